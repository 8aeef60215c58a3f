"""The classes that circulate, against a plain writing of the published step, on models stored in every way."""

import re

import pytest
import torch
from torch import Tensor, nn

from rankdecay.compat import NewtonSchulzLowRankDecay, StableRankMonitor
from tests import needs
from tests.ranks import on_ranks

KEYWORDS = ["q_proj", "k_proj", "attention", "qk_norm"]  # as most copies are called


pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


def published(weight: Tensor, rate: float, steps: int = 5) -> Tensor:
    """W - rate · NS(W), in the precision of the weight; the Frobenius norm has 1e-8 added."""
    x = weight / (torch.linalg.matrix_norm(weight) + 1e-8)
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x @ x.mT @ x
    return weight - rate * x


class Attention(nn.Module):
    """Separate projections, tall, wide and square."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 48)
        self.k_proj = nn.Linear(24, 12, bias=False)
        self.v_proj = nn.Linear(24, 24)
        self.q_norm = nn.Parameter(torch.ones(4, 12))  # a gain per head


class Torch(nn.Module):
    """The model of most copies: torch's attention, and a QK-norm whose gain is four-dimensional."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 16)
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.layers:
            layer.attention = nn.MultiheadAttention(16, 4)
            layer.qk_norm = nn.Module()
            layer.qk_norm.scale = nn.Parameter(torch.ones(1, 1, 1, 4))
            layer.ffn = nn.Linear(16, 32)


def make(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---- the step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
@pytest.mark.parametrize("rate", [1e-3, 0.1])
def test_separate_projections_take_the_published_step(dtype, steps, rate):
    model = make(Attention, dtype)
    wanted = state(model)
    decay = NewtonSchulzLowRankDecay(model.named_parameters(), rate, steps, target_keywords=["q_proj", "k_proj"])
    assert [name for name, _ in decay.params_to_decay] == ["q_proj.weight", "k_proj.weight"]
    for _ in range(3):
        decay.step()
        for name in ("q_proj.weight", "k_proj.weight"):
            wanted[name] = published(wanted[name].double(), rate, steps).to(dtype)
    for name, got in state(model).items():
        torch.testing.assert_close(got, wanted[name], rtol=0, atol=1e-6)
        assert ("weight" in name and "v_" not in name) or torch.equal(got, wanted[name])


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0])
def test_the_step_is_published_whatever_the_norm(scale):
    weight = nn.Parameter(scale * torch.randn(20, 30, generator=torch.Generator().manual_seed(1)) / 600**0.5)
    wanted = published(weight.detach().double(), 1e-3)
    NewtonSchulzLowRankDecay([("q_proj", weight)], target_keywords=["q_proj"]).step()
    torch.testing.assert_close(weight.detach().double(), wanted, rtol=1e-7, atol=1e-6)


def test_a_fused_weight_of_torch_is_decayed_as_three():
    model = make(Torch)
    before = state(model)
    NewtonSchulzLowRankDecay(model.named_parameters(), 0.01, target_keywords=KEYWORDS).step()
    for name, got in state(model).items():
        if name.endswith("in_proj_weight"):
            wanted = torch.cat([published(part, 0.01) for part in before[name].chunk(3)])
            assert (published(before[name], 0.01) - wanted).abs().max() > 1e-4  # as one it is another step
        elif name.endswith("out_proj.weight"):
            wanted = published(before[name], 0.01)
        else:
            assert torch.equal(got, before[name])
            continue
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_gpt2s_weight_is_decayed_as_three_columns():
    transformers = needs.package("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=9, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    before = state(model)
    NewtonSchulzLowRankDecay(model.named_parameters(), 0.01, target_keywords=["c_attn"]).step()
    for name, got in state(model).items():
        wanted = before[name]
        if name.endswith("c_attn.weight"):
            wanted = torch.cat([published(part, 0.01) for part in wanted.chunk(3, 1)], 1)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_rate_and_iterations_are_read_at_each_step():
    model = make(Attention)
    decay = NewtonSchulzLowRankDecay(iter(model.named_parameters()), 0.0, target_keywords=["q_proj"])
    before = model.q_proj.weight.detach().clone()
    decay.step()
    assert torch.equal(model.q_proj.weight, before)
    decay.decay_rate, decay.num_iterations = 0.1, 3
    decay.step()
    torch.testing.assert_close(model.q_proj.weight.detach(), published(before, 0.1, 3), rtol=0, atol=1e-6)
    decay.decay_rate = -1.0
    with pytest.raises(ValueError, match=r"decay_rate=-1.0 must be a finite number >= 0"):
        decay.step()


def test_sixteen_bits_keep_on_average_what_a_copy_loses():
    model = make(Attention, torch.bfloat16)
    before = model.q_proj.weight.detach().float()
    decay = NewtonSchulzLowRankDecay(model.named_parameters(), 1e-5, target_keywords=["q_proj"])
    for _ in range(100):
        decay.step()
    wanted = published(before, 1e-3)
    got = model.q_proj.weight.detach().float()
    share = ((got - before) * (wanted - before)).sum() / (wanted - before).square().sum()
    assert 0.7 < float(share) < 1.3


def sharded_step(steps: int) -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    mesh = init_device_mesh("cpu", (2,))
    fused = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    output = nn.Parameter(distribute_tensor(weight[:16].clone(), mesh, [Shard(0)]))
    named = [("attention.in_proj_weight", fused), ("attention.out_proj.weight", output)]
    NewtonSchulzLowRankDecay(named, 0.1, steps).step()
    wanted = torch.cat([published(part, 0.1, steps) for part in weight.chunk(3)])
    errors = [fused.full_tensor() - wanted, output.full_tensor() - published(weight[:16], 0.1, steps)]
    return max(float(error.abs().max()) for error in errors)


@pytest.mark.parametrize("steps", [3, 5])
def test_sharded_weights_take_the_step_of_whole_ones(steps):
    assert max(on_ranks(2, sharded_step, steps)) < 1e-6


# ---- what is selected ----------------------------------------------------------------------------------------


def refused(name: str, *shape: int, beside: str = "other", bias: int = 0) -> str:
    named = [(name, nn.Parameter(torch.ones(shape))), (beside, nn.Parameter(torch.ones(shape[-1], shape[-1])))]
    named += [(name.replace("weight", "bias"), nn.Parameter(torch.ones(bias)))] if bias else []
    with pytest.raises(ValueError, match="holds several of W_Q, W_K and W_V") as caught:
        NewtonSchulzLowRankDecay(named, 0.02, target_keywords=["attn"])
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "beside"),
    [
        ("attn.qkv.weight", (48, 16), "attn.proj.weight"),
        ("attn.query_key_value.weight", (48, 16), "attn.dense.weight"),
        ("attn.to_kv.weight", (32, 16), "attn.to_q.weight"),
        ("attn.kv_b_proj.weight", (32, 16), "attn.o_proj.weight"),
        ("attn.in_proj.weight", (48, 16), "attn.out_proj.weight"),
        ("attn.c_attn.weight", (48, 16), "attn.c_proj.weight"),  # gpt_bigcode's may be interleaved
        ("attn.in_proj_weight", (48, 16), "attn.out_proj_weight"),  # apex's is
        ("attn.in_proj_weight", (80, 16), "attn.out_proj.weight"),  # no thirds
        ("attn.qkv.parametrizations.weight.original", (48, 16), "attn.proj.weight"),
    ],
)
def test_a_fused_weight_whose_order_is_not_proven_is_refused(name, shape, beside):
    said = refused(name, *shape, beside=beside)
    assert said.startswith(f"{name} ({shape[0]}×{shape[1]}) ")
    assert said.endswith("LowRank(0.02, rule='newton_schulz', scale='absolute', lr_coupled=False, every=1))")
    assert "rd.attach(optimizer, model, query_key=rd." in said


def test_a_frozen_fused_weight_is_left_alone_and_not_refused(capsys):
    named = [("attn.qkv.weight", nn.Parameter(torch.ones(6, 2), requires_grad=False))]
    named += [("attn.proj.weight", nn.Parameter(torch.eye(2)))]
    decay = NewtonSchulzLowRankDecay(named, target_keywords=["attn"])
    assert [name for name, _ in decay.params_to_decay] == ["attn.proj.weight"]
    assert re.search(r"attn.qkv.weight +1 × 6×2 +not decayed: frozen", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["qkv_block.q_proj.weight", "qkv_block.out_proj.weight", "mixer.in_proj.weight"])
def test_a_matrix_of_its_own_is_not_taken_for_a_fused_one(name):
    weight = nn.Parameter(torch.randn(10, 4))
    before = weight.detach().clone()
    NewtonSchulzLowRankDecay([(name, weight)], 0.1, target_keywords=["proj"]).step()
    torch.testing.assert_close(weight.detach(), published(before, 0.1), rtol=0, atol=1e-6)


def test_what_is_decayed_and_what_not_is_printed_once(capsys):
    model = make(Torch)
    decay = NewtonSchulzLowRankDecay(model.named_parameters(), target_keywords=KEYWORDS)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "rankdecay: NewtonSchulzLowRankDecay, 0.001 per step, 5 iterations"
    assert [re.split("  +", line.strip()) for line in lines[:-1]] == [
        ["layers.*.attention.in_proj_weight", "2 × 48×16", "decayed as 3 matrices"],
        ["layers.*.attention.out_proj.weight", "2 × 16×16", "decayed"],
        ["layers.*.attention.in_proj_bias", "2 × 48", "not decayed: norm or bias"],
        ["layers.*.attention.out_proj.bias", "2 × 16", "not decayed: norm or bias"],
        ["layers.*.qk_norm.scale", "2 × 1×1×1×4", "not decayed: norm or bias"],
        ["5 other parameters: not decayed"],
    ]
    modern = "rd.attach(optimizer, model, query_key=rd.LowRank(0.001, rule='newton_schulz', scale='absolute', "
    assert lines[-1].strip() == f"in new code: {modern}lr_coupled=False, every=1))"
    decay.step()
    assert not capsys.readouterr().out


def test_a_gain_of_two_dimensions_and_unmatched_attention_are_named(capsys):
    NewtonSchulzLowRankDecay(make(Attention).named_parameters(), target_keywords=["q_"])
    said = capsys.readouterr().out
    assert re.search(r"q_norm +1 × 4×12 +not decayed: norm or bias", said)
    assert re.search(r"v_proj.weight +1 × 24×24 +not decayed: no keyword in its name", said)


def test_keywords_are_by_default_those_of_most_copies():
    decay = NewtonSchulzLowRankDecay(make(Torch).named_parameters())
    assert decay.target_keywords == ["qk_norm", "attention"]
    assert (decay.decay_rate, decay.num_iterations) == (1e-3, 5)


def test_keywords_that_select_nothing_are_an_error():
    with pytest.raises(ValueError, match=r"target_keywords=\['q_proj'\] select no matrix: .*in_proj_weight 2 × 48×16"):
        NewtonSchulzLowRankDecay(make(Torch).named_parameters(), target_keywords=["q_proj"])
    frozen = make(Attention).requires_grad_(False)
    with pytest.raises(ValueError, match=r"q_proj\.weight 1 × 48×24 not selected: frozen"):
        NewtonSchulzLowRankDecay(frozen.named_parameters(), target_keywords=["q_proj"])


def test_bad_arguments_are_named():
    model = make(Attention)
    with pytest.raises(ValueError, match=r"decay_rate=-0.1 must be a finite number >= 0"):
        NewtonSchulzLowRankDecay(model.named_parameters(), -0.1)
    with pytest.raises(ValueError, match=r"num_iterations=2.5 must be a whole number >= 1; the copies use 5"):
        NewtonSchulzLowRankDecay(model.named_parameters(), num_iterations=2.5)
    for keywords in ("q_proj", [""], [1]):
        with pytest.raises(TypeError, match="target_keywords must be a list such as"):
            NewtonSchulzLowRankDecay(model.named_parameters(), target_keywords=keywords)
    for named in (model, model.parameters(), model.state_dict()):
        with pytest.raises(TypeError, match=r"named_parameters must be model\.named_parameters\(\), got "):
            NewtonSchulzLowRankDecay(named, target_keywords=["q_proj"])
    used = model.named_parameters()
    list(used)
    with pytest.raises(ValueError, match="named_parameters is empty"):
        NewtonSchulzLowRankDecay(used, target_keywords=["q_proj"])


# ---- the monitor ---------------------------------------------------------------------------------------------


def stable_rank(weight: Tensor) -> float:
    sigma = torch.linalg.svdvals(weight.detach().double())
    return float(sigma.square().sum() / sigma[0].square())


def test_the_monitor_is_the_mean_over_the_matrices_with_a_keyword(capsys):
    model = make(Attention)
    monitor = StableRankMonitor(model, ["q_proj", "k_proj"])
    assert re.search(r"k_proj\.weight +1 × 12×24 +measured\n", capsys.readouterr().out)
    wanted = (stable_rank(model.q_proj.weight) + stable_rank(model.k_proj.weight)) / 2
    assert monitor.compute() == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        model.q_proj.weight.copy_(torch.ones(48, 24))
    assert monitor.compute() < wanted
    assert len(monitor.history) == 2


def test_the_monitor_measures_the_parts_of_a_fused_weight():
    model = make(Torch)
    parts = [part for layer in model.layers for part in layer.attention.in_proj_weight.chunk(3)]
    outputs = [layer.attention.out_proj.weight for layer in model.layers]
    ranks = list(map(stable_rank, [*parts, *outputs]))
    assert StableRankMonitor(model).compute() == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)


def test_a_monitor_whose_keywords_are_in_no_name_measures_queries_and_keys(capsys):
    model = make(Torch)
    monitor = StableRankMonitor(model, target_keywords=["q_proj", "k_proj"])
    assert "of W_Q and W_K, as no matrix's name contains q_proj or k_proj" in capsys.readouterr().out
    ranks = [stable_rank(part) for layer in model.layers for part in layer.attention.in_proj_weight.chunk(3)[:2]]
    assert monitor.compute() == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)


def test_a_monitor_of_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"select no matrix: .*rd\.Monitor\(model"):
        StableRankMonitor(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        StableRankMonitor(make(Attention).named_parameters())
