"""Quantised weights of live modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankdecay.attention.quantised.formats import left_alone, weights_in
from rankdecay.attention.quantised.stored import FLOAT, REMEDY, Refused, Stored, Weight, plain, settings_in
from rankdecay.attention.quantised.subclasses import dequantize, own_dequantize
from rankdecay.attention.tensors import Shape
from rankdecay.dtensor import whole


def live_weights(model: nn.Module) -> dict[str, Weight]:
    """Return the quantised weights of a live model by name, as if they were parameters: ``…q_proj.weight``.

    A weight in a format that is not read has the shape that its module states, and raises when it is read: an adapter
    on top of it can be trained without its values.

    Raises:
        ValueError: If a weight is in a format that is not read, and its module does not state its shape.
    """
    settings = settings_in(plain(getattr(model, "config", None)))
    found: dict[str, Weight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if left_alone(path):
            continue
        for leaf, weight in _of_module(module, path, settings):
            called = weight.format or type(getattr(module, leaf, module)).__name__
            found[f"{path}.{leaf}" if path else leaf] = weight._replace(format=called)
    return found


def _of_module(module: nn.Module, path: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Yield the quantised weights of a module itself, by the name each would have as a parameter."""
    name = f"{path}.weight" if path else "weight"
    if type(module).__module__.startswith("torch.ao.nn.quantized") and callable(getattr(module, "weight", None)):
        unpacked: Any = module
        shape = unpacked.out_features, unpacked.in_features
        called = f"{type(module).__name__} ({str(unpacked.weight().dtype).removeprefix('torch.')})"
        yield "weight", Weight(shape, lambda: unpacked.weight().dequantize(), format=called)
        return
    tensors = {leaf: t for leaf, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in tensors.items()}
    dtypes = {leaf: tensor.dtype for leaf, tensor in tensors.items()}

    def load(leaf: str) -> Tensor:
        return whole(getattr(module, leaf)).detach().cpu()

    stored = Stored("", shapes, dtypes, load, _module_settings(module, settings))
    weights = {leaf: _of_tensor(module, leaf, tensors[leaf], f"{path}.{leaf}" if path else leaf) for leaf in tensors}
    if any(weights.values()):
        yield from ((leaf, weight) for leaf, weight in weights.items() if weight)
        return
    packs = "qweight" in tensors and dtypes["qweight"] not in FLOAT
    if packs and callable(getattr(module, "dequantize_weight", None)):
        packed: Any = module  # GPTQModel's kernels reorder the codes, and give them back by this
        yield "weight", Weight(_stated_shape(module, name), lambda: packed.dequantize_weight().detach().t())
        return
    if "W_q" in tensors and callable(getattr(module, "dequantize", None)):
        hqq: Any = module
        yield "weight", Weight(tuple(hqq.meta["shape"]), lambda: hqq.dequantize().detach())
        return
    if packs and type(module).__name__ != "WQLinear_GEMM":
        yield "weight", _lazily(module, name, f"{name} is quantised as {type(module).__name__}, which is not read")
        return
    try:
        for leaf, weight in list(weights_in(stored, set())):
            yield leaf, weight._replace(read=_named(weight.read, path))
    except Refused as reason:
        yield "weight", _lazily(module, name, f"{path}.{reason}" if path else str(reason))


def _of_tensor(module: nn.Module, leaf: str, tensor: Tensor, name: str) -> Weight | None:
    """Return a weight whose tensor can dequantise itself: of torchao, quanto or bitsandbytes."""
    kind = type(tensor).__name__

    def now() -> Any:
        return getattr(module, leaf)

    if kind == "Params4bit" and getattr(tensor, "quant_state", None) is not None:
        state: Any = tensor
        return Weight(tuple(state.quant_state.shape), lambda: _dequantize_4bit(now(), name))
    if kind == "Int8Params" and tensor.dtype == torch.int8:

        def read() -> Tensor:
            statistics = getattr(now(), "SCB", None)
            if statistics is None:
                statistics = getattr(getattr(module, "state", None), "SCB", None)
            if statistics is None:
                raise ValueError(f"{name} holds int8 codes of bitsandbytes without their SCB; load the model again.")
            return now().detach().float() * (statistics.float().view(-1, 1) / 127)

        return Weight(tuple(tensor.shape), read)
    if own_dequantize(tensor) or type(tensor).__module__.startswith("torchao"):
        stored = Stored(name, {}, {}, lambda _: tensor, {})

        def unpack() -> Tensor:
            try:
                return dequantize(now().detach(), stored)
            except Refused as reason:
                raise ValueError(str(reason)) from None

        return Weight(tuple(tensor.shape), unpack)
    return None


def _dequantize_4bit(weight: Any, name: str) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name} was reordered for bitsandbytes' CPU kernel by the first forward pass; "
            "look at the model before it, or at its checkpoint."
        )
    return dequantize_4bit(weight.data, weight.quant_state)


def _module_settings(module: nn.Module, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a module itself says of its quantisation, else what the model's configuration says."""
    own: Any = module
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and getattr(scheme, "weights", None) is not None:
        groups = {"own": {"weights": scheme.weights.model_dump(mode="json")}}
        return {"quant_method": "compressed-tensors", "config_groups": groups}
    match type(module).__name__:
        case "BitLinear":
            return {"quant_method": "bitnet", "linear_class": "bitlinear"}
        case "AutoBitLinear":
            return {"quant_method": "bitnet", "linear_class": "autobitlinear"}
        case "FP8Linear":
            return {"quant_method": "fp8", "weight_block_size": getattr(own, "block_size", None)}
        case "MetalLinear":
            return {"quant_method": "metal", "group_size": own.group_size, "bits": own.bits}
        case "WQLinear_GEMM":
            return {"quant_method": "awq", "group_size": own.group_size, "bits": own.w_bit}
        case _:
            return settings


def _stated_shape(module: nn.Module, name: str) -> Shape:
    """Return the shape that a linear layer states, or that of a weight of ordinary numbers."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in FLOAT:
        return tuple(weight.shape)
    shape = tuple(getattr(module, side, None) for side in ("out_features", "in_features"))
    if not all(isinstance(n, int) for n in shape):
        raise ValueError(f"{name} is quantised as {type(module).__name__}, which is not read; {REMEDY}.")
    return shape  # pyright: ignore[reportReturnType]


def _lazily(module: nn.Module, name: str, reason: str) -> Weight:
    """Return a weight that is refused when it is read."""

    def read() -> Tensor:
        raise ValueError(f"{reason}{'' if reason.endswith('.') else f'; {REMEDY}.'}")

    return Weight(_stated_shape(module, name), read)


def _named(read: Callable[[], Tensor], path: str) -> Callable[[], Tensor]:
    """Return the reader, whose errors name the module."""

    def named() -> Tensor:
        try:
            return read()
        except Refused as reason:
            raise ValueError(f"{path}.{reason}" if path else str(reason)) from None

    return named
