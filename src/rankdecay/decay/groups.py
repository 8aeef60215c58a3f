"""Parameter groups: which decay each parameter gets, written into the optimizer's own groups.

A group is a plain dictionary for any ``torch.optim`` constructor. All that the hook of :func:`rankdecay.attach` reads
is in it as numbers and strings, so that it goes through ``state_dict`` and a weights-only load, can be read by a
person, and can be changed while training, like ``lr``:

==========================  ============================================================================
key                         meaning
==========================  ============================================================================
role                        what the group holds: ``"query_key"``, or ``"query_key+value_output"`` if fused
why                         a reason for each parameter, for ``describe()``
weight_decay                L2 applied by the optimizer itself; 0 where the hook decays
decoupled_weight_decay      True: not through the gradient (Adam reads this key; for SGD the hook steps in)
ROLE_rule                   ``"prox"``, … or ``"frobenius"``: a decay that the hook applies
ROLE_strength, _scale, …    the other fields of :class:`~rankdecay.LowRank`
ROLE_blocks                 where in the parameter, a :class:`~rankdecay.attention.Window` per matrix
ROLE_steps, _pending        state of ``every=k``: steps seen, and Σ lr · strength since the last decay
==========================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from rankdecay.attention import Window
from rankdecay.attention.layer import WHOLE
from rankdecay.attention.locate import Names, listed, warn_unhandled
from rankdecay.checks import check_number
from rankdecay.decay.policy import Decay, Frobenius, LowRank
from rankdecay.decay.roles import ROLES, Assigned, Block, assign_roles

Group = dict[str, Any]


def param_groups(
    model: nn.Module,
    default: Decay | None = None,
    *,
    query_key: Decay | None = None,
    value_output: Decay | None = None,
    mlp: Decay | None = None,
    embedding: Decay | None = None,
    norm: Decay | None = None,
    bias: Decay | None = None,
    other: Decay | None = None,
    names: Names = None,
    num_heads: int | None = None,
    only: bool = False,
) -> list[Group]:
    """Return parameter groups for an optimizer, one per role and layout, each with its decay.

    Every parameter of the model is in exactly one group, frozen ones too. Build the optimizer from the groups, then
    call :func:`rankdecay.attach`, which applies the decays that the optimizer cannot.

    Args:
        model: the model; plain, compiled, or wrapped by DDP or PEFT.
        default: decay of every matrix whose role is not named below; without one, the optimizer's own
            ``weight_decay``. Norms and biases have no decay unless they are named.
        query_key: decay of W_Q and W_K.
        value_output: decay of W_V and W_O.
        mlp: decay of the other matrices in blocks with attention.
        embedding: decay of input and output embeddings.
        norm: decay of normalisation gains.
        bias: decay of biases.
        other: decay of everything else.
        names: how your own attention names its projections, for one kind of attention or several, if
            :func:`rankdecay.find_attention` does not know it.
        num_heads: number of query heads, where the model does not say it.
        only: look for ``names`` alone.

    Returns:
        Groups with ``params``, ``param_names``, ``role``, ``why``, ``weight_decay`` and the keys of the decay
        (:mod:`rankdecay.decay.groups`).

    Raises:
        TypeError: If a decay is neither LowRank nor Frobenius.
        ValueError: If a named role matches no parameter, or only frozen ones; if a low-rank decay meets a parameter
            that is no matrix; if a tied parameter would get two decays.

    Warns:
        UserWarning: If some attention of the model is not handled, with the reason.

    Example:
        >>> model = nn.TransformerEncoderLayer(32, nhead=4)
        >>> groups = param_groups(model, Frobenius(0.1), query_key=LowRank(0.1))
        >>> sorted({group["role"] for group in groups})
        ['bias', 'mlp', 'norm', 'query_key+value_output', 'value_output']
    """
    named = {"query_key": query_key, "value_output": value_output, "mlp": mlp, "embedding": embedding, "norm": norm,
             "bias": bias, "other": other}  # fmt: skip
    for argument, decay in {"default": default, **named}.items():
        if decay is not None and not isinstance(decay, (LowRank, Frobenius)):
            raise TypeError(
                f"{argument}={decay!r} is not a decay; pass rankdecay.LowRank(strength) or "
                "rankdecay.Frobenius(strength)."
            )
    assigned, unhandled = assign_roles(model, names, num_heads, only)
    _check_every_role_matches(named, assigned, model, listed(unhandled))
    if query_key is not None or value_output is not None:
        warn_unhandled(unhandled, "is not decayed", stacklevel=3)

    groups: dict[object, Group] = {}
    for entry in assigned:
        decays = [(block, _decay_of(block, entry, named, default)) for block in entry.blocks]
        _check_no_conflict(entry, decays)
        # Not by the decays: the same model has the same groups whatever its decays, so that a state can be loaded.
        key = (tuple((block.role, block.window) for block in entry.blocks), _is_matrix(entry, entry.blocks[0]))
        group = groups.setdefault(key, {"params": [], "param_names": [], "why": [], **_keys(decays)})
        group["params"].append(entry.parameter)
        group["param_names"].append(entry.names[0])
        reasons = [*(block.why for block in entry.blocks), *(block.note for block in entry.blocks if block.note)]
        group["why"].append(", ".join(dict.fromkeys(reasons)))
    assumed = [entry.names[0] for entry in assigned if any(block.assumed for block in entry.blocks)]
    _keep_remarks(groups.values(), Remarks(tuple(listed(unhandled)), tuple(assumed)))
    return list(groups.values())


class Remarks(NamedTuple):
    """What a reader has to know of a model's attention, found when its groups were made.

    Attributes:
        unhandled: what looks like attention and is not decayed as such, with the reasons.
        assumed: names of fused parameters that are read as queries, keys, values, since nothing says the order.
    """

    unhandled: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


NO_REMARKS = Remarks()
#: Remarks by each parameter of the model. They are not in the groups, which hold only what an optimizer's state has to.
_remarks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _keep_remarks(groups: Iterable[Group], remarks: Remarks) -> None:
    for group in groups:
        for parameter in group["params"]:
            _remarks[parameter] = remarks


def remarks_on(groups: Iterable[Group]) -> Remarks:
    """Return what :func:`param_groups` remarked when it made the groups, of one model or several."""
    each = [_remarks[p] for group in groups for p in group["params"] if p in _remarks]
    return Remarks(*(tuple(dict.fromkeys(text for one in each for text in one[i])) for i in range(2)))


def decays_in(group: Group) -> dict[str, Decay]:
    """Return the decays that the hook applies to a group, by role, as its keys say now.

    Raises:
        ValueError: If a key has been given a value that the decay does not take.
    """
    found: dict[str, Decay] = {}
    for role in hook_roles(group):
        if group[f"{role}_rule"] == "frobenius":
            found[role] = Frobenius(_number(group, f"{role}_strength"))
            continue
        settings = {field.name: group[f"{role}_{field.name}"] for field in fields(LowRank)}
        settings["strength"] = _number(group, f"{role}_strength")
        found[role] = LowRank(**settings)
    return found


def hook_roles(group: Group) -> list[str]:
    """Return the roles of a group that the hook decays."""
    return [role for role in ROLES if f"{role}_rule" in group]


def names_in(group: Group) -> list[str]:
    """Return the names of a group's parameters, numbered if it has none."""
    return group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]


def windows_in(group: Group, role: str) -> list[Window]:
    """Return where in each parameter of a group the matrices of a role are."""
    return [Window.parse(text) for text in group.get(f"{role}_blocks", "").split("; ")]


def hook_keys(role: str, decay: Decay, windows: Iterable[Window] = (WHOLE,)) -> Group:
    """Return the keys that make the hook apply ``decay`` to the matrices of a role."""
    settings = asdict(decay) if isinstance(decay, LowRank) else {"rule": "frobenius", "strength": decay.strength}
    keys: Group = {f"{role}_{name}": value for name, value in settings.items()}
    keys |= {f"{role}_steps": 0, f"{role}_pending": 0.0}  # a distributed checkpoint fills existing keys alone
    blocks = "; ".join(filter(None, map(str, windows)))  # nothing of a whole parameter
    if blocks:
        keys[f"{role}_blocks"] = blocks
    return keys


def _number(group: Group, key: str) -> float:
    return check_number(f"the parameter group's {key}", group[key], at_least=0, remedy="0 switches the decay off")


def _decay_of(block: Block, entry: Assigned, named: dict[str, Decay | None], default: Decay | None) -> Decay | None:
    """Return the decay of a block; None for the optimizer's own weight decay."""
    decay = named[block.role]
    if decay is None:
        decay = default if _is_matrix(entry, block) else Frobenius(0.0)
    if isinstance(decay, LowRank):
        _check_matrix(block, entry, decay)
    return decay


def _is_matrix(entry: Assigned, block: Block) -> bool:
    """Return whether a block has the default decay: a norm's gain and a bias are never matrices."""
    return entry.parameter.ndim >= 2 and block.role not in ("norm", "bias") and not block.fixed


def _check_matrix(block: Block, entry: Assigned, decay: LowRank) -> None:
    name, shape = entry.names[0], tuple(entry.parameter.shape)
    if len(shape) != 2 and not block.stack and not block.window.has_heads:
        raise ValueError(
            f"{name} has role {block.role} and shape {shape}, and a low-rank decay needs a matrix: give "
            f"{block.role}=rankdecay.Frobenius(...) instead."
        )
    if decay.unit == "head" and not block.window.has_heads:
        raise ValueError(
            f"{block.role}=LowRank(unit='head') meets {name}, which has no heads; use unit='matrix' for this role."
        )


def _keys(decays: list[tuple[Block, Decay | None]]) -> Group:
    """Return the keys that say which decay the parameters of a group have."""
    roles = list(dict.fromkeys(block.role for block, _ in decays))
    keys: Group = {"role": "+".join(roles)}
    distinct = {decay for _, decay in decays}
    if len(distinct) == 1:
        [decay] = distinct
        if decay is None:
            return keys
        if isinstance(decay, Frobenius):
            return keys | {"weight_decay": decay.strength, "decoupled_weight_decay": True}
    keys["weight_decay"] = 0.0
    for role in roles:
        [decay] = {decay for block, decay in decays if block.role == role}
        windows = [block.labelled_window() for block, _ in decays if block.role == role]
        if decay is None:  # shares a parameter with a decay of the hook: so the hook has to do the optimizer's as well
            keys |= hook_keys(role, Frobenius(0.0), windows) | {f"{role}_strength": "weight_decay"}
        else:
            keys |= hook_keys(role, decay, windows)
    return keys


def _check_no_conflict(entry: Assigned, decays: list[tuple[Block, Decay | None]]) -> None:
    """Raise if a tied parameter would get two decays for the same matrix."""
    for i, (block, decay) in enumerate(decays):
        for earlier, earlier_decay in decays[:i]:
            same_place = WHOLE in (block.window, earlier.window) or block.window == earlier.window
            if same_place and decay != earlier_decay:
                raise ValueError(
                    f"{' and '.join(entry.names)} are one tied parameter and would get two decays: {earlier.role} "
                    f"({_words(earlier_decay)}) and {block.role} ({_words(decay)}). Give both roles the same decay, or "
                    "untie them."
                )


def _words(decay: Decay | None) -> str:
    return "the optimizer's weight decay" if decay is None else decay.describe()


def _check_every_role_matches(
    named: dict[str, Decay | None], assigned: list[Assigned], model: nn.Module, unhandled: list[str]
) -> None:
    by_role: dict[str, list[Assigned]] = {}
    for entry in assigned:
        for block in entry.blocks:
            by_role.setdefault(block.role, []).append(entry)
    for role, decay in named.items():
        if decay is None:
            continue
        if role not in by_role:
            also = f" Attention that is not handled: {'; '.join(unhandled[:3]).rstrip('.')}." if unhandled else ""
            names = [name for entry in assigned for name in entry.names]
            raise ValueError(
                f"{role}={decay!r} matches no parameter of {type(model).__name__}, whose roles are "
                f"{', '.join(r for r in ROLES if r in by_role)}.{also} Its parameters are "
                f"{', '.join(names[:12])}{', …' if len(names) > 12 else ''}. For attention of your own, pass "
                "names=rankdecay.AttentionNames(...)."
            )
        if decay.strength > 0 and not any(entry.parameter.requires_grad for entry in by_role[role]):
            adapted = any(".base_layer." in name for entry in by_role[role] for name in entry.names)
            raise ValueError(
                f"{role}={decay!r} matches only frozen parameters, such as {by_role[role][0].names[0]}, which nothing "
                "changes. "
                + (
                    "They are the base of an adapter: decay its factors with other=rankdecay.Frobenius(...), which is "
                    "a nuclear norm on their product."
                    if adapted
                    else f"Call requires_grad_() on them before building the groups, or leave {role} out."
                )
            )
