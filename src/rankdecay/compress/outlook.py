"""What a smaller head would drop of a model and save in its cache, from names, shapes and weights alone.

No class of transformers is asked, so that `inspect` can show it with the base install and for files of strangers;
whether the class takes another head size is then what the table of compared model types says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankdecay.attention.source import Source
from rankdecay.attention.windows import Found
from rankdecay.compress.choice import lost_energy, plane_scores, planes_left
from rankdecay.compress.reduction import Layer, Norm, NotReducible, check_reducible, value_energies
from rankdecay.compress.result import Size, size_table, usual_sizes
from rankdecay.compress.types import check_type


@dataclass(frozen=True)
class Outlook:
    """What smaller heads of a model would cost and save.

    Attributes:
        sizes: one for each head size, the present one first; empty if none can be made.
        reason: why none can be made; empty if some can.
    """

    sizes: tuple[Size, ...] = ()
    reason: str = ""

    def lines(self) -> list[str]:
        """Return the table of sizes, or the reason, as lines of text."""
        if self.reason:
            return [f"A smaller head: not possible. {self.reason}"]
        return ["A smaller head, as rankdecay compress makes it without a text", *size_table(self.sizes)]

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain numbers, strings and lists."""
        return {"sizes": [vars(size) for size in self.sizes], "reason": self.reason}


def outlook(source: Source, found: Sequence[Found]) -> Outlook:
    """Return what smaller heads of a causal language model would drop and save.

    Args:
        source: its parameters and settings.
        found: its attention.
    """
    try:
        sizes = _sizes(source, found)
    except NotReducible as error:
        return Outlook(reason=str(error))
    except RuntimeError:  # float64 that overflows: a decomposition of what is not finite
        sizes = ()
    if not all(math.isfinite(size.plane_energy + size.value_energy) for size in sizes) or not sizes:
        return Outlook(reason="its weights are so large or so small that their energies are no numbers.")
    return Outlook(sizes)


def _sizes(source: Source, found: Sequence[Found]) -> tuple[Size, ...]:
    kinds = {source.setting(layer.name, ("model_type",)) for layer in found}
    if kinds == {None}:
        raise NotReducible("no configuration says of which class it is.")
    for kind in sorted(map(str, kinds)):
        check_type(kind)
    check_reducible(found)
    head_dim = found[0].head_dim

    def read(name: str) -> Tensor:
        return source.reader(name)().detach()

    layers = [_layer(layer) for layer in found]
    turned = [layer for layer in layers if layer.found.rotary is not None]
    scores = plane_scores(turned, [f"{layer.found.rotary} {layer.found.frequencies}" for layer in turned], read)
    energies = [value_energies(layer, read, None) for layer in layers]
    width = read(found[0].places["key"].parameter).element_size()
    heads = sum(2 * layer.key_heads for layer in layers)
    sizes = []
    for size in (head_dim, *usual_sizes(head_dim)):
        lost = 0.0
        for score in scores.values():
            kept = score.kept(planes_left(len(score.energy), head_dim, size))
            lost = max(lost, score.lost(kept))
        sizes.append(Size(size, heads * size * width, lost, lost_energy(energies, size)))
    return tuple(sizes)


def _layer(found: Found) -> Layer:
    norm = Norm("", 0.0) if found.qk_norm else None  # that there is one is enough for the energies
    return Layer(found, norm, norm, scale=1.0, new_scale=1.0, sums_to_one=False)
