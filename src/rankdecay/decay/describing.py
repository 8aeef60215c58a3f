"""Rows and sentences by which ``Attachment.describe`` says what is decayed, read from an optimizer and its targets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import dropwhile
from typing import get_args

from torch import Tensor
from torch.optim import Optimizer

from rankdecay.attention.layer import WHOLE, Role
from rankdecay.decay.apply import Step
from rankdecay.decay.groups import Group
from rankdecay.decay.optimizers import (
    counts_steps,
    has_rate_per_parameter,
    rate,
)
from rankdecay.decay.policy import Decay, Frobenius, LowRank, Planes
from rankdecay.decay.sources import DecaySource
from rankdecay.decay.table import Row
from rankdecay.decay.targets import Target
from rankdecay.decay.units import in_units, present
from rankdecay.dtensor import is_sharded


def rows_of(optimizer: Optimizer, source: DecaySource, index: int, group: Group, active: bool) -> Iterator[Row]:
    """Yield a row for every matrix of every parameter of a group.

    Args:
        optimizer: with its groups in one piece.
        source: of its targets.
        index: of the group.
        group: itself.
        active: whether decays are applied.
    """
    targets: dict[int, list[Target]] = {}
    for target in source.targets(index, group):
        for position in target.positions:
            targets.setdefault(position, []).append(target)
    kind = type(optimizer).__name__
    for position, parameter in enumerate(group["params"]):
        name, role, why = source.place(index, group, position)
        frozen = "" if parameter.requires_grad else "frozen; "
        if position not in targets:
            l2 = group.get("weight_decay", 0.0)
            words = f"L2 {l2:g}" if l2 else "none"
            yield Row(name, parameter, role, WHOLE, words, kind if l2 else "", frozen + why)
        for target in targets.get(position, []):
            decay = target.decay_in(group)
            acts = decay.strength and not target.spares(position)
            words = decay.describe() if acts else "none"
            who = kind if target.by_optimizer else "rankdecay"
            who = (who if active else "nobody") if acts else ""
            low_rank = isinstance(decay, LowRank)
            every = target.every_in(group, counts_steps(optimizer, group))
            if every > 1 and decay.strength and isinstance(decay, LowRank) and decay.every is None:
                words += f", every {every} steps by shape"
            since = target.counter.steps % every
            waiting = f"{target.role}: {since} of {every} steps since its last decay" if since else ""
            for window in target.windows:
                notes = dropwhile(get_args(Role).__contains__, why.split(", "))  # behind the names of the matrices
                reason = frozen + (", ".join([window.label, *notes]) if window.label else why)
                reason += "; its planes were frozen when they were attached" if decay.strength and not acts else ""
                yield Row(name, parameter, target.role, window, words, who, reason, low_rank, waiting)


def units_of(optimizer: Optimizer, source: DecaySource) -> list[str]:
    """Return what the strengths mean now: a sentence for each role, decay and learning rate."""
    alike: dict[tuple[str, Decay, float, str], list[Tensor]] = {}
    for index, group in enumerate(optimizer.param_groups):
        lr = group.get("lr")
        if lr is None or has_rate_per_parameter(optimizer, group):
            continue
        now = float(rate(optimizer, group))
        name = "lr" if now == float(lr) else "rate"  # which the optimizer makes of it
        for target in source.targets(index, group):
            decay, parameters = target.decay_in(group), target.parameters(group)
            matrices = alike.setdefault((target.role, decay, now, name), [])
            if not decay.strength or any(map(is_sharded, parameters)):
                continue
            if isinstance(decay, Planes):
                pairs = zip(parameters, target.planes, strict=True)
                matrices += [rows.of(parameter) for parameter, several in pairs for rows in several]
            else:
                matrices += Step(parameters, target.windows, decay, 0.0, 0).matrices()
    return [
        f"{role}: {in_units(decay, now, present(matrices), name)}"
        for (role, decay, now, name), matrices in alike.items()
        if decay.strength
    ]


#: What computes a weight so that the norm of the stored matrix does not count.
_NORMS_OF_WEIGHTS = ("weight_norm", "spectral_norm")


def without_effect(optimizer: Optimizer, source: DecaySource) -> list[str]:
    """Return which roles have L2 on matrices under a norm of the weight, which undoes it: a sentence for each."""
    names: dict[tuple[str, str], list[str]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for target in source.targets(index, group):
            decay = target.decay_in(group)
            if not (isinstance(decay, Frobenius) and decay.strength):
                continue
            for position in target.positions:
                name, _, why = source.place(index, group, position)
                for norm in _NORMS_OF_WEIGHTS:
                    if f"under {norm}" in why:
                        names.setdefault((target.role, norm), []).append(name)
    return [
        f"{role}: {norm} takes out the length of {len(those)} of its matrices ({', '.join(those[:2])}"
        f"{', …' if len(those) > 2 else ''}), and L2 changes nothing else of them: use rankdecay.LowRank"
        + (", or decay the magnitudes with norm=" if norm == "weight_norm" else "")
        for (role, norm), those in names.items()
    ]
