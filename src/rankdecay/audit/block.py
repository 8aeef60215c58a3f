"""One parameter cut into heads, and the sums of g·w over them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from rankdecay.attention import Window
from rankdecay.attention.layer import WHOLE
from rankdecay.linalg.backend import double


class Block(NamedTuple):
    """Parameter, or a window on one, that can be cut into heads."""

    name: str
    parameter: nn.Parameter
    gradient: Tensor | None
    window: Window = WHOLE

    def cut(self, value: Tensor) -> Tensor:
        """Return (heads, …) of the parameter or its gradient, detached; (1, …) of a whole parameter."""
        return self._upright.heads(self._lines(value.detach()))

    def whole(self, value: Tensor) -> Tensor:
        """Return the same, not cut."""
        return self._upright.matrix(self._lines(value.detach()))

    def scale(self, factors: Tensor) -> None:
        """Multiply each head by its factor, in place."""
        value = self.cut(self.parameter)
        value = value * factors.to(value).reshape(-1, *[1] * (value.ndim - 1))
        self._upright.write(self._lines(self.parameter), value)

    @property
    def heads(self) -> int:
        return self.window.num_heads

    def _lines(self, value: Tensor) -> Tensor:
        """The value; a bias that is cut into heads as a matrix of one column."""
        return column(value) if self.window.has_heads else value

    @property
    def _upright(self) -> Window:
        return self.window if self.parameter.ndim > 1 else replace(self.window, transposed=False)


def column(value: Tensor) -> Tensor:
    """View a bias as a matrix of one column."""
    return value if value.ndim > 1 else value[:, None]


def size(g: Tensor, w: Tensor) -> float:
    """Return ‖g‖‖w‖, the largest that the sum of g·w can be."""
    return float(double(g).norm() * double(w).norm())


class Terms(NamedTuple):
    """Sums Σ g·w and Σ (g·w)², per head."""

    total: Tensor
    square: Tensor

    def grouped(self, groups: int) -> Terms:
        """Sum within each of ``groups`` runs of heads."""
        return Terms(*(value.unflatten(0, (groups, -1)).sum(1) for value in self))

    @staticmethod
    def of(blocks: list[Block]) -> Terms:
        """Sum over blocks with the same heads; a block without a gradient adds nothing."""
        terms = [
            (double(block.cut(block.gradient)) * double(block.cut(block.parameter)))[..., None].flatten(1)
            for block in blocks
            if block.gradient is not None
        ]
        return Terms(sum(t.sum(1) for t in terms), sum(t.square().sum(1) for t in terms))  # pyright: ignore


def cancels(terms: Terms) -> float:
    """Return the root mean square of the totals over what it would be if nothing cancelled: 0 if all terms cancel."""
    square = float(terms.square.sum())
    return math.sqrt(float(terms.total.square().sum()) / square) if square > 0 else math.inf
