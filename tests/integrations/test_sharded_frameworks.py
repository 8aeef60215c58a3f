"""FSDP2 and DDP as frameworks switch them on: two processes stop in the middle of a cycle and go on as one alone.

Accelerate, and so Trainer, shard on accelerators only, and on a CPU replicate without a word. Here Accelerate is told
that the CPU is one; all else is theirs. Lightning shards on any device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

import rankdecay as rd
from tests import needs
from tests.ranks import on_ranks

needs.package("transformers")
needs.package("accelerate")

SAVED, STEPS = 4, 7  # every=3: the cycle is at 1 of 3 when it is saved
IDS = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(1))  # each step takes all, half in each process


def make_model() -> Any:
    """In float64: Adam makes whole steps of rounding errors where gradients are 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).double()


def make_optimizer(model: nn.Module) -> AdamW:
    return AdamW(rd.param_groups(model, rd.Frobenius(0.1), query_key=rd.LowRank(1.0, every=3, warmup=5)), lr=1e-2)


def alone() -> dict[str, Any]:
    """The weights that one process arrives at, and the ranks it has seen."""
    model = make_model()
    optimizer = make_optimizer(model)
    rd.attach(optimizer)
    logged: list[dict[str, float]] = []
    rd.Monitor(model, every=2, log=logged.append, detail="model").attach(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return outcome(model, logged)


def outcome(model: nn.Module, logged: list[dict[str, float]], sharded: bool = False) -> dict[str, Any]:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert all(hasattr(weight, "full_tensor") == sharded for weight in weights.values())
    whole = {name: weight.full_tensor() if sharded else weight for name, weight in weights.items()}
    return {"weights": {name: weight.numpy() for name, weight in whole.items()}, "logged": logged}


def shard_on_the_cpu() -> None:
    """In this process, which ends with the test."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # pyright: ignore


# ---- Accelerate ------------------------------------------------------------------------------------------


def with_accelerate(folder: str) -> dict[str, Any]:
    """The decay attached before `prepare` swaps the optimizer's parameters; after it, when the run goes on."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert Accelerator(cpu=True, fsdp_plugin=plugin).distributed_type == DistributedType.MULTI_CPU  # not sharded
    AcceleratorState._reset_state(reset_partial_state=True)
    shard_on_the_cpu()
    logged: list[dict[str, float]] = []
    for start, stop in ((0, SAVED), (SAVED, STEPS)):
        accelerator = Accelerator(fsdp_plugin=plugin)
        model = make_model()
        optimizer = make_optimizer(model)
        if start == 0:
            rd.attach(optimizer)
        model, wrapped = accelerator.prepare(model, optimizer)
        if start > 0:
            rd.attach(wrapped)
            accelerator.load_state(folder)
        monitor = rd.Monitor(model, every=2, log=logged.append, detail="model")
        monitor.steps = start
        for _ in range(start, stop):
            mine = IDS[accelerator.process_index :: 2]
            accelerator.backward(model(input_ids=mine, labels=mine).loss)
            wrapped.step()
            wrapped.zero_grad()
            monitor.step()
        if start == 0:
            accelerator.save_state(folder)
            accelerator.free_memory()
    return outcome(model, logged, sharded=True)


# ---- Trainer ---------------------------------------------------------------------------------------------


def with_trainer(folder: str) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from rankdecay.integrations.transformers import RankCallback

    class LowRankTrainer(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = make_optimizer(self.model)
                rd.attach(self.optimizer)
            return self.optimizer

        def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
            if any(name.startswith("rank/") for name in logs):
                logged.append({"step": self.state.global_step, **logs})
            super().log(logs, start_time)

    shard_on_the_cpu()
    logged: list[dict[str, float]] = []
    data = [{"input_ids": row, "labels": row} for row in IDS]
    how: dict[str, Any] = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_steps": SAVED, "fsdp": True}
    how |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    model = make_model()
    with pytest.raises(RuntimeError, match="Passing `optimizers` is not allowed if PyTorch FSDP is enabled"):
        Trainer(model, TrainingArguments(folder, **how), optimizers=(make_optimizer(model), None))
    for stop in (SAVED, STEPS):
        arguments = TrainingArguments(folder, max_steps=stop, per_device_train_batch_size=2, **how)
        trainer = LowRankTrainer(make_model(), arguments, train_dataset=data)
        trainer.add_callback(RankCallback(trainer, every=2, detail="model"))
        trainer.train(resume_from_checkpoint=stop > SAVED)
    return outcome(trainer.model, logged, sharded=True)


def with_settings(folder: str, state_dict_type: str | None, **way: Any) -> dict[str, Any]:
    """The optimizer that Trainer makes, with a decay by role; replicated without a type of sharded states."""
    from transformers import Trainer, TrainingArguments

    how: dict[str, Any] = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_steps": SAVED}
    how |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-2}
    how |= {"per_device_train_batch_size": 2}
    if state_dict_type is None:
        how["use_cpu"] = True
    else:
        shard_on_the_cpu()
        how |= {"fsdp": True, "fsdp_config": {"state_dict_type": state_dict_type}}
    data = [{"input_ids": row, "labels": row} for row in IDS]
    for stop in (SAVED, STEPS):
        arguments = TrainingArguments(folder, max_steps=stop, **how)
        trainer = Trainer(make_model(), arguments, train_dataset=data, **way)
        trainer.train(resume_from_checkpoint=stop > SAVED)
    assert trainer.accelerator.num_processes == 2
    return outcome(trainer.model, [], sharded=state_dict_type is not None)


SETTINGS = "default=Frobenius:0.1,query_key=LowRank:1.0:every=3:warmup=5"


def with_callback(folder: str, state_dict_type: str | None = "SHARDED_STATE_DICT") -> dict[str, Any]:
    from rankdecay.integrations.transformers import RankDecay

    return with_settings(folder, state_dict_type, callbacks=[RankDecay(SETTINGS)])


def with_callback_and_one_file(folder: str) -> dict[str, Any]:
    return with_callback(folder, "FULL_STATE_DICT")


def with_factory(folder: str, state_dict_type: str = "SHARDED_STATE_DICT") -> dict[str, Any]:
    from rankdecay.integrations.transformers import decaying

    made = decaying(AdamW, {"lr": 1e-2}, SETTINGS)
    return with_settings(folder, state_dict_type, optimizer_cls_and_kwargs=made)


def with_factory_and_one_file(folder: str) -> dict[str, Any]:
    return with_factory(folder, "FULL_STATE_DICT")


def with_callback_and_replicas(folder: str) -> dict[str, Any]:
    return with_callback(folder, None)


BY_ROLES = [
    with_callback,
    with_callback_and_replicas,
    with_callback_and_one_file,
    with_factory,
    with_factory_and_one_file,
]

# ---- Lightning -------------------------------------------------------------------------------------------


def with_lightning_callback(folder: str) -> dict[str, Any]:
    """The callback attaches, under an optimizer which the module makes without a thought of decays."""
    return with_lightning(folder, by_callback=True)


def with_lightning(folder: str, by_callback: bool = False) -> dict[str, Any]:
    import lightning as L
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from rankdecay.integrations.lightning import RankCallback, RankDecay

    class Recorder(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            if any(name.startswith("rank/") for name in metrics):
                logged.append({"step": step, **metrics})

    class Module(L.LightningModule):
        def configure_model(self) -> None:
            self.model = make_model()
            for part in (*self.model.model.layers, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, batch_index: int) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            if by_callback:
                return AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)
            optimizer = make_optimizer(self.model)
            rd.attach(optimizer)
            return optimizer

    logged: list[dict[str, float]] = []
    module = Module()
    for stop in (SAVED, STEPS):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": Recorder()}
        callbacks: list[Any] = [RankCallback(every=2, detail="model")]
        if by_callback:
            callbacks.append(RankDecay(default=rd.Frobenius(0.1), query_key=rd.LowRank(1.0, every=3, warmup=5)))
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_steps=stop, callbacks=callbacks, **quiet
        )
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(IDS, batch_size=2), ckpt_path=folder if stop > SAVED else None)
        if stop == SAVED:
            trainer.save_checkpoint(folder)
    return outcome(module.model, logged, sharded=True)


#: Of callback or factory, shards or one file: the others have each of them once.
SLOW = (with_callback_and_one_file, with_factory)


@pytest.mark.parametrize(
    "framework",
    [
        pytest.param(framework, marks=pytest.mark.slow if framework in SLOW else ())
        for framework in (with_accelerate, with_trainer, with_lightning, with_lightning_callback, *BY_ROLES)
    ],
)
def test_two_processes_arrive_where_one_does(framework: Callable[[str], Any], tmp_path: Path) -> None:
    if framework in (with_lightning, with_lightning_callback):
        needs.package("lightning")
    first, other = on_ranks(2, framework, str(tmp_path / "saved"))
    expected = alone()
    for its in (first, other):
        for name, weight in expected["weights"].items():
            np.testing.assert_allclose(its["weights"][name], weight, rtol=1e-5, atol=1e-8, err_msg=name)
    assert other["logged"] == []
    for values, those in zip(first["logged"], expected["logged"] if framework not in BY_ROLES else [], strict=True):
        assert values == pytest.approx(those, rel=1e-5)
