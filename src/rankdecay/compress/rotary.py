"""The configuration of a smaller head: its size, and rotary frequencies that are any subset of those there were.

Any set of frequencies is a plain configuration of ``rope_type: "longrope"``: the class turns plane i of k by
θ^(−i/k) / factor_i, so that factor_i = θ^(−i/k) / f for the frequency f that a kept plane had, whatever scaling it came
from. ``short_factor`` and ``long_factor`` are those up to the original length and beyond it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankdecay.attention.model_types import PARTIAL_ROTARY
from rankdecay.compress.reduction import NotReducible
from rankdecay.compress.skeleton import Rope

#: What a configuration's rotary parameters say of frequencies; the rest is of something else, and stays.
_FREQUENCIES = frozenset(
    """
    rope_type type rope_theta partial_rotary_factor factor attention_factor beta_fast beta_slow short_factor long_factor
    low_freq_factor high_freq_factor mscale mscale_all_dim truncate original_max_position_embeddings short_mscale
    long_mscale
    """.split()  # noqa: SIM905 - a table of words
)


#: Radians per position below which a plane counts as one that does not turn.
STANDING = 1e-20


def smaller_configuration(
    config: Mapping[str, Any],
    head_dim: int,
    ropes: Mapping[str | None, Rope],
    kept: Mapping[str | None, Tensor],
    names: Mapping[str, str],
) -> dict[str, Any]:
    """Return a configuration with another head size, and with the frequencies of the kept planes.

    Args:
        config: as ``config.json`` has it, completed by the class (``rope_parameters``).
        head_dim: d'.
        ropes: the frequencies, by the kind of layer.
        kept: the planes that stay, by the kind of layer.
        names: what the class calls common settings (``attribute_map``).
    """
    new = copy.deepcopy(dict(config))
    new.pop("head_dim", None)
    new[names.get("head_dim", "head_dim")] = head_dim
    if not ropes:
        return new
    parameters = new.get("rope_parameters") or {}
    made = {
        key: _parameters(
            parameters if key is None else parameters[key],
            ropes[key],
            planes,
            head_dim,
            new.get(names.get("max_position_embeddings", "max_position_embeddings")),
        )
        for key, planes in kept.items()
    }
    new["rope_parameters"] = made.get(None, {**parameters, **made})
    turned = {_share(2 * len(planes), head_dim) for planes in kept.values()}
    for name in PARTIAL_ROTARY:
        if new.get(name) is not None:
            if len(turned) > 1:
                raise NotReducible("layers of different kinds would turn different shares of a head.")
            new[name] = next(iter(turned))
    for name in ("rope_scaling", "rope_theta", "rope_local_base_freq"):  # as releases before 5 have them
        new.pop(name, None)
    return new if None not in made else with_earlier_names(new)


def with_earlier_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with its frequencies also where releases of transformers before 5 look for them.

    They know no ``rope_parameters``, and turn by the frequencies of another model without a word. One table for each
    kind of layer they cannot read.
    """
    new, parameters = dict(config), dict(config.get("rope_parameters") or {})
    if "rope_theta" in parameters:
        new["rope_theta"] = parameters.pop("rope_theta")
        if "partial_rotary_factor" in parameters:
            new["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        if parameters.get("short_factor") != parameters.get("long_factor"):  # where the second begins to count
            new["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
        new["rope_scaling"] = parameters
    return new


def _parameters(old: Mapping[str, Any], rope: Rope, kept: Tensor, head_dim: int, longest: int | None) -> dict[str, Any]:
    theta = float(old["rope_theta"])
    planes = len(kept)
    base = theta ** -(torch.arange(planes, dtype=torch.float64) / planes)
    factors = []
    for frequencies in (rope.short, rope.long):
        # a plane that does not turn is one that turns by less than any number of float32 shows, as a factor is finite
        chosen = frequencies[kept].clamp_min(STANDING)
        factors.append((base / chosen).tolist())
    new: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": old["rope_theta"],
        "short_factor": factors[0],
        "long_factor": factors[1],
        "factor": 1.0,
        "attention_factor": rope.attention_factor,
    }
    rest = {name: value for name, value in old.items() if name not in _FREQUENCIES}
    # beyond the original length the second table counts; where there is one alone, some readers want the field anyway
    length = old.get("original_max_position_embeddings") if rope.kind == "longrope" or rest else None
    if length or longest:
        new["original_max_position_embeddings"] = length or longest
    if 2 * planes != head_dim or "partial_rotary_factor" in old:  # a class may have another share as its default
        new["partial_rotary_factor"] = _share(2 * planes, head_dim)
    if old.get("mrope_section"):
        raise NotReducible("its planes turn by positions of several kinds (mrope_section).")
    return new | rest


def _share(part: int, whole: int) -> float:
    """Return part / whole, so that classes that round the product with the whole downwards find the part."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 2.0)
