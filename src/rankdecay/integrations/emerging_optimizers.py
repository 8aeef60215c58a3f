"""A weight-update hook of NVIDIA's Emerging-Optimizers that acts on weights which have been decayed.

``rankdecay.attach`` decays under these optimizers as under any other. But their hooks for the weight update act inside
the step, one parameter at a time, before the decay: a hook that holds a norm would find it changed afterwards. Wrapped
in :class:`AfterDecay`, it acts when the step has been decayed.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rankdecay.decay.attachment import Attachment


class WeightUpdateHook(Protocol):
    """Interface of a hook of Emerging-Optimizers."""

    def pre_weight_update_inplace(self, p: Tensor, update: Tensor) -> Any:
        """Act before the update; what it returns is given to the other."""

    def post_weight_update_inplace(self, p: Tensor, pre_update_state: Any) -> None:
        """Act after the update."""


class AfterDecay:
    """Hook that lets another one act on the weights after a step's decay.

    Args:
        hook: any of theirs, such as ``HyperballHook(radius)``.

    Example:
        >>> hook = AfterDecay(HyperballHook(radius=1.0))  # doctest: +SKIP
        >>> optimizer = Muon(matrices, weight_update_hook=hook)  # doctest: +SKIP
        >>> hook.follow(rankdecay.attach(optimizer, model, query_key=rankdecay.LowRank(0.1)))  # doctest: +SKIP
    """

    def __init__(self, hook: WeightUpdateHook) -> None:
        self.hook = hook
        self._follows = False
        self._waiting: dict[Tensor, Any] = {}  # of each parameter that this step has updated

    def follow(self, attachment: Attachment) -> None:
        """Act after the decay of an attachment from now on; before this, the hook acts as it would by itself."""
        attachment.optimizer.register_step_post_hook(self._act)  # behind that of the attachment
        self._follows = True

    def pre_weight_update_inplace(self, p: Tensor, update: Tensor) -> Any:
        """Act before the update, as the hook does."""
        return self.hook.pre_weight_update_inplace(p, update)

    def post_weight_update_inplace(self, p: Tensor, pre_update_state: Any) -> None:
        """Put off what the hook does after the update."""
        if self._follows:
            self._waiting[p] = pre_update_state
        else:
            self.hook.post_weight_update_inplace(p, pre_update_state)

    @torch.no_grad()
    def _act(self, *_: Any) -> None:
        waiting, self._waiting = self._waiting, {}
        for parameter, state in waiting.items():
            self.hook.post_weight_update_inplace(parameter, state)
