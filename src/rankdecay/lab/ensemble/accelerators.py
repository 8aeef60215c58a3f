r"""Published rules that are said to make a network generalise sooner, each as its authors define it.

An accelerator acts once per step and member, when gradients are there and AdamW has not stepped yet: it changes the
gradient, or steps or decays parameters itself. What it remembers from step to step is part of the member's state.

===============  ======================================================================================================
`GrokfastEMA`    μ ← αμ + (1 - α)g, μ₀ = g₀;  g ← g + λμ  (arXiv 2405.20233)
`GrokfastMA`     g ← g + λ · mean of the last w gradients, once there are w  (the same)
`OrthoGrad`      g ← (g - ⟨w,g⟩/⟨w,w⟩ w), made as long as g was, per parameter tensor: ⊥Grad  (arXiv 2501.04697)
`StableMax`      softmax with s(x) = x + 1 for x ≥ 0 and 1/(1 - x) below in place of exp, in the loss  (the same)
`Muon`           the hidden matrices step by their orthogonalised momentum, all else by AdamW  (K. Jordan, 2024)
`CautiousDecay`  decoupled L2 of those weights alone that the update moves towards zero  (arXiv 2510.12402)
`HiddenRate`     AdamW with a learning rate of their own for the matrices that Muon is for: a control of Muon
===============  ======================================================================================================
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-30  # what the authors of ⊥Grad add to what they divide by
HIDDEN = ("query", "key", "value", "output", "mlp_in", "mlp_out")  # the matrices that Muon is for
QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Muon's Newton-Schulz steps
ITERATIONS = 5


@dataclass(frozen=True)
class Moment:
    """State of one member before AdamW's step, which an accelerator may change in place.

    Vectors hold all parameters, one after another as in ``layout``.

    Attributes:
        weights, gradient: ``(parameters,)``.
        mean: AdamW's average of the gradients so far, ``(parameters,)``.
        memory: what the accelerator remembers, ``(rows, parameters)``; zeros before the first step.
        decay: the share of each weight that decoupled L2 takes in this step, ``(parameters,)``.
        step: the number of this step; the first is 1.
        beta: AdamW's β₁.
        layout: the shape of every parameter, by name.
    """

    weights: Tensor
    gradient: Tensor
    mean: Tensor
    memory: Tensor
    decay: Tensor
    step: int
    beta: float
    layout: Mapping[str, tuple[int, ...]]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of the parts of a vector, by the name of their parameter."""
        parts = vector.split([math.prod(shape) for shape in self.layout.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.layout.items(), parts, strict=True)}


class Accelerator:
    """An accelerator that does nothing.

    Attributes:
        rows: vectors of all parameters that it remembers.
        stable_loss: whether the loss is taken by `stable_logits`.
        decays: whether it takes the decoupled L2 itself, in place of AdamW.
        needs: steps before it acts.
    """

    rows: int = 0
    stable_loss: bool = False
    decays: bool = False
    needs: int = 0

    def steps(self, name: str) -> bool:
        """Whether it steps a parameter itself, in place of AdamW, and takes its decoupled L2."""
        return False

    def rate(self, name: str) -> float | None:
        """The learning rate of a parameter in place of the member's, of which its decoupled L2 stays a share."""
        return None

    def act(self, moment: Moment) -> None:
        """Change gradients, or step or decay parameters."""


@dataclass(frozen=True)
class GrokfastEMA(Accelerator):
    """Grokfast: the exponential average of the gradients is added to the gradient.

    Attributes:
        factor: λ.
        alpha: of the average.
    """

    factor: float
    alpha: float = 0.98

    rows = 1

    def act(self, moment: Moment) -> None:
        (average,) = moment.memory
        if moment.step == 1:
            average.copy_(moment.gradient)
        average.mul_(self.alpha).add_(moment.gradient, alpha=1 - self.alpha)
        moment.gradient.add_(average, alpha=self.factor)


@dataclass(frozen=True)
class GrokfastMA(Accelerator):
    """Grokfast-MA: the mean of the last gradients is added to the gradient, from the step on at which there are enough.

    Attributes:
        factor: λ.
        window: number of gradients.
    """

    factor: float
    window: int = 100

    @property
    def rows(self) -> int:  # type: ignore[override]
        """The gradients, and their sum."""
        return self.window + 1

    @property
    def needs(self) -> int:  # type: ignore[override]
        """Steps before it acts."""
        return self.window

    def act(self, moment: Moment) -> None:
        last, total = moment.memory[:-1], moment.memory[-1]
        place = (moment.step - 1) % self.window
        total.sub_(last[place]).add_(moment.gradient)
        last[place] = moment.gradient
        if place == self.window - 1:
            total.copy_(last.sum(0))  # so that roundings add up over one window, and not over the run
        if moment.step >= self.window:
            moment.gradient.add_(total, alpha=self.factor / self.window)


@dataclass(frozen=True)
class OrthoGrad(Accelerator):
    """⊥Grad: the part of the gradient across the weights alone, per parameter tensor, at the gradient's length."""

    def act(self, moment: Moment) -> None:
        weights = moment.split(moment.weights)
        for name, gradient in moment.split(moment.gradient).items():
            w, g = weights[name].flatten(), gradient.flatten()
            across = g - w.dot(g) / (w.dot(w) + TINY) * w
            gradient.copy_((across * (g.norm() / (across.norm() + TINY))).view_as(gradient))


@dataclass(frozen=True)
class StableMax(Accelerator):
    """StableMax cross-entropy as the loss; figures of losses stay the ordinary cross-entropy."""

    stable_loss = True


@dataclass(frozen=True)
class Muon(Accelerator):
    """Muon: hidden matrices step by the orthogonalised Nesterov momentum, times √max(1, rows / columns).

    The authors orthogonalise in bfloat16, for speed; here it is the precision of the weights. Its decoupled L2 is the
    share that AdamW would take, so it does not change with ``lr``: Muon's own weight decay is that share over ``lr``.

    Attributes:
        lr: learning rate of the hidden matrices; that of all else is the member's.
        momentum: of the gradients.
        orthogonal: False for a control: the momentum as it is, at the length that it would have orthogonalised.
    """

    lr: float
    momentum: float = 0.95
    orthogonal: bool = True

    def steps(self, name: str) -> bool:
        return name.split(".")[0] in HIDDEN

    def act(self, moment: Moment) -> None:
        names = [name for name in moment.layout if self.steps(name)]
        weights, gradients, means, decays = (
            [parts[name] for name in names]
            for parts in map(moment.split, (moment.weights, moment.gradient, moment.mean, moment.decay))
        )
        for mean, gradient in zip(means, gradients, strict=True):
            mean.lerp_(gradient, 1 - self.momentum)
        ahead = [gradient.lerp(mean, self.momentum) for gradient, mean in zip(gradients, means, strict=True)]
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)  # which may be orthogonalised together
        for index, matrix in enumerate(ahead):
            alike[tuple(_wide(matrix).shape)].append(index)
        for some in alike.values():
            stacked = torch.stack([_wide(ahead[index]) for index in some])
            updates = orthogonalised(stacked) if self.orthogonal else as_long(stacked)
            for index, update in zip(some, updates, strict=True):
                rows, columns = weights[index].shape
                lr = self.lr * max(1, rows / columns) ** 0.5
                _wide(weights[index]).mul_(1 - _wide(decays[index])).sub_(update, alpha=lr)


@dataclass(frozen=True)
class HiddenRate(Accelerator):
    """AdamW at a learning rate of their own for the matrices that Muon is for; their decay takes the same share.

    Attributes:
        lr: of those matrices; that of all else is the member's.
    """

    lr: float

    def rate(self, name: str) -> float | None:
        return self.lr if name.split(".")[0] in HIDDEN else None


@dataclass(frozen=True)
class CautiousDecay(Accelerator):
    """Cautious weight decay: w ← w - η(u + λ[u w ≥ 0] w) with AdamW's update u, element by element."""

    decays = True

    def act(self, moment: Moment) -> None:
        update = moment.mean.lerp(moment.gradient, 1 - moment.beta)  # has the sign of AdamW's
        towards_zero = update.sign() * moment.weights.sign() >= 0
        moment.weights.mul_(1 - moment.decay * towards_zero)


def _wide(matrix: Tensor) -> Tensor:
    """A view of a matrix with no more rows than columns: its transpose, if it has more."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def stable_logits(logits: Tensor) -> Tensor:
    """Return log s(x): the softmax of these is StableMax of ``logits``, however large those are."""
    return torch.where(logits < 0, -torch.log1p(-logits.clamp(max=0)), torch.log1p(logits.clamp(min=0)))


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return nearly U Vᵀ of wide ``(n, rows, columns)`` matrices by Muon's five quintic Newton-Schulz steps."""
    a, b, c = QUINTIC
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def as_long(matrices: Tensor) -> Tensor:
    """Return wide ``(n, rows, columns)`` matrices at the length of matrices with orthonormal rows: √rows."""
    return matrices * (matrices.shape[-2] ** 0.5 / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7))
