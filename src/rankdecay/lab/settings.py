"""Settings that every experiment has, and the checks they share.

Importing this module, and with it any experiment's settings, imports neither torch nor numpy: ``--help`` reads them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rankdecay.lab.errors import SettingError, check_name, option

Record = dict[str, Any]
Preset = Literal["default", "standard"]
NOT_IDENTITY = ("preset", "out", "device", "compile", "quiet", "json", "open")  # do not change what a run computes
SEEDS = 2**32  # a first seed is below it, within the range of every generator
NAMING = ("arm", "name", "reference")  # keys that hold the name of an arm, in rows, configurations and summaries

REPORT_EXAMPLES = {
    "rankdecay report runs/grok --open": "the page of a run, complete or not, in a browser",
    "rankdecay report runs/grok --figure grok.pdf": "its figure for a paper",
}


@dataclass(frozen=True)
class Settings:
    """The options of every experiment; a subclass adds its own, and its docstring is the help of the command."""

    preset: Preset = "default"
    """'standard' computes more than the default: for a fast machine, or for longer."""
    first_seed: int = 0
    """Number of the first seed: tune on seeds that are not reported, from 100 up say."""
    out: Path = Path("runs")
    """Where results go; an interrupted run there is continued, a complete one is shown again."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    quiet: bool = False
    """No progress and no table."""
    json: bool = False
    """Print the summary as JSON on standard output; progress goes to standard error."""
    open: bool = False
    """Open the page in a browser at the end."""


@dataclass(frozen=True)
class Report:
    """Make the HTML page of a run directory again, or a figure for a paper.

    Several directories of boundary, which may differ in arms, seeds, strengths, amounts of data and decays of the rest
    alone, are merged into one page; of other experiments each gets its own page.
    """

    directories: tuple[Path, ...]
    """Run directories, one or more."""
    out: Path | None = None
    """Write the page here; several boundary directories make one page, otherwise merged-report.html."""
    figure: Path | None = None
    """Draw the static figure of one run, or of boundary directories merged, here instead: .png, .svg or .pdf."""
    open: bool = False
    """Open the page in a browser."""


def question(settings: type) -> str:
    """Question of an experiment: the first paragraph of its settings' docstring."""
    return " ".join((settings.__doc__ or settings.__name__).partition("\n\n")[0].split())


def seeds(settings: Any) -> range:
    """The seeds of ``--seeds`` and ``--first-seed``."""
    return range(settings.first_seed, settings.first_seed + settings.seeds)


def subset(settings: Any, *names: str) -> Record:
    """Settings that a part of an experiment has under the same names."""
    return {name: getattr(settings, name) for name in names}


def identity(settings: Any, without: Collection[str] = ()) -> Record:
    """The settings that decide what a run computes: all but `NOT_IDENTITY` and ``without``."""
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_IDENTITY and k not in without}


def renamed(record: Any, aliases: Mapping[str, str]) -> Any:
    """A row, a configuration or a summary with the names that its arms have today."""
    if isinstance(record, list):
        return [renamed(item, aliases) if isinstance(item, dict) else item for item in record]
    if not isinstance(record, dict) or not aliases:
        return record
    return {
        key: aliases.get(value, value) if key in NAMING and isinstance(value, str) else renamed(value, aliases)
        for key, value in record.items()
    }


def check_lists(settings: Any) -> None:
    """Raise a `SettingError` if an option that takes several values is given one of them twice."""
    for field in dataclasses.fields(settings):
        values = getattr(settings, field.name)
        if isinstance(values, tuple):
            twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
            if twice is not None:
                raise SettingError(f"{option(field.name)} lists {twice} twice: give it once")


def check_seeds(settings: Any) -> None:
    """Raise a `SettingError` unless ``--first-seed`` is the number of a seed."""
    if settings.first_seed < 0:
        raise SettingError(f"--first-seed {settings.first_seed} is negative: give 0 or more")
    if settings.first_seed >= SEEDS:
        raise SettingError(f"--first-seed {settings.first_seed} is too large: give less than {SEEDS}")


def check_effect(settings: Any, name: str, has_effect: bool, where: str) -> None:
    """Raise a `SettingError` if a setting was given another value than its default and nothing reads it.

    Args:
        settings: of an experiment.
        name: of the setting.
        has_effect: whether something reads it.
        where: nothing does, in words.
    """
    value = getattr(settings, name)
    if not has_effect and value != getattr(type(settings)(), name):
        raise SettingError(f"{option(name)} {value} has no effect {where}: leave it out")


def check_strengths(settings: Any) -> None:
    """Raise a `SettingError` unless there are ``--strengths``, each of them finite and at least 0."""
    if not settings.strengths:
        raise SettingError("--strengths is empty: give for example 0 0.1 0.4")
    for strength in settings.strengths:
        if not (math.isfinite(strength) and strength >= 0):
            raise SettingError(f"--strengths {strength:g} is negative or not finite: a decay is 0 (none) or more")


def check_counts(settings: Any, *names: str) -> None:
    """Raise a `SettingError` unless the named settings are at least 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise SettingError(f"{option(name)} {getattr(settings, name)} is too small: give at least 1")


def check_numbers(settings: Any, *names: str, zero: bool = False) -> None:
    """Raise a `SettingError` unless the named settings are finite and > 0; ``zero`` is allowed where it means none."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
            need = ">= 0; 0 switches it off" if zero else "> 0"
            raise SettingError(f"{option(name)} {value} must be a finite number {need}")


def check_width(width: int, heads: int, example: int) -> None:
    """Raise a `SettingError` unless ``--width`` can be split into the heads."""
    if width < heads or width % heads:
        raise SettingError(f"--width {width} must be a multiple of the {heads} heads: for example {example}")


def check_evaluations(settings: Any) -> None:
    """Raise a `SettingError` unless the last of ``--steps`` is evaluated."""
    steps, every = settings.steps, settings.evaluate_every
    if steps % every:
        raise SettingError(
            f"--steps {steps} is not a multiple of --evaluate-every {every}: "
            f"give for example --steps {max(1, steps // every) * every}"
        )


def check_arms(given: Sequence[str], known: Collection[str], setting: str = "arms") -> None:
    """Raise a `SettingError` unless there is an arm and all of them are known."""
    if not given:
        raise SettingError(f"{option(setting)} is empty: choose from {', '.join(known)}")
    for name in given:
        check_name(option(setting), name, known)


def given_strengths(
    texts: Sequence[str], arms: Collection[str], example: str, preset: Collection[str] = ()
) -> dict[str, tuple[float, ...]]:
    """The strengths of ``--strengths``, ascending, by arm.

    Args:
        texts: each like ``"l2=1,3,10"``.
        arms: those that were chosen.
        example: numbers to offer where some cannot be read.
        preset: texts that nobody typed, which do not count for arms that were not chosen.

    Raises:
        SettingError: For an arm that was not chosen, or what is not a list of numbers.
    """
    found = {}
    for text in texts:
        name, _, values = text.partition("=")
        if text in preset and name not in arms:
            continue
        check_name("--strengths", name, arms)
        try:
            numbers = sorted(float(value) for value in values.split(","))
        except ValueError:
            raise SettingError(f"--strengths {text} is not a list of numbers: give {name}={example}") from None
        twice = next((one for one, other in pairwise(numbers) if one == other), None)
        if twice is not None:
            raise SettingError(f"--strengths {text} lists {twice:g} twice: give it once")
        found[name] = tuple(numbers)
    return found
