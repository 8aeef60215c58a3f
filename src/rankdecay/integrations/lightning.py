"""Decays for a Lightning ``Trainer``, and the ranks of attention among its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rankdecay.decay.attachment import Attachment
from rankdecay.decay.settings import decays
from rankdecay.decay.several import attach_each
from rankdecay.monitor import Monitor


class RankDecay(Callback):
    """Callback that decays the roles that are named, under the optimizers of ``configure_optimizers``.

    It attaches when they are set up, before a checkpoint's state is loaded into them, and detaches when the fit ends.
    Of several optimizers each gets the roles that it has parameters of.

    The counts of ``every=k`` are in a checkpoint as the state of this callback. So a checkpoint of a run without it
    can be continued with it, and the other way round.

    Args:
        settings: as :func:`rankdecay.decays` reads them: text or a dictionary.
        **roles: decays by role, and other arguments of :func:`rankdecay.attach`, beside the settings or without.

    Attributes:
        arguments: those of :func:`rankdecay.attach` that were read.
        attachments: the :class:`rankdecay.Attachment` of each optimizer, of the present or the last fit.

    Raises:
        ValueError: From ``fit``, if no optimizer has a parameter of a role, or as :func:`rankdecay.attach`.

    Example:
        ``Trainer(callbacks=[RankDecay(query_key=rd.LowRank(0.1), value_output=rd.Frobenius(0.0))])``
    """

    def __init__(self, settings: str | Mapping[str, Any] | None = None, **roles: Any) -> None:
        super().__init__()
        self.arguments = {"counts": "attachment", **decays(settings, **roles)}
        self.attachments: list[Attachment] = []
        self._attached = False
        self._counts: dict[str, Any] = {}  # when the last fit ended
        self._loaded: dict[str, Any] = {}  # of a checkpoint that is being restored

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers, which hold the parameters that the strategy has left them."""
        self._detach()
        self.attachments = attach_each(trainer.optimizers, pl_module, **self.arguments)
        self._attached = True
        if pl_module.automatic_optimization:
            for attachment in self.attachments:
                attachment.expect_steps()
        self._load()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach, so that a further fit can begin."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach after a fit that raised or was interrupted."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint."""
        if self._attached:
            self._counts = {name: n for each in self.attachments for name, n in each.state_dict().items()}
        return {"counts": self._counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts from a checkpoint; some strategies restore it before there are optimizers, some after."""
        self._loaded = state_dict["counts"]
        if self._attached:
            self._load()

    def _load(self) -> None:
        counts, self._loaded = self._loaded, {}
        for attachment in self.attachments if counts else ():
            attachment.load_state_dict(counts)

    def _detach(self) -> None:
        self.state_dict()
        self._attached = False
        for attachment in self.attachments:
            attachment.detach()


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
