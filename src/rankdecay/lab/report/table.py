"""One description of a table, two renderers: the terminal's and the page's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rankdecay.lab.report.words import figure_text, is_number

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading: its name; where the terminal breaks the line there is a line feed.
        value: the key of a row, or a function of one.
        form: a format of numbers, or a function from the value to text.
        small: what the page shows beside it, smaller: text, or None.
        where: ``"both"``, or the one renderer that shows it: ``"page"``, ``"terminal"``.
        when: whether rows have anything to show in it.
    """

    heading: str
    value: str | Callable[[Row], Any]
    form: str | Callable[[Any], str] = ".3g"
    small: Callable[[Row], str | None] | None = None
    where: str = "both"
    when: Callable[[Sequence[Row]], bool] = lambda rows: True

    def of(self, row: Row) -> Any:
        """The value of a row."""
        return row.get(self.value) if isinstance(self.value, str) else self.value(row)

    def text(self, row: Row) -> str:
        """The value of a row as text."""
        value = self.of(row)
        if callable(self.form):
            return self.form(value)
        return value if isinstance(value, str) else figure_text(value, self.form)


def has(key: str) -> Callable[[Sequence[Row]], bool]:
    """For `Column.when`: whether any row has a number under a key."""
    return lambda rows: any(is_number(row.get(key)) for row in rows)


def several(key: str) -> Callable[[Sequence[Row]], bool]:
    """For `Column.when`: whether rows differ under a key."""
    return lambda rows: len({row.get(key) for row in rows}) > 1


def chosen(columns: Sequence[Column], rows: Sequence[Row], renderer: str) -> list[Column]:
    """The columns that a renderer shows of some rows."""
    return [column for column in columns if column.where in ("both", renderer) and column.when(rows)]


def html_table(label: str, columns: Sequence[Column], rows: Sequence[Row], names: Mapping[str, str]) -> str:
    """The table for a page; empty without rows.

    Args:
        label: what it holds, for who cannot see it.
        columns: beside that of the names.
        rows: with their name under ``name``.
        names: the label of each.
    """
    if not rows:
        return ""
    visible = chosen(columns, rows, "page")
    heads = ["Arm", *(" ".join(column.heading.split()) for column in visible)]
    heads = [head[:1].upper() + head[1:] for head in heads]
    body = [(names.get(str(row["name"]), str(row["name"])), [_cell(column, row) for column in visible]) for row in rows]
    return table(label, heads, body)


def _cell(column: Column, row: Row) -> str:
    more = column.small(row) if column.small else None
    return escape(column.text(row)) + (f" <small>{escape(more)}</small>" if more else "")


def table(label: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table with a name per row.

    Args:
        label: what it holds, for who cannot see it.
        heads: the columns (text), first that of the names.
        rows: a name (text) and its cells (HTML).
    """
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return scrolling(label, f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>")


def scrolling(label: str, rows: str) -> str:
    """A table that scrolls sideways by itself where the page is narrow."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table>{rows}</table></div>'
