"""Weight decay of the optimizer's own, divided for the length of a step: some parameters of a group have another.

The optimizer's groups are cut into parts before its step and put back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from rankdecay.decay.groups import Group
from rankdecay.decay.optimizers import check_divisible


class Section(NamedTuple):
    """Parameters of a group, and the weight decay that the optimizer is to have for them while it steps."""

    positions: list[int]
    l2: float


class _Parameters(list[Tensor]):
    """Parameters of a group, which note whether they were asked for."""

    asked = False

    def __iter__(self) -> Iterator[Tensor]:
        self.asked = True
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.asked = True
        return super().__getitem__(index)


class Divided:
    """Groups that are divided while an optimizer steps; puts them back when it is called.

    Args:
        put_back: puts them back.
        parts: of each divided group its number, the parameters left in it, and those of a part.
    """

    def __init__(
        self, put_back: Callable[[], None], parts: Sequence[tuple[int, _Parameters, _Parameters]] = ()
    ) -> None:
        self._put_back, self._parts = put_back, parts
        self.look()

    def __call__(self) -> None:
        self._put_back()

    def look(self) -> None:
        """Note from now on what is asked for and stepped."""
        self._versions = [[p._version for p in part] for _, _, part in self._parts]
        for _, left, part in self._parts:
            left.asked = part.asked = False

    def passed_over(self) -> int | None:
        """Return the number of a group of which a part was not looked at, in a step that was made; None without one.

        An optimizer may have kept its groups or parameters, or something for each group, since it was built: then it
        steps nothing of the part, or steps it with the weight decay of the group.
        """
        for (index, left, part), versions in zip(self._parts, self._versions, strict=True):
            asked = part.asked
            stepped = any(p._version != before for p, before in zip(part, versions, strict=True))
            if not asked and (left.asked or stepped):
                return index
        return None


_CHANGED = ("params", "weight_decay", "decoupled_weight_decay")


def give_weight_decay(optimizer: Optimizer, sections: list[list[Section]]) -> Divided:
    """Give parts of the optimizer's groups a weight decay of their own, for one step.

    A part becomes a group behind all others, since some optimizers know a group by its number, as dion's keep a
    learning rate for each; the list of the groups stays the same object, since wrappers share it.

    Args:
        optimizer: whose groups to divide.
        sections: of each group.

    Returns:
        What puts everything back.
    """
    found = list(optimizer.param_groups)
    parted: list[Group] = []
    parts_of: list[tuple[int, _Parameters, _Parameters]] = []
    undo: list[tuple[Group, dict[str, Any]]] = []
    for index, (group, parts) in enumerate(zip(found, sections, strict=True)):
        others = [part for part in _in_one_piece(group, parts) if not _has_l2(group, part.l2)]
        if not others:
            continue
        taken = {position for part in others for position in part.positions}
        rest = [p for position, p in enumerate(group["params"]) if position not in taken]
        if rest or len(others) > 1:
            check_divisible(optimizer, index, group)
        undo.append((group, {key: group[key] for key in _CHANGED if key in group}))
        counts = {key: value.clone() for key, value in group.items() if isinstance(value, Tensor)}  # advanced in place
        copies = [
            {
                **group,
                **counts,
                **_with_l2(group, part.l2),
                "params": _Parameters(group["params"][i] for i in part.positions),
            }
            for part in others
        ]
        if rest:
            group["params"] = _Parameters(rest)
        else:  # the group itself, so that what the optimizer counts in it is kept
            first = copies.pop(0)
            group.update({key: first[key] for key in _CHANGED if key in first})
        parted += copies
        parts_of += [(index, group["params"], copy["params"]) for copy in copies]
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

    return Divided(put_back, parts_of)


def _in_one_piece(group: Group, parts: list[Section]) -> list[Section]:
    """Return one part in the place of several that are all of a group and have the same weight decay."""
    positions = sorted(position for part in parts for position in part.positions)
    if len(positions) == len(group["params"]) and len({part.l2 for part in parts}) == 1:
        return [Section(positions, parts[0].l2)]
    return parts


def _has_l2(group: Group, l2: float) -> bool:
    """Whether the optimizer applies an L2 as the group stands: decoupled, so that an equal strength is not enough."""
    keys = _with_l2(group, l2)
    return not isinstance(group.get("weight_decay"), Tensor) and all(group.get(key) == keys[key] for key in keys)


def _with_l2(group: Group, l2: float) -> dict[str, Any]:
    keys: dict[str, Any] = {"weight_decay": l2}
    if l2 and "decoupled_weight_decay" in group:
        keys["decoupled_weight_decay"] = True
    return keys
