"""What a model's attention does when one head of one matrix is changed, through the windows that were found.

Nothing here knows how a family stores or forms its queries and keys. Attention weights are caught below the model's own
code, as the softmax inside the module. A head of W_Q changes the weights of its own head alone, one of W_K those of the
heads that meet it; and without a head of W_V the model gives what it gives without the columns of W_O that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankdecay as rd
from rankdecay.attention import AttentionLayer, MatrixView

#: Roles that form scores: of one query head, or of all that meet a key head.
_QUERIES = ("query", "query_rotary", "query_position", "query_sine")
_KEYS = ("key", "key_rotary", "key_position")


class Softmaxes(TorchDispatchMode):
    """Results of softmax while ``seen`` is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.seen is not None and func is torch.ops.aten._softmax.default:
            self.seen.append(out)
        return out


def prepared(model: nn.Module, gain: float = 1.5) -> nn.Module:
    """The model with weights that tell heads apart, and without biases or dropout."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=gain * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.zero_()
    return model.eval()


def check_heads(model: nn.Module, run: Callable[[], object]) -> list[AttentionLayer]:
    """Check every head of every layer of a prepared model that takes one example at a time."""
    layers = rd.find_attention(model)
    with torch.no_grad():
        for layer in layers:
            with _without_outputs_of_others(model, layer, layers):
                _check_scores(model, layer, run)
                if layer.output is not None:
                    _check_mixing(model, layer, run)
    return layers


@contextmanager
def _without_outputs_of_others(model: nn.Module, layer: AttentionLayer, layers: list[AttentionLayer]) -> Iterator[None]:
    """Silence the other layers that have the same keys or values, so that a change reaches this layer alone."""
    mine = {view.parameter_name for view in (layer.key, layer.value)}
    kept: list[tuple[Tensor, Tensor]] = []
    for other in layers:
        shared = other.name.partition(":")[0] != layer.name.partition(":")[0] and other.output is not None
        if shared and mine & {view.parameter_name for view in (other.key, other.value)}:
            output = model.get_parameter(other.output.parameter_name)
            kept.append((output, output.clone()))
            output.zero_()
    try:
        yield
    finally:
        for output, value in kept:
            output.copy_(value)


@contextmanager
def changed(model: nn.Module, view: MatrixView, heads: list[int], how: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change some heads of a matrix, through its window."""
    parameter = model.get_parameter(view.parameter_name)
    before = parameter.clone()
    value = view.window.heads(parameter).clone()
    value[heads] = how(value[heads])
    view.window.write(parameter, value)
    try:
        yield
    finally:
        parameter.copy_(before)


def _check_scores(model: nn.Module, layer: AttentionLayer, run: Callable[[], object]) -> None:
    before = _weights(model, layer, run)
    assert before, f"{layer.name} has no softmax of {layer.num_heads} heads"
    for view in layer.views:
        if view.role not in (*_QUERIES, *_KEYS):
            continue
        for head in range(view.num_heads):
            with changed(model, view, [head], lambda weight: weight.roll(1, -1)):
                after = _weights(model, layer, run)
            for one, other in zip(before, after, strict=True):
                moved = {
                    i
                    for i in range(len(one))
                    if not torch.allclose(one[i], other[i], rtol=0, atol=100 * torch.finfo(one.dtype).eps)
                }
                expected = _meeting(layer, view, head, len(one))
                some_only = view.role in _QUERIES and len(one) != layer.num_heads  # an expert has not all the tokens
                assert moved <= expected if some_only else moved == expected, (layer.name, view.role, head)


def _meeting(layer: AttentionLayer, view: MatrixView, head: int, slots: int) -> set[int]:
    """The slots of the softmax that a head takes part in; fewer than heads where tokens choose among experts."""
    if view.role in _QUERIES and slots == layer.num_heads:
        return {head}
    if view.num_heads == 1:
        return set(range(slots))
    key_head = layer.key_head(head) if view.role in _QUERIES else head
    return {slot for slot in range(slots) if layer.key_head(slot) == key_head}


def _check_mixing(model: nn.Module, layer: AttentionLayer, run: Callable[[], object]) -> None:
    assert layer.output is not None
    whole = _numbers(run())
    for head in range(layer.value.num_heads):
        readers = [i for i in range(layer.num_heads) if layer.key_head(i) == head]
        with changed(model, layer.value, [head], torch.zeros_like):
            without_value = _numbers(run())
        with changed(model, layer.output, readers, torch.zeros_like):
            without_output = _numbers(run())
        scale = float(whole.abs().max())
        assert not torch.allclose(without_value, whole, atol=1e-3 * scale), (layer.name, head)
        torch.testing.assert_close(without_value, without_output, atol=1e-4 * scale, rtol=1e-3)


def _weights(model: nn.Module, layer: AttentionLayer, run: Callable[[], object]) -> list[Tensor]:
    """The attention weights inside a layer, (heads, queries, keys) of each softmax."""
    module, mode = model.get_submodule(layer.name.partition(":")[0]), Softmaxes()
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: setattr(mode, "seen", seen)),
        module.register_forward_hook(lambda *_: setattr(mode, "seen", None)),
    ]
    try:
        with mode, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            run()
    finally:
        for handle in handles:
            handle.remove()
    weights = [weight.reshape(-1, *weight.shape[-2:]) for weight in seen]
    slots = {layer.num_heads, layer.num_key_value_heads * 2}  # of JetMoE, two experts a token
    return [weight for weight in weights if len(weight) in slots and weight.shape[-1] > 1]


def _numbers(output: object) -> Tensor:
    """All numbers of an output in one vector, but attention weights."""
    if isinstance(output, Tensor):
        return output.flatten()
    parts = list(output.values()) if isinstance(output, Mapping) else list(output) if isinstance(output, tuple) else []
    return torch.cat([torch.zeros(0), *(_numbers(part) for part in parts)])
