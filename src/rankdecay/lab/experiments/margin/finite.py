"""Training steps of finite length on K and Q, where a float64 softmax would be saturated: the optimizers people use.

Gradients are those of :mod:`flow`, a direction and the logarithm of its size, so they neither underflow nor are they
rounding. Adam's moments are kept in units of the present gradient, which is what its quotient needs of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankdecay.lab.experiments.margin.flow import (
    Course,
    Problem,
    Trajectory,
    Weights,
    gradient,
    per_set,
    product,
    velocity,
)
from rankdecay.lab.experiments.margin.settings import BETA1

Optimizer = Literal["gd", "normalised", "adam"]


class Adam:
    """Adam on gradients whose size is known by its logarithm.

    Args:
        beta2: β₂. Gradients fall as e^(-margin), and steps stay small while they fall faster than √β₂ a step.
        epsilon: ε, in true units.
    """

    def __init__(self, beta2: float, epsilon: float) -> None:
        self._beta2, self._epsilon = beta2, epsilon
        self._count = 0
        self._log_unit: Tensor | None = None  # of the moments, (sets,)
        self._moments: list[tuple[Tensor, Tensor]] = []

    def directions(self, gradients: Weights, log_unit: Tensor) -> Weights:
        """The steps of Adam at a learning rate of one.

        Args:
            gradients: of every matrix, in units of ``exp(log_unit)``.
            log_unit: shape (sets,).
        """
        self._count += 1
        shift = torch.zeros_like(log_unit) if self._log_unit is None else (self._log_unit - log_unit).exp()
        self._log_unit = log_unit
        old = self._moments or [(torch.zeros_like(g), torch.zeros_like(g)) for g in gradients]
        self._moments, found = [], []
        for g, (first, second) in zip(gradients, old, strict=True):
            unit = per_set(shift, g)
            first = BETA1 * unit * first + (1 - BETA1) * g
            second = self._beta2 * unit.square() * second + (1 - self._beta2) * g.square()
            self._moments.append((first, second))
            size = (second / (1 - self._beta2**self._count)).sqrt()
            bound = size + per_set(self._epsilon * (-log_unit).exp(), g) if self._epsilon else size
            found.append(first / (1 - BETA1**self._count) / bound.where(bound > 0, 1.0))
        return found


@dataclass(frozen=True)
class Method:
    """An optimizer.

    Attributes:
        optimizer: ``gd``; ``normalised``, every matrix's gradient divided by its norm; or ``adam``.
        lr: its learning rate, constant.
        beta2: of adam.
        epsilon: of adam.
    """

    optimizer: Optimizer
    lr: float
    beta2: float
    epsilon: float


def descend(
    weights: Weights,
    problem: Problem,
    method: Method,
    course: Course,
    evaluated: Callable[[int], None] = lambda step: None,
) -> Trajectory:
    """Train until every data set has reached the margin.

    Args:
        weights: K and Q, or W, with the sets on the leading axis; not modified.
        problem: the data sets.
        method: the optimizer.
        course: the loss, and when to stop.
        evaluated: told the step after each.
    """
    adam = Adam(method.beta2, method.epsilon)
    kept, at = [product(weights)], [0]
    for number in range(1, course.steps + 1):
        found = gradient(problem, product(weights), course.loss)
        ascent = velocity(weights, found.direction)
        if method.optimizer == "gd":
            ascent = [per_set(found.log_size.exp(), g) * g for g in ascent]
        elif method.optimizer == "normalised":
            ascent = [g / g.norm(dim=(-2, -1), keepdim=True) for g in ascent]
        else:
            ascent = adam.directions(ascent, found.log_size)
        going = method.lr * (found.margin < course.margin)
        weights = [w + per_set(going, w) * g for w, g in zip(weights, ascent, strict=True)]
        if number % course.evaluate_every and number != course.steps:
            continue
        kept.append(product(weights))
        at.append(number)
        evaluated(number)
        if bool((found.margin >= course.margin).all()):
            break
    return Trajectory(at, torch.stack(kept))
