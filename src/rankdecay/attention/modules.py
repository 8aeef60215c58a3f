"""The parameters and settings of a live ``nn.Module``, as :mod:`rankdecay.attention.naming` asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from rankdecay.attention.naming import KNOWN, ROTARY, AttentionNames, Found, Unhandled, locate
from rankdecay.dtensor import whole


def attention_of(model: nn.Module, rows: Iterable[AttentionNames] = KNOWN) -> tuple[list[Found], list[Unhandled]]:
    """Returns where the attention of ``model`` is, by names, and what looks like attention and is not handled."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    shapes = {name: tuple(p.shape) for name, p in named_parameters(model).items()}
    return locate(shapes, _settings(model), rows)


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


def reader(model: nn.Module, name: str) -> Callable[[], Tensor]:
    """Returns what reads a parameter's present value, with the contribution of active adapters, by :func:`whole`."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not owner.endswith("base_layer"):
        return lambda: whole(getattr(module, leaf))
    adapted: Any = model.get_submodule(owner.rpartition(".")[0])

    def weight() -> Tensor:
        base = whole(getattr(module, leaf))
        if leaf != "weight" or getattr(adapted, "merged", False) or getattr(adapted, "disable_adapters", False):
            return base
        active = [name for name in adapted.active_adapters if name in getattr(adapted, "lora_A", {})]
        return base + sum(whole(adapted.get_delta_weight(name)) for name in active)

    return weight
