"""Makes every number and picture of `docs/findings` from the rows in `docs/data`: `make findings`.

    python benchmarks/findings.py             # rewrites the pages, and draws the pictures whose rows have changed
    python benchmarks/findings.py --check     # fails if a page or a picture differs from the rows; below a minute
    python benchmarks/findings.py --redraw margin factor    # draws these pictures again; --redraw alone, all of them

A page is Markdown in which what is made stands between two comments, on a line or in lines of its own:

    low-rank decay held in <!-- findings: held grok_default low_rank -->3 of 3<!-- end --> seeds

    <!-- findings: boundary table docs/data/boundary/selection --rest 2 -->
    <!-- end -->

The words are a function below and its arguments, or a script of tables (`boundary` is
`benchmarks/boundary_findings.py`) and its arguments, which are printed above the table. The index is made from
`benchmarks/claims.py`, the pictures from `benchmarks/pictures.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerators_findings
import attention_findings
import boundary_findings
import claims
import compress_findings
import grok_findings
import margin_findings
import pictures
import pretrained_findings
import rotary_findings
import schedule_findings
import stored

from rankdecay.lab.experiments.boundary.claims import seeds_words
from rankdecay.lab.store import read_json

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("docs/data")
PAGES = (
    "README.md",
    "docs/guides/choose-a-decay.md",
    "docs/guides/lab.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "findings").glob("*.md")),
)
MARKED = re.compile(r"(<!-- findings: (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)
SCRIPTS = (
    "boundary",
    "attention",
    "margin",
    "factor",
    "rotary",
    "grok",
    "cost",
    "schedule",
    "accelerators",
    "compress",
    "pretrained",
)


# --- tables: what a script prints ---


def _printed(script: str, words: Sequence[str]) -> str:
    """The command of a table, and what it prints."""
    taken = io.StringIO()
    with contextlib.redirect_stdout(taken):
        importlib.import_module(f"{script}_findings").main(words)
    return f"`python benchmarks/{script}_findings.py {shlex.join(words)}`\n\n{taken.getvalue().strip()}"


# --- numbers ---


def _json(path: str) -> Any:
    return json.loads((DATA / path).read_text())


def value(path: str, keys: str, form: str = "g") -> str:
    """A number of a JSON file: ``value monitor.json share .3%``; ``rows:7b.read_ms`` is of the row called 7b."""
    found: Any = _json(path)
    for key in keys.split("."):
        if ":" in key:
            name, _, wanted = key.partition(":")
            rows = found[name]
            named = [row for row in rows if wanted in (row.get("name"), row.get("what"), row.get("model"))]
            if not named:
                raise ValueError(f"{DATA / path} has nothing called {wanted!r} among its {name}")
            found = named[0]
        else:
            found = found[int(key)] if isinstance(found, list) else found[key]
    return format(found, form)


def held(run: str, arm: str) -> str:
    """In how many seeds an arm of `grok` held 95 %."""
    return grok_findings.held(stored.arms(DATA / run)[arm])


def median(run: str, arm: str) -> str:
    """The median step at which an arm of `grok` held 95 %."""
    steps = stored.arms(DATA / run)[arm]["steps_to_generalise"]
    return "none" if steps is None else f"{steps:g}"


def lost(run: str, arm: str) -> str:
    """How many seeds of an arm of `grok` that held the threshold end below it."""
    return str(grok_findings.lost(DATA / run, arm))


def final(run: str, arm: str, key: str = "test_accuracy", form: str = ".1%") -> str:
    """A figure of an arm of `grok` at the end."""
    return format(stored.arms(DATA / run)[arm][key], form)


def _sweep(name: str, rest: str = "") -> boundary_findings.Sweep:
    return boundary_findings.sweep((DATA / "boundary" / name,), float(rest) if rest else None)


def at(name: str, arm: str, rest: str = "") -> str:
    """The boundary of an arm at its best strength with its interval."""
    sweep = _sweep(name, rest)
    return sweep.between(sweep.arm(arm)["boundary"])


def best(name: str, arm: str, key: str, rest: str = "", form: str = ".2g") -> str:
    """A mean over the runs of an arm's best column, or what the column is: ``best selection smooth stable_rank 2``."""
    arm_found = _sweep(name, rest).arm(arm)
    return format(arm_found["boundary"].get(key, arm_found.get(key)), form)


def data_ratio(name: str, arm: str, other: str, rest: str = "") -> str:
    """Data of one arm over data of another, the seed as the unit."""
    return seeds_words(_sweep(name, rest).ratio(arm, other)["by_seed"])


def fits_ratio(name: str, arm: str, other: str, rest: str = "") -> str:
    """The same by the two fitted boundaries."""
    return boundary_findings.fits_words(_sweep(name, rest).ratio(arm, other))


def time_ratio(name: str, arm: str, other: str, rest: str = "") -> str:
    """Time of one arm over time of another, the seed as the unit."""
    return seeds_words(_sweep(name, rest).ratio(arm, other)["time"])


def comparisons(name: str, arm: str, rest: str = "") -> str:
    """How many arms an arm is compared with."""
    return str(len(_sweep(name, rest).summary(arm)["differences"]))


def across_rests(name: str, arm: str, rest: str, other: str, other_rest: str) -> str:
    """Data of one arm over data of another, each at a decay of the rest of its own, the seed as the unit."""
    return seeds_words(
        boundary_findings.across_rests(_sweep(name), arm, float(rest), other, float(other_rest))["by_seed"]
    )


def _of_size(name: str, arm: str, size: str, rest: str) -> list[dict[str, Any]]:
    sweep = _sweep(name, rest)
    return [r for r in sweep.of(arm, sweep.arm(arm)["boundary"]) if sweep.size(r["train_fraction"]) == size]


def cell(name: str, arm: str, size: str, rest: str = "") -> str:
    """Seeds that held at one size, of an arm at its best strength."""
    rows = _of_size(name, arm, size, rest)
    return f"{sum(row['outcome'] == 'generalised' for row in rows)} of {len(rows)}"


def median_step(name: str, arm: str, size: str, rest: str = "") -> str:
    """The median step at which the runs of one size held, of an arm at its best strength."""
    held = [row["steps_to_generalise"] for row in _of_size(name, arm, size, rest) if row["outcome"] == "generalised"]
    return f"{statistics.median(held):g}"


def ended(name: str, arm: str, accuracy: str) -> str:
    """How many runs of an arm that generalised end with at least so much of the test set right."""
    last = boundary_findings.lasts(_sweep(name), arm)
    return f"{sum(value >= float(accuracy) for value in last)} of {len(last)}"


def held_from_to(name: str, arm: str, size: str, lowest: str, highest: str, rest: str = "") -> str:
    """Seeds of an arm that held at one size, least and most over its strengths from one to another."""
    sweep = _sweep(name, rest)
    held: dict[float, int] = {}
    for row in sweep.of(arm):
        if sweep.size(row["train_fraction"]) == size and float(lowest) <= row["strength"] <= float(highest):
            held[row["strength"]] = held.get(row["strength"], 0) + (row["outcome"] == "generalised")
    low, high = min(held.values()), max(held.values())
    return str(low) if low == high else f"{low} to {high}"


def _column(name: str, arm: str, strength: str) -> list[dict[str, Any]]:
    """The runs of an arm at one strength."""
    return [row for row in _sweep(name).of(arm) if row["strength"] == float(strength)]


def held_at(name: str, arm: str, strength: str) -> str:
    """The step at which the runs of a column held, the mean of those that did."""
    rows = _column(name, arm, strength)
    return f"{statistics.fmean(r['steps_to_generalise'] for r in rows if r['steps_to_generalise'] is not None):,.0f}"


def column(name: str, arm: str, strength: str, key: str, form: str = ".2f", size: str = "") -> str:
    """A mean over the runs of an arm at one strength, of every size or of one."""
    shown = _sweep(name).size
    rows = [row for row in _column(name, arm, strength) if size in ("", shown(row["train_fraction"]))]
    return format(statistics.fmean(row[key] for row in rows), form)


def most(name: str, arm: str, strength: str, key: str) -> str:
    """The greatest figure over the runs of an arm at one strength, of every size and seed."""
    return f"{max(row[key] for row in _column(name, arm, strength)):.2f}"


def holds(name: str, arm: str, strength: str, low: str, high: str) -> str:
    """How many runs of an arm at one strength held, of those of the sizes from one to another."""
    rows = _column(name, arm, strength)
    rows = [row for row in rows if float(low) <= row["train_fraction"] <= float(high)]
    return f"{sum(row['outcome'] == 'generalised' for row in rows)} of {len(rows)}"


def least_strength(name: str, arm: str, size: str, accuracy: str) -> str:
    """The lowest strength of an arm whose best test accuracy at one size is at least so much, a mean over seeds."""
    sweep = _sweep(name)
    strengths = sorted({row["strength"] for row in sweep.of(arm) if sweep.size(row["train_fraction"]) == size})
    enough = [s for s in strengths if _best_accuracy(sweep, arm, float(size), s) >= float(accuracy)]
    return f"{enough[0]:g}" if enough else "none"


def least_data(name: str, arm: str, accuracy: str, strength: str = "") -> str:
    """The smallest size at which an arm has such a best test accuracy, over seeds, at its best strength or one."""
    sweep = _sweep(name)
    size = boundary_findings.smallest(sweep, arm, float(accuracy), float(strength) if strength else None)
    return "none" if size is None else str(sweep.size(size))


def reached(name: str, arm: str, size: str, strength: str = "") -> str:
    """The best test accuracy of an arm at one size, a mean over seeds, at its best strength or one."""
    sweep = _sweep(name)
    strengths = {row["strength"] for row in sweep.of(arm) if sweep.size(row["train_fraction"]) == size}
    found = [_best_accuracy(sweep, arm, float(size), s) for s in strengths if not strength or s == float(strength)]
    return f"{max(found):.2f}"


def least_held(name: str, arm: str, accuracy: str, strength: str = "") -> str:
    """How many seeds of an arm held the threshold at the size that `least_data` says."""
    sweep = _sweep(name)
    found = boundary_findings.reaching(sweep, arm, float(accuracy), float(strength) if strength else None)
    if found is None:
        return "none"
    rows = [row for row in sweep.of(arm) if (row["train_fraction"], row["strength"]) == found]
    return f"{sum(row['steps_to_generalise'] is not None for row in rows)} of {len(rows)}"


def times_alike(name: str, arm: str, other: str) -> str:
    """Steps of an arm over those of another, over the same seeds at each size: least and most over the sizes.

    Each at its soonest strength of those with all seeds at all sizes; a run that never held counts with its budget.
    """
    ratios = boundary_findings.alike(_sweep(name), arm, other).values()
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


def sizes_alike(name: str, arm: str, other: str) -> str:
    """The sizes that `times_alike` compares, from the smallest on: those at which a run of one of the two held."""
    return f"{min(boundary_findings.alike(_sweep(name), arm, other)):g}"


def fullest(name: str, arm: str) -> str:
    """The strength at which `times_alike` takes an arm."""
    return f"{boundary_findings.fullest(_sweep(name), arm):g}"


def median_end(name: str, arm: str, key: str, ended: str, strength: str = "", form: str = ".1f") -> str:
    """The median of a figure at the end of an arm's runs, or a column's, that held (``held``) or did not (``not``)."""
    rows = _column(name, arm, strength) if strength else _sweep(name).of(arm)
    return format(statistics.median(r[key] for r in rows if (r["outcome"] == "generalised") == (ended == "held")), form)


def ends_of_held(name: str, arm: str, key: str, form: str = ".1f") -> str:
    """A figure at the end of an arm's runs that held 95 %, least and most."""
    found = [row[key] for row in _sweep(name).of(arm) if row["outcome"] == "generalised"]
    return f"{min(found):{form}} to {max(found):{form}}"


def _best_accuracy(sweep: boundary_findings.Sweep, arm: str, size: float, strength: float) -> float:
    return statistics.fmean(boundary_findings.best_accuracies(sweep, arm, size, strength))


def columns_between(name: str, size: str, low: str, high: str) -> str:
    """Columns, over all arms, whose best test accuracy at one size is between two values in the mean over seeds."""
    sweep = _sweep(name)
    columns = {(row["arm"], row["strength"]) for row in sweep.rows if sweep.size(row["train_fraction"]) == size}
    means = [_best_accuracy(sweep, arm, float(size), strength) for arm, strength in columns]
    return f"{sum(float(low) <= mean <= float(high) for mean in means)} of {len(means)}"


def cell_mean(name: str, arm: str, size: str, key: str, rest: str = "", form: str = ".2g") -> str:
    """A mean over the runs of one size, of an arm at its best strength."""
    rows = _of_size(name, arm, size, rest)
    return format(statistics.fmean(row[key] for row in rows), form)


def delay(name: str, arm: str, key: str, rest: str = "") -> str:
    """When the runs of an arm memorised, and how much later they generalised: a key of `boundary_findings.delays`."""
    return f"{boundary_findings.delays(_sweep(name, rest), arm)[key]:g}"


def switched(name: str, arm: str, strength: str, which: str, rest: str = "") -> str:
    """Steps from the switch to generalising, from 1000 examples on (``most``) or below (``few``)."""
    sweep = _sweep(name, rest)
    found = boundary_findings.switched(sweep, arm, float(strength))
    steps = [s for f, some in found.items() for s in some if (f * sweep.whole >= 999) == (which == "most")]
    return f"{min(steps)}–{max(steps)}"


def events(name: str, arm: str, key: str, rest: str = "") -> str:
    """In how many runs of an arm's best column the rank fell first, and so on."""
    found = _sweep(name, rest).arm(arm)["events"]
    return f"{found[key]} of {sum(found.values())}"


def chance() -> str:
    """Beyond what difference the loss of two language models is not chance, as it was measured."""
    return ", ".join(f"{found['bound']:.3f} ({found['runs']} {found['of']})" for found in attention_findings.chances())


def loss(run: str, arm: str, strength: str, form: str = "+.3f") -> str:
    """The loss of a cell above that of no decay."""
    cells = _cells(run)
    own = next(cell for cell in cells if (cell["name"], cell["strength"]) == (arm, float(strength)))
    return format(own["loss"] - next(cell["loss"] for cell in cells if cell["strength"] == 0), form)


def rank(run: str, arm: str, strength: str, part: str = "query_key", qk_norm: str = "no") -> str:
    """The pseudo rank of a part of a cell."""
    return measure(run, arm, strength, part, "pseudo_rank", qk_norm)


def measure(run: str, arm: str, strength: str, part: str, name: str, qk_norm: str = "no") -> str:
    """A measure of a part of a cell, as `imbalance` or `nuclear_gap`."""
    return f"{attention_findings.measure(_cell(run, arm, strength, qk_norm), part, name):.2f}"


def accuracy(run: str, arm: str, strength: str, qk_norm: str = "no") -> str:
    """The accuracy of a cell."""
    return f"{_cell(run, arm, strength, qk_norm)['accuracy']:.2f}"


def _cell(run: str, arm: str, strength: str, qk_norm: str) -> dict[str, Any]:
    wanted = arm, float(strength), qk_norm == "yes"
    for cell in _cells(run):
        if (cell["name"], cell["strength"], cell["qk_norm"]) == wanted:
            return cell
    raise ValueError(f"{run} has no cell of {arm} at {strength}")


@functools.cache
def _cells(run: str) -> list[dict[str, Any]]:
    return attention_findings.cells_of(DATA / run)


def svm(run: str, arm: str, key: str) -> str:
    """A figure of an arm of `margin`; ``nearer`` and ``excess`` are put in words."""
    row = stored.arms(DATA / "margin" / run)[arm]
    if key == "nearer":
        return f"{row['nearer_nuclear']} of {row['seeds']}"
    if key == "excess":
        own = [excess for excess in row["each"]["nuclear_excess"] if excess is not None]
        return f"{row['nuclear_excess']:.2%} ({min(own):.2%}–{max(own):.2%})"
    if key == "cosine":
        return f"{row['cosine_nuclear']:.3f} (least {row['cosine_nuclear_least']:.3f})"
    return f"{row[key]:.3g}"


def _factor(arm: str, run: str = "standard") -> list[dict[str, Any]]:
    rows = (read_json(DATA / "factor" / run / "summary.json") or {"arms": []})["arms"]
    return [row for row in rows if row["name"] == arm and row["strength"] > 0]


def spread(name: str, arm: str, key: str, rest: str = "", form: str = ".2g") -> str:
    """The least and largest of a figure over the runs of an arm's best column."""
    sweep = _sweep(name, rest)
    found = [row[key] for row in sweep.of(arm, sweep.arm(arm)["boundary"]) if row[key] is not None]
    return f"{min(found):{form}}–{max(found):{form}}"


def ends(name: str, arm: str, key: str) -> str:
    """How many runs of an arm generalised, how many of them end below the threshold, and the worst."""
    sweep = _sweep(name)
    last = boundary_findings.lasts(sweep, arm)
    found = {"runs": len(last), "lost": boundary_findings.lost(sweep, arm), "worst": f"{min(last):.3f}"}
    return str(found[key])


def published(key: str) -> str:
    """The prototype's published picture beside our cells: a key of `boundary_findings.published`."""
    return str(boundary_findings.published(DATA / "boundary" / "prototype")[key])


def rank_of(arm: str) -> str:
    """The rank at which an arm of `factor` ends, over its strengths."""
    found = {f"{row['rank']:g}" for row in _factor(arm)}
    return "–".join(sorted(found)[:: max(len(found) - 1, 1)])


def sent(unit: str, processes: str) -> str:
    """Bytes that a process sends for a decay, of the smallest model under FSDP2."""
    rows = _json("sharded.json")["rows"]
    wanted = ("FSDP2", int(processes), unit)
    row = next(r for r in rows if (r["layout"], r["processes"], r["unit"]) == wanted)
    return f"{sum(row['sent'].values()):,}"


def settled(arm: str) -> str:
    """How many of the matrix problems of an arm end at the soft threshold."""
    rows = _factor(arm)
    return f"{sum(row['settled'] or 0 for row in rows):,} of {sum(row['seeds'] for row in rows):,}"


def worst(arm: str, key: str, form: str = ".1e") -> str:
    """The largest of a figure of an arm of `factor` over its strengths."""
    return format(max(row[key] for row in _factor(arm) if row[key] is not None), form)


def rates(of: str) -> str:
    """By how much the measured rate of the imbalance is off 2ηλ, or off that of the steps, at most."""
    key = {"flow": "predicted_rate", "steps": "predicted_rate_of_steps"}[of]
    return f"{max(abs(row['imbalance_rate'] / row[key] - 1) for row in _factor('factors')):.1%}"


def noise(key: str) -> str:
    """A figure of the rows on Proposition B.2: ``off``, ``by_noise``, ``none``, ``by_rate``, ``bound``, ``rate``."""
    rows = _json("factor/more.json")["noise"]
    floor = {(row["noise"], row["rate"], row["strength"]): row["floor"] for row in rows}
    if key == "off":
        return f"{max(row['off_identity'] for row in rows):.1%}"
    if key == "bound":
        return f"{max(row['of_printed_bound'] for row in rows):.1%}"
    if key == "rate":
        shares = [row["rate_over_predicted"] for row in rows]
        return f"{min(shares):.2f}–{max(shares):.2f}"
    if key == "none":
        return f"{floor[0.0, 0.1, 0.4]:.0e}"
    other = {"by_noise": (0.01, 0.1, 0.4), "by_rate": (0.1, 0.1, 0.4)}[key]
    own = (0.1, 0.1, 0.4) if key == "by_noise" else (0.1, 0.03, 0.4)
    return f"{floor[own] / floor[other]:.2g}"


def left(arm: str) -> str:
    """The share of the imbalance that is left under an arm of `factor`, least and most over strengths."""
    shares = [row["imbalance"] / row["imbalance_initial"] for row in _factor(arm)]
    return f"{min(shares):.0%}–{max(shares):.0%}"


def stuck(key: str) -> str:
    """Of the runs of the plateau at .8 under L2 at step 1200: right answers, with either sign, or when it ends."""
    rows = [row for row in _json("plateau.json")["rows"]
            if (row["arm"], row["fraction"]) == ("l2", 0.8)]  # fmt: skip
    at = [next(point for point in row["curve"] if point[0] == 1200) for row in rows]
    if key == "right":
        return f"{min(p[3] for p in at):.2f}–{max(p[3] for p in at):.2f}"
    if key == "either":
        return f"{min(p[3] + p[4] for p in at):.2f}–{max(p[3] + p[4] for p in at):.2f}"
    firsts = [next(point[0] for point in row["curve"] if point[3] >= 0.9) for row in rows]
    return f"{min(firsts):,} and {max(firsts):,}"


def figure_two(arm: str, fraction: str, when: str, key: str, form: str = ".0%") -> str:
    """A figure of a run of `benchmarks/mechanism.py`: at its ``best``, at its ``end``, ``untrained``, or at a step."""
    row = boundary_findings.figure_two(arm, float(fraction))
    if when in ("best", "end"):
        return format(row[when][key], form)
    place = _json("boundary/mechanism.json")["columns"].index(key)
    step = 0 if when == "untrained" else int(when)
    return format(next(point[place] for point in row["curve"] if point[0] == step), form)


def share(path: str, what: str) -> str:
    """The share of a training step of GPT-2 that a reading takes."""
    row = next(r for r in _json(path)["rows"] if r["what"] == what and r["case"] == "gpt2")
    return f"{next(iter(row['share'].values())):.2%}"


def planes(key: str, form: str = ".1f") -> str:
    """Milliseconds of the hook of `Planes`: ``ms`` in the median, or ``best``."""
    return format(_json("planes.json")["readings"]["planes, the hook"][key], form)


def planes_share(key: str) -> str:
    """The share of a training step that the hook of `Planes` takes."""
    readings = _json("planes.json")["readings"]
    return f"{readings['planes, the hook'][key] / readings['training step'][key]:.2%}"


def against(path: str, what: str, other: str) -> str:
    """The ratio of two readings of 24 × 768²."""
    rows = {r["what"]: r["ms"] for r in _json(path)["rows"] if r["case"] == "24x768"}
    return f"{rows[what] / rows[other]:.2f}"


NUMBERS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        value, held, median, lost, final, at, best, data_ratio, fits_ratio, time_ratio, comparisons, across_rests,
        median_step, ended, cell, cell_mean, held_from_to, held_at, holds, most, column, least_strength, least_data,
        least_held, reached,
        times_alike, sizes_alike, fullest, ends_of_held, median_end, columns_between, delay,
        switched, events, chance, loss, rank, measure, accuracy, svm, settled, worst, rates, left, noise, stuck,
        figure_two, share, against, spread, ends, published, rank_of, sent, planes, planes_share,
    )
}  # fmt: skip
NUMBERS |= {"seeds_of": attention_findings.seeds_of, "learnt": attention_findings.learnt}
NUMBERS |= {"e1": schedule_findings.words}
NUMBERS |= {"control": attention_findings.control, "plane": attention_findings.plane}
NUMBERS |= {"above_none": attention_findings.above_none, "emptied": attention_findings.emptied}
NUMBERS |= {"refilled": attention_findings.refilled, "power": attention_findings.power}
NUMBERS |= {"of_pretrained": pretrained_findings.figure, "rounding": pretrained_findings.rounding_words}
NUMBERS |= {"planes_left": rotary_findings.words}
NUMBERS |= {"beyond": margin_findings.beyond}
NUMBERS |= {"accelerated": accelerators_findings.words, "accelerated_tuning": accelerators_findings.in_tuning}
NUMBERS |= {"if_test_decided": accelerators_findings.if_test_decided}
NUMBERS |= {"compressed": compress_findings.difference, "cut_rise": compress_findings.rise}


@functools.cache
def made(words: str) -> str:
    """Text or figure that replaces what stands between two comments, by the words of the first.

    Raises:
        ValueError: For words that nothing is made from.
    """
    name, *arguments = shlex.split(words)
    if name == "claims":
        return claims.index(made)
    if name in SCRIPTS:
        return _printed(name, arguments)
    if name not in NUMBERS:
        raise ValueError(
            f"nothing is called {name!r} in `findings: {words}`: choose of {', '.join(NUMBERS)}, {SCRIPTS}"
        )
    return NUMBERS[name](*arguments)


def remade(text: str) -> str:
    """A page with everything in it made anew."""

    def replaced(match: re.Match[str]) -> str:
        block = match[3].startswith("\n")
        new = made(match[2])
        return match[1] + (f"\n{new}\n" if block else new) + match[4]

    return MARKED.sub(replaced, text)


def main() -> int:
    """Write or check the pages and pictures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--redraw", nargs="*", metavar="NAME", help="draw these pictures, or all, also if their rows are as they were"
    )
    given = parser.parse_args()
    os.chdir(ROOT)
    chosen = () if given.redraw is None else given.redraw or (*pictures.RUNS, *pictures.CHARTS)
    stale = []
    for name in PAGES:
        path = Path(name)
        text = path.read_text(encoding="utf-8")
        new = remade(text)
        if new == text:
            continue
        stale.append(name)
        if not given.check:
            path.write_text(new, encoding="utf-8")
    stale += pictures.check() if given.check else pictures.draw_all(chosen)
    if given.check and stale:
        print(f"not what the rows in docs/data say: {', '.join(stale)}; run make findings", file=sys.stderr)
        return 1
    print(f"{'checked' if given.check else 'written'}: {', '.join(stale) or 'all as it was'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:  # a claim that its rows do not bear out, or words that nothing is made from
        sys.exit(f"findings: {error}")
