"""The settings of `rankdecay recall`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.settings import AttentionDecay, QKNorm, check_shared
from rankdecay.lab.settings import check_counts, check_numbers, check_width


@dataclass(frozen=True)
class Recall(AttentionDecay):
    """What does a decay of attention do to a two-layer attention-only transformer that learns associative recall?

    Trains it under every arm and strength, with and without QK-norm, and follows the pseudo rank, the imbalance and the
    gap of both products of each layer. Leaves config.json, metrics.jsonl, summary.json and report.html in --out.
    Interrupted, the same command continues. The default takes at most a quarter of an hour on two slow cores.
    """

    pairs: int = 20
    """Pairs of a key and a value in a sequence, N."""
    keys: int = 32
    """Distinct keys; at least as many as pairs."""
    queries: int = 20
    """Keys asked for in each sequence, each once; the paper's 1 takes larger batches."""
    values: int = 32
    """Distinct values, and answers."""
    label_noise: float = 0.05
    """Share of the training answers that are random; the validation set has none."""
    width: int = 64
    """Width of the network."""
    heads: int = 2
    """Heads of each of its two layers."""
    positions: Literal["learned", "rotary"] = "learned"
    """Learned positions are part of the tokens, as the theory has it; rotary ones turn W_KᵀW_Q with the distance."""
    initial: float = 0.0
    """Standard deviation of the initial weights; 0 for 1/√width."""
    valid_sequences: int = 512
    """Sequences of the validation set."""
    strengths: tuple[str, ...] = ("l2=0,1", "low_rank=0.1,1")
    qk_norm: QKNorm = "both"
    steps: int = 1000
    lr: float = 3e-3
    batch_size: int = 64
    """Sequences per step, over all processes and accumulated parts."""
    out: Path = Path("runs/recall")


PRESETS = {"default": Recall(), "standard": Recall(preset="standard", strengths=(), out=Path("runs/recall-standard"))}
EXAMPLES = {
    "rankdecay recall --arms low_rank --strengths low_rank=0.1,1": "one decay at two strengths",
    "rankdecay recall --qk-norm off --seeds 2 --out runs/recall-plain": "without QK-norm, two seeds",
}


def check(settings: Recall) -> Recall:
    """Return the settings; raise a `SettingError` for those that cannot work."""
    check_shared(settings)
    check_counts(settings, "pairs", "queries", "keys", "values", "heads")
    check_numbers(settings, "initial", zero=True)
    if settings.pairs > settings.keys:
        raise SettingError(
            f"--pairs {settings.pairs} needs as many distinct keys, --keys is {settings.keys}: give fewer pairs or "
            "more keys"
        )
    if settings.queries > settings.pairs:
        raise SettingError(f"--queries {settings.queries} asks for more keys than --pairs {settings.pairs}: give fewer")
    if settings.values < 2:
        raise SettingError("--values 1 leaves nothing to recall: give at least 2")
    if not 0 <= settings.label_noise < 1:
        raise SettingError(
            f"--label-noise {settings.label_noise} is outside [0, 1): give the share of answers to replace, such as "
            "0.05, or 0 for none"
        )
    if settings.valid_sequences < 2:
        raise SettingError(f"--valid-sequences {settings.valid_sequences} gives no standard error: for example 512")
    if settings.mlp_decays != Recall().mlp_decays:
        raise SettingError("--mlp-decays has no effect: this transformer is attention alone; leave it out")
    check_width(settings.width, settings.heads, example=32 * settings.heads)
    return settings
