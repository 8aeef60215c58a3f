"""Whether a module's own forward pass uses the matrices that were found as they were found, without knowing its code.

Scores are a product, so a query head scaled by c and its key head by 1/c leave what the module returns as it is; so do
a value head and its columns of the output. Either fails if a head's lines lie elsewhere, if the layout is another, or
if the matrices have each other's roles: then scores, or values, change by a factor that nothing undoes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    return model.eval()


@torch.no_grad()
def calls(model: nn.Module, modules: Sequence[str], forward: Callable[[], object]) -> dict[str, tuple[tuple, dict]]:
    """Return what each module is called with in one forward pass, first call."""
    seen: dict[str, tuple[tuple, dict]] = {}
    handles = []
    for name in modules:

        def note(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            seen.setdefault(name, (args, kwargs))

        handles.append(model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def wrong_roles(model: nn.Module, layer: AttentionLayer, module: str, call: tuple[tuple, dict]) -> list[str]:
    """Return what the module's output says against the matrices of one layer; nothing if all is well.

    Args:
        model: the model.
        layer: one of its layers.
        module: path of the module that was called, which holds the layer's matrices.
        call: what it is called with.
    """

    def result() -> Tensor:
        return _flat(model.get_submodule(module)(*call[0], **call[1]))

    wrong = []
    usual = result()
    for head in range(layer.num_heads):
        group = layer.key_head(head)
        queries = [h for h in range(layer.num_heads) if layer.key_head(h) == group]
        pairs: list[tuple[str, MatrixView, list[int], MatrixView | None, list[int]]] = []
        if layer.qk_norm:
            pairs += [("query", layer.query, [head], None, []), ("key", layer.key, [group], None, [])]
        else:
            pairs.append(("query and key", layer.query, queries, layer.key, [group]))
        if layer.output is not None:
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
def _scaled(model: nn.Module, view: MatrixView, heads: Sequence[int], factor: float):
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
    return torch.cat([_flat(part) for part in output if isinstance(part, (Tensor, tuple, list))])
