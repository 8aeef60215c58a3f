r"""Products that an attention head computes with, W_Kᵀ W_Q and W_O W_V: spectra, balance and gap, from their factors.

Written as :math:`A B^T` with :math:`A = W_{K,h}^T, B = W_{Q,h}^T`, or :math:`A = W_{O,h}, B = W_{V,h}^T`, each tall,
(d, head_dim). The product is d × d of rank at most head_dim; with :math:`A = Q_1 R_1, B = Q_2 R_2` its singular values
are those of the head_dim × head_dim core :math:`R_1 R_2^T`, and it is never formed.

L2 on the factors is :math:`\tfrac12(\|A\|^2 + \|B\|^2) \ge \|AB^T\|_*`, with equality exactly when they are balanced,
:math:`A^T A = B^T B`, as they are at every stationary point of an L2-regularised loss (Kobayashi et al., arXiv
2410.23819, Lemma 3.2). The **gap** is the difference of the two sides; the **imbalance** is
:math:`\|A^TA - B^TB\| / \|\tfrac12(A^TA + B^TB)\|`. Neither says that the rank is low: the gap only says that the
penalty *is* nuclear.

What balances depends on the architecture:

* **biases** are a column more of W_Q, W_K and W_V: the token has a constant 1;
* **grouped queries**: the sum over the query heads of a group balances its one key head, and the nuclear norm is that
  of :math:`W_K^T [W_{Q,1} \dots W_{Q,g}]`; likewise for outputs and values;
* **rotary positions** turn W_Q and W_K between the two, plane by plane: only :math:`\|W_{Q,p}\| = \|W_{K,p}\|` of
  each plane balances, and L2 is the group norm :math:`\sum_p \|W_{Q,p}\| \|W_{K,p}\|`. The spectrum is then that of
  equal positions;
* **QK-norm** makes scores that are no bilinear form at all: there is no product, and its spectrum is not shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rankdecay.linalg.backend import double
from rankdecay.linalg.stack import decomposed, triangular
from rankdecay.spectrum import Spectrum

ProductName = Literal["query_key", "query_key_rotary", "value_output"]
#: Which key head query head i of h meets, of g: i // (h / g), or i mod g.
Grouping = Literal["consecutive", "strided"]


def key_head_of(head: int, heads: int, key_heads: int, grouping: Grouping) -> int:
    """Return the key head that query head ``head`` of ``heads`` meets."""
    return head % key_heads if grouping == "strided" else head * key_heads // heads


class Rotary(NamedTuple):
    """Rotary positions of a head, which turn the first ``dims`` coordinates in planes of two."""

    dims: int
    interleaved: bool  # planes (0, 1), (2, 3), …; otherwise (0, dims/2), (1, dims/2 + 1), …

    def planes(self) -> Tensor:
        """Return the two coordinates of each plane, (planes, 2)."""
        turned = torch.arange(self.dims // 2 * 2)
        return turned.unflatten(0, (-1, 2)) if self.interleaved else turned.unflatten(0, (2, -1)).mT


@dataclass(frozen=True, eq=False)
class Product:
    """Product of each head, given by its factors.

    Attributes:
        name: ``"query_key"``, its part that positions turn, ``"query_key_rotary"``, or ``"value_output"``.
        single: (groups, rows, k): W_Kᵀ, or W_Vᵀ: one factor per key or value head, float64.
        several: (groups, heads per group, rows, k): W_Qᵀ, or W_O: one per query head, float64.
        rotary: how positions turn the heads of a query_key product.
        grouping: how the heads are numbered: those of a group together, or one of each group in turn.
    """

    name: ProductName
    single: Tensor
    several: Tensor
    rotary: Rotary | None = None
    grouping: Grouping = "consecutive"

    @property
    def num_heads(self) -> int:
        """Number of products: of query heads."""
        return self.several.shape[0] * self.several.shape[1]

    @cached_property
    def _finite(self) -> Tensor:
        """Mask of the heads that are finite, with the factor their group shares: (groups, heads per group)."""
        single, several = (gram.isfinite().all(-1).all(-1) for gram in self._raw_grams)
        return several & single[:, None]

    @cached_property
    def _raw_grams(self) -> tuple[Tensor, Tensor]:
        return self.single.mT @ self.single, self.several.mT @ self.several

    @cached_property
    def _grams(self) -> tuple[Tensor, Tensor]:
        """AᵀA (groups, k, k) and BᵀB (groups, heads per group, k, k); zeros where not finite."""
        single, several = self._raw_grams
        return _where_finite(single), _where_finite(several)

    @cached_property
    def _triangles(self) -> tuple[Tensor, Tensor]:
        """R of each factor, in the shapes of :attr:`_grams`."""
        single, several = self._grams
        return triangle(self.single, single), triangle(self.several, several)

    def spectrum(self) -> Spectrum:
        """Return the spectrum of each head's product: singular values (heads, k), k the rank it can have at most.

        A head with a non-finite weight has NaN.
        """
        return self._spectrum

    @cached_property
    def _spectrum(self) -> Spectrum:
        single, several = self._triangles
        cores = (several @ single[:, None].mT).cpu()  # small, and slow to decompose on a GPU
        sigma = decomposed(torch.linalg.svdvals, cores).masked_fill(~self._finite.cpu()[..., None], torch.nan)
        rows = max(self.single.shape[-2], self.several.shape[-2])
        return Spectrum(in_order(sigma, self.grouping), rows * torch.finfo(torch.float32).eps)

    @property
    def _balanced(self) -> tuple[Tensor, Tensor]:
        """Matrices that are equal in a balanced group: AᵀA and Σ BᵀB over its heads, (groups, k, k)."""
        single, several = self._grams
        return single, several.sum(1)

    @property
    def imbalance(self) -> Tensor:
        """Relative imbalance of the group a head belongs to, (heads,), in [0, 2]; 0 iff balanced.

        With rotary positions, of the norms of the planes.
        """
        first, second = self._balanced
        if self.rotary is not None:
            first, second = (self._by_plane(gram) for gram in (first, second))
        size = torch.linalg.matrix_norm
        return self._per_head(size(first - second) / (size(first + second) / 2))

    @property
    def nuclear_gap(self) -> Tensor:
        """Gap ½(‖A‖² + ‖B‖²) − ‖ABᵀ‖_* of the group a head belongs to, (heads,), ≥ 0, in the units of the product.

        With rotary positions the group norm of the planes takes the place of the nuclear norm.
        """
        return self._per_head(self._mean_frobenius - self._penalty)

    @property
    def nuclear_ratio(self) -> Tensor:
        """Ratio ‖ABᵀ‖_* / ½(‖A‖² + ‖B‖²) of the group a head belongs to, (heads,), in [0, 1]; 1 iff balanced."""
        return self._per_head(self._penalty / self._mean_frobenius)

    @property
    def mean_frobenius(self) -> Tensor:
        """Mean ½(‖A‖² + ‖B‖²) of the group a head belongs to, (heads,): L2 on the factors, up to its strength."""
        return self._per_head(self._mean_frobenius)

    @property
    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Diagonals of AᵀA and BᵀB of the group a head belongs to, (heads, n) each; equal if balanced.

        With rotary positions, of each plane, then of each coordinate that is not turned.
        """
        first, second = (self._per_head(self._diagonal(gram)) for gram in self._balanced)
        return first, second

    @property
    def _mean_frobenius(self) -> Tensor:
        single, several = (gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in self._balanced)
        return (single + several) / 2

    @cached_property
    def _penalty(self) -> Tensor:
        """L2 on the factors if they were balanced, (groups,): the nuclear norm, or that of the planes."""
        single = self._triangles[0]
        stacked = triangle(self.several.flatten(1, 2), self._balanced[1])  # the group's heads under each other
        if self.rotary is None:
            return decomposed(torch.linalg.svdvals, stacked @ single.mT).sum(-1)
        planes = self.rotary.dims // 2
        by_plane = [self._diagonal(gram)[:, :planes].sqrt() for gram in self._balanced]
        planes_norm = (by_plane[0] * by_plane[1]).sum(-1)
        rest = slice(self.rotary.dims, None)  # coordinates that positions do not turn
        return planes_norm + decomposed(torch.linalg.svdvals, stacked[..., rest] @ single[..., rest].mT).sum(-1)

    def _diagonal(self, gram: Tensor) -> Tensor:
        """Diagonal of each Gram matrix; with rotary positions the two coordinates of a plane are added."""
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        if self.rotary is None:
            return diagonal
        planes = diagonal[..., self.rotary.planes().to(gram.device)].sum(-1)
        return torch.cat([planes, diagonal[..., self.rotary.dims :]], -1)

    def _by_plane(self, gram: Tensor) -> Tensor:
        """Gram matrix with each plane reduced to its squared norm, and no entries between planes: what can balance."""
        assert self.rotary is not None
        out = torch.zeros_like(gram)
        a, b = self.rotary.planes().to(gram.device).unbind(1)
        out[:, a, a] = (gram[:, a, a] + gram[:, b, b]) / 2**0.5
        dims = self.rotary.dims
        out[:, dims:, dims:] = gram[:, dims:, dims:]
        return out

    def _per_head(self, per_group: Tensor) -> Tensor:
        finite = self._finite.all(1)  # one broken head leaves its group unknown
        value = per_group.masked_fill(~finite.view(-1, *[1] * (per_group.ndim - 1)), torch.nan)
        return in_order(value[:, None].expand(-1, self.several.shape[1], *value.shape[1:]), self.grouping)


def grouped(heads: Tensor, groups: int, grouping: Grouping) -> Tensor:
    """Return query heads by the key head they share: (groups, heads per group, …)."""
    if grouping == "strided":
        return heads.unflatten(0, (-1, groups)).transpose(0, 1)
    return heads.unflatten(0, (groups, -1))


def in_order(heads: Tensor, grouping: Grouping) -> Tensor:
    """Return (groups, heads per group, …) as (heads, …) in the order of the query heads: what undoes ``grouped``."""
    return (heads.transpose(0, 1) if grouping == "strided" else heads).flatten(0, 1)


def _where_finite(matrices: Tensor) -> Tensor:
    """Replace each matrix that is not finite by zeros."""
    return torch.where(matrices.isfinite().all(-1).all(-1)[..., None, None], matrices, 0.0)


def triangle(factor: Tensor, gram: Tensor | None = None) -> Tensor:
    """Return R with RᵀR = XᵀX for each factor X, (…, k, k), by Cholesky, which is matrix products; by QR where need be.

    Squaring halves the digits: σ of X comes out with an error of 2^-52 σ₁²/σ. Where that may exceed 1e-10 σ₁, in a head
    of (nearly) lower rank than its size, X is factored itself.

    Args:
        factor: X, (…, rows, k), float64.
        gram: XᵀX where it is known, with zeros for what is not finite.
    """
    gram = factor.mT @ factor if gram is None else gram
    lower, failed = torch.linalg.cholesky_ex(gram)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    poor = (failed > 0) | (diagonal.amin(-1) < 1e-5 * diagonal.amax(-1))
    upper = lower.mT
    if poor.any():
        upper[poor] = decomposed(triangular, _where_finite(factor[poor]))
    return upper


def with_bias(matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Return (heads, d, in) with the bias (heads · d,) as a column more, in float64."""
    matrix = double(matrix)
    if bias is None:
        return matrix
    return torch.cat([matrix, double(bias).reshape(*matrix.shape[:2], 1)], -1)
