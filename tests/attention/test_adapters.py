"""Weights under PEFT's adapters, against those after ``merge_and_unload``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rankdecay as rd
from tests import needs

from .families import build

peft = needs.package("peft")

TARGETS = ["q_proj", "v_proj"]
#: What a tuner needs beyond the names of the layers and a rank, for matrices of this size.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"r": 8, "init_r": 4, "target_r": 2, "total_step": 10},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_len": 2, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["v_proj"]},
    "OFT": {"r": 0, "oft_block_size": 4},
    "ROAD": {"group_size": 4},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 10},
}
#: Tuners that change no weight of a projection, which is then its own.
UNTOUCHED = ("ADAPTION_PROMPT", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
#: Tuners whose layer has no one weight, with a word of PEFT's reason.
NO_WEIGHT = {
    "BEFT": "Base layer has no bias",
    "LILY": "not supported for Lily",
    "POLY": "cannot be merged",
    "SHADOW": "input-dependent",
}
#: Tuners of other things than linear layers' weights.
ELSEWHERE = {
    "CARTRIDGE": "a cache of keys and values",
    "TRAINABLE_TOKENS": "rows of the embedding",
    "XLORA": "tested below, from saved adapters",
}


def llama() -> Any:
    transformers = needs.package("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=1,
        intermediate_size=32,
        vocab_size=16,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def trained(model: nn.Module) -> nn.Module:
    """Moves what a tuner trains, which may start where it does nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def configured(kind: str, cls: type) -> Any:
    fields = {field.name for field in dataclasses.fields(cls)}
    common = {"target_modules": TARGETS, "r": 4, "feedforward_modules": [], "num_virtual_tokens": 2}
    settings = {name: value for name, value in common.items() if name in fields} | SETTINGS.get(kind, {})
    return cls(task_type="CAUSAL_LM", **settings)


def projections(model: nn.Module) -> dict[str, Tensor]:
    [layer] = rd.find_attention(model)
    return {"q_proj": layer.query.tensor(), "k_proj": layer.key.tensor(), "v_proj": layer.value.tensor()}


def merged(model: nn.Module) -> dict[str, Tensor]:
    whole: Any = copy.deepcopy(model)
    attention = whole.merge_and_unload().model.layers[0].self_attn
    return {name: getattr(attention, name).weight.detach() for name in ("q_proj", "k_proj", "v_proj")}


def configurations() -> dict[str, type]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@pytest.mark.parametrize("kind", sorted(configurations().keys() - ELSEWHERE.keys()))
@pytest.mark.filterwarnings("ignore")  # of PEFT, about some of its tuners
def test_every_tuner_of_the_installed_peft_is_read_as_it_would_be_merged_or_refused(kind: str) -> None:
    base = llama()
    own = {name: getattr(base.model.layers[0].self_attn, name).weight.clone() for name in ("q_proj", "k_proj")}
    model = trained(peft.get_peft_model(base, configured(kind, configurations()[kind])))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind in NO_WEIGHT:
        with pytest.raises(
            ValueError, match=rf"q_proj has no weight with its adapter {kind.lower()}.*{NO_WEIGHT[kind]}"
        ):
            rd.find_attention(model)[0].query.tensor()
    elif kind in UNTOUCHED:
        ours = projections(model)
        assert all(torch.equal(ours[name], own[name]) for name in own)
    else:
        ours, expected = projections(model), merged(model)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        assert not torch.equal(ours["q_proj"], own["q_proj"])
        assert torch.equal(ours["k_proj"], own["k_proj"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


VARIANTS: dict[str, Callable[[], Any]] = {
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "pissa": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=TARGETS),
    "a whole parameter": lambda: peft.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]),
    "lokr of a full factor": lambda: peft.LoKrConfig(r=64, target_modules=TARGETS),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_variants_of_a_tuner(variant: str) -> None:
    model = trained(peft.get_peft_model(llama(), VARIANTS[variant]()))
    ours, expected = projections(model), merged(model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("kind", "settings", "two"),
    [
        ("LORA", {}, ("lora_A", "lora_B")),
        ("LORA", {"use_dora": True}, ("lora_A", "lora_B")),
        ("LORA", {"target_modules": ["embed_tokens"]}, ("lora_embedding_A", "lora_embedding_B")),
        *((kind, {}, ()) for kind in ("ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA")),
    ],
)
def test_a_product_is_said_of_two_factors_alone(kind: str, settings: dict[str, Any], two: tuple[str, ...]) -> None:
    configuration = configured(kind, configurations()[kind])
    for name, value in settings.items():
        setattr(configuration, name, value)
    model: Any = peft.get_peft_model(llama(), configuration)
    optimizer = torch.optim.AdamW(model.parameters())
    attachment = rd.attach(optimizer, model, other=rd.Frobenius(0.1))
    told = {row.name: row.why for row in attachment.rows() if model.get_parameter(row.name).requires_grad}
    assert told
    for name, why in told.items():
        of_two = any(factor in name for factor in two)
        assert ("factor of an adapter: L2 on both" if of_two else "part of an adapter") in why, name


def test_the_state_of_adapters_counts_when_a_view_is_read() -> None:
    model: Any = peft.get_peft_model(llama(), peft.LoHaConfig(r=4, target_modules=TARGETS))
    model.add_adapter("second", peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("hada_" in name)
    trained(model)
    [layer] = rd.find_attention(model)
    stored = model.get_parameter(layer.query.parameter_name).detach().clone()
    first = layer.query.tensor()
    model.set_adapter("second")
    second = layer.query.tensor()
    model.base_model.set_adapter(["default", "second"])
    both = layer.query.tensor()
    torch.testing.assert_close(both - stored, (first - stored) + (second - stored))
    with model.disable_adapter():
        assert torch.equal(layer.query.tensor(), stored)
    model.merge_adapter()
    torch.testing.assert_close(layer.query.tensor(), both)
    with model.disable_adapter():  # its forward pass would take the adapters out again
        torch.testing.assert_close(layer.query.tensor(), stored)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.query.tensor(), both)


def test_a_bias_of_an_adapter_is_part_of_the_bias() -> None:
    model = build("gpt2")
    config = peft.LoraConfig(r=2, lora_bias=True, fan_in_fan_out=True, target_modules=["c_attn"])
    model = trained(peft.get_peft_model(model, config))
    whole: Any = copy.deepcopy(model)
    attention = whole.merge_and_unload().transformer.h[0].attn.c_attn
    layer = rd.find_attention(model)[0]
    bias = layer.key.bias()
    assert bias is not None
    assert torch.equal(bias, attention.bias.detach()[len(bias) : 2 * len(bias)])
    assert torch.equal(layer.key.tensor(), attention.weight.detach()[:, len(bias) : 2 * len(bias)].T)


def test_multihead_attention_with_an_adapter() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4)})
    adapted: Any = trained(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attention"])))
    [layer] = rd.find_attention(adapted)
    whole: Any = copy.deepcopy(adapted).merge_and_unload()
    assert layer.num_heads == 4
    assert torch.equal(layer.key.tensor(), whole["attention"].in_proj_weight.detach()[16:32])
    assert layer.output is not None
    assert torch.equal(layer.output.tensor(), whole["attention"].out_proj.weight.detach())


@pytest.mark.parametrize("where", ["q_proj", "self_attn"])
def test_a_module_that_is_saved_beside_the_adapter_is_the_one_in_use(where: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=[where])
    model: Any = trained(peft.get_peft_model(llama(), config))
    [layer] = rd.find_attention(model)
    assert "modules_to_save.default" in layer.query.parameter_name
    in_use = layer.query.tensor()
    assert torch.equal(in_use, model.get_parameter(layer.query.parameter_name).detach())
    with model.disable_adapter():
        assert not torch.equal(layer.query.tensor(), in_use)
    groups = rd.param_groups(model, query_key=rd.LowRank(0.1))
    decayed = {
        n: p for g in groups if "query_key_rule" in g for n, p in zip(g["param_names"], g["params"], strict=True)
    }
    assert decayed[layer.query.parameter_name].requires_grad
    assert not any("original_module" in name for name in decayed)


@pytest.mark.parametrize("by", ["roles", "groups"])
@pytest.mark.parametrize("where", [["q_proj", "k_proj", "lm_head", "norm"], ["self_attn"]])
def test_the_copy_of_another_adapter_has_its_role_when_it_comes_into_use(where: list[str], by: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=where)
    model: Any = peft.get_peft_model(llama(), config)
    model.add_adapter("b", config)
    roles = {"query_key": rd.Frobenius(0.5)} | ({"norm": rd.Frobenius(0.3)} if "norm" in where else {})
    if by == "roles":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rd.attach(optimizer, model, **roles)
    else:
        optimizer = torch.optim.SGD(rd.param_groups(model, **roles), lr=0.1)
        rd.attach(optimizer)
    for adapter in ("b", "default"):
        model.set_adapter(adapter)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        moved = 0
        for name, p in model.named_parameters():
            trained_now = f"modules_to_save.{adapter}." in name
            is_norm = "norm.modules_to_save" in name
            share = 0.3 if is_norm else 0.5 if "q_proj" in name or "k_proj" in name else 0.0
            torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * share * trained_now), msg=name)
            moved += trained_now and share > 0
        assert moved == (5 if "norm" in where else 2)


def test_an_adapter_on_a_computed_weight_is_added_to_what_it_computes() -> None:
    base = llama()
    projection = base.model.layers[0].self_attn.q_proj
    nn.utils.parametrizations.weight_norm(projection)
    model = trained(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"])))
    attention: Any = model.get_submodule("base_model.model.model.layers.0.self_attn")
    [layer] = rd.find_attention(model)
    expected = attention.q_proj(torch.eye(32)).T.detach()
    torch.testing.assert_close(layer.query.tensor(), expected)
    assert layer.query.parameter_name.endswith("q_proj.base_layer.parametrizations.weight.original1")


class OwnLoRA(nn.Linear):
    """An adapter in the layer itself, as loralib's."""

    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(8, 2))
        self.merged = False


class OwnWrapper(nn.Module):
    """An adapter around a layer, which is not PEFT's."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8, bias=False)
        self.lora_down, self.lora_up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.merged = False


@pytest.mark.parametrize("cls", [OwnLoRA, OwnWrapper])
def test_an_adapter_of_ones_own_is_refused_until_it_is_merged(cls: type[nn.Module]) -> None:
    attention: Any = nn.Module()
    attention.num_heads, attention.q_proj = 2, cls()
    attention.k_proj, attention.v_proj, attention.o_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
    [layer] = rd.find_attention(attention)
    with pytest.raises(ValueError, match=r"q_proj \(Own.*\) adds lora_.* and lora_.* to its weight.*merge"):
        layer.query.tensor()
    attention.get_submodule("q_proj").__dict__["merged"] = True
    assert torch.equal(layer.query.tensor(), attention.get_parameter(layer.query.parameter_name).detach())


@pytest.mark.parametrize("merge", [False, True])
def test_a_file_saved_with_its_adapters(merge: bool, tmp_path) -> None:
    model: Any = trained(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=TARGETS)))
    config = model.get_base_model().config
    model = model.merge_and_unload() if merge else model
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    [layer] = rd.find_attention(tmp_path)
    assert layer.key.tensor().shape == (32, 32)
    if merge:
        assert torch.equal(layer.query.tensor(), model.model.layers[0].self_attn.q_proj.weight.detach())
        return
    with pytest.raises(ValueError, match=r"q_proj.lora_A.default.weight is an adapter that is not merged .*merge_and"):
        layer.query.tensor()


def test_a_file_with_a_module_saved_beside_the_adapter(tmp_path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["q_proj"])
    model: Any = trained(peft.get_peft_model(llama(), config))
    model.get_base_model().config.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)
    [layer], [live] = rd.find_attention(tmp_path), rd.find_attention(model)
    assert torch.equal(layer.query.tensor(), live.query.tensor())
    model.add_adapter("second", config)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)
    with pytest.raises(ValueError, match=r"modules_to_save.second.weight are saved.*does not say which is in use"):
        rd.find_attention(tmp_path)[0].query.tensor()


@pytest.mark.filterwarnings("ignore")
def test_a_mixture_of_adapters_is_refused_and_its_base_is_read_when_it_is_off(tmp_path) -> None:
    for name in ("one", "two"):
        peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=TARGETS)).save_pretrained(tmp_path / name)
    adapters = {name: str(tmp_path / name) for name in ("one", "two")}
    base = llama()
    base.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=adapters)
    model = peft.get_peft_model(base, config)
    [layer] = rd.find_attention(model)
    with pytest.raises(
        ValueError, match=r"self_attn.q_proj does not have a single weight: X-LoRA mixes its adapters anew"
    ):
        layer.query.tensor()


def test_an_adapter_on_a_quantised_base_is_added_to_what_the_codes_stand_for() -> None:
    bitsandbytes = needs.package("bitsandbytes")
    base = llama()
    attention = base.model.layers[0].self_attn
    dense = attention.q_proj.weight.detach().clone()
    scale = dense.abs().amax(dim=1, keepdim=True)
    quantised: Any = bitsandbytes.nn.Linear8bitLt(32, 32, bias=False, has_fp16_weights=False)
    codes = (dense / scale * 127).round().to(torch.int8)
    quantised.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    quantised.weight.SCB = scale.flatten()
    attention.q_proj = quantised
    loha = peft.get_peft_model(copy.deepcopy(base), peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"q_proj has an adapter \(Linear of peft.tuners.ia3.*on a quantised weight"):
        rd.find_attention(loha)[0].query.tensor()
