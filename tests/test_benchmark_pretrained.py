"""What `benchmarks/pretrained.py` does to heads whose rank is known, and that it reads what `inspect` reads."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import needs

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import pretrained
import pretrained_findings

gguf = needs.package("gguf")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def write_llama(folder: Path, layers: int = 2, width: int = 64) -> Path:
    tensors = {
        f"model.layers.{i}.self_attn.{letter}_proj.weight": random(width, width, seed=10 * i + n).float() * 0.02
        for i in range(layers)
        for n, letter in enumerate("qkvo")
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2}))
    return folder


def test_a_block_of_32_has_16_values_at_even_distances():
    matrix = random(4, 64)
    found = pretrained.rounded(matrix)
    for row, given in zip(found.reshape(-1, 32), matrix.reshape(-1, 32), strict=True):
        step = (given.max() - given.min()) / 15
        assert len(row.unique()) <= 16
        assert (row - given).abs().max() < 0.51 * step
        levels = (row - row.min()) / step
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=2e-2)  # 16-bit scales


def test_heads_are_rounded_as_they_lie_in_a_file():
    output = random(2, 64, 32)  # two heads of W_O, (width, head size)
    whole = torch.cat([output[0], output[1]], dim=1)
    again = pretrained.rounded_heads({"output": output})["output"]
    torch.testing.assert_close(torch.cat([again[0], again[1]], dim=1), pretrained.rounded(whole))
    query = random(2, 32, 64)
    again = pretrained.rounded_heads({"query": query})["query"]
    torch.testing.assert_close(again.reshape(64, 64), pretrained.rounded(query.reshape(64, 64)))


def test_ranks_are_those_of_inspect(tmp_path):
    path = write_llama(tmp_path / "model")
    heads = pretrained.heads_of(path)
    rows = pretrained.layer_rows("llama", path)
    assert [(row["layer"], row["product"]) for row in rows] == [
        (layer, product) for layer in (0, 1) for product in pretrained.PRODUCTS
    ]
    for row in rows:
        assert pretrained.ranks_of(heads[row["layer"]])[row["product"]] == pytest.approx(row["rank"], rel=1e-9)
        assert (row["heads"], row["head_dim"]) == (2, 32)
        assert row["least"] <= row["rank"] <= row["largest"]
        assert row["untrained"] == pytest.approx(row["rank"], abs=0.05)  # it is untrained


@pytest.mark.parametrize("rank", [2, 8])
def test_a_cut_has_the_rank_it_says_and_rounding_raises_it(rank):
    heads = pretrained.gaussian_heads(0, 64)
    low = pretrained.cut(heads, rank)
    assert all((torch.linalg.matrix_rank(own) == rank).all() for own in low.values())
    exact, drawn = pretrained.ranks_of(low), pretrained.ranks_of(pretrained.gaussian_heads(0, rank))
    for product in pretrained.PRODUCTS:
        assert 0 < exact[product] <= rank / 64
        assert 0 < drawn[product] <= rank / 64
    [row] = pretrained.control_rows("gaussian", {0: lambda rank: pretrained.cut(heads, rank)}, (rank,))
    assert row["before"] == exact
    assert all(row["after"][product] > exact[product] for product in pretrained.PRODUCTS)
    assert 0.02 < row["error"] < 0.15


def test_layers_of_a_control_are_spread_over_the_depth():
    assert pretrained.spread(range(30)) == [0, 6, 12, 17, 23, 29]
    assert pretrained.spread(range(3)) == [0, 1, 2]
    assert pretrained.spread([5]) == [5]


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match="is not a directory"):
        pretrained.checkpoint(tmp_path / "none")
    assert pretrained.checkpoint(tmp_path) == tmp_path
    (tmp_path / "a.gguf").write_bytes(b"")
    assert pretrained.checkpoint(tmp_path) == tmp_path / "a.gguf"


def test_the_tables_show_what_was_measured(tmp_path, monkeypatch, capsys):
    for name in ("minilm", "smollm2"):
        write_llama(tmp_path / name)
    monkeypatch.setattr(pretrained, "RANKS", (2,))
    path = tmp_path / "rows.json"
    words = ["", "--minilm", str(tmp_path / "minilm"), "--smollm2", str(tmp_path / "smollm2"), "--json", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    pretrained.main()
    capsys.readouterr()
    rows = json.loads(path.read_text())
    pretrained_findings.main(["layers", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4
    assert f"| {rows['layers'][0]['rank']:.3f} |" in lines[2]
    pretrained_findings.main(["rounding", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["2 of 64", "2 of 32", "whole of 32", "2 of 32"]
    assert pretrained_findings.whole_rise(path) < 0.05
    rises = pretrained_findings.rises(path=path)
    assert len(rises) == 2 * (6 + 2 + 2)
    assert min(rises) >= 0 < max(rises)  # at rank 2 a rank may stay, since it counts whole directions
