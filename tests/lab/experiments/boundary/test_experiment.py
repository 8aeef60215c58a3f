"""`rankdecay boundary` through its own functions and the command line, at sizes that train in a second."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rankdecay.cli import main
from rankdecay.lab.cli import parse
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import run as run_experiment
from rankdecay.lab.experiments.boundary import experiment as module
from rankdecay.lab.experiments.boundary.arms import make_arms
from rankdecay.lab.experiments.boundary.experiment import EXPERIMENT, make_plan, training_sets, trials
from rankdecay.lab.experiments.boundary.settings import PLACEMENT, PRESETS, Boundary, check, fixed
from rankdecay.lab.settings import NOT_IDENTITY
from tests.lab.lines import without_checksums
from tests.waiting import HANG, until

TINY = Boundary(
    task="subtract",
    modulus=5,
    arms=("none", "l2", "smooth", "uniform_attention"),
    strengths=("l2=1,10", "smooth=5,10"),
    fractions=(0.5, 0.8),
    seeds=2,
    steps=40,
    evaluate_every=20,
    batch_size=8,
    width=8,
    mlp_width=8,
    widen=0,
    precision="float32",
    quiet=True,
)
OPTIONS = shlex.split(
    "boundary --task subtract --modulus 5 --arms none l2 --strengths l2=1,10 --fractions 0.5 0.8 --seeds 2 --steps 40 "
    "--evaluate-every 20 --batch-size 8 --width 8 --mlp-width 8 --widen 0 --precision float32"
)


def run(settings, command):
    return run_experiment(EXPERIMENT, settings, command)


def arms_of(settings):
    return {arm.name: arm for arm in make_arms(settings)}


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def lines(directory: Path) -> set[str]:
    return set((directory / "metrics.jsonl").read_text().splitlines())


def figures(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("seconds", "crc")}


def test_a_sweep_leaves_a_row_per_run_and_the_settled_keys(tmp_path):
    summary = run(dataclasses.replace(TINY, out=tmp_path / "run"), "rankdecay boundary")
    found = rows(tmp_path / "run")
    assert len(found) == (1 + 2 + 2 + 1) * 2 * 2
    assert {row["outcome"] for row in found} <= {"generalised", "budget", "diverged"}
    assert [arm["name"] for arm in summary["arms"]] == list(TINY.arms)
    for arm in summary["arms"]:
        assert arm["seeds"] == 2
        for cell in arm["cells"]:
            assert {"train_fraction", "strength", "seeds", "generalised", "steps_to_generalise"} <= cell.keys()
        assert {"train_fraction", "low", "high", "strength"} <= arm["boundary"].keys()
    assert summary["command"] == "boundary"
    assert summary["wall_seconds"] > 0
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored == json.loads(json.dumps(summary))
    assert "<html" in (tmp_path / "run" / "report.html").read_text()[:200]
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_larger_grid_computes_only_what_is_missing(tmp_path):
    small = dataclasses.replace(TINY, out=tmp_path / "run", seeds=1, fractions=(0.5,), arms=("none", "smooth"))
    small = dataclasses.replace(small, strengths=("smooth=5",))
    run(small, "")
    before = lines(tmp_path / "run")
    assert len(before) == 2
    summary = run(dataclasses.replace(TINY, out=tmp_path / "run"), "")
    assert before < lines(tmp_path / "run")  # byte for byte as they were
    assert len(rows(tmp_path / "run")) == 24
    keys = [
        tuple(row[k] for k in ("arm", "strength", "rest_decay", "train_fraction", "seed"))
        for row in rows(tmp_path / "run")
    ]
    assert len(set(keys)) == 24
    whole = run(dataclasses.replace(TINY, out=tmp_path / "whole"), "")
    for one, other in zip(summary["arms"], whole["arms"], strict=True):
        assert one == other


def test_only_the_strengths_asked_for_get_new_seeds(tmp_path):
    settings = dataclasses.replace(TINY, out=tmp_path / "run", arms=("smooth",), strengths=("smooth=1,2",), seeds=1)
    run(settings, "")
    run(dataclasses.replace(settings, strengths=("smooth=2",), seeds=2), "")
    assert sorted((row["strength"], row["seed"]) for row in rows(tmp_path / "run") if row["train_fraction"] == 0.5) == [
        (1.0, 0),
        (2.0, 0),
        (2.0, 1),
    ]


def test_a_smaller_grid_later_keeps_the_larger_result(tmp_path):
    run(dataclasses.replace(TINY, out=tmp_path / "run"), "")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    summary = run(dataclasses.replace(TINY, out=tmp_path / "run", seeds=1), "")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert summary["arms"][0]["seeds"] == 2


def test_another_first_seed_adds_its_seeds_and_only_those(tmp_path):
    settings = dataclasses.replace(TINY, out=tmp_path / "run", arms=("none", "smooth"), strengths=("smooth=5",))
    both = run(settings, "")
    before = lines(tmp_path / "run")
    assert {row["seed"] for row in rows(tmp_path / "run")} == {0, 1}
    run(dataclasses.replace(settings, out=tmp_path / "second", first_seed=1, seeds=1), "")
    assert {row["seed"] for row in rows(tmp_path / "second")} == {1}
    second = [figures(row) for row in rows(tmp_path / "run") if row["seed"] == 1]
    assert sorted(map(str, second)) == sorted(str(figures(row)) for row in rows(tmp_path / "second"))

    more = run(dataclasses.replace(settings, first_seed=100, seeds=1), "")
    assert before < lines(tmp_path / "run")
    assert {row["seed"] for row in rows(tmp_path / "run")} == {0, 1, 100}
    assert [arm["seeds"] for arm in both["arms"]] == [2, 2]
    assert [arm["seeds"] for arm in more["arms"]] == [3, 3]


def test_rest_decay_is_an_axis(tmp_path):
    settings = dataclasses.replace(TINY, out=tmp_path / "run", rest_decays=(0.0, 1.0), arms=("none",), strengths=())
    summary = run(settings, "")
    assert {cell["rest_decay"] for cell in summary["arms"][0]["cells"]} == {0.0, 1.0}
    assert len(rows(tmp_path / "run")) == 8


def test_a_best_strength_at_the_edge_widens_the_grid(tmp_path):
    """With a threshold of nearly nothing every run generalises, so the best strength is where ties put it: an edge."""
    settings = dataclasses.replace(
        TINY, out=tmp_path / "run", arms=("smooth",), strengths=("smooth=1,2",), threshold=1e-9, widen=2
    )
    summary = run(settings, "")
    strengths = {cell["strength"] for cell in summary["arms"][0]["cells"]}
    edge = summary["arms"][0]["boundary"]["edge"]
    accuracies = [row["best_test_accuracy"] for row in rows(tmp_path / "run")]
    assert any(accuracies)
    assert strengths > {1.0, 2.0} or edge is None


def test_widening_a_complete_sweep_makes_its_summary_again(tmp_path):
    how = {"arms": ("smooth",), "strengths": ("smooth=1,2",), "threshold": 1e-9, "validation": 0, "widen": 0}
    settings = dataclasses.replace(TINY, out=tmp_path / "run", **how)
    first = run(settings, "")
    second = run(dataclasses.replace(settings, widen=3), "")
    cells = second["arms"][0]["cells"]
    assert len(cells) > len(first["arms"][0]["cells"])
    assert sum(cell["seeds"] for cell in cells) == len(rows(tmp_path / "run"))


def test_an_arm_that_sets_the_rest_is_run_once_whatever_the_rest_decays():
    settings = check(dataclasses.replace(TINY, arms=("l2_all",), strengths=("l2_all=1,2",), rest_decays=(1.0, 3.0)))
    keys = [trial.key for trial in trials(settings, arms_of(settings)["l2_all"], (1.0, 2.0))]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2


def test_every_arm_runs(tmp_path):
    settings = dataclasses.replace(
        TINY, out=tmp_path / "run", arms=("all",), strengths=(), fractions=(0.8,), seeds=1, steps=20
    )
    summary = run(settings, "")
    assert len(summary["arms"]) == 39
    for arm in summary["arms"]:
        assert arm["runs"] == len(arm["cells"])
        assert all(cell["diverged"] == 0 for cell in arm["cells"]), arm["name"]


def test_sampled_tasks_state_their_fraction_of_all_sequences(tmp_path):
    settings = dataclasses.replace(
        TINY,
        task="selection",
        fractions=(),
        train_examples=(20, 40),
        arms=("none",),
        strengths=(),
        out=tmp_path / "run",
    )
    run(settings, "")
    found = rows(tmp_path / "run")
    assert {row["train_examples"] for row in found} == {20, 40}
    assert {round(row["train_examples"] / row["train_fraction"]) for row in found} == {5**4 * 6}


def test_presets_are_the_published_grids():
    paper = check(PRESETS["paper"])
    assert paper.modulus == 97
    assert paper.fractions == (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
    for name in ("l2_all", "paper_a1", "paper_s5", "paper_s6"):
        assert arms_of(paper)[name].strengths == (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2)
    assert paper.threshold == 0.95
    prototype = check(PRESETS["prototype"])
    arms = arms_of(prototype)
    assert prototype.steps == 2500
    assert prototype.split == "ordered"
    assert prototype.fractions == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    for ours, labels in zip(arms["l2_all"].strengths, arms["prototype"].strengths, strict=True):
        assert ours == pytest.approx(10 * labels)
    assert len(list(trials(prototype, arms["prototype"], arms["prototype"].strengths))) == 36
    for settings in (paper, prototype):
        check(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "selektion"}, "did you mean 'selection'"),
        ({"fractions": (1.5,)}, "--fractions 1.5 is outside"),
        ({"steps": 50}, "--steps 40"),
        ({"arms": ("l3",)}, "--arms 'l3' is unknown: did you mean 'l2'"),
        ({"arms": ()}, "--arms is empty"),
        ({"strengths": ("l2=1,x",)}, "l2=1,3,10"),
        ({"strengths": ("l2=1000",)}, "below 500"),
        ({"strengths": ("truncate=1.5",), "arms": ("truncate",)}, "whole number"),
        ({"strengths": ("none=1",)}, "has no strength"),
        ({"strengths": ("sphere=1",)}, "--strengths 'sphere' is unknown"),
        ({"batch_size": 1000}, "smaller batch"),
        ({"rest_decays": (600.0,)}, "below 500"),
        ({"width": 6}, "multiple of the 4 heads"),
        ({"task": "selection"}, "use --train-examples"),
        ({"train_examples": (100,)}, "use --fractions"),
        ({"preset": "paper", "task": "selection", "fractions": ()}, "use --preset standard"),
        ({"gpu_share": 0.0}, "--gpu-share"),
        ({"threshold": 0.0}, "--threshold"),
        ({"places": -1}, "--places"),
    ],
)
def test_bad_settings_say_the_remedy_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(SettingError, match=message.replace("(", r"\(")):
        run(dataclasses.replace(TINY, out=tmp_path / "run", **changes), "")
    assert not (tmp_path / "run").exists()


def test_what_rows_share_leaves_out_what_may_differ():
    assert not set(fixed(TINY)) & {"seeds", "arms", "fractions", *PLACEMENT, *NOT_IDENTITY}
    assert {"task", "lr", "steps", "smoothing"} <= set(fixed(TINY))


def test_every_arm_is_made_of_the_same_data_sets(monkeypatch):
    training_sets.cache_clear()
    made = []
    real = module.make_dataset
    monkeypatch.setattr(module, "make_dataset", lambda *args, **of: made.append(of) or real(*args, **of))
    settings = check(dataclasses.replace(TINY, seeds=3))
    for arm in arms_of(settings).values():
        assert len(list(trials(settings, arm, (5.0,)))) == 3 * 2
    assert [(of["seed"], of["train_fraction"]) for of in made] == [(0, 0.5), (0, 0.8)]


def test_places_follow_the_device_and_a_short_sweep_is_not_compiled():
    for places, expected in ((0, 4), (7, 7)):
        settings = check(dataclasses.replace(TINY, places=places, precision="float32"))
        some = list(trials(settings, arms_of(settings)["none"], (0.0,)))
        plan = make_plan(settings, "cpu", some)
        assert (plan.places, plan.training.compile) == (expected, False)


def test_threads_and_ray_tasks_get_a_plan_with_the_precision_that_was_chosen():
    settings = check(dataclasses.replace(TINY, precision="auto"))
    some = list(trials(settings, arms_of(settings)["none"], (0.0,)))
    with pytest.raises(ValueError, match="precision 'auto' must be one of"):
        make_plan(settings, "cpu", some)
    for value in ("float32", "mixed"):
        chosen = dataclasses.replace(settings, precision=value)
        assert make_plan(chosen, "cpu", some).training.precision == value


def test_the_default_strengths_do_not_bind_a_command_that_names_other_arms(tmp_path):
    arguments = shlex.split(
        "boundary --task subtract --modulus 5 --arms none --fractions 0.5 --seeds 1 --steps 20 --evaluate-every 20 "
        "--batch-size 8 --width 8 --mlp-width 8 --precision float32 --quiet --out"
    )
    assert main([*arguments, str(tmp_path / "run")]) == 0
    assert [(row["arm"], row["strength"]) for row in rows(tmp_path / "run")] == [("none", 0.0)]
    assert main([*arguments, str(tmp_path / "other"), "--strengths", "l2=7"]) == 2
    assert not (tmp_path / "other").exists()


def test_the_default_and_the_standard_preset_are_grids_of_one_experiment():
    standard, default = (check(PRESETS[name]) for name in ("standard", "default"))
    assert fixed(standard) == fixed(default)  # so one directory can hold both
    assert standard.fractions == (0.5, 0.6, 0.7, 0.8)
    assert (standard.modulus, standard.steps, standard.widen, standard.seeds) == (31, 1200, 1, 3)
    arms = arms_of(standard)
    assert list(arms) == ["none", "l2", "prox", "smooth", "prototype", "uniform_attention"]
    assert set(standard.fractions) > set(default.fractions) - {0.65}
    for settings in (standard, default):
        check(settings)


def test_the_presets_are_the_defaults_of_their_own_command():
    assert parse(["boundary", "--preset", "paper"]).width == 128  # type: ignore[union-attr]
    assert parse(["boundary", "--preset=paper", "--width", "64"]).width == 64  # type: ignore[union-attr]
    assert parse(["grok"]).task == "selection"  # type: ignore[union-attr]


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    assert main([*OPTIONS, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "boundary" in shown
    assert "none" in shown
    assert "report.html" in shown
    assert main([*OPTIONS, "--out", str(tmp_path / "run"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["arms"][1]["name"] == "l2"
    assert "is complete" in captured.err
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("before", [[], ["--seeds", "1"]], ids=["at once", "after a smaller grid"])
def test_a_kill_before_the_page_was_made_leaves_it_to_the_next_time(tmp_path, monkeypatch, before):
    def interrupted(directory):
        raise KeyboardInterrupt

    command = [*OPTIONS, "--quiet", "--out", str(tmp_path / "run")]
    if before:
        assert main([*command, *before]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("rankdecay.lab.experiment.write_report", interrupted)
        assert main(command) == 130
    assert (tmp_path / "run" / "summary.json").exists()
    assert main(command) == 0
    page = (tmp_path / "run" / "report.html").read_bytes()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert page == (tmp_path / "run" / "report.html").read_bytes()


def test_killed_at_any_moment_the_same_command_finishes(tmp_path):
    """SIGKILL while rows are being written; what was stored stays byte for byte, nothing is there twice."""
    command = [*OPTIONS, "--steps", "200", "--quiet", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "rankdecay.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2, process)
    process.kill()
    process.communicate(timeout=HANG)
    stored = metrics.read_bytes().split(b"\n")[:-1]
    assert 2 <= len(stored) <= 12
    assert main(command) == 0
    after = metrics.read_bytes().split(b"\n")
    assert after[: len(stored)] == stored
    assert len(after) == 12 + 1
    assert main([*command[:-1], str(tmp_path / "whole")]) == 0
    resumed, straight = ({json.dumps(figures(r), sort_keys=True) for r in rows(tmp_path / d)} for d in ("run", "whole"))
    assert resumed == straight


def test_the_older_name_of_an_arm_is_its_rule(tmp_path):
    small = dataclasses.replace(TINY, out=tmp_path / "run", arms=("prox",), strengths=("prox=5",), seeds=1)
    run(small, "")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(
        without_checksums(path.read_text()).replace('"prox"', '"low_rank"')
    )  # as a sweep of before stored it
    before = lines(tmp_path / "run")
    older = dataclasses.replace(small, arms=("low_rank",), strengths=("low_rank=5,10",))
    summary = run(older, "")
    assert before < lines(tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 4
    assert [arm["name"] for arm in summary["arms"]] == ["prox"]
    assert summary["arms"][0]["runs"] == 4
