"""What the benchmark of sharded decays counts, against formulas, on processes that do not exist."""

import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rankdecay.linalg import shrink
from tests import needs
from tests.ranks import on_ranks

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # where benchmarks find each other
PATH = Path(__file__).parents[1] / "benchmarks" / "sharded.py"


def load():
    spec = importlib.util.spec_from_file_location("benchmark_sharded", PATH)
    module = sys.modules["benchmark_sharded"] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    module.MODELS["tiny"] = (64, 2, 8, 2, 32, 10)  # W_Q 64 × 64, W_K 16 × 64, heads of 8
    return module


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmark_sharded", None)
    return load()


def counted(benchmark, shards, unit, replicas=1):
    needs.package("transformers")
    with torch.device("meta"):
        model = benchmark.llama("tiny")
    with benchmark.fake_ranks(replicas * shards):
        return benchmark.dry_run(model, replicas, shards, unit)


def products(*shape):
    """Operations of a decay of one matrix in one place, by products."""
    with FlopCounterMode(display=False) as counter:
        shrink(torch.ones(1, *shape), torch.ones(1), backend="matmul")
    return counter.get_total_flops()


#: Half of a W_Q and half of a W_K: to the owner of the other pair, and back to the other process of one's own.
DEALT = 2 * (32 * 64 + 8 * 64) * 4


@pytest.mark.parametrize("replicas", [1, 3])
def test_matrices_are_dealt_one_of_each_kind_to_each_of_two(benchmark, replicas):
    traffic, operations = counted(benchmark, 2, "matrix", replicas)
    assert traffic.sent == {"all-to-all": DEALT}
    assert traffic.calls == 4
    assert traffic.buffer == 64 * 64 * 4
    assert operations == products(64, 64) + products(16, 64)


def test_heads_that_are_whole_in_a_shard_send_nothing_and_cut_ones_are_dealt(benchmark):
    assert counted(benchmark, 2, "head")[0].sent == {}
    traffic, _ = counted(benchmark, 4, "head")  # the two heads of W_K are cut, the eight of W_Q are not
    # of its halves of two heads one stays and one goes to its owner; of the head it owns the other half goes back
    assert traffic.sent == {"all-to-all": 2 * 4 * 64 * 4}


def test_one_process_sends_nothing(benchmark):
    assert counted(benchmark, 1, "matrix")[0].sent == {}


def rows_of(*layouts):
    module = load()
    rows = [row for layout in layouts for row in module.measure("tiny", layout, 2, "cpu", 1)]
    return [(asdict(row), module.line(row)) for row in rows]


def test_real_processes_send_what_is_counted(benchmark):
    needs.package("transformers")
    for rows in on_ranks(2, rows_of, "FSDP2", "TP"):
        for row, line in rows:
            whole = row["unit"] == "matrix"
            assert row["sent"] == ({"all-to-all": DEALT} if whole else {})
            assert row["loopback"] is None or row["loopback"] >= sum(row["sent"].values())
            assert row["decay_ms"] > 0 < row["adamw_ms"]
            assert line.count("|") == benchmark.HEADER.splitlines()[1].count("|")


def test_a_row_on_paper(benchmark):
    needs.package("transformers")
    row = benchmark.paper_rows("tiny", 2, 4)[0]
    assert row.gpus == 8
    assert row.decay_s == pytest.approx(row.of_that_communication_s + row.operations / 30e12)
    assert row.of_that_communication_s == pytest.approx(sum(row.sent.values()) / 450e9)  # shards in one node
    assert benchmark.line(row).count("|") == benchmark.PAPER_HEADER.splitlines()[1].count("|")
