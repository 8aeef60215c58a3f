"""Parameter groups: which decay each parameter gets, written into the optimizer's own groups.

A group is a plain dictionary for any ``torch.optim`` constructor. All that the hook of :func:`rankdecay.attach` reads
is in it as numbers and strings, so that it goes through ``state_dict`` and a weights-only load, can be read by a
person, and can be changed while training, like ``lr``:

==========================  ============================================================================
key                         meaning
==========================  ============================================================================
role                        what the group holds: ``"query_key"``, or ``"query_key+value_output"`` if fused
why                         a reason for each parameter, for ``describe()``
weight_decay                strength of L2, whoever applies it; a schedule may change it
decoupled_weight_decay      True: not through the gradient (Adam reads this key; for SGD the hook steps in)
ROLE_rule                   ``"prox"``, … or ``"frobenius"``: a decay that the hook applies. The optimizer's own L2
                            is then off while it steps
ROLE_strength, _scale, …    the other fields of :class:`~rankdecay.LowRank`; the strength of L2 may be
                            ``"weight_decay"``, for the value of that key
ROLE_blocks                 where in the parameter, a :class:`~rankdecay.attention.Window` per matrix
query_key_planes            of :class:`~rankdecay.Planes`: the rows of each parameter, of biases too, a
                            :class:`~rankdecay.attention.planes.PlaneRows` a line
ROLE_steps, _pending        state of ``every=k``: steps seen, and Σ lr · strength since the last decay
ROLE_warmed                 steps of a warm-up that have been made
==========================  ============================================================================
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from rankdecay.attention import Window
from rankdecay.attention.layer import WHOLE
from rankdecay.attention.locate import Names, SearchOptions
from rankdecay.attention.planes import PlaneRows
from rankdecay.checks import check_number
from rankdecay.decay.hooks import before_every_step
from rankdecay.decay.plan import DecayChoice, Excluded, Remarks, bias_planes, check_suits, is_matrix, plan, why_of
from rankdecay.decay.policy import Decay, Frobenius, LowRank, Planes, unit_of
from rankdecay.decay.roles import ROLES, ParameterRoles, Segment, decays_by_role
from rankdecay.decay.unattached import warn_if_unattached
from rankdecay.dtensor import is_sharded

Group = dict[str, Any]

#: Strength of an L2 that is the group's ``weight_decay``, where the hook applies it.
LIVE = "weight_decay"

#: The rule, in a group's keys, of decays that have none.
FROBENIUS, PLANES = "frobenius", "planes"
#: ``every`` of a low-rank decay that follows from the shapes of the matrices.
BY_SHAPE = "by shape"
#: Fields of a low-rank decay that a group always has; others where they are not as their defaults.
_ALWAYS = ("strength", "rule", "scale", "unit", "every", "lr_coupled", "smoothing")


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
    exclude: Excluded = (),
) -> list[Group]:
    """Return parameter groups for an optimizer, one per role and layout, each with its decay.

    Every parameter of the model is in exactly one group, frozen ones too. Build the optimizer from the groups, then
    call :func:`rankdecay.attach`, which applies the decays that the optimizer cannot.

    Args:
        model: the model; plain, compiled, or wrapped by DDP or PEFT.
        default: decay of every matrix whose role is not named below; without one, the optimizer's own
            ``weight_decay``. Norms and biases have no decay unless they are named.
        query_key: decay of W_Q and W_K; :class:`rankdecay.Planes` acts on their biases too.
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
        exclude: parameters to leave to the optimizer's own ``weight_decay``: names, shell patterns such as
            ``"*.layers.0.*"``, or compiled regular expressions (searched for); a module's path means all in it.

    Returns:
        Groups with ``params``, ``param_names``, ``role``, ``why``, ``weight_decay`` and the keys of the decay
        (:mod:`rankdecay.decay.groups`).

    Raises:
        TypeError: If a decay is none of LowRank, Frobenius and Planes.
        ValueError: If a named role matches no parameter, or only frozen ones; if a low-rank decay meets a parameter
            that is no matrix; if a tied parameter would get two decays; if a pattern of ``exclude`` matches nothing.

    Warns:
        UserWarning: If ``query_key`` or ``value_output`` is given and some attention is not handled, with the reason.
            At the first step of an optimizer with such groups, if nothing is attached to it.

    Example:
        >>> model = nn.TransformerEncoderLayer(32, nhead=4)
        >>> groups = param_groups(model, Frobenius(0.1), query_key=LowRank(0.1))
        >>> sorted({group["role"] for group in groups})
        ['bias', 'mlp', 'norm', 'query_key+value_output', 'value_output']
    """
    named = decays_by_role(query_key, value_output, mlp, embedding, norm, bias, other)
    choice = DecayChoice(named, default, SearchOptions(names, num_heads, only=only), exclude)
    planned, remarks = plan(model, choice, rest=Frobenius(0.0), stacklevel=3)
    groups: dict[object, Group] = {}
    planes = query_key if isinstance(query_key, Planes) else None
    for each in planned:
        entry, decays, excluded = each.entry, each.decays, each.excluded
        # Not by the decays: the same model has the same groups whatever its decays, so that a state can be loaded.
        layout = tuple((segment.role, segment.window) for segment in entry.segments)
        key = (layout, is_matrix(entry, entry.segments[0]), excluded)
        group = groups.setdefault(key, {"params": [], "param_names": [], "why": [], **_keys(decays)})
        group["params"].append(entry.parameter)
        group["param_names"].append(entry.names[0])
        group["why"].append(why_of(entry))
        l2 = all(isinstance(decay, Frobenius) and decay.is_l2 for _, decay in decays)
        known = GroupInfo(
            entry.names[0], group["why"][-1], remarks, entry.segments, l2, entry.planes, entry.no_planes, excluded
        )
        _known.know(model, known.name, entry.parameter, known)
    for group in groups.values():
        _give_planes(group, planes)
        group.update(real_l2(group))
    before_every_step(_look_before_step)
    return Groups(groups.values())


def _applied_by_hook(group: Group) -> list[str]:
    """Return the roles of a group that have a decay which only the hook applies."""
    strengths = {role: group[f"{role}_strength"] for role in hook_roles(group)}
    return [role for role, strength in strengths.items() if (group.get(LIVE) if strength == LIVE else strength)]


def _look_before_step(optimizer: Optimizer, *_: object) -> None:
    warn_if_unattached(optimizer, _applied_by_hook)


class Groups(list[Group]):
    """Groups that give names to those put beside them.

    An optimizer refuses groups with ``param_names``, such as ours, beside groups without, such as a user's own.
    """

    def __add__(self, others: Iterable[Any]) -> Groups:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Groups([*self, *map(with_names, others)])

    def __radd__(self, others: Iterable[Any]) -> Groups:
        return Groups([*map(with_names, others), *self])

    def __iadd__(self, others: Iterable[Any]) -> Groups:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.extend(others)
        return self

    def extend(self, others: Iterable[Any]) -> None:
        super().extend(map(with_names, others))

    def append(self, group: Any) -> None:
        super().append(with_names(group))


def with_names(group: Any) -> Any:
    """Return a group of a user's own with names for its parameters, if it has none."""
    if not isinstance(group, dict) or "param_names" in group or "params" not in group:
        return group
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    if any(isinstance(each, tuple) for each in params):
        return group
    return {**group, "params": params, "param_names": [f"parameter {i}" for i in range(len(params))]}


def name_later_groups(optimizer: Optimizer) -> None:
    """Let an optimizer whose groups have names take groups without, as a user adds them later."""
    add, reference = type(optimizer).add_param_group, weakref.ref(optimizer)

    def add_param_group(param_group: dict[str, Any]) -> None:
        optimizer = reference()
        if optimizer is not None:
            add(optimizer, with_names(param_group))

    optimizer.add_param_group = add_param_group  # pyright: ignore[reportAttributeAccessIssue]


class GroupInfo(NamedTuple):
    """Facts about a parameter that :func:`param_groups` finds, and that an optimizer's state need not hold.

    Attributes:
        name: its name.
        why: the reason for its role.
        remarks: on the model.
        segments: its matrices, with their roles.
        l2: whether its decay is L2 that was asked for, and not the optimizer's own.
        planes: where it has rows of rotary planes.
        no_planes: why it has none, for W_Q and W_K.
        excluded: whether it is left to the optimizer, with all others of its group.
    """

    name: str
    why: str
    remarks: Remarks
    segments: list[Segment]
    l2: bool
    planes: tuple[PlaneRows, ...] = ()
    no_planes: str = ""
    excluded: bool = False


class _KnownParameters:
    """Facts about parameters, kept while the modules that hold them are alive.

    A parameter itself has no weak reference: torch swaps none that has, as it moves DTensors to another type or device.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[nn.Module], str, GroupInfo]] = {}

    def know(self, model: nn.Module, name: str, parameter: Tensor, known: GroupInfo) -> None:
        """Take up a parameter of a model."""
        owner, _, leaf = name.rpartition(".")
        key = id(parameter)

        def forget(holder: weakref.ref[nn.Module]) -> None:
            if key in self._known and self._known[key][0] is holder:  # and no other parameter has its number by now
                del self._known[key]

        self._known[key] = (weakref.ref(model.get_submodule(owner), forget), leaf, known)

    def _found(self, parameter: Tensor) -> GroupInfo | None:
        reference, leaf, known = self._known.get(id(parameter), (lambda: None, "", None))
        holder = reference()
        present = holder._parameters[leaf] if holder is not None and leaf in holder._parameters else None
        if present is parameter or (present is not None and is_sharded(parameter) and present.shape == parameter.shape):
            return known  # FSDP2 puts the whole tensor in the place of the sharded one, for a forward pass and after it
        return None

    def was_replaced(self, parameter: Tensor) -> bool:
        """Whether the module that had a parameter still exists, and has another in its place."""
        return id(parameter) in self._known and self._found(parameter) is None

    def __contains__(self, parameter: Tensor) -> bool:
        return self._found(parameter) is not None

    def __getitem__(self, parameter: Tensor) -> GroupInfo:
        known = self._found(parameter)
        if known is None:
            raise KeyError(parameter)
        return known


_known = _KnownParameters()


def was_replaced(parameter: Tensor) -> bool:
    """Whether the model of :func:`param_groups` has another parameter in the place of one."""
    return _known.was_replaced(parameter)


def remarks_on(groups: Iterable[Group]) -> Remarks:
    """Return what :func:`param_groups` remarked when it made the groups, of one model or several."""
    each = list(dict.fromkeys(_known[p].remarks for group in groups for p in group["params"] if p in _known))
    return Remarks(*(tuple(dict.fromkeys(text for one in each for text in one[i])) for i in range(2)))


def decays_in(group: Group) -> dict[str, Decay]:
    """Return the decays that the hook applies to a group, by role, as its keys say now.

    Raises:
        ValueError: If a key has been given a value that the decay does not take.
    """
    found: dict[str, Decay] = {}
    for role in hook_roles(group):
        kind = {FROBENIUS: Frobenius, PLANES: Planes}.get(group[f"{role}_rule"], LowRank)
        keys = {field.name: f"{role}_{field.name}" for field in fields(kind)}
        settings = {name: group[key] for name, key in keys.items() if key in group}
        live = settings["strength"] == LIVE
        settings["strength"] = _number(group, LIVE if live else f"{role}_strength")
        if settings.get("every") == BY_SHAPE:
            settings["every"] = None
        found[role] = kind(**settings)
    return found


def live_l2(role: str, windows: Iterable[Window] = (WHOLE,)) -> Group:
    """Return the keys that make the hook apply the group's ``weight_decay`` to the matrices of a role."""
    return hook_keys(role, Frobenius(0.0), windows) | {f"{role}_strength": LIVE}


def _give_planes(group: Group, decay: Planes | None) -> None:
    """Write where the rotary planes of a group's parameters are; for biases also the decay, which acts on them too."""
    if decay is None:
        return
    rows = [_known[p].planes if p in _known else () for p in group["params"]]
    of_matrices = "query_key" in roles_of(group)
    if of_matrices or any(rows):
        group.update({} if of_matrices else hook_keys("query_key", decay))
        group[f"query_key_{PLANES}"] = ["\n".join(map(str, each)) for each in rows]


def planes_in(group: Group) -> list[tuple[PlaneRows, ...]]:
    """Return where the rotary planes of each of a group's parameters are, nothing of those that have none.

    Raises:
        ValueError: If the group does not say it of each of its parameters.
    """
    texts = group.get(f"query_key_{PLANES}")
    if texts is None:
        return [() for _ in group["params"]]
    if len(texts) == len(group["params"]):
        return [_rows(text) for text in texts]
    if all(p in _known for p in group["params"]):
        return [_known[p].planes for p in group["params"]]
    raise ValueError(
        f"the group of {group.get('role')} had {len(texts)} parameters and has {len(group['params'])}, and nothing "
        "says where the rotary planes of each are; build it with rankdecay.param_groups."
    )


@lru_cache(maxsize=4096)
def _rows(text: str) -> tuple[PlaneRows, ...]:
    return tuple(map(PlaneRows.parse, filter(None, text.split("\n"))))


def roles_of(group: Group) -> list[str]:
    """Return the roles of the matrices in a group; a bias with rotary planes has a decay of another."""
    return group.get("role", "").split("+")


def has_live_l2(group: Group) -> bool:
    """Whether the hook applies the group's ``weight_decay``."""
    return any(group[f"{role}_strength"] == LIVE for role in hook_roles(group))


def change_decays(group: Group, decays: Mapping[str, Decay]) -> None:
    """Give roles of a group other decays; their counts go on.

    Raises:
        ValueError: If the group does not say where the matrices of its roles are.
    """
    roles = roles_of(group)
    if any(_known[p].excluded for p in group["params"] if p in _known):
        return
    if "query_key" in decays and "query_key" not in roles:
        _change_biases(group, decays["query_key"])
    if not set(roles) & set(decays):
        return
    known = [_known[p].segments for p in group["params"] if p in _known]
    found = decays_in(group)
    if not known and (len(roles) > 1 or any(f"{role}_blocks" in group for role in roles)):
        raise ValueError(
            f"the decay of {group['role']} cannot be replaced, since its parameters are not those of "
            "rankdecay.param_groups: change the group's own keys, such as query_key_strength."
        )
    segments = known[0] if known else [Segment(roles[0], WHOLE, "")]
    whole: Decay | None = Frobenius(group["weight_decay"]) if "weight_decay" in group else None
    pairs = [(segment, decays.get(segment.role, found.get(segment.role, whole))) for segment in segments]
    for segment, decay in pairs:
        if decay is not None and group["params"]:
            no_planes = next((_known[p].no_planes for p in group["params"] if p in _known), "")
            check_suits(
                segment, ParameterRoles(group["params"][0], names_in(group)[:1], segments, no_planes=no_planes), decay
            )
    counts = {key: group[key] for key in group if key.endswith(("_steps", "_pending", "_missed"))}
    for role, decay in decays.items():
        if found.get(role) == decay and f"{role}_warmed" in group:
            counts[f"{role}_warmed"] = group[f"{role}_warmed"]  # the same decay again: its warm-up goes on
    for role in set(hook_roles(group)) & set(roles):
        for key in [key for key in group if key.startswith(f"{role}_")]:
            del group[key]
    group.update(_keys(pairs))
    acting = decays_in(group)
    if "query_key" in roles:
        query_key = acting.get("query_key")
        _give_planes(group, query_key if isinstance(query_key, Planes) else None)
    for role in [role for role in found if role in acting and _measure(acting[role]) != _measure(found[role])]:
        for what in ("pending", "missed"):  # read in another unit it might wipe the weight out
            counts.pop(f"{role}_{what}", None)
    group.update({key: n for key, n in counts.items() if key.replace("_missed", "_pending") in group})
    group.update(real_l2(group))


def _measure(decay: Decay) -> tuple[type, str]:
    """Return what an amount that is pending means: of which kind of decay, and in which unit."""
    return type(decay), unit_of(decay)


def _change_biases(group: Group, decay: Decay) -> None:
    """Let the biases of queries and keys in a group follow the decay of their matrices, if that is of planes."""
    found = decays_in(group)
    counts = {key: group[key] for key in ("query_key_steps", "query_key_warmed") if key in group}
    for key in [key for key in group if key.startswith("query_key_")]:
        del group[key]
    if not isinstance(decay, Planes):
        return
    bias_decay = found.get(roles_of(group)[0], Frobenius(group.get("weight_decay", 0.0)))
    for known in (_known[p] for p in group["params"] if p in _known):
        shape = next(p for p in group["params"] if p in _known and _known[p] is known)
        bias_planes(
            ParameterRoles(shape, [known.name], known.segments, known.planes),
            [(s, bias_decay) for s in known.segments],
            decay,
        )
    _give_planes(group, decay)
    same = found.get("query_key") == decay
    group.update({key: n for key, n in counts.items() if key in group and (same or key != "query_key_warmed")})


def hook_roles(group: Group) -> list[str]:
    """Return the roles of a group that the hook decays."""
    return [role for role in ROLES if f"{role}_rule" in group]


def names_in(group: Group) -> list[str]:
    """Return the names of a group's parameters, numbered where they are not known.

    A group may have lost parameters since its names were written, as frozen ones that were filtered out.
    """
    names = group.get("param_names")
    if names and len(names) == len(group["params"]):
        return names
    return [_known[p].name if p in _known else f"parameter {i}" for i, p in enumerate(group["params"])]


def whys_in(group: Group) -> list[str]:
    """Return the reason for the role of each of a group's parameters."""
    whys = group.get("why")
    if whys and len(whys) == len(group["params"]):
        return whys
    return [_known[p].why if p in _known else "" for p in group["params"]]


def windows_in(group: Group, role: str) -> list[Window]:
    """Return where in each parameter of a group the matrices of a role are."""
    return [Window.parse(text) for text in group.get(f"{role}_blocks", "").split("; ")]


def hook_keys(role: str, decay: Decay, windows: Iterable[Window] = (WHOLE,)) -> Group:
    """Return the keys that make the hook apply ``decay`` to the matrices of a role."""
    always = _ALWAYS if isinstance(decay, LowRank) else ("strength",)
    defaults = {field.name: field.default for field in fields(decay)}
    settings = {name: value for name, value in asdict(decay).items() if name in always or value != defaults[name]}
    if not isinstance(decay, LowRank):
        settings["rule"] = PLANES if isinstance(decay, Planes) else FROBENIUS
    elif decay.every is None:
        settings["every"] = BY_SHAPE
    keys: Group = {f"{role}_{name}": value for name, value in settings.items()}
    keys |= {f"{role}_steps": 0, f"{role}_pending": 0.0}  # a distributed checkpoint fills existing keys alone
    keys |= {f"{role}_warmed": 0} if decay.warmup else {}
    blocks = "; ".join(filter(None, map(str, windows)))  # nothing of a whole parameter
    if blocks:
        keys[f"{role}_blocks"] = blocks
    return keys


def _number(group: Group, key: str) -> float:
    return check_number(f"the parameter group's {key}", group[key], at_least=0, remedy="0 switches the decay off")


def real_l2(group: Group) -> Group:
    """Return the keys by which the hook applies L2 to 16-bit weights, if a group has any.

    The optimizer would round it away, at usual learning rates.
    """
    narrow = any(
        p.is_floating_point() and p.dtype.itemsize < 4 and p in _known and _known[p].l2 for p in group["params"]
    )
    if not narrow or not group.get("weight_decay") or set(hook_roles(group)) & set(roles_of(group)):
        return {}
    return live_l2(roles_of(group)[0])


def _keys(decays: list[tuple[Segment, Decay | None]]) -> Group:
    """Return the keys that say which decay the parameters of a group have."""
    roles = list(dict.fromkeys(segment.role for segment, _ in decays))
    keys: Group = {"role": "+".join(roles)}
    distinct = {decay for _, decay in decays}
    if len(distinct) == 1:
        [decay] = distinct
        if decay is None:
            return keys
        if isinstance(decay, Frobenius) and decay.is_l2:
            return keys | {"weight_decay": decay.strength, "decoupled_weight_decay": True}
    # One strength of L2 is the group's weight_decay, so that a schedule of it counts; absent, the optimizer's own.
    l2 = {decay for decay in distinct if decay is None or (isinstance(decay, Frobenius) and decay.is_l2)}
    live = None if None in l2 else (l2.pop() if len(l2) == 1 else Frobenius(0.0))
    keys |= {} if live is None else {"weight_decay": live.strength}
    for role in roles:
        [decay] = {decay for segment, decay in decays if segment.role == role}
        windows = [segment.labelled_window() for segment, _ in decays if segment.role == role]
        if decay is None or decay == live:
            keys |= live_l2(role, windows)
        else:
            keys |= hook_keys(role, decay, windows)
    return keys
