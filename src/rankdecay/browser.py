"""Pages that a command has written, opened in a browser. Does not import torch."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path

from rankdecay.files import real
from rankdecay.text import visible


def show_page(path: str | Path) -> None:
    """Open a page in a browser, that of ``$BROWSER`` if it is set, or say on standard error that there is none."""
    try:
        shown = webbrowser.open(real(path).as_uri())
    except (webbrowser.Error, OSError):
        shown = False
    if not shown:
        print(f"no browser could be started: open {visible(str(path))} in one, or set BROWSER", file=sys.stderr)
