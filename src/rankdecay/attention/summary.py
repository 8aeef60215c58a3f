"""What ``rankdecay inspect`` prints: a line per layer and product, with a strip of its heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankdecay.attention.inspection import Inspection

_BLOCKS = "▁▂▃▄▅▆▇█"
#: What a row is of: its symbol and what it does, in the order of reading.
KINDS = {
    "query_key": ("W_Kᵀ W_Q", "what a query looks for"),
    "query": ("W_Q", "queries, normalised afterwards"),
    "key": ("W_K", "keys, normalised afterwards"),
    "value_output": ("W_O W_V", "what a head writes"),
}
_FOOT = (
    "Means over heads; in brackets Gaussian matrices of the same shapes, untrained. Pseudo rank: the share of a head's",
    "dimensions that holds 95 % of the nuclear norm; on the right each head's, from ▁ 0 to █ 1, × if not finite.",
)
#: Column, key, whether the baseline stands beside it.
_COLUMNS = (
    ("pseudo rank", "pseudo_rank"),
    ("effective", "effective_rank"),
    ("stable", "stable_rank"),
    ("nuclear/bound", "nuclear_ratio"),
    ("imbalance", "imbalance"),
)


def summary(report: Inspection) -> str:
    """Returns the report as text: means over heads, in brackets the same shapes untrained."""
    count = len({(row["layer"], row["name"]) for row in report.rows})
    lines = [f"{report.source}: {count} attention layer{'s' if count != 1 else ''}"]
    lines += [f"  {note}" for note in report.notes]
    lines += [f"  not handled: {reason}" for reason in report.unhandled]
    for kind, (symbol, meaning) in KINDS.items():
        rows = [row for row in report.rows if kind in (row.get("product"), row.get("matrix"))]
        if rows:
            lines += ["", f"{symbol}, {meaning}", *_table(rows)]
    lines += ["", *_FOOT]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = [(title, key) for title, key in _COLUMNS if rows[0]["untrained"].get(key) is not None]
    cells = [["layer", "of", *(title for title, _ in columns), "heads"]]
    names = dict.fromkeys((row["layer"], row["name"]) for row in rows)
    several = len(names) > len({index for index, _ in names})  # runs of one shape beside each other
    for index, name in names:
        layer = [row for row in rows if (row["layer"], row["name"]) == (index, name)]
        figures = [
            f"{_number(_mean(row[key] for row in layer))} [{_number(layer[0]['untrained'][key])}]" for _, key in columns
        ]
        shown = strip(row["pseudo_rank"] for row in layer)
        cells.append([name if several else str(index), str(layer[0]["head_dim"]), *figures, shown])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def comparison(reports: list[Inspection]) -> str:
    """Returns the mean over heads of each layer's pseudo rank in several checkpoints, in their order, as text."""
    lines = ["", "Pseudo rank, mean over heads, in the order given"]
    for kind, (symbol, meaning) in KINDS.items():
        series = [
            {row["layer"]: [] for row in report.rows if kind in (row.get("product"), row.get("matrix"))}
            for report in reports
        ]
        for report, by_layer in zip(reports, series, strict=True):
            for row in report.rows:
                if kind in (row.get("product"), row.get("matrix")):
                    by_layer[row["layer"]].append(row["pseudo_rank"])
        if not any(series):
            continue
        lines += ["", f"{symbol}, {meaning}"]
        for index in dict.fromkeys(layer for by_layer in series for layer in by_layer):
            means = [_mean(by_layer.get(index, [])) for by_layer in series]
            lines.append(f"  layer {index}: " + " → ".join(map(_number, means)) + "  " + strip(means))
    return "\n".join(lines)


def strip(shares: Iterable[float | None]) -> str:
    """One block per share in [0, 1]; × where there is none."""
    return "".join("×" if s is None else _BLOCKS[min(int(s * len(_BLOCKS)), len(_BLOCKS) - 1)] for s in shares)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.3g}"
