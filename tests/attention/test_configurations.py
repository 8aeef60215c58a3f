"""The number of heads and the positions, from configurations of several libraries, beside the files and inside."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rankdecay as rd
from rankdecay.attention.checkpoints import open_checkpoint
from rankdecay.cli import main

from .families import build
from .test_states import FIRST


@pytest.mark.parametrize(
    "beside",
    [
        {"model_args": {"n_head": 4, "n_embd": 8, "block_size": 16}},
        {"config": {"lr": 1.0, "n_head": 4}},
        {"hyper_parameters": {"lr": 1.0, "model": {"num_heads": 4}}},
        {"hyper_parameters": {"num_attention_heads": 4}},
        {"args": argparse.Namespace(nhead=4, lr=1.0)},
        {"config": {"lr": 1.0}, "model_config": {"n_heads": 4}},
    ],
)
def test_a_configuration_inside_of_the_file(beside, tmp_path, capsys):
    torch.save({"model": FIRST, "optimizer": {}, **beside}, tmp_path / "ckpt.pt")
    assert [layer.num_heads for layer in rd.find_attention(tmp_path / "ckpt.pt")] == [4, 4]
    assert main(["inspect", str(tmp_path / "ckpt.pt")]) == 0
    assert "2 attention layers" in capsys.readouterr().out


def test_what_is_inside_comes_before_what_is_beside(tmp_path):
    torch.save({"model": FIRST, "model_args": {"n_head": 4}}, tmp_path / "ckpt.pt")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    assert open_checkpoint(tmp_path / "ckpt.pt").config == {"num_attention_heads": 2, "n_head": 4}
    save_file(FIRST, tmp_path / "model.safetensors")
    assert rd.find_attention(tmp_path / "model.safetensors")[0].num_heads == 2


_PARTS = {f"{side}.layers.0.attn.{x}_proj.weight": torch.ones(32, 32) for side in ("vision", "text") for x in "qkvo"}


@pytest.mark.parametrize(
    "beside",
    [
        {"hyper_parameters": {"vision": {"num_heads": 8}, "text": {"num_heads": 4}}},
        {"hyper_parameters": {"lr": 1.0, "model": {"vision": {"num_heads": 8}, "text": {"num_heads": 4}}}},
        {"config": {"vision_config": {"num_heads": 8}, "text_config": {"num_heads": 4}}},
        {"config": {"vision_cfg": {"n_head": 8}, "n_head": 4}},
        {"args": argparse.Namespace(vision=argparse.Namespace(nhead=8), text=argparse.Namespace(nhead=4))},
    ],
)
def test_parts_that_differ_inside_of_the_file_are_told_apart_by_path(beside, tmp_path):
    torch.save({"state_dict": _PARTS, **beside}, tmp_path / "last.ckpt")
    heads = {layer.name.partition(".")[0]: layer.num_heads for layer in rd.find_attention(tmp_path / "last.ckpt")}
    assert heads == {"vision": 8, "text": 4}


def test_parts_that_differ_and_that_no_path_names_are_refused(tmp_path):
    settings = {"hyper_parameters": {"teacher": {"num_heads": 2}, "student": {"num_heads": 4}}}
    weights = {name.replace("vision", "net"): tensor for name, tensor in _PARTS.items() if "vision" in name}
    torch.save({"state_dict": weights, **settings}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"the number of heads in its .* rows is unknown.*pass num_heads="):
        rd.find_attention(tmp_path / "last.ckpt")
    assert rd.find_attention(tmp_path / "last.ckpt", num_heads=4)[0].num_heads == 4
    settings["hyper_parameters"]["teacher"]["num_heads"] = 4
    torch.save({"state_dict": weights, **settings}, tmp_path / "last.ckpt")
    assert rd.find_attention(tmp_path / "last.ckpt")[0].num_heads == 4


_LANGUAGE = {"hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("path", "parts", "heads"),
    [
        ("layers.0.self_attn", {"text_config": _LANGUAGE, "vision_config": {"num_heads": 8}}, 4),
        ("vit.layers.0.self_attn", {"text_config": _LANGUAGE, "vision_config": {"num_heads": 8}}, 8),
        ("llm.model.layers.0.self_attn", {"text_config": _LANGUAGE, "audio_config": {"num_heads": 8}}, 4),
        ("language_backbone.layers.0.self_attn", {"text_config": _LANGUAGE, "backbone_config": {"num_heads": 8}}, 4),
        ("decoder.layers.0.encoder_attn", {"encoder_config": {"num_heads": 8}, "num_attention_heads": 4}, 4),
        ("model.encoder.layers.0.self_attn", {"encoder": {"text_config": _LANGUAGE, "vision_config": {}}}, 4),
        (
            "audio_video_encoder.embedder.video_encoder.layers.0.self_attn",
            {
                "audio_video_config": {
                    "num_heads": 2,
                    "audio_config": {"num_heads": 8},
                    "video_config": {"num_heads": 4},
                }
            },
            4,
        ),
    ],
)
def test_a_path_says_which_part_a_module_is_in(path, parts, heads, tmp_path):
    save_file({f"{path}.{x}_proj.weight": torch.ones(32, 32) for x in "qkvo"}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(parts))
    assert [layer.num_heads for layer in rd.find_attention(tmp_path)] == [heads]


def test_the_text_has_no_module_of_another_width(tmp_path):
    """Both towers of Cosmos 3 Omni are at the root of its files."""
    text = {f"layers.0.self_attn.{x}_proj.weight": torch.ones(32, 32) for x in "qkvo"}
    vision = {"blocks.0.attn.qkv.weight": torch.ones(48, 16), "blocks.0.attn.proj.weight": torch.ones(16, 16)}
    save_file(text | vision, tmp_path / "model.safetensors")
    config = {"text_config": _LANGUAGE, "vision_config": {"hidden_size": 16, "num_heads": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"blocks\.0\.attn is not handled.* pass names=AttentionNames\(") as warned:
        [layer] = rd.find_attention(tmp_path)
    assert len(warned) == 1
    assert layer.num_heads == 4
    names = rd.AttentionNames(fused="qkv", output="proj", num_heads=8)
    assert sorted(layer.num_heads for layer in rd.find_attention(tmp_path, names)) == [4, 8]


def meta(width: int = 16, keys: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    heights = {"wq": width, "wk": keys, "wv": keys, "wo": width}
    tensors = {f"layers.0.attention.{name}.weight": torch.randn(height, width) for name, height in heights.items()}
    return tensors | {"tok_embeddings.weight": torch.randn(4, width)}


def test_one_of_metas_shards_alone_is_refused(tmp_path, capsys):
    params = {"dim": 16, "n_layers": 1, "n_heads": 4}
    (tmp_path / "params.json").write_text(json.dumps(params))
    weights = meta(keys=16)
    torch.save(
        {n: w[:8] if ".w" in n and "wo" not in n else w for n, w in weights.items()}, tmp_path / "consolidated.00.pth"
    )
    assert main(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "layers.0.attention.wq.weight has 8 rows, but its config has 4 heads of 4" in said
    assert "model-parallel shards" in said
    assert "convert_llama_weights_to_hf" in said
    (tmp_path / "params.json").write_text(json.dumps(params | {"head_dim": 2}))
    torch.save({n: w[:, :8] if "wo" in n else w[:8] for n, w in weights.items()}, tmp_path / "consolidated.00.pth")
    assert rd.find_attention(tmp_path)[0].head_dim == 2  # stated to be as small


def test_metas_own_files(tmp_path):
    params = {"dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "rope_theta": None}
    torch.save(meta(), tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    for path in (tmp_path, tmp_path / "consolidated.00.pth"):
        [layer] = rd.find_attention(path)
        assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (4, 2, 4)
        assert layer.rotary is not None
        assert layer.rotary.dims == 4
        config = open_checkpoint(path).config
        assert (config["rope_interleaved"], config["rope_theta"], config["num_key_value_heads"]) == (True, 1e4, 2)


def test_llama2_c_and_mistral(tmp_path):
    arguments = {"dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 8}
    state = {f"_orig_mod.{name}": tensor for name, tensor in meta().items()}
    torch.save({"model": state, "model_args": arguments, "config": {"n_heads": 4}}, tmp_path / "ckpt.pt")
    assert open_checkpoint(tmp_path / "ckpt.pt").config["rope_interleaved"] is True
    save_file(meta(), tmp_path / "consolidated.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "num_attention_heads": 4}')
    (tmp_path / "params.json").write_text('{"dim": 16, "n_heads": 4, "head_dim": 4, "rope_theta": 1000000.0}')
    opened = open_checkpoint(tmp_path / "consolidated.safetensors")
    assert opened.config["rope_interleaved"] is True
    assert opened.config["rope_theta"] == 1e6


def test_the_same_names_without_rotary_positions_are_not_metas(tmp_path):
    tensors = {name: tensor for name, tensor in meta().items() if "tok" not in name}
    save_file(tensors | {"pos_emb.weight": torch.ones(4, 16)}, tmp_path / "model.safetensors")
    assert rd.find_attention(tmp_path / "model.safetensors", num_heads=4)[0].rotary is None


@pytest.mark.parametrize("called", ["pos_embeddings.weight", "position_embedding.weight", "wpe.weight", "pos_emb"])
@pytest.mark.parametrize("name", ["model.pt", "consolidated.00.pth"])
def test_metas_names_with_learned_positions_have_no_rotary_ones(called: str, name: str, tmp_path):
    """Nothing says so of a file with tok_embeddings and a table of positions, whatever it is called."""
    torch.save(meta() | {called: torch.ones(4, 16)}, tmp_path / name)
    [layer] = rd.find_attention(tmp_path / name, num_heads=4)
    assert layer.rotary is None
    assert "rotary" in layer.unknown
    (tmp_path / "params.json").write_text('{"dim": 16, "n_heads": 4, "n_layers": 1}')
    [layer] = rd.find_attention(tmp_path)
    assert (layer.rotary, layer.num_heads) == (None, 4)
    torch.save(meta() | {called: torch.ones(4, 16), "rope.freqs": torch.ones(2)}, tmp_path / name)
    assert rd.find_attention(tmp_path)[0].rotary is not None
    torch.save(meta() | {f"vision_encoder.{called}": torch.ones(4, 16)}, tmp_path / name)
    assert rd.find_attention(tmp_path)[0].rotary is not None


def test_litgpt(tmp_path):
    names = [f"transformer.h.0.attn.{name}.weight" for name in ("q", "k", "v")]
    torch.save({name: torch.ones(8, 8) for name in names}, tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(
        "# made by litgpt\nname: pythia\nhf_config:\n  org: EleutherAI\n  n_head: 99\nn_head: 4\n"
        "n_query_groups: 2  # few\n"
        "rope_base: 10000\nrotary_percentage: 0.5\nbias: true\nhead_size: null\nnorm_class_name: 'LayerNorm'\n"
    )
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')  # of the repository it was converted from
    config = open_checkpoint(tmp_path).config
    assert (config["n_head"], config["num_key_value_heads"], config["rope_theta"]) == (4, 2, 10000)
    assert (config["partial_rotary_factor"], config["bias"], config["name"]) == (0.5, True, "pythia")
    assert rd.find_attention(tmp_path)[0].num_heads == 4


def test_open_clip(tmp_path):
    def tower(prefix, width):
        block = f"{prefix}transformer.resblocks.0.attn."
        return {
            f"{block}in_proj_weight": torch.ones(3 * width, width),
            f"{block}out_proj.weight": torch.ones(width, width),
        }

    save_file(tower("visual.", 128) | tower("", 16), tmp_path / "open_clip_model.safetensors")
    model = {"vision_cfg": {"width": 128, "patch_size": 16}, "text_cfg": {"width": 16, "heads": 4}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    heads = {layer.name.partition(".")[0]: layer.num_heads for layer in rd.find_attention(tmp_path)}
    assert heads == {"visual": 2, "transformer": 4}


def test_a_checkpoint_of_a_trainer_takes_the_configuration_above_it(tmp_path):
    model = build("gpt2")
    (tmp_path / "checkpoint-3").mkdir()
    torch.save(model.state_dict(), tmp_path / "checkpoint-3" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    assert rd.find_attention(tmp_path)[0].num_heads == 4


@pytest.mark.parametrize(
    ("kind", "fused"), [("llama", False), ("my_own_thing", False), ("my_own_thing", True), ("progen", True)]
)
def test_a_model_type_that_no_table_covers_is_no_known_one(kind: str, fused: bool, tmp_path: Path) -> None:
    """ProGen's qkv_proj is in another order; a rotary setting does not say in which."""
    sides = {"qkv_proj": (48, 16), "out_proj": (16, 16)} if fused else dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj"), (16, 16)
    )  # fmt: skip
    torch.save({f"h.0.attn.{n}.weight": torch.randn(s) for n, s in sides.items()}, tmp_path / "pytorch_model.bin")
    settings = {"model_type": kind, "num_attention_heads": 2, "rope_theta": 1e4, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    [layer] = rd.find_attention(tmp_path)
    assert ("order" in layer.unknown) == fused
    assert ("qk_norm" in layer.unknown) == (kind != "llama")
    assert any("the model does not say" in note for note in rd.inspect(tmp_path).notes) == (kind != "llama")
