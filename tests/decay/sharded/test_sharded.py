"""Decays of DTensors against those of the same weights in one process, on real processes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import rankdecay as rd
from rankdecay.attention.layer import Window
from rankdecay.decay.groups import hook_keys
from tests.ranks import on_ranks

SHAPES = [(40, 12), (12, 40), (24, 24), (33, 20), (20, 33), (3, 2), (2, 3), (1, 5), (97, 5), (5, 97)]
DECAYS = [
    rd.LowRank(0.8),
    rd.LowRank(0.5, scale="absolute"),
    rd.LowRank(0.8, rule="smooth", smoothing=0.1),
    rd.LowRank(0.3, rule="polar"),
    rd.LowRank(0.3, rule="newton_schulz", lr_coupled=False, scale="absolute"),
    rd.LowRank(0.8, keep=2, preserve_norm=True, warmup=3),
    rd.Frobenius(2.0, power=0, warmup=3),
    rd.Frobenius(0.7),
]


def decayed(weights: list[Any], decay: Any, windows: Any = (), backend: Any = "auto", steps: int = 1) -> list[Any]:
    """The weights after steps of SGD without any gradient."""
    return decayed_together([(weights, decay, windows)], backend, steps)[0]


def decayed_together(groups: list[tuple[list[Any], Any, Any]], backend: Any = "auto", steps: int = 1) -> list[Any]:
    """The same of several groups of one optimizer: weights, their decay, their windows."""
    parameters = [[nn.Parameter(weight) for weight in weights] for weights, _, _ in groups]
    keys = [{"role": "mlp", **hook_keys("mlp", decay, windows)} for _, decay, windows in groups]
    made = [{"params": own, **its} for own, its in zip(parameters, keys, strict=True)]
    optimizer = torch.optim.SGD(made, lr=0.1)
    attachment = rd.attach(optimizer, backend=backend)
    for _ in range(steps):
        for parameter in itertools.chain(*parameters):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    attachment.detach()
    return [[parameter.detach() for parameter in own] for own in parameters]


def cut(weight: Tensor, mesh: Any, placements: Any) -> Any:
    """A weight that every process has, sharded: each keeps its part without asking the others for it."""
    return distribute_tensor(weight.clone(), mesh, placements, src_data_rank=None)


def distance(got: Any, wanted: Tensor, before: Tensor) -> float:
    """Between two steps, as a share of the wanted one; of a DTensor where this process has it, as a share of all."""
    step = (wanted - before).double().norm()
    if isinstance(got, DTensor):
        assert got.shape == wanted.shape
        got, wanted = got.to_local(), cut(wanted, got.device_mesh, got.placements).to_local()
    assert got.shape == wanted.shape
    difference = (got - wanted).double().norm()
    return float(difference / step) if step > 0 else float(difference)


def of_all(parts: list[dict[str, float]]) -> dict[str, float]:
    """Distances of whole weights, from those of the parts; what several processes hold counts several times."""
    assert len({frozenset(part) for part in parts}) == 1
    return {name: math.hypot(*(part[name] for part in parts)) for name in parts[0]}


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- every placement and shape -------------------------------------------------------------------------------


def placements_of(world: int) -> list[tuple[tuple[int, ...], tuple[Any, ...]]]:
    """Meshes and placements: lines of two processes, squares of four."""
    from torch.distributed.tensor import Replicate, Shard

    kinds = (Shard(0), Shard(1), Replicate())
    if world == 2:
        return [((2,), (kind,)) for kind in kinds]
    squares = [((2, 2), pair) for pair in itertools.product(kinds, kinds) if pair != (Replicate(), Replicate())]
    return [((4,), (Shard(0),)), *squares]


def every_placement(world: int) -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh

    before = [draw(shape, seed) for seed, shape in enumerate(SHAPES)]
    by_backend = {"auto": DECAYS, "matmul": [DECAYS[0], DECAYS[2]]}

    def alike(weights: Callable[[Tensor], Any], decays: list[Any], backend: Any) -> list[Any]:
        return decayed_together([([*map(weights, before)], decay, ()) for decay in decays], backend, steps=2)

    alone = dict(zip(map(str, DECAYS), alike(torch.clone, DECAYS, "auto"), strict=True))
    worst: dict[str, float] = {}
    for mesh_shape, placements in placements_of(world):
        mesh = init_device_mesh("cpu", mesh_shape)
        for backend, decays in by_backend.items():
            found = alike(partial(cut, mesh=mesh, placements=placements), decays, backend)
            for decay, news in zip(decays, found, strict=True):
                for shape, new, right, old in zip(SHAPES, news, alone[str(decay)], before, strict=True):
                    assert new.placements == placements
                    worst[f"{mesh_shape} {placements} {shape} {decay} {backend}"] = distance(new, right, old)
    return worst


def allowed(name: str) -> float:
    """Error of a step: the smooth rule by products is a polynomial in one process, which is right to 5e-4."""
    return 1e-3 if "'smooth'" in name and name.endswith("matmul") else 1e-5


@pytest.mark.parametrize("world", [2, 4])
def test_every_placement_and_shape_decays_as_in_one_process(world):
    worst = of_all(on_ranks(world, every_placement, world))
    assert {name: value for name, value in worst.items() if not value < allowed(name)} == {}
    assert len(worst) == len(placements_of(world)) * len(SHAPES) * (len(DECAYS) + 2)


# ---- windows: fused, grouped and transposed matrices, heads ----------------------------------------------------

WINDOWS = {
    "GPT-2, 3 heads of 4": ((12, 36), ["rows[0:12]/36 by 4 transposed", "rows[12:24]/36 by 4 transposed"]),
    "a fused layer with grouped keys": ((28, 20), ["rows[0:20]/28 by 4", "rows[20:24]/28 by 4"]),
    "GPT-NeoX, a group per head": ((36, 12), ["rows[0:4]/12*3 by 4", "rows[4:8]/12*3 by 4"]),
    "keys alone, 1 of 5 heads": ((4, 20), ["rows[0:4]/4 by 4"]),
    "an output, 5 heads of 3": ((14, 15), ["columns[0:15]/15 by 3"]),
    "a transposed output": ((15, 14), ["columns[0:15]/15 by 3 transposed"]),
    "heads that fit four shards": ((32, 10), ["rows[0:32]/32 by 4"]),
}


def every_window(world: int) -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh

    decays = [rd.LowRank(0.8), rd.LowRank(0.8, unit="head"), rd.LowRank(0.5, rule="smooth", unit="head"), DECAYS[-1]]
    decays += [rd.Frobenius(2.0, power=0), rd.Frobenius(0.5, power=2, cap=0.3, unit="head")]
    windows = [[Window.parse(text) for text in texts] for _, texts in WINDOWS.values()]
    before = [[draw(shape, 1), draw(shape, 2)] for shape, _ in WINDOWS.values()]

    def alike(weights: Callable[[Tensor], Any], decay: Any) -> list[Any]:
        together = zip(before, windows, strict=True)
        return decayed_together([([*map(weights, own)], decay, its) for own, its in together])

    alone = [alike(torch.clone, decay) for decay in decays]
    worst: dict[str, float] = {}
    for mesh_shape, placements in placements_of(world):
        mesh = init_device_mesh("cpu", mesh_shape)
        for decay, wanted in zip(decays, alone, strict=True):
            found = alike(partial(cut, mesh=mesh, placements=placements), decay)
            for name, *each in zip(WINDOWS, found, wanted, before, strict=True):
                for n, (new, right, old) in enumerate(zip(*each, strict=True)):
                    worst[f"{mesh_shape} {placements} {name} {decay} {n}"] = distance(new, right, old)
    return worst


@pytest.mark.parametrize("world", [2, 4])
def test_every_window_decays_as_in_one_process(world):
    worst = of_all(on_ranks(world, every_window, world))
    assert {name: value for name, value in worst.items() if not value < 1e-5} == {}
    assert len(worst) == len(placements_of(world)) * len(WINDOWS) * 6 * 2


def collectives(shape: tuple[int, ...], placement: int, text: str | None, unit: Any, power: Any) -> dict[str, int]:
    """What a decay step calls, by name: of a low-rank decay, or of a norm of some power."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))
    weights = [nn.Parameter(distribute_tensor(draw(shape, seed), mesh, [Shard(placement)])) for seed in range(3)]
    decay = rd.LowRank(0.5, unit=unit) if power is None else rd.Frobenius(0.5, power=power, unit=unit)
    keys = hook_keys("mlp", decay, [Window.parse(text)] if text else [])
    optimizer = torch.optim.SGD([{"params": weights, "role": "mlp", **keys}], lr=0.1)
    rd.attach(optimizer)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    with CommDebugMode() as seen:
        optimizer.step()
    return {str(name).rpartition(".")[2]: count for name, count in seen.get_comm_counts().items()}


@pytest.mark.parametrize(
    ("shape", "placement", "window", "unit", "power", "wanted"),
    [
        ((96, 12), 0, None, "matrix", None, {"_reduce_scatter_base_": 1, "_allgather_base_": 1}),
        ((12, 96), 1, None, "matrix", None, {"_reduce_scatter_base_": 1, "_allgather_base_": 1}),
        ((24, 24), 0, None, "matrix", None, {"alltoall_base_": 2}),
        ((12, 96), 0, None, "matrix", None, {"alltoall_base_": 2}),
        ((16, 20), 0, "rows[0:16]/16 by 4", "head", None, {}),
        ((12, 20), 0, "rows[0:12]/12 by 4", "head", None, {"alltoall_base_": 2}),
        ((24, 24), 0, None, "matrix", 1, {}),
        ((24, 24), 1, None, "matrix", 0, {"allreduce_": 1}),
        ((12, 20), 0, "rows[0:12]/12 by 4", "head", 2, {"allreduce_": 1}),
    ],
)
def test_long_sides_are_summed_whole_heads_are_local_and_the_rest_is_dealt_all_in_one_bucket(
    shape, placement, window, unit, power, wanted
):
    for seen in on_ranks(2, collectives, shape, placement, window, unit, power):
        assert seen == wanted


# ---- other layouts and states ----------------------------------------------------------------------------------


def odd_ones() -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, float] = {}
    for dim in (0, 1, 2):  # experts, their rows, their columns
        old = draw((5, 12, 7), 3)
        [wanted] = decayed([old.clone()], DECAYS[0])
        [new] = decayed([distribute_tensor(old.clone(), mesh, [Shard(dim)])], DECAYS[0])
        found[f"experts {dim}"] = distance(new.full_tensor(), wanted, old)
    old = draw((40, 12), 4).double()
    for decay in DECAYS:
        [wanted] = decayed([old.clone()], decay)
        [new] = decayed([distribute_tensor(old.clone(), mesh, [Shard(0)])], decay)
        found[f"float64 {decay}"] = distance(new.full_tensor(), wanted, old)
    bad, good = draw((40, 12), 5), draw((40, 12), 6)
    bad[33, 3] = torch.nan
    news = decayed([distribute_tensor(w.clone(), mesh, [Shard(0)]) for w in (bad, good)], DECAYS[0])
    whole = [new.full_tensor() for new in news]
    assert whole[0].isnan().all()
    found["beside a NaN"] = distance(whole[1], decayed([good.clone()], DECAYS[0])[0], good)
    zero = torch.zeros(6, 4)
    assert not decayed([distribute_tensor(zero, mesh, [Shard(0)])], DECAYS[0])[0].full_tensor().any()
    return found


def test_experts_float64_a_nan_and_zeros():
    for found in on_ranks(2, odd_ones):
        assert {name: value for name, value in found.items() if not value < 1e-5} == {}


def experts_of_both_kinds() -> list[float]:
    """Stacks of matrices whose experts lie in one dimension of the mesh and whose rows or columns in the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2, 2))
    found = []
    for shape, dim in itertools.product([(5, 12, 7), (1, 7, 12), (4, 97, 3)], (1, 2)):
        old = draw(shape, 3)
        [wanted] = decayed([old.clone()], DECAYS[0])
        [new] = decayed([distribute_tensor(old.clone(), mesh, [Shard(0), Shard(dim)])], DECAYS[0])
        found.append(distance(new.full_tensor(), wanted, old))
    return found


def test_experts_that_are_cut_themselves():
    for found in on_ranks(4, experts_of_both_kinds):
        assert max(found) < 1e-5


def half() -> tuple[Tensor, Tensor, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    old = draw((512, 64), 7).bfloat16()
    steps = 40
    cut = distribute_tensor(old.clone(), init_device_mesh("cpu", (2,)), [Shard(0)])
    copied = distribute_tensor(old.clone(), init_device_mesh("cpu", (2,)), [Replicate()])
    decay = rd.LowRank(0.002)
    cut, copied = (decayed([w], decay, steps=steps)[0] for w in (cut, copied))
    return old, cut.full_tensor(), copied.to_local()


def test_16_bit_shards_round_without_bias_and_copies_alike():
    first, second = on_ranks(2, half)
    old, cut, _ = first
    assert torch.equal(first[2], second[2])
    [exact] = decayed([old.float()], rd.LowRank(0.002), steps=40)
    moved = (cut.float() - exact).mean() / (old.float() - exact).abs().mean()
    assert abs(moved) < 0.05
    upper, lower = (cut - old).chunk(2)
    assert not torch.equal(upper == 0, lower == 0)  # noise of their own


def strided() -> list[float]:
    """FSDP2 over tensor parallelism: the rows of a shard are not neighbours."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = []
    for unit, (first, second) in itertools.product(("matrix", "head"), [(33, 20), (20, 33), (32, 8), (97, 5)]):
        net = nn.Sequential(nn.Linear(second, first, bias=False), nn.Linear(first, second, bias=False))
        olds = [draw(tuple(p.shape), seed) for seed, p in enumerate(net.parameters())]
        for parameter, old in zip(net.parameters(), olds, strict=True):
            parameter.data.copy_(old)
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(net, mesh=mesh["dp"])
        assert "Strided" in str(net[0].weight.placements)
        for parameter, old in zip(net.parameters(), olds, strict=True):
            windows = [Window.parse(f"rows[0:{old.shape[0]}]/{old.shape[0]} by {1 if old.shape[0] % 4 else 4}")]
            decay = rd.LowRank(0.6, unit=unit)
            [wanted] = decayed([old.clone()], decay, windows)
            keys = hook_keys("mlp", decay, windows)
            optimizer = torch.optim.SGD([{"params": [parameter], "role": "mlp", **keys}], lr=0.1)
            rd.attach(optimizer)
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            found.append(distance(parameter.full_tensor().detach(), wanted, old))
    return found


def test_fsdp2_over_tensor_parallelism():
    for found in on_ranks(4, strided):
        assert max(found) < 1e-5


# ---- what is refused -------------------------------------------------------------------------------------------


def partial_sums() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(DTensor.from_local(draw((6, 4), 0), mesh, [Partial()]))
    optimizer = torch.optim.SGD(
        [{"params": [weight], "param_names": ["up"], "role": "mlp", **hook_keys("mlp", rd.LowRank(0.1))}], lr=0.1
    )
    with pytest.raises(ValueError, match=r"up \(mlp\) has the placement .*Shard\(0\)") as caught:
        rd.attach(optimizer)
    return str(caught.value)


def test_partial_sums_are_refused_by_name():
    assert len(on_ranks(2, partial_sums)) == 2


def sharded_too_late() -> str:
    from torch.distributed.fsdp import fully_shard

    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    optimizer = torch.optim.SGD(rd.param_groups(model, query_key=rd.LowRank(0.1)), lr=0.1)
    rd.attach(optimizer)
    fully_shard(model)
    model(torch.randn(2, 3, 8)).sum().backward()
    with pytest.warns(UserWarning, match="call fully_shard or parallelize_module first") as caught:
        optimizer.step()
    optimizer.step()
    return str(len([one for one in caught if "first step" in str(one.message)]))


def test_an_optimizer_that_was_built_before_sharding_is_told_once():
    assert on_ranks(2, sharded_too_late) == ["1", "1"]


def shared_out(decays: dict[str, Any]) -> bool:
    """Whether a step that the processes share out is that of one, before and after a state was saved and loaded."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    models, optimizers = [], []
    for made in (ZeroRedundancyOptimizer, None):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model.embedding = nn.Embedding(7, 8)
        of = {"lr": 0.1, "weight_decay": 0.3}
        parameters = model.parameters()
        optimizer = made(parameters, torch.optim.AdamW, **of) if made else torch.optim.AdamW(parameters, **of)
        words = rd.attach(optimizer, model, **decays).describe()
        assert "attach the role to" not in words
        models.append(model)
        optimizers.append(optimizer)
    shared: Any = optimizers[0]
    for step in range(8):
        if step == 4:
            shared.consolidate_state_dict()
            state = [shared.state_dict() if torch.distributed.get_rank() == 0 else None]
            torch.distributed.broadcast_object_list(state)
            shared.load_state_dict(state[0])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            ids = torch.arange(6).view(2, 3) + step % 2
            model(model.embedding(ids)).square().mean().backward()
            optimizer.step()
    return all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize("decays", [{"embedding": rd.Frobenius(0.5)}, {"query_key": rd.LowRank(2.0, every=3)}])
def test_a_role_that_one_process_steps_for_all(decays: dict[str, Any]):
    """ZeroRedundancyOptimizer: in the others, the optimizer inside has none of it."""
    assert on_ranks(2, shared_out, decays) == [True, True]


def flattened(decays: dict[str, Any], use_orig_params: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    try:
        rd.attach(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, **decays)
    except ValueError as error:
        return str(error)
    return "attached"


@pytest.mark.filterwarnings("ignore")
def test_what_fsdp1_has_flattened_has_no_norm_and_no_matrix():
    """A process may hold any part of a vector, and decay it alone by power 1 only."""
    for decays, original, words in [
        ({"norm": rd.Frobenius(0.5, power=0)}, True, "needs the norm of all of .*1.weight, and FSDP1 leaves any part"),
        ({"other": rd.Frobenius(0.5, power=2)}, False, "needs the norm of all of .*_flat_param, and FSDP1 leaves any"),
        ({"default": rd.Frobenius(0.5)}, True, "default= is the decay of matrices.* flattened, as .* FSDP1 do"),
        ({"norm": rd.Frobenius(0.5)}, True, "attached"),
    ]:
        for told in on_ranks(2, flattened, decays, original):
            assert re.search(words, told), told
