"""Lines of a projection that belong to queries, keys and values: how it is stored, and how it is cut.

* **Fused, contiguous**: lines [q, k, v], the heads inside each.
* **Fused, interleaved**: one group per key head, [its queries, k, v]. With as many key heads as query heads that is
  per head [q, k, v] (GPT-NeoX, BLOOM); with one it is [all queries, k, v] (multi-query Falcon).
* **Fused, alternating**: a row of q, one of k and one of v in turn (EDM).
* **Transposed** (Conv1D): a fused matrix whose bias is as long as its second side.
* **Stacked**: a parameter (heads, in, head_dim), one matrix per head (TransformerLens).
* **With a gate**: per head [q, gate] in one projection (Qwen3-Next).
"""

from __future__ import annotations

from typing import Literal

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.model_types import (
    HEAD_DIM,
    KEY_DIM,
    NUM_HEADS,
)
from rankdecay.attention.module.beside import is_matrix
from rankdecay.attention.module.heads import (
    num_heads_remedy,
)
from rankdecay.attention.module.projections import ModuleParameters, divide, flattened_error, not_a_matrix_error
from rankdecay.attention.module.settings import NotHandled
from rankdecay.attention.names import AttentionNames


def layout_of(
    module: ModuleParameters, row: AttentionNames, parameters: dict[str, str]
) -> Literal["plain", "stacked", "middle"]:
    """Return how the projections are stored: as matrices, as (heads, in, head_dim), or as (in, heads, head_dim).

    Raises:
        NotHandled: If a projection is none of these.
    """
    shapes = {name: module.shape(name) for name in parameters.values()}
    for name, shape in shapes.items():
        if len(shape) == 1:
            raise flattened_error(name, shape)
    if all(map(is_matrix, shapes.values())):
        for name, shape in shapes.items():
            groups = (
                module.number(("q_groups", "groups")),
                module.source.setting(name.removesuffix(".weight"), ("groups",)),
            )
            if len(shape) > 2 and any(isinstance(count, int) and count > 1 for count in groups):
                raise NotHandled(f"{name} is the weight of a grouped convolution, which is not a matrix")
        return "plain"
    itself = all(name.endswith(child) for child, name in parameters.items())
    if not (itself and row.query and row.key and all(len(shape) == 3 for shape in shapes.values())):
        name, shape = next((name, shape) for name, shape in shapes.items() if not is_matrix(shape))
        raise not_a_matrix_error(name, shape)
    heads = row.num_heads or module.number(NUM_HEADS)
    first, middle, last = module.shape(parameters[row.query])
    if heads == first != middle < last != (row.head_dim or module.number(HEAD_DIM)):
        raise NotHandled(
            f"{parameters[row.query]} has shape {(first, middle, last)}, where {heads} matrices of (in, head_dim) "
            f"were expected; transpose it, or pass names=AttentionNames(..., head_dim={last}) if heads are that wide"
        )
    if heads == first != middle or (heads is None and first < middle):
        return "stacked"
    if heads == middle != first:
        return "middle"
    remedy = "store it as a matrix, (out, in)" if heads == first == middle else num_heads_remedy(module)
    raise NotHandled(
        f"{parameters[row.query]} has shape {module.shape(parameters[row.query])}; "
        f"{heads or 'an unknown number of'} heads do not tell which side is the heads'; {remedy}"
    )


def windows_of(
    module: ModuleParameters, row: AttentionNames, height: dict[str, int], heads: int, head_dim: int, gated: bool
) -> dict[Role, tuple[str, Window]]:
    """Return the projection and the window, if it is not transposed, of query, key and value."""

    def whole(child: str, size: int) -> tuple[str, Window]:
        return child, Window("rows", 0, height[child], height[child], size)

    windows: dict[Role, tuple[str, Window]] = {}
    if row.query and gated:  # per head [query, gate]
        windows["query"] = row.query, Window("rows", 0, head_dim, 2 * head_dim, head_dim, heads)
        windows["gate"] = row.query, Window("rows", head_dim, 2 * head_dim, 2 * head_dim, head_dim, heads)
    elif row.query:
        windows["query"] = whole(row.query, head_dim)
    if row.query and row.key and row.value:
        key_heads = divide(height[row.key], head_dim, f"the height of {row.key}", "the head size")
        value_dim = divide(height[row.value], key_heads, f"the height of {row.value}", "the key heads")
        windows["key"], windows["value"] = whole(row.key, head_dim), whole(row.value, value_dim)
        return windows
    assert row.fused
    for role, window in _cut(module, row, height[row.fused], heads, head_dim).items():
        windows[role] = (row.fused, window)
    if row.value:
        windows["value"] = whole(row.value, divide(height[row.value], heads, f"the height of {row.value}", "the heads"))
    return windows


def is_gated(
    module: ModuleParameters, row: AttentionNames, height: dict[str, int], heads: int, head_dim: int, across: list[int]
) -> bool:
    """Whether the query projection holds a gate beside each head; every other output fits without."""
    if not row.query or not module.has_gates():
        return False
    return head_dim % 2 == 0 and height[row.query] == heads * head_dim and heads * head_dim // 2 in across


def is_transposed(
    module: ModuleParameters, row: AttentionNames, parameters: dict[str, str], outputs: dict[str, str]
) -> bool:
    """Whether the weights are stored (in, out): as their class says or multiplies, or as shapes and bias tell.

    Raises:
        NotHandled: If they are parameters of the module itself, which may be either, and no shape tells; or are
            stored in both ways.
    """
    if row.transposed is not None:
        return row.transposed
    projections = parameters | outputs
    stored = {child: module.source.is_transposed(name.removesuffix(".weight")) for child, name in projections.items()}
    transposed = [child for child, is_so in stored.items() if is_so]
    if transposed and len(transposed) < len(stored):
        others = " and ".join(child for child in stored if child not in transposed)
        raise NotHandled(
            f"{' and '.join(transposed)} is stored as (in, out), but {others} as (out, in): store all the same way, or "
            "leave the module to the optimizer with exclude="
        )
    if transposed:
        return True
    for name in parameters.values():
        bias = module.bias(name)
        if bias is None or not module.shape(bias):
            continue
        (length, *_), (rows, columns, *_) = module.shape(bias), module.shape(name)
        if rows != columns:
            return length == columns
    raw_shapes = {child: module.shape(name) for child, name in parameters.items() if name == module.path_of(child)}
    if not raw_shapes or len(raw_shapes) < len(parameters) or any(child.endswith("weight") for child in raw_shapes):
        return False  # weights of modules, or called as torch calls those that it takes as (out, in)
    rows, columns = ({shape[side] for shape in raw_shapes.values()} for side in (0, 1))
    if row.fused and not row.query and (shape := raw_shapes[row.fused])[0] != shape[1]:
        return shape[1] > shape[0]
    if len(rows) == len(columns):
        raise NotHandled(
            f"{' and '.join(raw_shapes)} are parameters of the module itself, and no shape tells whether they are "
            "(out, in), or (in, out) as in x @ W: pass names=AttentionNames(..., transposed=...)"
        )
    return len(rows) < len(columns)  # all have the input's width in common


def _cut(module: ModuleParameters, row: AttentionNames, lines: int, heads: int, head_dim: int) -> dict[Role, Window]:
    """Return the windows of a fused parameter, if it is not transposed."""
    height = f"the height of {row.fused}"
    if module.number(KEY_DIM) and (
        row.layout == "interleaved" or not row.query
    ):  # values are wider than keys; LeViT's and HaloNet's are per head
        groups = heads if row.layout == "interleaved" else 1
        size = divide(lines, heads, height, "the heads") * heads // groups
        head_dim = head_dim * heads // groups
        ends = [head_dim * (i + 1) for i in range(len(row.order) - 1)] + [size]
        starts = [0, *ends[:-1]]
        roles: dict[str, Role] = {"q": "query", "k": "key", "v": "value"}
        return {
            roles[letter]: Window("rows", start, end, size, (end - start) * groups // heads, groups)
            for letter, start, end in zip(row.order, starts, ends, strict=True)
        }
    if row.value:
        key_heads = divide(lines, head_dim, height, "the head size") - heads
    elif len(row.order) == 2:
        key_heads = divide(lines, 2 * head_dim, height, "two heads")
    else:
        key_heads = (divide(lines, head_dim, height, "the head size") - heads) // 2
    amounts: dict[str, tuple[Role, int]] = {
        "q": ("query", heads),
        "k": ("key", key_heads),
        "v": ("value", key_heads),
    }
    sizes = [amounts[letter] for letter in row.order]
    if row.layout == "alternating":
        if key_heads != heads and "q" in row.order:
            raise NotHandled(f"{row.fused} holds {heads} query and {key_heads} key heads, which cannot alternate")
        turns = len(row.order)
        return {
            amounts[letter][0]: Window("rows", i, i + 1, turns, head_dim, lines // turns)
            for i, letter in enumerate(row.order)
        }
    groups = key_heads if row.layout == "interleaved" else row.blocks
    if any(amount % groups for _, amount in sizes):
        raise NotHandled(f"{heads} query and {key_heads} key heads do not split into {groups} equal groups")
    windows: dict[Role, Window] = {}
    start = 0
    for role, amount in sizes:
        stop = start + amount // groups * head_dim
        windows[role] = Window("rows", start, stop, lines // groups, head_dim, groups)
        start = stop
    return windows
