"""Separate decay for the attention of a language model: what it does to rank, and what rank costs in quality.

A GPT learns a real text under every arm, strength of the decay of attention and decay of the MLPs, from the same seeds
and on the same batches. The text needs no download: by default the bytes of Python's own standard library. The decays
join AdamW as they would in anyone's script, by `rd.param_groups` and `rd.attach`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.language import text
from rankdecay.lab.experiments.attention.language.settings import PRESETS, Language, check
from rankdecay.lab.experiments.attention.runs import Command, make_experiment
from rankdecay.lab.session.export import save_checkpoint
from rankdecay.lab.session.gpt import GPT, GPTConfig
from rankdecay.lab.session.session import Batch, Quality, summarise_losses
from rankdecay.lab.settings import Record, subset

OF_A_MODEL = ("context", "width", "depth", "heads", "mlp_width", "positions")


class LanguageModelling:
    """Prediction of the next token of a text.

    Args:
        settings: of the model.
        corpus: what is learnt.

    Raises:
        SettingError: For a text too short, more tokens than --vocabulary, or a width that no head fits.
    """

    unit = "tokens"

    def __init__(self, settings: Language, corpus: text.Corpus) -> None:
        text.check_length(corpus, settings.context)
        if 0 < settings.vocabulary < corpus.vocabulary:
            raise SettingError(
                f"--vocabulary {settings.vocabulary} is less than the {corpus.vocabulary} tokens there are: "
                f"give 0, or at least {corpus.vocabulary}"
            )
        self.corpus, self.context = corpus, settings.context
        self.config = GPTConfig(settings.vocabulary or corpus.vocabulary, **subset(settings, *OF_A_MODEL))
        self._validation = text.even_windows(corpus.validation, settings.context, settings.valid_windows)
        self._chunk = max(1, settings.batch_size // settings.accumulate)  # windows that fit into memory, as in training

    def model(self, seed: int, qk_norm: bool, **changes: Any) -> GPT:
        """Return a fresh GPT; with and without QK-norm a seed gives the same weights."""
        return GPT(replace(self.config, qk_norm=qk_norm, **changes), seed)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Draw windows from anywhere in the text, (size, context + 1)."""
        return (text.random_windows(self.corpus.training, self.context, size, seed, step),)

    def size(self, batch: Batch) -> int:
        """Count the tokens that are predicted."""
        return batch[0][:, 1:].numel()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of every next token, in nats."""
        windows = batch[0]
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def evaluate(self, model: nn.Module, device: str) -> Quality:
        """Loss on the validation text."""
        losses = []
        for windows in self._validation.to(device).split(self._chunk):
            logits = model(windows[:, :-1])
            losses.append(F.cross_entropy(logits.mT.float(), windows[:, 1:], reduction="none").mean(1))
        return summarise_losses(torch.cat(losses))

    def facts(self) -> Record:
        """Facts about the text and the model, for the summary."""
        corpus, parameters = self.corpus, sum(weights.numel() for weights in self.model(0, False).parameters())
        return {
            "text": {
                "name": corpus.name,
                "tokenizer": corpus.tokenizer,
                "sha1": corpus.sha1,
                "training_tokens": len(corpus.training),
                "validation_tokens": len(corpus.validation),
                "evaluated_tokens": self._validation[:, 1:].numel(),
            },
            "model": {"vocabulary": self.config.vocabulary, "parameters": parameters},
        }


def _problem(settings: Language) -> LanguageModelling:
    source = subset(settings, "text", "dataset", "tokenizer")
    return LanguageModelling(settings, text.load(**source, share=settings.valid_share))


def _notices(settings: Language) -> tuple[str, ...]:
    """Say, before training, of models that transformers cannot load with AutoModelForCausalLM."""
    if settings.save == "none" or settings.positions == "rotary":
        return ()
    kinds = {
        "off": "are ImageGPT's: load them with transformers.ImageGPTForCausalImageModeling",
        "on": "with QK-norm have no class in transformers: rankdecay inspect reads them",
        "both": "are ImageGPT's without QK-norm; with it they have no class in transformers, and rankdecay inspect "
        "reads them",
    }
    return (f"the saved models of --positions learned {kinds[settings.qk_norm]}",)


EXPERIMENT = make_experiment(
    Command(
        "language",
        PRESETS,
        check,
        _problem,
        "tokens",
        save=save_checkpoint,
        facts=LanguageModelling.facts,
        fingerprint=lambda problem: {"text_sha1": problem.corpus.sha1},
        notices=_notices,
        check_layout=lambda settings, layout: layout.check(settings.heads, settings.mlp_width),
    )
)
