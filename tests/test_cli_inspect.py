"""`rankdecay inspect` as it is typed: summary, JSON, CSV, page, comparison, mapping, refusals."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import rankdecay as rd
from rankdecay.cli import main
from tests import needs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    transformers = needs.package("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=48,
        vocab_size=40,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


def _answer(capsys, *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_summary(checkpoint, capsys):
    text = _answer(capsys, checkpoint)
    assert text == f"{rd.inspect(checkpoint)}\n"
    assert "2 query heads share a key head" in text


def test_json_has_the_rows_other_tools_read(checkpoint, capsys):
    answer = json.loads(_answer(capsys, checkpoint, "--json", "--layers", 1, "--heads", 0, 2))
    assert answer["command"] == "inspect"
    assert [(r["layer"], r["head"], r["product"]) for r in answer["rows"]] == [
        (1, 0, "query_key"), (1, 2, "query_key"), (1, 0, "value_output"), (1, 2, "value_output"),
    ]  # fmt: skip
    for row in answer["rows"]:
        for figures in (row, row["untrained"]):
            for key in ("nuclear_norm", "effective_rank", "stable_rank", "pseudo_rank", "nuclear_gap", "imbalance"):
                assert isinstance(figures[key], float)


def test_what_is_looked_at_is_not_written_over(checkpoint, tmp_path, capsys):
    weights = sorted(checkpoint.glob("*.safetensors"))[0]
    before = weights.read_bytes()
    for option in ("--csv", "--html"):
        assert main(["inspect", str(checkpoint), option, str(weights)]) == 2
        assert "is a file that would be read: give another name" in capsys.readouterr().err
    assert weights.read_bytes() == before
    out = str(tmp_path / "out")
    assert main(["inspect", str(checkpoint), "--csv", out, "--html", out]) == 2
    assert "give each a file of its own" in capsys.readouterr().err


def test_csv_and_page(checkpoint, tmp_path, capsys):
    table, page = tmp_path / "rows.csv", tmp_path / "page.html"
    out = _answer(capsys, checkpoint, "--csv", table, "--html", page)
    assert str(table) in out
    assert str(page) in out
    assert len(list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))) == 16
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("options", [(), ("--quiet",), ("--json",)], ids=["plain", "quiet", "json"])
def test_a_line_of_progress_where_work_is_long(options, tmp_path, capsys, monkeypatch):
    tensors = {f"{i}.{name}_proj.weight": torch.eye(4) for i in range(8) for name in ("q", "k", "v", "o")}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [tmp_path / "model.safetensors", "--num-heads", 2, *options]
    assert main(["inspect", *map(str, command)]) == 0
    fast = capsys.readouterr()
    assert fast.err == ""
    clock = iter(range(0, 1000, 2))  # two seconds a layer
    monkeypatch.setattr("rankdecay.commands.progress.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert main(["inspect", *map(str, command)]) == 0
    slow = capsys.readouterr()
    assert slow.out == fast.out
    lines = [] if options else [
        f"{command[0]}: 3 of 8 layers, 6 s, ETA 10 s", f"{command[0]}: 6 of 8 layers, 12 s, ETA 4 s",
    ]  # fmt: skip
    assert slow.err.splitlines() == lines


def test_a_comparison(checkpoint, tmp_path, capsys):
    later = tmp_path / "later"
    shutil.copytree(checkpoint, later)
    shard = next(file for file in later.glob("*.safetensors"))
    from safetensors.torch import load_file

    save_file({name: value * 2 for name, value in load_file(shard).items()}, shard, metadata={"format": "pt"})
    text = _answer(capsys, checkpoint, "--compare", later)
    assert "Pseudo rank, mean over heads, in the order given" in text
    answer = json.loads(_answer(capsys, checkpoint, "--compare", later, "--json"))
    assert len(answer["compare"][0]["rows"]) == len(answer["rows"])
    table = tmp_path / "rows.csv"
    _answer(capsys, checkpoint, "--compare", later, "--csv", table)
    lines = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    rows = answer["rows"] + answer["compare"][0]["rows"]
    assert [float(line["nuclear_norm"]) for line in lines] == [row["nuclear_norm"] for row in rows]
    assert [line["source"] for line in lines] == [str(checkpoint)] * 16 + [str(later)] * 16


def test_a_run_directory_of_ours(capsys):
    answer = json.loads(_answer(capsys, ROOT / "docs" / "data" / "grok_default", "--json"))
    members = {row["name"] for row in answer["rows"]}
    assert "low_rank, seed 0, layer 1" in members
    low, none = (
        [r["effective_rank"] for r in answer["rows"] if r["name"].startswith(arm)] for arm in ("low_rank", "none")
    )
    assert max(low) < min(none)


def test_a_state_dict_needs_to_be_told_its_heads(tmp_path, capsys):
    file = tmp_path / "own.safetensors"
    save_file({f"0.{name}.weight": torch.randn(8, 8) for name in "abcd"}, file)
    assert main(["inspect", str(file)]) == 2
    error = capsys.readouterr().err
    assert "0.a.weight (8, 8)" in error
    assert "--names query=...,key=...,value=...,output=... --num-heads N" in error
    assert "0.attn" not in error
    text = _answer(capsys, file, "--names", "query=a,key=b,value=c,output=d", "--num-heads", 2)
    assert "1 attention layer\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing does not exist"),
        (["pyproject.toml"], "is not a checkpoint"),
        (["src"], "has no weights"),
        (["docs/data/grok_default", "--compare", "missing"], "missing does not exist"),
    ],
)
def test_what_cannot_work_is_one_line_and_code_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_wrong_names_are_refused(checkpoint, capsys):
    assert main(["inspect", str(checkpoint), "--names", "q=a"]) == 2
    assert "--names q=a: expected name=projection, where name is one of query, key" in capsys.readouterr().err
    assert main(["inspect", str(checkpoint), "--layers", "9"]) == 2
    assert "layers=9 is out of range: the model has layers 0–1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--csv", "--html"])
def test_a_file_that_cannot_be_written_is_one_line(option, checkpoint, tmp_path, capsys):
    path = tmp_path / "nowhere" / "file"
    assert main(["inspect", str(checkpoint), option, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rankdecay: error: {path}")
    assert error.count("\n") == 1


@pytest.fixture
def two_kinds(tmp_path) -> Path:
    """Attention under names of its own, one that is known, and one that nobody can read."""
    file = tmp_path / "own.safetensors"
    own = {f"encoder.layers.4.own.{name}.weight": torch.randn(8, 8) for name in "abcd"}
    known = {f"decoder.layers.4.attn.{name}_proj.weight": torch.randn(8, 8) for name in "qkvo"}
    save_file(own | known | {"decoder.layers.5.attn.kqv.weight": torch.randn(24, 8)}, file)
    return file


NAMED = ("--names", "query=a,key=b,value=c,output=d,rotary=none,qk_norm=no")


def test_strict_is_an_exit_code_of_its_own(two_kinds, capsys):
    assert main(["inspect", str(two_kinds), "--num-heads", "2", "--strict"]) == 3
    assert "not handled: decoder.layers.5.attn: kqv (24, 8)" in capsys.readouterr().out
    answer = json.loads(_answer(capsys, two_kinds, "--num-heads", 2, "--json"))
    assert [said.partition(":")[0] for said in answer["unhandled"]] == ["decoder.layers.5.attn"]
    both = (*NAMED, "--names", "fused=kqv,order=kqv", "--num-heads", "2", "--strict", "--json")
    answer = json.loads(_answer(capsys, two_kinds, *both))
    assert answer["unhandled"] == []
    assert {row["label"] for row in answer["rows"]} == {"encoder.4", "decoder.4", "decoder.5"}


def test_only_what_is_named(two_kinds, capsys):
    answer = json.loads(_answer(capsys, two_kinds, *NAMED, "--only", "--num-heads", 2, "--json", "--strict"))
    assert {row["label"] for row in answer["rows"]} == {"4"}
    assert main(["inspect", str(two_kinds), "--only"]) == 2
    assert "--only needs --names: it restricts the search" in capsys.readouterr().err


def test_layers_of_a_tower_and_the_size_of_a_head(two_kinds, capsys):
    def labels(*layers: str) -> set[str]:
        how = (*NAMED, "--head-dim", 4, "--json", "--layers", *layers)
        return {row["label"] for row in json.loads(_answer(capsys, two_kinds, *how))["rows"]}

    assert labels("4") == {"encoder.4", "decoder.4"}
    assert labels("decoder.4") == {"decoder.4"}
    assert labels("encoder.4", "decoder.4") == {"encoder.4", "decoder.4"}
    for wrong in ("encoder.5", "7"):
        assert main(["inspect", str(two_kinds), *NAMED, "--head-dim", "4", "--layers", wrong]) == 2
        assert f"layers={wrong} is out of range" in capsys.readouterr().err
    assert main(["inspect", str(two_kinds), "--head-dim", "0"]) == 2
    assert "--head-dim 0 must be at least 1" in capsys.readouterr().err


def test_a_listing_has_the_layers_asked_for_and_no_heads(checkpoint, capsys) -> None:
    shown = _answer(capsys, checkpoint, "--list", "--layers", 1)
    assert "layers.1.self_attn.q_proj.weight" in shown
    assert "layers.0.self_attn.q_proj.weight" not in shown
    assert main(["inspect", str(checkpoint), "--list", "--heads", "0"]) == 2
    assert "--list computes no spectra for --heads" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--layers=0", "--heads=0", "--num-heads=4", "--head-dim=8", "--names=fused=qkv"])
def test_what_a_run_directory_cannot_be_asked_is_not_ignored(option, capsys) -> None:
    assert main(["inspect", str(ROOT / "docs" / "data" / "grok_default"), option]) == 2
    said = f"which is always shown whole: leave out {option.partition('=')[0]}"
    assert said in capsys.readouterr().err
