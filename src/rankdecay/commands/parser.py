"""Parser of the library's commands, and the error of a command line that cannot work."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rankdecay.checks import suggestion
from rankdecay.text import shown_examples


class CommandError(Exception):
    """Raised for a command line that cannot work. The message is one line that names the value and the remedy."""


class Parser(argparse.ArgumentParser):
    """Parser of a command of the library.

    Args:
        command: its name.
        text: what it does.
        examples: command lines to show at the end of its help, with what each does.
        wanted: what the command lacks without arguments.
    """

    def __init__(self, command: str, text: str, examples: Mapping[str, str], wanted: str) -> None:
        super().__init__(
            prog=f"rankdecay {command}",
            description=text,
            epilog=shown_examples(examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.wanted = wanted

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}: see {self.prog} --help")


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the settings on a command line.

    Raises:
        CommandError: If they cannot be understood, or there are none.
    """
    if not arguments:
        raise CommandError(f"{parser.prog} {parser.wanted}; see {parser.prog} --help")
    settings, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = re.findall(r"--[\w-]+", parser.format_usage())
        near = suggestion(unknown[0].partition("=")[0], known)
        raise CommandError(f"unknown argument {unknown[0]!r}: {near}see {parser.prog} --help")
    return settings


def explained(error: ValueError, path: Path) -> CommandError:
    """Return an error of the library for the command line: with the path, and the options that its remedy means."""
    options = {
        "names=": "--names query=...,key=...,value=...,output=...",
        "num_heads=": "--num-heads N",
        "head_dim=": "--head-dim N",
        "sizes=": "--sizes N ...",
        "calibration=": "--calibration FILE",
        "out=": "--out DIR",
    }
    meant = [option for argument, option in options.items() if argument in str(error)]
    hint = f" (here: {' '.join(meant)})" if meant else ""
    where = "" if path.name in str(error) else f"{path}: "
    return CommandError(f"{where}{error}{hint}")
