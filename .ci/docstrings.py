"""Docstrings as the site shows them: the roles and tables of reStructuredText become Markdown's."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([\w.]+)`")
RULE = re.compile(r"^( *)=+(?: +=+)+ *$")


def markdown(text: str) -> str:
    """A docstring with roles as code, ``double`` backquotes as single ones, and simple tables as Markdown's."""
    text = ROLE.sub(lambda match: f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`", text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)  # griffe knows the plural as doctests
    text = re.sub(r"``([^`\n]+)``", r"`\1`", text)
    lines, made, i = text.split("\n"), [], 0
    while i < len(lines):
        rule = RULE.match(lines[i])
        ends = [j for j in range(i + 1, len(lines)) if lines[j].strip() == lines[i].strip()] if rule else []
        if rule and len(ends) >= 2:
            starts = [match.start() for match in re.finditer("=+", lines[i])]
            made += _table(lines[i + 1 : ends[0]], lines[ends[0] + 1 : ends[1]], starts, rule[1])
            i = ends[1] + 1
        else:
            made.append(lines[i])
            i += 1
    return "\n".join(made)


def _table(head: list[str], body: list[str], starts: list[int], indent: str) -> list[str]:
    def cells(line: str) -> list[str]:
        ends = [*starts[1:], None]
        return [line[start:end].strip().replace("|", r"\|") for start, end in zip(starts, ends, strict=True)]

    rows: list[list[str]] = []
    for line in body:
        new = cells(line)
        if not new[0] and rows:  # a cell that goes on
            rows[-1] = [f"{old} {more}".strip() for old, more in zip(rows[-1], new, strict=True)]
        else:
            rows.append(new)
    heads = [" ".join(filter(None, column)) for column in zip(*map(cells, head), strict=True)]
    every = [heads, ["---"] * len(starts), *rows]
    return [f"{indent}| {' | '.join(row)} |" for row in every]


class Docstrings(griffe.Extension):
    """Changes each docstring once it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if getattr(obj, "docstring", None) is not None:
            obj.docstring.value = markdown(obj.docstring.value)
