"""The configuration of a smaller head: its size, and rotary frequencies that are any subset of those there were.

Any set of frequencies is a plain configuration of ``rope_type: "longrope"``: the class turns plane i of k by
θ^(−i/k) / factor_i, so that factor_i = θ^(−i/k) / f for the frequency f that a kept plane had, whatever scaling it came
from. ``short_factor`` and ``long_factor`` are those up to the original length and beyond it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankdecay.compress.reduction import NotReducible
from rankdecay.compress.skeleton import Rope

#: Kinds of frequencies that change with the length of a text in a way that two tables cannot say.
GROWING = ("dynamic",)


def smaller_configuration(
    config: Mapping[str, Any], head_dim: int, ropes: Mapping[str | None, Rope], kept: Mapping[str | None, Tensor]
) -> dict[str, Any]:
    """Return a configuration with another head size, and with the frequencies of the kept planes.

    Args:
        config: as ``config.json`` has it, completed by the class (``rope_parameters``).
        head_dim: d'.
        ropes: the frequencies, by the kind of layer.
        kept: the planes that stay, by the kind of layer.
    """
    new = copy.deepcopy(dict(config))
    new["head_dim"] = head_dim
    if not ropes:
        return new
    parameters = new.get("rope_parameters") or {}
    made = {
        key: _parameters(parameters if key is None else parameters[key], ropes[key], planes, head_dim)
        for key, planes in kept.items()
    }
    new["rope_parameters"] = made[None] if None in made else {**parameters, **made}
    turned = {2 * len(planes) / head_dim for planes in kept.values()}
    for name in ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_percent"):
        if new.get(name) is not None:
            if len(turned) > 1:
                raise NotReducible("layers of different kinds would turn different shares of a head.")
            new[name] = next(iter(turned))
    if "rope_scaling" in new or "rope_theta" in new:  # as releases before 5 write it, and read it
        if None not in made:
            for name in ("rope_scaling", "rope_theta", "rope_local_base_freq"):
                new.pop(name, None)
        else:
            flat = dict(made[None])
            new["rope_theta"] = flat.pop("rope_theta")
            new["rope_scaling"] = flat
    return new


def _parameters(old: Mapping[str, Any], rope: Rope, kept: Tensor, head_dim: int) -> dict[str, Any]:
    theta = float(old["rope_theta"])
    planes = len(kept)
    base = theta ** -(torch.arange(planes, dtype=torch.float64) / planes)
    factors = []
    for frequencies in (rope.short, rope.long):
        chosen = frequencies[kept]
        if not bool((chosen > 0).all()):
            raise NotReducible(
                "some rotary planes have frequency 0, which no factor of a configuration says: only planes of positive "
                "frequency can be kept."
            )
        factors.append((base / chosen).tolist())
    new: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": old["rope_theta"],
        "short_factor": factors[0],
        "long_factor": factors[1],
        "factor": 1.0,
        "attention_factor": rope.attention_factor,
    }
    if rope.kind == "longrope":  # beyond this length the second table counts
        new["original_max_position_embeddings"] = old["original_max_position_embeddings"]
    if 2 * planes != head_dim:
        new["partial_rotary_factor"] = 2 * planes / head_dim

    return new
