"""Shared by the tables of the findings: compact copies of run directories for `docs/data`, and the command line."""

import argparse
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from rankdecay.lab.store import read_json

Row = dict[str, Any]


def interval(values: Sequence[float], form: str = ".3f") -> str:
    """The mean of data sets or seeds and its 95 % interval (Student's t): ``0.990 ± 0.005``."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return format(mean, form)
    return f"{mean:{form}} ± {half_interval(values):{form.lstrip('+')}}"


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean (Student's t); infinite for one value."""
    if len(values) < 2:
        return math.inf
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def figure(value: float | None, form: str) -> str:
    """A figure of a table; a dash where there is none."""
    return "—" if value is None else format(value, form)


def mean(values: Sequence[float], form: str) -> str:
    """The mean of some values as a figure of a table; a dash without values."""
    return format(statistics.fmean(values), form) if values else "—"


def mean_of(rows: Iterable[Row], key: str, form: str) -> str:
    """The mean of a figure over the rows that have it; a dash where none has."""
    return mean([row[key] for row in rows if row.get(key) is not None], form)


def read_lines(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def arms(run: Path) -> dict[str, Row]:
    """The rows of a stored run's summary, one of each arm, by name; none without a summary."""
    return {row["name"]: row for row in (read_json(run / "summary.json") or {"arms": []})["arms"]}


def copy_config(run: Path, to: Path) -> None:
    """Copy a run's configuration, without the name of a folder that is nobody else's."""
    to.mkdir(parents=True, exist_ok=True)
    config = json.loads((run / "config.json").read_text())
    for command in (config, *config.get("earlier", [])):
        words = shlex.split(command["reproduce"])
        if "--out" in words:
            words[words.index("--out") + 1] = f"runs/{to.name}"
        command["reproduce"] = shlex.join(words)
    (to / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def write_summary(to: Path, summary: Row) -> None:
    """Write a summary without white space."""
    (to / "summary.json").write_text(json.dumps(summary, separators=(",", ":"), ensure_ascii=False) + "\n")


def store(options: argparse.Namespace) -> None:
    """Copy a run's configuration and summary: the action of ``store`` where the rows are not kept."""
    copy_config(options.run, options.to)
    write_summary(options.to, json.loads((options.run / "summary.json").read_text()))


def copy(run: Path, to: Path, rows: Iterable[Row]) -> None:
    """Copy a run's configuration, with `rows` in the place of its own."""
    copy_config(run, to)
    with (to / "metrics.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def existing(words: str) -> Path:
    """A file or folder on the command line; refused where there is none, which would print an empty table."""
    if not Path(words).exists():
        raise argparse.ArgumentTypeError(f"{words}: there is no such file or folder: give stored rows, see docs/data")
    return Path(words)


Action = Callable[[argparse.Namespace], None]


def command_line(
    doc: str | None,
    store: Action,
    tables: Mapping[str, Action],
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    arguments: Sequence[str] | None = None,
    measured: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Run a command of a script of findings.

    Args:
        doc: the docstring that ``--help`` shows.
        store: the action of ``store RUN TO``.
        tables: actions of ``TABLE DIRECTORY...``, by name.
        options: adds options to every table.
        arguments: the words after the script; those of the process by default.
        measured: actions of ``NAME --json FILE``, which run something and write it.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    storing = commands.add_parser("store")
    storing.set_defaults(action=store)
    storing.add_argument("run", type=existing)
    storing.add_argument("to", type=Path)
    for name, table in tables.items():
        shown = commands.add_parser(name)
        shown.set_defaults(action=table)
        shown.add_argument("directories", type=existing, nargs="+")
        options(shown)
    for name, measure in (measured or {}).items():
        running = commands.add_parser(name)
        running.set_defaults(action=lambda given, measure=measure: measure(given.json))
        running.add_argument("--json", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    chosen.action(chosen)
