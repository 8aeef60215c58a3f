"""One training run of a plain module, as a user of the library would write it: `param_groups`, `attach`, `Monitor`.

A `Problem` says what is learnt, a `Plan` how; a `Session` is one run, alone or in every process of a group
(:mod:`parallel`). A batch depends on the seed and the step alone and the learning rate on the step alone, so a resumed
run needs weights and moments, and gives the numbers of a run that was never interrupted.
"""

import contextlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.decay.policy import Decay
from rankdecay.lab.errors import SettingError
from rankdecay.lab.machine import compiled
from rankdecay.lab.precision import check_resolved
from rankdecay.lab.session.distributed import broadcast, processes, rank
from rankdecay.lab.session.parallel import Layout, clip_gradients, distribute_like, gather_to_cpu
from rankdecay.lab.session.run_key import KEY
from rankdecay.lab.settings import Record
from rankdecay.lab.store import Checkpoint

Batch = tuple[Tensor, ...]
THREAD_PAIRS = 5  # of steps that are timed, one on one core and one on all
THREADS_PAY = 1.1  # times as fast as on one core that a step must be on all
Precision = Literal["float32", "bfloat16", "float16"]
MEASURES = ("pseudo_rank", "effective_rank", "stable_rank", "nuclear_norm", "nuclear_gap", "imbalance")
PARTS = ("query_key", "value_output", "query", "key")
PIECES = 16  # contiguous pieces of a validation set, which its standard error is over
BETAS = (0.9, 0.95)
LAST_RATE = 0.1  # of the peak learning rate: where the cosine ends


class Quality(NamedTuple):
    """Quality of a model on the validation set."""

    loss: float
    error: float  # standard error of the loss over the pieces; NaN for a single one
    accuracy: float | None = None
    pieces: tuple[float, ...] = ()  # losses of pieces of the validation set, the same for every model


class Problem(Protocol):
    """Learning problem: a model, batches, a loss and an evaluation."""

    unit: str  # what `size` counts: "tokens", "sequences", "images"

    def model(self, seed: int, qk_norm: bool) -> nn.Module:
        """Return a fresh model on the CPU; its initial weights depend on the seed alone.

        A problem whose arms change the model takes `Run.model` as further keywords.
        """
        ...

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Return the examples of one step on the CPU, first dimension ``size``; they depend on the arguments alone."""
        ...

    def size(self, batch: Batch) -> int:
        """Count the tokens, sequences or images of a batch."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the examples of a batch."""
        ...

    def evaluate(self, model: nn.Module, device: str) -> Quality:
        """Quality on the validation set; called in evaluation mode without gradients."""
        ...


@dataclass(frozen=True)
class Run:
    """One run of an experiment: its key, and its decays by role."""

    arm: str
    strength: float  # of the decay of attention
    mlp_decay: float | None  # of the other matrices of a block; None where there are none
    qk_norm: bool
    seed: int
    decays: Mapping[str, Decay]
    rest_decay: float = 0.1  # of every other matrix
    in_loss: tuple[str, ...] = ()  # roles whose L2 is part of the loss: it goes through Adam's moments
    model: Mapping[str, Any] = field(default_factory=dict)  # what the arm changes in the model: keywords of `model`

    @property
    def key(self) -> Record:
        """Unique key of the run within its experiment."""
        return {name: getattr(self, name) for name in KEY}

    @property
    def file_name(self) -> str:
        """Name of the file or directory of this run."""
        mlp = "" if self.mlp_decay is None else f"_mlp_{self.mlp_decay:g}"
        return f"{self.arm}_{self.strength:g}{mlp}{'_qk_norm' if self.qk_norm else ''}_seed_{self.seed}"

    def __str__(self) -> str:
        mlp = "" if self.mlp_decay is None else f", MLP {self.mlp_decay:g}"
        return f"{self.arm} {self.strength:g}{mlp}{', QK-norm' if self.qk_norm else ''}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """Training plan of every run of an experiment.

    Attributes:
        steps: optimizer steps.
        batch_size: examples per step, over all processes and accumulated parts.
        lr: peak learning rate; a linear rise over ``warmup`` steps, then a cosine down to a tenth.
        warmup: steps of the rise.
        accumulate: parts a batch is cut into, one after another in the same step.
        clip: largest norm of the gradient; 0 for none.
        precision: float32, or bfloat16 or float16 (with a loss scaler) under autocast.
        compile: whether the model is compiled.
        device: where the model is trained.
        layout: how the processes of a group share each run.
    """

    steps: int
    batch_size: int
    lr: float
    warmup: int = 0
    accumulate: int = 1
    clip: float = 1.0
    precision: Precision = "float32"
    compile: bool = False
    device: str = "cpu"
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self) -> None:
        """Refuse a precision that was not resolved, which would silently train in float32."""
        check_resolved(self.precision, get_args(Precision))

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2)


class Diverged(SettingError):
    """Raised when the loss becomes NaN or infinite.

    Attributes:
        step: the first step with such a loss.
    """

    def __init__(self, run: Run, step: int, lr: float) -> None:
        super().__init__(
            f"the loss is not finite at step {step} of {run} (`lr` {lr:g}): give a smaller `lr`, leave this strength "
            "out, or give `skip_diverged` to note it and continue"
        )
        self.step = step


class Session:
    """Training of one run, from step 0 or from a checkpoint. Every process of a group makes the same calls.

    Args:
        run: the run to train.
        problem: the problem to learn.
        plan: the training plan.
    """

    def __init__(self, run: Run, problem: Problem, plan: Plan) -> None:
        self.run, self.problem, self.plan = run, problem, plan
        self.step = 0
        self.seconds = 0.0  # in training steps alone
        self.examples = 0  # tokens, sequences or images trained on
        self.model = problem.model(run.seed, run.qk_norm, **run.model).to(plan.device)
        plan.layout.shard(self.model)
        groups = rd.param_groups(self.model, rd.Frobenius(run.rest_decay), **run.decays)  # pyright: ignore[reportArgumentType] - roles
        for group in groups:
            if group["role"] in run.in_loss:
                group["decoupled_weight_decay"] = False
        # Adam reads in each group whether its L2 is decoupled; AdamW would forget it when a state is loaded.
        kind = torch.optim.Adam if run.in_loss else torch.optim.AdamW
        self.optimizer = kind(groups, lr=plan.lr, betas=BETAS)
        self.attachment = rd.attach(self.optimizer)
        # measured at evaluations, not at the monitor's own interval
        self.monitor = rd.Monitor(self.model, measures=MEASURES, of=PARTS, detail="layer")
        self._scaler = torch.amp.GradScaler(self._kind, enabled=plan.precision == "float16")
        self._trained: Any = compiled(self.model) if plan.compile else self.model
        if processes() > 1 and not plan.layout.sharded:
            self._trained = nn.parallel.DistributedDataParallel(self._trained)
        self._losses: list[float] = []  # of the steps since the last evaluation
        if plan.compile:  # compile before the clock starts, or the first run would look the slowest
            self._gradient(problem.batch(run.seed, 0, plan.batch_size))
            self.optimizer.zero_grad(set_to_none=True)

    @property
    def _kind(self) -> str:
        return self.plan.device.partition(":")[0]

    def train(self, steps: int) -> Iterator[int]:
        """Make ``steps`` optimizer steps and yield the step count after each.

        Raises:
            Diverged: At the end, if a loss on the way was not finite.
        """
        losses, first = [], self.step
        self.model.train()
        for _ in range(steps):
            start = time.perf_counter()
            losses.append(self._one_step())
            self.step += 1
            self.seconds += time.perf_counter() - start
            yield self.step
        start = time.perf_counter()
        # one transfer for all losses: steps are not synchronised, so on a GPU the time they take is counted here
        self._losses = torch.stack(losses).tolist()
        self.seconds += time.perf_counter() - start
        for step, loss in enumerate(self._losses, first + 1):
            if not math.isfinite(loss):
                raise Diverged(self.run, step, self.plan.lr)

    def _one_step(self) -> Tensor:
        plan = self.plan
        batch = self.problem.batch(self.run.seed, self.step, plan.batch_size)
        self.examples += self.problem.size(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(self.step)
        loss = self._gradient(batch)
        if plan.clip:
            self._scaler.unscale_(self.optimizer)
            clip_gradients(self.model.parameters(), plan.clip)
        with warnings.catch_warnings():
            # A loss that is not finite ends the run, with the step and what to do.
            warnings.filterwarnings("ignore", ".*entries that are not finite")
            self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if processes() > 1:
            torch.distributed.all_reduce(loss)  # the mean, which is NaN in every process if it is in one
            loss /= processes()
        return loss

    def _gradient(self, whole: Batch) -> Tensor:
        """Accumulate the gradient of a batch; return the mean loss of this process's share of it."""
        plan = self.plan
        size = plan.batch_size // (plan.layout.data_parallel_size * plan.accumulate)
        total = torch.zeros((), device=plan.device)
        for part in range(plan.accumulate):
            start = (plan.layout.data_rank * plan.accumulate + part) * size
            batch = tuple(t[start : start + size].to(plan.device, non_blocking=True) for t in whole)
            last = part == plan.accumulate - 1
            # gradients of shards are reduced after every part: deferring it would need whole gradients in memory
            model = self._trained
            is_copy = isinstance(model, nn.parallel.DistributedDataParallel)
            with model.no_sync() if is_copy and not last else contextlib.nullcontext():
                with self._autocast():
                    loss = self.problem.loss(model, batch) / plan.accumulate
                self._scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.plan.precision)
        return torch.autocast(self._kind, dtype, enabled=dtype is not None)

    @torch.no_grad()
    def evaluate(self) -> Record:
        """Return the row to store of the current model; an empty one on every rank but 0.

        Rank 0 measures a replicated model by itself; every rank takes part in measuring a sharded one.

        Raises:
            Diverged: On every rank, if the loss is not finite.
        """
        takes_part = rank() == 0 or self.plan.layout.sharded
        quality = broadcast(self._quality() if takes_part else None)
        if not math.isfinite(quality.loss):
            raise Diverged(self.run, self.step, self.plan.lr)
        layers = by_layer(self.monitor.measure()) if takes_part else []
        if rank() > 0:
            return {}
        return {
            **self.run.key,
            "step": self.step,
            self.problem.unit: self.examples,
            "seconds": round(self.seconds, 3),
            "train_loss": statistics.fmean(self._losses) if self._losses else None,
            "loss": quality.loss,
            "loss_error": quality.error if math.isfinite(quality.error) else None,
            "accuracy": quality.accuracy,
            "pieces": [float(f"{piece:.7g}") for piece in quality.pieces],
            "layers": layers,
        }

    def _quality(self) -> Quality:
        self.model.eval()
        with self._autocast():
            return self.problem.evaluate(self.model, self.plan.device)

    def whole_model(self) -> nn.Module:
        """Return the unsharded model: itself, or a copy on the CPU gathered from all processes."""
        if not self.plan.layout.sharded:
            return self.model
        model = self.problem.model(self.run.seed, self.run.qk_norm, **self.run.model)
        model.load_state_dict(gather_to_cpu(self.model.state_dict(), keep=True))
        return model

    def checkpoint(self) -> Checkpoint:
        """Return the state that the rest of the run depends on, for any number of processes.

        Its tensors are on rank 0 alone.
        """
        state = self.optimizer.state_dict()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        moments: dict[str, Record] = {}
        for index, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    moments.setdefault(str(index), {})[name] = value
        extra = {
            "run": self.run.key,
            "seconds": self.seconds,
            "examples": self.examples,
            "groups": state["param_groups"],
            "moments": moments,
            "scaler": self._scaler.state_dict(),
        }
        # copies, because safetensors refuses tied parameters: one tensor under two names
        tensors = gather_to_cpu(tensors, keep=rank() == 0)
        return Checkpoint(self.step, tensors, json.loads(json.dumps(extra)))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint of the same run; every process of a group passes all its tensors."""
        self.step, self.seconds = checkpoint.step, checkpoint.extra["seconds"]
        self.examples = checkpoint.extra["examples"]
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        ours = self.model.state_dict()
        self.model.load_state_dict(
            {name: distribute_like(tensor, ours[name]) for name, tensor in parts["model"].items()}
        )
        moments: dict[int, Record] = {int(i): dict(values) for i, values in checkpoint.extra["moments"].items()}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, tensor in parts["optimizer"].items():
            index, _, rest = name.partition(".")
            parameter = parameters[int(index)]
            # the step count is a scalar, which is not sharded
            value = distribute_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
            moments.setdefault(int(index), {})[rest] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": checkpoint.extra["groups"]})
        self._scaler.load_state_dict(checkpoint.extra["scaler"])


def choose_threads(run: Run, problem: Problem, plan: Plan) -> None:
    """Set torch to one thread where more make a step no faster: a small model, or a busy machine.

    There threads spend their time waiting for each other; beside two busy processes a run took fifteen times as long.

    Args:
        run: any run of the experiment.
        problem: its problem.
        plan: its training plan.
    """
    threads = torch.get_num_threads()
    if plan.device != "cpu" or threads == 1 or processes() > 1:
        return
    session = Session(run, problem, replace(plan, compile=False))
    batch = problem.batch(run.seed, 0, plan.batch_size)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        session._gradient(batch)
        return time.perf_counter() - start

    seconds(threads)  # warm up: the first step allocates
    gain = statistics.median(seconds(1) / seconds(threads) for _ in range(THREAD_PAIRS))
    torch.set_num_threads(threads if gain > THREADS_PAY else 1)


def by_layer(values: Mapping[str, float]) -> list[Record]:
    """Measurements of a Monitor by layer, part and measure: the mean over heads, and the least of them.

    Args:
        values: named as by `rd.Monitor`.

    Returns:
        For each layer in order ``{"query_key": {"pseudo_rank": ..., "pseudo_rank_min": ..., ...}, ...}``; a value that
        is not finite is None.
    """
    layers: dict[str, Record] = {}
    for name, value in values.items():
        words = name.split("/")
        if len(words) == 4:
            _, layer, part, measure = words
            number = float(f"{value:.6g}") if math.isfinite(value) else None
            layers.setdefault(layer, {}).setdefault(part, {})[measure] = number
    return list(layers.values())


def summarise_losses(losses: Tensor | Sequence[float], accuracy: float | None = None) -> Quality:
    """Quality from the losses of a validation set, in its order.

    Neighbours may be correlated, as windows of one text are, so the standard error is over contiguous pieces. Their
    losses are kept: the difference of two models on the same pieces is known far better than either loss.

    Args:
        losses: (examples,).
        accuracy: share of right answers.
    """
    values = torch.as_tensor(losses).cpu().double()
    pieces = torch.stack([stretch.mean() for stretch in values.tensor_split(min(PIECES, len(values)))])
    error = float(pieces.std()) / math.sqrt(len(pieces)) if len(pieces) > 1 else math.nan
    return Quality(float(values.mean()), error, accuracy, tuple(pieces.tolist()))
