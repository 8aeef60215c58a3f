"""A run of the tests ends with what was skipped and how to have it run; every skip has such a reason."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG

HERE = Path(__file__).parent
TESTS = """
import pytest
@pytest.mark.parametrize("i", range(3))
@pytest.mark.skipif(True, reason="no browser: install one")
def test_page(i): ...
@pytest.fixture
def device(): pytest.skip("no device: buy one")
def test_device(device): ...
def test_passes(): ...
@pytest.mark.xfail(strict=True)
def test_not_yet(): assert False
"""
MODULE = "import pytest\npytest.importorskip('no_such_package', reason='no device: buy one')\n"


def run(folder: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-p", "tests.skipped", "-ra", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=HANG
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["one process", "two"])
def test_the_last_lines_count_what_was_skipped_by_reason(tmp_path, options):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_none.py").write_text(MODULE)
    *before, title, first, second, last = run(tmp_path, *options)
    assert any("short test summary" in line for line in before)
    assert "skipped, and how to have it run" in title
    assert (first, second) == (
        "3 tests skipped: no browser: install one",
        "1 test and 1 file skipped: no device: buy one",
    )
    assert "1 passed, 5 skipped, 1 xfailed" in last


def test_a_run_that_skips_nothing_does_not_mention_it(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_passes(): ...")
    assert not any("how to have it run" in line for line in run(tmp_path))


def test_every_skip_has_its_reason_in_one_place():
    """`tests/needs.py`, whose reasons name a remedy."""
    elsewhere = []
    for path in HERE.rglob("*.py"):
        if path.name in ("needs.py", "test_skipped.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("skipif", "importorskip"):
                elsewhere.append(f"{path.relative_to(HERE)}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.skip", "pytest.mark.skip"):
                reason = ast.unparse(node.args[0]) if node.args else ""
                if not reason.removeprefix("needs.").partition(".")[0].isupper():
                    elsewhere.append(f"{path.relative_to(HERE)}:{node.lineno}")
    assert elsewhere == []
