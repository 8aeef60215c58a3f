"""Results of a sweep: the table of boundaries, and the claims with what its controls and its grid leave open.

The sentences are computed from the summary alone; they count runs and compare fitted boundaries with their intervals,
and never say that one thing caused another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rankdecay.lab.experiments.boundary.maps import DataAxis, data_axis
from rankdecay.lab.report.table import Column, has
from rankdecay.lab.report.words import Check, Decided, Facts, capital, counted, is_number, listed

UNKNOWN = "both boundaries lie beyond the same end of the grid"


# --- amounts in words ---


def interval(axis: DataAxis, low: Any, high: Any) -> str:
    """An interval of amounts of data; the grid may leave one end open, or both."""
    if is_number(low) and is_number(high):
        return str(axis.span(low, high))
    if is_number(high):
        return f"at most {axis.amount(high)}"
    return f"at least {axis.amount(low)}" if is_number(low) else "open"


def amount_words(boundary: Mapping[str, Any], axis: DataAxis) -> str:
    """Where a boundary lies, with the sign of a bound: `"24 %"`, `"≤ 10 %"`."""
    sign = {"below": "≤ ", "above": "> "}.get(str(boundary.get("censored")), "")
    return sign + axis.amount(boundary["train_fraction"])


def ratio_words(difference: Mapping[str, Any]) -> str:
    """How many times as much data the reference needs, with its interval: `"0.70 (0.62–0.81)"`."""
    if difference.get("censored") == "unknown" or not is_number(difference.get("ratio")):
        return "not known"
    bound = f"{difference['censored']} " if difference.get("censored") else ""
    low, high = difference.get("low"), difference.get("high")
    if is_number(low) and is_number(high):
        return f"{bound}{difference['ratio']:.2f} ({low:.2f}–{high:.2f})"
    ends = f" (<{high:.2f})" if is_number(high) else f" (>{low:.2f})" if is_number(low) else ""
    return f"{bound}{difference['ratio']:.2f}{ends}"


def seeds_words(found: Mapping[str, Any] | None) -> str:
    """A ratio with the seed as its unit: `"0.86 (0.70–1.04)"`, a dash where no seed can be compared."""
    if not found:
        return "—"
    low, high = found.get("low"), found.get("high")
    if not (is_number(low) and is_number(high)):
        return f"{found['ratio']:.2f}, one seed"
    alike = high < 1.0001 * low  # the grid does not part the seeds: their scatter, not the error, is 0
    between = ", all seeds alike" if alike else f" ({low:.2f}–{high:.2f})"
    return f"{found['ratio']:.2f}{between}"


def settled(difference: Mapping[str, Any]) -> str | None:
    """Whether the reference needs `"less"` or `"more"` data; None if that is not settled.

    The interval of the fits has to say it, and where seeds can be compared that with the seed as the unit as well: runs
    of one seed share their training sets, which the fits do not know.
    """
    sides = {_side(difference)} | ({_side(by_seed)} if (by_seed := difference.get("by_seed")) else set())
    return sides.pop() if len(sides) == 1 else None


def _side(interval: Mapping[str, Any]) -> str | None:
    low, high = interval.get("low"), interval.get("high")
    if is_number(high) and high < 1:
        return "less"
    return "more" if is_number(low) and low > 1 else None


# --- the table ---


def columns(facts: Facts) -> list[Column]:
    """The table: one line per arm, at its best strength."""
    axis = data_axis(facts.summary)

    def best(key: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda row: (row["boundary"] or {}).get(key)

    def edge(key: str) -> Callable[[Mapping[str, Any]], str | None]:
        return lambda row: f"the {best(key)(row)} tried" if best(key)(row) else None

    def amount(row: Mapping[str, Any]) -> str:
        return amount_words(row["boundary"], axis) if row["boundary"] else "no runs yet"

    def between(row: Mapping[str, Any]) -> str:
        return interval(axis, best("low")(row), best("high")(row)) if row["boundary"] else "—"

    def strength(row: Mapping[str, Any]) -> str:
        value = best("strength")(row)
        return f"{value:g}" if value else "—"

    rests = {cell["rest_decay"] for row in facts.summary["arms"] for cell in row["cells"]}
    return [
        Column("data at the\nboundary", amount),
        Column("95 %\ninterval", between),
        Column("best\nstrength", strength, small=edge("edge")),
        Column("decay of\nthe rest", best("rest_decay"), "g", edge("rest_edge"), when=lambda rows: len(rests) > 1),
        Column("runs that\ngeneralised", lambda row: f"{row['generalised']:,} of {row['runs']:,}"),
        Column("diverged", "diverged", ",d", when=lambda rows: any(row["diverged"] for row in rows)),
        Column("never\nacted", "never_acted", ",d", when=lambda rows: any(row.get("never_acted") for row in rows)),
        Column("stable rank\nthere", "stable_rank", when=has("stable_rank")),
    ]


def note(facts: Facts) -> str:
    """Note under the table."""
    threshold = f"{100 * (facts.summary.get('threshold') or 0):g} %"
    decides = "validation" if facts.settings.get("validation") else "test"
    waited = sum(row.get("never_acted") or 0 for row in facts.summary["arms"])
    never = (
        f" {counted(waited, 'run')} ended before a schedule or a truncation acted: they are runs without decay, or "
        "with decay throughout."
        if waited
        else ""
    )
    return (
        "The boundary is the amount of training data at which half of the runs generalise, each arm at the strength "
        "where that is least: a logistic fitted to the seeds of all amounts, with its 95 % credible interval. A run "
        f"has generalised when its {decides} accuracy reaches {threshold} and the next evaluation holds it.{never}"
    )


# --- the claims ---


class _Arm:
    """An arm that has a boundary, in words."""

    def __init__(self, facts: Facts, name: str) -> None:
        self.label, self.row, self.axis = facts.label(name), facts.arms[name][0], data_axis(facts.summary)
        self.boundary: Mapping[str, Any] = self.row["boundary"]
        self.censored = self.boundary.get("censored")
        self.amount = self.axis.amount(self.boundary["train_fraction"], unit=True)
        self.between = f"{self.amount} ({interval(self.axis, self.boundary.get('low'), self.boundary.get('high'))})"


def _fitted(facts: Facts) -> dict[str, _Arm]:
    return {name: _Arm(facts, name) for name, rows in facts.arms.items() if rows[0].get("boundary")}


def _any_generalised(facts: Facts) -> bool:
    return any(arm.censored != "above" for arm in _fitted(facts).values())


def headline(facts: Facts) -> str:
    """Which arm needs least data."""
    arms = _fitted(facts)
    if not _any_generalised(facts):
        return "In no arm did half of the runs generalise, at any strength or amount of data tried."
    below = [arm for arm in arms.values() if arm.censored == "below"]
    inside = sorted((arm for arm in arms.values() if not arm.censored), key=lambda arm: arm.boundary["train_fraction"])
    following = f" Next came {inside[0].label} at {inside[0].between}." if inside and below else ""
    if below:
        return (
            f"{capital(listed([arm.label for arm in below]))} generalised in at least half of the runs even with the "
            f"least data tried, {below[0].amount}: how little would do is not known.{following}"
        )
    best, others = inside[0], inside[1:]
    if not others:
        rest = "there is no other arm to compare it with" if len(arms) == 1 else "no other arm did anywhere on the grid"
        return f"Half of the runs of {best.label} generalise at {best.between}; {rest}."
    high, low = best.boundary.get("high"), others[0].boundary.get("low")
    apart = high is not None and low is not None and high < low
    order = "" if apart else "; their intervals overlap, so their order is not settled"
    return (
        f"{capital(best.label)} needed the least data, each arm at its best strength: half of its runs generalise at "
        f"{best.between}. Next came {others[0].label} at {others[0].between}{order}."
    )


def _less_data(facts: Facts) -> Decided | None:
    arms = _fitted(facts)
    known = [d for d in facts.summary.get("differences", []) if {d["reference"], d["arm"]} <= arms.keys()]
    if not known or not _any_generalised(facts):
        return None
    groups: dict[str, list[str]] = {}
    for difference in known:
        unknown = difference.get("censored") == "unknown"
        word = f"not known, for {UNKNOWN}" if unknown else settled(difference) or "not settled"
        groups.setdefault(word, []).append(f"{facts.label(difference['arm'])} {ratio_words(difference)}".strip())
    holds = None if groups.keys() - {"less", "more"} else "more" not in groups
    shown = "; ".join(f"{word}: {', '.join(others)}" for word, others in groups.items())
    return holds, f"{facts.label(known[0]['reference'])}, as a multiple of the data that another arm needs. {shown}."


def _inside(facts: Facts) -> Decided | None:
    beyond = [f"{arm.label} ({arm.censored})" for arm in _fitted(facts).values() if arm.censored]
    if not beyond:
        return True, "every boundary lies between amounts that were tried."
    return False, f"bounds, not estimates, below or above all amounts tried: {listed(beyond)}."


def _strength(facts: Facts) -> Decided | None:
    found: dict[str, list[str]] = {}
    for arm in _fitted(facts).values():
        for key, what in (("edge", "strength"), ("rest_edge", "decay of the rest")):
            edge = arm.boundary.get(key)
            if edge and not (key == "rest_edge" and edge == "only"):  # one decay of the rest is a setting, not a grid
                found.setdefault(f"{edge} {what}", []).append(arm.label)
    if not found:
        return True, "no best strength lies at the edge of what was tried."
    shown = "; ".join(f"best at the {where} tried, {listed(labels)}" for where, labels in found.items())
    return False, f"{shown}: beyond the grid they may need less data."


def _control(*names: str) -> Callable[[Facts], Decided | None]:
    """Whether an arm fails to generalise everywhere on the grid, so that it does not explain a success."""

    def decided(facts: Facts) -> Decided | None:
        arms = _fitted(facts)
        arm = next((arms[name] for name in names if name in arms), None)
        if arm is None or not _any_generalised(facts):
            return None
        if arm.censored == "above":
            return (
                True,
                f"fewer than half of the runs of {arm.label} generalised even with {arm.amount}, the most tried.",
            )
        where = f"already at {arm.amount}, the least tried" if arm.censored else f"at {arm.between}"
        return False, f"half of the runs of {arm.label} generalise {where}: with more data than that, it is enough."

    return decided


def _events(facts: Facts) -> Decided | None:
    differences = facts.summary.get("differences", [])
    name = differences[0]["reference"] if differences else next(iter(facts.arms), "")
    counts = facts.arms[name][0].get("events") if name in facts.arms else None
    if not counts or not counts["rank_first"] + counts["together"] + counts["accuracy_first"]:
        return None
    return counts["rank_first"] > counts["together"] + counts["accuracy_first"], (
        f"in {counts['rank_first']} of {sum(counts.values())} runs of {facts.label(name)} at its best strength, after "
        f"it in {counts['accuracy_first']}, at the same evaluation in {counts['together']}. What comes first need not "
        "be the cause of what follows."
    )


def _finite(facts: Facts) -> Decided | None:
    lost = [f"{rows[0]['diverged']} of {facts.label(name)}" for name, rows in facts.arms.items() if rows[0]["diverged"]]
    return (False, f"diverged, and counted as not generalised: {listed(lost)}.") if lost else None


def _enough(facts: Facts) -> Decided | None:
    cells = [cell for rows in facts.arms.values() for cell in rows[0]["cells"]]
    if not cells:
        return None
    seeds = sorted({int(cell["seeds"]) for cell in cells})
    budgets = sorted({int(cell["budget"]) for cell in cells if is_number(cell.get("budget"))})
    per_cell = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    steps = " to ".join(f"{budget:,}" for budget in dict.fromkeys([*budgets[:1], *budgets[-1:]]))
    runs = counted(sum(int(rows[0]["runs"]) for rows in facts.arms.values()), "run")
    return None, (
        f"one task, one model, {runs}, {per_cell} per cell, a budget of {steps} steps: a run that did not generalise "
        "might have later, and the best of many strengths looks a little better than it is."
    )


CHECKS = (
    Check("The reference needs less data than every other arm", _less_data),
    Check("Every boundary lies within the grid", _inside),
    Check("Every best strength lies within the grid", _strength),
    Check("Without decay of queries and keys half of the runs never generalise", _control("none"), ("none",),
          "whether queries and keys need any decay at all"),
    Check("L2 on the same matrices does not do it", _control("l2", "l2_all"), open="whether L2 would do as well",
          any_of=("l2", "l2_all")),
    Check("Switching attention off does not do it", _control("uniform_attention"), ("uniform_attention",),
          "whether switching attention off would do as well"),
    Check("The rank falls before test accuracy rises", _events),
    Check("Every run stays finite", _finite),
    Check("This goes beyond one task and one model", _enough),
)  # fmt: skip
