"""Is L2 on two factors the nuclear norm of their product, and how fast does it become that?

Fits a small matrix, given whole or in part, by one matrix, by two factors and by more, under every way to decay them,
from many seeds and at many strengths in one batch. The mathematics is in :mod:`factorised`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rankdecay.lab.convex import LARGEST
from rankdecay.lab.experiment import Arm, Axis, Chart, Check, Choice, Column, Experiment, Facts, Line, Section, Work
from rankdecay.lab.experiments.factor import fits
from rankdecay.lab.experiments.factor.factorised import shrunk
from rankdecay.lab.experiments.factor.settings import PRESETS, Factor, check
from rankdecay.lab.machine import one_thread
from rankdecay.lab.progress import ArmBar
from rankdecay.lab.report.style import ArmStyle
from rankdecay.lab.report.words import Decided, figure_text, is_number, known, listed, small, tiny
from rankdecay.lab.settings import Record, question, seeds
from rankdecay.lab.stored import StoredRun

RATE_TOLERANCE = 0.05
OPTIMAL = 1e-3  # of an objective above its minimum, in the units of the target's largest singular value
POINTS = 60  # of a curve of the theory
FEWEST = 1e-16  # below it a logarithmic axis shows rounding alone


# --- what is trained ---


def make_arms(settings: Factor) -> list[Arm]:
    """The arms asked for, in the order of `settings.ARMS`."""
    optimizer, depth, how = settings.optimizer, settings.depth, fits.FactorTreatment
    plain = optimizer == "momentum"
    steps = {"gd": "gradient descent", "momentum": "momentum 0.9", "adam": "Adam"}[optimizer]
    beside = "damped momentum 0.9" if plain else "AdamW"
    decoupled = how(2, "momentum" if plain else "adam", "decoupled")
    soft = "One W, every singular value soft-thresholded by ηλ after each gradient step."
    every = [
        Arm("factors", f"W = ABᵀ, L2 on A and B in the loss, {steps}.", how(2, optimizer)),
        Arm("momentum", "W = ABᵀ, L2 on A and B in the loss, damped momentum 0.9.", how(2, "momentum")),
        Arm("adam", "W = ABᵀ, L2 on A and B in the loss, Adam.", how(2, "adam")),
        Arm("decoupled", f"W = ABᵀ, L2 on A and B beside the gradient step: {beside}.", decoupled),
        Arm("low_rank", soft, how(1, "gd", "prox")),
        Arm("merged", f"One W, L2 on it in the loss, {steps}.", how(1, optimizer)),
        Arm("deep", f"W a product of {depth} factors, L2 on each in the loss, {steps}.", how(depth, optimizer)),
    ]
    return [arm for arm in every if arm.name in settings.arms]


def title(work: Work[Factor]) -> str:
    """Title of the run."""
    settings = work.settings
    count = len(work.arms) * len(settings.strengths) * settings.seeds
    return f"factor · {count:,} problems of {settings.size}×{settings.size} · {settings.steps} steps"


def train(work: Work[Factor]) -> Iterator[Record]:
    """Fits every problem, arm by arm, and yields what was measured on the way."""
    settings, device, bar = work.settings, work.device, work.screen
    assert isinstance(bar, ArmBar)
    problems = fits.make_problems(settings, device)
    rows: list[Record] = []
    bounds: Record = {}
    last: dict[str, list[np.ndarray]] = {"singular_values": [], "imbalance": [], "gap": []}
    with bar, one_thread():
        for arm in work.arms:
            factors = fits.initial_factors(settings, arm.how.depth, device)
            outcome = fits.train(arm, problems, factors, settings, functools.partial(bar.at, arm.name))
            bar.ended(arm.name, outcome.steps[-1], settings.steps)
            yield from fits.records(arm, outcome, settings)
            found = fits.summarise_arm(arm, outcome, problems, settings)
            if arm.how.penalty == 2 and settings.size <= LARGEST and arm.name in ("factors", "low_rank"):
                fits.compare_with_solver(found, outcome.W, problems, settings)
            rows += found
            if arm.how.depth == 2:
                bounds[arm.name] = dataclasses.asdict(outcome.bound)
            for name, parts in last.items():
                parts.append(outcome.measured[-1][name].cpu().numpy())
    names, per_arm = [arm.name for arm in work.arms], len(settings.strengths) * settings.seeds
    if settings.size > LARGEST and {"factors", "low_rank"} & set(names):
        bar.notice(f"the convex solver is for sizes up to {LARGEST}: optima are certified by duality alone")
    work.found = {"arms": rows, "bound": bounds}
    # every problem at the end, arm by arm, strength by strength, seed by seed
    ends = {
        "arms": np.repeat(names, per_arm),
        "strengths": np.tile(np.repeat(settings.strengths, settings.seeds), len(names)),
        "seeds": np.tile(seeds(settings), len(names) * len(settings.strengths)),
        "target": np.tile(problems.values.cpu().numpy(), (len(names), 1)),
    }
    work.run_directory.save_snapshot(settings.steps, ends | {name: np.concatenate(of) for name, of in last.items()})


# --- the table ---


def brief(rows: Sequence[Record]) -> list[Record]:
    """One row per arm: its ranks at all strengths, and of everything else the worst at a strength above 0."""
    made = []
    for name, arm_rows in Facts.of({"arms": rows}).arms.items():
        decayed = [row for row in arm_rows if row["strength"]] or arm_rows
        worst = {key: _most(decayed, key) for key in ("deviation", "imbalance", "gap", "optimality_gap")}
        settled, of = _settled(decayed)
        made.append({"name": name, "rank": _ranks(arm_rows), "settled": settled if of else None, "seeds": of, **worst})
    return made


def _most(rows: Sequence[Record], key: str) -> float | None:
    return max(known(rows, key), default=None)


def _ranks(rows: Sequence[Record]) -> str:
    return " ".join(f"{row['rank']:g}" for row in rows)


def _settled(rows: Sequence[Record]) -> tuple[int, int]:
    """How many problems ended where the theory has them, and of how many."""
    counted = [row for row in rows if is_number(row.get("settled"))]
    return sum(row["settled"] for row in counted), sum(row["seeds"] for row in counted)


def _digits(value: float) -> str:
    return "0" if abs(value) < 1e-6 else f"{value:.3g}" if value >= 1e-3 else small(value)


_tiny = functools.partial(tiny, rounding=2e-14)

COLUMNS = (
    Column("λ", "strength", "g", where="page"),
    Column("singular values (median)", lambda row: " ".join(map(_digits, row["singular_values"][:8])), where="page"),
    Column("rank", "rank", "g"),
    Column("off the\ntheory", "deviation", _tiny),
    Column("settled", lambda row: f"{row['settled']:,} of {row['seeds']:,}" if is_number(row.get("settled")) else "—"),
    Column("imbalance", "imbalance", _tiny),
    Column("gap", "gap", _tiny),
    Column("rate per step", "imbalance_rate", ".4f", where="page"),
    Column("2ηλ", "predicted_rate", ".4f", where="page"),
    Column("above the\noptimum", "optimality_gap", _tiny),
)


def note(facts: Facts) -> str:
    """Note under the table."""
    strengths = " ".join(f"{strength:g}" for strength in facts.settings.get("strengths", ()))
    return (
        f"λ = {strengths}. Medians over {facts.settings.get('seeds')} seeds at the end; a table with one row per arm "
        "has the worst λ > 0. The rank counts singular values above 1 % of the target's largest; a problem has settled "
        "where all of them are within 0.1 % of it from the theory, those at the threshold left out."
    )


# --- the claims ---


def headline(facts: Facts) -> str:
    """Whether L2 on two factors ended where the nuclear norm of their product has its minimum."""
    rows = facts.decayed("factors")
    if not rows:
        return "Without the arm of two factors under L2 there is nothing to hold against the nuclear norm."
    good, count = _settled(rows)
    if count:
        how = "in every problem" if good == count else "in most problems" if 2 * good > count else "seldom"
        return (
            f"L2 on two factors soft-thresholded the singular values, max(s − λ, 0), as a nuclear norm on their "
            f"product does, {how}: {good:,} of {count:,} within 0.1 % after {facts.settings['steps']:,} steps."
        )
    gap = _most(rows, "optimality_gap")
    if gap is not None and gap < OPTIMAL:
        return (
            "L2 on two factors completed the matrix as the nuclear norm would: its objective ended within "
            f"{small(gap)} of the optimum (median over seeds, worst strength)."
        )
    return "L2 on two factors had not reached the nuclear-norm optimum when the run ended: more steps may bring it."


def _threshold(arm: str) -> Any:
    def decided(facts: Facts) -> Decided | None:
        rows = facts.decayed(arm)
        good, count = _settled(rows)
        if not count:
            return None
        text = f"{good:,} of {count:,} problems settled; off by at most {small(_most(rows, 'deviation_largest'))}"
        edges = [row["borderline"] for row in rows if row.get("borderline")]
        if edges:
            text += (
                f"; a value exactly at the threshold goes as 1/(2ηt), to {edges[0]['predicted']:.4f} by now, and the "
                f"largest left is {max(edge['largest'] for edge in edges):.4f}"
            )
        return good == count, f"{text}."

    return decided


def _optimum(arm: str) -> Any:
    def decided(facts: Facts) -> Decided | None:
        rows = facts.arms[arm]
        worst = _most(rows, "optimality_gap_largest")
        excess = [abs(row["solver"]["excess"]) for row in rows if row.get("solver")]
        if worst is None and not excess:
            return None
        parts = [f"at the first seed within {small(max(excess))} of a convex solver's objective"] if excess else []
        if worst is not None:
            half = small(_most(rows, "optimality_gap"))
            parts.append(f"by duality every problem within {small(worst)} of its optimum, half of them within {half}")
        return worst is None or worst < OPTIMAL, f"{listed(parts)}."

    return decided


def _balance(facts: Facts) -> Decided | None:
    decayed, rates = facts.decayed("factors"), ("imbalance_rate", "predicted_rate")
    rows = [row for row in decayed if all(is_number(row.get(rate)) for rate in rates)]
    if not rows:
        return None
    off = {row["strength"]: abs(row["imbalance_rate"] / row["predicted_rate"] - 1) for row in rows}
    steps = max(abs(row["imbalance_rate"] / row["predicted_rate_of_steps"] - 1) for row in rows)
    beyond = listed([f"λ = {at:g} ({share:.1%})" for at, share in off.items() if share > RATE_TOLERANCE] or ["none"])
    return max(off.values()) <= RATE_TOLERANCE, (
        f"measured to within {max(off.values()):.1%}, further off than {RATE_TOLERANCE:.0%} at {beyond}; "
        f"−2 ln(1 − ηλ), which counts the step's size, to within {steps:.1%}."
    )


def _bound(facts: Facts) -> Decided | None:
    bound = facts.summary.get("bound", {}).get("factors")
    if not bound:
        return None
    return not bound["violations"], (
        f"{bound['violations']:,} of {bound['checks']:,} checks were above it; the gap ½(‖A‖² + ‖B‖²) − ‖ABᵀ‖_* came "
        f"to at most {bound['largest_ratio']:.0%} of the bound."
    )


def _kept(facts: Facts) -> Decided | None:
    row = next((row for row in facts.arms["factors"] if row["strength"] == 0), None)
    if row is None:
        return None
    share = row["imbalance"] / row["imbalance_initial"]
    return share > 1 - RATE_TOLERANCE, f"{share:.0%} of it was left (median); the flow would keep all of it."


def _merged(facts: Facts) -> Decided | None:
    rows = facts.arms["merged"]
    worst = _most(rows, "deviation_largest")
    off = "" if worst is None else f"; off S/(1 + λ) by at most {small(worst)}"
    return len({row["rank"] for row in rows}) == 1, f"ranks {_ranks(rows)}{off}."


def _decoupled(facts: Facts) -> Decided | None:
    rows = facts.decayed("decoupled") or facts.arms["decoupled"]
    left = [row["imbalance"] / row["imbalance_initial"] for row in rows]
    last = rows[-1]
    return max(left) < 0.01, (
        f"{min(left):.2g} to {max(left):.2g} of the initial imbalance was left (medians), and at λ = "
        f"{last['strength']:g} the largest singular value is {last['singular_values'][0]:.3g} of "
        f"{last['target'][0]:.3g}: beside normalised gradients this decay is not a nuclear norm."
    )


def _deep(facts: Facts) -> Decided | None:
    rows = facts.arms["deep"]
    good, count = _settled(rows)
    if not count:
        return None
    gone = figure_text(_most(facts.decayed("deep"), "collapsed"), ".2g")
    return good == count, (
        f"{good:,} of {count:,} problems ended at a root of it or at zero, which is a local minimum here: at the worst "
        f"strength {gone} values per problem went there though the condition has a root."
    )


CHECKS = (
    Check("L2 on two factors ends at the soft threshold", _threshold("factors"), ("factors",)),
    Check("Its objective is the nuclear-norm optimum", _optimum("factors"), ("factors",)),
    Check("‖AᵀA − BᵀB‖ decays at 2ηλ per step", _balance, ("factors",)),
    Check("The gap stays below the bound of Proposition B.4", _bound, ("factors",)),
    Check("Without decay the imbalance is kept", _kept, ("factors",)),
    Check("A soft threshold after every step does the same to one matrix", _threshold("low_rank"), ("low_rank",),
          "whether the library's decay ends there too"),
    Check("Its objective is the optimum as well", _optimum("low_rank"), ("low_rank",)),
    Check("L2 on one matrix keeps its rank", _merged, ("merged",), "whether L2 lowers rank without factors"),
    Check("Decoupled decay balances the factors", _decoupled, ("decoupled",)),
    Check("More factors meet the Schatten-2/L condition", _deep, ("deep",)),
    Check("With momentum, L2 in the loss has the same minimum", _threshold("momentum"), ("momentum",)),
    Check("With Adam, L2 in the loss has the same minimum", _threshold("adam"), ("adam",)),
)  # fmt: skip


# --- the charts ---


def sections(stored: StoredRun) -> list[Section]:
    """The charts of the page: where the singular values ended, and balance and gap over steps."""
    rows: list[Record] = stored.summary["arms"] if stored.summary else []
    facts = Facts.of({"arms": rows}, STYLES)
    labels = {name: facts.label(name) for name in facts.arms}
    balanced = {row["name"]: labels[row["name"]] for row in rows if "imbalance" in row}
    strengths = [f"{row['strength']:g}" for row in rows]
    depth = stored.settings.get("depth", 3)
    line = (
        "The line is where the proximal arm ended, which duality certifies as the nuclear-norm optimum."
        if stored.settings.get("observed", 1) < 1
        else "The line is the theory: max(s − λ, 0) for two factors, s/(1 + λ) for one matrix, the larger root of "
        f"w + λ w^(2/{depth} − 1) = s for {depth} factors; for AdamW, which has none, that of two factors."
    )
    ends = [made for name in labels for made in _ends(stored, name, rows)]
    over = [_over_steps(stored, row) for row in rows if row["name"] in balanced]
    imbalances, gaps = ([made for parts in over for made in parts[which]] for which in (0, 1))
    middle = strengths[len(strengths) // len(labels) // 3] if labels else None
    by_strength = Choice("strength", "λ", {at: at for at in strengths}, middle)
    panels = (
        ("spectra", "Singular values against strength", "λ", Axis("singular value", from_zero=True), ends,
         Choice("arm", "Arm", labels)),
        ("balance", "Imbalance of the factors", "step", Axis("imbalance", "log"), imbalances,
         Choice("balanced", "Arm", balanced)),
        ("gap", "Gap and its bound", "step", Axis("gap", "log"), gaps, by_strength),
    )  # fmt: skip
    spectra, balance, gap = (Chart(name, title, Axis(x), y, lines, [by]) for name, title, x, y, lines, by in panels)
    return [
        Section(
            "Singular values",
            f"Where training ended: the median over seeds, and as a bar the whole range. {line}",
            [spectra] if rows else [],
            "spectra",
        ),
        Section(
            "Balance",
            "The imbalance ‖AᵀA − BᵀB‖ over steps, the median over seeds; of more than two factors, the largest over "
            "neighbours. Dashed: its beginning times e^(−2ηλt), the law of gradient flow.",
            [balance] if balanced else [],
        ),
        Section(
            "Gap",
            "How far the mean squared norm of the factors is above the quasi-norm of their product, the nuclear norm "
            "for two: the median over seeds and, shaded, the whole range. Dotted: the bound of Proposition B.4.",
            [gap] if balanced else [],
        ),
    ]


def _ends(stored: StoredRun, name: str, rows: Sequence[Record]) -> list[Line]:
    """The singular values of an arm against strength, with their theory."""
    arm_rows = [row for row in rows if row["name"] == name]
    where = {"arm": name}
    x, values = _theory(stored, name, arm_rows, rows)
    lines = [Line("theory", x, list(y), mark="dashed", where=where) for y in values]
    for index in range(len(arm_rows[0]["singular_values"])):
        low, y, high = ([row[f"singular_values{end}"][index] for row in arm_rows] for end in ("_low", "", "_high"))
        lines.append(
            Line(STYLES[name].label, [row["strength"] for row in arm_rows], y, name, low, high, "points", where)
        )
    return lines


def _theory(
    stored: StoredRun, name: str, arm_rows: Sequence[Record], rows: Sequence[Record]
) -> tuple[list[float], list[list[Any]]]:
    """Where the singular values should be, over strengths: one curve per value of the target.

    For a given target that is exact and drawn finely. For a random one, another for each seed, it is the median over
    seeds at the strengths of the run; where entries are missing, what the arm low_rank found, which is certified.
    """
    settings = stored.settings
    if settings.get("observed", 1) == 1 and settings.get("target") != ["random"]:
        arm = next((arm for arm in stored.config.get("arms", []) if arm["name"] == name), {})
        penalty = arm.get("penalty") or 2
        target = torch.tensor(arm_rows[0]["target"], dtype=torch.float64)
        x = torch.linspace(0, 1.05 * (max(row["strength"] for row in arm_rows) or 0.1), POINTS, dtype=torch.float64)
        y = shrunk(target, x[:, None], penalty).T.tolist()  # (values, POINTS)
        # a jump is a gap in the line, not a slope
        return x.tolist(), [[v if v > 0 or penalty <= 2 else None for v in line] for line in y]
    certified = [row for row in rows if row["name"] == "low_rank"]
    source = arm_rows if any(row.get("expected") for row in arm_rows) else certified
    expected = [row["expected"] or row["singular_values"] for row in source]
    return [row["strength"] for row in source], [list(line) for line in zip(*expected, strict=True)]


def _over_steps(stored: StoredRun, row: Record) -> tuple[list[Line], list[Line]]:
    """The imbalance of an arm at one strength, with the law of the flow; and its gap, with its bound."""
    name, at = row["name"], row["strength"]
    lines = [line for line in stored.rows if line["arm"] == name and line["strength"] == at]
    step = [line["step"] for line in lines]

    def over(key: str) -> list[float | None]:
        return [line[key] if is_number(line.get(key)) and line[key] > FEWEST else None for line in lines]

    imbalance, begun = over("imbalance"), lines[0]["imbalance"] if lines else 0.0
    shade = stored.settings["strengths"].index(at) / max(1, len(stored.settings["strengths"]) - 1)
    where, called = {"balanced": name}, f"λ = {at:g}"
    measured = [
        Line(called, step, imbalance, name, over("imbalance_low"), over("imbalance_high"), "line", where, shade)
    ]
    if row.get("predicted_rate"):
        law = begun * np.exp(-row["predicted_rate"] * np.array(step, dtype=float))
        y = [value if value > FEWEST else None for value in law.tolist()]
        measured.insert(0, Line(called, step, y, name, mark="dashed", where=where, shade=shade))
    at_strength = {"strength": f"{at:g}"}
    label, bound = STYLES[name].label, over("gap_bound")
    gaps = [Line(label, step, over("gap"), name, over("gap_low"), over("gap_high"), where=at_strength)]
    if any(value is not None for value in bound):
        gaps.insert(0, Line(label, step, bound, name, mark="dotted", where=at_strength))
    return measured, gaps


STYLES = {
    "factors": ArmStyle("two factors", "#1d63b8", "#6cb2ff"),
    "momentum": ArmStyle("two factors, momentum", "#0d7a5f", "#4fd1ab", "dash"),
    "adam": ArmStyle("two factors, Adam", "#6a3fb5", "#b99bff", "dash"),
    "decoupled": ArmStyle("two factors, decoupled", "#b0307a", "#ff86bf"),
    "low_rank": ArmStyle("soft threshold of one matrix", "#c2410c", "#ff8f5c"),
    "merged": ArmStyle("one matrix", "#767b84", "#8d939d"),
    "deep": ArmStyle("deep product", "#8a6500", "#e8c34a"),
}

EXPERIMENT = Experiment(
    name="factor",
    question=question(Factor),
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
    minutes=1,
    shorter="fewer --seeds or --steps",
    resumable=False,
    brief=brief,
    note=note,
    sections=sections,
    styles=STYLES,
    files={
        "metrics.jsonl": "balance, gap and singular values of every arm and strength over steps",
        "snapshots": "every problem at the end: singular values, imbalance and gap, as numpy arrays",
    },
)
