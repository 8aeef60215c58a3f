"""What the matrix experiment shows, in words: where it agrees with the theory, to which precision, and where not.

As on every page, the sentences are computed from `summary.json` alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.experiments.grok.verdict import Verdict, listed

Row = dict[str, Any]
RATE_TOLERANCE = 0.05
OPTIMAL = 1e-3  # of an objective above its minimum, in the units of the target's largest singular value


def verdict(summary: dict[str, Any] | None) -> Verdict:
    """The verdict of a run, from its summary."""
    if summary is None:
        return Verdict("The run is not complete: it has no summary yet.", [])
    by_arm: dict[str, list[Row]] = {}
    for row in summary["arms"]:
        by_arm.setdefault(str(row["name"]), []).append(row)
    points: list[tuple[str, str]] = []
    sentences: dict[str, Callable[[list[Row], dict[str, Any]], list[tuple[str, str]]]] = {
        "factors": _factors,
        "low_rank": _low_rank,
        "merged": _merged,
        "decoupled": _decoupled,
        "deep": _deep,
    }
    for name, say in sentences.items():
        if name in by_arm:
            points += say(by_arm[name], summary)
    points += _optimizers({name: rows for name, rows in by_arm.items() if name in ("momentum", "adam")})
    points.append(_limits(summary))
    return Verdict(_headline(by_arm, summary), points)


def small(value: float) -> str:
    """A deviation as a person reads it: rounding is called rounding."""
    return "rounding error" if abs(value) < 2e-14 else f"{value:.1g}".replace("e-0", "e-")


def decayed(rows: Sequence[Row]) -> list[Row]:
    """The rows with a decay."""
    return [row for row in rows if row["strength"] > 0]


def most(rows: Sequence[Row], key: str) -> float | None:
    """The largest value there is."""
    return max((row[key] for row in rows if is_number(row.get(key))), default=None)


def settled(rows: Sequence[Row]) -> tuple[int, int]:
    """How many problems ended where the theory has them, and of how many."""
    known = [row for row in rows if is_number(row.get("settled"))]
    return sum(row["settled"] for row in known), sum(row["seeds"] for row in known)


def ranks(rows: Sequence[Row]) -> str:
    """The median ranks over the strengths, as words."""
    found = [row["rank"] for row in rows]
    if len(set(found)) == 1:
        return f"rank {found[0]:g} at {'every strength' if len(found) > 1 else 'its one strength'}"
    strengths = [f"{row['strength']:g}" for row in rows]
    return f"rank {', '.join(f'{rank:g}' for rank in found)} at λ = {', '.join(strengths)}"


def _headline(by_arm: dict[str, list[Row]], summary: dict[str, Any]) -> str:
    rows = decayed(by_arm.get("factors", []))
    if not rows:
        return "Without the arm of two factors under L2 there is nothing to hold against the nuclear norm."
    good, count = settled(rows)
    if count:
        share = f"{good:,} of {count:,} problems"
        if good == count:
            return (
                "L2 on two factors did what a nuclear norm on their product does: singular values were "
                f"soft-thresholded, max(s − λ, 0), in {share}."
            )
        how = "in most cases" if 2 * good > count else "seldom"
        return (
            f"L2 on two factors ended at the soft threshold max(s − λ, 0) {how}, in {share}; the others were further "
            f"than 0.1 % of the largest singular value from it after {summary['settings']['steps']:,} steps."
        )
    gap = most(rows, "optimality_gap")
    if gap is not None and gap < OPTIMAL:
        return (
            "L2 on two factors completed the matrix as the nuclear norm would: its objective ended within "
            f"{small(gap)} of the optimum (median over seeds, worst strength)."
        )
    return "L2 on two factors had not reached the nuclear-norm optimum when the run ended: more steps may bring it."


def _factors(rows: list[Row], summary: dict[str, Any]) -> list[tuple[str, str]]:
    points = []
    with_decay = decayed(rows)
    typical, worst = most(with_decay, "deviation"), most(with_decay, "deviation_largest")
    if typical is not None and worst is not None:
        text = f"Distance from max(s − λ, 0): {small(typical)} (median, worst strength), at most {small(worst)}."
        edges = [row["borderline"] for row in with_decay if row.get("borderline")]
        if edges:
            text += (
                f" A value exactly at the threshold goes as 1/(2ηt), to {edges[0]['predicted']:.4f} by now; "
                f"the largest left is {max(edge['largest'] for edge in edges):.4f}."
            )
        points.append(("Soft threshold", text))
    points += _solver(rows, "factors")
    points += _rates(rows)
    bound = summary.get("bound", {}).get("factors")
    if bound:
        held = "never" if not bound["violations"] else f"{bound['violations']:,} times"
        points.append(
            (
                "Gap",
                f"The gap ½(‖A‖² + ‖B‖²) − ‖ABᵀ‖_* was {held} above the bound of Proposition B.4, in "
                f"{bound['checks']:,} checks at every step; it came to at most {bound['largest_ratio']:.0%} of it.",
            )
        )
    kept = next((row for row in rows if row["strength"] == 0), None)
    if kept is not None:
        share = kept["imbalance"] / kept["imbalance_initial"]
        text = f"The imbalance ended at {share:.0%} of its beginning (median): the flow would keep all of it."
        points.append(("No decay", text))
    return points


def _rates(rows: list[Row]) -> list[tuple[str, str]]:
    known = [
        row for row in decayed(rows) if is_number(row.get("imbalance_rate")) and is_number(row.get("predicted_rate"))
    ]
    if not known:
        return []
    off_flow = {row["strength"]: abs(row["imbalance_rate"] / row["predicted_rate"] - 1) for row in known}
    off_steps = max(abs(row["imbalance_rate"] / row["predicted_rate_of_steps"] - 1) for row in known)
    beyond = [f"{strength:g} ({off:.1%})" for strength, off in off_flow.items() if off > RATE_TOLERANCE]
    text = f"‖AᵀA − BᵀB‖ decayed at 2ηλ per step to within {max(off_flow.values()):.1%}"
    if beyond:
        inside = [off for off in off_flow.values() if off <= RATE_TOLERANCE]
        within = f"to within {max(inside):.1%}, but" if inside else "but"
        text = f"‖AᵀA − BᵀB‖ decayed at 2ηλ per step {within} for λ = {listed(beyond)}"
    return [("Balance", f"{text}; −2 ln(1 − ηλ), which counts the step's size, is met to within {off_steps:.1%}.")]


def _solver(rows: list[Row], name: str) -> list[tuple[str, str]]:
    solved = [row["solver"] for row in rows if row.get("solver")]
    certified = most(rows, "optimality_gap_largest")
    if not solved and certified is None:
        return []
    text = ""
    if solved:
        excess = max(abs(found["excess"]) for found in solved)
        text = f"At the first seed the objective is within {small(excess)} of a convex solver's at every strength. "
    if certified is not None:
        text += f"Duality certifies every problem to within {small(certified)} of its optimum"
        text += f", half of them to within {small(most(rows, 'optimality_gap') or 0)}." if name == "factors" else "."
    return [("Convex optimum", text)]


def _low_rank(rows: list[Row], summary: dict[str, Any]) -> list[tuple[str, str]]:
    worst, optimum = most(rows, "deviation_largest"), most(rows, "optimality_gap_largest")
    ended = [f"within {small(worst)} of max(s − λ, 0)"] if worst is not None else []
    ended += [f"with its objective within {small(optimum)} of the optimum"] if optimum is not None else []
    text = f"The library's soft threshold after every step, on one W, ended in every problem {listed(ended)}."
    return [("Proximal decay", text)]


def _merged(rows: list[Row], summary: dict[str, Any]) -> list[tuple[str, str]]:
    worst = most(rows, "deviation_largest")
    if worst is None:
        return [("One matrix", f"L2 on W itself left {ranks(rows)}.")]
    return [("One matrix", f"L2 on W itself shrank it to S/(1 + λ), to {small(worst)}, and left {ranks(rows)}.")]


def _decoupled(rows: list[Row], summary: dict[str, Any]) -> list[tuple[str, str]]:
    with_decay = decayed(rows) or rows
    floor = [row["imbalance"] / row["imbalance_initial"] for row in with_decay]
    reach = [row["imbalance_high"] for row in with_decay]
    adaptive = summary["settings"].get("optimizer") != "momentum"
    name = "AdamW" if adaptive else "Momentum with decoupled decay"
    text = (
        f"{name} left {min(floor):.2g} to {max(floor):.2g} of the initial imbalance (medians; the largest is "
        f"{max(reach):.2g}), and {ranks(rows)}."
    )
    if adaptive:
        strongest = with_decay[-1]
        text += (
            f" At λ = {strongest['strength']:g} its largest singular value is {strongest['singular_values'][0]:.3g} of "
            f"{strongest['target'][0]:.3g}: its decay competes with normalised gradients, and is no nuclear norm."
        )
    return [("Decoupled decay", text)]


def _deep(rows: list[Row], summary: dict[str, Any]) -> list[tuple[str, str]]:
    depth = summary["settings"]["depth"]
    good, count = settled(rows)
    text = f"{ranks(rows)[0].upper()}{ranks(rows)[1:]}."
    if count:
        text = (
            f"In {good:,} of {count:,} problems every singular value ended at a root of w + λ w^(2/{depth} − 1) = s, "
            f"the Schatten-2/{depth} condition, or at zero; {text[0].lower()}{text[1:]}"
        )
        gone = most(decayed(rows), "collapsed")
        if gone:
            text += (
                f" Zero is a local minimum here: at the worst strength {gone:.2g} values per problem went there though "
                "the condition has a root."
            )
    return [(f"{depth} factors", text)]


def _optimizers(by_arm: dict[str, list[Row]]) -> list[tuple[str, str]]:
    found = []
    for name, rows in by_arm.items():
        good, count = settled(decayed(rows))
        label = {"momentum": "momentum", "adam": "Adam"}[name]
        if count:
            found.append(f"with {label}, {good:,} of {count:,} problems")
    if not found:
        return []
    text = f"L2 in the loss has one minimum whatever takes the steps. At the soft threshold ended, {listed(found)}."
    return [("Other optimizers", text)]


def _limits(summary: dict[str, Any]) -> tuple[str, str]:
    settings = summary["settings"]
    return (
        "Limits",
        f"Matrices of {settings['size']}×{settings['size']}, squared error, full-batch gradients without noise. It "
        "says what these decays are, not what they do to a transformer.",
    )
