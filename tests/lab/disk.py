"""A disk that is full for one file, until there is space again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rankdecay import files


@contextmanager
def full_for(partial: Path) -> Iterator[None]:
    """Make the disk full for a file that is written under the name ``partial`` first."""
    fresh = files.fresh

    def opened(path: Path) -> Any:
        return open("/dev/full", "wb") if Path(path) == partial else fresh(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fresh", opened)
        yield
