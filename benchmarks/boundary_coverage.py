"""How often intervals for a boundary contain it, by simulation, as `docs/log.md` and `boundary/statistics.py` say.

python benchmarks/boundary_coverage.py        # about half a minute on one core

Columns of cells are drawn from a logistic, with as many seeds and fractions as our sweeps have, and the boundary is
anywhere between the lowest and the highest fraction. Beside the credible interval that `rankdecay boundary` reports
stand percentile intervals of three bootstraps: the runs of each cell resampled, counts drawn from the fitted logistic
(parametric), and counts drawn from each cell's Beta posterior under a flat prior (smoothed). An end is open where the
estimate there is censored.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable

import numpy as np
from scipy import special

from rankdecay.lab.experiments.boundary.statistics import Fit, fit_boundary

STEP = math.log(1.25)  # between neighbouring fractions; the statistics do not depend on it
WIDTHS = (0.05, 0.2, 0.5, 1.0)  # of the logistic, in steps
SIMULATIONS, REPLICATES = 300, 200
Counts = np.ndarray  # of runs that generalised, one per fraction
Draw = Callable[[np.random.Generator, Counts, int], np.ndarray]  # replicates: (REPLICATES, fractions)
Interval = tuple[float, float]  # of log f50


def logs(fractions: int) -> np.ndarray:
    """The logarithms of the fractions tried."""
    return math.log(0.1) + STEP * np.arange(fractions)


@functools.cache  # replicates repeat each other
def fitted(counts: tuple[int, ...], seeds: int) -> Fit:
    return fit_boundary(np.exp(logs(len(counts))).tolist(), counts, [seeds] * len(counts))


def resampled(rng: np.random.Generator, counts: Counts, seeds: int) -> np.ndarray:
    return rng.binomial(seeds, counts / seeds, (REPLICATES, len(counts)))


def parametric(rng: np.random.Generator, counts: Counts, seeds: int) -> np.ndarray:
    fit = fitted(tuple(counts.tolist()), seeds)
    width = fit.width or 0.4 * STEP  # of a censored fit, which has none: what its prior expects
    return rng.binomial(
        seeds, special.expit((logs(len(counts)) - math.log(fit.f50)) / width), (REPLICATES, len(counts))
    )


def smoothed(rng: np.random.Generator, counts: Counts, seeds: int) -> np.ndarray:
    return rng.binomial(seeds, rng.beta(counts + 1, seeds - counts + 1, (REPLICATES, len(counts))))


BOOTSTRAPS: dict[str, Draw] = {"resampled runs": resampled, "parametric": parametric, "smoothed": smoothed}


def credible(counts: Counts, seeds: int) -> Interval:
    """The interval that is reported."""
    fit = fitted(tuple(counts.tolist()), seeds)
    return math.log(fit.low) if fit.low else -math.inf, math.log(fit.high) if fit.high else math.inf


def percentiles(replicates: np.ndarray, seeds: int) -> Interval:
    """The central 95 % of the boundaries of replicates."""
    ends = {"below": -math.inf, "above": math.inf}
    fits = [fitted(tuple(row), seeds) for row in replicates.tolist()]
    found = [math.log(fit.f50) if fit.censored is None else ends[fit.censored] for fit in fits]
    low, high = np.quantile(found, (0.025, 0.975), method="inverted_cdf")  # no mean of a number and infinity
    return float(low), float(high)


def simulate(seeds: int, fractions: int, width: float) -> dict[str, list[tuple[bool, float]]]:
    """Of every interval: whether it contained the boundary, and its length in steps, per simulated column."""
    rng = np.random.default_rng([seeds, fractions, round(100 * width)])
    x = logs(fractions)
    found: dict[str, list[tuple[bool, float]]] = {}
    for _ in range(SIMULATIONS):
        truth = rng.uniform(x[0], x[-1])
        counts = rng.binomial(seeds, special.expit((x - truth) / (width * STEP)))
        intervals = {"credible": credible(counts, seeds)}
        intervals |= {name: percentiles(draw(rng, counts, seeds), seeds) for name, draw in BOOTSTRAPS.items()}
        for name, (low, high) in intervals.items():
            length = math.inf if math.isinf(low) or math.isinf(high) else (high - low) / STEP
            found.setdefault(name, []).append((low <= truth <= high, length))
    return found


def main() -> None:
    """Print a Markdown line per case: how often each interval covers, and its median length in steps."""
    names = ["credible", *BOOTSTRAPS]
    print(f"| seeds | fractions | width, steps | {' | '.join(names)} |")
    print("|" + "---|" * (3 + len(names)))
    covers: dict[str, list[float]] = {name: [] for name in names}
    for seeds, fractions, width in itertools.product((3, 5), (4, 6), WIDTHS):
        found = simulate(seeds, fractions, width)
        cells = []
        for name in names:
            covers[name].append(statistics.fmean(covered for covered, _ in found[name]))
            length = statistics.median(length for _, length in found[name])
            cells.append(f"{covers[name][-1]:.0%}, {'open' if math.isinf(length) else f'{length:.2f}'}")
        print(f"| {seeds} | {fractions} | {width:g} | {' | '.join(cells)} |")
    for name, shares in covers.items():
        print(f"{name}: covers {min(shares):.0%} to {max(shares):.0%}")


if __name__ == "__main__":
    main()
