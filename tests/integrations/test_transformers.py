"""The callbacks of transformers.Trainer: a decay by settings, and what reaches its reporters and its log history."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

import rankdecay as rd
from rankdecay.decay.targets import STATE_KEY
from rankdecay.monitor import Monitor, RankCollapseWarning
from tests import needs

transformers = needs.package("transformers")
needs.package("accelerate")
from rankdecay.integrations.transformers import RankCallback, RankDecay, decaying  # noqa: E402

NAME = "rank/query_key/effective_rank"
LAYER = "rank/model.layers.0.self_attn/value_output/stable_rank_min"


class Reporter(transformers.TrainerCallback):
    """As the integrations of TensorBoard, W&B and trackio: among the first, and takes a copy."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append((state.global_step, dict(logs)))


def make_model() -> Any:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


def _trainer(folder: Path, steps: int = 6, **how: Any) -> tuple[Any, Reporter]:
    model = make_model()
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


# ---- the decay -------------------------------------------------------------------------------------------

SAVED, STEPS = 4, 7  # every=3: the cycle is at 1 of 3 when it is saved
ROLES = {"query_key": rd.LowRank(2.0, every=3, warmup=5), "value_output": rd.Frobenius(0.0)}
TEXT = "query_key=LowRank:2.0:every=3:warmup=5,value_output=Frobenius:0.0"
#: As Trainer makes its own, fused from torch 2.8 on.
KWARGS = {"lr": 1e-2, "weight_decay": 0.1, "fused": "fused" in transformers.TrainingArguments("", use_cpu=True).optim}


def make_trainer(folder: Path, steps: int = STEPS, trainer: dict[str, Any] | None = None, **how: Any) -> Any:
    options: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "save_steps": SAVED, "report_to": "none"}
    options |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "disable_tqdm": True, **how}
    arguments = transformers.TrainingArguments(str(folder), max_steps=steps, use_cpu=True, **options)
    ids = torch.randint(16, (96, 6), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    given: dict[str, Any] = {"train_dataset": data, **(trainer or {})}
    if "model_init" not in given:
        given.setdefault("model", make_model())
    made = transformers.Trainer(args=arguments, **given)
    made.remove_callback(transformers.PrinterCallback)
    return made


def ways(*names: str) -> Any:
    """Parametrises a test by ways to give decays to Trainer."""
    marks = {"factory": needs.trainer_factory()}
    return pytest.mark.parametrize("way", [pytest.param(name, marks=marks.get(name, ())) for name in names])


WAYS = {
    "callback": lambda: {"callbacks": [RankDecay(**ROLES)]},
    "text": lambda: {"callbacks": [RankDecay(TEXT)]},
    "factory": lambda: {"optimizer_cls_and_kwargs": decaying(torch.optim.AdamW, KWARGS, **ROLES)},
}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained without callback and factory: Trainer's own optimizer, attached as a user would."""
    made = make_trainer(tmp_path_factory.mktemp("by_hand"))
    rd.attach(made.create_optimizer(), made.model, **ROLES)
    made.train()
    return made


def assert_same_weights(one: Any, other: Any) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@ways(*WAYS)
def test_trainer_decays_its_own_optimizer_and_goes_on_in_the_middle_of_a_cycle(way, by_hand, tmp_path):
    whole = make_trainer(tmp_path, trainer=WAYS[way]())
    whole.train()
    assert_same_weights(whole.model, by_hand.model)
    assert [group["weight_decay"] for group in whole.optimizer.param_groups] == [0.1, 0.0]
    resumed = make_trainer(tmp_path, trainer=WAYS[way]())
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert_same_weights(resumed.model, by_hand.model)
    without = make_trainer(tmp_path / "without")
    without.train()
    query = without.model.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(query, by_hand.model.model.layers[0].self_attn.q_proj.weight)


def test_the_counts_are_in_the_state_of_the_trainer_too(by_hand, tmp_path):
    """Where a distributed checkpoint cannot load them; here they are taken out of the optimizer's state."""
    make_trainer(tmp_path, SAVED, trainer=WAYS["callback"]()).train()
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    taken = [entry.pop(STATE_KEY) for entry in state["state"].values() if STATE_KEY in entry]
    assert [counts["query_key_steps"] for counts in taken] == [SAVED, SAVED]  # of W_Q and W_K
    torch.save(state, checkpoint / "optimizer.pt")
    resumed = make_trainer(tmp_path, trainer=WAYS["text"]())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(resumed.model, by_hand.model)


def test_trainer_may_restore_the_callback_itself(by_hand, tmp_path):
    """With ``restore_callback_states_from_checkpoint`` it makes a new one from the state of the old one."""
    make_trainer(tmp_path, SAVED, trainer=WAYS["callback"]()).train()
    how: dict[str, Any] = {"restore_callback_states_from_checkpoint": True}
    resumed = make_trainer(tmp_path, trainer={"callbacks": [RankDecay("query_key=LowRank:9")]}, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert_same_weights(resumed.model, by_hand.model)


def test_a_trainer_that_calls_no_factory_is_told_what_to_give():
    """Trainer before 5.2 calls it with its groups alone."""
    factory, keywords = WAYS["factory"]()["optimizer_cls_and_kwargs"]
    with pytest.raises(TypeError, match=r"needs transformers 5\.2 or later.* Give callbacks=\[RankDecay"):
        factory([{"params": make_model().parameters()}], **keywords)


@ways("callback", "factory")
def test_model_init_and_a_second_training(way, by_hand, tmp_path):
    given = WAYS[way]()
    made = make_trainer(tmp_path, trainer={"model_init": make_model, **given})
    for _ in range(2):  # each of a new model, with a new optimizer
        made.train()
        assert_same_weights(made.model, by_hand.model)


def test_a_second_training_of_the_same_model_continues_its_cycle(tmp_path):
    callback = RankDecay(**ROLES)
    made = make_trainer(tmp_path, 4, trainer={"callbacks": [callback]})
    made.train()
    assert not callback.attachment.active
    made.train()
    counts = callback.attachment.state_dict()
    assert {counts[name] for name in counts if name.endswith("query_key_steps")} == {8}


def test_a_training_that_raised_can_be_begun_again(by_hand, tmp_path):
    class Stops(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    callback = RankDecay(**ROLES)
    made = make_trainer(tmp_path, trainer={"callbacks": [callback, Stops()]})
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.remove_callback(Stops)
    made.train()
    assert made.state.global_step == STEPS


def test_a_run_without_decay_goes_on_with_one_and_the_other_way_round(tmp_path):
    make_trainer(tmp_path / "without", SAVED).train()
    checkpoint = tmp_path / "without" / f"checkpoint-{SAVED}"
    callback = RankDecay(**ROLES)
    made = make_trainer(tmp_path / "with", 8, trainer={"callbacks": [callback]})
    made.train(resume_from_checkpoint=str(checkpoint))
    counts = callback.attachment.state_dict()
    assert {counts[name] for name in counts if name.endswith("query_key_steps")} == {8 - SAVED}
    made = make_trainer(tmp_path / "with", 9)
    made.train(resume_from_checkpoint=str(tmp_path / "with" / "checkpoint-8"))
    assert made.state.global_step == 9


@ways("callback", "factory")
def test_many_passes_to_a_step_are_no_sign_of_an_optimizer_that_never_steps(way, tmp_path):
    """Warnings are errors here; ten backward passes without a step would be one."""
    how: dict[str, Any] = {"gradient_accumulation_steps": 12, "per_device_train_batch_size": 2}
    made = make_trainer(tmp_path, 3, trainer=WAYS[way](), **how)
    made.train()
    assert made.state.global_step == 3


def test_an_optimizer_that_never_steps_is_still_noticed(tmp_path):
    class Deaf(transformers.Trainer):
        def create_optimizer(self, *model: Any) -> Any:  # transformers 5.1 gives none
            optimizer = super().create_optimizer(*model)
            optimizer.step = types.MethodType(lambda *_, **__: None, optimizer)  # schedulers wrap a method
            return optimizer

    made = make_trainer(tmp_path, 11)
    deaf = Deaf(made.model, made.args, train_dataset=made.train_dataset, callbacks=[RankDecay(**ROLES)])
    deaf.remove_callback(transformers.PrinterCallback)
    with pytest.warns(UserWarning, match=r"10 backward passes without a step\(\)"):
        deaf.train()


def test_peft(tmp_path):
    peft = needs.package("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2))
    with pytest.raises(ValueError, match=r"query_key=.* only frozen parameters, .* decay its factors with other="):
        make_trainer(tmp_path, trainer={"model": model, "callbacks": [RankDecay(**ROLES)]}).train()
    callback = RankDecay("other=Frobenius:0.5")
    made = make_trainer(tmp_path, trainer={"model": model, "callbacks": [callback]})
    made.train()
    decayed = [row.name for row in callback.attachment.rows() if row.decay == "L2 0.5"]
    assert len(decayed) == 4
    assert all("lora_" in name for name in decayed)


def test_what_cannot_be_read_is_said_at_once():
    with pytest.raises(ValueError, match="setting='query_kye' is unknown: did you mean 'query_key'"):
        RankDecay(query_kye=rd.LowRank(0.1))
    with pytest.raises(ValueError, match="no role is named"):
        RankDecay()
    with pytest.raises(ValueError, match="setting='lr' is unknown"):
        decaying(torch.optim.AdamW, lr=1e-2)
