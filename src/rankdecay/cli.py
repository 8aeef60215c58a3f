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
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments import boundary, factor, grok, language, margin, recall, vision
from rankdecay.lab.experiments.boundary import Boundary
from rankdecay.lab.experiments.factor import Factor
from rankdecay.lab.experiments.grok import Grok
from rankdecay.lab.experiments.language import Language
from rankdecay.lab.experiments.margin import Margin
from rankdecay.lab.experiments.recall import Recall
from rankdecay.lab.experiments.vision import Vision

if TYPE_CHECKING:
    from rankdecay.attention import AttentionNames


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


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show what training did to the rank of a checkpoint's attention, per layer and head, beside the same untrained."""

    path: tyro.conf.Positional[Path]
    """Directory of save_pretrained, safetensors file, PyTorch state dict, or run directory."""
    json: bool = False
    """Print every row as JSON instead of the summary."""
    csv: Path | None = None
    """Write every row here, without the spectra."""
    html: Path | None = None
    """Write a page with maps of the heads and their spectra here."""
    compare: tuple[Path, ...] = ()
    """Later checkpoints, in order: what changed from the first on."""
    layers: tuple[int, ...] = ()
    """Only these layers, counted from 0."""
    heads: tuple[int, ...] = ()
    """Only these heads."""
    num_heads: int | None = None
    """Number of query heads, for a state dict without config.json."""
    names: str | None = None
    """Names of the projections, for attention that is not recognised: query=wq,key=wk,value=wv,output=wo."""


def _inspect(settings: Inspect) -> None:
    from rankdecay.attention.inspection import inspect
    from rankdecay.attention.summary import comparison
    from rankdecay.lab.inspect_run import inspect_run, is_run_directory

    reports = []
    for path in (settings.path, *settings.compare):
        try:
            if is_run_directory(path):
                reports.append(inspect_run(path))
                continue
            layers, heads = settings.layers or None, settings.heads or None
            names = _names(settings.names)
            reports.append(inspect(path, names, settings.num_heads, layers=layers, heads=heads))
        except ValueError as error:
            hint = (
                " (here: --names query=...,key=...,value=...,output=... --num-heads N)"
                if "names=" in str(error)
                else ""
            )
            raise SettingError(f"{error}{hint}") from None
    if settings.csv is not None:
        settings.csv.write_text("".join(report.to_csv() for report in reports[:1]), encoding="utf-8")
    if settings.html is not None:
        from rankdecay.lab.report.inspection import inspection_page

        inspection_page(reports, settings.html)
    if settings.json:
        whole = reports[0].to_json() | {"command": "inspect"}
        if settings.compare:
            whole["compare"] = [report.to_json() for report in reports[1:]]
        print(json.dumps(whole, allow_nan=False))
        return
    print(reports[0] if not settings.compare else reports[-1])
    if settings.compare:
        print(comparison(reports))
    for written in (settings.csv, settings.html):
        if written is not None:
            print(written)


def _names(text: str | None) -> "AttentionNames | None":
    from rankdecay.attention import AttentionNames

    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    legal = ("query", "key", "value", "fused", "output", "order", "layout")
    for name, _, value in pairs:
        if name not in legal or not value:
            raise SettingError(
                f"--names {text}: expected name=projection with names out of {', '.join(legal)}, such as "
                "query=wq,key=wk,value=wv,output=wo or fused=qkv,output=proj"
            )
    return AttentionNames(**{name: value for name, _, value in pairs})  # pyright: ignore[reportArgumentType]


Experiment = Grok | Boundary | Factor | Margin | Recall | Language | Vision
EXPERIMENTS = {  # each a module with `run` and `print_summary`
    Grok: grok,
    Boundary: boundary,
    Factor: factor,
    Margin: margin,
    Recall: recall,
    Language: language,
    Vision: vision,
}
BRIEF = (Factor, Margin, Inspect, Report, type(None))  # what leaves nothing to continue from when it is interrupted


def _experiment(settings: Experiment, command: str) -> None:
    experiment = EXPERIMENTS[type(settings)]
    summary = experiment.run(settings, command)  # pyright: ignore[reportArgumentType] - the module of its own settings
    if not summary:  # a process of torchrun that does not write
        return
    if settings.json:
        print(json.dumps(summary))
    elif not settings.quiet:
        experiment.print_summary(summary)
        print(f"\n{settings.out / 'report.html'}  is the page to open; {settings.out / 'summary.json'} has the figures")


def _report(settings: Report) -> None:
    from rankdecay.lab.report import draw_figure, is_sweep, write_merged_report, write_report

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


def _preset(command: str, presets: dict[str, Any], arguments: Sequence[str], named: str = "--preset") -> Any:
    """The preset named on the command line supplies the defaults, so that every option can still be set."""
    first = next(iter(presets.values()))
    if not arguments or arguments[0] != command:
        return first
    for option, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name = value if option == named else option.removeprefix(f"{named}=")
        if name in presets and option.startswith(named):
            return presets[name]
    return first


def parse(arguments: Sequence[str]) -> Experiment | Inspect | Report:
    """Reads the command line; exits with code 2 and a message if it cannot be read."""
    commands = (
        Annotated[Grok, tyro.conf.subcommand("grok", default=_preset("grok", grok.PRESETS, arguments))]
        | Annotated[
            Boundary, tyro.conf.subcommand("boundary", default=_preset("boundary", boundary.PRESETS, arguments))
        ]
        | Annotated[Factor, tyro.conf.subcommand("factor")]
        | Annotated[Margin, tyro.conf.subcommand("margin")]
        | Annotated[Recall, tyro.conf.subcommand("recall")]
        | Annotated[
            Language,
            tyro.conf.subcommand("language", default=_preset("language", language.PRESETS, arguments, "--size")),
        ]
        | Annotated[Vision, tyro.conf.subcommand("vision")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
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
    settings = None
    try:
        settings = parse(arguments)
        if isinstance(settings, Inspect):
            _inspect(settings)
        elif isinstance(settings, Report):
            _report(settings)
        else:
            _experiment(settings, command)
        sys.stdout.flush()
    except SettingError as error:
        print(f"rankdecay: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        aim = "to begin anew" if isinstance(settings, BRIEF) else "to continue from the last checkpoint"
        print(f"\nrankdecay: interrupted; {aim}, run again: {command}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output, `head` perhaps, has what they wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
