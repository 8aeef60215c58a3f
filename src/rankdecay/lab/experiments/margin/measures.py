"""Measures of attention weights on their way: direction, norms, rank, and how near they are to an SVM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rankdecay.lab.experiments.margin.flow import Loss, Problem, infimum, log_excess, loss_value
from rankdecay.lab.experiments.margin.svm import Norm, Solution
from rankdecay.spectrum import spectrum

RANK = 0.01  # of the largest singular value: what counts for the numerical rank
Solutions = Sequence[Solution | None]


def selected_tokens(problem: Problem, W: Tensor) -> Tensor:
    """The token with most attention in every example, shape (…, n)."""
    return problem.logits(W).argmax(-1)


def margins(problem: Problem, W: Tensor, selected: Tensor) -> Tensor:
    """The least ``(x_s - x_l)ᵀ W z``, shape (sets,), of W (sets, d, d) with the selected tokens (sets, n)."""
    logits, index = problem.logits(W), selected[..., None]
    others = logits.scatter(-1, index, -torch.inf).amax(-1)
    return (logits.gather(-1, index)[..., 0] - others).amin(-1)


def climb(margin: np.ndarray, least: float = 0.0) -> np.ndarray:
    """The evaluations of one data set from the last one without a margin on, where its margin is at least ``least``.

    Args:
        margin: shape (evaluations,).
        least: the smallest margin that counts.
    """
    without = np.flatnonzero(~(margin > 0))
    found = margin >= least
    found[: without[-1] + 1 if without.size else 0] = False
    return np.flatnonzero(found)


def cosine(W: Tensor, solutions: Solutions) -> Tensor:
    """Cosine of each W, shape (sets, d, d), to its solution; NaN without one or where W is zero."""
    target = _stacked(solutions, W)
    W = W / W.flatten(-2).abs().amax(-1)[..., None, None]  # entries may be as large as a square root of the range
    norms = W.flatten(-2).norm(dim=-1) * target.flatten(-2).norm(dim=-1)
    return (W * target).flatten(-2).sum(-1) / norms


def alignment(W: Tensor, solutions: Solutions) -> Tensor:
    """How much of the solution's singular spaces those of W hold, 0 to 1, shape (sets,).

    ``½(‖U_rᵀ Û_r‖² + ‖V_rᵀ V̂_r‖²)/r`` with the r largest singular values of W, where r is the rank of the solution: by
    chance about r/d. NaN without a solution or where W is zero.
    """
    found = torch.full(W.shape[:1], torch.nan, dtype=W.dtype, device=W.device)
    U, S, Vh = torch.linalg.svd(W)
    for number, solution in enumerate(solutions):
        if solution is None or not S[number, 0] > 0:
            continue
        r = solution.rank
        left, _, right = torch.linalg.svd(torch.from_numpy(solution.W).to(W))
        both = (U[number, :, :r].mT @ left[:, :r]).square().sum() + (Vh[number, :r] @ right[:r].mT).square().sum()
        found[number] = both / (2 * r)
    return found


def measure(
    problem: Problem, W: Tensor, selected: Tensor, solutions: dict[Norm, Solutions], loss: Loss
) -> dict[str, Tensor]:
    """Everything that is recorded at one step.

    Args:
        problem: the data sets.
        W: the weights, shape (sets, d, d).
        selected: the tokens that the SVMs are for, shape (sets, n).
        solutions: of both SVMs, one per data set.
        loss: of the training.

    Returns:
        Shape (sets,), `singular_values` (sets, d); NaN where something is not defined.
    """
    mu = margins(problem, W, selected)
    safe = mu.where(mu > 0, torch.nan)  # before the tokens are selected there is no margin to divide by
    s = spectrum(W / W.flatten(1).abs().amax(1).clamp(min=1e-300)[:, None, None])
    sigma = torch.linalg.svdvals(W)
    found = {
        "margin": mu,
        "singular_values": sigma / safe[:, None],
        "normalised_nuclear": sigma.sum(-1) / safe,
        "normalised_frobenius": W.flatten(1).norm(dim=1) / safe,
        "effective_rank": s.effective_rank,
        "stable_rank": s.stable_rank,
        "rank": (sigma > RANK * sigma[:, :1]).sum(-1).to(W),
        "alignment": alignment(W, solutions["nuclear"]),
        "loss": loss_value(problem, W, loss),
        "loss_infimum": infimum(problem, loss),
        "log10_loss_excess": log_excess(problem, W, selected, loss) / torch.log(torch.tensor(10.0)).to(W),
    }
    for norm, of in solutions.items():
        optimum = torch.tensor([torch.nan if one is None else one.norm for one in of]).to(W)
        found[f"cosine_{norm}"] = cosine(W, of)
        found[f"{norm}_excess"] = found[f"normalised_{norm}"] / optimum - 1
    return found


def _stacked(solutions: Solutions, like: Tensor) -> Tensor:
    missing = torch.full(like.shape[-2:], torch.nan, dtype=like.dtype)
    return torch.stack([missing if one is None else torch.from_numpy(one.W) for one in solutions]).to(like)
