"""The key of a run: the names in its rows that tell it from every other run of its experiment. Imports no torch."""

from collections.abc import Mapping
from typing import Any

KEY = ("arm", "strength", "mlp_decay", "qk_norm", "seed")


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of the run that a row belongs to."""
    return tuple(row[name] for name in KEY)
