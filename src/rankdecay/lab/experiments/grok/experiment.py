"""Does low-rank decay make a scale-invariant transformer generalise where L2 does not, and why?

Trains the same small transformers from the same seeds under several decays of W_Q and W_K. The decay of the *rest*
of the model is one setting shared by all arms, so an arm differs from its control in one thing. Two controls bound
what may be claimed: an L2 tuned far beyond its usual strength, and attention held uniform.

Importing this module does not import torch: the command line reads its settings for ``--help``.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankdecay.decay.policy import Decay, Frobenius, LowRank, Scale
from rankdecay.lab.ensemble.outcome import steps_to_hold
from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.legacy import (
    Record,
    check_counts,
    check_numbers,
    check_seeds,
    check_threshold,
    check_width,
    configuration,
    finish,
    finished,
    identity,
    option,
    print_precision,
    seeds,
)
from rankdecay.rules import rule_names

if TYPE_CHECKING:
    from rankdecay.lab.ensemble.ensemble import Ensemble
    from rankdecay.lab.precision import Products
    from rankdecay.lab.tasks import Dataset

MINUTES = 3  # that the default may take on the slowest machine that counts
ARMS = ("none", "l2", "l2_tuned", "low_rank", "prototype", "uniform_attention")


@dataclass(frozen=True)
class Grok:
    """Does low-rank decay make a scale-invariant transformer generalise where L2 does not, and why?

    Trains every arm from the same seeds, shows their accuracy and rank as they go, and leaves config.json,
    metrics.jsonl, summary.json and report.html in --out. Interrupted, the same command continues. The default takes at
    most three minutes on two slow cores, under one on two fast ones.
    """

    preset: Literal["default", "standard", "prototype"] = "default"
    """'standard' is a larger network, for a fast machine; 'prototype' the public set-up: addition mod 113, ordered
    split, full-width QK-norm, rate 0.01."""
    arms: tuple[str, ...] = ARMS
    """Which decays of W_Q and W_K to compare."""
    task: str = "selection"
    """selection, recall, add, subtract, multiply, divide, quadratic (x²+xy+y²) or s5."""
    modulus: int = 13
    """p of the arithmetic; ignored by s5."""
    train_fraction: float = 0.5
    """Share of all examples used for training; for every task but selection and recall."""
    train_examples: int = 1100
    """Number of training examples, for selection and recall."""
    values: int = 4
    """Number of values to select from, for selection; of pairs, for recall."""
    split: Literal["unordered", "ordered"] = "unordered"
    """'ordered' lets (a, b) leak (b, a) in commutative tasks; only for replication."""
    steps: int = 600
    """Training steps."""
    seeds: int = 3
    """Seeds per arm; a seed fixes split, initial weights and batches in every arm."""
    first_seed: int = 0
    """Number of the first seed: tune on seeds that are not reported, from 100 up say."""
    rule: str = "smooth"
    """Rule of the low_rank arm: newton_schulz, polar, prox,
    smooth, or one that is registered."""
    scale: Scale = "absolute"
    """Scale of the low_rank arm: a step takes lr × strength from each singular value; 'relative': times their rms."""
    strength: float = 4.0
    """Strength of the low_rank arm."""
    smoothing: float = 0.13
    """For --rule smooth: directions below this share of ‖W‖_F shrink in proportion instead of by a fixed amount."""
    every: int = 4
    """Apply four steps' low-rank decay every fourth step, to save time."""
    tuned_strength: float = 30.0
    """Strength of the l2_tuned arm: the best the committed sweep found (docs/findings.md)."""
    weight_decay: float = 1.5
    """L2 on everything but W_Q and W_K, shared by all arms; the l2 arm applies it to W_Q and W_K too."""
    lr: float = 2e-3
    """Learning rate of AdamW."""
    batch_size: int = 128
    """Examples per step and member."""
    precision: Literal["auto", "float32", "mixed", "float64"] = "auto"
    """'mixed': bfloat16 products, float32 elsewhere; 'auto': mixed where the machine is faster at it, else float32."""
    width: int = 64
    """Width of the network, which has 4 heads."""
    mlp_width: int = 256
    """Width of the MLP's hidden layer."""
    depth: int = 2
    """Layers of the network."""
    qk_norm: Literal["head", "width", "none"] = "head"
    """RMSNorm of queries and keys: per head, over the full width, or none."""
    gains: bool = False
    """Learnable gains in every norm."""
    position_scale: float = 0.3
    """Standard deviation of the initial position embedding."""
    threshold: float = 0.95
    """Test accuracy that counts as generalised, if the next evaluation holds it."""
    stop_when_generalised: bool = False
    """Let a member leave once two evaluations in a row reach the threshold."""
    evaluate_every: int = 40
    """Steps between evaluations."""
    out: Path = Path("runs/grok")
    """Where results go; an interrupted run there is continued."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, where there is a compiler; 'auto' uses it on a GPU and for runs long enough to repay it."""
    quiet: bool = False
    """No progress and no table."""
    json: bool = False
    """Print the summary as JSON on standard output; progress goes to standard error."""


PRESETS = {
    "default": Grok(),
    "standard": Grok(
        preset="standard",
        modulus=31,
        train_examples=3000,
        steps=640,
        strength=10.0,
        tuned_strength=100.0,
        weight_decay=3.0,
        lr=1e-3,
        batch_size=256,
        width=128,
        mlp_width=512,
        out=Path("runs/grok-standard"),
    ),
    "prototype": Grok(
        preset="prototype",
        strength=10.0,
        tuned_strength=100.0,
        lr=1e-3,
        width=128,
        arms=("none", "l2", "prototype", "uniform_attention"),
        task="add",
        modulus=113,
        train_fraction=0.5,
        split="ordered",
        steps=2500,
        weight_decay=0.1,
        batch_size=512,
        mlp_width=512,
        precision="float32",
        qk_norm="width",
        gains=True,
        position_scale=0.02,
        threshold=0.99,
        stop_when_generalised=True,
        evaluate_every=200,
        out=Path("runs/grok-prototype"),
    ),
}
UNUSED = {
    "selection": ("train_fraction",),
    "recall": ("train_fraction",),
    "s5": ("modulus", "train_examples", "values"),
}


@dataclass(frozen=True)
class Arm:
    """One way to treat W_Q and W_K."""

    name: str
    description: str
    decay: Decay | None = None
    uniform_attention: bool = False


def make_arms(settings: Grok) -> list[Arm]:
    """The arms asked for, in the order of `ARMS`."""
    low_rank = LowRank(
        settings.strength, settings.rule, settings.scale, every=settings.every, smoothing=settings.smoothing
    )
    prototype = LowRank(0.01, rule="newton_schulz", scale="absolute", lr_coupled=False)
    every = [
        Arm("none", "No decay of W_Q and W_K."),
        Arm(
            "l2",
            f"L2 of strength {settings.weight_decay:g} on W_Q and W_K, the same as on the rest of the model.",
            Frobenius(settings.weight_decay),
        ),
        Arm(
            "l2_tuned",
            f"L2 of strength {settings.tuned_strength:g} on W_Q and W_K: {settings.tuned_strength * settings.lr:.0%} "
            "of the weights per step, the strength at which L2 does best.",
            Frobenius(settings.tuned_strength),
        ),
        Arm("low_rank", f"The library's decay of W_Q and W_K: {low_rank.describe()}.", low_rank),
        Arm("prototype", "The published prototype: five cubic Newton–Schulz steps, 0.01 per step.", prototype),
        Arm("uniform_attention", "W_Q and W_K held at zero: every position attends equally to all.", None, True),
    ]
    return [arm for arm in every if arm.name in settings.arms]


def check(settings: Grok) -> None:
    """Raises a `SettingError` for settings that cannot work, before anything is built or written."""
    from rankdecay.lab.tasks import TASKS
    from rankdecay.lab.tasks.base import check_fraction

    check_name("--task", settings.task, TASKS)
    check_fraction(settings.train_fraction)
    for name in UNUSED.get(settings.task, ("train_examples", "values")):
        if getattr(settings, name) != getattr(PRESETS[settings.preset], name):
            use = "--train-examples" if name == "train_fraction" else "--train-fraction"
            remedy = f"use {use}" if name.startswith("train") else "leave it out"
            value = getattr(settings, name)
            raise SettingError(f"{option(name)} {value} has no effect on --task {settings.task}: {remedy}")
    if not settings.arms:
        raise SettingError(f"--arms is empty: choose from {', '.join(ARMS)}")
    for name in settings.arms:
        check_name("--arms", name, ARMS)
    check_seeds(settings)
    check_counts(settings, "steps", "seeds", "every", "depth", "mlp_width", "batch_size", "evaluate_every")
    check_numbers(settings, "strength", "smoothing", "tuned_strength", "weight_decay", "lr", zero=True)
    for name in ("tuned_strength", "weight_decay"):
        if settings.lr * getattr(settings, name) >= 1:
            raise SettingError(
                f"{option(name)} {getattr(settings, name):g} at --lr {settings.lr:g} would flip the sign of the "
                f"weights: stay below {1 / settings.lr:g}"
            )
    check_name("--rule", settings.rule, rule_names())
    check_threshold(settings.threshold)
    check_width(settings.width, heads=4, example=128)


def make_datasets(settings: Grok) -> dict[int, Dataset]:
    """One data set per seed, checked against the batch size."""
    from rankdecay.lab.tasks import make_dataset

    datasets = {
        seed: make_dataset(
            settings.task,
            seed,
            modulus=settings.modulus,
            train_fraction=settings.train_fraction,
            train_examples=settings.train_examples,
            values=settings.values,
            split=settings.split,
        )
        for seed in seeds(settings)
    }
    size = min(len(data.train_targets) for data in datasets.values())  # unordered splits differ in size
    if settings.batch_size > size:
        raise SettingError(
            f"--batch-size {settings.batch_size} is larger than the training set of {size} examples: "
            f"give at most {size}, or more training examples"
        )
    return datasets


def make_ensembles(settings: Grok, arms: Sequence[Arm], datasets: dict[int, Dataset], device: str) -> list[Ensemble]:
    """One ensemble per arm on a CPU, where small batches stay in the cache; all members at once on a GPU."""
    import torch

    from rankdecay.lab.ensemble.ensemble import Ensemble, Member, Training, worth_compiling
    from rankdecay.lab.ensemble.transformer import TransformerConfig

    data = next(iter(datasets.values()))
    config = TransformerConfig(
        data.vocabulary,
        data.length,
        data.outputs,
        width=settings.width,
        depth=settings.depth,
        mlp_width=settings.mlp_width,
        qk_norm=settings.qk_norm,
        gains=settings.gains,
        position_scale=settings.position_scale,
    )
    on_gpu = device.startswith("cuda")
    training = Training(
        batch_size=settings.batch_size,
        precision=settings.precision,  # pyright: ignore[reportArgumentType] - auto is resolved
        device=device,
    )
    members = [
        Member(arm.name, seed, arm.decay, settings.weight_decay, settings.lr, uniform_attention=arm.uniform_attention)
        for arm in arms
        for seed in datasets
    ]
    together = [members] if on_gpu else [[m for m in members if m.arm == arm.name] for arm in arms]

    def ensemble(group: list[Member], training: Training) -> Ensemble:
        return Ensemble(config, group, [datasets[member.seed] for member in group], training)

    at_once = 1 if on_gpu else min(len(together), torch.get_num_threads())
    compiled = worth_compiling(
        settings.compile, device, lambda: ensemble(together[0], training), settings.steps * len(together) / at_once
    )
    return [ensemble(group, dataclasses.replace(training, compile=compiled)) for group in together]


def products(settings: Grok, datasets: dict[int, Dataset], device: str) -> Products:
    """The products of the MLPs, of which a step of an ensemble mostly consists."""
    from rankdecay.lab.precision import Products

    members = len(datasets) * (len(settings.arms) if device.startswith("cuda") else 1)
    length = next(iter(datasets.values())).length
    return Products(members, settings.batch_size * length, settings.width, settings.mlp_width)


def summarise_arm(name: str, members: Sequence[Sequence[Record]], threshold: float) -> Record:
    """The figures of one arm: medians of steps, means over seeds of everything else at each member's last evaluation.

    Args:
        name: of the arm.
        members: the records of each of its members, in order of steps.
        threshold: test accuracy that counts as generalised.
    """
    reached = [steps_to_hold(records, threshold) for records in members]
    last = [records[-1] for records in members]

    def mean(key: str) -> float | None:
        values = [record[key] for record in last if record[key] is not None]
        return statistics.fmean(values) if values else None

    steps = [math.inf if step is None else step for step in reached]
    median = statistics.median(steps)
    if math.isinf(median):  # of an even number of seeds exactly half may have got there: theirs is the lower median
        median = statistics.median_low(steps)
    step_seconds = [r["step_seconds"] for records in members for r in records if r["step_seconds"]]
    keys = (
        "test_accuracy train_accuracy stable_rank effective_rank product_stable_rank product_effective_rank "
        "query_norm key_norm decay_size radial_share tangential_share"
    )
    return {
        "name": name,
        "seeds": len(members),
        "generalised": sum(step is not None for step in reached),
        "steps_to_generalise": median if math.isfinite(median) else None,
        "steps_to_generalise_by_seed": reached,
        "diverged": sum(record["test_loss"] is None for record in last),
        **{key: mean(key) for key in keys.split()},
        "steps_per_second": 1 / statistics.median(step_seconds) if step_seconds else None,
    }


def summarise(records: Sequence[Record], arms: Sequence[str], threshold: float) -> list[Record]:
    """One object per arm, from the records of a whole run."""
    by_member: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=lambda r: r["step"]):
        by_member.setdefault((record["arm"], record["seed"]), []).append(record)
    return [
        summarise_arm(arm, [rows for (name, _), rows in sorted(by_member.items()) if name == arm], threshold)
        for arm in arms
    ]


def run(settings: Grok, command: str) -> Record:
    """Runs the experiment, or continues it, and returns its summary.

    Args:
        settings: what to run.
        command: how to repeat it, for the report.

    Raises:
        SettingError: if the settings or the output directory cannot work.
    """
    check(settings)
    datasets = make_datasets(settings)
    from rankdecay.lab import precision
    from rankdecay.lab.ensemble.runner import Runner
    from rankdecay.lab.machine import resolve_device
    from rankdecay.lab.progress import Progress, Promise
    from rankdecay.lab.store import RunDirectory

    device = resolve_device(settings.device)
    arms = make_arms(settings)
    names = [arm.name for arm in arms]
    described = [dataclasses.asdict(arm) for arm in arms]

    def solved(records: Sequence[Record]) -> bool:
        return settings.stop_when_generalised and steps_to_hold(records, settings.threshold) is not None

    title = f"{settings.task} · {len(arms)} arms × {settings.seeds} seeds · {settings.steps} steps · {device}"
    promise = Promise(MINUTES, "--seeds 1 or fewer --arms or --steps")
    progress = Progress(title, names, quiet=settings.quiet, to_stderr=settings.json, promise=promise)
    settings, choice = precision.resolve(
        settings, "grok", device, progress.notice, narrow="mixed", products=products(settings, datasets, device)
    )
    config = configuration("grok", identity(settings), described, device, command, choice)
    with RunDirectory.open(settings.out, config, progress.notice) as directory:
        summary = finished(directory, progress.notice, "for a new run give another --out")
        if summary is not None:
            return summary
        ensembles = make_ensembles(settings, arms, datasets, device)
        runner = Runner(
            directory, ensembles, steps=settings.steps, evaluate_every=settings.evaluate_every, leaves=solved
        )
        if runner.step:
            progress.notice(f"continuing {settings.out} at step {runner.step}")
        with progress.working(runner.work):
            records = runner.train(progress)
        summary = {
            "command": "grok",
            "settings": identity(settings),
            "threshold": settings.threshold,
            "arms": summarise(records, names, settings.threshold),
            "wall_seconds": runner.seconds,
        }
        return finish(directory, summary)


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


ROWS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "steps_to_generalise": ("median steps to it", lambda value: "—" if value is None else f"{value:g}"),
    "test_accuracy": ("final test accuracy", _share),
    "train_accuracy": ("final train accuracy", _share),
    "stable_rank": ("stable rank W_Q, W_K", _number),
    "effective_rank": ("effective rank W_Q, W_K", _number),
    "product_stable_rank": ("stable rank W_Q,hᵀW_K,h", _number),
    "product_effective_rank": ("effective rank …", _number),
    "query_norm": ("‖W_Q‖_F", _number),
    "key_norm": ("‖W_K‖_F", _number),
    "decay_size": ("decay step / ‖W‖_F", _share),
    "radial_share": ("radial part of step²", _share),
    "tangential_share": ("tangential part", _share),
    "steps_per_second": ("steps/s and run", _number),
}


def print_summary(summary: Record) -> None:
    """The table of a finished run, one column per arm, and what its controls allow one to say."""
    from rich.console import Console
    from rich.table import Table

    from rankdecay.lab.experiments.grok.verdict import verdict

    table = Table(box=None, pad_edge=False)
    table.add_column(f"after {summary['settings']['steps']} steps")
    for arm in summary["arms"]:
        table.add_column(arm["name"].replace("_", "\n"), justify="right", vertical="bottom")
    counts = [f"{arm['generalised']} of {arm['seeds']}" for arm in summary["arms"]]
    table.add_row(f"seeds that held {summary['threshold']:.0%} test", *counts)
    for key, (label, formatter) in ROWS.items():
        table.add_row(label, *(formatter(arm[key]) for arm in summary["arms"]))
    console = Console(highlight=False)
    console.print(table)
    print_precision(console, summary)
    console.print(f"\n{verdict(summary)}", markup=False)
