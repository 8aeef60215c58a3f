"""Locations of the matrices of one attention module, before their numbers are read."""

from __future__ import annotations

from typing import NamedTuple

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.products import Grouping, Rotary


class Place(NamedTuple):
    """Location of one matrix and of its bias."""

    parameter: str
    window: Window
    bias: str | None = None
    bias_window: Window | None = None
    added: str | None = None  # (heads, head_dim), or flat: what is added to queries before they meet keys

    def parts(self) -> list[tuple[str, Window]]:
        """Return where the lines are of the matrix and, in a parameter of one column, of its bias."""
        matrix = [(self.parameter, self.window)]
        if self.bias is None or self.bias_window is None:
            return matrix
        return [*matrix, (self.bias, self.bias_window.of_vector())]


class Found(NamedTuple):
    """Attention module, with the locations of its matrices by role.

    Attributes:
        name: path of the module, and after ``:`` a projection if it is not the module's first attention.
        places: of each matrix, by role.
        head_dim: size of a query's head.
        rotary: how positions turn the heads.
        qk_norm: whether queries and keys are normalised.
        grouping: which key head a query head meets.
        unknown: which of these nothing says.
        no_product: why scores are no product W_Kᵀ W_Q, though queries and keys are not normalised.
        no_value_product: what stands between values and output projection.
        no_output: why none of its other matrices is the output projection, if it has some.
        frequencies: what the settings say of the rotary frequencies, as text: layers of one text share them.
        planes_assumed: whether nothing says which coordinates positions turn together; then those half a head apart.
        remark: which numbers of heads the settings state that the weights contradict, and what else is assumed.
    """

    name: str
    places: dict[Role, Place]
    head_dim: int
    rotary: Rotary | None = None
    qk_norm: bool = False
    grouping: Grouping = "consecutive"
    unknown: frozenset[str] = frozenset()
    no_product: str = ""
    no_value_product: str = ""
    no_output: str = ""
    frequencies: str = ""
    planes_assumed: bool = False
    remark: str = ""

    @property
    def module(self) -> str:
        """Path of the module."""
        return self.name.partition(":")[0]
