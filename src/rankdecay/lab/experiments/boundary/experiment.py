"""At which data fraction and decay strength does a transformer generalise, under which decay, and how sure are we?

Every arm is trained over a grid of data fractions, strengths and seeds; the decay of the *rest* of the model is one
setting shared by all arms, itself an axis of the grid. What an arm is, and what it controls for, is in `lab.arms`.

Importing this module does not import torch: the command line reads its settings for ``--help``.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankdecay.lab.ensemble.outcome import key_of
from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.legacy import (
    Record,
    check_counts,
    check_evaluations,
    check_numbers,
    check_seeds,
    check_threshold,
    check_width,
    configuration,
    finish,
    finished,
    given_strengths,
    identity,
    print_precision,
    seeds,
)
from rankdecay.rules import rule_names

if TYPE_CHECKING:
    from rankdecay.lab.ensemble.sweep import Plan, Trial
    from rankdecay.lab.experiments.boundary.arms import Arm
    from rankdecay.lab.precision import Products
    from rankdecay.lab.store import RunDirectory
    from rankdecay.lab.tasks import Dataset

ARMS = ("none", "l2", "smooth", "uniform_attention")
STANDARD_ARMS = ("none", "l2", "low_rank", "smooth", "prototype", "uniform_attention")
MINUTES = 15  # that the default may take on the slowest machine that counts
PLACES = {"cpu": 4, "cuda": 64}  # members of an ensemble: what fits the cache, or fills the launches


@dataclass(frozen=True)
class Boundary:
    """At which data fraction and decay strength does a transformer generalise, and under which decay?

    Trains every arm over a grid of training-set sizes, strengths and seeds, shows the phase map as it fills, and
    leaves config.json, metrics.jsonl (one line per run), summary.json and report.html in --out. Interrupted, or run
    again with a larger grid, it computes only what is missing. The default takes at most a quarter of an hour on two
    slow cores.
    """

    preset: Literal["default", "standard", "paper", "prototype"] = "default"
    """'standard': more arms, sizes and strengths; 'paper': the published grid; 'prototype': the public prototype's 6×6,
    on its ordered split."""
    task: str = "add"
    """add, subtract, multiply, divide, quadratic (x²+xy+y²), s5, selection or recall."""
    arms: tuple[str, ...] = ARMS
    """Which decays and controls of W_Q and W_K to compare; 'all' is every one there is."""
    fractions: tuple[float, ...] = ()
    """Shares of all examples used for training; by default those of the preset."""
    train_examples: tuple[int, ...] = ()
    """Numbers of training examples, for selection and recall."""
    strengths: tuple[str, ...] = ("l2=3,10,30,100", "smooth=2.5,5,10")
    """Strengths of an arm, ARM=1,3,10; an arm that is not named has its own. Arms without one take none."""
    rest_decays: tuple[float, ...] = ()
    """L2 on everything but W_Q and W_K, shared by all arms; several are an axis of the grid."""
    seeds: int = 3
    """Seeds per cell; a seed fixes split, initial weights and batches in every arm."""
    first_seed: int = 0
    """Number of the first seed: tune on seeds that are not reported, from 100 up say."""
    steps: int = 0
    """Training steps after which a run that has not generalised ends; by default the preset's."""
    widen: int = 0
    """How often to add a strength where an arm's best is the edge of its grid."""
    modulus: int = 0
    """p of the arithmetic; by default the preset's; ignored by s5."""
    values: int = 4
    """Values to select from, or pairs to recall from."""
    named: int = 2
    """Positions the last token of selection names."""
    split: Literal["unordered", "ordered"] = "unordered"
    """'ordered' lets (a, b) leak (b, a) in commutative tasks; only for replication."""
    rule: str = "smooth"
    """Rule of the controls that take a low-rank decay apart, and of its schedules: newton_schulz, polar, prox,
    smooth, or one that is registered."""
    smoothing: float = 0.13
    """For the smooth rule: directions below this share of ‖W‖_F shrink in proportion."""
    strength: float = 5.0
    """Strength of the low-rank decay in the arms whose axis is something else: a norm, a target rank."""
    every: int = 4
    """Apply four steps' low-rank decay every fourth step, to save time; the published rules do not."""
    lr: float = 2e-3
    """Learning rate of AdamW."""
    batch_size: int = 128
    """Examples per step and run."""
    precision: Literal["auto", "float32", "mixed", "float64"] = "auto"
    """'mixed': bfloat16 products, float32 elsewhere; 'auto': mixed where the machine is faster at it, else float32."""
    width: int = 64
    """Width of the network, which has 4 heads."""
    mlp_width: int = 256
    """Width of the MLP's hidden layer."""
    depth: int = 2
    """Layers of the network."""
    qk_norm: Literal["head", "width"] = "head"
    """RMSNorm of queries and keys, per head or over the full width; the arm no_qk_norm has none."""
    gains: bool = False
    """Learnable gains in every norm."""
    position_scale: float = 0.3
    """Standard deviation of the initial position embedding."""
    threshold: float = 0.95
    """Test accuracy that counts as generalised, if the next evaluation holds it; a run then leaves."""
    evaluate_every: int = 40
    """Steps between evaluations; must divide --steps."""
    places: int = 0
    """Runs trained together by one ensemble; by default 4 on a CPU, 64 on a GPU."""
    ray: str | None = None
    """Run over a Ray cluster: its address, or 'local' to start one on this machine."""
    gpu_share: float = 1.0
    """Of a GPU that each Ray task takes."""
    out: Path = Path("runs/boundary")
    """Where results go; an interrupted or smaller sweep there is continued."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, where there is a compiler; 'auto' uses it on a GPU and for runs long enough to repay it."""
    quiet: bool = False
    """No progress and no table."""
    json: bool = False
    """Print the summary as JSON on standard output; progress goes to standard error."""


PAPER_FRACTIONS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
PRESETS = {
    "default": Boundary(),
    "standard": Boundary(
        preset="standard", arms=STANDARD_ARMS, strengths=(), widen=1, out=Path("runs/boundary-standard")
    ),
    "paper": Boundary(
        preset="paper",
        strengths=(),
        arms=("none", "l2_all", "paper_a1", "paper_s5", "paper_s6", "uniform_attention"),
        batch_size=512,
        width=128,
        mlp_width=512,
        every=1,
        evaluate_every=100,
        lr=1e-3,
        widen=0,
        out=Path("runs/boundary-paper"),
    ),
    "prototype": Boundary(
        preset="prototype",
        arms=("l2_all", "prototype"),
        strengths=("l2_all=0.001,0.005,0.01,0.05,0.1,0.5",),
        split="ordered",
        batch_size=512,
        width=128,
        mlp_width=512,
        qk_norm="width",
        gains=True,
        position_scale=0.02,
        lr=1e-3,
        threshold=0.99,
        evaluate_every=100,
        widen=0,
        seeds=1,
        out=Path("runs/boundary-prototype"),
    ),
}


@dataclass(frozen=True)
class Scale:
    """What a preset takes for the settings that depend on the task: modulus, budget, sizes of the training set."""

    modulus: int
    steps: int
    sizes: tuple[float, ...]  # fractions, or numbers of examples for the tasks whose examples are drawn
    rest_decay: float


STANDARD = {
    "selection": Scale(13, 800, (700, 850, 1000, 1250), 2.0),
    "recall": Scale(8, 1200, (700, 1000, 1400, 2000), 1.0),
    "s5": Scale(0, 1600, (0.3, 0.5, 0.7), 1.0),
}
STANDARD_MODULAR = Scale(31, 1200, (0.5, 0.6, 0.7, 0.8), 3.0)
DEFAULT_MODULAR = Scale(31, 1200, (0.5, 0.65, 0.8), 3.0)
PAPER = Scale(97, 3000, PAPER_FRACTIONS, 0.1)
PROTOTYPE = Scale(113, 2500, (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), 0.1)
GRID = (  # axes that may grow
    "arms",
    "fractions",
    "train_examples",
    "strengths",
    "rest_decays",
    "seeds",
    "first_seed",
    "widen",
)
PLACEMENT = ("places", "ray", "gpu_share")  # where a run is computed, which does not change what its row says


def filled(settings: Boundary) -> Boundary:
    """The settings with everything the preset decides filled in.

    Raises:
        SettingError: for settings that cannot work.
    """
    from rankdecay.lab.tasks import SAMPLED, TASKS

    check_name("--task", settings.task, TASKS)
    sampled = settings.task in SAMPLED
    if settings.preset in ("default", "standard"):
        scale = STANDARD.get(settings.task, DEFAULT_MODULAR if settings.preset == "default" else STANDARD_MODULAR)
    else:
        if sampled:
            raise SettingError(
                f"--preset {settings.preset} has no grid for --task {settings.task}: use --preset standard"
            )
        scale = PAPER if settings.preset == "paper" else PROTOTYPE
    if sampled and settings.fractions:
        raise SettingError(f"--fractions has no meaning for --task {settings.task}: use --train-examples")
    if not sampled and settings.train_examples:
        raise SettingError(f"--train-examples has no meaning for --task {settings.task}: use --fractions")
    return dataclasses.replace(
        settings,
        modulus=settings.modulus or scale.modulus,
        steps=settings.steps or scale.steps,
        fractions=() if sampled else tuple(sorted(settings.fractions or scale.sizes)),
        train_examples=tuple(sorted(settings.train_examples or map(int, scale.sizes))) if sampled else (),
        rest_decays=settings.rest_decays or (scale.rest_decay,),
    )


def check(settings: Boundary) -> None:
    """Raises a `SettingError` for settings that cannot work, before anything is built or written."""
    from rankdecay.lab.tasks.base import check_fraction

    for fraction in settings.fractions:
        check_fraction(fraction)
    check_seeds(settings)
    check_counts(settings, "steps", "seeds", "every", "depth", "mlp_width", "batch_size", "evaluate_every")
    for name in ("places", "widen"):
        if getattr(settings, name) < 0:
            raise SettingError(f"--{name} {getattr(settings, name)} is negative: give 0 or more")
    check_evaluations(settings)
    check_numbers(settings, "strength", "smoothing", "lr")
    for decay in settings.rest_decays:
        if not 0 <= settings.lr * decay < 1:
            raise SettingError(f"--rest-decays {decay:g} must be at least 0 and below {1 / settings.lr:g}, 1 / --lr")
    check_name("--rule", settings.rule, rule_names())
    check_threshold(settings.threshold)
    check_width(settings.width, heads=4, example=64)
    if not 0 < settings.gpu_share <= 1:
        raise SettingError(f"--gpu-share {settings.gpu_share} must be in (0, 1]: 0.5 lets two tasks share a GPU")


def chosen_arms(settings: Boundary) -> dict[str, Arm]:
    """The arms asked for, with the strengths asked for.

    Raises:
        SettingError: for an unknown arm or strengths it cannot take.
    """
    from rankdecay.lab.experiments.boundary.arms import PUBLISHED, arms

    known = arms(settings)
    names = list(dict.fromkeys(settings.arms))
    if "all" in names:
        names = [name for name in known if name not in PUBLISHED or settings.preset == "paper"]
    if not names:
        raise SettingError(f"--arms is empty: choose from {', '.join(known)}")
    chosen = {check_name("--arms", name, known): known[name] for name in names}
    preset = PRESETS[settings.preset].strengths
    for name, strengths in given_strengths(settings.strengths, chosen, "1,3,10", preset).items():
        arm = chosen[name]
        given = f"--strengths {name}={','.join(f'{strength:g}' for strength in strengths)}"
        if not arm.strengths:
            raise SettingError(f"{given}: the arm {name} has no strength")
        for strength in strengths:
            if not 0 < strength < arm.limit:
                raise SettingError(f"{given}: {strength:g} is not above 0 and below {arm.limit:g}, as {name} needs")
            if arm.whole and strength != int(strength):
                raise SettingError(f"{given}: {strength:g} is no whole number, as {name} needs: give {name}=2,4")
        chosen[name] = dataclasses.replace(arm, strengths=strengths)
    return chosen


Size = tuple[float, Record]  # a fraction of all examples, and the arguments of `make_dataset` that give it


@functools.lru_cache(maxsize=1)  # the same for every arm
def training_sets(settings: Boundary) -> tuple[list[Size], Dataset]:
    """The sizes of the training set to try, and the data set of the first.

    Raises:
        SettingError: for a data set that cannot be built, or a batch larger than the smallest.
    """
    from rankdecay.lab.tasks import make_dataset, sequences

    numbers = {"modulus": settings.modulus, "values": settings.values, "named": settings.named}
    whole = sequences(settings.task, **numbers)
    common: Record = {"task": settings.task, **numbers, "split": settings.split}
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
    from rankdecay.lab.ensemble.ensemble import Member
    from rankdecay.lab.ensemble.sweep import Trial
    from rankdecay.lab.ensemble.transformer import TransformerConfig

    sizes, data = training_sets(settings)
    for seed in seeds(settings):
        for strength in strengths:
            treatment = arm.treat(strength)
            config = TransformerConfig(
                data.vocabulary,
                data.length,
                data.outputs,
                width=settings.width,
                depth=settings.depth,
                mlp_width=settings.mlp_width,
                qk_norm=settings.qk_norm if treatment.qk_norm else "none",
                gains=settings.gains,
                position_scale=settings.position_scale,
            )
            own = treatment.rest_decay
            for rest in settings.rest_decays if own is None else (own,):
                for fraction, size in sizes:
                    member = Member(
                        arm.name,
                        seed,
                        treatment.decay,
                        rest,
                        settings.lr,
                        uniform_attention=treatment.uniform_attention,
                        control=treatment.control,
                    )
                    yield Trial(strength, fraction, member, config, size, treatment.stays)


def fixed(settings: Boundary) -> Record:
    """The settings that every row of one directory shares."""
    return identity(settings, without=(*GRID, *PLACEMENT))


def make_plan(settings: Boundary, device: str, missing: Sequence[Trial]) -> Plan:
    """How the trials that are missing are trained on a device."""
    import torch

    from rankdecay.lab.ensemble.ensemble import Ensemble, Training, worth_compiling
    from rankdecay.lab.ensemble.sweep import Plan
    from rankdecay.lab.tasks import make_dataset

    training = Training(
        batch_size=settings.batch_size,
        precision=settings.precision,  # pyright: ignore[reportArgumentType] - auto is resolved
        device=device,
    )
    together = places(settings, device)

    def ensemble() -> Ensemble:
        some = [trial for trial in missing if trial.config == missing[0].config][:together]
        data = [make_dataset(seed=trial.member.seed, **trial.data) for trial in some]
        return Ensemble(some[0].config, [trial.member for trial in some], data, training)

    steps = len(missing) / together / torch.get_num_threads() * settings.steps
    training = dataclasses.replace(training, compile=worth_compiling(settings.compile, device, ensemble, steps))
    return Plan(training, settings.steps, settings.evaluate_every, settings.threshold, together)


def places(settings: Boundary, device: str) -> int:
    """Runs trained together by one ensemble."""
    return settings.places or PLACES[device.partition(":")[0]]


def products(settings: Boundary, device: str) -> Products:
    """The products of the MLPs, of which a step of an ensemble mostly consists."""
    from rankdecay.lab.precision import Products

    rows = settings.batch_size * training_sets(settings)[1].length
    return Products(places(settings, device), rows, settings.width, settings.mlp_width)


def run(settings: Boundary, command: str) -> Record:
    """Runs the sweep, or what is missing of it, and returns its summary.

    Args:
        settings: what to run.
        command: how to repeat it, for the report.

    Raises:
        SettingError: if the settings or the output directory cannot work.
    """
    settings = filled(settings)
    check(settings)
    arms = chosen_arms(settings)
    for arm in arms.values():
        next(trials(settings, arm, arm.strengths or (0.0,)))  # a data set that cannot be built says so before anything

    from rankdecay.lab import precision
    from rankdecay.lab.experiments.boundary.statistics import reference, summarise
    from rankdecay.lab.experiments.boundary.terminal import PhaseProgress
    from rankdecay.lab.machine import resolve_device
    from rankdecay.lab.progress import Promise
    from rankdecay.lab.store import RunDirectory

    device = resolve_device(settings.device)
    described = [
        {"name": arm.name, "description": arm.description, "control": arm.controls_for} for arm in arms.values()
    ]
    title = f"{settings.task} · {len(arms)} arms · {settings.seeds} seeds · {settings.steps} steps · {device}"
    promise = Promise(MINUTES, "--seeds 1 or fewer --arms or --strengths")
    progress = PhaseProgress(title, list(arms), quiet=settings.quiet, to_stderr=settings.json, promise=promise)
    settings, choice = precision.resolve(
        settings, "boundary", device, progress.notice, narrow="mixed", products=products(settings, device)
    )
    asked = identity(settings, without=PLACEMENT)
    config = configuration("boundary", asked, described, device, command, choice) | {"fixed": fixed(settings)}
    with RunDirectory.open(settings.out, config, progress.notice, ("command", "schema", "fixed")) as directory:
        sweep = _Sweep(settings, arms, directory, device, progress)
        known = _with_new_arms(directory.config, config)
        if sweep.missing:
            if directory.summary is not None:  # complete until now, when there was nothing to warn of
                precision.warn_if_slow(choice, settings.out, device, progress.notice, products(settings, device))
            directory.save_config(known)
        sweep.run()
        summary = finished(directory, progress.notice, "a larger grid would be added to it")
        if summary is not None:
            return summary
        names = [arm["name"] for arm in known["arms"]]
        summary = {
            "command": "boundary",
            "settings": asked,
            "threshold": settings.threshold,
            **summarise(directory.metrics(), names, reference(names)),
            "wall_seconds": sweep.seconds,
        }
        return finish(directory, summary)


def _with_new_arms(stored: Record, config: Record) -> Record:
    """The configuration now asked for, with the arms that earlier sweeps of the directory had as well."""
    new = [arm["name"] for arm in config["arms"]]
    kept = [arm for arm in stored.get("arms", []) if arm["name"] not in new]
    return config | {"arms": [*config["arms"], *kept]}


class _Sweep:
    """The trials that a directory still lacks, and how they are run."""

    def __init__(
        self, settings: Boundary, arms: dict[str, Arm], directory: RunDirectory, device: str, progress: Any
    ) -> None:
        self._settings, self._arms, self._directory = settings, arms, directory
        self._device, self._progress = device, progress
        self._rows = directory.drop_damaged_line()
        self._done = {key_of(row) for row in self._rows}
        self.seconds = max((row["seconds"] for row in self._rows), default=0.0)
        self._columns = {name: list(arm.strengths or (0.0,)) for name, arm in arms.items()}
        typed = set(settings.strengths) - set(PRESETS[settings.preset].strengths)
        asked = {text.partition("=")[0] for text in typed}
        for row in self._rows:  # strengths that an earlier widening added, unless the user says which to run
            if row["arm"] not in asked and row["strength"] not in self._columns.get(row["arm"], [row["strength"]]):
                self._columns[row["arm"]].append(row["strength"])
        self.missing = self._missing()

    def _missing(self) -> list[Trial]:
        wanted = [t for name, arm in self._arms.items() for t in trials(self._settings, arm, self._columns[name])]
        waiting = [trial for trial in wanted if trial.key not in self._done]
        return sorted(waiting, key=lambda trial: trial.member.seed)  # a coarse map of everything first

    def run(self) -> None:
        """Trains what is missing, then widens the grid of every arm whose best strength is at its edge."""
        self._progress.begin(self._rows, self.missing, self._settings.steps)
        with self._progress:
            self._train(self.missing)
            for _ in range(self._settings.widen):
                if not self._widen():
                    break

    def _widen(self) -> bool:
        from rankdecay.lab.experiments.boundary.arms import wider
        from rankdecay.lab.experiments.boundary.statistics import edges

        added = False
        for name, arm in self._arms.items():
            edge = edges([row for row in self._rows if row["arm"] == name])["edge"]
            strength = (
                wider(arm, self._columns[name], edge) if arm.strengths and edge in ("lowest", "highest") else None
            )
            if strength is not None:
                self._progress.notice(f"{name} does best at the {edge} strength tried: adding {strength:g}")
                self._columns[name].append(strength)
                added = True
        if added:
            missing = self._missing()
            self._progress.begin(self._rows, missing, self._settings.steps)
            self._train(missing)
        return added

    def _train(self, missing: list[Trial]) -> None:
        if not missing:
            return
        self._directory.reopen()
        begun, before = time.monotonic(), self.seconds
        for row in self._ended(missing):
            self.seconds = before + time.monotonic() - begun
            row["seconds"] = round(self.seconds, 3)
            self._directory.append([row])
            self._rows.append(row)
            self._progress.update(row)
        self._done = {trial.key for trial in missing} | self._done

    def _ended(self, missing: list[Trial]) -> Iterator[Record]:
        plan = make_plan(self._settings, self._device, missing)
        if self._settings.ray is not None:
            from rankdecay.lab.ensemble import cluster

            return cluster.rows(missing, plan, self._settings.ray, self._settings.gpu_share, self._progress.notice)
        from rankdecay.lab.ensemble import local

        return local.rows(missing, plan, self._directory)


def print_summary(summary: Record) -> None:
    """The table of a finished sweep, one line per arm at its best strength, and what may be said of it."""
    from rich.console import Console
    from rich.table import Table

    from rankdecay.lab.experiments.boundary.verdict import verdict
    from rankdecay.lab.tasks import SAMPLED

    by_number = summary["settings"]["task"] in SAMPLED
    table = Table(box=None, pad_edge=False)
    for heading in ("arm", "best strength", "boundary", "95 % interval", "runs that generalised", "stable rank Q, K"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in summary["arms"]:
        best = arm["boundary"]
        if best is None:
            table.add_row(arm["name"], "", "no runs yet")
            continue
        whole = _whole(arm) if by_number else 1.0

        def size(value: float | None, whole: float = whole) -> str:
            return "…" if value is None else f"{value * whole:.0f}" if by_number else f"{value:.3f}"

        sign = {"above": "> ", "below": "< "}.get(best["censored"] or "", "")
        edge = {"lowest": " (lowest tried)", "highest": " (highest tried)"}.get(best["edge"] or "", "")
        rank = next((c["stable_rank"] for c in reversed(arm["cells"]) if _in_column(c, best)), None)
        table.add_row(
            arm["name"],
            f"{best['strength']:g}{edge}" if best["strength"] else "",
            sign + size(best["train_fraction"]),
            f"{size(best['low'])} – {size(best['high'])}",
            f"{arm['generalised']} of {arm['runs']}",
            "—" if rank is None else f"{rank:.3g}",
        )
    console = Console(highlight=False)
    console.print(table)
    print_precision(console, summary)
    what = "training examples" if by_number else "fraction of the data"
    console.print(f"\nboundary: {what} from which half of the runs hold {summary['threshold']:.0%} test accuracy")
    console.print(f"\n{verdict(summary)}", markup=False)


def _whole(arm: Record) -> float:
    """The number of distinct sequences of the task, from any cell."""
    cell = arm["cells"][0]
    return cell["train_examples"] / cell["train_fraction"]


def _in_column(cell: Record, column: Record) -> bool:
    return (cell["strength"], cell["rest_decay"]) == (column["strength"], column["rest_decay"])
