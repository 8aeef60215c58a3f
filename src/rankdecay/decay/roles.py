"""Role of each parameter of a model, by which its decay is chosen, and the reason for it.

==============  ==========================================================================================
role            parameters
==============  ==========================================================================================
query_key       W_Q and W_K of every attention layer
value_output    W_V and W_O
mlp             the other matrices of the blocks that hold attention: feed-forward, experts, routers
embedding       token, position and patch embeddings, class tokens, the output embedding
norm            gains of normalisation layers, magnitudes of weight norm
bias            biases, also those of normalisation layers, and tables of biases of the attention scores
other           the rest: task heads, adapters' factors, gates, scales, kernels of convolutions
==============  ==========================================================================================

A fused parameter has one segment per matrix in it, each with its own role.

What a parameter is outside attention follows, in this order, from the type of its module, its own name, its shape,
and whether its block holds attention. A word elsewhere in its path says nothing: an encoder may be called ``embedder``,
and a fused layer ``LayerNormMLP``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import type_before_parametrizations

from rankdecay.attention import Window
from rankdecay.attention.adapters import in_use, is_replaced, what_is
from rankdecay.attention.layer import WHOLE
from rankdecay.attention.locate import DEFAULT_SEARCH, SearchOptions, Unhandled, locate
from rankdecay.attention.module.found import Found
from rankdecay.attention.planes import PlaneRows, plane_rows
from rankdecay.attention.source import ModuleSource, ParameterInfo, named_parameters
from rankdecay.decay.policy import Decay

ROLES = ("query_key", "value_output", "mlp", "embedding", "norm", "bias", "other")


def decays_by_role(
    query_key: Decay | None,
    value_output: Decay | None,
    mlp: Decay | None,
    embedding: Decay | None,
    norm: Decay | None,
    bias: Decay | None,
    other: Decay | None,
) -> dict[str, Decay]:
    """Return the decays that were given, by role, in the order of :data:`ROLES`."""
    pairs = zip(ROLES, (query_key, value_output, mlp, embedding, norm, bias, other), strict=True)
    return {role: decay for role, decay in pairs if decay is not None}


_ATTENTION_ROLE = {
    "query": "query_key", "query_rotary": "query_key", "query_factor": "query_key", "query_position": "query_key",
    "query_sine": "query_key", "key": "query_key", "key_rotary": "query_key", "key_position": "query_key",
    "value": "value_output", "output": "value_output", "output_factor": "value_output", "output_mix": "value_output",
    "latent": "other", "gate": "other",
}  # fmt: skip

# ---- of classes ----
_MATRICES = (nn.Linear, nn.Bilinear, _ConvNd, nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
#: A class that is a normalisation, of any number of dimensions: ``LlamaRMSNorm``, ``LayerNorm2d``, ``RMSNormGated``.
_NORM_CLASS = re.compile(r"norm(alization)?(\dd|nd|act|gated|fp\d+|\d)*$", re.IGNORECASE)
_EMBEDDING_CLASS = re.compile(r"Embed(der|dings?)?(\dd)?$", re.IGNORECASE)
_TABLE_CLASS = re.compile(r"Embedding(Bag|\dd)?$", re.IGNORECASE)

# ---- of a parameter's own name, or its module's ----
_BIAS = re.compile(r"(.*_)?bias(es)?(_(table|[a-z]|[ih]h_l\d\w*))?")
_NORM = re.compile(r"(.*_)?(ln|(layer|rms|group|batch)?_?norm)_?\d*(_(weight|scale|gain|gamma|g|w))?")
_GAIN = re.compile(r"weight|gain|scale|gamma|g|w")
_SCALE = re.compile(r"(.*_)?(scales?|scaling|temperature|tau|gamma|beta|alpha|ls)_?\d*")
_STATE_SPACE = re.compile(r"A_logs?|Ds?|dt_.*|A_real|A_imag")
_EMBEDDING = re.compile(r"embed|(^|_)(emb|pos|abs_pos|rel_pos|tokens?)(_|$)|position|pos_(emb|enc)|tokens?\d*$")
_EMBEDDING_MODULE = re.compile(r"(.*_)?(embed(ding)?s?|wte|wpe)(_\d+)?|.*patch_embed.*")
_OUTPUT_EMBEDDING = re.compile(r"lm_head|lm_heads\.\d+|embed_out|unembed(ding)?|output_embeddings?")
#: Names that output embeddings have, but not they alone: they have the shape of an embedding table.
_MAYBE_OUTPUT = re.compile(r"output_projection|output_layer|to_logits|(.*_)?lm_head(\.\w+)?|(.*_)?decoder")
_ADAPTER = re.compile(r"(^|\.)(lora_|ia3_|hada_|lokr_)")
_ADAPTER_IN_BLOCK = re.compile(r"\.adapter")


class Segment(NamedTuple):
    """Matrix in a parameter, or the whole of one that is no matrix: its role, its window, and the reason for the role.

    Attributes:
        role: one of :data:`ROLES`.
        window: where in the parameter.
        why: for a reader.
        note: what the parameter is where the matrix is computed from it, such as ``"under weight_norm: …"``.
        stack: whether the parameter is a stack of matrices, one per expert.
        fixed: whether the default decay leaves it out, as the stored tensors of an orthogonal matrix; a decay given to
            its role by name does not.
        assumed: whether nothing says that the parameter holds its matrices in this order.
    """

    role: str
    window: Window
    why: str
    note: str = ""
    stack: bool = False
    fixed: bool = False
    assumed: bool = False

    def labelled_window(self) -> Window:
        """Return the window, with the matrix's name where the parameter holds several."""
        return self.window if self.window.is_whole else replace(self.window, label=self.why)


@dataclass
class ParameterRoles:
    """Parameter, with its names and its segments.

    Attributes:
        parameter: the parameter.
        names: its names; several if it is tied.
        segments: the matrices in it; one segment of a parameter that is no matrix.
        planes: where it has rows of rotary planes: W_Q, W_K and their biases.
        no_planes: of W_Q and W_K of an attention whose planes cannot be decayed: its name, and why.
    """

    parameter: nn.Parameter
    names: list[str]
    segments: list[Segment]
    planes: tuple[PlaneRows, ...] = ()
    no_planes: str = ""


def assign_roles(
    model: nn.Module, search: SearchOptions = DEFAULT_SEARCH
) -> tuple[list[ParameterRoles], list[Unhandled]]:
    """Return every parameter of the model once, with its segments, and the attention that is not handled."""
    source = ModuleSource(model)
    found, unhandled = locate(source, search)
    return roles_in(source, found), [*unhandled, *_not_decayed(source, found)]


def roles_in(source: ModuleSource, found: list[Found]) -> list[ParameterRoles]:
    """Return every parameter of a model once, with its segments, from the attention that was found in it.

    A tied parameter collects the segments of each of its names; a name that says nothing (role other) adds none.
    """
    in_attention: dict[str, list[Segment]] = {}
    for layer in found:
        for role, place in layer.places.items():
            note = source.known[place.parameter].note if place.parameter in source.known else ""
            segments = in_attention.setdefault(place.parameter, [])
            # Keys may be values too, and of several layers.
            if all(segment.window != place.window for segment in segments):
                assumed = "order" in layer.unknown and not place.window.is_whole
                segments.append(Segment(_ATTENTION_ROLE[role], place.window, role, note, assumed=assumed))
    rows, reasons = _planes(source, found)
    places = _Places(source, found)
    output_embedding = _output_embedding(source.model)

    assigned: dict[int, ParameterRoles] = {}
    every = named_parameters(source.model)
    stand_in = _in_use_for(source.model)
    for name, parameter in every.items():
        entry = assigned.setdefault(id(parameter), ParameterRoles(parameter, [], []))
        entry.names.append(name)
        entry.planes += tuple(rows.get(name, ()))
        used = stand_in(name)
        used = used if used in every else name
        entry.no_planes = entry.no_planes or reasons.get(used, "")
        known = source.known[used]
        segments = in_attention.get(used) or [places.segment(parameter, known)]
        if every[used] is output_embedding and not isinstance(known.holder, nn.Embedding):
            segments = [Segment("embedding", WHOLE, "output embedding")]
        for segment in segments:
            if all(other.role != segment.role or other.window != segment.window for other in entry.segments):
                entry.segments.append(segment)
    for entry in assigned.values():
        telling = [segment for segment in entry.segments if segment.role != "other" or segment.window.has_heads]
        entry.segments = telling or entry.segments[:1]
    return list(assigned.values())


def _in_use_for(model: nn.Module) -> Callable[[str], str]:
    """Return what gives the name of the parameter in use for that of another adapter's copy, which may be used later.

    PEFT has a copy of a module that is trained whole for each adapter; ``set_adapter`` chooses one, and trains it.
    """
    copies = {
        f"{path}.modules_to_save.{adapter}.".removeprefix("."): f"{path}.{in_use(module)}.".removeprefix(".")
        for path, module in model.named_modules()
        if is_replaced(module)
        for adapter in module.get_submodule("modules_to_save")._modules
    }

    def stand_in(name: str) -> str:
        prefix = next((prefix for prefix in copies if name.startswith(prefix)), "")
        return copies.get(prefix, "") + name[len(prefix) :]

    return stand_in


def _planes(source: ModuleSource, found: list[Found]) -> tuple[dict[str, list[PlaneRows]], dict[str, str]]:
    """Return the rows of rotary planes, or why there are none, by the name of the parameter."""
    computed = {name: weight.note for name, weight in source.computed.items()}
    notes = computed | {name: known.note for name, known in source.known.items() if known.note}
    rows, reasons = plane_rows(found, notes)
    return rows, {
        place.parameter: f"{layer.name or 'the model'}, which {reasons[layer.name]}"
        for layer in found
        if layer.name in reasons
        for role, place in layer.places.items()
        if _ATTENTION_ROLE[role] == "query_key"
    }


def _not_decayed(source: ModuleSource, found: list[Found]) -> Iterator[Unhandled]:
    """Yield the matrices of attention that are computed, and of which no matrix is stored that a decay could act on."""
    for layer in found:
        for role, place in layer.places.items():
            if place.parameter in source.computed:
                note = source.computed[place.parameter].note
                reason = f"its {role} is {note}; it is read, and its stored tensors have the role 'other'"
                yield Unhandled(layer.name, reason)


class _Places:
    """Places of attention and embeddings in a model, from which the roles of other parameters follow."""

    def __init__(self, source: ModuleSource, found: list[Found]) -> None:
        self._source = source
        self._attention = {layer.module for layer in found}
        self._blocks = {block for module in self._attention if (block := self._block_of(module))}
        self._holds_attention = {path for module in self._attention for path in _ancestors(f"{module}.")}
        self._tables = {tuple(m.weight.shape) for m in source.model.modules() if isinstance(m, nn.Embedding)}

    def segment(self, parameter: nn.Parameter, known: ParameterInfo) -> Segment:
        """Return the role of a parameter outside attention."""
        if known.plain is None:
            role = "norm" if known.gain else "other"
            return Segment(role, WHOLE, known.note, fixed=known.fixed)
        role, why, stack = self._role(known.plain, parameter, known.holder)
        return Segment(role, WHOLE, why, known.note, stack)

    def _role(self, name: str, parameter: nn.Parameter, holder: nn.Module) -> tuple[str, str, bool]:
        owner, _, leaf = name.rpartition(".")
        module_name = owner.rpartition(".")[2]
        if leaf.isdigit():  # of a ParameterList, which has the name
            leaf = module_name
        kind = type_before_parametrizations(holder).__name__
        block = next((path for path in _ancestors(name) if path in self._blocks), None)
        shape = tuple(parameter.shape)
        vector = sum(n > 1 for n in shape) < 2 and not isinstance(holder, _MATRICES)
        in_module = leaf == "weight"  # the module's type says what its weight is; another parameter has a name
        if _ADAPTER.search(name) or (block and _ADAPTER_IN_BLOCK.search(name[len(block) :])):
            return "other", what_is(name), False
        if leaf.endswith("bias"):
            return "bias", "bias", False
        if _BIAS.fullmatch(leaf) or (isinstance(holder, nn.Embedding) and _BIAS.fullmatch(module_name)):
            return "bias", "bias table", False
        if isinstance(holder, _NORMS) or (vector and "norm" in kind.lower()):
            return "norm", f"gain of {kind}", False
        if _NORM_CLASS.search(kind) and _GAIN.fullmatch(leaf) and not isinstance(holder, _MATRICES):
            return "norm", f"gain of {kind}", False  # one per head, or of an image
        if isinstance(holder, (nn.Embedding, nn.EmbeddingBag)):
            return "embedding", "embedding table", False
        if in_module and parameter.ndim == 2 and _TABLE_CLASS.search(kind):
            return "embedding", f"embedding table of {kind}", False
        if not in_module and _NORM.fullmatch(leaf):
            return "norm", "gain, by its name", False
        if parameter.ndim < 2:
            return "other", f"vector of {kind}", False
        if not in_module and (_SCALE.fullmatch(leaf) or _STATE_SPACE.fullmatch(leaf)):
            return "other", f"{leaf}, no matrix by its name", False
        if not in_module and _EMBEDDING.search(leaf) and shape[-1] > 1:
            return "embedding", "named as an embedding", False
        if not in_module and leaf.endswith("_table"):
            return "other", f"{leaf}, no matrix by its name", False
        if vector:
            return "other", f"vector of {kind}", False
        return self._role_of_matrix(name, owner, shape, holder, block)

    def _role_of_matrix(
        self, name: str, owner: str, shape: tuple[int, ...], holder: nn.Module, block: str | None
    ) -> tuple[str, str, bool]:
        """Return the role of a matrix, a kernel or a stack of matrices."""
        module_name = owner.rpartition(".")[2]
        leaf = name.rpartition(".")[2]
        if self._embeds_patches(owner, block):
            return "embedding", "patch embedding", False
        if block is None:
            tails = (module_name, ".".join(owner.split(".")[-2:])) if leaf == "weight" else (leaf,)
            if any(_OUTPUT_EMBEDDING.fullmatch(tail) for tail in tails):
                return "embedding", "output embedding, by its name", False
            if shape in self._tables and any(_MAYBE_OUTPUT.fullmatch(tail) for tail in tails):
                return "embedding", "output embedding, by its name and shape", False
            if self._embeds(owner):
                return "embedding", "named as an embedding", False
            return "other", "outside the blocks with attention", False
        raw = leaf != "weight"
        if isinstance(holder, _ConvNd) and any(n > 1 for n in shape[2:]):
            return "other", f"kernel of {type_before_parametrizations(holder).__name__}", False
        if raw and owner in self._attention:
            return "other", "parameter of attention beside its projections", False
        matrices = len(shape) == 2 or isinstance(holder, _ConvNd)
        experts = shape[0] > 1 or "expert" in module_name or "expert" in leaf
        stack = len(shape) == 3 and not isinstance(holder, _ConvNd) and experts
        if matrices or stack:
            return "mlp", "matrix of a block with attention", stack
        return "other", f"no matrix, but a tensor of shape {shape}", False

    def _embeds(self, owner: str) -> bool:
        """Whether a module outside the blocks, or the one that holds it, is an embedding; never one with attention."""
        outer, _, module_name = owner.rpartition(".")
        if "embed" in module_name or _EMBEDDING_MODULE.fullmatch(module_name):
            return True
        if outer in self._holds_attention or not outer:
            return False
        kinds = [type(module).__name__ for module in self._source.modules(outer)]
        named = _EMBEDDING_MODULE.fullmatch(outer.rpartition(".")[2])
        return bool(named) or any(_EMBEDDING_CLASS.search(kind) for kind in kinds)

    def _embeds_patches(self, owner: str, block: str | None) -> bool:
        """Whether a module is part of a patch embedding: by its name, or by its type where it is not between stages."""
        for path in [*_ancestors(owner), owner]:
            if path in self._holds_attention:
                continue
            module_name = path.rpartition(".")[2]
            kinds = [type(module).__name__ for module in self._source.modules(path)]
            by_type = block is None and module_name != "downsample" and any("PatchEmbed" in kind for kind in kinds)
            if "patch_embed" in module_name or by_type:
                return True
        return False

    def _block_of(self, attention: str) -> str:
        """Return the transformer block of an attention module: its path up to a number, or its parent.

        The first number counts that is one of a list of blocks, and not a place in an ``nn.Sequential`` of modules
        that are all different.
        """
        for path in [*_ancestors(attention), attention]:
            owner, _, module_name = path.rpartition(".")
            if module_name.isdigit() and not self._one_of_a_kind(owner, module_name):
                return path
        return attention.rpartition(".")[0]

    def _one_of_a_kind(self, owner: str, module_name: str) -> bool:
        siblings = next((m for m in self._source.modules(owner) if isinstance(m, nn.Sequential)), None)
        if siblings is None or len(siblings) < 2 or module_name not in siblings._modules:
            return False
        return sum(type(module) is type(siblings._modules[module_name]) for module in siblings) == 1


def _ancestors(name: str) -> Iterator[str]:
    """Yield the paths of the modules around a name, from the outermost inwards, without the model itself."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        yield ".".join(parts[:i])


def _output_embedding(model: nn.Module) -> nn.Parameter | None:
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return None
    try:
        module = get()
    except (NotImplementedError, AttributeError):
        return None
    return getattr(module, "weight", None)
