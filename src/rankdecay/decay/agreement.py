"""Check that all processes of a distributed run have the same decay, on attaching it, before anything can hang.

What each process decays, and how, goes into the store through which the processes found each other. Every process
reads all of it and so raises the same error, or none; a process that never attaches is named after `WAIT` seconds. In
the store, not by a collective: that would wait for ever for such a process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rankdecay.decay.groups import Group
from rankdecay.decay.policy import Planes
from rankdecay.decay.targets import Target
from rankdecay.dtensor import is_distributed, is_sharded

WAIT = 300.0  # seconds
_numbers = itertools.count()


def check_agreement(targets: Iterable[tuple[Group, Target]], backend: str) -> None:
    """Raise in all processes if they do not have the same decay.

    Processes that hold parts of the same parameters need the same parameters in the same order; any two the same decay
    for a role that both have.

    Args:
        targets: of the attachment, with their groups.
        backend: of the decay.

    Raises:
        RuntimeError: If a process did not attach in `WAIT` seconds.
        ValueError: If two processes disagree.
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return
    targets = list(targets)
    policy = _policy(targets, backend)
    meshes = [json.loads(mesh) for mesh in policy["sharded"]]
    meshes += _whole_meshes(targets) if policy["planes"] else []
    ranks = sorted({rank for mesh in meshes for rank in mesh}) or range(dist.get_world_size())
    store = dist.distributed_c10d._get_default_store()
    prefix = f"rankdecay/attach/{next(_numbers)}"
    text = json.dumps(policy)
    digest = hashlib.sha256(text.encode()).hexdigest()
    store.set(f"{prefix}/{digest}", text)  # once for all that agree, so that a thousand processes read little
    keys = {rank: f"{prefix}/rank {rank}" for rank in ranks}
    store.set(keys[dist.get_rank()], digest)
    try:
        store.wait(list(keys.values()), timedelta(seconds=WAIT))
    except (RuntimeError, ValueError) as error:
        absent = [rank for rank, key in keys.items() if not store.check([key])]
        raise RuntimeError(
            f"rankdecay.attach was not called on rank {', '.join(map(str, absent))} within {WAIT:g} s of rank "
            f"{dist.get_rank()}: every process has to attach the same decay to its optimizer."
        ) from error
    digests = {rank: store.get(key).decode() for rank, key in keys.items()}
    policies = {each: json.loads(store.get(f"{prefix}/{each}")) for each in sorted(set(digests.values()))}
    first, *others = digests
    for other in others:
        _check_planes(policies[digests[first]], policies[digests[other]], first, other)
        difference = _difference(policies[digests[first]], policies[digests[other]], first, other)
        if difference:
            setting, one, another = difference
            raise ValueError(
                f"the processes do not have the same decay: {setting} is {one} on rank {first} and {another} on rank "
                f"{other}; give rankdecay.param_groups the same arguments on every rank, and rankdecay.attach too."
            )


def _policy(targets: Iterable[tuple[Group, Target]], backend: str) -> dict[str, Any]:
    """Return what has to agree: settings by role, and the sharded parameters of each set of processes, in order."""
    settings: dict[str, Any] = {"the backend": backend}
    sharded: dict[str, list[str]] = {}
    planes: dict[str, list[str]] = {}
    for group, target in targets:
        decay, role = target.decay_in(group), target.role
        settings |= {
            f"{role}_{name}": value for name, value in {"decay": type(decay).__name__, **asdict(decay)}.items()
        }
        if isinstance(decay, Planes) and decay.scope == "model":
            for rows in (rows for several in target.planes for rows in several):
                layers = planes.setdefault(rows.configuration, [])
                layers += [] if rows.layer in layers else [rows.layer]
        parameter: Any
        for parameter, name in zip(target.parameters(group), target.names, strict=True):
            if is_sharded(parameter):
                mesh = json.dumps(parameter.device_mesh.mesh.flatten().tolist())
                words = f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.placements} for {role}"
                sharded.setdefault(mesh, []).append(words)
    return {"settings": settings, "sharded": sharded, "planes": planes}


def _whole_meshes(targets: Sequence[tuple[Group, Target]]) -> list[list[int]]:
    """Return the processes of the meshes that those of sharded parameters are parts of: pipeline stages among them."""
    found: list[list[int]] = []
    for group, target in targets:
        parameter: Any
        for parameter in target.parameters(group):
            if is_sharded(parameter):
                mesh = parameter.device_mesh
                root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
                found.append(root.mesh.flatten().tolist())
    return found


def _check_planes(one: dict[str, Any], other: dict[str, Any], rank: int, other_rank: int) -> None:
    """Raise if two processes hold different layers of planes that are to vanish in all layers."""
    if one["planes"] == other["planes"] or not (one["planes"] or other["planes"]):
        return
    if one["settings"].get("query_key_decay") != other["settings"].get("query_key_decay"):
        return  # which is said in other words
    words = (
        "; ".join(f"{len(layers)}, {', '.join(layers[:2])}, …" for layers in policy["planes"].values()) or "none"
        for policy in (one, other)
    )
    raise ValueError(
        "query_key=Planes(scope='model') needs all layers of a rotary configuration in every process, and these "
        f"processes have different ones, as pipeline stages do: rank {rank} has {next(words)} and rank {other_rank} "
        f"has {next(words)}; use scope='layer', which needs only the rows of one layer."
    )


def _difference(one: dict[str, Any], other: dict[str, Any], rank: int, other_rank: int) -> tuple[str, Any, Any] | None:
    if one is other:
        return None
    for key in one["settings"].keys() & other["settings"].keys():
        if one["settings"][key] != other["settings"][key]:
            return key, one["settings"][key], other["settings"][key]
    for mesh in {**one["sharded"], **other["sharded"]}:
        if not {rank, other_rank} <= set(json.loads(mesh)):
            continue
        pairs = (policy["sharded"].get(mesh, []) for policy in (one, other))
        for number, (first, second) in enumerate(itertools.zip_longest(*pairs, fillvalue="nothing")):
            if first != second:
                return f"sharded parameter {number}", first, second
    return None
