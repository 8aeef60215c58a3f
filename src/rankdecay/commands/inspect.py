"""Command ``rankdecay inspect``: the spectra of a checkpoint's attention, as text, JSON, CSV or a page."""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankdecay.browser import show_page
from rankdecay.commands.parser import CommandError, Parser, explained
from rankdecay.commands.progress import Progress
from rankdecay.files import unwritable, write
from rankdecay.text import json_text, visible

if TYPE_CHECKING:
    from rankdecay.attention import AttentionNames
    from rankdecay.attention.listing import Listing
    from rankdecay.inspection import Inspection

INSPECT = (
    "Show what training did to the rank of a checkpoint's attention, per layer and head, beside the same untrained."
)
#: Exit code of ``inspect --strict`` when something that looks like attention is not handled.
STRICT = 3
#: Command lines to show at the end of ``--help``, with what each does.
INSPECT_EXAMPLES = {
    "rankdecay inspect model": "the summary of a directory of save_pretrained",
    "rankdecay inspect model --html model.html --open": "maps of the heads and their spectra, in a browser",
    "rankdecay inspect first --compare second last": "what changed over training",
    "rankdecay inspect weights.pt --num-heads 4": "a state dict, which does not record its number of heads",
    "rankdecay inspect runs/grok": "the spectra that an experiment has stored",
}
#: What the command without arguments lacks.
_WANTED = "needs the PATH of a model: rankdecay inspect model shows a directory of save_pretrained"


def inspect_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser("inspect", INSPECT, INSPECT_EXAMPLES, _WANTED)
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


def inspect_command(settings: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
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
        raise explained(error, settings.path) from None
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
        raise explained(error, path) from None


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
    how = search_options(settings)
    try:
        listings = [listing(path, **how, layers=settings.layers or None, state=state) for path, state in chosen]
    except ValueError as error:
        raise explained(error, chosen[0][0]) from None
    if settings.json:
        print(_as_json(listings))
    else:
        print("\n\n".join(map(str, listings)))
    return _exit_code(listings, settings)


def _inspection(path: Path, state: str | None, settings: argparse.Namespace) -> "Inspection":
    from rankdecay.inspection import inspect
    from rankdecay.lab.experiments.grok.inspect_run import inspect_run, is_run_directory

    how = search_options(settings)
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
        progress = None if settings.quiet or settings.json else partial(Progress(), str(path), unit=" layers")
        return inspect(path, **how, layers=layers, heads=heads, state=state, progress=progress)
    except ValueError as error:
        raise explained(error, path) from None


def _layer(text: str) -> str:
    if not re.fullmatch(r"[\w.]*\d[\w.]*", text):
        raise argparse.ArgumentTypeError(f"invalid layer {text!r}: a number, or one of a tower such as decoder.4")
    return text


def search_options(settings: argparse.Namespace) -> dict[str, Any]:
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
