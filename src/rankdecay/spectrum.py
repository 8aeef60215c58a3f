"""Named ranks and norms of a set of singular values.

Several different numbers are called "effective rank" in public tools, so here each has a different
name. With singular values σ₁ ≥ σ₂ ≥ … ≥ σ_k ≥ 0, k = min(m, n):

==================  ===========================  ==========  ===============================================
name                formula                      range       source
==================  ===========================  ==========  ===============================================
effective rank      exp(-Σ qᵢ ln qᵢ), qᵢ=σᵢ/Σσ    [1, k]      Roy & Vetterli, EUSIPCO 2007
stable rank         ‖W‖_F² / ‖W‖₂²               [1, k]      Rudelson & Vershynin, J. ACM 2007
nuclear rank        ‖W‖_*² / ‖W‖_F²              [1, k]      "nuclear ratio" in decay prototypes
participation ratio (Σσ²)² / Σσ⁴                 [1, k]      inverse participation ratio of the energies σ²
pseudo rank         share of σ with 95 % of Σσ   (0, 1]      Kobayashi et al., arXiv 2410.23819
numerical rank      #{σ > tol}                   0 … k       `numpy.linalg.matrix_rank`
==================  ===========================  ==========  ===============================================

All but the last ignore the scale of W, and, up to rounding, stable rank ≤ participation ratio ≤ nuclear rank ≤
effective rank ≤ number of non-zero σ. The zero matrix has every rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankdecay.checks import check_number
from rankdecay.linalg.stack import check_matrix, decomposed, exponent_of, nonzero, power_of_two


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values and the norms and ranks that follow from them, batched over leading dimensions.

    Every property is a tensor of the leading shape (0-d for one matrix). A spectrum with a non-finite value
    gives NaN in its own entries only, of ranks and norms. Ranks are computed on σ/σ₁, so that nothing overflows.

    Attributes:
        singular_values: Shape (..., k), non-negative, in descending order.
        resolution: σ ≤ resolution·σ₁ cannot be told from 0. Without one, k times the rounding of the dtype.

    Example:
        >>> s = Spectrum(torch.tensor([4.0, 3.0]))
        >>> s.nuclear_norm.item(), s.frobenius_norm.item(), s.stable_rank.item()
        (7.0, 5.0, 1.5625)
    """

    singular_values: Tensor
    resolution: float | None = None

    def __post_init__(self) -> None:
        """Check type and shape, which needs no reading of the device."""
        sigma = self.singular_values
        if not isinstance(sigma, Tensor) or not sigma.dtype.is_floating_point:
            given = f"dtype {sigma.dtype}" if isinstance(sigma, Tensor) else type(sigma).__name__
            raise TypeError(f"singular_values must be a floating-point tensor, got {given}.")
        if sigma.ndim < 1:
            raise ValueError("singular_values is 0-d; expected shape (..., k): pass sigma[None] for one value.")

    @property
    def nuclear_norm(self) -> Tensor:
        """‖W‖_* = Σσ, in the units of W."""
        return self._known(self.singular_values.sum(-1))

    @property
    def frobenius_norm(self) -> Tensor:
        """‖W‖_F = √Σσ², in the units of W."""
        if self.singular_values.shape[-1] == 0:
            return self.nuclear_norm
        return torch.linalg.vector_norm(self._relative, dim=-1) * self.spectral_norm

    @property
    def spectral_norm(self) -> Tensor:
        """‖W‖₂ = σ₁, in the units of W."""
        sigma = self.singular_values
        return self._known(sigma[..., 0]) if sigma.shape[-1] else sigma.sum(-1)

    @property
    def effective_rank(self) -> Tensor:
        """exp(-Σ qᵢ ln qᵢ) with qᵢ = σᵢ/Σσ (Roy & Vetterli 2007), in [1, k]; 0 for a zero matrix.

        The exponential of the entropy of the singular values taken as a distribution: sensitive to the whole
        tail.
        """
        s = self._relative
        q = s / s.sum(-1, keepdim=True).clamp_min(1)  # the largest is 1, so the sum is 0 or at least 1
        return self._rank(torch.special.entr(q).sum(-1).exp())

    @property
    def stable_rank(self) -> Tensor:
        """‖W‖_F² / ‖W‖₂² (Rudelson & Vershynin 2007), in [1, k]; 0 for a zero matrix.

        Blind to the tail, and falls also when σ₁ alone grows.
        """
        return self._rank(self._relative.square().sum(-1))

    @property
    def nuclear_rank(self) -> Tensor:
        """‖W‖_*² / ‖W‖_F², in [1, k]; 0 for a zero matrix. The participation ratio of σ itself."""
        s = self._relative
        return self._rank(s.sum(-1).square() / s.square().sum(-1).clamp_min(1))

    @property
    def participation_ratio(self) -> Tensor:
        """(Σσ²)² / Σσ⁴, in [1, k]; 0 for a zero matrix. How many directions share the energy σ²."""
        energy = self._relative.square()
        return self._rank(energy.sum(-1).square() / energy.square().sum(-1).clamp_min(1))

    def pseudo_rank(self, share: float = 0.95) -> Tensor:
        """Return the share of singular values needed for ``share`` of Σσ (arXiv 2410.23819).

        The smallest j with σ₁ + … + σ_j ≥ share·Σσ, divided by k.

        Args:
            share: Fraction of the nuclear norm, in (0, 1].

        Returns:
            Values in (0, 1], of the leading shape; 0 for a zero matrix.

        Raises:
            ValueError: If ``share`` is outside (0, 1].
        """
        check_number("share", share, above=0, at_most=1, remedy="0.95 asks for 95 % of the sum of all σ")
        s = self._relative
        total = s.cumsum(-1)
        if s.shape[-1] == 0:
            return self.nuclear_norm
        # A rounding below: the sum of equal values must reach its own total.
        short = total < share * total[..., -1:] * (1 - 8 * torch.finfo(s.dtype).eps)
        return self._rank((short.sum(-1) + 1).to(s.dtype) / s.shape[-1])

    def numerical_rank(self, tol: float | Tensor | None = None) -> Tensor:
        """Return the number of singular values above ``tol``.

        Args:
            tol: Absolute threshold in the units of W, a number or one per matrix. By default resolution·σ₁,
                which for :func:`spectrum` is max(m, n) roundings (of float32, unless W was float64).

        Returns:
            Whole numbers of the leading shape, in the dtype of ``singular_values`` so that NaN can say
            "unknown".
        """
        sigma = self.singular_values
        if tol is None:
            rounding = sigma.shape[-1] * torch.finfo(sigma.dtype).eps
            tol = (rounding if self.resolution is None else self.resolution) * self.spectral_norm
        threshold = torch.as_tensor(tol, dtype=sigma.dtype, device=sigma.device)
        return self._known((sigma > threshold[..., None]).sum(-1).to(sigma.dtype))

    @property
    def _relative(self) -> Tensor:
        """Return σ/σ₁; zeros for a zero matrix."""
        sigma = self.singular_values
        largest = self.spectral_norm[..., None]
        return sigma / nonzero(largest)

    def _known(self, value: Tensor) -> Tensor:
        finite = self.singular_values.isfinite().all(-1)
        return torch.where(finite, value, torch.nan)

    def _rank(self, value: Tensor) -> Tensor:
        """Return zero for a zero matrix, NaN for a non-finite one, ``value`` otherwise."""
        return self._known(torch.where(self.spectral_norm == 0, 0.0, value))


@torch.no_grad()
def spectrum(W: Tensor) -> Spectrum:
    """Return the singular values of each matrix of ``W``, in float64, with the norms and ranks named.

    By a direct float64 ``svdvals``, because a spectrum is looked at down to its tail: singular values are
    accurate to about 1e-16 σ₁, where those of a float64 Gram matrix would end at 1e-8 σ₁.

    Args:
        W: Matrix or stack, shape (..., m, n), any real float dtype, any device. Not modified.

    Returns:
        A :class:`Spectrum` of shape (..., min(m, n)) on the CPU. A matrix with a non-finite entry has
        NaN.

    Raises:
        TypeError: If ``W`` is not a real floating-point tensor.
        ValueError: If ``W`` has fewer than two dimensions, or no numbers, as on the meta device.

    Example:
        >>> spectrum(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).singular_values
        tensor([4., 3.], dtype=torch.float64)
    """
    check_matrix(W, result=False)
    if W.is_meta:
        raise ValueError("W is on the meta device and has no values: load its weights first.")
    X = W.detach().to("cpu", torch.float64)
    if X.numel() == 0:
        return Spectrum(X.new_zeros((*X.shape[:-2], min(X.shape[-2:]))))
    largest = torch.linalg.vector_norm(X, ord=torch.inf, dim=(-2, -1), keepdim=True)
    bad = ~largest.isfinite()
    # A power of two near the largest entry: exact, and LAPACK never meets an overflow.
    exponent = exponent_of(largest, bad)
    X = (X * power_of_two(-exponent, torch.float64)).masked_fill_(bad, 0)
    sigma = decomposed(torch.linalg.svdvals, X) * power_of_two(exponent, torch.float64)[..., 0]
    resolution = max(X.shape[-2:]) * torch.finfo(W.dtype if W.dtype == torch.float64 else torch.float32).eps
    return Spectrum(sigma.masked_fill_(bad[..., 0], torch.nan), resolution)
