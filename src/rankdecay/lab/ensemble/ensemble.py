"""Many training runs as one batched computation.

A *member* is one run. Members share the shape of their network and the batch size; learning rate, decays, seed, data
set and initial scale are their own, and so is the step each has reached: a member may leave, and another take its
place, at any time. Each member's parameters are one row of a single (members, parameters) tensor, so an optimizer step
is a handful of in-place operations whatever the number of members.

Nothing a member does depends on its neighbours: initial weights, splits and batches are drawn from the member's seed
(and its step) alone. Member i of M therefore follows the trajectory it would follow alone, and a resumed run needs no
stored random state.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankdecay.decay.policy import Frobenius, OfMatrix
from rankdecay.lab.ensemble import transformer
from rankdecay.lab.ensemble.accelerators import Accelerator, Moment
from rankdecay.lab.ensemble.control import Part, above_rank, truncated
from rankdecay.lab.ensemble.members import STATE, Member, State, Training
from rankdecay.lab.ensemble.rows import Group, Rows
from rankdecay.lab.ensemble.transformer import TransformerConfig, initial_parameters
from rankdecay.lab.machine import compiled, compiler_available
from rankdecay.lab.tasks.base import Dataset, random_generator
from rankdecay.linalg.factored import factored_singular_values
from rankdecay.linalg.threshold import shrink_by, towards
from rankdecay.spectrum import Spectrum, spectrum

MEASURED_TRAIN = 1024  # training examples an evaluation looks at: enough to see memorisation, a third of the time
STEPS_BETWEEN_CHECKS = 10
ROTATION_STEPS = 20  # over which an evaluation says how far queries and keys have turned
BLOCK_MATRICES = ("value", "output", "mlp_in", "mlp_out")
EVALUATION_ROWS = {"cpu": 512, "cuda": 8192}  # examples per member and forward pass: what fits the cache, or the launch


class Ensemble:
    """Members of one shape, trained together.

    Args:
        config: shape of the network.
        members: the runs.
        datasets: one per member.
        training: what they share.
        paths: see `admit`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        members: Sequence[Member],
        datasets: Sequence[Dataset],
        training: Training,
        paths: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.config, self.training = config, training
        self.members: list[Member] = []
        self.steps: list[int] = []  # that each member has trained
        self._datasets: list[Dataset] = []
        self._acts: list[bool] = []  # whether its schedule lets each member's decay act
        self._dtype = torch.float64 if training.precision == "float64" else torch.float32
        self._matmul_dtype = torch.bfloat16 if training.precision == "mixed" else self._dtype
        self._shapes = config.shapes()
        self._query_key_size = 2 * config.depth * config.width**2
        self._block_names = [name for name in self._shapes if name.split(".")[0] in BLOCK_MATRICES]
        size = sum(math.prod(shape) for shape in self._shapes.values())
        self._weights = torch.empty(0, size, device=training.device, dtype=self._dtype)
        self._mean, self._square = self._weights.clone(), self._weights.clone()
        self._memory: list[Tensor] = []  # of each member's accelerator: (rows, parameters)
        self._angular = torch.empty(0, device=training.device, dtype=torch.float64)
        self._angular_after = self._angular.clone()
        self._marked: tuple[Tensor, list[int]] | None = None  # queries and keys of some steps ago, and those steps
        self._paths: list[Tensor | None] = []  # norms that yoked members are given: (steps + 1, depth, 2)
        self._loss: Callable[..., Tensor] = transformer.loss
        if training.compile and compiler_available(training.device):
            self._loss = compiled(transformer.loss, dynamic=False)
        self.admit(members, datasets, paths)

    # --- the members' tensors -----------------------------------------------------------------------------

    def admit(
        self, members: Sequence[Member], datasets: Sequence[Dataset], paths: Sequence[Tensor | None] | None = None
    ) -> None:
        """Add members at step 0; the others go on as if nothing had happened.

        Args:
            members: the new ones.
            datasets: one for each; all of an ensemble have a validation set, or none.
            paths: of a yoked member, the norms of its matrices at every step from 0 on, ``(steps + 1, depth, 2)``
                (`rankdecay.lab.ensemble.yoked.norm_paths`).

        Raises:
            ValueError: If a training set is smaller than a batch, a yoked member has no path, or a validation set is
                missing.
        """
        paths = [None] * len(members) if paths is None else paths
        for member, path in zip(members, paths, strict=True):
            if (member.control.yoked is None) != (path is None):
                raise ValueError(f"{member.arm} needs a path of the norm exactly if it is yoked: see norm_paths")
        if len({data.validation_targets is None for data in (*self._datasets, *datasets)}) > 1:
            raise ValueError("some members have a validation set and others none: give it to all, or to none")
        smallest = min((len(data.train_targets) for data in datasets), default=self.training.batch_size)
        if self.training.batch_size > smallest:
            raise ValueError(
                f"batch_size {self.training.batch_size} exceeds the smallest training set, {smallest} examples"
            )
        if not members:
            return
        new = torch.stack([self._initial(member, path) for member, path in zip(members, paths, strict=True)])
        self._weights = torch.cat([self._weights, new])
        self._mean = torch.cat([self._mean, torch.zeros_like(new)])
        self._square = torch.cat([self._square, torch.zeros_like(new)])
        accelerators = [member.accelerator or Accelerator() for member in members]
        self._memory += [new.new_zeros(each.rows, new.shape[1]) for each in accelerators]
        unknown = self._angular.new_full((len(members),), math.nan)
        self._angular = torch.cat([self._angular, unknown])
        self._angular_after = torch.cat([self._angular_after, unknown])
        self._marked = None
        self._paths += paths
        self.members += members
        self.steps += [0] * len(members)
        self._acts += [True] * len(members)
        self._datasets += datasets
        self._bind()

    def _initial(self, member: Member, path: Tensor | None) -> Tensor:
        """A member's row of parameters at step 0."""
        values = initial_parameters(self.config, member.seed, member.initial_scale)
        row = torch.cat([value.flatten() for value in values.values()])
        if member.uniform_attention:
            row[: self._query_key_size] = 0
        if member.control.holds_norm:
            matrices = row[: self._query_key_size].view(-1, self.config.width, self.config.width)
            norm = member.control.radius(0) or 0.0 if path is None else path[0].cpu().view(-1, 1, 1)
            matrices *= norm / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-300)
        return row.to(self.training.device, self._dtype)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.training.device, dtype=self._dtype)[:, None]

    def _bind(self) -> None:
        """Rebuild every tensor that is derived from the members and their rows."""
        self.parameters = {name: view.requires_grad_() for name, view in self._by_name(self._weights.detach()).items()}
        self._lr = self._column([m.lr for m in self.members])
        self._step = torch.tensor(self.steps, dtype=torch.float32, device=self.training.device)
        self._query_key_lr = self._lr * self._column([m.control.query_key_lr for m in self.members])
        self._holds_norms = any(m.control.holds_norm for m in self.members)
        self._sharpens = any(m.control.sharpen for m in self.members)
        stable = [m.accelerator is not None and m.accelerator.stable_loss for m in self.members]
        self._stable = torch.tensor(stable, device=self.training.device) if any(stable) else None
        self._bind_schedule()
        self._train_tokens, self._train_targets = self._stacked("train")
        self._test_tokens, self._test_targets = self._stacked("test")
        has_validation = self._datasets[0].validation_targets is not None
        self._validation = self._stacked("validation") if has_validation else None

    def _by_name(self, rows: Tensor) -> dict[str, Tensor]:
        """Views of ``(members, parameters)`` by the name of the parameter, each ``(members, *shape)``."""
        parts = rows.split([math.prod(shape) for shape in self._shapes.values()], 1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _bind_schedule(self) -> None:
        """Rebuild what depends on the decays that act now, and on the ranks they have reached."""
        self._l2 = [m.constant_l2 if acts else 0.0 for m, acts in zip(self.members, self._acts, strict=True)]
        self._bind_rows()
        groups: dict[tuple[int, OfMatrix, Part, bool], dict[int, float]] = defaultdict(dict)  # strengths by member
        for index, (member, acts) in enumerate(zip(self.members, self._acts, strict=True)):
            for order, decay in enumerate(member.decays if acts else ()):
                if not (isinstance(decay, Frobenius) and decay.is_l2):
                    second = decay is member.control.also
                    how: tuple[Part, bool] = (
                        ("whole", False) if second else (member.control.part, member.control.blocks)
                    )
                    groups[order, replace(decay, strength=0.0), *how][index] = decay.strength
        self._groups = [
            Group(*key[1:], list(strengths), self._column(list(strengths.values())))
            for key, strengths in sorted(groups.items(), key=lambda item: item[0][0])
        ]
        self._share: Tensor | None = None  # of its decay that each head block takes: (members, depth, 2, heads)
        if all(m.control.target_rank is None for m in self.members):
            return
        c = self.config
        self._share = self._weights.new_ones(len(self.members), c.depth, 2, c.heads)
        for index, member in enumerate(self.members):
            if member.control.target_rank is not None and member.low_rank:
                matrices = self.query_key[index]
                if member.low_rank.unit == "head":
                    matrices = matrices.unflatten(-2, (c.heads, c.head_dim))
                above = above_rank(matrices, member.control.target_rank)  # (depth, 2) or (depth, 2, heads)
                self._share[index] *= above.view(c.depth, 2, -1)

    def _bind_rows(self) -> None:
        """Rebuild the lists that AdamW steps, equal rates and decays together, and what accelerators are given."""
        alike: dict[tuple[float, float], Rows] = {}
        self._accelerated: list[tuple[int, Accelerator, Tensor]] = []  # with the shares that its decays take
        views = [self._by_name(whole.detach()) for whole in (self._weights, self._mean, self._square)]
        for index, member in enumerate(self.members):
            accelerator = member.accelerator or Accelerator()
            rates = {name: self._rate_and_decay(index, name) for name in self._shapes}
            if member.accelerator is not None:
                shares = [self._weights.new_full((math.prod(self._shapes[n]),), lr * d) for n, (lr, d) in rates.items()]
                self._accelerated.append((index, accelerator, torch.cat(shares)))
            for name, (lr, decay) in rates.items():
                if accelerator.steps(name):
                    continue
                rate = lr, 0.0 if accelerator.decays else decay
                rows = alike.setdefault(rate, Rows(*rate, [], [], [], [], []))
                rows.places.append((index, name))
                rows.steps.append(self._step[index])
                for view, parts in zip(views, (rows.weights, rows.means, rows.squares), strict=True):
                    parts.append(view[name][index])
        self._rows = list(alike.values())

    def _rate_and_decay(self, index: int, name: str) -> tuple[float, float]:
        """The learning rate of a parameter of a member, and its decoupled L2 per unit of that."""
        member = self.members[index]
        lr, decay = member.lr, member.rest_decay
        if name.split(".")[0] in ("query", "key"):
            lr, decay = lr * member.control.query_key_lr, self._l2[index]
        elif name in self._block_names and member.low_rank and member.control.blocks:
            decay = 0.0
        own_rate = member.accelerator.rate(name) if member.accelerator else None
        return (lr, decay) if own_rate is None else (own_rate, lr * decay / own_rate)

    def schedule(self, acts: Sequence[bool]) -> None:
        """Switch each member's decay on or off, and find which matrices are above their target rank now."""
        self._acts = list(acts)
        self._bind_schedule()

    def truncate(self, index: int) -> None:
        """Cut one member's queries and keys to the rank its control names."""
        rank = self.members[index].control.truncate_to
        if rank is not None:
            self.query_key[index] = truncated(self.query_key[index], rank)

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
        columns = []
        for member, step, data in zip(self.members, self.steps, self._datasets, strict=True):
            size = len(data.train_targets)
            start, stop = step * batch, (step + steps) * batch
            epochs = range(start // size, -(-stop // size))
            order = np.concatenate([random_generator(member.seed, "epoch", e).permutation(size) for e in epochs])
            offset = start - epochs[0] * size
            columns.append(order[offset : offset + steps * batch].reshape(steps, batch))
        return torch.from_numpy(np.stack(columns, axis=1)).to(self.training.device)

    def train(self, steps: int) -> None:
        """Train every member for ``steps`` further steps."""
        member = torch.arange(len(self.members), device=self.training.device)[:, None]
        for index, rows in enumerate(self._batch_indices(steps)):
            self.steps = [step + 1 for step in self.steps]
            self._step += 1  # before AdamW's own step, which reads it
            tokens, targets = self._train_tokens[member, rows], self._train_targets[member, rows]
            loss = self._loss(
                self.parameters, tokens, targets, self.config, self._matmul_dtype, self._sharpness(), self._stable
            )
            grads = torch.autograd.grad(loss.sum(), list(self.parameters.values()))
            self._update(dict(zip(self.parameters, grads, strict=True)), measure=index == steps - 1)

    def _sharpness(self) -> Tensor | None:
        """Factor on the scores of every member's attention at this step; None for 1."""
        if not self._sharpens:
            return None
        return self._column([m.control.sharpness(step) for m, step in zip(self.members, self.steps, strict=True)])[:, 0]

    def mark(self) -> None:
        """Remember queries and keys as they are: the next evaluation says how far they have turned since."""
        self._marked = self.query_key.clone(), list(self.steps)

    @torch.no_grad()
    def _update(self, grads: dict[str, Tensor], *, measure: bool) -> None:
        """One step of AdamW and of every decay; ``measure`` its angle, before the decays after it and with them."""
        # The angle is that of the update: a decay of AdamW's own, which does not turn a matrix, makes no difference.
        before = self.query_key.clone() if measure else None
        if self._accelerated:
            grads = self._accelerate(grads)
        for rows in self._rows:
            rows.step(grads, self.training.betas, self.training.eps)
        if before is not None:
            self._angular = _angle(before, self.query_key).flatten(1).mean(1)
        for group in self._groups:
            self._decay(group)
        if self._holds_norms:
            norms, target = self.query_key.norm(dim=(-2, -1), keepdim=True), self._held_norms()
            share = torch.where(target.isnan(), 0, towards(norms, target))
            self.query_key.copy_(shrink_by(self.query_key, share))
        if before is not None:
            self._angular_after = _angle(before, self.query_key).flatten(1).mean(1)

    def _accelerate(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let every accelerator act; return the gradients that AdamW is given."""
        flat = torch.cat([grad.flatten(1) for grad in grads.values()], 1)
        for index, accelerator, shares in self._accelerated:
            vectors = self._weights[index], flat[index], self._mean[index]
            step, beta = self.steps[index], self.training.betas[0]
            accelerator.act(Moment(*vectors, self._memory[index], shares, step, beta, self._shapes))
        return self._by_name(flat)

    def _held_norms(self) -> Tensor:
        """The norm of every matrix after this step, ``(members, depth, 2, 1, 1)``; NaN where it is free."""
        norms = self._weights.new_full((len(self.members), self.config.depth, 2), math.nan)
        for index, (member, path) in enumerate(zip(self.members, self._paths, strict=True)):
            step, radius = self.steps[index], member.control.radius(self.steps[index])
            if path is not None:
                if step >= len(path):
                    raise ValueError(
                        f"{member.arm} is at step {step}, and its path of the norm ends at {len(path) - 1}"
                    )
                norms[index] = path[step]
            elif radius is not None:
                norms[index] = radius
        return norms[..., None, None]

    def _decay(self, group: Group) -> None:
        """Decays those members of a group whose interval has passed."""
        c = self.config
        every = group.every(c.head_dim if group.policy.unit == "head" else c.width)
        due = [place for place, row in enumerate(group.rows) if self.steps[row] % every == 0]
        if not due:
            return
        if len(due) < len(group.rows):
            group = replace(group, rows=[group.rows[place] for place in due], strength=group.strength[due])
        rows = self._which(group.rows)
        self.query_key[rows] = self._decayed(group, every, self.query_key[rows])
        if group.blocks:
            amount = self._amount(group, self._lr[rows], every)
            for name in self._block_names:
                weight = self.parameters[name][rows]
                self.parameters[name][rows] = group.decayed(weight, amount.view(-1, *[1] * (weight.ndim - 3)))

    def _amount(self, group: Group, lr: Tensor, steps: int) -> Tensor:
        """Σ lr · strength over the last steps of each row of a group, (rows, 1); less while it is warming up."""
        policy, now = group.policy, [self.steps[row] for row in group.rows]
        acts = self._column([sum(policy.ramp(max(step - back, 1)) for back in range(steps)) for step in now])
        return group.strength * acts * (lr if policy.lr_coupled else 1.0)

    def _which(self, rows: list[int]) -> slice | Tensor:
        """Index of some members; a slice for all of them, which needs no gathered copy."""
        return slice(None) if len(rows) == len(self.members) else torch.tensor(rows, device=self.training.device)

    def _decayed(self, group: Group, steps: int, stack: Tensor) -> Tensor:
        """``stack``, queries and keys of a group, after ``steps`` steps' worth of decay."""
        policy, rows = group.policy, self._which(group.rows)
        by_head = policy.unit == "head"
        weight = stack.unflatten(-2, (self.config.heads, self.config.head_dim)) if by_head else stack
        amount = self._amount(group, self._query_key_lr[rows], steps).view(-1, *[1] * (weight.ndim - 3))
        if self._share is not None:
            share = self._share[rows]
            amount = amount * (share if by_head else share[..., 0])
        return group.decayed(weight, amount).view(stack.shape)

    def retain(self, keep: Sequence[bool]) -> None:
        """Drop the members for which ``keep`` is false; the others go on as if nothing had happened."""
        rows = [i for i, stays in enumerate(keep) if stays]
        self.members, self.steps = [self.members[i] for i in rows], [self.steps[i] for i in rows]
        self._datasets, self._acts = [self._datasets[i] for i in rows], [self._acts[i] for i in rows]
        self._weights, self._mean, self._square = (t[rows] for t in (self._weights, self._mean, self._square))
        self._angular, self._angular_after = self._angular[rows], self._angular_after[rows]
        self._paths, self._marked = [self._paths[i] for i in rows], None
        self._memory = [self._memory[i] for i in rows]
        if rows:
            self._bind()

    # --- measuring ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Measure every member on its test and validation sets and the first `MEASURED_TRAIN` training examples.

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
            "angular_step": self._angular,
            "angular_step_after": self._angular_after,
            "rotation": self._rotation(),
        }
        if self._validation is not None:
            accuracy, loss = self._accuracy_and_loss(*self._validation)
            columns |= {"validation_accuracy": accuracy, "validation_loss": loss}
        values = {name: column.tolist() for name, column in columns.items()}
        records = [
            {"step": self.steps[i], "arm": member.arm, "seed": member.seed}
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

    def _rotation(self) -> Tensor:
        """The angle since `mark`, if that was `ROTATION_STEPS` ago; else NaN."""
        if self._marked is None or any(
            now - then != ROTATION_STEPS for now, then in zip(self.steps, self._marked[1], strict=True)
        ):
            return torch.full_like(self._angular, math.nan)
        return _angle(self._marked[0], self.query_key).flatten(1).mean(1)

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
            logits = transformer.forward(
                self.parameters, part, self.config, self._matmul_dtype, seen, self._sharpness()
            )
            if attention is not None and seen is not None:
                attention.append(torch.stack(seen, 1))
            correct += (logits.argmax(-1) == answer).sum(1)
            losses = F.cross_entropy(logits.flatten(0, 1), answer.flatten(), ignore_index=-1, reduction="none")
            total_loss += losses.view(answer.shape).sum(1, dtype=torch.float64)
        count = (targets >= 0).sum(1)
        return correct / count, total_loss / count

    def _decay_geometry(self) -> tuple[Tensor, Tensor]:
        """‖D‖/‖W‖ of one step D of all decays of W_Q and W_K, and the share of ‖D‖² along W; NaN while none acts."""
        size = torch.full((len(self.members),), math.nan, device=self.training.device, dtype=torch.float64)
        radial = size.clone()
        after = shrink_by(self.query_key, (self._query_key_lr * self._column(self._l2)).view(-1, 1, 1, 1, 1))
        for group in self._groups:
            rows = self._which(group.rows)
            after[rows] = self._decayed(group, 1, after[rows])
        decayed = sorted({row for group in self._groups for row in group.rows})
        if decayed:
            rows = self._which(decayed)
            weight = self.query_key[rows].double()
            step = weight - after[rows].double()
            norm, length = weight.norm(dim=(-2, -1)), step.norm(dim=(-2, -1))  # (rows, depth, 2)
            cosine = (weight * step).sum((-2, -1)) / (norm * length)
            size[rows] = (length / norm).flatten(1).mean(1)
            radial[rows] = cosine.square().flatten(1).nanmean(1)  # a matrix below its target rank takes no step
        for index, member in enumerate(self.members):
            cautious = member.accelerator is not None and member.accelerator.decays  # which part, is not known here
            if member.constant_l2 and self._acts[index] and index not in decayed and not cautious:
                size[index], radial[index] = member.lr * member.control.query_key_lr * member.constant_l2, 1.0
        return size, radial

    # --- resuming ----------------------------------------------------------------------------------------

    def state(self, index: int) -> State:
        """Copy the state of one member to the CPU."""
        weights, mean, square = (row[index].detach().cpu().clone() for row in (self._weights, self._mean, self._square))
        memory = self._memory[index].cpu().clone() if len(self._memory[index]) else None
        return State(self.steps[index], weights, mean, square, memory)

    def restore(self, index: int, state: State) -> None:
        """Restore the state of one member.

        Raises:
            ValueError: If the state is not that of a member of this shape.
        """
        for name in (*STATE, "memory"):
            row, stored = getattr(self, f"_{name}")[index], getattr(state, name)
            stored = row[:0] if stored is None else stored
            if stored.shape != row.shape or stored.dtype != row.dtype:
                raise ValueError(
                    f"stored {name} are {tuple(stored.shape)} {stored.dtype}, expected {tuple(row.shape)} "
                    f"{row.dtype}: the checkpoint belongs to another ensemble"
                )
            row.copy_(stored)
        self.steps[index] = state.step
        self._step[index] = state.step
        self._marked = None


def train_unless_stopped(ensemble: Ensemble, steps: int, stop: threading.Event) -> None:
    """Train an ensemble for ``steps`` steps, marking where the rotation that is measured after them begins.

    Raises:
        InterruptedError: Within a few steps once ``stop`` is set.
    """
    parts = [max(steps - ROTATION_STEPS, 0), min(steps, ROTATION_STEPS)]
    for part in parts:
        if part == ROTATION_STEPS == parts[1]:
            ensemble.mark()
        for done in range(0, part, STEPS_BETWEEN_CHECKS):
            if stop.is_set():
                raise InterruptedError
            ensemble.train(min(STEPS_BETWEEN_CHECKS, part - done))


def _angle(before: Tensor, after: Tensor) -> Tensor:
    """The angle in radians between matrices ``(..., m, n)``, from the chord of their directions."""
    directions = [w.double() / w.double().norm(dim=(-2, -1), keepdim=True) for w in (before, after)]
    return 2 * torch.asin(((directions[0] - directions[1]).norm(dim=(-2, -1)) / 2).clamp(max=1))
