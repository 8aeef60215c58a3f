"""Decays for ``transformers.Trainer``, and the ranks of attention among its metrics.

:class:`RankDecay` attaches when training begins, to the optimizer that Trainer has made and prepared by then, and
detaches when it ends. Trainer has loaded its checkpoint before, and from a distributed one only what the optimizer's
state had already. So the counts of ``every=k`` are in ``trainer_state.json``, too.

:class:`RankCallback` logs through ``trainer.log``, so whatever the ``report_to`` of the training arguments names
receives the ranks, and ``trainer.state.log_history`` keeps them. It needs the trainer for that: Trainer puts its
reporters before the callbacks it is given, so adding to the dictionary of ``on_log`` would come too late for them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import __version__ as version
from transformers.trainer_callback import ExportableState

from rankdecay.decay.attach import attach
from rankdecay.decay.attachment import Attachment
from rankdecay.decay.settings import as_settings, decays
from rankdecay.monitor import Monitor

_logger = logging.getLogger(__name__)


class RankDecay(TrainerCallback, ExportableState):
    """Callback that decays the roles that are named, under the optimizer that Trainer makes.

    Args:
        settings: text or dictionary, as for :func:`rankdecay.decays`.
        **roles: decays by role, and other arguments of :func:`rankdecay.attach`, beside the settings or without.

    Attributes:
        attachment: the :class:`rankdecay.Attachment` of the present or the last training, None before the first.

    Raises:
        ValueError: If the settings cannot be read, or name no role; from ``train()`` what ``attach`` raises.

    Example:
        ``Trainer(model, arguments, callbacks=[RankDecay(query_key=rd.LowRank(0.1), value_output=rd.Frobenius(0.0))])``
    """

    def __init__(self, settings: str | Mapping[str, Any] | None = None, **roles: Any) -> None:
        self.keywords = decays(settings, **roles)
        self.attachment: Attachment | None = None
        self.counts: dict[str, Any] = {}
        self._attached = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Attach, and go on with the counts of the checkpoint that has been loaded."""
        self._detach()  # from a training that raised
        self.attachment = attach(optimizer, model, **self.keywords)
        self._attached = True
        # A checkpoint of a run without decay has no entry, and Trainer looks for one when it saves.
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step and isinstance(saved, Mapping):
            self.attachment.load_state_dict(saved["attributes"]["counts"])
        if state.is_world_process_zero:
            _logger.info("%s", self.attachment.describe())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Detach, so that a further training can begin."""
        self._detach()

    def state(self) -> dict[str, Any]:
        """Return the settings and the counts, for ``trainer_state.json``."""
        if self._attached and self.attachment is not None:
            counts = self.attachment.state_dict()
            self.counts = {name: count for name, count in counts.items() if count}
        return {"args": {"settings": as_settings(self.keywords)}, "attributes": {"counts": self.counts}}

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.detach()
        self._attached = False
        self.counts = {}


def decaying(
    optimizer_class: type[Optimizer],
    optimizer_kwargs: Mapping[str, Any] | None = None,
    settings: str | Mapping[str, Any] | None = None,
    **roles: Any,
) -> tuple[Decaying, dict[str, Any]]:
    """Return the ``optimizer_cls_and_kwargs`` with which Trainer makes an optimizer that decays.

    The optimizer is attached when it is made, before Trainer wraps or shards the model and loads a checkpoint. It has
    Trainer's own two groups, so ``weight_decay`` is left out for biases and norms. From transformers 5.2 on.

    Args:
        optimizer_class: a class of optimizers.
        optimizer_kwargs: its arguments; Trainer uses neither its ``learning_rate`` nor its ``weight_decay`` here.
        settings: text or dictionary, as for :func:`rankdecay.decays`.
        **roles: decays by role, and other arguments of :func:`rankdecay.attach`.

    Example:
        ``Trainer(..., optimizer_cls_and_kwargs=decaying(AdamW, {"lr": 3e-4}, query_key=rd.LowRank(0.1)))``
    """
    return Decaying(optimizer_class, dict(optimizer_kwargs or {}), decays(settings, **roles)), {}


class Decaying:
    """Factory of attached optimizers, as Trainer calls one. Made by :func:`decaying`.

    Attributes:
        attachment: of the optimizer that was made last.
    """

    def __init__(
        self, optimizer_class: type[Optimizer], optimizer_kwargs: dict[str, Any], keywords: dict[str, Any]
    ) -> None:
        self.optimizer_class, self.optimizer_kwargs, self.keywords = optimizer_class, optimizer_kwargs, keywords
        self.attachment: Attachment | None = None

    def __call__(self, groups: object = None) -> Any:
        """Return what makes an optimizer for a model: Trainer makes an instance of what it is given first.

        Raises:
            TypeError: If ``groups`` are given, by the Trainer of transformers before 5.2, which gives no model.
        """
        if groups is not None:
            raise TypeError(
                f"optimizer_cls_and_kwargs=decaying(...) needs transformers 5.2 or later, this is {version}: its "
                "Trainer makes an optimizer without saying of which model. Give callbacks=[RankDecay(...)], with "
                "optimizers= for another class."
            )
        return self.make

    def make(self, model: nn.Module) -> Optimizer:
        """Make an optimizer with Trainer's two groups, and attach."""
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType]
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trained if name in decayed]},
            {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
        ]
        make: Any = self.optimizer_class
        optimizer = make(groups, **self.optimizer_kwargs)
        self.attachment = attach(optimizer, model, **self.keywords)
        return optimizer


class RankCallback(TrainerCallback):
    """Callback that logs a :class:`rankdecay.Monitor`'s values every ``every`` optimizer steps.

    Args:
        trainer: the trainer it is added to.
        every: steps between two measurements; independent of ``logging_steps``.
        **options: the other arguments of :class:`rankdecay.Monitor`, but ``log``.

    Example:
        ``trainer.add_callback(RankCallback(trainer, every=100))``
    """

    def __init__(self, trainer: Trainer, every: int = 100, **options: Any) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"trainer must be the transformers.Trainer to log with, got {type(trainer).__name__}; make the trainer "
                "first, then trainer.add_callback(RankCallback(trainer))."
            )
        if "log" in options:
            raise ValueError("log is the trainer's here; use rankdecay.Monitor(model, log=...) to log elsewhere.")
        self.trainer, self.every, self.options = trainer, every, options
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Find the attention, and counts on from a checkpoint."""
        model: Any = self.trainer.model
        self.monitor = Monitor(model, self.every, self._log, **self.options)
        self.monitor.steps = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Follow the optimizer's steps."""
        if self.monitor is not None:
            self.monitor.step(state.global_step)

    def _log(self, values: dict[str, float]) -> None:
        """Log, and restore the flag by which Trainer makes its log of this step."""
        should_log = self.trainer.control.should_log
        self.trainer.log({name: value for name, value in values.items() if name != "step"})
        self.trainer.control.should_log = should_log
