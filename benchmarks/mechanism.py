"""Figure 2 of the low-rank decay paper, made again: rank and accuracy in time, spectra, and W_Q W_Kᵀ by frequency.

    python benchmarks/mechanism.py --json docs/data/boundary/mechanism.json     # a quarter of an hour on a core

Addition in the paper's settings (`rankdecay boundary --preset paper`), one seed, 3,000 steps without leaving early,
with 0.4 and 0.5 of the unordered pairs: the paper's step A1 and L2, each at its best strength, and neither.

The block structure that the paper sees in W_Q W_Kᵀ is looked for where the task has its structure: scores of one
operand for another in the first layer, as a function of both, in the Fourier basis of the integers modulo p.
"""

from typing import Any

import torch
import traced
from torch import Tensor

from rankdecay.lab.experiments.boundary.settings import PRESETS, check

ARMS = {"none": 0.0, "l2_all": 8.0, "paper_a1": 0.005}
MEASURED = ("train_accuracy", "test_accuracy", "stable_rank", "product_stable_rank")
CURVE = ("step", *MEASURED, "equal_frequencies", "pairs")
DIGITS = 4
LEARNT = 0.5  # a test accuracy from which on a run has a best


def fourier_basis(p: int) -> Tensor:
    """The real Fourier basis of functions on the integers modulo an odd p, shape (p, p), a function in each row.

    The constant, then the cosine and the sine of each frequency from 1 to (p - 1) / 2; orthonormal.
    """
    angle = 2 * torch.pi / p * torch.outer(torch.arange(1, (p - 1) // 2 + 1), torch.arange(p)).double()
    waves = torch.stack([angle.cos(), angle.sin()], 1).flatten(0, 1) * (2 / p) ** 0.5
    return torch.cat([torch.full((1, p), p**-0.5, dtype=torch.float64), waves])


def score_energies(query: Tensor, key: Tensor, embedding: Tensor, heads: int) -> Tensor:
    """The energy of a layer's scores between tokens, by the frequencies of the one that asks and the one that is asked.

    Args:
        query: W_Q, shape (width, width); heads are blocks of rows.
        key: W_K.
        embedding: of the p tokens, shape (p, width); its rows are normalised as the layer's norm does.
        heads: of the layer; their energies are added.

    Returns:
        Shape ((p - 1) / 2, (p - 1) / 2), without the constants, and adding to 1.
    """
    tokens = embedding.double()
    tokens = tokens / tokens.square().mean(1, keepdim=True).sqrt()
    waves = fourier_basis(len(tokens)) @ tokens
    asked, asking = ((waves @ weight.double().T).unflatten(1, (heads, -1)).transpose(0, 1) for weight in (key, query))
    scores = (asking @ asked.mT)[:, 1:, 1:].unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
    energies = scores.square().sum((0, 2, 4))
    return energies / energies.sum()


def structure(energies: Tensor) -> dict[str, Any]:
    """How much of the energy two tokens' equal frequencies have, and how few pairs of frequencies hold 95 % of it."""
    ordered = energies.flatten().sort(descending=True).values.cumsum(0)
    return {
        "equal_frequencies": round(energies.diagonal().sum().item(), DIGITS),
        "pairs": int((ordered < 0.95).sum()) + 1,
    }


def run(arm: str, strength: float, fraction: float, steps: int) -> dict[str, Any]:
    """A run with what the figure shows of it: through time, at its end, and at its best.

    Its best is before it may lose what it has learnt; of a run that learns nothing it is the end.
    """
    preset = PRESETS["paper"]
    settings = check(type(preset)(**{**vars(preset), "fractions": (fraction,), "precision": "float32", "seeds": 1}))
    ensemble, _ = traced.ensemble_of(settings, arm, strength)
    p = settings.modulus
    assert p is not None

    def at_present() -> dict[str, Any]:
        """Scores and singular values of the network as it is."""
        parameters = {name: ensemble.parameters[name][0].detach() for name in ("query.0", "key.0", "embedding")}
        own = parameters["query.0"], parameters["key.0"], parameters["embedding"][:p]
        energies = score_energies(*own, ensemble.config.heads)
        values = torch.linalg.svdvals(ensemble.query_key[0].double())  # (layers, 2, width)
        return {
            **structure(energies),
            "energies": [[float(f"{value:.3g}") for value in row] for row in energies.tolist()],
            "singular_values": {
                role: [[float(f"{value:.{DIGITS}g}") for value in layer[i].tolist()] for layer in values]
                for i, role in enumerate(("query", "key"))
            },
        }

    curve: list[list[float]] = []
    best: dict[str, Any] = {"test_accuracy": LEARNT}
    found: dict[str, Any] = {}
    for step in range(0, steps + 1, settings.evaluate_every):
        [record], _ = ensemble.evaluate()
        found = at_present()
        curve.append([step, *(round(record[name], DIGITS) for name in MEASURED), *(found[n] for n in CURVE[-2:])])
        if record["test_accuracy"] > best["test_accuracy"]:
            best = {"step": step, "test_accuracy": round(record["test_accuracy"], DIGITS), **found}
        if step < steps:
            ensemble.train(settings.evaluate_every)
    setting = {"arm": arm, "strength": strength, "fraction": fraction, "seed": ensemble.members[0].seed}
    end = {"step": steps, "test_accuracy": curve[-1][2], **found}
    return setting | {"curve": curve, "best": best if "step" in best else end, "end": end}


def main() -> None:
    traced.main(__doc__, lambda *of: [run(*of)], ARMS, CURVE, steps=3000, fractions=(0.4, 0.5))


if __name__ == "__main__":
    main()
