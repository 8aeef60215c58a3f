"""The grid of a decay of attention and its training: everything in which `recall`, `language` and `vision` are alike.

A run is one model under one arm, one strength of the decay of attention, one of the MLPs, with or without QK-norm, from
one seed. Runs follow one another; under ``torchrun`` all processes share each of them (`lab.session`).
`make_experiment` makes the experiment of a command from what is its own, a `Command`: its settings, and a `Problem`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rankdecay.decay.policy import Frobenius
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import Experiment, Job, Record, Work
from rankdecay.lab.experiments.attention.charts import figure, make_sections
from rankdecay.lab.experiments.attention.claims import CHECKS, STYLES, headline
from rankdecay.lab.experiments.attention.settings import GRID, NOT_IDENTITY, AttentionDecay, chosen_arms
from rankdecay.lab.experiments.attention.summary import check_row, so_far, summarise
from rankdecay.lab.experiments.attention.table import make_columns, note
from rankdecay.lab.machine import compiler_available, resolve_device
from rankdecay.lab.progress import RunsProgress
from rankdecay.lab.session import distributed
from rankdecay.lab.session.parallel import Layout
from rankdecay.lab.session.run_store import NonWriter, RunStore
from rankdecay.lab.session.session import Diverged, Plan, Problem, Run, Session, choose_threads
from rankdecay.lab.settings import question, seeds, subset

A = TypeVar("A", bound=AttentionDecay)
OF_A_PLAN = ("steps", "batch_size", "lr", "warmup", "accumulate", "clip", "precision")
SaveModel = Callable[[Any, Path], None]


def all_runs(settings: AttentionDecay, *, has_mlp: bool = True) -> list[Run]:
    """Every run of the grid, seed by seed, so that the whole picture is there first.

    Args:
        settings: of the experiment.
        has_mlp: whether there are MLPs to decay.
    """
    norms = {"off": (False,), "on": (True,), "both": (False, True)}[settings.qk_norm]
    mlps = {decay: {"mlp": Frobenius(decay)} for decay in settings.mlp_decays} if has_mlp else {None: {}}
    arms = chosen_arms(settings)
    return [
        Run(
            arm.name, strength, mlp, qk_norm, seed, arm.how.decays(strength, settings) | decays, settings.rest_decay,
            **arm.how.of_a_run(),
        )
        for seed in seeds(settings)
        for qk_norm in norms
        for arm in arms
        for mlp, decays in mlps.items()
        for strength in arm.strengths
    ]  # fmt: skip


def make_plan(settings: AttentionDecay, device: str) -> Plan:
    """The training plan of every run on a device, by all processes of a group.

    Raises:
        SettingError: If a batch cannot be shared evenly, or there is no compiler to compile with.
    """
    layout = make_layout(settings, device)
    is_worth_it = settings.compile == "auto" and device.startswith("cuda") and compiler_available(device)
    is_compiled = settings.compile == "on" or is_worth_it
    return Plan(**subset(settings, *OF_A_PLAN), compile=is_compiled, device=device, layout=layout)


def make_layout(settings: AttentionDecay, device: str) -> Layout:
    """Layout of the processes of a run.

    Raises:
        SettingError: For a batch that they cannot share evenly, or an order to compile without a compiler.
    """
    parallel: Any = getattr(settings, "parallel", "ddp")  # an option where the model can be cut into parts
    layout = Layout(parallel, device.partition(":")[0])
    shares = layout.data_parallel_size * settings.accumulate
    if settings.batch_size % shares:
        raise SettingError(
            f"--batch-size {settings.batch_size} cannot be shared evenly by {distributed.processes()} processes and "
            f"--accumulate {settings.accumulate}: give a multiple of {shares}"
        )
    if settings.compile == "on" and not compiler_available(device):
        raise SettingError(
            "--compile on needs a compiler (g++ or clang++, without ATEN_CPU_CAPABILITY=default; Triton on a GPU): "
            "give --compile off"
        )
    return layout


def train(
    work: Work[Any], runs: Sequence[Run], save: SaveModel | None, notices: Sequence[str] = ()
) -> Sequence[Record]:
    """Train the runs that have not ended, one after another; rows are stored in step with a checkpoint.

    Args:
        work: of the experiment.
        runs: every run of the grid.
        save: of `Command`.
        notices: said before the first run that is trained.

    Returns:
        No rows, because they are stored already.
    """
    steps = work.settings.steps
    store = RunStore(work.run_directory) if work.writes else NonWriter()
    plan = make_plan(work.settings, work.device)
    left = store.missing(runs)
    work.seconds = store.seconds
    if not left:
        return ()
    for text in notices if work.writes else ():
        work.screen.notice(text)
    choose_threads(left[0], work.data, plan)
    assert isinstance(work.screen, RunsProgress)
    with work.screen.working(steps * len(runs), steps * (len(runs) - len(left))) as progress:
        for run in left:
            _train(run, work, plan, store, progress, save)
    work.seconds = store.seconds
    return ()


def _train(
    run: Run, work: Work[Any], plan: Plan, store: RunStore | NonWriter, progress: RunsProgress, save: SaveModel | None
) -> None:
    """Train one run to its end, evaluated and stored on the way."""
    settings, session, checkpoint = work.settings, Session(run, work.data, plan), store.begin(run)
    if checkpoint is not None:
        session.restore(checkpoint)
        if work.writes:
            progress.notice(f"continuing {run} at step {session.step}")
    progress.begins(session.step)
    try:
        if checkpoint is None:
            store.add(session.evaluate())
        while session.step < settings.steps:
            for step in session.train(settings.evaluate_every - session.step % settings.evaluate_every):
                progress.at(step)
            record = session.evaluate()
            store.add(record)
            if work.writes:
                progress.evaluated(str(run), record)
            if session.step < settings.steps:
                store.checkpoint(session)
    except Diverged as error:
        if not settings.skip_diverged:
            step, file = store.checkpoint_step, settings.out / "checkpoint.safetensors"
            where = "" if step is None else f"; the last good checkpoint, of step {step}, is {file}"
            raise SettingError(f"{error}{where}") from None
        if work.writes:
            progress.notice(f"{run} diverged at step {error.step}: continuing with the next run")
        store.add({**run.key, "step": error.step, "diverged": True})
    else:
        is_kept = settings.save == "all" or (settings.save == "first" and run.seed == settings.first_seed)
        if save is not None and is_kept:
            store.save_model(run, session.whole_model(), save)
    store.end(run)
    progress.ended(settings.steps - session.step)


@dataclass(frozen=True)
class Command(Generic[A]):
    """Parts that each command has of its own.

    Attributes:
        name: of the command.
        presets: its settings by the name of the preset.
        check: of its settings.
        problem: makes what is learnt, in every process.
        unit: what the problem counts: tokens, sequences, images.
        has_mlp: whether its models have MLPs.
        save: writes a trained model into a directory that exists; None if models are not kept.
        facts: about the problem, for the summary.
        fingerprint: of the problem, where the settings do not say what is learnt: a file may have changed.
        notices: said before the first run.
        check_layout: raises a `SettingError` for a model that the processes cannot share.
    """

    name: str
    presets: Mapping[str, A]
    check: Callable[[A], A]
    problem: Callable[[A], Problem]
    unit: str
    has_mlp: bool = True
    save: SaveModel | None = None
    facts: Callable[[Any], Record] = lambda problem: {}
    fingerprint: Callable[[Any], Record] = lambda problem: {}
    notices: Callable[[A], Sequence[str]] = lambda settings: ()
    check_layout: Callable[[A, Layout], None] = lambda settings, layout: None

    def runs(self, settings: A) -> list[Run]:
        """Every run of the grid."""
        return all_runs(settings, has_mlp=self.has_mlp)

    def data(self, settings: A) -> Problem:
        """Return the problem, after checking that the processes can share a model of it."""
        made = self.problem(settings)
        device = resolve_device(settings.device, needs_float64=False)
        self.check_layout(settings, make_layout(settings, device))
        return made

    def title(self, work: Work[A]) -> str:
        """Title of the run."""
        return f"{self.name} · {len(self.runs(work.settings))} runs · {work.settings.steps} steps"

    def train(self, work: Work[A]) -> Sequence[Record]:
        """Train the runs that have not ended, as `train`."""
        return train(work, self.runs(work.settings), self.save, self.notices(work.settings))


def make_experiment(command: Command[A]) -> Experiment[A]:
    """The experiment of a command."""
    unit = command.unit
    return Experiment(
        name=command.name,
        question=question(type(next(iter(command.presets.values())))),
        presets=command.presets,
        check=command.check,
        arms=chosen_arms,
        data=command.data,
        jobs=lambda work: [Job(run.key, run) for run in command.runs(work.settings)],
        train=command.train,
        summarise=lambda work, rows: {"unit": unit, **command.facts(work.data), "arms": summarise(rows, unit)},
        columns=make_columns(unit),
        headline=headline,
        checks=CHECKS,
        title=command.title,
        screen=lambda work, title, options: RunsProgress(title, unit, **options),
        shorter="fewer --strengths or --steps",
        grid=GRID,
        not_identity=NOT_IDENTITY,
        fingerprint=command.fingerprint,
        narrow="bfloat16",
        needs_float64=False,
        processes=lambda: distributed,
        note=note,
        check_row=lambda row: check_row(row, unit),
        so_far=lambda stored: so_far(stored, unit),
        sections=make_sections,
        figure=figure,
        styles=STYLES,
        files={
            "metrics.jsonl": "every evaluation of every run, layer by layer, one JSON object per line",
            "summary.json": "the result of every cell of the grid; absent while the experiment goes on",
            "models": "the trained models that were kept",
        },
        again="The same version on the same device gives the same numbers; another device may give other digits.",
    )
