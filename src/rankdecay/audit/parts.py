"""Parts of a model that can have a scale symmetry, and whether each is scale-invariant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankdecay.attention import Window
from rankdecay.attention.layer import WHOLE
from rankdecay.attention.module.found import Found
from rankdecay.attention.scale import NORM_EPS, Terms, cancels
from rankdecay.attention.source import named_parameters
from rankdecay.audit.report import AuditRow, Kind, Share
from rankdecay.audit.trial import RESCALING, Trial, alternating
from rankdecay.audit.view import ParameterView, size, terms_of
from rankdecay.decay.roles import ParameterRoles
from rankdecay.linalg.backend import double
from rankdecay.spectrum import spectrum


def unmeasurable(view: ParameterView, largest: float) -> str:
    """Return why a view has no measurable symmetry, or ``""``; ``largest`` is the largest ‖g‖‖W‖ in the model."""
    if not view.parameter.requires_grad:
        return "frozen: not trained, and so not decayed"
    if view.gradient is None:
        return "unused: the loss does not depend on it, so any decay pulls it to zero unopposed"
    if not view.whole(view.parameter).any():
        return "zero: there is nothing to decay yet"
    rounding = min(16 * torch.finfo(view.parameter.dtype).eps, 1e-5)
    if size(view.whole(view.gradient), view.whole(view.parameter)) <= rounding * largest:
        return "without effect here: its gradient is rounding at most, so any decay pulls it to zero unopposed"
    return ""


@dataclass(eq=False)
class AuditedPart:
    """Matrix with its bias, or another parameter, and the symmetries found."""

    matrix: ParameterView
    role: str
    why: str
    part: str = ""
    bias: ParameterView | None = None
    tolerance: float = NORM_EPS
    reason: str = ""  # why no symmetry can be measured
    invariant: bool = False  # as a whole
    by_head: bool = False  # and head by head
    confirmed: bool | None = None
    partner: Partner | None = None

    @property
    def scaled(self) -> list[ParameterView]:
        """Views that scale together, head by head: without the bias of W_O, which has no heads."""
        return [self.matrix] if self.bias is None or self.part == "output" else [self.matrix, self.bias]

    @property
    def together(self) -> list[ParameterView]:
        """Matrix and its bias."""
        return [self.matrix] if self.bias is None else [self.matrix, self.bias]

    def terms(self) -> Terms:
        """Return the sums over matrix and bias as one head, of those with a gradient."""
        sums = [terms_of([view]).grouped(1) for view in self.together if view.gradient is not None]
        return Terms(*(torch.stack(values).sum(0) for values in zip(*sums, strict=True)))

    @property
    def transposed(self) -> bool:
        """Whether the matrix is stored as (in, out): its bias is as long as its second side only."""
        rows, columns = self.matrix.parameter.shape
        return self.bias is not None and self.bias.parameter.numel() == columns != rows

    def find_invariance(self, trial: Trial | None) -> None:
        """Test whether the loss is invariant to rescaling each head, or else the whole."""
        levels = [(self.scaled, terms_of(self.scaled))]
        if self.part:
            levels.append((self.together, self.terms()))
        for i, (views, sums) in enumerate(levels):
            if cancels(sums) > self.tolerance:
                continue
            unchanged = None
            if trial is not None:
                factors = [alternating(b.heads) if i == 0 else torch.full((b.heads,), RESCALING) for b in views]
                typical = math.log(RESCALING) * math.sqrt(float(sums.square.sum()))
                unchanged = trial.unchanged(list(zip(views, factors, strict=True)), typical, self.tolerance)
            if unchanged is not False:
                self.by_head, self.invariant, self.confirmed = i == 0, True, unchanged
                return

    def rows(self, largest: float) -> Iterator[AuditRow]:
        """Return rows for the whole, for the heads of an attention matrix, and for the bias."""
        by_head = None if self.matrix.gradient is None else terms_of(self.scaled)
        for head in [None, *(range(self.matrix.heads) if self.part else ())]:
            kind = self._kind(self.invariant if head is None else self.by_head)
            if by_head is None:
                euler = math.inf
            elif head is None:
                euler = cancels(self.terms())
            else:
                euler = cancels(Terms(by_head.total[head], by_head.square[head]))
            yield self._row(self.matrix, head, kind, self._words(kind, head), euler)
        if self.bias is not None:
            reason = unmeasurable(self.bias, largest)
            kind = "unknown" if reason else self._kind(self.invariant)
            of_pair = self.partner is not None and self.partner.scales(self.bias)
            if (kind == "unknown" and not reason) or (kind == "pair" and not of_pair):
                kind = "neither"
            words = f"{reason}." if reason else {
                "scale_invariant": "scale-invariant with its matrix: decaying one of the two is not a rescaling.",
                "pair": "scales with its matrix in the pair: a column more of it.",
            }.get(kind, "neither: L2 pulls it to zero.")  # fmt: skip
            euler = math.inf if self.bias.gradient is None else cancels(terms_of([self.bias]).grouped(1))
            yield self._row(self.bias, None, kind, words, euler)

    def _kind(self, invariant: bool) -> Kind:
        if self.reason:
            return "unknown"
        return "scale_invariant" if invariant else "pair" if self.partner else "neither"

    def _row(self, view: ParameterView, head: int | None, kind: Kind, words: str, euler: float) -> AuditRow:
        def values(tensor: Tensor) -> Tensor:
            return double(view.whole(tensor) if head is None else view.cut(tensor)[head])

        w, radial = values(view.parameter), None
        if view.gradient is not None and math.isfinite(euler):
            g = values(view.gradient)
            radial = float((g * w).sum() / (g.norm() * w.norm()))
        partner = self.partner if view is self.matrix else None
        is_bias = view is self.bias
        low_rank = None if is_bias else _low_rank_share(w)
        turned = f" (tangential share {low_rank.tangential:.0%})" if low_rank and kind != "unknown" else ""
        return AuditRow(
            name=view.name,
            part=self.part,
            role="bias" if is_bias else self.role,
            head=head,
            kind=kind,
            partner=partner.name(self.matrix.heads, head) if partner and kind == "pair" else None,
            radial=radial,
            euler=euler if math.isfinite(euler) else None,
            balance=partner.balance if partner else None,
            confirmed=self.confirmed if kind == "scale_invariant" else partner.confirmed if partner else None,
            gradient=None if radial is None else Share(radial**2, 1 - radial**2),
            low_rank=low_rank,
            words=words.replace("{turned}", turned),
        )

    def _words(self, kind: Kind, head: int | None) -> str:
        matrix = self.matrix.parameter.ndim > 1
        if kind == "unknown":
            return f"{self.reason}."
        if kind == "scale_invariant":
            bias = " together with its bias" if self.bias else ""
            turns = "; low-rank decay also turns it{turned}" if matrix else ""
            return f"scale-invariant{bias}: L2 changes only its radius, and so the effective learning rate{turns}."
        if kind == "pair" and self.partner:
            return f"pair with {self.partner.name(self.matrix.heads, head)}: {self.partner.words}."
        if self.invariant:
            return "neither: only all heads together are scale-invariant. L2 on all of them changes only the radius."
        if self.role == "norm":
            return f"neither ({self.why}): it carries a scale, and L2 pulls what is stored to zero."
        ranks = "; low-rank decay also turns it, towards a lower rank{turned}" if matrix else ""
        return f"neither: L2 shrinks it, and with it what the model computes{ranks}."


@dataclass(frozen=True, eq=False)
class Partner:
    """Other side of a pair, and the evidence for the pair.

    Attributes:
        part: the other side.
        words: what decay does to the pair.
        scaled: the views of both sides, which scale together.
        balance: distance from the equation of the pair.
        confirmed: whether a finite rescaling said the same; None if it was not tried, or rounding hid the answer.
    """

    part: AuditedPart
    words: str
    scaled: list[ParameterView]
    balance: float
    confirmed: bool | None

    def scales(self, view: ParameterView) -> bool:
        """Whether a parameter belongs to one of the sides."""
        return any(view.parameter is scaled.parameter for scaled in self.scaled)

    def name(self, heads: int, head: int | None) -> str:
        """Return the name of the other side, with the heads that pair with ``head`` of ``heads`` unless it is None."""
        name = f"{self.part.matrix.name} {self.part.part}".strip()
        if head is None:
            return name
        others = self.part.matrix.heads
        if others > heads:
            several = others // heads
            return f"{name} heads {head * several}–{(head + 1) * several - 1}"
        return f"{name} head {head * others // heads}"


def _low_rank_share(w: Tensor) -> Share | None:
    """Return the shares of U Vᵀ along W and across it: cos² = (Σσ)² / (‖W‖² · rank). A stack counts as one."""
    if w.ndim not in (2, 3) or not w.any():
        return None
    s = spectrum(w)
    radial = float(s.nuclear_norm.sum().square() / (w.square().sum() * s.numerical_rank().sum()))
    return Share(min(radial, 1.0), max(1 - radial, 0.0))


def parts(
    model: nn.Module, found: list[Found], gradients: dict[nn.Parameter, Tensor], assigned: list[ParameterRoles]
) -> list[AuditedPart]:
    """Return every parameter once, in order: attention's matrices one by one, a bias with its weight."""
    parameters = named_parameters(model)

    def view(name: str, window: Window = WHOLE) -> ParameterView:
        return ParameterView(name, parameters[name], gradients.get(parameters[name]), window)

    places = {(place.parameter, role): place for layer in found for role, place in layer.places.items()}
    biases = {parameters[place.bias] for place in places.values() if place.bias}
    parts: list[AuditedPart] = []
    for entry in assigned:
        roles = {known.why: known.role for known in entry.segments}
        first = entry.segments[0]
        located = [(place, role) for (name, role), place in places.items() if name in entry.names]
        for place, role in located:
            window = place.bias_window if role != "output" else None
            bias = view(place.bias, window or WHOLE) if place.bias else None
            parts.append(
                AuditedPart(view(place.parameter, place.window), roles.get(role, first.role), role, role, bias)
            )
        if located or entry.parameter in biases:
            continue
        name = entry.names[0]
        module, _, leaf = name.rpartition(".")
        weight, bias = (f"{module}.{leaf}".lstrip(".") for leaf in ("weight", "bias"))
        if leaf == "bias" and weight in parameters:
            continue  # with its weight
        has_bias = leaf == "weight" and bias in parameters
        parts.append(AuditedPart(view(name), first.role, first.why, bias=view(bias) if has_bias else None))
    return parts
