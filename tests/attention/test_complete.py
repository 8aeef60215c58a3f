"""Files that do not hold every layer of their model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rankdecay as rd
from rankdecay.cli import main


def _saved(folder: Path, layers: list[int], config: dict[str, object] | None = None, **others: torch.Tensor) -> Path:
    weights = {f"model.layers.{i}.self_attn.{n}_proj.weight": torch.randn(8, 8) for i in layers for n in "qkvo"}
    torch.save(weights | others, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2} | (config or {})))
    return folder


@pytest.mark.parametrize(
    ("layers", "config", "said"),
    [
        ([0, 1, 3], {}, "layer 2 is missing although layer 3 is present: the file is incomplete; copy it again"),
        ([1, 999_999_999], {}, "layer 2 is missing although layer 999999999 is present"),
        ([0, 1], {"num_hidden_layers": 4}, "has 2 of the 4 layers in its config (0-1)"),
        ([2, 3], {"num_hidden_layers": 4}, "has 2 of the 4 layers in its config (2-3)"),
    ],
)
def test_layers_that_a_file_does_not_hold_are_said(layers, config, said, tmp_path, capsys) -> None:
    path = _saved(tmp_path, layers, config)
    report = rd.inspect(path)
    assert [row["layer"] for row in report.rows if row["product"] == "query_key"][::2] == layers
    assert len(report.unhandled) == 1
    assert report.unhandled[0].startswith(f"model.layers: {said}")
    assert main(["inspect", str(path), "--strict"]) == 3
    assert said in " ".join(capsys.readouterr().out.split())


def test_layers_between_which_stands_what_has_no_weights_are_whole(tmp_path) -> None:
    """As in a sequence of layers and dropouts."""
    assert rd.inspect(_saved(tmp_path, [0, 2, 4])).unhandled == []
    assert "layer 1 is missing" in rd.inspect(_saved(tmp_path, [0, 2, 4, 8])).unhandled[0]


def test_a_whole_file_is_whole(tmp_path) -> None:
    other = {"model.layers.1.mamba.in_proj.weight": torch.randn(8, 8), "visual.layers.7.conv.weight": torch.randn(8, 8)}
    path = _saved(tmp_path, [0, 2], {"num_hidden_layers": 3}, **other)
    assert not rd.inspect(path).unhandled
    (tmp_path / "stage").mkdir()
    assert not rd.inspect(_saved(tmp_path / "stage", [2, 3])).unhandled
