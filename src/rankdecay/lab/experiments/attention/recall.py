"""What a decay of attention does to a two-layer attention-only transformer that learns associative recall.

A sequence is ``[x₁, y₁, …, x_N, y_N, x_j, x_k, …]``: N distinct keys, each with a value beside it, and some of the keys
again; the answer to each of these queries is its value. The paper has one query; asked for one in each sequence, our
networks still guessed one of the values present after 3000 steps, with twenty they learn in hundreds (findings, section
11). A query says nothing of another, so each is the paper's question. The first layer must copy each key to the value
beside it, the second find the query among the copies. There is nothing but attention in the blocks, no biases, and
positions are learned and added to the tokens, so a head is exactly its two products W_KᵀW_Q and W_O W_V: the setting of
Figure 2 of Kobayashi, Akram and von Oswald, "Weight decay induces low-rank attention layers" (NeurIPS 2024). Every
sequence is fresh; a share of the training answers is random, which gives the decay something to hold against.

The paper does not give its width, heads, numbers of keys and values, learning rate and steps: those here are ours.

Importing this module imports neither torch nor numpy: the command line reads its settings for ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention import experiment as attention_decay
from rankdecay.lab.experiments.attention.experiment import AttentionDecay, Experiment, QKNorm, Record, print_summary
from rankdecay.lab.legacy import check_counts, check_numbers, check_width

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from rankdecay.lab.session.gpt import GPT
    from rankdecay.lab.session.session import Batch, Quality

__all__ = ["Recall", "print_summary", "run"]

DEPTH = 2  # one layer to copy, one to find
CHUNK = 256  # validation sequences at a time


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
    """Keys asked for in each sequence, each once; the paper's 1 takes many more steps."""
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
    """Strengths of an arm, for example l2=0,0.1,1 low_rank=0.3,3; an arm that is not named has its own."""
    qk_norm: QKNorm = "both"
    """RMSNorm on the queries and keys of each head."""
    steps: int = 1000
    """Training steps of each run."""
    lr: float = 3e-3
    """Peak learning rate: a linear rise, then a cosine down to a tenth."""
    warmup: int = 50
    """Steps of the rise."""
    batch_size: int = 64
    """Sequences per step, over all processes and accumulated parts."""
    evaluate_every: int = 50
    """Steps between evaluations."""
    out: Path = Path("runs/recall")
    """Where results go; a run that was interrupted continues there."""


PRESETS = {"default": Recall(), "standard": Recall(preset="standard", strengths=(), out=Path("runs/recall-standard"))}


def check(settings: Recall) -> None:
    """Raises a `SettingError` for settings that cannot work, before anything is built or written."""
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


def draw(
    generator: np.random.Generator, count: int, *, pairs: int, queries: int, keys: int, values: int, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of the task and their answers.

    Args:
        generator: of everything random.
        count: number of sequences.
        pairs: in each.
        queries: keys of the pairs that are asked for after them, each once.
        keys: number of distinct keys: tokens 0, 1, …
        values: number of distinct values: the tokens after the keys.
        noise: share of the answers that is any value at random.

    Returns:
        Tokens ``(count, 2 · pairs + queries)`` and the answers of the queries, ``(count, queries)``, both int64.
    """
    import numpy as np

    rows = np.arange(count)[:, None]
    chosen = generator.random((count, keys)).argsort(axis=1)[:, :pairs]  # distinct keys in any order
    beside = keys + generator.integers(values, size=(count, pairs))
    asked = generator.random((count, pairs)).argsort(axis=1)[:, :queries]
    tokens = np.concatenate([np.stack([chosen, beside], axis=2).reshape(count, 2 * pairs), chosen[rows, asked]], axis=1)
    instead = keys + generator.integers(values, size=(count, queries))
    answers = np.where(generator.random((count, queries)) < noise, instead, beside[rows, asked])
    return tokens, answers


class RecallProblem:
    """The task as `lab.training` wants it.

    Args:
        settings: of the experiment.
    """

    unit = "sequences"

    def __init__(self, settings: Recall) -> None:
        self.settings = settings
        self._valid = self._draw(0, "valid", settings.valid_sequences, 0.0)  # the same for every seed

    def model(self, seed: int, qk_norm: bool) -> GPT:
        """A fresh network."""
        from rankdecay.lab.session.gpt import GPT, GPTConfig

        settings = self.settings
        config = GPTConfig(
            settings.keys + settings.values,
            2 * settings.pairs + settings.queries,
            settings.width,
            DEPTH,
            settings.heads,
            mlp_width=0,
            positions=settings.positions,
            qk_norm=qk_norm,
            # from the usual 0.02 attention would be uniform for thousands of steps
            initial=settings.initial or settings.width**-0.5,
        )
        return GPT(config, seed)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Fresh sequences, some of their answers wrong."""
        return self._draw(seed, "train", size, self.settings.label_noise, step)

    def size(self, batch: Batch) -> int:
        """How many sequences a batch has."""
        return len(batch[0])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the answers, over all tokens."""
        from torch.nn import functional as F

        tokens, answers = batch
        return F.cross_entropy(model(tokens)[:, -answers.shape[1] :].flatten(0, 1).float(), answers.flatten())

    def evaluate(self, model: nn.Module, device: str) -> Quality:
        """Loss and accuracy without noise."""
        import torch
        from torch.nn import functional as F

        from rankdecay.lab.session.session import judged

        losses, right = [], 0
        for tokens, answers in zip(*(part.to(device).split(CHUNK) for part in self._valid), strict=True):
            logits = model(tokens)[:, -answers.shape[1] :].float()
            losses.append(F.cross_entropy(logits.mT, answers, reduction="none").mean(1))
            right += int((logits.argmax(-1) == answers).sum())
        return judged(torch.cat(losses), right / self._valid[1].numel())

    def _draw(self, seed: int, purpose: str, count: int, noise: float, *index: int) -> Batch:
        import torch

        from rankdecay.lab.tasks.base import random_generator

        settings = self.settings
        drawn = draw(
            random_generator(seed, f"recall {purpose}", *index),
            count,
            pairs=settings.pairs,
            queries=settings.queries,
            keys=settings.keys,
            values=settings.values,
            noise=noise,
        )
        return tuple(torch.from_numpy(part) for part in drawn)


def run(settings: Recall, command: str) -> Record:
    """Runs the experiment, or continues it, and returns its summary.

    Args:
        settings: what to run.
        command: how to repeat it, for the report.

    Raises:
        SettingError: if the settings or the output directory cannot work, or a run diverges.
    """
    check(settings)
    experiment = Experiment("recall", lambda: RecallProblem(settings), has_mlp=False, save=_save)
    return attention_decay.run(settings, experiment, command)


def _save(model: nn.Module, directory: Path) -> None:
    from rankdecay.lab.session.export import save_checkpoint
    from rankdecay.lab.session.gpt import GPT

    assert isinstance(model, GPT)
    save_checkpoint(model, directory)
