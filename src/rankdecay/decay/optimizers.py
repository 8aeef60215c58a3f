"""What the decay has to know of an optimizer: its rate, which weights it steps, and what its own L2 means.

Most optimizers step the parameters themselves, at ``group["lr"]``, and for these nothing here matters. The others are
told by what they have (keys of their groups and of their states) rather than by name, so that a copy of one in another
package is treated alike:

=========================  ====================================================  =======================================
optimizer                  rate of a decay                                       weights that are decayed
=========================  ====================================================  =======================================
Prodigy, D-Adaptation      d · lr, with the d before the step                    the parameters
Adafactor, relative steps  the step of each parameter                            the parameters
schedule-free              lr with its warm-up                                   the base iterate z; the parameters, an
                                                                                 average, follow
Lookahead, Ranger          lr                                                    the fast weights; the parameters follow
                                                                                 when the two are averaged
=========================  ====================================================  =======================================

An optimizer that computes its parameters from weights of its own, as MADGRAD does from their start, would undo a
decay: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankdecay.decay.groups import Group
from rankdecay.decay.targets import STATE_KEY
from rankdecay.dtensor import local, whole

#: Optimizers of torch that decouple their ``weight_decay``, always or where ``decoupled_weight_decay`` says so.
_DECOUPLING = tuple(
    getattr(torch.optim, name) for name in ("Adam", "NAdam", "RAdam", "Adafactor", "Muon") if hasattr(torch.optim, name)
)

#: Entries of a state that are weights and do no harm: averaged with the parameters now and then, or only read.
_LAGGING = ("slow_buffer", "slow_params", "slow_weights", "lookahead_params", "cached_params")
_ONLY_READ = ("p0",)

_REMEDY = "use an optimizer that steps the parameters themselves, such as AdamW, or leave the decay to its weight_decay"
_IN_BACKWARD = "steps inside fused_backward, before which nothing sees a gradient; use an optimizer with a step()"
#: Classes that cannot be decayed, with the reason; by name, as nothing in their groups tells it before a step.
_REFUSED = {
    "MADGRAD": f"computes the parameters from their start and a sum of gradients, and so undoes a decay; {_REMEDY}",
    "MirrorMADGRAD": f"computes the parameters from a sum of gradients, and so undoes a decay; {_REMEDY}",
    "LOMO": _IN_BACKWARD,
    "AdaLomo": _IN_BACKWARD,
    "LayerWiseDummyOptimizer": "has a step() that does nothing, since hooks of the backward pass step each parameter; "
    "attach to each of the optimizers in its optimizer_dict",
}


def check_supported(optimizer: Optimizer) -> None:
    """Raise if a decay cannot act under an optimizer.

    Raises:
        ValueError: With the reason and what to do.
    """
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REFUSED:
            raise ValueError(f"{type(optimizer).__name__} {_REFUSED[kind.__name__]}.")


def check_own_decay(optimizer: Optimizer, index: int, group: Group, is_decayed: bool) -> None:
    """Raise if a group that is decayed has a decay of the optimizer's that cannot be switched off for it.

    Raises:
        ValueError: With the name under which the optimizer keeps its decay.
    """
    if "weight_decay" in group or not is_decayed:
        return
    for name in ("weight_decay", "wd", "weight_decay_rate", "decay", "l2"):
        for value in (group.get(name), getattr(optimizer, name, None)):
            if isinstance(value, (int, float)) and value:
                raise ValueError(
                    f"{type(optimizer).__name__} decays group {index} by its own {name}={value}, which cannot be "
                    f"switched off for the roles that are named; build it with {name}=0."
                )


def has_state(optimizer: Optimizer) -> bool:
    """Whether an optimizer has made its state; our own counts are none."""
    states = (state for state in optimizer.state.values() if isinstance(state, dict))
    return any(key != STATE_KEY for state in states for key in state)


def may_make_states_only(optimizer: Optimizer) -> bool:
    """Return whether the step about to be made may be one that only makes the state of a fresh optimizer.

    A checkpointer makes one before it loads, with learning rates and gradients of zero. It is no step of training, but
    a decay that is not coupled to the learning rate would act, and a cycle of ``every`` go on. The first step of a
    warm-up has gradients.
    """
    groups = optimizer.param_groups
    if has_state(optimizer) or any(group.get("lr") is None or float(group["lr"]) != 0 for group in groups):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(whole(gradient).any()) for gradient in gradients)


def is_schedule_free(group: Group) -> bool:
    """Whether a group is of a schedule-free optimizer, whose parameters are between a base iterate and its average."""
    return {"weight_sum", "lr_max", "weight_lr_power", "k"} <= group.keys()


def has_rate_per_parameter(optimizer: Optimizer, group: Group) -> bool:
    """Whether an optimizer has another rate for each parameter: Adafactor with relative steps."""
    return hasattr(optimizer, "_get_lr") and "relative_step" in group


def has_rate(optimizer: Optimizer, group: Group) -> bool:
    """Whether a group has a learning rate, of its own or hidden."""
    return group.get("lr") is not None or has_rate_per_parameter(optimizer, group)


def rate(optimizer: Optimizer, group: Group) -> float | Tensor:
    """Return the rate by which a decay of a group is multiplied, before the optimizer's step."""
    lr = group.get("lr")
    if lr is None:
        return 0.0
    if "d" in group and "d0" in group:  # what makes an lr of 1 a rate
        lr = lr * group["d"] * _bias_correction(group)
    if is_schedule_free(group):
        warmup, k = group.get("warmup_steps", 0), group["k"]
        lr = lr * ((k + 1) / warmup if k < warmup else 1.0)
    return lr


def rate_of_parameter(optimizer: Any, group: Group, parameter: Tensor) -> float:
    """Return the rate of one parameter in the step that has been made."""
    return float(optimizer._get_lr(group, optimizer.state[parameter]))


def _bias_correction(group: Group) -> float:
    if not group.get("use_bias_correction"):
        return 1.0
    (beta1, beta2), k = group["betas"][:2], group.get("k", 0)
    return (1 - beta2 ** (k + 1)) ** 0.5 / (1 - beta1 ** (k + 1))


def decouples(optimizer: Optimizer, group: Group) -> bool:
    """Whether an optimizer applies its ``weight_decay`` as :class:`rankdecay.Frobenius` would, or can be told to."""
    if "weight_decay" not in group:
        return False
    if isinstance(optimizer, _DECOUPLING) and "weight_decay" in optimizer.defaults:
        return True
    return bool(group.get("decouple")) or is_schedule_free(group) or has_rate_per_parameter(optimizer, group)


def is_decoupled(optimizer: Optimizer, group: Group) -> bool:
    """Whether an optimizer's ``weight_decay`` is decoupled as the group stands."""
    return decouples(optimizer, group) and bool(group.get("decoupled_weight_decay", True))


# ---- weights of the optimizer's own ----------------------------------------------------------------------


class Iterates:
    """What a decay acts on in the place of some parameters, and how these follow.

    The parameters of a schedule-free optimizer are y = (1 − β)·z + β·x, where x is the average of all z. A step adds u
    to z, and to y what of it y has: 1 − β·(1 − c) of u, where c is the weight of the new z in x. So does a decay.
    """

    def __init__(self, optimizer: Optimizer, group: Group, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        self.own = is_schedule_free(group) and all("z" in state for state in self._states)
        self.tensors: list[Tensor] = [state["z"] for state in self._states] if self.own else parameters
        self._before = [tensor.detach().clone() for tensor in self.tensors] if self.own else []
        self._share = 1.0
        if self.own:
            beta = group["betas"][0] if "betas" in group else group["momentum"]
            newest = group["k"] ** group.get("r", 0.0) * group["lr_max"] ** group["weight_lr_power"]
            c = newest / group["weight_sum"] if group["weight_sum"] else 0.0
            self._share = 1 - beta * (1 - c)

    def follow(self) -> None:
        """Let the parameters follow what has been decayed."""
        for parameter, now, before in zip(self._parameters, self.tensors, self._before, strict=False):
            parameter.add_((now - before).to(parameter.dtype), alpha=self._share)


def check_states(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raise if an optimizer, after its first step, turns out to keep weights of its own.

    A parameter that is computed from other weights loses a decay at the next step. Such weights are near the
    parameters at first, as no moment of the gradients is.

    Raises:
        ValueError: With the name of the entry of the state.
    """
    with_state = (p for p in parameters if optimizer.state.get(p))
    parameter = next((p for p in with_state if local(p).numel() and bool(local(p).any())), None)
    if parameter is None:
        return
    weight = local(parameter)
    for name, entry in optimizer.state[parameter].items():
        known = name in _LAGGING or name in _ONLY_READ or name == "z"
        if known or not isinstance(entry, Tensor) or entry.shape != parameter.shape or not entry.is_floating_point():
            continue
        if (local(entry).to(weight.device) - weight).float().norm() < 0.1 * weight.float().norm():
            raise ValueError(
                f"{type(optimizer).__name__} keeps weights of its own in its state ({name!r}), from which it may "
                f"compute the parameters again and so undo a decay; {_REMEDY}."
            )


def remarks_on_optimizer(optimizer: Optimizer, wrappers: Iterable[str]) -> list[str]:
    """Return what a reader of ``describe()`` has to know of an optimizer, and of the classes around it."""
    said: list[str] = []
    groups = optimizer.param_groups
    kind = type(optimizer).__name__
    if any(is_schedule_free(group) for group in groups):
        said.append(
            f"{kind} averages: the decay acts on its base iterate, and the parameters follow it as they follow a step"
        )
    if any("d" in group and "d0" in group for group in groups):
        said.append(f"{kind} finds its rate: a decay is multiplied by lr · d")
    if any(has_rate_per_parameter(optimizer, group) for group in groups):
        said.append(f"{kind} has a rate of its own for each parameter, by which a decay of it is multiplied")
    names = [*wrappers, kind]
    lagging = next((name for name in names if "lookahead" in name.lower() or "ranger" in name.lower()), None)
    if lagging:
        said.append(
            f"{lagging} averages the weights with slow ones now and then: these lag behind the decay, as behind a step"
        )
    return said
