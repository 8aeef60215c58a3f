"""Shared by the benchmarks that tune: runs of a protocol, equal grids for every arm, and settings that are frozen.

A grid holds strengths in factors of two at one decay of the rest; strengths are added until the best is inside; then
other decays of the rest are tried at the best, or at all of them where nothing held. The criterion is the restricted
mean time: steps until validation accuracy holds 95 %, the budget for a run that never does, over seeds and sizes.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rankdecay.lab.ensemble import local
from rankdecay.lab.ensemble.members import Training
from rankdecay.lab.ensemble.outcome import key_of
from rankdecay.lab.ensemble.sweep import SweepPlan, Trial
from rankdecay.lab.experiments.boundary.arms import every_arm
from rankdecay.lab.experiments.boundary.experiment import places, trials
from rankdecay.lab.experiments.boundary.settings import Boundary
from rankdecay.lab.machine import describe_machine, versions
from rankdecay.lab.store import EXTENSIBLE_IDENTITY, RunDirectory

Row = dict[str, Any]
WIDENINGS = 6


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Settings of training; smaller ones are for trying the command."""

    modulus: int = 13
    width: int = 64
    mlp_width: int = 256
    batch_size: int = 128
    lr: float = 2e-3
    validation: int = 1000
    evaluate_every: int = 40
    tune_seeds: tuple[int, ...] = (100, 101, 102)
    tune_sizes: tuple[float, ...] = (600, 700, 850)
    tune_budget: int = 1600
    test_seeds: tuple[int, ...] = tuple(range(200, 210))
    test_sizes: tuple[float, ...] = (600, 700, 800, 950)
    test_budget: int = 3200
    horizons: tuple[int, ...] = (800, 1600, 3200)
    secondary_size: int = 700

    command: ClassVar[str] = "schedule"  # what the rows say they were made by

    def settings(self, ramp: int | None = None) -> Boundary:
        """The settings of `rankdecay boundary` that its arms and runs read."""
        return Boundary(
            task="selection",
            modulus=self.modulus,
            width=self.width,
            mlp_width=self.mlp_width,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup=ramp or Boundary.warmup,
            validation=self.validation,
            seeds=1,
            precision="float32",
        )

    def sized(self, size: float) -> Row:
        """The settings that give a training set of a size."""
        return {"train_examples": (int(size),)}


@dataclasses.dataclass(frozen=True)
class Space:
    """Grid that is tried of every arm.

    Attributes:
        strengths: in factors of two; none for an arm that has no strength.
        ramps: lengths of a ramp, tried at every strength.
        rests: decays of the rest, tried at the best strength.
        first_rest: the decay of the rest at which strengths are tried.
        own_rests: those of an arm that has no strength, where they are others.
        of_all: arms whose strength is the decay of the rest as well.
    """

    strengths: Mapping[str, tuple[float, ...]]
    ramps: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    rests: tuple[float, ...] = (1.0, 2.0, 4.0)
    first_rest: float = 2.0
    own_rests: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    of_all: frozenset[str] = frozenset()

    def first(self, arm: str, strength: float) -> float:
        """The decay of the rest at which a strength is tried."""
        return strength if arm in self.of_all else self.first_rest

    def then(self, arm: str, strength: float) -> tuple[float, ...]:
        """The decays of the rest that are tried at the best strength."""
        return (strength,) if arm in self.of_all else self.own_rests.get(arm, self.rests)


# --- what is trained ---


def split_name(name: str) -> tuple[str, int | None]:
    """The arm and the ramp's length of ``l2_ramp@200``."""
    arm, _, ramp = name.partition("@")
    return arm, int(ramp) if ramp else None


def trial(
    protocol: Protocol,
    name: str,
    strength: float,
    rest: float,
    size: float,
    seed: int,
    arm: str | None = None,
    **options: Any,
) -> Trial:
    """One run; ``name`` is that of its rows, ``arm`` what it does if that is another."""
    which, ramp = split_name(arm or name)
    only = {"rest_decays": (rest,), "first_seed": seed} | protocol.sized(size)
    settings = dataclasses.replace(protocol.settings(ramp), **only, **options)
    (one,) = trials(settings, every_arm(settings)[which], [strength])
    return dataclasses.replace(one, member=dataclasses.replace(one.member, arm=name))


def trained(
    path: Path, protocol: Protocol, wanted: Iterable[Trial], budget: int, beta2: float = 0.999, device: str = "cpu"
) -> list[Row]:
    """All rows of a directory, after training what it does not hold of some trials."""
    fixed = {**dataclasses.asdict(protocol), "budget": budget, "precision": "float32"}
    fixed = json.loads(json.dumps(fixed))
    config = {
        "command": protocol.command,
        "settings": fixed,
        "fixed": fixed,
        "arms": [],
        "machine": describe_machine(device),
        "versions": versions(),
    }
    with RunDirectory.open(path, config, lambda line: print(line, file=sys.stderr), EXTENSIBLE_IDENTITY) as directory:
        rows = directory.drop_damaged_line()
        done = {key_of(row) for row in rows}
        missing = [one for one in wanted if one.key not in done]
        training = Training(protocol.batch_size, device=device, betas=(0.9, beta2))
        together = places(protocol.settings(), device)
        plan = SweepPlan(training, budget, protocol.evaluate_every, 0.95, together)
        begun = time.monotonic()
        for number, row in enumerate(local.rows(missing, plan, directory) if missing else (), 1):
            directory.append([row])
            rows.append(row)
            minutes = (time.monotonic() - begun) / 60
            print(f"{path.name}: {number} of {len(missing)} runs, {minutes:.1f} min", file=sys.stderr, flush=True)
    return rows


# --- tuning ---


def restricted(row: Row, horizon: float) -> float:
    """Steps until validation accuracy holds 95 %; the horizon for a run that had not by then."""
    steps = row["steps_to_generalise"]
    return float(min(horizon if steps is None else steps, horizon))


def mean_time(rows: Sequence[Row], horizon: float) -> float:
    return statistics.fmean(restricted(row, horizon) for row in rows)


def setting_of(row: Row) -> tuple[str, float, float]:
    """Arm with its ramp, strength, decay of the rest."""
    return row["arm"], row["strength"], row["rest_decay"]


def strength_at_edge(own: Row, rows: Sequence[Row]) -> bool:
    """Whether the frozen strength of an arm is the least or the greatest that was tried at its decay of the rest.

    Where it alone was tried there, the strengths were compared at another decay, and those count.

    Args:
        own: what is frozen of the arm.
        rows: of tuning, of all arms.
    """
    settings = {setting_of(row) for row in rows}
    there = {strength for name, strength, rest in settings if (name, rest) == (own["name"], own["rest_decay"])}
    tried = there if len(there) > 1 else {*own["strengths"]}
    return len(tried) > 1 and own["strength"] in (min(tried), max(tried))


def scores(rows: Sequence[Row], horizon: float) -> dict[tuple[str, float, float], float]:
    """The restricted mean time of every setting: arm with its ramp, strength, decay of the rest."""
    found: dict[tuple[str, float, float], list[Row]] = {}
    for row in rows:
        found.setdefault(setting_of(row), []).append(row)
    return {setting: mean_time(some, horizon) for setting, some in found.items()}


def tune(
    parts: Sequence[Sequence[str]],
    space: Space,
    protocol: Protocol,
    directory: Path,
    device: str,
    beside: Callable[[Row], Row] = lambda arms: {},
) -> Row:
    """Tune some arms after others, and freeze what is best of those that are done.

    Args:
        parts: arms that are tuned together, in this order; no arm's settings depend on another's.
        space: what is tried of each.
        protocol: of the runs.
        directory: where rows and the frozen settings are.
        device: on which runs are trained.
        beside: what is frozen beside the arms.
    """
    frozen = directory / "tuned.json"
    arms: Row = tuned(directory, protocol)["arms"] if frozen.exists() else {}
    if {arm for part in parts for arm in part} <= set(arms):
        raise SystemExit(f"{frozen} is frozen: the held-out runs use it. Give another --dir to tune again.")
    for part in parts:
        if not set(part) <= set(arms):
            arms |= tune_arms(part, space, protocol, directory, device)
            held = {"protocol": dataclasses.asdict(protocol), **beside(arms), "arms": arms}
            frozen.write_text(json.dumps(held, indent=1) + "\n")
    return tuned(directory, protocol)


def tune_arms(some: Sequence[str], space: Space, protocol: Protocol, directory: Path, device: str) -> Row:
    """Train the grids of some arms and return the best settings of each."""
    pairs = [(seed, size) for seed in protocol.tune_seeds for size in protocol.tune_sizes]

    def runs(settings: Sequence[tuple[str, float, float]]) -> list[Row]:
        wanted = [trial(protocol, *setting, size, seed) for seed, size in pairs for setting in settings]
        known = {one.key for one in wanted}
        rows = trained(directory / "tune", protocol, wanted, protocol.tune_budget, device=device)
        return [row for row in rows if key_of(row) in known]

    def at(name: str, strength: float) -> tuple[str, float, float]:
        return name, strength, space.first(split_name(name)[0], strength)

    grids: dict[str, list[float]] = {}
    for arm in some:
        for name in [f"{arm}@{ramp}" for ramp in space.ramps.get(arm, ())] or [arm]:
            grids[name] = list(space.strengths[arm]) or [0.0]
    added: dict[str, float] = {}
    found: dict[tuple[str, float, float], float] = {}
    for _ in range(WIDENINGS + 1):
        for name, strength in added.items():
            grids[name].append(strength)
        found = scores(runs([at(name, s) for name, each in grids.items() for s in each]), protocol.tune_budget)
        times = {name: {s: found[at(name, s)] for s in each} for name, each in grids.items()}
        following = {name: beyond(protocol, name, each) for name, each in times.items()}
        added = {name: strength for name, strength in following.items() if strength is not None}
        if not added:
            break
    tried: dict[str, list[tuple[str, float, float]]] = {}
    for arm in some:
        settings = [(name, s) for name in grids if split_name(name)[0] == arm for s in grids[name]]
        best = min(settings, key=lambda each: found[at(*each)])
        if found[at(*best)] < protocol.tune_budget:  # else no run of any held, none is the best, and all go on
            settings = [best]
        tried[arm] = [(name, s, rest) for name, s in settings for rest in space.then(arm, s)]
    found = scores(runs([one for each in tried.values() for one in each]), protocol.tune_budget)
    arms: Row = {}
    for arm, some_tried in tried.items():
        name, strength, rest = min(some_tried, key=lambda setting: found[setting])
        rests = [r for n, s, r in some_tried if (n, s) == (name, strength)]
        arms[arm] = {
            "name": name,
            "strength": strength,
            "rest_decay": rest,
            "restricted_mean_time": found[name, strength, rest],
            "strengths": sorted(grids[name]),
            "edge_is_open": name in added,
            "rest_at_edge": len(rests) > 1 and (rest == max(rests) or rest == min(rests) > 0),
        }
    return arms


def beyond(protocol: Protocol, name: str, times: Mapping[float, float]) -> float | None:
    """The next strength if the best is at an edge; None if it is inside, or all are alike, or the arm takes no more.

    Args:
        protocol: of the runs.
        name: of the arm, with its ramp.
        times: restricted mean times, by strength.
    """
    tried = sorted(times)
    if len(tried) == 1 or max(times.values()) == min(times.values()):
        return None
    best = min(tried, key=lambda strength: times[strength])
    following = 2 * best if best == tried[-1] else best / 2 if best == tried[0] else None
    if following is None:
        return None
    arm, ramp = split_name(name)
    return following if following < every_arm(protocol.settings(ramp))[arm].how.limit else None


def tuned(directory: Path, protocol: Protocol) -> Row:
    path = directory / "tuned.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: run --stage tune first, which freezes the settings of every arm.")
    held = json.loads(path.read_text())
    if held["protocol"] != json.loads(json.dumps(dataclasses.asdict(protocol))):
        raise SystemExit(f"{path} was tuned by another protocol: give another --dir, or the options it was made with.")
    return held
