"""What the tables of the findings share: compact copies of run directories for `docs/data`, and the command line."""

import argparse
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def copy_config(run: Path, to: Path) -> None:
    """Copies a run's configuration, without the name of a folder that is nobody else's."""
    to.mkdir(parents=True, exist_ok=True)
    config = json.loads((run / "config.json").read_text())
    words = shlex.split(config["reproduce"])
    if "--out" in words:
        words[words.index("--out") + 1] = f"runs/{to.name}"
    config["reproduce"] = shlex.join(words)
    (to / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def copy(run: Path, to: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Copies a run's configuration, with `rows` in the place of its own."""
    copy_config(run, to)
    with (to / "metrics.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


Action = Callable[[argparse.Namespace], None]


def command_line(
    doc: str | None,
    store: Action,
    tables: Mapping[str, Action],
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Runs ``store RUN TO``, or the table that is named, ``TABLE DIRECTORY...``, with options of its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    storing = commands.add_parser("store")
    storing.set_defaults(action=store)
    storing.add_argument("run", type=Path)
    storing.add_argument("to", type=Path)
    for name, table in tables.items():
        shown = commands.add_parser(name)
        shown.set_defaults(action=table)
        shown.add_argument("directories", type=Path, nargs="+")
        options(shown)
    chosen = parser.parse_args()
    chosen.action(chosen)
