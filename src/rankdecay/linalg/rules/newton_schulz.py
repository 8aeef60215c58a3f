"""Subtraction of τ times k cubic Newton-Schulz steps from W/‖W‖_F, as published prototypes of low-rank decay do.

See arXiv 2606.04405. The slope of p_k at zero is 1.5^k (7.6 at k = 5), so small directions are decayed
multiplicatively, and once ‖W‖_F < τ 1.5^k / 2 they grow. For replication.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from rankdecay.linalg.exact import inverse
from rankdecay.linalg.matmul import cubic_newton_schulz
from rankdecay.linalg.stack import Prepared, nonzero
from rankdecay.rules import Options, Rule, register_rule


def _fraction(sigma: Tensor, null: Tensor, tau: Tensor, options: Options) -> Tensor:
    F = torch.linalg.vector_norm(sigma, dim=-1, keepdim=True)
    p = sigma / nonzero(F)
    for _ in range(options.steps):
        p = p * (3 - p * p) / 2
    return tau * inverse(sigma, torch.zeros_like(null)) * p


def _taken(prepared: Prepared, tau: Tensor, options: Options) -> Tensor:
    return tau.to(prepared.X.dtype) * cubic_newton_schulz(prepared.X, options.steps)


RULE = Rule(
    "newton_schulz",
    "the published prototypes' five cubic steps",
    _fraction,
    _taken,
    always_products=True,
    homogeneous=True,
)


def with_steps(steps: int) -> Rule:
    """Return the rule of a number of steps, and make it known as ``newton_schulz_<steps>``; of five :data:`RULE`."""
    return RULE if steps == Options().steps else register_rule(_with_steps(steps))


@cache
def _with_steps(steps: int) -> Rule:
    def fraction(sigma: Tensor, null: Tensor, tau: Tensor, options: Options) -> Tensor:
        return _fraction(sigma, null, tau, options._replace(steps=steps))

    def taken(prepared: Prepared, tau: Tensor, options: Options) -> Tensor:
        return _taken(prepared, tau, options._replace(steps=steps))

    name, description = f"newton_schulz_{steps}", f"{steps} cubic steps, as the published prototypes' five"
    return replace(RULE, name=name, description=description, fraction=fraction, taken_by_products=taken)
