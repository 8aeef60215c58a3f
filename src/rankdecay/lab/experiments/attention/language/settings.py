"""The settings of `rankdecay language`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.settings import FURTHER, AttentionDecay, check_shared
from rankdecay.lab.session.parallel import Parallel
from rankdecay.lab.settings import check_counts


@dataclass(frozen=True)
class Language(AttentionDecay):
    """What does a separate decay of attention do to the rank and the loss of a language model?

    Trains a GPT on a text for every arm, strength and seed, by default on the bytes of Python's standard library, and
    leaves config.json, metrics.jsonl, summary.json, report.html and the models in --out. Interrupted, the same command
    continues. --size tiny, the default, takes at most a quarter of an hour on two slow cores; gpt2 is GPT-2 with its
    124 million parameters, for a GPU. Under torchrun all processes share each run.
    """

    further: ClassVar[tuple[str, ...]] = tuple(FURTHER)

    size: Literal["tiny", "small", "gpt2"] = "tiny"
    """Defaults of the model and its training: tiny 0.8, small 11, gpt2 124 million parameters."""
    arms: tuple[str, ...] = ("l2", "low_rank", "low_rank_both")
    """Decays of attention: l2, l2_query_key, low_rank, low_rank_both, the last two also with _absolute; or all. To be
    named: l2_loss, planes, and the controls uniform, positions, frozen, frozen_large."""
    strengths: tuple[str, ...] = ("l2=0,1,10", "low_rank=1,10", "low_rank_both=1")
    text: str | None = None
    """Learn this file, or the files of this directory, instead of Python's standard library."""
    dataset: str | None = None
    """Learn a data set of Hugging Face: a name on the hub, name:configuration, or a directory of save_to_disk."""
    tokenizer: str | None = None
    """Tokenizer of transformers: a directory, a tokenizer.json, or a name on the hub; without, a token is a byte."""
    valid_share: float = 0.1
    """Share of the text that is not trained on: whole files, or the end of the only one."""
    valid_windows: int = 256
    """Windows of the validation text, at even distances, in every evaluation."""
    context: int = 128
    """Tokens that a prediction can see."""
    width: int = 128
    """Width of the model."""
    depth: int = 4
    """Layers of the model."""
    heads: int = 4
    """Heads per layer."""
    mlp_width: int = 344
    """Width of the hidden layer of the MLPs."""
    positions: Literal["rotary", "learned"] = "rotary"
    """rotary: blocks of Llama, of Qwen 3 with QK-norm; learned: GPT-2 with RMSNorm."""
    vocabulary: int = 0
    """Rows of the embedding; 0 for as many as there are tokens."""
    batch_size: int = 8
    """Windows per step, over all processes and accumulated parts."""
    steps: int = 450
    evaluate_every: int = 75
    lr: float = 2e-3
    parallel: Parallel = "ddp"
    """How torchrun's processes share a run: ddp, fsdp2 (parts of all), tp (heads and units), fsdp2_tp (both)."""
    out: Path = Path("runs/language")


PRESETS = {
    "default": Language(),
    "standard": Language(preset="standard", strengths=(), out=Path("runs/language-standard")),
    "tiny": Language(),
    "small": Language(
        size="small",
        strengths=(),
        context=256,
        width=384,
        depth=6,
        heads=6,
        mlp_width=1024,
        batch_size=32,
        steps=5000,
        lr=1e-3,
        warmup=200,
        evaluate_every=250,
        out=Path("runs/language-small"),
    ),
    "gpt2": Language(
        size="gpt2",
        strengths=(),
        context=1024,
        width=768,
        depth=12,
        heads=12,
        mlp_width=3072,
        positions="learned",
        vocabulary=50257,
        batch_size=512,
        accumulate=16,
        steps=5000,
        lr=6e-4,
        warmup=250,
        evaluate_every=250,
        out=Path("runs/language-gpt2"),
    ),
}
EXAMPLES = {
    "rankdecay language --text corpus.txt --steps 200 --arms l2": "a text of your own",
    "rankdecay language --seeds 2 --json": "the summary as JSON, for a program",
}


def check(settings: Language) -> Language:
    """Return the settings; raise a `SettingError` for those that cannot work."""
    check_shared(settings)
    if settings.size != "tiny" and settings.preset != "default":
        raise SettingError(
            f"--preset {settings.preset} is for --size tiny: leave out --preset or --size {settings.size}"
        )
    if settings.parallel != "ddp" and settings.precision == "float16":
        raise SettingError(
            f"--precision float16 needs a loss scaler, which --parallel {settings.parallel} has not: give --precision "
            "bfloat16, or --parallel ddp"
        )
    check_counts(settings, "context", "width", "depth", "heads", "mlp_width", "valid_windows")
    if settings.valid_windows < 2:
        raise SettingError(f"--valid-windows {settings.valid_windows} gives no standard error: give at least 2")
    if "planes" in settings.arms and settings.positions != "rotary":
        raise SettingError(
            f"--arms planes decays rotary planes, and --positions {settings.positions} has none: give --positions "
            "rotary, or leave planes out"
        )
    if settings.vocabulary < 0:
        raise SettingError(f"--vocabulary {settings.vocabulary} is negative: give 0 for as many as there are tokens")
    return settings
