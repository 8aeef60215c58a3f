"""Run directories that commit 02dcd16 wrote, interrupted or complete, are continued, shown and reported."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from rankdecay import cli
from rankdecay.lab.store import read_metrics

STORED = Path(__file__).parent / "directories_02dcd16"
COMPLETE = ("factor", "margin", "vision")
INTERRUPTED = ("grok", "boundary", "recall", "language")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[Path, list[str]]:
    """A directory of the command, and the command line that wrote it: its defaults are those of a preset today."""
    command = request.param
    shutil.copytree(STORED, tmp_path / "runs")
    shutil.copy(STORED / "text.txt", tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    out = Path("runs") / command
    words = shlex.split(json.loads((out / "config.json").read_text())["reproduce"])[1:]
    return out, [*words, "--preset", "standard"]


@pytest.mark.parametrize("copied", INTERRUPTED, indirect=True)
def test_an_interrupted_one_is_continued(copied: tuple[Path, list[str]]) -> None:
    out, command = copied
    before = read_metrics(out)
    assert before
    assert cli.main(command) == 0
    after = read_metrics(out)
    assert len(after) > len(before)
    assert all(row in after for row in before)
    assert json.loads((out / "summary.json").read_text())["arms"]
    assert (out / "report.html").exists()


@pytest.mark.parametrize("copied", COMPLETE, indirect=True)
def test_a_complete_one_is_shown(copied: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    out, command = copied
    before = (out / "metrics.jsonl").read_bytes()
    assert cli.main([word for word in command if word != "--quiet"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("copied", [*COMPLETE, *INTERRUPTED], indirect=True)
def test_every_one_has_a_page_as_it_is(copied: tuple[Path, list[str]]) -> None:
    out, _ = copied
    assert cli.main(["report", str(out)]) == 0
    assert "<title>rankdecay" in (out / "report.html").read_text(encoding="utf-8")
