"""Processes that do not have the same decay, on real processes."""

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.decay.groups import hook_keys
from tests.ranks import on_ranks


def disagreement(sharded: bool, kind: str) -> str:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from rankdecay.decay import agreement

    first = dist.get_rank() == 0
    names, strength, backend = ["a", "b"], 0.1, "auto"
    if not first and kind == "strength":
        strength = 0.2
    if not first and kind == "order":
        names = names[::-1]
    if not first and kind == "backend":
        backend = "matmul"
    if kind == "absent":
        agreement.WAIT = 2.0
        if not first:
            return ""
    shape = {"a": (8, 4), "b": (6, 4)}
    mesh = init_device_mesh("cpu", (2,)) if kind != "absent" else None
    weights = [torch.randn(shape[name]) for name in sorted(names)]
    if sharded:
        weights = [distribute_tensor(weight, mesh, [Shard(0)]) for weight in weights]
    by_name = dict(zip(sorted(names), map(nn.Parameter, weights), strict=True))
    group = {
        "params": [by_name[name] for name in names],
        "param_names": names,
        "role": "mlp",
        **hook_keys("mlp", rd.LowRank(strength)),
    }
    with pytest.raises((ValueError, RuntimeError)) as caught:
        rd.attach(torch.optim.SGD([group], lr=0.1), backend=backend)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sharded", "kind", "words"),
    [
        (True, "strength", "mlp_strength is 0.1 on rank 0 and 0.2 on rank 1"),
        (False, "strength", "mlp_strength is 0.1 on rank 0 and 0.2 on rank 1"),
        (True, "order", r"sharded parameter 0 is a (8, 4) torch.float32 (Shard(dim=0),) for mlp on rank 0 and b"),
        (True, "backend", "the backend is auto on rank 0 and matmul on rank 1"),
    ],
)
def test_processes_that_disagree_all_fail_alike(sharded, kind, words):
    one, other = on_ranks(2, disagreement, sharded, kind)
    assert one == other
    assert words in one
    assert "rankdecay.param_groups the same arguments on every rank" in one


def test_a_process_that_never_attaches_is_named():
    said, _ = on_ranks(2, disagreement, False, "absent")
    assert "rankdecay.attach was not called on rank 1 within 2 s" in said


def other_orders_without_shards() -> str:
    """Stages of a pipeline hold different parameters."""
    import torch.distributed as dist

    weight = nn.Parameter(torch.randn(4 + dist.get_rank(), 3))
    keys = hook_keys("mlp", rd.LowRank(0.1))
    name = f"layer{dist.get_rank()}"
    return repr(
        rd.attach(torch.optim.SGD([{"params": [weight], "param_names": [name], "role": "mlp", **keys}], lr=0.1)).active
    )


def test_stages_of_a_pipeline_agree_by_role():
    assert on_ranks(2, other_orders_without_shards) == ["True", "True"]
