"""The lab's commands, ``rankdecay COMMAND [options]``: the experiments, and the pages of their results.

Settings are dataclasses: their fields are the options, their docstrings the help. Only the experiment that was named is
imported, and its settings do not import torch, so ``--help`` answers at once. :mod:`rankdecay.cli` calls this module
when the lab's packages are installed, and says what exit codes mean.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from rankdecay import files
from rankdecay.browser import show_page
from rankdecay.lab import experiment
from rankdecay.lab.errors import SettingError, check_name
from rankdecay.lab.settings import REPORT_EXAMPLES, Report
from rankdecay.text import json_text, shown_examples, visible

PRESET_OPTIONS = ("--preset", "--size")  # what may choose one of an experiment's PRESETS
CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
POSITIONAL = tyro.conf.PositionalRequiredArgs


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
        print(f"rankdecay: error: {visible(str(error))}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(
            f"rankdecay: error: not enough memory ({visible(str(error))}): choose smaller sizes of the data or the "
            "model",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        resumable = arguments[0] != "report" and experiment.load(arguments[0]).resumable
        aim = "to continue from the last checkpoint" if resumable else "to start over"
        print(f"\nrankdecay: interrupted; {aim}, run: {visible(command)}", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str]) -> Any:
    """Read the command line of one of the lab's commands; exit with code 2 and a message if it cannot be read.

    Args:
        arguments: the command, then its options.

    Returns:
        The settings: `Report`, or the dataclass of the experiment.

    Raises:
        SettingError: If there is no preset of the name given.
    """
    name, options = arguments[0], list(arguments[1:])
    try:
        if name == "report":
            return tyro.cli(Report, args=options, prog="rankdecay report", config=(*CONFIG, POSITIONAL))
        presets = experiment.presets(name)
        first = next(iter(presets.values()))
        default = _preset(name, presets, options) or first
        kind, written = type(first), _without_none(type(first))
        read = tyro.cli(
            written, args=options, prog=f"rankdecay {name}", default=written(**vars(default)), config=CONFIG
        )
        return kind(**vars(read))
    except SystemExit as leaving:
        if not leaving.code:  # tyro has shown the help, which knows no examples
            print(shown_examples(REPORT_EXAMPLES if name == "report" else experiment.examples(name)))
        raise


def _without_none(settings: Any) -> Any:
    """Return settings with the same options, whose help does not say ``(default: None)``.

    tyro takes this from a field's annotation alone, and settings do not import tyro.
    """
    silent, hints = tyro.conf.arg(help_behavior_hint=""), get_type_hints(settings)
    absent = {field.name: None for field in fields(settings) if field.default is None}
    annotations = {name: Annotated[hints[name], silent] for name in absent}
    written = type(
        settings.__name__, (settings,), {"__annotations__": annotations, "__doc__": settings.__doc__, **absent}
    )
    return dataclass(frozen=True)(written)


def _preset(name: str, presets: Mapping[str, Any], options: Sequence[str]) -> Any:
    """The preset named on the command line, which supplies the defaults, so that every option can still be set."""
    words = pairwise([*options, ""])
    for word, following in reversed(list(words)):  # the last one counts, as of every option
        option, equals, value = word.partition("=")
        if option in PRESET_OPTIONS:
            setting = option.removeprefix("--")
            known = {n: preset for n, preset in presets.items() if getattr(preset, setting, None) == n}
            if known:  # else the settings have no such option, which is said when they are read
                chosen = value if equals else following
                if chosen in experiment.renamed_presets(name):
                    now = experiment.renamed_presets(name)[chosen]
                    raise SettingError(f"{option} {chosen} has another name since rankdecay 0.2: give {option} {now}")
                return known[check_name(option, chosen, known)]
    return None


def _experiment(name: str, settings: Any, command: str) -> None:
    from rankdecay.lab import unfit
    from rankdecay.lab.machine import respect_cpu_quota
    from rankdecay.lab.report.terminal import print_summary

    respect_cpu_quota()
    chosen = experiment.load(name)
    summary = experiment.run(chosen, settings, command)
    if not summary:  # a process of torchrun that does not write
        return
    if settings.json:
        print(json_text(summary))
    elif not settings.quiet:
        with unfit.explain_inconsistency(lambda error: unfit.in_summary(settings.out)):
            print_summary(chosen, summary)
            if picture := chosen.picture(settings.out):
                print(f"\n{picture}")
        page, figures = (visible(str(settings.out / name)) for name in ("report.html", "summary.json"))
        opened = "is open in a browser" if settings.open else "is the page to open (--open does)"
        print(f"\n{page}  {opened}; {figures} has the figures")
    if settings.open:
        show_page(settings.out / "report.html")


def _note(text: str) -> None:
    print(f"rankdecay: note: {visible(text)}", file=sys.stderr)


def _check_not_of_a_run(page: Path, directories: Sequence[Path]) -> None:
    """Refuse to write a page over a file of a run: those asked for, and one in whose directory the page would be."""
    from rankdecay.lab.store import is_run

    try:
        place = files.real(page)
    except ValueError as error:  # a NUL
        raise SettingError(f"--out {str(page)!r} cannot be the name of a file ({error}): give another") from None
    inside = is_run(place.parent) or any(files.real(directory) in place.parents for directory in directories)
    if inside and place.suffix.lower() not in (".html", ".htm"):
        raise SettingError(f"--out {page} is in a run directory and not named as a page is: give a name with .html")


def _report(settings: Report) -> None:
    directories = list(settings.directories)
    if not directories:
        raise SettingError("report needs at least one run directory: rankdecay report runs/grok")
    if settings.figure is not None and settings.figure.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SettingError(f"--figure {settings.figure} is an unsupported figure format: use .png, .svg or .pdf")
    if settings.figure is not None and settings.out is not None:
        raise SettingError(f"--out {settings.out} is for the page and --figure for the figure: give one of them")
    for option, path in (("--out", settings.out), ("--figure", settings.figure)):
        if path is not None and os.path.isdir(path):
            raise SettingError(f"{option} {path} is a directory: give a file in it")
    if settings.out is not None:
        _check_not_of_a_run(settings.out, directories)
    if settings.figure is not None and settings.open:
        raise SettingError("--open opens the page, and --figure draws no page: leave out one of them")
    several = len(directories) > 1 and any(experiment.of_directory(path).merged for path in directories)
    try:
        if settings.figure is not None:
            pages = [experiment.draw_figure(directories, settings.figure)]
        elif settings.out is not None or several:
            merged = settings.out or Path("merged-report.html")
            pages = [experiment.write_merged_report(directories, merged, _note)]
        else:
            pages = [experiment.write_report(directory, _note) for directory in directories]
    except OSError as error:
        raise SettingError(files.unwritable(error)) from None
    for page in pages:
        print(visible(str(page)))
        if settings.open:
            show_page(page)
