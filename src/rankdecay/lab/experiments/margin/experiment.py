"""Which max-margin problem does softmax attention solve under gradient flow, and how fast?

Follows the flow of one-layer attention on many data sets at once, on W, on K and Q apart and on diagonals, with and
without an explicit decay, and holds its direction against the nuclear- and Frobenius-norm SVM. The mathematics is in
`lab.margin`.

Importing this module does not import torch: the command line reads its settings for ``--help``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.legacy import (
    Preset,
    Record,
    check_counts,
    check_numbers,
    check_seeds,
    configuration,
    identity,
    in_one_piece,
    number,
)

if TYPE_CHECKING:
    import numpy as np

    from rankdecay.lab.experiments.margin.data import DataSets
    from rankdecay.lab.progress import ArmBar

MINUTES = 3  # that the default may take on the slowest machine that counts
ARMS = ("merged", "separate", "diagonal", "separate_l2", "merged_l2", "low_rank", "recipe", "recipe_bare")
KINDS = ("generic", "equal", "aligned")  # of data that are drawn
LARGEST_MARGIN = 1e100  # squares of larger weights leave the range of a float64


@dataclass(frozen=True)
class Margin:
    """Which max-margin problem does softmax attention solve? The flow of one layer against two SVMs.

    Follows gradient flow on one-layer attention to margins far beyond float64's softmax, with W merged, K and Q apart
    or diagonal, with and without an explicit decay, and measures its direction against the SVMs of least nuclear and
    least Frobenius norm. Leaves config.json, metrics.jsonl, summary.json, snapshots and report.html in --out; an
    interrupted run begins again. The default takes at most three minutes on a slow core.
    """

    preset: Preset = "default"
    """'standard' computes more than the default: for a fast machine, or for longer."""
    parametrisation: tuple[str, ...] = tuple(name for name in ARMS if name != "low_rank")
    """Which arms to compare: these, or low_rank, which takes longest. Those in _l2, low_rank and recipe have an
    explicit decay of size --l2."""
    data: str = "generic"
    """generic, equal (all but the best token of an example share a score), aligned (both SVMs coincide), or an .npz."""
    dimension: int = 12
    """d, of tokens and queries."""
    tokens: int = 4
    """L, per example."""
    examples: int = 4
    """n, per data set."""
    datasets: int = 8
    """How many data sets to draw, each from a seed of its own; a file has its own number."""
    first_seed: int = 0
    """Number of the first seed: tune on seeds that are not reported, from 100 up say."""
    score: float = 4.0
    """Of the best tokens of equal and aligned data."""
    inner: int = 0
    """d_e, columns of K and Q; by default as many as the dimension."""
    loss: Literal["exponential", "logistic"] = "exponential"
    """Of an example's label times the output."""
    init: Literal["paper", "random"] = "paper"
    """paper: K = √2 scale I, Q = 0. random: both Gaussian. W begins as their product."""
    scale: float = 1.0
    """Of the initial weights."""
    l2: float = 2.2e-16
    """ε of the explicit decay ε(‖K‖² + ‖Q‖²), ε‖W‖² or 2ε‖W‖_*, in the arms that have one."""
    rate: float = 4e-3
    """Largest relative change of the weights per step of the flow."""
    steps: int = 20_000
    """Steps of the flow at most; it ends at --margin."""
    margin: float = 1e6
    """Margin at which the flow of a data set ends."""
    evaluate_every: int = 200
    """Steps between what is recorded."""
    out: Path = Path("runs/margin")
    """Where results go; a complete run there is shown again."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    quiet: bool = False
    """No progress and no table."""
    json: bool = False
    """Print the summary as JSON on standard output; progress goes to standard error."""


PRESETS = {
    "default": Margin(),
    "standard": Margin(
        preset="standard", parametrisation=ARMS, datasets=20, steps=30_000, margin=1e8, out=Path("runs/margin-standard")
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to parametrise attention, to train it and to decay it."""

    name: str
    description: str
    kind: Literal["merged", "separate", "diagonal"]
    decay: Literal["l2", "low_rank"] | None = None
    recipe: bool = False


EVERY = (
    Arm("merged", "Gradient flow on W; no decay.", "merged"),
    Arm("separate", "Gradient flow on K and Q, W = KQᵀ; no decay.", "separate"),
    Arm("diagonal", "Gradient flow on diagonal K and Q; no decay.", "diagonal"),
    Arm("separate_l2", "Gradient flow on K and Q, with ε(‖K‖² + ‖Q‖²) in the loss.", "separate", "l2"),
    Arm("merged_l2", "Gradient flow on W, with ε‖W‖² in the loss.", "merged", "l2"),
    Arm("low_rank", "Gradient flow on W, every singular value soft-thresholded: 2ε‖W‖_*.", "merged", "low_rank"),
    Arm(
        "recipe",
        "The published recipe: 2000 normalised float64 gradient steps on K and Q, with ε(‖K‖² + ‖Q‖²).",
        "separate",
        "l2",
        recipe=True,
    ),
    Arm("recipe_bare", "The published recipe without its ε(‖K‖² + ‖Q‖²).", "separate", recipe=True),
)


def make_arms(settings: Margin) -> list[Arm]:
    """The arms asked for, in the order of `ARMS`."""
    return [arm for arm in EVERY if arm.name in settings.parametrisation]


def check(settings: Margin) -> None:
    """Raises a `SettingError` for settings that cannot work, before anything is built or written."""
    if not settings.parametrisation:
        raise SettingError(f"--parametrisation is empty: choose from {', '.join(ARMS)}")
    for name in settings.parametrisation:
        check_name("--parametrisation", name, ARMS)
    check_seeds(settings)
    check_counts(settings, "examples", "datasets", "steps", "evaluate_every")
    check_numbers(settings, "score", "scale", "rate", "margin")
    check_numbers(settings, "l2", zero=True)
    if settings.dimension < 2:
        raise SettingError(f"--dimension {settings.dimension} is too small: a direction needs at least 2")
    if settings.tokens < 2:
        raise SettingError(f"--tokens {settings.tokens} leaves nothing to choose between: give at least 2")
    if settings.inner < 0:
        raise SettingError(f"--inner {settings.inner} is negative: give at least 1, or 0 for the dimension")
    if settings.rate > 0.1:
        raise SettingError(f"--rate {settings.rate:g} is no flow: a step may change weights by at most 0.1 of them")
    if not 1 <= settings.margin <= LARGEST_MARGIN:
        raise SettingError(f"--margin {settings.margin:g} must be between 1 and {LARGEST_MARGIN:g}")
    if settings.data not in KINDS and settings.first_seed and settings.init == "paper":
        raise SettingError(
            f"--first-seed {settings.first_seed} has no effect on --data {settings.data} with --init paper, where "
            "nothing is drawn: leave it out"
        )
    if settings.data not in KINDS and not settings.data.endswith(".npz"):
        check_name("--data", settings.data, (*KINDS, "FILE.npz"))
    if settings.data == "aligned":
        if settings.tokens % 2 == 0:
            raise SettingError(f"--tokens {settings.tokens}: aligned data have tokens in pairs beside the best: give 5")
        if settings.examples >= settings.dimension:
            raise SettingError(
                f"--examples {settings.examples} of aligned data have orthogonal best tokens: --dimension "
                f"{settings.dimension} must be larger"
            )


def _data(settings: Margin) -> DataSets:
    from rankdecay.lab.experiments.margin.data import check_scores, draw, load

    if settings.data in KINDS:
        first = settings.first_seed
        drawn = range(first, first + settings.datasets)
        data = draw(settings.data, drawn, settings.examples, settings.tokens, settings.dimension, settings.score)
    else:
        data = load(Path(settings.data))
    check_scores(data)
    return data


def run(settings: Margin, command: str) -> Record:
    """Runs the experiment and returns its summary.

    Args:
        settings: what to run.
        command: how to repeat it, for the report.

    Raises:
        SettingError: if the settings, the data or the output directory cannot work.
    """
    check(settings)
    from rankdecay.lab.machine import one_thread, resolve_device
    from rankdecay.lab.progress import ArmBar, Promise

    device = resolve_device(settings.device)
    data = _data(settings)
    arms = make_arms(settings)
    config = configuration("margin", identity(settings), [dataclasses.asdict(arm) for arm in arms], device, command)
    sets, n, L, d = data.tokens.shape
    title = f"{sets} data sets of {n} examples, {L} tokens in {d} dimensions, on {device}"
    promise = Promise(MINUTES, "fewer --steps, --datasets or arms of --parametrisation")
    progress = ArmBar(title, len(arms) * settings.steps, quiet=settings.quiet, to_stderr=settings.json, promise=promise)

    def compute() -> tuple[list[Record], Record, int, dict[str, np.ndarray]]:
        taking_part = _taking_part(arms, data, progress.notice)
        with progress, one_thread():
            lines, rows, arrays = _compute(settings, arms, data, taking_part, device, progress)
        found = {"datasets": sets, "shape": {"examples": n, "tokens": L, "dimension": d}, "arms": rows}
        return lines, found, max(row["steps"] for row in rows), arrays

    return in_one_piece(settings, config, progress.notice, compute)


def _taking_part(arms: Sequence[Arm], data: DataSets, notice: Callable[[str], None]) -> dict[str, list[int]]:
    """For each family of matrices among the arms, the data sets whose optimal tokens it can select; others are named.

    Raises:
        SettingError: if there is none.
    """
    from rankdecay.lab.experiments.margin.compare import FAMILIES, Solver

    solver, found = Solver(data), {}
    for family in dict.fromkeys(FAMILIES[arm.kind] for arm in arms):
        kept = solver.separable(family)
        lost = sorted(set(range(len(data))) - set(kept))
        what = "diagonal W" if family == "diagonal" else "W"
        _, n, L, d = data.tokens.shape
        if not kept and len({FAMILIES[arm.kind] for arm in arms} - {family} - {f for f, k in found.items() if not k}):
            notice(f"no data set is separable by a {what}: its arm is left out; for it, give fewer --examples")
        elif not kept and not any(found.values()):
            raise SettingError(
                f"the data are inseparable: in none of {len(data)} data sets does a {what} give every optimal token a "
                f"positive margin ({n * (L - 1)} constraints in {d} dimensions): give fewer --examples or --tokens, or "
                "a larger --dimension"
            )
        elif lost:
            notice(f"inseparable by a {what}, left out: {len(lost)} of {len(data)} data sets ({_listed(lost)})")
        found[family] = kept
    return found


def _listed(numbers: Sequence[int], most: int = 12) -> str:
    return ", ".join(map(str, numbers[:most])) + (", …" if len(numbers) > most else "")


def _compute(
    settings: Margin,
    arms: Sequence[Arm],
    data: DataSets,
    taking_part: dict[str, list[int]],
    device: str,
    progress: ArmBar,
) -> tuple[list[Record], list[Record], dict[str, np.ndarray]]:
    """The lines of ``metrics.jsonl``, the arms of the summary, and the arrays of the snapshot."""
    from rankdecay.lab.experiments.margin import compare

    solver = compare.Solver(data)
    lines, rows = [], []
    arrays = {"tokens": data.tokens, "queries": data.queries, "heads": data.heads, "labels": data.labels}
    for arm in arms:
        sets = taking_part[compare.FAMILIES[arm.kind]]
        if not sets:
            continue
        trajectory = compare.train(arm, data, sets, settings, device, functools.partial(progress.at, arm.name))
        outcome = compare.compare(arm, trajectory, solver, data, sets, settings.loss)
        progress.ended(arm.name, outcome.steps[-1], settings.steps)
        lines += compare.records(arm, outcome)
        row = compare.summarise(arm, outcome, data, settings)
        rows.append(row)
        arrays |= compare.arrays(arm, outcome)
        if row["rank_short"]:
            progress.notice(
                f"{arm.name}: the nuclear SVM needs a larger rank than --inner {settings.inner} in "
                f"{len(row['rank_short'])} data sets ({_listed(row['rank_short'])}); their W cannot reach it"
            )
        if row["infeasible"] or row["undecided"]:
            progress.notice(
                f"{arm.name}: left out of the means, {row['infeasible']} data sets whose selected tokens no W separates"
                f" and {row['undecided']} that selected none"
            )
    return lines, rows, arrays


def print_summary(summary: Record) -> None:
    """The table of a finished run, one line per arm, and what may be said of it."""
    from rich.console import Console
    from rich.table import Table

    from rankdecay.lab.experiments.margin.verdict import verdict

    table = Table(box=None, pad_edge=False)
    table.add_column("arm", vertical="bottom", no_wrap=True, min_width=11)
    headings = (  # within 80 columns
        "data\nsets", "cosine\nnuclear", "\nFrobenius", "nearer\nnuclear", "‖W‖_*\nabove", "‖W‖_F\nabove",
        "eff.\nrank", "\nmargin",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for row in summary["arms"]:
        table.add_row(
            row["name"],
            str(row["seeds"]),
            number(row["cosine_nuclear"], ".4f"),
            number(row["cosine_frobenius"], ".4f"),
            f"{row['nearer_nuclear']} of {row['seeds']}",
            number(row["nuclear_excess"], ".2%"),
            number(row["frobenius_excess"], ".2%"),
            number(row["effective_rank"], ".2f"),
            number(row["margin"], ".0e"),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print("\nmeans over data sets, the margin their median; above: per unit of margin, over the least there is")
    console.print(f"\n{verdict(summary)}", markup=False)
