"""Many training runs as one batched computation.

A *member* is one run. Members share the shape of their network, the batch size and the step; learning rate, decays,
seed, data set and initial scale are their own. Each member's parameters are one row of a single (members, parameters)
tensor, so an optimizer step is a handful of in-place operations whatever the number of members.

Nothing a member does depends on its neighbours: initial weights, splits and batches are drawn from the member's seed
(and the step) alone. Member i of M therefore follows the trajectory it would follow alone, and a resumed run needs no
stored random state.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankdecay.decay.policy import Decay, Frobenius, LowRank
from rankdecay.lab.models import transformer
from rankdecay.lab.models.transformer import TransformerConfig, initial_parameters
from rankdecay.lab.tasks.base import Dataset, random_generator
from rankdecay.linalg import shrink
from rankdecay.linalg.factored import factored_singular_values
from rankdecay.spectrum import Spectrum, spectrum

Precision = Literal["float32", "mixed", "float64"]
MEASURED_TRAIN = 1024  # training examples an evaluation looks at: enough to see memorisation, a third of the time
EVALUATION_ROWS = {"cpu": 512, "cuda": 8192}  # examples per member and forward pass: what fits the cache, or the launch


@dataclass(frozen=True)
class Member:
    """One training run.

    Attributes:
        arm, seed: its name; the seed decides initial weights and batches.
        decay: of queries and keys; ``None`` for none.
        rest_decay: decoupled L2 on every other parameter (AdamW's ``weight_decay``).
        lr: learning rate.
        initial_scale: multiplies the initial matrices.
        uniform_attention: queries and keys start at zero, where their gradient is exactly zero: they stay there.
    """

    arm: str
    seed: int
    decay: Decay | None
    rest_decay: float
    lr: float = 1e-3
    initial_scale: float = 1.0
    uniform_attention: bool = False


@dataclass(frozen=True)
class Training:
    """What all members of an ensemble share beside the shape of the network."""

    batch_size: int = 512
    precision: Precision = "float32"
    device: str = "cpu"
    compile: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def compiler_available(device: str) -> bool:
    """Whether `torch.compile` can generate code for ``device`` on this machine."""
    if device.startswith("cuda"):
        from torch.utils._triton import has_triton

        return has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++"))


def adamw_(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    lr: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One AdamW step in place on ``(members, n)`` rows, without its decay; ``grad`` is overwritten.

    ``lr`` is ``(members, 1)``.
    """
    beta1, beta2 = betas
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # Both bias corrections in the step size and ε: two passes over memory less, the same update.
    correction = math.sqrt(1 - beta2**step)
    update = torch.sqrt(square, out=grad).add_(eps * correction)
    torch.div(mean, update, out=update)
    weight.addcmul_(update, lr * (correction / (1 - beta1**step)), value=-1)


class Ensemble:
    """Members of one shape, trained together.

    Args:
        config: shape of the network.
        members: the runs.
        datasets: one per member.
        training: what they share.
    """

    def __init__(
        self, config: TransformerConfig, members: Sequence[Member], datasets: Sequence[Dataset], training: Training
    ) -> None:
        smallest = min(len(data.train_targets) for data in datasets)
        if training.batch_size > smallest:
            raise ValueError(f"batch_size {training.batch_size} exceeds the smallest training set, {smallest} examples")
        self.config, self.training = config, training
        self.members = list(members)
        self.step = 0
        self._datasets = list(datasets)
        self._dtype = torch.float64 if training.precision == "float64" else torch.float32
        self._matmul_dtype = torch.bfloat16 if training.precision == "mixed" else self._dtype
        self._shapes = config.shapes()
        self._query_key_size = 2 * config.depth * config.width**2
        self._weights = self._initial_weights()
        self._mean = torch.zeros_like(self._weights)
        self._square = torch.zeros_like(self._weights)
        self._loss: Callable[..., Tensor] = transformer.loss
        if training.compile and compiler_available(training.device):
            self._loss = torch.compile(transformer.loss, dynamic=False)
        self._bind()

    # --- the members' tensors -----------------------------------------------------------------------------

    def _initial_weights(self) -> Tensor:
        rows = []
        for member in self.members:
            values = initial_parameters(self.config, member.seed, member.initial_scale)
            row = torch.cat([value.flatten() for value in values.values()])
            if member.uniform_attention:
                row[: self._query_key_size] = 0
            rows.append(row)
        return torch.stack(rows).to(self.training.device, self._dtype)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.training.device, dtype=self._dtype)[:, None]

    def _bind(self) -> None:
        """Derives everything that follows from the members and their rows."""
        self.parameters = {}
        start = 0
        for name, shape in self._shapes.items():
            stop = start + math.prod(shape)
            view = self._weights.detach()[:, start:stop].view(len(self.members), *shape)
            self.parameters[name] = view.requires_grad_()
            start = stop
        self._lr = self._column([m.lr for m in self.members])
        l2 = [m.decay.strength if isinstance(m.decay, Frobenius) else 0.0 for m in self.members]
        self._keep_query_key = 1 - self._lr * self._column(l2)
        self._keep_rest = 1 - self._lr * self._column([m.rest_decay for m in self.members])
        groups: dict[LowRank, list[int]] = defaultdict(list)
        for index, member in enumerate(self.members):
            if isinstance(member.decay, LowRank) and member.decay.strength:
                groups[replace(member.decay, strength=0.0)].append(index)
        device = self.training.device
        self._low_rank: list[tuple[LowRank, slice | Tensor, Tensor]] = []
        for policy, rows in groups.items():
            everyone = len(rows) == len(self.members)  # a slice needs no gathered copy
            which = slice(None) if everyone else torch.tensor(rows, device=device)
            self._low_rank.append((policy, which, self._column([self._strength(i) for i in rows])))
        self._grad = torch.empty_like(self._weights)
        self._train_tokens, self._train_targets = self._stacked("train")
        self._test_tokens, self._test_targets = self._stacked("test")

    def _strength(self, index: int) -> float:
        decay = self.members[index].decay
        return decay.strength if decay else 0.0

    def _stacked(self, side: str) -> tuple[Tensor, Tensor]:
        """Tokens and targets of all members, padded to the longest set with target −1."""
        tokens = [getattr(data, f"{side}_tokens") for data in self._datasets]
        targets = [getattr(data, f"{side}_targets") for data in self._datasets]
        longest = max(map(len, targets))
        tokens = np.stack([np.pad(t, ((0, longest - len(t)), (0, 0))) for t in tokens])
        targets = np.stack([np.pad(t, (0, longest - len(t)), constant_values=-1) for t in targets])
        return tuple(torch.from_numpy(a).to(self.training.device) for a in (tokens, targets))  # type: ignore[return-value]

    @property
    def query_key(self) -> Tensor:
        """W_Q and W_K of every member: ``(members, depth, 2, width, width)``, a view."""
        c = self.config
        return self._weights[:, : self._query_key_size].view(-1, c.depth, 2, c.width, c.width)

    # --- training ----------------------------------------------------------------------------------------

    def _batch_indices(self, steps: int) -> Tensor:
        """Rows of the next ``steps`` batches, ``(steps, members, batch)``.

        A member's batches walk through its training set in one random order after another, so every example is used
        equally often. The order of epoch e is drawn from (seed, e): no state to store.
        """
        batch = self.training.batch_size
        start, stop = self.step * batch, (self.step + steps) * batch
        columns = []
        for member, data in zip(self.members, self._datasets, strict=True):
            size = len(data.train_targets)
            epochs = range(start // size, -(-stop // size))
            order = np.concatenate([random_generator(member.seed, "epoch", e).permutation(size) for e in epochs])
            offset = start - epochs[0] * size
            columns.append(order[offset : offset + steps * batch].reshape(steps, batch))
        return torch.from_numpy(np.stack(columns, axis=1)).to(self.training.device)

    def train(self, steps: int) -> None:
        """Trains every member for ``steps`` further steps."""
        member = torch.arange(len(self.members), device=self.training.device)[:, None]
        for rows in self._batch_indices(steps):
            self.step += 1
            tokens, targets = self._train_tokens[member, rows], self._train_targets[member, rows]
            loss = self._loss(self.parameters, tokens, targets, self.config, self._matmul_dtype)
            grads = torch.autograd.grad(loss.sum(), list(self.parameters.values()))
            torch.cat([g.flatten(1) for g in grads], dim=1, out=self._grad)
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        query_key, rest = self._weights.tensor_split([self._query_key_size], dim=1)
        query_key.mul_(self._keep_query_key)
        rest.mul_(self._keep_rest)
        t = self.training
        adamw_(self._weights, self._grad, self._mean, self._square, self._lr, self.step, t.betas, t.eps)
        for policy, rows, strength in self._low_rank:
            if self.step % policy.every == 0:
                self.query_key[rows] = self._decayed(policy, rows, strength, policy.every)

    def _decayed(self, policy: LowRank, rows: slice | Tensor, strength: Tensor, steps: int) -> Tensor:
        """Queries and keys of ``rows`` after ``steps`` steps' worth of decay."""
        stack = self.query_key[rows]
        weight = stack
        if policy.unit == "head":
            weight = stack.unflatten(-2, (self.config.heads, self.config.head_dim))
        ones = [1] * (weight.ndim - 3)
        tau = policy.threshold(weight, self._lr[rows].view(-1, *ones), strength.view(-1, *ones))
        return shrink(weight, steps * tau, policy.rule, smoothing=policy.smoothing).view(stack.shape)

    def retain(self, keep: Sequence[bool]) -> None:
        """Drops the members for which ``keep`` is false; the others go on as if nothing had happened."""
        rows = [i for i, stays in enumerate(keep) if stays]
        self.members = [self.members[i] for i in rows]
        self._datasets = [self._datasets[i] for i in rows]
        self._weights, self._mean, self._square = (t[rows] for t in (self._weights, self._mean, self._square))
        if rows:
            self._bind()

    # --- measuring ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Measures every member on its test set and on the first `MEASURED_TRAIN` examples of its training set.

        Returns:
            One record per member (the keys of ``metrics.jsonl``) and the arrays of a snapshot: spectra, and what the
            last position attends to on the test set.
        """
        attention: list[Tensor] = []
        shown = slice(MEASURED_TRAIN)
        train = self._accuracy_and_loss(self._train_tokens[:, shown], self._train_targets[:, shown])
        test = self._accuracy_and_loss(self._test_tokens, self._test_targets, attention)
        matrices, products = self.singular_values(), self.product_singular_values()
        size, radial = self._decay_geometry()
        norms = self.query_key.norm(dim=(-2, -1)).mean(1)  # (members, 2)
        columns = {
            "train_accuracy": train[0],
            "train_loss": train[1],
            "test_accuracy": test[0],
            "test_loss": test[1],
            "stable_rank": matrices.stable_rank.flatten(1).mean(1),
            "effective_rank": matrices.effective_rank.flatten(1).mean(1),
            "product_stable_rank": products.stable_rank.flatten(1).mean(1),
            "product_effective_rank": products.effective_rank.flatten(1).mean(1),
            "query_norm": norms[:, 0],
            "key_norm": norms[:, 1],
            "rest_norm": self._weights[:, self._query_key_size :].norm(dim=1),
            "decay_size": size,
            "radial_share": radial,
            "tangential_share": 1 - radial,
        }
        values = {name: column.tolist() for name, column in columns.items()}
        records = [
            {"step": self.step, "arm": member.arm, "seed": member.seed}
            | {name: column[i] if math.isfinite(column[i]) else None for name, column in values.items()}
            for i, member in enumerate(self.members)
        ]
        data = self._datasets[0]
        arrays = {
            "arms": np.array([m.arm for m in self.members]),
            "seeds": np.array([m.seed for m in self.members]),
            "singular_values": matrices.singular_values.float().cpu().numpy(),
            "product": products.singular_values.float().cpu().numpy(),
            "attention": self._attention_maps(torch.cat(attention, 2)).float().cpu().numpy(),
            "groups": np.array(list(data.groups.values())),
            "positions": np.array(data.positions),
        }
        return records, arrays

    def _attention_maps(self, weights: Tensor) -> Tensor:
        """Mean of ``weights`` (members, depth, batch, heads, positions) over each group of last tokens."""
        last, valid = self._test_tokens[:, :, -1], self._test_targets >= 0
        groups = torch.tensor(list(self._datasets[0].groups), device=last.device)
        chosen = ((last[:, None] == groups[:, None]) & valid[:, None]).double()  # (members, groups, batch)
        share = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
        return torch.einsum("mgb,mlbhp->mlhgp", share, weights.double())

    def singular_values(self) -> Spectrum:
        """Spectra of W_Q and W_K, ``(members, depth, 2, width)``."""
        return spectrum(self.query_key)

    def product_singular_values(self) -> Spectrum:
        """Spectra of W_Q,hᵀ W_K,h, ``(members, depth, heads, head_dim)``."""
        heads = self.query_key.unflatten(-2, (self.config.heads, self.config.head_dim))
        query, key = heads.unbind(2)  # (members, depth, heads, head_dim, width)
        return Spectrum(factored_singular_values(query.mT, key.mT))

    def _accuracy_and_loss(
        self, tokens: Tensor, targets: Tensor, attention: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means over each member's examples; the parts' attention (members, depth, rows, …) goes to ``attention``."""
        correct = torch.zeros(len(self.members), device=tokens.device, dtype=torch.float64)
        total_loss = torch.zeros_like(correct)
        rows = EVALUATION_ROWS[tokens.device.type]
        for part, answer in zip(tokens.split(rows, 1), targets.split(rows, 1), strict=True):
            seen: list[Tensor] | None = None if attention is None else []
            logits = transformer.forward(self.parameters, part, self.config, self._matmul_dtype, seen)
            if attention is not None and seen is not None:
                attention.append(torch.stack(seen, 1))
            correct += (logits.argmax(-1) == answer).sum(1)
            losses = F.cross_entropy(logits.flatten(0, 1), answer.flatten(), ignore_index=-1, reduction="none")
            total_loss += losses.view(answer.shape).sum(1, dtype=torch.float64)
        count = (targets >= 0).sum(1)
        return correct / count, total_loss / count

    def _decay_geometry(self) -> tuple[Tensor, Tensor]:
        """‖D‖/‖W‖ of one decay step D on queries and keys, and the share of ‖D‖² along W; NaN without decay."""
        size = torch.full((len(self.members),), math.nan, device=self.training.device, dtype=torch.float64)
        radial = size.clone()
        for index, member in enumerate(self.members):
            if isinstance(member.decay, Frobenius) and member.decay.strength:
                size[index], radial[index] = member.lr * member.decay.strength, 1.0
        for policy, rows, strength in self._low_rank:
            weight = self.query_key[rows].double()
            step = weight - self._decayed(policy, rows, strength, 1).double()
            norm, length = weight.norm(dim=(-2, -1)), step.norm(dim=(-2, -1))  # (rows, depth, 2)
            cosine = (weight * step).sum((-2, -1)) / (norm * length)
            size[rows] = (length / norm).flatten(1).mean(1)
            radial[rows] = cosine.square().flatten(1).mean(1)
        return size, radial

    # --- resuming ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs beside the step and the list of members left."""
        return {"weights": self._weights, "mean": self._mean, "square": self._square}

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Continues from a stored state; the ensemble must have the same members.

        Raises:
            ValueError: if the stored tensors do not fit.
        """
        for name, own in self.state().items():
            if state[name].shape != own.shape or state[name].dtype != own.dtype:
                raise ValueError(
                    f"stored {name} is {tuple(state[name].shape)} {state[name].dtype}, "
                    f"expected {tuple(own.shape)} {own.dtype}: the checkpoint belongs to another ensemble"
                )
            own.copy_(state[name])
        self.step = step
