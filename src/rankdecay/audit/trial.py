"""Finite rescaling: does the loss change when parameters with a suspected symmetry are multiplied?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankdecay.audit.view import ParameterView

#: The factor of the finite rescaling.
RESCALING = 1.5


def alternating(units: int) -> Tensor:
    """Return factors 1.5 and 1/1.5 in turn, (units,), so that one trial tests each unit separately."""
    factors = torch.full((units,), RESCALING, dtype=torch.float64)
    factors[1::2] = 1 / RESCALING
    return factors


class Trial:
    """Test of the loss at rescaled parameters."""

    def __init__(self, loss: Callable[[], Tensor]) -> None:
        self.loss = loss
        with torch.no_grad():
            value = loss()
            self.base, again = float(value), float(loss())
        noise = abs(again - self.base)
        if not noise <= 1e-4 * abs(self.base):
            raise ValueError(
                f"confirm=True needs the same loss at each call, and got {self.base:.6g} and {again:.6g}: call "
                "model.eval() to switch off dropout, and use one batch."
            )
        self.noise = 4 * noise + 16 * torch.finfo(value.dtype).eps * abs(self.base)

    @torch.no_grad()
    def change(self, scaled: list[tuple[ParameterView, Tensor]]) -> float:
        """Return the change of the loss when each view's heads are multiplied by its factors."""
        before = {view.parameter: view.parameter.clone() for view, _ in scaled}
        try:
            for view, factors in scaled:
                view.scale(factors.to(view.parameter.device))
            return float(self.loss()) - self.base
        finally:
            for parameter, value in before.items():
                parameter.copy_(value)

    def unchanged(self, scaled: list[tuple[ParameterView, Tensor]], reference: float, tolerance: float) -> bool | None:
        """Whether the loss stays, compared to a change of size ``reference``; None if rounding would hide that."""
        if reference <= 4 * self.noise:
            return None
        return abs(self.change(scaled)) <= min(10 * tolerance, 0.5) * reference + self.noise
