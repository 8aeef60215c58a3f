"""Finds the attention of a live ``nn.Module``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rankdecay.attention.layer import AttentionLayer, MatrixView, Role
from rankdecay.attention.naming import KNOWN, ROTARY, AttentionNames, Found, Place, Unhandled, locate


def find_attention(model: nn.Module, names: AttentionNames | None = None) -> list[AttentionLayer]:
    """Returns the attention layers of a model, in the order of its parameters.

    Recognised by the names and shapes of parameters and by the numbers of heads that modules and configurations
    state (:mod:`rankdecay.attention.naming`), not by class; so a model wrapped by ``torch.compile``, DDP or PEFT is
    seen too, and cross-attention counts as a layer of its own. With a PEFT adapter the view reads the effective
    weight.

    Args:
        model: the model, or any part of it.
        names: how your own attention names its projections; it is then the only naming looked for.

    Returns:
        One :class:`~rankdecay.attention.AttentionLayer` per attention module.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
        ValueError: If no attention is found; the message lists what looked like it, and why it was not taken.

    Warns:
        UserWarning: If some modules look like attention and could not be read, with the reason.

    Example:
        >>> attention = nn.MultiheadAttention(64, num_heads=4)
        >>> [layer] = find_attention(attention)
        >>> layer.key.parameter_name, str(layer.key.window), layer.key.heads().shape
        ('in_proj_weight', 'rows[64:128]/192 by 16', torch.Size([4, 16, 64]))
    """
    found, unhandled = attention_of(model, names)
    if not found:
        raise ValueError(_nothing(model, names, unhandled))
    for module in unhandled:
        warnings.warn(f"{module.name or 'the model'} is not handled: {module.reason}.", stacklevel=2)
    return [_layer(model, layer) for layer in found]


def attention_of(model: nn.Module, names: AttentionNames | None = None) -> tuple[list[Found], list[Unhandled]]:
    """Returns where the attention of ``model`` is, by names, and what looks like attention and is not handled."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    shapes = {name: tuple(p.shape) for name, p in named_parameters(model).items()}
    return locate(shapes, _settings(model), KNOWN if names is None else [names])


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the model under every name it has: a tied parameter appears more than once."""
    return dict(model.named_parameters(remove_duplicate=False))


def _settings(model: nn.Module) -> Callable[[str, tuple[str, ...]], object]:
    modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    def setting(path: str, attributes: tuple[str, ...]) -> object:
        """The nearest value of any of the attributes: in the module, its configuration, then one level up."""
        while True:
            module = modules.get(path)
            for holder in (module, getattr(module, "config", None)):
                for attribute in attributes:
                    value = _plain(holder, attribute)
                    if value is not None:
                        return value
            if not path:
                return None
            path = path.rpartition(".")[0]

    return setting


def _plain(holder: object, attribute: str) -> object:
    """A number, string, flag or dictionary; never a submodule or a method that happens to have the name."""
    value = getattr(holder, attribute, None)
    if attribute in ROTARY and isinstance(value, nn.Module):
        return True  # the module that turns queries and keys is there
    return value if isinstance(value, (bool, int, float, str, dict)) else None


def _layer(model: nn.Module, found: Found) -> AttentionLayer:
    views = {role: _view(model, role, place) for role, place in found.places.items()}
    return AttentionLayer(
        found.name,
        views["query"],
        views["key"],
        views["value"],
        views.get("output"),
        found.head_dim,
        found.rotary,
        found.qk_norm,
    )


def _view(model: nn.Module, role: Role, place: Place) -> MatrixView:
    owner, _, leaf = place.parameter.rpartition(".")
    module = model.get_submodule(owner)
    adapted: Any = model.get_submodule(owner.rpartition(".")[0]) if owner.endswith("base_layer") else None

    def weight() -> Tensor:
        base: Tensor = getattr(module, leaf)
        if adapted is None or getattr(adapted, "merged", False) or getattr(adapted, "disable_adapters", False):
            return base
        active = [name for name in adapted.active_adapters if name in getattr(adapted, "lora_A", {})]
        return base + sum(adapted.get_delta_weight(name) for name in active)

    return MatrixView(role, place.parameter, place.window, weight, _bias(model, place))


def _bias(model: nn.Module, place: Place) -> Callable[[], Tensor] | None:
    if place.bias is None or place.bias_window is None:
        return None
    owner, _, leaf = place.bias.rpartition(".")
    module, window = model.get_submodule(owner), place.bias_window
    return lambda: window.vector(getattr(module, leaf))


def _nothing(model: nn.Module, names: AttentionNames | None, unhandled: list[Unhandled]) -> str:
    text = f"no attention was found in {type(model).__name__}"
    if names is not None:
        text += f" under the names {', '.join(map(repr, names.projections))}"
    if unhandled:
        return text + ". Not handled: " + "; ".join(f"{m.name or 'the model'}: {m.reason}" for m in unhandled[:4]) + "."
    parameters = named_parameters(model)
    flat = [name for name, p in parameters.items() if p.ndim == 1 and name.rpartition(".")[2].startswith("_flat_param")]
    if flat:
        return text + f": {flat[0]} is a flattened FSDP1 parameter; shard with FSDP2 (fully_shard) instead."
    matrices = [f"{name} {tuple(p.shape)}" for name, p in parameters.items() if p.ndim == 2]
    return (
        text
        + f". Its matrices are: {', '.join(matrices[:12]) or 'none'}{', …' if len(matrices) > 12 else ''}. Say which "
        "are the attention's with names=AttentionNames(query=..., key=..., value=..., output=..., num_heads=...)."
    )
