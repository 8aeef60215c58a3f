"""What the site has besides its pages: formulas, and the files and folders of the repository that pages link to.

A page links to an example, a benchmark or a folder of results by its place in the repository, which is right on disk
and on GitHub. On the site there is no such file: `on_files` adds each that is linked to, `on_page_markdown` points to
it. Blocks of `math` become MathML, which browsers draw by themselves: no script, and nothing from elsewhere.
"""

import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BAR = r"\|"
MATH = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"^!\[([^\]]*)\]\(([^)]*)\)$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def _targets(page: Path, text: str) -> dict[str, str]:
    """Links of a page to what is no page and no file of the site: each with its address from the site's root."""
    found = {}
    for _, link, _, _ in LINK.findall(text):
        target = (page.parent / link).resolve()
        if target.is_relative_to(ROOT) and target.exists() and not (target.is_relative_to(DOCS) and target.is_file()):
            found[link] = f"source/{target.relative_to(ROOT)}" + ("/index.html" if target.is_dir() else ".txt")
    return found


def _content(target: Path) -> str:
    """A file as it is; of a folder the names in it, and how large they are."""
    if target.is_file():
        return target.read_text(encoding="utf-8")
    files = sorted(file for file in target.rglob("*") if file.is_file() and not file.name.startswith("."))
    rows = "".join(
        f"<li>{html.escape(str(file.relative_to(target)))}, {file.stat().st_size:,} bytes</li>" for file in files
    )
    name = html.escape(str(target.relative_to(ROOT)))
    head = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    style = "<style>:root{color-scheme:light dark}body{font-family:sans-serif;margin:2em}</style>"
    return f"{head}<title>{name}</title>{style}<h1>{name}</h1><p>In the repository:</p><ul>{rows}</ul>"


def _bars(row: re.Match[str]) -> str:
    """A row of a table whose code has a bar for an escaped one, as on GitHub; Python-Markdown keeps the backslash."""

    def code(match: re.Match[str]) -> str:
        return f"<code>{html.escape(match[1].replace(BAR, '|')).replace('|', '&#124;')}</code>"

    return re.sub(r"`([^`]*\\\|[^`]*)`", code, row[0])


def _without_comments(text: str) -> str:
    """Comments are left out, but in code; one with a line of its own takes that line along."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.compile(r"^<!--(?:(?!-->).)*-->\n", re.MULTILINE | re.DOTALL)
    inside = re.compile(r"<!--.*?-->", re.DOTALL)
    return "".join(part if part.startswith("```") else inside.sub("", lines.sub("", part)) for part in parts)


def _formula(match: re.Match[str]) -> str:
    latex = match[1].replace(r"\lVert", r"\Vert").replace(r"\rVert", r"\Vert")
    return f'<div class="formula">{convert(" ".join(latex.split()), display="block")}</div>'


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to."""
    added: dict[str, Path] = {}
    for page in files.documentation_pages():
        path = Path(str(page.abs_src_path))
        for link, place in _targets(path, path.read_text(encoding="utf-8")).items():
            added[place] = (path.parent / link).resolve()
    for place, target in added.items():
        files.append(File.generated(config, place, content=_content(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where `on_files` put what they mean, and write formulas.

    Comments go, since one at the beginning of a line would end a paragraph. A picture leads to itself, so that a tap on
    a phone shows it in full.
    """
    path = Path(page.file.abs_src_path)
    places = _targets(path, markdown)
    here = Path(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        opening, link, anchor, closing = match.groups()
        if link in places:
            return f"{opening}{os.path.relpath(places[link], here)}{closing}"
        return f"{opening}{link}{anchor or ''}{closing}"

    markdown = re.sub(r"^\|.*$", _bars, markdown, flags=re.MULTILINE)
    shown = PICTURE.sub(r"[![\1](\2)](\2)", _without_comments(markdown))
    return LINK.sub(moved, MATH.sub(_formula, shown))
