"""Cost of `rankdecay inspect` per layer, beside the SVD of the products written out and beside reading the file.

    python benchmarks/inspection.py                     # GPT-2 124M and the shapes of a 7B model, about 3 minutes
    python benchmarks/inspection.py --models gpt2 --json inspect.json

Random checkpoints are written to a temporary folder: GPT-2 124M whole (12 layers, float32), and ``--layers`` layers of
the attention of a 7B model (d = 4096, 32 heads of 128, bfloat16). Everything is per layer. *direct* is
``torch.linalg.svdvals`` in float64 of one head's d × d product, measured once, times the products of a layer; *read* is
reading the bytes of a layer's attention from a file that the system has in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from clock import seconds_of
from safetensors.torch import save_file

from rankdecay.attention import find_attention
from rankdecay.inspection import inspect
from rankdecay.lab.machine import describe_machine, versions


def write_gpt2(folder: Path, layers: int) -> int:
    """GPT-2 124M's attention, embeddings and MLP, in one file. Returns the number of layers."""
    tensors = {"wte.weight": torch.randn(50257, 768) * 0.02, "wpe.weight": torch.randn(1024, 768) * 0.02}
    for i in range(12):
        for name, shape in (("attn.c_attn", (768, 2304)), ("attn.c_proj", (768, 768)), ("mlp.c_fc", (768, 3072)),
                            ("mlp.c_proj", (3072, 768))):  # fmt: skip
            tensors[f"h.{i}.{name}.weight"] = torch.randn(shape) * 0.02
            tensors[f"h.{i}.{name}.bias"] = torch.zeros(shape[1])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 12, "initializer_range": 0.02}))
    return 12


def write_7b(folder: Path, layers: int) -> int:
    """The attention of a few layers with the shapes of a 7B Llama, a file each."""
    for i in range(layers):
        names = [f"model.layers.{i}.self_attn.{letter}_proj.weight" for letter in "qkvo"]
        tensors = {name: (torch.randn(4096, 4096) * 0.02).bfloat16() for name in names}
        save_file(tensors, folder / f"model-{i}.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 32}))
    return layers


WRITERS = {"gpt2": write_gpt2, "7b": write_7b}


def read_attention(folder: Path) -> None:
    """The bytes of the attention tensors, as the file has them."""
    for layer in find_attention(folder):
        for view in layer.views:
            view.weight().sum()  # touches every byte


def direct(folder: Path) -> tuple[float, int]:
    """Seconds of the SVD of one head's W_Kᵀ W_Q, d × d, and the number of products in a layer."""
    layer = find_attention(folder)[0]
    product = layer.query.heads()[0].double().T @ layer.key.heads()[0].double()
    return seconds_of(lambda: torch.linalg.svdvals(product)), 2 * layer.num_heads


def measure(model: str, layers: int, rounds: int) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = WRITERS[model](folder, layers)
        inspect(folder)  # the baseline is drawn once per shape; warms up
        ours, reads = [], []
        for _ in range(rounds):
            ours.append(seconds_of(lambda: inspect(folder)))
            reads.append(seconds_of(lambda: read_attention(folder)))
        one, products = direct(folder)
        code = f"import rankdecay as rd; rd.inspect({str(folder)!r})"
        idle = f"import rankdecay as rd; rd.inspect; rd.find_attention({str(folder)!r})"
        peak, floor = (
            int(subprocess.run([sys.executable, "-c", text + _PEAK], capture_output=True, text=True, check=True).stdout)
            for text in (code, idle)
        )
    per_layer = statistics.median(ours) / count
    reading = statistics.median(reads) / count
    return {
        "model": model,
        "inspect_ms": 1e3 * per_layer,
        "direct_ms": 1e3 * one * products,
        "read_ms": 1e3 * reading,
        "times_faster_than_direct": one * products / per_layer,
        "times_reading": per_layer / reading,
        "peak_mb_above_idle": (peak - floor) / 1024,
    }


#: Prints the peak in kB. Not ru_maxrss, which a process inherits from the one that starts it.
_PEAK = "; print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--layers", type=int, default=2, help="layers of the 7B model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the machine and every figure")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{describe_machine('cpu')}; torch {torch.__version__}; per layer, median of {arguments.rounds} rounds")
    rows = []
    for model in arguments.models:
        row = measure(model, arguments.layers, arguments.rounds)
        rows.append(row)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    if arguments.json:
        record = {"machine": describe_machine("cpu"), "versions": versions(), "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
