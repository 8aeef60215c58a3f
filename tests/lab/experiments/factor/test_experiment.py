"""The matrix experiment: its figures, its files and what it refuses."""

import dataclasses
import json
import re

import numpy as np
import pytest

from rankdecay import cli
from rankdecay.lab.experiment import draw_figure, read, write_report
from rankdecay.lab.experiment import run as run_experiment
from rankdecay.lab.experiments.factor.experiment import EXPERIMENT
from rankdecay.lab.experiments.factor.fits import Diverged
from rankdecay.lab.experiments.factor.settings import ARMS, Factor
from rankdecay.lab.report.words import verdict
from rankdecay.lab.store import read_metrics

SMALL = Factor(seeds=4, strengths=(0.0, 0.1, 0.3), steps=400, quiet=True, device="cpu")
ARM_KEYS = {
    "name", "seeds", "strength", "target", "singular_values", "singular_values_low", "singular_values_high", "rank",
    "steps", "expected", "deviation", "deviation_largest", "settled", "collapsed", "borderline",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run of every arm: its directory and its summary."""
    settings = dataclasses.replace(SMALL, out=tmp_path_factory.mktemp("factor") / "run", steps=800, seeds=6)
    return settings, run(settings, "rankdecay factor")


def run(settings, command):
    return run_experiment(EXPERIMENT, settings, command)


def rows(summary, name):
    return [row for row in summary["arms"] if row["name"] == name]


# --- the figures ---


def test_the_figures_of_a_small_run(finished):
    settings, summary = finished
    assert summary["command"] == "factor"
    assert summary["wall_seconds"] > 0
    assert [row["name"] for row in summary["arms"]] == [name for name in ARMS for _ in settings.strengths]
    for row in summary["arms"]:
        assert row.keys() >= ARM_KEYS
        assert row["target"] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
        assert row["seeds"] == 6
    for name in ("factors", "momentum", "adam", "low_rank"):
        for row in rows(summary, name):
            expected = [max(s - row["strength"], 0) for s in (1, 0.8, 0.6, 0.4, 0.2)]
            assert row["singular_values"] == pytest.approx(expected, abs=1e-4)
            assert row["expected"] == pytest.approx(expected)
            if row["strength"]:
                assert row["settled"] == 6
    for row in rows(summary, "merged"):
        assert row["singular_values"] == pytest.approx([s / (1 + row["strength"]) for s in (1, 0.8, 0.6, 0.4, 0.2)])
        assert row["rank"] == 5
    assert [row["rank"] for row in rows(summary, "factors")] == [5, 5, 4]
    for row in rows(summary, "factors")[1:]:
        assert row["imbalance_rate"] == pytest.approx(0.2 * row["strength"], rel=0.05)
        assert row["imbalance_rate_low"] <= row["imbalance_rate"] <= row["imbalance_rate_high"]
        assert abs(row["solver"]["excess"]) < 1e-6
        assert row["optimality_gap_largest"] < 1e-4
    for row in rows(summary, "low_rank"):
        assert abs(row["solver"]["excess"]) < 1e-9
    for row in rows(summary, "decoupled")[1:]:
        assert row["expected"] is None
        assert row["imbalance"] > 0.05 * row["imbalance_initial"]
    kept = rows(summary, "factors")[0]
    assert 0.9 < kept["imbalance"] / kept["imbalance_initial"] < 1.05
    bound = summary["bound"]["factors"]
    # one seed per strength after every step, and all 18 problems at each of the 40 evaluations
    assert bound == {"checks": 760 * 3 + 40 * 18, "violations": 0, "largest_ratio": bound["largest_ratio"]}
    assert 0.1 < bound["largest_ratio"] < 1


def test_the_files_of_a_small_run(finished):
    settings, summary = finished
    assert json.loads((settings.out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    lines = read_metrics(settings.out)
    assert len([line for line in lines if line["arm"] == "factors"]) == 41 * 3
    last = next(line for line in lines if line["arm"] == "factors" and line["strength"] == 0.3 and line["step"] == 800)
    assert last["singular_values"] == rows(summary, "factors")[2]["singular_values"]
    assert last["gap_low"] <= last["gap"] <= last["gap_high"]
    with np.load(settings.out / "snapshots" / "00000800.npz") as arrays:
        assert arrays["singular_values"].shape == (7 * 3 * 6, 5)
        chosen = (arrays["arms"] == "deep") & (arrays["strengths"] == 0.3)
        found = np.median(arrays["singular_values"][chosen], axis=0)
        np.testing.assert_allclose(found, rows(summary, "deep")[2]["singular_values"])
        assert arrays["seeds"][chosen].tolist() == list(range(6))
    assert (settings.out / "report.html").exists()


def test_an_interrupted_run_begins_again(tmp_path):
    settings = dataclasses.replace(SMALL, steps=20, out=tmp_path / "run", arms=("merged",))
    first = run(settings, "")
    (settings.out / "summary.json").unlink()
    lines = (settings.out / "metrics.jsonl").read_text()
    with (settings.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "arm"')
    assert run(settings, "")["arms"] == first["arms"]
    assert (settings.out / "metrics.jsonl").read_text() == lines


def test_the_first_seed_decides_which_problems_are_fitted(tmp_path):
    settings = dataclasses.replace(SMALL, steps=20, target=("random",), size=5, arms=("factors", "merged"))

    def fitted(first: int, count: int) -> dict[int, np.ndarray]:
        """The targets and what was found at each strength, by seed."""
        out = tmp_path / f"{first}-{count}"
        run(dataclasses.replace(settings, first_seed=first, seeds=count, out=out), "")
        with np.load(next((out / "snapshots").glob("*.npz"))) as arrays:
            each = np.concatenate([arrays["target"], arrays["singular_values"]], axis=1)
            return {int(seed): each[arrays["seeds"] == seed] for seed in np.unique(arrays["seeds"])}

    three, last = fitted(100, 3), fitted(102, 1)
    assert list(three) == [100, 101, 102]
    assert list(last) == [102]
    np.testing.assert_allclose(last[102], three[102], rtol=1e-9)
    assert not np.allclose(three[101], three[102])


def test_completion_is_certified_without_a_closed_form(tmp_path):
    settings = dataclasses.replace(
        SMALL, arms=("factors", "low_rank"), size=6, target=("random",), target_rank=1, observed=0.8, strengths=(0.1,),
        seeds=5, steps=500, lr=0.15, out=tmp_path / "run",
    )  # fmt: skip
    summary = run(settings, "")
    for row in summary["arms"]:
        assert row["expected"] is None
        assert row["optimality_gap"] < 1e-2
        assert row["solver"]["excess"] < 1e-3
    assert rows(summary, "factors")[0]["rank"] == 1
    assert "completed the matrix as the nuclear norm would" in verdict_of(summary).headline


# --- what it refuses ---


@pytest.mark.parametrize("arm", ["factors", "low_rank", "deep", "decoupled"])
def test_a_learning_rate_that_diverges_is_named_with_one_that_does_not(tmp_path, arm):
    lr = 3.0 if arm != "decoupled" else 1e3
    settings = dataclasses.replace(SMALL, arms=(arm,), strengths=(1e-4,), lr=lr, out=tmp_path / "run", seeds=3)
    if arm == "decoupled":  # normalised steps are bounded: they end far off but do not explode by themselves
        settings = dataclasses.replace(settings, steps=500)
    with pytest.raises(Diverged, match=r"--lr .* is too large: \d of 3 problems of the arm .* is safe") as caught:
        run(settings, "")
    safe = float(str(caught.value).split("--lr ")[-1].split()[0])
    assert run(dataclasses.replace(settings, lr=safe, steps=20), "")["arms"][0]["seeds"] == 3  # the same directory


# --- the command, the report ---


def test_the_command_prints_a_table_and_what_it_means(tmp_path, capsys):
    arguments = ["factor", "--out", str(tmp_path / "run"), "--seeds", "2", "--strengths", "0", "0.1", "--steps", "60"]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "28 problems of 5×5" in output
    assert re.search(r"factors +\d", output)
    assert "✓ L2 on one matrix keeps its rank" in output
    assert str(tmp_path / "run" / "report.html") in output.replace("\n", "")
    assert cli.main(["factor", "--depth", "1"]) == 2
    assert "--depth 1 must be at least 2" in capsys.readouterr().err


def test_page_and_figure_are_made_from_the_files(finished):
    settings, _ = finished
    (settings.out / "report.html").unlink()
    page = write_report(settings.out).read_text(encoding="utf-8")
    assert "in every problem: 12 of 12 within 0.1 %" in page
    figure = draw_figure([settings.out], settings.out / "figure.svg").read_text(encoding="utf-8")
    assert "Imbalance of the factors" in figure


def verdict_of(summary):
    return verdict(summary, EXPERIMENT.headline, EXPERIMENT.checks, EXPERIMENT.styles)


def test_claims_follow_the_numbers(finished):
    _, summary = finished
    holds = {point.claim: point.holds for point in verdict_of(summary).points}
    assert holds["L2 on two factors ends at the soft threshold"]
    assert holds["The gap stays below the bound of Proposition B.4"]
    assert not holds["Decoupled decay balances the factors"]
    changed = json.loads(json.dumps(summary))
    for row in rows(changed, "factors"):
        row["settled"] = 2
        row["imbalance_rate"] *= 1.2
    changed["bound"]["factors"]["violations"] = 3
    outcome = verdict_of(changed)
    assert "seldom: 4 of 12" in outcome.headline
    points = {point.claim: point for point in outcome.points}
    assert not points["L2 on two factors ends at the soft threshold"].holds
    assert not points["‖AᵀA − BᵀB‖ decays at 2ηλ per step"].holds
    assert "λ = 0.1" in points["‖AᵀA − BᵀB‖ decays at 2ηλ per step"].text
    assert "3 of " in points["The gap stays below the bound of Proposition B.4"].text


def test_an_arm_that_did_not_run_leaves_its_claim_open(finished):
    _, summary = finished
    outcome = verdict_of({**summary, "arms": rows(summary, "deep")})
    assert "nothing to hold against" in outcome.headline
    assert "it is open whether L2 lowers rank without factors" in str(outcome)
    assert "not complete" in verdict_of(None).headline


def test_the_theory_is_drawn_beside_what_was_found(finished):
    settings, summary = finished
    spectra = next(s for s in EXPERIMENT.sections(read(EXPERIMENT, [settings.out]))).parts[0]
    lines = [line for line in spectra.lines if line.where == {"arm": "factors"}]
    theory, found = lines[:5], lines[5:]
    assert [line.mark for line in lines] == ["dashed"] * 5 + ["points"] * 5
    assert found[0].y == [row["singular_values"][0] for row in rows(summary, "factors")]
    at = np.interp([0.1, 0.3], theory[0].x, theory[0].y)
    np.testing.assert_allclose(at, found[0].y[1:], atol=1e-3)
