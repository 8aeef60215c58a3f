"""Meaning of a strength: the share that a step takes at the present learning rate, and when nothing is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankdecay.decay.policy import Decay, Frobenius, LowRank, Planes
from rankdecay.linalg.backend import double
from rankdecay.linalg.shrink import log_norm

#: Σ lr·strength after which a relative step has taken a tenth of the rms: the decay alone, which takes as much from the
#: others as well, lowers that rms by as large a share in each step.
TENTH = -math.log(0.9)


def in_units(decay: Decay, lr: float, matrices: Sequence[Tensor], name: str = "lr") -> str:
    """Return a sentence on one step of a decay, after its warm-up.

    Args:
        decay: what it is.
        lr: present learning rate.
        matrices: that it decays, (..., m, n), for laws that depend on their norms; may be empty.
        name: of the rate.
    """
    amount = decay.strength * (lr if decay.lr_coupled else 1.0)
    conditions = [f"at the present {name} of {lr:g}"] * decay.lr_coupled + ["after the warm-up"] * bool(decay.warmup)
    when = f"{' and '.join(conditions)} " if conditions else ""
    if not amount:
        return f"{when}a step takes nothing"
    if isinstance(decay, Frobenius):
        return f"{when}a step takes {_of_norm(decay, amount, matrices)}"
    if isinstance(decay, Planes):
        return f"{when}a step takes {_of_planes(decay, amount, matrices)}"
    return f"{when}a step takes {_of_spectrum(decay, amount, matrices)}"


def _of_spectrum(decay: LowRank, amount: float, matrices: Sequence[Tensor]) -> str:
    ends = decay.rule == "prox"  # under other rules a singular value stays, chatters or overshoots
    of_each = f"every singular value{f' but the {decay.keep} largest' if decay.keep else ''}"
    most = "" if ends else "at most "
    if decay.scale == "relative":
        words = f"{most}{amount:.2g} of the root mean square of the singular values (rms)"
        words += f" from {of_each}" if decay.keep or not ends else ""
        if not ends:
            return words
        return f"{words}: a singular value a tenth of that size reaches zero after {_steps(TENTH / amount)}"
    words = f"{most}{amount:.2g} of {of_each}"
    norms = [_norms(m) for m in matrices]
    rms = [math.hypot(*n) / math.sqrt(min(m.shape[-2:]) * len(n)) for n, m in zip(norms, matrices, strict=True)]
    if not rms:
        return words
    mean = sum(rms) / len(rms)
    words += f", now {mean:.2g} in the root mean square"
    return f"{words}: a singular value of that size reaches zero after {_steps(mean / amount)}" if ends else words


def _of_planes(decay: Planes, amount: float, matrices: Sequence[Tensor]) -> str:
    but = f" but the {decay.keep} largest" if decay.keep else ""
    if decay.scale == "relative":
        return (
            f"{amount:.2g} of the root mean square of the planes' norms from each{but}: a plane a tenth of that size "
            f"reaches zero after {_steps(TENTH / amount)}"
        )
    words = f"{amount:.2g} of every plane{but}, of the root mean square of its rows' norms"
    rows = sum(m.shape[-2] for m in matrices)
    if not rows:
        return words
    rms = math.hypot(*(norm for m in matrices for norm in _norms(m))) / math.sqrt(rows)
    return f"{words}, now {rms:.2g} in all: a plane of that size reaches zero after {_steps(rms / amount)}"


def _of_norm(decay: Frobenius, amount: float, matrices: Sequence[Tensor]) -> str:
    cap = decay.cap or 1.0
    if not decay.needs_norm:
        share = min(amount, cap)
        half = math.inf if share == 1 else math.log(2) / -math.log1p(-share)
        left = "nothing is left after one" if share == 1 else f"half is left after {_steps(half)}"
        return f"{share:.2g} of the norm: {left}"
    norms = [norm for m in matrices for norm in _norms(m)]
    if not norms:
        return f"{amount:.2g} · ‖W‖_F^{decay.power - 1:g} of the norm"
    norm = sum(norms) / len(norms)
    share = min(math.exp(min(0.0, math.log(amount) + (decay.power - 1) * math.log(norm))), cap) if norm else 0.0
    words = f"{share:.2g} of the norm, now {norm:.2g} in the mean"
    if decay.power == 0 and norm:
        if cap == 1:
            words += f": zero after {_steps(norm / amount)}"
        else:
            left = norm / amount - 1 / cap  # steps until a constant amount is that share
            words += (
                f": at the cap of {cap:g} after {_steps(left)}, never zero" if left > 0 else ": the cap, so never zero"
            )
    return words


def _norms(matrix: Tensor) -> list[float]:
    """Return ‖·‖_F of each matrix of a stack, over the whole range of float64."""
    return log_norm(double(matrix)).exp().flatten().tolist()


def _steps(number: float) -> str:
    if not number < 1e12:
        return "more than 1e12 steps"
    count = math.ceil(number)
    return "1 step" if count <= 1 else f"{count:,} steps"


def present(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return those of the matrices that can be looked at without asking another process, and are finite."""
    here = [m.detach() for m in matrices if not m.is_meta and m.numel() and type(m.data) is torch.Tensor]
    return [m for m in here if bool(m.isfinite().all())]
