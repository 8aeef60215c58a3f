"""What `benchmarks/needle.py` calls the block between empty directions, and that a model is trained on as it says."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rankdecay.lab.experiments.attention.language.experiment import LanguageModelling
from rankdecay.lab.experiments.attention.language.settings import PRESETS
from rankdecay.lab.experiments.attention.language.text import load
from rankdecay.lab.session.export import save_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import attention_findings
import needle


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_block_between_empty_directions_is_what_neither_side_uses():
    model = nn.Module()
    model.q_proj = nn.Linear(12, 8, bias=False).double()  # two heads of 4
    low = random(2, 4, 2) @ random(2, 2, 12, seed=1)  # rank 2 each
    with torch.no_grad():
        model.q_proj.weight.copy_(low.flatten(0, 1))
    where = needle.places(model, 2)
    assert list(where) == ["q_proj.weight"]
    left, right = where["q_proj.weight"]
    torch.testing.assert_close(left @ low, low)
    torch.testing.assert_close(low @ right, low)
    own = {"q_proj.weight": low}
    assert needle.share(own, where) < 1e-20
    # of a matrix drawn at random (4 - 2)(12 - 2) of 4 · 12 entries' worth lies there, whatever the directions
    drawn = {"q_proj.weight": random(2, 4, 12, seed=2)}
    inside = needle.emptied(drawn["q_proj.weight"], where["q_proj.weight"])
    assert torch.linalg.matrix_rank(inside).tolist() == [2, 2]
    torch.testing.assert_close(left @ inside, torch.zeros_like(inside))
    torch.testing.assert_close(inside @ right, torch.zeros_like(inside))
    many = {"q_proj.weight": torch.cat([random(2, 4, 12, seed=s) for s in range(200)]).unflatten(0, (200, 2))}
    assert needle.isotropic(where) == pytest.approx(20 / 48)
    assert needle.share(many, where) == pytest.approx(20 / 48, rel=0.05)
    assert needle.sharpest({"q_proj.weight": inside}, where) == pytest.approx(
        torch.linalg.matrix_norm(inside, ord=2).tolist()
    )


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A small trained-looking model whose heads of W_Q and W_K have rank 2, and its problem."""
    text = tmp_path / "text.txt"
    text.write_text("what the loss does not see, the decay takes away. " * 80)
    tiny = dataclasses.replace(
        PRESETS["standard"], context=8, width=16, depth=1, heads=2, mlp_width=16, batch_size=4, valid_windows=8
    )
    monkeypatch.setitem(PRESETS, "standard", tiny)
    problem = LanguageModelling(tiny, load(text=str(text), dataset=None, tokenizer=None, share=0.1))
    gpt = problem.model(0, False)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.copy_((random(2, 8, 2) @ random(2, 2, 16, seed=1)).flatten(0, 1) * 0.05)
    directory = tmp_path / "low_rank_10_mlp_0.1_seed_3"
    directory.mkdir()
    save_checkpoint(gpt, directory)
    return directory, problem


def test_empty_directions_are_empty_at_the_start_and_come_back_without_the_decay(model, tmp_path, capsys, monkeypatch):
    directory, problem = model
    monkeypatch.setattr(needle, "INTERVAL", 20)
    rows = [row for arm in needle.ARMS for row in needle.train_on(directory, arm, problem, steps=40)]
    assert [(row["arm"], row["step"]) for row in rows] == [(arm, step) for arm in needle.ARMS for step in (0, 20, 40)]
    on, off = ([row for row in rows if row["arm"] == arm] for arm in needle.ARMS)
    assert {row["seed"] for row in rows} == {3}
    for own in (on, off):
        assert own[0]["share"] < 1e-10
        assert own[0]["in_use"] == 2
        assert 0 < own[0]["gradient_share"] < 1
        assert 0 < own[0]["gradient_sharpest"] < 1
    assert on[0]["loss"] == off[0]["loss"]
    assert off[-1]["share"] > 1e-8
    assert off[-1]["share"] > on[-1]["share"]
    assert off[-1]["in_use"] == 8
    assert all(row["grown"] > 0 for row in on[1:])
    assert "grown" not in off[-1]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": rows}))
    attention_findings.main(["needle", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith(f"| decay on | 0 | 1 | {on[0]['loss']:.4f} | 2.0 |")
    assert lines[3].endswith(f"| {on[1]['grown']:.1f} |")
    assert lines[2].endswith("| — |")


def test_the_same_command_goes_on_and_others_add_to_its_rows(model, tmp_path, monkeypatch):
    directory, problem = model
    monkeypatch.setattr(needle, "LanguageModelling", lambda *_: problem)
    monkeypatch.setattr(needle.text, "load", lambda **_: None)
    other = directory.rename(tmp_path / "low_rank_10_mlp_0.1_seed_4")
    shutil.copytree(other, directory)
    path = tmp_path / "rows.json"

    def trained(*models: Path) -> list[tuple[int, str, int]]:
        monkeypatch.setattr(sys, "argv", ["needle.py", *map(str, models), "--steps", "20", "--json", str(path)])
        needle.main()
        return [(row["seed"], row["arm"], row["step"]) for row in json.loads(path.read_text())["rows"]]

    expected = [(seed, arm, step) for seed in (3, 4) for arm in needle.ARMS for step in (0, 20)]
    assert trained(directory) == expected[:4]
    before = json.loads(path.read_text())["rows"]
    assert trained(directory, other) == expected
    assert json.loads(path.read_text())["rows"][:4] == before
