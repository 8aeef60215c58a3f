"""Which decay each matrix gets, and what is refused."""

import pytest
import torch
from torch import nn

import rankdecay as rd
from tests import needs
from tests.decay.models import Nano


def test_a_tied_matrix_cannot_have_two_decays():
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    model.num_heads = 2
    model["v_proj"].weight = model["q_proj"].weight
    with pytest.raises(ValueError, match=r"q_proj.weight and v_proj.weight are one tied parameter .*low-rank.*L2 0.1"):
        rd.param_groups(model, rd.Frobenius(0.1), query_key=rd.LowRank(1.0))
    same = rd.LowRank(1.0)
    rd.param_groups(model, rd.Frobenius(0.1), query_key=same, value_output=same)


def test_a_role_that_matches_nothing_is_an_error():
    linear = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"query_key=LowRank.* matches no parameter of Sequential.*0.weight"):
        rd.param_groups(linear, query_key=rd.LowRank(0.1))
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    with pytest.raises(ValueError, match=r"^query_key=LowRank:0.1:every=2 matches") as refused:
        rd.attach(torch.optim.SGD(deep.parameters(), lr=0.1), deep, query_key=rd.LowRank(0.1, every=2))
    said = str(refused.value)
    assert said.index("names=rankdecay.AttentionNames(...)") < said.index("Its parameters are 0.weight")
    assert said.endswith(" 1.weight, … (18 in all).")
    with pytest.raises(ValueError, match=r"norm=Frobenius.*whose roles are bias, other"):
        rd.param_groups(linear, norm=rd.Frobenius(0.1))


def test_a_role_with_only_frozen_parameters_is_an_error():
    model = Nano()
    for block in model.h:
        block.attn.requires_grad_(False)
    with pytest.raises(ValueError, match=r"only frozen parameters, such as h.0.attn.c_attn.weight.*requires_grad_"):
        rd.param_groups(model, query_key=rd.LowRank(0.1))
    model.h[0].attn.requires_grad_(True)
    rd.param_groups(model, query_key=rd.LowRank(0.1))


def test_an_adapters_base_is_frozen_and_its_factors_are_named():
    peft = needs.package("peft")
    transformers = needs.package("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=11
    )
    model = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    with pytest.raises(ValueError, match=r"base of an adapter: decay its factors with other="):
        rd.param_groups(model, query_key=rd.LowRank(0.1))
    groups = rd.param_groups(model, other=rd.Frobenius(0.1))
    factors = [g for g in groups if any("lora_A" in name for name in g["param_names"])]
    assert factors[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("by", ["roles", "groups"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_frozen_codes_of_4_bits_are_left_alone(storage: torch.dtype, by: str) -> None:
    """As QLoRA has them, beside matrices that are trained; their shape is not that of the matrix."""
    bitsandbytes = needs.package("bitsandbytes")
    model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    model.num_heads = 2
    codes = bitsandbytes.nn.Linear4bit(16, 16, bias=False)
    stored = {"requires_grad": False, "quant_storage": storage}
    codes.weight = bitsandbytes.nn.Params4bit(model["q_proj"].weight.detach(), **stored)
    model["q_proj"] = codes.to("cpu")
    low_rank = rd.LowRank(0.5, unit="head", every=1)
    if by == "roles":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        attachment = rd.attach(optimizer, model, rd.LowRank(0.5, every=1), query_key=low_rank)
    else:
        optimizer = torch.optim.AdamW(rd.param_groups(model, rd.LowRank(0.5, every=1), query_key=low_rank), lr=0.1)
        attachment = rd.attach(optimizer)
    for role in ("query_key", "value_output"):
        attachment.set(**{role: rd.LowRank(0.4, every=1)})
    before = {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():  # as bytes: codes in a float type may be NaN
        assert torch.equal(p.detach().view(torch.uint8), before[name]) == (name == "q_proj.weight"), name
    codes.requires_grad_(False)
    model["k_proj"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"query_key=LowRank.*matches only frozen parameters, such as q_proj.weight"):
        rd.param_groups(model, query_key=low_rank)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"norm": rd.LowRank(0.1)}, r"h.0.ln_1.weight has role norm and shape \(16,\).*norm=rankdecay.Frobenius"),
        ({"embedding": rd.LowRank(0.1)}, r"pos_embed has role embedding and shape \(1, 5, 16\)"),
        ({"mlp": rd.LowRank(0.1, unit="head")}, r"mlp=LowRank\(unit='head'\) meets h.0.mlp.0.weight"),
    ],
)
def test_a_decay_that_does_not_fit_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        rd.param_groups(Nano(), rd.Frobenius(0.1), **how)


class _Spectral(nn.Module):
    """Attention, and a matrix of complex numbers as a Fourier layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=False)
        self.spectral = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat))


@pytest.mark.parametrize(
    "decay",
    [
        rd.LowRank(0.5),
        rd.LowRank(0.5, scale="absolute"),
        rd.Frobenius(0.5, power=0),
        rd.Frobenius(0.5, cap=0.1),
        rd.Frobenius(0.5, warmup=2),
    ],
)
def test_complex_numbers_are_decayed_by_the_optimizers_l2_alone(decay: rd.LowRank | rd.Frobenius) -> None:
    model = _Spectral()
    complex_ = "meets spectral, whose numbers are complex: of those only L2 .* leave it out with exclude='spectral'"
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        with pytest.raises(ValueError, match=complex_):
            rd.attach(kind(model.parameters(), lr=0.1), model, other=decay)
        with pytest.raises(ValueError, match=complex_):
            rd.attach(kind(model.parameters(), lr=0.1), model, decay)
    with pytest.raises(ValueError, match=complex_):
        rd.param_groups(model, decay)
    with pytest.raises(ValueError, match=complex_):
        rd.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, other=rd.Frobenius(0.5))
    with pytest.raises(ValueError, match=complex_):
        rd.attach(torch.optim.SGD(rd.param_groups(model, other=rd.Frobenius(0.5)), lr=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attachment = rd.attach(optimizer, model, other=rd.Frobenius(0.5))
    with pytest.raises(ValueError, match=complex_):
        attachment.set(other=decay)
    attachment.set(other=rd.Frobenius(0.5))
    before = model.spectral.detach().clone()
    model.spectral.grad = torch.zeros_like(model.spectral)
    optimizer.step()
    torch.testing.assert_close(model.spectral.detach(), before * 0.95)


def test_what_is_no_decay_is_refused():
    with pytest.raises(TypeError, match=r"query_key=0.1 is not a decay; pass rankdecay.LowRank"):
        rd.param_groups(Nano(), query_key=0.1)
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a finite number >= 0; 0 switches it off"):
            rd.LowRank(strength)


def _named(heads: int, **shapes: tuple[int, int]) -> nn.Module:
    module = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})
    module.num_heads = heads
    return module


def test_attention_of_ones_own_beside_attention_that_is_known():
    model = nn.ModuleDict(
        {
            "own": _named(2, a=(8, 8), b=(8, 8), c=(8, 8), d=(8, 8)),
            "odd": _named(2, ask=(8, 8), answer=(8, 16), mix=(8, 8)),
            "known": _named(2, q_proj=(8, 8), k_proj=(8, 8), v_proj=(8, 8), o_proj=(8, 8)),
        }
    )
    names = [
        rd.AttentionNames(query="a", key="b", value="c", output="d"),
        rd.AttentionNames(query="ask", fused="answer", output="mix"),
    ]

    def decayed(**how) -> set[str]:
        groups = rd.param_groups(model, query_key=rd.LowRank(0.1), **how)
        return {name for group in groups if "query_key" in group["role"] for name in group["param_names"]}

    known, own = {"known.q_proj.weight", "known.k_proj.weight"}, {"own.a.weight", "own.b.weight"}
    assert decayed() == known
    assert decayed(names=names[0]) == known | own
    assert decayed(names=names) == known | own | {"odd.ask.weight", "odd.answer.weight"}
    assert decayed(names=names[:1], only=True) == own
    with pytest.raises(ValueError, match=r"only=True looks for names= alone"):
        decayed(only=True)


def test_an_output_that_is_named_and_missing_is_an_error_with_what_there_is():
    model = nn.ModuleDict({"own": _named(2, a=(8, 8), b=(8, 8), c=(8, 8), d=(8, 8))})
    names = rd.AttentionNames(query="a", key="b", value="c", output="e")
    with pytest.raises(ValueError, match=r"no output projection 'e'; its matrices are a\.weight.*d\.weight \(8, 8\)"):
        rd.param_groups(model, query_key=rd.LowRank(0.1), names=names)
