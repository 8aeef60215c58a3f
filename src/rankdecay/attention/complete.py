"""Whether a checkpoint holds every layer of its model: from the numbers in its names, and the number it states."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import count, pairwise

from rankdecay.attention.checkpoints import Checkpoint
from rankdecay.attention.model_types import NUM_LAYERS
from rankdecay.attention.numbering import LISTS, number_in


def missing_layers(checkpoint: Checkpoint, modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each list of layers that is not whole, with what is missing.

    One that does not begin at 0, and states no number, may be all that was meant, such as a stage of a pipeline.

    Args:
        checkpoint: the names of all tensors, since a layer may be there without attention.
        modules: paths of the modules with attention; other lists do not matter.
    """
    lists = {path: numbers for path, numbers in _lists(checkpoint.shapes).items() if _holds(path, modules)}
    for path, numbers in lists.items():
        first, last = min(numbers), max(numbers)
        gap = next(i for i in count(first, _stride(numbers)) if i not in numbers)
        depth = checkpoint.setting(f"{path}.{last}", NUM_LAYERS) if len(lists) == 1 else None
        if gap < last:
            yield (
                path,
                f"layer {gap} is missing although layer {last} is present: the file is incomplete; copy it again",
            )
        elif isinstance(depth, int) and len(numbers) < depth:
            yield (
                path,
                f"has {len(numbers)} of the {depth} layers in its config ({first}-{last}): give the file or the folder "
                "that holds them all",
            )


def _stride(numbers: set[int]) -> int:
    """Return the step between the numbers of a list: in a sequence, what has no weights may stand between layers."""
    ordered = sorted(numbers)
    steps = {after - before for before, after in pairwise(ordered)}
    return steps.pop() if len(steps) == 1 and len(ordered) > 2 else 1


def _lists(names: Collection[str]) -> dict[str, set[int]]:
    """Return the numbers of the layers in each list, the outermost of each name, by the list's path."""
    lists: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if parts[i - 1] in LISTS and (number := number_in(parts[i])) is not None:
                lists.setdefault(".".join(parts[:i]), set()).add(number)
                break
    return lists


def _holds(path: str, modules: Collection[str]) -> bool:
    return any(module.startswith(f"{path}.") for module in modules)
