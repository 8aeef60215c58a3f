"""Choice of the rotary planes that stay: by what a score would lose, from the weights alone, or by a text.

Without a text the planes of least *energy* go, Σ_heads ‖a_j‖²‖b_j‖² with the rows a_j of W_Q and b_j of W_K: the most
that dropping the plane can cost a score of unit inputs. Energy is not loss: in SmolLM2-135M it orders the planes only
roughly by what leaving one out costs (`docs/findings/compress.md`). With a text that loss itself is the score.

One set of planes serves all layers that share a table of frequencies, because a configuration has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankdecay.compress.reduction import Layer, Read, plane_parts, shares


@dataclass(frozen=True)
class PlaneScores:
    """Scores of the planes of one table of frequencies.

    Attributes:
        energy: the share of the energy of all planes that each has, (planes,).
        removable: whether dropping it changes nothing, (planes,).
        loss: the loss on a text with this plane left out, (planes,); None without a text.
    """

    energy: Tensor
    removable: Tensor
    loss: Tensor | None = None

    def kept(self, planes: int) -> Tensor:
        """Return the planes that stay, in increasing order: first go those that change nothing, then by the score."""
        score = (self.energy if self.loss is None else self.loss).clone()
        score[self.removable] = -torch.inf
        return score.sort(stable=True, descending=True).indices[:planes].sort().values

    def lost(self, kept: Tensor) -> float:
        """Return the share of the energy that the other planes have."""
        return float(self.energy[self._gone(kept)].sum())

    def is_free(self, kept: Tensor) -> bool:
        """Whether dropping the other planes changes nothing."""
        return bool(self.removable[self._gone(kept)].all())

    def _gone(self, kept: Tensor) -> Tensor:
        return torch.ones_like(self.removable).index_fill(0, kept, False)


#: What is known of the planes, by table of frequencies.
Scores = Mapping[str | None, PlaneScores]


def plane_scores(layers: Sequence[Layer], keys: Sequence[str | None], read: Read) -> dict[str | None, PlaneScores]:
    """Return the energy of the planes by table of frequencies, with layers and heads weighted by their energy.

    Args:
        layers: the layers with rotary positions.
        keys: the table of each.
        read: reads a parameter.
    """
    energies: dict[str | None, Tensor] = {}
    removable: dict[str | None, Tensor] = {}
    for layer, key in zip(layers, keys, strict=True):
        # squared norms, (key heads, heads of each, planes) and (key heads, planes)
        of_query, of_key = plane_parts(layer, read)
        no_query, no_key = of_query.amax((0, 1)) == 0, of_key.amax(0) == 0
        if layer.query_norm is None:
            energy = (of_query * of_key[:, None]).sum((0, 1))
            nothing = no_query | no_key
        else:  # each side is divided by its root mean square, in which every plane counts
            of_query, of_key = shares(of_query), shares(of_key)
            energy = (of_query * of_key[:, None]).sum((0, 1)) + of_query.sum((0, 1)) + of_key.sum(0)
            nothing = no_query & no_key
        energies[key] = energies.get(key, 0) + energy
        removable[key] = removable.get(key, True) & nothing
    return {key: PlaneScores(shares(energy), removable[key]) for key, energy in energies.items()}


def planes_left(planes: int, head_dim: int, new_head_dim: int) -> int:
    """Return how many planes a head of another size has; of heads that positions turn in part, in proportion."""
    return max(1, round(planes * new_head_dim / head_dim))


def kept_planes(scores: Scores, head_dim: int, new_head_dim: int) -> dict[str | None, Tensor]:
    """Return the planes that stay in a head of another size, by table of frequencies."""
    return {key: one.kept(planes_left(len(one.energy), head_dim, new_head_dim)) for key, one in scores.items()}


def lost_planes(scores: Scores, kept: Mapping[str | None, Tensor]) -> float:
    """Return the share of the planes' energy that is dropped, the largest over tables of frequencies."""
    return max((scores[key].lost(planes) for key, planes in kept.items()), default=0.0)


def lost_energy(energies: Sequence[Tensor], kept: int) -> float:
    """Return the share of energy beyond the largest few, a mean over heads.

    Args:
        energies: of each layer, (heads, directions), largest first.
        kept: how many stay.
    """
    return float(torch.cat([shares(one)[:, kept:].sum(-1) for one in energies]).mean())


def with_losses(scores: Scores, losses: Mapping[str | None, Tensor]) -> dict[str | None, PlaneScores]:
    """Return scores that choose by the loss with one plane left out."""
    return {key: replace(one, loss=losses[key]) for key, one in scores.items()}
