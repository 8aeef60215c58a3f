"""The hook that joins a decay to any torch optimizer.

``optimizer.register_step_post_hook`` runs after each step, the order of proximal gradient descent: first the gradient
step, then the shrinkage. Everything the hook does it reads from the parameter groups at that moment
(:mod:`rankdecay.decay.groups`), so a scheduler, a changed strength, a loaded state and swapped parameters all count.

Two things are less obvious; what a decay does to the matrices is in :mod:`rankdecay.decay.apply`:

* **every=k** applies the amount of k steps: Σ lr · strength over the steps since the last time, so that schedules
  of either inside the cycle count exactly, and a run resumed in mid-cycle continues it.
* **A skipped step.** Under ``GradScaler`` a fused optimizer's ``step`` runs, hooks included, also when gradients
  overflowed; its ``found_inf`` is then 1. It multiplies the decay away on the device, since reading it would wait for
  the device.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Iterator
from itertools import dropwhile
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankdecay.attention.layer import FLATTENED, WHOLE, Role
from rankdecay.checks import check_name
from rankdecay.decay.agreement import check_agreement
from rankdecay.decay.apply import apply
from rankdecay.decay.groups import Group, decays_in, hook_keys, hook_roles, names_in, remarks_on, windows_in
from rankdecay.decay.policy import Frobenius, LowRank
from rankdecay.decay.roles import ROLES
from rankdecay.decay.sharded.layout import check_placements
from rankdecay.decay.table import Row, table
from rankdecay.dtensor import is_sharded, unwrapped
from rankdecay.linalg import Backend

#: Optimizers that decouple their ``weight_decay`` themselves, where the group's ``decoupled_weight_decay`` says so or
#: always. Under any other the hook does it, since nothing says what its ``weight_decay`` means.
_DECOUPLING = tuple(
    getattr(torch.optim, name) for name in ("Adam", "NAdam", "RAdam", "Adafactor", "Muon") if hasattr(torch.optim, name)
)

_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()


def attach(optimizer: Optimizer, backend: Backend = "auto") -> Attachment:
    """Make an optimizer decay as its parameter groups say, after each of its steps.

    Copying or pickling an optimizer drops its hooks, and PyTorch does not say so: attach to the copy; a copied
    attachment is detached. Attach before or after ``load_state_dict``; the loaded groups count, strengths included, as
    they do for ``lr``. A parameter without a gradient is left alone, as AdamW does.

    Args:
        optimizer: built from the groups of :func:`rankdecay.param_groups`; any class. A wrapper of Accelerate or
            Lightning is seen through.
        backend: ``"exact"``, ``"matmul"``, or ``"auto"``: exact on a CPU, products elsewhere, so that a step
            never waits for the device.

    Returns:
        An :class:`Attachment`; keep it to describe or detach the decay. The optimizer keeps it alive.

    Raises:
        TypeError: If ``optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: If no group comes from :func:`rankdecay.param_groups`, if the optimizer is attached already, if
            another attached optimizer decays one of its parameters, or if a group's keys are not valid.

    Example:
        >>> import rankdecay as rd
        >>> model = torch.nn.MultiheadAttention(8, 2)
        >>> optimizer = torch.optim.SGD(rd.param_groups(model, query_key=rd.LowRank(0.1)), lr=0.1)
        >>> attachment = rd.attach(optimizer)
    """
    return Attachment(unwrapped(optimizer), backend)


class Attachment:
    """A decay that is attached to an optimizer. Made by :func:`attach`."""

    def __init__(self, optimizer: Optimizer, backend: Backend = "auto") -> None:
        kind = type(optimizer).__name__
        if any(other._optimizer() is optimizer for other in _attached):
            raise ValueError(
                f"this {kind} is attached already, and a second hook would decay twice; call detach() on its "
                "attachment first."
            )
        if not any("role" in group for group in optimizer.param_groups):
            raise ValueError(
                f"no parameter group of this {kind} comes from rankdecay.param_groups, so there is nothing to decay: "
                f"build it as {kind}(rankdecay.param_groups(model, ...), ...)."
            )
        check_name("backend", backend, get_args(Backend))
        # Weak, or the two would keep each other alive, and the next optimizer would seem to share its parameters.
        self._optimizer = weakref.ref(optimizer)
        self._backend: Backend = backend
        self._registered: list[_RegisteredGroup] = []
        for index, group in enumerate(optimizer.param_groups):
            self._register_group(index, group)
        _check_not_shared(optimizer)
        check_agreement(optimizer.param_groups, backend)
        self._params_with_grad: set[int] = set()
        self._closure = False
        self._first = True
        uncompiled: Any = torch.compiler.disable  # under a compiled `optimizer.step`, hooks run between its graphs
        self._handles = [
            optimizer.register_step_pre_hook(uncompiled(self._before_step)),
            optimizer.register_step_post_hook(uncompiled(self._after_step)),
            optimizer.register_state_dict_pre_hook(_settle_pending),
            optimizer.register_load_state_dict_post_hook(self._check_loaded),
        ]
        _attached.add(self)

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
        """Stop the decay. The groups keep their keys, so that attaching again continues."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _attached.discard(self)

    @property
    def active(self) -> bool:
        """Whether the decay is applied: False after :meth:`detach`."""
        return bool(self._handles)

    def describe(self, ranks: bool = False) -> str:
        """Return a table of every parameter: what decays it, how strongly, and why.

        Args:
            ranks: show instead the present ranks of the matrices that a low-rank decay acts on (an SVD of each).
        """
        optimizer = self.optimizer
        rows = [row for group in optimizer.param_groups for row in _rows(group, optimizer, self.active)]
        remarks = remarks_on(optimizer.param_groups)
        return table(rows, ranks=ranks, attached=self.active, optimizer=type(optimizer).__name__, remarks=remarks)

    @property
    def unhandled(self) -> tuple[str, ...]:
        """Attention of the model that is not decayed, with the reasons, as found when the groups were made."""
        return remarks_on(self.optimizer.param_groups).unhandled

    def __reduce__(self) -> tuple[Any, ...]:
        """Make copies detached, like a copied optimizer, which has no hooks; so that their owner can be copied."""
        return _detached, ()

    # ---- in a step ---------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note which parameters have a gradient: some optimizers clear it inside their step."""
        for index, group in enumerate(optimizer.param_groups):
            self._register_group(index, group)
        # With a closure the gradients of this step are not there yet, and those of the last one may be.
        self._closure = any(callable(value) for value in (*args[1:], *kwargs.values()))
        groups = [] if self._closure else [group for group in optimizer.param_groups if hook_roles(group)]
        self._params_with_grad = {id(p) for group in groups for p in group["params"] if p.grad is not None}
        if self._first:
            _check_values(optimizer)
        if self._first and not self._closure:
            self._first = False
            _check_trained(optimizer)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _makes_states_only(optimizer):
            return
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if self._closure and not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            # Cleared inside the step, which had made them too: whatever is trained had one.
            self._params_with_grad = {
                id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad
            }
        for index, group in enumerate(optimizer.param_groups):
            live = [p for p in group["params"] if p.grad is not None or id(p) in self._params_with_grad]
            for role, decay in decays_in(group).items():
                amount = _count_step(group, role, decay, found_inf)
                if live and (isinstance(amount, Tensor) or amount > 0):
                    seed = group[f"{role}_steps"] * 1_000_003 + index * 1_009 + ROLES.index(role)
                    with explain_collective_failure(role, live):
                        apply(live, windows_in(group, role), decay, amount, self._backend, seed)

    def _register_group(self, index: int, group: Group) -> None:
        """Check a new group, and before each step that a known one has parameters of the same shapes.

        They may be replaced by others of the same shapes, as Accelerate does under FSDP2.
        """
        now = _RegisteredGroup(hook_roles(group), [tuple(p.shape) for p in group["params"]])
        if index == len(self._registered):
            optimizer = self.optimizer
            _settle_weight_decay(optimizer, group)
            now = now._replace(roles=hook_roles(group))
            _check_group(optimizer, group)
            self._registered.append(now)
        elif now.roles and now.shapes != self._registered[index].shapes:
            raise ValueError(_swapped(index, group, self._registered[index].shapes, now.shapes))

    def _check_loaded(self, optimizer: Optimizer) -> None:
        for index, (registered, group) in enumerate(zip(self._registered, optimizer.param_groups, strict=False)):
            lost = [role for role in registered.roles if role not in hook_roles(group)]
            if lost:
                raise ValueError(
                    f"the loaded optimizer state has no decay for {', '.join(lost)} in group {index}: it was saved by "
                    "an optimizer without rankdecay, and torch replaces the groups by the saved ones. Copy the keys of "
                    "rankdecay.param_groups into its 'param_groups' before loading it."
                )


class _RegisteredGroup(NamedTuple):
    """Roles and shapes of a group when the decay was attached."""

    roles: list[str]
    shapes: list[tuple[int, ...]]


@contextlib.contextmanager
def explain_collective_failure(role: str, parameters: list[Tensor]) -> Iterator[None]:
    """Explain a collective that failed because another process stopped; the backend's message only names a socket."""
    try:
        yield
    except RuntimeError as error:
        if not any(is_sharded(parameter) for parameter in parameters):
            raise
        raise RuntimeError(
            f"the decay of {role} needs every process that holds a part of its parameters, and on rank "
            f"{torch.distributed.get_rank()} it failed: {error}. If another process has stopped, continue the run from "
            "its last checkpoint."
        ) from error


def _makes_states_only(optimizer: Optimizer) -> bool:
    """Return whether ``torch.distributed.checkpoint`` makes this step, to give a fresh optimizer its moments.

    It has a learning rate and gradients of zero and is no step of training; but a decay that is not coupled to the
    learning rate would act, and a cycle of ``every`` go on. Only its caller tells it from a step of a warm-up.
    """
    if any(group.get("lr") != 0 for group in optimizer.param_groups):
        return False
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False


def _detached() -> Attachment:
    attachment = Attachment.__new__(Attachment)
    attachment._optimizer = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    attachment._handles = []
    return attachment


# ---- attaching -------------------------------------------------------------------------------------------


def _settle_weight_decay(optimizer: Optimizer, group: Group) -> None:
    """Decide who applies L2: the optimizer where it decouples it, else the hook."""
    if "role" not in group:
        return
    for role in hook_roles(group):
        if group[f"{role}_strength"] == "weight_decay":
            group[f"{role}_strength"] = float(optimizer.defaults.get("weight_decay", 0.0))
    strength = group.get("weight_decay", 0.0)
    decouples = isinstance(optimizer, _DECOUPLING) and "weight_decay" in optimizer.defaults
    if group.get("decoupled_weight_decay") and strength and not decouples and not hook_roles(group):
        group["weight_decay"] = 0.0
        group.update(hook_keys(group["role"].split("+")[0], Frobenius(strength)))


def _check_group(optimizer: Optimizer, group: Group) -> None:
    """Open every window once, so that what cannot be decayed is found before training."""
    for role, decay in decays_in(group).items():
        if "lr" not in group and decay.strength and (isinstance(decay, Frobenius) or decay.lr_coupled):
            raise ValueError(
                f"the decay of {role} is coupled to the learning rate, and {type(optimizer).__name__} has no 'lr' in "
                "its groups; use LowRank(..., lr_coupled=False)."
            )
        for parameter, name in zip(group["params"], names_in(group), strict=True):
            if is_sharded(parameter):
                check_placements(parameter, f"{name} ({role})")
                if parameter.ndim != 2 and any(window.has_heads for window in windows_in(group, role)):
                    raise ValueError(
                        f"{name} ({role}) has shape {tuple(parameter.shape)} and is sharded; attention stored in "
                        "more than two dimensions can be decayed only whole: leave its module out of fully_shard."
                    )
            if parameter.ndim < 2 and isinstance(decay, LowRank):
                raise ValueError(
                    f"{name} ({role}) has shape {tuple(parameter.shape)}, not that of a matrix.{FLATTENED}"
                )
            for window in windows_in(group, role):
                try:
                    window.heads(torch.empty(parameter.shape, device="meta"))
                except ValueError as error:
                    raise ValueError(f"{name} ({role}): {error}") from None


def _check_not_shared(optimizer: Optimizer) -> None:
    """Raise if another attached optimizer decays one of these parameters."""
    decayed = {id(p) for group in optimizer.param_groups if hook_roles(group) for p in group["params"]}
    for other in [attachment._optimizer() for attachment in _attached]:
        for group in other.param_groups if other is not None else []:
            for parameter, name in zip(group["params"], names_in(group), strict=True):
                if id(parameter) in decayed and hook_roles(group):
                    raise ValueError(
                        f"{name} would be decayed twice: an attached {type(other).__name__}, which still exists, "
                        "decays it already. Call detach() on the earlier attachment, or give the parameter to one "
                        "optimizer."
                    )


def _check_trained(optimizer: Optimizer) -> None:
    """Warn of an optimizer left with the parameters a model had before it was sharded, which nothing trains."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if parameters and all(p.grad is None for p in parameters):
        warnings.warn(
            f"no parameter of this {type(optimizer).__name__} has a gradient at its first step, so nothing is trained "
            "or decayed. Sharding replaces a model's parameters: call fully_shard or parallelize_module first, then "
            "rankdecay.param_groups, then build the optimizer.",
            stacklevel=5,
        )


def _check_values(optimizer: Optimizer) -> None:
    """Raise if parameters have no values: groups made before ``to_empty``, which replaces a model's parameters."""
    for group in optimizer.param_groups:
        for parameter, name in zip(group["params"], names_in(group), strict=True):
            if hook_roles(group) and parameter.is_meta:
                raise ValueError(
                    f"{name} is on the meta device, so a step changes nothing of the model: to_empty replaces its "
                    "parameters. Call rankdecay.param_groups after it, then build the optimizer and attach."
                )


def _swapped(index: int, group: Group, before: list[tuple[int, ...]], now: list[tuple[int, ...]]) -> str:
    old = [shape for shape in before if shape not in now][:3]
    new = [shape for shape in now if shape not in before][:3]
    return (
        f"the parameters of group {index} (role {group.get('role')}) are not those the decay was attached to: "
        f"{len(before)} before and {len(now)} now, shapes {old} before and {new} now."
        + (
            FLATTENED
            if any(len(shape) == 1 for shape in new)
            else " Build the groups with rankdecay.param_groups on the model as it is now, then the optimizer, then "
            "attach."
        )
    )


def _settle_pending(optimizer: Optimizer) -> None:
    """Make the pending Σ lr · strength plain numbers, for a state that any weights-only load accepts."""
    for group in optimizer.param_groups:
        for role in hook_roles(group):
            if isinstance(group.get(f"{role}_pending"), Tensor):
                group[f"{role}_pending"] = float(group[f"{role}_pending"])


def _rows(group: Group, optimizer: Optimizer, active: bool) -> Iterator[Row]:
    decays = decays_in(group)
    whys = group.get("why") or [""] * len(group["params"])
    for parameter, name, why in zip(group["params"], names_in(group), whys, strict=True):
        frozen = "" if parameter.requires_grad else "frozen; "
        if not decays:
            strength = group.get("weight_decay", 0.0)
            words, who = (f"L2 {strength:g}", type(optimizer).__name__) if strength else ("none", "")
            yield Row(name, parameter, group.get("role", "not from param_groups"), WHOLE, words, who, frozen + why)
        for role, decay in decays.items():
            words = decay.describe() if decay.strength else "none"
            who = ("rankdecay" if active else "nobody") if decay.strength else ""
            low_rank = isinstance(decay, LowRank)
            since = group.get(f"{role}_steps", 0) % decay.every if isinstance(decay, LowRank) else 0
            waiting = f"{role}: {since} of {decay.every} steps since its last decay" if since else ""  # pyright: ignore
            for window in windows_in(group, role):
                notes = dropwhile(get_args(Role).__contains__, why.split(", "))  # behind the names of the matrices
                reason = frozen + (", ".join([window.label, *notes]) if window.label else why)
                yield Row(name, parameter, role, window, words, who, reason, low_rank, waiting)


# ---- stepping --------------------------------------------------------------------------------------------


def _count_step(group: Group, role: str, decay: LowRank | Frobenius, found_inf: Tensor | None) -> float | Tensor:
    """Count a step; return the amount to decay by now, Σ lr · strength since the last decay, or 0 between decays.

    Without ``lr_coupled`` the factor lr is left out.
    """
    coupled, every = (decay.lr_coupled, decay.every) if isinstance(decay, LowRank) else (True, 1)
    amount: float | Tensor = decay.strength * group["lr"] if coupled and decay.strength else decay.strength
    if found_inf is not None:
        amount = amount * (1 - found_inf)
    steps = group[f"{role}_steps"] = group.get(f"{role}_steps", 0) + 1
    pending = group.get(f"{role}_pending", 0.0) + amount
    if steps % every:
        group[f"{role}_pending"] = pending
        return 0.0
    # A skipped step applies nothing, and leaves the amount that was pending to the next step that decays.
    group[f"{role}_pending"] = 0.0 if found_inf is None or every == 1 else pending * found_inf
    return pending if found_inf is None else pending * (1 - found_inf)
