"""Norms of a run, step by step, for another to be held at: the schedule of the norm without the decay that made it."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rankdecay.lab.ensemble.control import PLAIN, YOKED_SEED
from rankdecay.lab.ensemble.ensemble import Ensemble
from rankdecay.lab.ensemble.members import Member, Training
from rankdecay.lab.ensemble.transformer import TransformerConfig
from rankdecay.lab.tasks import make_dataset


def norm_paths(
    config: TransformerConfig,
    members: Sequence[Member],
    data: Sequence[dict[str, Any]],
    training: Training,
    steps: int,
    stop: threading.Event,
) -> list[Tensor]:
    """Norms of queries and keys that yoked members are given.

    Each is that of a run of its own, with the member's settings, the decay that ``control.yoked`` names, and initial
    weights, data and batches of seed + `YOKED_SEED`. It is trained again when a run is resumed: nothing is stored.

    Args:
        config: of the network.
        members: yoked.
        data: arguments of `make_dataset` beside the seed, one per member.
        training: as the members are trained.
        steps: that they may train.
        stop: once set, gives up within a few steps.

    Returns:
        One tensor per member, ``(steps + 1, depth, 2)``, from before the first step on; float64.

    Raises:
        InterruptedError: If stopped.
    """
    if not members:
        return []
    donors = [
        replace(member, seed=member.seed + YOKED_SEED, decay=member.control.yoked, control=PLAIN) for member in members
    ]
    datasets = [make_dataset(seed=donor.seed, **how) for donor, how in zip(donors, data, strict=True)]
    # Eager: a compiled step would be compiled once more, for this number of members.
    ensemble = Ensemble(config, donors, datasets, replace(training, compile=False))
    norms = [ensemble.query_key.double().norm(dim=(-2, -1))]  # (members, depth, 2)
    for _ in range(steps):
        if stop.is_set():
            raise InterruptedError
        ensemble.train(1)
        norms.append(ensemble.query_key.double().norm(dim=(-2, -1)))
    return list(torch.stack(norms, 1))
