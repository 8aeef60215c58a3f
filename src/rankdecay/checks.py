"""Check of names and numbers, with one grammar of messages. Importing this module does not import torch.

======================  ==============================================================================
what was given          message
======================  ==============================================================================
an unknown name         ``rule='smoth' is unknown: did you mean 'smooth'? (known: prox, smooth)``
a number out of range   ``--clip -1.0 must be a finite number >= 0; 0 switches it off``
======================  ==============================================================================
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from operator import index
from typing import Any, TypeVar

Value = TypeVar("Value")


def given(name: str, value: object) -> str:
    """Return an argument as the user wrote it: ``--task 'add'`` for an option, else ``task='add'``."""
    return f"{name} {value!r}" if name.startswith("-") else f"{name}={value!r}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` with the known name that is nearest to a word, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? " if near else ""


def check_name(name: str, value: Value, known: Iterable[str], error: type[ValueError] = ValueError) -> Value:
    """Return ``value`` if it is a known name; else raise ``error``, which offers the nearest one.

    Args:
        name: the argument, or the option with its dashes.
        value: what the user gave.
        known: the legal names.
        error: what to raise.
    """
    names = list(known)
    if value in names:
        return value
    raise error(f"{given(name, value)} is unknown: {suggestion(str(value), names)}(known: {', '.join(names)})")


def check_number(
    name: str,
    value: Value,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    whole: bool = False,
    remedy: str = "",
    error: type[ValueError] = ValueError,
) -> Value:
    """Return ``value`` if it is a finite number within its bounds; else raise ``error`` with the bounds.

    Args:
        name: the argument, or the option with its dashes.
        value: what the user gave; a truth value is not a number.
        at_least: smallest legal number.
        above: a number that is too small, and all below it.
        at_most: largest legal number.
        below: a number that is too large, and all above it.
        whole: whether it must be an ``int``.
        remedy: what to do about it, for the end of the message.
        error: what to raise.
    """
    number = _number(value, whole)
    within = (
        (at_least is None or number >= at_least)
        and (above is None or number > above)
        and (at_most is None or number <= at_most)
        and (below is None or number < below)
    )
    if math.isfinite(number) and within:
        return value
    bounds = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
    need = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    kind = "a whole number" if whole else "a finite number"
    raise error(f"{given(name, value)} must be {f'{kind} {need}'.rstrip()}{f'; {remedy}' if remedy else ''}")


def _number(value: Any, whole: bool) -> float:
    """The value as a float; NaN if it is not a number, or not a whole one where that is needed."""
    if isinstance(value, (bool, str)):
        return math.nan
    try:
        return float(index(value) if whole else value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
