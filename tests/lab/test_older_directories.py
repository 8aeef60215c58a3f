"""Run directories of earlier versions continue: they have no `first_seed`, no `precision` object, and a `preset`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankdecay import cli
from rankdecay.lab import experiment
from rankdecay.lab.settings import identity
from rankdecay.lab.store import read_metrics
from tests.comparing import sorted_rows
from tests.lab.interruption import interrupt

DATA = Path(__file__).parents[2] / "docs" / "data"
COMMANDS = {
    "grok": (
        "grok --modulus 7 --train-examples 200 --width 16 --mlp-width 16 --batch-size 64 --seeds 2 "
        "--arms none low_rank --steps 20 --evaluate-every 10"
    ),
    "boundary": (
        "boundary --task subtract --modulus 5 --arms none l2 --strengths l2=1,10 --fractions 0.5 0.8 --seeds 2 "
        "--steps 40 --evaluate-every 20 --batch-size 8 --width 8 --mlp-width 8"
    ),
    "recall": (
        "recall --pairs 3 --queries 2 --keys 4 --values 4 --width 16 --heads 2 --batch-size 16 --steps 8 --warmup 2 "
        "--evaluate-every 4 --valid-sequences 64 --qk-norm off --arms l2 low_rank --strengths l2=0.1 low_rank=1"
    ),
}
NARROW = {"grok": "mixed", "boundary": "mixed", "recall": "bfloat16"}
CASES = [(command, precision) for command in COMMANDS for precision in ("float32", NARROW[command])]
CHECKPOINTS = {"grok": 2, "boundary": 3, "recall": 1}  # after which some of the steps are done


def words(command: str, *options: str) -> list[str]:
    return [*shlex.split(COMMANDS[command]), "--device", "cpu", *options]


def go(command: str, out: Path, *options: str) -> int:
    return cli.main([*words(command, *options), "--out", str(out)])


def as_before(out: Path, preset: str | None = None) -> None:
    """Give config.json the form that it had before precisions were chosen."""
    path = out / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("precision")["value"] == config["settings"]["precision"]
    assert config["settings"].pop("first_seed") == 0
    if preset is not None:
        config["settings"]["preset"] = preset
        if "fixed" in config:
            config["fixed"]["preset"] = preset
    path.write_text(json.dumps(config))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def files(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("command", "kept"), CASES)
def test_an_interrupted_one_goes_on_from_its_checkpoint_in_its_precision(
    tmp_path: Path, command: str, kept: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert go(command, whole, "--precision", kept, "--quiet") == 0
    interrupt(words(command, "--precision", kept, "--quiet"), out, CHECKPOINTS[command])
    as_before(out, {"grok": "default", "boundary": "small"}.get(command))

    assert go(command, out) == 0  # --precision auto
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["precision"] == kept
    assert sorted_rows(out) == sorted_rows(whole)
    assert (out / "report.html").exists()


def test_a_row_of_an_older_sweep_is_not_computed_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert go("boundary", out, "--precision", "float32", "--quiet") == 0
    as_before(out, "small")
    rows = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join(rows[:7]))
    (out / "summary.json").unlink()

    assert go("boundary", out, "--quiet") == 0
    after = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert after[:7] == rows[:7]
    assert len(after) == len(rows) == 12


@pytest.mark.parametrize("command", COMMANDS)
def test_a_complete_one_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    out = tmp_path / "run"
    assert go(command, out, "--precision", "float32", "--quiet") == 0
    as_before(out)
    edit(out / "summary.json", lambda summary: summary.pop("precision"))
    before = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()

    assert go(command, out) == 0
    shown = capsys.readouterr().out
    assert "is complete" in shown
    assert "precision" not in shown  # which is not known to have been chosen
    assert (out / "metrics.jsonl").read_bytes() == before
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_another_precision_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    out, kept = tmp_path / "run", NARROW[command]
    interrupt(words(command, "--precision", kept, "--quiet"), out)
    as_before(out)
    before = files(out)
    capsys.readouterr()
    assert go(command, out, "--precision", "float32", "--quiet") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"precision is '{kept}' there, 'float32' now" in line
    assert files(out) == before


@pytest.mark.parametrize("stored", ["grok_standard", "margin/standard", "recall/standard", "vision/standard"])
def test_the_standard_preset_is_what_the_stored_runs_of_before_had(stored: str) -> None:
    """So `--preset standard` continues a directory that was begun with no option at all."""
    config = json.loads((DATA / stored / "config.json").read_text())
    standard = experiment.presets(config["command"])["standard"]
    now = json.loads(json.dumps(identity(standard, experiment.load(config["command"]).not_identity)))
    added = {"first_seed", "warmup", "amount", "lr", "beta2", "epsilon"} - config["settings"].keys()
    resolved = {"precision", "validation"}
    assert {k: v for k, v in now.items() if k not in {*resolved, *added}} == {
        k: v for k, v in config["settings"].items() if k not in {*resolved, "preset"}
    }


@pytest.mark.parametrize("command", ["grok", "boundary"])
def test_a_directory_goes_on_with_the_validation_set_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """None in a directory of before; another one that is asked for is refused."""
    out = tmp_path / "run"
    interrupt(words(command, "--validation", "0", "--quiet"), out)
    config = json.loads((out / "config.json").read_text())
    for key in ("settings", "fixed"):
        config.get(key, {}).pop("validation", None)
    (out / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert go(command, out, "--validation", "1000", "--quiet") == 2
    assert "validation is 0 there, 1000 now" in capsys.readouterr().err
    assert go(command, out, "--quiet") == 0
    assert all("validation_accuracy" not in row for row in read_metrics(out))
    other = tmp_path / "other"
    assert go(command, other, "--quiet") == 0
    assert all("validation_accuracy" in row for row in read_metrics(other))
    pages = [(run / "report.html").read_text(encoding="utf-8") for run in (out, other)]
    assert ["validation accuracy" in page for page in pages] == [False, True]
