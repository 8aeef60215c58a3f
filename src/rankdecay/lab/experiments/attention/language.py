"""A separate decay for the attention of a language model: what it does to rank, and what rank costs in quality.

A GPT learns a real text under every arm, strength of the decay of attention and decay of the MLPs, from the same seeds
and on the same batches. The text needs no download: by default the bytes of Python's own standard library. The decays
join AdamW as they would in anyone's script, by `rd.param_groups` and `rd.attach`.

Importing this module imports neither torch nor numpy: the command line reads its settings for ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.experiments.attention import experiment as attention_decay
from rankdecay.lab.experiments.attention.experiment import AttentionDecay, Experiment, Record, print_summary
from rankdecay.lab.legacy import check_counts
from rankdecay.lab.session.parallel import Parallel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankdecay.lab.experiments.attention.text import Corpus
    from rankdecay.lab.session.gpt import GPT
    from rankdecay.lab.session.session import Batch, Quality

__all__ = ["PRESETS", "Language", "LanguageModelling", "check", "print_summary", "run"]


@dataclass(frozen=True)
class Language(AttentionDecay):
    """What does a separate decay of attention do to the rank and the loss of a language model?

    Trains a GPT on a text for every arm, strength and seed, by default on the bytes of Python's standard library, and
    leaves config.json, metrics.jsonl, summary.json, report.html and the models in --out. Interrupted, the same command
    continues. --size tiny, the default, takes at most a quarter of an hour on two slow cores; gpt2 is GPT-2 with its
    124 million parameters, for a GPU. Under torchrun all processes share each run.
    """

    size: Literal["tiny", "small", "gpt2"] = "tiny"
    """Defaults of the model and its training: tiny 0.8, small 11, gpt2 124 million parameters."""
    arms: tuple[str, ...] = ("l2", "low_rank", "low_rank_both")
    """Decays of attention: l2, l2_query_key, low_rank, low_rank_both, the last two also with _absolute; or all."""
    strengths: tuple[str, ...] = ("l2=0,1,10", "low_rank=1,10", "low_rank_both=1")
    """Strengths of an arm, for example l2=0,0.1,1 low_rank=0.3,3; an arm that is not named has its own."""
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
    """Its layers."""
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
    """Training steps of each run."""
    evaluate_every: int = 75
    """Steps between evaluations."""
    lr: float = 2e-3
    """Peak learning rate: a linear rise, then a cosine down to a tenth."""
    warmup: int = 50
    """Steps of the rise."""
    parallel: Parallel = "ddp"
    """How torchrun's processes share a run: ddp, fsdp2 (parts of all), tp (heads and units), fsdp2_tp (both)."""
    out: Path = Path("runs/language")
    """Where results go; a run that was interrupted continues there."""


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


def check(settings: Language) -> None:
    """Raises a `SettingError` for settings that cannot work, before anything is read or written."""
    attention_decay.check(settings)
    if settings.size != "tiny" and settings.preset != "default":
        raise SettingError(
            f"--preset {settings.preset} is for --size tiny: leave out --preset or --size {settings.size}"
        )
    check_name("--parallel", settings.parallel, get_args(Parallel))
    if settings.parallel != "ddp" and settings.precision == "float16":
        raise SettingError(
            f"--precision float16 needs a loss scaler, which --parallel {settings.parallel} has not: give --precision "
            "bfloat16, or --parallel ddp"
        )
    check_counts(settings, "context", "width", "depth", "heads", "mlp_width", "valid_windows")
    if settings.valid_windows < 2:
        raise SettingError(f"--valid-windows {settings.valid_windows} gives no standard error: give at least 2")
    if settings.vocabulary < 0:
        raise SettingError(f"--vocabulary {settings.vocabulary} is negative: give 0 for as many as there are tokens")


class LanguageModelling:
    """The next token of a text.

    Args:
        settings: of the model.
        corpus: what is learnt.

    Raises:
        SettingError: for a text too short, more tokens than --vocabulary, or a width that no head fits.
    """

    unit = "tokens"

    def __init__(self, settings: Language, corpus: Corpus) -> None:
        from rankdecay.lab.experiments.attention.text import check_length, even_windows
        from rankdecay.lab.session.gpt import GPTConfig

        check_length(corpus, settings.context)
        if 0 < settings.vocabulary < corpus.vocabulary:
            raise SettingError(
                f"--vocabulary {settings.vocabulary} is less than the {corpus.vocabulary} tokens there are: "
                f"give 0, or at least {corpus.vocabulary}"
            )
        self.corpus, self.context = corpus, settings.context
        make = partial(
            GPTConfig,
            settings.vocabulary or corpus.vocabulary,
            settings.context,
            settings.width,
            settings.depth,
            settings.heads,
            settings.mlp_width,
            settings.positions,
        )
        self.configs = {qk_norm: make(qk_norm) for qk_norm in (False, True)}
        self._validation = even_windows(corpus.validation, settings.context, settings.valid_windows)
        self._chunk = max(1, settings.batch_size // settings.accumulate)  # windows that the memory surely holds

    def model(self, seed: int, qk_norm: bool) -> GPT:
        """A GPT; from one seed it begins the same with and without QK-norm."""
        from rankdecay.lab.session.gpt import GPT

        return GPT(self.configs[qk_norm], seed)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Windows from anywhere in the text, (size, context + 1)."""
        from rankdecay.lab.experiments.attention.text import random_windows

        return (random_windows(self.corpus.training, self.context, size, seed, step),)

    def size(self, batch: Batch) -> int:
        """The number of tokens that are predicted."""
        return batch[0][:, 1:].numel()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The cross-entropy of every next token, in nats."""
        from torch.nn import functional as F

        windows = batch[0]
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def evaluate(self, model: nn.Module, device: str) -> Quality:
        """The loss on the validation text."""
        import torch
        from torch.nn import functional as F

        from rankdecay.lab.session.session import judged

        losses = []
        for windows in self._validation.to(device).split(self._chunk):
            logits = model(windows[:, :-1])
            losses.append(F.cross_entropy(logits.mT.float(), windows[:, 1:], reduction="none").mean(1))
        return judged(torch.cat(losses))

    def facts(self) -> Record:
        """What a summary says of the text and the model."""
        corpus, config = self.corpus, self.configs[False]
        return {
            "text": {
                "name": corpus.name,
                "tokenizer": corpus.tokenizer,
                "sha1": corpus.sha1,
                "training_tokens": len(corpus.training),
                "validation_tokens": len(corpus.validation),
                "evaluated_tokens": self._validation[:, 1:].numel(),
            },
            "model": {
                "vocabulary": config.vocabulary,
                "parameters": sum(parameter.numel() for parameter in self.model(0, False).parameters()),
            },
        }


def run(settings: Language, command: str) -> Record:
    """Runs the experiment, or continues it, and returns its summary.

    Args:
        settings: what to run.
        command: how to repeat it, for the report.

    Raises:
        SettingError: if the settings, the text or the output directory cannot work, or a run diverges.
    """
    check(settings)

    def problem() -> LanguageModelling:
        from rankdecay.lab.experiments.attention import text

        return LanguageModelling(
            settings,
            text.load(
                text=settings.text,
                dataset=settings.dataset,
                tokenizer=settings.tokenizer,
                share=settings.valid_share,
            ),
        )

    experiment = Experiment(
        "language",
        problem,
        save=_save,
        facts=LanguageModelling.facts,
        fingerprint=lambda problem: {"text_sha1": problem.corpus.sha1},
        notices=_notices(settings),
        parallel=settings.parallel,
        check=lambda layout: layout.check(settings.heads, settings.mlp_width),
    )
    return attention_decay.run(settings, experiment, command)


def _save(model: nn.Module, directory: Path) -> None:
    from rankdecay.lab.session.export import save_checkpoint

    save_checkpoint(model, directory)  # pyright: ignore[reportArgumentType] - ours is a GPT


def _notices(settings: Language) -> tuple[str, ...]:
    """What to say before training of models that transformers cannot load with AutoModelForCausalLM."""
    if settings.save == "none" or settings.positions == "rotary":
        return ()
    kinds = {
        "off": "are ImageGPT's: load them with transformers.ImageGPTForCausalImageModeling",
        "on": "with QK-norm have no class in transformers: rankdecay inspect reads them",
        "both": "are ImageGPT's without QK-norm; with it they have no class in transformers, and rankdecay inspect "
        "reads them",
    }
    return (f"the saved models of --positions learned {kinds[settings.qk_norm]}",)
