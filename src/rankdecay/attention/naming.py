"""Recognises attention from the names and shapes of parameters: the same for a live model and for files.

A module is attention when the parameters under it carry the names of one row of :data:`KNOWN`: separate projections, or
a fused one whose order and layout the name implies. Shapes, and the number of heads, say the rest.

* **Head size** is the query's height over the number of heads; how many key and value heads there are follows from the
  height of W_K. No model class is asked for.
* **Fused, contiguous**: lines [q, k, v], the heads inside each.
* **Fused, interleaved**: one group per key head, [its queries, k, v]. With as many key heads as query heads that is
  per head [q, k, v] (GPT-NeoX, BLOOM); with one it is [all queries, k, v] (multi-query Falcon).
* **Transposed** (Conv1D): a fused matrix whose bias is as long as its second side.

To teach the library a new family, add a row to :data:`KNOWN` and the model to ``tests/attention/test_families.py``,
which compares each head with what the model itself computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.products import Rotary
from rankdecay.checks import check_number

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AttentionNames:
    """How one family of attention modules names its projections, relative to the module.

    Give separate ``query``, ``key`` and ``value``; or ``fused`` alone for all three in one parameter; or ``query`` and
    ``fused`` for keys and values in one. A name is a submodule with a ``weight`` (``"q_proj"``), or a parameter itself
    (``"q_proj_weight"``).

    Attributes:
        query: name of the query projection.
        key: name of the key projection.
        value: name of the value projection.
        fused: name of the projection that holds several of them.
        output: names the output projection may have, the first that exists counts; ``"../output.dense"`` starts one
            level higher. Empty if there is none.
        order: what the fused projection holds, and in which order: ``"qkv"``, ``"qvk"`` or ``"kv"``.
        layout: of the fused projection: ``"contiguous"``, or ``"interleaved"`` by key head (module docstring).
        blocks: for a contiguous layout that repeats: how many times (CodeGen: 4).
        when: the row counts only if the model's configuration has this attribute with this value (CodeGen), or has it
            at all when the value is None.
        num_heads: number of query heads, if the module does not say it itself.
        head_dim: size of a head, if it is not height / num_heads.

    Example:
        >>> AttentionNames(query="to_queries", key="to_keys", value="to_values", output="unify", num_heads=8)
        ... # doctest: +ELLIPSIS
        AttentionNames(...)
    """

    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    output: str | tuple[str, ...] = ()
    order: Literal["qkv", "qvk", "kv"] = "qkv"
    layout: Literal["contiguous", "interleaved"] = "contiguous"
    blocks: int = 1
    when: tuple[str, object] | None = None
    num_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        given = {name for name in ("query", "key", "value", "fused") if getattr(self, name)}
        if given not in ({"query", "key", "value"}, {"fused"}, {"query", "fused"}):
            raise ValueError(
                f"AttentionNames got {', '.join(sorted(given)) or 'no projection'}; expected query, key and value, "
                "or fused alone, or query and fused (keys and values in one)."
            )
        if given == {"query", "fused"} and self.order != "kv":
            object.__setattr__(self, "order", "kv")
        for name in ("num_heads", "head_dim", "blocks"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), at_least=1, whole=True)

    @property
    def projections(self) -> tuple[str, ...]:
        """The names that must exist."""
        return tuple(name for name in (self.query, self.key, self.value, self.fused) if name)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names the output projection may have."""
        return (self.output,) if isinstance(self.output, str) else self.output


_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "o", "out_lin", "proj", "Wo", "wo", "W_o", "to_out.0", "to_out",
            "linear_out", "out", "proj_out", "../output.dense")  # fmt: skip


def _separate(query: str, key: str, value: str) -> AttentionNames:
    return AttentionNames(query=query, key=key, value=value, output=_OUTPUTS)


def _fused(name: str, query: str | None = None, **how: object) -> AttentionNames:
    return AttentionNames(fused=name, query=query, output=_OUTPUTS, **how)  # pyright: ignore[reportArgumentType]


#: The names in use, most specific first. Read in transformers 5.23, timm 1.0.31 and torch 2.13.
KNOWN: tuple[AttentionNames, ...] = (
    _separate("q_proj", "k_proj", "v_proj"),  # llama, mistral, qwen, gemma, opt, gpt-j, clip, whisper, bart, vit, …
    _separate("query", "key", "value"),  # bert, roberta
    _separate("q_lin", "k_lin", "v_lin"),  # distilbert
    _separate("q", "k", "v"),  # t5
    _separate("q_proj_weight", "k_proj_weight", "v_proj_weight"),  # nn.MultiheadAttention with kdim or vdim
    _separate("to_q", "to_k", "to_v"),  # diffusers, lucidrains
    _separate("query_proj", "key_proj", "value_proj"),
    _separate("wq", "wk", "wv"),
    _separate("Wq", "Wk", "Wv"),
    _separate("W_q", "W_k", "W_v"),
    _separate("linear_q", "linear_k", "linear_v"),
    _fused("c_attn", query="q_attn"),  # gpt-2's cross-attention
    _fused("c_attn", layout="interleaved", when=("multi_query", None)),  # gpt_bigcode
    _fused("c_attn"),  # gpt-2, nanoGPT
    _fused("query_key_value", layout="interleaved"),  # gpt_neox, bloom, falcon, persimmon
    _fused("qkv_proj", order="qvk", blocks=4, when=("model_type", "codegen")),
    _fused("qkv_proj"),  # phi-3
    _fused("Wqkv"),  # mpt, modernbert, dbrx
    _fused("in_proj_weight"),  # nn.MultiheadAttention
    _fused("qkv"),  # timm
    _fused("kv", query="q"),  # timm's attention pooling
    _fused("kv", query="to_q"),
)

#: What a module, or its configuration, calls its number of heads, its head size and its number of key heads.
NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "d_kv", "dim_head")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")

#: What says that positions turn queries and keys: in a configuration, or a module that does it.
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base", "rotary_dim", "rotary_pct", "rotary_emb")
#: Model types whose rotary planes are neighbouring coordinates; elsewhere they are half a head apart.
_INTERLEAVED = ("gptj", "codegen", "cohere", "cohere2", "glm", "glm4", "llama4_text", "ernie4_5")
_QK_NORM = re.compile(r"(q|k|query|key)_?(layer)?_?(norm|ln)|norm_(q|k)|(q|k)_layernorm")

_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")  # DeepSeek's multi-head latent attention


class Place(NamedTuple):
    """Where one matrix is, and where its bias is."""

    parameter: str
    window: Window
    bias: str | None = None
    bias_window: Window | None = None


class Found(NamedTuple):
    """An attention module, by the names of its parameters."""

    name: str
    places: dict[Role, Place]
    head_dim: int
    rotary: Rotary | None = None
    qk_norm: bool = False


class Unhandled(NamedTuple):
    """A module that looks like attention and is not handled."""

    name: str
    reason: str


class _NotHandled(Exception):
    """Raised while a module is read; becomes an :class:`Unhandled`."""


#: (module path, attributes) -> the nearest value of the first of them, in the module, its configuration, or above.
Setting = Callable[[str, tuple[str, ...]], object]


def locate(
    shapes: Mapping[str, Shape], setting: Setting, names: Iterable[AttentionNames] = KNOWN
) -> tuple[list[Found], list[Unhandled]]:
    """Returns the attention modules among the parameters, in order, and what looks like one and is not handled.

    Args:
        shapes: shape of every parameter, by its name.
        setting: returns an attribute of a module or of its configuration, the nearest one, or None.
        names: the rows to try, most specific first.
    """
    # Adapters keep the wrapped layer under `base_layer`: it is known by the name it had before.
    plain = {name.replace(".base_layer.", "."): name for name in shapes}
    found: list[Found] = []
    unhandled: list[Unhandled] = []
    for module in _modules(plain):
        reader = _Reader(module, plain, shapes, setting)
        latent = [child for child in _LATENT if reader.parameter(child)]
        if latent:
            unhandled.append(Unhandled(module, _LATENT_REASON.format(names=" and ".join(latent))))
            continue
        row = next((row for row in names if reader.matches(row)), None)
        if row is None:
            continue
        try:
            found.append(reader.read(row))
        except _NotHandled as reason:
            unhandled.append(Unhandled(module, str(reason)))
    return found, unhandled


_LATENT_REASON = (
    "multi-head latent attention ({names}): queries and keys are products of two factors with a normalisation between, "
    "so there is no W_Q and W_K to decay or to take the spectrum of; the factors have the role 'other'"
)


def _modules(names: Iterable[str]) -> list[str]:
    """Every path that is a prefix of a parameter's name, in the order of the names, inner modules after outer ones."""
    seen: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            seen.setdefault(".".join(parts[:i]))
    return list(seen)


class _Reader:
    """Reads one module as attention."""

    def __init__(self, module: str, plain: Mapping[str, str], shapes: Mapping[str, Shape], setting: Setting) -> None:
        self.module, self.plain, self.shapes, self.setting = module, plain, shapes, setting

    def parameter(self, child: str) -> str | None:
        """The plain name of the weight called ``child``: a submodule's, or the parameter itself."""
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
        parameters = {child: name for child in row.projections if (name := self.parameter(child))}
        output = next((name for child in row.outputs if (name := self.parameter(child))), None)
        self._check_shapes([*parameters.values(), *([output] if output else [])])
        transposed = self._transposed(list(parameters.values()))
        height = {child: self.shape(name)[1 if transposed else 0] for child, name in parameters.items()}
        across = self.shape(output)[0 if transposed else 1] if output else None  # columns of W_O

        heads, head_dim = self._heads(row, height, across)
        places = self._windows(row, parameters, height, heads, head_dim, transposed)
        key_heads, value_dim = places["key"].window.num_heads, places["value"].window.head_dim
        if heads % key_heads:
            raise _NotHandled(f"{heads} query heads are not a multiple of {key_heads} key heads")
        if output and across:
            if across != heads * value_dim:
                raise _NotHandled(
                    f"the output projection takes {across} columns, where {heads} heads of {value_dim} give "
                    f"{heads * value_dim}"
                )
            window = Window("columns", 0, across, across, value_dim, 1, transposed)
            places["output"] = self._place(output, window)
        return Found(self.module, places, head_dim, self._rotary(head_dim), self._qk_norm())

    def _qk_norm(self) -> bool:
        """Whether the module has a normalisation of its own for queries or keys."""
        inside = self.module + "." if self.module else ""
        children = {name[len(inside) :].split(".")[0] for name in self.plain if name.startswith(inside)}
        flags = (self.setting(self.module, (flag,)) for flag in ("use_qk_norm", "qk_layernorm", "qk_norm"))
        return any(_QK_NORM.fullmatch(child) for child in children) or any(flag is True for flag in flags)

    def _rotary(self, head_dim: int) -> Rotary | None:
        if self.setting(self.module, ROTARY) is None or self.setting(self.module, ("alibi",)) is True:
            return None
        dims = self.number(("rotary_dim", "rotary_ndims"))
        if dims is None:
            parameters = self.setting(self.module, ("rope_parameters",))
            share = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
            share = share or self.setting(self.module, ("partial_rotary_factor", "rotary_pct")) or 1.0
            dims = int(head_dim * share) if isinstance(share, (int, float)) else head_dim
        kind = self.setting(self.module, ("model_type",))
        dims = min(dims, head_dim) // 2 * 2
        return Rotary(dims, kind in _INTERLEAVED) if dims else None

    def _windows(
        self,
        row: AttentionNames,
        parameters: dict[str, str],
        height: dict[str, int],
        heads: int,
        head_dim: int,
        transposed: bool,
    ) -> dict[Role, Place]:
        """Returns the places of query, key and value."""

        def whole(child: str, size: int) -> Place:
            lines = height[child]
            return self._place(parameters[child], Window("rows", 0, lines, lines, size, 1, transposed))

        places: dict[Role, Place] = {}
        if row.query and row.key and row.value:
            key_heads = self._divide(height[row.key], head_dim, f"the height of {row.key}", "the head size")
            value_dim = self._divide(height[row.value], key_heads, f"the height of {row.value}", "the key heads")
            places["query"] = whole(row.query, head_dim)
            places["key"] = whole(row.key, head_dim)
            places["value"] = whole(row.value, value_dim)
            if row.query == "q_proj_weight":
                self._share_bias(places)
            return places
        assert row.fused
        if row.query:
            places["query"] = whole(row.query, head_dim)
        for role, window in self._cut(row, height[row.fused], heads, head_dim, transposed).items():
            places[role] = self._place(parameters[row.fused], window)
        if not self.bias(parameters[row.fused]):
            self._separate_biases(places)
        return places

    def _place(self, name: str, window: Window) -> Place:
        bias = self.bias(name)
        return Place(self.plain[name], window, self.plain[bias] if bias else None, window if bias else None)

    def _share_bias(self, places: dict[Role, Place]) -> None:
        """nn.MultiheadAttention keeps one bias, [q, k, v], also where the weights are separate."""
        name = f"{self.module}.in_proj_bias" if self.module else "in_proj_bias"
        if name not in self.plain:
            return
        lines = self.shape(name)[0] // 3
        for i, role in enumerate(places):
            window = Window("rows", i * lines, (i + 1) * lines, 3 * lines, lines)
            places[role] = places[role]._replace(bias=self.plain[name], bias_window=window)

    def _separate_biases(self, places: dict[Role, Place]) -> None:
        """Timm's BEiT and EVA add a q_bias and a v_bias of their own to a fused weight; a key has none."""
        for role, place in list(places.items()):
            name = self.plain.get(f"{self.module}.{role[0]}_bias")
            if name and len(self.shapes[name]) == 1:
                lines = self.shapes[name][0]
                places[role] = place._replace(bias=name, bias_window=Window("rows", 0, lines, lines, lines))

    def _check_shapes(self, names: list[str]) -> None:
        for name in names:
            shape = self.shape(name)
            if len(shape) == 1:
                raise _NotHandled(f"{name} has shape {shape}: flattened by DeepSpeed ZeRO or FSDP1; shard with FSDP2")
            if len(shape) != 2:
                raise _NotHandled(f"{name} has shape {shape}, not that of a matrix")

    def _transposed(self, names: list[str]) -> bool:
        """Whether the weights are stored (in, out): where the bias is as long as the second side only."""
        for name in names:
            bias = self.bias(name)
            if bias is None:
                continue
            (length,), (rows, columns) = self.shape(bias), self.shape(name)
            if rows != columns:
                return length == columns
        return False

    def _heads(self, row: AttentionNames, height: dict[str, int], across: int | None) -> tuple[int, int]:
        """Returns the number of query heads and their size."""
        heads = row.num_heads or self.number(NUM_HEADS)
        head_dim = row.head_dim or self.number(HEAD_DIM)
        if row.query:
            lines = height[row.query]
            if heads and lines % heads == 0:
                return heads, lines // heads
            if head_dim and lines % head_dim == 0:
                return lines // head_dim, head_dim
            raise self._no_heads(f"{row.query} has {lines} rows", heads, head_dim)
        assert row.fused
        lines = height[row.fused]
        if self.number(("key_dim", "val_dim", "value_dim")):
            raise _NotHandled(f"{row.fused} holds queries and values of different widths")
        if heads is None and head_dim and across:
            heads = across // head_dim
        if heads is None:
            raise self._no_heads(f"{row.fused} has {lines} rows", heads, head_dim)
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
        raise self._no_heads(f"{row.fused} has {lines} rows", heads, head_dim)

    @staticmethod
    def _no_heads(what: str, heads: int | None, head_dim: int | None) -> _NotHandled:
        return _NotHandled(
            f"{what}, and {heads or 'an unknown number of'} heads of {head_dim or 'unknown'} size do not divide it; "
            "pass num_heads=..."
        )

    @staticmethod
    def _divide(lines: int, by: int, what: str, what_by: str) -> int:
        if lines % by:
            raise _NotHandled(f"{what}, {lines}, is not a multiple of {what_by}, {by}")
        return lines // by

    def _cut(self, row: AttentionNames, lines: int, heads: int, head_dim: int, transposed: bool) -> dict[Role, Window]:
        """Returns the windows of a fused parameter."""
        if row.order == "kv":
            key_heads = self._divide(lines, 2 * head_dim, f"the height of {row.fused}", "two heads")
            sizes: list[tuple[Role, int]] = [("key", key_heads), ("value", key_heads)]
        else:
            key_heads = (self._divide(lines, head_dim, f"the height of {row.fused}", "the head size") - heads) // 2
            amounts: dict[str, tuple[Role, int]] = {
                "q": ("query", heads), "k": ("key", key_heads), "v": ("value", key_heads)
            }  # fmt: skip
            sizes = [amounts[letter] for letter in row.order]
        groups = key_heads if row.layout == "interleaved" else row.blocks
        if any(amount % groups for _, amount in sizes):
            raise _NotHandled(f"{heads} query and {key_heads} key heads do not fall into {groups} equal groups")
        size = lines // groups
        windows: dict[Role, Window] = {}
        start = 0
        for role, amount in sizes:
            stop = start + amount // groups * head_dim
            windows[role] = Window("rows", start, stop, size, head_dim, groups, transposed)
            start = stop
        return windows
