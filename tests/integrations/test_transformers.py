"""The callback of transformers.Trainer: what reaches its reporters and its log history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankdecay as rd
from rankdecay.monitor import Monitor, RankCollapseWarning
from tests import needs

transformers = needs.package("transformers")
needs.package("accelerate")
from rankdecay.integrations.transformers import RankCallback  # noqa: E402

NAME = "rank/query_key/effective_rank"
LAYER = "rank/model.layers.0.self_attn/value_output/stable_rank_min"


class Reporter(transformers.TrainerCallback):
    """As the integrations of TensorBoard, W&B and trackio: among the first, and takes a copy."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append((state.global_step, dict(logs)))


def _trainer(folder: Path, steps: int = 6, **how: Any) -> tuple[Any, Reporter]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    options: dict[str, Any] = {"logging_steps": 4, "save_steps": 4, "report_to": "none", **how}
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, disable_tqdm=True, use_cpu=True, **options
    )
    ids = torch.randint(16, (96, 6))
    data = [{"input_ids": row, "labels": row} for row in ids]
    optimizer = torch.optim.AdamW(rd.param_groups(model, query_key=rd.LowRank(0.1)), lr=1e-2)
    rd.attach(optimizer)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.remove_callback(transformers.PrinterCallback)
    reporter = Reporter()
    trainer.callback_handler.callbacks.insert(1, reporter)  # where report_to puts them
    return trainer, reporter


def _steps(rows: list[tuple[int, dict[str, float]]], name: str) -> list[int]:
    return [step for step, row in rows if name in row]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_reporters_and_history_receive_the_ranks_beside_the_losses(tmp_path, accumulate):
    trainer, reporter = _trainer(tmp_path, gradient_accumulation_steps=accumulate)
    trainer.add_callback(RankCallback(trainer, every=2))
    trainer.train()
    history = [(row["step"], row) for row in trainer.state.log_history]
    for rows in (reporter.rows, history):
        assert _steps(rows, NAME) == _steps(rows, LAYER) == [2, 4, 6]
        assert _steps(rows, "loss") == [4]
    last = Monitor(trainer.model).measure()
    assert all(reporter.rows[-2][1][name] == last[name] for name in last if name != "step")


def test_a_resumed_run_counts_on(tmp_path):
    trainer, _ = _trainer(tmp_path, steps=5)
    trainer.add_callback(RankCallback(trainer, every=3, detail="model"))
    trainer.train()
    again, reporter = _trainer(tmp_path, steps=9)
    again.add_callback(RankCallback(again, every=3, detail="model"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert _steps(reporter.rows, NAME) == [6, 9]
    assert not any("self_attn" in name for _, row in reporter.rows for name in row)


def test_the_other_arguments_are_the_monitors(tmp_path):
    trainer, _ = _trainer(tmp_path, steps=1)
    trainer.add_callback(RankCallback(trainer, every=1, of="query", collapse=100))
    with pytest.warns(RankCollapseWarning, match="query head 0"):
        trainer.train()
    trainer, _ = _trainer(tmp_path)
    trainer.add_callback(RankCallback(trainer, measures="rank"))
    with pytest.raises(ValueError, match="measures='rank' is unknown"):
        trainer.train()


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match=r"trainer must be the transformers\.Trainer to log with, got int"):
        RankCallback(100)
    with pytest.raises(ValueError, match="log is the trainer's here"):
        RankCallback(_trainer(tmp_path)[0], log=print)
