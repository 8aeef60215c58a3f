"""Notice that the optimizer a decay is attached to never steps, or never sees a gradient.

A decay that waits for a step which does not come would do nothing without a word: a trainer may have built another
optimizer, a wrapper may step the parameters itself, or hooks of the backward pass may step each parameter and leave no
gradient behind.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Sequence

from torch import Tensor

#: Backward passes without a step, or steps without a gradient, after which a warning is given, once.
PATIENCE = 10


class Watch:
    """Count of backward passes before the first step, and of steps without a gradient.

    Args:
        kind: name of the optimizer.
        parameters: that are decayed.
    """

    def __init__(self, kind: str, parameters: Sequence[Tensor]) -> None:
        self._kind = kind
        self._backwards = self._steps = self._empty = 0
        self._warned = False
        self._watched = bool(parameters)
        self._handle = None
        trained = next((p for p in parameters if p.requires_grad and p.is_leaf), None)
        if trained is not None:
            watch = weakref.ref(self)

            def count(_: Tensor) -> None:
                alive = watch()
                if alive is not None:
                    alive._backward()

            self._handle = trained.register_post_accumulate_grad_hook(count)

    def stop(self) -> None:
        """Stop to watch backward passes."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def stepped(self, had_gradients: bool, replaced: Callable[[], list[str]]) -> None:
        """Take note of a step, and whether a decayed parameter had a gradient in it.

        Args:
            had_gradients: whether one had.
            replaced: finds parameters without one that the model does not have any more; asked every few steps.
        """
        self._steps += 1
        self._empty = 0 if had_gradients or not self._watched else self._empty + 1
        if self._warned:
            return
        if self._steps % PATIENCE == 0 and (names := replaced()):
            self._warned = True
            warnings.warn(f"{words_of_replaced(names, self._kind)}.", stacklevel=6)
        elif self._empty == PATIENCE:
            self._warned = True
            warnings.warn(
                f"no decayed parameter had a gradient in {self._empty} steps of {self._kind}, so nothing was decayed. "
                "If hooks of the backward pass step each parameter by its own optimizer, attach to those.",
                stacklevel=6,
            )

    def _backward(self) -> None:
        if _is_accumulating():
            return
        self._backwards += 1
        if self._backwards == PATIENCE:
            self.stop()
            warnings.warn(
                f"{self._backwards} backward passes without a step() of the {self._kind} that rankdecay is attached "
                "to, so nothing is decayed yet. If something else steps the parameters (a wrapper, or an optimizer "
                "that a trainer built), attach to that; if you accumulate the gradients of more passes, ignore this.",
                stacklevel=2,
            )


def words_of_replaced(names: Sequence[str], kind: str) -> str:
    """Return that parameters of an optimizer are not those of the model any more, and what to do."""
    first = f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
    return (
        f"the model has other parameters in place of {len(names)} of this {kind}'s ({first}), as after "
        "load_state_dict(assign=True) or a new nn.Parameter, and they are neither trained nor decayed: "
        "build the optimizer from the model as it is now, then attach"
    )


def _is_accumulating() -> bool:
    """Whether Accelerate, with which Trainer trains too, says that the gradients of this pass wait for more."""
    state = sys.modules.get("accelerate.state")
    return state is not None and not state.GradientState().sync_gradients
