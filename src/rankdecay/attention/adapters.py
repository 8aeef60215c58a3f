"""Effective weights of layers that a PEFT model has wrapped.

PEFT knows how each of its tuners changes a weight: by its ``merge``, which :func:`merged` calls on a copy of the one
layer. PEFT itself is not imported: a wrapped layer is known by its ``base_layer``, and a module that is trained
beside the adapters by its ``modules_to_save``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from rankdecay.attention.computed import compute, computed_weights, detached_copy

#: Names of the factors of adapters.
_FACTOR = re.compile(r"lora|dora|hada|lokr|ia3_|adapter", re.IGNORECASE)
#: Names of the two of which the product is added to a weight.
_OF_PRODUCT = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")
_FLOAT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer that an adapter has wrapped."""
    return "base_layer" in module._modules and (hasattr(module, "active_adapters") or bool(factors(module)))


def factors(module: nn.Module) -> list[str]:
    """Return the names of the parameters and submodules that are named like the factors of an adapter."""
    return [name for name in (*module._parameters.keys(), *module._modules.keys()) if is_factor(name)]


def is_factor(name: str) -> bool:
    """Whether a module or parameter is called as the factors of adapters are."""
    return bool(_FACTOR.match(name))


def what_is(name: str, beside: Container[str] = ()) -> str:
    """Return what a parameter of an adapter is, for a reader.

    Args:
        name: of the parameter, or its part from the adapter's on.
        beside: names of the other parts of its adapter.
    """
    if _OF_PRODUCT.search(name) and "lora_E" not in beside:  # a third factor, of AdaLoRA
        return "factor of an adapter: L2 on both is a nuclear norm on their product"
    return "part of an adapter"


def check_plain(module: nn.Module, path: str) -> None:
    """Check that nothing adds to a module's weight in its forward pass.

    Raises:
        ValueError: If the module has factors of an adapter of its own, as loralib's and torchtune's layers have.
    """
    if (own := factors(module)) and not getattr(module, "merged", False):
        raise ValueError(
            f"{path or 'the module'} ({type(module).__name__}) adds {' and '.join(own)} to its weight in a way that "
            "is not known here; merge them into the weight first, or use PEFT, whose adapters are read."
        )


def is_replaced(module: nn.Module) -> bool:
    """Whether a module is trained whole beside the adapters; PEFT then keeps the original as well."""
    return "original_module" in module._modules and "modules_to_save" in module._modules


def in_use(replaced: Any) -> str:
    """Return which part of a module that exists twice is in use now, by its path in it."""
    active = [name for name in replaced.active_adapters if name in replaced.modules_to_save]
    return "original_module" if replaced.disable_adapters or not active else f"modules_to_save.{active[0]}"


def merged(adapted: Any, path: str) -> nn.Module:
    """Return the base layer with its active adapters merged: a copy, or the layer itself if there is nothing to merge.

    Args:
        adapted: the wrapped layer.
        path: of the layer, for messages.

    Raises:
        ValueError: If the adapter has no weight that it could be merged into.
    """
    if not hasattr(adapted, "active_adapters"):
        check_plain(adapted, path)  # somebody's own wrapper
        return adapted.base_layer
    if adapted.disable_adapters != adapted.merged:
        return adapted.base_layer
    tuner = type(adapted).__module__.split(".")[2] if "peft.tuners." in type(adapted).__module__ else "an adapter"
    mixed = getattr(vars(adapted).get("forward"), "__self__", None)
    if type(mixed).__module__.startswith("peft.tuners.xlora"):
        raise ValueError(f"{path} does not have a single weight: X-LoRA mixes its adapters anew for each input.")
    base: Any = adapted.get_base_layer()
    copied = detached_copy(adapted, changed=adapted.base_layer)
    _write_computed(base, copied.get_base_layer())
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copied.unmerge() if adapted.merged else copied.merge()
    except Exception as reason:  # each tuner raises its own
        message = str(reason) or "it cannot be merged"
        raise ValueError(f"{path} has no weight with its adapter {tuner} merged: {message.rstrip('.')}.") from reason
    return copied.base_layer


def added(adapted: Any, path: str, base: Tensor) -> Tensor:
    """Return the weight of an adapted layer whose stored base is quantised, from the base that it stands for.

    Args:
        adapted: the wrapped layer.
        path: of the layer, for messages.
        base: the dequantised weight.

    Raises:
        ValueError: If the adapter is more than a sum with the weight.
    """
    if not hasattr(adapted, "active_adapters"):
        check_plain(adapted, path)
        return base
    if adapted.disable_adapters or adapted.merged:
        return base
    names = [name for name in adapted.active_adapters if name in getattr(adapted, "lora_A", {})]
    plain_lora = hasattr(adapted, "lora_A") and not any(name in adapted.lora_variant for name in names)
    if not plain_lora:
        raise ValueError(
            f"{path} has an adapter ({type(adapted).__name__} of {type(adapted).__module__}) on a quantised weight, "
            "and only that of plain LoRA can be added to it; load the base in 16 or 32 bits to read it."
        )
    with torch.no_grad():
        return base + sum(adapted.get_delta_weight(name).detach().to(base.dtype) for name in names)


def is_quantised(base: nn.Module, leaf: str) -> bool:
    """Whether the weight of a base layer is stored as anything but floating-point numbers of 16 bits or more."""
    tensor = base._parameters.get(leaf)
    if tensor is None:
        return not (leaf in computed_weights(base) or any(name.startswith(leaf + "_") for name in base._parameters))
    kind = type(tensor).__name__
    return tensor.dtype not in _FLOAT or kind not in ("Parameter", "Tensor", "DTensor")


def _write_computed(base: nn.Module, copied: nn.Module) -> None:
    """Make weights that the base computes plain parameters of its copy, which an adapter can be merged into."""
    weights = computed_weights(base)
    if "parametrizations" in copied._modules:
        # Not by torch's remove_parametrizations, which changes the class that the copy shares with the original.
        del copied._modules["parametrizations"]
        copied.__class__ = type_before_parametrizations(base)
    for leaf in weights:
        vars(copied).pop(leaf, None)
        copied.register_parameter(leaf, nn.Parameter(compute(base, leaf), requires_grad=False))
