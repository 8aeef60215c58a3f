"""Rotary planes under an optimizer: groups and roles, counts, changes while training, and what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.decay.planes import decay_planes, plane_norms
from rankdecay.decay.policy import Decay
from tests.attention.families import build
from tests.decay.models import zero_gradients
from tests.decay.test_planes import SIZES, make, members_of

PLANES = rd.Planes(2.0)


def attached(
    model: nn.Module, way: str, decay: Decay, kind: Any = torch.optim.SGD, **how: Any
) -> tuple[rd.Attachment, torch.optim.Optimizer]:
    """Attach a decay of queries and keys by groups or by the model; the optimizer keeps the attachment alive."""
    if way == "groups":
        optimizer = kind(rd.param_groups(model, query_key=decay, **how), lr=0.1)
        return rd.attach(optimizer), optimizer
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.0)
    return rd.attach(optimizer, model, query_key=decay, **how), optimizer


def step(optimizer: torch.optim.Optimizer, model: nn.Module, times: int = 1) -> None:
    for _ in range(times):
        zero_gradients(model)
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def norms(model: nn.Module) -> torch.Tensor:
    return torch.cat(list(plane_norms(members_of(model, None), "model").values()))


@pytest.mark.parametrize("way", ["groups", "model"])
@pytest.mark.parametrize("kind", ["Qwen2", "Gemma3Text", "GPTNeoX"])
def test_a_step_is_that_of_the_function_and_touches_nothing_else(kind: str, way: str):
    model = make(kind)
    wanted = copy.deepcopy(model)
    step(attached(model, way, PLANES)[1], model, 3)
    for _ in range(3):
        decay_planes(members_of(wanted, 0.2), "model", "relative")
    same(model, wanted)


def test_each_parameter_has_its_own_rate():
    model = make("Qwen2")
    wanted = copy.deepcopy(model)
    fast = [p for name, p in model.named_parameters() if "k_proj" in name]
    slow = [p for name, p in model.named_parameters() if "k_proj" not in name]
    optimizer = torch.optim.SGD([{"params": fast, "lr": 0.3}, {"params": slow}], lr=0.1)
    rd.attach(optimizer, model, query_key=PLANES)
    step(optimizer, model)
    rates = {name: 0.6 if "k_proj" in name else 0.2 for name, _ in model.named_parameters()}
    names = {id(p): name for name, p in wanted.named_parameters()}
    by_storage = {p.data_ptr(): rates[names[id(p)]] for p in wanted.parameters()}
    members = [each._replace(amount=by_storage[each.parameter.data_ptr()]) for each in members_of(wanted, None)]
    decay_planes(members, "model", "relative")
    same(model, wanted)


@pytest.mark.parametrize("way", ["groups", "model"])
def test_changes_while_training(way: str):
    model = make("Qwen2")
    attachment, optimizer = attached(model, way, PLANES)
    before = norms(model)
    attachment.pause()
    step(optimizer, model)
    assert torch.equal(norms(model), before)
    attachment.resume()
    attachment.set(query_key=rd.Planes(2.0, keep=1, scale="absolute", warmup=4))
    for number in range(1, 7):
        start = norms(model)
        step(optimizer, model)
        lost = start - norms(model)
        rows = sum(rows.shape[0] // 4 for rows in (m.parameter for m in members_of(model, None)))
        due = 0.2 * min(1, number / 4) * rows**0.5
        torch.testing.assert_close(
            lost, torch.where(start == start.max(), 0.0, torch.minimum(start, torch.tensor(due))), atol=1e-4, rtol=1e-4
        )
    attachment.set(query_key=rd.LowRank(0.1, every=1))
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if "bias" in name}
    step(optimizer, model)
    assert all(torch.equal(p, biases[name]) for name, p in model.named_parameters() if name in biases)
    attachment.set(query_key=PLANES)
    wanted = copy.deepcopy(model)
    step(optimizer, model)
    decay_planes(members_of(wanted, 0.2), "model", "relative")
    same(model, wanted)
    with pytest.raises(ValueError, match="keep=4 spares every plane of"):
        attachment.set(query_key=rd.Planes(2.0, keep=4))
    assert "planes 2, relative" in attachment.describe()


@pytest.mark.parametrize("way", ["groups", "model"])
def test_a_resumed_run_goes_on_to_the_last_bit_of_16_bit_weights(way: str):
    torch.manual_seed(3)
    start = make("Qwen2").bfloat16()

    def run(model: nn.Module, steps: int, state: Any = None) -> Any:
        attachment, optimizer = attached(model, way, rd.Planes(0.02, warmup=4), torch.optim.AdamW)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            zero_gradients(model)
            optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        attachment.detach()
        return state

    whole, halves, unlike = (copy.deepcopy(start) for _ in range(3))
    run(whole, 6)
    state = run(halves, 3)
    run(halves, 3, state)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), halves.parameters(), strict=True))
    run(unlike, 3)
    run(unlike, 3)  # without the state, from the same counts again
    assert not all(torch.equal(p, q) for p, q in zip(whole.parameters(), unlike.parameters(), strict=True))


def test_biases_of_queries_and_keys_have_the_decay_of_their_planes_and_no_other():
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        model = make("Qwen2")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        attachment, optimizer = attached(
            model, "groups", rd.Planes(0.0), kind, default=rd.Frobenius(0.0), bias=rd.Frobenius(0.5)
        )
        step(optimizer, model)
        for name, p in model.named_parameters():
            left = 0.95 if name.endswith("v_proj.bias") else 1.0
            torch.testing.assert_close(p, left * before[name], msg=f"{kind} {name}")
        attachment.detach()


def test_the_planes_that_are_gone_are_described():
    model = make("Gemma3Text")
    with torch.no_grad():
        for layer, planes in zip(rd.find_attention(model), ([0], [1, 3]), strict=True):
            for view in (layer.query, layer.key):
                heads = dict(model.named_parameters())[view.parameter_name].view(-1, 8, 24)
                for j in planes:
                    heads[:, [j, j + 4]] = 0.0
    attachment, _optimizer = attached(model, "groups", rd.Planes(0.0))
    notes = [line for line in attachment.describe().splitlines() if "planes of query_key" in line]
    assert len(notes) == 2
    assert "sliding_attention" in notes[0] and notes[0].endswith("of 4, 1 is zero: 0")  # noqa: PT018
    assert "full_attention" in notes[1] and notes[1].endswith("of 4, 2 are zero: 1, 3")  # noqa: PT018
    attachment.set(query_key=rd.Planes(0.1, scope="group"))
    assert "of 4 in each of 2 key heads, 1 are zero" in attachment.describe()


def test_a_layer_that_is_frozen_or_excluded_whole_is_left_out():
    model = make("Llama")
    for p in model.get_submodule("model.layers.0").parameters():
        p.requires_grad_(False)
    before = norms_of_layers(model)
    attachment, optimizer = attached(model, "model", rd.Planes(2.0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    after = norms_of_layers(model)
    assert torch.equal(before[0], after[0])
    assert (after[1] < before[1]).all()
    attachment.detach()
    attachment, optimizer = attached(make("Llama"), "groups", rd.Planes(2.0), exclude="*.layers.0.*")
    assert attachment.describe().count("planes 2, relative") == 1 + 2


def norms_of_layers(model: nn.Module) -> list[torch.Tensor]:
    return list(plane_norms(members_of(model, None), "layer").values())


class Own(nn.Module):
    """Attention of a user's own, which says that it has rotary positions and not which rows they turn."""

    def __init__(self, heads: int = 2, size: int = 4) -> None:
        super().__init__()
        self.num_heads, self.rope_theta = heads, 10_000.0
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, heads * size, False) for _ in range(4))
        self.o_proj = nn.Linear(heads * size, 8, False)


NAMES: dict[str, Any] = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}


def test_attention_of_ones_own_says_its_convention():
    model = nn.Sequential(Own())
    with pytest.raises(ValueError, match="does not say which rows form a plane; pass names="):
        rd.param_groups(model, query_key=PLANES)
    names = rd.AttentionNames(**NAMES, rotary="interleaved", num_heads=2)
    _, optimizer = attached(model, "groups", PLANES, names=names)
    before = model[0].q_proj.weight.detach().clone()  # pyright: ignore
    step(optimizer, model)
    ratio = (model[0].q_proj.weight / before).mean(1)  # pyright: ignore
    torch.testing.assert_close(ratio[0::2], ratio[1::2])


def of_some(kind: str, part: str, weight_decay: float = 0.0) -> rd.Attachment:
    """Attach to an optimizer that has the parameters with a part in their names."""
    model = make(kind)
    chosen = [p for name, p in model.named_parameters() if part in name]
    return rd.attach(torch.optim.AdamW(chosen, lr=0.1, weight_decay=weight_decay), model, query_key=PLANES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rd.Planes(-1.0), "strength=-1.0 must be a finite number >= 0"),
        (lambda: rd.Planes(1.0, keep=-1), "keep=-1 must be a whole number >= 0"),
        (lambda: rd.Planes(1.0, scope="modle"), "scope='modle' is unknown: did you mean 'model'"),  # pyright: ignore
        (lambda: rd.Planes(1.0, scale="rel"), "scale='rel' is unknown"),  # pyright: ignore
        (lambda: rd.Planes(1.0, warmup=-1), "warmup=-1 must be a whole number >= 0"),
        (lambda: rd.param_groups(make("Llama"), query_key=rd.Planes(1.0, keep=4)), "keep=4 spares every plane of"),
        (lambda: rd.param_groups(make("Llama"), PLANES), "default=Planes.*: rotary planes are those of W_Q and W_K"),
        (lambda: rd.param_groups(make("Llama"), mlp=PLANES), "mlp=Planes.*pass it as query_key"),
        (lambda: rd.param_groups(build("gpt2"), query_key=PLANES), "h.0.attn, which has no rotary positions"),
        (lambda: rd.param_groups(build("vit"), query_key=PLANES), "which has no rotary positions. Give query_key="),
        (lambda: rd.param_groups(nn.Sequential(Own(2, 3)), query_key=PLANES, names=rd.AttentionNames(
            **NAMES, rotary="half", num_heads=2)), "which has heads of odd size 3"),
        (lambda: rd.param_groups(nn.TransformerEncoderLayer(8, 2), query_key=PLANES), "self_attn, which has no rotary"),
        (lambda: rd.param_groups(make("GPTNeoX"), query_key=PLANES, bias=rd.Frobenius(0.1)),
         "query_key_value.bias holds the biases of queries, keys and values"),
        (lambda: of_some("GPTNeoX", "", 0.01), "weight_decay=0.01 cannot act on the rest of it"),
        (lambda: attached(make("Qwen2"), "groups", PLANES, exclude="*k_proj.bias"), "k_proj.bias of .* is frozen"),
        (lambda: of_some("Qwen2", "weight"), "q_proj.bias, model.layers.0.self_attn.k_proj.bias of .* are frozen"),
        (lambda: of_some("Llama", "layers.0"),
         "needs the 2 layers of one rotary configuration in one optimizer, and this one has 1.*use scope='layer'"),
        (lambda: rd.attach(torch.optim.SGD(rd.param_groups(make("Llama"), query_key=PLANES)[1:2], lr=0.1)),
         "k_proj.weight of model.layers.0.self_attn is frozen, excluded or not in this one"),
    ],
)  # fmt: skip
def test_what_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        call()


def test_a_part_of_the_layers_is_enough_for_the_scope_of_one():
    model = make("Llama")
    optimizer = torch.optim.SGD(model.get_submodule("model.layers.0").parameters(), lr=0.1)
    rd.attach(optimizer, model, query_key=rd.Planes(2.0, scope="layer"))
    before = norms_of_layers(model)
    step(optimizer, model)
    after = norms_of_layers(model)
    assert (after[0] < before[0]).all()
    assert torch.equal(after[1], before[1])


def test_latent_attention_is_refused():
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 11,
        "intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 4, "n_routed_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0,
    }  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes))
    with pytest.raises(ValueError, match="is latent attention, where RoPE does not rotate rows of plain W_Q and W_K"):
        rd.param_groups(model, query_key=PLANES)


def test_text_and_groups_hold_the_decay():
    text = "query_key=Planes:0.1:keep=8:scope=layer:scale=absolute:warmup=5"
    decay = rd.Planes(0.1, keep=8, scope="layer", scale="absolute", warmup=5)
    assert rd.decays(text) == {"query_key": decay}
    from rankdecay.decay.groups import decays_in, hook_keys
    from rankdecay.decay.settings import as_settings

    assert rd.decays(as_settings({"query_key": decay})) == {"query_key": decay}
    assert decays_in(hook_keys("query_key", decay)) == {"query_key": decay}


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_what_a_strength_means_is_said(scale: Any):
    model = make("Qwen2")
    attachment, optimizer = attached(model, "groups", rd.Planes(0.1, scale=scale))
    found = re.search(
        r"note: query_key: at the present lr of 0\.1 a step takes 0\.01 of .* ([\d,]+) steps", attachment.describe()
    )
    assert found is not None
    said = int(found[1].replace(",", ""))
    before = norms(model)
    step(optimizer, model)
    lost = before[0] - norms(model)[0]
    size = before.square().mean().sqrt() * (0.1 if scale == "relative" else 1.0)
    assert float(size / lost) == pytest.approx(said, rel=0.1)


def test_a_weight_that_is_not_finite_is_named_once_and_spoils_no_other():
    model = make("Qwen2")
    name = "model.layers.1.self_attn.k_proj.weight"
    with torch.no_grad():
        dict(model.named_parameters())[name][3, 2] = torch.inf
    _, optimizer = attached(model, "model", PLANES)
    with pytest.warns(UserWarning, match=f"^{re.escape(name)} has entries that are not finite"):
        step(optimizer, model)
    step(optimizer, model)  # a second warning would be an error
    bad = {name: int((~p.isfinite()).sum()) for name, p in model.named_parameters() if not p.isfinite().all()}
    assert bad == {name: 1}


def test_planes_of_16_bit_weights_vanish_to_exact_zeros():
    model = make("Qwen2").bfloat16()
    _, optimizer = attached(model, "groups", rd.Planes(3.0, keep=1, scale="absolute"))
    step(optimizer, model, 12)
    assert int((norms(model) == 0).sum()) == 3


def test_layers_that_share_their_attention_are_one_group_of_the_model_alone():
    model: Any = make("Llama")
    wanted = copy.deepcopy(model)
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    attachment, optimizer = attached(model, "groups", PLANES)
    step(optimizer, model)
    alone = [each for each in members_of(wanted, 0.2) if each.rows[0].layer == "model.layers.0.self_attn"]
    decay_planes(alone, "model", "relative")
    torch.testing.assert_close(model.get_parameter("model.layers.0.self_attn.q_proj.weight"), alone[0].parameter)
    attachment.detach()
    with pytest.raises(ValueError, match=r"q_proj.weight, which .*0.self_attn and .*1.self_attn share.*scope='model'"):
        rd.param_groups(model, query_key=rd.Planes(1.0, scope="layer"))


def test_weights_that_are_computed_are_refused():
    model = make("Llama")
    nn.utils.parametrizations.weight_norm(model.get_submodule("model.layers.0.self_attn.k_proj"))
    with pytest.raises(ValueError, match=r"computes its weights: .*k_proj.*under weight_norm"):
        rd.param_groups(model, query_key=PLANES)


def test_layers_without_positions_among_others_have_to_be_left_out_by_name():
    import transformers

    sizes: dict[str, Any] = SIZES | {"num_hidden_layers": 4}
    model = transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**sizes))
    with pytest.raises(ValueError, match=r"layers\.3\.self_attn, which has no rotary positions"):
        rd.param_groups(model, query_key=PLANES)
    attachment, _optimizer = attached(model, "groups", PLANES, exclude="*.layers.3.self_attn.*")
    assert "query_key: 6 × planes 2" in attachment.describe()


def test_averaged_weights_are_refused():
    model = make("Llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0] |= {"weight_sum": 0.0, "weight_lr_power": 2.0}  # as schedule-free optimizers have
    with pytest.raises(ValueError, match="needs the weights of all parameters of a step at once"):
        rd.attach(optimizer, model, query_key=PLANES)


def test_a_parameter_without_a_gradient_counts_and_stays():
    model = make("Llama")
    wanted = copy.deepcopy(model)
    _, optimizer = attached(model, "model", PLANES)
    zero_gradients(model)
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").grad = None
    optimizer.step()
    members = [
        each._replace(amount=None if each.rows[0].part == "query" and ".0." in each.rows[0].layer else 0.2)
        for each in members_of(wanted, None)
    ]
    decay_planes(members, "model", "relative")
    same(model, wanted)
