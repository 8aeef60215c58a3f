"""What a strength means: the share that a step takes at the present learning rate, and when nothing is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankdecay.decay.policy import Decay, Frobenius, Planes


def in_units(decay: Decay, lr: float, matrices: Sequence[Tensor]) -> str:
    """Return a sentence on one step of a decay, after its warm-up.

    Args:
        decay: what it is.
        lr: present learning rate.
        matrices: that it decays, (..., m, n), for laws that depend on their norms; may be empty.
    """
    amount = decay.strength * (lr if decay.lr_coupled else 1.0)
    when = f"at the present lr of {lr:g} " if decay.lr_coupled else ""
    if not amount:
        return f"{when}a step takes nothing"
    if isinstance(decay, Frobenius):
        return f"{when}a step takes {_of_norm(decay, amount, matrices)}"
    if isinstance(decay, Planes):
        return f"{when}a step takes {_of_planes(decay, amount, matrices)}"
    if decay.scale == "relative":
        return (
            f"{when}a step takes {amount:.2g} of the root mean square of the singular values (rms): one of a tenth of "
            f"it is zero after {_steps(0.1 / amount)}"
        )
    words = f"{when}a step takes {amount:.2g} of every singular value"
    if not matrices:
        return words
    rms = [float(m.double().norm() / math.sqrt(min(m.shape[-2:]) * math.prod(m.shape[:-2]))) for m in matrices]
    mean = sum(rms) / len(rms)
    return f"{words}, now {mean:.2g} in the root mean square: one of that size is zero after {_steps(mean / amount)}"


def _of_planes(decay: Planes, amount: float, matrices: Sequence[Tensor]) -> str:
    if decay.scale == "relative":
        return (
            f"{amount:.2g} of the root mean square of the planes' norms from each: one of a tenth of it is zero after "
            f"{_steps(0.1 / amount)}"
        )
    words = f"{amount:.2g} of every plane, of the root mean square of its rows' norms"
    rows = sum(m.shape[-2] for m in matrices)
    if not rows:
        return words
    rms = math.sqrt(sum(float(m.double().square().sum()) for m in matrices) / rows)
    return f"{words}, now {rms:.2g} in all: one of that size is zero after {_steps(rms / amount)}"


def _of_norm(decay: Frobenius, amount: float, matrices: Sequence[Tensor]) -> str:
    cap = decay.cap or 1.0
    if not decay.needs_norm:
        share = min(amount, cap)
        left = "nothing is left after one" if share == 1 else f"half is left after {_steps(math.log(2) / share)}"
        return f"{share:.2g} of the norm: {left}"
    if not matrices:
        return f"{amount:.2g} · ‖W‖_F^{decay.power:g} of the norm"
    norms = [float(n) for m in matrices for n in m.double().norm(dim=(-2, -1)).flatten()]
    norm = sum(norms) / len(norms)
    share = min(amount * norm ** (decay.power - 1), cap) if norm else 0.0
    words = f"{share:.2g} of the norm, now {norm:.2g} in the mean"
    if decay.power == 0 and norm:
        words += f": zero after {_steps(norm / amount)}" + (f", or slower, by {cap:g} of it" if decay.cap else "")
    return words


def _steps(number: float) -> str:
    count = math.ceil(number)
    return "1 step" if count <= 1 else (f"{count:,} steps" if count < 1e12 else "no end in sight")


def present(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return those of the matrices that can be looked at without asking another process."""
    return [m.detach() for m in matrices if not m.is_meta and m.numel() and type(m.data) is torch.Tensor]
