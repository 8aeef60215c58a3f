"""The cost of decaying rotary planes: the hook's part of a training step of a Llama of GPT-2's size, 4 × 512 tokens.

    OMP_NUM_THREADS=2 python benchmarks/planes.py                # about 3 minutes on 2 CPU cores
    python benchmarks/planes.py --device cuda --rounds 20

The model has 12 layers, width 768, 12 heads and GPT-2's vocabulary: 24 matrices of 768² lose 32 planes. Timed in turns,
because these machines drift: a training step (forward, backward, AdamW) without a decay, AdamW's part of it, all that
the hook does before and after a step, and for comparison one pass of reading the same matrices and one of scaling them,
below which no decay of their rows can go. Medians of the rounds, and the best; where the two are far apart, something
else was using the machine, and a step of a second averages over what a decay of milliseconds meets or misses.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clock import seconds_of

import rankdecay as rd
from rankdecay.lab.machine import describe_machine, resolve_device, versions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def variants(device: str, dtype: torch.dtype, layers: int, width: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=layers, intermediate_size=8 * width // 3,
        vocab_size=50257, max_position_embeddings=1024,
    )  # fmt: skip
    built: Any = LlamaForCausalLM(config)
    model = built.to(device, dtype)
    tokens = torch.randint(50257, (4, 512), device=device)
    optimizer = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.1), query_key=rd.Planes(0.1, keep=8)), lr=3e-4)
    matrices = [
        m.weight.detach() for layer in model.model.layers for m in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    ]
    factor = torch.ones(width, 1, device=device, dtype=dtype)

    def train() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    train()
    attachment = rd.attach(optimizer)
    for handle in attachment._handles:  # called by hand, so that they are timed alone
        handle.remove()

    def decay() -> None:
        attachment._before_step(optimizer, (optimizer,), {})
        attachment._after_step(optimizer, (optimizer,), {})

    return {
        "training step": train,
        "of that AdamW.step": optimizer.step,
        "planes, the hook": decay,
        "reading the matrices": lambda: [torch.linalg.vector_norm(m, dim=1) for m in matrices],
        "scaling the matrices": lambda: [m.mul_(factor) for m in matrices],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--json", type=Path, help="file to write the readings to")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    torch.manual_seed(0)
    calls = variants(device, DTYPES[arguments.dtype], arguments.layers, arguments.width)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.rounds + 1):  # the first warms up
        for name, call in calls.items():
            several = 1 if name == "training step" else 5
            times[name] += [seconds_of(call, device) for _ in range(several)][-several // 2 :]
    readings = {name: {"ms": 1e3 * statistics.median(t[1:]), "best": 1e3 * min(t[1:])} for name, t in times.items()}
    print(describe_machine(device), arguments.dtype)
    step = readings["training step"]
    for name, reading in readings.items():
        share = "".join(f"{100 * reading[key] / step[key]:10.3f} %" for key in ("ms", "best"))
        print(f"{name:24}{reading['ms']:12.2f} ms (best {reading['best']:10.2f}){share}")
    if arguments.json:
        document = {"machine": describe_machine(device), "versions": versions(), "threads": torch.get_num_threads()}
        document |= {
            "dtype": arguments.dtype,
            "layers": arguments.layers,
            "width": arguments.width,
            "readings": readings,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
