"""The published experiment: normalised gradient descent in float64 with a tiny explicit L2 (TF-as-SVM, merged or not).

Its gradients are those a training loop gets, and underflow once the softmax is saturated. What is left for the
normalisation to amplify is the L2 term, or, without one, rounding errors. Kept to show that; `flow` has no such limit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rankdecay.lab.experiments.margin.flow import Loss, Problem, Trajectory, Weights, losses, product

LR, STEPS = 0.1, 2000  # of the public code


def descend(
    weights: Weights,
    problem: Problem,
    *,
    loss: Loss,
    strength: float,
    lr: float = LR,
    steps: int = STEPS,
    evaluate_every: int = 50,
    evaluated: Callable[[int], None] = lambda step: None,
) -> Trajectory:
    """Descend with every matrix's gradient divided by its own norm; a gradient of zero moves nothing.

    Args:
        weights: K and Q, or W, with the sets on the leading axis; not modified.
        problem: the data sets.
        loss: name of the loss.
        strength: ε of ε(‖K‖² + ‖Q‖²).
        lr: length of a step of each matrix.
        steps: number of steps.
        evaluate_every: steps between what is kept.
        evaluated: told the step after each.
    """
    weights = [weight.clone() for weight in weights]
    kept, at = [product(weights)], [0]
    for number in range(1, steps + 1):
        leaves = [weight.requires_grad_() for weight in weights]
        attention = problem.logits(product(leaves)).softmax(-1)
        output = (attention * problem.scores).sum(-1)
        total = losses(output, loss).mean(-1).sum() + strength * sum(leaf.square().sum() for leaf in leaves)
        gradients = torch.autograd.grad(total, leaves)
        with torch.no_grad():
            weights = [leaf.detach() - lr * _normalised(g) for leaf, g in zip(leaves, gradients, strict=True)]
            if number % evaluate_every == 0 or number == steps:
                kept.append(product(weights))
                at.append(number)
                evaluated(number)
    return Trajectory(at, torch.stack(kept))


def _normalised(g: torch.Tensor) -> torch.Tensor:
    largest = g.abs().amax((-2, -1), keepdim=True)  # first, or the squares of a tiny gradient underflow
    g = g / largest.where(largest > 0, 1.0)
    norm = g.norm(dim=(-2, -1), keepdim=True)
    return g / norm.where(norm > 0, 1.0)
