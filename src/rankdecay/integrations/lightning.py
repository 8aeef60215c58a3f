"""Ranks of attention among the metrics of a Lightning ``Trainer``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rankdecay.monitor import Monitor


class RankCallback(Callback):
    """Callback that hands a :class:`rankdecay.Monitor`'s values to the loggers, every ``every`` optimizer steps.

    They go straight to the loggers, at ``trainer.global_step``, whatever ``log_every_n_steps`` is.

    Args:
        every: optimizer steps between two measurements.
        **options: the other arguments of :class:`rankdecay.Monitor`, but ``log``.

    Example:
        ``Trainer(callbacks=[RankCallback(every=100)], logger=TensorBoardLogger("runs"))``
    """

    def __init__(self, every: int = 100, **options: Any) -> None:
        super().__init__()
        if "log" in options:
            raise ValueError("log is the trainer's loggers here; use rankdecay.Monitor(model, log=...) for others.")
        self.every, self.options = every, options
        self.monitor: Monitor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the attention, and counts on from a checkpoint."""
        if not trainer.loggers:
            raise ValueError(
                "RankCallback has nowhere to log: the trainer has no logger; give it one, not logger=False."
            )

        def log(values: dict[str, float]) -> None:
            step = int(values.pop("step"))
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

        self.monitor = Monitor(pl_module, self.every, log, **self.options)
        self.monitor.steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the optimizer's steps: several batches may make one, and one batch several."""
        if self.monitor is not None:
            self.monitor.step(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release the model."""
        self.monitor = None
