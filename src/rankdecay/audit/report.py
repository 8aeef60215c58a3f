"""Report of an audit: a row per parameter and head, a table, and the same in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import wrap
from typing import Literal, NamedTuple

from rankdecay.text import aligned, finite_mean

Kind = Literal["scale_invariant", "pair", "neither", "unknown"]


class Share(NamedTuple):
    """Shares of a step's squared length along W and across it, which turns W; they add to 1."""

    radial: float
    tangential: float


@dataclass(frozen=True)
class AuditRow:
    """Result for one matrix, one head of it, or one other parameter.

    Attributes:
        name: the parameter's name.
        part: ``"query"``, ``"key"``, ``"value"`` or ``"output"``, for an attention matrix and its bias.
        role: as :func:`rankdecay.param_groups` names it.
        head: which head; None for the whole.
        kind: ``"scale_invariant"``, ``"pair"``, ``"neither"`` or ``"unknown"``.
        partner: the other side of the pair.
        radial: cosine of the gradient and W; None without a gradient or for a zero W.
        euler: how far from Euler's equation, with the bias; 0 if scale-invariant, around 1 if not (module docstring).
        balance: how far the pair, all its heads or units together, is from its equation; None without a candidate.
        confirmed: True if a finite rescaling said the same; None if it was not asked, or rounding hid the answer. A
            kind that a rescaling contradicts is given up.
        gradient: shares of a gradient step.
        low_rank: shares of a low-rank step, along U Vᵀ; None for a vector.
        words: what L2 and low-rank decay do.
    """

    name: str
    part: str
    role: str
    head: int | None
    kind: Kind
    partner: str | None
    radial: float | None
    euler: float | None
    balance: float | None
    confirmed: bool | None
    gradient: Share | None
    low_rank: Share | None
    words: str

    @property
    def l2(self) -> Share:
        """Shares of an L2 step: it is along W."""
        return Share(1.0, 0.0)


@dataclass(frozen=True)
class AuditReport:
    """Result of :func:`audit`.

    Attributes:
        rows: in the order of the parameters; a matrix of attention first whole, then head by head.
        tolerance: what counted as zero; None: by the dtype of the parameter.
        notes: attention that could not be read, with the reason.
    """

    rows: tuple[AuditRow, ...]
    tolerance: float | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return a table with one line for the same parameter in all layers, and the same in words."""
        groups: dict[tuple[str, ...], list[AuditRow]] = {}
        for row in self.rows:
            unit = "whole" if row.head is None else "head"
            partner = re.sub(r" heads? [\d–]+$", "", _pattern(row.partner or ""))
            groups.setdefault((_pattern(row.name), row.part, unit, row.kind, partner), []).append(row)
        cells = [["parameter", "part", "unit", "kind", "euler", "balance", "turned by: L2", "low-rank", "gradient"]]
        words: dict[str, dict[frozenset[str], str]] = {}
        for (name, part, unit, kind, partner), rows in groups.items():
            count = f"{unit} ×{len(rows)}" if len(rows) > 1 else unit
            numbers = [_mean("{:.1g}", (row.euler for row in rows)), _mean("{:.1g}", (row.balance for row in rows))]
            turned = [[step and step.tangential for step in (row.l2, row.low_rank, row.gradient)] for row in rows]
            shares = [_mean("{:.0%}", column) for column in zip(*turned, strict=True)]
            sure = ", confirmed" if all(row.confirmed for row in rows) else ""
            cells.append([name, part, count, kind.replace("_", "-") + sure, *numbers, *shares])
            text = re.sub(r" \(tangential share.*?\)|(?<=pair) with .*?(?=:)", "", rows[0].words)
            what = " ".join(filter(None, [name, part, "of each head" if unit == "head" else ""]))
            which = frozenset(filter(None, [f"{name} {part}".strip(), partner]))  # a pair once, a head under its whole
            words.setdefault(text, {}).setdefault(which, what + (f" with {partner}" if partner else ""))
        sentences: list[str] = []
        for text, items in words.items():
            sentences += [*wrap(text, 116), *(f"    {item}" for item in items.values())]
        return "\n".join([*aligned(cells), "", *sentences, *(f"Not read as attention: {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.describe()


def _pattern(name: str) -> str:
    """Replace the numbers of layers in a name by ``*``."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _mean(form: str, values: Iterable[float | None]) -> str:
    mean = finite_mean(values)
    return "-" if mean is None else form.format(mean)
