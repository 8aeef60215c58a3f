"""Results of a run in words: checks of claims against its summary, and how numbers are said.

A `Check` is a claim, the arms it needs and how to decide it. A claim whose arms did not run is named as open, so a page
never says more than its controls allow. Importing this module imports neither torch nor numpy.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from rankdecay.lab.report.style import ArmStyle, arm_styles
from rankdecay.lab.settings import Record
from rankdecay.text import shown_lines

MARKS = {True: "✓", False: "✗", None: "–"}  # a claim holds, does not, or is not decided


@dataclass(frozen=True)
class Facts:
    """A summary with its rows by arm, which checks and headlines are computed from.

    Attributes:
        summary: the content of ``summary.json``.
        arms: the rows of each arm, in order.
        styles: how each arm is called and drawn.
    """

    summary: Mapping[str, Any]
    arms: dict[str, list[Record]] = field(default_factory=dict)
    styles: dict[str, ArmStyle] = field(default_factory=dict)

    @classmethod
    def of(cls, summary: Mapping[str, Any], styles: Mapping[str, ArmStyle] | None = None) -> "Facts":
        """The facts of a summary, with the styles of an experiment's own arms."""
        arms: dict[str, list[Record]] = {}
        for row in summary.get("arms", []):
            arms.setdefault(str(row["name"]), []).append(row)
        return cls(summary, arms, arm_styles(arms, styles))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the run."""
        return self.summary.get("settings", {})

    def decayed(self, arm: str) -> list[Record]:
        """Rows of an arm with a strength above zero."""
        return [row for row in self.arms.get(arm, []) if row["strength"] > 0]

    def label(self, arm: str) -> str:
        """An arm in words."""
        return self.styles[arm].label


Decided = tuple[bool | None, str]  # whether a claim holds, None where it is open, and the figures that say so


@dataclass(frozen=True)
class Check:
    """A claim about a run.

    Attributes:
        claim: a sentence that is true or false.
        holds: decides it; returns None where the run has nothing to say of it.
        arms: what it needs; without one of them the claim is not decided.
        any_of: arms of which one is enough.
        open: what stays open without these arms; an empty one leaves the claim out then.
    """

    claim: str
    holds: Callable[[Facts], Decided | None]
    arms: tuple[str, ...] = ()
    open: str = ""
    any_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """A claim, whether it holds, and the figures that say so."""

    claim: str
    holds: bool | None
    text: str

    def __str__(self) -> str:
        return f"{MARKS[self.holds]} {self.claim}: {self.text}"


@dataclass(frozen=True)
class Verdict:
    """A headline and the points under it, in plain text."""

    headline: str
    points: list[Point] = field(default_factory=list)

    def __str__(self) -> str:
        """The verdict as lines of text, for a terminal."""
        return shown_lines([self.headline, *map(str, self.points)])


def verdict(
    summary: Mapping[str, Any] | None,
    headline: Callable[[Facts], str],
    checks: Sequence[Check],
    styles: Mapping[str, ArmStyle] | None = None,
    so_far: str = "",
) -> Verdict:
    """Put a run in words.

    Args:
        summary: of the run; None while it is not complete.
        headline: says the main result.
        checks: the claims, in order.
        styles: of the experiment's own arms.
        so_far: what is known of a run that is not complete.
    """
    if summary is None:
        return Verdict(f"This run is not complete. {so_far}".strip())
    facts, points = Facts.of(summary, styles), []
    for check in checks:
        missing = [arm for arm in check.arms if arm not in facts.arms]
        if check.any_of and not any(arm in facts.arms for arm in check.any_of):
            missing.append(check.any_of[0])
        if missing and check.open:
            points.append(Point(check.claim, None, f"{listed(missing)} not in this run: it is open {check.open}."))
        elif not missing and (decided := check.holds(facts)) is not None:
            points.append(Point(check.claim, *decided))
    return Verdict(headline(facts), points)


# --- numbers ---


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def figure_text(value: Any, form: str = ".3g", factor: float = 1.0) -> str:
    """A figure in a table or a sentence, or a dash for one that is not known."""
    return format(value * factor if factor != 1 else value, form) if is_number(value) else "—"


def small(value: Any) -> str:
    """A deviation as a person reads it: rounding is called rounding."""
    if not is_number(value):
        return "—"
    return "rounding error" if abs(value) < 2e-14 else f"{value:.1g}".replace("e-0", "e-")


def tiny(value: Any, rounding: float) -> str:
    """A figure that ideally is zero, and 0 where it is below the rounding of its computation."""
    if not is_number(value):
        return "—"
    return "0" if abs(value) < rounding else small(value) if value < 0.1 else f"{value:.2g}"


def known(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """The numbers that rows have under a key."""
    return [row[key] for row in rows if is_number(row.get(key))]


def mean(values: Iterable[Any]) -> float | None:
    """The mean of the numbers among some values; None if there are none."""
    numbers = [value for value in values if is_number(value)]
    return statistics.fmean(numbers) if numbers else None


def span(values: Sequence[float], form: str = ",.1f") -> str:
    """The range of some numbers: ``"1.0–2.5"``, or the one they share."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}–{high}"


def listed(items: Sequence[str]) -> str:
    """Items as a sentence names them: ``"a, b and c"``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def capital(text: str) -> str:
    """A text that begins a sentence."""
    return text[:1].upper() + text[1:]


def counted(number: int, noun: str) -> str:
    """A number of things: ``"1 seed"``, ``"3 seeds"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion, 95 % by default: unlike a standard error, wide at 3 of 3."""
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
