"""Parts of every page: the template filled in, embedded JSON, and the pieces of HTML that pages share.

Words and tables are plain HTML, readable without a script. Text from a run or a checkpoint goes through `html.escape`,
and JSON through `embedded`. Nothing is fetched: a content-security policy in `assets/shell.html` forbids it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from rankdecay import files

SNAPSHOT_NUMBERS = 1_000_000  # of spectra and attention in one page, about 7 MB; what does not fit is thinned


def asset(name: str, package: str | None, parts: Mapping[str, str]) -> str:
    """A file of a package, with `{{name}}` in it replaced by HTML."""
    return _substituted((resources.files(package or "rankdecay.lab.report") / name).read_text(encoding="utf-8"), parts)


def _substituted(text: str, parts: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def fill(
    template: str, parts: Mapping[str, str], styles: Sequence[str], scripts: Sequence[str], package: str = ""
) -> str:
    """A page as one HTML string: a template inside `assets/shell.html`.

    Args:
        template: the name of a file in `assets/`; `{{name}}` in it, and in the shell, is replaced by a part.
        parts: HTML by name; `title`, `data` and `plotly` are for the shell.
        styles: names of style sheets, as `{{css}}`.
        scripts: names of scripts, as `{{js}}`.
        package: of an experiment, whose folder may hold any of these files, or else the one above it; `assets/` has
            the others.
    """
    folders = [resources.files("rankdecay.lab.report") / "assets"]
    if package:
        above = package.rpartition(".")[0]
        folders[:0] = [resources.files(package), *([resources.files(above)] if above else [])]

    def joined(names: Iterable[str]) -> str:
        paths = [next(folder / name for folder in folders if (folder / name).is_file()) for name in names]
        return "\n".join(path.read_text(encoding="utf-8") for path in paths)

    body = _substituted(joined([template]), parts)
    shell = {"css": joined(styles), "js": joined(scripts), "plotly": "", **parts, "body": body}
    return _substituted(joined(["shell.html"]), shell)


def write(text: str, path: Path) -> Path:
    """Put a page at `path`, by atomic rename, and return the path."""
    return files.write(path, text.encode("utf-8", "backslashreplace"))  # half a character, of a name, is spelled


def embedded(value: Any) -> str:
    """JSON for a `<script type="application/json">`: nothing in it can end the script or open a comment."""
    text = json.dumps(as_json(value), separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def as_json(value: Any) -> Any:
    """A value as JSON holds it: numpy arrays as lists, floats to four digits, non-finite numbers as null."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


# --- pieces ---


def notices(texts: Iterable[str]) -> str:
    """Notices that a reader must know before believing a page."""
    return "".join(f'<p class="notice">{escape(text)}</p>' for text in texts)


def absent(text: str) -> str:
    """Placeholder where a page has nothing to show."""
    return f'<p class="absent">{escape(text)}</p>'


def choice(state: str, label: str, choices: Mapping[Any, Any], chosen: Any = None) -> str:
    """A labelled choice that a script reads as `state[...]`; the first is chosen unless another is named."""
    options = "".join(
        f'<option value="{escape(str(value))}"{" selected" if chosen is not None and value == chosen else ""}>'
        f"{escape(str(text))}</option>"
        for value, text in choices.items()
    )
    return f'<label>{escape(label)} <select data-state="{state}">{options}</select></label>'
