"""The identities in plain algebra: random layers of every shape beside the same with a smaller head, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankdecay.attention.layer import Window
from rankdecay.attention.module.found import Found, Place
from rankdecay.attention.products import Rotary
from rankdecay.compress.choice import plane_scores
from rankdecay.compress.reduction import (
    Layer,
    Moments,
    Norm,
    plane_rows_of,
    reduced,
    smaller_window,
    truncated,
    unturned_energies,
    value_energies,
)

TOKENS = 7


# ---- the truncation ----------------------------------------------------------------------------------------


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


shapes = st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(1, 12))


@settings(max_examples=40)
@given(shapes, st.integers(1, 8), st.integers(0, 1000))
def test_truncated_is_the_best_of_its_rank(shape, rank, seed):
    rows, inner, columns = shape
    rank = min(rank, inner)
    left, right = _random(2, rows, inner, seed=seed), _random(2, inner, columns, seed=seed + 1)
    new_left, new_right = truncated(left, right, rank)
    assert new_left.shape == (2, rows, rank)
    assert new_right.shape == (2, rank, columns)
    # no product of the rank is nearer, by Eckart and Young: what is missing are the smallest singular values
    left_over = torch.linalg.matrix_norm(left @ right - new_left @ new_right)
    best = torch.linalg.svdvals(left @ right)[:, rank:].square().sum(-1).sqrt()
    torch.testing.assert_close(left_over, best, atol=1e-9, rtol=1e-9)
    # in balance: each direction has the same length on both sides
    lengths = torch.linalg.vector_norm(new_left, dim=-2), torch.linalg.vector_norm(new_right, dim=-1)
    torch.testing.assert_close(*lengths, atol=1e-9, rtol=1e-6)


@settings(max_examples=40)
@given(shapes, st.integers(1, 8), st.integers(0, 1000), st.booleans())
def test_truncated_counts_errors_where_it_is_told(shape, rank, seed, both):
    rows, inner, columns = shape
    left, right = _random(rows, inner, seed=seed), _random(inner, columns, seed=seed + 1)
    root = _random(columns, columns + 2, seed=seed + 2)
    weights = _random(rows + 3, rows, seed=seed + 3) if both else torch.eye(rows, dtype=torch.float64)
    new_left, new_right = truncated(left, right, rank, root, weights @ left if both else None)
    left_over = torch.linalg.matrix_norm(weights @ (left @ right - new_left @ new_right) @ root)
    best = torch.linalg.svdvals(weights @ left @ right @ root)[rank:].square().sum().sqrt()
    scale = torch.linalg.matrix_norm(weights @ left @ right @ root)
    torch.testing.assert_close(left_over, best, atol=1e-7 * float(scale), rtol=1e-7)


@settings(max_examples=40)
@given(st.integers(2, 16), st.integers(1, 8), st.booleans(), st.integers(0, 1000))
def test_what_is_small_is_not_lost(digits, rank, on_the_left, seed):
    """Weights that a decay has all but emptied have singular values of every size."""
    sizes = 10.0 ** -torch.linspace(0, digits, 8, dtype=torch.float64)
    graded = torch.linalg.qr(_random(12, 8, seed=seed)).Q * sizes @ torch.linalg.qr(_random(8, 8, seed=seed + 1)).Q
    low = _random(8, rank, seed=seed + 2) @ _random(rank, 10, seed=seed + 3)
    left, right = (graded, low) if on_the_left else (low.mT, graded.mT)
    new_left, new_right = truncated(left, right, rank)
    product = left @ right
    assert float((product - new_left @ new_right).abs().max() / product.abs().max()) < 1e-9


@given(shapes, st.integers(0, 1000))
def test_truncated_of_nothing_is_nothing(shape, seed):
    rows, inner, columns = shape
    zeros, rank = torch.zeros(inner, columns, dtype=torch.float64), min(3, inner)
    left, right = truncated(_random(rows, inner, seed=seed), zeros, rank)
    assert bool(left.isfinite().all())
    assert not right.any()


# ---- whole layers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One layer: its shapes, and what its class does beside its matrices."""

    groups: int
    members: int
    head: int
    width: int
    rotary: Rotary | None
    biases: frozenset[str]
    norm: str | None  # "head", "full"
    strided: bool
    fused: bool
    sums_to_one: bool
    seed: int


@st.composite
def cases(draw) -> Case:
    head = 2 * draw(st.integers(2, 5))
    turned = draw(st.sampled_from([0, 2, head - 2, head]))
    return Case(
        groups=draw(st.integers(1, 3)),
        members=draw(st.integers(1, 3)),
        head=head,
        width=draw(st.integers(3, 14)),
        rotary=Rotary(turned, draw(st.booleans())) if turned else None,
        biases=frozenset(draw(st.sets(st.sampled_from(["query", "key", "value", "output"])))),
        norm=draw(st.sampled_from([None, None, "head", "full"])),
        strided=draw(st.booleans()),
        fused=draw(st.booleans()),
        sums_to_one=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def _made(case: Case, new_head: int) -> tuple[Layer, dict[str, Tensor], Tensor | None]:
    """Return a layer, its parameters with zeros where they are to go, and the planes that stay."""
    heads = {"query": case.groups * case.members, "key": case.groups, "value": case.groups}
    heads["output"] = heads["query"]
    state: dict[str, Tensor] = {}
    places: dict[Any, Place] = {}
    if case.fused:  # all lines of one parameter, [q, k, v]
        size = sum(heads[role] for role in ("query", "key", "value")) * case.head
        start = 0
        state["qkv.weight"] = _random(size, case.width, seed=case.seed)
        state["qkv.bias"] = _random(size, seed=case.seed + 9)
        for role in ("query", "key", "value"):
            window = Window("rows", start, start + heads[role] * case.head, size, case.head)
            start = window.stop
            places[role] = Place("qkv.weight", window, "qkv.bias", window)
    else:
        for number, role in enumerate(("query", "key", "value")):
            size = heads[role] * case.head
            window = Window("rows", 0, size, size, case.head)
            state[f"{role}.weight"] = _random(size, case.width, seed=case.seed + number)
            bias = f"{role}.bias" if role in case.biases else None
            if bias:
                state[bias] = _random(size, seed=case.seed + 10 + number)
            places[role] = Place(f"{role}.weight", window, bias, window if bias else None)
    size = heads["output"] * case.head
    window = Window("columns", 0, size, size, case.head)
    state["output.weight"] = _random(case.width, size, seed=case.seed + 3)
    if "output" in case.biases:
        state["output.bias"] = _random(case.width, seed=case.seed + 13)
    bias = "output.bias" if "output" in case.biases else None
    places["output"] = Place("output.weight", window, bias, window if bias else None)
    norms: list[Norm | None] = [None, None]
    if case.norm:
        for number, role in enumerate(("query", "key")):
            size = case.head * (heads[role] if case.norm == "full" else 1)
            state[f"{role}_norm"] = _random(size, seed=case.seed + 20 + number)
            norms[number] = Norm(f"{role}_norm", offset=float(number))  # as Gemma stores its gains
    grouping = "strided" if case.strided else "consecutive"
    found = Found("layer", places, case.head, case.rotary, bool(case.norm), grouping)
    layer = Layer(found, norms[0], norms[1], case.head**-0.5, new_head**-0.5, case.sums_to_one)
    kept = _emptied(case, layer, state, new_head)
    return layer, state, kept


def _emptied(case: Case, layer: Layer, state: dict[str, Tensor], new_head: int) -> Tensor | None:
    turned = case.rotary.dims if case.rotary else 0
    kept, planes = None, 0
    generator = torch.Generator().manual_seed(case.seed)
    if case.rotary:
        planes = new_head // 2 if turned == case.head else min(turned // 2, max(1, (new_head - 1) // 2))
        kept = torch.randperm(turned // 2, generator=generator)[:planes].sort().values
        gone = torch.ones(turned, dtype=torch.bool)
        gone[plane_rows_of(case.rotary, kept)] = False
        rows = gone.nonzero()[:, 0]
        for role in ("query", "key"):
            _change(layer, role, state, lambda heads: heads.index_fill(1, rows, 0.0))
    rest = new_head - 2 * planes
    if turned < case.head:
        if case.norm:
            gone = torch.randperm(case.head - turned, generator=generator)[rest:] + turned
            for role in ("query", "key"):
                _change(layer, role, state, lambda heads, gone=gone: heads.index_fill(1, gone, 0.0))
        else:
            _change(layer, "key", state, lambda heads: _low(heads, turned, rest, case.seed))
    _change(layer, "value", state, lambda heads: _low(heads, 0, new_head, case.seed + 1))
    return kept


def _low(heads: Tensor, first: int, rank: int, seed: int) -> Tensor:
    heads = heads.clone()
    count = heads.shape[1] - first
    if rank < count:
        heads[:, first:] = _random(count, rank, seed=seed) @ _random(rank, heads.shape[2], seed=seed + 1)
    return heads


def _change(layer: Layer, role: Any, state: dict[str, Tensor], change: Any) -> None:
    place = layer.found.places[role]
    heads = place.window.heads(state[place.parameter])
    if place.bias is None or place.bias_window is None:
        place.window.write(state[place.parameter], change(heads))
        return
    column = place.bias_window.vector(state[place.bias]).reshape(*heads.shape[:2], 1)
    new = change(torch.cat([heads, column], dim=-1))
    place.window.write(state[place.parameter], new[..., :-1])
    place.bias_window.write(state[place.bias][:, None], new[..., -1:])


def _output(
    layer: Layer, state: dict[str, Tensor], inputs: Tensor, head: int, scale: float, frequencies: Tensor, sink: bool
) -> Tensor:
    """Compute the layer densely, by the definitions alone."""
    found = layer.found

    def side(role: Any, norm: Norm | None) -> Tensor:
        place = found.places[role]
        window = smaller_window(place.window, head)
        heads = window.heads(state[place.parameter])
        out = torch.einsum("hdi,ti->htd", heads, inputs)
        if place.bias is not None and place.bias_window is not None:
            out = out + smaller_window(place.bias_window, head).vector(state[place.bias]).reshape(-1, 1, head)
        if norm is not None:
            gains = state[norm.parameter] + norm.offset
            if gains.numel() == head:
                out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gains
            else:
                mean = out.square().mean((0, 2), keepdim=True)
                out = out / (mean + 1e-6).sqrt() * gains.view(-1, 1, head)
        return out if role == "value" or not len(frequencies) else turn(out)

    def turn(out: Tensor) -> Tensor:
        assert found.rotary is not None
        planes = len(frequencies)
        if found.rotary.interleaved:
            first, second = out[..., 0 : 2 * planes : 2], out[..., 1 : 2 * planes : 2]
        else:
            first, second = out[..., :planes], out[..., planes : 2 * planes]
        turned = torch.complex(first, second) * torch.polar(
            torch.ones(TOKENS, planes, dtype=torch.float64), torch.arange(TOKENS)[:, None] * frequencies
        )
        return torch.cat([turned.real, turned.imag, out[..., 2 * planes :]], dim=-1)  # in one order for both sides

    query, key, value = side("query", layer.query_norm), side("key", layer.key_norm), side("value", None)
    count, groups = len(query), len(key)
    of = torch.arange(count) % groups if found.grouping == "strided" else torch.arange(count) // (count // groups)
    weights = (query @ key[of].mT * scale).exp()
    weights = weights / (weights.sum(-1, keepdim=True) + (1.0 if sink else 0.0))
    place = found.places["output"]
    out = smaller_window(place.window, head).heads(state[place.parameter])
    result = torch.einsum("hts,hsd,hod->to", weights, value[of], out)
    return result + state[place.bias] if place.bias else result


@settings(max_examples=100)
@given(cases(), st.booleans(), st.data())
def test_a_layer_of_zeros_and_low_rank_is_the_same(case, with_moments, data):
    new_head = 2 * data.draw(st.integers(1 if case.rotary is None else 2, case.head // 2), label="new head")
    layer, state, kept = _made(case, new_head)
    inputs = _random(TOKENS, case.width, seed=case.seed + 30)
    moments = None
    if with_moments:
        extended = torch.cat([inputs, torch.ones(TOKENS, 1, dtype=torch.float64)], dim=1)
        moments = Moments(extended.T @ extended)
    new = reduced(layer, state.__getitem__, new_head, kept, moments)
    assert new.keys() == set(layer.parameters)
    frequencies = 1.3 ** -torch.arange(case.rotary.dims // 2 if case.rotary else 0, dtype=torch.float64)
    chosen = frequencies if kept is None else frequencies[kept]
    wanted = _output(layer, state, inputs, case.head, layer.scale, frequencies, sink=not case.sums_to_one)
    got = _output(layer, state | new, inputs, new_head, layer.new_scale, chosen, sink=not case.sums_to_one)
    error = float((wanted - got).abs().max() / wanted.abs().max())
    # with moments of few tokens their roots have small singular values, which the truncation divides by
    assert error < (1e-5 if with_moments else 1e-9)


def _case(**changes: Any) -> Case:
    usual: dict[str, Any] = {
        "groups": 2, "members": 2, "head": 8, "width": 12, "rotary": Rotary(8, False), "biases": frozenset(),
        "norm": None, "strided": False, "fused": False, "sums_to_one": True, "seed": 0,
    }  # fmt: skip
    return Case(**{**usual, **changes})


def test_energies_end_where_the_rank_does():
    layer, state, _ = _made(_case(rotary=None), 4)
    for energies in (value_energies(layer, state.__getitem__, None), unturned_energies(layer, state.__getitem__)):
        assert energies is not None
        assert energies.shape == (2, 8)
        assert bool((energies[:, 3] > 1e-3 * energies[:, 0]).all())
        assert bool((energies[:, 4:] < 1e-20 * energies[:, :1]).all())
    assert unturned_energies(_made(_case(), 4)[0], state.__getitem__) is None


def test_a_plane_of_zeros_in_the_key_alone_is_free_only_without_a_norm():
    """Under a norm the query's root mean square counts it: it is not removable, and its energy counts."""
    for norm, free in ((None, True), ("head", False)):
        layer, state, _ = _made(_case(norm=norm), 8)
        _change(layer, "key", state, lambda heads: heads.index_fill(1, torch.tensor([2, 6]), 0.0))
        scores = plane_scores([layer], [None], state.__getitem__)[None]
        assert scores.removable.tolist() == [False, False, free, False]
        assert (float(scores.energy[2]) == 0) == free
        inputs = _random(TOKENS, 12, seed=30)
        kept = torch.tensor([0, 1, 3])
        small = Layer(layer.found, layer.query_norm, layer.key_norm, layer.scale, 6**-0.5, True)
        _change(small, "value", state, lambda heads: _low(heads, 0, 6, 5))
        new = reduced(small, state.__getitem__, 6, kept, None)
        frequencies = 1.3 ** -torch.arange(4, dtype=torch.float64)
        wanted = _output(layer, state, inputs, 8, layer.scale, frequencies, sink=False)
        got = _output(small, state | new, inputs, 6, small.new_scale, frequencies[kept], sink=False)
        error = float((wanted - got).abs().max() / wanted.abs().max())
        assert error < 1e-9 if free else error > 1e-2


def test_a_plane_whose_gain_is_zero_still_counts():
    layer, state, _ = _made(_case(norm="head"), 8)
    assert layer.key_norm is not None
    state[layer.key_norm.parameter][[2, 6]] = -layer.key_norm.offset
    scores = plane_scores([layer], [None], state.__getitem__)[None]
    assert not scores.removable.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_stay(dtype):
    layer, state, kept = _made(_case(biases=frozenset({"query", "output"}), norm="head"), 4)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert {tensor.dtype for tensor in reduced(layer, state.__getitem__, 4, kept, None).values()} == {dtype}
