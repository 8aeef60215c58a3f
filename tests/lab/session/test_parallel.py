"""However processes share a run, they train what one alone trains, and any others can go on with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import signal
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import rankdecay as rd
from rankdecay.cli import main
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.language.settings import Language, check
from rankdecay.lab.session.distributed import process_group
from rankdecay.lab.session.parallel import Layout, Parallel
from rankdecay.lab.session.session import Plan, Run, Session
from rankdecay.lab.settings import Record
from rankdecay.lab.store import Checkpoint, read_metrics
from tests.held import held
from tests.lab.tiny import Repeat
from tests.ranks import RankFailed, on_ranks, on_ranks_of_torchrun, torchrun
from tests.waiting import HANG, until

# a clip that always acts: an error of the norm would be one of the moments
PLAN = Plan(steps=20, batch_size=8, lr=1e-2, warmup=4, accumulate=2, clip=0.05)
ATTENTION = {"l2": rd.Frobenius(2.0), "low_rank": rd.LowRank(5.0, unit="head", every=4)}


@dataclasses.dataclass
class Trained:
    losses: list[float]
    record: Record
    checkpoint: Checkpoint
    weights: dict[str, torch.Tensor]


def train(parallel: Parallel, arm: str, steps: int = 10, begin: bytes | None = None) -> Trained:
    """One run, or what follows the checkpoint of one. With QK-norm, whose gains tensor parallelism shares out too."""
    decays = {"query_key": ATTENTION[arm], "value_output": rd.Frobenius(1.0), "mlp": rd.Frobenius(0.5)}
    plan = dataclasses.replace(PLAN, layout=Layout(parallel))
    session = Session(Run(arm, 1.0, 0.5, True, 0, decays), Repeat(), plan)
    if begin is not None:
        session.restore(pickle.loads(begin))
    session.evaluate()  # leaves no trace
    for _ in session.train(steps):
        pass
    return Trained(session._losses, session.evaluate(), session.checkpoint(), session.whole_model().state_dict())


def train_all(parallel: Parallel, arms: list[str]) -> list[Trained]:
    return [train(parallel, arm) for arm in arms]


@pytest.fixture(scope="module")
def alone() -> dict[str, Trained]:
    return {arm: train("ddp", arm) for arm in ATTENTION}


def numbers(layers: list[Record]) -> list[float]:
    return [value for layer in layers for part in layer.values() for value in part.values() if value is not None]


# --- one run ---


@pytest.mark.parametrize(("parallel", "world"), [("ddp", 2), ("fsdp2", 2), ("tp", 2), ("fsdp2_tp", 4)])
def test_processes_train_what_one_does(parallel, world, alone):
    arms = ["l2", "low_rank"] if world == 2 else ["low_rank"]
    first, *others = on_ranks(world, train_all, parallel, arms)
    for its, expected in zip(first, [alone[arm] for arm in arms], strict=True):
        assert its.losses == pytest.approx(expected.losses, rel=1e-5)
        assert its.record["loss"] == pytest.approx(expected.record["loss"], rel=1e-5)
        assert its.record["tokens"] == expected.record["tokens"]
        assert numbers(its.record["layers"]) == pytest.approx(numbers(expected.record["layers"]), rel=1e-3, abs=1e-3)
        ours, theirs = its.checkpoint.tensors, expected.checkpoint.tensors
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4 * float(theirs[name].abs().max()))
        assert all(torch.equal(weight, ours[f"model.{name}"]) for name, weight in its.weights.items())
    for each in others:
        assert [its.losses for its in each] == [its.losses for its in first]
        assert not any(its.record or its.checkpoint.tensors for its in each)


def test_any_processes_go_on_with_what_others_began(alone):
    begin, losses = None, []
    for world, parallel in [(2, "fsdp2"), (2, "tp"), (4, "fsdp2_tp"), (1, "fsdp2")]:
        which = (parallel, "low_rank", 3 if begin is None else 2, begin)
        last = on_ranks(world, train, *which)[0] if world > 1 else train(*which)
        begin, losses = pickle.dumps(last.checkpoint), losses + last.losses
    assert losses == pytest.approx(alone["low_rank"].losses[:9], rel=1e-5)


# --- what cannot be shared ---


@pytest.mark.parametrize("count", [2, 3, 5])
def test_pairs_need_an_even_number_of_processes(monkeypatch, count):
    monkeypatch.setattr("rankdecay.lab.session.distributed.processes", lambda: count)
    with pytest.raises(SettingError, match=rf"--parallel fsdp2_tp cannot use {count} processes: start 4, 6, 8, … of"):
        Layout("fsdp2_tp")


def test_the_first_pair_shares_a_batch_with_the_second(monkeypatch):
    monkeypatch.setattr("rankdecay.lab.session.distributed.processes", lambda: 4)
    monkeypatch.setattr("rankdecay.lab.session.distributed.rank", lambda: 2)
    found = {parallel: Layout(parallel) for parallel in ("ddp", "fsdp2", "tp", "fsdp2_tp")}
    assert {parallel: (its.data_rank, its.data_parallel_size) for parallel, its in found.items()} == {
        "ddp": (2, 4), "fsdp2": (2, 4), "tp": (0, 1), "fsdp2_tp": (1, 2),
    }  # fmt: skip


def test_heads_and_units_have_to_be_shared_evenly(monkeypatch):
    monkeypatch.setattr("rankdecay.lab.session.distributed.processes", lambda: 4)
    Layout("tp").check(heads=8, mlp_width=0)
    Layout("fsdp2").check(heads=3, mlp_width=7)
    message = r"--parallel tp cannot share --heads 6 among 4 processes: give a multiple of 4, or --parallel fsdp2"
    with pytest.raises(SettingError, match=message):
        Layout("tp").check(heads=6, mlp_width=16)
    with pytest.raises(SettingError, match="--parallel fsdp2_tp cannot share --mlp-width 15 among 2 processes"):
        Layout("fsdp2_tp").check(heads=6, mlp_width=15)


def test_a_loss_scaler_is_for_whole_models():
    check(Language(precision="float16"))
    check(Language(precision="bfloat16", parallel="tp"))
    with pytest.raises(SettingError, match="--precision float16 needs a loss scaler, which --parallel fsdp2 has not"):
        check(Language(precision="float16", parallel="fsdp2"))
    with pytest.raises(SettingError, match="--parallel 'fsdp' is unknown: did you mean 'fsdp2'"):
        check(Language(parallel="fsdp"))  # type: ignore[arg-type]


# --- processes that are lost ---


def outlive(seconds: float, folder: Path) -> str:
    """What a process says when the other says nothing, or has left."""
    try:
        with process_group("cpu", timedelta(seconds=seconds)) as (_, first):
            torch.distributed.barrier()
            (folder / f"met{first}").touch()
            if not first:
                until((folder / "gave up").exists)
            torch.distributed.barrier()
    except SettingError as error:
        (folder / "gave up").touch()
        return str(error)
    return "nothing"


def arguments(out: Path, text: Path) -> list[str]:
    """A run of language with little to do in a step, but many of them: it has to be found in the middle."""
    return [
        "language", "--text", str(text), "--out", str(out), "--arms", "low_rank", "--strengths", "low_rank=2",
        "--width", "16", "--depth", "1", "--heads", "2", "--mlp-width", "16", "--context", "16", "--steps",
        "120", "--evaluate-every", "10", "--warmup", "10", "--valid-windows", "8", "--batch-size", "4", "--device",
        "cpu", "--parallel", "fsdp2",
    ]  # fmt: skip


def test_a_run_of_which_one_process_is_killed_goes_on_when_it_is_started_again(tmp_path):
    text, out = tmp_path / "text", tmp_path / "run"
    text.write_text("a decay of attention of its own, " * 200)
    log = out.with_suffix(".log")
    in_the_middle = held(*arguments(out, text), lines=5, file="checkpoint.safetensors")[1:]
    with torchrun(in_the_middle, log) as group:
        until(lambda: (out / "checkpoint.safetensors").exists() and len(read_metrics(out)) >= 5, group, log.read_text)
        second = [p for p in psutil.Process(group.pid).children() if p.environ().get("RANK") == "1"]
        second[0].send_signal(signal.SIGKILL)
        assert group.wait(HANG) != 0
    said = log.read_text()
    assert "Signal 9 (SIGKILL) received by PID" in said
    assert not (out / "summary.json").exists()

    with torchrun(["-m", "rankdecay.cli", *arguments(out, text)], log) as group:
        assert group.wait(HANG) == 0, log.read_text()
    said = log.read_text()
    assert said.count("continuing low_rank 2") == 1
    assert main([*arguments(tmp_path / "alone", text), "--quiet"]) == 0
    ours, alone = (read_metrics(tmp_path / name) for name in ("run", "alone"))
    assert [(r["arm"], r["step"], r["tokens"]) for r in ours] == [(r["arm"], r["step"], r["tokens"]) for r in alone]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in alone], rel=1e-4)
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "alone"))
    assert one["settings"] == other["settings"]
    assert [arm["loss"] for arm in one["arms"]] == pytest.approx([arm["loss"] for arm in other["arms"]], rel=1e-4)
    models = sorted(path.relative_to(out) for path in out.glob("models/*/*.safetensors"))
    assert len(models) == 1
    for path in models:
        saved, expected = load_file(out / path), load_file(tmp_path / "alone" / path)
        assert saved.keys() == expected.keys()
        for name in saved:
            torch.testing.assert_close(saved[name], expected[name], rtol=1e-2, atol=1e-3)


def test_a_process_that_waits_in_vain_says_so(tmp_path):
    for seconds in (1, 10, 100):  # of patience: enough for both to meet, on whatever machine
        folder = tmp_path / str(seconds)
        folder.mkdir()
        with contextlib.suppress(RankFailed):
            said = on_ranks_of_torchrun(2, outlive, seconds, folder)
            if len(list(folder.glob("met*"))) == 2:
                break
    for rank, words in enumerate(said):
        assert words.startswith(
            f"process {rank} of 2 lost contact with another process (exited, or silent for {seconds} s): see"
        )
        assert "rerun the command to continue from the last checkpoint" in words
