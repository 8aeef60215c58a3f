"""What would be read: ``rankdecay inspect --list``."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from rankdecay.attention.listing import listing
from rankdecay.cli import main

from .families import build
from .test_states import FIRST, SECOND


def test_names_shapes_and_windows_without_reading_a_tensor(tmp_path, monkeypatch, capsys):
    build("gpt_neox").save_pretrained(tmp_path)
    monkeypatch.setattr("rankdecay.attention.checkpoints.Checkpoint.reader", lambda self, name: pytest.fail)
    assert main(["inspect", str(tmp_path), "--list"]) == 0
    text = capsys.readouterr().out
    assert "2 attention layers" in text
    assert "rotary positions over" in text
    assert "gpt_neox.layers.0.attention.query_key_value.weight" in text
    assert main(["inspect", str(tmp_path), "--list", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    layer = report["layers"][1]
    assert (report["command"], layer["num_heads"], layer["qk_norm"]) == ("inspect", 4, False)
    assert [matrix["matrix"] for matrix in layer["matrices"]] == ["query", "key", "value", "output"]
    assert layer["matrices"][1]["window"].startswith("rows[")
    assert layer["matrices"][1]["shape"][0] == 3 * layer["matrices"][3]["shape"][0]


def test_a_live_model_is_listed_as_its_files_are(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    live, stored = listing(model), listing(tmp_path)
    assert live.layers == stored.layers


def test_the_candidates_are_listed_and_chosen_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "both.pt"
    torch.save({"student": FIRST, "teacher": SECOND}, file)
    assert main(["inspect", str(file), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["  --state student", "  --state teacher"]
    assert main(["inspect", str(file), "--num-heads", "2"]) == 2
    assert "holds several sets of weights: student, teacher; choose one with --state KEY" in capsys.readouterr().err
    choose = ["inspect", str(file), "--num-heads", "2", "--state", "teacher"]
    assert main([*choose, "--list"]) == 0
    assert "(--state KEY): student, teacher" in capsys.readouterr().out
    assert main([*choose, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    save_file(SECOND, tmp_path / "teacher.safetensors")
    assert main(["inspect", str(tmp_path / "teacher.safetensors"), "--num-heads", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows


def test_each_path_of_a_comparison_has_a_state_of_its_own(tmp_path, capsys):
    file = str(tmp_path / "both.pt")
    torch.save({"student": FIRST, "teacher": SECOND}, file)
    states = ["--state", "student", "--state", "teacher"]
    assert main(["inspect", file, *states, "--num-heads", "2", "--json", "--compare", file]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] != report["compare"][0]["rows"]
    assert main(["inspect", file, *states, "--num-heads", "2"]) == 2
    assert "--state is given 2 times for 1 paths" in capsys.readouterr().err


def test_what_a_list_cannot_do(tmp_path, capsys):
    save_file(FIRST, tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--list", "--csv", "x.csv"]) == 2
    assert "--list computes no spectra for --csv" in capsys.readouterr().err
    (tmp_path / "run" / "snapshots").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for option, message in (("--list", "leave out --list"), ("--state=x", "leave out --state x")):
        assert main(["inspect", str(tmp_path / "run"), option]) == 2
        assert message in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--list"]) == 2
    assert "num_heads=" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--list", "--state", "ema"]) == 2
    assert "has no weights 'ema': it holds layers" in capsys.readouterr().err
