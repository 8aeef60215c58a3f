import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special

from rankdecay.lab.experiments.boundary.statistics import (
    MOST_POINTS,
    boundary,
    cells,
    differences,
    edges,
    events,
    fit_boundary,
    paired,
    reference,
    summarise,
)
from rankdecay.lab.report.words import wilson_interval

FRACTIONS = [0.1, 0.15, 0.225, 0.3375]  # equal steps of log f
STEP = math.log(1.5)


def _row(arm="prox", strength=0.0, fraction=0.1, seed=0, generalised=True, **more):
    return {
        "arm": arm,
        "strength": strength,
        "rest_decay": 1.0,
        "train_fraction": fraction,
        "train_examples": round(1000 * fraction),
        "seed": seed,
        "outcome": "generalised" if generalised else "budget",
        "steps_to_generalise": 400 + 100 * seed if generalised else None,
        "steps": 1000,
        "budget": 1000,
        "test_accuracy": 1.0 if generalised else 0.25,
        "best_test_accuracy": 1.0 if generalised else 0.5,
        "train_accuracy": 1.0,
        "stable_rank": 2.0 if generalised else 8.0,
        "memorised_at": 100,
        "rank_fell_at": 200 if generalised else None,
        "accuracy_rose_at": 300 if generalised else None,
        "curve": {},
        "spectrum": [],
    } | more


def _rows(counts, seeds=3, fractions=FRACTIONS, **more):
    """One column: the first `counts[i]` of the seeds generalise at `fractions[i]`."""
    return [
        _row(fraction=fraction, seed=seed, generalised=seed < count, **more)
        for fraction, count in zip(fractions, counts, strict=True)
        for seed in range(seeds)
    ]


def _fit(counts, runs=3, fractions=FRACTIONS):
    return fit_boundary(fractions, counts, [runs] * len(fractions))


def _simulated(rng, log_f, log_f50, width, seeds):
    return rng.binomial(seeds, special.expit((log_f - log_f50) / width))


# the logistic fit


@given(st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_the_fit_is_the_maximum_that_an_optimiser_finds(counts):
    x, k = np.log(FRACTIONS), np.array(counts)

    def loss(parameters):
        z = (x - parameters[0]) / math.exp(parameters[1])
        prior = -0.5 * (parameters[1] - math.log(0.4 * STEP)) ** 2
        return -(k @ special.log_expit(z) + (5 - k) @ special.log_expit(-z) + prior)

    bounds = [(x[0] - STEP / 2, x[-1] + STEP / 2), (math.log(0.05 * STEP), math.log(3 * STEP))]
    starts = [(start, math.log(w * STEP)) for start in (*x, x[0] + STEP / 2) for w in (0.2, 1.0)]
    best = min((optimize.minimize(loss, start, bounds=bounds) for start in starts), key=lambda result: result.fun)
    fit = _fit(counts, 5)
    inside = min(max(best.x[0], x[0]), x[-1])
    here = (math.log(fit.f50), math.log(fit.width or math.exp(best.x[1])))
    # within two points of the grid, or as likely as the optimum, where the likelihood is flat or has two peaks
    assert abs(here[0] - inside) < STEP / 12 or loss(here) < best.fun + 0.05


def test_with_many_runs_the_prior_does_not_matter():
    x = np.log(FRACTIONS)
    k = np.array([40, 180, 320, 390])

    def loss(parameters):
        z = (x - parameters[0]) / parameters[1]
        return -(k @ special.log_expit(z) + (400 - k) @ special.log_expit(-z))

    pure = optimize.minimize(loss, (x[1], STEP), method="Nelder-Mead").x
    fit = _fit(k, 400)
    assert math.log(fit.f50) == pytest.approx(pure[0], abs=STEP / 24)
    assert fit.width == pytest.approx(pure[1], rel=0.1)
    assert fit.low < fit.f50 < fit.high < 1.2 * fit.low


def test_separated_cells_put_the_boundary_in_the_middle_of_the_gap():
    fit = _fit([0, 0, 3, 3])
    assert fit.f50 == pytest.approx(math.sqrt(0.15 * 0.225))
    assert fit.censored is None
    assert math.log(fit.high / fit.low) > 0.8 * STEP  # three runs on either side do not say where in the gap
    assert math.log(fit.high / fit.f50) == pytest.approx(math.log(fit.f50 / fit.low), rel=1e-6)


def test_a_boundary_below_every_fraction_is_censored():
    fit = _fit([3, 3, 3, 3])
    assert (fit.f50, fit.censored, fit.low, fit.width) == (pytest.approx(0.1), "below", None, None)
    assert 0.1 <= fit.high < 0.15


def test_a_boundary_above_every_fraction_is_censored():
    fit = _fit([0, 0, 0, 0])
    assert (fit.f50, fit.censored, fit.high) == (pytest.approx(0.3375), "above", None)
    assert 0.225 < fit.low <= fit.f50
    assert _fit([0, 0, 0, 1]).censored == "above"  # most runs still fail at the highest


@pytest.mark.parametrize(("count", "censored"), [(0, "above"), (1, "above"), (2, None), (3, "below"), (4, "below")])
def test_a_single_fraction(count, censored):
    fit = fit_boundary([0.3], [count], [4])
    assert fit.f50 == pytest.approx(0.3)
    assert fit.censored == censored
    assert (fit.low is None) or (fit.high is None)


def test_a_fraction_of_almost_everything():
    fit = fit_boundary([0.5, 0.999], [0, 0], [3, 3])
    assert (fit.f50, fit.censored) == (pytest.approx(0.999), "above")


def test_fractions_may_come_in_any_order():
    ahead, back = _fit([0, 1, 3, 3]), fit_boundary(FRACTIONS[::-1], [3, 3, 1, 0], [3] * 4)
    assert (ahead.f50, ahead.low, ahead.high) == (back.f50, back.low, back.high)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_no_interval_is_empty_and_each_contains_its_boundary(counts):
    fit = _fit(counts)
    low, high = fit.low or 0.0, fit.high or 1.0
    assert low <= fit.f50 * (1 + 1e-12)
    assert fit.f50 <= high * (1 + 1e-12)
    assert math.log(high / max(low, 1e-3)) > 0.3 * STEP


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4).map(sorted), st.integers(0, 3))
def test_one_more_success_never_raises_a_boundary_whose_counts_rise(counts, cell):
    more = sorted([*counts[:cell], min(counts[cell] + 1, 3), *counts[cell + 1 :]])
    assert _fit(more).f50 <= _fit(counts).f50 * (1 + 1e-12)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("fractions", [4, 6])
def test_the_interval_covers_the_boundary_as_often_as_it_says(seeds, fractions):
    rng = np.random.default_rng(seeds * 10 + fractions)
    x = math.log(0.08) + STEP * np.arange(fractions)
    covered = []
    for i in range(400):
        width = (0.05, 0.2, 0.5, 1.0)[i % 4] * STEP
        truth = rng.uniform(x[0] - STEP, x[-1] + STEP)  # also boundaries that the grid misses
        fit = fit_boundary(np.exp(x), _simulated(rng, x, truth, width, seeds), [seeds] * fractions)
        covered.append((fit.low or 0.0) <= math.exp(truth) <= (fit.high or math.inf))
    assert 0.93 <= statistics.fmean(covered) <= 0.995


@pytest.mark.parametrize("fractions", [np.linspace(0.1, 0.9, 8), [1e-6, 0.5, 0.5001, 0.5002, 0.9]])
def test_the_grid_of_a_fit_is_bounded_however_irregular_the_fractions(fractions):
    """What keeps a page of forty columns quick."""
    fit = fit_boundary(fractions, [3] * len(fractions), [5] * len(fractions))
    assert len(fit.logs) <= MOST_POINTS + 1


# cells


def test_a_cell_counts_its_seeds():
    (cell,) = cells([_row(seed=0), _row(seed=1), _row(seed=2, generalised=False, outcome="diverged")])
    assert (cell["seeds"], cell["generalised"], cell["diverged"]) == (3, 2, 1)
    assert (cell["generalised_low"], cell["generalised_high"]) == pytest.approx(wilson_interval(2, 3), abs=1e-4)
    assert cell["train_examples"] == 100
    assert cell["budget"] == 1000


def test_cells_are_sorted_and_apart():
    rows = _rows([0, 1, 2, 3], strength=2.0) + _rows([3, 3, 3, 3], strength=1.0)
    found = [(cell["strength"], cell["train_fraction"], cell["generalised"]) for cell in cells(rows[::-1])]
    assert found == [(1.0, f, 3) for f in FRACTIONS] + [
        (2.0, f, k) for f, k in zip(FRACTIONS, [0, 1, 2, 3], strict=True)
    ]


def test_means_leave_out_what_is_missing():
    rows = [
        _row(seed=0, stable_rank=2.0, test_accuracy=math.nan),
        _row(seed=1, stable_rank=None),
        _row(seed=2, stable_rank=3.0),
    ]
    (cell,) = cells(rows)
    assert (cell["stable_rank"], cell["test_accuracy"], cell["query_norm"]) == (2.5, 1.0, None)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9))
def test_the_median_step_of_runs_that_all_generalised(steps):
    (cell,) = cells([_row(seed=i, steps_to_generalise=step) for i, step in enumerate(steps)])
    assert cell["steps_to_generalise"] == statistics.median_low(steps)
    assert (cell["steps_low"] or 0) <= cell["steps_to_generalise"] <= (cell["steps_high"] or math.inf)


@pytest.mark.parametrize(("generalised", "median"), [(5, 600), (4, 600), (3, 600), (2, None), (0, None)])
def test_runs_that_did_not_generalise_count_as_later_than_the_budget(generalised, median):
    (cell,) = cells([_row(seed=i, generalised=i < generalised) for i in range(5)])
    assert cell["steps_to_generalise"] == median
    assert cell["steps_low"] == (400 if median else None)


def test_a_diverged_run_is_censored_at_its_budget_not_where_it_stopped():
    late = _row(seed=2, generalised=False, outcome="diverged", steps=10)
    (cell,) = cells([_row(seed=0), _row(seed=1), late])
    assert cell["steps_to_generalise"] == 500
    assert cell["steps_high"] is None


def test_many_seeds_bound_the_median_on_both_sides():
    (cell,) = cells([_row(seed=i, steps_to_generalise=10 * i + 10) for i in range(40)])
    assert 100 <= cell["steps_low"] < cell["steps_to_generalise"] == 200 < cell["steps_high"] <= 300


# the best column of an arm


def test_the_best_column_has_the_lowest_boundary():
    rows = _rows([0, 0, 0, 3], strength=1.0) + _rows([0, 3, 3, 3], strength=2.0) + _rows([0, 0, 3, 3], strength=4.0)
    best = boundary(rows)
    assert (best["strength"], best["edge"], best["rest_edge"]) == (2.0, None, "only")
    assert best["train_fraction"] == pytest.approx(math.sqrt(0.1 * 0.15))
    assert [column["strength"] for column in summarise(rows, ["prox"])["arms"][0]["boundaries"]] == [1.0, 2.0, 4.0]
    assert boundary([]) is None


def test_ties_go_to_more_successes_then_to_fewer_steps():
    most = _rows([2, 3, 3, 3], strength=1.0) + _rows([3, 3, 3, 3], strength=2.0)
    assert boundary(most)["strength"] == 2.0
    slow, quick = (_rows([3, 3, 3, 3], strength=s) for s in (1.0, 2.0))
    assert boundary([row | {"steps_to_generalise": 900} for row in slow] + quick)["strength"] == 2.0


def test_a_failure_at_a_small_fraction_is_not_a_low_boundary():
    rows = _rows([0, 0, 3, 3], strength=1.0) + _rows([0], fractions=[0.05], strength=2.0)
    assert boundary(rows)["strength"] == 1.0


@pytest.mark.parametrize(
    ("strengths", "best", "edge"),
    [
        ((1.0, 2.0, 4.0), 1.0, "lowest"),
        ((1.0, 2.0, 4.0), 2.0, None),
        ((1.0, 2.0, 4.0), 4.0, "highest"),
        ((0.0, 2.0, 4.0), 0.0, None),  # there is nothing below none
        ((3.0,), 3.0, "only"),
        ((0.0,), 0.0, None),
    ],
)
def test_edges(strengths, best, edge):
    rows = [row for s in strengths for row in _rows([0, 3 if s == best else 0, 3, 3], strength=s)]
    assert edges(rows)["edge"] == edge
    rest = [row | {"rest_decay": row["strength"], "strength": 0.0} for row in rows]
    assert edges(rest) == {"edge": None, "rest_edge": edge}


def test_edges_are_those_of_the_best_columns_neighbours():
    rows = _rows([0, 0, 3, 3], strength=1.0) + _rows([0, 0, 0, 3], strength=2.0)
    rows += _rows([0, 3, 3, 3], strength=1.0, rest_decay=3.0)
    assert edges(rows) == {"edge": "only", "rest_edge": "highest"}


def test_no_edge_while_nothing_generalised():
    assert edges(_rows([0] * 4, strength=1.0) + _rows([0] * 4, strength=2.0)) == {"edge": None, "rest_edge": None}
    assert edges([]) == {"edge": None, "rest_edge": None}


# between arms


def _difference(reference, other):
    rows = _rows(reference, arm="prox") + _rows(other, arm="l2")
    (difference,) = differences(rows, ["l2", "prox"], "prox")
    assert (difference["reference"], difference["arm"]) == ("prox", "l2")
    return difference


def test_a_difference_is_a_ratio_of_fractions():
    difference = _difference([0, 3, 3, 3], [0, 0, 0, 3])
    assert difference["ratio"] == pytest.approx(1.5**-2)
    assert difference["low"] < difference["ratio"] < difference["high"] < 1
    assert difference["censored"] is None


def test_two_arms_alike_differ_by_one_and_not_surely():
    difference = _difference([0, 0, 3, 3], [0, 0, 3, 3])
    assert difference["ratio"] == 1
    assert difference["low"] < 0.8
    assert difference["high"] == pytest.approx(1 / difference["low"], rel=1e-3)


@pytest.mark.parametrize(
    ("reference", "other", "censored", "open_end"),
    [
        ([3, 3, 3, 3], [0, 0, 3, 3], "at most", "low"),
        ([0, 0, 0, 0], [0, 0, 3, 3], "at least", "high"),
        ([0, 0, 3, 3], [3, 3, 3, 3], "at least", "high"),
        ([0, 0, 3, 3], [0, 0, 0, 0], "at most", "low"),
        ([3, 3, 3, 3], [0, 0, 0, 0], "at most", "low"),
        ([0, 0, 0, 0], [3, 3, 3, 3], "at least", "high"),
    ],
)
def test_a_censored_boundary_makes_the_ratio_a_bound(reference, other, censored, open_end):
    difference = _difference(reference, other)
    assert difference["censored"] == censored
    assert difference[open_end] is None
    assert difference["high" if open_end == "low" else "low"] is not None


@pytest.mark.parametrize("counts", [[0] * 4, [3] * 4])
def test_two_boundaries_beyond_the_same_end_have_no_ratio(counts):
    difference = _difference(counts, counts)
    assert difference["censored"] == "unknown"
    assert difference["ratio"] is difference["low"] is difference["high"] is None


def test_the_ratio_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    x = math.log(0.08) + STEP * np.arange(6)
    covered = []
    for i in range(250):
        width = (0.1, 0.5)[i % 2] * STEP
        truths = rng.uniform(x[0], x[-1], 2)
        rows = []
        for arm, truth in zip(("prox", "l2"), truths, strict=True):
            rows += _rows(_simulated(rng, x, truth, width, 3), fractions=np.exp(x).tolist(), arm=arm)
        (difference,) = differences(rows, ["prox", "l2"], "prox")
        low, high = difference["low"] or 0.0, difference["high"] or math.inf
        covered.append(low <= math.exp(truths[0] - truths[1]) <= high)
    assert statistics.fmean(covered) >= 0.92


def _shifted(rng, scatter, ratio, seeds):
    """Two columns of one size whose times differ by a ratio, beside what a seed has in common and what it has not."""
    columns: tuple[list, list] = [], []
    for seed in range(seeds):
        common = rng.normal(0, 1)  # this seed's training set, under both arms
        for arm, shift in enumerate((math.log(ratio), 0.0)):
            steps = math.exp(6 + shift + common + rng.normal(0, scatter))
            columns[arm].append(_row(seed=seed, steps_to_generalise=steps))
    return columns


def test_paired_ratios_cover_as_often_as_they_say_and_a_bootstrap_of_five_seeds_does_not():
    rng = np.random.default_rng(1)
    covered: dict[str, list[bool]] = {"": [], "bootstrap_": []}
    for _ in range(800):
        found = paired(*_shifted(rng, 0.2, 0.8, 5))["time"]
        for which, said in covered.items():
            said.append(found[f"{which}low"] <= 0.8 <= found[f"{which}high"])
    assert 0.935 <= statistics.fmean(covered[""]) <= 0.965
    assert 0.78 <= statistics.fmean(covered["bootstrap_"]) <= 0.88


def test_times_are_compared_where_one_of_the_two_held():
    ours = [_row(seed=s, fraction=f, steps_to_generalise=400) for s in range(3) for f in (0.2, 0.3)]
    theirs = [_row(seed=s, fraction=0.2, steps_to_generalise=800) for s in range(3)]
    theirs += [_row(seed=s, fraction=0.3, generalised=False) for s in range(3)]  # counts with its budget of 1000
    neither = [_row(seed=s, fraction=0.1, generalised=False) for s in range(3)]
    found = paired(ours + neither, theirs + neither)["time"]
    assert found["ratio"] == pytest.approx(math.sqrt(400 / 800 * 400 / 1000))
    assert (found["seeds"], found["at_bound"]) == (3, 3)


def test_a_seed_with_both_thresholds_beyond_one_end_says_nothing():
    ours, theirs = _rows([2, 3, 3, 3], arm="prox"), _rows([0, 0, 3, 3], arm="l2")
    found = paired(ours, theirs)["by_seed"]  # seeds 0 and 1 of `ours` generalise everywhere: bounds
    assert (found["seeds"], found["at_bound"]) == (3, 2)
    assert paired(_rows([0] * 4), _rows([0] * 4)) == {"by_seed": None, "time": None}
    assert paired(_rows([3] * 4), _rows([3] * 4))["by_seed"] is None
    assert paired([], theirs) == {"by_seed": None, "time": None}


def test_one_seed_has_a_ratio_and_no_interval():
    found = paired(_rows([0, 1, 1, 1], seeds=1), _rows([0, 0, 1, 1], seeds=1))
    assert found["by_seed"]["ratio"] == pytest.approx(1 / 1.5)
    assert found["by_seed"]["low"] is found["time"]["high"] is None


def test_many_seeds_are_resampled_alike_every_time():
    rng = np.random.default_rng(3)
    ours, theirs = _shifted(rng, 0.3, 0.5, 12)
    assert paired(ours, theirs) == paired(ours[::-1], theirs[::-1])
    found = paired(ours, theirs)["time"]
    assert found["bootstrap_low"] < found["ratio"] < found["bootstrap_high"]


def test_events():
    pairs = [(1, 2), (1, 3), (2, 2), (3, 2), (1, None), (None, 1), (None, None)]
    assert events(_row(rank_fell_at=rank, accuracy_rose_at=accuracy) for rank, accuracy in pairs) == {
        "rank_first": 2,
        "together": 1,
        "accuracy_first": 1,
        "rank_only": 1,
        "accuracy_only": 1,
        "neither": 1,
    }


# the summary


def _everything():
    return (
        _rows([0, 1, 3, 3], strength=5.0)
        + _rows([0, 3, 3, 3], strength=10.0)
        + _rows([0, 0, 0, 0], arm="none")
        + _rows([0, 0, 1, 3], arm="l2", seeds=5, strength=100.0)
    )


def test_a_summary_is_plain_json():
    summary = summarise(_everything(), ["prox", "l2", "none", "muon"], "prox")
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    low_rank, l2, none, muon = summary["arms"]
    assert (low_rank["name"], low_rank["seeds"], low_rank["generalised"], low_rank["runs"]) == ("prox", 3, 16, 24)
    assert low_rank["boundary"]["strength"] == 10.0
    assert low_rank["boundary"]["edge"] == "highest"
    assert low_rank["stable_rank"] == pytest.approx((9 * 2 + 3 * 8) / 12)
    assert low_rank["events"]["rank_first"] == 9
    assert l2["seeds"] == 5
    assert none["boundary"]["censored"] == "above"
    assert (muon["cells"], muon["boundaries"], muon["boundary"], muon["events"]) == ([], [], None, None)
    assert muon["stable_rank"] is None
    assert [difference["arm"] for difference in summary["differences"]] == ["l2", "none"]


def test_a_summary_does_not_depend_on_the_order_of_rows():
    rows = _everything()
    assert summarise(rows, ["prox", "l2"], "prox") == summarise(rows[::-1], ["prox", "l2"], "prox")


def test_a_summary_without_a_reference():
    assert summarise(_everything(), ["prox", "l2"], None)["differences"] == []
    assert summarise(_everything(), ["prox", "l2"], "muon")["differences"] == []
    assert summarise([], [], None) == {"arms": [], "differences": []}


def test_reference_is_the_first_low_rank_arm():
    assert reference(["none", "prox", "smooth"]) == "smooth"
    assert reference(["none", "l2"]) is None


def test_an_arm_of_one_strength_for_everything_has_one_axis():
    rows = [
        row
        for s, counts in ((1.0, [0, 0, 1, 3]), (3.0, [0, 2, 3, 3]))
        for row in _rows(counts, strength=s, rest_decay=s)
    ]
    assert edges(rows) == {"edge": "highest", "rest_edge": None}
