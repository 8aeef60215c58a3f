"""Decay of rotary planes on real classes of transformers, against the ten-line reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention.layer import AttentionLayer, MatrixView, Window
from rankdecay.attention.locate import locate
from rankdecay.attention.planes import PlaneRows, plane_rows
from rankdecay.attention.products import Rotary
from rankdecay.attention.source import ModuleSource, named_parameters
from rankdecay.decay.planes import Member, decay_planes, plane_norms
from tests.attention.families import build, randomised
from tests.decay.by_plane import reference

SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 8,
    "intermediate_size": 16, "vocab_size": 11, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
#: (class, planes of a head, whether biases have rows of them, number of rotary configurations)
MODELS = {
    "Llama": (SIZES, 4, False, 1),
    "Qwen2": (SIZES, 4, True, 1),
    "Qwen3": (SIZES, 4, False, 1),
    "Gemma3Text": (SIZES | {"layer_types": ["sliding_attention", "full_attention"]}, 4, False, 2),
    "GPTNeoX": (SIZES | {"hidden_size": 32, "rotary_pct": 0.5}, 2, True, 1),
    "Phi": (SIZES | {"hidden_size": 32, "partial_rotary_factor": 0.5}, 2, True, 1),
    "Cohere": (SIZES | {"hidden_size": 32}, 4, False, 1),
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind][0])
    return randomised(getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config))


def rows_of(model: nn.Module) -> dict[str, list[PlaneRows]]:
    source = ModuleSource(model)
    found, _ = locate(source)
    rows, reasons = plane_rows(found, {name: known.note for name, known in source.known.items() if known.note})
    assert not reasons
    return rows


def members_of(model: nn.Module, amount: float | Tensor | None) -> list[Member]:
    parameters = named_parameters(model)
    return [Member(parameters[name].detach(), tuple(rows), amount) for name, rows in rows_of(model).items()]


def planes_of(layer: AttentionLayer, view: MatrixView, head: int) -> list[Tensor]:
    """Return the rows of each plane of a head, with its bias as a column more: written apart from the library's."""
    assert layer.rotary is not None
    rows = view.heads()[head]
    bias = view.bias()
    if bias is not None:
        rows = torch.cat([rows, bias.view(-1, layer.head_dim)[head][:, None]], 1)
    d = layer.rotary.dims
    pairs = [(2 * j, 2 * j + 1) if layer.rotary.interleaved else (j, j + d // 2) for j in range(d // 2)]
    return [rows[list(pair)] for pair in pairs]


def scopes_of(model: nn.Module, scope: str) -> list[list[tuple[AttentionLayer, MatrixView, int]]]:
    """Return the heads of W_Q and W_K of each scope."""
    groups: dict[object, list[Any]] = {}
    configurations = {rows[0].layer: rows[0].configuration for rows in rows_of(model).values()}
    for layer in rd.find_attention(model):
        alone = layer.num_heads == layer.num_key_value_heads
        for view in (layer.query, layer.key):
            for head in range(view.num_heads):
                shared = layer.key_head(head) if view is layer.query else head
                key = {
                    "head": (layer.name, shared) if alone else (layer.name, view.role, head),
                    "group": (layer.name, shared),
                    "layer": layer.name,
                    "model": configurations[layer.name],
                }[scope]
                groups.setdefault(key, []).append((layer, view, head))
    return list(groups.values())


def expected(model: nn.Module, scope: str, amount: float, **how: Any) -> list[list[Tensor]]:
    """Return the planes of each scope after the reference's step; a bias's entry is a row of its own."""
    results = []
    for heads in scopes_of(model, scope):
        planes = [planes_of(*head) for head in heads]  # [head][plane]
        width = max(rows.shape[1] for head in planes for rows in head)
        stacked = []
        for j in range(len(planes[0])):
            rows = []
            for (_, view, _), head in zip(heads, planes, strict=True):
                bias = view.bias() is not None
                matrix = head[j][:, : head[j].shape[1] - bias]
                rows.append(torch.nn.functional.pad(matrix, (0, width - matrix.shape[1])))
                if bias:
                    rows.append(torch.nn.functional.pad(head[j][:, -1:], (0, width - 1)))
            stacked.append(torch.cat(rows))
        results.append(reference(stacked, amount, **how))
    return results


def actual(model: nn.Module, scope: str) -> list[list[Tensor]]:
    return expected(model, scope, 0.0)


@pytest.mark.parametrize("kind", MODELS)
def test_planes_of_real_models(kind: str):
    model = make(kind)
    _, planes, biased, configurations = MODELS[kind]
    rows = rows_of(model)
    assert {each.planes for several in rows.values() for each in several} == {planes}
    assert len({each.configuration for several in rows.values() for each in several}) == configurations
    assert any("bias" in each.part for several in rows.values() for each in several) == biased
    for several in rows.values():
        assert [PlaneRows.parse(str(each)) for each in several] == several


@pytest.mark.parametrize("scope", ["head", "group", "layer", "model"])
@pytest.mark.parametrize("kind", MODELS)
def test_step_is_that_of_the_reference(kind: str, scope: Any):
    model = make(kind).double()
    for how in ({"relative": True}, {"relative": False}, {"relative": True, "keep": 1}):
        amount = 0.9 if how["relative"] else 0.3
        after = expected(model, scope, amount, **how)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        decay_planes(
            members_of(model, amount), scope, "relative" if how["relative"] else "absolute", how.get("keep", 0)
        )
        for one, other in zip(actual(model, scope), after, strict=True):
            for got, want in zip(one, other, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        in_planes = rows_of(model)
        for name, p in model.named_parameters():
            if name not in in_planes:
                assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("kind", ["Qwen2", "GPTNeoX", "Phi", "Cohere"])
def test_a_plane_that_vanishes_is_zero_in_all_rows_and_biases_of_all_layers(kind: str):
    model = make(kind)
    untouched = {name: p.detach().clone() for name, p in model.named_parameters()}
    planes = MODELS[kind][1]
    for _ in range(50):
        decay_planes(members_of(model, 0.1), "model", "absolute", keep=1)
    [norms] = plane_norms(members_of(model, None), "model").values()
    assert int((norms == 0).sum()) == planes - 1
    gone = {j for j in range(planes) if norms[j] == 0}
    for layer in rd.find_attention(model):
        for view in (layer.query, layer.key):
            for head in range(view.num_heads):
                for j, rows in enumerate(planes_of(layer, view, head)):
                    assert bool((rows == 0).all()) == (j in gone)
            assert layer.rotary is not None
            rest = view.heads()[:, layer.rotary.dims :]
            assert torch.equal(rest, view.window.heads(untouched[view.parameter_name])[:, layer.rotary.dims :])
        assert torch.equal(layer.value.tensor(), layer.value.window.matrix(untouched[layer.value.parameter_name]))


def test_models_without_rotary_positions_give_a_reason():
    source = ModuleSource(build("gpt2"))
    rows, reasons = plane_rows(locate(source)[0], {})
    assert not rows
    assert set(reasons.values()) == {"has no rotary positions"}


# ---- the function itself ---------------------------------------------------------------------------------


def plain(heads: int, size: int, dims: int, interleaved: bool, columns: int, dtype: torch.dtype) -> list[Member]:
    """Return W_Q and W_K of one layer, with a bias of the queries."""
    lines = heads * size
    window = Window("rows", 0, lines, lines, size)
    parts: tuple[Any, ...] = ("query", "key", "query bias")
    return [
        Member(
            torch.randn((lines, columns) if part != "query bias" else (lines,), dtype=torch.float64).to(dtype),
            (PlaneRows("layer", part, window, Rotary(dims, interleaved), heads, heads, "consecutive", "c", (), 1),),
            0.5,
        )
        for part in parts
    ]


def planes_in(members: list[Member]) -> list[Tensor]:
    """Return the rows of each plane of all members, as rows of one width."""
    width = max(math.prod(member.parameter.shape[1:]) for member in members)
    rows = members[0].rows[0]
    return [
        torch.cat(
            [
                torch.nn.functional.pad(flat, (0, width - flat.shape[1]))
                for member in members
                if (flat := member.parameter.double().reshape(len(member.parameter), -1)[rows.lines[:, j].flatten()])
                is not None
            ]
        )
        for j in range(rows.planes)
    ]


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    planes=st.integers(1, 4),
    rest=st.integers(0, 3),
    columns=st.integers(0, 5),
    interleaved=st.booleans(),
    relative=st.booleans(),
    keep=st.integers(0, 3),
    amount=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1e30, 1.7e308]),
    exponent=st.sampled_from([0, -140, 120]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_any_shape_amount_and_size_of_weights(
    heads, planes, rest, columns, interleaved, relative, keep, amount, exponent, dtype, seed
):
    torch.manual_seed(seed)
    rest += rest % 2
    members = plain(heads, 2 * planes + rest, 2 * planes, interleaved, columns, dtype)
    if exponent and dtype == torch.float32:
        exponent = -110 if exponent < 0 else exponent
    if dtype == torch.float64:
        exponent *= 7
    at_one = [member._replace(parameter=member.parameter.clone(), amount=amount) for member in members]
    want = reference(planes_in(at_one), amount, relative=relative, keep=min(keep, planes - 1))
    for member in members:
        member.parameter.mul_(2.0**exponent)
    scaled = amount if relative else amount * 2.0**exponent
    scaled = min(scaled, 1.7e308)
    with torch.no_grad():
        decay_planes(
            [member._replace(amount=scaled) for member in members],
            "model",
            "relative" if relative else "absolute",
            min(keep, planes - 1),
        )
    eps = 4 * torch.finfo(dtype).eps
    for before, got, should in zip(planes_in(at_one), planes_in(members), want, strict=True):
        assert got.isfinite().all()
        scale = float(before.norm()) + 1e-30
        torch.testing.assert_close(
            got * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2), should, rtol=0, atol=eps * scale * 4
        )


def test_equal_planes_are_kept_in_the_same_order_at_every_step():
    members = plain(1, 8, 8, False, 3, torch.float64)[:2]
    for member in members:
        member.parameter.fill_(1.0)
    for _ in range(4):
        decay_planes([member._replace(amount=0.1) for member in members], "model", "relative", keep=2)
        [norms] = plane_norms(members, "model").values()
        assert norms[0] == norms[1] == 12**0.5
        assert (norms[2:] < norms[0]).all()


def test_each_parameter_loses_by_its_own_rate_and_the_norm_is_shared():
    torch.manual_seed(0)
    members = plain(2, 4, 4, False, 3, torch.float64)
    together = planes_in(members)
    norms = torch.stack([plane.norm() for plane in together])
    amounts: list[float | Tensor | None] = [0.2, torch.tensor(0.4), None]
    before = [member.parameter.clone() for member in members]
    decay_planes(
        [member._replace(amount=amount) for member, amount in zip(members, amounts, strict=True)], "model", "relative"
    )
    for member, start, amount in zip(members, before, (0.2, 0.4, 0.0), strict=True):
        lines = member.rows[0].lines
        for j in range(2):
            share = amount * norms.norm() / math.sqrt(2) / norms[j]
            its = lines[:, j].flatten()
            torch.testing.assert_close(member.parameter[its], (1 - share) * start[its], rtol=1e-6, atol=0)


def test_a_row_that_is_not_finite_spoils_itself_alone():
    torch.manual_seed(0)
    members = plain(2, 4, 4, False, 3, torch.float32)
    members[0].parameter[0, 1] = torch.nan
    members[1].parameter[2, 0] = torch.inf
    decay_planes(members, "model", "relative")
    bad = [(~member.parameter.isfinite()).sum().item() for member in members]
    assert bad == [1, 1, 0]


def test_sixteen_bits_are_rounded_at_random_and_the_same_for_a_seed():
    torch.manual_seed(0)
    start = plain(2, 64, 64, False, 64, torch.bfloat16)

    def after(seed: int) -> list[Tensor]:
        members = [member._replace(parameter=member.parameter.clone(), amount=1e-3) for member in start]
        decay_planes(members, "model", "relative", seed=seed)
        return [member.parameter for member in members]

    one, same, other = after(1), after(1), after(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    lost = 1 - sum(p.double().norm() ** 2 for p in one) / sum(m.parameter.double().norm() ** 2 for m in start)
    assert float(lost) == pytest.approx(2e-3, rel=0.1)  # to the nearest would be nothing


@pytest.mark.parametrize("way", ["transposed", "stack", "middle", "turns"])
def test_however_a_matrix_is_stored(way: str):
    torch.manual_seed(0)
    usual = plain(3, 4, 4, False, 5, torch.float64)[:2]
    stored = []
    for member in usual:
        W, rows = member.parameter, member.rows[0]
        heads = W.view(3, 4, 5)
        text, value = {
            "transposed": ("rows[0:12]/12 by 4 transposed", W.T.contiguous()),
            "stack": ("stack rows[0:4]/4*3 by 4 transposed", heads.mT.contiguous()),
            "middle": ("rows[0:12]/12 by 4 transposed", heads.permute(2, 0, 1).contiguous()),
            "turns": ("rows[1:2]/2*12 by 4", torch.stack([torch.ones_like(W), W], 1).flatten(0, 1)),
        }[way]
        window = Window.parse(text)
        stored.append(Member(value, (replace(rows, window=window),), member.amount))
    decay_planes(usual, "group", "relative")
    decay_planes(stored, "group", "relative")
    for member, its in zip(usual, stored, strict=True):
        got = its.parameter if way != "middle" else its.parameter.flatten(1)
        torch.testing.assert_close(its.rows[0].window.matrix(got), member.parameter, rtol=1e-14, atol=0)
        if way == "turns":
            assert torch.equal(its.parameter[::2], torch.ones(12, 5, dtype=torch.float64))
