"""What every experiment checks, records and ends with in the same way.

Importing this module imports neither torch nor numpy: the command line reads the experiments for ``--help``.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.precision import described

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from rankdecay.lab.precision import Choice
    from rankdecay.lab.store import RunDirectory

Record = dict[str, Any]
Preset = Literal["default", "standard"]
NOT_IDENTITY = ("preset", "out", "device", "compile", "quiet", "json")  # do not change what a run computes


def option(name: str) -> str:
    """A setting as the user writes it."""
    return f"--{name.replace('_', '-')}"


def check_counts(settings: Any, *names: str) -> None:
    """Raises a `SettingError` unless the named settings are at least 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise SettingError(f"{option(name)} {getattr(settings, name)} is too small: give at least 1")


def check_numbers(settings: Any, *names: str, zero: bool = False) -> None:
    """Raises a `SettingError` unless the named settings are finite and > 0; ``zero`` is allowed where it means none."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
            need = ">= 0; 0 switches it off" if zero else "> 0"
            raise SettingError(f"{option(name)} {value} must be a finite number {need}")


def check_threshold(threshold: float) -> None:
    """Raises a `SettingError` unless ``--threshold`` is an accuracy."""
    if not 0 < threshold <= 1:
        raise SettingError(f"--threshold {threshold} must be an accuracy in (0, 1]: for example 0.95")


def check_width(width: int, heads: int, example: int) -> None:
    """Raises a `SettingError` unless ``--width`` can be split into the heads."""
    if width < heads or width % heads:
        raise SettingError(f"--width {width} must be a multiple of the {heads} heads: for example {example}")


def check_evaluations(settings: Any) -> None:
    """Raises a `SettingError` unless the last of ``--steps`` is evaluated."""
    steps, every = settings.steps, settings.evaluate_every
    if steps % every:
        raise SettingError(
            f"--steps {steps} is no multiple of --evaluate-every {every}: "
            f"give for example --steps {max(1, steps // every) * every}"
        )


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
        SettingError: for an arm that was not chosen, or what is no list of numbers.
    """
    found = {}
    for text in texts:
        name, _, values = text.partition("=")
        if text in preset and name not in arms:
            continue
        check_name("--strengths", name, arms)
        try:
            found[name] = tuple(sorted({float(value) for value in values.split(",")}))
        except ValueError:
            raise SettingError(f"--strengths {text} is no list of numbers: give {name}={example}") from None
    return found


def print_precision(console: "Console", summary: Record) -> None:
    """The precision of a finished run, and why it was chosen, below its table."""
    if "precision" in summary:
        console.print(f"\nprecision {described(summary)}", markup=False)


def check_seeds(settings: Any) -> None:
    """Raises a `SettingError` unless ``--first-seed`` is the number of a seed."""
    if settings.first_seed < 0:
        raise SettingError(f"--first-seed {settings.first_seed} is negative: give 0 or more")


def seeds(settings: Any) -> range:
    """The seeds of ``--seeds`` and ``--first-seed``."""
    return range(settings.first_seed, settings.first_seed + settings.seeds)


def number(value: float | None, form: str) -> str:
    """A figure in a table, or a dash for one that is not known."""
    return "—" if value is None or not math.isfinite(value) else format(value, form)


def identity(settings: Any, without: Collection[str] = ()) -> Record:
    """The settings that decide what a run computes: all but `NOT_IDENTITY` and ``without``."""
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_IDENTITY and k not in without}


def configuration(
    command: str,
    settings: Record,
    arms: Sequence[Record],
    device: str,
    reproduce: str,
    precision: "Choice | None" = None,
) -> Record:
    """The content of ``config.json``.

    Args:
        command: name of the experiment.
        settings: of `identity`.
        arms: one object each, with ``name`` and ``description``.
        device: on which it runs.
        reproduce: the command line that repeats it.
        precision: of its products, where there is a choice.
    """
    from rankdecay.lab.machine import describe_machine, versions

    config = {
        "command": command,
        "settings": settings,
        "arms": list(arms),
        "versions": versions(),
        "machine": describe_machine(device),
        "reproduce": reproduce,
    }
    return config if precision is None else config | {"precision": dataclasses.asdict(precision)}


def in_one_piece(
    settings: Any,
    config: Record,
    notice: Callable[[str], None],
    compute: Callable[[], "tuple[list[Record], Record, int, dict[str, np.ndarray]]"],
) -> Record:
    """Runs an experiment too short to be continued, unless it is there already, and returns its summary.

    Args:
        settings: of the experiment, with ``out``.
        config: of `configuration`.
        notice: told what a user should know.
        compute: returns the lines of ``metrics.jsonl``, what the summary has beside its head, and the step and arrays
            of the snapshot. A `SettingError` of it leaves the directory to other settings: nothing was found.

    Raises:
        SettingError: if the output directory cannot work, or ``compute`` says so.
    """
    from rankdecay.lab.store import RunDirectory

    with RunDirectory.open(settings.out, config, notice) as directory:
        summary = finished(directory, notice, "for a new run give another --out")
        if summary is not None:
            return summary
        begun = time.monotonic()
        try:
            lines, found, step, arrays = compute()
        except SettingError:
            (settings.out / "config.json").unlink()
            raise
        directory.resume()  # an interrupted run may have left lines
        directory.append(lines)
        directory.save_snapshot(step, arrays)
        head = {"command": config["command"], "settings": config["settings"]}
        return finish(directory, {**head, **found, "wall_seconds": time.monotonic() - begun})


def finish(directory: "RunDirectory", summary: Record) -> Record:
    """Writes the summary, which marks the run complete, and its page."""
    from rankdecay.lab.report.legacy import write_report

    if "precision" in directory.config:
        summary["precision"] = directory.config["precision"]
    directory.finish(summary)
    write_report(directory.path)
    return summary


def finished(directory: "RunDirectory", notice: Callable[[str], None], hint: str) -> Record | None:
    """The summary of a run that is complete, after saying so; None of one that is not.

    Args:
        directory: of the run.
        notice: told that nothing is computed.
        hint: what to do for more.
    """
    from rankdecay.lab.report.legacy import write_report

    summary = directory.summary
    if summary is not None:
        notice(f"{directory.path} is complete: showing its result; {hint}")
        if not (directory.path / "report.html").exists():  # a kill came between the summary and the page
            write_report(directory.path)
    return summary
