"""Figures, tables and untrusted text, as plain text."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

#: What a terminal obeys or takes for a new line, what turns the direction of writing, and halves of characters.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
#: Beginnings of a cell that a spreadsheet takes for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: Levels of a picture made of characters, from nothing up, and what stands for each where the encoding has no blocks.
BLOCKS = "·▁▂▃▄▅▆▇█"
_IN_ASCII = dict(zip(BLOCKS, "._:-=+*#@", strict=True)) | {"×": "x", "ᵀ": "^T", "→": "->", "…": "..."}
GONE = 0.01  # share of the largest singular value below which a direction is drawn as gone


def visible(text: str) -> str:
    r"""Return a text of which no character does anything but stand there: ``\x1b``, ``\n`` and their like are spelled.

    Names of tensors, directories and arms are untrusted: a line feed in one fakes a line of a log, and an escape
    sequence clears the screen. Whatever a terminal or a log receives goes through here.

    Example:
        >>> print(visible("a\x1b[2J\nb"))
        a\x1b[2J\nb
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shown_lines(texts: Iterable[str]) -> str:
    """Return texts as lines, each made visible, so that a text with a line feed is still one line."""
    return "\n".join(map(visible, texts))


def json_text(value: object) -> str:
    """Return a value as JSON of one line that a terminal can show: whatever is not plain is spelled."""
    return json.dumps(value).replace("\x7f", "\\u007f")


def cell(value: object) -> object:
    """Return a value as a cell of a CSV file: a number as it is, a text such that a spreadsheet never computes it."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if value.startswith(_FORMULA) else text


def finite_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def number(value: float | None) -> str:
    """Return three digits of a value; × for None."""
    return "×" if value is None else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: ``"48 s"``, ``"3:07 min"``, ``"2:05 h"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def time_left(seconds: float, done: int, left: int) -> str:
    """Return how long the rest takes as ``"ETA 48 s"``; empty before anything is done, and once nothing is left.

    Args:
        seconds: that the work done took.
        done: pieces of work done.
        left: pieces of about the same size.
    """
    return f"ETA {duration(seconds / done * left)}" if done and left > 0 else ""


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return a line per row of a table, each column as wide as its widest cell, which is made visible."""
    shown = [[visible(text) for text in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]


def shown_examples(examples: Mapping[str, str]) -> str:
    """Return command lines, each below what it does, as they stand at the end of a command's help; empty for none."""
    lines = [line for command, what in examples.items() for line in (f"  {command}", f"      {what}")]
    return "\n".join(["examples:", *lines]) if lines else ""


def bars(values: Sequence[float], width: int = 48) -> str:
    """Return a picture of one line: a level for each value in [0, 1], ``·`` for one below `GONE`.

    Args:
        values: shares of the largest.
        width: characters at most; longer sequences are drawn by means of neighbours.
    """
    count = len(values)
    edges = [round(column * count / min(count, width)) for column in range(min(count, width) + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    levels = len(BLOCKS) - 1
    return "".join(BLOCKS[0 if not v >= GONE else min(1 + int(v * levels), levels)] for v in means)


def in_encoding(text: str, encoding: str | None) -> str:
    """Return a text that an encoding can write: blocks it lacks are levels in ASCII, other characters spelled."""
    return text.encode(encoding or "ascii", SPELLED).decode(encoding or "ascii")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Answer of the codecs' error handler `SPELLED`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (_IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(spelled), error.end


#: Error handler for streams whose encoding lacks characters of ours.
SPELLED = "rankdecay.spelled"
codecs.register_error(SPELLED, _spelled)
