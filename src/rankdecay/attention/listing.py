"""Listing of what would be read of a model or checkpoint: layers, names, shapes and windows, without any tensor."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from rankdecay.attention.layer import AttentionLayer, MatrixView
from rankdecay.attention.locate import Names, SearchOptions, chosen, find_layers, listed
from rankdecay.attention.source import Source, open_source
from rankdecay.attention.states import SeveralSets
from rankdecay.attention.tensors import Shape
from rankdecay.text import aligned, shown_lines


@dataclass(frozen=True)
class Listing:
    """Result of :func:`listing`.

    Attributes:
        source: the path, or the class of the model.
        layers: one dictionary per attention layer: its ``layer``, ``name``, heads, positions, and ``matrices``: of each
            the ``matrix``, its ``parameter`` with its ``shape``, and the ``window`` in it.
        candidates: keys of the sets of weights that ``state=`` can name, where there are several.
        unhandled: attention that cannot be read, with the reason.
        undecided: whether nothing says which of the candidates is meant; then there are no layers.
    """

    source: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)
    unhandled: list[str] = field(default_factory=list)
    undecided: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain numbers, strings and lists."""
        return {
            "source": self.source,
            "layers": self.layers,
            "candidates": self.candidates,
            "unhandled": self.unhandled,
        }

    def __str__(self) -> str:
        """Return what the command line prints."""
        if self.undecided:
            lines = [f"{self.source} holds several sets of weights; read one with"]
            return shown_lines([*lines, *(f"  --state {key}" for key in self.candidates)])
        count = len(self.layers)
        lines = [f"{self.source}: {count} attention layer{'s' if count != 1 else ''}"]
        if self.candidates:
            lines.append(f"  sets of weights in it (--state KEY): {', '.join(self.candidates)}")
        lines += [f"  not handled: {reason}" for reason in self.unhandled]
        for layer in self.layers:
            lines += ["", f"layer {layer['label']}  {layer['name'] or '(the model)'}: {_heads(layer)}"]
            lines += [f"  assumed: {layer['remark']}"] if layer["remark"] else []
            cells = [
                [m["matrix"], m["parameter"], "×".join(map(str, m["shape"])), m["window"]] for m in layer["matrices"]
            ]
            lines += [f"  {line}" for line in aligned(cells)]
        return shown_lines(lines)


def listing(
    model: nn.Module | str | Path,
    names: Names = None,
    num_heads: int | None = None,
    *,
    layers: Collection[int | str] | None = None,
    head_dim: int | None = None,
    only: bool = False,
    state: str | None = None,
) -> Listing:
    """Return what :func:`rankdecay.inspect` would read, from names and shapes alone.

    Args:
        model: a model, or the path of a checkpoint.
        names: how its attention names its projections, if it is not recognised.
        num_heads: number of query heads, where nothing says it.
        layers: only these, as for :func:`rankdecay.inspect`.
        head_dim: size of a head, where nothing says it.
        only: look for ``names`` alone.
        state: which weights, where there are several sets.

    Raises:
        TypeError: If ``model`` is neither a model nor a path.
        ValueError: If a checkpoint cannot be read, or no attention is found.
    """
    try:
        source = open_source(model, state)
    except SeveralSets as several:
        if state is not None:
            raise
        return Listing(str(model), candidates=list(several.candidates), undecided=True)
    found, unhandled = find_layers(source, SearchOptions(names, num_heads, head_dim, only))
    candidates: list[str] = list(getattr(source, "candidates", ()))
    shown = [_layer(layer, source) for layer in chosen(layers, found)]
    return Listing(str(source), shown, candidates, listed(unhandled))


def _layer(layer: AttentionLayer, source: Source) -> dict[str, Any]:
    return {
        "layer": layer.place.number,
        "tower": layer.place.tower,
        "label": layer.place.label,
        "name": layer.name,
        "num_heads": layer.num_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "rotary": None if layer.rotary is None else layer.rotary._asdict(),
        "qk_norm": layer.qk_norm,
        "unknown": sorted(layer.unknown),
        "remark": layer.remark,
        "matrices": [_matrix(view, source.shapes[view.parameter_name]) for view in layer.views],
    }


def _matrix(view: MatrixView, shape: Shape) -> dict[str, Any]:
    return {
        "matrix": view.role,
        "parameter": view.parameter_name,
        "shape": list(shape),
        "window": str(view.window),
        "bias": view.bias_vector is not None,
    }


def _heads(layer: dict[str, Any]) -> str:
    heads, keys, rotary = layer["num_heads"], layer["num_key_value_heads"], layer["rotary"]
    text = f"{heads} heads of {layer['head_dim']}"
    text += f", {keys} of keys and values" if keys != heads else ""
    if rotary is not None:
        planes = "neighbouring coordinates" if rotary.get("interleaved") else "coordinates half a head apart"
        planes += ", assumed" if "planes" in layer["unknown"] else ""
        text += f", rotary positions over {rotary['dims']} ({planes})"
    return text + (", queries and keys normalised" if layer["qk_norm"] else "")
