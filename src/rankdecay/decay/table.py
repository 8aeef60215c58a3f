"""Table of ``Attachment.describe``: every parameter, its decay, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rankdecay.attention import Window
from rankdecay.decay.plan import NO_REMARKS, Remarks
from rankdecay.dtensor import whole
from rankdecay.spectrum import spectrum
from rankdecay.text import aligned


class Row(NamedTuple):
    """Row of the table: a matrix, or a parameter."""

    name: str
    parameter: Tensor
    role: str
    window: Window
    decay: str
    by: str  # what applies it
    why: str
    low_rank: bool = False
    waiting: str = ""  # how far an every=k cycle is

    def matrix(self) -> Tensor:
        """Return the present matrix; a collective if the parameter is sharded.

        Raises:
            ValueError: If it is on the meta device.
        """
        if self.parameter.is_meta:
            raise ValueError(f"{self.name} is on the meta device and has no ranks; load the weights first.")
        return self.window.matrix(whole(self.parameter.detach()))


def table(
    rows: Sequence[Row], *, ranks: bool, state: str, remarks: Remarks = NO_REMARKS, notes: Sequence[str] = ()
) -> str:
    """Return the table as text, a summary first, low-rank decays before the rest.

    Args:
        rows: in the order of the optimizer's groups.
        ranks: only the matrices with a low-rank decay, with their ranks.
        state: whether it is attached, and to what.
        remarks: what a reader has to know of the model's attention.
        notes: what a reader has to know of the optimizer.
    """
    rows = sorted(rows, key=lambda row: not row.low_rank)
    shown = [row for row in rows if row.low_rank] if ranks else rows
    cells = [["parameter", "shape", "role", *(_RANKS if ranks else ["decay", "applied by", "why"])]]
    for row in shown:
        last = _ranks(row) if ranks else [row.decay, row.by or "-", row.why]
        cells.append([row.name, _shape(row, ranks), row.role, *last])
    named = [f"  not handled: {reason}" for reason in remarks.unhandled]
    named += [
        f"  assumed: {name} holds all queries, then all keys, then all values, as nothing says otherwise"
        for name in remarks.assumed
    ]
    named += [f"  note: {note}" for note in notes]
    return "\n".join([_summary(rows, state), *named, "", *aligned(cells)])


_RANKS = ["max rank", "stable rank", "effective rank", "numerical rank"]


def _shape(row: Row, ranks: bool) -> str:
    if row.window.is_whole:
        return "×".join(map(str, row.parameter.shape))
    if ranks:
        return f"{'×'.join(map(str, row.matrix().shape))} {row.window.label}"
    groups = f" of each {row.window.size}" if row.window.groups > 1 else ""
    where = f"{row.window.lines} {row.window.start}:{row.window.stop}{groups}"
    return f"{'×'.join(map(str, row.parameter.shape))} {'transposed ' if row.window.transposed else ''}{where}"


def _ranks(row: Row) -> list[str]:
    s = spectrum(row.matrix())
    values = (s.stable_rank, s.effective_rank, s.numerical_rank())
    return [str(s.singular_values.shape[-1]), *(f"{float(value.mean()):.4g}" for value in values)]


def _summary(rows: Sequence[Row], state: str) -> str:
    counts = Counter((row.role, row.decay, row.by) for row in rows)
    lines = [f"rankdecay, {state}"]
    waiting = dict.fromkeys(row.waiting for row in rows if row.waiting)
    for (role, decay, by), count in counts.items():
        lines.append(f"  {role}: {count} × {decay}" + (f", by {by}" if by else ""))
    lines += [f"  {words}; ranks include what gradients have added since" for words in waiting]
    return "\n".join(lines)
