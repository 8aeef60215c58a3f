"""Which rotary planes stay: by what a score would lose, from the weights alone, or by what a text shows.

Without a text the planes of least *energy* go, Σ_heads ‖a_j‖²‖b_j‖² with the rows a_j of W_Q and b_j of W_K: the most
that dropping the plane can cost a score of unit inputs. Energy is not loss: in SmolLM2-135M it orders the planes only
roughly by what leaving one out costs (`docs/findings/compress.md`). With a text that loss itself is the score.

One set of planes serves all layers that share a table of frequencies, because a configuration has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankdecay.compress.reduction import Layer, Read, plane_parts


@dataclass(frozen=True)
class PlaneScores:
    """What is known of the planes of one table of frequencies.

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
        gone = torch.ones_like(self.removable)
        gone[kept] = False
        return float(self.energy[gone].sum())


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
        query, value = plane_parts(
            layer, read
        )  # squared norms, (key heads, heads of each, planes), (key heads, planes)
        if layer.query_norm is None:
            energy = (query * value[:, None]).sum((0, 1))
            nothing = (query.amax((0, 1)) == 0) | (value.amax(0) == 0)
        else:  # each side is divided by its root mean square, in which every plane counts
            query = query / query.sum(-1, keepdim=True).clamp_min(torch.finfo(query.dtype).tiny)
            value = value / value.sum(-1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
            energy = (query * value[:, None]).sum((0, 1)) + query.sum((0, 1)) + value.sum(0)
            nothing = (query.amax((0, 1)) == 0) & (value.amax(0) == 0)
        energies[key] = energies.get(key, 0) + energy
        removable[key] = removable.get(key, True) & nothing
    return {
        key: PlaneScores(energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny), removable[key])
        for key, energy in energies.items()
    }


def planes_left(planes: int, head_dim: int, new_head_dim: int) -> int:
    """Return how many planes a head of another size has; of heads that positions turn in part, in proportion."""
    return max(1, round(planes * new_head_dim / head_dim))


def lost_energy(energies: Sequence[Tensor], kept: int) -> float:
    """Return the share of energy beyond the largest few, a mean over heads.

    Args:
        energies: of each layer, (heads, directions), largest first.
        kept: how many stay.
    """
    shares = [1 - e[:, :kept].sum(-1) / e.sum(-1).clamp_min(torch.finfo(e.dtype).tiny) for e in energies]
    return float(torch.cat(shares).clamp_min(0).mean())


def with_losses(
    scores: Mapping[str | None, PlaneScores], losses: Mapping[str | None, Tensor]
) -> dict[str | None, PlaneScores]:
    """Return scores that choose by the loss with one plane left out."""
    return {key: PlaneScores(one.energy, one.removable, losses[key]) for key, one in scores.items()}
