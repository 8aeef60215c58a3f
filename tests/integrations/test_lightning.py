"""The callback of Lightning: what reaches its loggers, counted in optimizer steps."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankdecay.monitor import Monitor, RankCollapseWarning
from tests import needs

L = needs.package("lightning")
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from rankdecay.integrations.lightning import RankCallback  # noqa: E402

pytestmark = [
    # Lightning 2.6 with torch 2.13, and about a loader without workers.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

NAME = "rank/query_key/effective_rank"


class Task(L.LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.count = optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.attention(batch, batch, batch)[0].square().sum()
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        made = [torch.optim.SGD(self.parameters(), lr=1e-3) for _ in range(self.count)]
        return made if self.count > 1 else made[0]


def _trainer(folder: Path, callback: RankCallback, steps: int, **how: Any) -> Any:
    options = {
        "logger": CSVLogger(str(folder), version=0),
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        **how,
    }
    return L.Trainer(
        max_steps=steps, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", **options,
    )  # fmt: skip


def _loader(batches: int = 12) -> Any:
    return torch.utils.data.DataLoader(torch.randn(2 * batches, 3, 8), batch_size=2)


def _rows(folder: Path) -> dict[int, dict[str, str]]:
    with open(folder / "lightning_logs" / "version_0" / "metrics.csv", encoding="utf-8") as file:
        return {int(row["step"]): row for row in csv.DictReader(file) if row[NAME]}


@pytest.mark.parametrize(
    "how", [{}, {"accumulate_grad_batches": 2}, {"log_every_n_steps": 7}, {"precision": "bf16-true"}]
)
def test_the_loggers_receive_the_ranks_every_k_optimizer_steps(tmp_path, how):
    task = Task()
    _trainer(tmp_path, RankCallback(every=3), 6, **how).fit(task, _loader())
    rows = _rows(tmp_path)
    assert list(rows) == [3, 6]
    for name, value in Monitor(task).measure().items():
        assert name == "step" or float(rows[6][name]) == pytest.approx(value, rel=1e-6)
    assert "rank/attention/value_output/stable_rank_min" in rows[6]


def test_two_optimizers_count_twice(tmp_path):
    _trainer(tmp_path, RankCallback(every=3), 12).fit(Task(optimizers=2), _loader())
    assert list(_rows(tmp_path)) == [4, 6, 10, 12]  # two steps at a time: a multiple of 3 has been passed


def test_a_resumed_run_counts_on(tmp_path):
    trainer = _trainer(tmp_path / "first", RankCallback(every=4), 6)
    trainer.fit(Task(), _loader(6))
    trainer.save_checkpoint(tmp_path / "at_6.ckpt")
    again = _trainer(tmp_path / "second", RankCallback(every=4), 9)
    again.fit(Task(), _loader(6), ckpt_path=str(tmp_path / "at_6.ckpt"))
    assert list(_rows(tmp_path / "second")) == [8]


def test_the_other_arguments_are_the_monitors(tmp_path):
    with pytest.warns(RankCollapseWarning, match="query head 0"):
        _trainer(tmp_path, RankCallback(every=1, of=("query_key", "query"), collapse=100), 1).fit(Task(), _loader())
    assert "rank/query/effective_rank" in _rows(tmp_path)[1]
    with pytest.raises(ValueError, match="measures='rank' is unknown"):
        _trainer(tmp_path / "second", RankCallback(measures="rank"), 1).fit(Task(), _loader())


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="log is the trainer's loggers here"):
        RankCallback(log=print)
    with pytest.raises(ValueError, match="nowhere to log"):
        _trainer(tmp_path, RankCallback(), 1, logger=False).fit(Task(), _loader())
