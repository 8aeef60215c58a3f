"""Decay of attention in a two-layer attention-only transformer that learns associative recall.

A sequence is ``[x₁, y₁, …, x_N, y_N, x_j, x_k, …]``: N distinct keys, each with a value beside it, and some of the keys
again; the answer to each of these queries is its value. The paper has one query. A query says nothing of another, so
each of several is the paper's question, and it is answers in a step that count: twenty queries in batches of 64, or one
in batches of 1,024, are learnt in hundreds of steps under L2, one in batches of 64 not from a million sequences
(`docs/findings/recall_language_vision.md`). The first layer must copy each key to the value beside
it, the second find the query among the copies. There is nothing but attention in the blocks, no biases, and positions
are learned and added to the tokens, so a head is exactly its two products W_KᵀW_Q and W_O W_V: the setting of Figure 2
of Kobayashi, Akram and von Oswald, "Weight decay induces low-rank attention layers" (NeurIPS 2024). Every sequence is
fresh; a share of the training answers is random, which gives the decay something to hold against.

The paper does not give its width, heads, numbers of keys and values, learning rate and steps: those here are ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankdecay.lab.experiments.attention.recall.settings import PRESETS, Recall, check
from rankdecay.lab.experiments.attention.runs import Command, make_experiment
from rankdecay.lab.session.export import save_checkpoint
from rankdecay.lab.session.gpt import GPT, GPTConfig
from rankdecay.lab.session.session import Batch, Quality, summarise_losses
from rankdecay.lab.settings import subset
from rankdecay.lab.tasks.base import random_generator

DEPTH = 2  # one layer to copy, one to find
CHUNK = 256  # validation sequences at a time
OF_A_TASK = ("pairs", "queries", "keys", "values")


def draw(
    generator: np.random.Generator, count: int, *, pairs: int, queries: int, keys: int, values: int, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw sequences of the task and their answers.

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
    rows = np.arange(count)[:, None]
    chosen = generator.random((count, keys)).argsort(axis=1)[:, :pairs]  # distinct keys in any order
    beside = keys + generator.integers(values, size=(count, pairs))
    asked = generator.random((count, pairs)).argsort(axis=1)[:, :queries]
    tokens = np.concatenate([np.stack([chosen, beside], axis=2).reshape(count, 2 * pairs), chosen[rows, asked]], axis=1)
    instead = keys + generator.integers(values, size=(count, queries))
    answers = np.where(generator.random((count, queries)) < noise, instead, beside[rows, asked])
    return tokens, answers


class RecallProblem:
    """The task as a `Problem`.

    Args:
        settings: of the experiment.
    """

    unit = "sequences"

    def __init__(self, settings: Recall) -> None:
        self.settings = settings
        self._valid = self._draw(0, "valid", settings.valid_sequences, 0.0)  # the same for every seed

    def model(self, seed: int, qk_norm: bool) -> GPT:
        """Return a fresh network."""
        given = self.settings
        tokens, context = given.keys + given.values, 2 * given.pairs + given.queries
        initial = given.initial or given.width**-0.5  # from 0.02 attention would be uniform for thousands of steps
        shape = tokens, context, given.width, DEPTH, given.heads, 0  # no MLP
        return GPT(GPTConfig(*shape, given.positions, qk_norm, initial), seed)

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Draw sequences, some of their answers wrong."""
        return self._draw(seed, "train", size, self.settings.label_noise, step)

    def size(self, batch: Batch) -> int:
        """Count the sequences of a batch."""
        return len(batch[0])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the answers, over all tokens."""
        tokens, answers = batch
        return F.cross_entropy(model(tokens)[:, -answers.shape[1] :].flatten(0, 1).float(), answers.flatten())

    def evaluate(self, model: nn.Module, device: str) -> Quality:
        """Loss and accuracy without noise."""
        losses, right = [], 0
        for tokens, answers in zip(*(part.to(device).split(CHUNK) for part in self._valid), strict=True):
            logits = model(tokens)[:, -answers.shape[1] :].float()
            losses.append(F.cross_entropy(logits.mT, answers, reduction="none").mean(1))
            right += int((logits.argmax(-1) == answers).sum())
        return summarise_losses(torch.cat(losses), right / self._valid[1].numel())

    def _draw(self, seed: int, purpose: str, count: int, noise: float, *index: int) -> Batch:
        task = subset(self.settings, *OF_A_TASK)
        drawn = draw(random_generator(seed, f"recall {purpose}", *index), count, noise=noise, **task)
        return tuple(torch.from_numpy(part) for part in drawn)


EXPERIMENT = make_experiment(
    Command("recall", PRESETS, check, RecallProblem, "sequences", has_mlp=False, save=save_checkpoint)
)
