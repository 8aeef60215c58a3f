"""Cost of a monitor in a training run: one measurement every 100 steps, beside the steps themselves.

    python benchmarks/monitor.py                          # a small GPT-2, about a minute on 2 CPU cores
    python benchmarks/monitor.py --layers 12 --width 768 --heads 12 --device cuda --json monitor.json

A round is one training step (forward, backward, AdamW) and the same step with an attached monitor that is due, the
order changing from round to round, because these machines drift. A measurement is the difference of the two; so that
the difference does not drown in the noise of the steps, it is also timed by itself, between the hook's begin and end.
The share is the median measurement, by itself, over 100 times the median step. Rounds that warm up are left out.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from clock import now

from rankdecay.lab.machine import describe_machine, resolve_device, versions
from rankdecay.monitor import Monitor

EVERY = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 4, "width": 256, "heads": 4, "batch": 8, "length": 128, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="PATH", help="write the machine and every number")
    arguments = parser.parse_args()
    device = arguments.device = resolve_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    seconds = measure(arguments)
    milliseconds = {what: 1e3 * statistics.median(times) for what, times in seconds.items()}
    share = milliseconds["measurement"] / (EVERY * milliseconds["step"])
    machine = describe_machine(device)
    print(f"{machine}; torch {torch.__version__}")
    print(
        f"GPT-2, {arguments.layers} layers of {arguments.width}, {arguments.heads} heads, "
        f"{arguments.batch} × {arguments.length} tokens; median of {arguments.rounds} rounds"
    )
    for what, ms in milliseconds.items():
        print(f"{what:24}{ms:10.2f} ms   best {1e3 * min(seconds[what]):.2f}")
    print(f"every {EVERY} steps it adds    {share:.4%}")
    if arguments.json:
        case = {name: value for name, value in vars(arguments).items() if name != "json"}
        record = {"machine": machine, "versions": versions(), "case": case, "ms": milliseconds, "share": share}
        Path(arguments.json).write_text(json.dumps(record | {"seconds": seconds}, indent=1) + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step, of a step with a measurement, and of the measurement in it, round by round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": arguments.width, "n_layer": arguments.layers, "n_head": arguments.heads}
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=arguments.length))
    model.to(arguments.device)
    tokens = torch.randint(50257, (arguments.batch, arguments.length), device=arguments.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    seconds: dict[str, list[float]] = {"step": [], "step with measurement": [], "measurement": []}

    def step() -> float:
        start = now(arguments.device)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        return now(arguments.device) - start

    def monitored() -> float:
        began: list[float] = []
        first = optimizer.register_step_post_hook(lambda *_: began.append(now(arguments.device)))
        attached = monitor.attach(optimizer)
        last = optimizer.register_step_post_hook(
            lambda *_: seconds["measurement"].append(now(arguments.device) - began[0])
        )
        took = step()
        for handle in (first, attached, last):
            handle.remove()
        return took

    monitor = Monitor(model, every=1, log=lambda _: None)
    variants = {"step": step, "step with measurement": monitored}
    for round_number in range(arguments.rounds + 2):
        for what, run in sorted(variants.items(), reverse=bool(round_number % 2)):
            seconds[what].append(run())
    return {what: times[2:] for what, times in seconds.items()}


if __name__ == "__main__":
    main()
