"""Prints the result of a run in a terminal: its table, and what may be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rankdecay.lab.precision import described
from rankdecay.lab.report.table import Column, Row, chosen
from rankdecay.lab.report.words import Facts, verdict
from rankdecay.lab.settings import Record
from rankdecay.text import shown_lines, visible

if TYPE_CHECKING:
    from rankdecay.lab.experiment import Experiment

FILE_WIDTH = 120  # characters: where no terminal says its width, there is room for a whole line


def print_summary(experiment: Experiment[Any], summary: Record) -> None:
    """Print the table of a finished run and what may be said of it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    styles = experiment.styles_of(summary["settings"])
    facts = Facts.of(summary, styles)
    console.print(table(experiment.columns_of(facts), experiment.brief(summary["arms"])))
    if "precision" in summary:
        console.print(f"\nprecision {visible(described(summary) or '')}", markup=False)
    if note := experiment.note(facts):
        console.print(f"\n{shown_lines(note.splitlines())}", markup=False)
    console.print(f"\n{verdict(summary, experiment.headline, experiment.checks, styles)}", markup=False)


def table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """The table for a terminal: the name of each row, then the columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 1))
    shown = chosen(columns, rows, "terminal")
    for number, heading in enumerate(["arm", *(column.heading for column in shown)]):
        made.add_column(heading, justify="right" if number else "left", vertical="bottom", no_wrap=True)
    for row in rows:
        made.add_row(*(Text(visible(text)) for text in (str(row["name"]), *(column.text(row) for column in shown))))
    return made
