"""The tables of `docs/findings` on E1, the schedule of the norm: as much of it as there are rows.

    python benchmarks/schedule_findings.py state docs/data/schedule        # what has been run
    python benchmarks/schedule_findings.py tuned docs/data/schedule        # the frozen settings of every arm
    python benchmarks/schedule_findings.py test docs/data/schedule         # the held-out runs
    python benchmarks/schedule_findings.py contrasts docs/data/schedule    # the four that were named beforehand
    python benchmarks/schedule_findings.py others docs/data/schedule       # low rank against the other arms
    python benchmarks/schedule_findings.py secondary docs/data/schedule

The rows are made by `benchmarks/schedule.py`, whose docstring is the protocol. Contrasts are printed when every
held-out run of the arms they compare is there, and not before.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import schedule
import stored
import tuning

from rankdecay.lab.store import read_metrics

Row = dict[str, Any]
DATA = Path("docs/data/schedule")
SECONDARY = ("secondary", "secondary_beta2")
ANGLES = {"angular_step": "angle of the step", "angular_step_after": "after the decay", "rotation": "over 20 steps"}


# --- what is there ---


def rows_of(directory: Path, stage: str) -> list[Row]:
    """The rows of a stage, none where it has not begun."""
    return read_metrics(directory / stage) if (directory / stage / "config.json").exists() else []


def frozen(directory: Path) -> Row | None:
    """The settings that tuning froze, None before that."""
    path = directory / "tuned.json"
    return json.loads(path.read_text()) if path.exists() else None


def protocol_fields(held: Row) -> Row:
    """The fields of the protocol that settings were tuned by, as its class has them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in held["protocol"].items()}


def protocol_of(directory: Path) -> schedule.Protocol:
    """The protocol that the settings were tuned by; today's before that."""
    held = frozen(directory)
    if held is None:
        return schedule.Protocol()
    return dataclasses.replace(schedule.Protocol(), **protocol_fields(held))


def expected(directory: Path, arms: Collection[str] = tuple(schedule.GRIDS)) -> int:
    """How many held-out runs there are to be of some arms."""
    protocol = protocol_of(directory)
    return len(arms) * len(protocol.test_seeds) * len(protocol.test_sizes)


def complete(directory: Path, arms: Collection[str] = schedule.NAMED) -> bool:
    """Whether every held-out run of some arms is there, those of the contrasts if none are given."""
    held = frozen(directory)
    if held is None or not set(arms) <= set(held["arms"]):
        return False
    settings = {tuning.setting_of_frozen(held["arms"][arm]) for arm in arms}
    return sum(tuning.setting_of(row) in settings for row in rows_of(directory, "test")) >= expected(directory, arms)


@functools.cache
def result(directory: Path) -> Row:
    """Figures and contrasts of the held-out runs, which are all there."""
    return schedule.report(protocol_of(directory), directory)


def words(key: str, run: str = "") -> str:
    """E1 in words, for the index and the page; a dash before there are rows.

    Args:
        key: ``status``, ``headline``, ``runs``, ``held:ARM``; ``FIRST/SECOND`` for two arms at the last horizon, a
            contrast or not; ``variant:NAME`` for a variant over its arm.
        run: its replication, below `docs/data`, in place of E1 itself.
    """
    directory = DATA.with_name(run) if run else DATA
    if key == "runs":
        return f"{len(rows_of(directory, 'tune')):,} runs of tuning, {len(rows_of(directory, 'test')):,} held out"
    if not complete(directory):
        return {"status": "open", "headline": "not run to the end"}.get(key, "—")
    found = result(directory)
    if key == "headline":
        return found["headline"]
    if key == "status":
        return {"stands": "holds", "withdrawn": "contradicted", "open": "open"}[found["headline"]]
    if key.startswith("held:"):
        arm = next(arm for arm in found["arms"] if arm["arm"] == key.removeprefix("held:"))
        return f"{list(arm['held'].values())[-1]} of {arm['runs']}"
    first, _, second = key.partition("/")
    if key.startswith("variant:"):
        one = variant(directory, key.removeprefix("variant:"))
    else:
        one = against(directory, found["low_rank"] if first == "low_rank" else first, second)
    return shown(one)


def shown(ratio: Row) -> str:
    """A ratio of times with its interval."""
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def against(directory: Path, first: str, second: str) -> Row:
    """The time of an arm over that of another at the last horizon, a contrast or not; p is of this pair alone."""
    protocol = protocol_of(directory)
    rows = schedule.held_out(directory, schedule.tuned(directory, protocol))
    return schedule.contrast(schedule.log_ratios(rows, first, second, protocol.horizons[-1]))


def variant(directory: Path, name: str) -> Row:
    """The time of a variant over that of the arm it is held against."""
    return variants(directory)[name][2]


# --- the tables ---


def state(options: argparse.Namespace) -> None:
    """The state of the runs, and what may be claimed from them."""
    for directory in options.directories:
        tune, test = len(rows_of(directory, "tune")), len(rows_of(directory, "test"))
        if not tune:
            print("Not run yet: there are no rows, and nothing is claimed.")
        elif frozen(directory) is None:
            print(f"Tuning is under way: {tune:,} runs so far. Nothing is claimed before the held-out runs.")
        elif not complete(directory):
            print(f"The arms of the contrasts are tuned ({tune:,} runs so far), and frozen. Of {expected(directory):,} "
                  f"held-out runs {test:,} are there; contrasts are printed when all of these arms are, not before."
                  )  # fmt: skip
        else:
            headline = result(directory)["headline"]
            print(f"Tuned on {tune:,} runs, tested on {test:,}. By the rule that was stated beforehand the headline, "
                  f"*a schedule of the norm, not the rank*: **{headline}**.")  # fmt: skip
            if not complete(directory, schedule.GRIDS):
                others = ", ".join(f"`{arm}`" for arm in schedule.PARTS[1] if not complete(directory, (arm,)))
                print(f"\nArms that no contrast names, not run to the end: {others}.")


def tuned(options: argparse.Namespace) -> None:
    """A Markdown line per arm: what was tried, and what is frozen."""
    for directory in options.directories:
        held = frozen(directory)
        if held is None:
            print("(Tuning has not ended: nothing is frozen.)")
            continue
        rows = rows_of(directory, "tune")
        print("| arm | strengths tried | best | decay of the rest | restricted mean time | inside its grid |\n|---|"
              + "---|" * 5)  # fmt: skip
        for own in sorted(held["arms"].values(), key=lambda own: own["restricted_mean_time"]):
            edges = tuning.edges(own, rows)
            inside = f"no: {', '.join(edges)}" if edges else "yes"
            if own["restricted_mean_time"] >= held["protocol"]["tune_budget"]:
                inside = "no: nothing held"
            tried = ", ".join(f"{s:g}" for s in own["strengths"] if s) or "—"
            best = f"{own['strength']:g}" if own["strength"] else "—"
            cells = [own["name"], tried, best, f"{own['rest_decay']:g}", f"{own['restricted_mean_time']:,.0f}"]
            print(f"| {' | '.join(cells)} | {inside} |")


def test(options: argparse.Namespace) -> None:
    """A Markdown line per arm: its held-out runs."""
    for directory in options.directories:
        held, rows = frozen(directory), rows_of(directory, "test")
        if held is None or not rows:
            print("(No held-out runs yet.)")
            continue
        protocol = protocol_of(directory)
        heads = ["arm", "runs", "held 95 %", *(f"mean time, at most {h:,}" for h in protocol.horizons)]
        heads += ["test accuracy at the end", "stable rank", "‖W_Q‖", *ANGLES.values()]
        print(f"| {' | '.join(heads)} |\n|---|" + "--:|" * (len(heads) - 1))
        for own in held["arms"].values():
            some = [row for row in rows if tuning.setting_of(row) == tuning.setting_of_frozen(own)]
            print(_line([own["name"]], some, protocol.horizons))


def _line(first: Sequence[str], rows: Sequence[Row], horizons: Sequence[int]) -> str:
    cells = [*first, str(len(rows)), str(sum(row["steps_to_generalise"] is not None for row in rows))]
    cells += [f"{schedule.mean_time(rows, horizon):,.0f}" if rows else "—" for horizon in horizons]
    cells += [stored.mean_of(rows, key, ".3g") for key in ("test_accuracy", "stable_rank", "query_norm", *ANGLES)]
    return f"| {' | '.join(cells)} |"


def contrasts(options: argparse.Namespace) -> None:
    """A Markdown line per contrast and horizon, with its pre-stated tests."""
    for directory in options.directories:
        if not complete(directory):
            print("(Printed when every held-out run is there.)")
            continue
        found = result(directory)
        print("| read at | time of / over time of | ratio (95 %) | p | Holm, of four | within ± 8 %: p | more than 8 % "
              "faster: p |\n|--:|---|---|--:|--:|--:|--:|")  # fmt: skip
        for horizon, some in found["contrasts"].items():
            for one in some:
                ratio = f"{one['ratio']:.3f} ({one['low']:.3f}–{one['high']:.3f})"
                p = " | ".join(f"{one[key]:.2g}" for key in ("p", "p_holm", "p_equivalent", "p_faster"))
                print(f"| {int(horizon):,} | {one['arm']} / {one['against']} | {ratio} | {p} |")


def others(options: argparse.Namespace) -> None:
    """A Markdown line per arm that no contrast names and whose runs are all there: low rank against it."""
    for directory in options.directories:
        some = [arm for arm in schedule.PARTS[1] if complete(directory, (*schedule.NAMED, arm))]
        if not some:
            print("(No arm beside those of the contrasts has all of its held-out runs.)")
            continue
        low_rank = result(directory)["low_rank"]
        print(f"| {low_rank} / over time of | ratio (95 %) | p, of this pair alone |\n|---|--:|--:|")
        found = {arm: against(directory, low_rank, arm) for arm in some}
        for arm, one in sorted(found.items(), key=lambda each: -each[1]["ratio"]):
            print(f"| {arm} | {one['ratio']:.3f} ({one['low']:.3f}–{one['high']:.3f}) | {one['p']:.2g} |")


def secondary(options: argparse.Namespace) -> None:
    """A Markdown line per variant, at one size, with its time over that of the arm that it is held against."""
    for directory in options.directories:
        found = variants(directory)
        if not found:
            print("(No secondary runs yet.)")
            continue
        horizons = protocol_of(directory).horizons
        heads = ["variant", "over time of", "ratio (95 %)", "runs", "held 95 %"]
        heads += [*(f"mean time, at most {h:,}" for h in horizons), "test accuracy at the end", "stable rank"]
        heads += ["‖W_Q‖", *ANGLES.values()]
        print(f"| {' | '.join(heads)} |\n|---|---|" + "--:|" * (len(heads) - 2))
        for name, (against_arm, rows, one) in found.items():
            print(_line([name, against_arm, shown(one)], rows, horizons))


def variants(directory: Path) -> dict[str, tuple[str, list[Row], Row]]:
    """Of every variant that was run: the arm it is held against, its rows, and its time over that arm's."""
    held, protocol = frozen(directory), protocol_of(directory)
    if held is None:
        return {}
    beside = [row for row in schedule.held_out(directory, held) if row["train_examples"] == protocol.secondary_size]
    found = {}
    for stage in SECONDARY:
        rows = rows_of(directory, stage)
        for name in dict.fromkeys(row["arm"] for row in rows):
            other = "l2_ramp" if name == "ramp_low_rank" else schedule.SECONDARY[name][0]
            some = [row for row in rows if row["arm"] == name]
            ratios = schedule.log_ratios([*some, *beside], name, other, protocol.horizons[-1])
            found[name] = other, some, schedule.contrast(ratios)
    return found


def store(options: argparse.Namespace) -> None:
    """Copy the frozen settings; the rows are written where they stay."""
    (options.to / "tuned.json").write_text(json.dumps(frozen(options.run), indent=1) + "\n")


TABLES = {
    "state": state,
    "tuned": tuned,
    "test": test,
    "contrasts": contrasts,
    "others": others,
    "secondary": secondary,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands above."""
    stored.command_line(__doc__, store, TABLES, arguments=arguments)


if __name__ == "__main__":
    main()
