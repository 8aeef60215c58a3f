"""Whether a module's own forward pass uses the matrices that were found as they were found, without knowing its code.

Scores are a product, so a query head scaled by c and its key head by 1/c leave what the module returns as it is; so do
a value head and its columns of the output. Either fails if a head's lines lie elsewhere, if the layout is another, or
if the matrices have each other's roles: then scores, or values, change by a factor that nothing undoes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankdecay.attention import AttentionLayer, MatrixView

_FACTOR = 1.7


def randomise(model: nn.Module) -> nn.Module:
    """Give every weight a size that tells heads apart; norms and the statistics of batches stay as they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias") and "norm" not in name and "bn" not in name:
                parameter.normal_(std=0.1, generator=generator)
    model.eval()  # which in some of timm's classes returns None
    return model


@torch.no_grad()
def contradictions(
    model: nn.Module, layer: AttentionLayer, forward: Callable[[], object], *, bent: bool = False
) -> list[str]:
    """Return what the model's output says against the matrices of one layer; nothing if all is well.

    Args:
        model: the model.
        layer: one of its layers.
        forward: runs it on the same input each time.
        bent: whether an activation stands between values and output, so that a factor does not pass.
    """

    def result() -> Tensor:
        return _flat(forward())

    wrong = []
    usual = result()
    for head in range(layer.num_heads):
        group = layer.key_head(head)
        queries = [h for h in range(layer.num_heads) if layer.key_head(h) == group]
        pairs: list[tuple[str, MatrixView, list[int], MatrixView | None, list[int]]] = []
        if layer.no_product and not layer.no_product.endswith("over the batch"):
            pass  # no product to test; in eval mode, and with statistics as at the start, a norm over the batch is none
        elif layer.qk_norm:
            pairs += [("query", layer.query, [head], None, []), ("key", layer.key, [group], None, [])]
        else:
            pairs.append(("query and key", layer.query, queries, layer.key, [group]))
        if layer.output is not None and not bent:
            pairs.append(("value and output", layer.value, [group], layer.output, queries))
        for what, first, heads, second, others in pairs:
            with _scaled(model, first, heads, _FACTOR):
                alone = result()
                if second is None:
                    changed = alone
                else:
                    with _scaled(model, second, others, 1 / _FACTOR):
                        changed = result()
            effect = float((alone - usual).norm())
            left = float((changed - usual).norm())
            if second is not None and effect < 1e-4 * float(usual.norm()):
                wrong.append(f"{what} of head {head} have no effect")
            if left > 1e-3 * (float(usual.norm()) if second is None else effect):
                wrong.append(f"{what} of head {head}: {left:.2g} left of {effect:.2g}, in {float(usual.norm()):.2g}")
    return wrong


@contextmanager
def _scaled(model: nn.Module, view: MatrixView, heads: Sequence[int], factor: float) -> Iterator[None]:
    """Multiply heads of a matrix, with their biases unless it is an output, in place."""
    changed: list[tuple[Tensor, Tensor]] = []
    parameters: dict[str, Any] = dict(model.named_parameters())
    weight = parameters[view.parameter_name]
    changed.append((weight, weight.detach().clone()))
    scaled = view.window.heads(weight.data).clone()
    scaled[list(heads)] *= factor
    view.window.write(weight.data, scaled)
    if view.window.lines == "rows" and view.bias_name and view.bias_window:
        bias = parameters[view.bias_name]
        changed.append((bias, bias.detach().clone()))
        column, window = bias.data.unsqueeze(-1), view.bias_window
        lines = window.heads(column).reshape(view.num_heads, -1, 1).clone()
        lines[list(heads)] *= factor
        window.write(column, lines.reshape(window.heads(column).shape))
    try:
        yield
    finally:
        for parameter, before in changed:
            parameter.data.copy_(before)


def _flat(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output.flatten()
    assert isinstance(output, (tuple, list))
    return torch.cat([part.flatten() for part in output if isinstance(part, Tensor)])


@torch.no_grad()
def planes_turned(model: nn.Module, layer: AttentionLayer, forward: Callable[[], object]) -> bool:
    """Whether queries and keys can be turned together in the layer's rotary planes, which commutes with positions."""
    assert layer.rotary is not None
    dims = layer.rotary.dims
    index = torch.arange(dims).view(-1, 2) if layer.rotary.interleaved else torch.arange(dims).view(2, -1).T
    usual = _flat(forward())
    parameters = dict(model.named_parameters())
    for view in (layer.query, layer.key):
        weight = parameters[view.parameter_name]
        heads = view.window.heads(weight.data).clone()
        for plane, (i, j) in enumerate(index.tolist()):
            angle = torch.tensor(0.3 + plane)
            first, second = heads[:, i].clone(), heads[:, j].clone()
            heads[:, i] = angle.cos() * first - angle.sin() * second
            heads[:, j] = angle.sin() * first + angle.cos() * second
        view.window.write(weight.data, heads)
    return bool(torch.allclose(_flat(forward()), usual, atol=1e-4))
