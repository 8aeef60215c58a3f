"""`rd.inspect`: rows against an independent computation, baselines, choices, and what a reader is told."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.inspection import BALANCE, NORMS, RANKS, comparison, csv_text, strip
from tests import needs

from .attention.families import build
from .attention.layouts import build_layout


def test_rows_equal_a_computation_in_numpy():
    """GPT-2's first layer by hand: slices of c_attn, the bias as a column more, numpy's SVD of the d × d product."""
    model = build("gpt2")
    report = rd.inspect(model)
    block = model.transformer.h[0].attn
    weight = block.c_attn.weight.detach().double().numpy().T  # (3d, d)
    bias = block.c_attn.bias.detach().double().numpy()
    output = block.c_proj.weight.detach().double().numpy().T
    whole = np.concatenate([weight, bias[:, None]], 1)
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        q, k, v = whole[:32][rows], whole[32:64][rows], whole[64:][rows]
        for product, a, b in (("query_key", k.T, q.T), ("value_output", output[:, rows], v.T)):
            [row] = [r for r in report.rows if (r["layer"], r["head"], r["product"]) == (0, head, product)]
            s = np.linalg.svd(a @ b.T, compute_uv=False)[:8]
            bound = ((a**2).sum() + (b**2).sum()) / 2
            p = s / s.sum()
            expected = {
                "nuclear_norm": s.sum(),
                "frobenius_norm": np.sqrt((s**2).sum()),
                "spectral_norm": s[0],
                "effective_rank": np.exp(-(p * np.log(p)).sum()),
                "stable_rank": (s**2).sum() / s[0] ** 2,
                "nuclear_rank": s.sum() ** 2 / (s**2).sum(),
                "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
                "pseudo_rank": (1 + (np.cumsum(s) / s.sum() < 0.95).sum()) / 8,
                "numerical_rank": 8,
                "nuclear_gap": bound - s.sum(),
                "nuclear_ratio": s.sum() / bound,
                "imbalance": np.linalg.norm(a.T @ a - b.T @ b) / np.linalg.norm((a.T @ a + b.T @ b) / 2),
            }
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=1e-9), name
            np.testing.assert_allclose(row["singular_values"], s, rtol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon-grouped"])
def test_what_is_equal_at_balance(family):
    """The squared norms of rows, of planes under rotary positions, and of groups where heads share a key."""
    model = build(family)
    rows = {(r["layer"], r["head"], r["product"]): r for r in rd.inspect(model).rows}
    for index, layer in enumerate(rd.find_attention(model)):

        def whole(view):
            bias = view.bias()
            heads = view.heads().double().numpy()
            return (
                heads
                if bias is None
                else np.concatenate([heads, bias.double().numpy().reshape(*heads.shape[:2], 1)], 2)
            )

        group = layer.num_heads // layer.num_key_value_heads
        output = layer.output.heads().double().numpy().swapaxes(1, 2)
        for product, names, factors in (
            ("query_key", ("query", "key"), (whole(layer.query), whole(layer.key))),
            ("value_output", ("value", "output"), (whole(layer.value), output)),
        ):
            norms = [(f**2).sum(-1).reshape(layer.num_key_value_heads, -1, f.shape[1]).sum(1) for f in factors]
            mean = sum(n.sum(-1) for n in norms) / 2
            if product == "query_key" and layer.rotary is not None:
                half = layer.rotary.dims // 2
                assert not layer.rotary.interleaved
                norms = [np.concatenate([n[:, :half] + n[:, half : 2 * half], n[:, 2 * half :]], 1) for n in norms]
            for head in range(layer.num_heads):
                row = rows[index, head, product]
                assert list(row["squared_norms"]) == list(names)
                for name, values in zip(names, norms, strict=True):
                    np.testing.assert_allclose(row["squared_norms"][name], values[head // group], rtol=1e-9)
                assert row["mean_frobenius"] == pytest.approx(mean[head // group])
                if group == 1 and (product == "value_output" or layer.rotary is None):
                    assert row["mean_frobenius"] - row["nuclear_norm"] == pytest.approx(row["nuclear_gap"], rel=1e-6)
                baseline = row["untrained"]
                assert {k: len(v) for k, v in baseline["squared_norms"].items()} == {
                    k: len(v) for k, v in row["squared_norms"].items()
                }
                assert sum(map(sum, baseline["squared_norms"].values())) / 2 == pytest.approx(
                    baseline["mean_frobenius"], rel=0.2
                )


def test_every_row_stands_beside_its_baseline():
    for row in rd.inspect(build("falcon-grouped")).rows:
        assert {*NORMS, *RANKS, *BALANCE, "singular_values"} <= row["untrained"].keys()
        assert len(row["untrained"]["singular_values"]) == len(row["singular_values"]) == row["head_dim"]


def test_a_fresh_model_looks_like_its_baseline():
    transformers = needs.package("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=128, n_head=2, n_layer=2, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    for row in rd.inspect(transformers.GPT2LMHeadModel(config)).rows:
        for name in ("nuclear_norm", "effective_rank", "nuclear_ratio", "imbalance"):
            assert row[name] == pytest.approx(row["untrained"][name], rel=0.08), (row["product"], name)


def test_layers_and_heads_can_be_chosen():
    model = build("llama")
    rows = rd.inspect(model, layers=[1], heads=[0, 3]).rows
    assert {(row["layer"], row["head"]) for row in rows} == {(1, 0), (1, 3)}
    assert [r["nuclear_norm"] for r in rd.inspect(model).rows if r["layer"] == 1 and r["head"] in (0, 3)] == [
        r["nuclear_norm"] for r in rows
    ]
    with pytest.raises(ValueError, match=r"layers=2 is out of range: the model has layers 0–1"):
        rd.inspect(model, layers=[2])
    with pytest.raises(ValueError, match=r"heads=4 is out of range: .* has heads 0–3"):
        rd.inspect(model, heads=[4])


def test_normalised_queries_are_shown_as_matrices_with_the_reason():
    report = rd.inspect(build("qwen3"))
    kinds = {row.get("product") or row["matrix"] for row in report.rows}
    assert kinds == {"query", "key", "value_output"}
    assert any("queries and keys are normalised" in note for note in report.notes)
    [row] = [r for r in report.rows if r.get("matrix") == "key" and (r["layer"], r["head"]) == (0, 3)]
    weight = rd.find_attention(build("qwen3"))[0].key.heads()[1].double()  # query head 3 meets key head 1
    assert row["nuclear_norm"] == pytest.approx(torch.linalg.svdvals(weight).sum().item())
    assert row["imbalance"] is None


def test_notes_name_the_layers_they_are_about():
    assert rd.inspect(build("llama")).notes[0].startswith("layers 0-1: RoPE rotates queries and keys, so only")
    assert "2 query heads share a key head" in rd.inspect(build("llama")).notes[1]
    assert "(4 of 8 coordinates)" in rd.inspect(build("gptj")).notes[0]
    assert rd.inspect(build("gpt2")).notes == []


def test_a_layer_that_is_not_finite_is_shown_and_the_rest_reported():
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = torch.nan  # first head's query
    report = rd.inspect(model)
    broken = [(r["layer"], r["head"], r["product"]) for r in report.rows if r["nuclear_norm"] is None]
    assert broken == [(1, 0, "query_key")]
    [row] = [r for r in report.rows if (r["layer"], r["head"], r["product"]) == (1, 0, "query_key")]
    assert row["mean_frobenius"] is None
    assert set(row["squared_norms"]["query"]) == set(row["squared_norms"]["key"]) == {None}
    assert "×███" in str(report)
    json.dumps(report.to_json(), allow_nan=False)


def test_the_summary_and_the_table_of_values():
    report = rd.inspect(build("gpt2"))
    text = str(report)
    assert text.startswith("GPT2LMHeadModel: 2 attention layers")
    assert "W_Kᵀ W_Q, what a query looks for\n  layer  max rank  pseudo rank" in text
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(lines) == len(report.rows)
    assert float(lines[5]["nuclear_norm"]) == report.rows[5]["nuclear_norm"]
    assert float(lines[5]["untrained_imbalance"]) == report.rows[5]["untrained"]["imbalance"]


def test_a_decayed_model_shows_lower_ranks_than_untrained():
    attention = nn.MultiheadAttention(32, 2)
    optimizer = torch.optim.SGD(rd.param_groups(attention, rd.Frobenius(0.0), query_key=rd.LowRank(0.9)), lr=1.0)
    rd.attach(optimizer)
    for p in attention.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for row in rd.inspect(attention).rows:
        if row["product"] == "query_key":
            assert row["pseudo_rank"] < row["untrained"]["pseudo_rank"] - 0.1
    assert all(row["numerical_rank"] == 16 for row in rd.inspect(attention).rows if row["product"] == "value_output")


def test_a_comparison_shows_each_layers_way():
    model = build("gpt2")
    first = rd.inspect(model)
    with torch.no_grad():
        query = model.transformer.h[1].attn.c_attn.weight[:, :32]
        u, s, vh = torch.linalg.svd(query)
        query.copy_(u[:, :2] @ torch.diag(s[:2]) @ vh[:2])
        model.transformer.h[1].attn.c_attn.bias[:32] = 0
    text = comparison([first, rd.inspect(model)])
    [line] = [x for x in text.split("W_O W_V")[0].splitlines() if "layer 1" in x]
    before, after = (float(x) for x in line.split(":")[1].split("  ")[0].split("→"))
    assert before > 0.8
    assert after < 0.3


def test_strips():
    assert strip([0, 0.5, 1, None, 0.124, 0.126]) == "▁▅█×▁▂"
    assert strip([]) == ""


def test_a_checkpoint_is_opened_once(tmp_path, monkeypatch):
    from rankdecay.attention import source

    opened = []
    real = source.open_checkpoint
    monkeypatch.setattr(source, "open_checkpoint", lambda path, state: opened.append(path) or real(path, state))
    build("gpt2").save_pretrained(tmp_path)
    assert rd.inspect(tmp_path).source == str(tmp_path)
    assert opened == [tmp_path]


def test_the_table_of_several_reports_names_the_source_of_each_row():
    first, second = rd.inspect(build("gpt2")), rd.inspect(nn.MultiheadAttention(16, 2))
    lines = list(csv.DictReader(io.StringIO(csv_text([first, second]))))
    assert [line["source"] for line in lines] == ["GPT2LMHeadModel"] * 16 + ["MultiheadAttention"] * 4
    assert "source" not in csv_text([first]).splitlines()[0].split(",")
    assert lines[-1]["head"] == "1"
    assert float(lines[-1]["nuclear_norm"]) == second.rows[-1]["nuclear_norm"]


def test_a_model_without_values_is_refused_by_name():
    with torch.device("meta"):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"^attention\.in_proj_weight is on the meta device and has no values; load"):
        rd.inspect(model)


def test_latent_attention_has_products_where_no_norm_stands():
    model = build_layout("deepseek_v3")
    report = rd.inspect(model)
    kinds = {row.get("product") or row.get("matrix"): 0 for row in report.rows}
    assert list(kinds) == ["query_key", "query_key_rotary", "value_output", "query_factor", "latent"]
    attention = model.model.layers[0].self_attn
    split = attention.kv_b_proj.weight.detach().double().view(4, 14, 8)
    output = attention.o_proj.weight.detach().double().view(32, 4, 6)
    for head, row in enumerate(report.of("value_output")):
        expected = torch.linalg.svdvals(output[:, head] @ split[head, 8:])[:6]
        torch.testing.assert_close(torch.tensor(row["singular_values"], dtype=torch.float64), expected)
    [latent] = report.of("latent")
    expected = torch.linalg.svdvals(attention.kv_a_proj_with_mqa.weight.detach().double()[:8])
    torch.testing.assert_close(torch.tensor(latent["singular_values"], dtype=torch.float64), expected)
    assert any("latent attention" in note for note in report.notes)


def test_a_strided_head_has_the_product_with_the_key_head_it_meets():
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(8, rows, bias=False) for n, rows in (("q", 8), ("k", 4), ("v", 4), ("o", 8))})
    for grouping, meets in (("strided", [0, 1, 0, 1]), ("consecutive", [0, 0, 1, 1])):
        names = rd.AttentionNames(query="q", key="k", value="v", output="o", num_heads=4, grouping=grouping)
        q, k = (model[name].weight.detach().double().unflatten(0, (-1, 2)) for name in "qk")
        for row in rd.inspect(model, names).of("query_key"):
            expected = torch.linalg.svdvals(k[meets[row["head"]]].mT @ q[row["head"]])[:2]
            torch.testing.assert_close(torch.tensor(row["singular_values"], dtype=torch.float64), expected)


def test_what_is_not_handled_is_in_the_report():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "odd": nn.ModuleDict({"kqv": nn.Linear(8, 24)})})
    report = rd.inspect(model)
    [said] = report.unhandled
    assert said.startswith("odd: kqv (24, 8) holds")
    assert f"not handled: {said}" in str(report)
    assert report.to_json()["unhandled"] == [said]
