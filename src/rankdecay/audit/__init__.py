r"""Audit of what L2 and low-rank decay do to each parameter, from the scale symmetries that one gradient shows.

If a loss does not change when W becomes cW, then :math:`\langle\nabla_W L, W\rangle = 0` (Euler). If it does not
change when A becomes cA and B becomes B/c, then :math:`\langle\nabla_A L, A\rangle = \langle\nabla_B L, B\rangle`.
Both are sums of terms g·w that cancel, so they are measured against the size such a sum has when nothing makes it
cancel, the root of the sum of the squared terms:

.. math:: \mathrm{euler} = \frac{|\sum g w|}{\sqrt{\sum (g w)^2}}, \qquad
          \mathrm{balance} = \frac{|\sum_A g w - \sum_B g w|}{\sqrt{\sum_{A, B} (g w)^2}}

These are around 1 for a parameter without the symmetry, however large it is, where the cosine of g and W falls like
1/√n for *every* matrix and proves nothing. A symmetry of all heads, or of all hidden units, must hold in each of them:
the root mean square over them is judged.

==================  ========================  =========================================================
kind                equation                  found in
==================  ========================  =========================================================
scale_invariant     euler ≈ 0                 W_Q and W_K under QK-norm, matrices right before a norm
pair                balance ≈ 0               W_Q and W_K, W_V and W_O, the gains of q_norm and k_norm, up and
                                              down projections of a gated or ReLU feed-forward, LoRA's A and B
neither             neither                   the rest
unknown             nothing to measure        frozen, unused, zero, or a gradient of rounding only
==================  ========================  =========================================================

A bias scales with its matrix and counts with it, but an output bias does not scale with W_O. Under grouped queries the
query heads of a group are one side, under rotary positions the scalar symmetry is as it was.

The equations are necessary: a parameter without the symmetry satisfies one by chance about once in 1/tolerance.
A finite rescaling settles it (``confirm=True``).

Sources: the theory is in Kobayashi et al., arXiv 2410.23819 (pairs), and Low-Rank Decay, arXiv 2606.04405 (invariance).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rankdecay.attention import find_attention
from rankdecay.attention.locate import Names, SearchOptions, listed, locate
from rankdecay.attention.scale import NORM_EPS
from rankdecay.attention.source import ModuleSource
from rankdecay.audit.pairs import pairs
from rankdecay.audit.parts import parts, unmeasurable
from rankdecay.audit.report import AuditReport, AuditRow, Share
from rankdecay.audit.trial import Trial
from rankdecay.audit.view import size
from rankdecay.checks import check_number
from rankdecay.decay.roles import roles_in

__all__ = ["AuditReport", "AuditRow", "Share", "audit"]


def audit(
    model: nn.Module,
    loss: Callable[[], Tensor] | Tensor,
    *,
    confirm: bool = False,
    tolerance: float | None = None,
    names: Names = None,
    num_heads: int | None = None,
    only: bool = False,
) -> AuditReport:
    """Report for every parameter, and every head, what L2 and low-rank decay do to it.

    One backward pass, by ``torch.autograd.grad``: no ``.grad`` is written and no hook of an optimizer runs. The model
    should be in eval mode, or at least without dropout, if ``confirm`` is set.

    Args:
        model: the model, without its optimizer.
        loss: computes the loss on the model, as a scalar tensor with a graph; or is that tensor.
        confirm: rescale by 1.5 what seems to have a symmetry, and look at the loss. One to three forward passes per
            matrix; the parameters are put back, also after an exception.
        tolerance: what counts as 0. By default the larger of 1e-3, for the eps inside norms, and 8 roundings of the
            parameter's dtype. Under autocast the computation is coarser than the dtype: give 0.06 for bfloat16.
        names: how your own attention names its projections, as for :func:`rankdecay.find_attention`.
        num_heads: number of query heads, where the model does not say it.
        only: look for ``names`` alone.

    Returns:
        The report; ``print`` it.

    Raises:
        TypeError: If ``model`` is no module, or ``loss`` neither a tensor nor a callable that returns one.
        ValueError: If the loss is not a finite scalar, has no graph, or does not depend on the model; if a gradient is
            not finite; if ``names`` finds no attention; if ``confirm`` meets a tensor, or a loss that is not
            the same twice.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.LayerNorm(4, eps=0.0)).double()
        >>> x = torch.randn(16, 8, dtype=torch.float64)
        >>> [row.kind for row in audit(model, lambda: model(x).pow(3).mean()).rows]
        ['scale_invariant', 'neither', 'unknown']
    """
    source = ModuleSource(model)
    found, unhandled = locate(source, SearchOptions(names, num_heads, only=only))
    if names is not None and not found:
        find_attention(model, names, num_heads, only=only)  # raises, and lists what there is
    if tolerance is not None:
        check_number("tolerance", tolerance, above=0, below=1, remedy="leave it out for one that suits the dtype")
    if confirm and isinstance(loss, Tensor):
        raise ValueError("confirm=True computes the loss again: pass a function of no arguments, not its value.")
    gradients = _gradients(model, loss)
    trial = Trial(loss) if confirm and not isinstance(loss, Tensor) else None

    largest = max(size(g, parameter.detach()) for parameter, g in gradients.items())
    found_parts = parts(model, found, gradients, roles_in(source, found))
    for part in found_parts:
        part.reason = unmeasurable(part.matrix, largest)
        part.tolerance = tolerance or max(NORM_EPS, 8 * torch.finfo(part.matrix.parameter.dtype).eps)
        if not part.reason:
            part.find_invariance(trial)
    for pair in pairs(found, found_parts):
        if not any(side.reason or side.partner or side.by_head for side in (pair.first, pair.second)):
            pair.judge(trial)
    notes = tuple(f"{reason}." for reason in listed(unhandled))
    return AuditReport(tuple(row for part in found_parts for row in part.rows(largest)), tolerance, notes)


def _gradients(model: nn.Module, loss: Callable[[], Tensor] | Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of every parameter that the loss depends on."""
    given = isinstance(loss, Tensor)
    if not given and not callable(loss):
        raise TypeError(f"loss must be a function of no arguments or a tensor, got {type(loss).__name__}.")
    with torch.enable_grad():
        value = loss if given else loss()
    if not isinstance(value, Tensor):
        raise TypeError(f"loss() returned {type(value).__name__}, expected a scalar tensor (for transformers: .loss).")
    if value.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(value.shape)}, expected one number: take .mean() or .sum().")
    if not value.requires_grad:
        raise ValueError("the loss has no graph: compute it without torch.no_grad(), .detach() or .item().")
    if not value.isfinite():
        raise ValueError(f"the loss is {value.item()}, and so are its gradients; audit a batch with a finite loss.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("every parameter of the model is frozen; set requires_grad_() on those to look at.")
    gradients = torch.autograd.grad(value, trained, allow_unused=True, retain_graph=given)
    out = {parameter: g.detach() for parameter, g in zip(trained, gradients, strict=True) if g is not None}
    if not out:
        raise ValueError("the loss does not depend on any parameter of the model: is it computed with this model?")
    for name, parameter in model.named_parameters():
        if parameter in out and not out[parameter].isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite; audit in float32 or on another batch.")
    return out
