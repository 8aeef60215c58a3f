"""An arm is named by its rule; what was stored or is typed under its older name counts as it."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from rankdecay import cli
from rankdecay.lab.ensemble.local import read_saved
from rankdecay.lab.ensemble.members import STATE
from rankdecay.lab.ensemble.outcome import key_of
from rankdecay.lab.experiment import load, read
from rankdecay.lab.experiments.boundary.settings import ALIASES
from rankdecay.lab.store import Checkpoint, RunDirectory
from tests.lab.lines import without_checksums

COMMAND = shlex.split(
    "boundary --task subtract --modulus 5 --arms none low_rank --strengths low_rank=1,10 --fractions 0.5 0.8 --seeds 1 "
    "--steps 40 --evaluate-every 20 --batch-size 8 --width 8 --mlp-width 8 --precision float32 --device cpu"
)


def rename(path: Path) -> None:
    """Give a file the name that the arm had before."""
    path.write_text(without_checksums(path.read_text()).replace('"prox"', '"low_rank"'))


@pytest.fixture
def older(tmp_path) -> Path:
    """A complete directory of before."""
    out = tmp_path / "run"
    assert cli.main([*COMMAND, "--quiet", "--out", str(out)]) == 0
    assert {json.loads(row)["arm"] for row in (out / "metrics.jsonl").read_text().splitlines()} == {"none", "prox"}
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        rename(out / name)
    return out


def test_a_complete_one_is_shown_under_the_name_of_today(older, capsys):
    before = (older / "metrics.jsonl").read_bytes()
    assert cli.main([*COMMAND, "--out", str(older)]) == 0
    shown = capsys.readouterr().out
    assert "is complete" in shown
    assert "\nprox" in shown
    notice, _, rest = shown.partition("\n")
    assert notice.startswith("--arms low_rank is an older name of prox")
    assert "low_rank" not in rest
    assert (older / "metrics.jsonl").read_bytes() == before
    run = read(load("boundary"), [older])
    assert run.arms == ["none", "prox"]
    assert run.summary is not None
    assert {cell["arm"] for arm in run.summary["arms"] for cell in arm["cells"]} == {"none", "prox"}
    assert {difference["reference"] for difference in run.summary["differences"]} == {"prox"}


def test_one_that_was_interrupted_computes_only_what_is_missing(older):
    rows = (older / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (older / "metrics.jsonl").write_bytes(b"".join(rows[:4]))
    (older / "summary.json").unlink()
    assert cli.main([*COMMAND, "--quiet", "--out", str(older)]) == 0
    after = (older / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert after[:4] == rows[:4]
    assert len(after) == len(rows) == 6
    assert [arm["name"] for arm in json.loads((older / "config.json").read_text())["arms"]] == ["none", "prox"]
    assert [arm["runs"] for arm in json.loads((older / "summary.json").read_text())["arms"]] == [2, 4]


def test_one_is_merged_with_one_of_today(older, tmp_path):
    assert cli.main([*COMMAND, "--first-seed", "1", "--quiet", "--out", str(tmp_path / "more")]) == 0
    run = read(load("boundary"), [older, tmp_path / "more"])
    assert run.arms == ["none", "prox"]
    assert len({key_of(row) for row in run.rows}) == len(run.rows) == 12


def test_a_trial_that_was_under_way_goes_on(tmp_path):
    with RunDirectory.open(tmp_path / "run", {"command": "boundary", "settings": {}, "arms": []}, print) as directory:
        tensors = {f"0.{name}": torch.ones(2) for name in STATE}
        runs = [[["low_rank", 1.0, 3.0, 0.5, 0], 20, 4.0, [{"step": 20}]]]
        directory.save_checkpoint(Checkpoint(0, tensors, {"runs": runs}), "under_way-0")
        [(key, saved)] = read_saved(directory, ALIASES).items()
    assert key == ("prox", 1.0, 3.0, 0.5, 0)
    assert (saved.state.step, saved.initial_rank, saved.records) == (20, 4.0, [{"step": 20}])


def test_strengths_of_both_names_are_of_one_arm(tmp_path):
    assert cli.main([*COMMAND, "--strengths", "low_rank=1", "prox=2", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["strength"] for row in rows} == {0.0, 2.0}  # the last one counts
