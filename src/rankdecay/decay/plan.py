"""Which decay each matrix of a model gets, from the decays of roles; and which decays do not suit it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple, get_args

from torch import Tensor, nn

from rankdecay.attention.layer import WHOLE, smaller_side
from rankdecay.attention.locate import SearchOptions, listed, warn_unhandled
from rankdecay.attention.planes import PlaneRows
from rankdecay.checks import suggestion
from rankdecay.decay.planes import check_planes
from rankdecay.decay.policy import Decay, Frobenius, LowRank, Planes
from rankdecay.decay.roles import ROLES, ParameterRoles, Segment, assign_roles
from rankdecay.decay.settings import decay_text

Excluded = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]


@dataclass(frozen=True)
class DecayChoice:
    """Decays that a user chooses for a model; :func:`plan` checks them.

    Attributes:
        by_role: decays of the roles that are named.
        default: decay of the matrices whose role is not named.
        search: how attention is looked for.
        exclude: parameters that are left to the optimizer.
    """

    by_role: Mapping[str, Decay]
    default: Decay | None
    search: SearchOptions
    exclude: Excluded


class Remarks(NamedTuple):
    """Remarks about a model's attention for the user, found when its groups were made.

    Attributes:
        unhandled: what looks like attention and is not decayed as such, with the reasons.
        assumed: names of fused parameters that are read as queries, keys, values, since nothing says the order.
    """

    unhandled: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


NO_REMARKS = Remarks()


class Planned(NamedTuple):
    """Parameter, and the decay of each of its matrices; None for the optimizer's own weight decay.

    Attributes:
        entry: the parameter.
        decays: of its segments.
        excluded: whether it is left to the optimizer, as one that holds the codes of a quantised weight is.
        bias_of: the decay of planes that a bias of queries or keys has rows of, in place of ``decays``.
    """

    entry: ParameterRoles
    decays: list[tuple[Segment, Decay | None]]
    excluded: bool = False
    bias_of: Planes | None = None

    @property
    def acting(self) -> list[tuple[Segment, Decay | None]]:
        """The decays that act on its segments; a bias with planes is part of W_Q and W_K."""
        return self.decays if self.bias_of is None else [(Segment("query_key", WHOLE, "bias"), self.bias_of)]


def plan(
    model: nn.Module, choice: DecayChoice, *, rest: Decay | None, stacklevel: int
) -> tuple[list[Planned], Remarks]:
    """Return the decay of every matrix of a model, and what a reader has to know of its attention.

    Args:
        model: the model.
        choice: the decays that were asked for.
        rest: decay of what is no matrix, where its role is not named.
        stacklevel: of the warning, seen from here.
    """
    by_role = choice.by_role
    check_decays({"default": choice.default, **by_role})
    assigned, unhandled = assign_roles(model, choice.search)
    is_excluded = _excluded(choice.exclude, [name for entry in assigned for name in entry.names])
    out = {id(entry) for entry in assigned if any(is_excluded(name) for name in entry.names)}
    _check_every_role_matches(by_role, [e for e in assigned if id(e) not in out], model, listed(unhandled), bool(out))
    if by_role.get("query_key") is not None or by_role.get("value_output") is not None:
        warn_unhandled(unhandled, "is not decayed", stacklevel=stacklevel + 1)
    _leave_out(assigned, out)
    planes = by_role.get("query_key")
    planned: list[Planned] = []
    for entry in assigned:
        if id(entry) in out or _holds_codes(entry.parameter):
            planned.append(Planned(entry, [(segment, None) for segment in entry.segments], True))
            continue
        decays = [(segment, decay_of(segment, entry, choice, rest)) for segment in entry.segments]
        _check_no_conflict(entry, decays)
        planned.append(Planned(entry, decays, bias_of=bias_planes(entry, decays, planes)))
    if isinstance(planes, Planes):
        check_planes(planes, [(entry.names[0], entry.planes) for entry in assigned])
    assumed = [entry.names[0] for entry in assigned if any(segment.assumed for segment in entry.segments)]
    return planned, Remarks(tuple(listed(unhandled)), tuple(assumed))


def _holds_codes(parameter: Tensor) -> bool:
    """Whether a parameter is a quantised weight, whose tensor has not the matrix's shape and takes no gradient."""
    quantised = getattr(parameter, "quant_state", None) is not None  # of 4 bits, whose codes may lie in a float type
    return quantised or not (parameter.is_floating_point() or parameter.is_complex())


def check_decays(decays: Mapping[str, Decay | None]) -> None:
    """Raise a `TypeError` if one of several arguments is neither a decay nor None."""
    for argument, decay in decays.items():
        if decay is not None and not isinstance(decay, get_args(Decay)):
            text = f"; text is read by **rankdecay.decays({argument}={decay!r})" if isinstance(decay, str) else ""
            raise TypeError(
                f"{argument}={decay!r} is not a decay; pass rankdecay.LowRank(strength), "
                f"rankdecay.Frobenius(strength) or, for query_key, rankdecay.Planes(strength){text}."
            )
        if isinstance(decay, Planes) and argument != "query_key":
            raise ValueError(f"{argument}={decay!r}: rotary planes are those of W_Q and W_K; pass it as query_key.")


def _leave_out(assigned: list[ParameterRoles], excluded: set[int]) -> None:
    """Take the planes of excluded and frozen parameters away, and count the layers that have some left."""
    for entry in assigned:
        if id(entry) in excluded or not entry.parameter.requires_grad:
            entry.planes = ()
    layers: dict[str, set[str]] = {}
    for rows in (rows for entry in assigned for rows in entry.planes):
        layers.setdefault(rows.configuration, set()).add(rows.layer)
    for entry in assigned:
        entry.planes = tuple(replace(rows, layers=len(layers[rows.configuration])) for rows in entry.planes)


def bias_planes(
    entry: ParameterRoles, decays: Sequence[tuple[Segment, Decay | None]], query_key: Decay | None
) -> Planes | None:
    """Return the decay of planes that a bias has instead of its own; None if it has none.

    Raises:
        ValueError: If it holds more than the bias of queries or keys, and biases have a decay of their own.
    """
    if not isinstance(query_key, Planes) or not entry.planes or any(s.role == "query_key" for s in entry.segments):
        return None
    bias_decay = next((decay for _, decay in decays if decay is not None and decay.strength), None)
    if bias_decay is not None and holds_more(entry.planes, entry.parameter):
        raise ValueError(
            f"{entry.names[0]} holds the biases of queries, keys and values: those of queries and keys are decayed "
            f"with query_key={query_key!r}, and bias={bias_decay!r} cannot act on the rest of it alone; leave bias out."
        )
    return query_key


def holds_more(planes: Iterable[PlaneRows], bias: Tensor) -> bool:
    """Whether a bias with rotary planes holds the biases of values too."""
    return sum(rows.window.extent(0) for rows in {(each.part, each.window): each for each in planes}.values()) < (
        bias.numel()
    )


def why_of(entry: ParameterRoles) -> str:
    """Return the reasons for the roles of a parameter."""
    reasons = [
        *(segment.why for segment in entry.segments),
        *(segment.note for segment in entry.segments if segment.note),
    ]
    return ", ".join(dict.fromkeys(reasons))


def _excluded(exclude: Excluded, names: list[str]) -> Callable[[str], bool]:
    """Return the test of whether a name is excluded.

    Raises:
        TypeError: If a pattern is neither a string nor a compiled regular expression.
        ValueError: If a pattern matches no name.
    """
    patterns = [exclude] if isinstance(exclude, (str, re.Pattern)) else exclude or ()
    if not isinstance(patterns, Iterable):
        raise TypeError(f"exclude={exclude!r}: give names, shell patterns, or compiled regular expressions.")
    tests: list[Callable[[str], bool]] = []
    for pattern in patterns:
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(f"exclude has {pattern!r}: give names, shell patterns, or compiled regular expressions.")

        def test(name: str, pattern: str | re.Pattern[str] = pattern) -> bool:
            if isinstance(pattern, re.Pattern):
                return pattern.search(name) is not None
            return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")

        if not any(test(name) for name in names):
            modules = {name.rpartition(".")[0] for name in names} - {""}
            near = suggestion(pattern if isinstance(pattern, str) else pattern.pattern, [*names, *sorted(modules)])
            if isinstance(pattern, str) and any(pattern in name for name in names):
                near = f"give {f'*{pattern}*'!r} for every name that has it in it "
            raise ValueError(
                f"exclude={pattern!r} matches no parameter: {near}(the {len(names)} are {names[0]} to {names[-1]})"
            )
        tests.append(test)
    return lambda name: any(test(name) for test in tests)


def decay_of(segment: Segment, entry: ParameterRoles, choice: DecayChoice, rest: Decay | None) -> Decay | None:
    """Return the decay of a segment; None for the optimizer's own weight decay."""
    decay = choice.by_role.get(segment.role)
    if decay is None:
        decay = choice.default if is_matrix(entry, segment) else rest
    if decay is not None:
        check_suits(segment, entry, decay)
    return decay


def is_matrix(entry: ParameterRoles, segment: Segment) -> bool:
    """Return whether a segment has the default decay: a norm's gain and a bias are never matrices."""
    return entry.parameter.ndim >= 2 and segment.role not in ("norm", "bias") and not segment.fixed


def check_suits(segment: Segment, entry: ParameterRoles, decay: Decay) -> None:
    """Raise if a decay is not defined for a segment."""
    name, shape = entry.names[0], tuple(entry.parameter.shape)
    if isinstance(decay, Planes):
        if entry.no_planes or not segment.window.has_heads:
            raise ValueError(
                f"{segment.role}={decay!r} meets {entry.no_planes or f'{name}, whose heads are not known'}. Give "
                f"{segment.role}=rankdecay.LowRank(...), or leave these layers out with exclude=."
            )
        return
    if entry.parameter.is_complex() and not (isinstance(decay, Frobenius) and decay.is_l2):
        raise ValueError(f"{segment.role}={decay!r} meets {complex_weights(name)}")
    needs_matrix = isinstance(decay, LowRank) or (decay.needs_norm and len(shape) > 2)
    if needs_matrix and len(shape) != 2 and not segment.stack and not segment.window.has_heads:
        what = "a low-rank decay" if isinstance(decay, LowRank) else f"a decay of power {decay.power:g}"
        raise ValueError(
            f"{name} has role {segment.role} and shape {shape}, and {what} needs a matrix: give "
            f"{segment.role}=rankdecay.Frobenius(...){' of power 1' if isinstance(decay, Frobenius) else ''} instead, "
            f"or leave it out with exclude={name!r}."
        )
    kind = type(decay).__name__
    if decay.unit == "head" and not segment.window.has_heads:
        raise ValueError(
            f"{segment.role}={kind}(unit='head') meets {name}, which has no heads; use unit='matrix' for this role."
        )
    if isinstance(decay, LowRank) and decay.keep:
        smaller = smaller_side(segment.window, shape, decay.unit == "head")
        if decay.keep >= smaller:
            raise ValueError(
                f"keep={decay.keep} of {segment.role} spares every singular value of {name}, whose "
                f"{'heads' if decay.unit == 'head' else 'matrices'} have {smaller}; give a smaller one, or "
                "rankdecay.Frobenius(0.0) for no decay."
            )


def complex_weights(name: str) -> str:
    """Return why a parameter of complex numbers is not decayed, and what to do."""
    return (
        f"{name}, whose numbers are complex: of those only L2 is decayed, and only where the optimizer decouples it, "
        f"as AdamW does; leave it out with exclude={name!r}."
    )


def _check_no_conflict(entry: ParameterRoles, decays: list[tuple[Segment, Decay | None]]) -> None:
    """Raise if a tied parameter would get two decays for the same matrix."""
    for i, (segment, decay) in enumerate(decays):
        for earlier, earlier_decay in decays[:i]:
            same_place = WHOLE in (segment.window, earlier.window) or segment.window == earlier.window
            if same_place and decay != earlier_decay:
                raise ValueError(
                    f"{' and '.join(entry.names)} are one tied parameter and would get two decays: {earlier.role} "
                    f"({_words(earlier_decay)}) and {segment.role} ({_words(decay)}). Give both roles the same decay, "
                    "or untie them."
                )


def _words(decay: Decay | None) -> str:
    return "the optimizer's weight decay" if decay is None else decay.describe()


#: Roles whose parameters are found as those of attention, and how many parameters a message names.
_OF_ATTENTION, _SHOWN = ("query_key", "value_output"), 3


def _check_every_role_matches(
    named: Mapping[str, Decay | None],
    assigned: list[ParameterRoles],
    model: nn.Module,
    unhandled: list[str],
    some_excluded: bool,
) -> None:
    by_role: dict[str, list[ParameterRoles]] = {}
    for entry in assigned:
        for segment in entry.segments:
            by_role.setdefault(segment.role, []).append(entry)
    for role, decay in named.items():
        if decay is None:
            continue
        if not assigned:
            raise ValueError(f"{role}={decay_text(decay)}: exclude leaves no parameter of {type(model).__name__}.")
        if role not in by_role:
            also = f" Attention that is not handled: {'; '.join(unhandled[:3]).rstrip('.')}." if unhandled else ""
            names = [name for entry in assigned for name in entry.names]
            left = " that is not excluded" if some_excluded else ""
            remedy = " For attention of your own, pass names=rankdecay.AttentionNames(...)."
            more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
            raise ValueError(
                f"{role}={decay_text(decay)} matches no parameter of {type(model).__name__}{left}, whose roles are "
                f"{', '.join(r for r in ROLES if r in by_role)}.{remedy if role in _OF_ATTENTION else ''}{also} Its "
                f"parameters are {', '.join(names[:_SHOWN])}{more}."
            )
        if decay.strength > 0 and not any(entry.parameter.requires_grad for entry in by_role[role]):
            adapted = any(".base_layer." in name for entry in by_role[role] for name in entry.names)
            raise ValueError(
                f"{role}={decay_text(decay)} matches only frozen parameters, such as {by_role[role][0].names[0]}, "
                "which training does not change. "
                + (
                    "They are the base of an adapter: decay its factors with other=rankdecay.Frobenius(...), which for "
                    "the two of LoRA is a nuclear norm on their product."
                    if adapted
                    else f"Call requires_grad_() on them before building the groups, or leave {role} out."
                )
            )
