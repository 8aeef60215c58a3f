"""One parameter cut into heads, and the sums of g·w over them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from rankdecay.attention import Window
from rankdecay.attention.layer import WHOLE
from rankdecay.attention.scale import Terms
from rankdecay.linalg.backend import double


class ParameterView(NamedTuple):
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


def terms_of(views: list[ParameterView]) -> Terms:
    """Return the sums of g·w over views with the same heads; a view without a gradient adds nothing."""
    return Terms.of([
        double(view.cut(view.gradient)) * double(view.cut(view.parameter))
        for view in views
        if view.gradient is not None
    ])  # fmt: skip
