"""The GPT that one run trains: what it computes, and what its seed decides."""

import collections
import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rankdecay as rd
from rankdecay.lab.errors import SettingError
from rankdecay.lab.session.gpt import EPSILON, GPT, Decoder, GPTConfig

SMALL = GPTConfig(vocabulary=32, context=16, width=24, depth=2, heads=3, mlp_width=40)
KINDS = [
    dataclasses.replace(SMALL, positions=positions, qk_norm=qk_norm, mlp_width=mlp_width)
    for positions in ("rotary", "learned")
    for qk_norm in (False, True)
    for mlp_width in (40, 0)
]


def tokens(rows=2, length=16, seed=0):
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def named(config: GPTConfig) -> str:
    return f"{config.positions}{'-qk_norm' if config.qk_norm else ''}{'' if config.mlp_width else '-attention'}"


@pytest.mark.parametrize("config", KINDS, ids=named)
def test_a_token_sees_none_that_follow(config):
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that attention is far from uniform
            parameter *= 5
        before = tokens()
        after = before.clone()
        after[:, 9:] = (after[:, 9:] + 1) % 32
        first, second = model(before), model(after)
    torch.testing.assert_close(first[:, :9], second[:, :9])
    assert (first[:, 9:] - second[:, 9:]).abs().amax() > 1e-2
    torch.testing.assert_close(model(before[:, :5]), first[:, :5])  # nor does a shorter text matter


@pytest.mark.parametrize("config", KINDS, ids=named)
def test_the_order_of_what_came_before_matters(config):
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5
        text = tokens(1)
        swapped = text[:, [1, 0, *range(2, 16)]]
        assert (model(text)[:, -1] - model(swapped)[:, -1]).abs().amax() > 1e-4


def test_rotary_positions_and_blocks_are_those_of_llama():
    model = GPT(SMALL, seed=3)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
            max_position_embeddings=16, rms_norm_eps=EPSILON, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    names = {name for name, _ in theirs.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    rotary = GPT(SMALL).model.layers[0].self_attn.rotary_emb
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 8, generator=generator).expand(1, 1, 16, 8) for _ in range(2))
    scores = (rotary(query) @ rotary(key).mT)[0, 0]
    for distance in range(16):
        torch.testing.assert_close(scores.diagonal(-distance), scores[distance, 0].expand(16 - distance))
    assert scores[:, 0].std() > 0.1


@pytest.mark.parametrize("config", KINDS, ids=named)
def test_the_seed_decides_the_weights_and_nothing_else_does(config):
    first = GPT(config, seed=1).state_dict()
    torch.manual_seed(99)
    torch.randn(7)
    again, other = GPT(config, seed=1).state_dict(), GPT(config, seed=2).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if tensor.ndim == 2:
            assert not torch.equal(tensor, other[name])
            assert tensor.std() == pytest.approx(0.02, rel=0.15)
        else:
            assert torch.equal(tensor, torch.ones_like(tensor))


def test_embeddings_are_tied():
    model = GPT(SMALL)
    assert model.get_output_embeddings().weight is model.model.embed_tokens.weight
    assert len(list(model.parameters())) == 2 + 9 * 2


def test_attention_alone():
    model = GPT(dataclasses.replace(SMALL, mlp_width=0))
    assert not any("mlp" in name or "post_attention" in name for name, _ in model.named_parameters())
    block = model.model.layers[0]
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), x + block.self_attn(block.input_layernorm(x)))


@pytest.mark.parametrize("config", KINDS, ids=named)
def test_the_library_knows_its_attention(config):
    layers = rd.find_attention(GPT(config))
    assert [layer.name for layer in layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for layer in layers:
        assert (layer.num_heads, layer.head_dim, layer.qk_norm) == (3, 8, config.qk_norm)
        assert (layer.rotary is not None) == (config.positions == "rotary")
    groups = rd.param_groups(GPT(config), rd.Frobenius(0.1), query_key=rd.LowRank(0.2), value_output=rd.Frobenius(0.3))
    counted = collections.Counter()
    for group in groups:
        counted[group["role"]] += len(group["params"])
    assert (counted["query_key"], counted["value_output"]) == (4, 4)


def test_gpt2_has_124_million_parameters():
    config = GPTConfig(50257, 1024, 768, 12, 12, 3072, positions="learned")
    with torch.device("meta"):  # shapes alone; the embedding counts once, because it is tied
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(124.4e6, rel=1e-3)


def test_a_sequence_too_long_and_heads_that_do_not_fit_are_refused():
    with pytest.raises(SettingError, match=r"17 tokens is longer than --context 16"):
        GPT(SMALL)(tokens(1, 17))
    with pytest.raises(SettingError, match=r"--width 25 cannot be split into 3 heads.*--width 96"):
        dataclasses.replace(SMALL, width=25)
    with pytest.raises(SettingError, match="even size"):
        dataclasses.replace(SMALL, width=9)
    assert dataclasses.replace(SMALL, width=9, positions="learned").head_dim == 3  # nothing turns in planes there


# --- controls of what scores come from ---


def scored(scores, positions="rotary", seed=0, **changes):
    return GPT(dataclasses.replace(SMALL, positions=positions, scores=scores, **changes), seed)


def enlarged(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5
    return model


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_uniform_attention_is_the_mean_of_what_came_before(positions, qk_norm):
    model = scored("uniform", positions, qk_norm=qk_norm)
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    means = attention.v_proj(x).cumsum(1) / torch.arange(1, 8)[:, None]
    torch.testing.assert_close(attention(x), attention.o_proj(means))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_scores_of_positions_do_not_depend_on_the_tokens(positions, monkeypatch):
    seen = []

    def attend(query, key, value, is_causal):
        seen.append(query @ key.mT)
        return value

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for scores in ("positions", "learned"):
        model = enlarged(scored(scores, positions))
        seen.clear()
        model(tokens(1, 12, seed=0))
        model(tokens(1, 12, seed=1))
        same = [torch.equal(one, other) for one, other in zip(seen[:2], seen[2:], strict=True)]
        assert same == [scores == "positions"] * 2
        assert seen[0].std(-1).mean() > 1e-3  # and places differ
        if scores == "positions" and positions == "rotary":  # of the distance alone
            for distance in range(12):
                diagonal = seen[0].diagonal(-distance, -2, -1)
                torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal))


@pytest.mark.parametrize("scores", ["learned", "positions", "frozen", "frozen_large", "uniform"])
def test_a_control_changes_w_q_and_w_k_alone(scores):
    plain, control = scored("learned", seed=3), scored(scores, seed=3)
    scale = {"uniform": 0.0, "frozen_large": 24**-0.5 / 0.02}.get(scores, 1.0)
    for (name, own), other in zip(plain.named_parameters(), control.parameters(), strict=True):
        is_scored = "q_proj" in name or "k_proj" in name
        torch.testing.assert_close(other, own * scale if is_scored else own)
        assert other.requires_grad == (not is_scored or scores in ("learned", "positions"))


def test_frozen_large_scores_have_a_size_of_about_one(monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, is_causal: seen.append(query @ key.mT / 8**0.5) or value,
    )
    scored("frozen_large")(tokens(8))
    scored("frozen")(tokens(8))
    large, small = seen[0].std().item(), seen[2].std().item()
    assert 0.6 < large < 1.5
    assert small < 0.02
