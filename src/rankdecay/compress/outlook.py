"""Energy that a smaller head would drop and cache that it would save, from names, shapes and weights alone.

No class of transformers is asked, so that `inspect` can show it with the base install and for untrusted files;
whether the class takes another head size is then what the table of compared model types says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankdecay.attention.module.found import Found
from rankdecay.attention.source import Source
from rankdecay.compress.choice import kept_planes, lost_energy, lost_planes, plane_scores
from rankdecay.compress.reduction import Layer, Norm, NotReducible, cached_heads, check_reducible, value_energies
from rankdecay.compress.result import Size, size_table, usual_sizes
from rankdecay.compress.types import check_type

_NO_NUMBERS = "its weights are too large or too small: their energies overflow or underflow float64."


@dataclass(frozen=True)
class Outlook:
    """Costs and savings of smaller heads of a model.

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
        return Outlook(_sizes(source, found))
    except NotReducible as error:
        return Outlook(reason=str(error))
    except RuntimeError:  # float64 that overflows: a decomposition of what is not finite
        return Outlook(reason=_NO_NUMBERS)


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
    if not all(bool(one.isfinite().all()) for one in (*energies, *(score.energy for score in scores.values()))):
        raise NotReducible(_NO_NUMBERS)
    each = cached_heads(found) * read(found[0].places["key"].parameter).element_size()  # bytes of a coordinate
    kept = {size: kept_planes(scores, head_dim, size) for size in (head_dim, *usual_sizes(head_dim))}
    return tuple(
        Size(size, each * size, lost_planes(scores, planes), lost_energy(energies, size))
        for size, planes in kept.items()
    )


def _layer(found: Found) -> Layer:
    norm = Norm("", 0.0) if found.qk_norm else None  # that there is one is enough for the energies
    return Layer(found, norm, norm, scale=1.0, new_scale=1.0, sums_to_one=False)
