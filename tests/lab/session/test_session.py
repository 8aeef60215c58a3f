"""One run: equal to a loop written by hand, and to itself after any interruption."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.lab.session.session import PIECES, Diverged, Plan, Run, Session, by_layer, summarise_losses
from rankdecay.lab.store import RunDirectory
from tests import needs
from tests.lab.tiny import Repeat

PLAN = Plan(steps=20, batch_size=8, lr=1e-2, warmup=4)
LOW_RANK = rd.LowRank(5.0, unit="head", every=4)
CONFIG = {"command": "language", "settings": {}, "arms": []}


def a_run(qk_norm: bool = False, seed: int = 0, query_key: rd.LowRank | rd.Frobenius = LOW_RANK) -> Run:
    decays = {"query_key": query_key, "value_output": rd.Frobenius(1.0), "mlp": rd.Frobenius(0.5)}
    return Run("low_rank", 5.0, 0.5, qk_norm, seed, decays)


def session(plan: Plan = PLAN, problem: Repeat | None = None, **which) -> Session:
    return Session(a_run(**which), problem or Repeat(), plan)


def go(its: Session, steps: int) -> Session:
    for _ in its.train(steps):
        pass
    return its


def state(its: Session) -> dict[str, torch.Tensor]:
    return its.checkpoint().tensors


def assert_same(first: Session, second: Session) -> None:
    one, other = state(first), state(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert (first.step, first.examples) == (second.step, second.examples)


def losses(its: Session) -> list[float]:
    return its._losses


# --- a step ---


@pytest.mark.parametrize("qk_norm", [False, True])
def test_training_is_the_loop_a_user_would_write(qk_norm):
    its = go(session(qk_norm=qk_norm), 20)

    problem, run = Repeat(), a_run(qk_norm)
    model = problem.model(0, qk_norm)
    optimizer = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.1), **run.decays), betas=(0.9, 0.95))
    rd.attach(optimizer)
    written = []
    for step in range(20):
        share = (step - 4) / 16
        rate = 1e-2 * (step + 1) / 4 if step < 4 else 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = problem.loss(model, problem.batch(0, step, 8))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        written.append(loss.item())
    assert losses(its) == written
    for (name, trained), by_hand in zip(its.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(trained, by_hand), name
    assert its.examples == 20 * 8 * 10


def test_the_rate_rises_and_falls_to_a_tenth():
    assert [PLAN.lr_at(step) for step in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert PLAN.lr_at(12) == pytest.approx(0.0055)
    assert PLAN.lr_at(20) == pytest.approx(0.001)
    assert dataclasses.replace(PLAN, warmup=0).lr_at(0) == pytest.approx(0.01)


def test_without_a_clip_the_gradient_is_left_as_it_is():
    tight = go(session(dataclasses.replace(PLAN, clip=1e-3)), 2)
    assert losses(go(session(dataclasses.replace(PLAN, clip=0.0)), 2)) == losses(
        go(session(dataclasses.replace(PLAN, clip=1e9)), 2)
    )
    assert state(tight)["optimizer.0.exp_avg"].norm() <= 1e-3


def test_a_batch_in_parts_is_the_same_batch():
    whole, parts = (go(session(dataclasses.replace(PLAN, accumulate=n)), 8) for n in (1, 4))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    assert whole.examples == parts.examples


def test_half_precision_trains_and_is_rounded():
    full, half = (go(session(dataclasses.replace(PLAN, precision=p)), 20) for p in ("float32", "bfloat16"))
    assert losses(half) != losses(full)
    assert losses(half) == pytest.approx(losses(full), rel=0.02)
    assert half.evaluate()["loss"] < session(PLAN).evaluate()["loss"]


@needs.compiler
def test_a_compiled_model_trains_alike_and_its_compilation_is_not_on_the_clock():
    from torch._dynamo.utils import counters

    small = Repeat(depth=1)
    counters.clear()
    compiled = session(dataclasses.replace(PLAN, compile=True), small)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert losses(go(compiled, 6)) == pytest.approx(losses(go(session(problem=small), 6)), rel=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs  # all was compiled before the clock of the steps ran
    assert compiled.examples == 6 * 8 * 10


# --- interrupted ---


@pytest.mark.parametrize("at", [4, 6, 7])  # 6 and 7 are in the middle of a cycle of four
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_restored_session_continues_bit_for_bit(tmp_path, at, precision):
    plan = dataclasses.replace(PLAN, precision=precision)
    straight = go(session(plan), 12)
    with RunDirectory.open(tmp_path / "run", CONFIG, print) as directory:
        directory.save_checkpoint(go(session(plan), at).checkpoint())
        saved = directory.load_checkpoint()
    assert saved is not None
    resumed = session(plan)
    resumed.restore(saved)
    assert resumed.step == at
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight
    go(resumed, 12 - at)
    assert_same(resumed, straight)
    assert losses(resumed) == losses(straight)[at:]
    assert resumed.checkpoint().extra["groups"] == straight.checkpoint().extra["groups"]
    assert resumed.checkpoint().extra["scaler"] == straight.checkpoint().extra["scaler"]
    assert bool(straight.checkpoint().extra["scaler"]) == (precision == "float16")


def test_a_checkpoint_is_a_copy():
    its = go(session(), 3)
    saved = its.checkpoint()
    before = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    go(its, 2)
    assert all(torch.equal(saved.tensors[name], before[name]) for name in before)
    its.restore(saved)
    assert_same(go(its, 2), go(session(), 5))


# --- what is stored ---


def test_an_evaluation_says_what_the_model_is():
    its = session()
    before = its.evaluate()
    assert (before["step"], before["tokens"], before["train_loss"], before["seconds"]) == (0, 0, None, 0)
    record = go(its, 20).evaluate()
    assert {k: record[k] for k in ("arm", "strength", "mlp_decay", "qk_norm", "seed")} == {
        "arm": "low_rank", "strength": 5.0, "mlp_decay": 0.5, "qk_norm": False, "seed": 0,
    }  # fmt: skip
    assert (record["step"], record["tokens"]) == (20, 1600)
    assert record["train_loss"] == pytest.approx(sum(losses(its)) / 20)
    quality = its.problem.evaluate(its.model.eval(), "cpu")
    assert (record["loss"], record["loss_error"], record["accuracy"]) == quality[:3]
    assert record["loss"] < before["loss"]
    assert record["seconds"] > 0
    rows = [row for row in rd.inspect(its.model).rows if (row["layer"], row["product"]) == (1, "query_key")]
    figures = record["layers"][1]["query_key"]
    assert figures["nuclear_norm"] == pytest.approx(sum(row["nuclear_norm"] for row in rows) / 2, rel=1e-5)
    assert figures["pseudo_rank_min"] == pytest.approx(min(row["pseudo_rank"] for row in rows), rel=1e-5)
    assert len(record["layers"]) == 2
    assert set(record["layers"][0]) == {"query_key", "value_output", "query", "key"}
    normalised = session(qk_norm=True).evaluate()["layers"][0]
    assert set(normalised) == {"query", "key", "value_output"}
    assert "imbalance" in normalised["value_output"]
    assert "imbalance" not in normalised["query"]


def test_numbers_that_are_not_finite_are_stored_as_none():
    assert by_layer({"step": 3, "rank/a/b/c": 1.23456789, "rank/a/b/d": math.nan, "rank/b/c": 4.0}) == [
        {"b": {"c": 1.23457, "d": None}}
    ]

    class OnePiece(Repeat):
        def evaluate(self, model, device):
            return summarise_losses([2.5])

    assert session(problem=OnePiece()).evaluate()["loss_error"] is None


def test_a_mean_its_error_and_its_pieces():
    quality = summarise_losses([1.0, 2.0, 6.0], accuracy=0.5)
    assert quality[:2] == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert quality[2:] == (0.5, (1.0, 2.0, 6.0))
    losses = torch.arange(50.0) ** 2
    quality = summarise_losses(losses)
    assert quality.loss == pytest.approx(losses.mean().item())
    assert len(quality.pieces) == PIECES
    assert quality.pieces[0] == pytest.approx((0 + 1 + 4 + 9) / 4)
    pieces = torch.tensor(quality.pieces, dtype=torch.float64)
    assert quality.error == pytest.approx(pieces.std().item() / PIECES**0.5)


# --- no number ---


def test_a_loss_that_is_no_number_is_named_with_its_step():
    its = session(problem=Repeat(breaks=(0, 5)))
    with pytest.raises(Diverged) as error:
        go(its, 8)
    assert error.value.step == 6
    text = str(error.value)
    for words in ("step 6", "low_rank 5", "MLP 0.5", "seed 0", "--lr 0.01", "smaller --lr", "--skip-diverged"):
        assert words in text
    assert "\n" not in text


def test_weights_that_are_no_numbers_are_found_by_the_evaluation():
    its = go(session(problem=Repeat(breaks=(0, 5))), 5)
    with torch.no_grad():
        its.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(Diverged) as error:
        its.evaluate()
    assert error.value.step == 5


# --- L2 in the loss ---


def in_loss(seed=0, **changes) -> Run:
    decays = {"query_key": rd.Frobenius(0.3), "value_output": rd.Frobenius(0.1), "mlp": rd.Frobenius(0.5)}
    return Run("l2_loss", 0.3, 0.5, False, seed, decays, **{"in_loss": ("query_key",)} | changes)


def test_l2_in_the_loss_is_a_penalty_whose_gradient_goes_through_adam():
    its = go(Session(in_loss(), Repeat(), dataclasses.replace(PLAN, clip=0)), 12)

    model, problem = Repeat().model(0, False), Repeat()
    scored = [p for name, p in model.named_parameters() if "q_proj" in name or "k_proj" in name]
    decays = in_loss().decays | {"query_key": rd.Frobenius(0.0)}
    optimizer = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.1), **decays), betas=(0.9, 0.95))
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = PLAN.lr_at(step)
        penalty = sum(p.square().sum() for p in scored) * 0.3 / 2
        (problem.loss(model, problem.batch(0, step, 8)) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, trained), by_hand in zip(its.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(trained, by_hand, msg=name, rtol=1e-4, atol=1e-6)
    decoupled = go(Session(in_loss(in_loss=()), Repeat(), dataclasses.replace(PLAN, clip=0)), 12)
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(its.model.get_parameter(weight), decoupled.model.get_parameter(weight), rtol=1e-2)


def test_l2_in_the_loss_stays_there_when_a_run_is_resumed():
    whole = go(Session(in_loss(), Repeat(), PLAN), 12)
    half = go(Session(in_loss(), Repeat(), PLAN), 6)
    again = Session(in_loss(), Repeat(), PLAN)
    again.restore(half.checkpoint())
    assert_same(go(again, 6), whole)
