"""Warnings of a decay that is too strong or trains nothing, and the explanation of a failed collective."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankdecay.decay.optimizers import parameters_of
from rankdecay.decay.policy import Decay, takes_a_share
from rankdecay.dtensor import is_distributed


def warn_if_too_strong(role: str, decay: Decay | None, factor: float | Tensor, warned: set[str]) -> None:
    """Warn once per role of a decay whose every step takes about as much as there is, or more.

    Args:
        role: of the decay.
        decay: to judge.
        factor: the rate of the step.
        warned: roles that a warning has named; this one is added.
    """
    if decay is None or role in warned or isinstance(factor, Tensor) or not takes_a_share(decay):
        return  # a rate in a tensor may be on a GPU, and a step never waits for it
    share = decay.strength * (factor if decay.lr_coupled else 1.0)
    if share >= 1:
        warned.add(role)
        coupled = "lr · strength" if decay.lr_coupled else "strength, with lr_coupled=False,"
        warnings.warn(
            f"{role}: {coupled} is {share:.3g}, and at 1 or more a weight vanishes within a few steps or "
            "overshoots zero. Lower the strength: attachment.describe() says what a step takes.",
            stacklevel=7,
        )


def warn_if_untrained(optimizer: Optimizer) -> None:
    """Warn of an optimizer left with the parameters a model had before it was sharded, which nothing trains."""
    if not is_distributed():
        return
    parameters = [p for p in parameters_of(optimizer) if p.requires_grad]
    if parameters and all(p.grad is None for p in parameters):
        warnings.warn(
            f"no parameter of this {type(optimizer).__name__} has a gradient at its first step, so nothing is trained "
            "or decayed. Sharding replaces a model's parameters: call fully_shard or parallelize_module first, then "
            "rankdecay.param_groups, then build the optimizer.",
            stacklevel=5,
        )


@contextlib.contextmanager
def explain_collective_failure(roles: list[str]) -> Iterator[None]:
    """Explain a collective that failed because another process stopped; the backend's message only names a socket."""
    try:
        yield
    except RuntimeError as error:
        if not roles:
            raise
        raise RuntimeError(
            f"the decay of {', '.join(dict.fromkeys(roles))} needs every process that holds a part of its parameters, "
            f"and on rank {torch.distributed.get_rank()} it failed: {error}. If another process has stopped, "
            "continue the run from its last checkpoint."
        ) from error
