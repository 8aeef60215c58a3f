"""Every example runs, lowers the rank of W_Q and W_K, and goes on from its checkpoints as if never interrupted.

Each takes 60 steps of the optimizer, decays every third, and saves after 40, in the middle of a cycle.
"""

import importlib.util
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import rankdecay as rd
from rankdecay.decay.targets import STATE_KEY
from tests import needs

needs.package("transformers")

pytestmark = [
    # Lightning 2.6 with torch 2.13; and a resumed run writes to a folder of its own here.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]

FOLDER = Path(__file__).parents[2] / "examples"
STEPS = 60


@dataclass
class Example:
    needs: list[str]
    checkpoint: str  # where it is after so many steps
    counts: Callable[[Path], tuple[int, float]]  # in a checkpoint, as anyone may load it: steps, and what is pending
    tables: int = 2  # of ranks, that it prints


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def in_optimizer(state: dict[str, Any]) -> tuple[int, float]:
    """Return the counts of W_Q and W_K in an optimizer's groups or states; where there are several, they are alike."""
    places = [*state["param_groups"], *(entry.get(STATE_KEY, {}) for entry in state["state"].values())]
    [counts] = {(g["query_key_steps"], g["query_key_pending"]) for g in places if "query_key_steps" in g}
    return counts


def in_callback(state: dict[str, Any]) -> tuple[int, float]:
    counts = state["callbacks"]["RankDecay"]["counts"]
    [steps], [pending] = ({n for name, n in counts.items() if name.endswith(kind)} for kind in ("steps", "pending"))
    return steps, pending


EXAMPLES = {
    "plain_loop": Example([], "step_{}.pt", lambda path: in_optimizer(load(path)["optimizer"])),
    "hf_trainer": Example(
        ["accelerate"], "checkpoint-{}", lambda path: in_optimizer(load(path / "optimizer.pt")), tables=1
    ),
    "accelerate_loop": Example(["accelerate"], "step_{}", lambda path: in_optimizer(load(path / "optimizer.bin"))),
    "lightning_module": Example(["lightning"], "*-step={}.ckpt", lambda path: in_callback(load(path))),
}


@dataclass
class Run:
    model: nn.Module
    optimizer: Optimizer
    steps: int  # of the optimizer, in this run
    folder: Path

    def checkpoint(self, name: str, step: int) -> Path:
        [path] = self.folder.glob(EXAMPLES[name].checkpoint.format(step))
        return path

    def counts(self, name: str, step: int) -> tuple[int, float]:
        return EXAMPLES[name].counts(self.checkpoint(name, step))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Runs an example's main in this process; the same arguments give the same run."""
    steps = 0
    done: dict[object, Run] = {}

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    def run(name: str, **settings: Any) -> Run:
        nonlocal steps
        for module in EXAMPLES[name].needs:
            needs.package(module)
        key = (name, *settings.items())
        if key not in done:
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(len(done))  # what a run draws must not be what the one before has left over
            folder = tmp_path_factory.mktemp(name)
            steps = 0
            model, optimizer = example(name).main(directory=str(folder), **settings)
            done[key] = Run(model, optimizer, steps, folder)
        return done[key]

    handle = register_optimizer_step_post_hook(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets it; here it is put back
        yield run
    handle.remove()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ranks(model: nn.Module) -> torch.Tensor:
    """Numerical rank over the largest there can be, of every W_Q and W_K."""
    matrices = [view.tensor() for layer in rd.find_attention(model) for view in (layer.query, layer.key)]
    return torch.tensor([float(rd.spectrum(m).numerical_rank()) / min(m.shape) for m in matrices])


@pytest.mark.parametrize("name", EXAMPLES)
def test_lowers_the_rank_once_per_step(name: str, run: Callable[..., Run]) -> None:
    decayed, without = run(name), run(name, strength=0.0)
    assert len(ranks(without.model)) == 4
    assert (ranks(without.model) == 1).all()
    assert (ranks(decayed.model) < 0.7).all()
    for one in (decayed, without):
        assert one.steps == STEPS
        assert one.counts(name, STEPS)[0] == STEPS


@pytest.mark.parametrize("name", EXAMPLES)
def test_learns_the_task_all_the_same(name: str, run: Callable[..., Run]) -> None:
    sequences = torch.randint(32, (64, 3), generator=torch.Generator().manual_seed(12345)).repeat(1, 5)
    model = run(name).model.eval()
    with torch.no_grad():
        logits = model(sequences).logits[:, 3:-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 4:].flatten())
    assert loss < 2.7  # log 32 = 3.5 before


@pytest.mark.parametrize("name", EXAMPLES)
def test_resumes_to_the_last_bit(name: str, run: Callable[..., Run]) -> None:
    step, whole = 40, run(name)
    checkpoint = whole.checkpoint(name, step)
    steps, pending = whole.counts(name, step)
    assert steps == step
    assert pending > 0
    resumed = run(name, resume=str(checkpoint))
    assert resumed.steps == STEPS - step
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert resumed.optimizer.state_dict()["param_groups"] == whole.optimizer.state_dict()["param_groups"]
    assert resumed.counts(name, STEPS) == whole.counts(name, STEPS)


def test_there_is_no_other_example() -> None:
    others = {"compress_decayed", "compress_pretrained"}  # test_compress_examples.py
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES) | others


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs_as_a_script(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """In this process: a new one would spend its time on importing transformers again."""
    for module in EXAMPLES[name].needs:
        needs.package(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.count("numerical rank") == EXAMPLES[name].tables
    assert list((tmp_path / "runs" / name).glob(EXAMPLES[name].checkpoint.format(40)))
