"""Number and size of the heads of one module, from its settings and from the shapes of its projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from rankdecay.attention.layer import Window
from rankdecay.attention.model_types import (
    HEAD_DIM,
    KEY_DIM,
    KEY_HEADS,
    NUM_HEADS,
    PARTS,
    WIDTH,
)
from rankdecay.attention.module.between import (
    is_channel_attention,
    is_vqgan_attention,
)
from rankdecay.attention.module.projections import ModuleParameters, divide
from rankdecay.attention.module.settings import NotHandled
from rankdecay.attention.names import AttentionNames


def check_heads(module: ModuleParameters, heads: int, key_heads: int) -> None:
    """Refuse query heads that do not share key heads equally."""
    if heads % key_heads:
        raise NotHandled(
            f"{heads} query heads are not a multiple of {key_heads} key heads; if the number of heads is wrong, "
            f"{num_heads_remedy(module)}"
        )


def share_of_output(module: ModuleParameters, child: str, across: int, width: int, transposed: bool) -> Window | None:
    """Return the part of an output projection one level up that belongs to this one of several modules.

    A list of modules of one head each, whose results are concatenated: the number is the last in the path.
    """
    number = module.path.rpartition(".")[2]
    if not child.startswith("../") or not number.isdigit() or across % width:
        return None
    siblings = module.source.children(module.path.rpartition(".")[0])
    first = int(number) * width
    if len(siblings) * width != across:
        return None
    return Window("columns", first, first + width, across, width, 1, transposed)


def count_heads(
    module: ModuleParameters,
    row: AttentionNames,
    height: dict[str, int],
    across: list[int],
    parameters: dict[str, str],
    stacked: bool,
) -> tuple[int, int]:
    """Return the number of query heads and the lines of each."""
    if stacked:  # the shape says it
        count, _, size = module.shape(parameters[row.query or row.fused or ""])
        return count, size
    heads, head_dim = _stated_heads(module, row), row.head_dim or module.number(HEAD_DIM)
    if row.query and _is_one_of_heads(module, row, height):
        return 1, height[row.query]
    if row.query:
        return _separate_heads(module, row, row.query, height[row.query], heads, head_dim)
    assert row.fused
    lines = height[row.fused]
    if heads and (key_dim := module.number(KEY_DIM)):
        return heads, key_dim
    if row.value and not heads and head_dim:
        heads = divide(lines, 2 * head_dim, f"the height of {row.fused}", "two times the head size")
    if row.value and heads:
        return heads, _size_of_two(row, lines, heads)
    return _fused_heads(module, row, row.fused, lines, across, heads, head_dim)


def _stated_heads(module: ModuleParameters, row: AttentionNames) -> int | None:
    """Return the number of heads that the names or the settings state, or None."""
    if row.num_heads:
        return row.num_heads
    heads = module.number(NUM_HEADS)
    if is_vqgan_attention(module):
        heads = 1
    if row.query in ("vision_proj", "text_proj") and (sides := module.number(("encoder_attention_heads",))):
        heads = sides // 2  # Grounding DINO's fusion
    ratio = module.number(("head_ratio",))
    if ratio and heads and module.number(HEAD_DIM) is None:
        heads //= ratio  # a configuration's number; ConvBERT gives the rest to its convolution
    if is_channel_attention(module):
        heads = module.number(("groups", "num_groups")) or heads
    return heads


def _separate_heads(
    module: ModuleParameters, row: AttentionNames, query: str, lines: int, heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """Return the number and size of the heads in a projection to queries alone."""
    own_dim = module.source.own(module.path, HEAD_DIM)
    stated = row.num_heads or row.head_dim or module.has_gates() or module.source.own(module.path, NUM_HEADS)
    if isinstance(own_dim, int) and not stated and own_dim > 0 and lines % own_dim == 0:
        return lines // own_dim, own_dim  # the configuration's number may be of another tower
    if row.head_dim:
        count = row.num_heads or lines // row.head_dim
        if count * row.head_dim != lines:
            raise NotHandled(
                f"{query} has {lines} rows, but {count} heads of {row.head_dim} have {count * row.head_dim}: "
                "omit head_dim= where the config has the number of heads, or pass their actual size"
            )
        return count, row.head_dim
    if row.layout == "interleaved" and (key_dim := module.number(KEY_DIM)):
        # LeViT: values are wider than keys, and a layer that shrinks has heads of its own
        return divide(lines, key_dim, f"the height of {query}", "the key size"), key_dim
    if heads and lines % heads == 0:
        return heads, lines // heads
    if head_dim and lines % head_dim == 0:
        return lines // head_dim, head_dim
    raise heads_error(module, query, lines, heads, head_dim)


def _size_of_two(row: AttentionNames, lines: int, heads: int) -> int:
    """Return the size of a head in a projection to queries and keys, which are as wide as each other."""
    size = divide(lines, 2 * heads, f"the height of {row.fused}", "two times the heads")
    if row.head_dim not in (None, size):
        raise NotHandled(
            f"{row.fused} has {lines} rows, but {heads} heads of {row.head_dim} queries and keys have "
            f"{2 * heads * row.head_dim}: pass their actual size, {size}"
        )
    return size


def _fused_heads(
    module: ModuleParameters,
    row: AttentionNames,
    fused: str,
    lines: int,
    across: list[int],
    heads: int | None,
    head_dim: int | None,
) -> tuple[int, int]:
    """Return the number and size of the heads in a projection to queries, keys and values."""
    if across and lines == 1 + 2 * across[0]:
        raise NotHandled(f"{fused} holds one score for each token, keys and values, and no queries: linear attention")
    if module.number(("val_dim", "value_dim")):
        raise NotHandled(f"{fused} holds queries and values of different widths")
    if heads is None and head_dim and across:
        heads = across[0] // head_dim
    if heads is None:
        raise heads_error(module, fused, lines, heads, head_dim)
    if row.head_dim and not row.num_heads and across and heads * row.head_dim not in across:
        heads = across[0] // row.head_dim  # some of those that the settings state
    key_heads = module.number(KEY_HEADS)
    candidates = [
        head_dim,
        *(columns // heads for columns in across if columns % heads == 0),
        lines // (heads + 2 * key_heads) if key_heads and lines % (heads + 2 * key_heads) == 0 else None,
        lines // (3 * heads) if lines % (3 * heads) == 0 else None,
    ]
    for size in candidates:
        if size and lines % size == 0 and (lines // size - heads) % 2 == 0 and lines // size > heads:
            return heads, size
    raise heads_error(module, fused, lines, heads, head_dim)


def check_key_heads_are_said(module: ModuleParameters, row: AttentionNames, heads: int, key: Window) -> None:
    """Refuse a fused projection of an unknown class that is not three times its queries, if nothing says why.

    Fewer key heads are one reason. Others are values of another size than keys (LeViT, EfficientFormer) and keys and
    values alone (GC ViT), of which the same rows are other matrices; shapes do not tell.
    """
    fused = row.fused
    if fused is None or row.query or row.value or key.num_heads == heads:
        return
    is_of_known_type = row.when is not None and row.when[0] == "model_type"
    if is_of_known_type or module.source.is_known(module.path):
        return
    if module.setting((*KEY_HEADS, "multi_query")):
        return
    lines = (heads + 2 * key.num_heads) * key.head_dim
    raise NotHandled(
        f"{fused}: its {lines} rows are {heads} query heads of {key.head_dim} with {key.num_heads} key heads, or keys "
        "and values of other sizes, and nothing says which: if there are so few key heads, pass "
        f"names=AttentionNames(fused={fused!r}, output=..., num_heads={heads})"
    )


def heads_error(
    module: ModuleParameters, child: str, lines: int, heads: int | None, head_dim: int | None
) -> NotHandled:
    """Return the error of a projection that does not split into the heads stated, if any are."""
    known = " with their number, or, if it is stored (in, out) as in x @ W, names=AttentionNames(..., transposed=True)"
    heads_of_size = " ".join(
        [*([str(heads)] if heads else []), "heads", *([f"of size {head_dim}"] if head_dim else [])]
    )
    what, remedy = f"its {lines} rows do not split into {heads_of_size}", num_heads_remedy(module)
    if not (heads or head_dim):
        what = f"the number of heads in its {lines} rows is unknown"
        remedy += "" if _heads_are_stated(module) else ", or head_dim=... if heads have one size in all layers"
    return NotHandled(f"{child}: {what}; {remedy}{known if heads else ''}")


def num_heads_remedy(module: ModuleParameters) -> str:
    """Return how to pass another number of heads: a plain ``num_heads=`` does not override the settings."""
    return "pass names=AttentionNames(..., num_heads=...)" if _heads_are_stated(module) else "pass num_heads=..."


def _heads_are_stated(module: ModuleParameters) -> bool:
    """Whether the settings state heads, of this module or of the parts of a model, in none of which it is."""
    return module.stated(NUM_HEADS) is not None or module.setting(tuple(PARTS)) is not None


def check_whole(module: ModuleParameters, heads: int, head_dim: int, across: int) -> None:
    """Refuse queries in a file that have room for some of the heads of the stated width, and not for all.

    Args:
        module: with the projection.
        heads: as many as the settings state, if this is such a file.
        head_dim: of each, if all of them are there.
        across: width of the input.
    """
    if module.source.kind(module.path) or module.number(WIDTH) != across or heads != module.stated(NUM_HEADS):
        return
    size, left = divmod(across, heads)
    narrow = ("head_ratio", "attention_downsample_rate")  # ConvBERT, SAM
    stated = module.number(HEAD_DIM) or module.number(KEY_DIM) or module.number(narrow)
    if stated or left or heads * head_dim >= across or heads * head_dim % size:
        return
    raise NotHandled(
        f"its config has {heads} heads of {size} (width {across}), but its weights hold only "
        f"{heads * head_dim // size}: either it is one of several tensor-parallel slices, which have to be merged, or "
        f"heads were pruned: then pass names=AttentionNames(..., head_dim={size}), or their actual size"
    )


def contradicted(module: ModuleParameters, heads: int, head_dim: int, key_heads: int) -> str:
    """Return which numbers of heads the settings state, and what the weights make; "" if they agree.

    Raises:
        NotHandled: If a class that no table covers states them itself, and not a configuration that may be
            another part's.
    """
    fit = f"but its weights fit {heads} heads of {head_dim} with {key_heads} key heads"
    how = "names=AttentionNames(..., num_heads=..., head_dim=...)"
    read = (
        (NUM_HEADS, "{} heads", heads),
        (HEAD_DIM, "heads of {}", head_dim),
        (KEY_HEADS, "{} key heads", key_heads),
    )

    def differing(setting: Callable[[tuple[str, ...]], object]) -> str:
        stated = [(text, setting(attributes), number) for attributes, text, number in read]
        return " and ".join(text.format(n) for text, n, number in stated if type(n) is int and n not in (0, -1, number))

    if not module.source.is_known(module.path) and (differences := differing(partial(module.source.own, module.path))):
        raise NotHandled(f"it states {differences}, {fit}: pass {how}")
    settings = [text] if (text := differing(module.stated)) else []
    of_file = not module.source.kind(module.path)  # whose configuration states key heads where there are fewer
    if of_file and key_heads not in (1, heads) and module.stated(NUM_HEADS) and module.stated(KEY_HEADS) is None:
        settings.append("no number of key heads")
    if not settings:
        return ""
    return f"its config says {' and '.join(settings)}, {fit} (shown); if that is wrong, pass {how}"


def _is_one_of_heads(module: ModuleParameters, row: AttentionNames, height: Mapping[str, int]) -> bool:
    """Whether the module is one head of a list of them: by the list's name, or by the output beside the list."""
    parts = module.path.split(".")
    if len(parts) < 2 or not parts[-1].isdigit() or any(map(module.parameter, _inside(row.outputs))):
        return False
    lines = height.get(row.value or "", 0)
    return parts[-2] in ("heads", "attn_heads", "attention_heads") or any(
        lines > 0
        and len(module.shape(name)) == 2
        and share_of_output(module, child, module.shape(name)[1], lines, False)
        for child in row.outputs
        if (name := module.parameter(child))
    )


def _inside(outputs: Iterable[str]) -> list[str]:
    return [child for child in outputs if not child.startswith("../")]
