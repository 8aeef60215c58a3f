"""Command line: ``rankdecay COMMAND [options]``.

``inspect`` and ``compress`` are here; the first needs what the library needs, the second transformers too. The other
commands are the lab's, in :mod:`rankdecay.lab.cli`, which is imported when one of them is named. This module imports
neither torch nor the lab: ``--help`` answers at once.

Exit codes are in `EXIT_CODES`, which ``--help`` shows.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rankdecay.browser import show_page
from rankdecay.checks import suggestion
from rankdecay.completion import SHELLS
from rankdecay.files import unwritable, write
from rankdecay.text import SPELLED, duration, json_text, shown_examples, time_left, visible

if TYPE_CHECKING:
    from rankdecay.attention import AttentionNames
    from rankdecay.attention.listing import Listing
    from rankdecay.inspection import Inspection

INSPECT = (
    "Show what training did to the rank of a checkpoint's attention, per layer and head, beside the same untrained."
)
COMPRESS = "Write the same model with a smaller head and KV cache, as an ordinary checkpoint, and say what it costs."
#: The packages of the extra `lab`, as they are imported.
LAB_PACKAGES = ("tyro", "rich", "plotly", "matplotlib", "scipy", "sklearn", "joblib", "cvxpy")
LAB_INSTALL = "pip install 'rankdecay[lab]'"

#: Seconds of work before the first line of progress, and between two of them.
PATIENCE = 5.0
#: Exit code of ``inspect --strict`` when something that looks like attention is not handled.
STRICT = 3
EXIT_CODES = {
    0: "done",
    1: "standard output cannot be written, as on a full disk",
    2: "a command, setting or file that cannot work: one line on standard error says what to do",
    STRICT: "inspect --strict: something that looks like attention is not handled",
    130: "interrupted (Ctrl-C); the last line says how to continue",
}
#: Command lines to show at the end of ``--help``, with what each does.
INSPECT_EXAMPLES = {
    "rankdecay inspect model": "the summary of a directory of save_pretrained",
    "rankdecay inspect model --html model.html --open": "maps of the heads and their spectra, in a browser",
    "rankdecay inspect first --compare second last": "what changed over training",
    "rankdecay inspect weights.pt --num-heads 4": "a state dict, which does not record its number of heads",
    "rankdecay inspect runs/grok": "the spectra that an experiment has stored",
}
COMPRESS_EXAMPLES = {
    "rankdecay compress model --dry-run": "what smaller heads would cost; writes nothing",
    "rankdecay compress model --head-dim 8 --out smaller --calibration text.txt": "write one, chosen on a text",
}
#: What a command without arguments lacks.
WANTED = {
    "inspect": "needs the PATH of a model: rankdecay inspect model shows a directory of save_pretrained",
    "compress": "needs the PATH of a model: rankdecay compress model --dry-run shows what smaller heads cost, "
    "rankdecay compress model --head-dim 64 --out smaller writes one",
}


class CommandError(Exception):
    """Raised for a command line that cannot work. The message is one line that names the value and the remedy."""


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
        return _inspect(_parsed(_inspect_parser(), arguments[1:]))
    elif command == "compress":
        return _compress(_parsed(_compress_parser(), arguments[1:]))
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
        "inspect": Command(INSPECT, of_parser(_inspect_parser())),
        "compress": Command(COMPRESS, of_parser(_compress_parser())),
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


# --- inspect ---


class _Parser(argparse.ArgumentParser):
    """Parser of a command of the library, with examples at the end of its help."""

    def __init__(self, command: str, text: str, examples: Mapping[str, str]) -> None:
        super().__init__(
            prog=f"rankdecay {command}",
            description=text,
            epilog=shown_examples(examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.command = command

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}: see {self.prog} --help")


def _inspect_parser() -> _Parser:
    parser = _Parser("inspect", INSPECT, INSPECT_EXAMPLES)
    add = parser.add_argument
    add(
        "path",
        type=Path,
        metavar="PATH",
        help="directory of save_pretrained, safetensors file, PyTorch state dict, GGUF file, or run directory",
    )
    add("--json", action="store_true", help="print every row as JSON instead of the summary")
    add(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write every row here, without the spectra; with --compare each row names its source",
    )
    add("--html", type=Path, metavar="FILE", help="write a page with maps of the heads and their spectra here")
    add(
        "--compare",
        type=Path,
        nargs="*",
        default=[],
        metavar="PATH",
        help="later checkpoints, in order: what changed from the first on",
    )
    add(
        "--layers",
        type=_layer,
        nargs="*",
        default=[],
        metavar="N",
        help="only these layers, by the model's own numbers; of a tower as decoder.4",
    )
    add("--heads", type=int, nargs="*", default=[], metavar="N", help="only these heads")
    add("--num-heads", type=int, metavar="N", help="number of query heads, for a state dict without config.json")
    add("--head-dim", type=int, metavar="N", help="size of a head, where --num-heads does not say it")
    add(
        "--names",
        action="append",
        metavar="NAMES",
        help="names of the projections, for attention that is not recognised: query=wq,key=wk,value=wv,output=wo, or "
        "fused=qkv,output=wo; also order, layout (contiguous, interleaved, alternating), num_heads, head_dim, "
        "rotary (none, half, interleaved), rotary_dims, qk_norm (yes, no), transposed (yes, no), grouping; repeat it "
        "for a second kind of attention",
    )
    add("--only", action="store_true", help="look for nothing but the attention of --names")
    add(
        "--strict",
        action="store_true",
        help=f"exit with code {STRICT} if anything that looks like attention is not handled",
    )
    add(
        "--state",
        action="append",
        metavar="KEY",
        help="which weights, where there are several sets: name of a file in the directory, dotted key, or prefix of "
        "names (student, state_dict_ema, model.safetensors); again for each path of --compare, if it is another",
    )
    add("--quiet", action="store_true", help="no lines of progress on standard error; --json has none either")
    add("--list", action="store_true", help="show what would be read, names, shapes and heads, without spectra")
    add("--open", action="store_true", help="open the page of --html in a browser")
    return parser


def _parsed(parser: _Parser, arguments: Sequence[str]) -> argparse.Namespace:
    if not arguments:
        raise CommandError(f"{parser.prog} {WANTED[parser.command]}; see {parser.prog} --help")
    settings, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = re.findall(r"--[\w-]+", parser.format_usage())
        near = suggestion(unknown[0].partition("=")[0], known)
        raise CommandError(f"unknown argument {unknown[0]!r}: {near}see {parser.prog} --help")
    return settings


def _inspect(settings: argparse.Namespace) -> int:
    from rankdecay.inspection import comparison, csv_text, moments, over_time
    from rankdecay.lab.store import tidy

    if settings.open and settings.html is None:
        raise CommandError("--open needs --html: add --html page.html")
    paths = (settings.path, *settings.compare)
    _check_outputs(paths, settings)
    try:
        for path in paths:
            tidy(path)
    except ValueError as error:
        raise _explained(error, settings.path) from None
    states = settings.state or [None]
    if len(states) not in (1, len(paths)):
        raise CommandError(
            f"--state is given {len(states)} times for {len(paths)} paths: give it once, or once for each"
        )
    chosen = list(zip(paths, states * len(paths) if len(states) == 1 else states, strict=True))
    if settings.list:
        return _list(chosen, settings)
    reports = [_inspection(path, state, settings) for path, state in chosen]
    pictured = "" if settings.json or settings.compare else _over_time(settings.path)
    try:
        if settings.csv is not None:
            write(settings.csv, csv_text(reports).encode())
        if settings.html is not None:
            from rankdecay.lab.report.inspection import inspection_page

            inspection_page(reports, settings.html)
    except OSError as error:
        raise CommandError(unwritable(error)) from None
    if settings.open and settings.html is not None:
        show_page(settings.html)
    if settings.json:
        print(_as_json(reports))
        return _exit_code(reports, settings)
    print(reports[-1])
    if settings.compare:
        print(comparison(reports))
        print(f"\n{over_time(moments(reports))}")
    elif pictured:
        print(f"\n{pictured}")
    for written in (settings.csv, settings.html):
        if written is not None:
            print(visible(str(written)))
    return _exit_code(reports, settings)


def _check_outputs(paths: Sequence[Path], settings: argparse.Namespace) -> None:
    """Refuse to write a table over the page, and either over what is looked at."""
    named = {"--csv": settings.csv, "--html": settings.html}
    given = {option: Path(path).absolute() for option, path in named.items() if path is not None}
    if len(set(given.values())) < len(given):
        raise CommandError(f"--csv and --html both name {settings.csv}: give each a file of its own")
    for option, path in given.items():
        for looked_at in (each.absolute() for each in paths):
            inside = looked_at in path.parents and path.exists() and path.suffix not in (".csv", ".html", ".htm")
            if path == looked_at or inside:
                raise CommandError(f"{option} {named[option]} is a file that would be read: give another name")


def _over_time(path: Path) -> str:
    """Return the picture of the spectra of a run directory's snapshots; "" of a checkpoint."""
    from rankdecay.lab.experiments.grok.inspect_run import is_run_directory, run_over_time

    try:
        return run_over_time(path) if is_run_directory(path) else ""
    except ValueError as error:  # an earlier snapshot that is damaged
        raise _explained(error, path) from None


def _exit_code(reports: "Sequence[Inspection | Listing]", settings: argparse.Namespace) -> int:
    return STRICT if settings.strict and any(report.unhandled for report in reports) else 0


def _as_json(reports: "Sequence[Inspection | Listing]") -> str:
    first, *later = (report.to_json() for report in reports)
    return json_text(first | {"command": "inspect"} | ({"compare": later} if later else {}))


def _list(chosen: Sequence[tuple[Path, str | None]], settings: argparse.Namespace) -> int:
    from rankdecay.attention.listing import listing
    from rankdecay.lab.experiments.grok.inspect_run import is_run_directory

    for option in ("csv", "html", "heads"):
        if getattr(settings, option):
            raise CommandError(f"--list computes no spectra for --{option}: leave out one of them")
    for path, _ in chosen:
        if is_run_directory(path):
            raise CommandError(f"{path} is a run directory, whose snapshots hold spectra alone: leave out --list")
    how = _search_options(settings)
    try:
        listings = [listing(path, **how, layers=settings.layers or None, state=state) for path, state in chosen]
    except ValueError as error:
        raise _explained(error, chosen[0][0]) from None
    if settings.json:
        print(_as_json(listings))
    else:
        print("\n\n".join(map(str, listings)))
    return _exit_code(listings, settings)


def _inspection(path: Path, state: str | None, settings: argparse.Namespace) -> "Inspection":
    from rankdecay.inspection import inspect
    from rankdecay.lab.experiments.grok.inspect_run import inspect_run, is_run_directory

    how = _search_options(settings)
    try:
        if is_run_directory(path):
            if state is not None:
                raise CommandError(
                    f"{path} is a run directory, which has one set of weights: leave out --state {state}"
                )
            for option in ("names", "only", "num_heads", "head_dim", "layers", "heads"):
                if getattr(settings, option):
                    flag = option.replace("_", "-")
                    raise CommandError(f"{path} is a run directory, which is always shown whole: leave out --{flag}")
            return inspect_run(path)
        layers, heads = settings.layers or None, settings.heads or None
        progress = None if settings.quiet or settings.json else partial(_Progress(), str(path), unit=" layers")
        return inspect(path, **how, layers=layers, heads=heads, state=state, progress=progress)
    except ValueError as error:
        raise _explained(error, path) from None


class _Progress:
    """Line on standard error now and then while work takes longer than one waits without a word."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._last = self._start = time.monotonic()
        self._due = self._start + PATIENCE

    def __call__(self, what: str, done: int, count: int, unit: str = "") -> None:
        """Say how much of what is done, unless it was said a moment ago or all of it is."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._due = what, self._last, self._last + PATIENCE
        self._last = now
        if now < self._due or done == count:
            return
        self._due = now + PATIENCE
        seconds = now - self._start
        left = ", ".join(filter(None, [duration(seconds), time_left(seconds, done, count - done)]))
        with contextlib.suppress(OSError):  # that nobody reads it must not end the work
            print(visible(f"{what}: {done} of {count}{unit}, {left}"), file=sys.stderr, flush=True)


def _explained(error: ValueError, path: Path) -> CommandError:
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


def _layer(text: str) -> str:
    if not re.fullmatch(r"[\w.]*\d[\w.]*", text):
        raise argparse.ArgumentTypeError(f"invalid layer {text!r}: a number, or one of a tower such as decoder.4")
    return text


def _search_options(settings: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that say how attention is found."""
    for option in ("num_heads", "head_dim"):
        value = getattr(settings, option)
        if value is not None and value < 1:
            raise CommandError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if settings.only and not settings.names:
        raise CommandError("--only needs --names: it restricts the search to the attention that --names describes")
    names = [_names(text) for text in settings.names or ()]
    return {
        "names": names or None,
        "num_heads": settings.num_heads,
        "head_dim": settings.head_dim,
        "only": settings.only,
    }


#: What ``--names`` may say, with the type of each value.
_NAMES: dict[str, type] = {
    "query": str, "key": str, "value": str, "fused": str, "output": str, "order": str, "layout": str, "grouping": str,
    "rotary": str, "qk_norm": bool, "transposed": bool,
    "num_heads": int, "head_dim": int, "rotary_dims": int, "blocks": int,
}  # fmt: skip


def _names(text: str) -> "AttentionNames":
    from rankdecay.attention import AttentionNames

    given: dict[str, object] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in _NAMES or not value:
            raise CommandError(
                f"--names {text}: expected name=projection, where name is one of {', '.join(_NAMES)}, such as "
                "query=wq,key=wk,value=wv,output=wo or fused=qkv,output=proj"
            )
        kind, flags = _NAMES[name], {"yes": True, "true": True, "no": False, "false": False}
        if kind is int and not re.fullmatch("[0-9]{1,18}", value):
            raise CommandError(f"--names {text}: {name}={value[:40]} must be a whole number")
        if kind is bool and value.lower() not in flags:
            raise CommandError(f"--names {text}: {name}={value} must be yes or no")
        given[name] = flags[value.lower()] if kind is bool else kind(value)
    try:
        return AttentionNames(**given)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise CommandError(f"--names {text}: {error}") from None


# --- compress ---


def _compress_parser() -> _Parser:
    parser = _Parser("compress", COMPRESS, COMPRESS_EXAMPLES)
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="directory of save_pretrained; a causal language model of transformers")
    add("--head-dim", type=int, metavar="N", help="size of a head wanted: even, better a multiple of 8")
    add("--out", type=Path, metavar="DIR", help="directory to write, which must not exist")
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text of what the model is for, on which planes and values are chosen and the loss is measured; without "
        "it the weights alone decide, which costs much more",
    )
    add("--window", type=int, metavar="N", help="tokens of a window of the text (default: 512)")
    add("--windows", type=int, metavar="N", help="windows of the text, half of which choose (default: 24)")
    add("--sizes", type=int, nargs="*", metavar="N", help="other head sizes to show (default: 7/8, 3/4 and 1/2)")
    add("--dry-run", action="store_true", help="show what head sizes would cost, and write nothing")
    add("--json", action="store_true", help="print the result as JSON")
    add("--quiet", action="store_true", help="no progress on standard error")
    return parser


def _compress(settings: argparse.Namespace) -> int:
    if settings.head_dim is None and not settings.dry_run:
        raise CommandError("rankdecay compress needs --head-dim N; --dry-run shows what head sizes cost")
    if settings.out is None and not settings.dry_run:
        raise CommandError("rankdecay compress needs --out DIR, a directory that does not exist yet; or --dry-run")
    of_text = {name: value for name in ("window", "windows") if (value := getattr(settings, name)) is not None}
    if of_text and settings.calibration is None:
        raise CommandError(f"--{next(iter(of_text))} is of a text: give one, --calibration FILE")
    from rankdecay.compress import compress, plan

    path: Path = settings.path
    size: int | None = settings.head_dim
    how: dict[str, Any] = {
        **of_text,
        "sizes": settings.sizes,
        "progress": None if settings.quiet else _Progress(),
    }
    try:
        if settings.dry_run:
            result = plan(path, size, settings.calibration, **how)
        else:
            assert size is not None
            result = compress(path, size, settings.out, settings.calibration, **how)
    except ValueError as error:
        raise _explained(error, settings.path) from None
    print(json_text(result.to_json() | {"command": "compress"}) if settings.json else result)
    return 0


if __name__ == "__main__":
    console()
