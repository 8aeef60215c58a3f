r"""Gradient flow of softmax attention far beyond where a float64 softmax saturates.

With softmax p and token s(i) the one with the largest logit, the negative gradient of the loss by W is

.. math::

    -\nabla_W \mathcal L = \tfrac1n \sum_{i,\, l \ne s(i)} w_i\, p_{il} (\bar\gamma_i - \gamma_{il})
        (x_{i,s(i)} - x_{il}) z_i^\top, \qquad w_i = -\ell'(\bar\gamma_i),
        \quad \bar\gamma_i = \gamma_{i,s(i)} + \sum_l p_{il} (\gamma_{il} - \gamma_{i,s(i)}),

(Sheen et al., arXiv 2403.08699, section 3), in which nothing cancels when p saturates. Coefficients are kept as sign
and logarithm and divided by the largest, so the direction is exact however small the gradient is; its size is kept as a
logarithm, because an explicit decay is compared with it.

**Time.** A common factor of all rates changes the clock and not the path. A step is therefore as long as it may be
without changing W, or K and Q, by more than a fraction ``rate``. At large margins the flow slides along where several
margins are equal, and a step jumps across: from where steps change logits by more than one, the directions that are
returned are averages over about `WINDOW` steps, which takes these jumps out. Halve ``rate`` to see what is left.

**Value heads** are fixed, as in the theory, or trained by the same flow at the same clock. Once the softmax has
selected tokens the loss is all v's: it grows as the logarithm of the time, and the margin of attention as a multiple of
the logarithm of that.

**Weights.** `merged` W; `separate` K and Q, W = KQᵀ; `diagonal` ξ_k and ξ_q, W = diag(ξ_k ⊙ ξ_q). For the latter two
the flow with a fixed gradient is linear in the weights, and a step is its exponential to second order, which
keeps KᵀK - QᵀQ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rankdecay.lab.experiments.margin.data import DataSets
from rankdecay.linalg import soft_threshold

Loss = Literal["exponential", "logistic"]
Kind = Literal["merged", "separate", "diagonal"]
Weights = list[Tensor]  # W (sets, d, d); K and Q (sets, d, d_e); ξ_k and ξ_q (sets, d)
WINDOW = 50  # steps
STABLE = 0.2  # change of W in units of the logits below which descent to a minimum, where decays end, is smooth
SETTLED = 2e-6  # change of the direction per step at which a flow with an explicit decay counts as at its end


@dataclass(frozen=True)
class Problem:
    """The data sets as tensors."""

    tokens: Tensor  # (sets, n, L, d)
    queries: Tensor  # (sets, n, d)
    labels: Tensor  # y, (sets, n)
    scores: Tensor  # γ, (sets, n, L)
    unit: Tensor  # norm of W at which logits are of the order of one, (sets,)

    @classmethod
    def of(cls, data: DataSets, device: str = "cpu") -> Problem:
        """The tensors of some data sets."""
        arrays = (data.tokens, data.queries, data.labels, data.scores)
        x, z, y, gamma = (torch.from_numpy(array).to(device) for array in arrays)
        return cls(x, z, y, gamma, 1 / (x.norm(dim=-1).amax(-1) * z.norm(dim=-1)).amax(-1))

    @property
    def unit_of_heads(self) -> Tensor:
        """Norm of a value head at which scores are of the order of one, (sets,)."""
        return 1 / self.tokens.norm(dim=-1).amax((1, 2))

    def with_heads(self, heads: Tensor) -> Problem:
        """The same data under other value heads, shape (sets, d)."""
        return replace(self, scores=self.labels[..., None] * (self.tokens @ heads[:, None, :, None])[..., 0])

    def logits(self, W: Tensor) -> Tensor:
        """``X W z``, shape (sets, n, L), of W (sets, d, d)."""
        return (self.tokens @ (self.queries @ W.mT)[..., None])[..., 0]

    def ascent(self, coefficients: Tensor) -> Tensor:
        """``Σ c_il x_il z_iᵀ``, shape (sets, d, d)."""
        return (coefficients[..., None, :] @ self.tokens)[..., 0, :].mT @ self.queries


# --- the gradient ---


@dataclass(frozen=True)
class Gradient:
    """The negative gradient by W, as ``exp(log_size) · direction``."""

    direction: Tensor  # (sets, d, d)
    log_size: Tensor  # (sets,)
    margin: Tensor  # of the tokens with the largest logits, (sets,)
    heads: Tensor | None = None  # the negative gradient by the value heads in the same units, (sets, d)


def _log_attention(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The token with the largest logit, (…, 1), and log p, (…, L)."""
    selected = logits.argmax(-1, keepdim=True)
    relative = logits - logits.gather(-1, selected)
    return selected, relative - relative.exp().sum(-1, keepdim=True).log()


def gradient(problem: Problem, W: Tensor, loss: Loss, heads: bool = False) -> Gradient:
    """The negative gradient at W, shape (sets, d, d), exact in direction at any margin.

    Args:
        problem: the data sets.
        W: the weights.
        loss: name of the loss.
        heads: by the value heads too, which are about e^margin larger: for margins below 700.
    """
    logits = problem.logits(W)
    selected, log_p = _log_attention(logits)
    gain = problem.scores - problem.scores.gather(-1, selected)
    mean_gain = (log_p.exp() * gain).sum(-1, keepdim=True)
    average = problem.scores.gather(-1, selected) + mean_gain
    log_weight = -average if loss == "exponential" else logsigmoid(-average)
    heaviest = log_weight.amax((-2, -1))  # apart: beside large scores, what attention adds would be rounded away
    log_weight = log_weight - heaviest[:, None, None]
    excess = gain - mean_gain
    log_rate = (log_weight + log_p + excess.abs().log()).scatter(-1, selected, -math.inf)
    largest = log_rate.amax((-2, -1))
    coefficients = excess.sign() * (log_rate - largest[:, None, None]).exp()
    coefficients = coefficients.scatter_add(-1, selected, -coefficients.sum(-1, keepdim=True))
    second = logits.scatter(-1, selected, -math.inf).amax(-1)
    margin = (logits.gather(-1, selected)[..., 0] - second).amin(-1)
    by_heads = None
    if heads:
        attended = log_p.exp() * log_weight.exp() * problem.labels[..., None]
        by_heads = (attended[..., None] * problem.tokens).sum((1, 2)) * (-largest).exp()[:, None]
    log_size = heaviest + largest - math.log(logits.shape[1])
    return Gradient(problem.ascent(coefficients), log_size, margin, by_heads)


def log_excess(problem: Problem, W: Tensor, selected: Tensor, loss: Loss) -> Tensor:
    """The logarithm of the loss above the infimum that the selected tokens allow.

    Args:
        problem: the data sets.
        W: shape (sets, d, d).
        selected: s, shape (sets, n).
        loss: name of the loss.

    Returns:
        Shape (sets,); NaN where the loss is below it, because better tokens have weight.
    """
    index = selected[..., None]
    log_p = _log_attention(problem.logits(W))[1]
    best = problem.scores.gather(-1, index)
    lack = best - problem.scores
    signed = (log_p + lack.abs().log()).scatter(-1, index, -math.inf)
    top = signed.amax(-1, keepdim=True)
    x = top[..., 0] + (lack.sign() * (signed - top).exp()).sum(-1).log()  # log(γ_s - γ̄)
    best = best[..., 0]
    if loss == "exponential":
        grown = x.exp()
        log_gap = -best + torch.where(x > -30, grown + (-(-grown).expm1()).log(), x)  # e^{-γ̄} - e^{-γ_s}
    else:
        log_gap = torch.where(x > -15, (softplus(x.exp() - best) - softplus(-best)).log(), logsigmoid(-best) + x)
    return torch.logsumexp(log_gap, -1) - math.log(log_gap.shape[-1])


def loss_value(problem: Problem, W: Tensor, loss: Loss) -> Tensor:
    """The training loss, shape (sets,)."""
    average = (_log_attention(problem.logits(W))[1].exp() * problem.scores).sum(-1)
    return losses(average, loss).mean(-1)


def infimum(problem: Problem, loss: Loss) -> Tensor:
    """The loss with every optimal token selected, shape (sets,)."""
    return losses(problem.scores.amax(-1), loss).mean(-1)


def losses(average: Tensor, loss: Loss) -> Tensor:
    """The loss of each example, from its average score γ̄."""
    return (-average).exp() if loss == "exponential" else softplus(-average)


# --- the weights ---


def product(weights: Weights) -> Tensor:
    """The matrices W, shape (sets, d, d)."""
    if len(weights) == 1:
        return weights[0]
    K, Q = weights
    return K @ Q.mT if K.ndim == 3 else torch.diag_embed(K * Q)


def initial_weights(
    kind: Kind,
    init: Literal["paper", "random"],
    scale: float,
    seeds: Sequence[int],
    d: int,
    inner: int,
    device: str = "cpu",
) -> Weights:
    """Initial weights of the flow.

    ``paper`` is condition (5) of Sheen et al.: KQᵀ = 0 with K = √2 scale I and Q = 0, in the diagonal case
    ξ_k = √2 scale. ``random`` draws K and Q Gaussian, with entries of size scale/√d_e (diagonal: scale). W begins as
    the product of the same K and Q.

    Args:
        kind: of the weights.
        init: initialisation, as above.
        scale: ω₀.
        seeds: of the draws, one per data set.
        d: dimension of a token.
        inner: d_e.
        device: where the weights are made.
    """
    draws = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        shape = (2, d) if kind == "diagonal" else (2, d, inner)
        if init == "random":
            size = scale if kind == "diagonal" else scale / math.sqrt(inner)
            draws.append(size * torch.randn(shape, generator=rng, dtype=torch.float64))
        else:
            K = torch.ones(d) if kind == "diagonal" else torch.eye(d, inner)
            draws.append(torch.stack([math.sqrt(2) * scale * K.double(), torch.zeros_like(K).double()]))
    K, Q = torch.stack(draws, 1).to(device)
    return [product([K, Q])] if kind == "merged" else [K, Q]


def velocity(weights: Weights, direction: Tensor) -> Weights:
    """The flow's change of the weights per unit of time: linear in K and Q for a fixed direction."""
    if len(weights) == 1:
        return [direction]
    K, Q = weights
    if K.ndim == 3:
        return [direction @ Q, direction.mT @ K]
    g = direction.diagonal(dim1=-2, dim2=-1)
    return [g * Q, g * K]


def norm(tensors: Weights) -> Tensor:
    return torch.stack([tensor.flatten(1).square().sum(1) for tensor in tensors]).sum(0).sqrt()


def per_set(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Decay:
    """An explicit decay in true units.

    ``l2`` adds ε(‖K‖² + ‖Q‖²), or ε‖W‖², to the loss; ``low_rank`` adds 2ε‖W‖_* to that of a merged W, by the library's
    soft threshold. For two factors the former is the latter at their balanced minimum.
    """

    rule: Literal["l2", "low_rank"] = "l2"
    strength: float = 0.0  # ε


def step(
    weights: Weights,
    problem: Problem,
    loss: Loss,
    decay: Decay,
    rate: float,
    target: float,
    heads: Tensor | None = None,
) -> tuple[Weights, Gradient, Tensor | None]:
    """One step of the flow; data sets whose margin has reached the target stay where they are.

    Args:
        weights: not modified.
        problem: the data sets.
        loss: name of the loss.
        decay: of the weights, beside the loss.
        rate: largest relative change.
        target: margin at which a data set is finished.
        heads: value heads that are trained too, shape (sets, d); those of the problem are fixed.

    Returns:
        The weights after the step, the gradient before it, and the heads after it.
    """
    W = product(weights)
    if heads is not None:
        problem = problem.with_heads(heads)
    found = gradient(problem, W, loss, heads is not None)
    log_decay = math.log(2 * decay.strength) if decay.strength else -math.inf
    scale = found.log_size.clamp(min=log_decay)  # the larger of the two forces is of the order of one
    push = (found.log_size - scale).exp()
    pull = (log_decay - scale).exp()
    first = velocity(weights, per_set(push, W) * found.direction)
    second = velocity(first, per_set(push, W) * found.direction) if len(weights) == 2 else []
    room = rate * (norm([W]) + problem.unit)
    if decay.strength:
        room = torch.minimum(room, STABLE * problem.unit)
    if len(weights) == 1:
        time = room / norm(first)
    else:
        (K, Q), (dK, dQ) = weights, first
        by_product = norm([dK @ Q.mT + K @ dQ.mT]) if K.ndim == 3 else norm([dK * Q + K * dQ])
        time = torch.minimum(rate * norm(weights) / norm(first), room / by_product)
    time = torch.minimum(time, rate / pull)
    if heads is not None and found.heads is not None:
        by_heads = push[:, None] * found.heads
        time = torch.minimum(time, rate * (norm([heads]) + problem.unit_of_heads) / norm([by_heads]))
        heads = heads + time.where(found.margin < target, 0.0)[:, None] * by_heads
    time = time.where(found.margin < target, 0.0)
    new = []
    for number, old in enumerate(weights):
        t = per_set(time, old)
        value = old + t * first[number]
        if second:
            value = value + t * t / 2 * second[number]
        if decay.strength and decay.rule == "l2":
            value = value / (1 + t * per_set(pull, old))
        new.append(value)
    if decay.strength and decay.rule == "low_rank":
        new = [soft_threshold(new[0], time * pull, backend="exact")]
    return new, found, heads


@dataclass(frozen=True)
class Trajectory:
    """Path of a flow."""

    steps: list[int]
    weights: Tensor  # W, averaged over a few steps, (evaluations, sets, d, d)
    heads: Tensor | None = None  # where they are trained too, (evaluations, sets, d)


@dataclass(frozen=True)
class Course:
    """How long weights are trained by which loss, and how often they are kept.

    Attributes:
        loss: name of the loss.
        steps: largest number of steps.
        margin: at which a data set is finished and stays where it is.
        evaluate_every: steps between what is kept.
    """

    loss: Loss = "exponential"
    steps: int = 100_000
    margin: float = 1e8
    evaluate_every: int = 200


def follow(
    weights: Weights,
    problem: Problem,
    course: Course,
    *,
    decay: Decay | None = None,
    rate: float = 4e-3,
    heads: Tensor | None = None,
    evaluated: Callable[[int], None] = lambda step: None,
) -> Trajectory:
    """Follow the flow until every data set has reached the margin, or an explicit decay has stopped it.

    Args:
        weights: where it begins; not modified.
        problem: the data sets.
        course: the loss, and when to stop.
        decay: beside the loss.
        rate: largest relative change per step.
        heads: value heads that are trained too, where they begin, shape (sets, d); margins have to stay below 700.
        evaluated: told the step after each.
    """
    decay = decay or Decay()
    W = product(weights)
    direction = W / per_set(norm([W]).clamp(min=1e-300), W)
    kept, at, kept_heads = [W], [0], [heads]
    for number in range(1, course.steps + 1):
        weights, found, heads = step(weights, problem, course.loss, decay, rate, course.margin, heads)
        W = product(weights)
        size = per_set(norm([W]).clamp(min=1e-300), W)
        sliding = (rate * norm([W]) > problem.unit) & (decay.strength == 0)
        share = torch.where(sliding, 1 / WINDOW, 1.0) * (
            found.margin < course.margin
        )  # a finished data set keeps its average
        direction = direction + per_set(share, W) * (W / size - direction)
        if number % course.evaluate_every and number != course.steps:
            continue
        kept.append(size * direction)
        kept_heads.append(heads)
        at.append(number)
        evaluated(number)
        unmoved = (_unit(kept[-1]) - _unit(kept[-2])).flatten(1).norm(dim=1) < SETTLED * (at[-1] - at[-2])
        if bool(((found.margin >= course.margin) | (unmoved & (decay.strength > 0))).all()):
            break
    trained = [v for v in kept_heads if v is not None]
    return Trajectory(at, torch.stack(kept), torch.stack(trained) if trained else None)


def _unit(W: Tensor) -> Tensor:
    return W / per_set(norm([W]).clamp(min=1e-300), W)
