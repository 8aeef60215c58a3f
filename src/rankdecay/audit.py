r"""What L2 and low-rank decay do to each parameter: which of the loss's scale symmetries it has, from one gradient.

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

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rankdecay.attention import AttentionNames, Window, find_attention
from rankdecay.attention.modules import attention_of, named_parameters
from rankdecay.attention.naming import Found
from rankdecay.decay.roles import assign_roles
from rankdecay.spectrum import spectrum

Kind = Literal["scale_invariant", "pair", "neither", "unknown"]

#: Smallest default tolerance: what a norm's eps takes from its invariance, about eps / mean square of its input.
NORM_EPS = 1e-3
#: The factor of the finite rescaling.
RESCALING = 1.5


class Share(NamedTuple):
    """How much of a step's squared length is along W, and how much turns it; they add to 1."""

    radial: float
    tangential: float


@dataclass(frozen=True)
class AuditRow:
    """One matrix, one head of it, or one other parameter.

    Attributes:
        name: the parameter's name.
        part: ``"query"``, ``"key"``, ``"value"`` or ``"output"``, for an attention matrix and its bias.
        role: as :func:`rankdecay.param_groups` names it.
        head: which head; None for the whole.
        kind: ``"scale_invariant"``, ``"pair"``, ``"neither"`` or ``"unknown"``.
        partner: the other side of the pair.
        radial: cosine of the gradient and W; None without a gradient or for a zero W.
        euler: how far from Euler's equation, with the bias; 0 if scale-invariant, around 1 if not (module docstring).
        balance: how far the pair, all its heads or units together, is from its equation; None without a candidate.
        confirmed: True if a finite rescaling said the same; None if it was not asked, or rounding hid the answer. A
            kind that a rescaling contradicts is given up.
        gradient: shares of a gradient step.
        low_rank: shares of a low-rank step, along U Vᵀ; None for a vector.
        words: what L2 and low-rank decay do.
    """

    name: str
    part: str
    role: str
    head: int | None
    kind: Kind
    partner: str | None
    radial: float | None
    euler: float | None
    balance: float | None
    confirmed: bool | None
    gradient: Share | None
    low_rank: Share | None
    words: str

    @property
    def l2(self) -> Share:
        """Shares of an L2 step: it is along W."""
        return Share(1.0, 0.0)


@dataclass(frozen=True)
class AuditReport:
    """What :func:`audit` found.

    Attributes:
        rows: in the order of the parameters; a matrix of attention first whole, then head by head.
        tolerance: what counted as zero; None: by the dtype of the parameter.
        notes: attention that could not be read, with the reason.
    """

    rows: tuple[AuditRow, ...]
    tolerance: float | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Returns a table, one line for like parameters of all layers and for all heads, and what it says in words."""
        groups: dict[tuple[str, ...], list[AuditRow]] = {}
        for row in self.rows:
            unit = "whole" if row.head is None else "head"
            partner = re.sub(r" heads? [\d–]+$", "", _pattern(row.partner or ""))
            groups.setdefault((_pattern(row.name), row.part, unit, row.kind, partner), []).append(row)
        cells = [["parameter", "part", "unit", "kind", "euler", "balance", "turned by: L2", "low-rank", "gradient"]]
        words: dict[str, dict[frozenset[str], str]] = {}
        for (name, part, unit, kind, partner), rows in groups.items():
            count = f"{unit} ×{len(rows)}" if len(rows) > 1 else unit
            numbers = [_mean("{:.1g}", (row.euler for row in rows)), _mean("{:.1g}", (row.balance for row in rows))]
            turned = [[step and step.tangential for step in (row.l2, row.low_rank, row.gradient)] for row in rows]
            shares = [_mean("{:.0%}", column) for column in zip(*turned, strict=True)]
            sure = ", confirmed" if all(row.confirmed for row in rows) else ""
            cells.append([name, part, count, kind.replace("_", "-") + sure, *numbers, *shares])
            text = re.sub(r" \(tangential share.*?\)|(?<=pair) with .*?(?=:)", "", rows[0].words)
            what = " ".join(filter(None, [name, part, "of each head" if unit == "head" else ""]))
            which = frozenset(filter(None, [f"{name} {part}".strip(), partner]))  # a pair once, a head under its whole
            words.setdefault(text, {}).setdefault(which, what + (f" with {partner}" if partner else ""))
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        said: list[str] = []
        for text, items in words.items():
            said += [*wrap(text, 116), *(f"    {item}" for item in items.values())]
        return "\n".join([*table, "", *said, *(f"Not read as attention: {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.describe()


def audit(
    model: nn.Module,
    loss: Callable[[], Tensor] | Tensor,
    *,
    confirm: bool = False,
    tolerance: float | None = None,
    names: AttentionNames | None = None,
) -> AuditReport:
    """Says for every parameter, and every head, what L2 and low-rank decay do to it.

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
    found, unhandled = attention_of(model) if names is None else attention_of(model, [names])
    if names is not None and not found:
        find_attention(model, names)  # raises, and lists what there is
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} is outside (0, 1); leave it out for one that suits the dtype.")
    if confirm and isinstance(loss, Tensor):
        raise ValueError("confirm=True computes the loss again: pass a function of no arguments, not its value.")
    gradients = _gradients(model, loss)
    trial = _Trial(loss) if confirm and not isinstance(loss, Tensor) else None

    largest = max(_size(g, parameter.detach()) for parameter, g in gradients.items())
    parts = _parts(model, found, gradients, names)
    for part in parts:
        part.reason = _unmeasurable(part.matrix, largest)
        part.tolerance = tolerance or max(NORM_EPS, 8 * torch.finfo(part.matrix.parameter.dtype).eps)
        if not part.reason:
            part.find_invariance(trial)
    for pair in _pairs(found, parts):
        if not any(side.reason or side.pair or side.by_head for side in (pair.first, pair.second)):
            pair.judge(trial)
    notes = tuple(f"{module.name or 'the model'}: {module.reason}." for module in unhandled)
    return AuditReport(tuple(row for part in parts for row in part.rows(largest)), tolerance, notes)


def _gradients(model: nn.Module, loss: Callable[[], Tensor] | Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradient of every parameter that has one."""
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
    gradients = torch.autograd.grad(value.reshape(()), trained, allow_unused=True, retain_graph=given)
    out = {parameter: g.detach() for parameter, g in zip(trained, gradients, strict=True) if g is not None}
    if not out:
        raise ValueError("the loss does not depend on any parameter of the model: is it computed with this model?")
    for name, parameter in model.named_parameters():
        if parameter in out and not out[parameter].isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite; audit in float32 or on another batch.")
    return out


# ---- parts: what has a kind ------------------------------------------------------------------------------


class _Block(NamedTuple):
    """A parameter, or a window on one, cut into heads."""

    name: str
    parameter: nn.Parameter
    gradient: Tensor | None
    window: Window | None = None

    def cut(self, value: Tensor) -> Tensor:
        """(heads, …) of the parameter or its gradient, detached; without a window (1, …)."""
        value = value.detach()
        return value[None] if self.window is None else self._upright.heads(_column(value))

    def whole(self, value: Tensor) -> Tensor:
        """The same, not cut."""
        value = value.detach()
        return value if self.window is None else self._upright.matrix(_column(value))

    def scale(self, factors: Tensor) -> None:
        """Multiplies each head by its factor, in place."""
        value = self.cut(self.parameter)
        value = value * factors.to(value).reshape(-1, *[1] * (value.ndim - 1))
        if self.window is None:
            self.parameter.copy_(value[0])
        else:
            self._upright.write(_column(self.parameter), value)

    @property
    def heads(self) -> int:
        return 1 if self.window is None else self.window.num_heads

    @property
    def _upright(self) -> Window:
        assert self.window is not None
        return self.window if self.parameter.ndim > 1 else replace(self.window, transposed=False)


def _column(value: Tensor) -> Tensor:
    """A bias as a matrix of one column, a view."""
    return value if value.ndim > 1 else value[:, None]


def _size(g: Tensor, w: Tensor) -> float:
    return float(g.double().norm() * w.double().norm())


class _Terms(NamedTuple):
    """Σ g·w and Σ (g·w)², per head."""

    total: Tensor
    square: Tensor

    def grouped(self, groups: int) -> _Terms:
        """Summed within each of ``groups`` runs of heads."""
        return _Terms(*(value.unflatten(0, (groups, -1)).sum(1) for value in self))

    @staticmethod
    def of(blocks: list[_Block]) -> _Terms:
        """Summed over blocks with the same heads; a block without a gradient adds nothing."""
        terms = [
            (block.cut(block.gradient).double() * block.cut(block.parameter).double()).flatten(1)
            for block in blocks
            if block.gradient is not None
        ]
        return _Terms(sum(t.sum(1) for t in terms), sum(t.square().sum(1) for t in terms))  # pyright: ignore


def _cancels(terms: _Terms) -> float:
    """Root mean square of the totals, over what it would be if nothing cancelled."""
    square = float(terms.square.sum())
    return math.sqrt(float(terms.total.square().sum()) / square) if square > 0 else math.inf


def _unmeasurable(block: _Block, largest: float) -> str:
    """Why nothing can be said of a block, or nothing; ``largest`` is the largest ‖g‖‖W‖ of the model's parameters."""
    if not block.parameter.requires_grad:
        return "frozen: not trained, and so not decayed"
    if block.gradient is None:
        return "unused: the loss does not depend on it, so any decay pulls it to zero unopposed"
    if not block.whole(block.parameter).any():
        return "zero: there is nothing to decay yet"
    rounding = min(16 * torch.finfo(block.parameter.dtype).eps, 1e-5)
    if _size(block.whole(block.gradient), block.whole(block.parameter)) <= rounding * largest:
        return "without effect here: its gradient is rounding at most, so any decay pulls it to zero unopposed"
    return ""


@dataclass(eq=False)
class _Part:
    """A matrix with its bias, or another parameter, and what is found out about it."""

    matrix: _Block
    role: str
    why: str
    part: str = ""
    bias: _Block | None = None
    tolerance: float = NORM_EPS
    reason: str = ""  # why nothing can be said
    invariant: bool = False  # as a whole
    by_head: bool = False  # and head by head
    confirmed: bool | None = None
    pair: _Pair | None = None

    @property
    def scaled(self) -> list[_Block]:
        """What scales together, head by head: not W_O's bias, which has no heads."""
        return [self.matrix] if self.bias is None or self.part == "output" else [self.matrix, self.bias]

    @property
    def together(self) -> list[_Block]:
        """The matrix and its bias."""
        return [self.matrix] if self.bias is None else [self.matrix, self.bias]

    def terms(self) -> _Terms:
        """Of everything together, as one head; of what has a gradient."""
        sums = [_Terms.of([block]).grouped(1) for block in self.together if block.gradient is not None]
        return _Terms(*(torch.stack(values).sum(0) for values in zip(*sums, strict=True)))

    @property
    def transposed(self) -> bool:
        """Whether the matrix is stored as (in, out): its bias is as long as its second side only."""
        rows, columns = self.matrix.parameter.shape
        return self.bias is not None and self.bias.parameter.numel() == columns != rows

    def find_invariance(self, trial: _Trial | None) -> None:
        """Sets whether each head can be rescaled, or else the whole."""
        levels = [(self.scaled, _Terms.of(self.scaled))]
        if self.part:
            levels.append((self.together, self.terms()))
        for i, (blocks, sums) in enumerate(levels):
            if _cancels(sums) > self.tolerance:
                continue
            said = None
            if trial is not None:
                factors = [_alternating(b.heads) if i == 0 else torch.full((b.heads,), RESCALING) for b in blocks]
                typical = math.log(RESCALING) * math.sqrt(float(sums.square.sum()))
                said = trial.unchanged(list(zip(blocks, factors, strict=True)), typical, self.tolerance)
            if said is not False:
                self.by_head, self.invariant, self.confirmed = i == 0, True, said
                return

    def rows(self, largest: float) -> Iterator[AuditRow]:
        """The whole, its heads if it is attention's, and its bias."""
        by_head = None if self.matrix.gradient is None else _Terms.of(self.scaled)
        for head in [None, *(range(self.matrix.heads) if self.part else ())]:
            kind = self._kind(self.invariant if head is None else self.by_head)
            if by_head is None:
                euler = math.inf
            elif head is None:
                euler = _cancels(self.terms())
            else:
                euler = _cancels(_Terms(by_head.total[head], by_head.square[head]))
            yield self._row(self.matrix, head, kind, self._words(kind, head), euler)
        if self.bias is not None:
            reason = _unmeasurable(self.bias, largest)
            kind = "unknown" if reason else self._kind(self.invariant)
            of_pair = self.pair is not None and self.pair.scales(self.bias)
            if (kind == "unknown" and not reason) or (kind == "pair" and not of_pair):
                kind = "neither"
            words = f"{reason}." if reason else {
                "scale_invariant": "scale-invariant with its matrix: to decay one of the two is no rescaling.",
                "pair": "scales with its matrix in the pair: a column more of it.",
            }.get(kind, "neither: L2 pulls it to zero.")  # fmt: skip
            euler = math.inf if self.bias.gradient is None else _cancels(_Terms.of([self.bias]).grouped(1))
            yield self._row(self.bias, None, kind, words, euler)

    def _kind(self, invariant: bool) -> Kind:
        if self.reason:
            return "unknown"
        return "scale_invariant" if invariant else "pair" if self.pair else "neither"

    def _row(self, block: _Block, head: int | None, kind: Kind, words: str, euler: float) -> AuditRow:
        def values(of: Tensor) -> Tensor:
            return (block.whole(of) if head is None else block.cut(of)[head]).double()

        w, radial = values(block.parameter), None
        if block.gradient is not None and math.isfinite(euler):
            g = values(block.gradient)
            radial = float((g * w).sum() / (g.norm() * w.norm()))
        pair = self.pair if block is self.matrix else None
        is_bias = block is self.bias
        low_rank = None if is_bias else _low_rank_share(w)
        turned = f" (tangential share {low_rank.tangential:.0%})" if low_rank and kind != "unknown" else ""
        return AuditRow(
            name=block.name,
            part=self.part,
            role="bias" if is_bias else self.role,
            head=head,
            kind=kind,
            partner=pair.partner(self, head) if pair and kind == "pair" else None,
            radial=radial,
            euler=euler if math.isfinite(euler) else None,
            balance=pair.balance if pair else None,
            confirmed=self.confirmed if kind == "scale_invariant" else pair.confirmed if pair else None,
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
        if kind == "pair" and self.pair:
            return f"pair with {self.pair.partner(self, head)}: {_EFFECT[self.pair.effect]}."
        if self.invariant:
            return "neither: only all heads together are scale-invariant. L2 on all of them changes only the radius."
        if self.role == "norm":
            return f"neither ({self.why}): it carries a scale, and L2 pulls what is stored to zero."
        ranks = "; low-rank decay also turns it, towards a lower rank{turned}" if matrix else ""
        return f"neither: L2 shrinks it, and with it what the model computes{ranks}."


def _low_rank_share(w: Tensor) -> Share | None:
    """Shares of U Vᵀ along W and across it: cos² = (Σσ)² / (‖W‖² · rank). A stack of matrices counts as one."""
    if w.ndim not in (2, 3) or not w.any():
        return None
    s = spectrum(w)
    radial = float(s.nuclear_norm.sum().square() / (w.square().sum() * s.numerical_rank().sum()))
    return Share(min(radial, 1.0), max(1 - radial, 0.0))


def _parts(
    model: nn.Module, found: list[Found], gradients: dict[nn.Parameter, Tensor], names: AttentionNames | None
) -> list[_Part]:
    """Every parameter once, in order: attention's matrices one by one, a bias with its weight."""
    parameters = named_parameters(model)

    def block(name: str, window: Window | None = None) -> _Block:
        return _Block(name, parameters[name], gradients.get(parameters[name]), window)

    places = {(place.parameter, role): place for layer in found for role, place in layer.places.items()}
    biases = {parameters[place.bias] for place in places.values() if place.bias}
    parts: list[_Part] = []
    for entry in assign_roles(model, names)[0]:
        roles = {known.why: known.role for known in entry.blocks}
        first = entry.blocks[0]
        own = [(place, role) for (name, role), place in places.items() if name in entry.names]
        for place, role in own:
            window = place.bias_window if role != "output" else None
            bias = block(place.bias, window) if place.bias else None
            parts.append(_Part(block(place.parameter, place.window), roles.get(role, first.role), role, role, bias))
        if own or entry.parameter in biases:
            continue
        name = entry.names[0]
        module, _, leaf = name.rpartition(".")
        weight, bias = (f"{module}.{own}".lstrip(".") for own in ("weight", "bias"))
        if leaf == "bias" and weight in parameters:
            continue  # with its weight
        has_bias = leaf == "weight" and bias in parameters
        parts.append(_Part(block(name), first.role, first.why, bias=block(bias) if has_bias else None))
    return parts


# ---- pairs -----------------------------------------------------------------------------------------------

_EFFECT = {
    "product": "only their product counts. L2 on both balances them, and is then a nuclear norm on the product; "
    "low-rank decay lowers the rank of each, and so of the product{turned}",
    "planes": "only their product counts, at every distance. L2 on both balances each rotary plane, and is then a sum "
    "over the planes, not a nuclear norm; low-rank decay lowers the rank of each{turned}",
    "units": "only the product of both sides of a hidden unit counts. L2 on both balances each unit, and then switches "
    "off whole units; low-rank decay lowers the rank of each{turned}",
    "gains": "only their product counts: the scale of the scores, which the norms took from W_Q and W_K. L2 on both "
    "balances them, and then makes attention more even",
}


@dataclass(eq=False)
class _Pair:
    """Two parts of which, perhaps, only the product counts: in every head, or every hidden unit."""

    first: _Part
    second: _Part
    effect: str
    sides: tuple[list[_Block], list[_Block]]  # what scales, cut into units; one side may have several in each
    balance: float | None = None
    confirmed: bool | None = None

    def judge(self, trial: _Trial | None) -> None:
        """Makes the parts a pair if the equation holds, and a rescaling does not contradict it."""
        terms = [_Terms.of(side) for side in self.sides]
        units = min(len(side.total) for side in terms)
        first, second = (side.grouped(units) for side in terms)
        self.balance = _cancels(_Terms(first.total - second.total, first.square + second.square))
        tolerance = max(self.first.tolerance, self.second.tolerance)
        if self.balance > tolerance:
            return
        if trial is not None:
            up = _alternating(units)
            first, second = (
                [(block, factors.repeat_interleave(block.heads // units)) for block in side]
                for side, factors in zip(self.sides, (up, 1 / up), strict=True)
            )
            self.confirmed = trial.unchanged(first + second, abs(trial.change(first)), tolerance)
        if self.confirmed is not False:
            self.first.pair = self.second.pair = self

    def scales(self, block: _Block) -> bool:
        """Whether the parameter belongs to one of the sides."""
        return any(block.parameter is own.parameter for side in self.sides for own in side)

    def partner(self, part: _Part, head: int | None) -> str:
        """The other side's name, and for a head those of its heads that belong to it."""
        other = self.second if part is self.first else self.first
        name = f"{other.matrix.name} {other.part}".strip()
        if head is None:
            return name
        theirs, ours = other.matrix.heads, part.matrix.heads
        if theirs > ours:
            several = theirs // ours
            return f"{name} heads {head * several}–{(head + 1) * several - 1}"
        return f"{name} head {head * theirs // ours}"


def _pairs(found: list[Found], parts: list[_Part]) -> Iterator[_Pair]:
    """What may be a pair: by attention's structure, and by the shapes of matrices side by side in one module."""
    known = {(part.matrix.name, part.part): part for part in parts}
    for layer in found:
        query, key, value, output = (
            known.get((layer.places[role].parameter, role)) if role in layer.places else None
            for role in ("query", "key", "value", "output")
        )
        if query and key:
            yield _Pair(query, key, "planes" if layer.rotary else "product", (query.scaled, key.scaled))
        if value and output:
            yield _Pair(value, output, "product", (value.scaled, output.scaled))
        gains = [part for part in parts if part.role == "norm" and part.matrix.name.startswith(layer.name + ".")]
        for first in gains:
            for second in gains:
                if re.search(r"\.(norm_)?q", first.matrix.name[len(layer.name) :]) and first is not second:
                    yield _Pair(first, second, "gains", (first.scaled, second.scaled))

    siblings: dict[str, list[_Part]] = {}
    for part in parts:
        if not part.part and part.matrix.parameter.ndim == 2 and part.role in ("mlp", "other"):
            module = part.matrix.name.rpartition(".")[0]
            adapter = re.sub(r"lora_[AB]\.(.*)", r"lora.\1.", module)  # A and B in dictionaries of their own
            siblings.setdefault(adapter.rpartition(".")[0], []).append(part)
    for module, members in siblings.items():
        for first in members:
            for second in members:
                sizes = [side.matrix.parameter.shape[i ^ side.transposed] for i, side in enumerate((first, second))]
                if first is second or sizes[0] != sizes[1]:
                    continue
                rows = Window("rows", 0, sizes[0], sizes[0], 1, transposed=first.transposed)
                columns = Window("columns", 0, sizes[0], sizes[0], 1, transposed=second.transposed)
                sides = ([b._replace(window=rows) for b in first.scaled], [second.matrix._replace(window=columns)])
                yield _Pair(first, second, "product" if ".lora." in module else "units", sides)


# ---- finite rescaling ------------------------------------------------------------------------------------


def _alternating(units: int) -> Tensor:
    """(units,) 1.5 and 1/1.5 in turn, so that one trial asks each unit for itself."""
    factors = torch.full((units,), RESCALING, dtype=torch.float64)
    factors[1::2] = 1 / RESCALING
    return factors


class _Trial:
    """Computes the loss at rescaled parameters."""

    def __init__(self, loss: Callable[[], Tensor]) -> None:
        self.loss = loss
        with torch.no_grad():
            value = loss()
            self.base, again = float(value), float(loss())
        noise = abs(again - self.base)
        if not noise <= 1e-4 * abs(self.base):
            raise ValueError(
                f"confirm=True needs the same loss at each call, and got {self.base:.6g} and {again:.6g}: call "
                "model.eval() to switch off dropout, and use one batch."
            )
        self.noise = 4 * noise + 16 * torch.finfo(value.dtype).eps * abs(self.base)

    @torch.no_grad()
    def change(self, scaled: list[tuple[_Block, Tensor]]) -> float:
        """Returns the change of the loss when each block's heads are multiplied by its factors."""
        before = {block.parameter: block.parameter.clone() for block, _ in scaled}
        try:
            for block, factors in scaled:
                block.scale(factors.to(block.parameter.device))
            return float(self.loss()) - self.base
        finally:
            for parameter, value in before.items():
                parameter.copy_(value)

    def unchanged(self, scaled: list[tuple[_Block, Tensor]], reference: float, tolerance: float) -> bool | None:
        """Whether the loss stays, against a change of size ``reference``; None if that is lost in rounding."""
        if reference <= 4 * self.noise:
            return None
        return abs(self.change(scaled)) <= min(10 * tolerance, 0.5) * reference + self.noise


# ---- printing --------------------------------------------------------------------------------------------


def _pattern(name: str) -> str:
    """The name with the numbers of layers left out."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _mean(form: str, values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known) / len(known)) if known else "-"
