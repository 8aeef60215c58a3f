"""Hooks of an optimizer: their order around a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_watched: set[Callable[..., None]] = set()


def before_every_step(function: Callable[..., None]) -> None:
    """Call a function before every step of any optimizer, ahead of its own hooks; registering it again does nothing.

    The hooks of an optimizer cannot be put in order while they run.
    """
    if function not in _watched:
        uncompiled: Any = torch.compiler.disable
        register_optimizer_step_pre_hook(uncompiled(function))
        _watched.add(function)


def keep_in_place(optimizer: Optimizer, last: int, first: int) -> None:
    """Move a hook before the step to the last place, and a hook after it to the first.

    Hooks of a user's may set learning rates and weight decays. The decay itself keeps its place among them.

    Args:
        optimizer: whose hooks to order.
        last: id of the hook before the step.
        first: id of the hook after the step.
    """
    before: Any = optimizer._optimizer_step_pre_hooks
    after: Any = optimizer._optimizer_step_post_hooks
    if last in before and next(reversed(before)) != last:
        before.move_to_end(last)
    if first in after and next(iter(after)) != first:
        after.move_to_end(first, last=False)
