"""What a decay of attention did, in words: ranks, loss, and how far the figures carry.

A claim compares means with standard errors; none says that one thing caused another. A difference counts where it is
larger than its standard error, a change of pseudo rank where it is larger than `MATERIAL`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from rankdecay.lab.experiments.attention.settings import ARMS
from rankdecay.lab.experiments.attention.summary import (
    Cell,
    difference,
    main_mlp_decay,
    of,
    rank_of,
    series,
    without_decay,
)
from rankdecay.lab.report.style import ArmStyle
from rankdecay.lab.report.words import Check, Decided, Facts, counted, is_number, listed

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
}


# --- cells in words ---


def _cells(facts: Facts) -> list[Cell]:
    return list(facts.summary.get("arms", []))


def _known(facts: Facts) -> list[Cell]:
    return [cell for cell in _cells(facts) if is_number(cell.get("loss"))]


def _several(facts: Facts, axis: str) -> bool:
    return len({cell[axis] for cell in _cells(facts)}) > 1


def _by_norm(facts: Facts) -> dict[bool, Arms]:
    """The cells at the main decay of the MLPs, without and with QK-norm, by arm."""
    cells = _cells(facts)
    main = main_mlp_decay(cells)
    found = {norm: series(cells, qk_norm=norm, mlp_decay=main) for norm in (False, True)}
    return {norm: arms for norm, arms in found.items() if arms}


def _in_norm(facts: Facts, norm: bool) -> str:
    return ("with QK-norm " if norm else "without QK-norm ") if _several(facts, "qk_norm") else ""


def _named(facts: Facts, cell: Cell) -> str:
    words = f"{facts.label(cell['name'])} at {cell['strength']:g}"
    if _several(facts, "qk_norm"):
        words += " with QK-norm" if cell["qk_norm"] else " without QK-norm"
    if _several(facts, "mlp_decay") and cell["mlp_decay"] is not None:
        words += f", MLP decay {cell['mlp_decay']:g}"
    return words


def _product(cell: Cell, part: str) -> str:
    return PRODUCTS[part] if part in (cell.get("mean") or {}) else "W_Q, W_K (mean)"


def loss_words(cell: Cell) -> str:
    """The loss with its standard error."""
    error = cell.get("loss_error")
    return f"{cell['loss']:.4f}" + (f" ± {error:.4f}" if is_number(error) else "")


def _least(cells: Sequence[Cell], key: str = "loss") -> Cell:
    return min((cell for cell in cells if is_number(cell.get(key))), key=lambda cell: cell[key])


def _against(cell: Cell, other: Cell, name: str) -> str:
    """How the loss of a cell compares with another's; a difference within its standard error is called so."""
    distance, error = difference(other, cell)
    size = f"{abs(distance):.4f}" + (f" ± {error:.4f}" if error is not None else "")
    side = "below" if distance >= 0 else "above"
    if error is not None and abs(distance) <= error:
        return f"not told apart from {name} ({size} {side} it)"
    return f"{size} {side} {name}"


def _start(arms: Arms, name: str) -> tuple[float | None, str]:
    """The rank of queries and keys that an arm is held against, and where it is from."""
    none = without_decay(arms, name)
    if none is not None:
        return rank_of(none, "query_key"), "without decay"
    return rank_of(arms[name][0], "query_key", "untrained_mean"), "untrained"


# --- the headline ---


def headline(facts: Facts) -> str:
    """Whether the strongest decays lowered the rank of queries and keys, and which cell has the least loss."""
    known = _known(facts)
    if not known:
        return "No run ended with a finite loss, so there is nothing to compare."
    best, arms = _least(known), next(iter(_by_norm(facts).values()), {})
    parts = [_rank_headline(facts, arms)]
    if len(known) == 1:
        parts.append(f"The loss was {loss_words(best)}; there is no other cell to compare it with.")
    else:
        around = series(known, qk_norm=best["qk_norm"], mlp_decay=best["mlp_decay"])
        none = without_decay(around, best["name"])
        compared = "" if none is None or none is best else f": {_against(best, none, 'no decay')}"
        parts.append(f"The least loss, {loss_words(best)}, was that of {_named(facts, best)}{compared}.")
    return " ".join(filter(None, parts))


def _rank_headline(facts: Facts, arms: Arms) -> str:
    changes: dict[bool, list[str]] = {True: [], False: []}
    starts: set[str] = set()
    subject = ""
    for name, cells in arms.items():
        strongest, (start, where) = cells[-1], _start(arms, name)
        end = rank_of(strongest, "query_key")
        if end is None or start is None or strongest["strength"] == 0:
            continue
        subject = _product(strongest, "query_key")
        starts.add(f"{start:.2f} {where}")
        text = f"{end:.2f} under {facts.label(name)} at {strongest['strength']:g}"
        changes[end < start - MATERIAL].append(text)
    if not starts:
        return ""
    start = f", {starts.pop()}," if len(starts) == 1 else ""
    if not changes[True]:
        return f"The pseudo rank of {subject}{start} was not lowered by decay: {listed(changes[False])}."
    rest = f"; it was not lowered to speak of by others: {listed(changes[False])}" if changes[False] else ""
    return f"Decay of attention lowered the pseudo rank of {subject}{start} to {listed(changes[True])}{rest}."


# --- the claims ---


def _lowers_rank(name: str, facts: Facts) -> Decided | None:
    lowered, texts = [], []
    for norm, arms in _by_norm(facts).items():
        if name not in arms:
            continue
        strongest, (start, _) = arms[name][-1], _start(arms, name)
        end = rank_of(strongest, "query_key")
        if start is None or end is None or strongest["strength"] == 0:
            continue
        lowered.append(end < start - MATERIAL)
        ranks = listed([text for part in PRODUCTS if (text := _ranks(arms, name, part))])
        texts.append(f"{_in_norm(facts, norm)}pseudo rank of {ranks}")
    return (all(lowered), f"{'; '.join(texts)}.") if texts else None


def _ranks(arms: Arms, name: str, part: str) -> str:
    cells, none = arms[name], without_decay(arms, name)
    strongest, end = cells[-1], rank_of(cells[-1], part)
    found = [(rank_of(cells[0], part, "untrained_mean"), "untrained")]
    if none is not None and none is not strongest:
        found.append((rank_of(none, part), "without decay"))
    found.append((end, f"at {strongest['strength']:g}"))
    ranks = [(rank, cell["strength"]) for cell in cells if (rank := rank_of(cell, part)) is not None]
    if end is not None and min(ranks)[0] < end - MATERIAL:
        found.append((min(ranks)[0], f"at {min(ranks)[1]:g}, the lowest"))
    values = [f"{rank:.2f} {when}" for rank, when in found if rank is not None]
    return f"{_product(strongest, part)} {', '.join(values)}" if values else ""


def _lowers_loss(name: str, facts: Facts) -> Decided | None:
    better: list[bool | None] = []
    texts = []
    for norm, arms in _by_norm(facts).items():
        if name not in arms:
            continue
        cells, none = arms[name], without_decay(arms, name)
        best = _least(cells)
        distance, error = (0.0, None) if none is None else difference(none, best)
        better.append(None if none is None else distance > (error or 0.0))
        edge = best is cells[-1] and len(cells) > 1
        text = f"{_in_norm(facts, norm)}least loss {loss_words(best)} at {best['strength']:g}"
        text += " (the strongest tried: a stronger one may do better)" if edge else ""
        if none is not None and none is not best:
            text += f", {_against(best, none, 'no decay')}"
        strongest = cells[-1]
        if strongest is not best and strongest is not none:
            at = f"strength {strongest['strength']:g}"
            text += f", {_against(best, strongest, at)}"
        texts.append(text + _accuracy(cells))
    if not texts:
        return None
    return None if None in better else all(better), f"{'; '.join(texts)}."


def _accuracy(cells: Sequence[Cell]) -> str:
    accurate = [cell for cell in cells if is_number(cell.get("accuracy"))]
    if not accurate:
        return ""
    top = max(accurate, key=lambda cell: cell["accuracy"])
    if len(accurate) > 1 and all(cell["accuracy"] == top["accuracy"] for cell in accurate):
        return f", accuracy {top['accuracy']:.1%} at every strength"
    return f", best accuracy {top['accuracy']:.1%} at {top['strength']:g}"


def _matrices(cell: Cell) -> float | None:
    """The mean pseudo rank of W_Q and W_K themselves, which with and without QK-norm is the same measure."""
    mean = cell.get("mean") or {}
    return of({part: mean[part] for part in ("query", "key") if part in mean}, "query_key", "pseudo_rank")


def _under_norm(facts: Facts) -> Decided | None:
    """Whether each decay still lowers the rank of W_Q and W_K where their product is behind a norm."""
    by_norm = _by_norm(facts)
    lowered, texts = [], []
    for name in by_norm.get(True, {}):
        ranks = {}
        for norm, arms in by_norm.items():
            none = without_decay(arms, name)
            if none is not None and name in arms and arms[name][-1]["strength"]:
                ranks[norm] = _matrices(none), _matrices(arms[name][-1])
        ranks = {norm: (start, end) for norm, (start, end) in ranks.items() if start is not None and end is not None}
        if True not in ranks:
            continue
        start, end = ranks[True]
        lowered.append(end < start - MATERIAL)
        text = f"{facts.label(name)} at {by_norm[True][name][-1]['strength']:g} {start:.2f} to {end:.2f}"
        texts.append(
            text + (f" (without the norm {ranks[False][0]:.2f} to {ranks[False][1]:.2f})" if False in ranks else "")
        )
    if not texts:
        return None
    return all(lowered), f"their mean pseudo rank, without decay and at the strongest: {'; '.join(texts)}."


def _free(facts: Facts) -> Decided | None:
    """Whether the lowest rank has the least loss, or one not told apart from it."""
    held, texts = [], []
    for norm, arms in _by_norm(facts).items():
        cells = [cell for own in arms.values() for cell in own if rank_of(cell, "query_key") is not None]
        if len(cells) < 2:
            continue
        best, lowest = _least(cells), min(cells, key=lambda cell: rank_of(cell, "query_key") or 0)
        near = [cell for cell in cells if cell is best or _is_near(cell, best)]
        cheap = min(near, key=lambda cell: rank_of(cell, "query_key") or 0)
        held.append(lowest in near)
        text = f"{_in_norm(facts, norm)}the lowest pseudo rank of {_product(best, 'query_key')}, "
        text += f"{rank_of(lowest, 'query_key'):.2f}, is that of {_named(facts, lowest)}, at a loss of "
        text += loss_words(lowest)
        text += ", the least of all" if lowest is best else f", {lowest['loss'] - best['loss']:.4f} above the least"
        if cheap is not lowest:
            text += (
                f"; not told apart from the least loss, the lowest is {rank_of(cheap, 'query_key'):.2f}, "
                f"{_named(facts, cheap)}, at a loss of {loss_words(cheap)}"
            )
        texts.append(text)
    return (all(held), f"{'; '.join(texts)}.") if texts else None


def _is_near(cell: Cell, best: Cell) -> bool:
    distance, error = difference(cell, best)
    return error is not None and distance <= error


def _balances(facts: Facts) -> Decided | None:
    arms = _by_norm(facts).get(False, {})
    lowered, texts = [], []
    for name, cells in arms.items():
        none = without_decay(arms, name)
        if none is None or cells[-1]["strength"] == 0:
            continue
        changes = []
        for part, product in PRODUCTS.items():
            start, end = (of(cell.get("mean") or {}, part, "imbalance") for cell in (none, cells[-1]))
            if start is not None and end is not None:
                lowered.append(end < start)
                changes.append(f"{product} {start:.2f} to {end:.2f}")
        if changes:
            texts.append(f"{facts.label(name)} at {cells[-1]['strength']:g}, {listed(changes)}")
    if not texts:
        return None
    return all(lowered), f"imbalance (0 balanced, 2 at most), from no decay to the strongest: {'; '.join(texts)}."


def _equal_time(facts: Facts) -> Decided | None:
    by_arm: dict[str, list[Cell]] = {}
    for cell in _known(facts):
        if is_number(cell.get("loss_at_equal_time")) and is_number(cell.get("per_second")):
            by_arm.setdefault(cell["name"], []).append(cell)
    if "l2" not in by_arm or len(by_arm) < 2:
        return None
    best = [_least(cells, "loss_at_equal_time") for cells in by_arm.values()]
    best.sort(key=lambda cell: cell["loss_at_equal_time"])
    losses = [f"{cell['loss_at_equal_time']:.4f} ({_named(facts, cell)})" for cell in best]
    speeds = {name: max(cell["per_second"] for cell in cells) for name, cells in by_arm.items()}
    quickest = max(speeds, key=lambda name: speeds[name])
    shares = [f"{facts.label(name)} {s / speeds[quickest]:.0%}" for name, s in speeds.items() if name != quickest]
    return best[0]["name"] != "l2", (
        f"least losses after as many seconds of training as the quickest run took: {'; '.join(losses)}. The quickest "
        f"arm made {speeds[quickest]:,.0f} {facts.summary.get('unit', 'examples')} per second "
        f"({facts.label(quickest)}); of that, {listed(shares)}."
    )


def _same_at_every_mlp_decay(facts: Facts) -> Decided | None:
    cells = _cells(facts)
    values = sorted({cell["mlp_decay"] for cell in cells if cell["mlp_decay"] is not None})
    same, texts = [], []
    for norm in (False, True):
        by_mlp = [series(cells, qk_norm=norm, mlp_decay=value) for value in values]
        for name in facts.arms:
            best = [_least(arms[name]) for arms in by_mlp if name in arms]
            if len(best) > 1:
                same.append(len({cell["strength"] for cell in best}) == 1)
                at = listed([f"{cell['strength']:g} at MLP decay {cell['mlp_decay']:g}" for cell in best])
                top = _least(best)["mlp_decay"]
                texts.append(f"{_in_norm(facts, norm)}{facts.label(name)} {at}, the least at MLP decay {top:g}")
    return (all(same), f"the strength with the least loss: {'; '.join(texts)}.") if texts else None


def _all_ended(facts: Facts) -> Decided | None:
    lost = [f"{c['diverged']} of {c['seeds']} under {_named(facts, c)}" for c in _cells(facts) if c.get("diverged")]
    return (False, f"left out of every mean, {'; '.join(lost)}.") if lost else None


def _enough_seeds(facts: Facts) -> Decided | None:
    known = _known(facts)
    if not known:
        return None
    count = max(cell["seeds"] - (cell.get("diverged") or 0) for cell in known)
    if count == 1:
        text = (
            "one seed per cell. The ± is the error of one evaluation, of a difference that over the same pieces of the "
            "validation set, and another seed may put the strengths in another order."
        )
    else:
        rough = "; of so few it is itself a rough guess" if count < FEW else ""
        text = f"the ± is the standard error over {counted(count, 'seed')}, of a difference seed by seed{rough}."
    text += " With so many cells some differences beyond one standard error are to be expected by chance."
    main = main_mlp_decay(_cells(facts))
    if _several(facts, "mlp_decay") and main is not None:
        text += f" Where nothing else is said, the decay of the MLPs is {main:g}."
    return count >= FEW, text


def _of_arm(name: str) -> tuple[Check, Check]:
    label = STYLES[name].label
    label = label[:1].upper() + label[1:]
    open_rank = {
        "l2": "whether plain L2 lowers the rank too",
        "low_rank": "whether a low-rank decay lowers it further",
    }
    return (
        Check(f"{label} lowers the rank", partial(_lowers_rank, name), (name,), open_rank.get(name, "")),
        Check(f"{label} lowers the loss", partial(_lowers_loss, name), (name,)),
    )


CHECKS = (
    *(check for name in ARMS for check in _of_arm(name)),
    Check("The rank of W_Q and W_K falls under QK-norm too", _under_norm),
    Check("A low rank costs no loss", _free),
    Check("Decay balances the factors", _balances),
    Check("In equal time another decay is ahead of L2", _equal_time, ("l2",)),
    Check("The best decay is the same whatever that of the MLPs", _same_at_every_mlp_decay),
    Check("Every run ended with a finite loss", _all_ended),
    Check("There are enough seeds to put the strengths in order", _enough_seeds),
)
