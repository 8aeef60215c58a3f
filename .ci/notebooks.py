"""Run the notebooks and store what they print: ``python .ci/notebooks.py [NAME...]``.

Every notebook of `notebooks/` runs from the first cell to the last in a kernel of its own, without the network, and is
written back with its outputs, without anything that differs from run to run: times, numbers of executions, paths.
`tests/test_notebooks.py` runs them too and compares the cells tagged ``deterministic``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
LARGEST = 200_000  # bytes of a notebook with its outputs
SECONDS = 300  # of a cell


def executed(path: Path) -> Any:
    """Return a notebook after running it in an empty directory; raises at a cell that does.

    Args:
        path: the notebook.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    # IPython's own settings and history would be those of whoever runs this; matplotlib draws into the notebook.
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(IPYTHONDIR=folder, MPLBACKEND="module://matplotlib_inline.backend_inline", NO_COLOR="1")
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources=resources, coalesce_streams=True
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(names: list[str]) -> None:
    """Run the notebooks of these names, or all, and write them back."""
    import nbformat

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        text = nbformat.writes(executed(path)) + "\n"
        if len(text.encode()) > LARGEST:
            sys.exit(f"{path.name} has {len(text.encode())} bytes with its outputs: at most {LARGEST}")
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(text.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
