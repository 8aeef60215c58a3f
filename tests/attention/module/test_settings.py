"""What settings say of one layer: positions that the class decides on where a configuration leaves it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.attention.checkpoints import Checkpoint
from rankdecay.attention.locate import find_layers
from rankdecay.attention.model_types import PARTIAL_ROTARY
from rankdecay.attention.module.settings import ModuleSettings
from rankdecay.attention.products import Rotary
from rankdecay.cli import main
from tests import needs

_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
          "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def _of_file(config: dict[str, Any], layers: int) -> list[int]:
    """Coordinates that positions turn in each layer, from a configuration and names alone."""
    shapes = {f"model.layers.{i}.self_attn.{n}_proj.weight": (32, 32) for i in range(layers) for n in "qkvo"}
    found, _ = find_layers(Checkpoint(Path("file"), shapes, config, torch.zeros))
    return [layer.rotary.dims if layer.rotary else 0 for layer in found]


@pytest.mark.parametrize("name", PARTIAL_ROTARY)
def test_the_share_of_rotary_coordinates_by_every_name(name: str) -> None:
    assert _of_file({"num_attention_heads": 4, "rope_theta": 1e4, name: 0.5}, 1) == [4]


@pytest.mark.parametrize(
    ("configuration", "settings", "expected"),
    [
        ("SmolLM3Config", {}, [8, 8, 8, 0]),
        ("SmolLM3Config", {"no_rope_layer_interval": 2}, [8, 0, 8, 0]),
        ("Cohere2Config", {"sliding_window_pattern": 2}, [8, 0, 8, 0]),
        ("Glm4Config", {"head_dim": 8}, [4, 4, 4, 4]),
        ("PersimmonConfig", {}, [4, 4, 4, 4]),
    ],
)
def test_a_configuration_that_leaves_positions_to_its_class(configuration, settings, expected) -> None:
    transformers = needs.package("transformers")
    config = getattr(transformers, configuration)(**_SMALL, num_hidden_layers=4, **settings)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert [layer.rotary.dims if layer.rotary else 0 for layer in rd.find_attention(model)] == expected
    told = {"model_type": config.model_type, "rope_theta": 1e4, "num_attention_heads": 4, **settings}
    assert _of_file(told, 4) == expected


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("esm", {"position_embedding_type": "absolute"}),
        ("granitemoehybrid", {"position_embedding_type": "nope"}),
        ("zamba2", {"use_mem_rope": False}),
        ("gemma", {"use_rope": False}),
        ("llama", {"alibi": True}),
    ],
)
def test_a_model_that_turns_nothing_though_it_could(kind, settings) -> None:
    told = {"model_type": kind, "rope_theta": 1e4, "num_attention_heads": 4}
    assert _of_file(told | settings, 2) == [0, 0]


def test_a_list_has_a_value_for_each_layer_wherever_the_model_is_held() -> None:
    config = {"num_heads": [1, 2, 3, 4], "text_config": {}}
    for path in ("layers.2.attn", "0.model.layers.2.attn", "stages.2.blocks.7.attn"):
        source = Checkpoint(Path("file"), {f"{path}.q.weight": (1, 1)}, config, torch.zeros)
        assert ModuleSettings(path, source).number(("num_heads",)) == 3
    assert ModuleSettings("attn", source).number(("num_heads",)) is None


# ---- numbers of heads that the weights contradict --------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "keys", "said"),
    [
        ({"num_attention_heads": 4}, 32, ""),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}, 16, ""),
        ({"num_attention_heads": 4, "multi_query": True}, 8, ""),
        ({"num_attention_heads": 4, "num_key_value_heads": -1}, 32, ""),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, 16,
         "says 4 key heads, but its weights fit 4 heads of 8 with 2 key heads"),
        ({"num_attention_heads": 8}, 16,
         "says no number of key heads, but its weights fit 8 heads of 4 with 4 key heads"),
        ({"num_attention_heads": 4, "head_dim": 16}, 32,
         "says heads of 16, but its weights fit 4 heads of 8 with 4 key heads"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [None, "llama"])
def test_numbers_of_heads_that_weights_contradict_are_said(
    config, keys: int, said: str, kind, tmp_path, capsys
) -> None:
    shapes = {"q": (32, 32), "k": (keys, 32), "v": (keys, 32), "o": (32, 32)}
    tensors = {f"model.layers.0.self_attn.{n}_proj.weight": torch.randn(shape) for n, shape in shapes.items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "rope_theta": 1.0} | config))
    [layer] = rd.find_attention(tmp_path)
    assert said in layer.remark
    assert bool(layer.remark) == bool(said)
    assert main(["inspect", str(tmp_path), "--list"]) == 0
    assert (f"assumed: its config {said}" in " ".join(capsys.readouterr().out.split())) == bool(said)
    names = rd.AttentionNames(query="q_proj", key="k_proj", value="v_proj", output="o_proj", num_heads=4, head_dim=8)
    assert rd.find_attention(tmp_path, names)[0].remark == ""


def test_numbers_of_heads_that_a_class_of_ones_own_contradicts_are_refused() -> None:
    attention = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    attention.num_heads, attention.head_dim = 4, 16
    with pytest.raises(ValueError, match=r"it states heads of 16, but its weights fit 4 heads of 8 with 4 key heads"):
        rd.find_attention(attention)
    names = rd.AttentionNames(query="q_proj", key="k_proj", value="v_proj", output="o_proj", num_heads=2, head_dim=16)
    assert rd.find_attention(attention, names)[0].num_heads == 2
    attention.head_dim, attention.num_kv_heads = 8, 2
    with pytest.raises(ValueError, match=r"it states 2 key heads, but its weights fit 4 heads of 8 with 4 key heads"):
        rd.find_attention(attention)


# ---- rotary planes that nothing states --------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, names: str, called: str) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(32, 32, bias=False) for name in names.split()})
        self.attn.num_heads = 4
        if called == "rotary_emb":
            self.rotary_emb = nn.Module()
        else:
            kind = torch.complex64 if called == "freqs_cis" else torch.float32
            self.register_buffer(called, torch.ones(8, 4, dtype=kind))


@pytest.mark.parametrize("called", ["freqs_cis", "freqs_cos", "rotary_emb"])
@pytest.mark.parametrize("names", ["q_proj k_proj v_proj o_proj", "wq wk wv wo", "qkv_proj o_proj"])
def test_which_rows_positions_turn_together_is_not_told_by_a_table_of_angles(called: str, names: str) -> None:
    """MiniMind and Gemma's own code turn halves with tables of the names that Meta's code, of neighbours, has."""
    if "qkv" in names:
        model: nn.Module = _Block(names, called)
        model.attn["qkv_proj"] = nn.Linear(32, 96, bias=False)
    else:
        model = _Block(names, called)
    [layer] = rd.find_attention(model)
    of_meta = names.startswith("wq") and called != "rotary_emb"
    assert layer.rotary == Rotary(8, of_meta)
    assert ("planes" in layer.unknown) == (not of_meta)
    said = [note for note in rd.inspect(model).notes if "which coordinates RoPE pairs" in note]
    assert len(said) == (not of_meta)
    if of_meta:
        rd.param_groups(model, query_key=rd.Planes(0.1))
        return
    with pytest.raises(ValueError, match="does not say which rows form a plane"):
        rd.param_groups(model, query_key=rd.Planes(0.1))
    if "qkv" not in names:
        query, key, value, output = names.split()
        told = rd.AttentionNames(query=query, key=key, value=value, output=output, rotary="half")
        rd.param_groups(model, query_key=rd.Planes(0.1), names=told)
        assert not any("coordinates RoPE pairs" in note for note in rd.inspect(model, names=told).notes)


# ---- cross-attention --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "turned"),
    [
        *((name, True) for name in ("attn1", "self_attn", "attention", "cross_layers.0.self_attn", "across")),
        *((name, False) for name in ("src_attn", "xattn", "x_attn", "cross", "cross.attn", "encdec_attn")),
        *((name, False) for name in ("EncDecAttention", "cross_mha")),
        *((name, None) for name in ("attn2", "multihead_attn")),
    ],
)
def test_cross_attention_by_any_name_has_no_rotary_positions(name: str, turned: bool | None, tmp_path: Path) -> None:
    tensors = {f"blocks.0.{name}.{n}_proj.weight": torch.randn(32, 32) for n in "qkvo"}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    told = {"model_type": "own", "num_attention_heads": 4, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(told))
    model = nn.Module()
    for tensor in tensors:
        path, _, child = tensor.removesuffix(".weight").rpartition(".")
        part = model
        for step in path.split("."):
            if step not in part._modules:
                part.add_module(step, nn.Module())
            part = part._modules[step]
        part.num_heads = 4
        part.add_module(child, nn.Linear(32, 32))
    model.rotary_emb = nn.Module()
    for source in (model, tmp_path):
        [layer] = rd.find_attention(source)
        assert (layer.rotary is not None) == bool(turned)
        assert turned is not None or "rotary" in layer.unknown


@pytest.mark.parametrize(("kind", "more"), [("default", {}), ("linear", {"factor": 2.0})])
@pytest.mark.parametrize("family", ["Llama", "Phi"])
def test_a_share_that_the_class_ignores_counts_for_nothing(family: str, kind: str, more: dict, tmp_path: Path) -> None:
    # Llama's class reads partial_rotary_factor for every type of frequencies but the default
    transformers = needs.package("transformers")
    rope = {"rope_type": kind, "rope_theta": 1e4, "partial_rotary_factor": 0.5, **more}
    config = getattr(transformers, f"{family}Config")(**_SMALL, num_hidden_layers=1, rope_parameters=rope)
    model = getattr(transformers, f"{family}Model")(config)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        [layer] = rd.find_attention(source)
        assert layer.rotary == Rotary(2 * len(model.rotary_emb.inv_freq), interleaved=False)
