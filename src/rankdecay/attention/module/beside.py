"""Other parts of a projection than its matrix: further matrices, and in a sequence norms and activations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from rankdecay.attention.adapters import is_factor
from rankdecay.attention.names import LETTERS, words_of
from rankdecay.attention.source import Source
from rankdecay.attention.tensors import Shape

#: Steps of a sequence that leave a product of matrices what it is.
_PASSIVE = re.compile(r"drop|identity|rearrange|flatten|permute|reshape|contiguous", re.IGNORECASE)
#: What a step is called that the source shows to be a norm and does not name.
BATCH_NORM, NORM, UNSEEN = "BatchNorm", "Norm", "a step without weights, which may be an activation,"


#: What the two factors of a pair are called: the one that its input meets, and the other.
_SIDES = {"a": "a", "down": "a", "b": "b", "up": "b"}


def is_matrix(shape: Shape) -> bool:
    """Whether a parameter is a matrix, or a convolution over nothing but its own place."""
    return len(shape) == 2 or (len(shape) > 2 and all(size == 1 for size in shape[2:]))


def other_matrices(source: Source, plain: Mapping[str, str], path: str, weight: str) -> list[str]:
    """Return what a projection computes with beside its weight: matrices, and factors of an adapter of its own.

    Factors beside the weight itself, as PEFT's and loralib's, are none of these: they are known where it is read. Nor
    is what the weight is stored with, such as ``weight_scale``.

    Args:
        source: the parameters.
        plain: every parameter's name in the source, by its name without adapters.
        path: of the projection.
        weight: name of its weight without adapters.
    """
    direct = weight in (path, f"{path}.weight")
    known = direct or source.own(path, ("merged",)) is True
    found: list[str] = []
    for child in sorted(source.children(path)):
        if is_factor(child):
            found += [] if known else [child]
            continue
        inside = (
            name for name in _inside(source, plain, f"{path}.{child}") if name != weight and ".weight_" not in name
        )
        found += [n.removeprefix(f"{path}.") for n in inside if is_matrix(s := source.shapes[plain[n]]) or len(s) == 3]
    return found


def _inside(source: Source, plain: Mapping[str, str], path: str) -> Iterator[str]:
    if path in plain:
        yield path
    for child in sorted(source.children(path)):
        yield from _inside(source, plain, f"{path}.{child}")


def factors_beside(source: Source, plain: Mapping[str, str], path: str) -> dict[str, str]:
    """Return the factors of low rank that are children beside projections, and of which queries, keys and values.

    As the wrappers that fine-tune SAM hold them: ``linear_a_q`` and ``linear_b_q`` beside ``qkv``.

    Args:
        source: the parameters.
        plain: every parameter's name in the source, by its name without adapters.
        path: of the module.

    Returns:
        By the name of the child, ``"q"``, ``"k"``, ``"v"``, or "" where the name does not say it.
    """
    pairs: dict[tuple[str, ...], dict[str, tuple[str, Shape]]] = {}
    for child in source.children(path):
        words = words_of(child)
        side = next((_SIDES[word] for word in words if word in _SIDES), None)
        inside = f"{path}.{child}" if path else child
        weight = next((name for name in (f"{inside}.weight", inside) if name in plain), None)
        if side and weight and {"linear", "lora", "adapter"} & set(words):
            rest = tuple(word for word in words if word not in _SIDES)
            pairs.setdefault(rest, {})[side] = child, source.shapes[plain[weight]]
    found: dict[str, str] = {}
    for rest, pair in pairs.items():
        if len(pair) < 2:
            continue
        (first, one), (second, other) = pair["a"], pair["b"]
        if len(one) == len(other) == 2 and one[0] == other[1] < min(one[1], other[0]):
            of = next((letter for word in rest if (letter := LETTERS.get(word, word)) in ("q", "k", "v")), "")
            found |= {first: of, second: of}
    return found


def steps(source: Source, plain: Mapping[str, str], weight: str, side: Literal["before", "behind"]) -> list[str]:
    """Return the classes of what stands before or behind a weight in its sequence and changes numbers.

    Files name no classes: what has weights is told by their shapes, and what has none can only be missing in between.

    Args:
        source: the parameters and modules.
        plain: every parameter's name in the source, by its name without adapters.
        weight: name of the weight without adapters.
        side: ``"before"`` or ``"behind"``.
    """
    sequence, _, number = weight.removesuffix(".weight").rpartition(".")
    if not number.isdigit() or not weight.endswith(".weight") or source.kind(sequence).endswith(".ModuleList"):
        return []
    position = int(number)
    positions = sorted(int(child) for child in source.children(sequence) if child.isdigit())
    neighbours = [i for i in positions if (i < position if side == "before" else i > position)]
    found = [_class_of(source, plain, f"{sequence}.{i}") for i in neighbours]
    if side == "before" and not source.kind(sequence) and len(neighbours) < position:
        found.append(UNSEEN)
    return [kind for kind in found if not _PASSIVE.search(kind)]


def _class_of(source: Source, plain: Mapping[str, str], path: str) -> str:
    """Return the name of a step's class, in files as far as its tensors tell it."""
    if kind := source.kind(path):
        return kind.rpartition(".")[2]
    children = source.children(path)
    if "running_mean" in children:
        return BATCH_NORM
    name = f"{path}.weight"
    return NORM if name not in plain or len(source.shapes[plain[name]]) == 1 else "a convolution"


def is_norm(step: str) -> bool:
    """Whether a step is a norm."""
    return "norm" in step.lower()


def is_batch_norm(step: str) -> bool:
    """Whether a step is a norm over the batch."""
    return "batchnorm" in step.lower()
