"""The tables on the decay of attention: differences by seed, planes of models that were kept, runs not over yet."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from rankdecay import cli
from rankdecay.lab.session.export import save_checkpoint
from rankdecay.lab.session.gpt import GPT, GPTConfig
from rankdecay.lab.store import read_metrics
from tests.lab.experiments.attention.conftest import write_experiment

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import attention_findings
import findings

LOSSES = {
    ("l2", 0.0): (1.65, 1.63, 1.60, 1.61),
    ("l2", 0.1): (1.64, 1.62, 1.61, 1.61),
    ("uniform", 0.1): (2.00, 2.05, 1.97, 2.02),
}


def losses(directory: Path, found=LOSSES) -> Path:
    """A made-up run whose losses are those above."""
    write_experiment(directory, ("l2", "uniform"), strengths={"l2": (0.0, 0.1), "uniform": (0.1,)}, seeds=4)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["loss"] = found[row["arm"], row["strength"]][row["seed"]]
        row["layers"][0]["query_key"]["pseudo_rank"] = 0.0 if row["arm"] == "uniform" else 0.8
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def printed(capsys, *words) -> list[str]:
    capsys.readouterr()
    attention_findings.main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def test_a_difference_is_taken_seed_by_seed(tmp_path):
    run = losses(tmp_path / "run")
    found = attention_findings.above(run, "uniform", 0.1, ("l2", 0.1))
    theirs = stats.ttest_rel(LOSSES["uniform", 0.1], LOSSES["l2", 0.1]).confidence_interval(0.95)
    assert found is not None
    assert (found["low"], found["high"]) == pytest.approx(tuple(theirs))
    assert (found["mean"], found["seeds"]) == (pytest.approx(0.39), 4)
    assert attention_findings.above(run, "frozen", 0.1, ("l2", 0.1)) is None
    assert attention_findings.above_words(None) == "—"
    assert attention_findings.above_words({"mean": 0.1, "low": 0, "high": 0, "seeds": 1}) == "+0.100 (one seed)"


def test_the_table_of_controls(tmp_path, capsys):
    lines = printed(capsys, "controls", losses(tmp_path / "run"))
    assert [line.split(" | ")[:4] for line in lines[2:]] == [
        ["| learned", "l2", "0", "4"], ["| learned", "l2", "0.1", "4"], ["| controlled", "uniform", "0.1", "4"],
    ]  # fmt: skip
    assert lines[3].split(" | ")[5] == "—"
    assert lines[4].split(" | ")[4:6] == ["2.0100", "+0.390 (+0.333 to +0.447)"]


def test_the_table_of_the_extension_has_the_planes_of_every_seed(tmp_path, capsys, monkeypatch):
    run = losses(tmp_path / "run")
    names = list(attention_findings.PLANE_FIGURES)
    rows = [{"model": "l2_0.1", "seed": seed} | dict.fromkeys(names, 0.5 + 0.1 * seed) for seed in range(2)]
    (run / "planes.json").write_text(json.dumps({"rows": rows}))
    lines = printed(capsys, "extension", run)
    assert lines[2].endswith("| — | — | — | — | — | — |")  # no models of l2 0
    assert "| -0.002 (-0.018 to +0.013) |" in lines[3]
    assert lines[3].endswith("| 0.55 | 0.55 | 0.55 | 0.55 | 0.55 | 0.55 |")
    assert len(lines[0].split(" | ")) == len(lines[3].split(" | "))
    table = printed(capsys, "table", run)
    assert [line.split(" | ")[-1] for line in table[1:4:2]] == ["planes in use |", "— |"]
    assert table[4].endswith("| 0.55 |")
    monkeypatch.setattr(attention_findings, "DATA", tmp_path)
    assert findings.made("plane run l2 0.1 planes") == "0.55"
    assert findings.made("plane run l2 0 planes") == "—"
    assert findings.made("above_none run l2 0.1") == "-0.002 (-0.018 to +0.013)"


def test_the_planes_of_a_model_know_its_seed(tmp_path, capsys):
    out = tmp_path / "run"
    words = "--steps 2 --evaluate-every 1 --warmup 1 --depth 1 --width 16 --heads 2 --context 8 --mlp-width 16"
    text = tmp_path / "text.txt"
    text.write_text("what the loss does not see, the decay takes away. " * 60)
    arms = ["--arms", "l2", "planes", "--strengths", "l2=0", "planes=300", "--first-seed", "7"]
    options = [*words.split(), *arms, "--lr", "3e-3", "--quiet", "--text", str(text), "--out", str(out)]
    assert cli.main(["language", *options, "--valid-windows", "8", "--batch-size", "4", "--device", "cpu"]) == 0
    printed(capsys, "planes", *sorted((out / "models").iterdir()), "--json", tmp_path / "planes.json")
    none, planes = json.loads((tmp_path / "planes.json").read_text())["rows"]
    assert (none["model"], none["seed"], planes["model"], planes["seed"]) == ("l2_0", 7, "planes_300", 7)
    assert planes["planes"] < none["planes"] == none["heads"] == 1.0  # lr · strength is 0.9 of a plane's mean size


def test_a_head_that_has_died_has_no_rank(tmp_path):
    directory = tmp_path / "l2_10_mlp_0.1_seed_2"
    directory.mkdir()
    model = GPT(GPTConfig(16, 8, 16, 2, 2, 16), 0)
    with torch.no_grad():
        for layer, name in ((0, "q_proj"), (1, "q_proj"), (1, "k_proj")):
            weight = model.get_parameter(f"model.layers.{layer}.self_attn.{name}.weight")
            weight[8:] *= 1e-4  # the second head of both layers, in W_Q or in both
        low = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
        low[1:4], low[5:8] = 0, 0  # of the first head's planes (0, 4) alone is left
    save_checkpoint(model, directory)
    row = attention_findings.plane_figures(directory)
    assert (row["model"], row["seed"], row["heads"], row["planes"]) == ("l2_10", 2, 0.5, round(5 / 16, 4))
    assert row["carrying"] == (1 / 4 + 1) / 2
    assert row["query"] == pytest.approx((2 / 8 + 1) / 2, abs=0.07)
    assert row["key"] > 0.85


def test_of_a_run_that_is_not_over_the_runs_that_ended_are_stored(tmp_path):
    run = write_experiment(tmp_path / "run", seeds=2, runs=3)
    attention_findings.main(["store", str(run), str(tmp_path / "stored")])
    kept = read_metrics(tmp_path / "stored")
    assert {(row["strength"], row["seed"]) for row in kept} == {(0.0, 0), (0.1, 0)}
    assert not (tmp_path / "stored" / "summary.json").exists()
    cells = attention_findings.cells_of(tmp_path / "stored")
    assert [cell["strength"] for cell in cells] == [0.0, 0.1]


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_four_in_five_experiments_find_the_difference_that_would_show(seeds):
    generator = np.random.default_rng(seeds)
    differences = generator.normal(size=seeds).tolist()
    again = generator.normal(size=(20_000, seeds)) * np.std(differences, ddof=1)
    found = stats.ttest_1samp(again + attention_findings.least_shown(differences), 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(attention_findings.POWER, abs=0.02)
