"""The hook that joins a decay to any torch optimizer.

``optimizer.register_step_post_hook`` runs after each step, the order of proximal gradient descent: first the gradient
step, then the shrinkage. What is decayed comes from a source (:mod:`rankdecay.decay.sources`), the optimizer's own
groups or a model, and is asked for at that moment, so that a scheduler, a changed strength, a loaded state and swapped
parameters all count. What a decay does to the matrices is in :mod:`rankdecay.decay.apply`.

Three things are less obvious:

* **No other decay.** While the optimizer steps, the parameters of a role that has a decay have no L2 of the
  optimizer's: their groups are divided for the length of the step, which is exact whatever that L2 would have been.
* **every=k** applies the amount of k steps: Σ lr · strength over the steps since the last time, so that schedules
  of either inside the cycle count exactly, and a run resumed in mid-cycle continues it.
* **A skipped step.** Under ``GradScaler`` a fused optimizer's ``step`` runs, hooks included, also when gradients
  overflowed; its ``found_inf`` is then 1. It multiplies the decay away on the device, since reading it would wait for
  the device.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankdecay.decay.agreement import check_agreement
from rankdecay.decay.apply import Step, apply
from rankdecay.decay.averaged import decay_averaged, is_averaged
from rankdecay.decay.describing import rows_of, units_of, without_effect
from rankdecay.decay.finite import FiniteCheck
from rankdecay.decay.groups import Group, name_later_groups
from rankdecay.decay.hooks import before_every_step, keep_in_place
from rankdecay.decay.notices import explain_collective_failure, warn_if_too_strong, warn_if_untrained
from rankdecay.decay.optimizers import (
    check_states,
    counts_steps,
    has_rate_per_parameter,
    has_state,
    is_inner_step,
    is_stepping,
    may_make_states_only,
    rate,
    rate_of_parameter,
    rate_of_step,
    remarks_on_optimizer,
)
from rankdecay.decay.plan import check_decays
from rankdecay.decay.planes import PlaneStep
from rankdecay.decay.policy import Decay, Frobenius, LowRank, Planes, unit_of
from rankdecay.decay.registered import RegisteredGroup, check_group, swapped
from rankdecay.decay.roles import ROLES, decays_by_role
from rankdecay.decay.sources import DecaySource, check_planes_held
from rankdecay.decay.table import Row, table
from rankdecay.decay.targets import Target, count_step, pending_key
from rankdecay.decay.unattached import know
from rankdecay.decay.watch import Watch, words_of_replaced
from rankdecay.decay.weight_decay import Divided, give_weight_decay
from rankdecay.dtensor import bare_name, local
from rankdecay.linalg import Backend
from rankdecay.linalg.rounding import step_seed

_NOTHING = Divided(lambda: None)
_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()
_attaching = threading.Lock()  # the set must not change its size while another thread looks through it


def attached() -> list[Attachment]:
    """Return the attachments whose decay is applied, or paused, and whose optimizer still exists."""
    return [attachment for attachment, _ in _living()]


def _living() -> list[tuple[Attachment, Optimizer]]:
    """Return attachments with their optimizers, which then live on: the garbage collector may run at any moment."""
    with _attaching:
        every = list(_attached)
    pairs = [(attachment, attachment._optimizer()) for attachment in every]
    return [(attachment, optimizer) for attachment, optimizer in pairs if optimizer is not None]


class _Due(NamedTuple):
    """What one target loses in a step.

    Attributes:
        group: of the optimizer.
        where: the index of the group, and that of the target in it.
        target: with its windows, names and role.
        parameters: of the target.
        decay: as the group has it now.
        amounts: what is due, and the positions of the parameters that lose it.
        seed: of stochastic rounding.
    """

    group: Group
    where: tuple[int, int]
    target: Target
    parameters: list[Tensor]
    decay: Decay
    amounts: list[tuple[float | Tensor, list[int]]]
    seed: int


class Attachment:
    """A decay that is attached to an optimizer. Made by :func:`attach`."""

    def __init__(self, optimizer: Optimizer, source: DecaySource, backend: Backend, wrappers: list[object]) -> None:
        kind = type(optimizer).__name__
        if any(other is optimizer for _, other in _living()):
            raise ValueError(
                f"this {kind} is attached already, and a second hook would decay twice; call detach() on its "
                "attachment first. Of several models that it trains, attach torch.nn.ModuleList([one, other])."
            )
        # Weak, or the two would keep each other alive, and the next optimizer would seem to share its parameters.
        self._optimizer = weakref.ref(optimizer)
        self._source = source
        self._backend: Backend = backend
        self._wrappers = [type(each).__name__ for each in wrappers]
        self._registered: list[RegisteredGroup] = []
        self._too_strong: set[str] = set()  # roles that a warning has named
        self._put_back = _NOTHING
        self._paused = self._in_step = False
        try:
            for index, group in enumerate(optimizer.param_groups):
                self._register_group(index, group)
            self._check_all(optimizer)
            check_agreement([(current.group, current.target) for current in self._targets(optimizer)], backend)
            self._give_weight_decay(optimizer)()  # so that what cannot be divided is found now
        except BaseException:
            source.close(optimizer)
            raise
        self._params_with_grad: set[int] = set()
        self._rates: list[float | Tensor] = []  # of each group, before the step
        self._factors: list[float | Tensor] = []  # the same when it has been made
        self._stepping: list[list[_CurrentTarget]] = []  # the targets of this step, by group
        self._closure = False
        self._first = True
        self._looked_at: set[tuple[int, int]] = set()  # targets whose state has been looked at
        self._states_only = False
        self._finite = FiniteCheck()
        self._had_rate = any(group.get("lr") or group.get("initial_lr") for group in optimizer.param_groups)
        uncompiled: Any = torch.compiler.disable  # under a compiled `optimizer.step`, hooks run between its graphs
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(uncompiled(self._before_step)),
            optimizer.register_step_post_hook(uncompiled(self._step_made)),
            optimizer.register_step_post_hook(uncompiled(self._after_step)),
            optimizer.register_state_dict_pre_hook(self._before_saving),
            optimizer.register_load_state_dict_post_hook(self._check_loaded),
        ]
        if any("param_names" in group for group in optimizer.param_groups):
            name_later_groups(optimizer)
        self._watch = Watch(kind, [p for current in self._targets(optimizer) for p in current.parameters])
        with _attaching:
            _attached.add(self)
        know(optimizer)
        before_every_step(_look_before_step)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose steps the decay follows."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError(
                "this attachment has no optimizer: it was copied or pickled, which drops hooks, or its optimizer no "
                "longer exists; call rankdecay.attach on the optimizer in use."
            )
        return optimizer

    def detach(self) -> None:
        """Stop the decay and leave the optimizer's groups as they were found. Attaching again continues its cycles."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._watch.stop()
        optimizer = self._optimizer()
        if optimizer is not None:
            self._before_saving(optimizer)
            self._source.close(optimizer)
            vars(optimizer).pop("add_param_group", None)
        with _attaching:
            _attached.discard(self)

    @property
    def active(self) -> bool:
        """Whether the decay is applied: False after :meth:`detach`, and while it is paused."""
        return bool(self._handles) and not self._paused

    def pause(self) -> None:
        """Stop the decay until :meth:`resume`: the matrices have none meanwhile, and cycles of steps stand still.

        L2 that the optimizer applies by the groups of :func:`rankdecay.param_groups` goes on; change their
        ``weight_decay`` for that.
        """
        self._paused = True

    def resume(self) -> None:
        """Decay again, after :meth:`pause`."""
        self._check_attached()
        self._paused = False

    def expect_steps(self) -> None:
        """Give no warning of backward passes without a step: something is known to step, after however many."""
        self._watch.stop()

    def set(
        self,
        *,
        query_key: Decay | None = None,
        value_output: Decay | None = None,
        mlp: Decay | None = None,
        embedding: Decay | None = None,
        norm: Decay | None = None,
        bias: Decay | None = None,
        other: Decay | None = None,
    ) -> None:
        """Give roles other decays, from the next step on. A cycle of steps that has begun goes on.

        In a distributed run, call it with the same decays in every process.

        Raises:
            TypeError: If a decay is none of the library's.
            ValueError: If the optimizer has no parameter of a role, or a decay does not suit one.
        """
        optimizer = self.optimizer
        self._check_attached()
        decays = decays_by_role(query_key, value_output, mlp, embedding, norm, bias, other)
        check_decays(decays)
        with self._groups_in_one_piece(optimizer):
            self._source.set(optimizer, decays)
            for index, group in enumerate(optimizer.param_groups):
                check_group(optimizer, index, group, self._source)
                self._registered[index] = RegisteredGroup.of(group, self._source.targets(index, group))

    def _check_attached(self) -> None:
        if not self._handles:
            raise RuntimeError("this attachment is detached, so the call would have no effect; attach again.")

    def rows(self) -> list[Row]:
        """Return a row for every matrix of every parameter: what decays it, how strongly, and why."""
        optimizer = self.optimizer
        with self._groups_in_one_piece(optimizer):
            indexed = enumerate(optimizer.param_groups)
            return [
                row for index, group in indexed for row in rows_of(optimizer, self._source, index, group, self.active)
            ]

    def describe(self, ranks: bool = False) -> str:
        """Return the rows as a table, with what else a reader has to know above it.

        Args:
            ranks: show instead the present ranks of the matrices that a low-rank decay acts on (an SVD of each). Of
                sharded parameters that is a collective, and so is counting the rotary planes that are zero, which is
                then left out without it.
        """
        optimizer = self.optimizer
        planes = self._planes(optimizer)
        zeros = planes.words() if ranks or not planes.is_collective else []
        with self._groups_in_one_piece(optimizer):
            units = [] if ranks else units_of(optimizer, self._source)
            units += without_effect(optimizer, self._source)
        state = "attached to" if self.active else ("paused on" if self._handles else "detached from")
        return table(
            self.rows(),
            ranks=ranks,
            state=f"{state} {type(optimizer).__name__}" + ("" if self.active else ": what follows is not applied"),
            remarks=self._source.remarks(optimizer),
            notes=[
                *units,
                *remarks_on_optimizer(optimizer, self._wrappers),
                *self._source.notes(optimizer),
                *self._replaced(optimizer),
                *zeros,
            ],
        )

    def _replaced(self, optimizer: Optimizer) -> list[str]:
        with_gradient = {id(p) for held in self._targets(optimizer) for p in held.parameters if p.grad is not None}
        names = self._source.replaced(optimizer, with_gradient)
        return [words_of_replaced(names, type(optimizer).__name__)] if names else []

    def _planes(self, optimizer: Optimizer) -> PlaneStep:
        """Return all rows of planes that have a decay, and have values."""
        planes = PlaneStep()
        for _, target, parameters in self._targets(optimizer):
            if isinstance(target.decay, Planes) and not any(parameter.is_meta for parameter in parameters):
                planes.add(target.decay, parameters, target.names, target.planes, {}, 0)
        return planes

    @property
    def unhandled(self) -> tuple[str, ...]:
        """Attention of the model that is not decayed, with the reasons, as found when the model was looked at."""
        return self._source.remarks(self.optimizer).unhandled

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the decay by parameter, role and kind: plain numbers.

        ``optimizer.state_dict()`` has them too, unless the decay was attached with ``counts="attachment"``.
        """
        optimizer = self.optimizer
        targets = [current.target for current in self._targets(optimizer)]
        for target in targets:
            target.counter.settle()
        counts: dict[str, Any] = {}
        for target in targets:
            missed, unit = target.counter.missed, unit_of(target.decay)
            for position, name in enumerate(target.names):
                prefix = f"{bare_name(name)}.{target.role}"
                counts |= {f"{prefix}_steps": target.counter.steps, pending_key(prefix, unit): target.counter.pending}
                counts |= {pending_key(prefix, unit, "missed"): missed[position]} if position in missed else {}
                counts |= {f"{prefix}_warmed": target.counter.warmed} if target.decay and target.decay.warmup else {}
        return counts

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the counts over from :meth:`state_dict`; a count that is missing there is zero.

        Raises:
            ValueError: If it has counts, but none of these parameters.
        """
        names = [bare_name(name) for current in self._targets(self.optimizer) for name in current.target.names]
        if state_dict and not any(key.rpartition(".")[0] in names for key in state_dict):
            raise ValueError(
                f"the counts are of other parameters, such as {next(iter(state_dict))}; here they are of "
                f"{', '.join(names[:3])}. Load the attachment.state_dict() of the same model."
            )
        for _, target, _ in self._targets(self.optimizer):
            prefix = f"{bare_name(target.names[0])}.{target.role}"
            target.counter.steps = int(state_dict.get(f"{prefix}_steps", 0))
            target.counter.pending = float(state_dict.get(pending_key(prefix, unit_of(target.decay)), 0.0))
            target.counter.start_warmup(after=int(state_dict.get(f"{prefix}_warmed", 0)))
            target.counter.take_missed()
            for position, name in enumerate(target.names):
                missed = state_dict.get(
                    pending_key(f"{bare_name(name)}.{target.role}", unit_of(target.decay), "missed")
                )
                if missed is not None:
                    target.counter.miss(position, float(missed))

    def __reduce__(self) -> tuple[Any, ...]:
        """Make copies detached, like a copied optimizer, which has no hooks; so that their owner can be copied."""
        return _detached, ()

    # ---- in a step ---------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Put the groups back as they were before the step, once."""
        put_back, self._put_back = self._put_back, _NOTHING
        put_back()

    def _has_divided_groups_of(self, other: Optimizer) -> bool:
        """Whether a step is being made with parts of groups that another optimizer has, too, but not the parts."""
        optimizer = self._optimizer()
        if not self._in_step or optimizer is None or len(optimizer.param_groups) == len(self._registered):
            return False
        theirs = set(map(id, other.param_groups))
        ours = set(map(id, optimizer.param_groups))
        return bool(ours & theirs) and not ours <= theirs and is_stepping(optimizer)

    def _targets(self, optimizer: Optimizer) -> list[_CurrentTarget]:
        """Return the targets with their parameters; in the middle of a step those of the step, whose groups are cut."""
        elsewhere = self._in_step and self._thread != threading.get_ident()  # where `is_stepping` cannot look
        if self._put_back is not _NOTHING and (elsewhere or is_stepping(optimizer)):
            return [current for group in self._stepping for current in group]
        self._restore()
        self._look_at_groups(optimizer)
        return [current for group in self._targets_by_group(optimizer) for current in group]

    def _targets_by_group(self, optimizer: Optimizer) -> list[list[_CurrentTarget]]:
        return [
            [_CurrentTarget(group, target, target.parameters(group)) for target in self._source.targets(index, group)]
            for index, group in enumerate(optimizer.param_groups)
        ]

    @contextlib.contextmanager
    def _groups_in_one_piece(self, optimizer: Optimizer) -> Iterator[None]:
        """Put the groups back for a moment, if a step is being made, and know those that were added since the last."""
        cut = self._put_back is not _NOTHING and is_stepping(optimizer)
        self._restore()
        self._look_at_groups(optimizer)
        try:
            yield
        finally:
            if cut:
                self._put_back = self._give_weight_decay(optimizer)

    def _look_at_groups(self, optimizer: Optimizer) -> None:
        """Know the groups that were added, and those that have other parameters of the model, since the last look."""
        known = len(self._registered)
        changed = len(optimizer.param_groups) > known
        for index, group in enumerate(optimizer.param_groups[:known]):
            if self._source.exchanged(index, group):
                self._register_again(index, group)
                check_group(optimizer, index, group, self._source)
                changed = True
        for index, group in enumerate(optimizer.param_groups[known:], known):
            self._register_group(index, group)
        if changed:
            self._check_all(optimizer)

    def _check_all(self, optimizer: Optimizer) -> None:
        """Raise if the parameters of all groups together cannot be decayed, or another attached optimizer has some."""
        check_planes_held(self._source, optimizer)
        _check_not_shared(optimizer, self)
        _check_memory(self._targets(optimizer))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Note which parameters have a gradient: some optimizers clear it inside their step.

        Return the step's arguments if a closure is among them, which then sees the groups in one piece.
        """
        if self._in_step and is_inner_step(optimizer):
            return None
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() is being captured in a CUDA graph, which replays kernels alone: "
                "rates and counts of the decay would stay those of this step. Capture forward and backward, and step "
                "outside the graph; or detach()."
            )
        self._in_step, self._thread = True, threading.get_ident()
        self._restore()  # if the last step raised
        self._watch.stop()
        # With a closure the gradients of this step are not there yet, and those of the last one may be.
        self._closure = any(callable(value) for value in (*args[1:], *kwargs.values()))
        self._params_with_grad = set()
        self._prepare(optimizer)
        self._states_only = may_make_states_only(optimizer)
        if self._first:
            self._check_values(optimizer)
        if not self._closure:
            self._note_gradients()
            if self._first:
                self._first = False
                warn_if_untrained(optimizer)
            self._put_back.look()
            return None
        named = {name: self._in_one_piece(value) for name, value in kwargs.items()}
        return (args[0], *map(self._in_one_piece, args[1:])), named

    def _prepare(self, optimizer: Optimizer) -> None:
        """Take the groups as they are now, and divide them while the optimizer makes its step."""
        if len(optimizer.param_groups) < len(self._registered):
            raise ValueError(
                f"{type(optimizer).__name__} had {len(self._registered)} groups and now has "
                f"{len(optimizer.param_groups)}: detach before removing groups, then attach again."
            )
        self._look_at_groups(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            self._register_group(index, group)
        self._source.recall(optimizer)
        self._stepping = self._targets_by_group(optimizer)
        self._rates = [rate(optimizer, group) for group in optimizer.param_groups]
        self._put_back = self._give_weight_decay(optimizer)

    def _note_gradients(self) -> None:
        live = (p for targets in self._stepping for current in targets for p in current.parameters)
        self._params_with_grad |= {id(p) for p in live if p.grad is not None}

    def _in_one_piece(self, argument: Any) -> Any:
        """Return a closure that finds the groups in one piece, and leaves them so if it raises.

        It may be all of a training step, as Lightning's is: it sets rates and weight decays, saves, adds groups.
        """
        if not callable(argument):
            return argument

        def closure(*args: Any, **kwargs: Any) -> Any:
            try:
                self._restore()
                found = argument(*args, **kwargs)
                if self._handles:  # it may have detached
                    self._prepare(self.optimizer)
                    self._note_gradients()
                    self._put_back.look()
            except BaseException:
                self._in_step = False
                self._restore()
                raise
            return found

        return torch.compiler.disable(closure)

    def _give_weight_decay(self, optimizer: Optimizer) -> Divided:
        sections = [
            self._source.sections(optimizer, index, group) for index, group in enumerate(optimizer.param_groups)
        ]
        if self._paused:
            sections = [[part._replace(l2=0.0) for part in parts] for parts in sections]
        return give_weight_decay(optimizer, sections)

    def _step_made(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Put the groups back and note the rates of the step, before a hook of a user's sets those of the next."""
        if is_inner_step(optimizer):
            return
        self._in_step = False
        passed_over = self._put_back.passed_over()
        self._restore()
        if passed_over is not None:
            raise ValueError(
                f"{type(optimizer).__name__} does not step by its param_groups as they are now: it passed over a part "
                f"of group {passed_over}, which was divided so that its weight_decay spares the roles that are named. "
                "Give these a group of their own, or set weight_decay=0 in that group."
            )
        pairs = zip(optimizer.param_groups, self._rates, strict=False)
        factors = [rate_of_step(optimizer, group, before) for group, before in pairs]
        self._factors = [each.clone() if isinstance(each, Tensor) else each for each in factors]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_inner_step(optimizer):
            return
        if self._closure:  # an optimizer need not call it
            self._note_gradients()
        if self._states_only:  # or a step of a stateless optimizer that was given no rate
            self._states_only = has_state(optimizer) or self._had_rate
        else:
            self._had_rate = True
        if not self._states_only:
            self._watch.stepped(
                bool(self._params_with_grad), lambda: self._source.replaced(optimizer, self._params_with_grad)
            )
            self._decay(optimizer)
        self._source.keep(optimizer, self._params_with_grad)

    def _decay(self, optimizer: Optimizer) -> None:
        """Decay what is due in this step, then look whether any of it is not finite."""
        steps: list[Step] = []
        planes = PlaneStep()
        looked_at: list[tuple[str, Tensor]] = []  # parameters, or norms of them, by name
        for group, where, target, parameters, decay, amounts, seed in self._due(optimizer):
            if isinstance(decay, Planes):
                by_position = {position: amount for amount, positions in amounts for position in positions}
                planes.add(decay, parameters, target.names, target.planes, by_position, seed)
                continue
            for amount, positions in amounts:
                chosen = [parameters[position] for position in positions]
                if isinstance(decay, LowRank) or decay.needs_norm:
                    looked_at += [(target.names[position], parameters[position]) for position in positions]
                if where not in self._looked_at:
                    self._looked_at.add(where)
                    check_states(optimizer, chosen)
                step = Step(chosen, target.windows, decay, amount, seed, target.role)
                if is_averaged(group):
                    decay_averaged(optimizer, group, step, self._backend)
                else:
                    steps.append(step)
        roles = [step.role for step in steps if step.is_collective]
        with explain_collective_failure(roles + ["query_key"] * planes.is_collective):
            apply(steps, self._backend)
            looked_at += planes.apply()
        self._finite.look(looked_at)

    def _due(self, optimizer: Optimizer) -> Iterator[_Due]:
        """Count this step of every target, and yield those that we decay with what is due of each."""
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        groups = zip(optimizer.param_groups, self._stepping, self._factors, strict=False)  # a hook may have added some
        for index, (group, targets, factor) in enumerate(groups):
            if not targets:
                if "role" in group and group.get("decoupled_weight_decay"):  # L2 that is the optimizer's
                    l2 = Frobenius(float(group.get("weight_decay", 0.0)))
                    warn_if_too_strong(group["role"], l2, factor, self._too_strong)
                continue
            counts = counts_steps(optimizer, group)
            own_rates = has_rate_per_parameter(optimizer, group)  # of which the factor is only a part
            for number, (_, target, parameters) in enumerate(targets):
                if self._paused and target.decay is not None:
                    continue  # what is the optimizer's own goes on
                if not own_rates:
                    warn_if_too_strong(target.role, target.decay, factor, self._too_strong)
                if target.by_optimizer:
                    continue
                decay, every = target.decay_in(group), target.every_in(group, counts)
                live = [id(p) in self._params_with_grad for p in parameters]
                amounts = count_step(target, decay, every, factor, found_inf, live)
                if decay.lr_coupled and own_rates:
                    amounts = _with_own_rates(optimizer, group, parameters, amounts)
                seed = step_seed(target.counter.steps, index, ROLES.index(target.role), number // len(ROLES))
                yield _Due(group, (index, number), target, parameters, decay, amounts, seed)

    def _register_group(self, index: int, group: Group) -> None:
        """Check a new group, and before each step that a known one has parameters of the same shapes.

        They may be replaced by others of the same shapes, by the same sharded, as Accelerate does under FSDP2.
        """
        if index == len(self._registered):
            optimizer = self.optimizer
            self._source.register(optimizer, index, group)
            check_group(optimizer, index, group, self._source)
            self._registered.append(RegisteredGroup.of(group, self._source.targets(index, group)))
            return
        before = self._registered[index]
        now = RegisteredGroup.of(group, [])
        if before.roles and now.shapes != before.shapes:
            raise ValueError(swapped(index, before, now.shapes))
        self._source.check_kept(self.optimizer, index, group, before.roles)
        if now.dtypes != before.dtypes:  # who applies L2 depends on them
            self._register_again(index, group)

    def _register_again(self, index: int, group: Group) -> None:
        self._source.register(self.optimizer, index, group)
        self._registered[index] = RegisteredGroup.of(group, self._source.targets(index, group))

    def _before_saving(self, optimizer: Optimizer) -> None:
        """Make the state what it is between steps: groups in one piece, and counts that are plain numbers."""
        self._restore()
        for _, target, _ in self._targets(optimizer):
            target.counter.settle()
        self._source.keep(optimizer, set())

    def _check_loaded(self, optimizer: Optimizer) -> None:
        self._source.recall(optimizer)
        for index, (registered, group) in enumerate(zip(self._registered, optimizer.param_groups, strict=False)):
            self._source.check_kept(optimizer, index, group, registered.roles)

    def _check_values(self, optimizer: Optimizer) -> None:
        """Raise if parameters have no values: an optimizer made before ``to_empty``, which replaces parameters."""
        for _, target, parameters in self._targets(optimizer):
            for parameter, name in zip(parameters, target.names, strict=True):
                if parameter.is_meta:
                    raise ValueError(
                        f"{name} is on the meta device, so a step changes nothing of the model: to_empty replaces its "
                        "parameters. Build the optimizer, and with it rankdecay.param_groups after it, then attach."
                    )


class _CurrentTarget(NamedTuple):
    """Target with the group and the parameters that it has now."""

    group: Group
    target: Target
    parameters: list[Tensor]


def _with_own_rates(
    optimizer: Optimizer, group: Group, parameters: list[Tensor], amounts: list[tuple[float | Tensor, list[int]]]
) -> list[tuple[float | Tensor, list[int]]]:
    """Return the amount of each parameter by itself, under an optimizer that has a rate for each."""
    return [
        (amount * rate_of_parameter(optimizer, group, parameters[position]), [position])
        for amount, positions in amounts
        for position in positions
    ]


def _look_before_step(optimizer: Optimizer, *_: Any) -> None:
    """Let the hook before a step be the last, and that which notes its rates the first behind it.

    Raises:
        ValueError: If the step is made inside that of an attached optimizer, with groups of it that are divided.
    """
    for attachment, its in _living():
        if its is optimizer and attachment._handles:
            last, first = (handle.id for handle in attachment._handles[:2])
            keep_in_place(optimizer, last, first)
        elif attachment._has_divided_groups_of(optimizer):
            attachment._restore()
            raise ValueError(
                f"{type(its).__name__} steps {type(optimizer).__name__} by groups that both have, and what is decayed "
                f"would not be trained: attach to that {type(optimizer).__name__} instead."
            )


def _detached() -> Attachment:
    attachment = Attachment.__new__(Attachment)
    attachment._optimizer = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    attachment._handles = []
    return attachment


# ---- attaching -------------------------------------------------------------------------------------------


def _check_not_shared(optimizer: Optimizer, attachment: Attachment) -> None:
    """Raise if another attached optimizer decays one of these parameters."""
    targets = attachment._targets(optimizer)
    ours = {id(p): name for each in targets for p, name in zip(each.parameters, each.target.names, strict=True)}
    for other, other_optimizer in _living():
        for _, _, parameters in other._targets(other_optimizer) if other is not attachment else ():
            for parameter in parameters:
                if id(parameter) in ours:
                    raise ValueError(
                        f"{ours[id(parameter)]} would be decayed twice: an attached {type(other_optimizer).__name__}, "
                        "which still exists, decays it already. Call detach() on the earlier attachment, or give the "
                        "parameter to one optimizer. (After a trainer was interrupted, its attachment is in "
                        "rankdecay.decay.attachment.attached().)"
                    )


def _check_memory(targets: list[_CurrentTarget]) -> None:
    """Raise if two parameters have their numbers in one place, where each would be decayed."""
    places: dict[object, tuple[Tensor, str]] = {}
    for each in targets:
        for parameter, name in zip(each.parameters, each.target.names, strict=True):
            numbers = local(parameter)
            if numbers.is_meta or not numbers.numel():
                continue
            first, its_name = places.setdefault((numbers.device, numbers.data_ptr()), (parameter, name))
            if first is not parameter:
                raise ValueError(
                    f"{its_name} and {name} are two parameters of the same numbers in memory, which would be decayed "
                    "twice, as the optimizer steps them twice; tie them as one parameter, a.weight = b.weight, and "
                    "build the optimizer again, or leave one of them out with exclude=."
                )
