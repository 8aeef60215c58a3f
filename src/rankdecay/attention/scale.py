"""Whether scaling a matrix changes a loss, from its gradient by Euler's theorem: sums of g·w that cancel.

A sum is measured against the size it has when nothing makes it cancel, the root of the sum of its squared terms. Where
queries and keys are normalised, the loss does not depend on the scale of any head of W_Q or W_K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankdecay.attention.layer import AttentionLayer, MatrixView
from rankdecay.dtensor import whole
from rankdecay.linalg.backend import double

#: Smallest tolerance: what a norm's eps takes from its invariance, about eps / mean square of its input.
NORM_EPS = 1e-3


class Terms(NamedTuple):
    """Sums Σ g·w and Σ (g·w)², per head."""

    total: Tensor
    square: Tensor

    def grouped(self, groups: int) -> Terms:
        """Sum within each of ``groups`` runs of heads."""
        return Terms(*(value.unflatten(0, (groups, -1)).sum(1) for value in self))

    @staticmethod
    def of(products: Sequence[Tensor]) -> Terms:
        """Sum over the entries of g·w, each (heads, …)."""
        flat = [product.flatten(1) for product in products]
        return Terms(sum(t.sum(1) for t in flat), sum(t.square().sum(1) for t in flat))  # pyright: ignore


def cancels(terms: Terms) -> float:
    """Return the root mean square of the totals over what it would be if nothing cancelled: 0 if all terms cancel."""
    square = float(terms.square.sum())
    return math.sqrt(float(terms.total.square().sum()) / square) if square > 0 else math.inf


def settled(layers: Sequence[AttentionLayer], gradients: Mapping[str, Tensor]) -> list[AttentionLayer]:
    """Return the layers with ``qk_norm`` as the gradients tell it, where nothing had stated it.

    Args:
        layers: of a live model.
        gradients: of a loss, by the names of the parameters; a layer whose queries or keys have none stays unknown.
    """
    return [_settled(layer, gradients) if "qk_norm" in layer.unknown else layer for layer in layers]


def _settled(layer: AttentionLayer, gradients: Mapping[str, Tensor]) -> AttentionLayer:
    measured = [terms for view in (layer.query, layer.key) if (terms := _terms(view, gradients)) is not None]
    if not measured:
        return layer
    tolerance = max(NORM_EPS, 8 * torch.finfo(layer.query.weight().dtype).eps)
    of_heads = min(map(cancels, measured)) <= tolerance
    # A norm over all heads leaves one sum of each matrix, which may be small by chance: of both it is not.
    of_width = len(measured) == 2 and all(cancels(terms.grouped(1)) <= tolerance for terms in measured)
    return replace(layer, qk_norm=of_heads or of_width, unknown=layer.unknown - {"qk_norm"})


def _terms(view: MatrixView, gradients: Mapping[str, Tensor]) -> Terms | None:
    """Return the sums of g·w of the heads, bias included; None without a gradient."""
    gradient, bias = gradients.get(view.parameter_name), view.bias()
    if gradient is None or not gradient.isfinite().all() or not gradient.any():
        return None
    products = [double(view.window.heads(gradient)) * double(view.heads())]
    of_bias = gradients.get(view.bias_name) if view.bias_name else None
    if bias is not None and of_bias is not None and view.bias_window is not None:
        products.append((double(view.bias_window.vector(of_bias)) * double(bias)).view(view.num_heads, -1))
    return Terms.of(products)


def gradients_of(model: nn.Module, names: Sequence[str], example: Any) -> dict[str, Tensor]:
    """Return the gradients of some parameters after one forward and backward pass; nothing of the model is changed.

    Args:
        model: the model.
        names: of parameters.
        example: what the model is called with: a dictionary of arguments, a tuple, one argument; or a function of no
            arguments that returns a loss or an output of the model. Of an output that is no loss a random sum is taken.

    Raises:
        ValueError: If the model cannot be called with it, or returns nothing that depends on the parameters.
    """
    parameters = {
        name: parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name in names
    }
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad and _can_train(parameter)]
    for parameter in frozen:
        parameter.requires_grad_()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = list({p.device for p in parameters.values() if p.device.type == "cuda"})
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=devices):
            value = _as_number(_call(model, example))
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    except (TypeError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(
            f"the model cannot be run and differentiated on example={type(example).__name__}: {error}"
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.no_grad():  # running statistics, which a pass in training mode moves
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
    return {name: whole(g.detach()) for name, g in zip(parameters, found, strict=True) if g is not None}


def _can_train(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Tensor):
        return model(example)
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, Callable) and not isinstance(example, nn.Module):
        return example()
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _as_number(output: Any) -> Tensor:
    """Return the loss of an output, or a random sum over the first tensor in it, always the same."""
    loss = getattr(output, "loss", None)
    tensors = [loss] if isinstance(loss, Tensor) else list(_tensors(output))
    if not tensors:
        raise ValueError(f"the model returned {type(output).__name__} without a tensor of numbers on example=.")
    first = next((tensor for tensor in tensors if tensor.requires_grad), tensors[0])
    if first.numel() == 1:
        return first.reshape(())
    weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first.device)
    return (first * weights.to(first.dtype)).sum()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
