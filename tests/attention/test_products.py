"""Products of a head from their factors, against the d × d matrix itself and against what theory says must vanish."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention.products import Product, Rotary

from .families import build


def _factors(groups: int, heads: int, rows: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(groups, rows, k, generator=generator, dtype=torch.float64),
        torch.randn(groups, heads, rows + 3, k, generator=generator, dtype=torch.float64),
    )


def _direct(product: Product) -> Tensor:
    """Singular values of each whole product, (heads, k)."""
    whole = product.several @ product.single[:, None].mT
    return torch.linalg.svdvals(whole).flatten(0, 1)[:, : product.single.shape[-1]]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None)
def test_spectra_are_those_of_the_whole_product(groups, heads, rows, k, seed):
    product = Product("query_key", *_factors(groups, heads, rows, k, seed))
    found = product.spectrum().singular_values
    expected = _direct(product)
    assert found.shape[0] == product.num_heads == groups * heads
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-8, rtol=1e-8)
    assert (found[:, expected.shape[1] :].abs() < 1e-8).all()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon-grouped", "llama", "phi3", "bert", "bart", "gptj", "opt"])
def test_real_models_agree_with_the_product_written_out(name):
    """W_Kᵀ W_Q and W_O W_V with biases as a column more, d × d, one head at a time."""
    for layer in rd.find_attention(build(name)):
        products = {"query_key": layer.query_key(), "value_output": layer.value_output()}
        shared = layer.num_heads // layer.num_key_value_heads
        for head in range(layer.num_heads):
            query, key, value = (
                torch.cat([view.heads()[h].double(), b.double().reshape(view.num_heads, -1)[h][:, None]], 1)
                if (b := view.bias()) is not None
                else view.heads()[h].double()
                for view, h in ((layer.query, head), (layer.key, head // shared), (layer.value, head // shared))
            )
            whole = {"query_key": key.T @ query, "value_output": layer.output.heads()[head].double() @ value}
            for kind, matrix in whole.items():
                expected = torch.linalg.svdvals(matrix)
                found = products[kind].spectrum().singular_values[head]
                k = min(len(found), len(expected))
                assert (found[:k] - expected[:k]).abs().max() <= 1e-8 * expected[0]
                assert expected[k:].sum() <= 1e-8 * expected[0]


# ---- balance ---------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None)
def test_the_gap_is_never_negative_and_the_ratio_at_most_one(groups, heads, rows, k, seed):
    for rotary in (None, Rotary(k // 2 * 2, seed % 2 == 0)) if k > 1 else (None,):
        product = Product("query_key", *_factors(groups, heads, rows, k, seed), rotary)
        assert (product.nuclear_gap >= -1e-9).all()
        assert ((product.nuclear_ratio > 0) & (product.nuclear_ratio <= 1 + 1e-12)).all()
        assert ((product.imbalance >= 0) & (product.imbalance <= 2)).all()


def test_balanced_factors_have_no_gap():
    u, s, vh = torch.linalg.svd(torch.randn(9, 9, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    single, several = (side[:, :4] * s[:4].sqrt() @ turn for side in (u, vh.T))
    product = Product("query_key", single[None], several[None, None])
    assert product.imbalance.item() < 1e-12
    assert abs(product.nuclear_gap.item()) < 1e-12
    torch.testing.assert_close(product.spectrum().nuclear_norm, s[:4].sum()[None])
    stretched = Product("query_key", 2 * single[None], several[None, None] / 2)
    assert stretched.imbalance.item() > 1
    assert stretched.nuclear_gap.item() > 0.1


def _minimise(loss, parameters: list[Tensor]) -> None:
    """To a stationary point: L-BFGS until nothing moves."""
    for p in parameters:
        p.requires_grad_()
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=20_000, max_eval=40_000, tolerance_grad=1e-13, tolerance_change=1e-16,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    for p in parameters:
        p.requires_grad_(False)


def test_grouped_queries_balance_as_a_group():
    """At a stationary point of an L2-regularised loss the group's imbalance vanishes, a single head's does not."""
    torch.manual_seed(0)
    key, queries = torch.randn(1, 6, 3, dtype=torch.float64), torch.randn(1, 2, 6, 3, dtype=torch.float64)
    targets = torch.randn(2, 6, 6, dtype=torch.float64) * 2

    def loss():
        fit = sum((key[0] @ queries[0, h].T - targets[h]).square().sum() for h in range(2))
        return fit / 2 + 0.3 / 2 * (key.square().sum() + queries.square().sum())

    _minimise(loss, [key, queries])
    product = Product("query_key", key, queries)
    assert product.imbalance.max() < 1e-5
    assert product.nuclear_gap.max() < 1e-5
    assert Product("query_key", key, queries[:, :1]).imbalance.max() > 0.3


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_heads_balance_by_plane(interleaved):
    """The loss sees W_Kᵀ R_Δ W_Q for several Δ: only the norms of the planes balance, and L2 is the group norm."""
    torch.manual_seed(1)
    key, query = (torch.randn(1, *shape, dtype=torch.float64) for shape in ((6, 4), (1, 6, 4)))
    offsets = torch.arange(4, dtype=torch.float64)
    targets = torch.randn(4, 6, 6, dtype=torch.float64)
    frequency = torch.tensor([1.0, 0.4], dtype=torch.float64)
    planes = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]

    def rotation(offset: Tensor) -> Tensor:
        turn = torch.zeros(4, 4, dtype=torch.float64)
        for (a, b), f in zip(planes, frequency, strict=True):
            c, s = torch.cos(f * offset), torch.sin(f * offset)
            turn[a, a], turn[b, b], turn[a, b], turn[b, a] = c, c, -s, s
        return turn

    def loss():
        fit = sum(
            (key[0] @ rotation(o) @ query[0, 0].T - t).square().sum() for o, t in zip(offsets, targets, strict=True)
        )
        return fit / 2 + 0.1 / 2 * (key.square().sum() + query.square().sum())

    _minimise(loss, [key, query])
    turned = Product("query_key", key, query, Rotary(4, interleaved))
    plain = Product("query_key", key, query)
    assert turned.imbalance.item() < 1e-5
    assert abs(turned.nuclear_gap.item()) < 1e-5
    assert plain.imbalance.item() > 0.05
    assert plain.nuclear_ratio.item() < 0.99


@pytest.mark.parametrize(
    ("d", "k", "ratio", "imbalance", "pseudo_rank"),
    [
        (768, 64, 0.978, 0.41, 0.94),
        (384, 64, 0.959, 0.55, 0.92),
        (128, 64, 0.875, 0.89, 0.84),
        (64, 64, 0.748, 1.15, 0.67),
    ],
)
def test_untrained_factors_look_as_theory_says(d, k, ratio, imbalance, pseudo_rank):
    """docs/theory.md section 6.3."""
    single, several = (torch.randn(4, d, k, dtype=torch.float64) for _ in range(2))
    product = Product("query_key", single, several[:, None])
    assert product.nuclear_ratio.mean().item() == pytest.approx(ratio, abs=0.01)
    assert product.imbalance.mean().item() == pytest.approx(imbalance, abs=0.03)
    assert product.spectrum().pseudo_rank().mean().item() == pytest.approx(pseudo_rank, abs=0.02)


# ---- what layers say of themselves -----------------------------------------------------------------------


def test_a_broken_head_is_nan_and_the_others_are_not():
    attention = nn.MultiheadAttention(16, 4)
    with torch.no_grad():
        attention.in_proj_weight[5, 3] = torch.nan  # second head of the queries
    [layer] = rd.find_attention(attention)
    product = layer.query_key()
    assert product.spectrum().nuclear_norm.isnan().tolist() == [False, True, False, False]
    assert product.imbalance.isnan().tolist() == [False, True, False, False]
    assert not layer.value_output().spectrum().singular_values.isnan().any()
