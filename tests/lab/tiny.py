"""A problem of a few milliseconds a step: a tiny GPT learns to repeat what it has read."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rankdecay.lab.experiment import Record, run
from rankdecay.lab.experiments.attention.runs import Command, make_experiment
from rankdecay.lab.experiments.attention.settings import AttentionDecay, check_shared
from rankdecay.lab.session.gpt import GPT, GPTConfig
from rankdecay.lab.session.session import Quality, summarise_losses

VOCABULARY, HALF = 16, 5


class Repeat:
    """Sequences whose second half is the first.

    Args:
        depth: blocks of the model.
        breaks: a seed and the step from which its batches have a NaN.
        stops: number of batches after which training is interrupted.
    """

    unit = "tokens"

    def __init__(self, depth: int = 2, breaks: tuple[int, int] | None = None, stops: int | None = None) -> None:
        self.depth, self.breaks, self.stops = depth, breaks, stops
        self.asked: list[tuple[int, int]] = []  # seed and step of every batch for training

    def model(self, seed: int, qk_norm: bool) -> GPT:
        return GPT(GPTConfig(VOCABULARY, 2 * HALF, 16, self.depth, 2, 16, qk_norm=qk_norm), seed)

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, ...]:
        if len(self.asked) == self.stops:
            raise KeyboardInterrupt
        self.asked.append((seed, step))
        broken = self.breaks is not None and seed == self.breaks[0] and step >= self.breaks[1]
        return sequences(1000 * seed + step, size), torch.full((size,), torch.nan if broken else 1.0)

    def size(self, batch: tuple[Tensor, ...]) -> int:
        return batch[0].numel()

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        tokens, weights = batch
        logits = model(tokens[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (losses.view(len(tokens), -1).mean(1) * weights).mean()

    def evaluate(self, model: nn.Module, device: str) -> Quality:
        pieces = [sequences(10_000_000 + i, 8) for i in range(3)]
        losses = [self.loss(model, (tokens, torch.ones(8))).item() for tokens in pieces]
        right = [(model(t[:, :-1]).argmax(-1) == t[:, 1:])[:, HALF:].float().mean().item() for t in pieces]
        return summarise_losses(losses, sum(right) / len(right))


def sequences(seed: int, size: int) -> Tensor:
    half = torch.randint(VOCABULARY, (size, HALF), generator=torch.Generator().manual_seed(seed))
    return torch.cat([half, half], 1)


def save(model: nn.Module, path: Path) -> None:
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, path / "model.safetensors")


def settings(out: Path, **changes: Any) -> AttentionDecay:
    given: dict[str, Any] = {
        "steps": 24, "evaluate_every": 6, "warmup": 4, "batch_size": 8, "lr": 1e-2, "out": out, "device": "cpu",
        "arms": ("low_rank",), "strengths": ("low_rank=2",),
    }  # fmt: skip
    return AttentionDecay(**given | changes)


def make(out: Path, problem: Repeat | None = None, command: str = "rankdecay tiny", **changes: Any) -> Record:
    """Runs an experiment in a directory, or goes on with it."""
    problem = Repeat() if problem is None else problem
    experiment = make_experiment(
        Command("language", {"default": AttentionDecay()}, check, lambda _: problem, "tokens", save=save)
    )
    return run(experiment, settings(out, **changes), command)


def check(settings: AttentionDecay) -> AttentionDecay:
    check_shared(settings)
    return settings
