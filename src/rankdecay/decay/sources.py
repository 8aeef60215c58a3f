"""Sources of an attachment's targets: the optimizer's groups, or a model and the decays of its roles.

Both say the same things of a group: its targets, and with which weight decay the optimizer is to step which of its
parameters, so that a role has its decay and no other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankdecay.attention.source import named_parameters
from rankdecay.decay.groups import (
    Group,
    change_decays,
    decays_in,
    has_live_l2,
    hook_roles,
    live_l2,
    names_in,
    planes_in,
    real_l2,
    remarks_on,
    roles_of,
    was_replaced,
    whys_in,
    windows_in,
)
from rankdecay.decay.optimizers import counts_steps, decouples, is_decoupled
from rankdecay.decay.plan import DecayChoice, Planned, Remarks, bias_planes, decay_of, holds_more, plan, why_of
from rankdecay.decay.planes import check_alike, check_planes
from rankdecay.decay.policy import Decay, Frobenius, Planes, unit_of
from rankdecay.decay.targets import Bundle, StepCounter, Target
from rankdecay.decay.weight_decay import Section
from rankdecay.dtensor import is_sharded


class ParameterDescription(NamedTuple):
    """Description of a parameter of a group, for the user."""

    name: str
    role: str
    why: str


class DecaySource(Protocol):
    """Source of the targets of an optimizer."""

    def register(self, optimizer: Optimizer, index: int, group: Group) -> None:
        """Take a group up, when it is first seen and when the dtypes of its parameters have changed."""
        ...

    def exchanged(self, index: int, group: Group) -> bool:
        """Whether a group has other parameters of the model than when it was taken up."""
        ...

    def targets(self, index: int, group: Group) -> list[Target]:
        """Return the targets of a group."""
        ...

    def sections(self, optimizer: Optimizer, index: int, group: Group) -> list[Section]:
        """Return the parameters that the optimizer is to step with another weight decay than the group's."""
        ...

    def place(self, index: int, group: Group, position: int) -> ParameterDescription:
        """Return what a parameter is."""
        ...

    def remarks(self, optimizer: Optimizer) -> Remarks:
        """Return what a reader has to know of the model's attention."""
        ...

    def notes(self, optimizer: Optimizer) -> list[str]:
        """Return what else a reader has to know."""
        ...

    def replaced(self, optimizer: Optimizer, stepped: Set[int]) -> list[str]:
        """Return the names of decayed parameters that have no gradient, as the model has others in their place."""
        ...

    def set(self, optimizer: Optimizer, decays: Mapping[str, Decay]) -> None:
        """Give roles other decays."""
        ...

    def recall(self, optimizer: Optimizer) -> None:
        """Take the counts from a state that has been loaded."""
        ...

    def keep(self, optimizer: Optimizer, stepped: set[int]) -> None:
        """Write the counts where the optimizer saves them."""
        ...

    def check_kept(self, optimizer: Optimizer, index: int, group: Group, roles: list[str]) -> None:
        """Raise if a loaded state has taken the decays of these roles out of a group; not every load calls hooks."""
        ...

    def close(self, optimizer: Optimizer) -> None:
        """Leave the optimizer's groups as they were found."""
        ...


def check_planes_held(source: DecaySource, optimizer: Optimizer) -> None:
    """Raise if an optimizer has a part of the rows of rotary planes that are to vanish together.

    Raises:
        ValueError: If it has; or if groups differ in what a plane is.
    """
    targets = [target for index, group in enumerate(optimizer.param_groups) for target in source.targets(index, group)]
    decays = [target.decay for target in targets if isinstance(target.decay, Planes)]
    check_alike(decays)
    for decay in decays[:1]:
        check_planes(decay, [pair for t in targets if t.planes for pair in zip(t.names, t.planes, strict=True)])


# ---- the optimizer's groups ------------------------------------------------------------------------------


class FromGroups:
    """Targets of an optimizer that was built from the groups of :func:`rankdecay.param_groups`."""

    def __init__(self) -> None:
        self._added: dict[int, list[str]] = {}  # keys written to a group that was found without them
        self._warned = False

    def register(self, optimizer: Optimizer, index: int, group: Group) -> None:
        """Let the hook apply L2 where the optimizer does not decouple it, or would round it away."""
        l2 = group.get("decoupled_weight_decay") and group.get("weight_decay")
        if "role" not in group or set(hook_roles(group)) & set(roles_of(group)) or not l2:
            return
        keys = real_l2(group) if decouples(optimizer, group) else live_l2(roles_of(group)[0])
        group.update(keys)
        self._added[index] = list(keys)

    def exchanged(self, index: int, group: Group) -> bool:
        """Return False: decays are of the group, whatever is in it."""
        return False

    def targets(self, index: int, group: Group) -> list[Target]:
        """Return the targets of a group, as its keys say now.

        Raises:
            ValueError: If a key has been given a value that its decay does not take.
        """
        names, whys, planes = names_in(group), whys_in(group), planes_in(group)
        every = list(range(len(group["params"])))
        biases = [] if "query_key" in roles_of(group) else [i for i in every if planes[i]]  # among others
        targets: list[Target] = []
        for role, decay in decays_in(group).items():
            of_planes = isinstance(decay, Planes)
            at = every if not biases else biases if of_planes else [i for i in every if i not in biases]
            windows, counter = windows_in(group, role), StepCounter(group, role)
            rows = [planes[i] for i in at] if of_planes else []
            its_names, its_whys = [names[i] for i in at], [whys[i] for i in at]
            targets.append(Target(role, decay, windows, at, its_names, its_whys, counter, planes=rows))
        return targets

    def sections(self, optimizer: Optimizer, index: int, group: Group) -> list[Section]:
        """Return a group whole where the hook decays it: the optimizer's own L2 is off."""
        if not hook_roles(group) or "weight_decay" not in group:
            return []
        decayed_roles = set(hook_roles(group)) & set(roles_of(group))
        if group["weight_decay"] and decayed_roles and not has_live_l2(group) and not self._warned:
            self._warned = True
            decays = ", ".join(decay.describe() for decay in decays_in(group).values())
            warnings.warn(
                f"weight_decay={group['weight_decay']} was written to the group of {group['role']}, which has a decay "
                f"of its own ({decays}), and has no effect; change that decay with attachment.set(...).",
                stacklevel=6,
            )
        every = list(range(len(group["params"])))
        if not decayed_roles:  # biases of queries and keys, whose planes are decayed, among others
            planes = planes_in(group)
            every = [position for position in every if planes[position]]
        return [Section(every, 0.0)]

    def place(self, index: int, group: Group, position: int) -> ParameterDescription:
        """Return what the group says of a parameter."""
        role = group.get("role", "not from param_groups")
        return ParameterDescription(names_in(group)[position], role, whys_in(group)[position])

    def remarks(self, optimizer: Optimizer) -> Remarks:
        """Return what was remarked when the groups were made."""
        return remarks_on(optimizer.param_groups)

    def notes(self, optimizer: Optimizer) -> list[str]:
        """Return nothing: the rows say it all."""
        return []

    def replaced(self, optimizer: Optimizer, stepped: Set[int]) -> list[str]:
        """Return the names of decayed parameters that have no gradient, as the model has others in their place."""
        return [
            name
            for group in optimizer.param_groups
            if hook_roles(group)
            for name, parameter in zip(names_in(group), group["params"], strict=True)
            if _is_idle(parameter, stepped) and was_replaced(parameter)
        ]

    def set(self, optimizer: Optimizer, decays: Mapping[str, Decay]) -> None:
        """Write other decays into the groups.

        Raises:
            ValueError: If no group holds one of the roles.
        """
        roles_here = {role for group in optimizer.param_groups for role in roles_of(group)}
        for role in decays:
            if role not in roles_here:
                raise ValueError(
                    f"{role} has no parameter in this optimizer; its roles are {', '.join(sorted(roles_here))}."
                )
        before = [dict(group) for group in optimizer.param_groups]
        try:
            for index, group in enumerate(optimizer.param_groups):
                change_decays(group, decays)
                self.register(optimizer, index, group)
            check_planes_held(self, optimizer)
        except ValueError:
            for group, found in zip(optimizer.param_groups, before, strict=True):
                group.clear()
                group.update(found)
            raise

    def recall(self, optimizer: Optimizer) -> None:
        """Do nothing: the optimizer loads the counts with its groups."""

    def keep(self, optimizer: Optimizer, stepped: set[int]) -> None:
        """Do nothing: the optimizer saves the counts with its groups."""

    def check_kept(self, optimizer: Optimizer, index: int, group: Group, roles: list[str]) -> None:
        """Raise if a loaded state has replaced a group by one without the decays of these roles."""
        self.register(optimizer, index, group)
        lost = [role for role in roles if role not in hook_roles(group)]
        if lost:
            saved = "with other decays" if "role" in group else "by an optimizer without rankdecay"
            raise ValueError(
                f"the loaded optimizer state has no decay for {', '.join(lost)} in group {index}: it was saved "
                f"{saved}, and torch replaces the groups by the saved ones. Copy the keys of "
                "rankdecay.param_groups into its 'param_groups' before loading it, or build the optimizer without "
                "them and attach by roles: rankdecay.attach(optimizer, model, query_key=...)."
            )

    def close(self, optimizer: Optimizer) -> None:
        """Take out of the groups what was added to them."""
        for index, keys in self._added.items():
            for key in keys:
                optimizer.param_groups[index].pop(key, None)
        self._added = {}


# ---- a model ---------------------------------------------------------------------------------------------


class FromModel:
    """Targets of an optimizer whose groups stay as they are: found in a model by the roles of its parameters.

    A parameter is known by its place in its group, so that it may be replaced by another of the same shape, as
    Accelerate does under FSDP2; unless what replaces it has another name in the model, as where blocks take turns.

    Args:
        model: the model.
        choice: the decays that were asked for.
        planned: the decays of its matrices that follow.
        remarks: what is known of its attention.
        counts_in_state: whether the optimizer's state has the counts.
        elsewhere: names of parameters that the optimizer steps in other processes.
    """

    def __init__(
        self,
        model: nn.Module,
        choice: DecayChoice,
        planned: list[Planned],
        remarks: Remarks,
        counts_in_state: bool,
        elsewhere: Set[str] = frozenset(),
    ) -> None:
        self._elsewhere = elsewhere
        self._model = model
        self._kind = type(model).__name__
        self._choice = choice
        self._remarks = remarks
        self._counts_in_state = counts_in_state
        self._planned: dict[str, Planned] = {}
        self._frozen: set[str] = set()
        self._know(planned)
        self._names: list[list[str | None]] = []  # of each parameter of each group
        self._seen: list[list[int]] = []  # the identity of each, when it was last looked up
        self._bundles: list[list[Bundle]] = []
        self._aside: dict[str, dict[str, Any]] = {}  # counts of parameters, when a group was last exchanged

    def register(self, optimizer: Optimizer, index: int, group: Group) -> None:
        """Find the parameters of a group in the model.

        Raises:
            ValueError: If the optimizer's own L2 would act on a named role and cannot be switched off.
        """
        names = self._names_of(group)
        if any(name is not None and name not in self._planned for name in names):
            planned, _ = plan(self._model, self._choice, rest=None, stacklevel=3)  # something has been added to it
            self._know(planned)
        if index == len(self._bundles):
            self._names.append(names)
            self._seen.append(list(map(id, group["params"])))
            self._bundles.append(self._bundle(optimizer, index, group))
        elif self._is_exchanged(index, names):
            self._put_counts_aside()
            self._names[index] = names
            self._bundles[index] = self._bundle(optimizer, index, group)
            for bundle in self._bundles[index]:
                its = {position: self._aside.get(names[position] or "") for position in bundle.positions}
                bundle.take_each({position: counts for position, counts in its.items() if counts is not None})
        else:
            self._bundles[index] = self._counted_on(self._bundles[index], self._bundle(optimizer, index, group))

    def _put_counts_aside(self) -> None:
        """Keep the counts of every parameter by its name, since it may leave its group, or go to another."""
        for names, bundles in zip(self._names, self._bundles, strict=True):
            for bundle in bundles:
                self._aside |= {names[position] or "": counts for position, counts in bundle.each_counts().items()}

    def _names_of(self, group: Group) -> list[str | None]:
        by_id = {id(p): name for name, p in named_parameters(self._model).items()}
        return [by_id.get(id(parameter)) for parameter in group["params"]]

    def exchanged(self, index: int, group: Group) -> bool:
        """Whether a group has parameters that have other names in the model than those it had."""
        seen = list(map(id, group["params"]))
        if seen == self._seen[index]:
            return False
        self._seen[index] = seen
        return self._is_exchanged(index, self._names_of(group))

    def _is_exchanged(self, index: int, names: list[str | None]) -> bool:
        """Whether names are others; a parameter that the model does not have stands for the one it replaces."""
        return None not in names and names != self._names[index]

    def _know(self, planned: list[Planned]) -> None:
        """Take up the parameters that are not known yet."""
        for each in planned:
            for name in each.entry.names:
                if name not in self._planned:
                    self._planned[name] = _without_values(each)
                    self._frozen |= set() if each.entry.parameter.requires_grad else {name}

    def targets(self, index: int, group: Group) -> list[Target]:
        """Return the targets of a group."""
        return [target for bundle in self._bundles[index] for target in bundle.targets]

    def sections(self, optimizer: Optimizer, index: int, group: Group) -> list[Section]:
        """Return the parameters of named roles, with the decay that the optimizer applies for us, or none."""
        if "weight_decay" not in group:
            return []
        for bundle in self._bundles[index]:  # a schedule may have raised the group's weight decay
            _check_part(optimizer, index, group, bundle)
        return [Section(bundle.positions, bundle.l2) for bundle in self._bundles[index]]

    def place(self, index: int, group: Group, position: int) -> ParameterDescription:
        """Return what the model says of a parameter."""
        name = self._names[index][position]
        if name is None:
            return ParameterDescription(
                f"parameter {position} of group {index}", "-", f"not a parameter of {self._kind}"
            )
        planned = self._planned[name]
        role = "+".join(dict.fromkeys(segment.role for segment, _ in planned.acting))
        return ParameterDescription(name, role, why_of(planned.entry) + ("; excluded" if planned.excluded else ""))

    def remarks(self, optimizer: Optimizer) -> Remarks:
        """Return what was remarked when the model was looked at."""
        return self._remarks

    def notes(self, optimizer: Optimizer) -> list[str]:
        """Return which parameters of the named roles the optimizer does not have."""
        names_here = {name for names in self._names for name in names}
        missing: dict[str, list[str]] = {}
        for name, planned in self._planned.items():
            entry = planned.entry
            if name in self._frozen or names_here & set(entry.names) or name != entry.names[0]:
                continue
            for role in {segment.role for segment, decay in planned.acting if decay is not None}:
                missing.setdefault(role, []).append(name)
        return [
            f"{role}: {len(names)} of its parameters are not in this optimizer ({', '.join(names[:4])}"
            f"{', …' if len(names) > 4 else ''}); "
            + (
                "other processes step and decay them"
                if self._elsewhere >= set(names)
                else "attach the role to the optimizer which has them, too"
            )
            for role, names in missing.items()
        ]

    def replaced(self, optimizer: Optimizer, stepped: Set[int]) -> list[str]:
        """Return the names of decayed parameters that have no gradient, as the model has others in their place."""
        idle = [
            (target.names[number], parameter)
            for group, bundle in self._each_bundle(optimizer)
            for target in bundle.targets[:1]
            for number, parameter in enumerate(target.parameters(group))
            if _is_idle(parameter, stepped)
        ]
        present = set(map(id, named_parameters(self._model).values())) if idle else set()
        return [name for name, parameter in idle if id(parameter) not in present]

    def set(self, optimizer: Optimizer, decays: Mapping[str, Decay]) -> None:
        """Give roles other decays; their counts go on.

        Raises:
            ValueError: If the optimizer holds no parameter of one of the roles.
        """
        names_here = {name for names in self._names for name in names if name is not None}
        for role in decays:
            if not any(segment.role == role for name in names_here for segment, _ in self._planned[name].decays):
                raise ValueError(f"{role} has no parameter of {self._kind} in this {type(optimizer).__name__}.")
        choice = replace(self._choice, by_role={**self._choice.by_role, **decays})
        planned = {}
        for name, (entry, old, excluded, _) in self._planned.items():
            pairs = [(b, None if excluded else decay_of(b, entry, choice, None)) for b, _ in old]
            bias_of = None if excluded else bias_planes(entry, pairs, choice.by_role.get("query_key"))
            planned[name] = Planned(entry, pairs, excluded, bias_of)
        before = self._choice, self._planned, self._bundles
        self._choice, self._planned = choice, planned
        try:
            indexed = enumerate(optimizer.param_groups)
            self._bundles = [self._bundle(optimizer, index, group) for index, group in indexed]
            check_planes_held(self, optimizer)
        except ValueError:
            self._choice, self._planned, self._bundles = before
            raise
        self._bundles = [self._counted_on(old, new) for old, new in zip(before[2], self._bundles, strict=True)]
        self.keep(optimizer, set())  # or the next step would recall the former counts, of a warm-up too

    def recall(self, optimizer: Optimizer) -> None:
        """Take the counts from a state that has been loaded."""
        if self._counts_in_state:
            for group, bundle in self._each_bundle(optimizer):
                bundle.recall(optimizer, group)

    def keep(self, optimizer: Optimizer, stepped: set[int]) -> None:
        """Write the counts to the state of the parameters that were stepped."""
        if self._counts_in_state:
            for group, bundle in self._each_bundle(optimizer):
                bundle.keep(optimizer, group, stepped, counts_steps(optimizer, group))

    def check_kept(self, optimizer: Optimizer, index: int, group: Group, roles: list[str]) -> None:
        """Do nothing: the groups say nothing of decays."""

    def close(self, optimizer: Optimizer) -> None:
        """Do nothing: the groups are as they were found."""

    @staticmethod
    def _counted_on(before: list[Bundle], now: list[Bundle]) -> list[Bundle]:
        """Let the counts of new bundles go on from those that had their parameters; a new decay warms up anew.

        What is pending goes on under a decay of the same kind that counts in the same unit (`unit_of`), and is dropped
        elsewhere.
        """
        for bundle in now:
            former = next((each for each in before if bundle.positions[0] in each.positions), None)
            if former is None:
                continue
            bundle.take(former.numbers)
            same = {(target.role, target.decay) for target in former.targets}
            kinds = {(target.role, type(target.decay)) for target in former.targets}
            for target in bundle.targets:
                if (target.role, type(target.decay)) not in kinds:
                    target.counter.drop()
                if target.decay is not None and target.decay.warmup and (target.role, target.decay) not in same:
                    target.counter.start_warmup()
        return now

    def _each_bundle(self, optimizer: Optimizer) -> Iterable[tuple[Group, Bundle]]:
        for group, bundles in zip(optimizer.param_groups, self._bundles, strict=False):
            for bundle in bundles:
                yield group, bundle

    def _bundle(self, optimizer: Optimizer, index: int, group: Group) -> list[Bundle]:
        """Return the parameters of a group that have a named decay, those of one kind together."""
        alike: dict[object, list[int]] = {}
        for position, name in enumerate(self._names[index]):
            if name is None or all(decay is None for _, decay in self._planned[name].acting):
                continue
            narrow = group["params"][position].dtype.itemsize < 4
            matrices = tuple((segment.role, segment.window, decay) for segment, decay in self._planned[name].acting)
            alike.setdefault((matrices, narrow), []).append(position)
        return [self._bundle_of(optimizer, index, group, positions) for positions in alike.values()]

    def _bundle_of(self, optimizer: Optimizer, index: int, group: Group, positions: list[int]) -> Bundle:
        names = [name for position in positions if (name := self._names[index][position]) is not None]
        decays = self._planned[names[0]].acting
        whys = [why_of(self._planned[name].entry) for name in names]
        distinct = {decay for _, decay in decays}
        [decay, *others] = distinct
        narrow = group["params"][positions[0]].dtype.itemsize < 4  # the optimizer would round L2 away
        by_optimizer = isinstance(decay, Frobenius) and decay.is_l2 and not others and decouples(optimizer, group)
        by_optimizer = by_optimizer and not narrow
        numbers: dict[str, Any] = {}
        targets = []
        for role in dict.fromkeys(segment.role for segment, _ in decays):
            [role_decay] = {decay for segment, decay in decays if segment.role == role}
            windows = [segment.labelled_window() for segment, _ in decays if segment.role == role]
            counter = StepCounter(numbers, role, unit_of(role_decay))
            planes = [self._planned[name].entry.planes for name in names] if isinstance(role_decay, Planes) else []
            targets.append(Target(role, role_decay, windows, positions, names, whys, counter, by_optimizer, planes))
        l2 = decay.strength if by_optimizer and isinstance(decay, Frobenius) else 0.0
        bundle = Bundle(positions, targets, l2, numbers)
        _check_part(optimizer, index, group, bundle)
        return bundle


def _is_idle(parameter: Tensor, stepped: Set[int]) -> bool:
    """Whether a parameter is to be trained and had no gradient in a step; FSDP2 puts others in place of its own."""
    return id(parameter) not in stepped and parameter.requires_grad and not is_sharded(parameter)


def _check_part(optimizer: Optimizer, index: int, group: Group, bundle: Bundle) -> None:
    """Raise if a part of a parameter is left to an L2 that cannot act on a part: through the gradient, or on a bias."""
    left = next((target for target in bundle.targets if target.decay is None), None)
    l2 = group.get("weight_decay", 0.0)
    for target in bundle.targets:
        for parameter, name, rows in zip(target.parameters(group), target.names, target.planes, strict=False):
            if l2 and parameter.ndim == 1 and holds_more(rows, parameter):
                raise ValueError(
                    f"{name} in group {index} holds the biases of queries, keys and values: those of queries and keys "
                    f"are decayed with their planes, and the group's weight_decay={l2} cannot act on the rest of it "
                    "alone; put it into a group with weight_decay=0, as biases usually are."
                )
    if left is not None and l2 and not is_decoupled(optimizer, group):
        raise ValueError(
            f"{left.names[0]} in group {index} holds matrices of {left.role} too, and the group's weight_decay={l2} "
            f"goes through the gradient of {type(optimizer).__name__}, so no part of a parameter can be spared it: "
            f"name {left.role} as well, or set weight_decay=0 in that group."
        )


def _without_values(planned: Planned) -> Planned:
    """Return the plan of a parameter without the parameter: sharding replaces it, and would not free it."""
    parameter = planned.entry.parameter
    shape = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
    return planned._replace(entry=replace(planned.entry, parameter=shape))
