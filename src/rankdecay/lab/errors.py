"""Errors that a user of the lab can mend."""

import re
from collections.abc import Iterable, Mapping

from rankdecay import checks


class SettingError(ValueError):
    """Raised for a setting that cannot work. The message is one line that names the value and the remedy.

    A function that several experiments call does not know what their options are called: it writes a setting in
    backticks, by the name of its argument, and the experiment gives the options of its own in `names`.
    """

    names: Mapping[str, str] = {}

    def __str__(self) -> str:
        """The message, with every setting as the option that a user types."""
        return re.sub(r"`(\w+)`", lambda match: option(self.names.get(match[1], match[1])), super().__str__())


def option(name: str) -> str:
    """A setting as the user writes it."""
    return f"--{name.replace('_', '-')}"


def check_name(option: str, value: str, known: Iterable[str]) -> str:
    """Return ``value`` if it is a known name; else raise a `SettingError` that offers the nearest one."""
    return checks.check_name(option, value, known, SettingError)
