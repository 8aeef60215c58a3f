"""Sources of parameters and settings: a live module or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from rankdecay.attention import orientation
from rankdecay.attention.adapters import (
    added,
    check_plain,
    factors,
    in_use,
    is_adapted,
    is_factor,
    is_quantised,
    is_replaced,
    merged,
    what_is,
)
from rankdecay.attention.checkpoints import Checkpoint, open_checkpoint
from rankdecay.attention.computed import Computed, StoredWeight, compute, computed_weights, stored_weights
from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.model_types import ROTARY
from rankdecay.attention.quantised import Weight, live_weights
from rankdecay.attention.tensors import Shape
from rankdecay.dtensor import whole


class Source(Protocol):
    """Parameters by name, read on demand, and the settings of the modules they belong to."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every parameter, by name."""
        ...

    @property
    def plain(self) -> Mapping[str, str]:
        """Name of every parameter by the name it would have without adapters and parametrisations."""
        ...

    @property
    def stored_as(self) -> Mapping[str, str]:
        """Storage format of each quantised parameter, by name; it is read dequantised."""
        ...

    def setting(self, path: str, attributes: tuple[str, ...]) -> object:
        """Return the value of the first of the attributes that is set, as near to the module as possible, or None."""
        ...

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that reads the present value of a parameter."""
        ...

    def children(self, path: str) -> Collection[str]:
        """Return the names of what is directly in a module: submodules, with weights or without, and parameters."""
        ...

    def kind(self, path: str) -> str:
        """Return the name of a module's class, as "timm.models.nest.Attention"; "" where nothing says it."""
        ...

    def is_transposed(self, path: str) -> bool | None:
        """Return whether a live module stores its weight as (in, out), by its class or as it multiplies, or None."""
        ...

    def is_not_plain_linear(self, path: str, transposed: bool) -> bool:
        """Whether a live module, whose class says nothing of it, does more than to multiply by its weight."""
        ...

    def is_known(self, path: str) -> bool:
        """Whether names and settings say all of a module: it is of a library whose classes the tables cover."""
        ...

    def own(self, path: str, attributes: tuple[str, ...]) -> object:
        """Return the value of the first of the attributes that a live module itself has; None in files."""
        ...


class ParameterInfo(NamedTuple):
    """Identity of a parameter of a live model, seen without wrappers.

    Attributes:
        plain: the name it would have without adapters and parametrisations; None for what they brought with them.
        holder: the module that would hold it, without wrappers.
        note: what it is to its wrapper, for a reader; empty without one.
        gain: whether it is the magnitude of weight norm.
        fixed: whether a decay of its matrix has no meaning, as of an orthogonal one.
    """

    plain: str | None
    holder: nn.Module
    note: str = ""
    gain: bool = False
    fixed: bool = False


class ModuleSource:
    """Source of the parameters of a live ``nn.Module``.

    A weight that its module computes (weight norm, spectral norm, pruning, parametrisations) is known by the stored
    matrix of the same shape, and where there is none by the name that the module gives it.

    Attributes:
        model: the module.
        shapes: shape of every parameter, and of every weight that is computed without a matrix of its shape.
        plain: name in ``shapes`` by the name without wrappers (``base_layer``, ``parametrizations.weight.original``).
        known: what each parameter is, by name.
        computed: weights that are computed without a matrix of their shape, by name.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
        ValueError: If a parameter has no shape.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = model
        if nested := next((name for name, p in model.named_parameters() if p.is_nested), None):
            raise ValueError(f"{nested} is a nested tensor, which has no shape: convert it to a plain tensor first.")
        parameters = {name: tuple(p.shape) for name, p in named_parameters(model).items()}
        self.shapes = parameters | {name: weight.shape for name, weight in self._quantised.items()}
        self.known: dict[str, ParameterInfo] = {}
        self.plain: dict[str, str] = {}
        self.computed: dict[str, Computed] = {}
        self._weights: dict[int, dict[str, Computed]] = {}
        self._modules: dict[str, list[nn.Module]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._modules.setdefault(path, []).append(module)
            self._weights[id(module)] = computed_weights(module)
            without = ".".join(_without_wrappers(model, path)) if path else path
            if without != path:
                self._modules.setdefault(without, []).append(module)
        for name in list(self.shapes):
            known = self.known[name] = self._identify(name)
            if known.plain is not None:
                self.plain.setdefault(known.plain, name)
        del self._weights

    def __str__(self) -> str:
        return type(self.model).__name__

    @cached_property
    def _quantised(self) -> dict[str, Weight]:
        return live_weights(self.model)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what reads quantised weights: in a copy it would read those of the model that was copied."""
        return {name: value for name, value in vars(self).items() if name != "_quantised"}

    @property
    def stored_as(self) -> Mapping[str, str]:
        """Storage format of each quantised parameter, by name."""
        return {name: weight.format for name, weight in self._quantised.items()}

    def setting(self, path: str, attributes: tuple[str, ...]) -> object:
        """Return the nearest value of the attributes: of the module, its configuration, then one level up."""
        nearest_config: object = None  # the configuration of the part the module is in
        while True:
            for module in self.modules(path):
                config = getattr(module, "config", None)
                nearest_config = nearest_config if nearest_config is not None else config
                if attributes == ROTARY and config is not nearest_config and config is not None:
                    return None  # of another part, whose positions are its own
                for holder in (module,) if config is None else (module, config):
                    for attribute in attributes:
                        value = _plain(holder, attribute)
                        if value is not None:
                            return value
            if not path:
                return None
            path = path.rpartition(".")[0]

    def modules(self, path: str) -> list[nn.Module]:
        """Return the modules at a path without wrappers: those that wrap, then what they wrap."""
        return self._modules.get(path, [])

    def children(self, path: str) -> Collection[str]:
        """Return the names of the submodules, parameters and buffers of a module, without its wrappers.

        A place that is left empty, by None or an Identity as timm's ``q_norm`` is, does not count.
        """
        tables = [(m._modules, m._parameters, m._buffers) for m in self.modules(path)]
        parts = [(name, part[name]) for group in tables for part in group for name in part.keys()]  # noqa: SIM118 - scripted
        return {name for name, value in parts if value is not None and not isinstance(value, nn.Identity)}

    def kind(self, path: str) -> str:
        """Return the name of a module's class, without wrappers, and of where it is from."""
        kind = type(self.modules(path)[-1]) if self.modules(path) else None
        return f"{kind.__module__}.{kind.__qualname__}" if kind else ""

    def is_transposed(self, path: str) -> bool | None:
        """Return whether a module, without wrappers, stores its weight as (in, out); None where nothing tells."""
        return orientation.is_transposed(self.modules(path)[-1]) if self.modules(path) else None

    def is_not_plain_linear(self, path: str, transposed: bool) -> bool:
        """Whether a module, without wrappers, does more to a vector than to multiply it by its weight."""
        return bool(self.modules(path)) and orientation.is_not_plain_linear(self.modules(path)[-1], transposed)

    def is_known(self, path: str) -> bool:
        """Whether a module is of torch, transformers or timm, whose norms and positions names and settings tell."""
        known = ("torch.nn.modules.activation.", "transformers.models.", "timm.")  # torch's: MultiheadAttention
        return any(f"{type(module).__module__}.".startswith(known) for module in self.modules(path))

    def own(self, path: str, attributes: tuple[str, ...]) -> object:
        """Return the value of the first of the attributes that a module itself has, not its configuration."""
        values = (_plain(module, attribute) for module in self.modules(path) for attribute in attributes)
        return next((value for value in values if value is not None), None)

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that reads a parameter whole, as the forward pass uses it now.

        That is with the contribution of active adapters, and as a parametrisation computes it.
        """
        if name not in self.computed and (name not in self.known or self.known[name].plain is None):
            return partial(self._own, name)  # no lambda: a copy of it is to read the copy of the model
        return partial(self._in_use, name)

    def _own(self, name: str) -> Tensor:
        """Read a stored tensor itself."""
        return self._quantised[name].read() if name in self._quantised else whole(_tensor(self.model, name))

    def _in_use(self, name: str) -> Tensor:
        return _read(self.model, name.split("."), "", partial(self._own, name))

    def _identify(self, name: str) -> ParameterInfo:
        """Return what a parameter is, by the modules on its path."""
        module: Any = self.model
        kept: list[str] = []
        parts = name.split(".")
        while True:
            part = parts[0]
            if (is_adapted(module) and part != "base_layer") or (len(parts) == 1 and part in factors(module)):
                return ParameterInfo(None, module, what_is(part, factors(module)))
            if is_replaced(module):
                used = in_use(module)
                if not name.startswith(f"{name[: len(name) - len('.'.join(parts))]}{used}."):
                    return ParameterInfo(None, module, f"not in use: {used} stands for it")
                parts = parts[used.count(".") + 1 :]
                module = module.get_submodule(used)
                continue
            within = ".".join(parts)
            for leaf, weight in self._weights[id(module)].items():
                if within in weight.stored:
                    return self._identify_stored(name, within, module, leaf, weight, kept)
            if part == "parametrizations" and len(parts) > 2 and parts[1] in self._weights[id(module)]:
                return ParameterInfo(
                    None, module, f"parameter of {self._weights[id(module)][parts[1]].how} of {parts[1]}"
                )
            if len(parts) == 1:
                return ParameterInfo(".".join([*kept, part]), module)
            if not (part == "base_layer" and is_adapted(module)):
                kept.append(part)
            module, parts = module._modules[part], parts[1:]

    def _identify_stored(
        self, name: str, within: str, module: nn.Module, leaf: str, weight: Computed, kept: list[str]
    ) -> ParameterInfo:
        if within == weight.gain:
            return ParameterInfo(None, module, f"magnitude of {leaf} under {weight.how}", gain=True)
        plain = ".".join([*kept, leaf])
        if within == weight.matrix:
            return ParameterInfo(plain, module, weight.note)
        if weight.matrix is None:
            path = name[: -len(within)] + leaf
            self.shapes[path] = weight.shape
            self.computed[path] = weight
            self.plain.setdefault(plain, path)
        return ParameterInfo(None, module, f"stored of {leaf} {weight.note}", fixed=weight.matrix is None)


def _without_wrappers(model: nn.Module, path: str) -> Iterator[str]:
    """Yield the parts of a module's path without those that wrappers put in it."""
    module: Any = model
    parts = path.split(".")
    while parts:
        used = in_use(module) if is_replaced(module) else "base_layer" if is_adapted(module) else ""
        if used and f"{'.'.join(parts)}.".startswith(used + "."):
            module, parts = module.get_submodule(used), parts[used.count(".") + 1 :]
            continue
        yield parts[0]
        module, parts = module._modules[parts[0]], parts[1:]


def _read(module: Any, parts: list[str], path: str, read_stored: Callable[[], Tensor]) -> Tensor:
    """Return a weight as the forward pass uses it now.

    Args:
        module: where the rest of the path starts.
        parts: the rest of the path.
        path: so far, for messages.
        read_stored: reads the stored tensor itself.
    """
    part = parts[0]
    if part == "base_layer" and is_adapted(module):
        base: Any = module.base_layer
        if len(parts) == 2 and is_quantised(base, parts[1]):
            return added(module, path, read_stored()) if parts[1] == "weight" else read_stored()
        merged_base = merged(module, path)
        if merged_base is base:
            return _read(base, parts[1:], path, read_stored)
        within = ".".join(parts[1:])  # in the copy, what the base computes is a plain parameter
        rest = next((leaf for leaf, weight in computed_weights(base).items() if weight.matrix == within), within)
        return _read(merged_base, rest.split("."), path, lambda: _tensor(merged_base, rest))
    if is_replaced(module):
        used = in_use(module)
        rest = parts[1:] if part == "original_module" else parts[2:]
        here: Any = module.get_submodule(used)
        return _read(here, rest, path, lambda: whole(_tensor(here, ".".join(rest))))
    weights = computed_weights(module)
    within = ".".join(parts)
    for leaf, weight in weights.items():
        if within in (leaf, weight.matrix):
            return compute(module, leaf)
    if len(parts) == 1:
        check_plain(module, path)
        return read_stored()
    return _read(module._modules[part], parts[1:], f"{path}.{part}" if path else part, read_stored)


def _tensor(module: nn.Module, name: str) -> Tensor:
    return reduce(getattr, name.split("."), module)  # pyright: ignore[reportReturnType]


def open_source(model: nn.Module | str | Path, state: str | None = None) -> Source:
    """Return the parameters and settings of a model, or of a checkpoint by its path.

    Args:
        model: the model or the path.
        state: which weights, of a checkpoint that holds several sets.

    Raises:
        TypeError: If ``model`` is neither an ``nn.Module`` nor a path, or ``state`` is given with a model.
        ValueError: If a checkpoint cannot be read.
    """
    if isinstance(model, nn.Module):
        if state is not None:
            raise TypeError(f"state={state!r} names weights in a checkpoint; give the part of the model itself.")
        return ModuleSource(model)
    if isinstance(model, (str, Path)):
        return without_wrappers(open_checkpoint(model, state))
    raise TypeError(f"model must be a torch.nn.Module or a path to a checkpoint, got {type(model).__name__}.")


def without_wrappers(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with each weight under the name it would have without adapters and parametrisations.

    Reading one that an adapter changes, or that is computed in a way the file does not tell, raises a CheckpointError.
    """
    shapes, load = dict(checkpoint.shapes), checkpoint.load
    weights = dict(stored_weights(shapes, load, CheckpointError))
    weights.update(_saved_under_adapters(shapes, weights, load))
    if not weights:
        return checkpoint
    first = {weight.parts[0]: name for name, weight in weights.items()}
    parts = {part for weight in weights.values() for part in weight.parts}
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if name in first and first[name] in weights:
            found[first[name]] = weights[first[name]].shape
        elif name not in parts:
            found[name] = shape
    return replace(checkpoint, shapes=found, load=lambda name: weights[name].read() if name in weights else load(name))


def _saved_under_adapters(
    shapes: Mapping[str, Shape], computed: Mapping[str, StoredWeight], load: Callable[[str], Tensor]
) -> Iterator[tuple[str, StoredWeight]]:
    """Yield the weights of a file saved with its adapters, by their names without them."""
    for name in shapes:  # of loralib's kind: factors beside the weight they belong to, without a wrapper
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if is_factor(part)), 0)
        weight = ".".join([*parts[:first], "weight"])
        if first and weight in shapes:
            reason = f"{name} is an adapter that is not merged into {weight}; merge it into the weight and save again."
            yield weight, StoredWeight(shapes[weight], (weight,), _refusal(reason))
    copies: dict[str, list[str]] = {}
    beside: dict[str, str] = {}  # a factor of its adapter, by the path of a wrapped layer
    wrapped = {name[: name.index(".base_layer.")] for name in shapes if ".base_layer." in name}
    for name in shapes:
        path = name
        while path := path.rpartition(".")[0]:
            if path in wrapped and not name.startswith(path + ".base_layer."):
                beside.setdefault(path, name)
        if ".modules_to_save." in name:
            head, _, tail = name.partition(".modules_to_save.")
            copies.setdefault(f"{head}.{tail.partition('.')[2]}", []).append(name)
    for name in [*shapes, *computed]:
        if ".base_layer." in name:
            factor = beside.get(name[: name.index(".base_layer.")])
            shape = computed[name].shape if name in computed else shapes[name]
            read = computed[name].read if name in computed else partial(load, name)
            reason = f"{factor} is an adapter that is not merged into {name}"
            remedy = "save the model after merge_and_unload()"
            parts = computed[name].parts if name in computed else (name,)
            reader = _refusal(f"{reason}; {remedy}.") if factor else read
            yield name.replace(".base_layer.", "."), StoredWeight(shape, parts, reader)
    for plain, names in copies.items():
        original = next((n for n in shapes if n.replace(".original_module.", ".") == plain and n != plain), None)
        reason = f"{' and '.join(names)} are saved, but the file does not say which is in use"
        read = partial(load, names[0]) if len(names) == 1 else _refusal(f"{reason}; save the one that is.")
        yield plain, StoredWeight(shapes[names[0]], (*names, *([original] if original else [])), read)


def _refusal(message: str) -> Callable[[], Tensor]:
    def refuse() -> Tensor:
        raise CheckpointError(message)

    return refuse


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of the model under each of its names: a tied parameter appears more than once."""
    return dict(model.named_parameters(remove_duplicate=False))


def _plain(holder: object, attribute: str) -> object:
    """Return an attribute that is a number, string, flag or dictionary; None for a submodule or method of that name."""
    settings = vars(holder).get("_internal_dict") if isinstance(holder, nn.Module) else None
    if settings is not None and attribute not in vars(holder) and hasattr(settings, attribute):
        return None  # diffusers' models warn when asked for what their config, which is asked next, has
    try:
        value = getattr(holder, attribute, None)
    except RuntimeError:  # transformers' configurations whose layers differ refuse what has no one value
        return None
    if (attribute in ROTARY or attribute == "rope") and isinstance(value, (nn.Module, Tensor)):
        return True  # the submodule, or a table of angles, that turns queries and keys
    if attribute in ("processor", "attention") and value is not None:
        return type(value).__name__  # what computes the attention of one of diffusers' modules, or OpenAI's
    return value if isinstance(value, (bool, int, float, str, dict, list)) else None
