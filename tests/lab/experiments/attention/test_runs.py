"""The grid, what is stored of it, and what an interruption or a loss that is no number costs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import run
from rankdecay.lab.experiments.attention.runs import Command, all_runs, make_experiment, make_plan
from rankdecay.lab.experiments.attention.settings import AttentionDecay
from rankdecay.lab.store import read_metrics
from tests.comparing import contents, timeless
from tests.lab.tiny import Repeat, check, make, settings
from tests.waiting import HANG

ROOT = Path(__file__).parents[4]


# --- the grid ---


def test_every_cell_of_the_grid_is_a_run():
    grid = AttentionDecay(
        arms=("l2", "low_rank"), strengths=("l2=1,0", "low_rank=3"), mlp_decays=(0.1, 1.0, 0.1), qk_norm="both", seeds=2
    )
    runs = all_runs(grid)
    assert len({tuple(run.key.values()) for run in runs}) == len(runs) == 3 * 2 * 2 * 2
    assert [run.seed for run in runs] == [0] * 12 + [1] * 12
    assert [(run.arm, run.strength, run.mlp_decay) for run in runs[:6]] == [
        ("l2", 0.0, 0.1), ("l2", 1.0, 0.1), ("l2", 0.0, 1.0), ("l2", 1.0, 1.0), ("low_rank", 3.0, 0.1),
        ("low_rank", 3.0, 1.0),
    ]  # fmt: skip
    plain = all_runs(dataclasses.replace(grid, qk_norm="off"), has_mlp=False)
    assert len(plain) == 3 * 2
    assert {(run.mlp_decay, run.qk_norm, "mlp" in run.decays) for run in plain} == {(None, False, False)}


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"--batch-size 8 .* 1 processes and --accumulate 3: give a multiple of 3"):
        make(tmp_path / "run", accumulate=3)
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_only_an_order_to_compile_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match=r"--compile on needs a compiler .*: give --compile off"):
        make_plan(settings(tmp_path, compile="on", precision="float32"), "cpu")
    assert not make_plan(settings(tmp_path, compile="auto", precision="float32"), "cpu").compile


# --- a whole experiment ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    make(out, arms=("l2", "low_rank"), strengths=("l2=0", "low_rank=2"), seeds=2, quiet=True)
    return out


def read(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def config_of(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


def test_what_a_directory_holds(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".lock", "config.json", "metrics.jsonl", "models", "report.html", "summary.json",
    ]  # fmt: skip
    records = read_metrics(finished)
    runs = [(arm, strength, seed) for seed in (0, 1) for arm, strength in (("l2", 0.0), ("low_rank", 2.0))]
    told = [(r["arm"], r["strength"], r["seed"], r["step"], r.get("ended", False)) for r in records]
    assert told == [(*run, step, step == 24) for run in runs for step in (0, 6, 12, 18, 24)]
    summary = read(finished)
    assert summary["command"] == "language"
    assert [(cell["name"], cell["seeds"], cell["diverged"]) for cell in summary["arms"]] == [
        ("l2", 2, 0), ("low_rank", 2, 0),
    ]  # fmt: skip
    for cell in summary["arms"]:
        last = [r["loss"] for r in records if r["arm"] == cell["name"] and r.get("ended")]
        assert cell["loss"] == pytest.approx(sum(last) / 2)
    first, second = (cell["mean"]["query_key"]["effective_rank"] for cell in summary["arms"])
    assert second < first
    assert not {"out", "device", "skip_diverged", "save"} & set(summary["settings"])


def test_the_models_of_the_first_seed_are_kept(finished):
    kept = finished / "models"
    assert sorted(p.name for p in kept.iterdir()) == ["l2_0_mlp_0.1_seed_0", "low_rank_2_mlp_0.1_seed_0"]
    weights = load_file(kept / "l2_0_mlp_0.1_seed_0" / "model.safetensors")
    model = Repeat().model(0, False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    [row] = [r for r in read_metrics(finished) if (r["arm"], r["seed"], r["step"]) == ("l2", 0, 24)]
    with torch.no_grad():
        assert Repeat().evaluate(model, "cpu").loss == row["loss"]


@pytest.mark.parametrize(("keep", "count"), [("all", 2), ("none", 0)])
def test_which_models_are_kept_is_a_choice(tmp_path, keep, count):
    make(tmp_path / "run", seeds=2, steps=6, save=keep, quiet=True)
    assert len(list((tmp_path / "run").glob("models/*"))) == count


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"--out .*file/run cannot be written .*: choose a directory"):
        make(tmp_path / "file" / "run")


def test_no_progress_and_no_table_when_quiet_and_lines_otherwise(tmp_path, capsys):
    make(tmp_path / "quiet", steps=6, quiet=True)
    assert capsys.readouterr() == ("", "")
    make(tmp_path / "json", steps=6, json=True)
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if not line.startswith("expected time")]  # of a slow machine
    assert lines[0] == "language · 1 runs · 6 steps · cpu"
    assert lines[1].startswith("low_rank 2, MLP 0.1, seed 0  step 6  loss ")


# --- interrupted ---


def test_an_interrupted_experiment_goes_on_with_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rankdecay.lab.store.CHECKPOINT_RARITY", 0)  # one at each evaluation
    make(tmp_path / "straight", seeds=2)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", Repeat(stops=24 + 14), seeds=2)
    assert len(read_metrics(tmp_path / "run")) == 5 + 3
    again = Repeat()
    capsys.readouterr()
    make(tmp_path / "run", again, seeds=2)
    assert again.asked == [(1, step) for step in range(12, 24)]
    assert "continuing low_rank 2, MLP 0.1, seed 1 at step 12" in capsys.readouterr().out
    whole, other = (read_metrics(tmp_path / name) for name in ("straight", "run"))
    assert timeless(other) == timeless(whole)
    walls = [row["wall"] for row in other]
    assert walls == sorted(walls)


def test_a_larger_grid_is_added_to_a_complete_run(tmp_path, capsys):
    """The same rows and summary as of the larger grid from the start."""
    larger = {"arms": ("l2", "low_rank"), "strengths": ("l2=0,1", "low_rank=2"), "seeds": 2}
    make(tmp_path / "straight", **larger)
    make(tmp_path / "run", arms=("l2",), strengths=("l2=0",), seeds=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    make(tmp_path / "run", seeds=1, arms=("l2", "low_rank"), strengths=("l2=0,1", "low_rank=2"))
    added = Repeat()
    make(tmp_path / "run", added, **larger)
    assert {seed for seed, _ in added.asked} == {1}
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(before)
    whole, other = (timeless(read_metrics(tmp_path / name)) for name in ("straight", "run"))
    assert sorted(map(str, other)) == sorted(map(str, whole))
    assert [arm["name"] for arm in config_of(tmp_path / "run")["arms"]] == ["l2", "low_rank"]
    cells = [
        {(c["name"], c["strength"]): timeless(c) for c in read(tmp_path / name)["arms"]} for name in ("straight", "run")
    ]
    assert cells[0] == cells[1]
    capsys.readouterr()
    nothing = Repeat()
    make(tmp_path / "run", nothing, arms=("l2",), strengths=("l2=0",), seeds=1)  # a part of what is there
    assert nothing.asked == []
    assert "is complete: showing its result; a larger grid would be added to it" in capsys.readouterr().out
    make(tmp_path / "run", **larger | {"first_seed": 5, "seeds": 1})
    assert [cell["averaged_seeds"] for cell in read(tmp_path / "run")["arms"]] == [[0, 1, 5]] * 3


@pytest.mark.parametrize("cut", [20, 4000])
def test_a_complete_run_that_lost_lines_is_refused_and_not_trained_again(finished, tmp_path, cut):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    before = contents(tmp_path / "run")
    grid = {"arms": ("l2", "low_rank"), "strengths": ("l2=0", "low_rank=2"), "seeds": 2}
    for more in ({}, {"seeds": 5}):
        with pytest.raises(SettingError, match=r"lines, and summary.json was made from .*: restore it from a copy"):
            make(tmp_path / "run", **grid | more)
        assert contents(tmp_path / "run") == before


def test_every_command_that_made_a_run_is_on_its_page(tmp_path):
    for seeds in (1, 1, 2, 3, 2):  # the second and the last add nothing
        make(tmp_path / "run", command=f"rankdecay tiny --seeds {seeds}", seeds=seeds)
    config = config_of(tmp_path / "run")
    assert [one["reproduce"][-1] for one in config["earlier"]] == ["1", "2"]
    assert config["reproduce"][-1] == "3"
    assert [one["settings"]["seeds"] for one in [*config["earlier"], config]] == [1, 2, 3]
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(page.count(f"<code>rankdecay tiny --seeds {seeds}</code>") == 1 for seeds in (1, 2, 3))
    config["earlier"].append("rankdecay tiny")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match=r"config.json: its earlier has 'rankdecay tiny'; restore the file"):
        make(tmp_path / "run", seeds=3)


def test_another_machine_that_the_same_command_ran_on_is_kept(tmp_path):
    make(tmp_path / "run", seeds=1)
    config = config_of(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"machine": "a first machine"}))
    make(tmp_path / "run", seeds=2)
    assert [one["machine"] for one in config_of(tmp_path / "run")["earlier"]] == ["a first machine"]
    assert f"<dd>a first machine; {config['machine']}</dd>" in (tmp_path / "run" / "report.html").read_text()


def test_notices_are_for_what_is_trained(tmp_path, capsys):
    command = Command(
        "language", {"default": AttentionDecay()}, check, lambda _: Repeat(), "tokens", notices=lambda _: ["a notice"]
    )
    for shown in (1, 0):  # complete the second time
        run(make_experiment(command), settings(tmp_path / "run"), "rankdecay tiny")
        assert capsys.readouterr().out.count("a notice") == shown


def test_an_interrupted_run_is_not_dropped_by_a_grid_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr("rankdecay.lab.store.CHECKPOINT_RARITY", 0)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", Repeat(stops=24 + 14), seeds=2)
    kept = ("checkpoint.safetensors", "config.json")
    before = [(tmp_path / "run" / name).read_bytes() for name in kept]
    for more in ({}, {"strengths": ("low_rank=2,3",)}):  # nothing that is missing, something that is
        with pytest.raises(
            SettingError, match=r"has an interrupted run \(arm low_rank, strength 2.0, .* seed 1\) that .*ask"
        ):
            make(tmp_path / "run", seeds=1, command="rankdecay tiny --seeds 1", **more)
        assert [(tmp_path / "run" / name).read_bytes() for name in kept] == before
    make(tmp_path / "run", seeds=2)
    assert read(tmp_path / "run")["arms"][0]["seeds"] == 2


def test_a_run_that_diverged_can_be_noted_or_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("rankdecay.lab.store.CHECKPOINT_RARITY", 0)
    for name in ("noted", "dropped"):
        with pytest.raises(SettingError, match="leave this strength out, or give --skip-diverged"):
            make(tmp_path / name, Repeat(breaks=(1, 14)), seeds=2)
        with pytest.raises(
            SettingError, match=r"with --skip-diverged\); or remove .*checkpoint.safetensors to drop it"
        ):
            make(tmp_path / name, seeds=1)
    make(tmp_path / "noted", Repeat(breaks=(1, 14)), seeds=2, skip_diverged=True)
    (tmp_path / "dropped" / "checkpoint.safetensors").unlink()
    make(tmp_path / "dropped", seeds=1)
    assert [read(tmp_path / name)["arms"][0]["diverged"] for name in ("noted", "dropped")] == [1, 0]
    assert {row["seed"] for row in read_metrics(tmp_path / "dropped")} == {0}


def test_a_run_of_before_grids_could_grow_takes_more_seeds(tmp_path):
    make(tmp_path / "run", seeds=1)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["arms"] = [arm | {"strengths": [2.0]} for arm in config["arms"]]
    del config["fixed"]
    path.write_text(json.dumps(config | {"settings": config["settings"] | {"dropout": 0.1}}))
    with pytest.raises(SettingError, match=r"dropout is 0.1 there, None now"):  # which a later version has removed
        make(tmp_path / "run", seeds=2)
    path.write_text(json.dumps(config))
    make(tmp_path / "run", seeds=2)
    assert read(tmp_path / "run")["arms"][0]["seeds"] == 2
    with pytest.raises(SettingError, match=r"steps is 24 there, 30 now"):
        make(tmp_path / "run", seeds=2, steps=30)


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.lab.tiny import make

def run(name):
    make(Path(name), arms=("l2", "low_rank"), strengths=("l2=0", "low_rank=2"), seeds=2, every=5, quiet=True)

make(Path("warm"), steps=6, quiet=True)  # whatever is imported on the way is there for every child
begun = time.monotonic()
run("straight")
took = time.monotonic() - begun
random.seed(3)
kills = 0
while True:
    child = os.fork()
    if child == 0:
        run("run")
        os._exit(0)
    time.sleep(random.uniform(0, took / 3) * (1 + kills / 10))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] != 0:
        kills += 1
    elif kills >= 2:
        break
    else:  # it was faster than the run before, which was to say how long one takes: anew, with shorter waits
        shutil.rmtree("run")
        took, kills = took / 2, 0
print("kills", kills)
"""


def test_killed_at_any_moment_the_same_command_gives_the_same_numbers(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED).format(root=str(ROOT)))
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("kills")[-1]) >= 2
    assert timeless(read_metrics(tmp_path / "run")) == timeless(read_metrics(tmp_path / "straight"))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (tmp_path / "straight").iterdir()}
    for path in (tmp_path / "straight").glob("models/*/*"):
        assert (tmp_path / "run" / path.relative_to(tmp_path / "straight")).read_bytes() == path.read_bytes()
    ours, theirs = ([cell["loss"] for cell in read(tmp_path / name)["arms"]] for name in ("run", "straight"))
    assert ours == theirs


# --- no number ---


def test_a_run_that_diverges_stops_with_where_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("rankdecay.lab.store.CHECKPOINT_RARITY", 0)
    out = tmp_path / "run"
    with pytest.raises(SettingError) as error:
        make(out, Repeat(breaks=(1, 14)), seeds=2)
    for words in ("step 15", "low_rank 2", "seed 1", "--lr 0.01", "of step 12", str(out / "checkpoint.safetensors")):
        assert words in str(error.value)
    records = read_metrics(out)
    assert [(r["seed"], r["step"]) for r in records] == [(0, s) for s in (0, 6, 12, 18, 24)] + [(1, 0), (1, 6), (1, 12)]
    assert json.loads((out / "config.json").read_text())["command"] == "language"

    # the remedy that the message names, in the same directory
    summary = make(out, Repeat(breaks=(1, 14)), seeds=2, skip_diverged=True)
    [cell] = summary["arms"]
    assert (cell["seeds"], cell["diverged"]) == (2, 1)
    assert cell["loss"] == records[4]["loss"]
    assert read_metrics(out)[:8] == records
    assert not (out / "checkpoint.safetensors").exists()
    assert [p.name for p in (out / "models").iterdir()] == ["low_rank_2_mlp_0.1_seed_0"]


def test_with_skip_diverged_the_sweep_goes_on(tmp_path, capsys):
    problem = Repeat(breaks=(0, 3))
    summary = make(tmp_path / "run", problem, seeds=2, skip_diverged=True)
    [cell] = summary["arms"]
    assert (cell["seeds"], cell["diverged"]) == (2, 1)
    ended = [r for r in read_metrics(tmp_path / "run") if r.get("ended")]
    assert [(r["seed"], r["step"], r.get("diverged", False)) for r in ended] == [(0, 4, True), (1, 24, False)]
    assert "low_rank 2, MLP 0.1, seed 0 diverged at step 4: continuing with the next run" in capsys.readouterr().out


def test_where_every_run_diverges_there_is_a_summary(tmp_path):
    [cell] = make(tmp_path / "run", Repeat(breaks=(0, 0)), skip_diverged=True)["arms"]
    assert (cell["seeds"], cell["diverged"], cell["loss"]) == (1, 1, None)
