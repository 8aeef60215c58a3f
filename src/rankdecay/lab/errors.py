"""Errors a user of the lab can mend, and the helper that names the nearest legal value."""

import difflib
from collections.abc import Iterable


class SettingError(ValueError):
    """A setting that cannot work. The message is one line that names the value and the remedy."""


def check_name(option: str, value: str, known: Iterable[str]) -> str:
    """Returns ``value`` if it is known, else raises a `SettingError` that offers the nearest name.

    Args:
        option: how the user gave it, e.g. ``"--task"``.
        value: what the user gave.
        known: the legal names.
    """
    names = list(known)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise SettingError(f"{option} {value!r} is unknown: {hint}(known: {', '.join(names)})")
