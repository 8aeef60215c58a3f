"""Weight decay of the optimizer's own, divided for the length of a step: some parameters of a group have another.

The optimizer's groups are cut into parts before its step and put back after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from rankdecay.decay.groups import Group
from rankdecay.decay.optimizers import check_divisible


class Section(NamedTuple):
    """Parameters of a group, and the weight decay that the optimizer is to have for them while it steps."""

    positions: list[int]
    l2: float


_CHANGED = ("params", "weight_decay", "decoupled_weight_decay")


def give_weight_decay(optimizer: Optimizer, sections: list[list[Section]]) -> Callable[[], None]:
    """Give parts of the optimizer's groups a weight decay of their own, for one step.

    A part becomes a group behind all others, since some optimizers know a group by its number, as dion's keep a
    learning rate for each; the list of the groups stays the same object, since wrappers share it.

    Args:
        optimizer: whose groups to divide.
        sections: of each group.

    Returns:
        Function that puts everything back.
    """
    found = list(optimizer.param_groups)
    parted: list[Group] = []
    undo: list[tuple[Group, dict[str, Any]]] = []
    for index, (group, parts) in enumerate(zip(found, sections, strict=True)):
        others = [part for part in parts if not _has_l2(group, part.l2)]
        if not others:
            continue
        taken = {position for part in others for position in part.positions}
        rest = [p for position, p in enumerate(group["params"]) if position not in taken]
        if rest or len(others) > 1:
            check_divisible(optimizer, index, group)
        undo.append((group, {key: group[key] for key in _CHANGED if key in group}))
        counts = {key: value.clone() for key, value in group.items() if isinstance(value, Tensor)}  # advanced in place
        copies = [
            {**group, **counts, **_with_l2(group, part.l2), "params": [group["params"][i] for i in part.positions]}
            for part in others
        ]
        if rest:
            group["params"] = rest
        else:  # the group itself, so that what the optimizer counts in it is kept
            first = copies.pop(0)
            group.update({key: first[key] for key in _CHANGED if key in first})
        parted += copies
    if undo:
        optimizer.param_groups[:] = [*found, *parted]

    given = [{key: group.get(key) for key in keys} for group, keys in undo]

    def put_back() -> None:
        """After a step that raised this is late: what was written and added since then stays."""
        for (group, keys), ours in zip(undo, given, strict=True):
            group.update({key: value for key, value in keys.items() if key == "params" or group.get(key) is ours[key]})
        if undo:
            known = set(map(id, (*found, *parted)))
            added = [group for group in optimizer.param_groups if id(group) not in known]
            optimizer.param_groups[:] = [*found, *added]

    return put_back


def _has_l2(group: Group, l2: float) -> bool:
    """Whether the optimizer applies an L2 as the group stands: decoupled, so that an equal strength is not enough."""
    keys = _with_l2(group, l2)
    return not isinstance(group.get("weight_decay"), Tensor) and all(group.get(key) == keys[key] for key in keys)


def _with_l2(group: Group, l2: float) -> dict[str, Any]:
    keys: dict[str, Any] = {"weight_decay": l2}
    if l2 and "decoupled_weight_decay" in group:
        keys["decoupled_weight_decay"] = True
    return keys
