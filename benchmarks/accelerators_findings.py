"""The tables of `docs/findings` on published accelerators of grokking: as much of them as there are rows.

    python benchmarks/accelerators_findings.py state docs/data/accelerators/selection       # what has been run
    python benchmarks/accelerators_findings.py tuned docs/data/accelerators/selection       # the frozen settings
    python benchmarks/accelerators_findings.py test docs/data/accelerators/selection        # the held-out runs
    python benchmarks/accelerators_findings.py contrasts docs/data/accelerators/selection   # those named beforehand
    python benchmarks/accelerators_findings.py controls docs/data/accelerators/selection    # Muon against its controls
    python benchmarks/accelerators_findings.py cost docs/data/accelerators/selection        # milliseconds of a step

The rows are made by `benchmarks/accelerators.py`, whose docstring is the protocol. An arm is shown when every held-out
run of it is there, and not before.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import accelerators
import schedule_findings
import stored
import tuning
from accelerators import Row
from schedule import LEVEL
from schedule_findings import shown

from rankdecay.lab.ensemble.outcome import steps_to_hold

DATA = Path("docs/data/accelerators")


@functools.cache
def result(directory: Path) -> Row | None:
    """Figures and contrasts of the held-out runs that are there; None before there are any."""
    held = schedule_findings.frozen(directory)
    if held is None or not schedule_findings.rows_of(directory, "test"):
        return None
    protocol = accelerators.Accelerated(**schedule_findings.protocol_fields(held))
    return accelerators.report(protocol, directory) | {"protocol": protocol}


def costs(directory: Path) -> Row:
    """The measured time of a step, by arm; no arms before it was measured."""
    path = directory / "cost.json"
    return json.loads(path.read_text()) if path.exists() else {"arms": {}}


def words(key: str, arm: str = "", against: str = "learning_rate", task: str = "selection") -> str:
    """A figure of an arm for the index; a dash before its rows are there.

    Args:
        key: ``time``, ``still``, ``lost``, ``milliseconds``, or ``ratio`` or ``status`` of a contrast.
        arm: the arm; ``still`` and ``lost`` without one, or of ``all``, are of every run that held 95 %.
        against: what the contrast is with.
        task: whose rows are read.
    """
    found = result(DATA / task)
    arms = {row["arm"]: row for row in found["arms"]} if found else {}
    pairs = [*found["contrasts"], *found["controls"]] if found else []
    contrasts = {(one["arm"], one["against"]): one for one in pairs}
    one = contrasts.get((arm, against))
    if key == "status":
        if one is None or one["p_holm"] >= LEVEL:
            return "open"
        return "holds with a condition" if one["ratio"] < 1 else "contradicted"
    if key == "ratio":
        return shown(one) if one else "—"
    if key in ("still", "lost") and arm in ("", "all"):
        kept, ever = (sum(own[what] for own in arms.values()) for what in ("still", "held"))
        return f"{kept if key == 'still' else ever - kept} of {ever}"
    if key == "milliseconds":
        measured = costs(DATA / task)["arms"]
        return f"{measured[arm]['milliseconds']:.1f}" if arm in measured else "—"
    if arm not in arms:
        return "—"
    own = arms[arm]
    if key == "lost":
        return f"{own['held'] - own['still']} of {own['held']}"
    if key == "time":
        return f"{list(own['restricted_mean_time'].values())[-1]:,.0f}"
    return f"{own['still']} of {own['runs']}"


def in_tuning(arm: str, strength: str, rest: str = "2", task: str = "selection") -> str:
    """How many runs of tuning held 95 % at a setting of an arm."""
    wanted = arm, float(strength), float(rest)
    rows = schedule_findings.rows_of(DATA / task, "tune")
    some = [row for row in rows if (row["arm"], row["strength"], row["rest_decay"]) == wanted]
    return f"{sum(row['steps_to_generalise'] is not None for row in some)} of {len(some)}" if some else "—"


def if_test_decided(what: str, task: str = "selection") -> str:
    """How often a held-out run would have held 95 % at the same evaluation, had the test set decided.

    Of all runs, which are trained to the end of their budget whatever they hold; one that holds by neither set is the
    same.

    Args:
        what: ``same``, or ``near``, at most one evaluation apart; or ``mean``, of test minus validation, in steps, of
            those that hold by both.
        task: whose rows are read.
    """
    by_both: list[tuple[int | None, int | None]] = []
    for row in schedule_findings.rows_of(DATA / task, "test"):
        steps = zip(row["curve"]["step"], row["curve"]["test_accuracy"], strict=True)
        of_test = [{"step": step, "test_accuracy": accuracy} for step, accuracy in steps]
        by_both.append((row["steps_to_generalise"], steps_to_hold(of_test, accelerators.HOLDS)))
    if not by_both:
        return "—"
    apart = [test - decides for decides, test in by_both if decides is not None and test is not None]
    if what == "mean":
        return f"{statistics.fmean(apart):+.0f}"
    one = 0 if what == "same" else accelerators.PROTOCOLS[task].evaluate_every
    alike = sum(abs(steps) <= one for steps in apart) + by_both.count((None, None))
    return f"{alike / len(by_both):.0%}"


# --- the tables ---


def state(options: argparse.Namespace) -> None:
    """The state of the runs, and what may be claimed from them."""
    for directory in options.directories:
        held, found = schedule_findings.frozen(directory), result(directory)
        if held is None:
            print("Not run yet: nothing is tuned, and nothing is claimed.")
            continue
        tuned, all_arms = list(held["arms"]), list(accelerators.GRIDS)
        done = [arm["arm"] for arm in found["arms"]] if found else []
        print(f"Tuned and frozen: {len(tuned)} of {len(all_arms)} arms; held-out runs are all there of {len(done)}.")
        lacking = [f"`{arm}`" for arm in all_arms if arm not in done]
        if lacking:
            print(f"Not run to the end, and nothing is claimed of them: {', '.join(lacking)}.")


def tuned(options: argparse.Namespace) -> None:
    """A Markdown line per arm: what was tried, and what is frozen; an edge is one of the rows, at the best decay."""
    for directory in options.directories:
        held = schedule_findings.frozen(directory)
        if held is None:
            print("(Tuning has not ended: nothing is frozen.)")
            continue
        rows = schedule_findings.rows_of(directory, "tune")
        runs = Counter(row["arm"] for row in rows)
        heads = ["arm", "strengths tried", "best", "decay of the rest", "runs", "restricted mean time"]
        heads.append("inside its grid")
        print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
        for own in sorted(held["arms"].values(), key=lambda own: own["restricted_mean_time"]):
            edges = tuning.edges(own, rows)
            inside = f"no: {', '.join(edges)}" if edges else "yes"
            if own["restricted_mean_time"] >= held["protocol"]["tune_budget"]:
                inside = "no: nothing held"
            tried = ", ".join(f"{s:g}" for s in own["strengths"] if s) or "—"
            best = f"{own['strength']:g}" if own["strength"] else "—"
            cells = [own["name"], tried, best, f"{own['rest_decay']:g}", str(runs[own["name"]])]
            print(f"| {' | '.join(cells)} | {own['restricted_mean_time']:,.0f} | {inside} |")


def test(options: argparse.Namespace) -> None:
    """A Markdown line per arm, the fastest first: its held-out runs."""
    for directory in options.directories:
        found = result(directory)
        if found is None or not found["arms"]:
            print("(No arm has all of its held-out runs yet.)")
            continue
        horizons = found["protocol"].horizons
        heads = ["arm", "strength", "decay of the rest", "runs", *(f"mean time, at most {h:,}" for h in horizons)]
        heads += ["times", "held 95 %", "still, at the end", "test accuracy at the end"]
        print(f"| {' | '.join(heads)} |\n|---|" + "--:|" * (len(heads) - 1))
        for own in sorted(found["arms"], key=lambda own: own["restricted_mean_time"][str(horizons[-1])]):
            strength = f"{own['strength']:g}" if own["strength"] else "—"
            cells = [own["arm"], strength, f"{own['rest_decay']:g}", str(own["runs"])]
            cells += [f"{own['restricted_mean_time'][str(h)]:,.0f}" for h in horizons]
            cells += [", ".join(f"{t:.0f}" for t in own["times"]), str(own["held"]), str(own["still"])]
            print(f"| {' | '.join(cells)} | {own['test_accuracy']:.3f} |")


def contrasts(options: argparse.Namespace) -> None:
    """A Markdown line per contrast of arms that have all of their runs."""
    _pairs(options, "contrasts", {"p": "p", f"Holm, of {len(accelerators.CONTRASTS)}": "p_holm"})


def controls(options: argparse.Namespace) -> None:
    """A Markdown line per pair of Muon and its controls, which was not named beforehand."""
    _pairs(options, "controls", {"p, of this pair alone": "p"})


def _pairs(options: argparse.Namespace, kind: str, chances: dict[str, str]) -> None:
    """Print the pairs of one kind; ``chances`` names the p-value of every further column."""
    for directory in options.directories:
        found = result(directory)
        if found is None or not found[kind]:
            print("(Printed when every held-out run of both arms is there.)")
            continue
        heads = ["time of / over time of", "ratio (95 %)", "seeds", *chances]
        print(f"| {' | '.join(heads)} |\n|---|---|" + "--:|" * (len(heads) - 2))
        for one in found[kind]:
            cells = [f"{one['arm']} / {one['against']}", shown(one), str(one["seeds"])]
            cells += [f"{one[key]:.2g}" for key in chances.values()]
            print(f"| {' | '.join(cells)} |")


def cost(options: argparse.Namespace) -> None:
    """A Markdown line per arm: milliseconds of a step of one run, and times those of AdamW."""
    for directory in options.directories:
        measured = costs(directory)
        if not measured["arms"]:
            print("(Not measured yet.)")
            continue
        clock = "of one thread's own time" if measured["clock"] == "thread_time" else "on the clock"
        print(f"Milliseconds {clock}, {measured['places']} runs at once:\n")
        print("| arm | ms | of AdamW |\n|---|--:|--:|")
        for arm, own in sorted(measured["arms"].items(), key=lambda item: item[1]["of_adamw"]):
            print(f"| {arm} | {own['milliseconds']:.2f} | {own['of_adamw']:.2f} |")


def store(options: argparse.Namespace) -> None:
    """Copy the frozen settings; the rows are written where they stay."""
    schedule_findings.store(options)


TABLES = {"state": state, "tuned": tuned, "test": test, "contrasts": contrasts, "controls": controls, "cost": cost}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, store, TABLES, arguments=arguments)


if __name__ == "__main__":
    main()
