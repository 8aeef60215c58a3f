"""Associative recall: its sequences, small runs of the whole command, and what it refuses."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import rankdecay as rd
from rankdecay import cli
from rankdecay.lab.experiments.attention.recall.experiment import RecallProblem, draw
from rankdecay.lab.experiments.attention.recall.settings import Recall
from rankdecay.lab.store import read_metrics

TINY = (
    "--pairs",
    "3",
    "--queries",
    "2",
    "--keys",
    "4",
    "--values",
    "4",
    "--width",
    "16",
    "--heads",
    "2",
    "--batch-size",
    "16",
)
TINY += ("--steps", "8", "--warmup", "2", "--evaluate-every", "4", "--valid-sequences", "512", "--device", "cpu")
SMALL = Recall(pairs=5, queries=3, keys=8, values=6, valid_sequences=512)


def command(out: Path, *more: str) -> list[str]:
    return ["recall", *TINY, "--out", str(out), *more]


def answers_of(tokens: np.ndarray, keys: int, queries: int) -> list[list[int]]:
    """The values beside the keys that are asked for, found as a person would."""
    found = []
    for row in tokens.tolist():
        body, asked = row[:-queries], row[-queries:]
        pairs = dict(zip(body[::2], body[1::2], strict=True))
        assert len(pairs) == len(body) // 2, "a key comes twice"
        assert len(set(asked)) == queries, "a key is asked for twice"
        assert max(pairs) < keys <= min(pairs.values())
        found.append([pairs[key] for key in asked])
    return found


# --- the sequences ---


def test_the_answer_is_the_value_of_the_key_that_is_asked_for():
    tokens, answers = draw(np.random.default_rng(0), 500, pairs=5, queries=3, keys=8, values=6)
    assert tokens.shape == (500, 13)
    assert tokens.dtype == answers.dtype == np.int64
    assert answers.tolist() == answers_of(tokens, keys=8, queries=3)
    for place in range(3):
        assert set(answers[:, place].tolist()) == set(range(8, 14))
        assert set(tokens[:, 10 + place].tolist()) == set(range(8))
        asked = (tokens[:, :10:2] == tokens[:, 10 + place, None]).argmax(1)
        assert set(asked.tolist()) == set(range(5))  # every place in the sequence


def test_as_many_keys_as_pairs_is_a_permutation():
    tokens, _ = draw(np.random.default_rng(0), 50, pairs=6, queries=1, keys=6, values=2)
    assert (np.sort(tokens[:, :-1:2], axis=1) == np.arange(6)).all()
    assert len({tuple(row) for row in tokens[:, :-1:2].tolist()}) > 40


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_the_share_of_answers_that_noise_changes(noise):
    tokens, answers = draw(np.random.default_rng(1), 20_000, pairs=3, queries=2, keys=4, values=5, noise=noise)
    wrong = np.mean(answers != answers_of(tokens, keys=4, queries=2))
    expected = noise * 4 / 5  # a value at random is the right one in one of 5 cases
    assert wrong == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 40_000) ** 0.5)
    assert answers.min() == 4
    assert answers.max() == 8


def test_a_batch_depends_on_seed_and_step_alone():
    problem, again = RecallProblem(SMALL), RecallProblem(SMALL)
    first = problem.batch(0, 7, 32)
    problem.batch(0, 8, 32)
    for other in (problem.batch(0, 7, 32), again.batch(0, 7, 32)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], problem.batch(0, 8, 32)[0])
    assert not torch.equal(first[0], problem.batch(1, 7, 32)[0])
    assert problem.size(first) == 32


def test_training_has_noise_and_validation_has_none():
    problem = RecallProblem(dataclasses.replace(SMALL, label_noise=0.5))
    tokens, answers = problem.batch(0, 0, 400)
    assert 0.3 < np.mean(answers.numpy() != answers_of(tokens.numpy(), keys=8, queries=3)) < 0.55
    tokens, answers = problem._valid
    assert answers.tolist() == answers_of(tokens.numpy(), keys=8, queries=3)


# --- the model and how it is judged ---


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_model_is_attention_alone_at_the_scale_asked_for(qk_norm):
    model = RecallProblem(SMALL).model(3, qk_norm)
    assert {name.split(".")[-2] for name, _ in model.named_parameters()} == {
        "embed_tokens", "embed_positions", "q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm", "norm",
        *(("q_norm", "k_norm") if qk_norm else ()),
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "positions" not in name:
            assert parameter.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert len(rd.find_attention(model)) == 2
    same = RecallProblem(SMALL).model(3, qk_norm)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    smaller = RecallProblem(dataclasses.replace(SMALL, initial=0.02)).model(3, qk_norm)
    assert smaller.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


class Knowing(torch.nn.Module):
    """Gives the right answer, save for sequences whose first token is one of some."""

    def __init__(self, wrong_first: Sequence[int]) -> None:
        super().__init__()
        self.wrong_first = wrong_first

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 14)
        known = answers_of(tokens.numpy(), keys=8, queries=3)
        for row, (sequence, answers) in enumerate(zip(tokens.tolist(), known, strict=True)):
            for place, answer in enumerate(answers):
                logits[row, 10 + place, answer if sequence[0] not in self.wrong_first else 0] = 50.0
        return logits


def test_accuracy_is_the_share_of_right_answers():
    problem = RecallProblem(SMALL)
    assert problem.evaluate(Knowing([]), "cpu")[:3] == pytest.approx((0.0, 0.0, 1.0), abs=1e-6)
    wrong = (problem._valid[0][:, 0] < 2).float()
    quality = problem.evaluate(Knowing([0, 1]), "cpu")
    assert quality.accuracy == pytest.approx(1 - wrong.mean().item())
    assert quality.loss == pytest.approx(50 * wrong.mean().item(), rel=1e-3)
    pieces = 50 * wrong.view(16, 32).mean(1)
    assert quality.error == pytest.approx(pieces.std().item() / 4, rel=1e-3)


# --- the command ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("recall") / "run"
    strengths = ("--strengths", "l2=0,1", "low_rank=1")
    assert cli.main(command(out, *strengths, "--quiet")) == 0
    return out, json.loads((out / "summary.json").read_text())


def test_the_summary_of_a_tiny_run(finished):
    _, summary = finished
    assert summary["command"] == "recall"
    assert summary["unit"] == "sequences"
    assert summary["wall_seconds"] > 0
    arms = [(arm["name"], arm["strength"], arm["qk_norm"]) for arm in summary["arms"]]
    assert arms == [
        ("l2", 0, False), ("l2", 1, False), ("low_rank", 1, False),
        ("l2", 0, True), ("l2", 1, True), ("low_rank", 1, True),
    ]  # fmt: skip
    for arm in summary["arms"]:
        assert arm["seeds"] == 1
        assert arm["mlp_decay"] is None
        assert 0 <= arm["accuracy"] <= 1
        assert arm["loss"] > 0
        assert len(arm["layers"]) == len(arm["untrained"]) == 2
        for layer in arm["layers"]:
            assert 0 < layer["value_output"]["pseudo_rank"] <= 1
            assert layer["value_output"]["imbalance"] > 0
            assert layer["value_output"]["nuclear_gap"] >= 0
            # under QK-norm the scores are no product of W_Q and W_K
            assert {"query", "key"} <= layer.keys()
            assert ("query_key" in layer) == (not arm["qk_norm"])


def test_the_rows_follow_both_products_of_each_layer(finished):
    out, _ = finished
    rows = read_metrics(out)
    assert len(rows) == 6 * 3
    for row in rows:
        assert row["sequences"] == 16 * row["step"]
        assert len(row["layers"]) == 2
        assert row["accuracy"] is not None
        for layer in row["layers"]:
            for part in ("value_output",) if row["qk_norm"] else ("query_key", "value_output"):
                assert {"pseudo_rank", "pseudo_rank_min", "imbalance", "nuclear_gap"} <= layer[part].keys()
    start = {
        row["qk_norm"]: [r["loss"] for r in rows if r["step"] == 0 and r["qk_norm"] == row["qk_norm"]] for row in rows
    }
    for losses in start.values():  # all arms begin at the same weights
        assert len(set(losses)) == 1


def test_the_trained_models_can_be_inspected(finished):
    out, summary = finished
    models = sorted((out / "models").iterdir())
    assert len(models) == len(summary["arms"])
    rows = rd.inspect(out / "models" / "l2_0_seed_0").rows
    trained = next(arm for arm in summary["arms"] if (arm["name"], arm["strength"], arm["qk_norm"]) == ("l2", 0, False))
    for index, layer in enumerate(trained["layers"]):
        ranks = [row["pseudo_rank"] for row in rows if row["layer"] == index and row.get("product") == "value_output"]
        assert np.mean(ranks) == pytest.approx(layer["value_output"]["pseudo_rank"], rel=1e-4)


def test_an_easy_task_is_learnt(tmp_path, capsys):
    """Two pairs of three keys and values: the real thing takes minutes."""
    easy = [
        "recall",
        "--pairs",
        "2",
        "--queries",
        "2",
        "--keys",
        "3",
        "--values",
        "3",
        "--width",
        "32",
        "--heads",
        "1",
        "--json",
    ]
    easy += ["--arms", "l2", "--strengths", "l2=0.1", "--qk-norm", "off", "--steps", "300", "--evaluate-every", "150"]
    easy += ["--lr", "3e-3", "--valid-sequences", "512", "--save", "none", "--device", "cpu"]
    easy += ["--out", str(tmp_path / "run")]
    assert cli.main(easy) == 0
    (arm,) = json.loads(capsys.readouterr().out)["arms"]
    assert arm["accuracy"] > 0.9
    assert not (tmp_path / "run" / "models").exists()
