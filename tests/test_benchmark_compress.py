"""What `benchmarks/compress.py` compares: rivals at full size change nothing, and its sets of planes are compress's."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from tests import needs

needs.package("transformers")
needs.package("scipy")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import compress_findings  # noqa: E402

from benchmarks import compress as benchmark  # noqa: E402
from rankdecay.compress import compress  # noqa: E402

D = benchmark.TINY.head_dim


@pytest.fixture(params=benchmark.FAMILIES)
def model(request: pytest.FixtureRequest):
    made = benchmark.fresh(benchmark.TINY, request.param, 0, D).eval()
    for name, parameter in made.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(0))


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def test_rivals_at_full_size_change_nothing(model, tokens: torch.Tensor) -> None:
    whole = logits(model, tokens)
    for change in (benchmark.keys_by_svd, benchmark.rows_by_magnitude, benchmark.values_by_magnitude):
        with benchmark.changed(model, D) as layers:
            for heads in layers:
                change(heads, D)
            torch.testing.assert_close(logits(model, tokens), whole, atol=1e-5, rtol=1e-4)
    with benchmark.changed(model, D) as layers:
        benchmark.values_at(layers, [None] * len(layers), D)
        torch.testing.assert_close(logits(model, tokens), whole, atol=1e-5, rtol=1e-4)
        benchmark.values_at(layers, [None] * len(layers), 2)
        assert not torch.allclose(logits(model, tokens), whole, atol=1e-3)
    torch.testing.assert_close(logits(model, tokens), whole, atol=0, rtol=0)  # they were put back


def test_the_svd_of_the_scores_keeps_their_matrix_and_loses_their_positions(model, tokens: torch.Tensor) -> None:
    def products(layers) -> torch.Tensor:
        return torch.stack([torch.einsum("ghid,gie->ghde", heads.query, heads.key) for heads in layers])

    whole = logits(model, tokens)
    with benchmark.changed(model, D) as layers:
        before = products(layers)
        for heads in layers:
            benchmark.scores_by_svd(heads, D)
        torch.testing.assert_close(products(layers), before, atol=1e-5, rtol=1e-3)
        assert not torch.allclose(logits(model, tokens), whole, atol=1e-4)


def test_planes_kept_and_values_put_are_the_model_that_compress_makes(model, tokens: torch.Tensor) -> None:
    small = compress(model, D // 2, calibration=tokens, sizes=[])
    kept = torch.zeros(D // 2, dtype=torch.bool)
    kept[small.compression.kept["all"]] = True
    with benchmark.changed(model, D) as layers:
        for heads in layers:
            heads.keep_planes(kept)
        benchmark.put_values(layers, [benchmark.Heads(one, D // 2) for one in benchmark.attentions(small)])
        torch.testing.assert_close(logits(model, tokens), logits(small, tokens), atol=1e-5, rtol=1e-4)


def test_fisher_scores_are_by_key_head_and_plane_and_are_sums_over_windows(model, tokens: torch.Tensor) -> None:
    both = benchmark.fisher(model, tokens[:2], D)
    one, other = benchmark.fisher(model, tokens[:1], D), benchmark.fisher(model, tokens[1:2], D)
    assert [scores.shape for scores in both] == [(benchmark.TINY.key_heads, D // 2)] * benchmark.TINY.depth
    for together, first, second in zip(both, one, other, strict=True):
        torch.testing.assert_close(together, first + second)


def test_moments_go_along_where_the_shape_is_the_same(tmp_path: Path) -> None:
    lab = benchmark.Lab(argparse.Namespace(dir=tmp_path, work=tmp_path), benchmark.TINY)
    model, moments = lab.shared("llama", 0)
    again, held = lab.shared("llama", 0)  # from the file
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=0, rtol=0)
    torch.testing.assert_close(held, moments, atol=0, rtol=0)
    small = compress(model, 8, calibration=lab.reported[:, :-1], sizes=[])
    after = benchmark.train(small, moments, benchmark.TINY, lab.corpus, 0, range(6, 7))
    steps = {name: int(state["step"]) for name, state in after.items()}
    assert {name for name, step in steps.items() if step == 1} == {
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qkvo"
    }
    assert set(steps.values()) == {1, 7}


def test_the_tables_are_made_from_rows(tmp_path: Path, capsys) -> None:
    rows = [
        {"family": "llama", "seed": seed, "arm": arm, "head_dim": size, "healed": loss + seed, "cache_bytes": 64 * size}
        | ({} if arm in ("dense", "small") else {"whole": 1.0, "cut": 2.0 + seed, "exact": arm == "planes"})
        for seed in (0, 1)
        for arm, size, loss in (("dense", 16, 1.0), ("cut", 8, 1.25), ("planes", 8, 1.5), ("small", 8, 0.5))
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tuned-llama.json").write_text(json.dumps({"strengths": {"planes": 1.0}}))
    compress_findings.main(["arms", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    planes = next(line for line in lines if line.startswith("| `Planes`, then cut | 8 | 512 | 2 | 2 of 2 |"))
    assert planes.endswith("| +0.500 ± 0.000 | +0.250 ± 0.000 |")  # paired by seed, so that seeds drop out
    assert any(line.startswith("| small from the start | 8 |") and "-0.500 ± 0.000" in line for line in lines)
    assert compress_findings.difference("llama", "planes", "8", "cut", directory=tmp_path) == "+0.250 ± 0.000"
    assert compress_findings.difference("llama", "planes", "8", "dense", directory=tmp_path) == "+0.500 ± 0.000"
    assert compress_findings.rise("llama", "cut", "8", directory=tmp_path) == "+1.500 ± 6.353"  # 12.7 / √2 · σ


def test_an_interval_is_that_of_a_t_distribution() -> None:
    assert compress_findings.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"  # 4.3027 / √3


def test_files_are_timed_beside_a_copy(tmp_path: Path, monkeypatch, capsys) -> None:
    command = ["compress", "--stage", "files", "--tiny", "--dir", str(tmp_path / "rows"), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    capsys.readouterr()
    compress_findings.main(["files", str(tmp_path / "rows")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if "layers" in line] == [
        "| 2 layers of width 64, in memory",
        "| 2 layers of width 64, not in memory",
    ]
