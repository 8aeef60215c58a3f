"""Attention against its SVMs: the science over twenty data sets, the figures, the files and what is refused."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from rankdecay import cli
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import draw_figure, write_report
from rankdecay.lab.experiment import run as run_experiment
from rankdecay.lab.experiments.margin.data import draw
from rankdecay.lab.experiments.margin.experiment import EXPERIMENT
from rankdecay.lab.experiments.margin.settings import FLOWS, Margin
from rankdecay.lab.report.terminal import print_summary
from rankdecay.lab.store import read_metrics
from tests.lab.experiments.margin.test_claims import arm

SMALL = Margin(
    parametrisation=FLOWS,
    datasets=3,
    dimension=8,
    examples=3,
    tokens=3,
    margin=1e3,
    rate=0.02,
    evaluate_every=50,
    quiet=True,
    device="cpu",
)
ARM_KEYS = {
    "name", "seeds", "datasets", "steps", "reached", "undecided", "infeasible", "optimal", "rank_short", "at", "each",
    "cosine_nuclear", "cosine_frobenius", "nuclear_excess", "frobenius_excess", "effective_rank", "stable_rank",
    "alignment", "loss", "loss_infimum", "log10_loss_excess", "margin", "nearer_nuclear", "cosine_between",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = dataclasses.replace(SMALL, out=tmp_path_factory.mktemp("margin") / "run", steps=2000)
    return settings, run(settings, "rankdecay margin")


def run(settings, command=""):
    return run_experiment(EXPERIMENT, settings, command)


# --- the science ---


def test_merged_goes_to_frobenius_and_separate_to_nuclear_in_every_one_of_twenty_data_sets(tmp_path):
    settings = dataclasses.replace(
        SMALL, datasets=20, parametrisation=("merged", "separate", "separate_l2"), out=tmp_path / "run", rate=0.01,
        dimension=10, examples=4, tokens=4, margin=1e6, steps=8000, init="random",
    )  # fmt: skip
    summary = run(settings)
    merged, separate, decayed = (arm(summary, name) for name in settings.parametrisation)
    assert (merged["nearer_nuclear"], separate["nearer_nuclear"], decayed["nearer_nuclear"]) == (0, 20, 20)
    assert merged["cosine_frobenius"] > 0.999
    assert decayed["cosine_nuclear"] > 0.995
    assert separate["cosine_nuclear"] > 0.97
    assert separate["nuclear_excess"] < 0.02
    slower = [found["nuclear_excess"] for found in separate["at"][1:]]
    assert slower == sorted(slower, reverse=True)  # it goes on shrinking with the margin


def test_finite_steps_and_a_trained_head_against_the_flow(tmp_path):
    """Normalised descent is where the flow is at the same margin; Adam is not; a head that an example does not hold
    leaves it with a small margin."""
    settings = dataclasses.replace(
        SMALL, datasets=3, parametrisation=("separate", "normalised", "adam", "trained_head"), out=tmp_path / "run",
        dimension=10, examples=6, tokens=8, margin=100, steps=8000, init="random", lr=0.05, beta2=0.9, epsilon=0.0,
        first_seed=100, rate=0.01,
    )  # fmt: skip
    summary = run(settings)
    flow, steps, adam, head = (arm(summary, name) for name in settings.parametrisation)
    assert flow["reached"] == steps["reached"] == adam["reached"] == 3
    at = flow["at"][-1]
    assert len(at["sets"]) == len(at["each"]["nuclear_excess"]) == at["datasets"]
    assert at["cosine_nuclear"] == pytest.approx(np.mean(at["each"]["cosine_nuclear"]), abs=1e-5)
    ends = [np.array(row["each"]["cosine_nuclear"]) for row in (flow, steps, adam)]
    assert np.abs(ends[0] - ends[1]).max() < 0.01
    assert (ends[0] - ends[2] > 0.02).all()
    assert head["each"]["supports"] == [6, 5, 6]
    assert min(head["each"]["cosine_head"]) > 0.9999
    margin = head["each"]["margin"]
    assert margin[1] < 4 < 20 < min(margin[0], margin[2])
    assert "cosine_head" not in flow["each"]


@pytest.mark.slow
def test_with_a_vanishing_l2_every_one_of_twenty_data_sets_is_at_the_nuclear_solution(tmp_path):
    settings = dataclasses.replace(
        SMALL, datasets=20, parametrisation=("separate_l2",), out=tmp_path / "run", rate=4e-3, dimension=10, examples=6,
        tokens=8, steps=400_000, evaluate_every=1000, init="random", l2=1e-60,
    )  # fmt: skip
    row = run(settings)["arms"][0]
    assert row["cosine_nuclear_least"] > 0.995
    assert row["nearer_nuclear"] == 20


@pytest.mark.slow
def test_diagonal_weights_go_to_the_l1_solution(tmp_path):
    """Theorem 4.1: the norm falls towards the least there is, by how much at margin 1e8 depends on the data."""
    settings = dataclasses.replace(
        SMALL, data="equal", parametrisation=("diagonal",), datasets=6, dimension=20, examples=4, tokens=3, margin=1e8,
        rate=2e-3, steps=80_000, evaluate_every=800, out=tmp_path / "run",
    )  # fmt: skip
    row = run(settings)["arms"][0]
    assert row["reached"] == row["nearer_nuclear"] == 6
    assert min(row["each"]["nuclear_excess"]) < 0.002
    assert row["nuclear_excess"] < 0.005
    excess = [found["nuclear_excess"] for found in row["at"]]
    assert excess == sorted(excess, reverse=True)


# --- the figures and files ---


def test_the_figures_of_a_small_run(finished):
    _, summary = finished
    assert summary["command"] == "margin"
    assert summary["wall_seconds"] > 0
    assert [row["name"] for row in summary["arms"]] == list(FLOWS)
    for row in summary["arms"]:
        assert row.keys() >= ARM_KEYS
        assert row["seeds"] == 3
        assert -1 <= row["cosine_nuclear"] <= 1
        assert len(row["each"]["cosine_nuclear"]) == 3
        assert row["cosine_nuclear"] == pytest.approx(np.mean(row["each"]["cosine_nuclear"]), abs=1e-5)
    for name in ("merged", "separate", "diagonal"):
        assert arm(summary, name)["reached"] == 3
        last = arm(summary, name)["at"][-2:]  # the first evaluation may have passed the smaller ones
        assert [(found["margin"], found["datasets"]) for found in last] == [(100, 3), (1000, 3)]


def test_the_files_of_a_small_run(finished):
    settings, summary = finished
    assert json.loads((settings.out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    lines = read_metrics(settings.out)
    assert "NaN" not in (settings.out / "metrics.jsonl").read_text()
    last = [line for line in lines if line["arm"] == "separate"][-1]
    assert last["datasets"] == [0, 1, 2]
    assert last["cosine_nuclear"] == arm(summary, "separate")["each"]["cosine_nuclear"]
    assert len(last["singular_values"]) == 3
    assert len(last["singular_values"][0]) == 8
    (snapshot,) = (settings.out / "snapshots").glob("*.npz")
    with np.load(snapshot) as arrays:
        assert arrays["tokens"].shape == (3, 3, 3, 8)
        assert arrays["separate_weights"].shape == (len(arrays["separate_steps"]), 3, 8, 8)
        assert arrays["separate_nuclear"].shape == (3, 8, 8)


def test_the_command_prints_json_and_a_table(tmp_path, capsys):
    options = (
        "--datasets 2 --dimension 8 --examples 2 --tokens 3 --margin 100 --rate 0.02 --evaluate-every 20 --device cpu"
    )
    arguments = ["margin", *options.split(), "--parametrisation", "merged", "separate"]
    assert cli.main([*arguments, "--json", "--out", str(tmp_path / "json")]) == 0
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert [row["name"] for row in summary["arms"]] == ["merged", "separate"]
    assert "2 data sets of 2 examples" in output.err
    assert cli.main([*arguments, "--out", str(tmp_path / "table")]) == 0
    output = capsys.readouterr().out
    assert "Frobenius" in output
    assert re.search(r"merged +2 ", output)
    assert "✓ K and Q apart come nearer the nuclear SVM as the margin grows: cosine" in output


def test_an_interrupted_run_begins_again(tmp_path):
    settings = dataclasses.replace(SMALL, parametrisation=("merged",), steps=60, out=tmp_path / "run")
    first = run(settings)
    (settings.out / "summary.json").unlink()
    lines = (settings.out / "metrics.jsonl").read_text()
    with (settings.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 80, "arm"')
    assert run(settings)["arms"] == first["arms"]
    assert (settings.out / "metrics.jsonl").read_text() == lines


def test_arms_are_stored_under_the_keys_they_always_had(finished):
    settings, _ = finished
    stored = json.loads((settings.out / "config.json").read_text())["arms"]
    assert [(one["name"], one["kind"], one["decay"], one["recipe"]) for one in stored[-3:]] == [
        ("low_rank", "merged", "low_rank", False),
        ("recipe", "separate", "l2", True),
        ("recipe_bare", "separate", None, True),
    ]


def test_page_table_and_figure_are_made_from_the_files(planar, summary, tmp_path, capsys):
    page = (planar / "report.html").read_text(encoding="utf-8")
    for row in summary["arms"]:
        assert f"{row['cosine_nuclear']:.4f} <small>least {row['cosine_nuclear_least']:.4f}</small>" in page
    print_summary(EXPERIMENT, summary)
    assert re.search(r"diagonal +3 ", capsys.readouterr().out)
    figure = draw_figure([planar], tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert "Cosine to the nuclear SVM" in figure


def test_a_row_says_which_data_sets_are_left_out_of_its_means(planar, summary, tmp_path):
    copy = shutil.copytree(planar, tmp_path / "copy")
    row = summary["arms"][0] | {"infeasible": 1, "undecided": 2, "cosine_nuclear": None, "log10_loss_excess": -12345.6}
    (copy / "summary.json").write_text(json.dumps(summary | {"arms": [row]}))
    page = write_report(copy).read_text(encoding="utf-8")
    assert "<td>1 <small>of 4: 1 select the inseparable, 2 select none</small>" in page
    assert "<td>-12,346</td>" in page


# --- what it refuses, and what it names ---


def test_inseparable_data_are_refused_or_named(tmp_path, capsys):
    crowded = dataclasses.replace(SMALL, examples=8, tokens=8, dimension=3, out=tmp_path / "run")
    with pytest.raises(SettingError, match=r"the data are inseparable: in none of 3 data sets .* fewer --examples"):
        run(crowded, "")
    some = dataclasses.replace(
        SMALL, parametrisation=("merged", "diagonal"), examples=5, tokens=8, out=tmp_path / "run"
    )
    capsys.readouterr()
    summary = run(some, "")  # the directory is free again
    assert summary["arms"][0]["name"] == "merged"
    assert "diagonal W" in capsys.readouterr().err


def test_equal_scores_are_refused_by_name(tmp_path):
    data = draw("generic", range(1), 2, 3, 4, 4.0)
    data.tokens[0, 1] = data.tokens[0, 1, :1]
    np.savez(tmp_path / "data.npz", tokens=data.tokens, queries=data.queries, heads=data.heads, labels=data.labels)
    settings = dataclasses.replace(SMALL, data=str(tmp_path / "data.npz"), out=tmp_path / "run")
    with pytest.raises(SettingError, match=r"data set 0, example 1: tokens . and . have the same best score"):
        run(settings)


def test_an_inner_dimension_below_the_rank_of_the_svm_is_named(tmp_path, capsys):
    settings = dataclasses.replace(
        SMALL, parametrisation=("separate",), inner=1, init="random", examples=4, out=tmp_path / "run", steps=1500
    )
    row = run(settings)["arms"][0]
    assert row["rank_short"]
    assert "needs a larger rank than --inner 1" in capsys.readouterr().err


def test_weights_that_select_nothing_are_counted_and_left_out(tmp_path, capsys):
    settings = dataclasses.replace(
        SMALL, parametrisation=("low_rank", "separate_l2"), l2=1e4, init="random", out=tmp_path / "run", steps=2000
    )
    row = run(settings)["arms"][1]
    assert row["name"] == "low_rank"
    assert row["undecided"] == 3
    assert row["cosine_nuclear"] is None
    assert "3 that selected none" in capsys.readouterr().err


@pytest.mark.parametrize("init", ["paper", "random"])
def test_the_first_seed_decides_data_and_initial_weights(tmp_path, init):
    """One data set of three alone ends where it ends among them."""
    settings = dataclasses.replace(SMALL, parametrisation=("separate",), init=init, steps=60)

    def margins(first: int, count: int) -> list[float]:
        out = tmp_path / f"{first}-{count}"
        run(dataclasses.replace(settings, first_seed=first, datasets=count, out=out), "")
        return read_metrics(out)[-1]["margin"]

    three = margins(100, 3)
    assert len(set(three)) == 3
    assert margins(102, 1) == pytest.approx(three[2:], rel=1e-9)
