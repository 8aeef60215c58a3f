"""Blocks of the documents' pages, as `.ci/walk.py` reads them, for tests that run them in this process."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("walk", ROOT / ".ci" / "walk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


walk = _loaded()


def python_blocks(page: str) -> list[str]:
    """The Python of a page that runs here, parts of a file included, in order."""
    found = walk.blocks((ROOT / page).read_text(encoding="utf-8"))
    return [block.code for block in found if block.language == "python" and block.kind != "elsewhere"]
