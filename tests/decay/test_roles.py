"""Roles of parameters, by place, name and shape."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.attention.layer import WHOLE
from rankdecay.decay.roles import assign_roles
from tests.decay.models import Nano


def roles_of(model: nn.Module) -> dict[str, str]:
    assigned, _ = assign_roles(model)
    return {name: "+".join(dict.fromkeys(s.role for s in entry.segments)) for entry in assigned for name in entry.names}


def test_every_parameter_has_the_role_its_place_says():
    roles = roles_of(Nano(tied=False))
    assert roles["wte.weight"] == roles["pos_embed"] == roles["lm_head.weight"] == "embedding"
    assert roles["h.1.attn.c_attn.weight"] == "query_key+value_output"
    assert roles["h.1.attn.c_proj.weight"] == "value_output"
    assert roles["h.0.mlp.0.weight"] == roles["h.1.mlp.2.weight"] == "mlp"
    assert roles["h.0.ln_1.weight"] == "norm"
    assert roles["h.0.ln_1.bias"] == roles["h.0.attn.c_attn.bias"] == roles["probe.bias"] == "bias"
    assert roles["scale"] == roles["probe.weight"] == "other"


def test_a_segment_knows_its_window_and_its_reason():
    by_name = {entry.names[0]: entry for entry in assign_roles(Nano(tied=False))[0]}
    fused = by_name["h.0.attn.c_attn.weight"].segments
    assert [segment.why for segment in fused] == ["query", "key", "value"]
    assert [str(segment.labelled_window()) for segment in fused] == [
        "query: rows[0:16]/48 by 8", "key: rows[16:32]/48 by 8", "value: rows[32:48]/48 by 8"
    ]  # fmt: skip
    [output] = by_name["h.1.attn.c_proj.weight"].segments
    assert str(output.labelled_window()) == "columns[0:16]/16 by 8"  # alone in its parameter: no name needed
    for name in ("wte.weight", "h.0.ln_1.weight", "scale", "h.0.mlp.0.weight"):
        [segment] = by_name[name].segments
        assert segment.window is WHOLE
        assert segment.labelled_window() is WHOLE


def test_a_tied_parameter_has_the_roles_of_all_its_names_that_say_something():
    model = nn.Module()
    model.wte = nn.Embedding(11, 16)
    model.other = nn.Linear(16, 11, bias=False)
    model.other.weight = model.wte.weight
    [entry] = assign_roles(model)[0]
    assert entry.names == ["wte.weight", "other.weight"]
    assert [segment.role for segment in entry.segments] == ["embedding"]


def test_names_of_adapters_and_tokens_tell_their_roles():
    model = nn.Module()
    model.proj = nn.Module()
    model.proj.lora_A = nn.Linear(4, 2, bias=False)
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    model.gate = nn.Parameter(torch.zeros(4))
    assert roles_of(model) == {"proj.lora_A.weight": "other", "cls_token": "embedding", "gate": "other"}


# ---- what a parameter is, not what is written in its path ----------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))


class Layer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 2 * width)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.pooler = nn.Linear(8, 8)


@pytest.mark.parametrize(
    "name", ["embedder", "embedding_model", "norm_embed", "patch_embed", "token_embedding", "bias"]
)
def test_a_model_has_the_same_roles_under_any_name(name: str) -> None:
    outer = nn.Module()
    outer.add_module(name, Encoder())
    assert roles_of(outer) == {f"{name}.{key}": role for key, role in roles_of(Encoder()).items()}
    assert roles_of(outer)[f"{name}.layers.0.fc.weight"] == "mlp"
    assert roles_of(outer)[f"{name}.pooler.weight"] == "other"


def test_a_place_in_a_sequence_of_different_modules_is_no_block() -> None:
    roles = roles_of(nn.Sequential(nn.Linear(8, 8), Encoder(), nn.Linear(8, 3)))
    assert roles["1.layers.1.fc.weight"] == "mlp"
    assert roles["0.weight"] == roles["1.pooler.weight"] == roles["2.weight"] == "other"
    roles = roles_of(nn.Sequential(nn.Linear(8, 8), Layer(), Layer(), nn.Linear(8, 3)))
    assert roles["1.fc.weight"] == roles["2.fc.weight"] == "mlp"
    assert roles["0.weight"] == roles["3.weight"] == "other"


class LayerNormMLP(nn.Module):
    """Fused, with the names of TransformerEngine."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(8))
        self.layer_norm_bias = nn.Parameter(torch.zeros(8))
        self.fc1_weight = nn.Parameter(torch.ones(16, 8))
        self.fc1_bias = nn.Parameter(torch.zeros(16))


class NormHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(11, 8))


class NormedLinear(nn.Linear):
    pass


class PerHeadRMSNorm(nn.Module):
    """One gain per head, as Cohere's and Chameleon's normalisation of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


class VocabParallelEmbedding(nn.Module):
    """A table that is no subclass of nn.Embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(11, 8))


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 4, 4)


def tensor(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


#: In a block with attention, and outside it.
IN_BLOCK: dict[str, tuple[Callable[[], nn.Module | nn.Parameter], dict[str, str]]] = {
    "mlp": (LayerNormMLP,
            {"layer_norm_weight": "norm", "layer_norm_bias": "bias", "fc1_weight": "mlp", "fc1_bias": "bias"}),
    "normed": (lambda: NormedLinear(8, 4, bias=False), {"weight": "mlp"}),
    "q_norm": (PerHeadRMSNorm, {"weight": "norm"}),
    "batch": (lambda: nn.BatchNorm2d(8), {"weight": "norm", "bias": "bias"}),
    "relative_attention_bias": (lambda: nn.Embedding(32, 2), {"weight": "bias"}),
    "distance_embedding": (lambda: nn.Embedding(15, 4), {"weight": "embedding"}),
    "relative_position_bias_table": (lambda: tensor(49, 2), {"": "bias"}),
    "attention_biases": (lambda: tensor(2, 49), {"": "bias"}),
    "pos_bias_u": (lambda: tensor(2, 4), {"": "bias"}),
    "rel_pos_h": (lambda: tensor(13, 4), {"": "embedding"}),
    "pos_embed": (lambda: tensor(1, 5, 8), {"": "embedding"}),
    "logit_scale": (lambda: tensor(2, 1, 1), {"": "other"}),
    "temperature": (lambda: tensor(2, 1, 1), {"": "other"}),
    "layer_scale": (lambda: tensor(8, 5, 5), {"": "other"}),
    "gamma": (lambda: tensor(1, 1, 1, 8), {"": "other"}),
    "A_log": (lambda: tensor(8, 4), {"": "other"}),
    "experts": (lambda: tensor(3, 8, 4), {"": "mlp"}),
    "one_expert": (lambda: tensor(1, 8, 4), {"": "mlp"}),
    "queries": (lambda: tensor(1, 6, 8), {"": "other"}),
    "router": (lambda: nn.Linear(8, 3, bias=False), {"weight": "mlp"}),
    "gate": (lambda: nn.Linear(8, 1, bias=False), {"weight": "mlp"}),
    "depthwise": (lambda: nn.Conv1d(8, 8, 3, groups=8, bias=False), {"weight": "other"}),
    "pointwise": (lambda: nn.Conv2d(8, 16, 1, bias=False), {"weight": "mlp"}),
}  # fmt: skip
OUTSIDE: dict[str, tuple[Callable[[], nn.Module | nn.Parameter], dict[str, str]]] = {
    "words": (VocabParallelEmbedding, {"weight": "embedding"}),
    "bag": (lambda: nn.EmbeddingBag(11, 8), {"weight": "embedding"}),
    "stem": (PatchEmbed, {"proj.weight": "embedding", "proj.bias": "bias"}),
    "patch_embedding": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
                        {"0.weight": "embedding", "0.bias": "bias", "1.weight": "norm", "1.bias": "bias"}),
    "conv_stem": (lambda: nn.Conv2d(3, 8, 3, bias=False), {"weight": "other"}),
    "embedder": (lambda: nn.Sequential(nn.Linear(8, 8, bias=False)), {"0.weight": "other"}),
    "register_tokens": (lambda: tensor(1, 4, 8), {"": "embedding"}),
    "cls_token": (lambda: tensor(1, 1, 8), {"": "embedding"}),
    "head": (NormHead, {"weight": "other"}),
    "lm_head": (NormHead, {"weight": "embedding"}),
    "embed_out": (lambda: nn.Linear(8, 11, bias=False), {"weight": "embedding"}),
    "output_projection": (lambda: nn.Linear(8, 11, bias=False), {"weight": "embedding"}),
    "narrow": (lambda: nn.ModuleDict({"output_projection": nn.Linear(8, 5, bias=False)}),
               {"output_projection.weight": "other"}),
}  # fmt: skip


@pytest.mark.parametrize("name", [*IN_BLOCK, *OUTSIDE])
def test_what_a_parameter_is_decides(name: str) -> None:
    make, expected = (IN_BLOCK | OUTSIDE)[name]
    model, made = Encoder(), make()
    place = model.layers[0] if name in IN_BLOCK else model
    setattr(place, name, made)
    path = f"layers.0.{name}" if name in IN_BLOCK else name
    roles = roles_of(model)
    assert {key: roles[f"{path}.{key}" if key else path] for key in expected} == expected


def test_kernels_are_not_taken_for_stacks_of_experts() -> None:
    model = Encoder()
    model.layers[0].pointwise = nn.Conv1d(8, 16, 1, bias=False)
    refused = r"pointwise.weight has role mlp and shape \(16, 8, 1\).*needs a matrix.*e='layers.0.pointwise.weight'"
    with pytest.raises(ValueError, match=refused):
        rd.param_groups(model, mlp=rd.LowRank(0.1))


def test_a_weight_under_weight_norm_has_the_role_it_had() -> None:
    model = Encoder()
    model.stem = PatchEmbed()
    names = ("layers.0.fc", "pooler", "stem.proj")
    for name in names:
        nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    roles = roles_of(model)
    stored = {name: roles[f"{name}.parametrizations.weight.original1"] for name in names}
    assert stored == {"layers.0.fc": "mlp", "pooler": "other", "stem.proj": "embedding"}
    assert roles["layers.0.fc.parametrizations.weight.original0"] == "norm"
