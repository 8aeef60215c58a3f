"""Shared by the benchmarks that tune: runs of a protocol, equal grids for every arm, and settings that are frozen.

A grid holds strengths in factors of two at one decay of the rest, with the length of a ramp as a second factor; then
other decays of the rest are tried at the best, or at all strengths where nothing held. Each of the three is widened by
factors of two until the best is inside. The criterion is the restricted mean time: steps until validation accuracy
holds 95 %, the budget for a run that never does, over seeds and sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
Setting = tuple[str, float, float]  # arm with its ramp, strength, decay of the rest
Times = dict[Setting, float]  # restricted mean time of every setting
WIDENINGS = 12  # rounds, so that tuning ends where nothing is inside
OF_TUNING = ("tune_seeds", "tune_sizes", "tune_budget")  # fields of a protocol that say which runs tune
OF_TESTING = ("test_seeds", "test_sizes", "test_budget", "horizons", "secondary_size")  # and which are held out


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
    whole = json.loads(json.dumps(dataclasses.asdict(protocol)))
    of_a_run = {name: value for name, value in whole.items() if name not in (*OF_TUNING, *OF_TESTING)}
    fixed = {**of_a_run, "budget": budget, "precision": "float32"}
    config = {
        "command": protocol.command,
        "settings": whole | fixed,
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


def setting_of(row: Row) -> Setting:
    """The setting that a run was trained at."""
    return row["arm"], row["strength"], row["rest_decay"]


def setting_of_frozen(own: Row) -> Setting:
    """The setting that is frozen of an arm."""
    return own["name"], own["strength"], own["rest_decay"]


def edges(own: Row, rows: Sequence[Row]) -> list[str]:
    """Which of the strength, the ramp and the decay of the rest that are frozen of an arm are the last that was tried.

    A strength is compared with those that were tried at its decay of the rest. Where it alone was tried there, the
    strengths were compared at another decay, and those count. A decay of 0 is no edge: there is none below it.

    Args:
        own: what is frozen of the arm.
        rows: of tuning, of all arms.
    """
    arm, ramp = split_name(own["name"])
    best = setting_of_frozen(own)
    settings = {setting_of(row) for row in rows}
    strengths = {strength for name, strength, rest in settings if (name, rest) == (own["name"], own["rest_decay"])}
    tried = {
        "strength": (own["strength"], strengths if len(strengths) > 1 else {*own["strengths"]}),
        "ramp": (ramp or 0, {each or 0 for name, *_ in settings for of, each in [split_name(name)] if of == arm}),
        "rest": (own["rest_decay"], {rest for *which, rest in settings if (*which,) == best[:2]}),
    }
    return [what for what, (value, each) in tried.items() if at_edge(value, each)]


def at_edge(value: float, tried: Collection[float]) -> bool:
    """Whether a value is the least, if that is not 0, or the greatest of some that were tried."""
    return len(tried) > 1 and value != 0 and value in (min(tried), max(tried))


def scores(rows: Sequence[Row], horizon: float) -> Times:
    """The restricted mean time of every setting."""
    found: dict[Setting, list[Row]] = {}
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
    again: Collection[str] = (),
) -> Row:
    """Tune some arms after others, and freeze what is best of those that are done.

    Args:
        parts: arms that are tuned together, in this order; no arm's settings depend on another's.
        space: what is tried of each.
        protocol: of the runs.
        directory: where rows and the frozen settings are.
        device: on which runs are trained.
        beside: what is frozen beside the arms.
        again: frozen arms that are tuned again, because more is tried than when they were frozen. Runs that are there
            are not repeated, and held-out runs at settings that change are left out of every report.
    """
    frozen = directory / "tuned.json"
    arms: Row = tuned(directory, protocol)["arms"] if frozen.exists() else {}
    every = [arm for part in parts for arm in part]
    if unknown := [arm for arm in again if arm not in every]:
        raise SystemExit(f"--again {unknown[0]}: no such arm; it is one of {', '.join(every)}.")
    if early := [arm for arm in again if arm not in arms]:
        raise SystemExit(f"--again {early[0]}: {frozen} does not have it yet; run --stage tune without --again first.")
    if not again and set(every) <= set(arms):
        raise SystemExit(
            f"{frozen} is frozen: the held-out runs use it. Give another --dir, or name arms to tune --again."
        )
    for part in parts:
        some = [arm for arm in part if arm in again or (arm not in arms and not again)]
        if some:
            arms |= tune_arms(some, space, protocol, directory, device)
            held = {"protocol": dataclasses.asdict(protocol), **beside(arms), "arms": arms}
            frozen.write_text(json.dumps(held, indent=1) + "\n")
    return tuned(directory, protocol)


def tune_arms(some: Sequence[str], space: Space, protocol: Protocol, directory: Path, device: str) -> Row:
    """Train the grids of some arms and return the best settings of each."""
    pairs = [(seed, size) for seed in protocol.tune_seeds for size in protocol.tune_sizes]
    budget = protocol.tune_budget

    def times_of(settings: Sequence[Setting]) -> Times:
        wanted = [trial(protocol, *setting, size, seed) for seed, size in pairs for setting in settings]
        known = {one.key for one in wanted}
        rows = trained(directory / "tune", protocol, wanted, budget, device=device)
        return scores([row for row in rows if key_of(row) in known], budget)

    def widened(settings: list[Setting], more: Callable[[Times], list[Setting]]) -> Times:
        for _ in range(WIDENINGS):
            added = more(times_of(settings))
            if not added:
                break
            settings = [*settings, *added]
        return times_of(settings)

    def at_first(arm: str, name: str, strengths: Sequence[float]) -> list[Setting]:
        return [(name, strength, space.first(arm, strength)) for strength in strengths]

    def wider(found: Times) -> list[Setting]:
        settings: list[Setting] = []
        for arm in some:
            own = of_arm(found, arm)
            for name in dict.fromkeys(name for name, *_ in own):
                following = another_strength(protocol, name, {s: t for (n, s, _), t in own.items() if n == name})
                settings += [] if following is None else at_first(arm, name, [following])
            ramp = another_ramp(protocol, own) if arm in space.ramps else None
            settings += [] if ramp is None else at_first(arm, f"{arm}@{ramp}", space.strengths[arm])
        return settings

    def wider_rests(found: Times) -> list[Setting]:
        settings: list[Setting] = []
        for arm in some:
            own = of_arm(found, arm)
            keys, rests = dict.fromkeys(key[:2] for key in own), dict.fromkeys(rest for *_, rest in own)
            rest = another_rest(own)
            settings += [] if rest is None else [(*key, rest) for key in keys]
            if len(keys) > 1:  # strengths that are compared here, and not at the first decay
                name, _, at = best_of(own)
                times = {s: spent for (n, s, r), spent in own.items() if (n, r) == (name, at)}
                following = another_strength(protocol, name, times)
                settings += [] if following is None else [(name, following, each) for each in rests]
        return settings

    begun = [
        setting
        for arm in some
        for name in [f"{arm}@{ramp}" for ramp in space.ramps.get(arm, ())] or [arm]
        for setting in at_first(arm, name, space.strengths[arm] or (0.0,))
    ]
    first = widened(begun, wider)
    compared: list[Setting] = []
    for arm in some:
        own = of_arm(first, arm)
        best = best_of(own)
        # Where no run of any strength held none is the best, and all are tried at the other decays.
        compared += [best] if own[best] < budget else own
    others = [(name, s, rest) for name, s, _ in compared for rest in space.then(split_name(name)[0], s)]
    found = widened(others, wider_rests)
    arms: Row = {}
    for arm in some:
        own = of_arm(found, arm)
        best = best_of(own)
        arms[arm] = {
            **dict(zip(("name", "strength", "rest_decay"), best, strict=True)),
            "restricted_mean_time": own[best],
            "strengths": sorted({strength for name, strength, _ in (*first, *own) if name == best[0]}),
        }
    return arms


def of_arm(times: Times, arm: str) -> Times:
    """Those of one arm, whatever its ramp."""
    return {setting: spent for setting, spent in times.items() if split_name(setting[0])[0] == arm}


def best_of(times: Times) -> Setting:
    """The setting of the least time; of several the one that was tried first."""
    return min(times, key=lambda setting: times[setting])


def beyond(times: Mapping[float, float]) -> float | None:
    """The value that follows the best of some in a grid of factors of two; None where it is inside, or all are alike.

    Args:
        times: restricted mean times, by what was tried.
    """
    if max(times.values()) == min(times.values()):
        return None
    best = min(sorted(times), key=lambda value: times[value])
    return None if not at_edge(best, times) else 2 * best if best == max(times) else best / 2


def another_strength(protocol: Protocol, name: str, times: Mapping[float, float]) -> float | None:
    """The next strength of an arm, with its ramp; None where the best is inside, or the arm takes no more."""
    arm, ramp = split_name(name)
    following = beyond(times)
    if following is None or following >= every_arm(protocol.settings(ramp))[arm].how.limit:
        return None
    return following


def another_ramp(protocol: Protocol, times: Times) -> int | None:
    """The next length of an arm's ramp, in steps; None where the best is inside, or it would outlast tuning."""
    ramps = {split_name(name)[1] or 0 for name, *_ in times}
    following = beyond(
        {ramp: min(spent for (name, *_), spent in times.items() if split_name(name)[1] == ramp) for ramp in ramps}
    )
    return None if following is None or following > protocol.tune_budget else int(following)


def another_rest(times: Times) -> float | None:
    """The next decay of the rest beside the best setting; None where that is inside."""
    best = best_of(times)
    return beyond({rest: spent for (name, strength, rest), spent in times.items() if (name, strength) == best[:2]})


def tuned(directory: Path, protocol: Protocol) -> Row:
    path = directory / "tuned.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: run --stage tune first, which freezes the settings of every arm.")
    held = json.loads(path.read_text())
    asked = json.loads(json.dumps(dataclasses.asdict(protocol)))
    if {**held["protocol"], **{name: asked[name] for name in OF_TESTING}} != asked:
        raise SystemExit(f"{path} was tuned by another protocol: give another --dir, or the options it was made with.")
    return held


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse a command line that has a ``--stage``, with the option of tuning again, which other stages refuse."""
    parser.add_argument(
        "--again", nargs="+", default=(), metavar="ARM", help="with --stage tune: frozen arms to tune again"
    )
    arguments = parser.parse_args()
    if arguments.again and arguments.stage != "tune":
        parser.error(f"--again has no effect on --stage {arguments.stage}: give --stage tune")
    return arguments


def train_held_out(protocol: Protocol, directory: Path, wanted: Iterable[Trial], device: str) -> None:
    """Train held-out runs; the file of the settings says of which seeds and sizes they are, which may become more."""
    held = tuned(directory, protocol)
    path = directory / "tuned.json"
    path.write_text(json.dumps(held | {"protocol": dataclasses.asdict(protocol)}, indent=1) + "\n")
    trained(directory / "test", protocol, wanted, protocol.test_budget, device=device)
