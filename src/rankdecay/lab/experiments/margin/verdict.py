"""What the attention experiment shows, in words: which SVM each arm tends to, how near it came, and what was left out.

As on every page, the sentences are computed from `summary.json` alone.
"""

from typing import Any

from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.experiments.grok.verdict import Verdict, listed

Row = dict[str, Any]


def verdict(summary: dict[str, Any] | None) -> Verdict:
    """The verdict of a run, from its summary."""
    if summary is None:
        return Verdict("The run is not complete: it has no summary yet.", [])
    by_arm: dict[str, Row] = {row["name"]: row for row in summary["arms"]}
    points = []
    for name, say in (("separate", _speed), ("merged", _merged), ("diagonal", _diagonal)):
        if name in by_arm and is_number(by_arm[name]["cosine_nuclear"]):
            points += say(by_arm[name])
    points += _explicit(by_arm, summary) + _recipe(by_arm) + _left_out(summary)
    points.append(_limits(summary))
    return Verdict(_headline(by_arm), points)


def _headline(by_arm: dict[str, Row]) -> str:
    row = by_arm.get("separate")
    if row is None or not is_number(row["cosine_nuclear"]):
        return "Without the flow on K and Q apart there is nothing to say of an implicit nuclear-norm bias."
    between = row["cosine_between"]
    if between > 0.999:
        return (
            "On these data the nuclear and the Frobenius SVM have one solution, so they cannot tell the biases apart; "
            f"the flow on K and Q ended at cosine {row['cosine_nuclear']:.4f} to it."
        )
    known = row["seeds"] - row["infeasible"] - row["undecided"]
    nearer = row["nearer_nuclear"]
    figures = (
        f"its direction ended at a cosine of {row['cosine_nuclear']:.3f} to the nuclear-norm SVM and "
        f"{row['cosine_frobenius']:.3f} to the Frobenius-norm one (means over {known} data sets)"
    )
    if nearer == known:
        return (
            f"With no decay at all, gradient flow on K and Q leans to the nuclear norm, in every data set: {figures}."
        )
    if 2 * nearer > known:
        lead = f"With no decay, gradient flow on K and Q leans to the nuclear norm in {nearer} of {known} data sets"
    else:
        other = f"{known - nearer} of {known} data sets"
        lead = f"With no decay, gradient flow on K and Q shows no nuclear-norm bias in {other}"
    return f"{lead}: {figures}."


def _speed(row: Row) -> list[tuple[str, str]]:
    at = [found for found in row["at"] if is_number(found["cosine_nuclear"])]
    most = max((found["datasets"] for found in at), default=0)
    at = [found for found in at if found["datasets"] == most]  # means over other data sets do not compare
    if len(at) < 2:
        return []
    some = [at[0], at[len(at) // 2], at[-1]] if len(at) > 2 else at
    cosines = listed([f"{found['cosine_nuclear']:.3f} at margin {_short(found['margin'])}" for found in some])
    excess = listed([f"{found['nuclear_excess']:.1%}" for found in some])
    text = (
        f"K and Q apart: cosine to the nuclear SVM {cosines}; its nuclear norm, per unit of margin, was {excess} above "
        f"the least (means over {most} data sets)."
    )
    return [("How fast", text)]


def _short(margin: float) -> str:
    return f"{margin:,g}".replace("e+0", "e").replace("e+", "e")


def _merged(row: Row) -> list[tuple[str, str]]:
    return [("Merged", (
        f"The flow on W itself ended at cosine {row['cosine_frobenius']:.4f} to the Frobenius SVM and "
        f"{row['cosine_nuclear']:.3f} to the nuclear one, which are {row['cosine_between']:.3f} from each other."
    ))]  # fmt: skip


def _diagonal(row: Row) -> list[tuple[str, str]]:
    return [("Diagonal", (
        f"‖β‖₁ per unit of margin ended {row['nuclear_excess']:.2%} above the least (mean of {row['seeds']}); cosine "
        f"{row['cosine_nuclear']:.3f} to the ℓ1 solution and {row['cosine_frobenius']:.3f} to the ℓ2 one."
    ))]  # fmt: skip


def _explicit(by_arm: dict[str, Row], summary: dict[str, Any]) -> list[tuple[str, str]]:
    names = {
        "separate_l2": "on K and Q", "merged_l2": "on W", "low_rank": "as a nuclear norm on W"
    }  # fmt: skip
    found = [
        f"{words}, cosine {row['cosine_nuclear']:.4f} to the nuclear SVM and {row['cosine_frobenius']:.4f} to the other"
        for name, words in names.items()
        if (row := by_arm.get(name)) is not None and is_number(row["cosine_nuclear"])
    ]
    if not found:
        return []
    stopped = max(by_arm[name]["margin"] for name in names if name in by_arm)
    text = f"A decay of ε = {summary['settings']['l2']:g}: {'; '.join(found)}. "
    text += f"It stops the flow at a margin of about {stopped:.3g}."
    steps = summary["settings"]["steps"]
    turning = [words for name, words in names.items() if name in by_arm and by_arm[name]["steps"] >= steps]
    if turning:
        text += f" After {steps:,} steps the direction was not settled yet {listed(turning)}."
    return [("Explicit decay", text)]


def _recipe(by_arm: dict[str, Row]) -> list[tuple[str, str]]:
    known = [(name, by_arm[name]) for name in ("recipe", "recipe_bare") if name in by_arm]
    known = [(name, row) for name, row in known if is_number(row["cosine_nuclear"])]
    if not known:
        return []
    words = {"recipe": "with its ε(‖K‖² + ‖Q‖²)", "recipe_bare": "without"}
    text = listed([f"{row['cosine_nuclear']:.3f} {words[name]}" for name, row in known])
    return [("Published recipe", f"Normalised float64 descent ended at cosine {text} to the nuclear SVM.")]


def _left_out(summary: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for row in summary["arms"]:
        parts = []
        if row["seeds"] < summary["datasets"]:
            parts.append(f"{summary['datasets'] - row['seeds']} inseparable")
        if row["infeasible"]:
            parts.append(f"{row['infeasible']} with selected tokens that no W separates")
        if row["undecided"]:
            parts.append(f"{row['undecided']} that selected no tokens")
        if row["rank_short"]:
            parts.append(f"in the means though the inner dimension is below the SVM's rank, {len(row['rank_short'])}")
        if parts:
            found.append(f"{row['name']}: {listed(parts)}")
    found += [f"{name}: all {summary['datasets']} inseparable" for name in never_trained(summary)]
    return [("Left out", "; ".join(found) + ".")] if found else []


def never_trained(summary: dict[str, Any]) -> list[str]:
    """The arms that were asked for and could select the optimal tokens of no data set."""
    trained = {row["name"] for row in summary["arms"]}
    return [name for name in summary["settings"]["parametrisation"] if name not in trained]


def _limits(summary: dict[str, Any]) -> tuple[str, str]:
    shape = summary["shape"]
    return "Limits", (
        f"One layer and one head, {shape['examples']} examples of {shape['tokens']} tokens in {shape['dimension']} "
        "dimensions, a fixed value head, gradient flow without noise. Where other than the optimal tokens were "
        "selected, the SVMs are those of the selected ones."
    )
