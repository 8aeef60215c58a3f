"""The monitor: its values by hand in float64, when it measures, where, and what it says of bad input."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.monitor import Monitor, RankCollapseWarning
from tests import needs
from tests.ranks import on_ranks
from tests.walked import ROOT, walk

transformers = needs.package("transformers")

SIZES = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IDS = torch.arange(16).reshape(2, 8)


def _gpt2(dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_head": 3, "n_layer": layers, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **SIZES))
    for block in model.transformer.h:
        nn.init.normal_(block.attn.c_attn.bias, std=0.2)
    return model.to(dtype)


def _llama(kind: str = "Llama", **how: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
             "intermediate_size": 16, "head_dim": 6, **SIZES, **how}  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


# ---- values ----------------------------------------------------------------------------------------------


def _ranks(matrix: Tensor) -> tuple[float, float]:
    """Effective and stable rank, written out, of a matrix formed in full."""
    sigma = torch.linalg.svd(matrix)[1]
    sigma = sigma[sigma > 1e-12 * sigma[0]]
    q = sigma / sigma.sum()
    return float((-(q * q.log()).sum()).exp()), float((sigma**2).sum() / sigma[0] ** 2)


def _close(value: float, expected: float) -> bool:
    return abs(value - expected) <= 1e-9 * abs(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_gpt2_are_those_of_the_products_written_out(dtype):
    model = _gpt2(dtype)
    monitor = Monitor(model, detail="head")
    values = monitor.measure()
    everything: dict[str, list[float]] = {}
    for i, block in enumerate(model.transformer.h):
        weight = block.attn.c_attn.weight.detach().double()  # (24, 72): stored as (in, out)
        bias = block.attn.c_attn.bias.detach().double()
        out = block.attn.c_proj.weight.detach().double()  # (24, 24): (in, out)
        affine = torch.cat([weight, bias[None]])  # the token has a constant 1 more
        for head in range(3):
            q, k, v = (affine[:, start + 8 * head : start + 8 * (head + 1)] for start in (0, 24, 48))
            for part, matrix in (("query_key", k @ q.T), ("value_output", out[8 * head : 8 * (head + 1)].T @ v.T)):
                for measure, expected in zip(("effective_rank", "stable_rank"), _ranks(matrix), strict=True):
                    name = f"rank/transformer.h.{i}.attn/{part}/{measure}"
                    assert _close(values[f"{name}_{head}"], expected)
                    everything.setdefault(name, []).append(expected)
                    everything.setdefault(f"rank/{part}/{measure}", []).append(expected)
    for name, heads in everything.items():
        assert _close(values[name], sum(heads) / len(heads))
        assert _close(values[f"{name}_min"], min(heads))
    assert len(values) == 1 + 2 * 2 * (2 + 2 * (2 + 3))
    assert all(type(value) in (int, float) for value in values.values())


def test_values_of_llama_with_grouped_keys():
    model = _llama()
    values = Monitor(model, detail="head").measure()
    for i, block in enumerate(model.model.layers):
        its = block.self_attn
        q, k, v, o = (getattr(its, f"{name}_proj").weight.detach().double() for name in "qkvo")
        for head in range(4):
            mine, shared = slice(6 * head, 6 * head + 6), slice(6 * (head // 2), 6 * (head // 2) + 6)
            name = f"rank/model.layers.{i}.self_attn"
            ranks = _ranks(k[shared].T @ q[mine])
            assert _close(values[f"{name}/query_key/effective_rank_{head}"], ranks[0])
            ranks = _ranks(o[:, mine] @ v[shared])
            assert _close(values[f"{name}/value_output/stable_rank_{head}"], ranks[1])


def test_normalised_queries_and_keys_are_measured_as_matrices():
    model = _llama("Qwen3")
    values = Monitor(model, measures="effective_rank", detail="head").measure()
    assert {name.split("/")[1] for name in values if name.count("/") == 2} == {"query", "key", "value_output"}
    its = model.model.layers[1].self_attn
    for head in range(2):
        expected = _ranks(its.k_proj.weight.detach().double()[6 * head : 6 * head + 6])[0]
        assert _close(values[f"rank/model.layers.1.self_attn/key/effective_rank_{head}"], expected)


def test_the_matrices_every_measure_and_less_detail():
    its = nn.MultiheadAttention(8, 2)
    measures = ["pseudo_rank", "numerical_rank", "nuclear_norm", "spectral_norm"]
    values = Monitor(its, measures=measures, of=["output", "query"], detail="model").measure()
    assert len(values) == 1 + 2 * 4 * 2
    assert values["rank/output/numerical_rank"] == 4
    output = its.out_proj.weight.detach().double()
    norms = [float(torch.linalg.matrix_norm(output[:, 4 * head : 4 * head + 4], "nuc")) for head in range(2)]
    assert _close(values["rank/output/nuclear_norm"], sum(norms) / 2)
    layer = Monitor(its, measures="stable_rank", of="query_key").measure()
    assert list(layer)[3:] == ["rank/attention/query_key/stable_rank", "rank/attention/query_key/stable_rank_min"]


def test_the_balance_of_products_and_of_nothing_else():
    torch.manual_seed(0)
    its = nn.MultiheadAttention(8, 2, bias=False)
    values = Monitor(its, measures=["imbalance", "nuclear_gap"], of=["query_key", "query"], detail="head").measure()
    assert not any("/query/" in name for name in values)
    q, k, _ = its.in_proj_weight.detach().double().chunk(3)
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        first, second = k[rows] @ k[rows].T, q[rows] @ q[rows].T
        relative = torch.linalg.matrix_norm(first - second) / torch.linalg.matrix_norm((first + second) / 2)
        assert _close(values[f"rank/attention/query_key/imbalance_{head}"], float(relative))
        mean = float(first.trace() + second.trace()) / 2
        gap = mean - float(torch.linalg.matrix_norm(k[rows].T @ q[rows], "nuc"))
        assert _close(values[f"rank/attention/query_key/nuclear_gap_{head}"], gap)


def test_attention_without_an_output_projection():
    its = nn.Module()
    its.q, its.k, its.v, its.num_heads = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), 2
    values = Monitor(its, measures="stable_rank", detail="model").measure()
    assert [name.split("/")[1] for name in values if "/" in name][::2] == ["query_key", "value"]
    with pytest.raises(ValueError, match=r"of=\('output',\): no attention of Module has an output projection"):
        Monitor(its, of="output")


def test_a_layer_that_is_not_finite_is_nan_and_the_others_are_not():
    model = _gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[3, 9] = torch.inf  # in head 1's query
    values = Monitor(model, detail="head", collapse=0.1).measure()
    nan = {name for name, value in values.items() if value != value}
    name = "rank/transformer.h.1.attn/query_key/effective_rank"
    assert {f"{name}_1", name, f"{name}_min", "rank/query_key/effective_rank"} <= nan
    assert not {f"{name}_0", "rank/transformer.h.0.attn/query_key/effective_rank"} & nan
    assert not any("value_output" in name for name in nan)


# ---- when ------------------------------------------------------------------------------------------------


def test_every_k_steps_and_nothing_changes():
    model = _gpt2()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    random = torch.get_rng_state()
    logged: list[dict[str, float]] = []
    monitor = Monitor(model, every=3, log=logged.append)
    returned = [monitor.step() for _ in range(7)]
    assert [values and values["step"] for values in returned] == [None, None, 3, None, None, 6, None]
    assert logged == [returned[2], returned[5]]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.state_dict(keep_vars=True).items())


def test_own_counts_may_stay_and_jump():
    monitor = Monitor(_gpt2(), every=10, log=lambda values: values.clear())
    due = [bool(monitor.step(at)) for at in (9, 9, 10, 10, 19, 31, 32, 5, 10)]
    assert due == [False, False, True, False, False, True, False, False, True]


def test_a_resumed_monitor_counts_on():
    model, logged = _gpt2(), []
    first = Monitor(model, every=4, log=logged.append)
    for _ in range(6):
        first.step()
    second = Monitor(model, every=4, log=logged.append)
    second.load_state_dict(first.state_dict())
    second.step()
    second.step()
    assert [values["step"] for values in logged] == [4, 8]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_step_that_a_scaler_skips_does_not_count(fused: bool, every: int):
    model, logged = _gpt2(layers=1), []
    monitor = Monitor(model, every=every, log=logged.append, detail="model")
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused), torch.amp.GradScaler("cpu")
    monitor.attach(optimizer)
    for made, overflows in enumerate([1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1]):
        scaler.scale(model(IDS, labels=IDS).loss * (torch.inf if overflows else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if made == 4:
            assert monitor.state_dict() == {"steps": 2}
    assert [values["step"] for values in logged] == [step for step in range(1, 6) if step % every == 0]
    assert monitor.state_dict() == {"steps": 5}


def test_a_copy_measures_the_copy_of_the_model():
    model = _gpt2()
    monitor = Monitor(model, log=lambda values: None)
    model.monitor = monitor  # as in the module of a trainer, which is copied for an average of the weights
    before = monitor.measure()
    copied = copy.deepcopy(model)
    for block in copied.transformer.h:
        nn.init.ones_(block.attn.c_attn.weight)
    assert monitor.measure() == before
    assert copied.monitor.model is copied
    assert copied.monitor.measure() == Monitor(copied).measure() != before


@pytest.mark.filterwarnings("ignore:.* at 1 or more a weight vanishes")
def test_attached_it_follows_the_optimizer_and_its_wrapper_and_measures_after_the_decay():
    accelerate = needs.package("accelerate")
    model, logged = _gpt2(), []
    groups = rd.param_groups(model, query_key=rd.LowRank(1e3), value_output=rd.Frobenius(0.0))
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    rd.attach(optimizer)
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    handle = Monitor(model, every=2, log=logged.append, measures="numerical_rank", of="query").attach(wrapped)
    for _ in range(4):
        _train(model, wrapped)
    assert [values["step"] for values in logged] == [2, 4]
    assert logged[0]["rank/query/numerical_rank"] == 0  # a decay of everything, seen
    handle.remove()
    _train(model, wrapped)
    _train(model, wrapped)
    assert len(logged) == 2


def test_print_is_the_default(capsys):
    Monitor(nn.MultiheadAttention(8, 2), every=1).step()
    assert capsys.readouterr().out.startswith("{'step': 1, 'rank/query_key/effective_rank': ")


# ---- where -----------------------------------------------------------------------------------------------


# torch.compile itself, where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@needs.compiled_transformers
def test_outside_of_compiled_code():
    """Names as without compilation; no graph of its own, no recompilation."""
    model, logged = _gpt2(layers=1), []
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(compiled, every=2, log=logged.append)
    assert list(monitor.measure()) == list(Monitor(model).measure())
    monitor.attach(optimizer)
    inside = Monitor(model, every=1, log=logged.append)
    frames: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        frames.append(len(graph.graph.nodes))
        return graph.forward

    @torch.compile(backend=counting)
    def step() -> None:
        optimizer.step()
        inside.step()

    for _ in range(4):
        optimizer.zero_grad()
        compiled(input_ids=IDS, labels=IDS).loss.backward()
        step()
        if inside.steps == 2:
            so_far = len(frames)
    assert len(frames) == so_far
    assert [values["step"] for values in logged] == [1, 2, 2, 3, 4, 4]
    by_hand = Monitor(model).measure()
    assert all(logged[-1][name] == by_hand[name] for name in by_hand if name != "step")


def test_blocks_that_are_compiled_each_keep_their_names():
    model = _gpt2()
    plain = list(Monitor(model).measure())
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = torch.compile(block, backend="eager")
    assert list(Monitor(model).measure()) == plain


def replica() -> tuple[list[int], int, str]:
    """What a process logged of four steps that it trained with another, and what it is called."""
    warnings.simplefilter("error")
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    model = torch.nn.parallel.DistributedDataParallel(attention)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logged: list[dict[str, float]] = []
    monitor = Monitor(model, every=2, log=logged.append)
    for step in range(4):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(10 * step + torch.distributed.get_rank()))
        optimizer.zero_grad()
        model(x, x, x)[0].square().sum().backward()
        optimizer.step()
        monitor.step()
    own = Monitor(attention).measure()
    assert logged == [] or all(logged[-1][name] == own[name] for name in own if name != "step")
    return [int(values["step"]) for values in logged], monitor.steps, list(own)[5]


def test_in_a_distributed_run_one_process_logs():
    name = "rank/value_output/effective_rank"
    assert on_ranks(2, replica) == [([2, 4], 4, name), ([], 4, name)]


# ---- collapse --------------------------------------------------------------------------------------------


def test_a_collapse_is_said_once_until_the_head_recovers():
    model, logged = _gpt2(), []
    monitor = Monitor(model, every=1, log=logged.append, collapse=1.5, measures="stable_rank", detail="model")
    kept = model.transformer.h[1].attn.c_attn.weight.detach().clone()
    monitor.step()

    def collapse() -> None:
        with torch.no_grad():
            model.transformer.h[1].attn.c_attn.weight[:, 9:16] = 0  # all but a column of head 1's query
            model.transformer.h[1].attn.c_attn.bias[9:16] = 0

    collapse()
    with pytest.warns(RankCollapseWarning) as said:
        monitor.step()
    monitor.step()  # here a warning would be an error
    assert len(said) == 1
    assert "step 2: the effective rank has fallen below 1.5 in transformer.h.1.attn query_key head 1 (1)." in str(
        said[0]
    )
    assert len(logged) == 3
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.fill_(torch.nan)
    monitor.step()  # unknown: neither fallen nor recovered
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.copy_(kept)
    monitor.step()
    collapse()
    with pytest.warns(RankCollapseWarning, match="step 6"):
        monitor.step()


def test_many_collapses_are_one_warning():
    with pytest.warns(RankCollapseWarning, match=r"head 0 .* and 4 more\.") as said:
        Monitor(_gpt2(), every=1, log=lambda _: None, collapse=100).step()
    assert len(said) == 1


def test_without_a_bound_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Monitor(nn.MultiheadAttention(8, 8), every=1, log=lambda _: None).step()


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"every": 0}, ValueError, r"every=0 must be a whole number >= 1; the steps between"),
        ({"every": 2.0}, ValueError, r"every=2\.0"),
        ({"every": True}, ValueError, r"every=True"),
        ({"log": "wandb"}, TypeError, r"log must be callable with a dictionary, got str; for example print"),
        ({"measures": ["efective_rank"]}, ValueError, r"measures='efective_rank'.*did you mean 'effective_rank'"),
        ({"measures": []}, ValueError, r"measures is empty; expected one or more of 'effective_rank'"),
        ({"of": "qeury_key"}, ValueError, r"of='qeury_key'.*did you mean 'query_key'"),
        ({"detail": "heads"}, ValueError, r"detail='heads'.*did you mean 'head'"),
        ({"collapse": 0}, ValueError, r"collapse=0 must be a finite number > 0"),
        ({"collapse": float("nan")}, ValueError, r"collapse=nan must be a finite number > 0"),
    ],
)
def test_bad_arguments(how, error, says):
    with pytest.raises(error, match=says):
        Monitor(nn.MultiheadAttention(8, 2), **how)


def test_bad_models_and_optimizers():
    with pytest.raises(ValueError, match="no attention was found in Linear"):
        Monitor(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be the torch\.nn\.Module in training, got str"):
        Monitor("gpt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got Linear"):
        Monitor(nn.MultiheadAttention(8, 2)).attach(nn.Linear(2, 2))  # type: ignore[arg-type]


# ---- the page --------------------------------------------------------------------------------------------

#: But the first, which makes a model.
BLOCKS = [block.code for block in walk.blocks((ROOT / "docs/guides/monitor.md").read_text(encoding="utf-8"))[1:]]


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_blocks_of_the_page_run(block, monkeypatch, tmp_path):
    """With stand-ins for the trackers, which are not dependencies."""
    monkeypatch.chdir(tmp_path)
    received = MagicMock()
    model = _gpt2()
    for module in ("wandb", "trackio", "torch.utils.tensorboard"):
        if module in block:  # transformers asks for the specification of these modules when its Trainer is imported
            monkeypatch.setitem(sys.modules, module, received)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    known: dict[str, Any] = {"rd": rd, "model": model, "optimizer": optimizer, "monitor": Monitor(model)}
    known["train_step"] = lambda *_: None
    if "L." in block:
        known["L"] = needs.package("lightning")
    if "trainer.add" in block:
        needs.package("accelerate")
        known["ids"] = torch.randint(8, (4, 8))
    exec(compile(block, "monitor.md", "exec"), known)
    if "wandb" in block or "trackio" in block or "tensorboard" in block:
        for _ in range(100):
            values = known["monitor"].step()
        name = "rank/query_key/effective_rank"
        call = (
            received.SummaryWriter("runs").add_scalar.call_args_list[1] if "board" in block else received.log.call_args
        )
        assert (name, values[name]) == call.args[:2] or call.args[0][name] == values[name]
        assert "wandb" in block or 100 in (*call.args, *call.kwargs.values())


def test_attention_of_ones_own_alone():
    model = nn.ModuleDict(
        {
            "known": nn.MultiheadAttention(8, 2),
            "own": nn.ModuleDict({name: nn.Linear(8, 8) for name in "abcd"}),
        }
    )
    names = rd.AttentionNames(query="a", key="b", value="c", output="d", qk_norm=False, rotary="none")
    how = {"log": lambda values: None, "names": [names], "num_heads": 2}
    both = rd.Monitor(model, **how).measure()
    assert any(name.startswith("rank/known/") for name in both)
    only = rd.Monitor(model, only=True, **how).measure()
    assert {name.split("/")[1] for name in only if name.count("/") == 3} == {"own"}
