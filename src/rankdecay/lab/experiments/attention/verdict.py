"""What a decay of attention came to, in words: ranks, quality, and how far the numbers carry.

As on every page, the sentences are computed from `summary.json` alone. They compare means with standard errors and
never say that one thing caused another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankdecay.lab.experiments.attention.read import PARTS, main_mlp_decay, series
from rankdecay.lab.experiments.attention.summary import difference, of
from rankdecay.lab.experiments.grok.read import is_number
from rankdecay.lab.experiments.grok.verdict import Verdict, listed
from rankdecay.lab.report.style import arm_styles

Cell = Mapping[str, Any]
MATERIAL = 0.01  # a change of the mean pseudo rank that is worth a word
USUAL = 0.1  # the decay that is usual for every matrix
FEW = 5  # seeds; of fewer a standard error is itself a rough guess


def verdict(summary: dict[str, Any] | None) -> Verdict:
    """The verdict of an experiment, from its summary."""
    if summary is None:
        return Verdict("The run is not complete: it has no summary yet.", [])
    cells: list[Cell] = summary.get("arms") or []
    words = _Words(cells)
    known = [cell for cell in cells if is_number(cell.get("loss"))]
    if not known:
        return Verdict("No run ended with a finite loss, so there is nothing to compare.", _diverged(cells, words))
    main = main_mlp_decay(cells)
    by_norm = {norm: series(cells, qk_norm=norm, mlp_decay=main) for norm in (False, True)}
    by_norm = {norm: arms for norm, arms in by_norm.items() if arms}
    points: list[tuple[str, str]] = []
    for norm, arms in by_norm.items():
        for name, rows in arms.items():
            points.append((words.lead(name, norm), _of_arm(rows, without_decay(arms, name))))
    points += _under_norm(by_norm, words)
    for norm, arms in by_norm.items():
        points += _cost(arms, words, norm if len(by_norm) > 1 else None)
    points += _balance(by_norm.get(False, {}), words)
    points += _time(known, summary.get("unit", "examples"), words)
    points += _mlp(cells, words)
    points += _diverged(cells, words)
    points.append(_limits(known, words, main))
    return Verdict(_headline(known, by_norm, words), points)


# --- comparing ---


def error_of(cell: Cell) -> float | None:
    """The standard error of a loss; None where it is not known."""
    return cell["loss_error"] if is_number(cell.get("loss_error")) else None


def without_decay(arms: Mapping[str, Sequence[Cell]], name: str) -> Cell | None:
    """What an arm is held against: its own cell at strength 0, else that of an arm that decays the same, or any."""
    for other in (name, "l2_query_key", *arms):
        for cell in arms.get(other, ()):
            if cell["strength"] == 0:
                return cell
    return None


def least(cells: Sequence[Cell], key: str = "loss") -> Cell:
    """The cell with the least of a number; those without it are passed over."""
    return min((cell for cell in cells if is_number(cell.get(key))), key=lambda cell: cell[key])


def rank_of(cell: Cell, part: str, when: str = "mean") -> float | None:
    """The pseudo rank of a part at the end, or untrained; under QK-norm W_Q and W_K stand for their product."""
    value = of(cell.get(when) or {}, part, "pseudo_rank")
    return value if is_number(value) else None


def product_name(cell: Cell, part: str) -> str:
    """What `rank_of` speaks of."""
    return PARTS[part] if part in (cell.get("mean") or {}) else "W_Q, W_K (mean)"


def _against(cell: Cell, other: Cell, name: str) -> str:
    """How the loss of a cell compares with another's; a difference within its standard error is none to speak of."""
    distance, error = difference(other, cell)
    size = f"{abs(distance):.4f}" + (f" ± {error:.4f}" if error is not None else "")
    side = "below" if distance >= 0 else "above"
    if error is not None and abs(distance) <= error:
        return f"not told apart from {name} ({size} {side} it)"
    return f"{size} {side} {name}"


def _is_near(cell: Cell, best: Cell) -> bool:
    distance, error = difference(cell, best)
    return error is not None and distance <= error


def _loss(cell: Cell) -> str:
    error = error_of(cell)
    return f"{cell['loss']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


@dataclass(frozen=True)
class _Words:
    """Names for the arms and cells of one experiment: only what differs between cells is said."""

    cells: Sequence[Cell]

    def label(self, name: str) -> str:
        return arm_styles(dict.fromkeys(cell["name"] for cell in self.cells))[name].label

    def several(self, axis: str) -> bool:
        return len({cell[axis] for cell in self.cells}) > 1

    def lead(self, name: str, norm: bool) -> str:
        label = self.label(name)
        label = label[:1].upper() + label[1:]
        return label + ((", QK-norm" if norm else ", no QK-norm") if self.several("qk_norm") else "")

    def short(self, cell: Cell) -> str:
        return f"{self.label(cell['name'])} at {cell['strength']:g}"

    def cell(self, cell: Cell) -> str:
        words = self.short(cell)
        if self.several("qk_norm"):
            words += " with QK-norm" if cell["qk_norm"] else " without QK-norm"
        if self.several("mlp_decay") and cell["mlp_decay"] is not None:
            words += f", MLP decay {cell['mlp_decay']:g}"
        return words


# --- sentences ---


def _headline(known: Sequence[Cell], by_norm: Mapping[bool, Mapping[str, Sequence[Cell]]], words: _Words) -> str:
    rank = _rank_headline(next(iter(by_norm.values()), {}), words)
    best = least(known)
    same = [c for c in known if c["qk_norm"] == best["qk_norm"] and c["mlp_decay"] == best["mlp_decay"]]
    arms = series(same, qk_norm=best["qk_norm"], mlp_decay=best["mlp_decay"])
    none = without_decay(arms, best["name"])
    text = f"The least loss, {_loss(best)}, was that of {words.cell(best)}"
    if len(known) == 1:
        return f"{rank} The loss was {_loss(best)}; there is no other cell to compare it with.".strip()
    if none is None or best is none:
        return f"{rank} {text}.".strip()
    return f"{rank} {text}: {_against(best, none, 'no decay')}.".strip()


def _rank_headline(arms: Mapping[str, Sequence[Cell]], words: _Words) -> str:
    """Whether decay lowered the rank of queries and keys, arm by arm, at its strongest."""
    lowered, kept = [], []
    starts: set[str] = set()
    subject = ""
    for name, rows in arms.items():
        strongest, none = rows[-1], without_decay(arms, name)
        end, untrained = rank_of(strongest, "query_key"), rank_of(rows[0], "query_key", "untrained_mean")
        start = rank_of(none, "query_key") if none is not None else untrained
        if end is None or start is None or strongest["strength"] == 0:
            continue
        subject = product_name(strongest, "query_key")
        before = f" ({untrained:.2f} untrained)" if untrained is not None else ""
        starts.add(f"{start:.2f} without decay{before}" if none is not None else f"{start:.2f} untrained")
        change = f"{end:.2f} under {words.label(name)} at {strongest['strength']:g}"
        (lowered if end < start - MATERIAL else kept).append(change)
    if not starts:
        return ""
    begun = f", {starts.pop()}," if len(starts) == 1 else ""
    if not lowered:
        return f"The pseudo rank of {subject}{begun} was not lowered by decay: {listed(kept)}."
    rest = f"; it was not lowered to speak of by others: {listed(kept)}" if kept else ""
    return f"Decay of attention lowered the pseudo rank of {subject}{begun} to {listed(lowered)}{rest}."


def _of_arm(rows: Sequence[Cell], none: Cell | None) -> str:
    ranks = [text for part in ("query_key", "value_output") if (text := _ranks(rows, none, part))]
    text = f"Pseudo rank of {'; of '.join(ranks)}. " if ranks else ""
    best = least(rows)
    references = [row for row in rows if row["strength"] in (0, USUAL) or row is rows[-1]]
    compared = [_against(best, row, f"strength {row['strength']:g}") for row in references if row is not best]
    if none is not None and none not in rows:
        compared.insert(0, _against(best, none, "no decay"))
    if len(rows) == 1:
        text += f"Loss {_loss(best)} at its one strength, {best['strength']:g}"
    else:
        edge = " (the weakest tried)" if best is rows[0] and best["strength"] > 0 else ""
        edge = " (the strongest tried: a stronger one may do better)" if best is rows[-1] else edge
        text += f"Least loss {_loss(best)} at {best['strength']:g}{edge}"
    text += f": {'; '.join(compared)}." if compared else "."
    return text + _accuracy(rows)


def _accuracy(rows: Sequence[Cell]) -> str:
    accurate = [row for row in rows if is_number(row.get("accuracy"))]
    if not accurate:
        return ""
    top = max(accurate, key=lambda row: row["accuracy"])
    if len(accurate) == 1:
        return f" Accuracy {top['accuracy']:.1%}."
    if all(row["accuracy"] == top["accuracy"] for row in accurate):
        return f" Accuracy {top['accuracy']:.1%} at every strength."
    return f" Best accuracy {top['accuracy']:.1%} at {top['strength']:g}."


def _ranks(rows: Sequence[Cell], none: Cell | None, part: str) -> str:
    strongest = rows[-1]
    found: list[tuple[float | None, str]] = [(rank_of(rows[0], part, "untrained_mean"), "untrained")]
    if none is not None:
        found.append((rank_of(none, part), "without decay"))
    end = rank_of(strongest, part)
    if strongest is not none:
        found.append((end, f"at {strongest['strength']:g}"))
    values = [f"{rank:.2f} {when}" for rank, when in found if rank is not None]
    between = [(rank, row["strength"]) for row in rows if (rank := rank_of(row, part)) is not None]
    if end is not None and min(between)[0] < end - MATERIAL:
        values.append(f"lowest {min(between)[0]:.2f} at {min(between)[1]:g}")
    return f"{product_name(strongest, part)}: {', '.join(values)}" if values else ""


def _under_norm(by_norm: Mapping[bool, Mapping[str, Sequence[Cell]]], words: _Words) -> list[tuple[str, str]]:
    """Whether each decay still lowers the rank of W_Q and W_K where their product is behind a norm."""
    if True not in by_norm:
        return []
    texts = []
    for name, rows in by_norm[True].items():
        changes = []
        for norm in (True, False):
            arms = by_norm.get(norm, {})
            none = without_decay(arms, name)
            own = arms.get(name)
            if not own or none is None or own[-1]["strength"] == 0:
                continue
            start, end = _matrices(none), _matrices(own[-1])
            if start is not None and end is not None:
                changes.append((norm, start, end))
        if not changes or not changes[0][0]:
            continue
        _, start, end = changes[0]
        verb = "lowered it" if end < start - MATERIAL else "did not lower it"
        text = f"{words.label(name)} at {rows[-1]['strength']:g} {verb}, {start:.2f} to {end:.2f}"
        if len(changes) > 1:
            text += f" (without the norm {changes[1][1]:.2f} to {changes[1][2]:.2f})"
        texts.append(text)
    if not texts:
        return []
    text = "; ".join(texts)
    return [("Under QK-norm", f"Mean pseudo rank of W_Q and W_K, without decay and at the strongest: {text}.")]


def _matrices(cell: Cell) -> float | None:
    """The mean pseudo rank of W_Q and W_K by themselves, which with and without QK-norm is the same measure."""
    mean = cell.get("mean") or {}
    return of({part: mean[part] for part in ("query", "key") if part in mean}, "query_key", "pseudo_rank")


def _cost(arms: Mapping[str, Sequence[Cell]], words: _Words, norm: bool | None) -> list[tuple[str, str]]:
    """What the lowest rank costs, and how low a rank comes at no cost that can be told from chance."""
    cells = [cell for rows in arms.values() for cell in rows if rank_of(cell, "query_key") is not None]
    if len(cells) < 2:
        return []
    best, lowest = least(cells), min(cells, key=lambda cell: rank_of(cell, "query_key") or 0)
    subject = product_name(best, "query_key")
    text = f"The lowest pseudo rank of {subject}, {rank_of(lowest, 'query_key'):.2f}, is that of {words.short(lowest)}"
    text += f", at a loss of {_loss(lowest)}"
    text += ", the least of all." if lowest is best else f", {lowest['loss'] - best['loss']:.4f} above the least."
    if error_of(best) is not None and lowest is not best:
        near = [cell for cell in cells if cell is best or _is_near(cell, best)]
        cheap = min(near, key=lambda cell: rank_of(cell, "query_key") or 0)
        shown = f"{rank_of(cheap, 'query_key'):.2f}, {words.short(cheap)}, at a loss of {_loss(cheap)}"
        text += (
            f" Not told apart from the least loss (within a standard error of the difference), the lowest is {shown}."
        )
    lead = "What rank costs" + ("" if norm is None else ", QK-norm" if norm else ", no QK-norm")
    return [(lead, text)]


def _balance(arms: Mapping[str, Sequence[Cell]], words: _Words) -> list[tuple[str, str]]:
    texts = []
    for name, rows in arms.items():
        none = without_decay(arms, name)
        if none is None or rows[-1]["strength"] == 0:
            continue
        changes = []
        for part in ("query_key", "value_output"):
            start, end = (of(cell.get("mean") or {}, part, "imbalance") for cell in (none, rows[-1]))
            if is_number(start) and is_number(end):
                changes.append(f"{PARTS[part]} {start:.2f} to {end:.2f}")
        if changes:
            texts.append(f"{words.short(rows[-1])}, {listed(changes)}")
    if not texts:
        return []
    text = "; ".join(texts)
    return [("Balance", f"Imbalance of the factors (0 balanced, 2 at most), from no decay to the strongest: {text}.")]


def _time(known: Sequence[Cell], unit: str, words: _Words) -> list[tuple[str, str]]:
    by_arm: dict[str, list[Cell]] = {}
    for cell in known:
        if is_number(cell.get("loss_at_equal_time")) and is_number(cell.get("per_second")):
            by_arm.setdefault(cell["name"], []).append(cell)
    if len(by_arm) < 2:
        return []
    best = {name: least(cells, "loss_at_equal_time") for name, cells in by_arm.items()}
    order = sorted(best.values(), key=lambda cell: cell["loss_at_equal_time"])
    losses = [f"{cell['loss_at_equal_time']:.4f} ({words.cell(cell)})" for cell in order]
    speeds = {name: max(cell["per_second"] for cell in cells) for name, cells in by_arm.items()}
    quickest = max(speeds, key=lambda name: speeds[name])
    shares = [f"{words.label(n)} {s / speeds[quickest]:.0%}" for n, s in speeds.items() if n != quickest]
    text = f"Each arm's least loss after as many seconds of training as the quickest run took: {'; '.join(losses)}. "
    text += f"The quickest arm made {speeds[quickest]:,.0f} {unit} per second ({words.label(quickest)}); of that, "
    return [("Equal time", f"{text}{listed(shares)}.")]


def _mlp(cells: Sequence[Cell], words: _Words) -> list[tuple[str, str]]:
    values = sorted({cell["mlp_decay"] for cell in cells if cell["mlp_decay"] is not None})
    if len(values) < 2:
        return []
    texts = []
    for norm in (False, True):
        by_mlp = {value: series(cells, qk_norm=norm, mlp_decay=value) for value in values}
        for name in dict.fromkeys(cell["name"] for cell in cells):
            best = [least(arms[name]) for arms in by_mlp.values() if name in arms]
            if len(best) > 1:
                at = [f"{cell['strength']:g} at {cell['mlp_decay']:g}" for cell in best]
                same = len({cell["strength"] for cell in best}) == 1
                shown = f"{best[0]['strength']:g} at each of them" if same else listed(at)
                top = least(best)
                texts.append(f"{words.lead(name, norm)}: {shown}, the least at MLP decay {top['mlp_decay']:g}.")
    text = "The decay of attention with the least loss at each decay of the MLPs."
    return [("MLP decay", " ".join([text, *texts]))] if texts else []


def _diverged(cells: Sequence[Cell], words: _Words) -> list[tuple[str, str]]:
    lost = [f"{c['diverged']} of {c['seeds']} under {words.cell(c)}" for c in cells if c.get("diverged")]
    if not lost:
        return []
    return [("Diverged", f"Runs whose loss was no longer finite, left out of every mean: {'; '.join(lost)}.")]


def _limits(known: Sequence[Cell], words: _Words, main: float | None) -> tuple[str, str]:
    seeds = max(cell["seeds"] - (cell.get("diverged") or 0) for cell in known)
    if seeds == 1:
        text = (
            "One seed per cell: the ± is the error of one evaluation, of a difference that over the same pieces of "
            "the validation set, and another seed may put the strengths in another order."
        )
    else:
        text = f"The ± is the standard error over {seeds} seeds, of a difference seed by seed"
        text += "; of so few it is itself a rough guess." if seeds < FEW else "."
    text += " With so many cells some differences beyond one standard error are to be expected by chance."
    if words.several("mlp_decay") and main is not None:
        text += f" Where nothing else is said, the decay of the MLPs is {main:g}."
    return "Limits", text
