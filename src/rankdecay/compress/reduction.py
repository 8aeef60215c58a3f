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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rankdecay.attention.layer import Role, Window
from rankdecay.attention.module.found import Found, Place
from rankdecay.attention.products import Rotary, grouped, in_order, triangle, with_bias
from rankdecay.linalg.stack import decomposed

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
        """d, the size of a head."""
        return self.found.head_dim

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that become others."""
        places = [self.found.places[role] for role in _ROLES]
        names = [name for place in places for name in (place.parameter, place.bias) if name]
        return list(dict.fromkeys([*names, *(norm.parameter for norm in (self.query_norm, self.key_norm) if norm)]))


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the inputs [x; 1] of a layer's projections over some text, (D + 1, D + 1), float64."""

    matrix: Tensor
    _roots: dict[tuple[bool, bool], Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def mean(self) -> Tensor:
        """Mean input, (D,)."""
        return self.matrix[:-1, -1] / self.matrix[-1, -1]

    def root(self, *, centred: bool = False, with_one: bool) -> Tensor:
        """Return a root L with L Lᵀ the moments of x or [x; 1], or the covariance of x."""
        if (centred, with_one) not in self._roots:  # D³, the same for every matrix and every head size
            self._roots[centred, with_one] = self._root(centred, with_one)
        return self._roots[centred, with_one]

    def _root(self, centred: bool, with_one: bool) -> Tensor:
        moments = self.matrix / self.matrix[-1, -1]
        if centred:
            moments = moments[:-1, :-1] - self.mean[:, None] * self.mean
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
    values = _values(layer, parts, head_dim, moments)
    heads: dict[Role, Tensor] = {"query": query, "key": key, "value": values.value, "output": values.output}
    written = _written(parts, head_dim, heads)
    if (name := layer.found.places["output"].bias) is not None:
        _check_finite(name, read(name))
        written[name] = read(name) if values.bias is None else values.bias
    for norm, scale in ((layer.query_norm, layer.scale / layer.new_scale), (layer.key_norm, 1.0)):
        if norm is not None and coordinates is not None:
            _check_finite(norm.parameter, read(norm.parameter))  # what is dropped would not be missed
            written[norm.parameter] = _gains(layer, norm, read(norm.parameter), scale, coordinates)
    stored = {name: tensor.to(read(name).dtype) for name, tensor in written.items()}
    if odd := next((name for name, tensor in stored.items() if not _is_finite(tensor)), None):
        raise NotReducible(
            f"{odd} of a smaller head has numbers too large for {stored[odd].dtype}: save the model in bfloat16 or "
            "float32 first."
        )
    return stored


def value_energies(layer: Layer, read: Read, moments: Moments | None) -> Tensor:
    """Return the squared singular values of W_O W_V of each key head, (key heads, d), largest first.

    On the moments of the layer's input, where they are given: then it is the output's energy that each direction has.
    """
    parts = _Parts(layer.found, read)
    value, output = parts.heads("value"), parts.grouped(parts.heads("output")).flatten(1, 2)
    if moments is not None:
        value = value @ moments.root(with_one=parts.has_bias("value"))
    return _product_energies(output, value)


def unturned_energies(layer: Layer, read: Read) -> Tensor | None:
    """Return the energies of what a head has without positions, (key heads, directions), largest first.

    Without a norm the squared singular values of Q̂ᵀ W_K; with one, the shares of coordinates, one row for all heads.
    None where positions turn all of a head.
    """
    turned = layer.found.rotary.dims if layer.found.rotary is not None else 0
    if turned == layer.head_dim:
        return None
    if layer.query_norm is not None:
        return _coordinate_shares(layer, read)[turned:].sort(descending=True).values[None]
    parts = _Parts(layer.found, read)
    query = parts.grouped(parts.heads("query")[:, turned:]).mT.flatten(1, 2)
    return _product_energies(query, parts.heads("key")[:, turned:])


def _product_energies(left: Tensor, right: Tensor) -> Tensor:
    """Return the squared singular values of left right, (…, rows, d) and (…, d, columns), largest first."""
    return decomposed(torch.linalg.svdvals, triangle(left) @ triangle(right.mT).mT).square()


class _Parts:
    """The matrices of a layer by role, head by head, in float64, with their biases as a last column."""

    def __init__(self, found: Found, read: Read) -> None:
        self.found, self.read = found, read

    def heads(self, role: Role) -> Tensor:
        """Return (heads, d, D), with the bias (heads, d, D + 1); of the output (heads, out, d)."""
        place = self.found.places[role]
        bias = None
        if self.has_bias(role):
            assert place.bias is not None
            assert place.bias_window is not None
            bias = place.bias_window.vector(self.read(place.bias))
        matrix = place.window.heads(self.read(place.parameter))
        _check_finite(place.parameter, matrix)
        if bias is not None:
            _check_finite(f"{place.bias}", bias)
        return with_bias(matrix, bias)

    def has_bias(self, role: Role) -> bool:
        """Whether the heads of a matrix have a bias; that of the output is no head's."""
        return role != "output" and self.found.places[role].bias is not None

    def grouped(self, heads: Tensor) -> Tensor:
        """Return query heads by the key head they meet: (key heads, heads of each, …)."""
        return grouped(heads, self.found.places["key"].window.num_heads, self.found.grouping)

    def in_order(self, heads: Tensor) -> Tensor:
        """Undo ``grouped``."""
        return in_order(heads, self.found.grouping)


def plane_rows_of(rotary: Rotary, kept: Tensor) -> Tensor:
    """Return the coordinates of a head that some of its planes have, in the order of a head with these alone."""
    coordinates = rotary.planes()[kept]
    return (coordinates if rotary.interleaved else coordinates.mT).flatten()


def plane_parts(layer: Layer, read: Read) -> tuple[Tensor, Tensor]:
    """Return the squared norms of the rows of each plane, (key heads, heads of each, planes), (key heads, planes)."""
    rotary = layer.found.rotary
    assert rotary is not None
    parts = _Parts(layer.found, read)

    def of(role: Role) -> Tensor:
        return parts.heads(role).square().sum(-1)[:, rotary.planes()].sum(-1)

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
    rows, turned = _turned(layer, kept)
    if turned == layer.head_dim:
        return rows
    rest = _coordinate_shares(layer, read)[turned:].sort(stable=True, descending=True).indices
    return torch.cat([rows, rest[: head_dim - len(rows)].sort().values + turned])


def _coordinate_shares(layer: Layer, read: Read) -> Tensor:
    """Return the share that each coordinate has in the norms of queries and keys and in their product, (d,)."""
    parts = _Parts(layer.found, read)
    query, key = (parts.heads(role).square().sum(-1) for role in ("query", "key"))
    query, key = shares(query), shares(key)
    return (parts.grouped(query) * key[:, None]).sum((0, 1)) + query.sum(0) + key.sum(0)


def shares(energies: Tensor) -> Tensor:
    """Return the share that each number of a last dimension has in their sum; of nothing each has 0."""
    return energies / energies.sum(-1, keepdim=True).clamp_min(torch.finfo(energies.dtype).tiny)


def _scores(
    layer: Layer, parts: _Parts, head_dim: int, kept: Tensor | None, coordinates: Tensor | None, moments: Moments | None
) -> tuple[Tensor, Tensor]:
    """Return W_Q and W_K with their biases, (heads, d', D)."""
    query, key = parts.heads("query"), parts.heads("key")
    if coordinates is not None:
        same = (head_dim / layer.head_dim) ** 0.5  # the root mean square stays what it was
        return query[:, coordinates] * same, key[:, coordinates] * same
    rows, turned = _turned(layer, kept)
    new_query, new_key = query[:, rows], key[:, rows]
    if turned < layer.head_dim:
        left, right = _without_positions(parts, query[:, turned:], key[:, turned:], head_dim - len(rows), moments)
        new_query, new_key = torch.cat([new_query, left], dim=1), torch.cat([new_key, right], dim=1)
    return new_query * (layer.scale / layer.new_scale), new_key


def _turned(layer: Layer, kept: Tensor | None) -> tuple[Tensor, int]:
    """Return the coordinates of the kept planes, and how many coordinates positions turn."""
    if kept is None or layer.found.rotary is None:
        return torch.empty(0, dtype=torch.int64), 0
    return plane_rows_of(layer.found.rotary, kept), layer.found.rotary.dims


def _without_positions(
    parts: _Parts, query: Tensor, key: Tensor, rank: int, moments: Moments | None
) -> tuple[Tensor, Tensor]:
    by_key = parts.grouped(query).mT  # (groups, m, D, n)
    weighted = right_root = None
    if moments is not None:
        weighted = (moments.root(with_one=parts.has_bias("query")).mT @ by_key).flatten(1, 2)
        right_root = moments.root(with_one=parts.has_bias("key"))
    left, right = truncated(by_key.flatten(1, 2), key, rank, right_root, weighted)
    return parts.in_order(left.unflatten(1, by_key.shape[1:3]).mT), right


class _Values(NamedTuple):
    """W_V with its bias, (groups, d', D), W_O, (heads, out, d'), and the output's bias if it changes."""

    value: Tensor
    output: Tensor
    bias: Tensor | None


def _values(layer: Layer, parts: _Parts, rank: int, moments: Moments | None) -> _Values:
    value, output = parts.heads("value"), parts.grouped(parts.heads("output"))  # (groups, m, out, d)
    stacked = output.flatten(1, 2)
    output_bias = layer.found.places["output"].bias
    folds, biased = layer.sums_to_one and output_bias is not None, parts.has_bias("value")
    matrix = value[..., :-1] if folds and biased else value
    root = None if moments is None else moments.root(centred=folds, with_one=biased and not folds)
    left, right = truncated(stacked, matrix, rank, root)

    def summed(constants: Tensor) -> Tensor:
        """Return the sum over heads of what each writes, of (groups, m · out, 1)."""
        return constants.unflatten(1, output.shape[1:3]).sum((0, 1))[:, 0]

    bias = None
    if folds:
        assert output_bias is not None
        bias = parts.read(output_bias).double()
        if moments is not None:  # what is dropped has a mean, and rows of the softmax sum to one
            bias = bias + summed(stacked @ (matrix @ moments.mean[:, None]) - left @ (right @ moments.mean[:, None]))
        if biased:
            bias = bias + summed(stacked @ value[..., -1:])
            right = torch.nn.functional.pad(right, (0, 1))
    return _Values(right, parts.in_order(left.unflatten(1, output.shape[1:3])), bias)


def truncated(
    left: Tensor, right: Tensor, rank: int, root: Tensor | None = None, weighted_left: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return factors of the best product of a rank: left' right' ≈ left right, equal where the rank allows it.

    Args:
        left: (…, rows, d).
        right: (…, d, columns).
        rank: d', at most d.
        root: L, where the error counted is (left right − left' right') L.
        weighted_left: K left, where the error counted has K on its left.

    Returns:
        left', (…, rows, rank), and right', (…, rank, columns), in balance.
    """
    factor = triangle(left if weighted_left is None else weighted_left)
    seen = triangle((right if root is None else right @ root).mT)
    U, sigma, Vh = decomposed(torch.linalg.svd, factor @ seen.mT)
    sigma = sigma[..., None, :rank]
    lost = sigma <= 2.0**-50 * sigma[..., :1]  # rounding: what is left of nothing
    new_right = U[..., :rank].mT @ factor @ right
    new_left = left @ (seen.mT @ Vh[..., :rank, :].mT / torch.where(lost, torch.inf, sigma))
    lengths = torch.linalg.vector_norm(new_right, dim=-1) / torch.linalg.vector_norm(new_left, dim=-2)
    balance = torch.where((lengths > 0) & lengths.isfinite(), lengths, 1.0).sqrt()
    return new_left * balance[..., None, :], new_right / balance[..., None]


def _gains(layer: Layer, norm: Norm, stored: Tensor, scale: float, coordinates: Tensor) -> Tensor:
    """Return the gains that make up for a smaller head's root mean square, and for another scale of the scores."""
    gains = (stored.double() + norm.offset).view(-1, layer.head_dim)[:, coordinates]
    return (gains * scale * (layer.head_dim / len(coordinates)) ** 0.5 - norm.offset).flatten()


def _is_finite(numbers: Tensor) -> bool:
    """Whether all of some numbers are finite; NaN is both extremes, and asking each is thirty times as slow."""
    return bool(torch.stack(torch.aminmax(numbers)).isfinite().all())


def _check_finite(name: str, numbers: Tensor) -> None:
    if not _is_finite(numbers):
        raise NotReducible(f"{name} has values that are not finite: mend the checkpoint first.")


def _written(parts: _Parts, head_dim: int, new: Mapping[Role, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a layer, with heads of the new size where the old ones were; biases are last columns."""
    written: dict[str, Tensor] = {}
    for role, heads in new.items():
        lines = [heads[..., :-1], heads[..., -1:]] if parts.has_bias(role) else [heads]
        for (name, window), new_lines in zip(parts.found.places[role].parts(), lines, strict=False):  # no output's bias
            shape = list(parts.read(name).shape)
            dim = window.line_dim(max(len(shape), 2))
            shape[dim] = shape[dim] // window.head_dim * head_dim
            whole = written.setdefault(name, torch.zeros(shape, dtype=parts.read(name).dtype))
            smaller_window(window, head_dim).write(as_matrix(whole), new_lines)
    return written


def as_matrix(parameter: Tensor) -> Tensor:
    """Return a parameter, of a bias the view of one column in which its window lies."""
    return parameter[:, None] if parameter.ndim == 1 else parameter


def smaller_window(window: Window, head_dim: int) -> Window:
    """Return where a matrix lies in its parameter once every head in it has another size."""

    def scaled(lines: int) -> int:
        return lines // window.head_dim * head_dim

    return replace(
        window, start=scaled(window.start), stop=scaled(window.stop), size=scaled(window.size), head_dim=head_dim
    )


def cached_heads(every: Sequence[Found]) -> int:
    """Return the heads of keys and of values that a token has in the cache, over all layers."""
    return sum(2 * found.places["key"].window.num_heads for found in every)


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
        raise NotReducible(f"{name}: neither names nor config state its {', '.join(sorted(found.unknown))}.")
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
