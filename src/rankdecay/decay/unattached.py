"""Notice an optimizer that steps groups with decays while nothing is attached to it, as a copy of one has no hooks."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

#: Roles of a group whose decay a hook applies.
RolesOf = Callable[[dict[str, Any]], list[str]]

_known: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # attached once, or looked at
_changing = threading.Lock()
_registered: list[object] = []


def know(optimizer: Optimizer) -> None:
    """Remember that a user has attached to an optimizer, and may have detached."""
    with _changing:
        _known.add(optimizer)


def watch_steps(roles_of: RolesOf) -> None:
    """Look at every optimizer before its first step from now on; calling it again does nothing."""
    with _changing:
        if _registered:
            return

        def look(optimizer: Optimizer, *_: object) -> None:
            if optimizer not in _known:
                _look(optimizer, roles_of)

        uncompiled: Any = torch.compiler.disable
        _registered.append(register_optimizer_step_pre_hook(uncompiled(look)))


def _look(optimizer: Optimizer, roles_of: RolesOf) -> None:
    """Warn once if an optimizer has decays that nothing applies; one around, or inside, an attached one has not.

    A step at rates of zero, as checkpointers make to fill the state before they load, may come before ``attach``.
    """
    if not any(group.get("lr", True) for group in optimizer.param_groups):
        return
    with _changing:
        others = list(_known)
        _known.add(optimizer)
    roles = sorted({role for group in optimizer.param_groups for role in roles_of(group)})
    if not roles:
        return
    ours = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) in ours for other in others for group in other.param_groups for parameter in group["params"]):
        return
    kind = type(optimizer).__name__
    warnings.warn(
        f"this {kind} steps groups of rankdecay.param_groups, and nothing applies their decays of {', '.join(roles)}: "
        f"call rankdecay.attach on it. A copy of an attached {kind} has to be attached, too.",
        stacklevel=5,
    )
