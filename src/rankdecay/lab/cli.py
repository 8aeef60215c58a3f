"""The lab's commands, ``rankdecay COMMAND [options]``: the experiments, and the pages of their results.

Settings are dataclasses: their fields are the options, their docstrings the help. Only the experiment that was named is
imported, and its settings do not import torch, so ``--help`` answers at once. :mod:`rankdecay.cli` calls this module
when the lab's packages are installed, and says what exit codes mean.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from rankdecay.lab import experiment
from rankdecay.lab.errors import SettingError, check_name

#: The settings class of every experiment, in its module of `lab.experiments`, beside `run` and `print_summary`.
EXPERIMENTS = {
    "boundary": "boundary.experiment:Boundary",
}
BRIEF = ("factor", "margin", "report")  # commands that leave nothing to continue from when they are interrupted
PRESET_OPTIONS = ("--preset", "--size")  # what may choose one of an experiment's PRESETS
CONFIG = (tyro.conf.FlagCreatePairsOff,)


@dataclasses.dataclass(frozen=True)
class Report:
    """Make the HTML page of a run directory again, or a figure for a paper.

    Several directories of boundary, which may differ in arms, seeds, strengths, amounts of data and decays of the rest
    alone, are merged into one page; of other experiments each gets its own page.
    """

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path | None = None
    """Write the page of boundary directories here, merged; several go to merged-report.html otherwise."""
    figure: Path | None = None
    """Draw the static figure of one run, or of boundary directories merged, here instead: .png, .svg or .pdf."""


def main(arguments: Sequence[str]) -> int:
    """Run one of the lab's commands and return the exit code.

    Args:
        arguments: the command, then its options.
    """
    command = shlex.join(["rankdecay", *arguments])
    try:
        settings = parse(arguments)
        if isinstance(settings, Report):
            _report(settings)
        else:
            _experiment(arguments[0], settings, command)
    except SettingError as error:
        print(f"rankdecay: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        aim = "to begin anew" if arguments[0] in BRIEF else "to continue from the last checkpoint"
        print(f"\nrankdecay: interrupted; {aim}, run again: {command}", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str]) -> Any:
    """Read the command line of one of the lab's commands; exit with code 2 and a message if it cannot be read.

    Args:
        arguments: the command, then its options.

    Returns:
        The settings: `Report`, or the dataclass of the experiment.

    Raises:
        SettingError: if there is no preset of the name given.
    """
    name, options = arguments[0], list(arguments[1:])
    if name == "report":
        return tyro.cli(Report, args=options, prog="rankdecay report", config=CONFIG)
    if name not in EXPERIMENTS:
        presets = experiment.presets(name)
        first = next(iter(presets.values()))
        default = _preset(presets, options) or first
        return tyro.cli(type(first), args=options, prog=f"rankdecay {name}", default=default, config=CONFIG)
    module = _module(name)
    settings_class, presets = getattr(module, EXPERIMENTS[name].partition(":")[2]), getattr(module, "PRESETS", {})
    default = _preset(presets, options) or next(iter(presets.values()), settings_class())
    return tyro.cli(settings_class, args=options, prog=f"rankdecay {name}", default=default, config=CONFIG)


def _module(name: str) -> ModuleType:
    return import_module(f"rankdecay.lab.experiments.{EXPERIMENTS[name].partition(':')[0]}")


def _preset(presets: Mapping[str, Any], options: Sequence[str]) -> Any:
    """The preset named on the command line, which supplies the defaults, so that every option can still be set."""
    words = pairwise([*options, ""])
    for word, following in reversed(list(words)):  # the last one counts, as of every option
        option, equals, value = word.partition("=")
        if option in PRESET_OPTIONS:
            setting = option.removeprefix("--")
            known = {name: preset for name, preset in presets.items() if getattr(preset, setting, None) == name}
            if known:  # else the settings have no such option, which is said when they are read
                return known[check_name(option, value if equals else following, known)]
    return None


def _experiment(name: str, settings: Any, command: str) -> None:
    from rankdecay.lab.machine import respect_cpu_quota

    respect_cpu_quota()
    if name not in EXPERIMENTS:
        found = experiment.load(name)
        summary = experiment.run(found, settings, command)
        show = partial(experiment.print_summary, found)
    else:
        module = _module(name)
        summary, show = module.run(settings, command), module.print_summary
    if not summary:  # a process of torchrun that does not write
        return
    if settings.json:
        print(json.dumps(summary))
    elif not settings.quiet:
        show(summary)
        print(f"\n{settings.out / 'report.html'}  is the page to open; {settings.out / 'summary.json'} has the figures")


def _report(settings: Report) -> None:
    from rankdecay.lab.report.legacy import draw_figure, is_sweep, write_merged_report, write_report

    directories = list(settings.directories)
    if not directories:
        raise SettingError("report needs at least one run directory: rankdecay report runs/grok")
    if settings.figure is not None and settings.figure.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SettingError(f"--figure {settings.figure} is no figure that can be drawn: name it .png, .svg or .pdf")
    if settings.figure is not None and settings.out is not None:
        raise SettingError(f"--out {settings.out} is for the page and --figure for the figure: give one of them")
    several = len(directories) > 1 and any(map(is_sweep, directories))
    try:
        if settings.figure is not None:
            print(draw_figure(directories, settings.figure))
        elif settings.out is not None or several:
            print(write_merged_report(directories, settings.out or Path("merged-report.html")))
        else:
            for directory in directories:
                print(write_report(directory))
    except OSError as error:
        raise SettingError(f"{error.filename} cannot be read or written ({error.strerror}): check the path") from None
