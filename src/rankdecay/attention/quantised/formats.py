"""The table of formats: how each is recognised, and what reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from rankdecay.attention.quantised.packed import (
    read_affine,
    read_bitsandbytes4,
    read_float4,
    read_gptq_or_awq,
    read_hqq,
    read_packed,
    read_ternary,
)
from rankdecay.attention.quantised.scales import (
    EXPONENTS,
    read_float_beside_scale,
    read_llm_int8,
    read_quanto,
    read_scaled,
)
from rankdecay.attention.quantised.stored import FLOAT, FLOAT8, Stored, Weight, plain

#: Tensors that describe codes, and integers that are no weights: masks, indices, positions.
_BESIDE = re.compile(
    r"(scales?|scale_inv|scale_\d|scb|zeros?|zero_points?|absmax|map|shape|state\w*|format|g_idx|biases)$"
)
_NO_WEIGHT = re.compile(r"(mask|bias|index|idxs?|ids|perm|positions?|table|tracked|steps?|buffer)", re.IGNORECASE)
#: A module, or the one that holds it, that is no projection of attention.
_ELSEWHERE = re.compile(
    r"(mlp|ffn|feed_?forward|moe|block_sparse_moe|fc_?\d|w[123]|(gate|up|down|gate_up)_proj|dense_h_to_4h|dense_4h_to_h"
    r"|embed\w*|word_embeddings|wte|wpe|lm_head|embed_out|router|classifier)"
)
_SCALES = ("weight_scale", "_scale_inv", ".scale_weight", "scaled_fp8")
_SCALED_FLOAT8 = ("", "fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark")


def left_alone(module: str) -> bool:
    """Whether a module is an expert, a feed-forward layer or an embedding: nothing reads its weights here."""
    return "expert" in module or any(_ELSEWHERE.fullmatch(part) for part in module.split(".")[-2:])


def weights_in(stored: Stored, taken: set[str]) -> Iterator[tuple[str, Weight]]:
    """Yield the quantised weights by name; ``taken`` are tensors already accounted for."""
    for name, dtype in stored.dtypes.items():
        owner, dot, leaf = name.rpartition(".")
        if name in taken or left_alone(owner):
            continue
        row = next((row for row in FORMATS if row.sign == leaf and row.fits(stored.at(name))), None)
        if row:
            weight, read = stored.at(owner if row.inside else f"{owner}{dot}weight"), row.read
        elif dtype not in FLOAT and _is_weight(stored, name):
            weight, read = stored.at(name), _codes
        else:
            continue
        found = read(weight)
        if found and plain(stored.settings.get("transform_config")).get("config_groups"):
            raise weight.refused("rotated weights (transform_config of compressed-tensors)")
        if found:
            yield weight.name, found._replace(format=_called(stored.method, row, dtype))


def _called(method: str, row: Format | None, dtype: torch.dtype) -> str:
    """Return what a format is called: by the configuration, by the tensor that identifies it, by the type of codes."""
    called = method or (row.called if row else "")
    codes = str(dtype).removeprefix("torch.")
    return f"{called} ({codes})" if called else f"{codes} codes"


def _is_weight(stored: Stored, name: str) -> bool:
    """Whether a tensor that is not of a floating type stands for a weight, and not for a mask or an index."""
    leaf, dtype = name.rpartition(".")[2].lower(), stored.dtypes[name]
    if len(stored.shapes[name]) < 2 or dtype == torch.bool or _BESIDE.search(leaf):
        return False
    if leaf.endswith("weight") or dtype in FLOAT8:
        return True
    alone = stored.at(name).find("weight", "weight_packed", "qweight", "W_q") is None
    return bool(stored.settings) and alone and dtype != torch.int64 and not _NO_WEIGHT.search(leaf)


def _codes(stored: Stored) -> Weight | None:
    """Read a weight whose codes have its own name, by their type and by the tensors beside them."""
    dtype = stored.dtypes[stored.name]
    scale = stored.find("_scale_inv", "_scale", "scale_weight", "scale")
    if len(stored.shapes[stored.name]) != 2 and (scale or dtype not in FLOAT8):
        raise stored.refused(f"codes of shape {stored.shapes[stored.name]}")
    if dtype in (torch.qint8, torch.quint8):
        return Weight(stored.shapes[stored.name], lambda: stored.load(stored.name).dequantize())
    if stored.find("pre_quant_scale", "act_pre_scale"):
        raise stored.refused("weights whose inputs are scaled (pre_quant_scale)")
    if stored.find(".absmax", "._data"):
        return None  # rows of their own
    if dtype == torch.uint32 and stored.find("biases", "qbiases"):
        return read_affine(stored)
    if stored.method == "bitnet" and scale and dtype in (torch.uint8, torch.int8):
        return read_ternary(stored, scale)
    if dtype == torch.int8 and stored.find("SCB"):
        return read_llm_int8(stored, stored.need("SCB"))
    if scale and dtype == torch.uint8 and (stored.find("_scale_2") or stored.dtypes[scale] in EXPONENTS):
        return read_float4(stored, stored.name, scale)
    if scale and dtype == torch.int8 and (stored.method in ("fp8", "mxfp4") or stored.dtypes[scale] in EXPONENTS):
        return read_float4(stored, stored.name, scale)
    if scale and dtype in FLOAT8 and stored.method in _SCALED_FLOAT8:
        return read_scaled(stored, scale)
    if scale and dtype == torch.int8 and stored.method in ("", "compressed-tensors"):
        return read_scaled(stored, scale)
    if dtype in FLOAT8 and not scale:
        if stored.settings or any(name.endswith(_SCALES) for name in stored.shapes):
            raise stored.wrong(f"it holds {str(dtype).removeprefix('torch.')} numbers without their scale")
        return Weight(stored.shapes[stored.name], lambda: stored.load(stored.name).float())
    raise stored.unknown()


class Format(NamedTuple):
    """Row of the table of formats: the tensor that identifies it, and how the weight is read.

    Attributes:
        sign: last part of the name of that tensor.
        read: what reads the weight, or says why it is not read.
        inside: whether the tensor's name continues that of the weight (``weight.absmax``), not of the module.
        beside: tensors that must lie beside it, where the name alone could be anything.
        codes: whether the tensor itself holds codes, which are of no floating type.
        called: what the format is called where no configuration says it.
    """

    sign: str
    read: Callable[[Stored], Weight | None]
    inside: bool = False
    beside: tuple[str, ...] = ()
    called: str = ""
    codes: bool = False

    def fits(self, stored: Stored) -> bool:
        holds = not self.codes or stored.dtypes[stored.name] not in FLOAT
        return holds and all(stored.find(part) for part in self.beside)


def _refuse(kind: str) -> Callable[[Stored], None]:
    def read(stored: Stored) -> None:
        raise stored.refused(kind)

    return read


#: Formats that are known by the name of a tensor; those known by the type of ``weight`` are in :func:`_codes`.
FORMATS: tuple[Format, ...] = (
    Format("absmax", read_bitsandbytes4, inside=True, called="bitsandbytes"),
    Format("_data", read_quanto, inside=True, called="quanto"),
    Format("qweight", read_gptq_or_awq, beside=("scales",), called="gptq or awq", codes=True),
    Format("qweight", _refuse("codes in a tensor named qweight"), codes=True),
    Format("weight_packed", read_packed, beside=("weight_scale",), called="compressed-tensors"),
    Format("weight_packed", _refuse("compressed-tensors' marlin-24")),
    Format("W_q", read_hqq, called="hqq"),
    Format("weight_scale", read_float_beside_scale),
    Format("weight_scale_inv", read_float_beside_scale),
    Format("codes", _refuse("AQLM"), beside=("codebooks",), codes=True),
    Format("indices", _refuse("VPTQ"), beside=("centroids.weight",), codes=True),
    Format("trellis", _refuse("EXL3"), codes=True),
    Format("q_weight", _refuse("EXL2"), codes=True),
    Format("Qidxs", _refuse("QuIP#"), codes=True),
    Format("dense_weights", _refuse("SpQR")),
    Format("B", _refuse("Marlin"), beside=("s",), codes=True),
    Format("dqweight", _refuse("FP-Quant"), codes=True),
    Format("weight_sf", _refuse("NVFP4 in the order of its kernel")),
    Format("bitmask", _refuse("compressed-tensors' sparse format")),
    Format("_weight_qdata", _refuse("torchao, whose description is missing from the header of the file")),
)
