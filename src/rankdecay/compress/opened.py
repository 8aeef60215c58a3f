"""A model as it is given to be compressed, alive or in a directory: its class, its configuration and its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankdecay.compress.files import StoredModel
from rankdecay.compress.original import Original
from rankdecay.compress.reduction import NotReducible, Read
from rankdecay.compress.skeleton import model_class
from rankdecay.compress.types import check_type


class Opened(NamedTuple):
    """A model of transformers.

    Attributes:
        kind: its class.
        config: its configuration, an object of transformers.
        read: reads a parameter by its name.
        live: the model itself, if it is alive.
        stored: its directory, if it is in one.
    """

    kind: type[nn.Module]
    config: Any
    read: Read
    live: nn.Module | None = None
    stored: StoredModel | None = None

    @property
    def name(self) -> str:
        """Name of the model: its path as given, or its class."""
        return self.kind.__name__ if self.stored is None else str(self.stored.path)

    @property
    def written(self) -> dict[str, Any]:
        """Contents of its ``config.json``, with ``rope_parameters`` as the class completes them."""
        completed = self.config.to_dict()
        if self.stored is None:
            return completed
        parameters = completed.get("rope_parameters")
        return dict(self.stored.config) | ({"rope_parameters": parameters} if parameters else {})

    def check(self, original: Original) -> None:
        """Raise a ``ValueError`` if its weights are not what its class builds from its configuration."""
        if self.live is not None:
            original.skeleton.check_same(self.live)
        if self.stored is not None:
            names = [name for layer in original.layers for name in layer.parameters]
            self.stored.check(original.skeleton.shapes, names)


def opened(model: nn.Module | str | Path) -> Opened:
    """Open a model.

    Raises:
        TypeError: If it is neither a model of transformers nor a path.
        NotReducible: If it is quantised, an adapter, or needs code of its own.
        ValueError: If it cannot be read.
    """
    return _in_files(model) if isinstance(model, (str, Path)) else _alive(model)


def _in_files(path: str | Path) -> Opened:
    from transformers import AutoConfig

    stored = StoredModel(path)
    try:
        config = AutoConfig.from_pretrained(str(stored.path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever transformers makes of a configuration
        said, file = " ".join(str(error).split())[:300], stored.path / "config.json"
        if (model_type := stored.config.get("model_type")) is None:
            raise NotReducible(
                f"{file} has no model_type, by which transformers knows the class of a model: a smaller head is "
                "written for its causal language models alone."
            ) from None
        check_type(model_type)  # says more than that a type is not known
        raise NotReducible(f"{file} is not one that transformers reads: {said}") from None
    return Opened(model_class(config), config, stored.read, stored=stored)


def _alive(model: nn.Module) -> Opened:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a model of transformers or the path of one, got {type(model).__name__}; of a model in "
            "wrappers give what is inside, and merge adapters first (merge_and_unload)."
        )
    state = model.state_dict()
    if odd := next((name for name, t in state.items() if t.is_meta), None):
        raise ValueError(f"{odd} is on the meta device and has no values; load the weights first.")

    def read(name: str) -> Tensor:
        if name not in state:
            raise NotReducible(
                f"the model has no {name}, which its class should have: merge adapters first (merge_and_unload)."
            )
        return state[name].detach().cpu()

    config = _of_plain_weights(model, state)
    if isinstance(getattr(config, "dtype", None), str):  # as save_pretrained leaves it, with which not all are built
        config = copy.deepcopy(config)
        config.dtype = getattr(torch, config.dtype)
    return Opened(type(model), config, read, live=model)


def _of_plain_weights(model: Any, state: Mapping[str, Tensor]) -> Any:
    """Return the configuration of a live model, once its weights are sure to be plain numbers.

    Of GGUF transformers says that a model is quantised even where it has unpacked every weight in loading it.
    """
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    packed = next((name for name in names if not state[name].is_floating_point()), None)
    quantised = vars(model.config).get("quantization_config")
    of_gguf = getattr(quantised, "quant_method", None) == "gguf"
    if packed is not None or (quantised is not None and not of_gguf):
        what = "the model is quantised" if packed is None else f"{packed} is quantised ({state[packed].dtype})"
        remedy = (
            "load it with quantization_config=transformers.GgufConfig(dequantize=True)"
            if of_gguf
            else "dequantise the model first (model.dequantize())"
        )
        raise NotReducible(f"{what}: {remedy}.")
    if not of_gguf:
        return model.config
    config = copy.deepcopy(model.config)
    del config.quantization_config
    return config
