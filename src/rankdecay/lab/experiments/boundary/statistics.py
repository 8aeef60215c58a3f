"""The statistics of a phase diagram: at what share of the data does training begin to generalise?

Input are rows, one dict per finished run; output are plain dicts for `summary.json`. A *cell* is the runs of one
(arm, strength, rest_decay, train_fraction), which differ in seed; a *column* is the cells of one
(arm, strength, rest_decay). The boundary of a column is f50 of

    P(generalise | f) = 1 / (1 + exp(−(log f − log f50) / w)).

Three to five seeds per cell are mostly all-or-nothing, where the likelihood has no finite maximum in w, so w has a weak
prior: log-normal, around 0.4 of the distance between neighbouring fractions, one standard deviation a factor e. The
reported f50 maximises likelihood times that prior; its interval is the central 95 % *credible* interval of f50 on the
same grid, under a flat prior on log f50. In simulated columns of this size it covers the truth in 93 to 100 %. It is
not a bootstrap: the parametric one covers 67 to 91 %, since replicates of separated cells rarely leave their gap;
resampling the runs of each cell 14 to 90 %, since separated cells then have one replicate; and counts smoothed by a
Beta posterior per cell cover always, at more than twice the length and mostly with an open end, since that flips cells
far from the boundary. `benchmarks/boundary_coverage.py` measures them all,
`tests/lab/experiments/boundary/test_statistics.py` what is here.

That interval takes the runs of a column as independent. They are not: the runs of one seed share nested training sets
and initial weights. Between arms the seed is therefore the unit as well, in `paired`: a ratio per seed, then Student's
t over seeds. A bootstrap over so few seeds is too short (five have 126 distinct resamples; where seeds scatter
normally the nominal 95 % contain the truth in 83 %), so it is reported beside it and decides nothing.
"""

import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from scipy import special, stats

from rankdecay.lab.ensemble.outcome import FIGURES
from rankdecay.lab.report.words import mean
from rankdecay.lab.settings import Record as Row

Edge = Literal["lowest", "highest", "only"]

MEANS = (*FIGURES, "best_test_accuracy")
EVENTS = ("rank_first", "together", "accuracy_first", "rank_only", "accuracy_only", "neither")

LONE_STEP = math.log(1.5)  # distance to a neighbour that a column of a single fraction does not have
PER_STEP = 24  # points of the grid of log f50 between neighbouring fractions; even, so that it has the midpoints
MOST_POINTS = 2400  # of log f50, however irregular the fractions
WIDTHS = np.geomspace(0.05, 3.0, 24)  # w, in steps between neighbouring fractions
WIDTH_PRIOR = -0.5 * np.log(WIDTHS / 0.4) ** 2
TAIL = 0.025
RESAMPLES = 10_000  # of seeds, in a bootstrap; of five seeds there are 3,125
OPEN = math.exp(-0.5 * 1.96**2)  # an end of the grid this likely, relative to the best, is not ruled out


@dataclass(frozen=True)
class Fit:
    """The boundary of one column.

    Attributes:
        f50: the fraction from which most runs generalise; the lowest or highest fraction tried if censored.
        low, high: its 95 % credible interval. None where the data do not rule out what lies beyond the grid.
        censored: "below" if the boundary lies below the fractions tried, "above" if above them.
        width: w of the logistic, in units of log f; None if censored. With separated cells the prior speaks.
        logs, weights: log f50 on the grid, and the posterior weight of each point.
    """

    f50: float
    low: float | None
    high: float | None
    censored: Literal["below", "above"] | None
    width: float | None
    logs: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class _Column:
    strength: float
    rest_decay: float
    rows: list[Row]
    fit: Fit

    @property
    def generalised(self) -> int:
        return sum(map(_generalised, self.rows))

    def as_dict(self) -> dict[str, Any]:
        fit = self.fit
        return {
            "strength": self.strength,
            "rest_decay": self.rest_decay,
            "train_fraction": fit.f50,
            "low": fit.low,
            "high": fit.high,
            "censored": fit.censored,
            "width": fit.width,
            "generalised": self.generalised,
            "runs": len(self.rows),
        }


def summarise(rows: Sequence[Row], arms: Sequence[str], reference: str | None = None) -> dict[str, Any]:
    """The summary of a phase diagram, as plain JSON.

    Args:
        rows: one dict per finished run.
        arms: the arms to report, in this order; one without rows yet has empty lists and None.
        reference: the arm that the others are compared with.

    Returns:
        `{"arms": [...], "differences": [...]}`.
    """
    return {
        "arms": [_summarise_arm(name, _of(rows, name)) for name in arms],
        "differences": differences(rows, arms, reference) if reference is not None else [],
    }


def cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Counts, times and means of every cell, sorted by arm, strength, rest_decay and train_fraction.

    Steps are the median over seeds by Kaplan and Meier: a run that did not generalise, or diverged, would have taken
    more than its budget. `steps_low` and `steps_high` bound that median where its survival curve's band crosses ½.
    """
    keys = ("arm", "strength", "rest_decay", "train_fraction")
    return [_cell(dict(zip(keys, key, strict=True)), group) for key, group in _grouped(rows, keys)]


def fit_boundary(fractions: Sequence[float], successes: Sequence[int], runs: Sequence[int]) -> Fit:
    """Fit the logistic of one column.

    The grid of log f50 reaches half a step beyond the fractions tried, but not above f = 1. An estimate out there is
    censored, not reported: adding a success to counts that rise with f then never raises f50. (To counts that do not,
    it can: one success at the lowest fraction alone widens the logistic.) A step is the median distance of neighbours
    in log f, or a factor 1.5 if there is only one fraction, whose f50 is that fraction: censored, unless half of its
    runs generalised.

    Args:
        fractions: distinct shares of the data.
        successes: runs that generalised at each.
        runs: all runs at each.
    """
    order = np.argsort(fractions)
    x = np.log(np.asarray(fractions, dtype=float)[order])
    k, n = (np.asarray(counts, dtype=float)[order] for counts in (successes, runs))
    step = float(np.median(np.diff(x))) if len(x) > 1 else LONE_STEP
    first, last = x[0] - step / 2, min(x[-1] + step / 2, 0.0)
    logs = np.linspace(first, last, min(round((last - first) / step * PER_STEP), MOST_POINTS) + 1)
    z = (x - logs[:, None, None]) / (step * WIDTHS[:, None])
    posterior = special.log_expit(z) @ k + special.log_expit(-z) @ (n - k) + WIDTH_PRIOR  # point × width
    best, width = np.unravel_index(posterior.argmax(), posterior.shape)
    likelihood = np.exp(posterior - posterior.max()).sum(1)  # of log f50, any width
    weights = likelihood / likelihood.sum()

    half = (logs[1] - logs[0]) / 2
    below = best == 0 or logs[best] < x[0] - half
    above = best == len(logs) - 1 or logs[best] > x[-1] + half
    censored = "below" if below else "above" if above else None
    at = {"below": x[0], "above": x[-1], None: logs[best]}[censored]
    low, high = _quantiles(logs, weights)
    open_below, open_above = (
        censored == side or likelihood[end] > OPEN * likelihood.max() for side, end in (("below", 0), ("above", -1))
    )
    return Fit(
        f50=math.exp(at),
        low=None if open_below else math.exp(min(low, at)),
        high=None if open_above else math.exp(max(high, at)),
        censored=censored,
        width=None if censored else float(step * WIDTHS[width]),
        logs=logs,
        weights=weights,
    )


def boundary(arm_rows: Sequence[Row]) -> dict[str, Any] | None:
    """The column of one arm with the lowest boundary, with `edge` and `rest_edge`; None without rows.

    Its interval is that of the column, not of a minimum, and the best of many noisy columns looks too good: of five
    equal columns with three seeds per cell, by 0.2 to 0.5 steps of the grid, and the interval then covers 82 to 97 %.
    Compare arms over as many columns each, or repeat the chosen ones with new seeds.
    """
    columns = _columns(arm_rows)
    return _best(columns).as_dict() | _edges(columns) if columns else None


def edges(arm_rows: Sequence[Row]) -> dict[str, Edge | None]:
    """Where a sweep of one arm has to be widened, because its best column lies at the edge of what was tried.

    Returns:
        `edge` of the strength (among the columns with the best's rest_decay) and `rest_edge` of the rest_decay (among
        those with the best's strength): "lowest", "highest", "only" if nothing else was tried, None if inside. Zero
        cannot be widened downwards and is no edge, and neither is anything while no run has generalised.
    """
    columns = _columns(arm_rows)
    return _edges(columns) if columns else {"edge": None, "rest_edge": None}


def differences(rows: Sequence[Row], arms: Sequence[str], reference: str) -> list[dict[str, Any]]:
    """How many times as much data the reference needs as each other arm, each at its best column.

    `low` and `high` are those of two fitted boundaries, whose posteriors are taken as independent: what the grid and
    the number of runs allow. That the two arms share seeds makes it wide, that a seed's runs share their training sets
    makes it short, and which of the two prevails differs: two arms count as different only where `by_seed` says so too.

    Returns:
        Per other arm that has rows: `ratio` of the f50s, reference / other, and its 95 % credible `low` and `high`,
        None where open. `censored` says what the ratio then is, "at most" or "at least"; it is "unknown", and the
        numbers are None, when both boundaries lie beyond the same end, for then nothing bounds their ratio. `by_seed`
        and `time` are those of `paired`.
    """
    best = {name: _best(columns) for name in arms if (columns := _columns(_of(rows, name)))}
    base = best.get(reference)
    if base is None:
        return []
    return [
        {"reference": reference, "arm": name} | _ratio(base.fit, other.fit) | paired(base.rows, other.rows)
        for name, other in best.items()
        if name != reference
    ]


def paired(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, dict[str, Any] | None]:
    """Ratios of two columns with the seed as the unit: of the data they need, and of the time.

    Only sizes and seeds that both have are compared. The threshold of a seed is the boundary of its own runs; a seed
    for which both lie beyond the same end of the grid says nothing and is left out, one for which either does counts
    with that end, so its ratio is nearer to 1 than the truth. The time of a seed is its mean log-ratio over the sizes
    at which at least one of the two held; a run that did not counts with its budget, which again brings the ratio
    nearer to 1.

    Args:
        rows: of one column, one dict per run.
        others: of the other column.

    Returns:
        `by_seed` and `time`, each None without a seed to compare, else `ratio` (geometric mean over seeds), `low` and
        `high` (95 %, Student's t over seeds; None for a single seed), `bootstrap_low` and `bootstrap_high` (percentiles
        over resampled seeds), `seeds`, and `at_bound`, how many of the seeds (or pairs of times) stand at an end.
    """
    ours, theirs = _by_seed(rows), _by_seed(others)
    thresholds, times, thresholds_at_bound, times_at_bound = [], [], 0, 0
    for seed in sorted(ours.keys() & theirs.keys()):
        sizes = sorted(ours[seed].keys() & theirs[seed].keys())
        if not sizes:
            continue
        a, b = (_fit_one([runs[seed][size] for size in sizes]) for runs in (ours, theirs))
        if a.censored is None or a.censored != b.censored:
            thresholds.append(math.log(a.f50 / b.f50))
            thresholds_at_bound += bool(a.censored or b.censored)
        pairs = [(ours[seed][size], theirs[seed][size]) for size in sizes]
        told = [pair for pair in pairs if any(map(_generalised, pair))]
        if told:
            times.append(statistics.fmean(math.log(_time(one) / _time(other)) for one, other in told))
            times_at_bound += sum(not all(map(_generalised, pair)) for pair in told)
    return {"by_seed": _over_seeds(thresholds, thresholds_at_bound), "time": _over_seeds(times, times_at_bound)}


def _by_seed(rows: Iterable[Row]) -> dict[int, dict[float, Row]]:
    found: dict[int, dict[float, Row]] = {}
    for row in rows:
        found.setdefault(row["seed"], {})[row["train_fraction"]] = row
    return found


def _fit_one(rows: Sequence[Row]) -> Fit:
    fractions = [row["train_fraction"] for row in rows]
    return fit_boundary(fractions, [int(_generalised(row)) for row in rows], [1] * len(rows))


def _time(row: Row) -> float:
    return max(float(row["steps_to_generalise"] if _generalised(row) else row["budget"]), 1.0)  # it held from the start


def _over_seeds(logs: Sequence[float], at_bound: int) -> dict[str, Any] | None:
    """The geometric mean of a ratio per seed with its intervals."""
    if not logs:
        return None
    values, count = np.asarray(logs), len(logs)
    middle = float(values.mean())
    found: dict[str, Any] = {"ratio": math.exp(middle), "low": None, "high": None}
    if count > 1:
        half = float(stats.t.ppf(1 - TAIL, count - 1)) * float(values.std(ddof=1)) / math.sqrt(count)
        found |= {"low": math.exp(middle - half), "high": math.exp(middle + half)}
    ends = [math.exp(end) for end in np.quantile(_resampled_means(values), (TAIL, 1 - TAIL))]
    return found | {"bootstrap_low": ends[0], "bootstrap_high": ends[1], "seeds": count, "at_bound": at_bound}


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """Means of resamples with replacement: all of them for a few seeds, else draws that are always the same."""
    count = len(values)
    if count**count <= RESAMPLES:
        picks = np.stack(np.meshgrid(*[np.arange(count)] * count), -1).reshape(-1, count)
    else:
        picks = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    return values[picks].mean(1)


def reference(arms: Sequence[str]) -> str | None:
    """The arm the others are compared with: the first low-rank decay among them."""
    return next((name for name in ("smooth", "prox", "prototype", "paper_a1") if name in arms), None)


def events(rows: Iterable[Row]) -> dict[str, int]:
    """In how many runs the rank fell before, with or after the rise of test accuracy, or one of them never came."""
    counts: dict[str, int] = dict.fromkeys(EVENTS, 0)
    for row in rows:
        counts[_event(row.get("rank_fell_at"), row.get("accuracy_rose_at"))] += 1
    return counts


def _summarise_arm(name: str, rows: list[Row]) -> dict[str, Any]:
    columns, its_cells = _columns(rows), cells(rows)
    best = _best(columns) if columns else None
    return {
        "name": name,
        "seeds": max((cell["seeds"] for cell in its_cells), default=0),
        "runs": len(rows),
        "generalised": sum(map(_generalised, rows)),
        "diverged": sum(row["outcome"] == "diverged" for row in rows),
        "never_acted": sum(row.get("acted_at", 0) is None for row in rows),  # of those with something to wait for
        "cells": its_cells,
        "boundaries": [column.as_dict() for column in columns],
        "boundary": best.as_dict() | _edges(columns) if best else None,
        "events": events(best.rows) if best else None,
        **_means(best.rows if best else []),
    }


def _cell(key: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    generalised = sum(map(_generalised, rows))
    share = stats.binomtest(generalised, len(rows)).proportion_ci(method="wilson")
    steps, steps_low, steps_high = _median_steps(rows)
    return {
        "arm": key["arm"],
        "train_fraction": float(key["train_fraction"]),
        "train_examples": int(statistics.median(row["train_examples"] for row in rows)),
        "strength": float(key["strength"]),
        "rest_decay": float(key["rest_decay"]),
        "seeds": len(rows),
        "generalised": generalised,
        "diverged": sum(row["outcome"] == "diverged" for row in rows),
        "generalised_low": float(share.low),
        "generalised_high": float(share.high),
        "steps_to_generalise": steps,
        "steps_low": steps_low,
        "steps_high": steps_high,
        "budget": max(int(row["budget"]) for row in rows),
        **_means(rows),
    }


def _median_steps(rows: Sequence[Row]) -> tuple[int | None, int | None, int | None]:
    """The first step by which half of the runs had generalised, and the bounds of that step."""
    censored = [not _generalised(row) for row in rows]
    if 2 * sum(censored) > len(rows):
        return None, None, None
    times = [row["budget"] if late else row["steps_to_generalise"] for row, late in zip(rows, censored, strict=True)]
    survival = stats.ecdf(stats.CensoredData.right_censored(times, censored)).sf
    with warnings.catch_warnings():  # it has no band where all or none are left; NaN never crosses
        warnings.simplefilter("ignore", RuntimeWarning)
        band = survival.confidence_interval(0.95, method="log-log")

    def crossing(curve: Any) -> int | None:
        below = curve.probabilities <= 0.5 + 1e-9
        return int(curve.quantiles[below.argmax()]) if below.any() else None

    return crossing(survival), crossing(band.low), crossing(band.high)


def _columns(arm_rows: Sequence[Row]) -> list[_Column]:
    columns = []
    for (strength, rest_decay), rows in _grouped(arm_rows, ("strength", "rest_decay")):
        by_fraction = _grouped(rows, ("train_fraction",))
        fit = fit_boundary(
            [key[0] for key, _ in by_fraction],
            [sum(map(_generalised, group)) for _, group in by_fraction],
            [len(group) for _, group in by_fraction],
        )
        columns.append(_Column(float(strength), float(rest_decay), rows, fit))
    return columns


def _best(columns: Sequence[_Column]) -> _Column:
    def order(column: _Column) -> tuple[float, ...]:
        # A boundary above a column's fractions may be anywhere above: it never counts as low, however low those were.
        lowest = math.inf if column.fit.censored == "above" else column.fit.f50
        steps = _median_steps(column.rows)[0]
        accuracy = mean(row.get("best_test_accuracy") for row in column.rows)
        return (
            lowest,
            -column.generalised,
            math.inf if steps is None else steps,
            math.inf if accuracy is None else -accuracy,
        )

    return min(columns, key=order)


def _edges(columns: Sequence[_Column]) -> dict[str, Edge | None]:
    best = _best(columns)
    if not best.generalised:
        return {"edge": None, "rest_edge": None}
    if all(c.strength == c.rest_decay for c in columns):  # an arm of one strength for everything has one axis
        return {"edge": _edge(best.strength, [c.strength for c in columns]), "rest_edge": None}
    return {
        "edge": _edge(best.strength, [c.strength for c in columns if c.rest_decay == best.rest_decay]),
        "rest_edge": _edge(best.rest_decay, [c.rest_decay for c in columns if c.strength == best.strength]),
    }


def _edge(value: float, tried: Sequence[float]) -> Edge | None:
    if len(tried) == 1:
        return "only" if value else None
    if value == max(tried):
        return "highest"
    return "lowest" if value == min(tried) and value else None


def _ratio(reference: Fit, other: Fit) -> dict[str, Any]:
    censored = _bound(reference, other)
    if censored == "unknown":
        return {"ratio": None, "low": None, "high": None, "censored": censored}
    logs = (reference.logs[:, None] - other.logs).ravel()
    weights = np.outer(reference.weights, other.weights).ravel()
    order = np.argsort(logs)
    low, high = _quantiles(logs[order], weights[order])
    ratio = reference.f50 / other.f50
    return {
        "ratio": ratio,
        "low": None if reference.low is None or other.high is None else min(math.exp(low), ratio),
        "high": None if reference.high is None or other.low is None else max(math.exp(high), ratio),
        "censored": censored,
    }


def _bound(reference: Fit, other: Fit) -> Literal["at most", "at least", "unknown"] | None:
    if reference.censored == other.censored:
        return "unknown" if reference.censored else None
    return "at most" if reference.censored == "below" or other.censored == "above" else "at least"


def _quantiles(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The central 95 % of sorted, weighted values; each weight is spread around its value, so the width is never 0."""
    middle = np.cumsum(weights) - weights / 2
    low, high = np.interp((TAIL, 1 - TAIL), middle, values)
    return float(low), float(high)


def _event(rank: int | None, accuracy: int | None) -> str:
    if rank is None or accuracy is None:
        return "neither" if rank == accuracy else "rank_only" if accuracy is None else "accuracy_only"
    return "together" if rank == accuracy else "rank_first" if rank < accuracy else "accuracy_first"


def _grouped(rows: Iterable[Row], keys: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return sorted(groups.items(), key=itemgetter(0))


def _means(rows: Sequence[Row]) -> dict[str, float | None]:
    return {key: mean(row.get(key) for row in rows) for key in MEANS}


def _of(rows: Iterable[Row], arm: str) -> list[Row]:
    return [row for row in rows if row["arm"] == arm]


def _generalised(row: Row) -> bool:
    return row["outcome"] == "generalised"
