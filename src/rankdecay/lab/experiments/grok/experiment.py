"""Does low-rank decay make a scale-invariant transformer generalise where L2 does not, and why?

Trains the same small transformers from the same seeds under several decays of W_Q and W_K. The decay of the *rest*
of the model is one setting shared by all arms, so an arm differs from its control in one thing. Two controls bound
what may be claimed: an L2 tuned far beyond its usual strength, and attention held uniform.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rankdecay.decay.policy import Frobenius, LowRank, OfMatrix, Scale
from rankdecay.lab.ensemble.outcome import steps_to_hold
from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import Arm, Column, Experiment, Job, Work
from rankdecay.lab.experiments.grok.charts import figure, sections, styles
from rankdecay.lab.experiments.grok.claims import CHECKS, headline, note
from rankdecay.lab.experiments.grok.inspect_run import run_over_time
from rankdecay.lab.experiments.grok.settings import PRESETS, Grok, check
from rankdecay.lab.experiments.grok.summary import so_far, summarise
from rankdecay.lab.precision import Products
from rankdecay.lab.progress import Progress
from rankdecay.lab.report.table import Row, has
from rankdecay.lab.report.words import wilson_interval
from rankdecay.lab.settings import Record, question, seeds, subset
from rankdecay.lab.tasks import Dataset, make_dataset
from rankdecay.rules import rule_names

if TYPE_CHECKING:
    from rankdecay.lab.ensemble.ensemble import Ensemble


# --- what is trained ---


@dataclass(frozen=True)
class GrokTreatment:
    """One way to treat W_Q and W_K."""

    decay: OfMatrix | None = None
    uniform_attention: bool = False


def make_arms(settings: Grok) -> list[Arm]:
    """The arms asked for, in the order of `settings.ARMS`; those named by a rule stand beside ``low_rank``."""

    def arm(name: str, description: str, decay: OfMatrix | None = None, uniform: bool = False) -> Arm:
        return Arm(name, description, GrokTreatment(decay, uniform))

    def low_rank(name: str, rule: Any, scale: Scale = settings.scale, strength: float = settings.strength) -> Arm:
        decay = LowRank(strength, rule, scale, every=settings.every, smoothing=settings.smoothing)
        return arm(name, f"The library's decay of W_Q and W_K: {decay.describe()}.", decay)

    shared, tuned = settings.weight_decay, settings.tuned_strength
    strongest = f"L2 of strength {tuned:g} on W_Q and W_K: {tuned * settings.lr:.0%} of the weights per step"
    prototype = LowRank(0.01, "newton_schulz", "absolute", every=1, lr_coupled=False)
    every = [
        arm("none", "No decay of W_Q and W_K."),
        arm(
            "l2", f"L2 of strength {shared:g} on W_Q and W_K, the same as on the rest of the model.", Frobenius(shared)
        ),
        arm("l2_tuned", f"{strongest}, the strength at which L2 does best.", Frobenius(tuned)),
        arm(
            "l2_ramp",
            f"The same L2, {tuned:g}, rising from 0 over {settings.warmup} steps.",
            Frobenius(tuned, warmup=settings.warmup),
        ),
        arm(
            "radial",
            "A constant amount of each norm per step, at most a tenth of it: no rank is lowered.",
            Frobenius(settings.amount, power=0, cap=0.1),
        ),
        low_rank("low_rank", settings.rule),
        low_rank("relative", settings.rule, "relative", tuned),  # L2's law of the norm, so L2's strength
        *(low_rank(rule, rule) for rule in rule_names() if rule in settings.arms),
        arm("prototype", "The published prototype: five cubic Newton–Schulz steps, 0.01 per step.", prototype),
        arm("uniform_attention", "W_Q and W_K held at zero: every position attends equally to all.", uniform=True),
    ]
    return [arm for arm in every if arm.name in settings.arms]


def make_datasets(settings: Grok) -> dict[int, Dataset]:
    """One data set per seed, checked against the batch size."""
    how = subset(settings, "modulus", "train_fraction", "train_examples", "values", "split")
    how |= {"validation": settings.validation or 0}
    datasets = {seed: make_dataset(settings.task, seed, **how) for seed in seeds(settings)}
    size = min(len(data.train_targets) for data in datasets.values())  # unordered splits differ in size
    if settings.batch_size > size:
        raise SettingError(
            f"--batch-size {settings.batch_size} is larger than the training set of {size} examples: "
            f"give at most {size}, or more training examples"
        )
    return datasets


def make_ensembles(settings: Grok, arms: Sequence[Arm], datasets: Mapping[int, Dataset], device: str) -> list[Ensemble]:
    """One ensemble per arm on a CPU, where small batches stay in the cache; all members at once on a GPU."""
    import torch

    from rankdecay.lab.ensemble.compiling import worth_compiling
    from rankdecay.lab.ensemble.ensemble import Ensemble
    from rankdecay.lab.ensemble.members import Member, Training
    from rankdecay.lab.ensemble.transformer import TransformerConfig

    data = next(iter(datasets.values()))
    shape = subset(settings, "width", "depth", "mlp_width", "qk_norm", "gains", "position_scale")
    config = TransformerConfig(data.vocabulary, data.length, data.outputs, **shape)
    on_gpu = device.startswith("cuda")
    training = Training(device=device, **subset(settings, "batch_size", "precision"))
    rates = settings.weight_decay, settings.lr
    members = [
        Member(arm.name, seed, arm.how.decay, *rates, uniform_attention=arm.how.uniform_attention)
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


def jobs(work: Work[Grok]) -> list[Job]:
    """Every member of the ensembles."""
    return [Job({"arm": arm.name, "seed": seed}, arm.how) for arm in work.arms for seed in work.data]


def products(work: Work[Grok]) -> Products:
    """The products of the MLPs, of which a step of an ensemble mostly consists."""
    settings, datasets = work.settings, work.data
    members = len(datasets) * (len(work.arms) if work.device.startswith("cuda") else 1)
    length = next(iter(datasets.values())).length
    return Products(members, settings.batch_size * length, settings.width, settings.mlp_width)


def title(work: Work[Grok]) -> str:
    """Title of the run."""
    settings = work.settings
    return f"{settings.task} · {len(work.arms)} arms × {settings.seeds} seeds · {settings.steps} steps"


def train(work: Work[Grok]) -> Sequence[Record]:
    """Train all members in step, from the last checkpoint on; their rows are stored with the checkpoints."""
    from rankdecay.lab.ensemble.runner import Runner

    settings, progress = work.settings, work.screen
    assert isinstance(progress, Progress)

    def leaves(records: Sequence[Record]) -> bool:
        return settings.stop_when_generalised and steps_to_hold(records, settings.threshold) is not None

    ensembles = make_ensembles(settings, work.arms, work.data, work.device)
    runner = Runner(
        work.run_directory, ensembles, steps=settings.steps, evaluate_every=settings.evaluate_every, leaves=leaves
    )
    if runner.step:
        progress.notice(f"continuing {settings.out} at step {runner.step}")
    with progress.working(runner.work):
        runner.train(progress)
    work.seconds = runner.seconds
    return ()


def summary(work: Work[Grok], rows: list[Record]) -> Record:
    """The figures of every arm."""
    threshold = work.settings.threshold
    return {"threshold": threshold, "arms": summarise(rows, [arm.name for arm in work.arms], threshold)}


# --- the table ---


def _interval(row: Row) -> str:
    low, high = wilson_interval(row["generalised"], row["seeds"])
    return f"{low * 100:.0f}–{high * 100:.0f} %"


COLUMNS = (
    Column("generalised", lambda row: f"{row['generalised']} of {row['seeds']}", small=_interval),
    Column("median\nsteps", "steps_to_generalise", ",.0f"),
    Column("test\naccuracy", "test_accuracy", ".1%"),
    Column("train\naccuracy", "train_accuracy", ".1%", where="page"),
    Column("diverged\nseeds", "diverged", "d", when=lambda rows: any(row.get("diverged") for row in rows)),
    Column("stable\nrank", "stable_rank", when=has("stable_rank")),
    Column("effective\nrank", "effective_rank", when=has("effective_rank")),
    Column("stable rank,\nhead product", "product_stable_rank", where="page"),
    Column("effective rank,\nhead product", "product_effective_rank", where="page"),
    Column("‖W_Q‖", "query_norm", where="page"),
    Column("‖W_K‖", "key_norm", where="page"),
    Column("‖D‖/‖W‖ of\na decay step", "decay_size", ".2%", where="page", when=has("decay_size")),
    Column("tangential\nshare", "tangential_share", ".1%", when=has("tangential_share")),
    Column("steps/s", "steps_per_second", when=has("steps_per_second")),
)


def check_row(row: Record) -> Record:
    """An evaluation of one member, which has a step."""
    return row | {"arm": str(row["arm"]), "seed": int(row["seed"]), "step": int(row["step"])}


EXPERIMENT = Experiment(
    name="grok",
    question=question(Grok),
    presets=PRESETS,
    check=check,
    arms=make_arms,
    train=train,
    summarise=summary,
    columns=COLUMNS,
    headline=headline,
    checks=CHECKS,
    jobs=jobs,
    data=make_datasets,
    title=title,
    screen=lambda work, title, options: Progress(title, [arm.name for arm in work.arms], **options),
    minutes=3,
    shorter="--seeds 1 or fewer --arms or --steps",
    narrow="mixed",
    products=products,
    note=note,
    check_row=check_row,
    so_far=so_far,
    sections=sections,
    figure=figure,
    styles=styles,
    picture=partial(run_over_time, most=3),
    files={
        "metrics.jsonl": "every evaluation of every member, one JSON object per line",
        "snapshots": "spectra and attention maps, one numpy archive per step",
    },
    again="This command asks for the same run; another machine or version may give other digits.",
)
