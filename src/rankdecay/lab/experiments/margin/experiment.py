"""Which max-margin problem does softmax attention solve under gradient flow, and how fast?

Follows the flow of one-layer attention on many data sets at once, on W, on K and Q apart and on diagonals, with and
without an explicit decay, and holds its direction against the nuclear- and Frobenius-norm SVM. The flow is in
:mod:`flow`, what it is held against in :mod:`svm`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import Arm, Column, Experiment, Work
from rankdecay.lab.experiments.margin import compare
from rankdecay.lab.experiments.margin.charts import STYLES, sections
from rankdecay.lab.experiments.margin.claims import CHECKS, decided, headline, note, short
from rankdecay.lab.experiments.margin.data import ARRAYS, DataSets, check_scores, draw, load
from rankdecay.lab.experiments.margin.finite import Optimizer
from rankdecay.lab.experiments.margin.settings import KINDS, PRESETS, Margin, check
from rankdecay.lab.machine import one_thread
from rankdecay.lab.progress import ArmBar
from rankdecay.lab.report.table import Row
from rankdecay.lab.report.words import is_number
from rankdecay.lab.settings import Record, question

LISTED = 12  # data sets that a notice names


@dataclass(frozen=True)
class MarginTreatment:
    """How attention is parametrised, trained and decayed."""

    kind: Literal["merged", "separate", "diagonal"]
    decay: Literal["l2", "low_rank"] | None = None
    recipe: bool = False
    finite: Optimizer | None = None  # what takes steps of finite length; None for the flow, or the recipe
    head: bool = False  # whether the value head is trained too


ALL_ARMS = (
    Arm("merged", "Gradient flow on W; no decay.", MarginTreatment("merged")),
    Arm("separate", "Gradient flow on K and Q, W = KQᵀ; no decay.", MarginTreatment("separate")),
    Arm("diagonal", "Gradient flow on diagonal K and Q; no decay.", MarginTreatment("diagonal")),
    Arm("separate_l2", "Gradient flow on K and Q, with ε(‖K‖² + ‖Q‖²) in the loss.", MarginTreatment("separate", "l2")),
    Arm("merged_l2", "Gradient flow on W, with ε‖W‖² in the loss.", MarginTreatment("merged", "l2")),
    Arm(
        "low_rank",
        "Gradient flow on W, every singular value soft-thresholded: 2ε‖W‖_*.",
        MarginTreatment("merged", "low_rank"),
    ),
    Arm(
        "recipe",
        "The published recipe: 2000 normalised float64 gradient steps on K and Q, with ε(‖K‖² + ‖Q‖²).",
        MarginTreatment("separate", "l2", recipe=True),
    ),
    Arm("recipe_bare", "The published recipe without its ε(‖K‖² + ‖Q‖²).", MarginTreatment("separate", recipe=True)),
    Arm("descent", "Gradient descent on K and Q; no decay.", MarginTreatment("separate", finite="gd")),
    Arm(
        "normalised",
        "Gradient descent on K and Q, each gradient divided by its norm, in exact arithmetic; no decay.",
        MarginTreatment("separate", finite="normalised"),
    ),
    Arm("adam", "Adam on K and Q; no decay.", MarginTreatment("separate", finite="adam")),
    Arm("trained_head", "Gradient flow on K, Q and the value head; no decay.", MarginTreatment("separate", head=True)),
)


# --- what is trained ---


def make_arms(settings: Margin) -> list[Arm]:
    """The arms asked for, in the order of `settings.ARMS`."""
    return [arm for arm in ALL_ARMS if arm.name in settings.parametrisation]


def make_data(settings: Margin) -> DataSets:
    """The data sets, drawn or read from a file.

    Raises:
        SettingError: For a file that does not hold data sets, or an example without a best token.
    """
    if settings.data in KINDS:
        drawn = range(settings.first_seed, settings.first_seed + settings.datasets)
        data = draw(settings.data, drawn, settings.examples, settings.tokens, settings.dimension, settings.score)
    else:
        data = load(Path(settings.data))
    check_scores(data)
    return data


def title(work: Work[Margin]) -> str:
    """Title of the run."""
    sets, n, L, d = work.data.tokens.shape
    return f"margin · {sets} data sets of {n} examples, {L} tokens in {d} dimensions"


def train(work: Work[Margin]) -> Iterator[Record]:
    """Follow the flow arm by arm, and yield what was measured on the way."""
    settings, data, bar = work.settings, work.data, work.screen
    assert isinstance(bar, ArmBar)
    solver = compare.Solver(data)
    taking_part = separable_sets(work, solver)
    rows: list[Record] = []
    arrays = {name: getattr(data, name) for name in ARRAYS}
    with bar, one_thread():
        for arm in work.arms:
            sets = taking_part[compare.FAMILIES[arm.how.kind]]
            if not sets:
                continue
            at = functools.partial(bar.at, arm.name)
            trajectory = compare.train(arm, data, sets, settings, work.device, at)
            outcome = compare.compare(arm, trajectory, solver, data, sets, settings.loss)
            bar.ended(arm.name, outcome.steps[-1], settings.steps)
            yield from compare.records(arm, outcome)
            rows.append(compare.summarise(arm, outcome, data, settings))
            arrays |= compare.arrays(arm, outcome)
            _warn(work, rows[-1])
    shape = dict(zip(("examples", "tokens", "dimension"), data.tokens.shape[1:], strict=True))
    work.found = {"datasets": len(data), "shape": shape, "arms": rows}
    work.run_directory.save_snapshot(max(row["steps"] for row in rows), arrays)


def separable_sets(work: Work[Margin], solver: compare.Solver) -> dict[str, list[int]]:
    """For each family of matrices among the arms, the data sets whose optimal tokens it can select; others are named.

    Raises:
        SettingError: If there is none.
    """
    data, notice = work.data, work.screen.notice
    families = dict.fromkeys(compare.FAMILIES[arm.how.kind] for arm in work.arms)
    found = {family: solver.separable(family) for family in families}
    if not any(found.values()):
        _, n, L, d = data.tokens.shape
        raise SettingError(
            f"the data are inseparable: in none of {len(data)} data sets does a {_matrix(*found)} give every optimal "
            f"token a positive margin ({n * (L - 1)} constraints in {d} dimensions): give fewer --examples or "
            "--tokens, or a larger --dimension"
        )
    for family, kept in found.items():
        lost = sorted(set(range(len(data))) - set(kept))
        if not kept:
            notice(
                f"no data set is separable by a {_matrix(family)}: its arm is left out; for it, give fewer --examples"
            )
        elif lost:
            notice(
                f"inseparable by a {_matrix(family)}, left out: {len(lost)} of {len(data)} data sets ({_numbers(lost)})"
            )
    return found


def _matrix(*families: str) -> str:
    return "W" if "full" in families else "diagonal W"


def _warn(work: Work[Margin], row: Record) -> None:
    """Say which data sets an arm could not solve."""
    name, short = row["name"], row["rank_short"]
    if short:
        work.screen.notice(
            f"{name}: the nuclear SVM needs a larger rank than --inner {work.settings.inner} in {len(short)} data sets "
            f"({_numbers(short)}); their W cannot reach it"
        )
    if row["infeasible"] or row["undecided"]:
        work.screen.notice(
            f"{name}: left out of the means, {row['infeasible']} data sets whose selected tokens no W separates"
            f" and {row['undecided']} that selected none"
        )


def _numbers(sets: Sequence[int]) -> str:
    return ", ".join(map(str, sets[:LISTED])) + (", …" if len(sets) > LISTED else "")


# --- the table ---


def _left_out(row: Row) -> str | None:
    counts = {"select the inseparable": row["infeasible"], "select none": row["undecided"]}
    reasons = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"of {row['seeds']}: {reasons}" if reasons else None


def _beside(key: str, form: str, words: str) -> Any:
    """For `Column.small`: another figure of the row."""
    return lambda row: f"{words} {row[key]:{form}}" if is_number(row.get(key)) else None


COLUMNS = (
    Column("data\nsets", decided, "d", _left_out),
    Column("cosine\nnuclear", "cosine_nuclear", ".4f", _beside("cosine_nuclear_least", ".4f", "least")),
    Column("cosine\nFrobenius", "cosine_frobenius", ".4f", _beside("cosine_frobenius_least", ".4f", "least")),
    Column("nearer\nnuclear", lambda row: f"{row['nearer_nuclear']} of {decided(row)}"),
    Column("‖W‖_*\nabove", "nuclear_excess", ".2%"),
    Column("‖W‖_F\nabove", "frobenius_excess", ".2%"),
    Column("rank", "rank", ".3g", _beside("rank_nuclear", ".3g", "SVM"), "page"),
    Column("eff.\nrank", "effective_rank", ".2f"),
    Column("alignment", "alignment", ".3f", where="page"),
    Column("\nmargin", "margin", lambda value: short(value, ".2g")),
    Column("head", "cosine_head", ".4f", _beside("head_norm", ".2g", "‖v‖"), "page"),
    Column("log₁₀ of the excess loss", "log10_loss_excess", lambda value: short(value, ",.5g"), where="page"),
    Column("optimal tokens", lambda row: f"{row['all_optimal']} of {row['seeds']}", where="page"),
)

EXPERIMENT = Experiment(
    name="margin",
    question=question(Margin),
    presets=PRESETS,
    check=check,
    arms=make_arms,
    train=train,
    summarise=lambda work, rows: work.found,
    columns=COLUMNS,
    headline=headline,
    checks=CHECKS,
    data=make_data,
    title=title,
    screen=lambda work, title, options: ArmBar(title, len(work.arms) * work.settings.steps, **options),
    minutes=3,
    shorter="fewer --steps, --datasets or arms of --parametrisation",
    resumable=False,
    note=note,
    sections=sections,
    styles=STYLES,
    files={
        "metrics.jsonl": "every evaluation of every arm, with lists over the data sets, one JSON object per line",
        "summary.json": "where every arm ended, data set by data set, and means at margins of 1, 10, 100, …",
        "snapshots": "the data, the weights through time, the tokens selected and both SVM solutions, as numpy arrays",
    },
)
