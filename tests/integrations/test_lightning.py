"""The callbacks of Lightning: what is decayed, and what reaches its loggers, counted in optimizer steps."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.monitor import Monitor, RankCollapseWarning
from tests import needs

L = needs.package("lightning")
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from rankdecay.integrations.lightning import RankCallback, RankDecay  # noqa: E402

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


# ---- decays ------------------------------------------------------------------------------------------------

LR = 0.1
Maker = Callable[["Decayed"], Any]


def one(module: Decayed) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)


def two(module: Decayed) -> Any:
    """One for the matrices of the block, one for the rest, where there is nothing to decay."""
    matrices = [p for p in module.block.parameters() if p.ndim == 2]
    others = [p for p in module.parameters() if all(p is not m for m in matrices)]
    return [torch.optim.SGD(others, lr=LR), torch.optim.AdamW(matrices, lr=LR, weight_decay=0.0)]


def shared_out(module: Decayed) -> Any:
    """The attention and the feed-forward matrices have an optimizer each."""
    attention = list(module.block.self_attn.parameters())
    others = [p for p in module.parameters() if all(p is not a for a in attention)]
    return [torch.optim.AdamW(attention, lr=LR, weight_decay=0.3), torch.optim.SGD(others, lr=LR, momentum=0.9)]


class Decayed(L.LightningModule):
    def __init__(self, maker: Maker = one, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"dim_feedforward": 10, "dropout": 0.0, "batch_first": True, "bias": False}
        self.block = nn.TransformerEncoderLayer(8, 2, **sizes)
        self.head = nn.Linear(8, 1)
        self.maker = maker
        self.automatic_optimization = not manual

    def loss(self, batch: Tensor) -> Tensor:
        return self.head(self.block(batch)).square().mean()

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return self.maker(self)


DATA = torch.randn(48, 3, 8, generator=torch.Generator().manual_seed(1))
DECAYS: dict[str, Any] = {
    "query_key": rd.LowRank(1.0, every=3, warmup=5),
    "value_output": rd.Frobenius(0.5),
    "mlp": rd.LowRank(0.5, rule="smooth", every=4, lr_coupled=False),
}


def _fit(module: Decayed, steps: int, *callbacks: Any, ckpt_path: Any = None, batches: int = 24, **how: Any) -> Any:
    trainer = L.Trainer(
        max_steps=steps, callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", logger=False, enable_checkpointing=False, **how,
    )  # fmt: skip
    data = DATA[: 2 * batches].to(module.head.weight.dtype)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=ckpt_path)
    return trainer


def _alone(maker: Maker, steps: int, passes: int = 1, **decays: Any) -> Decayed:
    """The same without Lightning."""
    module = Decayed(maker)
    made = maker(module)
    optimizers = made if isinstance(made, list) else [made]
    for optimizer in optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        its = {
            role: decay
            for role, decay in decays.items()
            if (id(module.block.linear1.weight) if role == "mlp" else id(module.block.self_attn.in_proj_weight)) in held
        }
        if its:
            rd.attach(optimizer, module, **its).expect_steps()
    for step in range(steps):
        for part in range(passes):
            start = 2 * (step * passes + part) % len(DATA)
            (module.loss(DATA[start : start + 2]) / passes).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return module


def _same(module: nn.Module, other: nn.Module) -> None:
    for (name, weight), expected in zip(module.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0, msg=name)


# Lightning wants manual optimization for several optimizers
@pytest.mark.parametrize(("maker", "manual"), [(one, False), (one, True), (two, True), (shared_out, True)])
def test_each_optimizer_decays_the_roles_that_it_has(maker: Maker, manual: bool) -> None:
    callback = RankDecay(**DECAYS)
    module = Decayed(maker, manual)
    _fit(module, 9 if maker is one else 18, callback)
    _same(module, _alone(maker, 9, **DECAYS))
    assert len(callback.attachments) == (2 if maker is shared_out else 1)
    assert not any(attachment.active for attachment in callback.attachments)


@pytest.mark.parametrize("accumulate", [3, 12])
def test_accumulated_gradients_are_no_reason_to_warn(accumulate: int) -> None:
    module = Decayed()
    _fit(module, 2, RankDecay(**DECAYS), accumulate_grad_batches=accumulate)
    _same(module, _alone(one, 2, accumulate, **DECAYS))


@pytest.mark.parametrize("counts", [{}, {"counts": "optimizer"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_resumed_in_mid_cycle_changes_nothing(tmp_path: Path, counts: dict[str, str], dtype: torch.dtype) -> None:
    whole = Decayed().to(dtype)
    _fit(whole, 11, RankDecay(**DECAYS, **counts), batches=1)
    trainer = _fit(Decayed().to(dtype), 5, RankDecay(**DECAYS, **counts), batches=1)
    trainer.save_checkpoint(tmp_path / "at_5.ckpt")
    resumed = Decayed().to(dtype)
    _fit(resumed, 11, RankDecay(**DECAYS, **counts), ckpt_path=tmp_path / "at_5.ckpt", batches=1)
    _same(resumed, whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_a_checkpoint_without_decay_is_continued_with_it_and_the_other_way_round(tmp_path: Path) -> None:
    _fit(Decayed(), 5, batches=1).save_checkpoint(tmp_path / "without.ckpt")
    callback = RankDecay(**DECAYS)
    trainer = _fit(Decayed(), 10, callback, ckpt_path=tmp_path / "without.ckpt", batches=1)
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    counts = callback.attachments[0].state_dict()
    assert {n for name, n in counts.items() if name.endswith(("query_key_steps", "mlp_steps"))} == {5}
    _fit(Decayed(), 11, ckpt_path=tmp_path / "with.ckpt", batches=1)


def test_a_second_fit_begins_anew_also_after_one_that_raised() -> None:
    class Raises(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("the loader is gone")

    callback = RankDecay(**DECAYS)
    module = Decayed()
    with pytest.raises(RuntimeError, match="the loader is gone"):
        _fit(module, 4, callback, Raises())
    assert not callback.attachments[0].active
    fresh, expected = Decayed(), Decayed()
    _fit(fresh, 4, callback)
    _fit(expected, 4, RankDecay(**DECAYS))
    _same(fresh, expected)
    _fit(fresh, 4, callback)
    _fit(expected, 4, RankDecay(**DECAYS))
    _same(fresh, expected)
    assert isinstance(copy.deepcopy(callback), RankDecay)


def test_gradients_that_overflow_are_a_step_that_is_left_out() -> None:
    """With the scaler of mixed precision, here on the CPU."""

    def fit(*callbacks: Any) -> Decayed:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1000)  # infinite at first
        module = Decayed(lambda m: torch.optim.SGD(m.parameters(), lr=LR))
        _fit(module, 3, *callbacks, plugins=MixedPrecision("16-mixed", "cpu", scaler))
        return module

    callback = RankDecay(query_key=rd.Frobenius(0.5))
    module = fit(callback)
    steps = callback.attachments[0].state_dict()["block.self_attn.in_proj_weight.query_key_steps"]
    plain = fit()
    decayed, expected = (each.block.self_attn.in_proj_weight.detach()[:16].norm() for each in (module, plain))
    assert float(decayed / expected) == pytest.approx((1 - LR * 0.5) ** steps, rel=2e-2)
    assert steps < 3


def test_a_role_that_no_optimizer_has_is_an_error() -> None:
    for maker in (one, shared_out):
        with pytest.raises(ValueError, match="embedding"):
            _fit(Decayed(maker, manual=True), 1, RankDecay(embedding=rd.Frobenius(0.1)))

    def without_attention(module: Decayed) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=LR) for part in (module.head, module.block.linear1)]

    with pytest.raises(ValueError, match=r"query_key=LowRank\(.*names no parameter of these optimizers \(SGD, SGD\)"):
        _fit(Decayed(without_attention, manual=True), 1, RankDecay(query_key=rd.LowRank(0.1)))
    with pytest.raises(ValueError, match="none of the optimizers has a matrix of this model"):
        _fit(
            Decayed(lambda m: [torch.optim.SGD([p], lr=LR) for p in (m.head.bias, m.block.norm1.weight)], manual=True),
            1,
            RankDecay(default=rd.Frobenius(0.1)),
        )
