"""Ranks of attention among the metrics of ``transformers.Trainer``.

The callback logs through ``trainer.log``, so whatever the ``report_to`` of the training arguments names receives the
ranks, and ``trainer.state.log_history`` keeps them. It needs the trainer for that: Trainer puts its reporters before
the callbacks it is given, so adding to the dictionary of ``on_log`` would come too late for them.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankdecay.monitor import Monitor


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
