"""Which modules are attention, and what is said of those that cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.attention.checkpoints import Checkpoint
from rankdecay.attention.locate import SearchOptions, Unhandled, locate
from rankdecay.attention.source import ModuleSource
from tests import needs

from .families import build


def test_compiled_models_are_seen_through() -> None:
    [layer, _] = rd.find_attention(torch.compile(build("llama")))
    assert layer.query.parameter_name == "_orig_mod.model.layers.0.self_attn.q_proj.weight"


def test_tied_attention_is_listed_under_each_name() -> None:
    model = build("llama")
    first, second = (model.model.layers[i].self_attn.q_proj for i in range(2))
    second.weight = first.weight
    layers = rd.find_attention(model)
    assert layers[0].query.tensor().data_ptr() == layers[1].query.tensor().data_ptr()
    assert layers[0].query.parameter_name != layers[1].query.parameter_name


def test_latent_attention_is_read_factor_by_factor() -> None:
    import transformers

    config = transformers.DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=50, q_lora_rank=16,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    [layer] = rd.find_attention(model)
    attention = model.model.layers[0].self_attn
    split = attention.kv_b_proj.weight.detach().view(4, 16, 8)
    assert torch.equal(layer.key.heads(), split[:, :8])
    assert torch.equal(layer.value.heads(), split[:, 8:])
    queries = attention.q_b_proj.weight.detach().view(4, 12, 16)
    assert torch.equal(layer.query.heads(), queries[:, :8])
    assert torch.equal(layer.factors["query_rotary"].heads(), queries[:, 8:])
    shared = attention.kv_a_proj_with_mqa.weight.detach()
    assert torch.equal(layer.factors["latent"].tensor(), shared[:8])
    assert torch.equal(layer.factors["key_rotary"].tensor(), shared[8:])
    assert torch.equal(layer.factors["query_factor"].tensor(), attention.q_a_proj.weight)
    scores = layer.query_key().spectrum().singular_values
    expected = torch.linalg.svdvals(split[:, :8].double().mT @ queries[:, :8].double())
    torch.testing.assert_close(scores[:, :8], expected[:, :8])
    rotary = layer.query_key_rotary().spectrum().singular_values
    expected = torch.linalg.svdvals(shared[8:].double().mT @ queries[:, 8:].double())
    torch.testing.assert_close(rotary, expected[:, :4])
    roles = {name: group["role"] for group in rd.param_groups(model) for name in group["param_names"]}
    of_attention = {name: role for name, role in roles.items() if "self_attn" in name and "norm" not in name}
    assert {name.split(".")[-2]: role for name, role in of_attention.items()} == {
        "q_a_proj": "query_key", "q_b_proj": "query_key", "kv_a_proj_with_mqa": "other+query_key",
        "kv_b_proj": "query_key+value_output", "o_proj": "value_output",
    }  # fmt: skip


class _Own(nn.Module):
    """Somebody's own attention: odd names, keys and values in one."""

    def __init__(self, heads: int | None = None) -> None:
        super().__init__()
        self.asks = nn.Linear(24, 24, bias=False)
        self.answers = nn.Linear(24, 24)
        self.mix = nn.Linear(24, 24)
        if heads:
            self.num_heads = heads


def test_ones_own_attention_is_named_in_one_call() -> None:
    model = nn.Sequential(_Own(), _Own())
    names = rd.AttentionNames(query="asks", fused="answers", output="mix", num_heads=4)
    layers = rd.find_attention(model, names)
    assert [layer.name for layer in layers] == ["0", "1"]
    layer = layers[0]
    assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (4, 2, 6)
    assert torch.equal(layer.key.tensor(), model[0].answers.weight[:12])
    assert torch.equal(layer.value.bias(), model[0].answers.bias[12:])
    assert layer.output.heads().shape == (4, 24, 6)


def test_what_is_not_attention_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"no attention was found in Linear.*weight \(3, 4\).*names=AttentionNames"):
        rd.find_attention(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"got int"):
        rd.find_attention(7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"under the names 'asks', 'answer'"):
        rd.find_attention(_Own(), rd.AttentionNames(query="asks", fused="answer", output="mix", num_heads=4))
    with pytest.raises(ValueError, match=r"asks: the number of heads in its 24 rows is unknown.*num_heads"):
        rd.find_attention(_Own(), rd.AttentionNames(query="asks", fused="answers"))


def test_a_module_may_have_two_kinds_of_attention() -> None:
    both = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "query", "key", "value")})
    both.num_heads = 2
    found, unhandled = locate(ModuleSource(both))
    assert [layer.places["query"].parameter for layer in found] == ["query.weight", "q_proj.weight"]
    assert [layer.name for layer in found] == ["", ":q_proj"]
    assert [layer.module for layer in found] == ["", ""]
    assert unhandled == []
    names = rd.AttentionNames(query="q_proj", key="k_proj", value="v_proj")
    assert [layer.places["query"].parameter for layer in locate(ModuleSource(both), SearchOptions(names))[0]] == [
        "q_proj.weight",
        "query.weight",
    ]
    assert len(locate(ModuleSource(both), SearchOptions(names, only=True))[0]) == 1


def test_what_is_not_handled_says_where_and_why() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({name: nn.Linear(24, 24) for name in ("q", "k", "v")})})
    found, [module] = locate(ModuleSource(model))
    assert found == []
    assert str(module).startswith("a: q: the number of heads in its 24 rows is unknown")
    assert str(Unhandled("", "flattened")) == "the model: flattened"


@pytest.mark.parametrize(
    "names",
    ["qproj kproj vproj oproj", "fcq fck fcv fco", "queryproj keyproj valueproj out", "Qnet Knet Vnet", "qin kin v"],
)
def test_names_that_differ_in_q_k_and_v_alone_are_spoken_of(names: str) -> None:
    """Beside attention that is read, they would be decayed with the rest of the model and be left out of reports."""
    attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in names.split()})
    attention.num_heads = 2
    query, key, *_ = names.split()
    found, [module] = locate(ModuleSource(nn.ModuleDict({"read": nn.MultiheadAttention(8, 2), "own": attention})))
    assert [layer.name for layer in found] == ["read"]
    assert module.name == "own"
    assert f"map them with names=AttentionNames(query={query!r}, key={key!r}" in module.reason
    others = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("quality", "kuality", "out", "fcq", "fcv")})
    with pytest.raises(ValueError, match="no attention was found"):
        rd.find_attention(others)


def test_each_of_three_attentions_of_a_module_has_a_name_of_its_own() -> None:
    attention = nn.Module()
    attention.num_heads = 2
    kinds = [f"{part}_{kind}" for part in ("key", "value") for kind in ("protein", "structure", "msa")]
    for name in ("query", *kinds, "out_proj"):
        attention.add_module(name, nn.Linear(8, 8))
    layers = rd.find_attention(nn.ModuleDict({"attn": attention}))
    assert [layer.name for layer in layers] == ["attn", "attn:query", "attn:key_msa"]


@pytest.mark.parametrize("given", [None, 2])
def test_an_order_that_nothing_says_is_assumed_and_said(given: int | None, tmp_path) -> None:
    attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
    if given is None:
        attention.num_heads = 2
    model = nn.ModuleDict({"attn": attention})
    assert [layer.unknown for layer in rd.find_attention(model, num_heads=given)] == [{"order", "qk_norm", "rotary"}]
    [note, _] = [note for note in rd.inspect(model, num_heads=given).notes if "the model does not say" in note]
    assert "the fused projection is read as all queries, all keys, all values" in note
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert "order" in rd.find_attention(tmp_path / "weights.pt", num_heads=2)[0].unknown
    names = rd.AttentionNames(fused="qkv", output="proj")
    assert "order" not in rd.find_attention(model, names, num_heads=given)[0].unknown


def test_a_file_of_many_modules_is_walked_once() -> None:
    """What is looked up for each module must not be built anew of all names."""
    shapes = {f"layers.{i}.attn.{name}_proj.weight": (8, 8) for i in range(50) for name in "qkvo"}
    checkpoint = Checkpoint(Path("file"), shapes, {"num_attention_heads": 2}, torch.zeros)
    assert checkpoint.plain is checkpoint.plain
    assert checkpoint._settings_of("layers.0.attn") is checkpoint._settings_of("layers.0.attn")
    assert len(locate(checkpoint)[0]) == 50


LLAMA = rd.AttentionNames(query="q_proj", key="k_proj", value="v_proj", output="o_proj")


#: Names of the four projections, in their usual places.
SCHEMES = [
    ("wq", "wk", "wv", "wo"), ("query", "key", "value", "dense"), ("to_q", "to_k", "to_v", "to_out.0"),
    ("attn_q", "attn_k", "attn_v", "attn_output"), ("q", "k", "v", "proj"), ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q_proj", "k_proj", "v_proj", "out_proj"), ("self.query", "self.key", "self.value", "output.dense"),
    ("linear_q", "linear_k", "linear_v", "linear_out"), ("W_query", "W_key", "W_value", "out_proj"),
    ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"), ("c_q", "c_k", "c_v", "c_proj"),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids="-".join)
@pytest.mark.parametrize("called", [None, "mem_proj"])
def test_attention_without_one_of_its_projections_is_named(
    scheme: tuple[str, ...], called: str | None, tmp_path
) -> None:
    """Missing from a file, or called as nobody else calls it."""
    inside, _, _ = scheme[0].rpartition(".")
    for missing in scheme[:3]:
        names = {name: name for name in scheme} | (
            {missing: ".".join(filter(None, [inside, called]))} if called else {}
        )
        whole = {f"layers.0.attn.{name}.weight": torch.randn(8, 8) for name in scheme}
        part = {f"layers.1.attn.{names[n]}.weight": torch.randn(8, 8) for n in scheme if called or n != missing}
        torch.save(whole | part, tmp_path / "weights.pt")
        report = rd.inspect(tmp_path / "weights.pt", num_heads=2)
        assert {row["layer"] for row in report.rows} == {0}
        [said] = report.unhandled
        assert said.startswith(f"layers.1.attn{'.' if inside else ''}{inside}: ")


@pytest.mark.parametrize("name", ["O", "O_h", "out_proj", "W_o", "to_out", "c_proj", "fc_out"])
def test_an_output_projection_beside_the_module_is_spoken_of(name: str, tmp_path) -> None:
    """As graph transformers have it: one level above queries, keys and values."""
    attention = nn.ModuleDict({letter: nn.Linear(8, 8) for letter in "QKV"})
    attention.num_heads = 2
    model = nn.ModuleDict({"attention": attention, name: nn.Linear(8, 8), "fc2": nn.Linear(16, 8)})
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for source in (model, tmp_path / "weights.pt"):
        with pytest.warns(UserWarning, match=rf"output projection was not found: \.\./{name} may be it: pass names="):
            [layer] = rd.find_attention(source, num_heads=2)
        assert layer.output is None
    names = rd.AttentionNames(query="Q", key="K", value="V", output=f"../{name}")
    [layer] = rd.find_attention(model, names)
    assert [view.parameter_name for view in layer.views][-1] == f"{name}.weight"


def test_what_stands_beside_the_module_may_be_of_another_attention(recwarn) -> None:
    inner = nn.ModuleDict({letter: nn.Linear(8, 8) for letter in "QKV"})
    inner.num_heads = 2
    around = nn.ModuleDict({f"{letter}_proj": nn.Linear(8, 8) for letter in "qkvo"} | {"inner": inner})
    around.num_heads = 2
    alone = nn.ModuleDict({"attention": inner, "out": nn.Linear(8, 3), "fc2": nn.Linear(16, 8)})
    assert [len(rd.find_attention(model)) for model in (around, alone)] == [2, 1]
    assert [str(w.message) for w in recwarn] == []


def test_sizes_that_contradict_the_settings_are_refused() -> None:
    """They are for models that state none; taken over stated ones, heads would be cut where none begin."""
    transformers = needs.package("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
    [layer] = rd.find_attention(model, num_heads=4, head_dim=8)
    assert layer.num_heads == 4
    for name, number, stated in (("num_heads", 8, 4), ("num_heads", 3, 4), ("head_dim", 16, 8)):
        message = rf"{name}={number} contradicts the config \({stated}\): omit {name}"
        with pytest.raises(ValueError, match=message):
            rd.find_attention(model, **{name: number})
    with pytest.raises(ValueError, match=r"num_heads=8 contradicts the config \(4\)"):
        rd.attach(torch.optim.AdamW(model.parameters()), model, query_key=rd.LowRank(1.0, unit="head"), num_heads=8)
    [layer] = rd.find_attention(model, replace(LLAMA, num_heads=8))  # the settings are wrong, and it is meant
    assert layer.num_heads == 8


# ---- projections whose names say little -------------------------------------------------------------------


def _beside(**children: nn.Module) -> nn.Module:
    """A module that states its heads, beside attention that is found."""
    known = nn.ModuleDict({f"{name}_proj": nn.Linear(32, 32) for name in "qkvo"})
    other = nn.ModuleDict(children)
    known.num_heads = other.num_heads = 4  # pyright: ignore[reportArgumentType]
    return nn.ModuleDict({"known": known, "other": other})


def _linear(rows: int, columns: int = 32) -> nn.Module:
    return nn.Linear(columns, rows, bias=False)


@pytest.mark.parametrize(
    ("children", "said"),
    [
        ({"in_proj": _linear(96), "out_proj": _linear(32)}, r"in_proj \(96, 32\) beside out_proj \(32, 32\) may hold"),
        ({"in_proj": _linear(64), "out_proj": _linear(32)}, r"in_proj \(64, 32\) beside out_proj \(32, 32\) may hold"),
        ({"proj": _linear(96), "o_proj": _linear(32), "g_proj": _linear(32)}, r"proj \(96, 32\) beside o_proj"),
        ({"layernorm_qkv": nn.Sequential(nn.LayerNorm(32), _linear(96)), "out_proj": _linear(32)}, "layernorm_qkv"),
        ({"to_q": _linear(32), "to_vk": _linear(64), "to_out": _linear(32)}, r"to_vk \(64, 32\) holds"),
        ({"toqk": _linear(32), "tov": _linear(32), "to_out": _linear(32)}, r"toqk \(32, 32\) holds"),
    ],
)
def test_what_may_be_attention_by_its_shapes_is_named(children: dict[str, nn.Module], said: str) -> None:
    with pytest.warns(UserWarning, match=rf"other is not handled: .*{said}.*in an unknown order: pass names="):
        assert [layer.name for layer in rd.find_attention(_beside(**children))] == ["known"]


def test_what_they_hold_can_be_said() -> None:
    model = _beside(in_proj=_linear(64), out_proj=_linear(32))
    names = rd.AttentionNames(fused="in_proj", output="out_proj", num_heads=4)
    layer = next(layer for layer in rd.find_attention(model, names) if layer.name == "other")
    assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (4, 2, 8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "children",
    [
        {"in_proj": _linear(128), "out_proj": _linear(32, 128)},  # an MLP
        {"fc": _linear(256), "out_proj": _linear(32, 128)},  # with a gate
        {"in_proj": _linear(96), "out_proj": _linear(32), "conv": nn.Conv1d(32, 32, 3, groups=32)},  # LFM2
    ],
)
def test_what_is_none_is_not_named(children: dict[str, nn.Module]) -> None:
    assert [layer.name for layer in rd.find_attention(_beside(**children))] == ["known"]


def test_esmfold(tmp_path) -> None:
    esmfold = needs.package("transformers.models.esm.modeling_esmfold")
    attention = esmfold.EsmFoldSelfAttention(32, 4, 8, gated=True)
    with pytest.raises(ValueError, match=r"proj \(96, 32\) beside o_proj \(32, 32\) may hold queries, keys and values"):
        rd.find_attention(attention)
    names = rd.AttentionNames(fused="proj", output="o_proj", layout="interleaved", num_heads=4)
    [layer] = rd.find_attention(attention, names)
    heads = attention.proj.weight.detach().unflatten(0, (4, 3, 8))
    assert torch.equal(layer.key.heads(), heads[:, 1])
    assert layer.no_value_product
