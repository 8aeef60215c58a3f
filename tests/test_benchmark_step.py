"""The decay benchmark's own reference and table, on a stack that takes no time."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from rankdecay.linalg import shrink

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # where benchmarks find each other
PATH = Path(__file__).parents[1] / "benchmarks" / "step.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_step", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_step", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LEAST", 0.0)
    return module


@pytest.mark.parametrize("rule", ["prox", "smooth", "polar", "newton_schulz"])
def test_the_reference_is_the_rule(benchmark, rule):
    W = torch.randn(3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tau = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    taken = benchmark.reference(W, tau)[rule]
    torch.testing.assert_close(W - taken, shrink(W, tau, rule), rtol=0, atol=1e-12)


def test_a_stack_has_a_row_for_every_rule_and_backend_and_for_what_they_are_compared_with(benchmark):
    arguments = argparse.Namespace(device="cpu", full=False, rounds=1, peer=None, patience=benchmark.PATIENCE)
    rows = {
        row.what: row for row in benchmark.stack_rows("2x16", ["prox", "smooth", "polar", "newton_schulz"], arguments)
    }
    names = ["prox", "smooth", "polar"]
    decays = [f"{name}, {backend}" for name in names for backend in ("exact", "matmul")] + ["newton_schulz, matmul"]
    assert set(decays) | {"torch.linalg.svd", "AdamW.step", "Muon.step"} < set(rows)
    for name in decays:
        row = rows[name]
        assert row.ran == name.split(", ")[1]
        assert row.every[4] == pytest.approx(row.ms / 4)
        assert row.weight_error < 1e-6
        assert row.step_error < 0.05  # "matmul" is exact to 3e-7 of the norm, and τ is 7e-6 of it
        assert (row.ceiling is None) == (row.ran == "exact")
        assert benchmark.line(row)
    assert rows["AdamW.step"].step_error is None


def test_a_part_of_a_large_case_is_labelled_as_one(benchmark, monkeypatch):
    monkeypatch.setitem(benchmark.ON_CPU, "6x16", ("prox",))
    arguments = argparse.Namespace(device="cpu", full=False, rounds=1, peer=None, patience=benchmark.PATIENCE)
    rows = benchmark.stack_rows("6x16", ["prox", "smooth", "polar", "newton_schulz"], arguments)
    assert {row.measured for row in rows} == {"1 of 6"}
    assert not any("polar" in row.what for row in rows)
    arguments.full = True
    assert {row.measured for row in benchmark.stack_rows("6x16", ["prox"], arguments)} == {"6"}


def test_a_slow_variant_is_timed_once_and_a_quick_one_without_its_first_round(benchmark):
    runs = {"slow": iter([70.0]), "stalled once": iter([50.0, 1.0, 1.0, 1.0]), "quick": iter([0.5, 0.1, 0.1, 0.1])}
    seconds = benchmark.interleaved({name: lambda run=run: next(run) for name, run in runs.items()}, 3)
    assert seconds == {"slow": [70.0], "stalled once": [1.0, 1.0, 1.0], "quick": [0.1, 0.1, 0.1]}


def test_a_missing_dependency_of_the_prototype_is_named(benchmark, tmp_path, monkeypatch):
    (tmp_path / "experiment.py").write_text("import a_module_nobody_has\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="no module named a_module_nobody_has"):
        benchmark.peer(str(tmp_path))
