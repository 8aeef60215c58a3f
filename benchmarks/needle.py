"""Directions that low-rank decay has emptied, under the task's gradient: with the decay on, and without it.

    rankdecay language --preset standard --steps 600 --evaluate-every 300 --arms low_rank --strengths low_rank=10 \\
        --seeds 3 --save all --out runs/needle
    python benchmarks/needle.py runs/needle/models/* --json docs/data/language/needle.json     # minutes a model
    python benchmarks/attention_findings.py needle docs/data/language/needle.json    # the table of the rows

At a full rank the subgradient of the nuclear norm is one matrix; where the rank is low it is a set, U Vᵀ + Z with any Z
of spectral norm at most 1 between the empty directions ("the needle and the fan"). So the decay leaves them to the
task: they stay empty as long as its gradient does not exceed the threshold there, and may come back where it does.

Every model is trained on at its last rate, from the same moments (none) and on the same batches, with its decay and
with none of W_Q and W_K. Measured in each head of W_Q and W_K, over all layers, with U and V the directions that are
in use at the start: the share of ‖W‖² in the block between the empty directions; the share of the gradient's square
there, beside that of a matrix without a preferred direction, and its largest singular value over that of the whole
gradient; and with the decay on by how much the largest singular value there has grown in three steps of four, over the
threshold of four.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import rankdecay as rd
from rankdecay.lab.experiments.attention.language import text
from rankdecay.lab.experiments.attention.language.experiment import LanguageModelling
from rankdecay.lab.experiments.attention.language.settings import PRESETS
from rankdecay.lab.machine import describe_machine, versions
from rankdecay.lab.session.session import LAST_RATE, Plan, Run, Session

STRENGTH, EVERY = 10.0, 4  # as the models were trained
STEPS, INTERVAL, WARMUP = 200, 20, 20
WINDOWS = 64  # of the gradient that is measured
IN_USE = 1e-4  # of the largest singular value: a direction above it is in use
UNSEEN = 1000  # added to the seed of a model's batches
ARMS = ("decay on", "decay off")
Row = dict[str, Any]
Places = dict[str, tuple[Tensor, Tensor]]  # of each parameter: U and V of its heads, those in use, else zero


def heads(weight: Tensor, count: int) -> Tensor:
    """(heads, head size, width), in float64."""
    return weight.detach().double().unflatten(0, (count, -1))


def places(model: torch.nn.Module, count: int) -> Places:
    """Projectors onto the directions in use of W_Q and W_K: (heads, head size, head size), (heads, width, width)."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            left, sigma, right = torch.linalg.svd(heads(parameter, count), full_matrices=False)
            used = (sigma > IN_USE * sigma[..., :1]).double()
            found[name] = (left * used[..., None, :]) @ left.mT, (right.mT * used[..., None, :]) @ right
    return found


def emptied(matrix: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    """The block of heads between the directions that were empty: (heads, head size, width)."""
    left, right = place
    matrix = matrix - left @ matrix
    return matrix - matrix @ right


def share(matrices: dict[str, Tensor], where: Places) -> float:
    """Of the square of all matrices, what lies between the empty directions."""
    inside = sum(emptied(own, where[name]).square().sum() for name, own in matrices.items())
    return float(inside / sum(own.square().sum() for own in matrices.values()))


def isotropic(where: Places) -> float:
    """The share that a matrix without any preferred direction would have there."""
    sizes = [
        (1 - left.diagonal(dim1=-2, dim2=-1).mean(-1)) * (1 - right.diagonal(dim1=-2, dim2=-1).mean(-1))
        for left, right in where.values()
    ]
    return float(torch.cat(sizes).mean())


def sharpest(matrices: dict[str, Tensor], where: Places) -> list[float]:
    """Of each head the largest singular value between the empty directions."""
    found = [torch.linalg.matrix_norm(emptied(own, where[name]), ord=2) for name, own in matrices.items()]
    return torch.cat(found).tolist()


def measure(its: Session, where: Places, count: int, batch: tuple[Tensor, ...]) -> Row:
    """The figures of a session as it stands."""
    parameters = dict(its.model.named_parameters())
    weights = {name: heads(parameters[name], count) for name in where}
    its.problem.loss(its.model, batch).backward()
    gradients = {name: heads(parameters[name].grad, count) for name in where}  # type: ignore[arg-type]
    its.model.zero_grad(set_to_none=True)
    whole = torch.cat([torch.linalg.matrix_norm(own, ord=2) for own in gradients.values()]).tolist()
    sigma = torch.cat([torch.linalg.svdvals(own) for own in weights.values()])
    row = its.evaluate()
    return {
        "step": its.step, "loss": row["loss"],
        "share": share(weights, where), "gradient_share": share(gradients, where), "isotropic": isotropic(where),
        "gradient_sharpest": statistics.fmean(a / b for a, b in zip(sharpest(gradients, where), whole, strict=True)),
        "in_use": float((sigma > IN_USE * sigma[:, :1]).double().sum(1).mean()),
        "pseudo_rank": float(rd.spectrum(torch.cat(list(weights.values()))).pseudo_rank().mean()),
    }  # fmt: skip


def regrown(its: Session, where: Places, count: int, lr: float) -> float:
    """The largest singular value between the empty directions over the threshold of four steps, mean over heads."""
    parameters = dict(its.model.named_parameters())
    weights = {name: heads(parameters[name], count) for name in where}
    norms = torch.cat([own.norm(dim=(-2, -1)) for own in weights.values()])
    size = min(next(iter(weights.values())).shape[-2:])
    thresholds = (EVERY * lr * STRENGTH * norms / math.sqrt(size)).tolist()
    return statistics.fmean(a / b for a, b in zip(sharpest(weights, where), thresholds, strict=True))


def named(directory: Path) -> tuple[str, int]:
    """The arm with its strength, and the seed, of a directory of a model."""
    return directory.name.partition("_mlp_")[0], int(directory.name.rpartition("_seed_")[2])


def train_on(directory: Path, arm: str, problem: LanguageModelling, steps: int = STEPS) -> list[Row]:
    """Train a stored model on under an arm; a row per interval."""
    model, seed = named(directory)
    settings = PRESETS["standard"]
    rest = rd.Frobenius(settings.rest_decay)
    decay = rd.LowRank(STRENGTH, unit="head", every=EVERY) if arm == "decay on" else rd.Frobenius(0.0)
    lr = settings.lr * LAST_RATE
    # so many steps that the cosine stays at its start
    plan = Plan(10**9, settings.batch_size, lr, warmup=WARMUP)
    run = Run(arm, STRENGTH, 0.1, False, seed + UNSEEN, {"query_key": decay, "value_output": rest, "mlp": rest})
    its = Session(run, problem, plan)
    its.model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)  # its embedding is tied
    count = settings.heads
    where = places(its.model, count)
    batch = problem.batch(seed + 2 * UNSEEN, 0, WINDOWS)
    rows, grown = [measure(its, where, count, batch)], []
    for step in its.train(steps):
        if arm == "decay on" and step % EVERY == EVERY - 1:
            grown.append(regrown(its, where, count, plan.lr_at(step)))
        if step % INTERVAL == 0:
            rows.append(measure(its, where, count, batch) | ({"grown": statistics.fmean(grown)} if grown else {}))
            grown = []
    return [{"model": model, "seed": seed, "arm": arm, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="directories of models that `rankdecay language` kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="write the machine and every row, beside those that are there; a model that has rows is not trained again",
    )
    given = parser.parse_args()
    settings = PRESETS["standard"]
    problem = LanguageModelling(
        settings, text.load(text=None, dataset=None, tokenizer=None, share=settings.valid_share)
    )
    rows: list[Row] = json.loads(given.json.read_text())["rows"] if given.json and given.json.exists() else []
    done = {(row["model"], row["seed"], row["arm"]) for row in rows}
    for directory, arm in itertools.product(given.models, ARMS):
        if (*named(directory), arm) not in done:
            rows += train_on(directory, arm, problem, given.steps)
            print(json.dumps(rows[-1]), flush=True)
            if given.json:  # as far as it is: the same command goes on, and other models are added
                document = {"machine": describe_machine("cpu"), "versions": versions(), "rows": rows}
                given.json.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
