"""The identities of a smaller head: what becomes of W_Q, W_K, W_V and W_O of one attention layer.

Head size d becomes d'. All of it is computed in float64; what a row stands for is in :mod:`rankdecay.attention.planes`.

* **Rotary planes.** In the score q_iᵀ R(i − j) k_j each plane turns by a frequency of its own, so that a plane can go
  if and only if it is zero in the query or in the key of every head: what stays are its rows, those of the kept planes.
* **Scale.** A class that divides by √d' where it divided by √d has W_Q and b_Q multiplied by √(d'/d).
* **A norm of queries and keys** divides by the root mean square over d numbers, zeros included. The kept rows times
  √(d'/d) have the root mean square they had, and the gains make up for it. A plane that is zero in the key alone
  counts in the query's root mean square and must not go.
* **Coordinates without positions** (N1). A head with W_Q of its queries and W_K computes with Q̂ᵀ W_K alone, where Q̂
  has W_Q and b_Q of all query heads that share the key: its truncated SVD is the best W_Q and W_K of d' coordinates,
  and equal if the rank is at most d'. A bias of the keys is a column of W_K: this holds with sinks and caps, too.
* **Values** (N2). M = [W_O,1; …; W_O,m] W_V by key head, truncated in the same way. Rows of the softmax sum to one, so
  that b_V adds W_O b_V to the output's bias where there is one; elsewhere it is a column of W_V.

With second moments of the layer's input (``Moments``) the truncation is that of the outputs on the data; without them
every input counts alike, which loses more the more the directions of the input differ in size.

Source: W. Su et al. 2021 (rotary positions); the identities are derived in `docs/guides/compress.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.products import Rotary
from rankdecay.attention.windows import Found, Place

Read = Callable[[str], Tensor]


class NotReducible(ValueError):
    """Raised for a model whose head cannot be made smaller, or not in its own class; the message says why."""


@dataclass(frozen=True)
class Norm:
    """Norm of queries or keys by their root mean square.

    Attributes:
        parameter: name of its gains, (d,) or (heads · d,).
        offset: what the class adds to the stored gains: 1 in Gemma, else 0.
    """

    parameter: str
    offset: float


@dataclass(frozen=True)
class Layer:
    """One attention layer and what its class does beside its matrices.

    Attributes:
        found: where its matrices are.
        query_norm: norm of the queries, or None.
        key_norm: norm of the keys, or None.
        scale: what scores are multiplied by now.
        new_scale: what the smaller head's class multiplies them by.
        sums_to_one: whether the softmax's rows do, and values reach W_O as they are: not with sinks, nor with gates.
    """

    found: Found
    query_norm: Norm | None
    key_norm: Norm | None
    scale: float
    new_scale: float
    sums_to_one: bool

    @property
    def head_dim(self) -> int:
        """D."""
        return self.found.head_dim

    @property
    def key_heads(self) -> int:
        """Number of key heads."""
        return self.found.places["key"].window.num_heads

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that become others."""
        places = [self.found.places[role] for role in _ROLES]
        names = [name for place in places for name in (place.parameter, place.bias) if name]
        return list(dict.fromkeys([*names, *(norm.parameter for norm in (self.query_norm, self.key_norm) if norm)]))


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs [x; 1] of a layer's projections over some text, (D + 1, D + 1), float64."""

    matrix: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean input, (D,)."""
        return self.matrix[:-1, -1] / self.matrix[-1, -1]

    def root(self, *, centred: bool = False, with_one: bool) -> Tensor:
        """Return a root L with L Lᵀ the moments of x or [x; 1], or the covariance of x."""
        moments = self.matrix / self.matrix[-1, -1]
        if centred:
            mean = moments[:-1, -1]
            moments = moments[:-1, :-1] - mean[:, None] * mean
        elif not with_one:
            moments = moments[:-1, :-1]
        values, vectors = torch.linalg.eigh(moments)
        # inputs that the text never showed still count a little, or what is exact would not stay so
        return vectors * values.clamp_min(1e-10 * float(values[-1])).sqrt()


_ROLES: tuple[Role, ...] = ("query", "key", "value", "output")


def reduced(layer: Layer, read: Read, head_dim: int, kept: Tensor | None, moments: Moments | None) -> dict[str, Tensor]:
    """Return the parameters of a layer with a smaller head, in the types they had.

    Args:
        layer: the layer.
        read: reads a parameter by its name.
        head_dim: d'.
        kept: the rotary planes that stay, in increasing order; None for a layer without rotary positions.
        moments: of the layer's input, for the choice of what low rank keeps; None: all inputs count alike.
    """
    read = lru_cache(maxsize=None)(read)  # a fused parameter is asked for by each of its matrices
    parts = _Parts(layer.found, read)
    coordinates = kept_coordinates(layer, read, head_dim, kept) if layer.query_norm is not None else None
    query, key = _scores(layer, parts, head_dim, kept, coordinates, moments)
    value, output, bias = _values(layer, parts, head_dim, moments)
    made = _Writer(parts, head_dim)
    sides: list[tuple[Role, Tensor]] = [("query", query), ("key", key), ("value", value)]
    for role, heads in sides:
        made.write(role, heads[..., : parts.width(role)], heads[..., -1] if parts.has_bias(role) else None)
    made.write("output", output, None)
    written = made.finished()
    if (name := layer.found.places["output"].bias) is not None:
        written[name] = read(name) if bias is None else bias
    for norm, side in ((layer.query_norm, "query"), (layer.key_norm, "key")):
        if norm is not None and coordinates is not None:
            written[norm.parameter] = _gains(layer, norm, read(norm.parameter), side, coordinates)
    return {name: tensor.to(read(name).dtype) for name, tensor in written.items()}


def value_energies(layer: Layer, read: Read, moments: Moments | None) -> Tensor:
    """Return the squared singular values of W_O W_V of each key head, (key heads, d), largest first.

    On the moments of the layer's input, where they are given: then it is the output's energy that each direction has.
    """
    parts = _Parts(layer.found, read)
    value, output = parts.heads("value"), parts.grouped(parts.heads("output")).flatten(1, 2)
    if moments is not None:
        value = value @ moments.root(with_one=parts.has_bias("value"))
    (factor, _), (seen, _) = _square_factor(output), _square_factor(value.mT)
    return torch.linalg.svdvals(factor @ seen.mT).square()


def unturned_energies(layer: Layer, read: Read) -> Tensor | None:
    """Return the energies of what a head has without positions, (key heads, directions), largest first.

    Without a norm the squared singular values of Q̂ᵀ W_K; with one, the shares of coordinates, one row for all heads.
    None where positions turn all of a head.
    """
    turned = layer.found.rotary.dims if layer.found.rotary is not None else 0
    if turned == layer.head_dim:
        return None
    if layer.query_norm is not None:
        return _shares(layer, read)[turned:].sort(descending=True).values[None]
    parts = _Parts(layer.found, read)
    query = parts.grouped(parts.heads("query")[:, turned:]).transpose(-1, -2).flatten(1, 2)
    key = parts.heads("key")[:, turned:]
    (left, _), (right, _) = _square_factor(query), _square_factor(key.mT)
    return torch.linalg.svdvals(left @ right.mT).square()


class _Parts:
    """The matrices of a layer by role, head by head, in float64, with their biases as a last column."""

    def __init__(self, found: Found, read: Read) -> None:
        self.found, self.read = found, read

    def heads(self, role: Role) -> Tensor:
        """Return (heads, d, D), with the bias (heads, d, D + 1); of the output (heads, out, d)."""
        place = self.found.places[role]
        heads = place.window.heads(self.read(place.parameter)).double()
        if not heads.isfinite().all():
            raise NotReducible(f"{place.parameter} has values that are not finite: mend the checkpoint first.")
        if role == "output" or not self.has_bias(role):
            return heads
        assert place.bias is not None
        assert place.bias_window is not None
        bias = replace(place.bias_window, transposed=False, stacked=False).vector(self.read(place.bias)).double()
        return torch.cat([heads, bias.view(*heads.shape[:2], 1)], dim=-1)

    def has_bias(self, role: Role) -> bool:
        """Whether a matrix has a bias."""
        return self.found.places[role].bias is not None

    def width(self, role: Role) -> int:
        """Return D, the number of inputs."""
        place = self.found.places[role]
        return place.window.matrix(self.read(place.parameter)).shape[1]

    def grouped(self, heads: Tensor) -> Tensor:
        """Return query heads by the key head they meet: (key heads, heads of each, …)."""
        groups = self.found.places["key"].window.num_heads
        if self.found.grouping == "strided":
            return heads.unflatten(0, (-1, groups)).transpose(0, 1)
        return heads.unflatten(0, (groups, -1))

    def in_order(self, grouped: Tensor) -> Tensor:
        """Undo ``grouped``."""
        return (grouped.transpose(0, 1) if self.found.grouping == "strided" else grouped).flatten(0, 1)


def plane_rows_of(rotary: Rotary, kept: Tensor) -> Tensor:
    """Return the coordinates of a head that some of its planes have, in the order of a head with these alone."""
    if rotary.interleaved:
        return torch.stack([2 * kept, 2 * kept + 1], dim=1).flatten()
    return torch.cat([kept, kept + rotary.dims // 2])


def plane_parts(layer: Layer, read: Read) -> tuple[Tensor, Tensor]:
    """Return the squared norms of the rows of each plane, (key heads, heads of each, planes), (key heads, planes)."""
    rotary = layer.found.rotary
    assert rotary is not None
    parts = _Parts(layer.found, read)

    def of(role: Role) -> Tensor:
        squares = parts.heads(role).square().sum(-1)[:, plane_rows_of(rotary, torch.arange(rotary.dims // 2))]
        pairs = squares.unflatten(1, (-1, 2)).mT if rotary.interleaved else squares.unflatten(1, (2, -1))
        return pairs.sum(1)

    return parts.grouped(of("query")), of("key")


def kept_coordinates(layer: Layer, read: Read, head_dim: int, kept: Tensor | None) -> Tensor:
    """Return the coordinates of a head that stay where queries and keys are normalised, in their new order.

    Those of the kept planes, and of the coordinates without positions, which the gains of one norm tie together over
    all heads, those of the largest share in the norms of queries and keys and in their product.

    Args:
        layer: the layer.
        read: reads a parameter by its name.
        head_dim: d'.
        kept: the rotary planes that stay; None for a layer without rotary positions.
    """
    rows = torch.empty(0, dtype=torch.int64)
    turned = 0
    if kept is not None and layer.found.rotary is not None:
        rows, turned = plane_rows_of(layer.found.rotary, kept), layer.found.rotary.dims
    if turned == layer.head_dim:
        return rows
    shares = _shares(layer, read)[turned:]
    best = shares.sort(stable=True, descending=True).indices[: head_dim - len(rows)].sort().values
    return torch.cat([rows, best + turned])


def _shares(layer: Layer, read: Read) -> Tensor:
    """Return the share that each coordinate has in the norms of queries and keys and in their product, (d,)."""
    parts = _Parts(layer.found, read)
    query, key = (parts.heads(role).square().sum(-1) for role in ("query", "key"))
    query, key = (part / part.sum(-1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny) for part in (query, key))
    return (parts.grouped(query) * key[:, None]).sum((0, 1)) + query.sum(0) + key.sum(0)


def _scores(
    layer: Layer, parts: _Parts, head_dim: int, kept: Tensor | None, coordinates: Tensor | None, moments: Moments | None
) -> tuple[Tensor, Tensor]:
    query, key = parts.heads("query"), parts.heads("key")
    if coordinates is not None:
        same = (head_dim / layer.head_dim) ** 0.5  # the root mean square stays what it was
        return query[:, coordinates] * same, key[:, coordinates] * same
    rotary = layer.found.rotary if kept is not None else None
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    turned = 0
    if rotary is not None and kept is not None:
        rows = plane_rows_of(rotary, kept)
        turned = rotary.dims
        queries.append(query[:, rows])
        keys.append(key[:, rows])
    if turned < layer.head_dim:
        rank = head_dim - sum(part.shape[1] for part in queries)
        left, right = _without_positions(parts, query[:, turned:], key[:, turned:], rank, moments)
        queries.append(left)
        keys.append(right)
    return torch.cat(queries, dim=1) * (layer.scale / layer.new_scale), torch.cat(keys, dim=1)


def _without_positions(
    parts: _Parts, query: Tensor, key: Tensor, rank: int, moments: Moments | None
) -> tuple[Tensor, Tensor]:
    grouped = parts.grouped(query)  # (groups, m, n, D)
    left = grouped.transpose(-1, -2).flatten(1, 2)  # (groups, m D, n)
    weights = right_root = None
    if moments is not None:
        root = moments.root(with_one=parts.has_bias("query"))
        weights = (root.mT @ grouped.transpose(-1, -2)).flatten(1, 2)
        right_root = moments.root(with_one=parts.has_bias("key"))
    left, right = truncated(left, key, rank, right_root, weights)
    return parts.in_order(left.unflatten(1, (grouped.shape[1], -1)).transpose(-1, -2)), right


def _values(layer: Layer, parts: _Parts, rank: int, moments: Moments | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return W_V with its bias, (groups, d', D), W_O, (heads, out, d'), and the output's bias if it changes."""
    value, output = parts.heads("value"), parts.heads("output")
    grouped = parts.grouped(output)  # (groups, m, out, d)
    stacked = grouped.flatten(1, 2)
    place = layer.found.places["output"]
    folds = layer.sums_to_one and place.bias is not None
    matrix = value[..., : parts.width("value")] if folds else value
    root = None
    if moments is not None:
        root = moments.root(centred=folds, with_one=matrix.shape[-1] > parts.width("value"))
    left, right = truncated(stacked, matrix, rank, root)
    new_output = parts.in_order(left.unflatten(1, (grouped.shape[1], -1)))
    if not folds:
        return right, new_output, None
    assert place.bias is not None
    bias = parts.read(place.bias).double()
    if parts.has_bias("value"):
        bias = bias + (stacked @ value[..., -1:]).unflatten(1, (grouped.shape[1], -1)).sum((0, 1))[:, 0]
        right = torch.cat([right, right.new_zeros(*right.shape[:-1], 1)], dim=-1)
    if moments is not None:  # what is dropped has a mean, and rows of the softmax sum to one
        missing = stacked @ (matrix @ moments.mean[:, None]) - left @ (
            right[..., : matrix.shape[-1]] @ moments.mean[:, None]
        )
        bias = bias + missing.unflatten(1, (grouped.shape[1], -1)).sum((0, 1))[:, 0]
    return right, new_output, bias


def truncated(
    left: Tensor, right: Tensor, rank: int, root: Tensor | None = None, weighted_left: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return factors of the best product of a rank: left' right' ≈ left right, equal where the rank allows it.

    Args:
        left: (…, rows, d).
        right: (…, d, columns).
        rank: d'.
        root: L, where the error counted is (left right − left' right') L.
        weighted_left: K left, where the error counted has K on its left.

    Returns:
        left', (…, rows, rank), and right', (…, rank, columns), in balance.
    """
    counted = left if weighted_left is None else weighted_left
    factor, inverse = _square_factor(counted)
    seen, _ = _square_factor((right if root is None else right @ root).mT)
    vectors = torch.linalg.svd(factor @ seen.mT, full_matrices=False).U[..., :rank]
    new_right = vectors.mT @ factor @ right
    new_left = left @ (inverse @ vectors)
    lengths = torch.linalg.vector_norm(new_right, dim=-1) / torch.linalg.vector_norm(new_left, dim=-2)
    balance = torch.where((lengths > 0) & lengths.isfinite(), lengths, 1.0).sqrt()
    new_left, new_right = new_left * balance[..., None, :], new_right / balance[..., None]
    if (missing := rank - vectors.shape[-1]) > 0:
        new_left = torch.nn.functional.pad(new_left, (0, missing))
        new_right = torch.nn.functional.pad(new_right, (0, 0, 0, missing))
    return new_left, new_right


#: Condition number from which a Gram matrix in float64 no longer tells what is small from what is zero.
_WELL_CONDITIONED = 1e6


def _square_factor(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Return F, (…, d, d) or smaller, with Fᵀ F = tallᵀ tall, and its pseudoinverse.

    From the Gram matrix, a tenth of the time of a QR decomposition, unless it is too badly conditioned for that: what
    a decay left of low rank is to stay exactly so.
    """
    values, vectors = torch.linalg.eigh(tall.mT @ tall)
    if bool((values[..., 0] * _WELL_CONDITIONED**2 > values[..., -1]).all()):
        scale = values.sqrt()[..., None, :]
        return (vectors * scale) @ vectors.mT, (vectors / scale) @ vectors.mT
    factor = torch.linalg.qr(tall, mode="r").R
    return factor, torch.linalg.pinv(factor)


def _gains(layer: Layer, norm: Norm, stored: Tensor, side: str, coordinates: Tensor) -> Tensor:
    gains = stored.double().flatten() + norm.offset
    factor = (layer.head_dim / len(coordinates)) ** 0.5
    if side == "query":
        factor *= layer.scale / layer.new_scale
    return (gains.view(-1, layer.head_dim)[:, coordinates] * factor - norm.offset).flatten()


class _Writer:
    """New parameters, into which heads of the new size are written where the old ones were."""

    def __init__(self, parts: _Parts, head_dim: int) -> None:
        self.parts, self.head_dim = parts, head_dim
        self.new: dict[str, Tensor] = {}
        self.lines: dict[str, int] = {}  # that are written

    def write(self, role: Role, heads: Tensor, bias: Tensor | None) -> None:
        place = self.parts.found.places[role]
        self._write(place.parameter, place.window, heads)
        if bias is not None:
            assert place.bias is not None
            assert place.bias_window is not None
            window = replace(place.bias_window, transposed=False, stacked=False)
            self._write(place.bias, window, bias[..., None])

    def _write(self, name: str, window: Window, heads: Tensor) -> None:
        old = self.parts.read(name)
        small = smaller_window(window, self.head_dim)
        if name not in self.new:
            shape = list(old.shape)
            dim = 0 if old.ndim == 1 else window.line_dim(old.ndim)
            shape[dim] = shape[dim] // window.head_dim * self.head_dim
            self.new[name] = torch.zeros(shape, dtype=torch.float64)
            self.lines[name] = 0
        new = self.new[name]
        small.write(new[:, None] if new.ndim == 1 else new, heads)
        self.lines[name] += small.num_heads * small.head_dim

    def finished(self) -> dict[str, Tensor]:
        return self.new


def smaller_window(window: Window, head_dim: int) -> Window:
    """Return where a matrix lies in its parameter once every head in it has another size."""

    def scaled(lines: int) -> int:
        return lines // window.head_dim * head_dim

    return replace(
        window, start=scaled(window.start), stop=scaled(window.stop), size=scaled(window.size), head_dim=head_dim
    )


def check_reducible(every: Sequence[Found]) -> None:
    """Raise ``NotReducible`` if the identities do not hold for some attention of a model.

    Args:
        every: the attention of the model.
    """
    owners: dict[str, str] = {}
    for found in every:
        _check_reducible(found)
        for place in found.places.values():
            other = owners.setdefault(place.parameter, found.name)
            if other != found.name:
                raise NotReducible(f"{found.name} takes {place.parameter} of {other}: layers share their keys.")
    if len(sizes := {found.head_dim for found in every}) > 1:
        raise NotReducible(f"its layers have heads of several sizes, {sorted(sizes)}, and one is written.")


def _check_reducible(found: Found) -> None:
    name = found.name
    extra = found.places.keys() - set(_ROLES)
    if extra or "output" not in found.places:
        kind = "latent attention or a gate" if extra else "no output projection"
        raise NotReducible(f"{name} has {kind}, whose heads are not those of plain W_Q, W_K, W_V and W_O.")
    if found.unknown:
        raise NotReducible(f"{name}: neither names nor settings say its {', '.join(sorted(found.unknown))}.")
    if found.no_value_product:
        raise NotReducible(f"{name}: {found.no_value_product}, so that values cannot be given fewer coordinates.")
    if found.no_product:
        raise NotReducible(f"{name}: {found.no_product}, so that its scores are not those of W_Q and W_K alone.")
    places: dict[Role, Place] = found.places
    if places["query"].added is not None:
        raise NotReducible(f"{name} adds {places['query'].added} to its queries beside their bias.")
    used: dict[str, set[tuple[int, int]]] = {}
    for role in _ROLES:
        window = places[role].window
        if window.head_dim != found.head_dim:
            raise NotReducible(
                f"{name}: heads of its {role} have size {window.head_dim}, those of its query {found.head_dim}."
            )
        if any(number % window.head_dim for number in (window.start, window.stop, window.size)):
            raise NotReducible(f"{name}: heads take turns row by row in {places[role].parameter}.")
        span = (window.start, window.stop)
        if span in used.setdefault(places[role].parameter, set()):
            raise NotReducible(f"{name} takes its keys as values too.")
        used[places[role].parameter].add(span)
    for parameter, spans in used.items():
        window = next(places[role].window for role in _ROLES if places[role].parameter == parameter)
        if sum(stop - start for start, stop in spans) != window.size:
            raise NotReducible(f"{parameter} has rows that are none of queries, keys and values.")
