"""Notice an optimizer that steps groups with decays while nothing is attached to it, as a copy of one has no hooks."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

#: Roles of a group whose decay a hook applies.
RolesOf = Callable[[dict[str, Any]], list[str]]

_known: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # attached once, or looked at
_changing = threading.Lock()


def know(optimizer: Optimizer) -> None:
    """Remember that a user has attached to an optimizer, and may have detached."""
    with _changing:
        _known.add(optimizer)


def warn_if_unattached(optimizer: Optimizer, roles_of: RolesOf) -> None:
    """Warn before the first step if an optimizer has decays that nothing applies, and is not around an attached one.

    A step at rates of zero, as checkpointers make to fill the state before they load, may come before ``attach``.
    """
    if optimizer in _known or not any(group.get("lr", True) for group in optimizer.param_groups):
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
