"""What a run shows, in words, and what its controls do not let it show.

The sentences are computed from `summary.json` alone. They count seeds and compare medians; they never say
that one thing caused another. The controls that could explain a success away come first, and one that is
missing from the run is named as missing.
"""

import math
from dataclasses import dataclass
from typing import Any

from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.report.style import arm_styles

COLLAPSED = 0.9  # an arm whose every seed generalised and whose final mean accuracy is below this did not keep it


@dataclass(frozen=True)
class Verdict:
    """A headline and the points under it, each a lead-in and a sentence or two."""

    headline: str
    points: list[tuple[str, str]]

    def __str__(self) -> str:
        """The verdict as lines of text, for a terminal."""
        return "\n".join([self.headline, *(f"{lead}: {text}" for lead, text in self.points)])


@dataclass(frozen=True)
class _Outcome:
    label: str
    generalised: int
    seeds: int
    steps: float | None  # median, None if fewer than half of the seeds got there
    final_accuracy: float | None
    stable_rank: float | None
    by_seed: list[float]  # steps of the seeds that got there

    @property
    def count(self) -> str:
        return f"{self.generalised} of {self.seeds} seed{'s' if self.seeds != 1 else ''}"

    @property
    def count_and_time(self) -> str:
        return self.count + (f" (median {self.steps:,.0f} steps)" if self.steps is not None else "")


def seed_count(arm: dict[str, Any]) -> int:
    """How many seeds an arm of `summary.json` had: `seeds` is a number or a list of them."""
    seeds = arm.get("seeds", 0)
    return len(seeds) if isinstance(seeds, list) else int(seeds or 0)


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion, 95 % by default: unlike a standard error, wide at 3 of 3."""
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def verdict(summary: dict[str, Any] | None, last_step: int | None = None) -> Verdict:
    """Put the outcome of a run in words.

    Args:
        summary: the content of `summary.json`, or None while the run is not complete.
        last_step: the last step measured, for a run in progress.

    Returns:
        A `Verdict` in plain text (not HTML).
    """
    if summary is None:
        so_far = (
            f"It has been measured up to step {last_step:,}" if last_step is not None else "Nothing is measured yet"
        )
        return Verdict("This run is not complete.", [("So far", f"{so_far}; there is no result to state.")])
    outcomes = _outcomes(summary)
    if not outcomes:
        return Verdict("The figures of this run are in the table below.", [])
    budget = summary.get("settings", {}).get("steps")
    within = f" within {budget:,} steps" if is_number(budget) else ""
    if not any(outcome.generalised for outcome in outcomes.values()):  # then a control that failed too says nothing
        return Verdict(_headline(outcomes, within), [_limits(outcomes)])
    points = [
        _uniform_attention(outcomes, within),
        _tuned_l2(outcomes, within),
        _no_decay(outcomes),
        _kept(outcomes),
        _rank(outcomes),
        _limits(outcomes),
    ]
    return Verdict(_headline(outcomes, within), [point for point in points if point])


def _outcomes(summary: dict[str, Any]) -> dict[str, _Outcome]:
    arms = [arm for arm in summary.get("arms", []) if is_number(arm.get("generalised"))]
    styles = arm_styles([arm["name"] for arm in arms])

    def number(arm: dict[str, Any], key: str) -> float | None:
        return float(arm[key]) if is_number(arm.get(key)) else None

    return {
        arm["name"]: _Outcome(
            styles[arm["name"]].label,
            int(arm["generalised"]),
            seed_count(arm),
            number(arm, "steps_to_generalise"),
            number(arm, "test_accuracy"),
            number(arm, "stable_rank"),
            [float(steps) for steps in arm.get("steps_to_generalise_by_seed", []) if is_number(steps)],
        )
        for arm in arms
    }


def _headline(outcomes: dict[str, _Outcome], within: str) -> str:
    reached = {name: outcome for name, outcome in outcomes.items() if outcome.generalised}
    if not reached:
        return f"No arm generalised{within}, so this run does not tell the arms apart."
    others = [f"{o.label} in {o.count_and_time}" for name, o in reached.items() if name != "low_rank"]
    subject = outcomes.get("low_rank")
    if subject is None:
        return f"Generalised{within}: {listed(others)}."
    if not subject.generalised:
        return f"Low-rank decay generalised in none of its {subject.seeds} seeds{within}; {listed(others)} did."
    rest = f"so did {listed(others)}" if others else "no other arm did"
    if len(outcomes) == 1:
        rest = "there was no other arm to compare it with"
    return f"Low-rank decay generalised in {subject.count_and_time}; {rest}."


def _uniform_attention(outcomes: dict[str, _Outcome], within: str) -> tuple[str, str]:
    uniform = outcomes.get("uniform_attention")
    if uniform is None:
        return (
            "Uniform attention",
            "Not in this run: it is open whether switching attention off would do as well.",
        )
    if uniform.generalised:
        return "Uniform attention", (
            f"Generalised in {uniform.count_and_time}, with queries and keys held at zero. The task can be "
            "solved without any learned attention pattern, so this run cannot tell the benefit of a low-rank "
            "pattern from that of switching attention off."
        )
    return "Uniform attention", (
        f"Generalised in none of its {uniform.seeds} seeds{within}: here, switching attention off was not enough."
    )


def _tuned_l2(outcomes: dict[str, _Outcome], within: str) -> tuple[str, str]:
    tuned, subject = outcomes.get("l2_tuned"), outcomes.get("low_rank")
    if tuned is None:
        return (
            "Tuned L2",
            "Not in this run: it is open whether a stronger L2 on the same matrices would do as well.",
        )
    if not tuned.generalised:
        return "Tuned L2", (
            f"Generalised in none of its {tuned.seeds} seeds{within}, at the one strength this run used. "
            "Other strengths were not tried here."
        )
    text = f"Got there too, in {tuned.count_and_time}: generalising here did not require low-rank decay."
    if subject is not None and subject.steps is not None and tuned.steps is not None:
        difference = subject.steps - tuned.steps
        order = (
            "at the same median step as"
            if difference == 0
            else (f"{abs(difference):,.0f} steps {'earlier' if difference < 0 else 'later'} than")
        )
        text += f" Low-rank decay was {order} tuned L2 by the median, which {_few(subject, tuned)}."
        if len(subject.by_seed) == subject.seeds and len(tuned.by_seed) == tuned.seeds:
            text += f" Seed by seed: {_span(subject.by_seed, 0)} steps against {_span(tuned.by_seed, 0)}."
    return "Tuned L2", text


def _few(*compared: _Outcome) -> str:
    fewest = min(outcome.seeds for outcome in compared)
    seeds = f"{fewest} seed{'s' if fewest != 1 else ''}"
    return f"with {seeds} is an observation, not a test" if fewest < 10 else f"rests on {seeds} per arm"


def _no_decay(outcomes: dict[str, _Outcome]) -> tuple[str, str] | None:
    none = outcomes.get("none")
    if none is None:
        return "No decay", "Not in this run: it is open whether queries and keys need any decay at all."
    if none.generalised:
        return "No decay", (
            f"Generalised in {none.count_and_time} with no decay on queries and keys: "
            "the rest of the training set-up can be enough."
        )
    return None


def _kept(outcomes: dict[str, _Outcome]) -> tuple[str, str] | None:
    lost = [
        f"{o.label} ({o.final_accuracy:.2f})"
        for o in outcomes.values()
        if o.seeds and o.generalised == o.seeds and o.final_accuracy is not None and o.final_accuracy < COLLAPSED
    ]
    if not lost:
        return None
    return "Not kept", f"Every seed generalised, yet mean test accuracy at the end is lower: {listed(lost)}."


def _rank(outcomes: dict[str, _Outcome]) -> tuple[str, str] | None:
    trained = [o for name, o in outcomes.items() if name != "uniform_attention" and o.stable_rank is not None]
    did = [o.stable_rank for o in trained if o.generalised > o.seeds / 2 and o.stable_rank is not None]
    did_not = [o.stable_rank for o in trained if o.generalised <= o.seeds / 2 and o.stable_rank is not None]
    if not did or not did_not:
        return None
    groups = f"{_span(did)} in the arms where most seeds generalised, {_span(did_not)} in the others"
    if max(did) < min(did_not):
        return "Stable rank at the end", f"{groups}. They go together here; that alone does not say why."
    return "Stable rank at the end", f"{groups}. It does not separate the two groups."


def _limits(outcomes: dict[str, _Outcome]) -> tuple[str, str]:
    most = max(outcome.seeds for outcome in outcomes.values())
    best = max(outcome.generalised for outcome in outcomes.values())
    low, high = wilson_interval(best, most)
    return "How far this goes", (
        f"One task, one model, one budget. {best} of {most} seeds is compatible with a true rate between "
        f"{low * 100:.0f} and {high * 100:.0f} % (95 % interval). "
        "The page shows what went together, not what caused what."
    )


def _span(values: list[float], digits: int = 1) -> str:
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return low if low == high else f"{low}–{high}"


def listed(items: list[str]) -> str:
    """Items as a sentence names them: `"a, b and c"`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
