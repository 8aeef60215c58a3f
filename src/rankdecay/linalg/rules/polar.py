"""Subtraction of τ times the subgradient U Vᵀ of the nuclear norm, σ → σ - τ, with null directions contributing zero.

Nothing below τ is special-cased: a direction smaller than τ overshoots and then chatters, which is what this rule does
and why it is not the default.
"""

from __future__ import annotations

from torch import Tensor

from rankdecay.linalg.exact import inverse
from rankdecay.linalg.matmul import polar_by_products
from rankdecay.linalg.stack import Prepared
from rankdecay.rules import Options, Rule


def _fraction(sigma: Tensor, null: Tensor, tau: Tensor, options: Options) -> Tensor:
    return tau * inverse(sigma, null)


def _taken(prepared: Prepared, tau: Tensor, options: Options) -> Tensor:
    return tau.to(prepared.X.dtype) * polar_by_products(prepared.X)


RULE = Rule("polar", "the subgradient UVᵀ", _fraction, _taken, homogeneous=True)
