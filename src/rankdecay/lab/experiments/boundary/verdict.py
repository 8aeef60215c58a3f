"""What a sweep shows, in words, and what its controls and its grid do not let it show.

As for a single run, the sentences are computed from the summary alone; they count runs and compare fitted boundaries
with their intervals, and never say that one thing caused another.
"""

from dataclasses import dataclass
from typing import Any

from rankdecay.lab.experiments.boundary.maps import DataAxis, data_axis
from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.experiments.grok.verdict import Verdict, listed
from rankdecay.lab.report.style import arm_styles

#: What is open without a control.
CONTROLS = {
    "none": ("No decay", "whether queries and keys need any decay at all"),
    "l2": ("L2", "whether L2 on the same matrices would do as well"),
    "uniform_attention": ("Uniform attention", "whether switching attention off would do as well"),
}


@dataclass(frozen=True)
class _Arm:
    name: str
    label: str
    summary: dict[str, Any]
    axis: DataAxis

    @property
    def boundary(self) -> dict[str, Any]:
        return self.summary["boundary"]

    @property
    def censored(self) -> str | None:
        return self.boundary.get("censored")

    @property
    def amount(self) -> str:
        return self.axis.amount(self.boundary["train_fraction"], unit=True)

    @property
    def interval(self) -> str:
        return interval(self.axis, self.boundary.get("low"), self.boundary.get("high"))


def interval(axis: DataAxis, low: Any, high: Any) -> str:
    """An interval of amounts of data; the grid may leave one end open, or both."""
    if is_number(low) and is_number(high):
        return str(axis.span(low, high))
    if is_number(high):
        return f"at most {axis.amount(high)}"
    return f"at least {axis.amount(low)}" if is_number(low) else "open"


def amount_words(boundary: dict[str, Any], axis: DataAxis) -> str:
    """Where a boundary lies, with the sign of a bound: `"24 %"`, `"≤ 10 %"`."""
    sign = {"below": "≤ ", "above": "> "}.get(str(boundary.get("censored")), "")
    return sign + axis.amount(boundary["train_fraction"])


def verdict(summary: dict[str, Any] | None, complete: bool = True) -> Verdict:
    """Put the outcome of a sweep in words.

    Args:
        summary: the content of `summary.json`, or what `statistics.summarise` made of the runs so far;
            None before the first.
        complete: whether all runs are finished.

    Returns:
        A `Verdict` in plain text (not HTML).
    """
    if summary is None:
        return Verdict("This sweep is not complete.", [("So far", "No run is finished; there is no result to state.")])
    axis = data_axis(summary)
    labels = arm_styles(str(arm["name"]) for arm in summary["arms"])
    arms = {
        name: _Arm(name, labels[name].label, arm, axis)
        for arm in summary["arms"]
        if (name := str(arm["name"])) and arm.get("boundary")
    }
    runs = sum(int(arm.get("runs") or 0) for arm in summary["arms"])
    first = None if complete else ("Not complete", f"{runs:,} runs are finished; what follows can still change.")
    comparisons = [
        _differences(summary, arms),
        _bounded(arms),
        _edges(arms),
        *(_control(name, arms) for name in CONTROLS),
        _events(summary, arms),
    ]
    if not _any_generalised(arms):  # then a control that failed too says nothing
        comparisons = []
    points = [first, *comparisons, _diverged(summary, labels), _limits(summary, runs)]
    return Verdict(_headline(arms), [point for point in points if point])


def _any_generalised(arms: dict[str, _Arm]) -> bool:
    return any(arm.censored != "above" for arm in arms.values())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _headline(arms: dict[str, _Arm]) -> str:
    if not _any_generalised(arms):
        return (
            "In no arm did half of the runs generalise, at any strength or amount of data tried: this sweep does not "
            "tell the arms apart."
        )
    below = [arm for arm in arms.values() if arm.censored == "below"]
    inside = sorted((arm for arm in arms.values() if not arm.censored), key=lambda arm: arm.boundary["train_fraction"])
    if below:
        words = (
            f"{_capital(listed([arm.label for arm in below]))} generalised in at least half of the runs even with the "
            f"least data tried, {below[0].amount}: how little would do is not known"
        )
        return words + (
            f". Next came {inside[0].label} at {inside[0].amount} ({inside[0].interval})." if inside else "."
        )
    best = inside[0]
    words = f"half of its runs generalise at {best.amount} (95 % interval {best.interval})"
    if len(arms) == 1:
        return f"{_capital(best.label)}: {words}; there is no other arm to compare it with."
    words = f"{_capital(best.label)} needed the least data, each arm at its best strength: {words}"
    if len(inside) == 1:
        return f"{words}. No other arm generalised in half of its runs anywhere on the grid."
    ends = best.boundary.get("high"), inside[1].boundary.get("low")
    apart = all(map(is_number, ends)) and ends[0] < ends[1]  # type: ignore[operator]
    words += f". {_next(inside[1])}"
    return words + ("." if apart else "; their intervals overlap, so their order is not settled.")


def _next(arm: _Arm) -> str:
    return f"Next came {arm.label} at {arm.amount} ({arm.interval})"


def ratio_words(difference: dict[str, Any]) -> str:
    """How many times as much data the reference needs, with its interval: `"0.70 (0.62–0.81)"`."""
    if difference.get("censored") == "unknown" or not is_number(difference.get("ratio")):
        return "not known"
    bound = f"{difference['censored']} " if difference.get("censored") else ""
    low, high = difference.get("low"), difference.get("high")
    if is_number(low) and is_number(high):
        return f"{bound}{difference['ratio']:.2f} ({low:.2f}–{high:.2f})"
    ends = f" (<{high:.2f})" if is_number(high) else f" (>{low:.2f})" if is_number(low) else ""
    return f"{bound}{difference['ratio']:.2f}{ends}"


def settled(difference: dict[str, Any]) -> str | None:
    """Whether the interval says that the reference needs `"less"` or `"more"` data; None if it does not."""
    low, high = difference.get("low"), difference.get("high")
    if is_number(high) and high is not None and high < 1:
        return "less"
    return "more" if is_number(low) and low is not None and low > 1 else None


def _differences(summary: dict[str, Any], arms: dict[str, _Arm]) -> tuple[str, str] | None:
    known = [d for d in summary.get("differences", []) if d["reference"] in arms and d["arm"] in arms]
    if not known:
        return None
    reference = arms[known[0]["reference"]].label
    groups: dict[str | None, list[str]] = {}
    for difference in known:
        unknown = difference.get("censored") == "unknown"
        words = arms[difference["arm"]].label + ("" if unknown else f" {ratio_words(difference)}")
        groups.setdefault("unknown" if unknown else settled(difference), []).append(words)
    texts = {
        "less": "It needed less than: {}.",
        "more": "It needed more than: {}.",
        None: "Not settled, for the interval includes 1 or is open: {}.",
        "unknown": "Not known, for both boundaries lie beyond the same end of the grid: {}.",
    }
    sentences = [text.format("; ".join(groups[key])) for key, text in texts.items() if key in groups]
    what = f"Data that {reference} needed as a multiple of what another arm needed, with its 95 % interval."
    return f"{_capital(reference)} and the others", " ".join([what, *sentences])


def _bounded(arms: dict[str, _Arm]) -> tuple[str, str] | None:
    sentences = []
    for side, text in (
        ("above", "fewer than half of the runs generalised at any strength, even with the most data tried"),
        ("below", "at least half of the runs generalised even with the least data tried"),
    ):
        own = [arm for arm in arms.values() if arm.censored == side]
        if own:
            amounts = listed(list(dict.fromkeys(arm.amount for arm in own)))
            sentences.append(f"{_capital(listed([arm.label for arm in own]))}: {text} ({amounts}).")
    if not sentences:
        return None
    return "Bounded by the grid", f"{' '.join(sentences)} Their boundaries are bounds, not estimates."


def _edges(arms: dict[str, _Arm]) -> tuple[str, str] | None:
    found: dict[str, list[str]] = {}
    for arm in arms.values():
        for key, what in (("edge", "strength"), ("rest_edge", "decay of the rest")):
            edge = arm.boundary.get(key)
            if edge and not (key == "rest_edge" and edge == "only"):  # one decay of the rest is a setting, not a grid
                found.setdefault(f"{edge} {what} tried", []).append(arm.label)
    if not found:
        return "Edge of the grid", "No best strength lies at the edge of what was tried."
    parts = [f"best at the {where}: {listed(names)}" for where, names in found.items()]
    words = _capital("; ".join(parts))
    return "Edge of the grid", f"{words}. Beyond the grid they may need less data than is stated here."


def _control(name: str, arms: dict[str, _Arm]) -> tuple[str, str] | None:
    lead, question = CONTROLS[name]
    arm = arms.get(name) or arms.get(f"{name}_all")  # the published comparison is with L2 of every matrix
    if arm is None:
        return lead, f"Not in this sweep: it is open {question}."
    lead = _capital(arm.label)
    if arm.censored == "above":
        text = f"Fewer than half of its runs generalised even with {arm.amount}, the most tried."
        if name == "uniform_attention":
            text += " On this grid, switching attention off was not enough."
        return lead, text
    where = f"at {arm.amount} ({arm.interval})" if not arm.censored else f"already at {arm.amount}, the least tried"
    text = f"Half of its runs generalise {where}"
    return lead, text + {
        "none": ". With more data than that, generalising needs no decay of queries and keys.",
        "l2": ", at its best strength. With more data than that, generalising does not require low-rank decay.",
        "uniform_attention": (
            ", with queries and keys held at zero. With more data than that, the task can be solved without any "
            "learned attention pattern, and this sweep cannot tell the benefit of a low-rank pattern from that of "
            "switching attention off."
        ),
    }[name]


def _events(summary: dict[str, Any], arms: dict[str, _Arm]) -> tuple[str, str] | None:
    differences = summary.get("differences", [])
    name = differences[0]["reference"] if differences else next(iter(arms), "")
    counts = arms[name].summary.get("events") if name in arms else None
    if not counts or not counts["rank_first"] + counts["together"] + counts["accuracy_first"]:
        return None
    return "Order of events", (
        f"In {counts['rank_first']} of {sum(counts.values())} runs of {arms[name].label} at its best strength the rank "
        f"fell before test accuracy rose, in {counts['accuracy_first']} after, in {counts['together']} at the same "
        "evaluation. What comes first need not be the cause of what follows."
    )


def _diverged(summary: dict[str, Any], labels: dict[str, Any]) -> tuple[str, str] | None:
    counts = [
        f"{arm['diverged']} of {labels[str(arm['name'])].label}" for arm in summary["arms"] if arm.get("diverged")
    ]
    return ("Diverged", f"Runs that diverged: {listed(counts)}; they count as not generalised.") if counts else None


def _limits(summary: dict[str, Any], runs: int) -> tuple[str, str]:
    cells = [cell for arm in summary["arms"] for cell in arm.get("cells", [])]
    seeds = sorted({int(cell["seeds"]) for cell in cells})
    budgets = sorted({int(cell["budget"]) for cell in cells if is_number(cell.get("budget"))})
    per_cell = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "no"
    budget = f" within {' to '.join(f'{steps:,}' for steps in dict.fromkeys([*budgets[:1], *budgets[-1:]]))} steps"
    return "How far this goes", (
        f"One task, one model, {runs:,} runs, {per_cell} per cell. Generalising means{budget if budgets else ''}: "
        "a run that did not might have later. The best of many strengths looks a little better than it is. The page "
        "shows what went together, not what caused what."
    )
