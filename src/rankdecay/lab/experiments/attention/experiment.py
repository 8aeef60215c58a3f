"""What `recall`, `language` and `vision` share: a decay of attention of its own, swept, with everything else fixed.

A run is one model under one arm, one strength of the decay of attention, one of the MLPs, with or without QK-norm, from
one seed. Runs follow one another; under ``torchrun`` all processes share each of them. `lab.training` makes one run,
the experiment says by a `Problem` what is learnt, and here is the grid, what is stored, and what it came to.

Importing this module imports neither torch nor numpy: the command line reads its settings for ``--help``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rankdecay.decay.policy import Decay, Frobenius, LowRank
from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.experiments.attention.summary import of, summarise
from rankdecay.lab.legacy import (
    Preset,
    check_counts,
    check_evaluations,
    check_numbers,
    check_seeds,
    configuration,
    finish,
    finished,
    given_strengths,
    identity,
    number,
    option,
    print_precision,
    seeds,
)

if TYPE_CHECKING:
    from torch import nn

    from rankdecay.lab.precision import Choice
    from rankdecay.lab.progress import RunsProgress
    from rankdecay.lab.session.parallel import Layout, Parallel
    from rankdecay.lab.session.run_store import Follower, RunStore
    from rankdecay.lab.session.session import Plan, Problem, Run, Session

Record = dict[str, Any]
MINUTES = 15  # that a default may take on the slowest machine that counts
NOT_IDENTITY = ("save", "skip_diverged", "parallel")  # beside those of every experiment: no change of what is computed
QKNorm = Literal["off", "on", "both"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Compile = Literal["auto", "on", "off"]
Save = Literal["first", "all", "none"]
CHOICES = {"preset": Preset, "qk_norm": QKNorm, "precision": Precision, "compile": Compile, "save": Save}


@dataclass(frozen=True)
class AttentionDecay:
    """The settings that the experiments share; each sets its own defaults."""

    preset: Preset = "default"
    """'standard' trains more and larger: for a fast machine, or an hour."""
    arms: tuple[str, ...] = ("l2", "low_rank")
    """Which decays of attention to compare."""
    strengths: tuple[str, ...] = ()
    """Strengths of an arm in place of its own, for example l2=0,0.1,1 low_rank=0.3,3."""
    mlp_decays: tuple[float, ...] = (0.1,)
    """L2 of the matrices of the MLPs; several are a second axis of the grid."""
    rest_decay: float = 0.1
    """L2 of every other matrix, embeddings among them, and of W_V, W_O where an arm decays W_Q, W_K alone."""
    qk_norm: QKNorm = "off"
    """RMSNorm on the queries and keys of each head."""
    seeds: int = 1
    """Runs per cell of the grid, each from a seed of its own."""
    first_seed: int = 0
    """Number of the first seed: tune on seeds that are not reported, from 100 up say."""
    steps: int = 500
    """Training steps of each run."""
    lr: float = 1e-3
    """Peak learning rate: a linear rise, then a cosine down to a tenth."""
    warmup: int = 50
    """Steps of the rise."""
    batch_size: int = 16
    """Examples per step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts a batch is cut into, one after another."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for none."""
    evaluate_every: int = 50
    """Steps between evaluations."""
    precision: Precision = "auto"
    """Of the matrix products, by autocast: 'auto' is bfloat16 on a GPU that has it, float32 elsewhere."""
    every: int = 4
    """Steps that a low-rank decay gathers before it acts."""
    compile: Compile = "auto"
    """torch.compile; auto compiles on a GPU."""
    skip_diverged: bool = False
    """Note a run whose loss is no longer finite and go on with the next; otherwise stop there."""
    save: Save = "first"
    """Trained models to keep in --out/models: those of the first seed, all, or none."""
    out: Path = Path("runs/attention")
    """Where results go; a run that was interrupted continues there."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, …"""
    quiet: bool = False
    """No progress and no table."""
    json: bool = False
    """Print the summary as JSON on standard output; progress goes to standard error."""


# --- the arms ---


@dataclass(frozen=True)
class Arm:
    """One way to decay attention."""

    name: str
    description: str
    strengths: tuple[float, ...]
    of: tuple[str, ...]  # roles it decays; the other attention matrices get the decay of the rest
    scale: Literal["relative", "absolute"] | None = None  # of a low-rank decay; None is L2

    def decays(self, strength: float, settings: AttentionDecay) -> dict[str, Decay]:
        """The decays of all attention matrices, by role."""
        found: dict[str, Decay] = {role: Frobenius(settings.rest_decay) for role in ("query_key", "value_output")}
        for role in self.of:
            found[role] = (
                Frobenius(strength)
                if self.scale is None
                else LowRank(strength, scale=self.scale, unit="head", every=settings.every)
            )
        return found


BOTH = ("query_key", "value_output")
ARMS = {
    arm.name: arm
    for arm in (
        Arm("l2", "L2 on W_Q, W_K, W_V and W_O.", (0.0, 0.1, 1.0, 10.0), BOTH),
        Arm("l2_query_key", "L2 on W_Q and W_K.", (0.0, 0.1, 1.0, 10.0), ("query_key",)),
        Arm(
            "low_rank",
            "Soft threshold of each head's W_Q and W_K, relative to their size.",
            (0.1, 1.0, 10.0),
            ("query_key",),
            "relative",
        ),
        Arm(
            "low_rank_both",
            "Soft threshold of each head's W_Q, W_K, W_V and W_O, relative to their size.",
            (0.1, 1.0, 10.0),
            BOTH,
            "relative",
        ),
        Arm(
            "low_rank_absolute",
            "Soft threshold of each head's W_Q and W_K, by the same amount whatever their size.",
            (0.01, 0.1, 1.0),
            ("query_key",),
            "absolute",
        ),
        Arm(
            "low_rank_both_absolute",
            "Soft threshold of each head's W_Q, W_K, W_V and W_O, by the same amount whatever their size.",
            (0.01, 0.1, 1.0),
            BOTH,
            "absolute",
        ),
    )
}


def chosen_arms(settings: AttentionDecay) -> list[Arm]:
    """The arms asked for, with the strengths asked for.

    Raises:
        SettingError: for an unknown arm, or strengths that are no decay.
    """
    if not settings.arms:
        raise SettingError(f"--arms is empty: choose from {', '.join(ARMS)}")
    names = ARMS if "all" in settings.arms else settings.arms
    chosen = {check_name("--arms", name, ARMS): ARMS[name] for name in names}
    for name, strengths in given_strengths(settings.strengths, chosen, "0,0.1,1", type(settings)().strengths).items():
        chosen[name] = dataclasses.replace(chosen[name], strengths=strengths)
    for arm in chosen.values():
        for strength in arm.strengths:
            _check_decay(f"--strengths {arm.name}={strength:g}", strength, settings.lr, limited=arm.scale != "absolute")
    return list(chosen.values())


def _check_decay(given: str, strength: float, lr: float, *, limited: bool = True) -> None:
    if not (math.isfinite(strength) and strength >= 0):
        raise SettingError(f"{given} is no decay: give 0 for none, or more")
    if limited and lr * strength >= 1:
        raise SettingError(
            f"{given} at --lr {lr:g} would take more than all of a weight in one step: stay below {1 / lr:g}"
        )


def check(settings: AttentionDecay) -> None:
    """Raises a `SettingError` for settings that cannot work, before anything is built or written."""
    for name, choices in CHOICES.items():
        check_name(option(name), getattr(settings, name), get_args(choices))
    check_seeds(settings)
    check_counts(settings, "seeds", "steps", "batch_size", "accumulate", "evaluate_every", "every")
    check_numbers(settings, "lr")
    check_numbers(settings, "clip", "warmup", zero=True)
    chosen_arms(settings)
    if settings.warmup >= settings.steps:
        raise SettingError(f"--warmup {settings.warmup} must be less than --steps {settings.steps}")
    check_evaluations(settings)
    if not settings.mlp_decays:
        raise SettingError("--mlp-decays is empty: give for example 0.1")
    for decay in settings.mlp_decays:
        _check_decay(f"--mlp-decays {decay:g}", decay, settings.lr)
    _check_decay(f"--rest-decay {settings.rest_decay:g}", settings.rest_decay, settings.lr)


# --- the runs ---


def all_runs(settings: AttentionDecay, *, has_mlp: bool = True) -> list[Run]:
    """Every run of the grid, seed by seed, so that a picture of everything is there first.

    Args:
        settings: of the experiment.
        has_mlp: whether there are MLPs to decay.
    """
    from rankdecay.lab.session.session import Run

    norms = {"off": (False,), "on": (True,), "both": (False, True)}[settings.qk_norm]
    mlp_decays = tuple(dict.fromkeys(settings.mlp_decays)) if has_mlp else (None,)
    arms, runs = chosen_arms(settings), []
    for seed in seeds(settings):
        for qk_norm in norms:
            for arm in arms:
                for mlp in mlp_decays:
                    for strength in arm.strengths:
                        decays = arm.decays(strength, settings)
                        if mlp is not None:
                            decays["mlp"] = Frobenius(mlp)
                        runs.append(Run(arm.name, strength, mlp, qk_norm, seed, decays, settings.rest_decay))
    return runs


def make_plan(settings: AttentionDecay, device: str, parallel: Parallel = "ddp") -> Plan:
    """How the runs are trained on a device, by all processes of a group.

    Raises:
        SettingError: if a batch cannot be shared out evenly, or there is no compiler to compile with.
    """
    from rankdecay.lab.ensemble.ensemble import compiler_available
    from rankdecay.lab.session.distributed import processes
    from rankdecay.lab.session.parallel import Layout
    from rankdecay.lab.session.session import Plan

    layout = Layout(parallel, device.partition(":")[0])
    shares = layout.shares * settings.accumulate
    if settings.batch_size % shares:
        raise SettingError(
            f"--batch-size {settings.batch_size} cannot be shared evenly by {processes()} processes and --accumulate "
            f"{settings.accumulate}: give a multiple of {shares}"
        )
    compiles = settings.compile == "on" or (settings.compile == "auto" and device.startswith("cuda"))
    if compiles and not compiler_available(device):
        if settings.compile == "on":
            raise SettingError(
                "--compile on needs a compiler (g++ or clang++, without ATEN_CPU_CAPABILITY=default; Triton on a GPU): "
                "give --compile off"
            )
        compiles = False
    return Plan(
        settings.steps,
        settings.batch_size,
        settings.lr,
        settings.warmup,
        settings.accumulate,
        settings.clip,
        settings.precision,  # pyright: ignore[reportArgumentType] - auto is resolved
        compiles,
        device,
        layout,
    )


@dataclass(frozen=True)
class Experiment:
    """What one of the commands adds to the shared part.

    Attributes:
        command: its name.
        problem: makes what is learnt; called once, in every process.
        has_mlp: whether its models have MLPs.
        save: writes a trained model into a directory that exists; None if models are not kept.
        facts: of the summary, beside the arms; of the problem.
        fingerprint: of the problem, where the settings do not say what is learnt: a file may have changed.
        notices: said before the first run.
        parallel: how the processes of a group share each run; only a GPT can be shared other than by ``"ddp"``.
        check: raises a `SettingError` for a model that they cannot share so.
    """

    command: str
    problem: Callable[[], Problem]
    has_mlp: bool = True
    save: Callable[[nn.Module, Path], None] | None = None
    facts: Callable[[Any], Record] = lambda problem: {}
    fingerprint: Callable[[Any], Record] = lambda problem: {}
    notices: Sequence[str] = ()
    parallel: Parallel = "ddp"
    check: Callable[[Layout], None] = lambda layout: None


def run(settings: AttentionDecay, experiment: Experiment, reproduce: str) -> Record:
    """Runs an experiment, or continues it, and returns its summary.

    Raises:
        SettingError: if the settings or the output directory cannot work, or a run diverges.
    """
    check(settings)
    from rankdecay.lab import precision
    from rankdecay.lab.machine import resolve_device
    from rankdecay.lab.progress import Promise, RunsProgress
    from rankdecay.lab.session.distributed import joined, share
    from rankdecay.lab.session.run_store import Follower

    with joined(resolve_device(settings.device, needs_float64=False)) as (device, first):
        runs = all_runs(settings, has_mlp=experiment.has_mlp)
        problem = experiment.problem()
        title = f"{experiment.command} · {len(runs)} runs · {settings.steps} steps · {device}"
        promise = Promise(MINUTES, "fewer --strengths or --steps")
        quiet = settings.quiet or not first
        progress = RunsProgress(title, problem.unit, quiet=quiet, to_stderr=settings.json, promise=promise)
        resolved = None
        if first:
            resolved = precision.resolve(settings, experiment.command, device, progress.notice, narrow="bfloat16")
        settings, choice = share(resolved)
        plan = make_plan(settings, device, experiment.parallel)
        experiment.check(plan.layout)
        if first:
            return _lead(settings, experiment, reproduce, runs, problem, plan, choice, progress)
        _train_all(runs, problem, plan, settings, Follower(), progress, experiment.save)
        return {}


def _lead(
    settings: AttentionDecay,
    experiment: Experiment,
    reproduce: str,
    runs: Sequence[Run],
    problem: Problem,
    plan: Plan,
    choice: Choice,
    progress: RunsProgress,
) -> Record:
    """The process that writes."""
    from rankdecay.lab.session.distributed import share
    from rankdecay.lab.session.run_store import RunStore
    from rankdecay.lab.store import RunDirectory

    arms = chosen_arms(settings)
    stored = [dataclasses.asdict(arm) for arm in arms]
    whole = identity(settings, NOT_IDENTITY) | experiment.fingerprint(problem)
    config = configuration(experiment.command, whole, stored, plan.device, reproduce, choice)
    with RunDirectory.open(settings.out, config, progress.notice) as directory:
        summary = finished(directory, progress.notice, "for a new run give another --out")
        if summary is not None:
            share([])
            return summary
        for text in experiment.notices:
            progress.notice(text)
        store = RunStore(directory)
        _train_all(runs, problem, plan, settings, store, progress, experiment.save)
        records = directory.metrics()
        return finish(
            directory,
            {
                "command": experiment.command,
                "settings": whole,
                "unit": problem.unit,
                **experiment.facts(problem),
                "arms": summarise(records, problem.unit),
                "wall_seconds": store.seconds,
            },
        )


def _train_all(
    runs: Sequence[Run],
    problem: Problem,
    plan: Plan,
    settings: AttentionDecay,
    store: RunStore | Follower,
    progress: RunsProgress,
    save: Callable[[nn.Module, Path], None] | None,
) -> None:
    """The runs that have not ended, one after another; in every process of a group, with the store it has."""
    from rankdecay.lab.session.session import choose_threads

    left = store.missing(runs)
    if left:
        choose_threads(left[0], problem, plan)
    with progress.working(settings.steps * len(runs), settings.steps * (len(runs) - len(left))):
        for run_ in left:
            _train(run_, problem, plan, settings, store, progress, save)


def _until_evaluation(session: Session, settings: AttentionDecay) -> int:
    return settings.evaluate_every - session.step % settings.evaluate_every


def _train(
    run_: Run,
    problem: Problem,
    plan: Plan,
    settings: AttentionDecay,
    store: RunStore | Follower,
    progress: RunsProgress,
    save: Callable[[nn.Module, Path], None] | None,
) -> None:
    """One run to its end, evaluated and stored on the way."""
    from rankdecay.lab.session.distributed import rank
    from rankdecay.lab.session.session import Diverged, Session

    speaks = rank() == 0
    session = Session(run_, problem, plan)
    checkpoint = store.begin(run_)
    if checkpoint is not None:
        session.restore(checkpoint)
        if speaks:
            progress.notice(f"continuing {run_} at step {session.step}")
    progress.begins(session.step)
    try:
        if checkpoint is None:
            store.add(session.evaluate())
        while session.step < settings.steps:
            for step in session.train(_until_evaluation(session, settings)):
                progress.at(step)
            record = session.evaluate()
            store.add(record)
            if speaks:
                progress.evaluated(str(run_), record)
            if session.step < settings.steps:
                store.checkpoint(session)
    except Diverged as error:
        if not settings.skip_diverged:
            step, file = store.checkpoint_step, settings.out / "checkpoint.safetensors"
            where = "" if step is None else f"; the last good checkpoint, of step {step}, is {file}"
            raise SettingError(f"{error}{where}") from None
        if speaks:
            progress.notice(f"{run_} diverged at step {error.step}: going on with the next")
        store.add({**run_.key, "step": error.step, "diverged": True})
    else:
        is_first = run_.seed == settings.first_seed
        if save is not None and (settings.save == "all" or (settings.save == "first" and is_first)):
            store.save_model(run_, session.whole_model(), save)
    store.end(run_)
    progress.ended(settings.steps - session.step)


# --- what it came to ---


def print_summary(summary: Record) -> None:
    """The table of a finished experiment, one line per arm and strength, and what may be said of it."""
    from rich.console import Console
    from rich.table import Table

    from rankdecay.lab.experiments.attention.verdict import verdict

    several_mlp = len({arm["mlp_decay"] for arm in summary["arms"]}) > 1
    several_norms = len({arm["qk_norm"] for arm in summary["arms"]}) > 1
    has_accuracy = any(arm["accuracy"] is not None for arm in summary["arms"])
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    headings = ["arm", "decay"]
    headings += ["MLP"] if several_mlp else []
    headings += ["QK-\nnorm"] if several_norms else []
    headings += [
        "loss",
        "±",
        *(["accur."] if has_accuracy else []),
        *("rank\nQK", "rank\nVO", "imb.\nQK", "imb.\nVO"),
        f"{summary['unit']}\n/s",
    ]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right", vertical="bottom", no_wrap=True)
    for arm in summary["arms"]:
        row = [arm["name"], f"{arm['strength']:g}"]
        row += [f"{arm['mlp_decay']:g}"] if several_mlp else []
        row += ["yes" if arm["qk_norm"] else "no"] if several_norms else []
        if arm["loss"] is None:
            table.add_row(*row, "diverged")
            continue
        row += [f"{arm['loss']:.4f}", number(arm["loss_error"], ".4f")]
        row += [number(arm["accuracy"], ".1%")] if has_accuracy else []
        row += [number(of(arm["mean"], part, "pseudo_rank"), ".2f") for part in ("query_key", "value_output")]
        row += [number(of(arm["mean"], part, "imbalance"), ".2f") for part in ("query_key", "value_output")]
        table.add_row(*row, number(arm["per_second"], ",.0f"))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has room for a whole line
        console.width = max(console.width, 110)
    console.print(table)
    print_precision(console, summary)
    console.print("\nrank: pseudo rank of W_KᵀW_Q and W_O W_V, mean over heads and layers; with QK-norm of W_Q and W_K")
    first = next((arm for arm in summary["arms"] if arm["untrained_mean"]), None)
    if first is not None:
        ranks = [
            f"{name} {number(of(first['untrained_mean'], part, 'pseudo_rank'), '.3f')}"
            for part, name in (("query_key", "W_KᵀW_Q"), ("value_output", "W_O W_V"))
        ]
        console.print(f"untrained pseudo rank: {', '.join(ranks)}")
    console.print(f"\n{verdict(summary)}", markup=False)
