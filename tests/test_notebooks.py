"""The notebooks: every cell runs, in a kernel of its own, and what does not depend on rounding is what is stored.

`.ci/run` runs them: ``pytest -m slow tests/test_notebooks.py``. ``python .ci/notebooks.py`` stores their outputs anew.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import needs

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 200_000  # bytes


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """The script that runs notebooks."""
    for package in ("nbformat", "nbclient", "ipykernel"):
        needs.package(package)
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / ".ci" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def printed(cell: dict[str, Any]) -> str:
    """What a cell printed on standard output."""
    outputs = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join("".join(output["text"]) for output in outputs if output["name"] == "stdout")


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_small_and_whole(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in code)
    assert any("deterministic" in cell["metadata"].get("tags", []) for cell in code)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|tmp|work|root)/|Warning", text)
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (path.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter_client|nbclient|tornado).*")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path: Path, runner: ModuleType) -> None:
    ran = runner.executed(path)
    for stored, cell in zip(cells(path), ran.cells, strict=True):
        if "deterministic" in stored["metadata"].get("tags", []):
            assert printed(cell) == printed(stored)
        if stored["cell_type"] == "code":
            assert not [output for output in cell.outputs if output.get("name") == "stderr"]
            assert [o.output_type for o in cell.outputs] == [o["output_type"] for o in stored["outputs"]]
