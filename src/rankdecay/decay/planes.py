r"""Decay of rotary planes: a group lasso over the rows that positions turn together, without an SVD.

.. math:: X_j \leftarrow X_j \cdot \max(0,\, 1 - \tau\sqrt{n_j} / \|X_j\|_F)

:math:`X_j` is all rows of plane j in a scope, of W_Q and W_K and of their biases, :math:`n_j` of them. A plane that is
zero everywhere in a scope can be left out of an ordinary checkpoint. Under ``scale="relative"`` τ is
lr · strength · :math:`\|X\|_F / \sqrt{P n_j}` with X all P planes of the scope, so that planes of equal norm lose what
L2 takes from them; under ``"absolute"`` it is lr · strength.

What has to be known of a plane is its norm, a sum of squares over rows that lie in many parameters and, where these are
sharded, in many processes. So a step has two passes over the rows: one for their squares, which add up in a table of
scopes and planes (one all-reduce of it per mesh dimension that cuts anything; copies do not count), and one in which
each line loses the share of its plane. A parameter's own learning rate gives its own τ; the norm is shared.

The squares are kept in float64, and of float64 weights in units of a power of two, so that a norm beyond the range of
the weights' dtype is still that of the same weights at scale 1. A row that is not finite counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rankdecay.attention.planes import PlaneRows
from rankdecay.decay.apply import rounded
from rankdecay.decay.policy import Planes, Scale, Scope
from rankdecay.decay.sharded.layout import Layout, lines_of
from rankdecay.dtensor import is_sharded, local
from rankdecay.linalg.backend import has_float64
from rankdecay.linalg.rounding import NEXT_SEED
from rankdecay.linalg.threshold import shrink_by, soft, spare_largest

#: Norms whose squares float32 holds to its last digit.
_SAFE = (1e-15, 1e15)


class Member(NamedTuple):
    """Parameter that has rows of planes.

    Attributes:
        parameter: the parameter, perhaps a DTensor.
        rows: where its planes are.
        amount: lr · strength of this step; None if it loses nothing, though its rows count in the norms.
    """

    parameter: Tensor
    rows: tuple[PlaneRows, ...]
    amount: float | Tensor | None


class PlaneStep:
    """Planes that a step of the optimizer decays, gathered over its groups, since a plane has rows in several."""

    def __init__(self) -> None:
        self._decay: Planes | None = None
        self._seed = 0
        self._members: list[Member] = []
        self._names: list[str] = []

    def add(
        self,
        decay: Planes,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        rows: Sequence[tuple[PlaneRows, ...]],
        amounts: Mapping[int, float | Tensor],
        seed: int,
    ) -> None:
        """Add parameters of one group.

        Args:
            decay: of the group; only its strength may differ between groups.
            parameters: of the group, those without a gradient too.
            names: of each.
            rows: of each.
            amounts: lr · strength of those that lose something, by position.
            seed: of the rounding of 16-bit weights.

        Raises:
            ValueError: If the groups differ in what is decayed.
        """
        if self._decay is None:
            self._decay, self._seed = decay, seed
        check_alike([self._decay, decay])
        for position, (parameter, name, own_rows) in enumerate(zip(parameters, names, rows, strict=True)):
            if own_rows:
                self._members.append(Member(parameter, own_rows, amounts.get(position)))
                self._names.append(name)

    @property
    def is_collective(self) -> bool:
        """Whether other processes take part in it."""
        return any(is_sharded(member.parameter) for member in self._members)

    def apply(self) -> list[tuple[str, Tensor]]:
        """Decay the planes, if anything loses anything, and return the norms of the lines that each parameter had."""
        if self._decay is None or all(member.amount is None for member in self._members):
            return []
        norms = decay_planes(self._members, self._decay.scope, self._decay.scale, self._decay.keep or 0, self._seed)
        return list(zip(self._names, norms, strict=True))

    def words(self) -> list[str]:
        """Return how many planes are zero, in words, for each rotary configuration: a collective if sharded."""
        if self._decay is None or not self._members:
            return []
        zero: dict[str, list[Tensor]] = {}
        for (configuration, _), norms in plane_norms(self._members, self._decay.scope).items():
            zero.setdefault(configuration, []).append(norms == 0)
        counted = {name: _counted(torch.stack(each), self._decay.scope) for name, each in zero.items()}
        return [f"planes of query_key{f' ({n})' if len(zero) > 1 else ''}: {words}" for n, words in counted.items()]


def _counted(zero: Tensor, scope: Scope) -> str:
    """Return which planes are zero in all layers, or how many in each scope, of a table (scopes, planes)."""
    scopes, planes = zero.shape
    if scope != "model":
        few, many = int(zero.sum(1).min()), int(zero.sum(1).max())
        scope_name = {"layer": "layers", "group": "key heads", "head": "heads"}[scope]
        return f"of {planes} in each of {scopes} {scope_name}, {few if few == many else f'{few} to {many}'} are zero"
    gone = ", ".join(map(str, zero[0].nonzero()[:, 0].tolist()))
    number = int(zero.sum())
    return f"of {planes}, {number or 'none'} {'are' if number > 1 else 'is'} zero{f': {gone}' if gone else ''}"


def check_alike(decays: Iterable[Planes]) -> None:
    """Raise a ``ValueError`` if decays differ in what a plane is and by which law it shrinks."""
    kinds = dict.fromkeys((decay.scope, decay.scale, decay.keep) for decay in decays)
    if len(kinds) > 1:
        raise ValueError(
            f"groups of query_key differ in what is decayed: (scope, scale, keep) is {' and '.join(map(str, kinds))}, "
            "and planes that vanish together have one of each; change it with "
            "attachment.set(query_key=rankdecay.Planes(...))."
        )


def decay_planes(
    members: Sequence[Member],
    scope: Scope,
    scale: Scale,
    keep: int = 0,
    seed: int = 0,
) -> list[Tensor]:
    """Decay the planes of all parameters of a step in place.

    A collective where parameters are sharded: every process that holds a part has to call it.

    Args:
        members: all parameters with rows of the planes' scopes, in the same order in every process.
        scope: what a plane belongs to.
        scale: of τ.
        keep: number of planes of each scope, the largest, that lose nothing.
        seed: of the rounding of 16-bit weights.

    Returns:
        Norms of the lines of each parameter in this process before the step, up to a power of two, in which an entry
        that is not finite shows.
    """
    table = table_of(members, scope)
    views = [_lines_first(local(member.parameter), member.rows[0]) for member in members]
    norms, exponent, of_lines = _norms(views, table)
    amounts: list[float | Tensor] = []
    numbers: list[int] = []  # of each member's amount
    for member in members:
        number = next((i for i, a in enumerate(amounts) if a is member.amount or _same(a, member.amount)), len(amounts))
        if number == len(amounts) and member.amount is not None:
            amounts.append(member.amount)
        numbers.append(number)
    shares = torch.stack(
        [_shares(norms, table, amount, exponent, scale, keep) for amount in amounts]
    )  # (amounts, slots)
    for number, (member, view, piece) in enumerate(zip(members, views, table.pieces, strict=True)):
        if member.amount is None or not view.numel():
            continue
        part = view[piece.first : piece.last]
        share = shares[numbers[number]][piece.slots].view(*part.shape[:-1], 1)
        _leave(part, share, seed + number * NEXT_SEED + piece.part)
    return of_lines


def plane_norms(members: Sequence[Member], scope: Scope) -> dict[tuple[str, ...], Tensor]:
    """Return the norms of the planes of each scope, (planes,), float64, by (configuration, scope).

    A collective where parameters are sharded.
    """
    table = table_of(members, scope)
    views = [_lines_first(local(member.parameter), member.rows[0]) for member in members]
    norms, exponent, _ = _norms(views, table)
    found: dict[tuple[str, ...], Tensor] = {}
    for span in table.spans:
        block = math.ldexp(1.0, exponent) * norms[span.start : span.stop].view(-1, span.planes)
        found |= {(span.configuration, name): row for name, row in zip(span.scopes, block, strict=True)}
    return found


def check_planes(decay: Planes, held: Iterable[tuple[str, tuple[PlaneRows, ...]]]) -> None:
    """Raise a ``ValueError`` if some rows of a plane's scope are missing, or if planes and decay do not fit.

    Args:
        decay: of the planes.
        held: names and rows of the parameters that it acts on.
    """
    rows = [each for _, several in held for each in several]
    given = f"query_key=Planes(scope={decay.scope!r})"
    parts: dict[str, set[str]] = {}
    layers: dict[str, set[str]] = {}
    for each in rows:
        parts.setdefault(each.layer, set()).add(each.part)
        layers.setdefault(each.configuration, set()).add(each.layer)
    for each in rows:
        missing = [name for part, name in each.parameters if part not in parts[each.layer]]
        if missing:
            raise ValueError(
                f"{given} needs all rows of a plane in one optimizer, and {', '.join(missing)} of {each.layer} "
                f"{'is' if len(missing) == 1 else 'are'} frozen, excluded or not in this one: a plane would never "
                "vanish. No other scope helps: put W_Q, W_K and their biases into one optimizer, all of them "
                "trained, or exclude the layer."
            )
        present = layers[each.configuration]
        if decay.scope == "model" and len(present) != each.layers:
            raise ValueError(
                f"{given} needs the {each.layers} layers of one rotary configuration in one optimizer, and this one "
                f"has {len(present)} of them, {', '.join(sorted(present)[:4])}{', …' if len(present) > 4 else ''}: "
                "give it the others too, or use scope='layer', which needs only the rows of one layer."
            )
        if (decay.keep or 0) >= each.planes:
            raise ValueError(
                f"keep={decay.keep} spares every plane of {each.layer}, whose heads have {each.planes}; give a smaller "
                "one, or rankdecay.Frobenius(0.0) for no decay."
            )
    for name, several in held:
        if decay.scope == "model":
            break
        owner: dict[object, str] = {}
        for each in several:
            if owner.setdefault((each.part, each.window), each.layer) != each.layer:
                raise ValueError(
                    f"{given} meets {name}, which {owner[each.part, each.window]} and {each.layer} share, so that its "
                    "planes are of several layers; use scope='model'."
                )


# ---- which line belongs to which plane -------------------------------------------------------------------


class SlotSpan(NamedTuple):
    """Slots of the table that one rotary configuration has: a row of planes for each scope."""

    configuration: str
    scopes: tuple[str, ...]
    planes: int
    start: int

    @property
    def stop(self) -> int:
        """Its end."""
        return self.start + len(self.scopes) * self.planes


class LinePiece(NamedTuple):
    """Lines of one parameter that this process has, from the first to the last in a plane.

    Attributes:
        first: the first.
        last: one past the last.
        slots: of the table, for each line; the last slot of all for a line in no plane.
        sums: over which processes the squares add up: a mesh and its dimensions that cut; None if all are here.
        part: number of the piece; the same in processes that hold copies.
    """

    first: int
    last: int
    slots: Tensor
    sums: tuple[Any, tuple[int, ...]] | None
    part: int


class Table(NamedTuple):
    """Scopes and planes of a set of parameters, and to which of them each line belongs.

    Attributes:
        spans: one for each rotary configuration.
        rows: number of rows of each slot, (slots + 1,), float64.
        pieces: of each parameter.
    """

    spans: list[SlotSpan]
    rows: Tensor
    pieces: list[LinePiece]

    @property
    def slots(self) -> int:
        """Number of slots that are planes."""
        return self.spans[-1].stop


def table_of(members: Sequence[Member], scope: Scope) -> Table:
    """Return the table of the planes of some parameters; the same object while they stay where they are."""
    return _table(
        tuple(member.rows for member in members),
        tuple(tuple(member.parameter.shape) for member in members),
        tuple(Layout.of(m.parameter) if is_sharded(m.parameter) else None for m in members),
        tuple(local(member.parameter).device for member in members),
        scope,
    )


@lru_cache(maxsize=16)
def _table(
    rows: tuple[tuple[PlaneRows, ...], ...],
    shapes: tuple[tuple[int, ...], ...],
    layouts: tuple[Layout | None, ...],
    devices: tuple[torch.device, ...],
    scope: Scope,
) -> Table:
    scopes: dict[str, dict[str, None]] = {}
    planes: dict[str, int] = {}
    for each in (one for several in rows for one in several):
        planes[each.configuration] = each.planes
        scopes.setdefault(each.configuration, {}).update(dict.fromkeys(each.scopes(scope)))
    spans: list[SlotSpan] = []
    for configuration, names in scopes.items():
        start = spans[-1].stop if spans else 0
        spans.append(SlotSpan(configuration, tuple(names), planes[configuration], start))
    first_slot = {
        (span.configuration, name): span.start + number * span.planes
        for span in spans
        for number, name in enumerate(span.scopes)
    }
    slots = spans[-1].stop
    counts = torch.zeros(slots + 1, dtype=torch.float64)
    pieces: list[LinePiece] = []
    for plane_rows, shape, layout, device in zip(rows, shapes, layouts, devices, strict=True):
        window = plane_rows[0].window
        lines = torch.full((window.groups * window.size,), slots)
        for each in plane_rows:
            starts = torch.tensor([first_slot[each.configuration, name] for name in each.scopes(scope)])
            lines[each.lines] = (starts[:, None] + torch.arange(each.planes))[..., None].expand_as(each.lines)
        counts += lines.bincount(minlength=slots + 1)
        dim = 0 if len(shape) == 1 else window.line_dim(len(shape))
        coordinate = layout.mesh.get_coordinate() if layout is not None else None
        if layout is not None and coordinate is not None:
            lines = lines[lines_of(layout, dim, coordinate)]
        inside = (lines < slots).nonzero()[:, 0]
        first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
        if window.stacked:
            first, last = 0, len(lines)
        cuts = layout.cut_mesh_dims if layout is not None else ()
        sums = (layout.mesh, cuts) if layout is not None and cuts else None
        pieces.append(LinePiece(first, last, lines[first:last].to(device), sums, layout.part if layout else 0))
    return Table(spans, counts.clamp_min(1), pieces)


def _lines_first(parameter: Tensor, rows: PlaneRows) -> Tensor:
    """Return a view of a parameter with its lines first: (lines, length), or (groups, lines, length) of a stack."""
    window = rows.window
    if parameter.ndim == 1:
        return parameter[:, None]
    if parameter.ndim > 2 and not window.stacked:
        parameter = parameter.view(parameter.shape[0], -1)
    return parameter if (window.lines == "rows") != window.transposed else parameter.mT


# ---- norms -----------------------------------------------------------------------------------------------


def _norms(views: Sequence[Tensor], table: Table) -> tuple[Tensor, int, list[Tensor]]:
    """Return the norms of all planes in units of a power of two, (slots,) float64, its exponent, and those of lines.

    On the CPU, or on a device that has float64.
    """
    parts = [view[piece.first : piece.last] for view, piece in zip(views, table.pieces, strict=True)]
    exponent = _exponent(parts, table) if any(part.dtype == torch.float64 for part in parts) else 0
    ways = list(dict.fromkeys(piece.sums for piece in table.pieces))
    home = next((part.device for part in parts if has_float64(part.device)), torch.device("cpu"))
    total = torch.zeros(table.slots + 1, dtype=torch.float64, device=home)
    of_lines = _line_norms(parts, exponent)
    for way in ways:
        summed_so = [i for i, piece in enumerate(table.pieces) if piece.sums == way]
        norms = torch.cat([of_lines[i].to(home) for i in summed_so]).nan_to_num_(nan=0.0, posinf=0.0)
        slots = torch.cat([table.pieces[i].slots.to(home) for i in summed_so])
        squares = torch.zeros_like(total).index_add_(0, slots, norms.square_())
        if way is not None:
            squares = _summed(squares, way)
        total += squares
    return total[:-1].sqrt_(), exponent, of_lines


def _summed(squares: Tensor, way: tuple[Any, tuple[int, ...]]) -> Tensor:
    mesh, dims = way
    on_mesh = squares.to(mesh.device_type)
    for dim in dims:
        dist.all_reduce(on_mesh, group=mesh.get_group(dim))
    return on_mesh.to(squares.device)


def _line_norms(parts: Sequence[Tensor], exponent: int) -> list[Tensor]:
    """Return the norm of each line in units of 2^exponent, float64."""
    narrow = [i for i, part in enumerate(parts) if part.dtype != torch.float64 and part.device.type == "cpu"]
    found: dict[int, Tensor] = {}
    if narrow:
        norms = [torch.linalg.vector_norm(parts[i], dim=-1, dtype=torch.float32).flatten() for i in narrow]
        together = torch.cat(norms)
        unsafe = bool(((together < _SAFE[0]) | ~(together < _SAFE[1])).any())
        for i, norm in zip(narrow, norms, strict=True):
            wide = _careful(parts[i], norm) if unsafe else norm.double()
            found[i] = wide.ldexp_(torch.tensor(-exponent)) if exponent else wide
    return [found[i] if i in found else _wide(part, exponent) for i, part in enumerate(parts)]


def _careful(part: Tensor, norm: Tensor) -> Tensor:
    """Return the norms of lines in float64, of which some in float32 may have lost what was small or large."""
    if not part.numel():
        return norm.double()
    largest = torch.linalg.vector_norm(part, torch.inf, dim=-1).flatten()
    norm = torch.where(largest == 0, 0.0, norm.double())
    again = (((norm < _SAFE[0]) | ~(norm < _SAFE[1])) & (largest != 0)).nonzero()[:, 0]
    if len(again):
        norm[again] = torch.linalg.vector_norm(part.flatten(0, -2)[again].double(), dim=-1)
    return norm


def _wide(part: Tensor, exponent: int) -> Tensor:
    if not has_float64(part.device):
        part = part.cpu()
    if exponent:
        part = part.double().ldexp(torch.tensor(-exponent, device=part.device))
    return torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64).flatten()


def _exponent(parts: Sequence[Tensor], table: Table) -> int:
    """Return the exponent of the largest entry where squares of float64 could leave its range, else 0."""
    largest = [torch.linalg.vector_norm(part, torch.inf) for part in parts if part.numel()]
    top = max((float(value) for value in largest if value.isfinite()), default=0.0)
    for mesh, dims in dict.fromkeys(piece.sums for piece in table.pieces if piece.sums is not None):
        value = torch.tensor(top, dtype=torch.float64, device=mesh.device_type)
        for dim in dims:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        top = float(value)
    return math.frexp(top)[1] if top and not 1e-100 < top < 1e100 else 0


# ---- shares ----------------------------------------------------------------------------------------------


def _shares(norms: Tensor, table: Table, amount: float | Tensor, exponent: int, scale: str, keep: int) -> Tensor:
    """Return what each slot loses, (slots + 1,), with 0 for the lines in no plane."""
    tau = torch.as_tensor(amount, dtype=torch.float64).to(norms.device).clamp_max(torch.finfo(torch.float64).max)
    shares = []
    for span in table.spans:
        norm = norms[span.start : span.stop].view(-1, span.planes)
        if scale == "relative":
            length = torch.linalg.vector_norm(norm, dim=-1, keepdim=True)
            threshold = (tau * length / span.planes**0.5).expand_as(norm)
        else:
            rows = table.rows[span.start : span.stop].to(norm.device).view_as(norm)
            threshold = (tau * rows.sqrt()).ldexp(torch.tensor(-exponent))
        share = soft(norm, threshold)
        shares.append((spare_largest(share, norm, keep) if keep else share).flatten())
    return torch.cat([*shares, norms.new_zeros(1)])


def _same(one: float | Tensor, other: float | Tensor | None) -> bool:
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _leave(part: Tensor, share: Tensor, seed: int) -> None:
    """Let lines lose their share in place; 16 bits are rounded stochastically."""
    share = share.to(part.device, torch.float64 if part.dtype == torch.float64 else torch.float32)
    if part.dtype.itemsize >= 4:
        shrink_by(part, share, out=part)
    else:
        part.copy_(rounded(shrink_by(part.float(), share), part.dtype, seed))
