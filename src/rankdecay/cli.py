"""The command line: ``rankdecay COMMAND [options]``.

Commands are dataclasses: their fields are the options, their docstrings the help. Neither this module nor the settings
it reads import torch, so ``--help`` answers at once; a command imports what it needs when it runs.

Exit codes: 0 done, 2 a setting or file that cannot work (one line on standard error says what to do), 130 interrupted.
"""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.grok import PRESETS, Grok


@dataclasses.dataclass(frozen=True)
class Report:
    """Make the HTML page of a run directory again, or a figure for a paper."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    figure: Path | None = None
    """Draw the static figure of one run here instead: .png, .svg or .pdf."""


def _grok(settings: Grok, command: str) -> None:
    from rankdecay.lab.experiments import grok

    summary = grok.run(settings, command)
    if settings.json:
        print(json.dumps(summary))
    elif not settings.quiet:
        grok.print_summary(summary)
        print(f"\n{settings.out / 'report.html'}  is the page to open; {settings.out / 'summary.json'} has the figures")


def _report(settings: Report, command: str) -> None:
    from rankdecay.lab.report import write_report

    directories = list(settings.directories)
    if not directories:
        raise SettingError("report needs at least one run directory: rankdecay report runs/grok")
    if settings.figure is None:
        for directory in directories:
            print(write_report(directory))
        return
    if len(directories) > 1:
        raise SettingError(f"--figure {settings.figure} shows one run, {len(directories)} were given")
    from rankdecay.lab.report.figure import figure

    print(figure(directories[0], settings.figure))


def _preset(arguments: Sequence[str]) -> Grok:
    """The preset named on the command line supplies the defaults, so that every option can still be set."""
    for option, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name = value if option == "--preset" else option.removeprefix("--preset=")
        if name in PRESETS and option.startswith("--preset"):
            return PRESETS[name]
    return PRESETS["default"]


def parse(arguments: Sequence[str]) -> Grok | Report:
    """Reads the command line; exits with code 2 and a message if it cannot be read."""
    commands = (
        Annotated[Grok, tyro.conf.subcommand("grok", default=_preset(arguments))]
        | Annotated[Report, tyro.conf.subcommand("report")]
    )
    return tyro.cli(
        commands,  # type: ignore[arg-type]
        args=list(arguments),
        prog="rankdecay",
        description="Weight decay that decays rank: control, measure, explain the rank of a transformer's attention.",
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["rankdecay", *arguments])
    try:
        settings = parse(arguments)
        if isinstance(settings, Grok):
            _grok(settings, command)
        else:
            _report(settings, command)
        sys.stdout.flush()
    except SettingError as error:
        print(f"rankdecay: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nrankdecay: interrupted; to continue from the last checkpoint, run again: {command}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output, `head` perhaps, has what they wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
