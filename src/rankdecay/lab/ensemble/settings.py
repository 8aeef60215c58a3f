"""The settings of experiments that train many small transformers at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.settings import Settings, check_counts, check_numbers, check_seeds, check_width
from rankdecay.rules import rule_names

HEADS = 4  # of every network
VALIDATION = 1000  # examples, by default


@dataclass(frozen=True)
class EnsembleSettings(Settings):
    """The network, and how every run of an ensemble is trained."""

    seeds: int = 3
    """Runs of every arm, or cell of the grid; a seed fixes split, initial weights and batches in every arm."""
    split: Literal["unordered", "ordered"] = "unordered"
    """'ordered' lets (a, b) leak (b, a) in commutative tasks; only for replication."""
    validation: int | None = None
    """Examples of a third set that decides when a run has generalised, stops or switches, at most half of what is not
    trained on; the test set is reported alone. 0: the test set decides. By default 1000; a directory that began without
    such a set goes on without."""
    smoothing: float = 0.13
    """For the smooth rule: directions below this share of ‖W‖_F shrink in proportion instead of by a fixed amount."""
    every: int = 4
    """Apply low-rank decay every so many steps, for as many at once, to save time; the published rules act at each."""
    lr: float = 2e-3
    """Learning rate of AdamW."""
    batch_size: int = 128
    """Examples per step and run."""
    precision: Literal["auto", "float32", "mixed", "float64"] = "auto"
    """'mixed': bfloat16 products, float32 elsewhere; 'auto': mixed where the machine is faster at it, else float32."""
    width: int = 64
    """Width of the network, which has 4 heads."""
    mlp_width: int = 256
    """Width of the MLP's hidden layer."""
    depth: int = 2
    """Layers of the network."""
    gains: bool = False
    """Learnable gains in every norm."""
    position_scale: float = 0.3
    """Standard deviation of the initial position embedding."""
    threshold: float = 0.95
    """Accuracy of the set that decides that counts as generalised, if the next evaluation holds it."""
    evaluate_every: int = 40
    """Steps between evaluations."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, where there is a compiler; 'auto' uses it on a GPU and for runs long enough to repay it."""


E = TypeVar("E", bound=EnsembleSettings)


def validated(settings: E, command: str) -> E:
    """Return the settings with a size of the validation set: that of the directory which goes on, if there is one.

    Directories of before have no such set.

    Args:
        settings: of an experiment.
        command: name of the experiment; a directory of another one does not count.

    Raises:
        SettingError: For a configuration that cannot be read.
    """
    from rankdecay.lab.store import read_json

    if settings.validation is not None:
        return settings
    stored = read_json(settings.out / "config.json") or {}
    began = stored.get("settings") if stored.get("command") == command else None
    kept = began.get("validation", 0) if isinstance(began, dict) else VALIDATION
    return replace(settings, validation=kept if isinstance(kept, int) else VALIDATION)


def check_shared(settings: Any, width: int) -> None:
    """Raise a `SettingError` for settings that the experiments share and that cannot work.

    Args:
        settings: of one of them; ``steps``, ``warmup`` and ``rule`` are its own.
        width: an example of one that can be split into the heads.
    """
    check_name("--rule", settings.rule, rule_names())
    check_seeds(settings)
    check_counts(settings, "steps", "seeds", "every", "warmup", "depth", "mlp_width", "batch_size", "evaluate_every")
    check_numbers(settings, "position_scale", zero=True)
    if not 0 < settings.threshold <= 1:
        raise SettingError(f"--threshold {settings.threshold} must be an accuracy in (0, 1]: for example 0.95")
    check_width(settings.width, HEADS, width)
