"""Attention as the class of a model defines it: frequencies, the score's scale, norms, and shapes of parameters.

A model is built from its configuration without memory (on torch's meta device), and the few parts that compute
something, rotary frequencies and norms, are built once more and asked. So nothing is taken from a table that a class
could contradict: the same is done with the smaller configuration, and what does not come out as it should is refused.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rankdecay.attention.locate import locate
from rankdecay.attention.module.found import Found
from rankdecay.attention.module.settings import ModuleSettings
from rankdecay.attention.names import is_query_key_norm
from rankdecay.attention.source import ModuleSource
from rankdecay.compress.reduction import Norm, NotReducible, check_reducible

#: What an attention module calls the number its scores are multiplied by.
SCALES = ("scaling", "scale", "softmax_scale", "attention_scale", "inv_norm_factor")
#: What it calls the number they are divided by.
DIVISOR = "norm_factor"


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies that layers share.

    Attributes:
        short: radians per position of each plane, (planes,), float64, up to the original length.
        long: the same beyond it.
        attention_factor: what sine and cosine are multiplied by.
        kind: ``rope_type`` of the configuration.
    """

    short: Tensor
    long: Tensor
    attention_factor: float
    kind: str


class Skeleton:
    """A model without weights.

    Attributes:
        config: its configuration, an object of transformers.
        model: the model, on the meta device.
        found: its attention, in order.
    """

    def __init__(self, kind: type[nn.Module], config: Any) -> None:
        """Build a model of a class from its configuration.

        Raises:
            NotReducible: If the class cannot be built, or its attention cannot be read.
        """
        self.config = config
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built: Any = kind(config)
                built.tie_weights()  # which transformers 5.0 leaves to loading
        except Exception as error:  # whatever a class makes of a configuration it was not written for
            raise NotReducible(f"{kind.__name__} cannot be built from the configuration: {error}") from None
        self.model: nn.Module = built
        self._source = ModuleSource(self.model)
        self.found, unhandled = locate(self._source)
        if unhandled:
            raise NotReducible(f"{kind.__name__} has attention that is not read: {unhandled[0]}")
        if not self.found:
            raise NotReducible(f"{kind.__name__} has no attention that could be read.")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @cached_property
    def own_names(self) -> list[str]:
        """Names of what has to be read: of tied parameters the first, since a checkpoint holds no other."""
        return list(dict.fromkeys(_first_names(self.model).values()))

    def check(self) -> None:
        """Raise ``NotReducible`` if the identities do not hold for some layer."""
        if (limit := getattr(self.config, "clip_qkv", None)) is not None:
            raise NotReducible(
                f"clip_qkv={limit}: queries, keys and values are clipped coordinate by coordinate, so that they cannot "
                "be given others; if nothing of yours is that large, set clip_qkv to null in config.json."
            )
        check_reducible(self.found)

    def check_same(self, model: nn.Module) -> None:
        """Raise ``NotReducible`` if a live model is not what its configuration builds.

        The configuration is what a checkpoint is read by: numbers of modules, shapes, rotary frequencies and parameters
        tied by hand that were changed after building would be lost without a word.
        """
        name = type(model).__name__
        for key, tensor in model.state_dict().items():
            built_shape = self.shapes.get(key)
            if built_shape is not None and tuple(tensor.shape) != built_shape:
                raise NotReducible(
                    f"{key} has shape {tuple(tensor.shape)}, and {name}'s configuration says {built_shape}."
                )
        self._check_tied(model)
        built = dict(self.model.named_modules())
        for path, module in model.named_modules():
            other = built.get(path)
            if other is None or type(other) is not type(module):
                continue
            if frequencies := _frequencies(module):
                self._check_frequencies(path, frequencies)
            else:
                _check_numbers(path, module, other, name)

    def _check_frequencies(self, path: str, frequencies: Mapping[str, Tensor]) -> None:
        for part, buffer in frequencies.items():
            rope = self.ropes.get(_layers_of(part))
            if rope is None or ("original_" not in part and rope.kind in ("longrope", "dynamic")):
                continue  # that follows the length of the last text
            if buffer.shape != rope.short.shape or not torch.allclose(
                buffer.double().cpu(), rope.short, rtol=1e-2 if buffer.itemsize < 4 else 1e-5
            ):
                raise NotReducible(
                    f"{path}.{part} has other frequencies than {type(self.model).__name__}'s configuration says."
                )

    def _check_tied(self, model: nn.Module) -> None:
        ours = _first_names(model)
        for key, first in _first_names(self.model).items():
            if ours.get(key, first) != first:
                tied = ours[key] != key
                other, are = (ours[key], "one parameter") if tied else (first, "two parameters")
                raise NotReducible(
                    f"{key} and {other} are {are}, and {type(model).__name__}'s configuration says otherwise: set "
                    f"tie_word_embeddings={tied} in it."
                )

    def scale(self, found: Found) -> float:
        """Return what the scores of an attention are multiplied by."""
        module = self.model.get_submodule(found.module)
        for name in (*SCALES, DIVISOR):
            value = getattr(module, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                return 1 / float(value) if name == DIVISOR else float(value)
        raise NotReducible(
            f"{found.name} ({type(module).__name__}) does not say what its scores are multiplied by: none of "
            f"{', '.join((*SCALES, DIVISOR))}."
        )

    def norms(self, found: Found) -> tuple[Norm | None, Norm | None]:
        """Return the norms of queries and keys of an attention."""
        if not found.qk_norm:
            return None, None
        module = self.model.get_submodule(found.module)
        heads = {role: found.places[role].window.num_heads for role in ("query", "key")}
        norms: dict[str, Norm] = {}
        for name, child in module.named_children():
            side = "query" if name.lower().startswith("q") else "key" if name.lower().startswith("k") else None
            if side is None or not is_query_key_norm(name):
                continue
            gains = list(child.named_parameters())
            sizes = (found.head_dim, found.head_dim * heads[side])
            if len(gains) != 1 or gains[0][1].ndim != 1 or gains[0][1].numel() not in sizes:
                raise NotReducible(
                    f"{found.name}.{name} ({type(child).__name__}) is not a norm with one gain for each coordinate of "
                    "a head: the root mean square that a smaller head has could not be made up for."
                )
            path, gain = gains[0]
            norms[side] = Norm(f"{found.module}.{name}.{path}", _offset(child, gain.numel(), f"{found.name}.{name}"))
        if norms.keys() != {"query", "key"}:
            raise NotReducible(f"{found.name} normalises queries and keys without gains, or one of the two alone.")
        return norms["query"], norms["key"]

    def sums_to_one(self, found: Found) -> bool:
        """Whether a constant that all values of an attention have comes out of it as the same constant.

        Not where a sink takes a part of the softmax, nor where a gate multiplies what a head gives; so only where
        the module has nothing but its projections and norms.
        """
        module = self.model.get_submodule(found.module)
        prefix = f"{found.module}." if found.module else ""
        known = {place.parameter for place in found.places.values()} | {place.bias for place in found.places.values()}
        others = [name for name, _ in module.named_parameters() if prefix + name not in known]
        return all(is_query_key_norm(name.partition(".")[0]) and "." in name for name in others)

    @cached_property
    def ropes(self) -> dict[str | None, Rope]:
        """Rotary frequencies by the kind of layer; the key is None where all layers have the same."""
        ropes: dict[str | None, Rope] = {}
        for module in self.model.modules():
            names = [name for name in _frequencies(module) if "original_" not in name]
            if not names:
                continue
            kind = type(module)
            try:
                real = kind(module.config)  # pyright: ignore[reportCallIssue]
            except Exception as error:  # of a class that wants something else
                raise NotReducible(f"{kind.__name__} cannot be built from the configuration alone: {error}") from None
            for name in names:
                key = _layers_of(name)
                rope = _rope(real, name, key, module.config)
                if key in ropes and not torch.equal(ropes[key].short, rope.short):
                    raise NotReducible("the model has several tables of rotary frequencies under one name.")
                ropes[key] = rope
        return ropes

    def rope_key(self, number: int) -> str | None:
        """Return the key in ``ropes`` of an attention by its place in ``found``."""
        if None in self.ropes:
            return None
        found = self.found[number]
        kinds = getattr(self.config, "layer_types", None) or ()
        layer = ModuleSettings(found.module, self._source).layer_number
        if layer is None or layer >= len(kinds) or kinds[layer] not in self.ropes:
            raise NotReducible(f"{found.name}: it is unknown which of the rotary frequencies it uses.")
        return kinds[layer]


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    """Return the tables of rotary frequencies that a module itself holds, those before any scaling too."""
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")}


def _layers_of(table: str) -> str | None:
    """Return the kind of layer that a table of frequencies is of, by its name; None if it is of all."""
    return table.removesuffix("inv_freq").removesuffix("original_").removesuffix("_") or None


def _check_numbers(path: str, module: nn.Module, built: nn.Module, name: str) -> None:
    for part, value in vars(module).items():
        configured = vars(built).get(part)
        if type(value) in (int, float) and type(configured) in (int, float) and value != configured:
            raise NotReducible(
                f"{path}.{part} is {value}, and {name}'s configuration builds it with {configured}: a checkpoint is "
                "read by its configuration, so set it there."
            )


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return the first name of the tensor that each name of a state dict has; tied parameters have one."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def _rope(real: Any, name: str, key: str | None, config: Any) -> Rope:
    kind = real.rope_type if key is None else real.rope_type[key]
    factor = getattr(real, "attention_scaling" if key is None else f"{key}_attention_scaling", 1.0)
    short = getattr(real, name).double().cpu()
    long = short
    if kind == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        parameters = config.rope_parameters if key is None else config.rope_parameters[key]
        beyond = parameters["original_max_position_embeddings"] + 1
        given = {} if key is None else {"layer_type": key}
        long = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=beyond, **given)[0].double()
    return Rope(short, long, float(factor), str(kind))


def _offset(norm: nn.Module, size: int, name: str) -> float:
    """Return what a norm's class adds to its gains, once it is sure to divide by the root mean square and no more."""
    real = copy.deepcopy(norm).to_empty(device="cpu").float()
    numbers = torch.linspace(0.5, 2.0, size).view(1, 1, 1, -1)  # with a mean, which a LayerNorm would take away
    expected = numbers / numbers.square().mean().sqrt()
    with torch.no_grad():
        (gain,) = real.parameters()
        for offset in (0.0, 1.0):
            gain.fill_(1.0 - offset)
            if torch.allclose(real(numbers), expected, rtol=1e-3):
                gain.fill_(2.0 - offset)
                if torch.allclose(real(numbers), 2 * expected, rtol=1e-3):
                    return offset
    raise NotReducible(
        f"{name} ({type(norm).__name__}) does not divide by the root mean square alone, as a LayerNorm, which takes "
        "the mean away, does not: a plane that is zero changes it."
    )


def model_class(config: Any) -> type[nn.Module]:
    """Return the class of transformers that a configuration names, or that its type has for causal language models.

    Raises:
        NotReducible: If there is none.
    """
    import transformers

    stated = getattr(config, "architectures", None)
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    for name in names:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    name = CAUSAL.get(config.model_type)
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise NotReducible(f"transformers has no class for {', '.join(names) or config.model_type}.")
    return kind


def changed_shapes(old: Mapping[str, tuple[int, ...]], new: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Return the names of the parameters whose shape differs, or that only one of two models has."""
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
