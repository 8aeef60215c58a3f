"""Attention spectra of a model or a checkpoint, row by row, beside the same shapes untrained.

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.layer import AttentionLayer, MatrixView
from rankdecay.attention.locate import Names, SearchOptions, chosen, layers_of, listed, locate_or_raise
from rankdecay.attention.model_types import SCALED_OUTPUT
from rankdecay.attention.numbering import ranges
from rankdecay.attention.products import Product, ProductName, Rotary
from rankdecay.attention.scale import gradients_of, settled
from rankdecay.attention.source import ModuleSource, Source, open_source
from rankdecay.compress.outlook import Outlook, outlook
from rankdecay.spectrum import Spectrum, spectrum
from rankdecay.text import BLOCKS, GONE, aligned, bars, cell, finite_mean, number, shown_lines

#: The named ranks and norms of a row, as the methods and properties of :class:`~rankdecay.Spectrum` are called.
RANKS = ("effective_rank", "stable_rank", "nuclear_rank", "participation_ratio", "pseudo_rank", "numerical_rank")
NORMS = ("nuclear_norm", "frobenius_norm", "spectral_norm")
#: The figures of a product that a matrix does not have.
BALANCE = ("nuclear_gap", "nuclear_ratio", "imbalance")

#: The products and matrices that have rows: symbol and what it does, in the order of reading.
KINDS = {
    "query_key": ("W_Kᵀ W_Q", "what a query looks for"),
    "query_key_rotary": ("W_Kᵀ W_Q rotary", "the part rotated by RoPE"),
    "query": ("W_Q", "queries, normalised afterwards"),
    "key": ("W_K", "keys, normalised afterwards"),
    "value_output": ("W_O W_V", "what a head writes"),
    "value": ("W_V", "values"),
    "output": ("W_O", "output projection, of gated or normalised heads"),
    "query_factor": ("W_QA", "query down-projection, normalised before the up-projection"),
    "latent": ("W_C", "the latent that keys and values share, normalised afterwards"),
    "output_factor": ("W_OA", "output down-projection, in groups"),
    "output_mix": ("W_OB", "output up-projection"),
}
#: The matrices of :data:`KINDS` that have no heads.
_FACTORS = ("query_factor", "latent", "output_factor", "output_mix")

Row = dict[str, Any]


@dataclass(frozen=True)
class Inspection:
    """Result of :func:`inspect`.

    Attributes:
        source: the path, or the class of the model.
        rows: one dictionary per head and product: ``layer``, the model's own number, with its ``tower`` where there are
            several and a ``label`` that no other layer has, ``name``, ``head``, ``product`` (or ``matrix``), the names
            in :data:`NORMS`, :data:`RANKS` and :data:`BALANCE` (None where not defined, or not finite), ``head_dim``,
            ``singular_values``; of a product ``mean_frobenius``, ½(‖A‖² + ‖B‖²), and ``squared_norms``, those of the
            rows of each factor, or of the planes, by the factor's name; and ``untrained``, the same keys.
        notes: what a reader has to know about positions, normalisation and shared heads, with the layers concerned.
        unhandled: attention that could not be read, with the reason.
        smaller: what smaller heads would drop and save, or why none can be made; None where only a part was inspected.
    """

    source: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    unhandled: list[str] = field(default_factory=list)
    smaller: Outlook | None = None

    def of(self, kind: str) -> list[Row]:
        """Return the rows of one of :data:`KINDS`."""
        return [row for row in self.rows if kind in (row.get("product"), row.get("matrix"))]

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain numbers, strings and lists; None for a number that is not finite."""
        whole: dict[str, Any] = {
            "source": self.source,
            "rows": self.rows,
            "notes": self.notes,
            "unhandled": self.unhandled,
        }
        return whole if self.smaller is None else whole | {"smaller_heads": self.smaller.to_json()}

    def to_csv(self) -> str:
        """Return one line per row, without the spectra; the untrained figures have columns of their own."""
        return csv_text([self])

    def __str__(self) -> str:
        """Return the summary that the command line prints: means over heads, in brackets the same shapes untrained."""
        count = len({(label(row), row["name"]) for row in self.rows})
        lines = [f"{self.source}: {count} attention layer{'s' if count != 1 else ''}"]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  not handled: {reason}" for reason in self.unhandled]
        for kind, (symbol, meaning) in KINDS.items():
            if rows := self.of(kind):
                lines += ["", f"{symbol}, {meaning}", *_table(rows)]
        lines += ["", *_FOOT]
        if self.smaller is not None:
            lines += ["", *self.smaller.lines()]
        return shown_lines(lines)


def inspect(
    model: nn.Module | str | Path,
    names: Names = None,
    num_heads: int | None = None,
    *,
    head_dim: int | None = None,
    layers: Collection[int | str] | None = None,
    heads: Collection[int] | None = None,
    only: bool = False,
    state: str | None = None,
    example: Any = None,
    progress: Callable[[int, int], object] | None = None,
) -> Inspection:
    """Return the spectra of every head's products in a model or checkpoint, beside the same shapes untrained.

    A model with sharded parameters (DTensors) has to be inspected in every process, and each returns the same; one
    parameter at a time is whole.

    Args:
        model: a model, or a path: a directory of ``save_pretrained``, a safetensors file, a PyTorch state dict,
            a GGUF file.
        names: how its attention names its projections, for one kind of attention or several, if
            :func:`rankdecay.find_attention` does not know it.
        num_heads: number of query heads, where nothing says it: a state dict without a configuration.
        layers: only these, by the model's own numbers; of a tower as ``"decoder.4"``.
        heads: only these.
        head_dim: size of a head, where nothing says it.
        only: look for ``names`` alone.
        state: which weights, of a checkpoint that holds several sets: a file's name, a dotted key, a prefix of names.
        example: what a live model is called with (a dictionary of arguments, a tuple, a tensor), or a function that
            returns its loss. One forward and backward pass then tells whether queries and keys are normalised, where
            neither the module nor its configuration says it.
        progress: called after each layer with the number of layers done and that of all.

    Returns:
        An :class:`Inspection`; ``print`` it for a summary.

    Raises:
        TypeError: If ``model`` is neither a model nor a path, or ``example`` is given with a path.
        ValueError: If a checkpoint cannot be read, the model has no values (on the meta device) or cannot be run on
            ``example``, no attention is found, or a layer or head does not exist.

    Example:
        >>> report = inspect(nn.MultiheadAttention(16, 2))
        >>> [(row["head"], row["product"]) for row in report.rows]
        [(0, 'query_key'), (1, 'query_key'), (0, 'value_output'), (1, 'value_output')]
    """
    source = open_source(model, state)
    located, unhandled = locate_or_raise(source, SearchOptions(names, num_heads, head_dim, only))
    found = layers_of(source, located)
    if isinstance(source, ModuleSource):
        check_values(source.model, found)
    if example is not None:
        if not isinstance(source, ModuleSource):
            raise TypeError(f"example= runs a live model, and {source} is a checkpoint: load the model and give it.")
        found = settled(found, gradients_of(source.model, score_parameters(found), example))
    rows: list[Row] = []
    notes: dict[str, list[str]] = {}
    asked = chosen(layers, found)
    for done, layer in enumerate(asked, 1):
        wanted = _chosen_heads(heads, layer.num_heads, layer.name or "the model")
        try:
            layer_rows = list(_layer_rows(layer, *_deviations(source, layer, len(found))))
        except CheckpointError:
            raise
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:  # shapes that contradict each other
            raise ValueError(f"{layer.name or 'the model'} of {source} cannot be read: {error}") from None
        place = {
            "layer": layer.place.number,
            "tower": layer.place.tower,
            "label": layer.place.label,
            "name": layer.name,
        }
        rows += [place | row for row in layer_rows if row["head"] in wanted]
        for note in (*_notes(layer), *_stored_as(layer, source.stored_as)):
            notes.setdefault(note, []).append(layer.place.label)
        if progress is not None:
            progress(done, len(asked))
    noted = [f"{ranges(labels)}: {note}" for note, labels in notes.items()]
    smaller = outlook(source, located) if layers is None and heads is None else None
    return Inspection(str(source), rows, noted, listed(unhandled), smaller)


def check_values(model: nn.Module, layers: Sequence[AttentionLayer]) -> None:
    """Raise a ``ValueError`` if parameters of attention are on the meta device, where they have no values."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer in layers:
        for view in layer.views:
            if (parameter := parameters.get(view.parameter_name)) is not None and parameter.is_meta:
                raise ValueError(
                    f"{view.parameter_name} is on the meta device and has no values; load the weights first "
                    "(to_empty and load_state_dict, or from_pretrained)."
                )


def score_parameters(layers: Sequence[AttentionLayer]) -> list[str]:
    """Return the names of the weights and biases of queries and keys."""
    views = [view for layer in layers for view in (layer.query, layer.key)]
    return [name for view in views for name in (view.parameter_name, view.bias_name) if name]


def _chosen_heads(wanted: Collection[int] | None, count: int, place: str) -> list[int]:
    if wanted is None:
        return list(range(count))
    outside = sorted(i for i in wanted if not 0 <= i < count)
    if outside:
        raise ValueError(f"heads={outside[0]} is out of range: {place} has heads 0–{count - 1}.")
    return sorted(set(wanted))


def _deviations(source: Source, layer: AttentionLayer, depth: int) -> tuple[float, float]:
    """Return the standard deviations at initialisation: of W_Q, W_K and W_V, and of W_O."""
    value = source.setting(layer.name, ("initializer_range",))
    deviation = float(value) if isinstance(value, (int, float)) and 0 < value < 10 else 0.02
    scaled = source.setting(layer.name, ("model_type",)) in SCALED_OUTPUT
    return deviation, deviation / (2 * depth) ** 0.5 if scaled else deviation


def _notes(layer: AttentionLayer) -> Iterator[str]:
    apart = "scores are not computed from W_Kᵀ W_Q; W_Q and W_K are shown separately"
    if layer.qk_norm:
        yield f"queries and keys are normalised, so {apart}"
    elif layer.no_product:
        yield f"it {layer.no_product}, so {apart}"
    elif "query_rotary" in layer.factors:
        yield (
            "latent attention: products are formed where no norm stands between the factors: W_Kᵀ W_Q between the "
            "queries' vector and the latent, the same for the rotary part, and W_O W_V from the latent; the factors "
            "before the norms are shown separately"
        )
    elif layer.rotary is not None:
        part = "" if layer.rotary.dims == layer.head_dim else f" ({layer.rotary.dims} of {layer.head_dim} coordinates)"
        yield (
            f"RoPE rotates queries and keys{part}, so only plane norms can balance: gap and "
            "imbalance of W_Kᵀ W_Q are by plane, its spectrum is that at equal positions"
        )
    if layer.no_value_product:
        yield f"it {layer.no_value_product}, so a head's output is not W_O W_V; W_V and W_O are shown separately"
    if layer.num_key_value_heads < layer.num_heads:
        yield (
            f"{layer.num_heads // layer.num_key_value_heads} query heads share a key head: gap and imbalance are of "
            "the group, the spectrum of each head"
        )
    if layer.remark:
        yield f"assumed: {layer.remark}"
    if "order" in layer.unknown:
        yield (
            "the fused projection is read as all queries, all keys, all values by default; the model does not say. If "
            "heads or rows are interleaved, pass layout=interleaved or layout=alternating in AttentionNames (--names)"
        )
    if "grouping" in layer.unknown:
        yield (
            "the model does not say which key head each query head uses; contiguous groups are assumed. If query head "
            "i uses key head i mod g, pass grouping=strided in AttentionNames (--names)"
        )
    if "planes" in layer.unknown and layer.has_score_product:
        yield (
            "the model does not say which coordinates RoPE pairs; coordinates half a head apart are assumed. If pairs "
            "are neighbours, pass rotary=interleaved in AttentionNames (--names), else rotary=half"
        )
    if unknown := layer.unknown - {"order", "grouping", "planes"}:
        asked = {"qk_norm": "queries and keys are normalised", "rotary": "RoPE rotates them"}
        questions = " or whether ".join(asked[name] for name in sorted(unknown))
        settings = " and ".join(f"{name}=..." for name in sorted(unknown))
        example = ", or give a live model and example=" if "qk_norm" in unknown else ""
        yield (
            f"the model does not say whether {questions}; it is shown as if not. Pass {settings} in AttentionNames "
            f"(--names){example}"
        )


def _stored_as(layer: AttentionLayer, formats: Mapping[str, str]) -> Iterator[str]:
    formats_of = dict.fromkeys(formats[v.parameter_name] for v in layer.views if v.parameter_name in formats)
    if formats_of:
        yield f"weights are stored as {', '.join(formats_of)}, and shown dequantised"


def label(row: Row) -> str:
    """Return the unique label of a row's layer in its model."""
    return row.get("label") or str(row["layer"])


# ---- rows ------------------------------------------------------------------------------------------------


def _layer_rows(layer: AttentionLayer, deviation: float, output_deviation: float) -> Iterator[Row]:
    if not layer.has_score_product:
        for view in (layer.query, layer.key):
            yield from _matrix_rows(view, layer, deviation)
    else:
        yield from _product_rows(layer.query_key(), (deviation, deviation))
        if "query_rotary" in layer.factors:
            yield from _product_rows(layer.query_key_rotary(), (deviation, deviation))
    if layer.has_value_product:
        yield from _product_rows(layer.value_output(), (deviation, output_deviation))
    elif layer.output is not None:
        yield from _matrix_rows(layer.value, layer, deviation)
        yield from _matrix_rows(layer.output, layer, output_deviation)
    for role in _FACTORS:
        if role in layer.factors:
            yield from _factor_rows(layer.factors[role], deviation)  # pyright: ignore[reportArgumentType]


def _product_rows(product: Product, deviations: tuple[float, float]) -> Iterator[Row]:
    k, shape = product.single.shape[-1], (product.single.shape[-2], product.several.shape[-2])
    untrained = untrained_product(product.name, shape, k, product.several.shape[1], product.rotary, deviations)
    balance, norms = _balance(product), _squared_norms(product)
    for head, row in enumerate(spectrum_rows({"product": product.name}, k, product.spectrum(), untrained)):
        row |= {name: values[head] for name, values in balance.items()}
        yield row | {"squared_norms": {role: values[head] for role, values in norms.items()}}


def _matrix_rows(view: MatrixView, layer: AttentionLayer, deviation: float) -> Iterator[Row]:
    heads = view.heads()
    each = spectrum(heads)
    if view.num_heads < layer.num_heads:  # a row for each query head, with the key or value head it meets
        which = torch.tensor([layer.key_head(head) for head in range(layer.num_heads)])
        each = replace(each, singular_values=each.singular_values[which.to(each.singular_values.device)])
    untrained = _untrained_matrix(tuple(heads.shape[-2:]), deviation)
    return spectrum_rows({"matrix": view.role}, min(heads.shape[-2:]), each, untrained)


def _factor_rows(view: MatrixView, deviation: float) -> Iterator[Row]:
    """Return one row, as of head 0: a factor has no heads."""
    matrix = view.tensor()
    untrained = _untrained_matrix(tuple(matrix.shape), deviation)
    return spectrum_rows({"matrix": view.role}, min(matrix.shape), spectrum(matrix[None]), untrained)


def spectrum_rows(kind: Row, head_dim: int, heads: Spectrum, untrained: Row) -> Iterator[Row]:
    """Return a row per head with the figures of its spectrum, and without balance.

    Args:
        kind: ``{"product": name}`` or ``{"matrix": name}``.
        head_dim: largest rank that a head can have.
        heads: singular values, (heads, k).
        untrained: the same figures of the same shapes at initialisation.
    """
    figures = _spectrum_figures(heads)
    for head, sigma in enumerate(heads.singular_values):
        yield {"head": head, **kind, "head_dim": head_dim, **{name: values[head] for name, values in figures.items()},
               **dict.fromkeys(BALANCE), "singular_values": _plain(sigma), "untrained": untrained}  # fmt: skip


def _spectrum_figures(s: Spectrum) -> dict[str, list[float | None]]:
    """Return every named norm and rank, one value per head."""
    return {name: _plain(figure(s, name)) for name in (*NORMS, *RANKS)}


def _balance(product: Product) -> dict[str, list[float | None]]:
    return {name: _plain(figure(product, name)) for name in (*BALANCE, "mean_frobenius")}


def _squared_norms(product: Product) -> dict[str, list[list[float | None]]]:
    """Return one list per head by the names of the factors, the query or the value first."""
    single, several = ([_plain(head) for head in norms] for norms in product.squared_norms)
    return {"query": several, "key": single} if product.name != "value_output" else {"value": single, "output": several}


def figure(measured: Spectrum | Product, name: str) -> Tensor:
    """Return a named rank or norm of a spectrum, or the balance of a product: one value per head."""
    value = getattr(measured, name)
    return value if isinstance(value, Tensor) else value()


def _plain(values: Tensor) -> list[float | None]:
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
    """Return the mean figures of a few Gaussian draws of the shapes of a product; they hardly vary."""
    rotary = rotary and rotary._replace(interleaved=False)  # Gaussian rows are the same in any order
    generator = torch.Generator().manual_seed(0)
    draws = 2 if max(rows) > 1024 else 4
    single = torch.randn(draws, rows[0], k, generator=generator, dtype=torch.float64) * deviations[0]
    several = torch.randn(draws, group, rows[1], k, generator=generator, dtype=torch.float64) * deviations[1]
    product = Product(name, single, several, rotary)
    # of the norms one draw, whose scatter is that of a head
    one = {"squared_norms": {role: norms[0] for role, norms in _squared_norms(product).items()}}
    return _means(product.spectrum(), _balance(product)) | one


@lru_cache(maxsize=64)
def _untrained_matrix(shape: tuple[int, int], deviation: float) -> Row:
    draw = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * deviation
    return _means(spectrum(draw), {}) | dict.fromkeys(BALANCE)


def _means(s: Spectrum, balance: dict[str, list[float | None]]) -> Row:
    means = {name: finite_mean(values) for name, values in (_spectrum_figures(s) | balance).items()}
    return means | {"singular_values": _plain(s.singular_values.mean(0))}


# ---- as text ---------------------------------------------------------------------------------------------

_BLOCKS = BLOCKS[1:]
_FOOT = (
    "Means over heads; in brackets Gaussian matrices of the same shapes, untrained. Pseudo rank: the share of a head's",
    "dimensions that holds 95 % of the nuclear norm; on the right each head's, from ▁ 0 to █ 1, × if not finite.",
)
#: Columns of the summary, and the keys of a row.
_COLUMNS = {
    "pseudo rank": "pseudo_rank",
    "effective": "effective_rank",
    "stable": "stable_rank",
    "nuclear/bound": "nuclear_ratio",
    "imbalance": "imbalance",
}


def _table(rows: list[Row]) -> list[str]:
    columns = {title: key for title, key in _COLUMNS.items() if rows[0]["untrained"].get(key) is not None}
    cells = [["layer", "max rank", *columns, "heads"]]
    layers: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        layers.setdefault((label(row), row["name"]), []).append(row)
    several = len(layers) > len({called for called, _ in layers})  # runs of one shape beside each other
    for (called, name), heads in layers.items():
        untrained = heads[0]["untrained"]
        figures = [f"{number(finite_mean(row[key] for row in heads))} [{number(untrained[key])}]"
                   for key in columns.values()]  # fmt: skip
        shown = strip(row["pseudo_rank"] for row in heads)
        cells.append([name if several else called, str(heads[0]["head_dim"]), *figures, shown])
    return ["  " + line for line in aligned(cells)]


def comparison(reports: Sequence[Inspection]) -> str:
    """Return the mean over heads of each layer's pseudo rank in several checkpoints, in their order, as text."""
    lines = ["", "Pseudo rank, mean over heads, in the order given"]
    for kind, (symbol, meaning) in KINDS.items():
        series = [by_layer(report.of(kind)) for report in reports]
        layers = dict.fromkeys(layer for layers in series for layer in layers)
        if layers:
            lines += ["", f"{symbol}, {meaning}"]
        for layer in layers:
            means = [finite_mean(row["pseudo_rank"] for row in layers.get(layer, ())) for layers in series]
            lines.append(f"  layer {layer}: {' → '.join(map(number, means))}  {strip(means)}")
    return shown_lines(lines)


def moments(reports: Sequence[Inspection]) -> dict[str, list[tuple[str, list[float]]]]:
    """Return for :func:`over_time` the mean spectrum of each product in several checkpoints, in their order."""
    series: dict[str, list[tuple[str, list[float]]]] = {}
    for kind, (symbol, meaning) in KINDS.items():
        for report in reports:
            if rows := report.of(kind):
                spectra = mean_spectrum(row["singular_values"] for row in rows)
                series.setdefault(f"{symbol}, {meaning}", []).append((report.source, spectra))
    return series


def mean_spectrum(spectra: Iterable[Sequence[float | None]]) -> list[float]:
    """Return the mean of spectra, each relative to its largest; what a shorter one does not have is 0."""
    shares = []
    for sigma in spectra:
        values = [0.0 if value is None else value for value in sigma]
        largest = max(values, default=0.0)
        shares.append([value / largest if largest else 0.0 for value in values])
    return [sum(column) / len(shares) for column in zip_longest(*shares, fillvalue=0.0)]


def over_time(series: Mapping[str, Sequence[tuple[str, Sequence[float]]]]) -> str:
    """Return spectra over time as text: a picture for each series, in it a line per moment.

    Args:
        series: by its heading, moments in order, each with its name and its singular values, relative to the largest.

    Example:
        >>> print(over_time({"W_Kᵀ W_Q": [("step 0", [1, 0.9, 0.8, 0.7]), ("step 100", [1, 0.4, 0, 0])]}))
        Singular values relative to the largest, · below 1 %, mean over heads
        <BLANKLINE>
        W_Kᵀ W_Q
          step 0    █████
          step 100  █▄··
    """
    lines = [
        f"Singular values relative to the largest, {BLOCKS[0]} below {GONE:.0%}, mean over heads".replace("1%", "1 %")
    ]
    for heading, line in series.items():
        lines += ["", heading, *(f"  {text}" for text in aligned([[name, bars(values)] for name, values in line]))]
    return shown_lines(lines)


def csv_text(reports: Sequence[Inspection]) -> str:
    """Return one line per row of the reports, without the spectra; of several, the first column names the source."""
    figures = (*NORMS, *RANKS, *BALANCE)
    head = ["layer", "tower", "name", "head", "of", *figures, *(f"untrained_{name}" for name in figures)]
    lines: list[Sequence[object]] = [["source", *head] if len(reports) > 1 else head]
    for report in reports:
        for row in report.rows:
            values = [*(row[name] for name in figures), *(row["untrained"].get(name) for name in figures)]
            line = [
                row["layer"],
                row.get("tower", ""),
                row["name"],
                row["head"],
                row.get("product") or row.get("matrix"),
                *values,
            ]
            lines.append([report.source, *line] if len(reports) > 1 else line)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(cell, line) for line in lines)  # None is an empty field
    return text.getvalue()


def by_layer(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each layer by its label, in order."""
    layers: dict[str, list[Row]] = {}
    for row in rows:
        layers.setdefault(label(row), []).append(row)
    return layers


def strip(shares: Iterable[float | None]) -> str:
    """Return one block per share in [0, 1]; × for None."""
    return "".join("×" if s is None else _BLOCKS[min(int(s * len(_BLOCKS)), len(_BLOCKS) - 1)] for s in shares)
