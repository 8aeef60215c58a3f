"""Facts about optimizers that a decay needs: the rate, the weights that are stepped, and the meaning of their own L2.

Most optimizers step the parameters themselves, at ``group["lr"]``, and for these nothing here matters. The others are
told by what they have (keys of their groups and of their states) where that says enough, so that a copy of one in
another package is treated alike, and by their names where it does not. ``docs/guides/optimizers.md`` lists both.

=========================  ====================================================  =======================================
optimizer                  rate of a decay                                       weights that are decayed
=========================  ====================================================  =======================================
Prodigy, D-Adaptation      d · lr, with the d before the step                    the parameters
Adafactor, relative steps  the step of each parameter                            the parameters
Adagrad, ASGD, Apollo      lr by the count of steps of each parameter            the parameters
warm-up of its own         lr with that: heavyball, ApolloDQN, Ranger21          the parameters
schedule-free              lr with its warm-up                                   :mod:`rankdecay.decay.averaged`
Lookahead, Ranger          lr                                                    the fast weights; the parameters follow
                                                                                 when the two are averaged
=========================  ====================================================  =======================================

An optimizer that computes its parameters from weights of its own, as MADGRAD does from their start, would undo a
decay: it is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankdecay.decay.averaged import is_averaged
from rankdecay.decay.groups import Group
from rankdecay.decay.targets import STATE_KEY
from rankdecay.dtensor import is_sharded, local, whole

#: File of the function that calls the hooks around a step.
_HOOKED_STEP = Optimizer.profile_hook_step.__code__.co_filename
#: Optimizers of torch that always decouple their ``weight_decay``. Others do where they read the key, Adam from 2.7 on.
_DECOUPLING = tuple(getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name))
_DECOUPLED = "decoupled_weight_decay"

#: Entries of a state that are weights and do no harm: averaged with the parameters now and then, or only read.
_LAGGING = ("slow_buffer", "slow_param", "slow_params", "slow_weights", "la_param", "lookahead_params",
            "lookahead_slow_buff", "cached_params")  # fmt: skip
_ONLY_READ = ("p0", "ax", "ema", "pbar", "prev", "prev_param", "old", "old_p", "backup")
#: Moments, which a loss that is ‖W‖² makes equal to the weights.
_MOMENTS = ("exp_avg", "momentum", "grad", "square")

_REMEDY = "use an optimizer that steps the parameters themselves, such as AdamW, or leave the decay to its weight_decay"
_IN_BACKWARD = "steps inside the backward pass, where nothing sees a gradient; use an optimizer with a step()"
_DIFFERENTIABLE = "is built with differentiable=True, and its gradient would not see the decay; build it without"
_FROM_START = f"recomputes the parameters from their initial values and a gradient sum, which undoes a decay; {_REMEDY}"
_OWN_WEIGHTS = f"recomputes the parameters from its own copy, which undoes a decay; {_REMEDY}"
_FIXED_NORM = "fixes the norm of every matrix after each step, which undoes L2; use an optimizer that does not"
_SCHEDULE_FREE = "is the reference implementation of schedule-free: use AdamWScheduleFree or SGDScheduleFree"
_INNER_GRADIENT = f"replaces the inner optimizer's step with its own, which undoes a decay; {_REMEDY}"
#: Classes that cannot be decayed, with the reason; by name, as nothing in their groups tells it before a step.
_REFUSED = {
    "MADGRAD": _FROM_START,
    "MirrorMADGRAD": _FROM_START,
    "DAdaptAdaGrad": _FROM_START,
    "DAdaptSGD": _FROM_START,
    "FTRL": _FROM_START,
    "A2Grad": _OWN_WEIGHTS,
    "A2GradExp": _OWN_WEIGHTS,
    "A2GradInc": _OWN_WEIGHTS,
    "A2GradUni": _OWN_WEIGHTS,
    "AccSGD": _OWN_WEIGHTS,
    "SRMM": _OWN_WEIGHTS,
    "MSAMLaProp": _OWN_WEIGHTS,
    "BlockOptimizer": _OWN_WEIGHTS,
    "BlockOptimizerRatio": _OWN_WEIGHTS,
    "SafeFP16Optimizer": _OWN_WEIGHTS,
    "CPUOffloadOptimizer": _OWN_WEIGHTS,
    "TRAC": _INNER_GRADIENT,
    "Magma": "skips steps at random, and their decays with them; attach to an optimizer without it",
    "Amos": "has a decay of its own besides weight_decay, which cannot be switched off; use another optimizer",
    "Nero": _FIXED_NORM,
    "HyperBallAdamW": _FIXED_NORM,
    "Scion": _FIXED_NORM,
    "SFAdamW": f"keeps the iterate of schedule-free where it cannot be decayed; {_SCHEDULE_FREE.partition(': ')[2]}",
    "ScheduleFreeRAdam": "does not expose its learning rate; use schedulefree.RAdamScheduleFree or a warm-up",
    "AdamWScheduleFreeReference": _SCHEDULE_FREE,
    "SGDScheduleFreeReference": _SCHEDULE_FREE,
    "ScheduleFreeWrapperReference": _SCHEDULE_FREE,
    "ScheduleFreeWrapper": f"does not expose its average; {_SCHEDULE_FREE.partition(': ')[2]}",
    "LayerWiseDummyOptimizer": "has a step() that does nothing, since hooks of the backward pass step each parameter; "
    "attach to each of the optimizers in its optimizer_dict",
}
#: Classes that keep something by the position of a group, or count in tensors that they share between groups.
_INDIVISIBLE = ("AdaBound", "AdaBoundW", "ASGD")
#: Lists beside ``params`` that no optimizer steps by.
_ONLY_NAMES = ("param_names", "why")
#: Keys and attributes by which an optimizer decays weights.
_DECAYS = re.compile(r"decay|lambda_rank|(\w+_)?(wd|l2|weight_decay)(_(rate|reg|factor|coef\w*|lambda))?")
#: The same, of parameters that are no matrices.
_DECAYS_OF_VECTORS = ("weight_decay_1d",)
#: Classes whose decay is an attribute, which a group's key does not change.
_DECAY_IS_ATTRIBUTE = ("DeMo", "WSAM")


def check_supported(optimizer: object) -> None:
    """Raise if a decay cannot act under an optimizer, or a wrapper.

    Raises:
        ValueError: With the reason and what to do.
    """
    kind = type(optimizer).__name__
    for base in type(optimizer).__mro__:
        if base.__name__ in _REFUSED:
            raise ValueError(f"{kind} {_REFUSED[base.__name__]}.")
    groups = getattr(optimizer, "param_groups", None) or []
    if hasattr(optimizer, "fused_backward") or any(group.get("fused_back_pass") for group in groups):
        raise ValueError(f"{kind} {_IN_BACKWARD}.")
    if any(group.get("differentiable") for group in groups):
        raise ValueError(f"{kind} {_DIFFERENTIABLE}.")


def check_own_decay(optimizer: Optimizer, index: int, group: Group, decayed: Iterable[Tensor]) -> None:
    """Raise if a group has a decay of the optimizer's that cannot be switched off.

    Args:
        optimizer: whose group it is.
        index: of the group.
        group: to check.
        decayed: its parameters that are decayed.

    Raises:
        ValueError: With the name under which the optimizer keeps its decay.
    """
    dimensions = {parameter.ndim for parameter in decayed}
    if not dimensions:
        return
    kind = type(optimizer).__name__
    attribute = "weight_decay" not in group or kind in _DECAY_IS_ATTRIBUTE
    vectors = _DECAYS_OF_VECTORS if min(dimensions) < 2 else ()
    for name, value in (*group.items(), *(vars(optimizer).items() if attribute else ())):
        switched_off = name == "weight_decay" and not attribute  # by us
        decays = name in vectors or (_DECAYS.fullmatch(name) and not switched_off)
        if decays and isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            raise ValueError(
                f"{kind} decays group {index} by its own {name}={value}, which cannot be switched off for the "
                f"roles that are named; build it with {name}=0."
            )


def check_divisible(optimizer: Optimizer, index: int, group: Group) -> None:
    """Raise if a group of an optimizer cannot be stepped in parts.

    Raises:
        ValueError: With what to do.
    """
    kind = type(optimizer).__name__
    beside = _lists_beside_params(optimizer, group)
    if kind in _INDIVISIBLE or beside or group.get("gradient_release"):  # which holds on to the group of each parameter
        raise ValueError(
            f"{kind} cannot step a part of group {index} without its weight_decay"
            + (f", which has {' and '.join(beside)} of every parameter" if beside else "")
            + ": give the named roles a group of their own, or set weight_decay=0 in that group."
        )


def _lists_beside_params(optimizer: Optimizer, group: Group) -> list[str]:
    """Return the keys of a group with an entry for each parameter, as the names of LoRA-FA, which go by pairs."""
    return [
        key
        for key, value in group.items()
        if isinstance(value, list)
        and len(value) == len(group["params"])
        and key not in ("params", *_ONLY_NAMES, *optimizer.defaults)  # betas may be a list of two
        and not key.endswith("_planes")
    ]


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of all groups."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def is_inner_step(optimizer: Optimizer) -> bool:
    """Whether a hook is called from a step inside another of the same optimizer, as by ``super().step()``."""
    return _steps_running(optimizer, 2) == 2


def is_stepping(optimizer: Optimizer) -> bool:
    """Whether a step of an optimizer is being made, as when its closure asks."""
    return _steps_running(optimizer, 1) == 1


def _steps_running(optimizer: Optimizer, most: int) -> int:
    frame, found = sys._getframe(2), 0
    while frame is not None and found < most:
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename == _HOOKED_STEP:
            found += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found


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
    rates = [group.get("lr") for group in optimizer.param_groups]
    if has_state(optimizer) or any(rate is None or float(rate) != 0 for rate in rates):
        return False
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    return bool(gradients) and not any(bool(whole(gradient).any()) for gradient in gradients)


def has_rate_per_parameter(optimizer: Optimizer, group: Group) -> bool:
    """Whether an optimizer has another rate for each parameter: relative steps, or lr by its own count of steps."""
    kinds = (_has_relative_steps, _is_adagrad, _is_asgd, _is_apollo, _is_abel)
    return any(is_kind(optimizer, group) for is_kind in kinds)


def _has_relative_steps(optimizer: object, group: Group) -> bool:
    return "relative_step" in group and (hasattr(optimizer, "_get_lr") or hasattr(optimizer, "get_relative_step_size"))


def _is_adagrad(_: object, group: Group) -> bool:
    return "initial_accumulator_value" in group and bool(group.get("lr_decay"))


def _is_asgd(_: object, group: Group) -> bool:
    return "t0" in group and "alpha" in group and bool(group.get("lambd"))


def _is_apollo(_: object, group: Group) -> bool:
    return "base_lr" in group and "init_lr" in group and bool(group.get("warmup"))


def _is_abel(optimizer: object, _: Group) -> bool:
    return hasattr(optimizer, "abel_update") and hasattr(optimizer, "current_lr")


def counts_steps(optimizer: Optimizer, group: Group) -> bool:
    """Whether the decays of several steps can be applied at once: one rate for all parameters, and one step."""
    return not has_rate_per_parameter(optimizer, group) and not group.get("gradient_release")


def has_rate(optimizer: Optimizer, group: Group) -> bool:
    """Whether a group has a learning rate, of its own or hidden."""
    return group.get("lr") is not None or has_rate_per_parameter(optimizer, group)


def finds_rate(optimizer: object, group: Group) -> bool:
    """Whether an optimizer multiplies lr by an estimate d; the d of torch's Adafactor is a threshold of clipping."""
    named = any(kind.__name__.startswith(("DAdapt", "Prodigy")) for kind in type(optimizer).__mro__)
    return "d" in group and ("d0" in group or named)


def rate(optimizer: Any, group: Group) -> float | Tensor:
    """Return the rate by which a decay of a group is multiplied, before the optimizer's step."""
    lr = group.get("lr")
    if lr is None:
        return 0.0
    if _is_abel(optimizer, group):
        return optimizer.current_lr
    if isinstance(lr, Tensor):
        lr = lr.reshape(())  # torch takes a tensor of one element, too
    if "d_prev" in group and hasattr(optimizer, "get_dlr"):
        lr = optimizer.get_dlr(group)
        return optimizer.get_bias_correction(lr, group["betas"][1], group["k"])[0] if _corrects(group) else lr
    if finds_rate(optimizer, group):  # d makes an lr of 1 a rate
        lr = lr * group["d"] * _bias_correction(group)
    if is_averaged(group):
        warmup, k = group.get("warmup_steps", 0), group.get("k", group.get("step", 0))
        lr = lr * ((k + 1) / warmup if k < warmup else 1.0)
    return lr


def rate_of_step(optimizer: Optimizer, group: Group, before: float | Tensor) -> float | Tensor:
    """Return the rate in the step that has been made; where each parameter has its own, a factor of all of them.

    Args:
        optimizer: that has made it.
        group: whose rate.
        before: the rate before the step, which counts where the step itself finds the next one.
    """
    if _has_relative_steps(optimizer, group) or _is_apollo(optimizer, group):
        return 1.0
    if is_averaged(group):
        return group.get("scheduled_lr", before)
    if finds_rate(optimizer, group) or _is_abel(optimizer, group):
        return before
    return _scheduled(optimizer, group, rate(optimizer, group))  # a step may set its lr


def rate_of_parameter(optimizer: Any, group: Group, parameter: Tensor) -> float | Tensor:
    """Return the rate of one parameter in the step that has been made, as a multiple of :func:`rate_of_step`."""
    state = optimizer.state[parameter]
    if _is_adagrad(optimizer, group):
        return 1 / (1 + _made(state["step"]) * group["lr_decay"])
    if _is_asgd(optimizer, group):
        return (1 + group["lambd"] * rate(optimizer, group) * _made(state["step"])) ** -group["alpha"]
    if _is_apollo(optimizer, group):
        made, warmup, first = _made(state["step"]), group["warmup"], group["init_lr"]
        return group["lr"] if made >= warmup else (group["base_lr"] - first) * made / warmup + first
    if _is_abel(optimizer, group):
        return optimizer.warmup_dampening(1.0, state["step"]) if optimizer.use_warmup else 1.0
    if hasattr(optimizer, "_get_lr"):
        return float(optimizer._get_lr(group, state))
    settings = (group["step"], group["relative_step"], group["warmup_init"])
    step, rms = optimizer.get_relative_step_size(group["lr"], *settings), optimizer.get_rms(parameter.detach().float())
    return float(optimizer.get_lr(step, float(rms), group["scale_parameter"]))


def _made(step: Any) -> Any:
    """Return the number of steps before the one that was made; of a fused step that was skipped the count is less."""
    if isinstance(step, Tensor) and step.device.type != "cpu":
        return (step - 1).clamp(min=0)  # to read it would be to wait for the device
    return max(int(step) - 1, 0)


# ---- a schedule that an optimizer applies to lr in its step ------------------------------------------------


def _scheduled(optimizer: Any, group: Group, lr: float | Tensor) -> float | Tensor:
    """Return what an optimizer made of lr in the step that has been made."""
    if "base_lr" in group and "step_count" in group:  # heavyball
        made = _made(group["step_count"])
        return lr if not group["warmup_steps"] else lr * _at_most_1((made + 1) / (group["warmup_steps"] + 1))
    if "init_lr" in group and "step" in group and hasattr(optimizer, "warmup_steps"):  # ApolloDQN
        step, warmup, first = _made(group["step"]) + 1, optimizer.warmup_steps, group["init_lr"]
        return lr if step >= warmup else (optimizer.lr - first) * step / warmup + first
    if hasattr(optimizer, "warm_up_dampening"):  # Ranger21 of pytorch_optimizer
        if optimizer.disable_lr_scheduler:
            return lr
        step = _made(group["step"]) + 1
        if step <= optimizer.num_warm_up_iterations:
            lr = lr * step / optimizer.num_warm_up_iterations
        return _warmed_down(optimizer, lr, step, optimizer.num_warm_down_iterations, optimizer.warm_down_lr_delta)
    if hasattr(optimizer, "warmup_dampening"):  # Ranger21
        states = [optimizer.state.get(parameter) or {} for parameter in parameters_of(optimizer)]
        step = max((state["step"] for state in states if "step" in state), default=0)
        if optimizer.use_warmup and step <= optimizer.num_warmup_iters:
            lr = lr * step / optimizer.num_warmup_iters
        if optimizer.warmdown_active:
            return _warmed_down(optimizer, lr, step, optimizer.warmdown_total_iterations, optimizer.warmdown_lr_delta)
    return lr


def _at_most_1(share: Any) -> Any:
    return share.clamp(max=1) if isinstance(share, Tensor) else min(share, 1.0)


def _warmed_down(optimizer: Any, lr: float | Tensor, step: int, steps: int, delta: float) -> float | Tensor:
    begun = step + 1 - optimizer.start_warm_down
    if step < optimizer.start_warm_down:
        return lr
    return max(optimizer.starting_lr - delta * min(begun / (steps + 1), 1.0), optimizer.min_lr)


def _corrects(group: Group) -> bool:
    return bool(group.get("use_bias_correction") or group.get("bias_correction"))


def _bias_correction(group: Group) -> float:
    if not _corrects(group):
        return 1.0
    beta1, beta2 = group["betas"][:2]
    k = group["k"] + 1 if "k" in group else group["step"] + ("d0" not in group)
    return (1 - beta2**k) ** 0.5 / (1 - beta1**k)


def decouples(optimizer: Optimizer, group: Group) -> bool:
    """Whether an optimizer applies its ``weight_decay`` as :class:`rankdecay.Frobenius` would, or can be told to."""
    if "weight_decay" not in group:
        return False
    of_torch = type(optimizer).step.__module__.startswith("torch.optim.")  # and not overridden
    reads_key = _DECOUPLED in optimizer.defaults
    if of_torch and "weight_decay" in optimizer.defaults and (reads_key or isinstance(optimizer, _DECOUPLING)):
        return True
    if finds_rate(optimizer, group):
        return bool(group.get("decouple") or (is_averaged(group) and group.get("weight_decay_by_lr")))
    if "relative_step" in group:
        return hasattr(optimizer, "_get_lr")
    return is_averaged(group)


def is_decoupled(optimizer: Optimizer, group: Group) -> bool:
    """Whether an optimizer's ``weight_decay`` is decoupled as the group stands."""
    reads_key = _DECOUPLED in optimizer.defaults  # else the group may have one that says nothing
    return decouples(optimizer, group) and (not reads_key or bool(group.get(_DECOUPLED, True)))


# ---- weights of the optimizer's own ----------------------------------------------------------------------


def check_states(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raise if an optimizer, after its first step, turns out to keep weights of its own.

    A parameter that is computed from other weights loses a decay at the next step. Such weights are near the
    parameters at first, as no moment of the gradients is. They are looked for in the state, whatever its nesting, and
    in lists and dictionaries of the optimizer.

    Args:
        optimizer: that has made its first step.
        parameters: that have been stepped.

    Raises:
        ValueError: With the name of the entry.
    """
    parameters = list(parameters)
    for dtype in {parameter.dtype for parameter in parameters}:  # such weights may be those of one, as of 16 bits
        parameter = next((p for p in parameters if p.dtype == dtype and _is_telling(local(p))), None)
        if parameter is not None:
            _check_state(optimizer, parameter)


def _check_state(optimizer: Optimizer, parameter: Tensor) -> None:
    weight = local(parameter)
    known = set(map(id, parameters_of(optimizer)))
    kept = {name: value for name, value in vars(optimizer).items() if name not in ("param_groups", "state", "defaults")}
    averages = any(is_averaged(group) for group in optimizer.param_groups)
    for name, entry in (*_tensors(optimizer.state.get(parameter, {})), *_tensors(kept)):
        if name in _LAGGING or name in _ONLY_READ or any(word in name for word in _MOMENTS):
            continue
        if (averages and name == "z") or id(entry) in known:
            continue
        if _holds_among_others(entry, weight):
            raise ValueError(_keeps_a_copy(optimizer, name))
        if entry.shape != parameter.shape or not entry.is_floating_point() or local(entry).shape != weight.shape:
            continue
        if local(entry).data_ptr() == weight.data_ptr():
            continue
        if (local(entry).to(weight.device) - weight).float().norm() < 0.1 * weight.float().norm():
            raise ValueError(_keeps_a_copy(optimizer, name))


def _keeps_a_copy(optimizer: Optimizer, name: str) -> str:
    return (
        f"{type(optimizer).__name__} keeps a copy of the weights in its state ({name!r}), from which it may "
        f"recompute the parameters and so undo a decay; {_REMEDY}."
    )


def _holds_among_others(entry: Tensor, weight: Tensor) -> bool:
    """Whether a vector has all of a weight in one piece somewhere, rounded as the weight is: masters of many."""
    values = weight.flatten()
    if entry.ndim != 1 or not entry.is_floating_point() or is_sharded(entry) or len(entry) <= len(values):
        return False
    if entry.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        return False  # the weight is a part of it, and so is a decay
    largest = int(values.abs().argmax())
    there = entry[largest : len(entry) - len(values) + largest + 1].detach().to(values.device, values.dtype)
    starts = (there == values[largest]).nonzero().flatten()[:8].tolist()
    return any(torch.equal(entry[i : i + len(values)].detach().to(values), values) for i in starts)


def _is_telling(weight: Tensor) -> bool:
    """Whether a weight differs from others: constants, as gains are at first, are near other constants."""
    return weight.numel() > 1 and bool((weight != weight.flatten()[0]).any())


def _tensors(entries: object, name: str = "", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dictionaries and lists, with the last name that leads to each."""
    if isinstance(entries, Tensor):
        yield name, entries
    elif depth and isinstance(entries, Mapping):
        for key, entry in entries.items():
            yield from _tensors(entry, key if isinstance(key, str) else name, depth - 1)
    elif depth and isinstance(entries, (list, tuple)):
        for entry in entries:
            yield from _tensors(entry, name, depth - 1)


def remarks_on_optimizer(optimizer: Optimizer, wrappers: Iterable[str]) -> list[str]:
    """Return what a reader of ``describe()`` has to know of an optimizer, and of the classes around it."""
    remarks: list[str] = []
    groups = optimizer.param_groups
    kind = type(optimizer).__name__
    if any(is_averaged(group) for group in groups):
        remarks.append(
            f"{kind} averages: a low-rank decay acts on its base iterate, and shrinks what the average, whose weights "
            "are evaluated, still holds outside the range of that; L2 acts as the optimizer's own"
        )
    if any(finds_rate(optimizer, group) for group in groups):
        remarks.append(f"{kind} finds its rate: a decay is multiplied by lr · d")
    if any(has_rate_per_parameter(optimizer, group) for group in groups):
        remarks.append(f"{kind} has a rate of its own for each parameter, by which a decay of it is multiplied")
    names = [*wrappers, kind]
    lagging = next((name for name in names if "lookahead" in name.lower() or "ranger" in name.lower()), None)
    if lagging:
        remarks.append(
            f"{lagging} averages the weights with slow ones now and then: these lag behind the decay, as behind a step"
        )
    if kind == "SPlus":
        remarks.append("SPlus evaluates an average of its weights, which lags behind the decay, as behind a step")
    return remarks
