"""Decay under a schedule-free optimizer, whose parameters are between a base iterate z and the average x of all z.

Between steps a parameter is y = β·x + (1 − β)·z, and in evaluation mode x (Defazio et al., *The Road Less Scheduled*,
NeurIPS 2024). The optimizer keeps z in its state; x is y + (1 − 1/β)·(z − y). A decay added to y alone would be lost at
the next step, which computes y from z and x.

* **L2** is that of the optimizer: z ← z − c·y, and y follows by (1 − β) of it. x follows as z enters the average.
* **A low-rank decay** acts on z. x would keep directions that z has lost for as many steps as have passed, and the
  weights that are evaluated would never have a low rank. So x loses τ a step too, but only in what it has outside the
  range of z: there is nothing left to average. With P = Z (ZᵀZ + ε²)⁻¹ Zᵀ, Q = ZᵀZ (ZᵀZ + ε²)⁻¹, ε = τ, the part
  P X Q stays as it is. Directions of z far above τ are kept, those it has lost are not, and no rank is decided.

Shrinking all of x instead would decay what stays twice, with z and again by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankdecay.decay.apply import Step, apply, backend_on, rounded
from rankdecay.decay.groups import Group
from rankdecay.decay.policy import LowRank
from rankdecay.linalg import Backend, shrink
from rankdecay.linalg.backend import has_float64
from rankdecay.linalg.rounding import NEXT_SEED


def is_averaged(group: Group) -> bool:
    """Whether a group is of a schedule-free optimizer."""
    return {"weight_sum", "weight_lr_power"} <= group.keys() or bool(group.get("use_schedulefree"))


def holds_average(optimizer: Optimizer) -> bool:
    """Whether the parameters are x between steps: in the variants that make y inside a step, from a closure."""
    return not callable(getattr(optimizer, "train", None))


def decay_averaged(optimizer: Optimizer, group: Group, step: Step, backend: Backend) -> None:
    """Decay matrices of a schedule-free optimizer in place, after its step.

    Args:
        optimizer: that has made the step.
        group: of the parameters.
        step: the matrices, and what they lose.
        backend: as for :func:`rankdecay.attach`.
    """
    seed = step.seed
    beta = float(group["betas"][0] if "betas" in group else group["momentum"])
    is_average = holds_average(optimizer)
    for number, parameter in enumerate(step.parameters):
        if "z" not in optimizer.state.get(parameter, ()):
            continue  # never stepped: nothing is due of it, though a rate on the device does not say so
        iterate = optimizer.state[parameter]["z"]
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        held, z = parameter.detach().to(wide), iterate.detach().to(parameter.device, wide)
        x = held if is_average else held.lerp(z, 1 - 1 / beta)
        if isinstance(step.decay, LowRank):
            change_x, change_z = _low_rank_changes(x, z, step, step.decay, backend)
        else:
            y = x.lerp(z, 1 - beta) if is_average else held
            change_x, change_z = torch.zeros_like(x), _change(y, step, backend)
        change = change_x if is_average else beta * change_x + (1 - beta) * change_z
        seed += NEXT_SEED * (number > 0)
        iterate.copy_(rounded(z + change_z, iterate.dtype, seed))
        parameter.copy_(rounded(held + change, parameter.dtype, seed + 1))


def _change(weight: Tensor, step: Step, backend: Backend) -> Tensor:
    """Return what a step would add to a weight."""
    decayed = weight.clone()
    apply([step._replace(parameters=[decayed])], backend)  # which rounds nothing: the weight is wide
    return decayed - weight


def _low_rank_changes(x: Tensor, z: Tensor, step: Step, decay: LowRank, backend: Backend) -> tuple[Tensor, Tensor]:
    """Return what is added to the average and to the iterate."""
    change_z = _change(z, step, backend)
    now, after = x.clone(), z + change_z
    for window in step.windows:
        average, iterate = step.view(window, x), step.view(window, after)
        tau = decay.tau(step.view(window, z), step.amount)
        kept = within_range(average, iterate, tau)
        backend_here = backend_on(average, backend)
        rest = shrink(average - kept, tau, decay.rule, smoothing=decay.smoothing, backend=backend_here)
        window.write(now, kept + rest)
    return now - x, change_z


def within_range(average: Tensor, iterate: Tensor, tau: Tensor) -> Tensor:
    """Return the part of an average in the row and column space of an iterate: P X Q of the module's docstring.

    Args:
        average: X, (..., m, n).
        iterate: Z, of the same shape.
        tau: (...), what is small beside the singular values of Z that count.
    """
    if average.shape[-2] < average.shape[-1]:
        return within_range(average.mT, iterate.mT, tau).mT
    wide = torch.float64 if has_float64(average.device) else torch.float32
    X, Z = average.to(wide), iterate.to(wide)
    norm = Z.norm(dim=(-2, -1))
    small = torch.maximum(tau.to(wide), norm * 1e-6) ** 2 + torch.finfo(wide).tiny  # what the solve can resolve
    G = Z.mT @ Z + small[..., None, None] * torch.eye(Z.shape[-1], dtype=wide, device=Z.device)
    factor = torch.linalg.cholesky_ex(G)[0]  # which does not wait for the device
    left = Z @ torch.cholesky_solve(Z.mT @ X, factor)
    return (left - small[..., None, None] * torch.cholesky_solve(left.mT, factor).mT).to(average.dtype)
