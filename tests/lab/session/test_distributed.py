"""Two processes of torchrun train what one process trains, and share what befalls them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankdecay.lab import cli, store
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention import runs
from rankdecay.lab.session.distributed import broadcast, process_group
from rankdecay.lab.store import read_metrics
from tests.comparing import timeless
from tests.lab.tiny import Repeat, make
from tests.ranks import on_ranks_of_torchrun, torchrun
from tests.waiting import HANG, until

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.held import hold
from tests.lab.session.test_distributed import outcome
folder, lines = Path(sys.argv[1]), int(sys.argv[2])
hold(folder / "run", "open", lines, ".lock")
print(outcome(folder, json.loads(sys.argv[3])))
"""


def outcome(folder: Path, changes: dict[str, Any], breaks: tuple[int, int] | None = None) -> str:
    """What a process of a run ends with: what it said and whether it has a summary, or the words of its error."""
    store.CHECKPOINT_RARITY = 0
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            summary = make(folder / "run", Repeat(breaks=breaks), **changes)
    except SettingError as error:
        return str(error)
    return said.getvalue() + ("summary" if summary else "nothing")


def held_at(folder: Path, lines: int, **changes: Any) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Two processes of torchrun, of which the first is held before it adds to so many lines."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(root=str(Path(__file__).parents[3])))
    return torchrun([str(script), str(folder), str(lines), json.dumps(changes)], folder / "log")


def together(folder: Path, breaks: tuple[int, int] | None = None, **changes: Any) -> list[str]:
    """What two processes of a run ended with."""
    return on_ranks_of_torchrun(2, outcome, folder, changes, breaks)


def test_alone_there_is_nobody_to_join(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu") as here:
        assert here == ("cpu", True)
        assert not torch.distributed.is_initialized()
        assert broadcast({"a": 1}) == {"a": 1}


def test_two_processes_train_what_one_does_also_after_all_were_killed(tmp_path):
    settings = {"arms": ("l2", "low_rank"), "strengths": ("l2=0", "low_rank=2"), "accumulate": 2, "steps": 48}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with held_at(tmp_path, 12, **settings) as group:
        in_the_second_run = lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 12  # noqa: E731
        until(in_the_second_run, group, (tmp_path / "log").read_text)
    written = metrics.read_bytes()
    assert not (tmp_path / "run" / "summary.json").exists()

    first, second = together(tmp_path, **settings)
    assert first.endswith("summary")
    assert second == "nothing"
    assert metrics.read_bytes().startswith(written[: written.index(b'"ended": true')])  # the first run stood
    make(tmp_path / "alone", **settings)
    ours, alone = (timeless(read_metrics(tmp_path / name)) for name in ("run", "alone"))
    told = ("arm", "strength", "seed", "step", "tokens", "ended")
    assert [[r.get(k) for k in told] for r in ours] == [[r.get(k) for k in told] for r in alone]
    for name in ("loss", "accuracy"):
        assert [r[name] for r in ours] == pytest.approx([r[name] for r in alone], rel=1e-4), name
    assert [r["train_loss"] for r in ours[1:9]] == pytest.approx([r["train_loss"] for r in alone[1:9]], rel=1e-4)
    models = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").glob("models/*/*"))
    assert len(models) == 2
    for path in models:
        one, other = (load_file(tmp_path / name / path) for name in ("run", "alone"))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)

    first, second = together(tmp_path, **settings)
    assert "is complete: showing its result" in first
    assert first.endswith("summary")
    assert second == "nothing"


def test_a_batch_that_two_cannot_share_is_refused_by_both(tmp_path):
    words = "--batch-size 6 cannot be shared evenly by 2 processes and --accumulate 2: give a multiple of 4"
    assert together(tmp_path, batch_size=6, accumulate=2) == [words, words]
    command = ["-m", "rankdecay", "recall", "--batch-size", "6", "--accumulate", "2", "--device", "cpu"]
    with torchrun([*command, "--out", str(tmp_path / "run")], tmp_path / "log") as group:
        assert group.wait(HANG) != 0
    assert words in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


def test_all_leave_a_run_that_diverges_together(tmp_path):
    first, second = together(tmp_path, (0, 9), seeds=2, skip_diverged=True)
    assert first.endswith("summary")
    assert second == "nothing"
    ended = [r for r in read_metrics(tmp_path / "run") if r.get("ended")]
    assert [(r["seed"], r["step"], r.get("diverged", False)) for r in ended] == [(0, 10, True), (1, 24, False)]
    alone = make(tmp_path / "alone", Repeat(breaks=(0, 9)), seeds=2, skip_diverged=True)
    assert ended[1]["loss"] == pytest.approx(alone["arms"][0]["loss"], rel=1e-4)


def test_the_first_process_chooses_the_precision_of_all(tmp_path):
    """Also where the others would choose otherwise: only rank 0 finds a directory that began in bfloat16."""
    out = tmp_path / "run"
    options = shlex.split(
        "--pairs 3 --queries 2 --keys 4 --values 4 --width 16 --heads 2 --batch-size 16 --steps 4 --warmup 2 "
        "--evaluate-every 4 --valid-sequences 64 --qk-norm off --arms l2 --strengths l2=0.1 --device cpu"
    )
    assert cli.main(["recall", *options, "--precision", "bfloat16", "--quiet", "--out", str(out)]) == 0
    alone = timeless(read_metrics(out))
    (out / "summary.json").unlink()
    (out / "metrics.jsonl").unlink()

    assert on_ranks_of_torchrun(2, chosen, ["recall", *options, "--out"], out) == [(0, "bfloat16"), (0, "bfloat16")]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["precision"] == "bfloat16"
    ours = timeless(read_metrics(out))
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in alone], rel=1e-2)


def chosen(command: list[str], out: Path) -> tuple[int, str]:
    """The exit code and the precision of a process; the second one's directory is of nobody."""
    taken = []
    make_plan = runs.make_plan

    def noted(settings, *arguments):
        taken.append(settings.precision)
        return make_plan(settings, *arguments)

    runs.make_plan = noted
    path = str(out) if os.environ["RANK"] == "0" else f"{out}-of-nobody"
    return cli.main([*command, path]), *taken
