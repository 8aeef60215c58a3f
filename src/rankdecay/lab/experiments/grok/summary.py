"""The figures of an arm, from the evaluations of its members."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from rankdecay.lab.ensemble.outcome import FIGURES, steps_to_hold
from rankdecay.lab.report.words import mean
from rankdecay.lab.settings import Record
from rankdecay.lab.stored import StoredRun

MEANS = (*(name for name in FIGURES if name != "angular_step"), "decay_size", "radial_share")


def by_member(rows: Iterable[Record]) -> dict[tuple[str, int], list[Record]]:
    """The evaluations of every arm and seed in order of steps; of a step measured twice, the later one."""
    found: dict[tuple[str, int], dict[int, Record]] = {}
    for row in rows:
        found.setdefault((row["arm"], row["seed"]), {})[row["step"]] = row
    return {member: [at[step] for step in sorted(at)] for member, at in sorted(found.items())}


def summarise_arm(name: str, members: Sequence[Sequence[Record]], threshold: float) -> Record:
    """The figures of one arm: medians of steps, means over seeds of everything else at each member's last evaluation.

    Args:
        name: of the arm.
        members: the records of each of its members, in order of steps.
        threshold: test accuracy that counts as generalised.
    """
    reached = [steps_to_hold(records, threshold) for records in members]
    last = [records[-1] for records in members]
    steps = [math.inf if step is None else step for step in reached]
    median = statistics.median(steps)
    if math.isinf(median):  # of an even number of seeds exactly half may have got there: theirs is the lower median
        median = statistics.median_low(steps)
    step_seconds = [seconds for records in members for r in records if (seconds := r.get("step_seconds"))]
    return {
        "name": name,
        "seeds": len(members),
        "generalised": sum(step is not None for step in reached),
        "steps_to_generalise": median if math.isfinite(median) else None,
        "steps_to_generalise_by_seed": reached,
        "diverged": sum(record["test_loss"] is None for record in last),
        **{key: mean(record.get(key) for record in last) for key in MEANS},
        "steps_per_second": 1 / statistics.median(step_seconds) if step_seconds else None,
    }


def summarise(rows: Iterable[Record], arms: Sequence[str], threshold: float) -> list[Record]:
    """One object per arm that has been evaluated."""
    members = by_member(rows)
    by_arm = {arm: [records for (name, _), records in members.items() if name == arm] for arm in arms}
    return [summarise_arm(arm, records, threshold) for arm, records in by_arm.items() if records]


def so_far(stored: StoredRun) -> Record | None:
    """The summary of a run that is not complete, as of its last evaluation."""
    threshold = stored.settings.get("threshold")
    if threshold is None or not stored.rows:
        return None
    arms = summarise(stored.rows, stored.arms, threshold)
    return {"settings": stored.settings, "threshold": threshold, "arms": arms, "step": stored.last_step}
