"""The tables of `docs/findings` on the phase diagram, from the stored rows of the sweeps.

    python benchmarks/boundary_findings.py store runs/selection docs/data/boundary/selection   # a compact copy
    python benchmarks/boundary_findings.py table docs/data/boundary/selection                  # one line per arm
    python benchmarks/boundary_findings.py table docs/data/boundary/selection --rest 3
    python benchmarks/boundary_findings.py ratios docs/data/boundary/selection --rest 2        # against the reference
    python benchmarks/boundary_findings.py events docs/data/boundary/selection --rest 2        # rank or accuracy first
    python benchmarks/boundary_findings.py delay docs/data/boundary/selection --rest 2         # after memorising
    python benchmarks/boundary_findings.py rests docs/data/boundary/selection                  # by decay of the rest
    python benchmarks/boundary_findings.py cells docs/data/boundary/add                        # best accuracy per cell
    python benchmarks/boundary_findings.py ranks docs/data/boundary/selection --rest 2         # what is left
    python benchmarks/boundary_findings.py ends docs/data/boundary/selection                   # what the runs kept
    python benchmarks/boundary_findings.py stuck docs/data/plateau.json                        # subtraction near .4
    python benchmarks/boundary_findings.py mechanism docs/data/boundary/mechanism.json         # the paper's Figure 2
    python benchmarks/boundary_findings.py arms docs/data/boundary/selection                   # what each arm is
    python benchmarks/boundary_findings.py picture docs/data/boundary/prototype                # beside the published

A compact copy is a run directory: its rows without curves and spectra, so `rankdecay report` draws it too, and a longer
sweep goes on from it.
"""

import argparse
import functools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import stored

from rankdecay.lab.experiments.boundary.arms import every_arm
from rankdecay.lab.experiments.boundary.claims import seeds_words
from rankdecay.lab.experiments.boundary.settings import ALIASES, Boundary
from rankdecay.lab.experiments.boundary.statistics import boundary, reference, summarise
from rankdecay.lab.settings import renamed
from rankdecay.lab.store import read_metrics
from rankdecay.lab.tasks import SAMPLED

DROPPED = ("curve", "spectrum", "spectrum_index", "decay_size", "seconds")
LATER = {"angular_step_after": "after the decay", "rotation": "over 20 steps"}  # rows of earlier versions have neither
MECHANISM = Path("docs/data/boundary/mechanism.json")  # of `benchmarks/mechanism.py`
Row = dict[str, Any]


def store(options: argparse.Namespace) -> None:
    """Copy a run directory without what only its page shows."""
    stored.copy(options.run, options.to, (_kept(row) for row in read_metrics(options.run)))


def _kept(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in DROPPED} | {"seconds": round(row["seconds"])}


# --- the rows ---


class Sweep:
    """The rows of one sweep, or of several together, at one decay of the rest or at all."""

    def __init__(self, directories: Iterable[Path], rest: float | None = None, arms: Sequence[str] = ()) -> None:
        rows: list[Row] = []
        names: dict[str, None] = {}
        self.by_number, self.threshold = False, 0.95
        for directory in directories:
            config = renamed(json.loads((directory / "config.json").read_text()), ALIASES)
            names |= {arm["name"]: None for arm in config["arms"]}
            rows += [renamed(row, ALIASES) for row in read_metrics(directory)]
            self.by_number = config["settings"]["task"] in SAMPLED
            self.threshold = config["settings"]["threshold"]
        wanted = {ALIASES.get(arm, arm) for arm in arms}
        self.names = [name for name in names if not wanted or name in wanted]
        if rest is not None:
            rows = [row for row in rows if row["rest_decay"] == rest or row["arm"] == "l2_all"]
        self.rows = [row for row in rows if row["arm"] in self.names]
        self.sizes = sorted({row["train_fraction"] for row in self.rows})
        self.whole = rows[0]["train_examples"] / rows[0]["train_fraction"] if self.by_number else 1.0
        self._summaries: dict[str | None, Row] = {}

    def summary(self, against: str | None = None) -> Row:
        """The statistics of the sweep, with ratios against an arm, the usual reference by default."""
        name = ALIASES.get(against or "", against) or reference(self.names)
        if name not in self._summaries:
            self._summaries[name] = summarise(self.rows, self.names, name)
        return self._summaries[name]

    def arm(self, name: str) -> Row:
        """The statistics of one arm."""
        return next(arm for arm in self.summary()["arms"] if arm["name"] == name)

    def of(self, name: str, best: Mapping[str, Any] | None = None) -> list[Row]:
        """The rows of an arm, or of its best column."""
        rows = [row for row in self.rows if row["arm"] == name]
        if best is None:
            return rows
        return [row for row in rows if all(row[key] == best[key] for key in ("strength", "rest_decay"))]

    def ratio(self, name: str, other: str) -> Row:
        """The ratio of two arms at their best columns: of data and of time."""
        return next(d for d in self.summary(name)["differences"] if d["arm"] == other)

    def size(self, value: float | None) -> str:
        """An amount of data, "…" for an end that the grid leaves open."""
        return "…" if value is None else f"{value * self.whole:.0f}" if self.by_number else f"{value:.3g}"

    def between(self, best: Mapping[str, Any]) -> str:
        """A boundary with its interval, or the bound that it is."""
        sign = {"above": "> ", "below": "< "}.get(best["censored"] or "", "")
        return f"{sign}{self.size(best['train_fraction'])} ({self.size(best['low'])}–{self.size(best['high'])})"


@functools.cache
def sweep(directories: tuple[Path, ...], rest: float | None = None, arms: tuple[str, ...] = ()) -> Sweep:
    """A sweep, read and fitted once."""
    return Sweep(directories, rest, arms)


def _sweep(options: argparse.Namespace) -> Sweep:
    return sweep(tuple(options.directories), options.rest, tuple(options.arms or ()))


def never_acted(row: Row) -> bool:
    """Whether an arm that waits has a schedule that never acted in this run."""
    return row.get("acted_at", 0) is None


def across_rests(runs: Sweep, arm: str, rest: float, other: str, other_rest: float) -> Row:
    """The ratio of two arms, each at a decay of the rest of its own: of data and of time."""
    at = {arm: rest, other: other_rest}
    rows = [row for row in runs.rows if at.get(row["arm"]) == row["rest_decay"]]
    return summarise(rows, [arm, other], arm)["differences"][0]


# --- the tables ---


def table(options: argparse.Namespace) -> None:
    """A Markdown line per arm at its best strength, lowest boundary first."""
    runs = _sweep(options)
    later = [key for key in LATER if any(row.get(key) is not None for row in runs.rows)]
    heads = ["arm", "best strength", "tried", "boundary (95 %)", *map(runs.size, runs.sizes)]
    heads += ["stable rank", "‖W_Q‖", "angle per step", *(LATER[key] for key in later)]
    waits = any(map(never_acted, runs.rows))
    print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
    order = {"below": 0, None: 1, "above": 2}
    scored = [arm for arm in runs.summary(options.reference)["arms"] if arm["boundary"]]
    for arm in sorted(scored, key=lambda a: (order[a["boundary"]["censored"]], a["boundary"]["train_fraction"])):
        best = arm["boundary"]
        column = [c for c in arm["cells"] if (c["strength"], c["rest_decay"]) == (best["strength"], best["rest_decay"])]
        strength = f"{best['strength']:g}" if best["strength"] else "—"
        strength += f" ({best['edge']})" if best["edge"] in ("lowest", "highest") else ""
        several = len({c["rest_decay"] for c in arm["cells"]}) > 1 and arm["name"] != "l2_all"
        strength += f", rest {best['rest_decay']:g}" if several else ""
        tried = sorted({c["strength"] for c in arm["cells"] if c["strength"]})
        cells = {c["train_fraction"]: c for c in column}
        own = runs.of(arm["name"], best)
        counts = [
            _count(cells.get(s), sum(never_acted(row) for row in own if row["train_fraction"] == s)) for s in runs.sizes
        ]
        figures = [stored.mean_of(column, key, ".2g") for key in ("stable_rank", "query_norm", "angular_step")]
        figures += [stored.mean_of(own, key, ".2g") for key in later]
        shown = [arm["name"], strength, ", ".join(f"{s:g}" for s in tried) or "—", runs.between(best)]
        print(f"| {' | '.join([*shown, *counts, *figures])} |")
    if waits:
        print("\n† each: a run in which the schedule never acted.")


def _count(cell: Row | None, never: int = 0) -> str:
    if cell is None:
        return "—"
    steps = cell["steps_to_generalise"]
    return f"{cell['generalised']}/{cell['seeds']}{'†' * never}" + (f" @{steps:g}" if steps is not None else "")


def _end(value: float | None) -> str:
    return "…" if value is None else f"{value:.2f}"


def fits_words(found: Row) -> str:
    """The ratio of two fitted boundaries, "at most" or "at least" where the grid leaves an end open."""
    if found["ratio"] is None:
        return "cannot be told"
    return f"{found['censored'] or ''} {found['ratio']:.2f} ({_end(found['low'])}–{_end(found['high'])})".strip()


def bootstrap_words(found: Row | None) -> str:
    """The percentiles of the cluster bootstrap."""
    return f"{found['bootstrap_low']:.2f}–{found['bootstrap_high']:.2f}" if found else "—"


def ratios(options: argparse.Namespace) -> None:
    """A Markdown line per arm: data and time of the reference over those of the arm, the seed as the unit."""
    runs = _sweep(options)
    heads = ["compared", "data, by seed (95 %)", "bootstrap", "of fits", "time, by seed (95 %)", "bootstrap"]
    print(f"| {' | '.join([*heads, 'seeds, at a bound'])} |\n|" + "---|" * 7)
    for d in runs.summary(options.reference)["differences"]:
        by_seed, spent = d["by_seed"], d["time"]
        bound = f"{by_seed['seeds']}, {by_seed['at_bound']}" if by_seed else "0"
        shown = [seeds_words(by_seed), bootstrap_words(by_seed), fits_words(d)]
        shown += [seeds_words(spent), bootstrap_words(spent), bound]
        print(f"| {d['reference']} / {d['arm']} | {' | '.join(shown)} |")


def events(options: argparse.Namespace) -> None:
    """A Markdown line per arm at its best strength: what came first, the fall of rank or the rise of accuracy."""
    print("| arm | rank first | together | accuracy first | rank alone | accuracy alone | neither |\n|" + "---|" * 7)
    for arm in _sweep(options).summary()["arms"]:
        if arm["boundary"]:
            print(f"| {arm['name']} | " + " | ".join(str(count) for count in arm["events"].values()) + " |")


def delays(runs: Sweep, name: str) -> Row:
    """When the runs of an arm at its best strength memorised, and how much later those that generalised did so."""
    rows = runs.of(name, runs.arm(name)["boundary"])
    memorised = [row["memorised_at"] for row in rows if row["memorised_at"] is not None]
    held = [row for row in rows if row["outcome"] == "generalised"]
    later = [row["steps_to_generalise"] - row["memorised_at"] for row in held if row["memorised_at"] is not None]
    lost = [row for row in rows if row["outcome"] != "generalised"]
    return {
        "runs": len(rows),
        "generalised": len(held),
        "memorised_at": statistics.median(memorised) if memorised else None,
        "delay": statistics.median(later) if later else None,
        "shortest": min(later, default=None),
        "longest": max(later, default=None),
        "without_memorising": len(held) - len(later),
        "lost": len(lost),
        "lost_and_memorised": sum(row["memorised_at"] is not None for row in lost),
    }


def delay(options: argparse.Namespace) -> None:
    """A Markdown line per arm at its best strength: steps from memorising to generalising."""
    runs = _sweep(options)
    heads = ["arm", "generalised", "memorised at (median)", "steps from there to generalising"]
    print(f"| {' | '.join([*heads, 'of those that did not, memorised'])} |\n|" + "---|" * 5)
    for name in runs.names:
        found = delays(runs, name)
        span = "—" if found["delay"] is None else f"{found['delay']:g} ({found['shortest']} to {found['longest']})"
        at = "never" if found["memorised_at"] is None else f"{found['memorised_at']:g}"
        counts = f"{found['generalised']} of {found['runs']}", f"{found['lost_and_memorised']} of {found['lost']}"
        print(f"| {name} | {counts[0]} | {at} | {span} | {counts[1]} |")


def switched(runs: Sweep, name: str, strength: float) -> dict[float, list[int]]:
    """Steps from the switch to generalising of the runs of an arm that waits for it, by size."""
    found: dict[float, list[int]] = {}
    for row in runs.of(name):
        if row["strength"] == strength and row["outcome"] == "generalised":
            found.setdefault(row["train_fraction"], []).append(row["steps_to_generalise"] - row["acted_at"])
    return found


def rests(options: argparse.Namespace) -> None:
    """A Markdown line per decay of the rest: the boundary of each arm at its best strength there."""
    directories = tuple(options.directories)
    whole = _sweep(options)
    values = sorted({row["rest_decay"] for row in whole.rows if row["arm"] != "l2_all"})
    print(f"| decay of the rest | {' | '.join(whole.names)} |\n|" + "---|" * (len(whole.names) + 1))
    for rest in values:
        runs = sweep(directories, rest, tuple(options.arms or ()))
        shown = []
        for name in whole.names:
            best = boundary(runs.of(name))
            shown.append(runs.between(best) if best else "")
        print(f"| {rest:g} | {' | '.join(shown)} |")


def best_accuracies(runs: Sweep, name: str, fraction: float, strength: float) -> list[float]:
    """The best test accuracy of every seed of a cell."""
    return [
        row["best_test_accuracy"] or 0.0
        for row in runs.of(name)
        if (row["train_fraction"], row["strength"]) == (fraction, strength)
    ]


def smallest(runs: Sweep, name: str, accuracy: float, strength: float | None = None) -> float | None:
    """The smallest size at which an arm has such a best test accuracy, over seeds, at its best strength or one."""
    found = reaching(runs, name, accuracy, strength)
    return found[0] if found else None


def reaching(runs: Sweep, name: str, accuracy: float, strength: float | None = None) -> tuple[float, float] | None:
    """The smallest size at which an arm has such a best test accuracy, over seeds, and the strength that has it there.

    Of several strengths the one with the most seeds there, then the most accurate.
    """
    enough = []
    for size, s in {(row["train_fraction"], row["strength"]) for row in runs.of(name)}:
        seeds = best_accuracies(runs, name, size, s)
        if strength in (None, s) and statistics.fmean(seeds) >= accuracy:
            enough.append((-size, len(seeds), statistics.fmean(seeds), s))
    return (-max(enough)[0], max(enough)[3]) if enough else None


def steps_or_budget(runs: Sweep, name: str, strength: float) -> dict[tuple[float, int], float]:
    """Steps until each run of a column held, by size and seed; a run that never did counts with its budget."""
    return {
        (row["train_fraction"], row["seed"]): (
            row["budget"] if row["steps_to_generalise"] is None else row["steps_to_generalise"]
        )
        for row in runs.of(name)
        if row["strength"] == strength
    }


def fullest(runs: Sweep, name: str) -> float:
    """The strength of an arm that is soonest in the mean, of those that have the most runs: every size, every seed."""
    columns = {s: steps_or_budget(runs, name, s) for s in {row["strength"] for row in runs.of(name)}}
    most = max(map(len, columns.values()))
    return min((statistics.fmean(column.values()), s) for s, column in columns.items() if len(column) == most)[1]


def alike(runs: Sweep, name: str, other: str) -> dict[float, float]:
    """Mean steps of an arm over those of another by size, each at its `fullest` strength, over the seeds of both.

    Of the sizes at which one of the two held.
    """
    strengths = {each: fullest(runs, each) for each in (name, other)}
    own, beside = (steps_or_budget(runs, each, strength) for each, strength in strengths.items())
    held = {
        row["train_fraction"]
        for each, strength in strengths.items()
        for row in runs.of(each)
        if row["strength"] == strength and row["steps_to_generalise"] is not None
    }
    found = {}
    for size in sorted(held):
        both = [at for at in own if at in beside and at[0] == size]
        if both:
            found[size] = sum(own[at] for at in both) / sum(beside[at] for at in both)
    return found


def cells(options: argparse.Namespace) -> None:
    """Best test accuracy of every cell (mean over seeds): an arm per table, fractions down, strengths across.

    Where cells differ in their number of seeds, those of several say it: (3 of 3). A cell without runs is empty.
    """
    _grid(options, best_accuracies, lambda found: f"{statistics.fmean(found):.2f}")


def steps(options: argparse.Namespace) -> None:
    """The step at which each cell's runs held 95 %, the mean of those that did, "—" if none: tables as of `cells`."""
    _grid(options, steps_held, lambda found: f"{statistics.fmean(found):,.0f}")


def steps_held(runs: Sweep, name: str, fraction: float, strength: float) -> list[float]:
    """The steps at which the runs of a cell held, of those that did."""
    rows = (row for row in runs.of(name) if (row["train_fraction"], row["strength"]) == (fraction, strength))
    return [row["steps_to_generalise"] for row in rows if row["steps_to_generalise"] is not None]


def _grid(
    options: argparse.Namespace,
    of_cell: Callable[[Sweep, str, float, float], list[float]],
    shown_as: Callable[[list[float]], str],
) -> None:
    runs = _sweep(options)
    counts = Counter((row["arm"], row["train_fraction"], row["strength"]) for row in runs.rows)
    uneven = len(set(counts.values())) > 1  # then a cell of several seeds says how many its mean is of

    def shown(name: str, fraction: float, strength: float) -> str:
        found, count = of_cell(runs, name, fraction, strength), counts[name, fraction, strength]
        if not found:
            return "—" if count else ""
        return shown_as(found) + (f" ({len(found)} of {count})" if uneven and count > 1 else "")

    for name in runs.names:
        strengths = sorted({row["strength"] for row in runs.of(name)})
        print(f"\n**{name}**\n\n| {'size' if runs.by_number else 'fraction'} | "
              f"{' | '.join(f'{s:g}' for s in strengths)} |")  # fmt: skip
        print("|" + "---|" * (len(strengths) + 1))
        for fraction in reversed(runs.sizes):
            if any(row["train_fraction"] == fraction for row in runs.of(name)):
                found = [shown(name, fraction, strength) for strength in strengths]
                print(f"| {runs.size(fraction)} | {' | '.join(found)} |")


NEAR = 0.11  # of a published colour: a cell that agrees with it


def published(directory: Path) -> Row:
    """Our cells beside those of the published picture: how many agree, and the rank of its strongest column."""
    runs = sweep((directory,))
    known = json.loads((directory / "published.json").read_text())["arms"]
    off = {}
    for arm, by_fraction in known.items():
        for fraction, by_strength in by_fraction.items():
            for strength, value in by_strength.items():
                (ours,) = best_accuracies(runs, arm, float(fraction), float(strength))
                off[arm, fraction, strength] = round(abs(round(ours, 2) - value), 2)  # read off to two digits
    strongest = max(row["strength"] for row in runs.of("prototype"))
    ranks = [row["stable_rank"] for row in runs.of("prototype") if row["strength"] == strongest]
    return {
        "cells": len(off),
        "near": sum(value <= NEAR for value in off.values()),
        "within": NEAR,
        "apart": ", ".join(
            f"{arm} {strength} at {fraction}" for (arm, fraction, strength), v in off.items() if v > NEAR
        ),
        "full_rank": f"{min(ranks):.0f}–{max(ranks):.0f}",
    }


def picture(options: argparse.Namespace) -> None:
    """The cells of the prototype's grid, ours / the published picture's."""
    for directory in options.directories:
        runs = sweep((directory,))
        for arm, by_fraction in json.loads((directory / "published.json").read_text())["arms"].items():
            strengths = list(next(iter(by_fraction.values())))
            print(f"\n| {arm} | {' | '.join(strengths)} |\n|" + "---|" * (len(strengths) + 1))
            for fraction, known in by_fraction.items():
                shown = []
                for strength in strengths:
                    (ours,) = best_accuracies(runs, arm, float(fraction), float(strength))
                    shown.append(f"{ours:.2f} / {known[strength]:.2f}")
                print(f"| {fraction} | {' | '.join(shown)} |")


def lasts(runs: Sweep, name: str) -> list[float]:
    """The test accuracies at the end of the runs of an arm that generalised; of one that diverged, 0."""
    return [row["test_accuracy"] or 0.0 for row in runs.of(name) if row["outcome"] == "generalised"]


def lost(runs: Sweep, name: str) -> int:
    """How many of them are below the threshold."""
    return sum(value < runs.threshold for value in lasts(runs, name))


def ends(options: argparse.Namespace) -> None:
    """A Markdown line per arm: test accuracy at the end of the runs that generalised, and the best of all runs."""
    runs = _sweep(options)
    print(f"| arm | generalised | at their end: mean | worst | below {runs.threshold:g} | best of all runs |")
    print("|" + "---|" * 6)
    for name in runs.names:
        own = runs.of(name)
        if not own:
            continue
        last = lasts(runs, name)
        mean, worst = (f"{statistics.fmean(last):.3f}", f"{min(last):.3f}") if last else ("—", "—")
        best = max(row["best_test_accuracy"] or 0.0 for row in own)
        print(f"| {name} | {len(last)} of {len(own)} | {mean} | {worst} | {lost(runs, name)} | {best:.3f} |")


def ranks(options: argparse.Namespace) -> None:
    """A Markdown line per arm at its best strength, of the runs that generalised: ranks of W_Q, W_K, products."""
    runs = _sweep(options)
    keys = ("stable_rank", "effective_rank", "product_stable_rank", "product_effective_rank")
    print(
        "| arm | best strength | runs | stable rank W_Q, W_K | effective | stable rank W_KᵀW_Q of a head | effective |"
    )
    print("|" + "---|" * 7)
    for arm in runs.summary(options.reference)["arms"]:
        best = arm["boundary"]
        own = [row for row in runs.of(arm["name"], best) if best and row["outcome"] == "generalised"]
        if own:
            figures = " | ".join(stored.mean_of(own, key, ".2g") for key in keys)
            print(f"| {arm['name']} | {best['strength']:g} | {len(own)} | {figures} |")


def stuck(options: argparse.Namespace) -> None:
    """A Markdown line per run of the plateau: right answers, and answers right but for the sign, through time."""
    for path in options.directories:
        rows = json.loads(path.read_text())["rows"]
        steps = [point[0] for point in rows[0]["curve"]]
        shown = [step for step in steps if step % 600 == 0]
        print(
            f"| arm | fraction | seed | {' | '.join(f'step {step}' for step in shown)} |\n|" + "---|" * (3 + len(shown))
        )
        for row in rows:
            points = [f"{p[3]:.2f} + {p[4]:.2f}" for p in row["curve"] if p[0] in shown]
            name = f"{row['arm']} {row['strength']:g}" if row["strength"] else row["arm"]
            print(f"| {name} | {row['fraction']:g} | {row['seed']} | {' | '.join(points)} |")


def figure_two(arm: str, fraction: float) -> Row:
    """A run of `benchmarks/mechanism.py`."""
    rows = json.loads(MECHANISM.read_text())["rows"]
    return next(row for row in rows if (row["arm"], row["fraction"]) == (arm, fraction))


def mechanism(options: argparse.Namespace) -> None:
    """A Markdown line per run of `benchmarks/mechanism.py`: accuracy, rank in time, spectrum, scores by frequency.

    Values of W_Q are those of the first layer, at the run's best; energies are beside those of the untrained network.
    """
    heads = (
        "fraction", "arm", "test, at its best", "at step", "at the end", "stable rank at 0, 500, its best",
        "values of W_Q above a hundredth", "energy at equal frequencies: untrained, best, end",
        "pairs with 95 %: untrained, best, end",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for path in options.directories:
        for row in sorted(json.loads(path.read_text())["rows"], key=lambda row: row["fraction"]):
            ranks = {point[0]: point[3] for point in row["curve"]}
            best, (*_, untrained_share, untrained_pairs) = row["best"], row["curve"][0]
            values = best["singular_values"]["query"][0]
            shares = (untrained_share, best["equal_frequencies"], row["end"]["equal_frequencies"])
            pairs = (untrained_pairs, best["pairs"], row["end"]["pairs"])
            shown = (
                f"{row['fraction']:g}", f"{row['arm']} {row['strength']:g}", f"{best['test_accuracy']:.2f}",
                f"{best['step']:,}", f"{row['end']['test_accuracy']:.2f}",
                ", ".join(f"{ranks[step]:.1f}" for step in (0, 500, best["step"]) if step in ranks),
                f"{sum(value > 0.01 * values[0] for value in values)} of {len(values)}",
                ", ".join(f"{share:.0%}" for share in shares), ", ".join(f"{count:,}" for count in pairs),
            )  # fmt: skip
            print(f"| {' | '.join(shown)} |")


def arms(options: argparse.Namespace) -> None:
    """A Markdown line per arm of any of the directories: what it does, and what it is a control of."""
    there = {row["arm"].partition("@")[0] for path in options.directories for row in read_metrics(path)}
    print("| arm | what it does | what it rules out |\n|---|---|---|")
    for arm in every_arm(Boundary()).values():
        if arm.name in there:
            print(f"| {arm.name} | {arm.description} | {arm.control or '—'} |")


TABLES = {
    "arms": arms,
    "table": table,
    "ratios": ratios,
    "events": events,
    "delay": delay,
    "rests": rests,
    "cells": cells,
    "steps": steps,
    "ranks": ranks,
    "ends": ends,
    "stuck": stuck,
    "mechanism": mechanism,
    "picture": picture,
}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", nargs="*")
    parser.add_argument("--rest", type=float, help="only this decay of the rest of the model")
    parser.add_argument("--reference")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, store, TABLES, _options, arguments)


if __name__ == "__main__":
    main()
