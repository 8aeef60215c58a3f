"""What is L2 on W_Q and W_K under rotary positions: does it prune planes, and is that the optimum?

Fits the scores of a head by its planes, from many seeds and at many strengths in one batch, beside the convex problem
that bounds it and the same weights without positions. The mathematics is in :mod:`planes`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiment import Arm, Axis, Chart, Check, Choice, Column, Experiment, Facts, Line, Section, Work
from rankdecay.lab.experiments.rotary import planes
from rankdecay.lab.experiments.rotary.planes import Scores
from rankdecay.lab.experiments.rotary.settings import PRESETS, Rotary, check
from rankdecay.lab.machine import one_thread
from rankdecay.lab.progress import ArmBar
from rankdecay.lab.report.style import ArmStyle
from rankdecay.lab.report.words import Decided, is_number, known, small, tiny
from rankdecay.lab.settings import Record, question, seeds
from rankdecay.lab.stored import StoredRun

SMALL = 0.01  # of the largest plane of a target: what counts for a plane, and its square root for a rank of weights
OPTIMAL = 1e-4  # above the minimum, in the units of the largest plane: counts as certified
ZERO = 1e-7  # of a singular value of the convex solution, where soft thresholds leave exact zeros
AT_REST = 1e-6  # norm of a gradient
ITERATIONS = 3000  # of the convex arm


@dataclass(frozen=True)
class RotaryTreatment:
    """Parametrisation by which an arm fits the scores."""

    turned: bool = True  # by positions
    convex: bool = False


ALL_ARMS = (
    Arm("rotary", "L2 on W_Q and W_K in the loss, under rotary positions.", RotaryTreatment()),
    Arm(
        "convex",
        "The planes' nuclear norms without a bound on their ranks, proximal steps.",
        RotaryTreatment(convex=True),
    ),
    Arm(
        "unturned",
        "L2 on W_Q and W_K in the loss, without positions.",
        RotaryTreatment(turned=False),
        control="what L2 does to the same weights where nothing turns them: a nuclear norm of W_QᵀW_K",
    ),
)


# --- the problems ---


def draw(settings: Rotary, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The targets H*, and the planes of W_Q and W_K that training begins with; alike at every strength."""
    P, left, right = settings.planes, settings.heads * settings.width, settings.width
    drawn = []
    for seed in seeds(settings):
        rng = torch.Generator().manual_seed(seed)
        normal = functools.partial(torch.randn, dtype=torch.complex128, generator=rng)
        sizes = (torch.randperm(P, generator=rng) + 1).to(torch.complex128) / P
        if settings.target == "full":
            target = normal((P, left, right))
            target = target / torch.linalg.matrix_norm(target, 2)[:, None, None]
        else:
            distinct = P if settings.target == "planes" else 1
            a, b = (_unit(normal((distinct, width))).expand(P, width) for width in (left, right))
            target = a.conj()[:, :, None] * b[:, None, :]
        begun = [settings.scale * _unit(normal((P, width))) for width in (left, right)]
        drawn.append((sizes[:, None, None] * target, *begun))
    target, a, b = (torch.stack(part).to(device) for part in zip(*drawn, strict=True))
    count = len(settings.strengths)
    return target.repeat(count, 1, 1, 1), a.repeat(count, 1, 1), b.repeat(count, 1, 1)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def make_scores(settings: Rotary, target: Tensor, turned: bool) -> Scores:
    """Problem of an arm."""
    j = torch.arange(settings.planes, dtype=torch.float64, device=target.device)
    fourier = 2 * math.pi * (j + 1) / settings.offsets
    frequencies = fourier if settings.frequencies == "fourier" else settings.theta ** (-j / settings.planes)
    offsets = torch.arange(settings.offsets if turned else 1, dtype=torch.float64, device=target.device)
    strength = torch.tensor(settings.strengths, dtype=torch.float64, device=target.device)
    return Scores(planes.coupling(frequencies, offsets), target, strength.repeat_interleave(settings.seeds))


# --- training and measuring ---


def measure(scores: Scores, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Measures of every problem of an arm with factors, shape (problems,)."""
    a_norm, b_norm = a.norm(dim=-1), b.norm(dim=-1)
    sizes = a_norm * b_norm  # ‖H_j‖
    W_Q, W_K = planes.rows(a), planes.rows(b)
    product = planes.products(a, b).real.sum(1)  # of all query heads, at equal positions
    mean = 0.5 * (a_norm.square() + b_norm.square()).sum(1)
    value = planes.objective(scores, a, b)
    slope = torch.stack([g.abs().square().sum((1, 2)) for g in planes.gradients(scores, a, b)]).sum(0).sqrt()
    unbalanced = W_Q @ W_Q.mT - W_K @ W_K.mT
    return {
        "active": (sizes > SMALL).sum(1).double(),
        "query_rank": _rank(W_Q, SMALL**0.5),
        "key_rank": _rank(W_K, SMALL**0.5),
        "product_rank": _rank(product, SMALL),
        "plane_imbalance": (a_norm - b_norm).abs().amax(1),
        "imbalance": torch.linalg.matrix_norm(unbalanced),
        "plane_gap": mean - sizes.sum(1),
        "nuclear_gap": mean - torch.linalg.svdvals(product).sum(1),
        "objective": value,
        "slope": slope,
        "optimality_gap": planes.duality_gap(scores, planes.products(a, b), value),
        "sizes": sizes,
    }


def _rank(W: Tensor, above: float) -> Tensor:
    return (torch.linalg.svdvals(W) > above).sum(1).double()


def measure_convex(scores: Scores, H: Tensor) -> dict[str, Tensor]:
    """Measures of the convex problem's solution."""
    sigma = torch.linalg.svdvals(H)
    value = scores.fit(H) + scores.strength * sigma.sum((1, 2))
    return {
        "active": (sigma[..., 0] > SMALL).sum(1).double(),
        "plane_rank": (sigma > ZERO).sum(-1).amax(1).double(),
        "product_rank": _rank(H.real.sum(1), SMALL),
        "objective": value,
        "optimality_gap": planes.duality_gap(scores, H, value),
        "sizes": sigma.sum(-1),
    }


Measured = dict[str, Tensor]


def fit(
    scores: Scores, a: Tensor, b: Tensor, settings: Rotary, evaluated: Callable[[int], None]
) -> list[tuple[int, Measured]]:
    """Descend with momentum, and measure on the way.

    Raises:
        SettingError: If the learning rate is too large.
    """
    found = [(0, measure(scores, a, b))]
    moving = torch.zeros_like(a), torch.zeros_like(b)
    for step in range(1, settings.steps + 1):
        slopes = planes.gradients(scores, a, b)
        moving = tuple(settings.momentum * old + slope for old, slope in zip(moving, slopes, strict=True))
        a, b = a - settings.lr * moving[0], b - settings.lr * moving[1]
        if step % settings.evaluate_every and step != settings.steps:
            continue
        if not bool(a.isfinite().all() & b.isfinite().all() & (a.abs().amax() < 1e6)):
            raise SettingError(f"--lr {settings.lr:g} is too large: weights left every bound by step {step}")
        found.append((step, measure(scores, a, b)))
        evaluated(step)
    return found


def train(work: Work[Rotary]) -> Iterator[Record]:
    """Fits every problem, arm by arm, and yields what was measured on the way."""
    settings, bar = work.settings, work.screen
    assert isinstance(bar, ArmBar)
    target, a, b = draw(settings, work.device)
    rows: list[Record] = []
    ended: dict[str, Measured] = {}
    with bar, one_thread():
        for arm in work.arms:
            scores = make_scores(settings, target, arm.how.turned)
            if arm.how.convex:
                found = [(0, measure_convex(scores, planes.solve(scores, ITERATIONS)))]
            else:
                found = fit(scores, a, b, settings, functools.partial(bar.at, arm.name))
            bar.ended(arm.name, found[-1][0], settings.steps)
            ended[arm.name] = found[-1][1]
            for number, strength in enumerate(settings.strengths):
                members = slice(number * settings.seeds, (number + 1) * settings.seeds)
                for step, measured in found:
                    yield {"step": step, "arm": arm.name, "strength": strength} | _medians(measured, members)
                rows.append(_row(arm, settings, scores, ended[arm.name], members, strength))
    if {"rotary", "convex"} <= ended.keys():
        for row in rows:
            if row["name"] == "rotary":
                row |= _beside_convex(ended, settings, row["strength"])
    work.found = {"arms": rows}
    ends = {
        f"{name}_{key}": value.cpu().numpy()
        for name, measured_last in ended.items()
        for key, value in measured_last.items()
    }
    work.run_directory.save_snapshot(settings.steps, ends)


def _medians(measured: Measured, members: slice) -> Record:
    return {name: float(values[members].quantile(0.5)) for name, values in measured.items() if values.ndim == 1}


def _row(arm: Arm, settings: Rotary, scores: Scores, last: Measured, members: slice, strength: float) -> Record:
    """The figures of one arm at one strength: medians, the worst, and the counts of every seed."""
    gaps = last["optimality_gap"][members]
    row: Record = {"name": arm.name, "strength": strength, "seeds": settings.seeds, **_medians(last, members)}
    row["optimality_gap_largest"] = float(gaps.max())
    row["certified"] = int((gaps < OPTIMAL).sum())
    counts = ("active", "query_rank", "key_rank", "product_rank", "plane_rank")
    row["each"] = {name: last[name][members].int().tolist() for name in counts if name in last}
    if settings.frequencies == "fourier" and arm.how.turned and not (arm.how.convex and settings.target == "full"):
        # each plane by itself: its largest singular value, soft-thresholded
        expected = (torch.linalg.matrix_norm(scores.target[members], 2) - strength).clamp(min=0)
        row["deviation_largest"] = float((last["sizes"][members] - expected).abs().max())
    return row


def _beside_convex(ended: dict[str, Measured], settings: Rotary, strength: float) -> Record:
    """How the ends of W_Q and W_K compare with the convex problem's solutions, at one strength.

    `attainable` counts the seeds whose solution has no plane of a rank above one, so that some W_Q and W_K attain it;
    `not_global` those of them where descent came to rest higher.
    """
    first = settings.strengths.index(strength) * settings.seeds
    members = slice(first, first + settings.seeds)
    at, best = ({name: values[members] for name, values in ended[arm].items()} for arm in ("rotary", "convex"))
    above = at["objective"] - best["objective"]
    attainable = best["plane_rank"] <= 1
    return {
        "above_convex": float(above.quantile(0.5)),
        "above_convex_largest": float(above.max()),
        "same_planes": int(((at["sizes"] > SMALL) == (best["sizes"] > SMALL)).all(1).sum()),
        "attainable": int(attainable.sum()),
        "not_global": int((attainable & (above > OPTIMAL) & (at["slope"] < AT_REST)).sum()),
    }


# --- the table, the claims ---


_tiny = functools.partial(tiny, rounding=1e-13)

COLUMNS = (
    Column("λ", "strength", "g"),
    Column("planes", "active", "g"),
    Column("rank\nW_Q", "query_rank", "g"),
    Column("rank\nW_K", "key_rank", "g", where="page"),
    Column("rank\nW_QᵀW_K", "product_rank", "g"),
    Column("of a\nplane", "plane_rank", "g", where="page"),
    Column("gap of\nplanes", "plane_gap", _tiny),
    Column("nuclear\ngap", "nuclear_gap", _tiny),
    Column("above the\noptimum", "optimality_gap", _tiny),
    Column("certified", lambda row: f"{row['certified']} of {row['seeds']}"),
    Column("off the threshold", "deviation_largest", _tiny, where="page"),
)


def note(facts: Facts) -> str:
    """Note under the table."""
    return (
        f"Medians over {facts.settings.get('seeds')} seeds. A plane counts from 1 % of the target's largest, a rank "
        "from the same. Gap of planes: ½(‖W_Q‖² + ‖W_K‖²) − Σ‖a_j‖‖b_j‖; nuclear gap: the same less ‖W_QᵀW_K‖_* at "
        f"equal positions. Certified: by duality within {OPTIMAL:g} of the minimum of the convex problem, and so of "
        "its own."
    )


def headline(facts: Facts) -> str:
    """Headline of the run."""
    rows = facts.arms.get("rotary", [])
    if not rows:
        return "Without the arm rotary there is nothing to say of planes."
    course = ", ".join(f"{row['active']:g}" for row in rows)
    ranks = ", ".join(f"{row['query_rank']:g}" for row in rows)
    at = ", ".join(f"{row['strength']:g}" for row in rows)
    return f"Under rotary positions L2 of {at} left {course} planes, and W_Q a rank of {ranks}."


def _planes(facts: Facts) -> Decided | None:
    rows = facts.decayed("rotary")
    if not rows:
        return None
    worst, nuclear = (max(known(rows, name), default=0.0) for name in ("plane_gap", "nuclear_gap"))
    return worst < OPTIMAL < nuclear, (
        f"½(‖W_Q‖² + ‖W_K‖²) ends above Σ‖a_j‖‖b_j‖ by at most {small(worst)} and above ‖W_QᵀW_K‖_* by up to "
        f"{small(nuclear)} (medians)."
    )


def _certified(facts: Facts) -> Decided | None:
    rows = facts.decayed("rotary")
    if not rows:
        return None
    count, of = sum(row["certified"] for row in rows), sum(row["seeds"] for row in rows)
    largest = max(row["optimality_gap_largest"] for row in rows)
    text = f"{count:,} of {of:,} problems, the worst within {small(largest)}"
    if all("attainable" in row for row in rows):
        attainable, stuck = (sum(row[key] for row in rows) for key in ("attainable", "not_global"))
        text += f"; W_Q and W_K could attain it in {attainable:,}, and came to rest above it in {stuck:,} of them"
    return count == of, f"{text}."


def _threshold(facts: Facts) -> Decided | None:
    off = known(facts.decayed("rotary"), "deviation_largest")
    return (max(off) < OPTIMAL * 10, f"off by at most {small(max(off))}.") if off else None


CHECKS = (
    Check("L2 is a group penalty over planes and no nuclear norm of W_QᵀW_K", _planes, ("rotary",)),
    Check("It ends at the minimum of the convex problem", _certified, ("rotary",)),
    Check("Planes that do not see each other end at the soft threshold", _threshold, ("rotary",)),
)


# --- the charts ---

COUNTS = {"active": "planes", "query_rank": "rank of W_Q", "product_rank": "rank of W_QᵀW_K"}


def sections(stored: StoredRun) -> list[Section]:
    """Planes and ranks against the strength, and the gaps over steps."""
    rows: list[Record] = stored.summary["arms"] if stored.summary else []
    facts = Facts.of({"arms": rows}, STYLES)
    counts, gaps = [], []
    for name, own in facts.arms.items():
        for key in COUNTS:
            points = [(row["strength"], row[key]) for row in own if is_number(row.get(key))]
            if points:
                x, y = zip(*points, strict=True)
                counts.append(Line(facts.label(name), x, y, name, mark="line+points", where={"count": key}))
    for row in rows:
        own = [line for line in stored.rows if (line["arm"], line["strength"]) == (row["name"], row["strength"])]
        y = [value if is_number(value := line.get("plane_gap")) and value > 1e-16 else None for line in own]
        where = {"strength": f"{row['strength']:g}"}
        if len(own) > 1:
            gaps.append(Line(facts.label(row["name"]), [line["step"] for line in own], y, row["name"], where=where))
    at = list(dict.fromkeys(f"{row['strength']:g}" for row in rows))
    by_strength = Choice("strength", "λ", {value: value for value in at}, at[len(at) // 2] if at else None)
    return [
        Section(
            "Planes and ranks",
            "What is left at the end, medians over seeds.",
            [Chart("counts", "Left at the end", Axis("λ"), Axis("count", from_zero=True), counts,
                   [Choice("count", "Of", COUNTS)])] if rows else [],
            "counts",
        ),
        Section(
            "Balance of planes",
            "How far ½(‖W_Q‖² + ‖W_K‖²) is above Σ‖a_j‖‖b_j‖, medians over seeds.",
            [Chart("gap", "Gap of planes", Axis("step"), Axis("gap", "log"), gaps, [by_strength])] if gaps else [],
        ),
    ]  # fmt: skip


STYLES = {
    "rotary": ArmStyle("L2, rotary positions", "#1d63b8", "#6cb2ff"),
    "convex": ArmStyle("convex problem", "#c2410c", "#ff8f5c", "dash"),
    "unturned": ArmStyle("L2, no positions", "#767b84", "#8d939d"),
}


def make_arms(settings: Rotary) -> Sequence[Arm]:
    """The arms asked for, in the order of `settings.ARMS`."""
    return [arm for arm in ALL_ARMS if arm.name in settings.arms]


def title(work: Work[Rotary]) -> str:
    """Title of the run."""
    settings = work.settings
    count = len(work.arms) * len(settings.strengths) * settings.seeds
    return f"rotary · {count:,} problems of {settings.planes} planes · {settings.steps} steps"


EXPERIMENT = Experiment(
    name="rotary",
    question=question(Rotary),
    presets=PRESETS,
    check=check,
    arms=make_arms,
    train=train,
    summarise=lambda work, rows: work.found,
    columns=COLUMNS,
    headline=headline,
    checks=CHECKS,
    title=title,
    screen=lambda work, title, options: ArmBar(title, len(work.arms) * work.settings.steps, **options),
    minutes=5,
    shorter="fewer --seeds or --steps",
    resumable=False,
    note=note,
    sections=sections,
    styles=STYLES,
    files={
        "metrics.jsonl": "planes, ranks, gaps and objectives of every arm and strength over steps, medians over seeds",
        "snapshots": "every problem at the end, as numpy arrays",
    },
)
