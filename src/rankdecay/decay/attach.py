"""Joins a decay to an optimizer: from the decays of roles of a model, or from the optimizer's own groups.

What happens then is in :mod:`rankdecay.decay.attachment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from rankdecay.attention.layer import FLATTENED
from rankdecay.attention.locate import Names, SearchOptions
from rankdecay.checks import check_name
from rankdecay.decay.attachment import Attachment
from rankdecay.decay.groups import hook_roles
from rankdecay.decay.optimizers import check_supported, parameters_of
from rankdecay.decay.plan import DecayChoice, Excluded, Planned, plan
from rankdecay.decay.policy import Decay
from rankdecay.decay.roles import decays_by_role
from rankdecay.decay.sources import DecaySource, FromGroups, FromModel
from rankdecay.dtensor import shares_out, unwrapped, wrappers_of
from rankdecay.linalg import Backend

Counts = Literal["optimizer", "attachment"]


def attach(
    optimizer: Optimizer,
    model: nn.Module | None = None,
    default: Decay | None = None,
    *,
    query_key: Decay | None = None,
    value_output: Decay | None = None,
    mlp: Decay | None = None,
    embedding: Decay | None = None,
    norm: Decay | None = None,
    bias: Decay | None = None,
    other: Decay | None = None,
    exclude: Excluded = (),
    names: Names = None,
    num_heads: int | None = None,
    only: bool = False,
    backend: Backend = "auto",
    counts: Counts = "optimizer",
) -> Attachment:
    """Make an optimizer decay the roles that are named, after each of its steps.

    The optimizer's groups stay as they are. A role that is named gets its decay and no other: the optimizer's own
    ``weight_decay`` does not act on it. All else is left to the optimizer. If it has a part of a role's parameters,
    that part is decayed, and ``describe()`` names the rest, which another optimizer may have.

    Without a model and roles, the decays are those in the groups of :func:`rankdecay.param_groups`.

    Copying or pickling an optimizer drops its hooks, and PyTorch does not say so: attach to the copy; a copied
    attachment is detached. Attach before or after ``load_state_dict``. A parameter without a gradient is left alone, as
    AdamW does.

    Args:
        optimizer: any class; a wrapper of Accelerate, Lightning, timm or SAM is seen through.
        model: the model whose parameters the optimizer has; plain, compiled, or wrapped by DDP, FSDP2 or PEFT.
        default: decay of every matrix whose role is not named.
        query_key: decay of W_Q and W_K; :class:`rankdecay.Planes` acts on their biases too.
        value_output: decay of W_V and W_O.
        mlp: decay of the other matrices in blocks with attention.
        embedding: decay of input and output embeddings.
        norm: decay of normalisation gains.
        bias: decay of biases.
        other: decay of everything else.
        exclude: parameters to leave to the optimizer, as for :func:`rankdecay.param_groups`.
        names: how your own attention names its projections, as in :func:`rankdecay.find_attention`.
        num_heads: number of query heads, where the model does not say it.
        only: look for ``names`` alone.
        backend: ``"exact"``, ``"matmul"``, or ``"auto"``: exact on a CPU, products elsewhere, so that a step
            never waits for the device.
        counts: where the state of ``every=k`` is saved: in ``optimizer.state_dict()``, under one key in the state of
            each parameter, or in ``attachment.state_dict()`` alone. Either can load the state of a run without decay;
            but a distributed checkpoint must have every key that ``optimizer.state_dict()`` has.

    Returns:
        An :class:`Attachment`; keep it to describe, change or detach the decay. The optimizer keeps it alive.

    Raises:
        TypeError: If ``optimizer`` is not a ``torch.optim.Optimizer`` or ``model`` not a module.
        ValueError: If there is nothing to decay, if the optimizer is attached already, if another attached optimizer
            decays one of its parameters, if it cannot be decayed under, or if it holds nothing of a role.

    Example:
        >>> import rankdecay as rd
        >>> model = torch.nn.MultiheadAttention(8, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> attachment = rd.attach(optimizer, model, query_key=rd.LowRank(0.1))
    """
    if isinstance(optimizer, nn.Module) and isinstance(model, Optimizer):
        raise TypeError("the arguments are swapped: rankdecay.attach(optimizer, model, ...).")
    check_supported(optimizer)
    inside, wrappers = unwrapped(optimizer), wrappers_of(optimizer)
    for each in (*wrappers, inside):
        check_supported(each)
    named = decays_by_role(query_key, value_output, mlp, embedding, norm, bias, other)
    check_name("backend", backend, get_args(Backend))
    check_name("counts", counts, get_args(Counts))
    choice = DecayChoice(named, default, SearchOptions(names, num_heads, only=only), exclude)
    stepped: list[Any] = [inside, *filter(shares_out, wrappers)]
    by_id = {id(p): p for each in stepped for p in parameters_of(each)}
    source = _source(inside, model, choice, counts == "optimizer", by_id)
    return Attachment(inside, source, backend, wrappers)


def _source(
    optimizer: Optimizer,
    model: nn.Module | None,
    choice: DecayChoice,
    counts_in_state: bool,
    stepped: Mapping[int, Tensor],
) -> DecaySource:
    """Return where the decays come from: the optimizer's groups, or the model and the roles.

    ``stepped`` are the parameters, by identity, that the optimizer steps here or in another process.
    """
    named, default = choice.by_role, choice.default
    kind = type(optimizer).__name__
    ours = any("role" in group and ("why" in group or hook_roles(group)) for group in optimizer.param_groups)
    if model is None:
        if named or default is not None or choice.exclude:
            words = ", ".join(named) or ("default" if default is not None else "exclude")
            raise TypeError(f"attach({kind}, {words}=...) needs the model: rankdecay.attach(optimizer, model, ...).")
        if not ours:
            raise ValueError(
                f"no parameter group of this {kind} comes from rankdecay.param_groups, so there is nothing to decay: "
                "name the roles, rankdecay.attach(optimizer, model, query_key=rankdecay.LowRank(0.1)), or build it as "
                f"{kind}(rankdecay.param_groups(model, ...), ...)."
            )
        return FromGroups()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {model!r}; the backend is a keyword, backend={model!r}."
            if isinstance(model, str)
            else f"model must be a torch.nn.Module, got {type(model).__name__}."
        )
    if not named and default is None:
        raise ValueError("no role is named, so there is nothing to decay: give query_key=rankdecay.LowRank(0.1).")
    if ours:
        roles = sorted({role for group in optimizer.param_groups for role in hook_roles(group)} & set(named))
        raise ValueError(
            f"the groups of this {kind} come from rankdecay.param_groups and say their decays already"
            + (f", of {', '.join(roles)} too" if roles else "")
            + "; give all of them there and call rankdecay.attach(optimizer), or build the optimizer from "
            "model.parameters()."
        )
    planned, remarks = plan(model, choice, rest=None, stacklevel=4)
    _check_stepped(type(optimizer).__name__, stepped, model, named, planned)
    here = set(map(id, parameters_of(optimizer)))
    elsewhere = {each.entry.names[0] for each in planned if id(each.entry.parameter) in stepped.keys() - here}
    return FromModel(model, choice, planned, remarks, counts_in_state, elsewhere)


def _check_stepped(
    kind: str, stepped: Mapping[int, Tensor], model: nn.Module, named: Mapping[str, Decay], planned: list[Planned]
) -> None:
    """Raise if the optimizer has no parameter of the model, none of a role, or none that has a decay.

    Args:
        kind: of the optimizer.
        stepped: the parameters that it steps, by identity.
        model: of which the decays are.
        named: decays by role.
        planned: parameters of the model.
    """
    of_model = [each for each in planned if id(each.entry.parameter) in stepped]
    flattened = FLATTENED if any(p.ndim == 1 for p in stepped.values()) else ""
    if not of_model:
        shapes = {tuple(each.entry.parameter.shape) for each in planned}
        copies = sum(tuple(p.shape) in shapes for p in stepped.values())
        raise ValueError(
            f"this {kind} has no parameter of {type(model).__name__}"
            + (
                f", but {copies} of the same shapes: they are those of another copy, or of the model before it was "
                "sharded or copied. Build the optimizer from the model as it is now, then attach."
                if copies
                else "; give the model whose parameters it has." + flattened
            )
        )
    for role in named:
        of_role = [
            e.entry for e in planned if not e.excluded and any(segment.role == role for segment in e.entry.segments)
        ]
        if of_role and not any(id(entry.parameter) in stepped for entry in of_role):
            raise ValueError(
                f"{role}={named[role]!r} names no parameter of this {kind}: {of_role[0].names[0]} and "
                f"{len(of_role) - 1} more are not in it. Attach that role to the optimizer which has them."
            )
    if not any(decay is not None for each in of_model for _, decay in each.acting):
        raise ValueError(
            f"default= is the decay of matrices, and this {kind} has none of {type(model).__name__} but what is "
            f"excluded; name a role, such as norm=rankdecay.Frobenius(0.1).{flattened}"
        )
