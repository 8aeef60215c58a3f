"""LoRA adapters in files, against what PEFT makes of the same files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rankdecay as rd
from rankdecay.attention.checkpoints import open_checkpoint
from rankdecay.attention.errors import CheckpointError
from tests.needs import package

from .families import build


def configure(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def adapted(folder, family="llama", dtype=torch.float32, kind="LoraConfig", named="org/base", **how) -> nn.Module:
    """Write a base and an adapter of random weights; returns what PEFT merges from these files."""
    peft = package("peft")
    torch.manual_seed(0)
    model = build(family).to(dtype)
    model.save_pretrained(folder / "base")
    with_adapter = peft.get_peft_model(model, getattr(peft, kind)(target_modules=how.pop("on"), **how))
    for name, parameter in with_adapter.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    with_adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with_adapter.save_pretrained(folder / "adapter")
    configure(folder / "adapter", base_model_name_or_path=named)
    base = type(model).from_pretrained(folder / "base", dtype=dtype)
    return peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()


def same(model, path) -> None:
    for ours, theirs in zip(rd.find_attention(model), rd.find_attention(path), strict=True):
        assert (ours.num_heads, ours.rotary) == (theirs.num_heads, theirs.rotary)
        for a, b in zip(ours.views, theirs.views, strict=True):
            assert torch.equal(a.tensor(), b.tensor())
            assert a.bias() is None or torch.equal(a.bias(), b.bias())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "how",
    [
        {"on": ["q_proj", "v_proj", "o_proj"], "r": 4, "lora_alpha": 7},
        {"on": ["q_proj", "k_proj"], "r": 4, "use_rslora": True},
        {"on": "all-linear", "r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.o_proj": 3},
         "alpha_pattern": {"0.self_attn.k_proj": 99}},
        {"on": ["q_proj"], "r": 4, "dtype": torch.bfloat16},
        {"on": ["q_proj", "embed_tokens"], "r": 4, "layers_to_transform": None, "modules_to_save": ["lm_head"]},
        {"on": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True, "family": "gpt2", "bias": "all"},
        {"on": ["attn.c_proj"], "r": 4, "fan_in_fan_out": True, "family": "gpt2"},
    ],
)  # fmt: skip
def test_lora_is_merged_as_peft_does(how, tmp_path):
    merged = adapted(tmp_path, **how)
    same(merged, tmp_path / "adapter")
    same(merged, tmp_path / "adapter" / "adapter_model.safetensors")
    assert open_checkpoint(tmp_path / "adapter").config["model_type"] == how.get("family", "llama")


def test_the_base_is_found_by_its_path_or_beside_the_adapter(tmp_path, monkeypatch):
    merged = adapted(tmp_path, on=["q_proj"], named=str(tmp_path / "base"))
    same(merged, tmp_path / "adapter")
    configure(tmp_path / "adapter", base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    same(merged, tmp_path / "adapter")
    configure(tmp_path / "adapter", base_model_name_or_path="meta-llama/Other-8B")
    with pytest.raises(CheckpointError, match=r"base 'meta-llama/Other-8B' is not a directory here.*merge_and_unload"):
        rd.inspect(tmp_path / "adapter")
    (tmp_path / "adapter").rename(tmp_path / "base" / "adapter")  # a subdirectory of the base's own
    same(merged, tmp_path / "base" / "adapter")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"kind": "LoHaConfig"}, "peft_type LOHA"),
        ({"kind": "OFTConfig", "oft_block_size": 8}, "peft_type OFT"),
    ],
)
def test_other_adapters_are_refused(how, what, tmp_path):
    adapted(tmp_path, on=["q_proj"], **how)
    with pytest.raises(CheckpointError, match=rf"is an adapter with {what}.*merge it first: .*merge_and_unload"):
        rd.inspect(tmp_path / "adapter")


@pytest.mark.parametrize(
    "names",
    [
        ("unet.attn.to_q.lora_A.weight", "unet.attn.to_q.lora_B.weight"),
        ("lora_unet_attn_to_q.lora_down.weight", "lora_unet_attn_to_q.lora_up.weight"),
        ("attn.to_q.hada_w1_a", "attn.to_q.hada_w1_b"),
    ],
)
def test_adapters_of_other_libraries_are_named(names, tmp_path):
    save_file({name: torch.ones(4, 4) for name in names} | {"x.alpha": torch.ones(())}, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=r"is an adapter without adapter_config.json .*merge it with its base"):
        rd.inspect(tmp_path)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    adapted(tmp_path, on=["q_proj"], r=4)
    build("gpt2").save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"does not fit its base .*the base has no .*q_proj.weight"):
        rd.inspect(tmp_path / "adapter")
    configure(tmp_path / "adapter", r=5)
    build("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"rank 4 where adapter_config.json says 5"):
        rd.inspect(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter without adapter_config.json"):
        rd.inspect(tmp_path / "adapter")
