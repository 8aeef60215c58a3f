"""Which modules of a model look like attention, judged without the library's tables; and what is known not to be read.

:func:`look_alikes` is generous: it takes a module for attention by the names of its children, or by its class.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

_QUERY = re.compile(
    r"(.*_)?(q|wq|query|queries)(_.*)?|(to|w|linear|project|projection|att|attn)_?(q|query|queries).*|.*_q"
)
_KEY = re.compile(r"(.*_)?(k|wk|kv|key|keys)(_.*)?|(to|w|linear|project|projection|att|attn)_?(k|key|keys|kv).*|.*_kv?")
_FUSED = re.compile(
    r".*qkv.*|c_attn|in_proj_weight|query_key_value|queries_keys_values|att_proj|.*_qk|qk_.*|query_key|w_?pack", re.I
)
_NONE = re.compile(r".*(norm|ln|rope|rotary|bias|scale|embed|embedding|embeddings|gate|tokens?|dropout|pos)_?.*")
_CLASS = re.compile(r".*(Attention|Attn)$")

#: Modules of the sweep that hold projections and are not read, by class: what is said of them.
NAMED: dict[str, str] = {
    "GatedDeltaNet": "recurrent state", "DeltaAttention": "recurrent state", "TextLinearAttention": "recurrent state",
    "LightningAttention": "lightning attention", "xLSTMLayer": "mLSTM", "Indexer": "an indexer",
    "QSAIndexer": "an indexer", "DeformableAttention": "deformable attention",
    "EfficientAdditiveAttention": "additive attention", "LSHSelfAttention": "hashing",
    "AutoformerAttention": "autocorrelation", "CCAProjection": "convolutions stand between",
    "SqueezeBertSelfAttention": "grouped convolution", "DiffLlamaAttention": "differential attention",
    "MobileViTV2LinearSelfAttention": "linear attention",
    "AriaCrossAttention": "multihead_attn", "AXK2Attention": "latent attention",
    "Compressor": "in an unknown order", "V4Indexer": "in an unknown order",
    "GlobalPointer": "not recognised", "AttentionPoolingHead": "without a projection to queries",
}  # fmt: skip
#: Classes that sound like attention and hold no projections of queries and keys of their own.
NO_PROJECTIONS = (
    "RwkvSelfAttention",  # receptance, key and value, without queries
    "ZayaAttention",  # its projections are a module of their own, which is named
    "MgpstrA3Module", "PatchTSMixerGatedAttention",
)  # fmt: skip


def look_alikes(model: nn.Module) -> dict[str, str]:
    """The modules that look like attention, by path: their class."""
    return {path: type(module).__name__ for path, module in model.named_modules() if _looks(module)}


def _looks(module: nn.Module) -> bool:
    names = [name for name in _matrices(module) if not _NONE.fullmatch(name)]
    both = any(map(_QUERY.fullmatch, names)) and any(map(_KEY.fullmatch, names))
    return both or any(map(_FUSED.fullmatch, names)) or bool(_CLASS.fullmatch(type(module).__name__) and len(names) > 2)


def _matrices(module: nn.Module) -> list[str]:
    """The children that hold a matrix, perhaps in a wrapper of their own."""
    found = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim >= 2]
    for name, child in module.named_children():
        if isinstance(child, nn.Embedding):
            continue
        inner = [child, *(getattr(child, part, None) for part in ("linear", "conv", "projection"))]
        weights = (getattr(part, "weight", None) for part in inner)
        if any(isinstance(weight, Tensor) and weight.ndim >= 2 for weight in weights):
            found.append(name)
    return found
