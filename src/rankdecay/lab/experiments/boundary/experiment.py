"""At which data fraction and decay strength does a transformer generalise, under which decay, and how sure are we?

Every arm is trained over a grid of data fractions, strengths and seeds; the decay of the *rest* of the model is one
setting shared by all arms, itself an axis of the grid. What an arm is, and what it controls for, is in :mod:`arms`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rankdecay.lab.ensemble import local
from rankdecay.lab.ensemble.compiling import worth_compiling
from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Member, Training
from rankdecay.lab.ensemble.outcome import KEY, key_of
from rankdecay.lab.ensemble.sweep import SweepPlan, Trial
from rankdecay.lab.ensemble.transformer import TransformerConfig
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import Arm, Experiment, Job, Work
from rankdecay.lab.experiments.boundary.arms import make_arms, styles, wider
from rankdecay.lab.experiments.boundary.charts import sections
from rankdecay.lab.experiments.boundary.claims import CHECKS, columns, headline, note
from rankdecay.lab.experiments.boundary.read import checked_row, merged, so_far
from rankdecay.lab.experiments.boundary.settings import ALIASES, GRID, PLACEMENT, PRESETS, Boundary, check
from rankdecay.lab.experiments.boundary.statistics import edges, reference, summarise
from rankdecay.lab.experiments.boundary.terminal import PhaseProgress
from rankdecay.lab.precision import Products
from rankdecay.lab.settings import Record, question, renamed, seeds, subset
from rankdecay.lab.tasks import make_dataset, sequences

if TYPE_CHECKING:
    from pathlib import Path

    from rankdecay.lab.stored import StoredRun
    from rankdecay.lab.tasks import Dataset

PLACES = {"cpu": 4, "cuda": 64}  # members of an ensemble: what fits the cache, or fills the launches


# --- the runs of the grid ---


Size = tuple[float, Record]  # a fraction of all examples, and the arguments of `make_dataset` that give it


@functools.lru_cache(maxsize=1)  # the same for every arm
def training_sets(settings: Boundary) -> tuple[list[Size], Dataset]:
    """The sizes of the training set to try, and the data set of the first.

    Raises:
        SettingError: For a data set that cannot be built, or a batch larger than the smallest.
    """
    numbers = subset(settings, "modulus", "values", "named")
    whole = sequences(settings.task, **numbers)
    common = subset(settings, "task", "split") | numbers
    common |= {"validation": settings.validation} if settings.validation else {}
    sizes: list[Size] = [(f, common | {"train_fraction": f}) for f in settings.fractions]
    sizes += [(count / whole, common | {"train_examples": count}) for count in settings.train_examples]
    first = [make_dataset(seed=0, **size) for _, size in sizes]
    smallest = min(len(data.train_targets) for data in first)
    if settings.batch_size > smallest:
        raise SettingError(
            f"--batch-size {settings.batch_size} is larger than the smallest training set of {smallest} examples: "
            "give a smaller batch, or more training examples"
        )
    return sizes, first[0]


def trials(settings: Boundary, arm: Arm, strengths: Iterable[float]) -> Iterator[Trial]:
    """The runs of some columns of an arm, seed by seed, so that the map fills evenly."""
    sizes, data = training_sets(settings)
    for seed in seeds(settings):
        for strength in strengths:
            treatment = arm.how.treat(strength)
            config = TransformerConfig(
                data.vocabulary,
                data.length,
                data.outputs,
                qk_norm=settings.qk_norm if treatment.qk_norm else "none",
                **subset(settings, "width", "depth", "mlp_width", "gains", "position_scale"),
            )
            own_rest = treatment.rest_decay
            for rest in settings.rest_decays if own_rest is None else (own_rest,):
                for fraction, size in sizes:
                    member = Member(
                        arm.name,
                        seed,
                        treatment.decay,
                        rest,
                        treatment.lr or settings.lr,
                        uniform_attention=treatment.uniform_attention,
                        control=treatment.control,
                        accelerator=treatment.accelerator,
                    )
                    yield Trial(strength, fraction, member, config, size, treatment.stays)


def make_plan(settings: Boundary, device: str, missing: Sequence[Trial]) -> SweepPlan:
    """How the trials that are missing are trained on a device."""
    training = Training(device=device, **subset(settings, "batch_size", "precision"))
    together = places(settings, device)

    def ensemble() -> Ensemble:
        some = [trial for trial in missing if trial.config == missing[0].config][:together]
        data = [make_dataset(seed=trial.member.seed, **trial.data) for trial in some]
        members = [  # without the norms of other runs, which would have to be trained first
            dataclasses.replace(trial.member, control=dataclasses.replace(trial.member.control, yoked=None))
            for trial in some
        ]
        return Ensemble(some[0].config, members, data, training)

    steps = len(missing) / together / torch.get_num_threads() * settings.steps
    training = dataclasses.replace(training, compile=worth_compiling(settings.compile, device, ensemble, steps))
    return SweepPlan(training, settings.steps, settings.evaluate_every, settings.threshold, together)


def places(settings: Boundary, device: str) -> int:
    """Runs trained together by one ensemble."""
    return settings.places or PLACES[device.partition(":")[0]]


def products(settings: Boundary, device: str) -> Products:
    """The products of the MLPs, of which a step of an ensemble mostly consists."""
    rows = settings.batch_size * training_sets(settings)[1].length
    return Products(places(settings, device), rows, settings.width, settings.mlp_width)


# --- the sweep ---


def strengths_of(work: Work[Boundary]) -> dict[str, list[float]]:
    """The strengths of every arm: those asked for, and those that an earlier widening added.

    Rows of other strengths do not count for an arm whose strengths the user typed.
    """
    columns = {arm.name: list(arm.strengths or (0.0,)) for arm in work.arms}
    typed = set(work.settings.strengths) - set(PRESETS[work.settings.preset].strengths)
    asked = {text.partition("=")[0] for text in typed}
    for row in work.rows:
        if row["arm"] not in asked and row["strength"] not in columns.get(row["arm"], [row["strength"]]):
            columns[row["arm"]].append(row["strength"])
    return columns


def jobs(work: Work[Boundary], columns: Mapping[str, Sequence[float]] | None = None) -> list[Job]:
    """Every run of the grid, a coarse map of everything first."""
    columns = columns or strengths_of(work)
    wanted = [trial for arm in work.arms for trial in trials(work.settings, arm, columns[arm.name])]
    return [
        Job(dict(zip(KEY, trial.key, strict=True)), trial)
        for trial in sorted(wanted, key=lambda trial: trial.member.seed)
    ]


def train(work: Work[Boundary]) -> Iterator[Record]:
    """Train what is missing, then widen the grid of every arm whose best strength is at its edge."""
    columns, rows, screen = strengths_of(work), list(work.rows), work.screen
    assert isinstance(screen, PhaseProgress)
    work.seconds = max((row["seconds"] for row in rows), default=0.0)
    missing = [job.how for job in work.jobs]
    screen.begin(rows, missing)
    with screen:
        for widened in range(work.settings.widen + 1):
            if widened:
                if not _widen(work, rows, columns):
                    return
                done = {key_of(row) for row in rows}  # an earlier sweep may have been there
                missing = [job.how for job in jobs(work, columns) if job.how.key not in done]
                screen.begin(rows, missing)
            begun, before = time.monotonic(), work.seconds or 0.0
            for row in _rows_of_finished_runs(work, missing) if missing else ():
                work.seconds = before + time.monotonic() - begun
                row["seconds"] = round(work.seconds, 3)
                rows.append(row)
                yield row
                screen.update(row)


def _widen(work: Work[Boundary], rows: Sequence[Record], columns: dict[str, list[float]]) -> bool:
    """Add a strength to every arm whose best one is at the edge of its grid; return whether there was one."""
    added = False
    for arm in work.arms:
        edge = edges([row for row in rows if row["arm"] == arm.name])["edge"]
        strength = wider(arm, columns[arm.name], edge) if arm.strengths and edge in ("lowest", "highest") else None
        if strength is not None:
            work.screen.notice(f"{arm.name} does best at the {edge} strength tried: adding {strength:g}")
            columns[arm.name].append(strength)
            added = True
    return added


def _rows_of_finished_runs(work: Work[Boundary], missing: Sequence[Trial]) -> Iterator[Record]:
    """A row for each run as it ends."""
    settings, plan = work.settings, make_plan(work.settings, work.device, missing)
    if settings.ray is not None:
        from rankdecay.lab.ensemble import cluster

        return cluster.rows(missing, plan, settings.ray, settings.gpu_share, work.screen.notice)
    return local.rows(missing, plan, work.run_directory, ALIASES)


def summary_of(work: Work[Boundary], rows: Sequence[Record]) -> Record:
    """The cells, boundaries and differences of all runs of the directory, earlier arms included."""
    names = [arm["name"] for arm in renamed(work.run_directory.config, ALIASES)["arms"]]
    return {"threshold": work.settings.threshold, **summarise(rows, names, reference(names))}


def check_datasets(settings: Boundary) -> Any:
    """Build a run of every arm, so that a data set that cannot be built says so before anything is written."""
    for arm in make_arms(settings):
        next(trials(settings, arm, arm.strengths or (0.0,)))


def figure(stored: StoredRun, path: Path) -> Path:
    """Draw the figure for a paper; training needs no matplotlib."""
    from rankdecay.lab.experiments.boundary.figure import figure as draw

    return draw(stored, path)


EXPERIMENT = Experiment(
    name="boundary",
    question=question(Boundary),
    presets=PRESETS,
    check=check,
    arms=make_arms,
    data=check_datasets,
    jobs=jobs,
    train=train,
    summarise=summary_of,
    columns=columns,
    headline=headline,
    checks=CHECKS,
    note=note,
    title=lambda work: (
        f"{work.settings.task} · {len(work.arms)} arms · {work.settings.seeds} seeds · {work.settings.steps} steps"
    ),
    screen=lambda work, title, options: PhaseProgress(title, [arm.name for arm in work.arms], **options),
    shorter="--seeds 1 or fewer --arms or --strengths",
    grid=GRID,
    not_identity=PLACEMENT,
    narrow="mixed",
    products=lambda work: products(work.settings, work.device),
    aliases=ALIASES,
    setting_names={"train_fraction": "fractions"},
    check_row=checked_row,
    so_far=so_far,
    merged=merged,
    sections=sections,
    figure=figure,
    styles=styles,
    files={
        "metrics.jsonl": "every finished run with its curves, one JSON object per line",
        "summary.json": "cells, boundaries and differences; absent while the sweep runs",
    },
    again="This asks for the same runs; another machine or version may give other digits.",
)
