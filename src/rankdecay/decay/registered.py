"""Groups of an optimizer that a decay is attached to: what is checked of each, and whether it is still the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.optim import Optimizer

from rankdecay.attention.layer import FLATTENED
from rankdecay.decay.averaged import is_averaged
from rankdecay.decay.groups import Group
from rankdecay.decay.optimizers import check_own_decay, counts_steps, has_rate, has_rate_per_parameter
from rankdecay.decay.plan import complex_weights
from rankdecay.decay.policy import Frobenius, LowRank, Planes
from rankdecay.decay.sharded.layout import check_placements
from rankdecay.decay.sources import DecaySource
from rankdecay.decay.targets import Target
from rankdecay.dtensor import is_flattened, is_sharded


class RegisteredGroup(NamedTuple):
    """Roles, shapes and dtypes of a group when the decay was attached."""

    name: str
    roles: list[str]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]

    @classmethod
    def of(cls, group: Group, targets: list[Target]) -> RegisteredGroup:
        roles = list(dict.fromkeys(target.role for target in targets))
        shapes, dtypes = [tuple(p.shape) for p in group["params"]], [p.dtype for p in group["params"]]
        return cls(group.get("role", "+".join(roles)), roles, shapes, dtypes)


def check_group(optimizer: Optimizer, index: int, group: Group, source: DecaySource) -> None:
    """Open every window once, so that what cannot be decayed is found before training."""
    targets = source.targets(index, group)
    check_own_decay(optimizer, index, group, [p for target in targets for p in target.parameters(group)])
    for target in targets:
        decay, role = target.decay_in(group), target.role
        if decay.strength and decay.lr_coupled and not has_rate(optimizer, group):
            raise ValueError(
                f"the decay of {role} is coupled to the learning rate, and {type(optimizer).__name__} has no 'lr' in "
                "its groups; use lr_coupled=False."
            )
        if isinstance(decay, LowRank) and is_averaged(group) and any(map(is_sharded, target.parameters(group))):
            raise ValueError(
                f"{role} is sharded, and a low-rank decay under {type(optimizer).__name__} needs whole matrices; use "
                "DDP, or an optimizer that is not schedule-free."
            )
        if isinstance(decay, Planes) and (is_averaged(group) or group.get("gradient_release")):
            why = "keeps an average of them" if is_averaged(group) else "steps each parameter by itself"
            raise ValueError(
                f"{role}=Planes needs the weights of all parameters of a step at once, and {type(optimizer).__name__} "
                f"{why}; use {role}=rankdecay.LowRank(...), or another optimizer."
            )
        for parameter, name in zip(target.parameters(group), target.names, strict=True):
            if is_sharded(parameter):
                check_placements(parameter, f"{name} ({role})")
                if parameter.ndim != 2 and any(window.has_heads for window in target.windows):
                    raise ValueError(
                        f"{name} ({role}) has shape {tuple(parameter.shape)} and is sharded; attention stored in "
                        "more than two dimensions can be decayed only whole: leave its module out of fully_shard."
                    )
            if parameter.is_complex() and decay.strength and not target.by_optimizer:
                raise ValueError(f"{role}={decay!r} meets {complex_weights(name)}")
            flat = isinstance(decay, Planes) and any(window.has_heads for window in target.windows)
            if parameter.ndim < 2 and (flat or isinstance(decay, LowRank)):
                raise ValueError(
                    f"{name} ({role}) has shape {tuple(parameter.shape)}, not that of a matrix.{FLATTENED}"
                )
            if parameter.ndim < 2 and isinstance(decay, Frobenius) and decay.needs_norm and is_flattened(parameter):
                raise ValueError(
                    f"{role}={decay!r} needs the norm of all of {name}, and FSDP1 leaves any part of it to a process; "
                    "shard with FSDP2 (torch.distributed.fsdp.fully_shard), or give a decay of power 1 without a cap."
                )
            for window in target.windows:
                try:
                    window.heads(torch.empty(parameter.shape, device="meta"))
                except ValueError as error:
                    raise ValueError(f"{name} ({role}): {error}") from None
        every = target.every_in(group, counts_steps(optimizer, group))
        if every > 1 and has_rate_per_parameter(optimizer, group):
            raise ValueError(
                f"{role} is to be decayed every {every} steps, and {type(optimizer).__name__} has another rate "
                "for each parameter in each step; use every=1."
            )
        if every > 1 and group.get("gradient_release"):
            raise ValueError(
                f"{role} is to be decayed every {every} steps, and with gradient_release=True "
                f"{type(optimizer).__name__} steps each parameter by itself, so that there is nothing to count; use "
                "every=1."
            )


def swapped(index: int, before: RegisteredGroup, now: list[tuple[int, ...]]) -> str:
    old = [shape for shape in before.shapes if shape not in now][:3]
    new = [shape for shape in now if shape not in before.shapes][:3]
    return (
        f"the parameters of group {index} (role {before.name}) are not those the decay was attached to: "
        f"{len(before.shapes)} before and {len(now)} now, shapes {old} before and {new} now."
        + (
            FLATTENED
            if any(len(shape) == 1 for shape in new)
            else " Build the optimizer from the model as it is now, then attach."
        )
    )
