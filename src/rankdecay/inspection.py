"""The attention spectra of a model or a checkpoint, row by row, beside the same shapes untrained.

A row is one head's product, W_Kᵀ W_Q or W_O W_V; where queries and keys are normalised there is no product W_Kᵀ W_Q,
and the head's W_Q and W_K have a row each instead. The **untrained** figures are those of Gaussian matrices of the same
shapes, with the standard deviation the configuration initialises with (0.02 if it does not say; GPT-2 divides that of
W_O by the root of twice its depth). At 4096 × 128 the nuclear norm is 0.99 of its bound before any training, so a
figure without its baseline says nothing.

Layer by layer: what is in memory is one layer's attention in float64.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankdecay.attention.layer import AttentionLayer, MatrixView
from rankdecay.attention.locate import find_layers
from rankdecay.attention.names import SCALED_OUTPUT, AttentionNames
from rankdecay.attention.products import Product, ProductName, Rotary
from rankdecay.attention.source import Source, open_source
from rankdecay.spectrum import Spectrum, spectrum

#: The named ranks and norms of a row, as the methods and properties of :class:`~rankdecay.Spectrum` are called.
RANKS = ("effective_rank", "stable_rank", "nuclear_rank", "participation_ratio", "pseudo_rank", "numerical_rank")
NORMS = ("nuclear_norm", "frobenius_norm", "spectral_norm")
BALANCE = ("nuclear_gap", "nuclear_ratio", "imbalance")

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

Row = dict[str, Any]


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes:
        source: the path, or the class of the model.
        rows: one dictionary per head and product: ``layer``, ``name``, ``head``, ``product`` (or ``matrix``), the names
            in :data:`NORMS`, :data:`RANKS` and :data:`BALANCE` (None where not defined, or not finite), ``head_dim``,
            ``singular_values``; of a product ``mean_frobenius``, ½(‖A‖² + ‖B‖²), and ``squared_norms``, those of the
            rows of each factor, or of the planes, by the factor's name; and ``untrained``, the same keys.
        notes: what a reader has to know of some layers: positions, normalisation, shared heads.
        unhandled: attention that could not be read, with the reason.
    """

    source: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    unhandled: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain numbers, strings and lists; what is not finite is None."""
        return {"source": self.source, "rows": self.rows, "notes": self.notes, "unhandled": self.unhandled}

    def to_csv(self) -> str:
        """One line per row, without the spectra; the untrained figures in columns of their own."""
        figures = (*NORMS, *RANKS, *BALANCE)
        lines: list[list[object]] = [
            ["layer", "name", "head", "of", *figures, *(f"untrained_{name}" for name in figures)]
        ]
        for row in self.rows:
            values = [*(row[name] for name in figures), *(row["untrained"].get(name) for name in figures)]
            kind = row.get("product") or row.get("matrix")
            lines.append([row["layer"], row["name"], row["head"], kind, *("" if v is None else v for v in values)])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        return text.getvalue()

    def __str__(self) -> str:
        """The summary that the command line prints."""
        return summary(self)


def inspect(
    model: nn.Module | str | Path,
    names: AttentionNames | None = None,
    num_heads: int | None = None,
    *,
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
) -> Inspection:
    """Returns the spectra of every head's products in a model or checkpoint, beside the same shapes untrained.

    A model with sharded parameters (DTensors) has to be inspected in every process, and each returns the same; one
    parameter at a time is whole.

    Args:
        model: a model, or a path: a directory of ``save_pretrained``, a safetensors file, a PyTorch state dict.
        names: how its attention names its projections, if :func:`rankdecay.find_attention` does not know it.
        num_heads: number of query heads, where nothing says it: a state dict without a configuration.
        layers: only these, counted from 0 in the order of the model.
        heads: only these.

    Returns:
        An :class:`Inspection`; ``print`` it for a summary.

    Raises:
        TypeError: If ``model`` is neither a model nor a path.
        ValueError: If a checkpoint cannot be read, no attention is found, or a layer or head does not exist.

    Example:
        >>> report = inspect(nn.MultiheadAttention(16, 2))
        >>> [(row["head"], row["product"]) for row in report.rows]
        [(0, 'query_key'), (1, 'query_key'), (0, 'value_output'), (1, 'value_output')]
    """
    source = open_source(model)
    found, unhandled = find_layers(source, names, num_heads)
    chosen = _chosen("layers", layers, len(found))
    rows: list[Row] = []
    notes: dict[str, list[int]] = {}
    for index in chosen:
        layer = found[index]
        wanted = _chosen("heads", heads, layer.num_heads)
        try:
            for row in _layer_rows(layer, _initial(source, layer, len(found))):
                if row["head"] in wanted:
                    rows.append({"layer": index, "name": layer.name, **row})
        except RuntimeError as error:  # shapes that contradict each other, found when they are used
            raise ValueError(f"{layer.name} cannot be read: {error}") from None
        for note in _notes(layer):
            notes.setdefault(note, []).append(index)
    return Inspection(
        str(source),
        rows,
        [f"{_ranges(indices)}: {note}" for note, indices in notes.items()],
        [str(module) for module in unhandled],
    )


def _chosen(argument: str, wanted: Collection[int] | None, count: int) -> list[int]:
    if wanted is None:
        return list(range(count))
    outside = sorted(i for i in wanted if not 0 <= i < count)
    if outside:
        raise ValueError(f"{argument} has {outside[0]}, and there are {argument} 0 to {count - 1}.")
    return sorted(set(wanted))


class _Initial(NamedTuple):
    """Standard deviations at initialisation: of W_O, and of the others."""

    output: float = 0.02
    others: float = 0.02


def _initial(source: Source, layer: AttentionLayer, depth: int) -> _Initial:
    value = source.setting(layer.name, ("initializer_range",))
    deviation = float(value) if isinstance(value, (int, float)) and 0 < value < 10 else 0.02
    scaled = source.setting(layer.name, ("model_type",)) in SCALED_OUTPUT
    return _Initial(deviation / (2 * depth) ** 0.5 if scaled else deviation, deviation)


def _notes(layer: AttentionLayer) -> Iterator[str]:
    if layer.qk_norm:
        yield "queries and keys are normalised, so W_Kᵀ W_Q is not what scores are made of: W_Q and W_K on their own"
    elif layer.rotary is not None:
        part = "" if layer.rotary.dims == layer.head_dim else f" ({layer.rotary.dims} of {layer.head_dim} coordinates)"
        yield (
            f"rotary positions turn queries and keys{part}, so only the norms of the planes can balance: gap and "
            "imbalance of W_Kᵀ W_Q are by plane, its spectrum is that at equal positions"
        )
    if layer.num_key_value_heads < layer.num_heads:
        yield (
            f"{layer.num_heads // layer.num_key_value_heads} query heads share a key head: gap and imbalance are of "
            "the group, the spectrum of each head"
        )


def _layer_rows(layer: AttentionLayer, initial: _Initial) -> Iterator[Row]:
    if layer.qk_norm:
        for view in (layer.query, layer.key):
            yield from _matrix_rows(view, layer.num_heads, initial.others)
    else:
        yield from _product_rows(layer.query_key(), (initial.others, initial.others))
    if layer.output is not None:
        yield from _product_rows(layer.value_output(), (initial.others, initial.output))


def _product_rows(product: Product, deviations: tuple[float, float]) -> Iterator[Row]:
    k, shape = product.single.shape[-1], (product.single.shape[-2], product.several.shape[-2])
    baseline = untrained_product(product.name, shape, k, product.several.shape[1], product.rotary, deviations)
    figures = _product_figures(product)
    sigma = product.spectrum().singular_values
    norms = _squared_norms(product)
    for head in range(product.num_heads):
        own = {name: values[head] for name, values in figures.items()}
        yield {"head": head, "product": product.name, "head_dim": k, **own,
               "squared_norms": {role: plain(values[head]) for role, values in norms.items()},
               "singular_values": plain(sigma[head]), "untrained": baseline}  # fmt: skip


def _product_figures(product: Product) -> dict[str, list[float | None]]:
    balance = {name: plain(getattr(product, name)) for name in (*BALANCE, "mean_frobenius")}
    return figures_of(product.spectrum()) | balance


def _squared_norms(product: Product) -> dict[str, Tensor]:
    """(heads, n) by the names of the factors, the query or the value first."""
    single, several = product.squared_norms
    if product.name == "query_key":
        return {"query": several, "key": single}
    return {"value": single, "output": several}


def _matrix_rows(view: MatrixView, num_heads: int, deviation: float) -> Iterator[Row]:
    heads = view.heads()
    spectra = spectrum(heads)
    figures = figures_of(spectra)
    baseline = _untrained_matrix(tuple(heads.shape[-2:]), deviation)
    shared = num_heads // len(heads)
    for head in range(num_heads):
        own = {name: values[head // shared] for name, values in figures.items()}
        yield {"head": head, "matrix": view.role, "head_dim": min(heads.shape[-2:]), **own,
               **dict.fromkeys(BALANCE), "singular_values": plain(spectra.singular_values[head // shared]),
               "untrained": baseline}  # fmt: skip


def figures_of(s: Spectrum) -> dict[str, list[float | None]]:
    """Every named norm and rank, one value per head."""
    methods = {"pseudo_rank": s.pseudo_rank(), "numerical_rank": s.numerical_rank()}
    return {name: plain(methods[name] if name in methods else getattr(s, name)) for name in (*NORMS, *RANKS)}


def plain(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


# ---- untrained -------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def untrained_product(
    name: ProductName,
    rows: tuple[int, int],
    k: int,
    group: int,
    rotary: Rotary | None,
    deviations: tuple[float, float],
) -> Row:
    """The mean over a few Gaussian draws of the same shapes; they hardly vary."""
    generator = torch.Generator().manual_seed(0)
    draws = 2 if max(rows) > 1024 else 4
    single = torch.randn(draws, rows[0], k, generator=generator, dtype=torch.float64) * deviations[0]
    several = torch.randn(draws, group, rows[1], k, generator=generator, dtype=torch.float64) * deviations[1]
    product = Product(name, single, several, rotary)
    # of the norms one draw, whose scatter is that of a head
    return _mean(_product_figures(product)) | {
        "squared_norms": {role: plain(values[0]) for role, values in _squared_norms(product).items()},
        "singular_values": plain(product.spectrum().singular_values.mean(0)),
    }


@lru_cache(maxsize=64)
def _untrained_matrix(shape: tuple[int, int], deviation: float) -> Row:
    draw = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * deviation
    s = spectrum(draw)
    return _mean(figures_of(s)) | dict.fromkeys(BALANCE) | {"singular_values": plain(s.singular_values.mean(0))}


def _mean(figures: dict[str, list[float | None]]) -> Row:
    return {name: sum(value or 0.0 for value in values) / len(values) for name, values in figures.items()}


def _ranges(indices: list[int]) -> str:
    """Layers 0-3 and 5, in words."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer{'s' if len(indices) > 1 else ''} {words}"


# ---- as text ---------------------------------------------------------------------------------------------


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
            f"{number(finite_mean(row[key] for row in layer))} [{number(layer[0]['untrained'][key])}]"
            for _, key in columns
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
            means = [finite_mean(by_layer.get(index, [])) for by_layer in series]
            lines.append(f"  layer {index}: " + " → ".join(map(number, means)) + "  " + strip(means))
    return "\n".join(lines)


def strip(shares: Iterable[float | None]) -> str:
    """One block per share in [0, 1]; × where there is none."""
    return "".join("×" if s is None else _BLOCKS[min(int(s * len(_BLOCKS)), len(_BLOCKS) - 1)] for s in shares)


def finite_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def number(value: float | None) -> str:
    return "×" if value is None else f"{value:.3g}"
