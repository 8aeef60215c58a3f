"""Command line: ``rankdecay COMMAND [options]``.

``inspect`` and ``compress`` are in :mod:`rankdecay.commands`; the first needs what the library needs, the second
transformers too. The other commands are the lab's, in :mod:`rankdecay.lab.cli`, which is imported when one of them is
named. This module imports neither torch nor the lab: ``--help`` answers at once.

Exit codes are in `EXIT_CODES`, which ``--help`` shows.
"""

import argparse
import errno
import io
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from rankdecay.checks import suggestion
from rankdecay.commands.compress import COMPRESS, compress_command, compress_parser
from rankdecay.commands.inspect import INSPECT, STRICT, inspect_command, inspect_parser
from rankdecay.commands.parser import CommandError, parse
from rankdecay.completion import SHELLS
from rankdecay.text import SPELLED, visible

#: The packages of the extra `lab`, as they are imported.
LAB_PACKAGES = ("tyro", "rich", "plotly", "matplotlib", "scipy", "sklearn", "joblib", "cvxpy")
LAB_INSTALL = "pip install 'rankdecay[lab]'"
EXIT_CODES = {
    0: "done",
    1: "standard output cannot be written, as on a full disk",
    2: "a command, setting or file that cannot work: one line on standard error says what to do",
    STRICT: "inspect --strict: something that looks like attention is not handled",
    130: "interrupted (Ctrl-C); the last line says how to continue",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"rankdecay: error: {visible(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(["rankdecay", *arguments])
        print(f"\nrankdecay: interrupted; to start over, run: {visible(again)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has closed it
        _drop_output()
        return 0
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _drop_output()
        print(f"rankdecay: error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        return 1


def _drop_output() -> None:
    """Send what is still buffered nowhere, or it would fail once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> NoReturn:
    """Run the command of this process and end it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`: what is said then goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without our characters gets them spelled
            stream.reconfigure(errors=SPELLED)
    if os.environ.get("NO_COLOR") or not sys.stderr.isatty():  # tyro, which reads its own variable when imported
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    code = main()
    if "rankdecay.lab.session.distributed" in sys.modules:
        from rankdecay.lab.session.distributed import exit_now, started_by_torchrun

        if started_by_torchrun():
            exit_now(code)
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    if not arguments:
        print(_help(), file=sys.stderr)
        return 2
    command = arguments[0]
    if command in ("-h", "--help"):
        print(_help())
    elif command == "--version":
        print(f"rankdecay {_version()}")
    elif command.partition("=")[0] == "--completion":
        print(_completion(" ".join([*command.split("=")[1:], *arguments[1:]])), end="")
    elif command == "inspect":
        return inspect_command(parse(inspect_parser(), arguments[1:]))
    elif command == "compress":
        return compress_command(parse(compress_parser(), arguments[1:]))
    elif command in _lab_commands():
        return _run_lab(arguments)
    else:
        kind, known = (
            ("option", ("--help", "--version", "--completion")) if command.startswith("-") else ("command", _commands())
        )
        raise CommandError(f"unknown {kind} {command!r}: {suggestion(command, known)}see rankdecay --help")
    return 0


def _commands() -> list[str]:
    return ["inspect", "compress", *_lab_commands()]


def _lab_commands() -> dict[str, str]:
    """Return what each of the lab's commands does, from the experiments that are installed."""
    from rankdecay.lab.experiment import questions
    from rankdecay.lab.settings import Report, question

    return questions() | {"report": question(Report)}


def _help_parser() -> argparse.ArgumentParser:
    width = max(len(str(code)) for code in EXIT_CODES)
    codes = [f"  {code:<{width}}  {meaning}" for code, meaning in EXIT_CODES.items()]
    parser = argparse.ArgumentParser(
        prog="rankdecay",
        usage="rankdecay COMMAND [options]",
        description="Weight decay that decays rank: control, measure, explain the rank of a transformer's attention.",
        epilog="\n".join(
            ["exit codes:", *codes, "", "rankdecay COMMAND --help lists the options of a command, with examples."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version of rankdecay and exit")
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        help='print the completion script of a shell: eval "$(rankdecay --completion bash)"',
    )
    return parser


def _help() -> str:
    parser = _help_parser()
    library = parser.add_argument_group("commands")
    lab = parser.add_argument_group("commands of the lab", f"These need more packages: {LAB_INSTALL}")
    for group, commands in ((library, {"inspect": INSPECT, "compress": COMPRESS}), (lab, _lab_commands())):
        for name, text in commands.items():
            group.add_argument(name, help=text)  # for the help alone: `_run` chooses the command
    return parser.format_help().rstrip()


def _completion(shell: str) -> str:
    """Return the completion script of a shell; the lab's commands are in it whether its packages are there or not."""
    from rankdecay.completion import Command, of_parser, of_settings, script
    from rankdecay.lab.experiment import presets
    from rankdecay.lab.settings import Report

    if shell not in SHELLS:
        raise CommandError(
            f'--completion {shell!r}: give one of {", ".join(SHELLS)}, such as eval "$(rankdecay --completion bash)"'
        )
    commands: dict[str, Command] = {
        "inspect": Command(INSPECT, of_parser(inspect_parser())),
        "compress": Command(COMPRESS, of_parser(compress_parser())),
    }
    for name, text in _lab_commands().items():
        settings = Report if name == "report" else type(next(iter(presets(name).values())))
        commands[name] = Command(text, of_settings(settings))
    return script(shell, commands, of_parser(_help_parser()))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rankdecay")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(not installed)"


def _run_lab(arguments: Sequence[str]) -> int:
    missing = [name for name in LAB_PACKAGES if find_spec(name) is None]
    if missing:
        packages = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        raise CommandError(f"rankdecay {arguments[0]} needs the packages of the lab, and {packages}: {LAB_INSTALL}")
    from rankdecay.lab import cli

    return cli.main(arguments)


if __name__ == "__main__":
    console()
