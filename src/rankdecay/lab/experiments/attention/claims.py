"""Effects of a decay of attention in words: ranks, loss, and how far the figures carry.

A claim compares means with standard errors; none says that one thing caused another. A difference counts where it is
larger than its standard error, a change of pseudo rank where it is larger than `MATERIAL`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter

from rankdecay.lab.experiments.attention.settings import ARMS, FURTHER
from rankdecay.lab.experiments.attention.summary import (
    Cell,
    by_norm,
    difference,
    main_mlp_decay,
    of,
    series,
    without_decay,
)
from rankdecay.lab.report.style import ArmStyle
from rankdecay.lab.report.words import Check, Decided, Facts, capital, is_number, listed

MATERIAL = 0.01
FEW = 5  # seeds; of fewer a standard error is itself a rough guess
PRODUCTS = {"query_key": "W_KᵀW_Q", "value_output": "W_O W_V"}
Arms = Mapping[str, Sequence[Cell]]

_PROX = "(prox, per head)"
STYLES = {
    "l2": ArmStyle("L2", "#1d63b8", "#6cb2ff"),
    "l2_query_key": ArmStyle("L2 of W_Q, W_K", "#3f5fd0", "#9db4ff", "dash"),
    "low_rank": ArmStyle(f"low-rank decay {_PROX}", "#c2410c", "#ff8f5c"),
    "low_rank_both": ArmStyle(f"low-rank decay of both products {_PROX}", "#9a2f0a", "#ff7a6b", "longdash"),
    "low_rank_absolute": ArmStyle(f"absolute low-rank decay {_PROX}", "#8b3a8f", "#dd8fe0", "dashdot"),
    "low_rank_both_absolute": ArmStyle(
        f"absolute low-rank decay of both products {_PROX}", "#b0307a", "#ff86bf", "dot"
    ),
    "l2_loss": ArmStyle("L2 in the loss", "#0f766e", "#5eead4"),
    "planes": ArmStyle("decay of rotary planes", "#4d7c0f", "#bef264"),
    "positions": ArmStyle("scores of positions alone", "#57534e", "#d6d3d1"),
    "frozen": ArmStyle("W_Q, W_K never trained", "#78716c", "#a8a29e", "dash"),
    "frozen_large": ArmStyle("W_Q, W_K never trained, large", "#44403c", "#e7e5e4", "dashdot"),
    "uniform": ArmStyle("uniform attention", "#1c1917", "#fafaf9", "dot"),
}
CONTROLS = [name for name, arm in FURTHER.items() if arm.control]


# --- cells in words ---


def _cells(facts: Facts) -> list[Cell]:
    return list(facts.summary.get("arms", []))


def _known(facts: Facts) -> list[Cell]:
    return [cell for cell in _cells(facts) if is_number(cell.get("loss"))]


def _several(facts: Facts, axis: str) -> bool:
    return len({cell[axis] for cell in _cells(facts)}) > 1


def _in_norm(facts: Facts, norm: bool) -> str:
    return ("with QK-norm " if norm else "without QK-norm ") if _several(facts, "qk_norm") else ""


def _named(facts: Facts, cell: Cell) -> str:
    words = f"{facts.label(cell['name'])} at {cell['strength']:g} {_in_norm(facts, cell['qk_norm'])}".rstrip()
    if _several(facts, "mlp_decay") and cell["mlp_decay"] is not None:
        words += f", MLP decay {cell['mlp_decay']:g}"
    return words


def _product(cell: Cell, part: str) -> str:
    return PRODUCTS[part] if part in (cell.get("mean") or {}) else "W_Q, W_K (mean)"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + (f" ± {error:.4f}" if is_number(error) else "")


def loss_words(cell: Cell) -> str:
    """The loss with its standard error."""
    return _with_error(cell["loss"], cell.get("loss_error"))


def _least(cells: Sequence[Cell], key: str = "loss") -> Cell:
    return min((cell for cell in cells if is_number(cell.get(key))), key=lambda cell: cell[key])


def _against(cell: Cell, other: Cell, name: str) -> str:
    """How the loss of a cell compares with another's; a difference within its standard error is called so."""
    distance, error = difference(other, cell)
    size, side = _with_error(abs(distance), error), "below" if distance >= 0 else "above"
    if error is not None and abs(distance) <= error:
        return f"not told apart from {name} ({size} {side} it)"
    return f"{size} {side} {name}"


Change = tuple[float, float, str]  # a value before, at the strongest decay, and both in words


def _changes(arms: Arms, part: str, measure: str = "pseudo_rank") -> dict[str, Change]:
    """A measure of each arm without decay, or untrained, and at its strongest decay."""
    found = {}
    for name, cells in arms.items():
        if name in CONTROLS:  # what they lower, they do not lower by a decay
            continue
        none, strongest = without_decay(arms, name), cells[-1]
        start = of(cells[0], part, measure, "untrained_mean") if none is None else of(none, part, measure)
        end = of(strongest, part, measure)
        if start is not None and end is not None and strongest["strength"]:
            before = "untrained" if none is None else "without decay"
            found[name] = start, end, f"{start:.2f} {before} to {end:.2f} at {strongest['strength']:g}"
    return found


def _is_lower(change: Change) -> bool:
    return change[1] < change[0] - MATERIAL


def _decided(held: Sequence[bool | None], texts: Sequence[str], lead: str = "") -> Decided | None:
    """A claim that holds where it holds in every part, with the figures of each."""
    return (None if None in held else all(held), f"{lead}{'; '.join(texts)}.") if texts else None


# --- the headline ---


def headline(facts: Facts) -> str:
    """Whether the strongest decays lowered the rank of queries and keys, and which cell has the least loss."""
    known = _known(facts)
    if not known:
        return "No run ended with a finite loss, so there is nothing to compare."
    best, arms = _least(known), next(iter(by_norm(_cells(facts)).values()), {})
    texts = []
    if changes := _changes(arms, "query_key"):
        words = {name: f"{change[2]} under {facts.label(name)}" for name, change in changes.items()}
        lowered = [name for name in changes if _is_lower(changes[name])]
        kept = [text for name, text in words.items() if name not in lowered]
        subject = f"the pseudo rank of {_product(arms[next(iter(changes))][-1], 'query_key')}"
        if lowered:
            texts.append(f"Decay of attention lowered {subject}: {listed([words[name] for name in lowered])}.")
        if kept:
            texts.append(f"{'Not' if lowered else f'Decay of attention did not lower {subject}'}: {listed(kept)}.")
    none = without_decay(series(known, qk_norm=best["qk_norm"], mlp_decay=best["mlp_decay"]), best["name"])
    compared = "" if none is None or none is best else f": {_against(best, none, 'no decay')}"
    return " ".join([*texts, f"The least loss, {loss_words(best)}, was that of {_named(facts, best)}{compared}."])


# --- the claims ---

OfNorm = Callable[[Facts, Arms], Decided | None]  # decides a claim with or without QK-norm alone


def _each_norm(decide: OfNorm) -> Callable[[Facts], Decided | None]:
    """A claim that is to hold with and without QK-norm."""

    def decided(facts: Facts) -> Decided | None:
        found = {norm: decide(facts, arms) for norm, arms in by_norm(_cells(facts)).items()}
        both = {_in_norm(facts, norm): each for norm, each in found.items() if each is not None}
        return _decided([held for held, _ in both.values()], [lead + text for lead, (_, text) in both.items()])

    return decided


def _lowers_rank(name: str, facts: Facts, arms: Arms) -> Decided | None:
    changes = {part: change for part in PRODUCTS if (change := _changes(arms, part).get(name)) is not None}
    if "query_key" not in changes:
        return None
    texts = []
    for part, change in changes.items():
        lowest, at = min((rank, cell["strength"]) for cell in arms[name] if (rank := of(cell, part)) is not None)
        aside = f" (lowest {lowest:.2f} at {at:g})" if lowest < change[1] - MATERIAL else ""
        texts.append(f"{_product(arms[name][-1], part)} {change[2]}{aside}")
    return _is_lower(changes["query_key"]), f"pseudo rank of {listed(texts)}"


def _lowers_loss(name: str, facts: Facts, arms: Arms) -> Decided | None:
    if name not in arms:
        return None
    cells, none = arms[name], without_decay(arms, name)
    best, strongest = _least(cells), cells[-1]
    text = f"least loss {loss_words(best)} at {best['strength']:g}"
    if best is strongest and len(cells) > 1:
        text += " (the strongest tried: a stronger one may do better)"
    if none is not None and none is not best:
        text += f", {_against(best, none, 'no decay')}"
    if strongest is not none and strongest is not best:
        text += f", {_against(best, strongest, 'strength ' + format(strongest['strength'], 'g'))}"
    if accurate := [cell for cell in cells if is_number(cell.get("accuracy"))]:
        top = max(accurate, key=lambda cell: cell["accuracy"])
        text += f", best accuracy {top['accuracy']:.1%} at {top['strength']:g}"
    distance, error = (0.0, None) if none is None else difference(none, best)
    return None if none is None else distance > (error or 0.0), text


def _under_norm(facts: Facts) -> Decided | None:
    """Whether each decay still lowers the rank of W_Q and W_K where their product is behind a norm."""
    arms = by_norm(_cells(facts))
    plain, normed = (_changes(arms.get(norm, {}), "matrices") for norm in (False, True))
    texts = [
        f"{facts.label(name)} {change[2]}" + (f" ({plain[name][2]} without the norm)" if name in plain else "")
        for name, change in normed.items()
    ]
    return _decided([_is_lower(change) for change in normed.values()], texts, "their mean pseudo rank: ")


def _free(facts: Facts, arms: Arms) -> Decided | None:
    """Whether the lowest rank has the least loss, or one not told apart from it."""

    def words(rank: float, cell: Cell) -> str:
        return f"{rank:.2f}, of {_named(facts, cell)} at a loss of {loss_words(cell)}"

    cells = [cell for name, own in arms.items() for cell in own if name not in CONTROLS]
    ranked = [(rank, cell) for cell in cells if (rank := of(cell, "query_key")) is not None]
    ranked.sort(key=itemgetter(0))
    if len(ranked) < 2:
        return None
    best, lowest = _least([cell for _, cell in ranked]), ranked[0][1]
    cheap_rank, cheap = next((rank, cell) for rank, cell in ranked if cell is best or _is_near(cell, best))
    text = f"the lowest pseudo rank of {_product(best, 'query_key')} is {words(*ranked[0])}"
    if lowest is not best:
        text += f", {lowest['loss'] - best['loss']:.4f} above the least"
    if cheap is not lowest:
        text += f"; not told apart from the least loss, {words(cheap_rank, cheap)}"
    return cheap is lowest, text


def _is_near(cell: Cell, best: Cell) -> bool:
    distance, error = difference(cell, best)
    return error is not None and distance <= error


def _balances(facts: Facts) -> Decided | None:
    arms = by_norm(_cells(facts)).get(False, {})
    held, texts = [], []
    for part, product in PRODUCTS.items():
        for name, (start, end, words) in _changes(arms, part, "imbalance").items():
            held.append(end < start)
            texts.append(f"{product} under {facts.label(name)} {words}")
    return _decided(held, texts, "imbalance (0 balanced, 2 at most) of ")


def _equal_time(facts: Facts) -> Decided | None:
    timed = [c for c in _known(facts) if is_number(c.get("loss_at_equal_time")) and is_number(c.get("per_second"))]
    by_arm = {name: [c for c in timed if c["name"] == name] for name in facts.arms if name not in CONTROLS}
    best = [_least(cells, "loss_at_equal_time") for cells in by_arm.values() if cells]
    if not by_arm["l2"] or len(best) < 2:
        return None
    best.sort(key=lambda cell: cell["loss_at_equal_time"])
    unit = facts.summary.get("unit", "examples")
    texts = [
        f"{cell['loss_at_equal_time']:.4f}, {_named(facts, cell)} "
        f"({max(c['per_second'] for c in by_arm[cell['name']]):,.0f} {unit} per second)"
        for cell in best
    ]
    lead = "least losses after as many seconds of training as the quickest run took: "
    return _decided([best[0]["name"] != "l2"], texts, lead)


def _same_at_every_mlp_decay(facts: Facts) -> Decided | None:
    cells = _cells(facts)
    values = sorted({cell["mlp_decay"] for cell in cells if cell["mlp_decay"] is not None})
    held, texts = [], []
    for norm in (False, True):
        by_mlp = [series(cells, qk_norm=norm, mlp_decay=value) for value in values]
        for name in facts.arms:
            best = [_least(arms[name]) for arms in by_mlp if name in arms]
            if len(best) > 1:
                held.append(len({cell["strength"] for cell in best}) == 1)
                at = listed([f"{cell['strength']:g} at MLP decay {cell['mlp_decay']:g}" for cell in best])
                top = _least(best)["mlp_decay"]
                texts.append(f"{_in_norm(facts, norm)}{facts.label(name)} {at}, the least at MLP decay {top:g}")
    return _decided(held, texts, "the strength with the least loss: ")


def _all_ended(facts: Facts) -> Decided | None:
    lost = [f"{c['diverged']} of {c['seeds']} under {_named(facts, c)}" for c in _cells(facts) if c.get("diverged")]
    return _decided([False], lost, "left out of every mean, ")


def _enough_seeds(facts: Facts) -> Decided | None:
    count = max((cell["seeds"] - (cell.get("diverged") or 0) for cell in _known(facts)), default=0)
    rough = "; of so few it is itself a rough guess" if count < FEW else ""
    text = (
        f"the ± is the standard error over {count} seeds, of a difference seed by seed{rough}."
        if count > 1
        else "one seed per cell. The ± is the error of one evaluation, of a difference that over the same pieces of "
        "the validation set, and another seed may put the strengths in another order."
    )
    text += " With so many cells some differences beyond one standard error are to be expected by chance."
    if _several(facts, "mlp_decay"):
        text += f" Where nothing else is said, the decay of the MLPs is {main_mlp_decay(_cells(facts)):g}."
    return (count >= FEW, text) if count else None


OPEN = {"l2": "whether plain L2 lowers the rank too", "low_rank": "whether a low-rank decay lowers it further"}


def _of_arm(name: str) -> tuple[Check, Check]:
    label, open_rank = capital(STYLES[name].label), OPEN.get(name, "")
    return (
        Check(f"{label} lowers the rank", _each_norm(partial(_lowers_rank, name)), (name,), open_rank),
        Check(f"{label} lowers the loss", _each_norm(partial(_lowers_loss, name)), (name,)),
    )


CHECKS = (
    *(check for name in (*ARMS, *FURTHER) if name not in CONTROLS for check in _of_arm(name)),
    Check("The rank of W_Q and W_K falls under QK-norm too", _under_norm),
    Check("A low rank costs no loss", _each_norm(_free)),
    Check("Decay balances the factors", _balances),
    Check("In equal time another decay is ahead of L2", _equal_time, ("l2",)),
    Check("The best decay is the same whatever that of the MLPs", _same_at_every_mlp_decay),
    Check("Every run ended with a finite loss", _all_ended),
    Check("There are enough seeds to put the strengths in order", _enough_seeds),
)
