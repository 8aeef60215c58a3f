"""Products of a GPU's tensor cores in place of float32's: operands rounded to TF32 or bfloat16, sums in float32.

==============  ==========================================  ==================  ====================  =================
tier            operands                                    unit roundoff       products              TFLOP/s, H200
==============  ==========================================  ==================  ====================  =================
``tf32``        11 bits, rounded here, so none is cut off   2⁻¹¹                1 of TF32             494
``bfloat16x3``  a sum of two of 8 bits; lo·lo is left out   some 2⁻¹⁷           3 of bfloat16         330
``float32``     as they are                                 2⁻²⁴                1 of float32          67
==============  ==========================================  ==================  ====================  =================

(The rates are those of the data sheet.) A CPU rounds to the same operands and multiplies them in float32, where a
product of two of them is exact. So `benchmarks/tiers.py` prints without a GPU what a step has of error, up to the
order and the rounding of sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: A product of float32 stacks (b, m, k), (b, k, n).
Product = Callable[[Tensor, Tensor], Tensor]

#: Whether torch has a product of bfloat16 that leaves its sum in float32; from 2.8 on.
_SUMS_IN_FLOAT32 = "out_dtype" in (torch.bmm.__doc__ or "")


def available(device: torch.device) -> tuple[str, ...]:
    """Return the tiers of a device, the quickest first: all from capability 8.0 of CUDA on, else float32 alone."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return ("float32",)
    return ("tf32", "bfloat16x3", "float32") if _SUMS_IN_FLOAT32 else ("tf32", "float32")


def product_of(tier: str) -> Product | None:
    """Return the product of a tier, on any device; None for torch's own."""
    return {"tf32": by_tf32, "bfloat16x3": by_bfloat16x3, "float32": None}[tier]


def by_tf32(A: Tensor, B: Tensor) -> Tensor:
    """Return A B of operands rounded to TF32."""
    A, B = round_to_tf32(A), round_to_tf32(B)
    with _tf32_allowed() if A.device.type == "cuda" else contextlib.nullcontext():
        return A @ B


def by_bfloat16x3(A: Tensor, B: Tensor) -> Tensor:
    """Return A B of operands that are sums of two bfloat16 numbers each, without the product of the smaller two."""
    (high, low), (other_high, other_low) = _split(A), _split(B)
    small = of_bfloat16(high, other_low).add_(of_bfloat16(low, other_high))
    return small.add_(of_bfloat16(high, other_high))


def of_bfloat16(A: Tensor, B: Tensor) -> Tensor:
    """Return the float32 product of bfloat16 stacks."""
    return torch.bmm(A, B, out_dtype=torch.float32) if A.device.type == "cuda" else A.float() @ B.float()


def round_to_tf32(A: Tensor) -> Tensor:
    """Return float32 numbers rounded to the nearest of 11 bits, half away from zero; |A| < 2¹²⁷."""
    return (A.contiguous().view(torch.int32) + 0x1000).bitwise_and_(-0x2000).view(torch.float32)


def _split(A: Tensor) -> tuple[Tensor, Tensor]:
    high = A.bfloat16()
    return high, (A - high).bfloat16()


@contextlib.contextmanager
def _tf32_allowed() -> Iterator[None]:
    """Let CUDA multiply float32 in TF32, inside a block of full precision."""
    settings = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(settings, "fp32_precision") else ("allow_tf32", True)
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)
