"""Attaching to the optimizers of a trainer, which share the parameters of a model out among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rankdecay.attention.locate import SearchOptions
from rankdecay.decay.attach import attach
from rankdecay.decay.attachment import Attachment
from rankdecay.decay.optimizers import parameters_of
from rankdecay.decay.plan import DecayChoice, plan
from rankdecay.decay.policy import Decay
from rankdecay.decay.roles import ROLES
from rankdecay.dtensor import unwrapped


def attach_each(optimizers: Iterable[Optimizer], model: nn.Module, **arguments: Any) -> list[Attachment]:
    """Attach to every optimizer that has parameters of a role, for the roles that it has.

    Args:
        optimizers: those of a trainer.
        model: whose parameters they have.
        **arguments: of :func:`rankdecay.attach`.

    Returns:
        The attachments, in the order of the optimizers; one that has nothing to decay is passed over.

    Raises:
        ValueError: If none of the optimizers has a parameter of a role; else as :func:`rankdecay.attach`.
    """
    each = list(optimizers)
    if len(each) == 1:
        return [attach(each[0], model, **arguments)]
    named: dict[str, Decay] = {role: arguments[role] for role in ROLES if arguments.get(role) is not None}
    rest = {name: value for name, value in arguments.items() if name not in ROLES}
    roles_held = [_roles_held(optimizer, model, named, rest) for optimizer in each]
    for role in named:
        if not any(role in roles for roles, _ in roles_held):
            kinds = ", ".join(type(unwrapped(optimizer)).__name__ for optimizer in each)
            raise ValueError(f"{role}={named[role]!r} names no parameter of these optimizers ({kinds}).")
    attachments: list[Attachment] = []
    try:
        for optimizer, (roles, any_decay) in zip(each, roles_held, strict=True):
            if any_decay:
                own_arguments: dict[str, Any] = {
                    **rest,
                    **{role: decay for role, decay in named.items() if role in roles},
                }
                attachments.append(attach(optimizer, model, **own_arguments))
    except BaseException:
        for attachment in attachments:
            attachment.detach()
        raise
    if not attachments:
        raise ValueError("none of the optimizers has a matrix of this model; give the model that they train.")
    return attachments


def _roles_held(
    optimizer: Optimizer, model: nn.Module, named: Mapping[str, Decay], rest: Mapping[str, Any]
) -> tuple[set[str], bool]:
    """Return the roles of an optimizer's parameters, and whether any of these has a decay."""
    search = SearchOptions(rest.get("names"), rest.get("num_heads"), only=rest.get("only", False))
    choice = DecayChoice(named, rest.get("default"), search, rest.get("exclude", ()))
    planned, _ = plan(model, choice, rest=None, stacklevel=4)
    parameter_ids = set(map(id, parameters_of(unwrapped(optimizer))))
    pairs = [pair for e in planned if not e.excluded and id(e.entry.parameter) in parameter_ids for pair in e.decays]
    return {segment.role for segment, _ in pairs}, any(decay is not None for _, decay in pairs)
