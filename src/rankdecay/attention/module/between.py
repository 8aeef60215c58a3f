"""Operations between the matrices of an attention module, because of which scores or outputs are not their product."""

from __future__ import annotations

import math
from typing import Literal

from rankdecay.attention.layer import Role
from rankdecay.attention.model_types import (
    POOLING,
    TURNED,
    VALUE_NORMS_WITHOUT_WEIGHTS,
)
from rankdecay.attention.module.beside import is_batch_norm, is_matrix, is_norm, steps
from rankdecay.attention.module.found import Place
from rankdecay.attention.module.projections import ModuleParameters
from rankdecay.attention.names import (
    BETWEEN,
    CHANNELS,
    CONVOLUTIONS,
    HEAD_MIXERS,
    HEADS_NORMS,
    NORM_OF_HEADS,
    OUTPUT_BESIDE,
    PLAIN_NORMS,
    SCALES,
    AttentionNames,
    is_gate,
    is_value_norm,
)

#: What a norm is called that stands behind a projection in a module of their own.
BATCH_NORMS = ("bn", "norm", "batch_norm", "batchnorm", "normalization")


def why_no_product(module: ModuleParameters, row: AttentionNames, places: dict[Role, Place]) -> str:
    """Return what makes scores more than the product of queries and keys, if their norms are not counted."""
    if is_channel_attention(module):
        return "takes its scores between channels, not tokens"
    weights = (module.parameter(child) for child in (row.query, row.key, row.fused) if child)
    owners = {  # a norm beside the last of a sequence, called proj, is before it
        weight.removesuffix(".weight").rpartition(".")[0]
        for weight in weights
        if weight and not weight.endswith(".proj.weight")
    }
    if any(f"{owner}.{norm}.weight" in module.plain for owner in owners - {module.path} for norm in BATCH_NORMS):
        return "normalises queries and keys over the batch"
    after = _steps_after_projection(module, row)
    if any(map(is_batch_norm, after)):
        return "normalises queries and keys over the batch"
    if other := next((step for step in after if not is_norm(step)), ""):
        return f"puts {other} between its projections and the scores"
    kind = module.setting(("model_type",))
    if kind in TURNED:
        return "rotates queries and keys by positions, but not plane by plane"
    if kind in POOLING and row.fused and (shape := module.shape(module.parameter(row.fused) or ""))[0] != 3 * shape[1]:
        return "pools its queries over tokens"
    children = module.source.children(module.path)
    if "k_sconv" in children:
        return "convolves keys over tokens"
    if "bt_proj" in children:
        return "reflects keys by what stands between the tokens"  # fla's PaTH
    if "proj_e" in children and module.has_rows("proj_e", places["query"].window.extent(0)):
        return "weighs what each coordinate adds to the scores by the edge between two nodes"
    if {"q", "k"} & _convolved(module):
        return "convolves queries or keys over tokens"
    if _scales_coordinates(module, row, places):
        return "scales queries or keys coordinate by coordinate, by a learned vector"
    return ""


def mixes_heads(module: ModuleParameters, heads: int) -> bool:
    """Whether a matrix mixes the scores of the heads before their softmax (talking heads)."""
    names = map(module.parameter, filter(HEAD_MIXERS.fullmatch, module.source.children(module.path)))
    shapes = (module.shape(name) for name in names if name)
    return heads > 1 and any(is_matrix(shape) and shape[:2] == (heads, heads) for shape in shapes)


def _convolved(module: ModuleParameters) -> set[str]:
    """Return which of q, k and v convolutions over tokens stand behind."""
    children = filter(module.is_convolution_after, module.source.children(module.path))
    matches = (CONVOLUTIONS.fullmatch(child) for child in children)
    names = (match["of"] for match in matches if match)
    return {letter for name in names for letter in (name if name.strip("qkv") == "" else name[0])}


def _scales_coordinates(module: ModuleParameters, row: AttentionNames, places: dict[Role, Place]) -> bool:
    """Whether a parameter has a factor for each coordinate of a head, or of all heads, that meets queries or keys.

    One of a factor for each head, or of a single one, leaves a product what it is.
    """
    window = places["query"].window
    for child in module.source.children(module.path):
        if child and SCALES.fullmatch(child) and child not in row.projections:
            path = module.path_of(child)
            names = (path, f"{path}.{child}", f"{path}.weight", f"{path}.scale")
            shape = next((module.shape(name) for name in names if name in module.plain), ())
            whole = "q" in child or "k" in child  # otherwise it may be one of what the module gives
            sizes = {window.head_dim, *([window.head_dim * window.num_heads] if whole else [])}
            if shape and shape[-1] > 1 and math.prod(shape) in sizes:
                return True
    return False


def _steps_after_projection(module: ModuleParameters, row: AttentionNames) -> list[str]:
    """Return what stands in sequences between the projections to queries and keys and their scores."""
    weights = (module.parameter(child) for child in (row.query, row.key, row.fused) if child)
    return [step for weight in weights if weight for step in steps(module.source, module.plain, weight, "behind")]


def has_norm_after(module: ModuleParameters, row: AttentionNames) -> bool:
    """Whether a norm, but not over the batch, stands behind a projection to queries or keys in a sequence."""
    return any(is_norm(step) and not is_batch_norm(step) for step in _steps_after_projection(module, row))


def why_no_value_product(module: ModuleParameters, places: dict[Role, Place], value: str = "", output: str = "") -> str:
    """Return what stands between values and output projection, if it is more than the weights of attention.

    Args:
        module: that holds them.
        places: of the matrices.
        value: plain name of the weight that projects to values, if it may be in a sequence.
        output: that of the output projection.
    """
    if "output" not in places:
        return ""
    if is_channel_attention(module):
        return "mixes the channels of each head by its scores"
    if OUTPUT_BESIDE.search(module.source.kind(module.path)):
        return "adds its values, too, to what its output projection gives"
    children = module.source.children(module.path)
    width = places["query"].window.num_heads * places["value"].window.head_dim
    if reason := next((reason for child, reason in BETWEEN.items() if child in children), ""):
        return reason
    if "v" in _convolved(module):
        return BETWEEN["v_sconv"]
    if child := module.local_convolution(places["value"].window.num_heads, places["value"].window.extent(0)):
        return f"has a convolution over tokens, {child}, which may be of its values"
    if "gate" in places or any(module.has_rows(child, width) for child in filter(is_gate, children)):
        return "gates what its heads give before the output projection"
    if any(child in children for child in HEADS_NORMS) or norm_stands(module, places) == "behind heads":
        return "normalises what its heads give before the output projection"
    if any(map(is_value_norm, children)) or module.setting(("model_type",)) in VALUE_NORMS_WITHOUT_WEIGHTS:
        return "normalises values"
    behind = steps(module.source, module.plain, value, "behind")
    before = steps(module.source, module.plain, output, "before")
    if step := next((step for step in (*behind, *before) if not is_norm(step)), ""):
        return f"puts {step} between values and the output projection"
    if behind:
        return "normalises values"
    return "normalises what its heads give before the output projection" if before else ""


def norm_stands(module: ModuleParameters, places: dict[Role, Place]) -> Literal["", "behind heads", "unknown"]:
    """Return where a plain norm stands: "" if before the projections, or if there is none."""
    children = module.source.children(module.path)
    norm = plain_norm(module)
    if not norm or "sr" in children or "output" not in places or "latent" in places:
        return ""  # sr: a norm of what keys and values are formed from
    if module.norms_inside():  # it is those of queries and keys
        return ""
    if norm == PLAIN_NORMS[0] and module.source.kind(module.path) in NORM_OF_HEADS:
        return "behind heads"
    of_library = module.source.kind(module.path).startswith(("timm.", "transformers.", "diffusers."))
    if of_library or module.setting(("model_type",)) is not None or is_vqgan_attention(module):
        return ""
    weight, query, value = module.path_of(f"{norm}.weight"), places["query"], places["value"].window
    width = module.shape(weight)[0] if weight in module.plain and module.shape(weight) else None
    read = math.prod(module.shapes[query.parameter]) // (query.window.groups * query.window.size)
    given = {query.window.num_heads * value.head_dim, value.head_dim}
    if width is None or (width in given) == (width == read):
        return "unknown"
    return "behind heads" if width in given else ""


def plain_norm(module: ModuleParameters) -> str:
    """Return the child that is a norm and does not say of what; "" if there is none."""
    children = module.source.children(module.path)
    return next((norm for norm in PLAIN_NORMS if norm in children), "")


def is_vqgan_attention(module: ModuleParameters) -> bool:
    """Whether it is the attention of a VQGAN's convolutions: of one head, without positions."""
    query = module.parameter("q")
    return bool(query and module.parameter("proj_out") and len(module.shape(query)) == 4)


def is_channel_attention(module: ModuleParameters) -> bool:
    """Whether tokens are summed over in the scores: Florence-2's and DaViT's channel attention, XCiT, Restormer.

    A temperature of another shape than (heads, 1, 1) is a factor of the scores between tokens.
    """
    if CHANNELS.search(module.source.kind(module.path)) or "channel_attn" in module.path.split("."):
        return True
    name = module.path_of("temperature")
    return name in module.plain and len(shape := module.shape(name)) == 3 and shape[1:] == (1, 1)
