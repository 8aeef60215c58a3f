"""Results of `rankdecay margin` in words: which SVM each arm tends to, how near it came, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankdecay.lab.experiment import Check, Facts
from rankdecay.lab.report.words import Decided, figure_text, is_number, listed
from rankdecay.lab.settings import Record

ONE_SOLUTION = 0.999  # cosine between the two SVMs above which data cannot tell them apart


def decided(row: Mapping[str, Any]) -> int:
    """The data sets of an arm in which it selected tokens that some W separates."""
    return row["seeds"] - row["infeasible"] - row["undecided"]


def never_trained(facts: Facts) -> list[str]:
    """The arms that were asked for and could select the optimal tokens of no data set."""
    return [name for name in facts.settings["parametrisation"] if name not in facts.arms]


def note(facts: Facts) -> str:
    """Note under the table."""
    shape = facts.summary["shape"]
    return (
        f"One layer and one head, {shape['examples']} examples of {shape['tokens']} tokens in {shape['dimension']} "
        f"dimensions, {_what_moves(facts)}. Means over data sets at the end, the margin "
        f"their median: of {facts.summary['datasets']}, those whose optimal tokens a W can select. Cosines to the SVMs "
        "of the tokens that were selected; above: the norm per unit of margin, over the least there is. The rank "
        "counts singular values above 1 % of the largest. Alignment is the share of the nuclear solution's singular "
        "spaces that W has, 1 at most. Optimal tokens: data sets in which every example selected its best."
    )


def _what_moves(facts: Facts) -> str:
    """Departures of the training from the theory."""
    how = "gradient flow without noise"
    if steps := [name for name in ("descent", "normalised", "adam") if name in facts.arms]:
        how += f" (steps of --lr {facts.settings['lr']:g}: {listed(steps)})"
    fixed = "a fixed value head" + (", trained in trained_head" if "trained_head" in facts.arms else "")
    return f"{fixed}, {how}"


def headline(facts: Facts) -> str:
    """Whether gradient flow on K and Q leans to the nuclear norm."""
    row = _row(facts, "separate")
    if row is None:
        return "Without the flow on K and Q apart there is nothing to say of an implicit nuclear-norm bias."
    if row["margin"] < 1:
        return f"After {row['steps']:,} steps the flow on K and Q is at a margin of {row['margin']:.2g}: raise --steps."
    if row["cosine_between"] > ONE_SOLUTION:
        return (
            "On these data the nuclear and the Frobenius SVM have one solution, so they cannot tell the biases apart; "
            f"the flow on K and Q ended at cosine {row['cosine_nuclear']:.4f} to it."
        )
    nearer, known = row["nearer_nuclear"], decided(row)
    if nearer == known:
        lead = "leans to the nuclear norm, in every data set"
    elif 2 * nearer > known:
        lead = f"leans to the nuclear norm in {nearer} of {known} data sets"
    else:
        lead = f"shows no nuclear-norm bias in {known - nearer} of {known} data sets"
    return (
        f"With no decay at all, gradient flow on K and Q {lead}: its direction ended at a cosine of "
        f"{row['cosine_nuclear']:.3f} to the nuclear-norm SVM and {row['cosine_frobenius']:.3f} to the Frobenius-norm "
        f"one (means over {known} data sets)."
    )


def _row(facts: Facts, name: str) -> Record | None:
    """The row of an arm that ended with a direction."""
    return next((row for row in facts.arms.get(name, []) if is_number(row["cosine_nuclear"])), None)


def _approach(facts: Facts) -> Decided | None:
    row = _row(facts, "separate")
    at = [found for found in row["at"] if is_number(found["cosine_nuclear"])] if row else []
    most = max((found["datasets"] for found in at), default=0)
    at = [found for found in at if found["datasets"] == most]  # means over other data sets do not compare
    if len(at) < 2:
        return None
    some = [at[0], at[len(at) // 2], at[-1]] if len(at) > 2 else at
    cosines = listed([f"{found['cosine_nuclear']:.3f} at margin {short(found['margin'])}" for found in some])
    excess = listed([f"{found['nuclear_excess']:.1%}" for found in some])
    return at[-1]["cosine_nuclear"] > at[0]["cosine_nuclear"] and at[-1]["nuclear_excess"] < at[0]["nuclear_excess"], (
        f"cosine to the nuclear SVM {cosines}; the nuclear norm per unit of margin was {excess} above the least (means "
        f"over {most} data sets)."
    )


def short(value: Any, form: str = ",g") -> str:
    """A number with its power of ten in few characters: ``"1e6"``."""
    return figure_text(value, form).replace("e+0", "e").replace("e+", "e")


def _nearer(claim: str, name: str, nuclear: bool = True, open: str = "") -> Check:
    """The claim that an arm ended nearer the nuclear SVM, or nearer the other, in every data set."""

    def holds(facts: Facts) -> Decided | None:
        row = _row(facts, name)
        if row is None or row["cosine_between"] > ONE_SOLUTION:
            return None
        count, known = row["nearer_nuclear"] if nuclear else decided(row) - row["nearer_nuclear"], decided(row)
        diagonal, full = ("ℓ1 solution", "ℓ2 one", "‖β‖₁"), ("nuclear SVM", "Frobenius one", "‖W‖_*")
        first, second, norm = diagonal if name == "diagonal" else full
        text = (
            f"in {count} of {known} data sets; cosine {row['cosine_nuclear']:.4f} to the {first} and "
            f"{row['cosine_frobenius']:.4f} to the {second}, which have {row['cosine_between']:.3f} to each other; "
            f"{norm} {row['nuclear_excess']:.2%} above the least."
        )
        if row["margin"] < 1:
            ended = f"the flow ended after {row['steps']:,} steps at a margin of {row['margin']:.2g}"
            return None, f"{ended}: raise --steps."
        return count == known, text + _stopped(facts, row)

    return Check(claim, holds, (name,), open)


def _stopped(facts: Facts, row: Record) -> str:
    """Where an explicit decay ended the flow, and whether the direction had settled."""
    settings = facts.settings
    if row["name"] not in ("separate_l2", "merged_l2", "low_rank"):
        early = decided(row) - row["reached"]
        if row["name"] in ("recipe", "recipe_bare") or early <= 0:
            return ""
        return f" {early} of {decided(row)} ended after {row['steps']:,} steps, before --margin."
    turning = f"; after {settings['steps']:,} steps the direction was not settled yet"
    more = turning if row["steps"] >= settings["steps"] else ""
    return f" ε = {settings['l2']:g} stops the flow at a margin of about {row['margin']:.3g}{more}."


def _left_out(facts: Facts) -> Decided | None:
    found = []
    for (row,) in facts.arms.values():
        counts = {
            "inseparable": facts.summary["datasets"] - row["seeds"],
            "with selected tokens that no W separates": row["infeasible"],
            "that selected no tokens": row["undecided"],
        }
        parts = [f"{count} {why}" for why, count in counts.items() if count]
        if short := len(row["rank_short"]):
            parts.append(f"in the means though the inner dimension is below the SVM's rank, {short}")
        if parts:
            found.append(f"{row['name']}: {listed(parts)}")
    found += [f"{name}: all {facts.summary['datasets']} inseparable" for name in never_trained(facts)]
    return (False, f"{'; '.join(found)}.") if found else None


CHECKS: Sequence[Check] = (
    Check("K and Q apart come nearer the nuclear SVM as the margin grows", _approach, ("separate",)),
    _nearer("The flow on W itself ends nearer the Frobenius SVM", "merged", False, "whether it takes two factors"),
    _nearer("Diagonal K and Q end nearer the ℓ1 solution", "diagonal"),
    _nearer("An L2 on K and Q ends nearer the nuclear SVM", "separate_l2",
            open="where an explicit decay of the factors leads"),
    _nearer("An L2 on W ends nearer the Frobenius SVM", "merged_l2", nuclear=False),
    _nearer("A nuclear norm on W ends nearer the nuclear SVM", "low_rank"),
    _nearer("The published recipe, normalised float64 descent, ends nearer the nuclear SVM", "recipe"),
    _nearer("So it does without its ε(‖K‖² + ‖Q‖²)", "recipe_bare"),
    _nearer("Gradient descent on K and Q ends nearer the nuclear SVM", "descent"),
    _nearer("Normalised descent in exact arithmetic ends nearer the nuclear SVM", "normalised"),
    _nearer("Adam on K and Q ends nearer the nuclear SVM", "adam"),
    _nearer("With a trained value head K and Q end nearer the nuclear SVM", "trained_head"),
    Check("No data set is left out", _left_out),
)  # fmt: skip
