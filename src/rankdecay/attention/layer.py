"""One attention layer, and the window that locates each of its four matrices in a parameter.

Models store W_Q, W_K, W_V and W_O in many ways: one parameter each, all in one, transposed, interleaved head by
head. A :class:`Window` says where one matrix lies, in numbers alone, so that it can be kept in an optimizer's
parameter group, and opens it as a strided view. Seen through its window every matrix is (out, in): a query is
``x @ W_Q.T + b``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from rankdecay.attention.numbering import LayerNumber
from rankdecay.attention.products import Grouping, Product, ProductName, Rotary, grouped, key_head_of, with_bias
from rankdecay.linalg.backend import double

Role = Literal["query", "key", "value", "output", "query_rotary", "key_rotary", "query_factor", "latent", "gate",
               "query_position", "key_position", "query_sine", "output_factor", "output_mix"]  # fmt: skip

_WINDOW = re.compile(
    rf"(?:(?P<label>{'|'.join(get_args(Role))}): )?"
    r"(?P<stacked>stack )?(?P<lines>rows|columns)\[(?P<start>\d+):(?P<stop>\d+)\]/(?P<size>\d+)"
    r"(?P<groups>\*\d+)? by (?P<head_dim>\d+)(?P<transposed> transposed)?"
)


@dataclass(frozen=True)
class Window:
    """Location of one matrix in a parameter: an attention matrix in a 2-D one, or :data:`WHOLE` of any.

    The parameter, transposed if it is stored as (in, out), is cut into lines: its rows for W_Q, W_K and W_V, its
    columns for W_O, since those are the sides that the heads share out. The lines fall into ``groups`` equal groups of
    ``size``, and the matrix takes lines ``start`` to ``stop`` of every group, ``head_dim`` lines per head.

    ==================================  =================================
    GPT-2's key, 12 heads of 64         rows[768:1536]/2304 by 64 transposed
    GPT-NeoX's, one group per head      rows[64:128]/192*12 by 64
    Llama's output, 32 heads of 128     columns[0:4096]/4096 by 128
    TransformerLens's W_Q, (12, d, 64)  stack rows[0:64]/64*12 by 64 transposed
    EDM's key, of a convolution         rows[1:2]/3*512 by 64
    ==================================  =================================

    In the last, queries, keys and values take turns row by row, so that a head has lines of many groups. A stack has
    its groups in a first dimension of their own.

    Attributes:
        lines: ``"rows"`` or ``"columns"``.
        start: first line of each group, inclusive.
        stop: last line of each group, exclusive.
        size: lines in a group.
        groups: number of groups; the parameter has ``groups · size`` lines.
        head_dim: lines per head.
        transposed: whether the parameter is stored as (in, out), as Conv1D does.
        label: which matrix it is, for a reader; empty where the parameter holds one alone.
        stacked: whether the parameter is a stack (groups, …), a matrix per group.
    """

    lines: Literal["rows", "columns"]
    start: int
    stop: int
    size: int
    head_dim: int
    groups: int = 1
    transposed: bool = False
    label: str = ""
    stacked: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the matrix is all of the parameter."""
        return self.stop - self.start == self.size

    @property
    def has_heads(self) -> bool:
        """Whether the window says how the matrix is cut into heads: every window but :data:`WHOLE` does."""
        return self.head_dim > 0

    @property
    def num_heads(self) -> int:
        """Number of heads the matrix holds; 1 for :data:`WHOLE`."""
        return self.groups * (self.stop - self.start) // self.head_dim if self.has_heads else 1

    def line_dim(self, ndim: int) -> int:
        """Return the dimension of a parameter of ``ndim`` dimensions along which its lines lie."""
        return ndim - 2 if (self.lines == "rows") != self.transposed else ndim - 1

    def extent(self, lines: int) -> int:
        """Return the number of the matrix's lines in a parameter of ``lines`` lines."""
        return self.groups * (self.stop - self.start) if self.has_heads else lines

    def __str__(self) -> str:
        if not self.has_heads:
            return ""
        groups = f"*{self.groups}" if self.groups > 1 else ""
        turned = " transposed" if self.transposed else ""
        label = f"{self.label}: " if self.label else ""
        label += "stack " if self.stacked else ""
        return f"{label}{self.lines}[{self.start}:{self.stop}]/{self.size}{groups} by {self.head_dim}{turned}"

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Window:
        """Return the window that ``str(window)`` describes; the empty text is :data:`WHOLE`.

        Raises:
            ValueError: If the text does not describe a window.
        """
        if not text:
            return WHOLE
        found = _WINDOW.fullmatch(text)
        if not found:
            raise ValueError(f"{text!r} is not a window such as 'rows[0:768]/2304 by 64 transposed'.")
        return Window(
            lines="rows" if found["lines"] == "rows" else "columns",
            start=int(found["start"]),
            stop=int(found["stop"]),
            size=int(found["size"]),
            head_dim=int(found["head_dim"]),
            groups=int((found["groups"] or "*1")[1:]),
            transposed=found["transposed"] is not None,
            label=found["label"] or "",
            stacked=found["stacked"] is not None,
        )

    def matrix(self, parameter: Tensor) -> Tensor:
        """Return the whole matrix, (out, in); a view when it is contiguous in the parameter."""
        return self._upright(self._blocks(parameter).flatten(0, 2)) if self.has_heads else parameter

    def heads(self, parameter: Tensor) -> Tensor:
        """Return one matrix per head: (heads, head_dim, in), or (heads, out, head_dim) for W_O."""
        return self._upright(self._blocks(parameter).flatten(0, 1)) if self.has_heads else parameter[None]

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Copy ``value``, shaped as :meth:`matrix` or :meth:`heads`, to its place in the parameter."""
        place = self._blocks(parameter) if self.has_heads else parameter
        place.copy_(self._upright(value).reshape(place.shape))

    def of_vector(self) -> Window:
        """Return where the same lines are in a parameter of one column, as a bias is: bias[:, None]."""
        return replace(self, transposed=False, stacked=False)

    def vector(self, bias: Tensor) -> Tensor:
        """Return the part of a bias (out,) that belongs to the matrix."""
        if self.lines == "columns" or not self.has_heads:
            return bias
        if bias.shape != (self.groups * self.size,):
            raise ValueError(
                f"the bias has shape {tuple(bias.shape)}, expected ({self.groups * self.size},) for the window {self}."
            )
        return bias.unflatten(0, (self.groups, self.size))[:, self.start : self.stop].reshape(-1)

    def _upright(self, lines: Tensor) -> Tensor:
        return lines if self.lines == "rows" else lines.mT

    def _blocks(self, parameter: Tensor) -> Tensor:
        """The strided view (groups, heads per group, head_dim, length of a line); never a copy."""
        if parameter.ndim > 2 and not self.stacked:  # (out, in, 1, 1) of a convolution; (in, heads, head_dim)
            parameter = parameter.view(parameter.shape[0], -1)
        if parameter.ndim != (3 if self.stacked else 2):
            kind = f"a stack of {self.groups} matrices" if self.stacked else "a matrix"
            raise ValueError(
                f"the parameter has shape {tuple(parameter.shape)}, expected {kind} with {self.groups * self.size} "
                f"{self.lines} for the window {self}." + (FLATTENED if parameter.ndim == 1 else "")
            )
        lines = parameter if (self.lines == "rows") != self.transposed else parameter.mT
        if lines.shape[:-1] != ((self.groups, self.size) if self.stacked else (self.groups * self.size,)):
            raise ValueError(
                f"the parameter has shape {tuple(parameter.shape)}, which does not have the "
                f"{self.groups * self.size} {self.lines} of the window {self}: it is not the parameter the window was "
                "made for. Build the groups with rankdecay.param_groups on the model as it is now."
            )
        groups = lines if self.stacked else lines.unflatten(0, (self.groups, self.size))
        cut = groups[:, self.start : self.stop]
        if cut.shape[1] < self.head_dim:  # one line of each group
            return cut.unflatten(0, (-1, self.head_dim)).transpose(1, 2)
        return cut.unflatten(1, (-1, self.head_dim))


@lru_cache(maxsize=4096)
def smaller_side(window: Window, shape: tuple[int, ...], by_head: bool) -> int:
    """Return the smaller side of a window's matrix, or of each of its heads, in a parameter of a shape."""
    parameter = torch.empty(shape, device="meta")
    return min((window.heads if by_head else window.matrix)(parameter).shape[-2:], default=0)


#: All of a parameter of any shape: a matrix, a stack of one per expert, a vector. A state dict holds nothing of it.
WHOLE = Window("rows", start=0, stop=0, size=0, head_dim=0)

#: What to say when a parameter that should be a matrix is a vector.
FLATTENED = (
    " It has been flattened, as DeepSpeed ZeRO and FSDP1 do, and the shape of its matrix is gone; shard with FSDP2 "
    "(torch.distributed.fsdp.fully_shard), which keeps parameters as matrices."
)


@dataclass(frozen=True)
class MatrixView:
    """W_Q, W_K, W_V or W_O of one layer, wherever and however it is stored.

    Attributes:
        role: ``"query"``, ``"key"``, ``"value"`` or ``"output"``.
        parameter_name: name of the parameter that holds it, as in ``model.named_parameters()``.
        window: where in the parameter.
        weight: returns the parameter's present value; with the adapters' contribution for a PEFT model.
        bias_vector: returns the matrix's part of its bias, if there is one, with what is added to queries alone.
        bias_name: name of the parameter that holds the bias.
        bias_window: where in that parameter.
    """

    role: Role
    parameter_name: str
    window: Window
    weight: Callable[[], Tensor]
    bias_vector: Callable[[], Tensor] | None = None
    bias_name: str | None = None
    bias_window: Window | None = None

    def tensor(self) -> Tensor:
        """Return the matrix as it is now, detached, (out, in): a query is ``x @ W_Q.T + b``."""
        return self.window.matrix(self._numbers())

    def heads(self) -> Tensor:
        """Return one matrix per head, detached: (heads, head_dim, in), or (heads, out, head_dim) for the output."""
        return self.window.heads(self._numbers())

    def _numbers(self) -> Tensor:
        """Return the parameter's value, detached.

        Raises:
            ValueError: If it is not a dense tensor of real numbers.
        """
        value = self.weight().detach()
        what = "nested" if value.is_nested else "complex" if value.is_complex() else ""
        if what or value.layout is not torch.strided:
            raise ValueError(
                f"{self.parameter_name} is a {what or 'sparse'} tensor ({value.dtype}); rankdecay needs dense real "
                "matrices: convert it first."
            )
        return value

    def bias(self) -> Tensor | None:
        """Return the matrix's bias (out,), detached, or None if it has none."""
        return None if self.bias_vector is None else self.bias_vector().detach()

    @property
    def num_heads(self) -> int:
        """Heads in this matrix; fewer for keys and values than for queries under grouped-query attention."""
        return self.window.num_heads

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, (out, in)."""
        rows, columns = self.tensor().shape
        return rows, columns


@dataclass(frozen=True)
class AttentionLayer:
    """The matrices of one attention module.

    In **multi-head latent attention** (DeepSeek) queries, keys and values come from a narrow vector each, behind a
    norm: ``query`` and ``key`` are the parts of the second factors that positions do not turn, ``key`` and ``value``
    act on the latent that both share, and ``factors`` are the rest, by role.

    Attributes:
        name: path of the module in the model; with ``:`` and a projection where a module has two kinds of attention.
        query: W_Q, (num_heads · head_dim, d).
        key: W_K, (num_key_value_heads · head_dim, d); that of another layer where layers share keys.
        value: W_V, (num_key_value_heads · its head size, d); W_K itself where values are the keys.
        output: W_O, (d, num_heads · head size of the values); None if the module has no output projection.
        head_dim: size of a query's and a key's head.
        rotary: how positions turn queries and keys, if they do.
        qk_norm: whether queries and keys are normalised before their product.
        grouping: which key head query head i meets: ``"consecutive"``, i // (num_heads / num_key_value_heads), or
            ``"strided"``, i mod num_key_value_heads.
        no_product: why scores are no product W_Kᵀ W_Q though queries and keys are not normalised; else "".
        no_value_product: what stands between values and output projection, so that no head writes W_O W_V; else "".
        factors: of latent attention, by role: ``query_factor`` (the queries' first), ``query_rotary`` and
            ``key_rotary`` (the parts that positions turn; one key head), ``latent``. Of others the ``gate`` inside a
            query projection, and projections of positions, ``query_position``, ``key_position``, ``query_sine``.
        unknown: which of ``"rotary"``, ``"planes"`` (of rotary positions), ``"qk_norm"``, ``"order"`` (of a fused
            projection) and ``"grouping"`` nothing states, neither names nor settings; they are then as is usual: none,
            half a head apart, no, all queries before all keys and values, and consecutive.
        place: the model's own number of the layer, and the tower it stands in.
        remark: which numbers of heads the settings state that the weights contradict, and what else is assumed.
    """

    name: str
    query: MatrixView
    key: MatrixView
    value: MatrixView
    output: MatrixView | None
    head_dim: int
    rotary: Rotary | None = None
    qk_norm: bool = False
    grouping: Grouping = "consecutive"
    no_product: str = ""
    no_value_product: str = ""
    factors: Mapping[Role, MatrixView] = field(default_factory=dict)
    unknown: frozenset[str] = frozenset()
    place: LayerNumber = field(default_factory=LayerNumber)
    remark: str = ""

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self.query.num_heads

    @property
    def num_key_value_heads(self) -> int:
        """Number of key and value heads."""
        return self.key.num_heads

    @property
    def views(self) -> tuple[MatrixView, ...]:
        """Query, key, value, if it exists output, and the factors."""
        matrices = (self.query, self.key, self.value, self.output)
        return tuple(view for view in (*matrices, *self.factors.values()) if view is not None)

    def key_head(self, head: int) -> int:
        """Return the key and value head that a query head meets."""
        return key_head_of(head, self.num_heads, self.num_key_value_heads, self.grouping)

    def query_key(self) -> Product:
        """Return W_Kᵀ W_Q of every head, by its factors, biases included; of latent attention without the rotary part.

        Raises:
            ValueError: If queries and keys are normalised: their scores are then no bilinear form.
        """
        self._check_no_norm()
        rotary = None if "query_rotary" in self.factors else self.rotary
        return self._scores("query_key", self.query, self.key, rotary)

    def query_key_rotary(self) -> Product:
        """Return W_Kᵀ W_Q of the part that positions turn, of latent attention.

        Raises:
            ValueError: If the layer has no such part, or normalises queries and keys.
        """
        if "query_rotary" not in self.factors:
            raise ValueError(f"{self.name} has no separate rotary part; its scores are those of query_key().")
        self._check_no_norm()
        return self._scores("query_key_rotary", self.factors["query_rotary"], self.factors["key_rotary"], self.rotary)

    def value_output(self) -> Product:
        """Return W_O W_V of every head, by its factors, with the values' bias.

        Raises:
            ValueError: If the layer has no output projection, or a norm or a gate stands before it.
        """
        if self.output is None:
            raise ValueError(f"{self.name} has no output projection, so there is no product W_O W_V.")
        if self.no_value_product:
            raise ValueError(
                f"{self.name} {self.no_value_product}, so a head's output is not W_O W_V; look at the spectra of "
                "value.tensor() and output.tensor() instead."
            )
        values = with_bias(self.value.heads(), self.value.bias())
        outputs = grouped(double(self.output.heads()), len(values), self.grouping)
        return Product("value_output", values.mT, outputs, None, self.grouping)

    def _scores(self, name: ProductName, query: MatrixView, key: MatrixView, rotary: Rotary | None) -> Product:
        keys = with_bias(key.heads(), key.bias())
        queries = with_bias(query.heads(), query.bias())
        return Product(name, keys.mT, grouped(queries.mT, len(keys), self.grouping), rotary, self.grouping)

    @property
    def has_score_product(self) -> bool:
        """Whether scores are those of a product W_Kᵀ W_Q."""
        return not (self.qk_norm or self.no_product)

    @property
    def has_value_product(self) -> bool:
        """Whether what a head writes is a product W_O W_V."""
        return self.output is not None and not self.no_value_product

    def _check_no_norm(self) -> None:
        if not self.has_score_product:
            raise ValueError(
                f"{self.name} {self.no_product or 'normalises queries and keys'}, so its scores are not computed "
                "from W_Kᵀ W_Q; look at the spectra of query.tensor() and key.tensor() instead."
            )
