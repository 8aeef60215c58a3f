"""Read where W_Q, W_K, W_V and W_O of one attention module lie, from the names and shapes of its parameters.

* **Head size** is the query's height over the number of heads; how many key and value heads there are follows from the
  height of W_K. No model class is asked for.
* **Fused, contiguous**: lines [q, k, v], the heads inside each.
* **Fused, interleaved**: one group per key head, [its queries, k, v]. With as many key heads as query heads that is
  per head [q, k, v] (GPT-NeoX, BLOOM); with one it is [all queries, k, v] (multi-query Falcon).
* **Transposed** (Conv1D): a fused matrix whose bias is as long as its second side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.names import HEAD_DIM, INTERLEAVED, KEY_HEADS, NUM_HEADS, QK_NORM, ROTARY, AttentionNames
from rankdecay.attention.products import Rotary
from rankdecay.attention.source import Shape, Source


class Place(NamedTuple):
    """Location of one matrix and of its bias."""

    parameter: str
    window: Window
    bias: str | None = None
    bias_window: Window | None = None


class Found(NamedTuple):
    """Attention module, with the locations of its matrices by role."""

    name: str
    places: dict[Role, Place]
    head_dim: int
    rotary: Rotary | None = None
    qk_norm: bool = False


class NotHandled(Exception):
    """Raised for a module that looks like attention and cannot be read, with the reason."""


class ModuleReader:
    """Reader of one module as attention."""

    def __init__(self, module: str, plain: Mapping[str, str], source: Source) -> None:
        """Prepare to read a module.

        Args:
            module: its path.
            plain: every parameter's name in the source, by its name without adapters.
            source: the parameters and settings.
        """
        self.module, self.plain, self.shapes, self.setting = module, plain, source.shapes, source.setting

    def parameter(self, child: str) -> str | None:
        """Return the plain name of the weight called ``child``: of a submodule, or the parameter itself."""
        path = self.module
        while child.startswith("../"):
            if not path:
                return None
            path, child = path.rpartition(".")[0], child[3:]
        name = f"{path}.{child}" if path else child
        return next((full for full in (f"{name}.weight", name) if full in self.plain), None)

    def bias(self, weight: str) -> str | None:
        name = weight.removesuffix("weight") + "bias"
        return name if name in self.plain else None

    def matches(self, row: AttentionNames) -> bool:
        """Whether the module has every projection of the row, and the configuration it asks for."""
        if not all(self.parameter(child) for child in row.projections):
            return False
        if row.when is None:
            return True
        attribute, wanted = row.when
        value = self.setting(self.module, (attribute,))
        return value is not None if wanted is None else value == wanted

    def shape(self, name: str) -> Shape:
        return self.shapes[self.plain[name]]

    def number(self, attributes: tuple[str, ...]) -> int | None:
        value = self.setting(self.module, attributes)
        return value if isinstance(value, int) and value > 0 else None

    def read(self, row: AttentionNames) -> Found:
        """Locate the matrices of the module.

        Raises:
            NotHandled: If names, shapes and settings do not agree.
        """
        parameters = {child: name for child in row.projections if (name := self.parameter(child))}
        output = next((name for child in row.outputs if (name := self.parameter(child))), None)
        self._check_shapes([*parameters.values(), *([output] if output else [])])
        transposed = self._transposed(list(parameters.values()))
        height = {child: self.shape(name)[1 if transposed else 0] for child, name in parameters.items()}
        across = self.shape(output)[0 if transposed else 1] if output else None  # columns of W_O

        heads, head_dim = self._heads(row, height, across)
        places: dict[Role, Place] = {}
        for role, (child, window) in self._windows(row, height, heads, head_dim).items():
            places[role] = self._place(parameters[child], replace(window, transposed=transposed))
        if row.query == "q_proj_weight":
            self._share_bias(places)
        elif row.fused and not self.bias(parameters[row.fused]):
            self._separate_biases(places)
        key_heads, value_dim = places["key"].window.num_heads, places["value"].window.head_dim
        if heads % key_heads:
            raise NotHandled(f"{heads} query heads are not a multiple of {key_heads} key heads")
        if output and across:
            if across != heads * value_dim:
                raise NotHandled(
                    f"the output projection takes {across} columns, where {heads} heads of {value_dim} give "
                    f"{heads * value_dim}"
                )
            places["output"] = self._place(output, Window("columns", 0, across, across, value_dim, 1, transposed))
        return Found(self.module, places, head_dim, self._rotary(head_dim), self._qk_norm())

    def _qk_norm(self) -> bool:
        """Whether the module normalises queries or keys."""
        inside = self.module + "." if self.module else ""
        children = {name[len(inside) :].split(".")[0] for name in self.plain if name.startswith(inside)}
        flags = (self.setting(self.module, (flag,)) for flag in ("use_qk_norm", "qk_layernorm", "qk_norm"))
        return any(QK_NORM.fullmatch(child) for child in children) or any(flag is True for flag in flags)

    def _rotary(self, head_dim: int) -> Rotary | None:
        if self.setting(self.module, ("use_rope",)) is False:
            return None
        if self.setting(self.module, ROTARY) is None or self.setting(self.module, ("alibi",)) is True:
            return None
        dims = self.number(("rotary_dim", "rotary_ndims"))
        if dims is None:
            parameters = self.setting(self.module, ("rope_parameters",))
            share = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
            share = share or self.setting(self.module, ("partial_rotary_factor", "rotary_pct")) or 1.0
            dims = int(head_dim * share) if isinstance(share, (int, float)) else head_dim
        interleaved = self.setting(self.module, ("rope_interleaved",))
        if not isinstance(interleaved, bool):
            interleaved = self.setting(self.module, ("model_type",)) in INTERLEAVED
        dims = min(dims, head_dim) // 2 * 2
        return Rotary(dims, interleaved) if dims else None

    def _windows(
        self, row: AttentionNames, height: dict[str, int], heads: int, head_dim: int
    ) -> dict[Role, tuple[str, Window]]:
        """Return the projection and the window, if it is not transposed, of query, key and value."""

        def whole(child: str, size: int) -> tuple[str, Window]:
            return child, Window("rows", 0, height[child], height[child], size)

        if row.query and row.key and row.value:
            key_heads = _divide(height[row.key], head_dim, f"the height of {row.key}", "the head size")
            value_dim = _divide(height[row.value], key_heads, f"the height of {row.value}", "the key heads")
            return {
                "query": whole(row.query, head_dim),
                "key": whole(row.key, head_dim),
                "value": whole(row.value, value_dim),
            }
        assert row.fused
        windows: dict[Role, tuple[str, Window]] = {"query": whole(row.query, head_dim)} if row.query else {}
        for role, window in self._cut(row, height[row.fused], heads, head_dim).items():
            windows[role] = (row.fused, window)
        return windows

    def _place(self, name: str, window: Window) -> Place:
        bias = self.bias(name)
        return Place(self.plain[name], window, self.plain[bias] if bias else None, window if bias else None)

    def _share_bias(self, places: dict[Role, Place]) -> None:
        """Locate the biases of nn.MultiheadAttention: one vector [q, k, v], even if the weights are separate."""
        name = f"{self.module}.in_proj_bias" if self.module else "in_proj_bias"
        if name not in self.plain:
            return
        lines = self.shape(name)[0] // 3
        for i, role in enumerate(places):
            window = Window("rows", i * lines, (i + 1) * lines, 3 * lines, lines)
            places[role] = places[role]._replace(bias=self.plain[name], bias_window=window)

    def _separate_biases(self, places: dict[Role, Place]) -> None:
        """Locate the q_bias and v_bias that timm's BEiT and EVA add to a fused weight; the key has no bias."""
        for role, place in list(places.items()):
            name = self.plain.get(f"{self.module}.{role[0]}_bias")
            if name and len(self.shapes[name]) == 1:
                lines = self.shapes[name][0]
                places[role] = place._replace(bias=name, bias_window=Window("rows", 0, lines, lines, lines))

    def _check_shapes(self, names: list[str]) -> None:
        for name in names:
            shape = self.shape(name)
            if len(shape) == 1:
                raise NotHandled(f"{name} has shape {shape}: flattened by DeepSpeed ZeRO or FSDP1; shard with FSDP2")
            if len(shape) != 2:
                raise NotHandled(f"{name} has shape {shape}, not that of a matrix")

    def _transposed(self, names: list[str]) -> bool:
        """Whether the weights are stored (in, out): the bias is then as long as the second side only."""
        for name in names:
            bias = self.bias(name)
            if bias is None:
                continue
            (length,), (rows, columns) = self.shape(bias), self.shape(name)
            if rows != columns:
                return length == columns
        return False

    def _heads(self, row: AttentionNames, height: dict[str, int], across: int | None) -> tuple[int, int]:
        """Return the number of query heads and their size."""
        heads = row.num_heads or self.number(NUM_HEADS)
        head_dim = row.head_dim or self.number(HEAD_DIM)
        if row.query:
            lines = height[row.query]
            if heads and lines % heads == 0:
                return heads, lines // heads
            if head_dim and lines % head_dim == 0:
                return lines // head_dim, head_dim
            raise _no_heads(row.query, lines, heads, head_dim)
        assert row.fused
        lines = height[row.fused]
        if self.number(("key_dim", "val_dim", "value_dim")):
            raise NotHandled(f"{row.fused} holds queries and values of different widths")
        if heads is None and head_dim and across:
            heads = across // head_dim
        if heads is None:
            raise _no_heads(row.fused, lines, heads, head_dim)
        key_heads = self.number(KEY_HEADS)
        candidates = [
            head_dim,
            across // heads if across and across % heads == 0 else None,
            lines // (heads + 2 * key_heads) if key_heads and lines % (heads + 2 * key_heads) == 0 else None,
            lines // (3 * heads) if lines % (3 * heads) == 0 else None,
        ]
        for size in candidates:
            if size and lines % size == 0 and (lines // size - heads) % 2 == 0 and lines // size > heads:
                return heads, size
        raise _no_heads(row.fused, lines, heads, head_dim)

    def _cut(self, row: AttentionNames, lines: int, heads: int, head_dim: int) -> dict[Role, Window]:
        """Return the windows of a fused parameter, if it is not transposed."""
        height = f"the height of {row.fused}"
        if row.order == "kv":
            key_heads = _divide(lines, 2 * head_dim, height, "two heads")
        else:
            key_heads = (_divide(lines, head_dim, height, "the head size") - heads) // 2
        amounts: dict[str, tuple[Role, int]] = {
            "q": ("query", heads),
            "k": ("key", key_heads),
            "v": ("value", key_heads),
        }
        sizes = [amounts[letter] for letter in row.order]
        groups = key_heads if row.layout == "interleaved" else row.blocks
        if any(amount % groups for _, amount in sizes):
            raise NotHandled(f"{heads} query and {key_heads} key heads do not fall into {groups} equal groups")
        windows: dict[Role, Window] = {}
        start = 0
        for role, amount in sizes:
            stop = start + amount // groups * head_dim
            windows[role] = Window("rows", start, stop, lines // groups, head_dim, groups)
            start = stop
        return windows


def _no_heads(child: str, lines: int, heads: int | None, head_dim: int | None) -> NotHandled:
    return NotHandled(
        f"{child} has {lines} rows, and {heads or 'an unknown number of'} heads of {head_dim or 'unknown'} size do not "
        "divide it; pass num_heads=..."
    )


def _divide(lines: int, by: int, what: str, what_by: str) -> int:
    if lines % by:
        raise NotHandled(f"{what}, {lines}, is not a multiple of {what_by}, {by}")
    return lines // by
