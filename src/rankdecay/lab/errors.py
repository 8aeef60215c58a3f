"""Errors that a user of the lab can mend."""

from collections.abc import Iterable

from rankdecay import checks


class SettingError(ValueError):
    """Raised for a setting that cannot work. The message is one line that names the value and the remedy."""


def check_name(option: str, value: str, known: Iterable[str]) -> str:
    """Return ``value`` if it is a known name; else raise a `SettingError` that offers the nearest one."""
    return checks.check_name(option, value, known, SettingError)
