"""`rankdecay compress` as it is typed: the table, the checkpoint, JSON, refusals."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rankdecay.cli import main
from tests import needs
from tests.compress import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small.saved(tmp_path_factory.mktemp("llama"))


def _answer(capsys, *arguments: object, code: int = 0) -> str:
    assert main(["compress", *map(str, arguments)]) == code
    shown = capsys.readouterr()
    return shown.out if code == 0 else shown.err


def test_a_dry_run_shows_sizes_and_writes_nothing(folder, tmp_path, capsys):
    text = _answer(capsys, folder, "--dry-run")
    assert "cache bytes/token" in text
    assert "low energy does not mean low loss" in text
    assert "chosen without a text" in text
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_is_written(folder, tmp_path, capsys):
    text = _answer(capsys, folder, "--head-dim", 8, "--out", tmp_path / "made")
    assert "head size 16 → 8" in text
    assert str(tmp_path / "made") in text
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["head_dim"] == 8
    assert config["rope_parameters"]["rope_type"] == "longrope"
    assert len(config["rope_parameters"]["short_factor"]) == 4


def test_progress_that_nobody_reads_does_not_end_the_work(folder, tmp_path, capsys, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("rankdecay.commands.progress.PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", Closed())
    assert main(["compress", str(folder), "--head-dim", "8", "--out", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made" / "config.json").exists()
    assert "head size 16 → 8" in capsys.readouterr().out


@needs.full_disk
def test_a_full_disk_under_the_output_is_one_line(folder):
    command = [sys.executable, "-c", "from rankdecay.cli import console; console()"]
    with open("/dev/full", "w") as full:
        call = [*command, "compress", str(folder), "--dry-run"]
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "rankdecay: error: standard output cannot be written (No space left on device)\n"


def test_json(folder, capsys):
    answer = json.loads(_answer(capsys, folder, "--dry-run", "--head-dim", 4, "--sizes", 6, "--json"))
    assert answer["command"] == "compress"
    assert [size["head_dim"] for size in answer["sizes"]] == [16, 6, 4]
    assert len(answer["kept"]["all"]) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs --head-dim N"),
        (["--head-dim", "8"], "needs --out DIR"),
        (["--head-dim", "9", "--dry-run"], "(here: --head-dim N)"),
        (
            ["--dry-run", "--sizes", "8", "98"],
            "98 in sizes=[8, 98] must be smaller than 16, the size of the model's heads. (here: --sizes N ...)",
        ),
        (["--head-dim", "8", "--out", "."], "exists"),
        (["--head-dim", "8", "--out", f"{__file__}/made"], "name a directory where you may write"),
        (
            ["--head-dim", "8", "--dry-run", "--calibration", "nowhere.txt"],
            "nowhere.txt cannot be read (No such file or directory): name a text file for calibration=. (here: "
            "--calibration FILE)",
        ),
        (
            ["--head-dim", "8", "--dry-run", "--calibration", "."],
            "is a directory, not a regular file: name a text",
        ),
        (["--head-dim", "8", "--dry-run", "--calibration", __file__], "has no tokenizer"),
        (["--head-dims", "8"], "did you mean '--head-dim'"),
        (["--head-dim", "8", "--dry-run", "--window", "1", "--calibration", __file__], "window=1"),
        (["--head-dim", "8", "--dry-run", "--windows", "8"], "--windows is of a text: give one, --calibration FILE"),
    ],
)
def test_refusals(folder, capsys, arguments, says):
    text = _answer(capsys, folder, *arguments, code=2)
    assert text.startswith("rankdecay: error: ")
    assert text.count("\n") == 1
    assert says in text


def test_a_path_that_is_nothing(tmp_path, capsys):
    assert "is not a directory of save_pretrained" in _answer(
        capsys, tmp_path / "nothing", "--head-dim", 8, "--dry-run", code=2
    )
