"""What a model itself computes in an attention layer, against the matrices that were found.

The score product and the mixing of values are caught below the model's own code, as the `bmm` that any attention ends
in. Nothing here knows how a family stores its matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankdecay.attention import AttentionLayer

_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


class Products(TorchDispatchMode):
    """Batched products (left, right, result) in the order of execution, while ``open``."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.open and func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            left, right = args[-2:]
            self.open[-1].append((left, right, out))
        return out


@contextmanager
def watched(model: nn.Module, layers: list[AttentionLayer]) -> Iterator[dict[str, list]]:
    """Collects, per attention layer, the products inside it; per module, its first input and its output."""
    seen: dict[str, list] = {}
    products = Products()
    handles = []

    def note_module(name: str) -> Callable[..., None]:
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))
            seen[name] = [given, output[0] if isinstance(output, tuple) else output]

        return hook

    for layer in layers:
        attention = model.get_submodule(layer.name)
        record: list[tuple[Tensor, Tensor, Tensor]] = seen.setdefault(f"products of {layer.name}", [])
        handles.append(attention.register_forward_pre_hook(lambda *_, record=record: products.open.append(record)))
        handles.append(attention.register_forward_hook(lambda *_: products.open.pop() and None))
        handles.append(attention.register_forward_hook(note_module(layer.name), with_kwargs=True))
        for view in layer.views:
            owner = _owner(view.parameter_name)
            handles.append(model.get_submodule(owner).register_forward_hook(note_module(owner), with_kwargs=True))
    try:
        with products, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _owner(parameter: str) -> str:
    """The module that applies the parameter; with an adapter, the wrapper."""
    return parameter.rpartition(".")[0].removesuffix(".base_layer")


def check_model(model: nn.Module, layers: list[AttentionLayer], forward: Callable[[], object]) -> None:
    for module in list(model.modules()):
        for name in _NORMS:
            if isinstance(getattr(module, name, None), nn.Module):
                setattr(module, name, nn.Identity())
    with watched(model, layers) as seen:
        forward()
    for layer in layers:
        check_layer(layer, seen)


def check_layer(layer: AttentionLayer, seen: dict[str, list]) -> None:
    heads, shared = layer.num_heads, layer.num_heads // layer.num_key_value_heads
    scores, mixing = [p for p in seen[f"products of {layer.name}"] if p[0].shape[0] % heads == 0][-2:]
    query, key, value, context = scores[0], scores[1].mT, mixing[1], mixing[2]
    for view, formed, repeats in ((layer.query, query, 1), (layer.key, key, shared), (layer.value, value, shared)):
        x = (seen.get(_owner(view.parameter_name)) or seen[layer.name])[0]  # (batch, tokens, in)
        expected = torch.einsum("bti,hdi->bhtd", x, view.heads())
        bias = view.bias()
        if bias is not None:
            expected += bias.reshape(view.num_heads, 1, -1)
        expected = expected.repeat_interleave(repeats, 1)
        actual = formed.reshape(expected.shape)
        scale = float(actual.norm() / expected.norm())  # some fold the softmax's 1/√d, or half of it, into the query
        steps = [layer.head_dim**-power for power in (0, 0.25, 0.5)]
        assert min(abs(scale / step - 1) for step in steps) < 1e-4, (layer.name, view.role, scale)
        torch.testing.assert_close(actual, scale * expected, atol=1e-5, rtol=1e-4)
    if layer.output is None:
        return
    context = context.reshape(-1, heads, *context.shape[1:])  # (batch, heads, tokens, d)
    expected = torch.einsum("bhtd,hod->bto", context, layer.output.heads())
    bias = layer.output.bias()
    expected = expected if bias is None else expected + bias
    actual = (seen.get(_owner(layer.output.parameter_name)) or seen[layer.name])[1]
    torch.testing.assert_close(actual.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4)
