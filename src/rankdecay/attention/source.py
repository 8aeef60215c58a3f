"""Sources of parameters and settings: a live module or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from rankdecay.attention.checkpoints import Shape, open_checkpoint
from rankdecay.attention.names import ROTARY
from rankdecay.attention.quantised import live_weights
from rankdecay.dtensor import whole


class Source(Protocol):
    """Parameters by name, read on demand, and the settings of the modules they belong to."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every parameter, by name."""
        ...

    def setting(self, path: str, attributes: tuple[str, ...]) -> object:
        """Return the value of the first of the attributes that is set, as near to the module as possible, or None."""
        ...

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that reads the present value of a parameter."""
        ...


class ModuleSource:
    """Source of the parameters of a live ``nn.Module``.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = model
        self._quantised = live_weights(model)
        parameters = {name: tuple(p.shape) for name, p in named_parameters(model).items()}
        self.shapes = parameters | {name: weight.shape for name, weight in self._quantised.items()}
        self._modules = dict(model.named_modules(remove_duplicate=False))

    def __str__(self) -> str:
        return type(self.model).__name__

    def setting(self, path: str, attributes: tuple[str, ...]) -> object:
        """Return the nearest value of the attributes: of the module, its configuration, then one level up."""
        while True:
            module = self._modules.get(path)
            for holder in (module, getattr(module, "config", None)):
                for attribute in attributes:
                    value = _plain(holder, attribute)
                    if value is not None:
                        return value
            if not path:
                return None
            path = path.rpartition(".")[0]

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that reads a parameter whole, with the contribution of active adapters."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        own = self._quantised[name].read if name in self._quantised else lambda: whole(getattr(module, leaf))
        if not owner.endswith("base_layer"):
            return own
        adapted: Any = self.model.get_submodule(owner.rpartition(".")[0])

        def weight() -> Tensor:
            base = own()
            if leaf != "weight" or getattr(adapted, "merged", False) or getattr(adapted, "disable_adapters", False):
                return base
            active = [name for name in adapted.active_adapters if name in getattr(adapted, "lora_A", {})]
            return base + sum(whole(adapted.get_delta_weight(name)) for name in active)

        return weight


def open_source(model: nn.Module | str | Path) -> Source:
    """Return the parameters and settings of a model, or of a checkpoint by its path.

    Raises:
        TypeError: If ``model`` is neither an ``nn.Module`` nor a path.
        ValueError: If a checkpoint cannot be read.
    """
    if isinstance(model, nn.Module):
        return ModuleSource(model)
    if isinstance(model, (str, Path)):
        return open_checkpoint(model)
    raise TypeError(f"model must be a torch.nn.Module or a path to a checkpoint, got {type(model).__name__}.")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of the model under each of its names: a tied parameter appears more than once."""
    return dict(model.named_parameters(remove_duplicate=False))


def _plain(holder: object, attribute: str) -> object:
    """Return an attribute that is a number, string, flag or dictionary; None for a submodule or method of that name."""
    value = getattr(holder, attribute, None)
    if attribute in ROTARY and isinstance(value, nn.Module):
        return True  # the submodule that turns queries and keys
    return value if isinstance(value, (bool, int, float, str, dict)) else None
