r"""E1: is what low-rank decay does for grokking a schedule of the norm, or the rank? (`docs/findings`)

    python benchmarks/schedule.py --stage time               # how long the whole takes here, from measured steps
    python benchmarks/schedule.py --stage tune               # seeds 100-102; ends by freezing DIR/tuned.json
    python benchmarks/schedule.py --stage test               # seeds 200-209, each arm at its frozen settings
    python benchmarks/schedule.py --stage secondary          # variants, at one size
    python benchmarks/schedule.py --stage report [--json]    # from the stored rows alone

Selection mod 13, the network of the default `rankdecay grok`. Every stage goes on where it was interrupted; rows are in
DIR/tune and DIR/test (DIR is docs/data/schedule). Three sets: training, validation (1,000 examples, which decides
stopping and tuning) and test (1,000, read by ``report`` once, for the accuracy at the end).

**Tuning**, the same for every arm: six strengths in factors of two at a decay of the rest of 2, the ramp's length as
a second factor where there is one; then the decay of the rest in {1, 2, 4} at the best; each of the three is widened
until the best is inside (a ramp to the budget of tuning at most). The criterion is the restricted mean time: steps
until validation accuracy holds 95 %, the budget for a run that never does, over seeds and sizes. ``tuned.json`` is
written once; ``--again ARM`` tunes frozen arms again where more is tried than before.

**Contrasts**, named beforehand: low rank against `radial_only`, `raise_rank` and `l2_ramp`, and `l2_ramp` against
`l2`, where low rank is the one of `smooth` and `prox` that tuning found faster. Their six arms are tuned, frozen and
trained first, the others after them; no arm's settings depend on another's. Times of one seed and size are paired;
a seed's log-ratio is its mean over sizes, and the seed is the unit: t-tests over seeds, Holm over the four. Two arms
are equivalent when both one-sided tests at ±8 % pass at 5 %. The headline (a schedule of the norm) **stands** if low
rank is equivalent to `l2_ramp` and to `radial_only`, is **withdrawn** if low rank is more than 8 % faster than either
(one-sided, 5 %, Holm over the two), and is **open** otherwise; also where fewer than half of the runs of one of the
three held 95 %, since two runs that reach the horizon look alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tuning
from scipy import stats
from tuning import (
    Protocol,
    Row,
    Space,
    mean_time,
    restricted,
    setting_of,
    setting_of_frozen,
    split_name,
    train_held_out,
    trained,
    trial,
    tuned,
)

from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Training
from rankdecay.lab.machine import describe_machine
from rankdecay.lab.store import read_metrics
from rankdecay.lab.tasks import make_dataset

HALVES = (0.625, 1.25, 2.5, 5.0, 10.0, 20.0)
SQUARES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
RADII = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
GRIDS: dict[str, tuple[float, ...]] = {  # strengths in factors of two
    "none": (),
    "l2": SQUARES,
    "l2_ramp": SQUARES,
    "radial": (5.0, 10.0, 20.0, 40.0, 80.0, 160.0),
    "power_2": SQUARES,
    "radial_only": HALVES,
    "sphere": RADII,
    "sphere_falling": RADII,
    "smooth": HALVES,
    "prox": HALVES,
    "relative": SQUARES,
    "raise_rank": HALVES,
    "yoked": HALVES,
}
RAMPS = {"l2_ramp": (100, 200, 400), "sphere_falling": (100, 200, 400)}
SPACE = Space(GRIDS, RAMPS)
LOW_RANK = ("smooth", "prox")
CONTRASTS = (("low rank", "radial_only"), ("low rank", "raise_rank"), ("low rank", "l2_ramp"), ("l2_ramp", "l2"))
NAMED = tuple(arm for arm in GRIDS if arm in {*LOW_RANK, *(arm for pair in CONTRASTS for arm in pair)})
PARTS = (NAMED, tuple(arm for arm in GRIDS if arm not in NAMED))  # the arms of the contrasts, then the others
MARGIN, LEVEL = 1.08, 0.05
# A variant, the arm whose settings it has, and its β₂; at one size, on the held-out seeds.
SECONDARY = {
    "no_qk_norm": ("l2", 0.999),
    "radial_no_qk_norm": ("radial_only", 0.999),
    "none_beta2": ("none", 0.95),
    "smooth_beta2": ("smooth", 0.95),
    "sharpen": ("none", 0.999),
    "elastic": ("smooth", 0.999),
    "ramp_low_rank": ("smooth", 0.999),
}
SHARPEN = 200.0  # steps in which the scores of attention rise to what they are


TINY = Protocol(5, 16, 16, 16, 1e-2, 50, 20, (100, 101), (60, 120), 60, (200, 201, 202), (60, 120), 80, (40, 80), 60)


# --- tuning ---


def tune(protocol: Protocol, directory: Path, device: str, again: Sequence[str] = ()) -> Row:
    """Tune the arms of the contrasts, then the others; low rank is the rule that tuning finds faster."""

    def beside(arms: Row) -> Row:
        return {"low_rank": min(LOW_RANK, key=lambda arm: arms[arm]["restricted_mean_time"])}

    return tuning.tune(PARTS, SPACE, protocol, directory, device, beside, again)


# --- held-out seeds ---


def test(protocol: Protocol, directory: Path, device: str) -> None:
    """Every arm at its frozen settings on seeds and sizes that tuning has not seen."""
    held = tuned(directory, protocol)["arms"]
    for part in PARTS:
        wanted = [
            trial(protocol, own["name"], own["strength"], own["rest_decay"], size, seed)
            for seed in protocol.test_seeds
            for size in protocol.test_sizes
            for own in (held[arm] for arm in part if arm in held)
        ]
        train_held_out(protocol, directory, wanted, device)


def secondary(protocol: Protocol, directory: Path, device: str) -> None:
    """Variants that are no rivals: at one size, with the settings of the arm that each is held against."""
    held, size = tuned(directory, protocol)["arms"], protocol.secondary_size
    for beta2 in (0.999, 0.95):
        wanted = []
        for name, (of, beta) in SECONDARY.items():
            if beta != beta2:
                continue
            own, ramp = held[of], split_name(held["l2_ramp"]["name"])[1]
            arm = name.removesuffix("_beta2") + ("" if name != "ramp_low_rank" else f"@{ramp}")
            strength = SHARPEN if name == "sharpen" else own["strength"]
            beside = "l2_ramp" if name == "ramp_low_rank" else "l2"
            wanted += [
                trial(
                    protocol, name, strength, own["rest_decay"], size, seed, arm, l2_strength=held[beside]["strength"]
                )
                for seed in protocol.test_seeds
            ]
        path = directory / ("secondary" if beta2 == 0.999 else "secondary_beta2")
        trained(path, protocol, wanted, protocol.test_budget, beta2, device)


# --- contrasts ---


def log_ratios(rows: Sequence[Row], arm: str, other: str, horizon: float) -> np.ndarray:
    """Mean over sizes of log(time of ``arm`` / time of ``other``), one number per seed."""
    times = {(row["arm"], row["seed"], row["train_examples"]): restricted(row, horizon) for row in rows}
    by_seed: dict[int, list[float]] = {}
    for (name, seed, size), spent in times.items():
        if name == arm:
            if (other, seed, size) not in times:
                raise SystemExit(f"{other} has no run of seed {seed} with {size} examples: run --stage test first.")
            by_seed.setdefault(seed, []).append(math.log(spent / times[other, seed, size]))
    return np.array([statistics.fmean(by_seed[seed]) for seed in sorted(by_seed)])


def contrast(ratios: np.ndarray) -> Row:
    """The ratio of times with its interval, p of no difference, of equivalence, and of being more than 8 % faster."""
    count, mean = len(ratios), float(np.mean(ratios))
    error = float(np.std(ratios, ddof=1)) / math.sqrt(count)

    def tail(bound: float, below: bool) -> float:
        """P of a mean so far below (or above) a bound if the truth is the bound."""
        if error == 0:
            return 0.0 if (mean < bound) == below and mean != bound else 1.0
        t = (mean - bound) / error
        return float(stats.t.cdf(t, count - 1) if below else stats.t.sf(t, count - 1))

    margin, half = math.log(MARGIN), float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * error
    return {
        "ratio": math.exp(mean),
        "low": math.exp(mean - half),
        "high": math.exp(mean + half),
        "seeds": count,
        "p": min(1.0, 2 * min(tail(0.0, below=True), tail(0.0, below=False))),
        "p_equivalent": max(tail(margin, below=True), tail(-margin, below=False)),
        "p_faster": tail(-margin, below=True),
    }


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, by Holm's step-down."""
    order, adjusted, worst = np.argsort(p), [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[index]))
        adjusted[int(index)] = worst
    return adjusted


def verdict(against_ramp: Row, against_radial: Row, held: Sequence[float]) -> str:
    """The verdict on the headline, from two contrasts of low rank and the shares of runs that held 95 %."""
    both = (against_ramp, against_radial)
    if min(holm([each["p_faster"] for each in both])) < LEVEL:
        return "withdrawn"
    alike = all(each["p_equivalent"] < LEVEL for each in both)
    return "stands" if alike and min(held) >= 0.5 else "open"


def held_out(directory: Path, held: Row) -> list[Row]:
    """The rows of the held-out runs, each with its arm in place of the arm and ramp that tuning found best."""
    arm_of = {setting_of_frozen(own): arm for arm, own in held["arms"].items()}
    rows = read_metrics(directory / "test")  # some at settings that an arm had before it was tuned again
    return [row | {"arm": arm_of[setting_of(row)]} for row in rows if setting_of(row) in arm_of]


def report(protocol: Protocol, directory: Path) -> Row:
    """Everything that is printed, from the stored rows."""
    held = tuned(directory, protocol)
    rows = held_out(directory, held)
    arms = []
    for arm, own in held["arms"].items():
        some = [row for row in rows if row["arm"] == arm]
        lacking = len(protocol.test_seeds) * len(protocol.test_sizes) - len(some)
        if lacking and arm in NAMED:
            raise SystemExit(f"{directory / 'test'} lacks {lacking} runs of {arm}: run --stage test first.")
        if lacking:
            continue
        times = {str(horizon): mean_time(some, horizon) for horizon in protocol.horizons}
        arms.append(
            {
                "arm": arm,
                **{key: own[key] for key in ("name", "strength", "rest_decay")},
                "runs": len(some),
                "restricted_mean_time": times,
                "held": {str(h): sum(restricted(row, h) < h for row in some) for h in protocol.horizons},
                "test_accuracy": statistics.fmean(row["test_accuracy"] or 0.0 for row in some),
                "stable_rank": statistics.fmean(row["stable_rank"] or math.nan for row in some),
            }
        )
    at_horizons: Row = {}
    for horizon in protocol.horizons:
        pairs = [(held["low_rank"] if a == "low rank" else a, b) for a, b in CONTRASTS]
        found = [contrast(log_ratios(rows, a, b, horizon)) | {"arm": a, "against": b} for a, b in pairs]
        for one, adjusted in zip(found, holm([one["p"] for one in found]), strict=True):
            one["p_holm"] = adjusted
        at_horizons[str(horizon)] = found
    last = {one["against"]: one for one in at_horizons[str(protocol.horizons[-1])] if one["arm"] == held["low_rank"]}
    shares = [
        arm["held"][str(protocol.horizons[-1])] / arm["runs"]
        for arm in arms
        if arm["arm"] in (held["low_rank"], "l2_ramp", "radial_only")
    ]
    headline = verdict(last["l2_ramp"], last["radial_only"], shares)
    return {"low_rank": held["low_rank"], "arms": arms, "contrasts": at_horizons, "headline": headline}


def show(result: Row) -> None:
    for arm in result["arms"]:
        times = "  ".join(f"{h}: {t:,.0f}" for h, t in arm["restricted_mean_time"].items())
        times += f"  held {list(arm['held'].values())[-1]}"
        settings = f"{arm['name']} {arm['strength']:g}, rest {arm['rest_decay']:g}"
        print(f"{settings:<32} {arm['runs']:>4} runs  {times}  test {arm['test_accuracy']:.3f}")
    for horizon, contrasts in result["contrasts"].items():
        print(f"\nread at {horizon} steps: time of the first over time of the second")
        for one in contrasts:
            print(
                f"{one['arm']} / {one['against']}: {one['ratio']:.3f} ({one['low']:.3f}-{one['high']:.3f}), "
                f"p {one['p']:.3g}, Holm {one['p_holm']:.3g}; within 8 %: p {one['p_equivalent']:.3g}"
            )
    print(f"\nheadline: {result['headline']}")


# --- how long it takes ---


def duration(protocol: Protocol) -> Row:
    """Hours of every stage on this machine if nobody leaves early, from steps of an ensemble per core."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    one = trial(protocol, "smooth", 5.0, SPACE.first_rest, protocol.tune_sizes[0], 100)
    members = [dataclasses.replace(one.member, seed=seed) for seed in range(100, 104)]
    data = [make_dataset(seed=member.seed, **one.data) for member in members]
    ensemble = Ensemble(one.config, members, data, Training(protocol.batch_size))
    ensemble.train(8)
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        ensemble.train(16)
        rounds.append((time.perf_counter() - start) / 16 / len(members))
    seconds = statistics.median(rounds)
    settings = sum(max(len(some), 1) * len(RAMPS.get(arm, (0,))) for arm, some in GRIDS.items())
    settings += (len(SPACE.rests) - 1) * len(GRIDS)
    settings += len(GRIDS["yoked"])  # each of those is trained after the run whose norms it gets
    tuning = settings * len(protocol.tune_seeds) * len(protocol.tune_sizes) * protocol.tune_budget
    held_out = (len(GRIDS) + 1) * len(protocol.test_seeds) * len(protocol.test_sizes) * protocol.test_budget
    beside = len(SECONDARY) * len(protocol.test_seeds) * protocol.test_budget

    def hours(steps: float) -> float:
        return steps * seconds / cores / 3600

    return {
        "machine": describe_machine("cpu"),
        "milliseconds_per_step_and_run": 1e3 * seconds,
        "cores": cores,
        "tune_hours_at_most": hours(tuning),
        "test_hours_at_most": hours(held_out),
        "secondary_hours_at_most": hours(beside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("time", "tune", "test", "secondary", "report"), required=True)
    parser.add_argument("--dir", type=Path, default=Path("docs/data/schedule"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a protocol of a minute, to try the command; needs a --dir")
    parser.add_argument("--modulus", type=int, default=Protocol.modulus, help="31 with --width 128: the replication")
    parser.add_argument("--width", type=int, default=Protocol.width)
    parser.add_argument("--sizes", type=int, nargs="+", help="of the held-out runs and of tuning alike: one replicates")
    parser.add_argument("--json", action="store_true")
    arguments = tuning.parse_arguments(parser)
    if arguments.tiny and arguments.dir == parser.get_default("dir"):
        parser.error("--tiny needs a --dir of its own: docs/data/schedule is for the protocol itself")
    protocol = TINY if arguments.tiny else Protocol(modulus=arguments.modulus, width=arguments.width)
    if arguments.width != Protocol.width and not arguments.tiny:
        protocol = dataclasses.replace(protocol, mlp_width=4 * arguments.width)
    if arguments.sizes:
        sizes = tuple(arguments.sizes)
        protocol = dataclasses.replace(protocol, tune_sizes=sizes, test_sizes=sizes, secondary_size=sizes[0])
    if arguments.stage == "report":
        result = report(protocol, arguments.dir)
        print(json.dumps(result, indent=1)) if arguments.json else show(result)
    elif arguments.stage == "time":
        print(json.dumps(duration(protocol), indent=1))
    elif arguments.stage == "tune":
        tune(protocol, arguments.dir, arguments.device, arguments.again)
    else:
        {"test": test, "secondary": secondary}[arguments.stage](protocol, arguments.dir, arguments.device)


if __name__ == "__main__":
    main()
