"""Waiting for what a page shows."""

from typing import Any


def wait_for(page: Any, condition: str, value: object = None) -> None:
    """Wait until a condition in JavaScript holds, in which ``value`` is the value."""
    page.wait_for_function(f"value => {condition}", arg=value)
