"""Targets of a step: the matrices of one role, in parameters of one group of the optimizer.

It follows from a group's own keys, where :func:`rankdecay.param_groups` made the group, or from the model, where
:func:`rankdecay.attach` was given the decays. Either way it is a :class:`Target`. Only its count of steps is kept
elsewhere, where whatever saves the optimizer saves it too: in the keys of the group, or in the state of its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankdecay.attention import Window
from rankdecay.attention.layer import smaller_side
from rankdecay.attention.planes import PlaneRows
from rankdecay.decay.groups import Group
from rankdecay.decay.policy import Decay, Frobenius, LowRank
from rankdecay.linalg.backend import has_float64

#: Our one key in ``optimizer.state[parameter]``.
STATE_KEY = "rankdecay"


class StepCounter:
    """Counts in a dictionary: steps seen, those of a warm-up, and Σ lr · strength since the last decay.

    Args:
        numbers: the dictionary.
        role: whose counts they are.
        unit: of what is pending, where the dictionary does not say it elsewhere. It is in the name, so that a decay of
            another unit does not take it over: an absolute amount read as a share would wipe the weight out.
    """

    def __init__(self, numbers: dict[str, Any], role: str, unit: str = "") -> None:
        self._numbers, self._steps, self._warmed = numbers, f"{role}_steps", f"{role}_warmed"
        self._pending, self.missed_key = pending_key(role, unit), pending_key(role, unit, "missed")

    def take(self, found: Mapping[str, Any]) -> None:
        """Take over the counts of another dictionary that are of this decay."""
        for key in (self._steps, self._warmed, self._pending):
            if key in found and key in self._numbers:
                self._numbers[key] = found[key]
        if isinstance(found.get(self.missed_key), dict):  # not that of one parameter, from its state
            self._numbers[self.missed_key] = found[self.missed_key]

    @property
    def steps(self) -> int:
        return self._numbers.get(self._steps, 0)

    @steps.setter
    def steps(self, value: int) -> None:
        self._numbers[self._steps] = value

    def reset(self, warmup: int) -> None:
        """Count from zero, with every number there that a decay with this warm-up has."""
        self.steps, self.pending = 0, 0.0
        if warmup:
            self._numbers[self._warmed] = 0

    def ramp(self, decay: Decay, found_inf: Tensor | None) -> float | Tensor:
        """Count a step of the decay's warm-up, and return the part of its strength that acts in it.

        Args:
            decay: of the step.
            found_inf: 1 on the device if the step was skipped, which then does not count.
        """
        if not decay.warmup:
            return 1.0
        if found_inf is None:
            self._numbers[self._warmed] = min(int(self.warmed) + 1, decay.warmup)
            return decay.ramp(self._numbers[self._warmed])
        warmed = (self.warmed + (1 - found_inf)).clamp_max(decay.warmup)
        self._numbers[self._warmed] = warmed
        return warmed / decay.warmup

    @property
    def warmed(self) -> int | Tensor:
        """Steps of a warm-up that have been made."""
        return self._numbers.get(self._warmed, 0)

    def start_warmup(self, after: int = 0) -> None:
        """Let a warm-up begin with the next step, or go on after some."""
        if after or self._warmed in self._numbers:
            self._numbers[self._warmed] = after

    @property
    def pending(self) -> float | Tensor:
        return self._numbers.get(self._pending, 0.0)

    @pending.setter
    def pending(self, value: float | Tensor) -> None:
        self._numbers[self._pending] = value

    def pending_in(self, found: Mapping[str, Any]) -> float | Tensor:
        """Return what is pending of this decay in the counts of another dictionary."""
        return found.get(self._pending, 0.0)

    def miss(self, position: int, amount: float | Tensor) -> None:
        """Note a part of the pending sum that a parameter, by its position in the target, is spared."""
        missed = self._numbers.setdefault(self.missed_key, {})
        missed[str(position)] = missed.get(str(position), 0.0) + amount

    @property
    def missed(self) -> dict[int, float | Tensor]:
        """Amounts deferred since the last decay, by the position of the parameter."""
        return {int(position): amount for position, amount in self._numbers.get(self.missed_key, {}).items()}

    def missed_by(self, position: int) -> float | Tensor:
        """Return the amount deferred for one parameter."""
        return self._numbers.get(self.missed_key, {}).get(str(position), 0.0)

    def take_missed(self) -> dict[int, float | Tensor]:
        """Return what each parameter was spared since the last decay, and begin anew."""
        missed = self.missed
        self._numbers.pop(self.missed_key, None)
        return missed

    def drop(self) -> None:
        """Forget what is pending, and what parameters were spared of it."""
        self.pending = 0.0
        self.take_missed()

    def settle(self) -> None:
        """Make the counts plain numbers, for a state that any weights-only load accepts."""
        if isinstance(self.warmed, Tensor):
            self._numbers[self._warmed] = int(self.warmed)
        if isinstance(self.pending, Tensor):
            self.pending = float(self.pending)
        if self.missed_key in self._numbers:
            self._numbers[self.missed_key] = {name: float(n) for name, n in self._numbers[self.missed_key].items()}


def pending_key(role: str, unit: str, what: str = "pending") -> str:
    """Return the name of Σ lr · strength since the last decay, or, ``"missed"``, of what parameters were spared."""
    return "_".join(filter(None, (role, unit, what)))


@dataclass
class Target:
    """Matrices of one role that one decay acts on, in parameters of one group.

    Attributes:
        role: their role.
        decay: what decays them; None for the optimizer's own L2, which the hook has to apply where another matrix in
            the same parameter must not have it.
        windows: where in each parameter they are.
        positions: of the parameters in the group.
        names: of the parameters.
        whys: the reason for the role, for each parameter.
        counter: of its steps.
        by_optimizer: whether the optimizer applies the decay, and the hook nothing.
        planes: of a decay of rotary planes: where they are in each parameter; nothing of one that takes no part.
    """

    role: str
    decay: Decay | None
    windows: list[Window]
    positions: list[int]
    names: list[str]
    whys: list[str]
    counter: StepCounter
    by_optimizer: bool = False
    planes: list[tuple[PlaneRows, ...]] = field(default_factory=list)

    def parameters(self, group: Group) -> list[Tensor]:
        """Return its parameters, as they are in the group now."""
        return [group["params"][position] for position in self.positions]

    def spares(self, position: int) -> bool:
        """Whether a decay of planes takes nothing of a parameter, which was frozen when it was attached."""
        return bool(self.planes) and not self.planes[self.positions.index(position)]

    def every_in(self, group: Group, counts: bool) -> int:
        """Return after how many steps its decay is applied.

        Args:
            group: of the parameters.
            counts: whether the optimizer's steps can be counted; else a number that follows from the shapes is 1.
        """
        decay = self.decay_in(group)
        if not isinstance(decay, LowRank) or (decay.every is None and not counts):
            return 1
        if decay.every is not None:
            return decay.every
        by_head = decay.unit == "head"
        sides = [smaller_side(w, tuple(p.shape), by_head) for p in self.parameters(group) for w in self.windows]
        return max(1, decay.interval(max(sides, default=1)))

    def decay_in(self, group: Group) -> Decay:
        """Return its decay; for the optimizer's own L2, of the group's present ``weight_decay``."""
        return self.decay if self.decay is not None else Frobenius(float(group.get("weight_decay", 0.0)))


@dataclass
class Bundle:
    """Parameters of a group that have the same matrices with the same decays, found in a model.

    Attributes:
        positions: of the parameters in the group.
        targets: one per role.
        l2: weight decay with which the optimizer is to step these parameters.
        numbers: counts of the targets. The state of every parameter has a copy, with what that parameter was spared,
            where a resumed run needs it: for cycles of several steps, for a warm-up, and for the random numbers by
            which 16-bit weights are rounded. A state without it is that of a run without decay, and either can load
            the other's. Plain numbers, since a tensor would be cast to the dtype of the parameter.
    """

    positions: list[int]
    targets: list[Target]
    l2: float
    numbers: dict[str, Any] = field(default_factory=dict)
    _written: dict[int, dict[str, Any]] = field(default_factory=dict)  # the copies, by position

    def __post_init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        """Count from zero, with every number there: a distributed checkpoint loads into the keys that it finds."""
        self.numbers.clear()
        for target in self.targets:
            target.counter.reset(target.decay.warmup if target.decay is not None else 0)

    def is_counted(self, group: Group, counts: bool) -> bool:
        """Whether a resumed run needs the counts; ``counts`` as for :meth:`Target.every_in`."""
        narrow = any(group["params"][position].dtype.itemsize < 4 for position in self.positions)
        return narrow or any(
            t.every_in(group, counts) > 1 or (t.decay is not None and t.decay.warmup) for t in self.targets
        )

    def recall(self, optimizer: Optimizer, group: Group) -> None:
        """Take the counts over from a state that has been loaded since the last step, or from another group.

        What is pending of a parameter stays its own: beside others, of which more or less is, it is spared the
        difference. One without counts has not been stepped, and nothing of it is pending.
        """
        states = {position: optimizer.state.get(group["params"][position]) or {} for position in self.positions}
        found = {position: state[STATE_KEY] for position, state in states.items() if state.get(STATE_KEY)}
        if all(copy is self._written.get(position) for position, copy in found.items()) and (
            found or not self._written
        ):
            return
        self.take_each(found)

    def take_each(self, found: Mapping[int, Mapping[str, Any]]) -> None:
        """Begin with the counts that each parameter has, by its position in the group, and no others."""
        self._reset()
        self._written = {}
        self.take(next(iter(found.values()), {}))
        for target in self.targets if found else ():
            for index, position in enumerate(target.positions):
                spared = target.counter.pending - target.counter.pending_in(found.get(position, {}))
                spared = spared + found.get(position, {}).get(target.counter.missed_key, 0.0)
                if spared != 0.0:
                    target.counter.miss(index, spared)

    def take(self, found: Mapping[str, Any]) -> None:
        """Take over the counts that are of the decays here."""
        for target in self.targets:
            target.counter.take(found)

    def keep(self, optimizer: Optimizer, group: Group, stepped: set[int], counts: bool) -> None:
        """Write the counts to the state of the parameters that have been stepped, and of those that have counts.

        Not before: to many an optimizer a state with anything in it is one that has been made.
        """
        counted = self.is_counted(group, counts)
        for index, position in enumerate(self.positions):
            parameter = group["params"][position]
            if (counted and id(parameter) in stepped) or STATE_KEY in (optimizer.state.get(parameter) or ()):
                copy = self._written.setdefault(position, {})
                copy.update(self._counts_of(index))
                optimizer.state[parameter][STATE_KEY] = copy

    def _counts_of(self, index: int) -> dict[str, Any]:
        """Return the counts of one of the parameters: those of all, and what it was spared."""
        counts = {key: value for key, value in self.numbers.items() if not isinstance(value, dict)}
        low_rank = (target.counter for target in self.targets if isinstance(target.decay, LowRank))
        return counts | {counter.missed_key: counter.missed_by(index) for counter in low_rank}

    def each_counts(self) -> dict[int, dict[str, Any]]:
        """Return the counts of each parameter, by its position in the group."""
        return {position: self._counts_of(index) for index, position in enumerate(self.positions)}


# ---- counting a step -------------------------------------------------------------------------------------

#: Bounds of an amount, far above any that leaves something of a weight: so that sums stay finite, and ∞ · 0 never is.
_LARGEST, _LARGEST_ON_DEVICE = 1e300, 1e37


def _bounded(amount: float | Tensor) -> float | Tensor:
    if not isinstance(amount, Tensor):
        return min(float(amount), _LARGEST)  # of numpy too, which a weights-only load would not take
    return amount.clamp_max(_LARGEST if amount.dtype == torch.float64 else _LARGEST_ON_DEVICE)


def count_step(
    target: Target, decay: Decay, every: int, rate: float | Tensor, found_inf: Tensor | None, live: list[bool]
) -> list[tuple[float | Tensor, list[int]]]:
    """Count a step, and return what is to be decayed now: amounts, and the parameters that lose them.

    An amount is Σ rate · strength over the steps since the last decay in which a parameter had a gradient. Without
    ``lr_coupled`` the rate is left out. Between the decays of ``every=k`` there is nothing.

    Args:
        target: whose step it is.
        decay: of the target.
        every: after how many steps it is applied.
        rate: of the step.
        found_inf: 1 on the device if the step was skipped.
        live: whether each parameter of the target has a gradient.
    """
    counter = target.counter
    if isinstance(rate, Tensor) and has_float64(rate.device):  # where a strength beyond float32 is none
        rate = rate.double()
    amount = _bounded(decay.strength * rate if decay.lr_coupled and decay.strength else decay.strength)
    if found_inf is not None:
        amount = (amount if isinstance(amount, Tensor) else min(amount, _LARGEST_ON_DEVICE)) * (1 - found_inf)
    amount = amount * counter.ramp(decay, found_inf)
    counter.steps += 1
    pending = counter.pending + amount
    if every > 1:
        for position in (position for position, has_gradient in enumerate(live) if not has_gradient):
            counter.miss(position, amount)
    if counter.steps % every:
        counter.pending = pending
        return []
    # A skipped step applies nothing, and leaves the amount that was pending to the next step that decays.
    counter.pending = 0.0 if found_inf is None or every == 1 else pending * found_inf
    amount_now = pending if found_inf is None else pending * (1 - found_inf)
    missed = counter.take_missed()
    if found_inf is not None:
        for position, spared in missed.items():
            counter.miss(position, spared * found_inf)
        missed = {position: spared * (1 - found_inf) for position, spared in missed.items()}
    by_amount: dict[object, tuple[float | Tensor, list[int]]] = {}
    for position, has_gradient in enumerate(live):
        lost = amount_now  # the same object for all that were spared nothing, which are then decayed together
        if position in missed:
            lost = amount_now - missed[position]
            lost = lost.clamp_min(0.0) if isinstance(lost, Tensor) else lost
        if (has_gradient or every > 1) and (isinstance(lost, Tensor) or lost > 0):
            by_amount.setdefault(lost if isinstance(lost, float) else id(lost), (lost, []))[1].append(position)
    return list(by_amount.values())
