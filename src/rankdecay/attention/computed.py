"""Weights that a module computes from other tensors before it uses them, live and in files.

=======================================  ==================================  ======================================
what computes the weight W               tensors stored of it                W
=======================================  ==================================  ======================================
``parametrizations.weight_norm``         ``parametrizations.weight``         g · v / ‖v‖, norms over all but one side
                                         ``.original0`` g, ``.original1`` v
``weight_norm``, the older               ``weight_g``, ``weight_v``          the same
``parametrizations.spectral_norm``       ``.original``, ``.0._u``, ``._v``   V / σ with σ = uᵀ V v
``spectral_norm``, the older             ``weight_orig``, ``weight_u``,      the same
                                         ``weight_v``
``utils.prune``                          ``weight_orig``, ``weight_mask``    their product
any other of ``utils.parametrize``       ``.original`` or ``.original0``, …  live: as the module computes it;
                                                                             in a file: refused by name
=======================================  ==================================  ======================================

A live weight is computed on copies, so that nothing of the model changes: neither the power iteration of spectral norm,
nor a random generator, nor the graph.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rankdecay.attention.tensors import Shape
from rankdecay.dtensor import whole

#: Hooks that write the weight before each forward pass, and the suffix of the stored matrix of the same shape.
_HOOKS = {
    WeightNorm: ("weight_norm", "_v"),
    SpectralNorm: ("spectral_norm", "_orig"),
    BasePruningMethod: ("pruning", "_orig"),
}


class Computed(NamedTuple):
    """Weight that a module computes.

    Attributes:
        how: what computes it, such as ``"weight_norm"``.
        shape: of the weight.
        stored: names, in the module, of the tensors it is computed from.
        matrix: the one of them that a decay acts on, of the same shape; None if there is none.
        gain: the one that only scales it, if there is one.
        note: for a reader: what is stored, or why nothing of it is decayed as the matrix.
    """

    how: str
    shape: Shape
    stored: tuple[str, ...]
    matrix: str | None
    gain: str | None
    note: str


# ---- live ------------------------------------------------------------------------------------------------


def computed_weights(module: nn.Module) -> dict[str, Computed]:
    """Return the weights that a module itself computes, by their names in it."""
    found: dict[str, Computed] = {}
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        for leaf, steps in lists.items():
            found[leaf] = _parametrised(leaf, steps)
    for hook in module._forward_pre_hooks.values():
        for kind, (how, suffix) in _HOOKS.items():
            if isinstance(hook, kind):
                written: Any = hook
                leaf = written._tensor_name if how == "pruning" else written.name
                matrix = _parameter(module, leaf + suffix)
                gain = f"{leaf}_g" if how == "weight_norm" else None
                stored = tuple(name for name in (gain, leaf + suffix) if name)
                part = "direction" if gain else "matrix"
                note = f"under {how}: the stored {part}{' before its mask' if how == 'pruning' else ''}"
                found[leaf] = Computed(how, tuple(matrix.shape), stored, leaf + suffix, gain, note)
    return found


def compute(module: nn.Module, leaf: str) -> Tensor:
    """Return a weight as the module's next forward pass would compute it, without changing the module."""
    with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(module)):
        if parametrize.is_parametrized(module, leaf):
            lists: Any = module.parametrizations
            return detached_copy(lists[leaf])()
        stand_in = nn.Module().train(module.training)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                stand_in.register_buffer(name, whole(tensor).detach().clone())
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, tuple(_HOOKS)):
                hook(stand_in, ())
        return getattr(stand_in, leaf).detach()


def detached_copy(module: nn.Module, changed: nn.Module | None = None) -> Any:
    """Return a copy of a module whose parameters are those of the module, whole and detached.

    Args:
        module: to be copied; its buffers are copied too.
        changed: the part of it whose parameters the caller will change, and which are therefore copied.
    """
    parts = list(module.modules())  # once: PEFT's MultiheadAttention makes its parameters anew each time it is listed
    inside = {id(part) for part in changed.modules()} if changed is not None else set()
    memo: dict[int, Any] = {}
    for part in parts:
        for name, value in vars(part).items():
            if "hook" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()  # a hook would copy the object it is bound to as well
            elif name in ("_hf_hook", "forward") or isinstance(value, Tensor):
                memo[id(value)] = value
        for parameter in part._parameters.values():
            if parameter is not None:
                value = whole(parameter).detach()
                value = value.clone() if id(part) in inside else value
                memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
        for buffer in part._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = whole(buffer).detach().clone()
    return copy.deepcopy(module, memo)


def _parametrised(leaf: str, steps: Any) -> Computed:
    tensors = (*steps.named_parameters(recurse=False), *steps.named_buffers(recurse=False))
    originals = {name: tensor for name, tensor in tensors if name.startswith("original")}
    kinds = [type(step).__name__.removeprefix("_") for step in steps]
    names = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm", "Orthogonal": "orthogonal"}
    how = " and ".join(names.get(kind, kind) for kind in kinds)
    shape = _shape(steps)
    within = f"parametrizations.{leaf}."
    gain = within + "original0" if kinds[0] == "WeightNorm" and "original1" in originals else None
    stored = tuple(within + name for name in originals)
    matrices = [name for name, tensor in originals.items() if tuple(tensor.shape) == shape]
    if "Orthogonal" in kinds:
        return Computed(how, shape, stored, None, gain, f"under {how}, which fixes its singular values")
    if len(matrices) != 1 and not gain:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in originals.items())
        return Computed(how, shape, stored, None, None, f"under {how}, of which no one matrix is stored but {shapes}")
    part = "direction" if gain else "matrix"
    matrix = "original1" if gain else matrices[0]
    return Computed(how, shape, stored, within + matrix, gain, f"under {how}: the stored {part}")


def _shape(steps: Any) -> Shape:
    """Return the shape of a parametrised weight: from tensors without values where the parametrisation allows it."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            memo = {id(t): nn.Parameter(torch.empty_like(t, device="meta"), False) for t in steps.parameters()}
            memo |= {id(t): torch.empty_like(t, device="meta") for t in steps.buffers()}
            return tuple(copy.deepcopy(steps, memo)().shape)
        except Exception:  # whatever a parametrisation of the user's own cannot do without values
            return tuple(detached_copy(steps)().shape)


def _parameter(module: nn.Module, name: str) -> Tensor:
    """Return a tensor of a module; a pruned one is stored under another name."""
    return getattr(module, name) if hasattr(module, name) else getattr(module, f"{name}_orig")


def _cuda_devices(module: nn.Module) -> list[Any]:
    return list({tensor.device for tensor in module.parameters() if tensor.device.type == "cuda"})


# ---- in files --------------------------------------------------------------------------------------------

_PARAMETRISED = re.compile(r"(?P<weight>(?:.+\.)?)parametrizations\.(?P<leaf>[^.]+)\.(?P<part>.+)")
_OLDER = re.compile(r"(?P<weight>(?:.+\.)?[^.]*weight)_(?P<part>g|v|u|orig|mask)")

_REMEDY = (
    "save the model after torch.nn.utils.parametrize.remove_parametrizations (of the older functions: "
    "remove_weight_norm, remove_spectral_norm, prune.remove)"
)


class StoredWeight(NamedTuple):
    """Weight of a file that is computed from several of its tensors.

    Attributes:
        shape: of the weight; empty where the file does not say it.
        parts: names of the tensors it is computed from.
        read: computes it.
    """

    shape: Shape
    parts: tuple[str, ...]
    read: Callable[[], Tensor]


def stored_weights(
    shapes: Mapping[str, Shape], load: Callable[[str], Tensor], error: type[ValueError]
) -> Iterator[tuple[str, StoredWeight]]:
    """Yield the weights of a file that are computed from several tensors, by the name of the weight.

    Args:
        shapes: of all tensors of the file, by name.
        load: reads one of them.
        error: what reading a weight raises when the file does not say how it is computed.
    """
    families: dict[str, dict[str, str]] = {}
    for name in shapes:
        if found := _PARAMETRISED.fullmatch(name):
            families.setdefault(found["weight"] + found["leaf"], {})[found["part"]] = name
        elif found := _OLDER.fullmatch(name):
            families.setdefault(found["weight"], {})["~" + found["part"]] = name
    for weight, parts in families.items():
        if weight not in shapes and (stored := _stored(weight, parts, shapes, load, error)):
            yield weight, stored


def _stored(
    weight: str,
    parts: Mapping[str, str],
    shapes: Mapping[str, Shape],
    load: Callable[[str], Tensor],
    error: type[ValueError],
) -> StoredWeight | None:
    def shape(part: str) -> Shape:
        return shapes[parts[part]]

    def of(*names: str) -> list[Tensor]:
        tensors = [load(parts[name]) for name in names]
        return [tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor for tensor in tensors]

    match tuple(sorted(parts)):
        case ("original0", "original1") as pair if _scales(shape("original0"), shape("original1")):
            matrix, read = "original1", lambda: _weight_norm(*of(*pair))
        case ("~g", "~v") as pair if _scales(shape("~g"), shape("~v")):
            matrix, read = "~v", lambda: _weight_norm(*of(*pair))
        case ("0._u", "0._v", "original") if _vectors(shape("0._u"), shape("0._v"), shape("original")):
            matrix, read = "original", lambda: _spectral_norm(*of("original", "0._u", "0._v"))
        case ("~orig", "~u", "~v") if _vectors(shape("~u"), shape("~v"), shape("~orig")):
            matrix, read = "~orig", lambda: _spectral_norm(*of("~orig", "~u", "~v"))
        case ("~mask", "~orig") if shape("~mask") == shape("~orig"):
            matrix, read = "~orig", lambda: torch.mul(*of("~orig", "~mask"))
        case names if all(name.startswith("~") for name in names) and "~orig" not in names:
            return None  # names that resemble torch's by chance
        case names:

            def refuse() -> Tensor:
                stored_names = ", ".join(parts[name] for name in names)
                raise error(f"{weight} is computed from {stored_names}, but the file does not say how; {_REMEDY}.")

            matrix = next((name for name in ("original", "~orig") if name in parts), None)
            if {"original0", "original1"} <= parts.keys() and _scales(shape("original0"), shape("original1")):
                matrix = "original1"
            return StoredWeight(shape(matrix) if matrix else (), tuple(parts.values()), refuse)
    return StoredWeight(shape(matrix), tuple(parts.values()), read)


def _scales(gain: Shape, matrix: Shape) -> bool:
    """Whether a tensor has one number per line of another, or one number in all, as the gain of weight norm."""
    if not gain:
        return True
    long = [n for n in gain if n > 1]
    fits = len(gain) == len(matrix) and all(n in (1, m) for n, m in zip(gain, matrix, strict=True))
    return fits and len(long) <= 1


def _vectors(u: Shape, v: Shape, matrix: Shape) -> bool:
    """Whether two tensors are as long as the sides of a matrix, as the vectors of spectral norm."""
    return len(u) == len(v) == 1 and len(matrix) == 2 and (u + v in (matrix, matrix[::-1]))


def _weight_norm(gain: Tensor, direction: Tensor) -> Tensor:
    sides = [i for i in range(direction.ndim) if gain.ndim == 0 or gain.shape[i] == 1]
    if gain.ndim and len(sides) == direction.ndim:
        sides = list(range(1, direction.ndim))  # one line: the gain is of the first side
    return gain * direction / direction.norm(dim=sides, keepdim=gain.ndim > 0)


def _spectral_norm(matrix: Tensor, u: Tensor, v: Tensor) -> Tensor:
    turned = matrix if (len(u), len(v)) == tuple(matrix.shape) else matrix.mT
    return matrix / (u @ (turned @ v))
