"""Roles, and the groups they become."""

import copy
import gc
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.decay import groups
from tests.decay.models import Nano


def test_every_parameter_is_in_exactly_one_group():
    model = Nano()
    groups = rd.param_groups(model, rd.Frobenius(0.1), query_key=rd.LowRank(0.2))
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    names = [name for group in groups for name in group["param_names"]]
    assert set(names) == {name for name, _ in model.named_parameters()}
    torch.optim.AdamW(groups)


def test_groups_are_few():
    groups = rd.param_groups(Nano(), rd.Frobenius(0.1), query_key=rd.LowRank(0.2))
    assert len(groups) == len({group["role"] for group in groups}) + 1  # "other" holds a matrix and a scalar


def test_the_same_model_has_the_same_groups_whatever_its_decays():
    several = [
        rd.param_groups(Nano(), rd.Frobenius(0.0), query_key=rd.LowRank(0.2)),
        rd.param_groups(Nano(), rd.Frobenius(0.1)),
        rd.param_groups(Nano(), norm=rd.Frobenius(0.3), query_key=rd.LowRank(0.1), value_output=rd.LowRank(0.1)),
    ]
    names = [[group["param_names"] for group in groups] for groups in several]
    assert names[0] == names[1] == names[2]


def test_decays_go_where_they_are_asked_for():
    groups = rd.param_groups(
        Nano(), rd.Frobenius(0.1), query_key=rd.LowRank(0.2), value_output=rd.Frobenius(0.3), norm=rd.Frobenius(0.4)
    )
    by_name = {name: group for group in groups for name in group["param_names"]}
    fused = by_name["h.0.attn.c_attn.weight"]
    assert fused["weight_decay"] == 0.3  # of the values alone
    assert (fused["query_key_rule"], fused["query_key_strength"]) == ("prox", 0.2)
    assert fused["query_key_blocks"] == "query: rows[0:16]/48 by 8; key: rows[16:32]/48 by 8"
    assert (fused["value_output_rule"], fused["value_output_strength"]) == ("frobenius", "weight_decay")
    assert fused["value_output_blocks"] == "value: rows[32:48]/48 by 8"
    assert by_name["h.0.attn.c_proj.weight"]["weight_decay"] == 0.3
    assert by_name["h.0.mlp.0.weight"]["weight_decay"] == by_name["wte.weight"]["weight_decay"] == 0.1
    assert by_name["h.0.ln_1.weight"]["weight_decay"] == 0.4
    assert by_name["h.0.ln_1.bias"]["weight_decay"] == by_name["scale"]["weight_decay"] == 0


def test_without_a_default_the_optimizers_own_weight_decay_counts():
    groups = rd.param_groups(Nano(), query_key=rd.LowRank(0.2))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    rd.attach(optimizer)
    by_name = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert by_name["h.0.mlp.0.weight"]["weight_decay"] == 0.05
    assert by_name["h.0.ln_1.weight"]["weight_decay"] == by_name["probe.bias"]["weight_decay"] == 0
    fused = by_name["h.0.attn.c_attn.weight"]
    assert (fused["weight_decay"], fused["value_output_strength"]) == (0.05, "weight_decay")  # of the values alone


def test_group_keys_are_plain_and_survive_a_weights_only_load():
    optimizer = torch.optim.AdamW(rd.param_groups(Nano(), rd.Frobenius(0.1), query_key=rd.LowRank(0.2, every=3)))
    rd.attach(optimizer)
    for group in optimizer.param_groups:
        ours = {k: v for k, v in group.items() if k == "role" or k.startswith(("query_key", "value_output"))}
        assert all(isinstance(value, (str, int, float, bool)) for value in ours.values())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = torch.optim.AdamW(rd.param_groups(Nano(), rd.Frobenius(0.0), query_key=rd.LowRank(0.7)))
    rd.attach(other)
    other.load_state_dict(state)
    for ours, theirs in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


def test_a_tied_matrix_is_decayed_once():
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    model.num_heads = 2
    model["k_proj"].weight = model["q_proj"].weight
    groups = rd.param_groups(model, rd.Frobenius(0.0), query_key=rd.LowRank(1.0))
    [group] = [group for group in groups if group["role"] == "query_key"]
    assert len(group["params"]) == 1
    assert group["query_key_blocks"].count("rows") == 1


def test_ones_own_attention_gets_its_roles():
    own = nn.ModuleDict({"asks": nn.Linear(8, 8), "gives": nn.Linear(8, 16), "mix": nn.Linear(8, 8)})
    names = rd.AttentionNames(query="asks", fused="gives", output="mix", num_heads=2)
    groups = rd.param_groups(own, rd.Frobenius(0.0), query_key=rd.LowRank(0.1), names=names)
    by_name = {name: group for group in groups for name in group["param_names"]}
    assert by_name["asks.weight"]["role"] == "query_key"
    assert by_name["gives.weight"]["query_key_blocks"] == "key: rows[0:8]/16 by 4"


def test_groups_of_a_copied_model_are_alike():
    model = Nano()
    keys = [
        [{k: v for k, v in g.items() if k != "params"} for g in rd.param_groups(m, query_key=rd.LowRank(0.1))]
        for m in (model, copy.deepcopy(model))
    ]
    assert keys[0] == keys[1]


# ---- states saved by 0.1 -----------------------------------------------------------------------------------------


class Experts(nn.Module):
    """One block with a fused attention and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.attn = nn.Module()
        block.attn.n_head = 2
        block.attn.c_attn = nn.Linear(16, 48, bias=False)
        block.attn.c_proj = nn.Linear(16, 16, bias=False)
        block.mlp = nn.Module()
        block.mlp.experts = nn.Parameter(torch.ones(3, 16, 8))
        self.h = nn.ModuleList([block])


def saved_keys(role: str, strength: float, unit: str = "matrix", blocks: str | None = None) -> dict[str, object]:
    """What commit 504033f writes of a decay, word for word."""
    keys = {"strength": strength, "rule": "prox", "scale": "relative", "unit": unit, "every": 1, "lr_coupled": True}
    keys |= {"smoothing": 0.0, "steps": 0, "pending": 0.0} | ({"blocks": blocks} if blocks is not None else {})
    return {f"{role}_{key}": value for key, value in keys.items()}


SAVED = [
    {"role": "query_key+value_output", "param_names": ["h.0.attn.c_attn.weight"], "why": ["query, key, value"],
     **saved_keys("query_key", 0.2, "head", "query: rows[0:16]/48 by 8; key: rows[16:32]/48 by 8"),
     **saved_keys("value_output", 0.1, blocks="value: rows[32:48]/48 by 8")},
    {"role": "value_output", "param_names": ["h.0.attn.c_proj.weight"], "why": ["output"],
     **saved_keys("value_output", 0.1, blocks="columns[0:16]/16 by 8")},
    {"role": "mlp", "param_names": ["h.0.mlp.experts"], "why": ["matrix of a block with attention"],
     **saved_keys("mlp", 0.1)},
]  # fmt: skip


def test_a_state_says_what_it_always_said_and_nothing_of_a_whole_parameter():
    optimizer = torch.optim.SGD(
        rd.param_groups(Experts(), rd.LowRank(0.1, every=1), query_key=rd.LowRank(0.2, unit="head", every=1)), 1.0
    )
    rd.attach(optimizer)
    ours = [
        {key: value for key, value in group.items() if key in saved or key.split("_")[0] in ("mlp", "query", "value")}
        for group, saved in zip(optimizer.state_dict()["param_groups"], SAVED, strict=True)
    ]
    assert ours == SAVED
    assert [list(group) for group in ours[2:]] == [
        ["param_names", "why", "role", *(key for key in SAVED[2] if key.startswith("mlp"))]
    ]


def test_a_state_saved_before_whole_windows_decays_as_it_says():
    model = Experts()
    optimizer = torch.optim.SGD(rd.param_groups(model, rd.LowRank(9.0), query_key=rd.LowRank(9.0, rule="smooth")), 1.0)
    rd.attach(optimizer)
    state = optimizer.state_dict()
    plain = [
        {key: group[key] for key in ("lr", "momentum", "params", "weight_decay")} for group in state["param_groups"]
    ]
    defaults = {"dampening": 0, "nesterov": False, "maximize": False, "foreach": None, "differentiable": False}
    groups = [defaults | {"fused": None} | one | saved for one, saved in zip(plain, SAVED, strict=True)]
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def prox(weight: torch.Tensor, strength: float) -> torch.Tensor:
        U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        tau = strength * weight.double().norm(dim=(-2, -1)) / min(weight.shape[-2:]) ** 0.5
        return (U * (sigma - tau[..., None]).clamp_min(0)[..., None, :]) @ Vh

    fused, output, experts = before
    heads = prox(fused[:32].unflatten(0, (4, 8)), 0.2).flatten(0, 1)
    expected = [torch.cat([heads, prox(fused[32:], 0.1)]), prox(output, 0.1), prox(experts, 0.1)]
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=0, atol=1e-6)


def test_heads_given_here_count_everywhere():
    model = nn.ModuleDict({name: nn.Linear(12, 12) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    groups = rd.param_groups(model, query_key=rd.LowRank(0.1, unit="head"), num_heads=3)
    assert {group["query_key_blocks"] for group in groups if "query_key_blocks" in group} == {"rows[0:12]/12 by 4"}


def _attached(model: nn.Module, by: str, how: dict[str, Any]) -> tuple[torch.optim.Optimizer, rd.Attachment]:
    """A decay under SGD, by roles of the model or by groups."""
    if by == "roles":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, rd.attach(optimizer, model, **how)
    optimizer = torch.optim.SGD(rd.param_groups(model, **how), lr=0.1)
    return optimizer, rd.attach(optimizer)


@pytest.mark.parametrize("by", ["roles", "groups"])
def test_a_decay_that_is_set_later_leaves_what_is_excluded_alone(by: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    model.num_heads = 2
    how = {"query_key": rd.LowRank(0.5, every=1), "exclude": "q_proj"}
    optimizer, attachment = _attached(model, by, how)
    attachment.set(query_key=rd.Frobenius(1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model["q_proj"].weight, before["q_proj.weight"])
    torch.testing.assert_close(model["k_proj"].weight.detach(), before["k_proj.weight"] * 0.9)


@pytest.mark.parametrize("by", ["roles", "groups"])
def test_a_model_whose_tensors_are_swapped_on_conversion_is_decayed(by: str) -> None:
    """As torch converts DTensors always: it swaps no tensor that has a weak reference."""
    model, how = Nano(), {"query_key": rd.LowRank(0.5, every=1), "value_output": rd.Frobenius(0.5)}
    optimizer, attachment = _attached(model, by, how)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    attachment.set(query_key=rd.Frobenius(0.5))  # of a fused matrix, which only what is known of it tells
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    name = "h.0.attn.c_attn.weight"
    assert model.get_parameter(name).dtype == torch.float64
    torch.testing.assert_close(model.get_parameter(name).detach(), before[name] * 0.95)


def test_what_is_known_of_a_parameter_goes_with_its_model() -> None:
    kept = len(groups._known._known)
    model = Nano()
    rd.param_groups(model, rd.Frobenius(0.1))
    parameters = len(list(model.parameters()))
    assert len(groups._known._known) == kept + parameters
    replaced = nn.Parameter(torch.randn(2, 2))
    groups._known._known[id(replaced)] = groups._known._known[id(model.h[0].attn.c_attn.weight)]
    assert replaced not in groups._known
    del groups._known._known[id(replaced)], model
    gc.collect()
    assert len(groups._known._known) <= kept


_UNATTACHED = "nothing applies their decays of query_key: call rankdecay.attach"


def _stepped(optimizer: torch.optim.Optimizer) -> list[str]:
    """Warnings of two steps."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    return [str(warning.message) for warning in given]


def _adamw(model: nn.Module, decay: rd.LowRank, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(rd.param_groups(model, query_key=decay), weight_decay=0.0, **settings)


def test_a_step_to_which_nothing_is_attached_is_one_warning() -> None:
    [said] = _stepped(_adamw(Nano(), rd.LowRank(0.1)))
    assert _UNATTACHED in said
    assert _stepped(torch.optim.AdamW(rd.param_groups(Nano(), rd.Frobenius(0.1)))) == []  # AdamW's own
    assert _stepped(_adamw(Nano(), rd.LowRank(0.0))) == []
    waiting = _adamw(Nano(), rd.LowRank(0.1), lr=0.0)
    assert _stepped(waiting) == []  # as a checkpointer steps, before it loads


def test_a_copy_to_which_nothing_is_attached_is_one_warning() -> None:
    model = Nano()
    optimizer = _adamw(model, rd.LowRank(0.1))
    attachment = rd.attach(optimizer)
    assert _stepped(optimizer) == []
    _, copied = copy.deepcopy((model, optimizer))
    [said] = _stepped(copied)
    assert _UNATTACHED in said
    attachment.detach()
    assert _stepped(optimizer) == []


def test_a_wrapper_of_an_optimizer_that_is_attached_is_not_one() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__([torch.zeros(1)], {})
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    wrapper = Wrapper(_adamw(Nano(), rd.LowRank(0.1)))
    rd.attach(wrapper)
    assert _stepped(wrapper) == []
