"""Location of the rotary planes of W_Q, W_K and their biases: the lines of a parameter that RoPE rotates together.

Positions turn two coordinates of a head by one angle: coordinates j and j + d/2 in the rotate-half convention, 2j and
2j + 1 in the interleaved one, of the first ``dims`` coordinates. The two rows of W_Q and the two of W_K, with their
entries of the biases, are *plane j* of the head, and an ordinary checkpoint can leave out what is zero in all of them.

A checkpoint has one set of frequencies for all layers that share a configuration, so a plane can be meant of a head, of
a key head with the query heads it serves, of a layer, or of all those layers (:meth:`PlaneRows.scopes`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.module.found import Found, Place
from rankdecay.attention.products import Grouping, Rotary, key_head_of

Part = Literal["query", "key", "query bias", "key bias"]


@dataclass(frozen=True)
class PlaneRows:
    """Rotary planes of one matrix, or of its bias: which lines of the parameter are plane j of which head.

    Attributes:
        layer: name of the attention.
        part: which matrix or bias it is.
        window: where its heads are in the parameter; of a bias the lines are its entries.
        rotary: how positions turn a head.
        heads: query heads of the layer.
        key_heads: key heads of the layer.
        grouping: which key head a query head meets.
        configuration: the rotary configuration of the layer; layers of one text can lose a plane only together.
        parameters: names of the parameters of all parts of the layer that have rows of its planes.
        layers: number of layers that share the configuration.
    """

    layer: str
    part: Part
    window: Window
    rotary: Rotary
    heads: int
    key_heads: int
    grouping: Grouping
    configuration: str
    parameters: tuple[tuple[Part, str], ...]
    layers: int

    @property
    def planes(self) -> int:
        """Number of planes of a head."""
        return self.rotary.dims // 2

    def __str__(self) -> str:
        return json.dumps(
            {
                "layer": self.layer,
                "part": self.part,
                "window": str(self.window),
                "dims": self.rotary.dims,
                "interleaved": self.rotary.interleaved,
                "heads": self.heads,
                "key_heads": self.key_heads,
                "grouping": self.grouping,
                "configuration": self.configuration,
                "parameters": dict(self.parameters),
                "layers": self.layers,
            }
        )

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> PlaneRows:
        """Return the rows that ``str(rows)`` describes.

        Raises:
            ValueError: If the text does not describe rows.
        """
        try:
            fields = json.loads(text)
            return PlaneRows(
                fields["layer"],
                fields["part"],
                Window.parse(fields["window"]),
                Rotary(fields["dims"], fields["interleaved"]),
                fields["heads"],
                fields["key_heads"],
                fields["grouping"],
                fields["configuration"],
                tuple(fields["parameters"].items()),
                fields["layers"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{text!r} does not describe the rows of rotary planes: {error}") from None

    @cached_property
    def lines(self) -> Tensor:
        """The lines of the parameter that each plane of each head has, (heads of the matrix, planes, 2)."""
        count = self.window.groups * self.window.size
        numbers = torch.arange(count)[:, None]  # as a parameter of one column
        return self.window.of_vector().heads(numbers)[..., 0][:, self.rotary.planes()]

    def of(self, parameter: Tensor) -> Tensor:
        """Return the rows of all heads, (heads · head_dim, in); of a bias one of its entries is a row."""
        return self.window.vector(parameter)[:, None] if parameter.ndim == 1 else self.window.matrix(parameter)

    def scopes(self, scope: str) -> list[str]:
        """Return what the planes of each head of the matrix belong to; matrices that belong together say the same.

        Args:
            scope: ``"head"``: a query head, with its key head if that serves it alone (otherwise each is by itself);
                ``"group"``: a key head with the query heads it serves; ``"layer"``; or ``"model"``: all layers of the
                configuration.
        """
        numbers = range(self.window.num_heads)
        if scope == "model":
            return [self.configuration for _ in numbers]
        if scope == "layer":
            return [self.layer for _ in numbers]
        if scope == "head" and self.heads != self.key_heads:
            return [f"{self.layer} {self.part.split()[0]} {head}" for head in numbers]
        return [f"{self.layer} {self._key_head(head)}" for head in numbers]

    def _key_head(self, head: int) -> int:
        if self.part.startswith("key"):
            return head
        return key_head_of(head, self.heads, self.key_heads, self.grouping)


def plane_rows(found: list[Found], notes: Mapping[str, str]) -> tuple[dict[str, list[PlaneRows]], dict[str, str]]:
    """Return the rows of the rotary planes of a model, and the attention that has none or none that can be decayed.

    Args:
        found: the attention.
        notes: how parameters are computed from what is stored, by name, where they are.

    Returns:
        Rows by the name of the parameter; reasons by the name of the attention.
    """
    reasons = {layer.name: reason for layer in found if (reason := _reason(layer, notes))}
    turned = [layer for layer in found if layer.name not in reasons]
    configurations = [_configuration(layer) for layer in turned]
    rows: dict[str, list[PlaneRows]] = {}
    for layer, configuration in zip(turned, configurations, strict=True):
        assert layer.rotary is not None
        parts = _parts(layer)
        heads, key_heads = (layer.places[role].window.num_heads for role in ("query", "key"))
        names: tuple[tuple[Part, str], ...] = tuple((part, name) for part, (name, _) in parts.items())
        for part, (name, window) in parts.items():
            rows.setdefault(name, []).append(
                PlaneRows(
                    layer.name,
                    part,
                    window,
                    layer.rotary,
                    heads,
                    key_heads,
                    layer.grouping,
                    configuration,
                    names,
                    configurations.count(configuration),
                )
            )
    return rows, reasons


def _parts(layer: Found) -> dict[Part, tuple[str, Window]]:
    names: dict[Literal["query", "key"], tuple[Part, Part]]
    names = {"query": ("query", "query bias"), "key": ("key", "key bias")}
    parts: dict[Part, tuple[str, Window]] = {}
    for role, part_names in names.items():
        parts |= zip(part_names, layer.places[role].parts(), strict=False)  # perhaps without a bias
    return parts


def _configuration(layer: Found) -> str:
    rotary = layer.rotary
    assert rotary is not None
    convention = "interleaved" if rotary.interleaved else "half"
    return f"{rotary.dims} of {layer.head_dim} {convention}" + (f", {layer.frequencies}" if layer.frequencies else "")


def _reason(layer: Found, notes: Mapping[str, str]) -> str:
    """Return why the rotary planes of an attention cannot be decayed; "" if they can."""
    places: dict[Role, Place] = layer.places
    if {"latent", "query_rotary", "query_factor"} & places.keys():
        return "is latent attention, where RoPE does not rotate rows of plain W_Q and W_K"
    if layer.rotary is None:
        if "rotary" in layer.unknown:
            return (
                "does not say whether RoPE rotates its queries and keys; if so, pass names=rankdecay."
                "AttentionNames(..., rotary='half' or 'interleaved')"
            )
        return "has no rotary positions"
    if layer.planes_assumed:
        return (
            "has rotary positions, but does not say which rows form a plane; pass names=rankdecay."
            "AttentionNames(..., rotary='half' or 'interleaved')"
        )
    if "order" in layer.unknown:
        return "does not say in which order its fused projection holds queries and keys; pass names="
    if layer.head_dim % 2:
        return f"has heads of odd size {layer.head_dim}, which do not split into planes"
    if layer.no_product:
        return f"{layer.no_product}, so that no rows are a plane of its scores"
    query, key = places["query"], places["key"]
    if any(place.parameter == key.parameter and place.window == key.window for role, place in places.items()
           if role not in ("query", "key")):  # fmt: skip
        return "takes its keys as values too, so that their rows are not those of planes alone"
    if query.added is not None:
        return f"adds {query.added} to its queries beside their bias"
    for place in (query, key):
        if note := notes.get(place.parameter):
            return f"computes its weights: {place.parameter} is {note}"
    return ""
