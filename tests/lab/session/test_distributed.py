"""Two processes of torchrun train what one process trains, and share what befalls them."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankdecay.lab import cli
from rankdecay.lab.session.distributed import joined, share
from rankdecay.lab.store import read_metrics
from tests.lab.tiny import Repeat, make, timeless
from tests.ranks import torchrun
from tests.waiting import HANG, until

SCRIPT = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.lab.tiny import Repeat, make
from rankdecay.lab.errors import SettingError
from rankdecay.lab.session.distributed import leave
from tests.held import hold
import rankdecay.lab.store
rankdecay.lab.store.CHECKPOINT_RARITY = 0
breaks, changes, lines = json.loads(sys.argv[1])
if lines:
    hold(Path(sys.argv[2], "run"), "open", lines, ".lock")
said = Path(sys.argv[2], os.environ["RANK"])
try:
    summary = make(Path(sys.argv[2], "run"), Repeat(breaks=breaks), **changes)
except SettingError as error:
    said.write_text(str(error))
    other, end = said.with_name(str(1 - int(said.name))), time.monotonic() + 20
    while not other.exists() and time.monotonic() < end:  # torchrun ends it as soon as this one has left
        time.sleep(0.02)
    leave(3)
said.write_text("summary" if summary else "nothing")
leave(0)
"""


def started(
    folder: Path, breaks: tuple[int, int] | None = None, lines: int = 0, **changes: Any
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Two processes, of which the first is held before it adds to so many lines, if they are not 0."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(root=str(Path(__file__).parents[3])))
    return torchrun([str(script), json.dumps([breaks, changes, lines]), str(folder)], folder / "log")


def said(folder: Path) -> list[str]:
    return [(folder / rank).read_text() for rank in "01"]


def together(folder: Path, breaks: tuple[int, int] | None = None, **changes) -> int:
    """The exit status of two processes that ran to their end."""
    with started(folder, breaks, **changes) as group:
        return group.wait(HANG)


def log(folder: Path) -> str:
    return (folder / "log").read_text()


def test_alone_there_is_nobody_to_join(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined("cpu") as here:
        assert here == ("cpu", True)
        assert not torch.distributed.is_initialized()
        assert share({"a": 1}) == {"a": 1}


def test_two_processes_train_what_one_does_also_after_all_were_killed(tmp_path):
    settings = {"arms": ("l2", "low_rank"), "strengths": ("l2=0", "low_rank=2"), "accumulate": 2, "steps": 48}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with started(tmp_path, lines=12, **settings) as group:
        in_the_second_run = lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 12  # noqa: E731
        until(in_the_second_run, group, lambda: log(tmp_path))
    written = metrics.read_bytes()
    assert not (tmp_path / "run" / "summary.json").exists()

    assert together(tmp_path, **settings) == 0, log(tmp_path)
    assert said(tmp_path) == ["summary", "nothing"]
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

    assert together(tmp_path, **settings) == 0, log(tmp_path)  # complete
    assert said(tmp_path) == ["summary", "nothing"]
    assert "is complete: showing its result" in log(tmp_path)


def test_a_batch_that_two_cannot_share_is_refused_by_both(tmp_path):
    assert together(tmp_path, batch_size=6, accumulate=2) != 0
    for words in said(tmp_path):
        assert words == (
            "--batch-size 6 cannot be shared evenly by 2 processes and --accumulate 2: give a multiple of 4"
        )
    assert not (tmp_path / "run").exists()


def test_all_leave_a_run_that_diverges_together(tmp_path):
    assert together(tmp_path, (0, 9), seeds=2, skip_diverged=True) == 0, log(tmp_path)
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

    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(CHOICE))
    with torchrun([str(script), str(tmp_path), *options, "--out", str(out)], tmp_path / "log") as group:
        assert group.wait(HANG) == 0, log(tmp_path)
    assert said(tmp_path) == ["bfloat16", "bfloat16"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["precision"] == "bfloat16"
    ours = timeless(read_metrics(out))
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in alone], rel=1e-2)


CHOICE = """
import os, sys
from pathlib import Path
from rankdecay.lab import cli
from rankdecay.lab.experiments.attention import runs
from rankdecay.lab.session.distributed import leave

make_plan = runs.make_plan
rank = os.environ["RANK"]

def noted(settings, *arguments):
    Path(sys.argv[1], rank).write_text(settings.precision)
    return make_plan(settings, *arguments)

runs.make_plan = noted
arguments = sys.argv[2:]
if rank == "1":
    arguments[arguments.index("--out") + 1] += "-of-nobody"
leave(cli.main(["recall", *arguments]))
"""
