"""Children of one module that are no projections, or two factors of one, by their names and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention.names import factor_of


def _module(**children: nn.Module | Tensor) -> nn.Module:
    module = nn.Module()
    module.num_heads = 2
    for name, child in children.items():
        if isinstance(child, nn.Module):
            module.add_module(name, child)
        else:
            module.register_parameter(name, nn.Parameter(child))
    return module


def _linear(inside: int, outside: int) -> nn.Linear:
    return nn.Linear(inside, outside, bias=False)


def _plain(**more: nn.Module | Tensor) -> nn.Module:
    return _module(q_proj=_linear(8, 8), k_proj=_linear(8, 8), v_proj=_linear(8, 8), o_proj=_linear(8, 8), **more)


FACTORS = [
    ("q_down", "q_up", "kv_down", "k_up", "v_up"),
    ("q_down_proj", "q_up_proj", "kv_down_proj", "k_up_proj", "v_up_proj"),
    ("W_DQ", "W_UQ", "W_DKV", "W_UK", "W_UV"),
    ("w_dq", "w_uq", "w_dkv", "w_uk", "w_uv"),
    ("compress_q", "decompress_q", "compress_kv", "decompress_k", "decompress_v"),
    ("q_a", "q_b", "kv_a", "k_b", "v_b"),
    ("queryDown", "queryUp", "kvDown", "keyUp", "valueUp"),
]


@pytest.mark.parametrize("names", FACTORS, ids=lambda names: names[0])
@pytest.mark.parametrize("whole", [False, True])
def test_factors_of_latent_attention_by_other_names_are_refused(names: tuple[str, ...], whole: bool) -> None:
    down, up, shared, key, value = names
    queries = {"q_proj": _linear(8, 8)} if whole else {down: _linear(8, 4), up: _linear(4, 8)}
    rest = {shared: _linear(8, 4), key: _linear(4, 8), value: _linear(4, 8)}
    attention = _module(**queries, **rest, o_proj=_linear(8, 8))
    model = nn.ModuleDict({"latent": attention, "plain": _plain()})
    with pytest.warns(UserWarning, match=r"latent is not handled: \w+ takes what \w+ gives, as the factors of latent"):
        [layer] = rd.find_attention(model)
    assert layer.name == "plain"


@pytest.mark.parametrize(
    "factors",
    [
        {"to_latent_q": _linear(8, 4), "to_q": _linear(4, 8)},
        {"to_latent_kv": _linear(8, 4), "to_k": _linear(4, 8), "to_v": _linear(4, 8)},
        {"latent_kv": _linear(8, 4), "to_kv": _linear(4, 16)},
    ],
)
def test_a_second_factor_may_be_called_as_a_whole_projection_is(factors: dict[str, nn.Module]) -> None:
    """x-transformers' ``use_latent_q`` and ``use_latent_kv``: W_Q is the product of both."""
    rest = {name: _linear(8, 8) for name in ("to_q", "to_k", "to_v", "to_out")}
    if "to_kv" in factors:
        del rest["to_k"], rest["to_v"]
    model = nn.ModuleDict({"latent": _module(**(rest | factors)), "plain": _plain()})
    with pytest.warns(UserWarning, match=r"latent is not handled: \w+ takes what \w+ gives, as the factors of latent"):
        [layer] = rd.find_attention(model)
    assert layer.name == "plain"


def test_factors_by_the_names_that_are_advised_are_read() -> None:
    attention = _module(
        q_a_proj=_linear(8, 4), q_b_proj=_linear(4, 8), kv_a_proj_with_mqa=_linear(8, 4), kv_b_proj=_linear(4, 16),
        o_proj=_linear(8, 8),
    )  # fmt: skip
    [layer] = rd.find_attention(attention)
    assert layer.query.parameter_name == "q_b_proj.weight"
    assert set(layer.factors) == {"latent", "query_factor"}


def test_queries_of_two_inputs_are_not_factors() -> None:
    attention = _module(
        q_proj=_linear(8, 4), k_proj=_linear(8, 4), v_proj=_linear(8, 4), o_proj=_linear(4, 8),
        add_q_proj=_linear(4, 4), add_k_proj=_linear(4, 4), add_v_proj=_linear(4, 4),
    )  # fmt: skip
    layers = rd.find_attention(attention)
    assert [layer.query.parameter_name for layer in layers] == ["q_proj.weight", "add_q_proj.weight"]


@pytest.mark.parametrize("name", ["q_proj", "qkv", "to_q", "q_a_proj", "kv_b_proj", "wq_a", "up_proj", "upsample", "a"])
def test_names_that_are_not_of_a_factor(name: str) -> None:
    assert not factor_of(name)


@pytest.mark.parametrize(
    ("name", "shape"), [("mem_kv", (2, 2, 4, 4)), ("null_kv", (2, 4)), ("mem_k", (2, 4, 4)), ("memory_keys", (3, 8))]
)
@pytest.mark.filterwarnings("error")
def test_keys_that_are_learned_numbers_are_no_projection(name: str, shape: tuple[int, ...]) -> None:
    [layer] = rd.find_attention(_plain(**{name: torch.randn(shape)}))
    assert layer.key.parameter_name == "k_proj.weight"


@pytest.mark.parametrize("compiled", [("q_proj",), ("q_proj", "k_proj", "v_proj", "o_proj")])
def test_projections_that_are_compiled_one_by_one(compiled: tuple[str, ...]) -> None:
    attention = _plain()
    weight = attention.q_proj.weight
    for name in compiled:
        setattr(attention, name, torch.compile(getattr(attention, name)))
    [layer] = rd.find_attention(attention)
    assert torch.equal(layer.query.tensor(), weight)
    assert layer.output is not None


def test_gates_beside_queries_are_read_as_the_message_says() -> None:
    attention = _module(q_proj=_linear(8, 16), k_proj=_linear(8, 8), v_proj=_linear(8, 8), o_proj=_linear(8, 8))
    with pytest.raises(ValueError, match=r"takes 8 columns.*give 16; .*set attn_output_gate = True on the module"):
        rd.find_attention(attention)
    attention.attn_output_gate = True
    [layer] = rd.find_attention(attention)
    assert layer.head_dim == 4
    assert layer.query.heads().shape == (2, 4, 8)
    assert "gate" in layer.factors


def _two_streams() -> nn.Module:
    return _module(
        to_q_a=_linear(16, 8), to_k_a=_linear(16, 8), to_v_a=_linear(16, 8), to_out_a=_linear(8, 16),
        to_q_b=_linear(8, 16), to_k_b=_linear(8, 16), to_v_b=_linear(8, 16), to_out_b=_linear(16, 8),
    )  # fmt: skip


def test_streams_that_are_called_a_and_b_are_two_attentions() -> None:
    layers = rd.find_attention(_two_streams())
    assert [layer.query.parameter_name for layer in layers] == ["to_q_a.weight", "to_q_b.weight"]
    names = rd.AttentionNames(query="to_q_a", key="to_k_a", value="to_v_a", output="to_out_a", num_heads=2)
    [layer] = rd.find_attention(_two_streams(), names, only=True)
    assert layer.output is not None


def test_what_the_user_names_is_a_projection_whatever_it_is_called() -> None:
    factors = _module(q_down=_linear(8, 4), q_up=_linear(4, 8), kv_down=_linear(8, 4), k_up=_linear(4, 8),
                      v_up=_linear(4, 8), o_proj=_linear(8, 8))  # fmt: skip
    names = rd.AttentionNames(query="q_up", key="k_up", value="v_up", output="o_proj", num_heads=2)
    [layer] = rd.find_attention(factors, names, only=True)
    assert layer.query.parameter_name == "q_up.weight"
    own = _module(**{name: torch.randn(8, 8) for name in ("query_w", "memory_key", "learned_value", "out_w")})
    names = rd.AttentionNames("query_w", "memory_key", "learned_value", output="out_w", num_heads=2, transposed=True)
    [layer] = rd.find_attention(own, names, only=True)
    assert layer.key.parameter_name == "memory_key"


@pytest.mark.filterwarnings("error")
def test_a_branch_of_factors_beside_attention_that_is_read_is_left_alone() -> None:
    [layer] = rd.find_attention(_plain(v_down=_linear(8, 2), v_up=_linear(2, 8)))
    assert layer.value.parameter_name == "v_proj.weight"
