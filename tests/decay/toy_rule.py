"""A rule of another package in one file: the gradient of a smooth log-penalty, σ → σ - τ σ/(1 + σ²)."""

from torch import Tensor

from rankdecay.rules import Options, Rule, register_rule


def fraction(sigma: Tensor, null: Tensor, tau: Tensor, options: Options) -> Tensor:
    return tau / (1 + sigma * sigma)


RULE = register_rule(Rule("toy", "σ - τ σ/(1 + σ²), the gradient of log(1 + σ²)/2", fraction))
