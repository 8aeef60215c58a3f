"""The documents: links lead somewhere, cited sections exist, the citation is current, the examples of extending run."""

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch

import rankdecay
from rankdecay import cli, rules
from rankdecay.commands.inspect import inspect_parser, search_options
from rankdecay.commands.parser import parse
from rankdecay.linalg import shrink

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
CODE = [ROOT / folder for folder in ("src", "tests", "benchmarks", "examples")]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CITATION = re.compile(
    r"docs/theory\.md,?\s+sections?\s+(\d+(?:\.\d+)?)|\[theory\]\((?:docs/)?theory\.md\),\s+section\s+(\d+(?:\.\d+)?)"
)
RECOGNITION = (ROOT / "docs" / "guides" / "recognition.md").read_text(encoding="utf-8")
#: Documents that were never published: what they said is in docs/theory.md.
UNPUBLISHED = re.compile(r"(low_rank_decay|attention_rank|matrix_functions)\.md|planning (notes|table)")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def sections() -> set[str]:
    """The numbers of the sections of docs/theory.md."""
    return set(re.findall(r"^#+ (\d+(?:\.\d+)?) ", prose(ROOT / "docs" / "theory.md"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_comment_breaks_a_paragraph(page: Path) -> None:
    """At the beginning of a line GitHub takes a comment for the end of the paragraph, and shows the line as it is."""
    broken = re.findall(r"^ *<!--.*<!-- end -->.*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_picture_has_the_command_that_makes_it_beside_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for picture in re.finditer(r"^!\[.*images/(\w+)\.png\)$", text, re.MULTILINE):
        beside = text[max(picture.start() - 400, 0) : picture.end() + 400]
        commands = re.findall(r"(?:--redraw|--figure|--screenshot)[ =](\w+)", beside)
        assert picture[1] in commands, picture[0]


def test_cited_sections_exist_and_nothing_unpublished_is_cited() -> None:
    known, cited = sections(), set()
    for file in [*PAGES, *(file for folder in CODE for file in folder.rglob("*.py"))]:
        text = file.read_text(encoding="utf-8")
        found = {first or second for first, second in CITATION.findall(text)}
        assert found <= known, f"{file}: docs/theory.md has no section {', '.join(sorted(found - known))}"
        assert file == Path(__file__) or not UNPUBLISHED.search(text), file
        cited |= found
    assert len(cited) > 5


def test_sections_are_numbered_in_order() -> None:
    numbers = re.findall(r"^#+ (\d+(?:\.\d+)?) ", prose(ROOT / "docs" / "theory.md"), re.MULTILINE)
    order = [tuple(map(int, number.split("."))) for number in numbers]
    assert order == sorted(set(order))


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "cff-version: 1.2.0\n" in text
    for name in ("version", "license"):
        assert f"\n{name}: {project[name]}\n" in text
    try:
        import yaml
    except ImportError:  # the plain checks are all there is
        return
    citation = yaml.safe_load(text)
    assert {"message", "title", "authors", "abstract"} <= citation.keys()
    assert citation["authors"] == project["authors"]
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()


def test_one_licence_is_stated_in_every_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [stated] = tomllib.loads((ROOT / "REUSE.toml").read_text(encoding="utf-8"))["annotations"]
    assert stated["path"] == "**"
    assert stated["SPDX-License-Identifier"] == project["license"]
    assert (ROOT / "LICENSES" / f"{project['license']}.txt").read_text() == (ROOT / "LICENSE").read_text()
    elsewhere = [path for path in (ROOT / "src").rglob("*.py") if "SPDX" in path.read_text(encoding="utf-8")]
    assert elsewhere == []  # a file with another licence would say so, and REUSE.toml too


def test_the_changelog_begins_with_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert project["version"] in headings[:2]


def test_the_hooks_are_of_the_versions_in_use() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    [ruff] = re.findall(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(rf"ruff-pre-commit\n +rev: v{re.escape(ruff)}\b", hooks)


def test_the_page_on_recognition_runs_and_says_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"torch": torch, "nn": torch.nn, "rd": rankdecay}
    for block in re.findall(r"```python\n(.*?)```", RECOGNITION, re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6
    assert "cross: query_of (32, 32) and key_of (32, 32)" in printed[0]
    assert printed[1:4] == ["['self_attn', 'cross']", "()", "rows[0:32]/96 by 8 rows[32:64]/96 by 8"]
    assert "the model does not say whether queries and keys are normalised" in printed[4]
    assert "queries and keys are normalised, so" in printed[5]


@pytest.mark.parametrize("command", re.findall(r"^rankdecay inspect .*--names.*$", RECOGNITION, re.MULTILINE))
def test_the_commands_of_the_page_on_recognition_are_understood(command: str) -> None:
    settings = parse(inspect_parser(), shlex.split(command)[2:])
    assert search_options(settings)["names"]


# --- what the guide on extending shows ---


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files that the guide shows, installed as pip would: on the path, with an entry point for each."""
    from rankdecay.lab import experiment

    blocks = re.findall(
        r"```python\n# (\S+\.py)\n(.*?)```", (ROOT / "docs" / "guides" / "extend.md").read_text("utf-8"), re.DOTALL
    )
    assert [name for name, _ in blocks] == ["log_penalty.py", "fade/settings.py", "fade/experiment.py"]
    site = tmp_path / "site"
    for name, code in blocks:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(code, encoding="utf-8")
    (site / "fade" / "__init__.py").touch()
    metadata = site / "fade-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fade\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[rankdecay.rules]\nlog_penalty = log_penalty:RULE\n[rankdecay.experiments]\nfade = fade\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(rules, "_registered", dict(rules._registered))
    caches = rules._loaders, experiment._folders
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("fade", "log_penalty")]:
        del sys.modules[name]


@pytest.mark.usefixtures("package")
def test_the_rule_of_the_guide_decays() -> None:
    W = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(shrink(W, 0.1, "log_penalty").diagonal(), torch.tensor([1.96, 0.95]).double())


@pytest.mark.usefixtures("package")
def test_the_experiment_of_the_guide_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["fade", "--steps", "10", "--device", "cpu", "--out", str(out)]
    assert cli.main(command) == 0
    assert "✓ L2 keeps the rank" in capsys.readouterr().out
    arms = {arm["name"]: arm for arm in json.loads((out / "summary.json").read_text())["arms"]}
    assert arms["prox"]["rank"] < arms["l2"]["rank"] == 32
    assert "Which decay lowers the rank" in (out / "report.html").read_text(encoding="utf-8")
    assert cli.main([*command, "--quiet"]) == 0
    assert cli.main([*command, "--strength", "0.2"]) == 2
    assert cli.main([*command, "--strength", "-1"]) == 2
    assert "--strength -1" in capsys.readouterr().err
    assert cli.main(["report", str(out), "--figure", str(tmp_path / "figure.svg")]) == 0
    assert (tmp_path / "figure.svg").exists()


def test_a_picture_of_a_page_is_taken_after_it_was_drawn() -> None:
    """A headless browser may take it before the charts are there, unless it is told to give the page time."""
    for page in PAGES:
        for command in re.findall(r"^chromium .*", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert "--virtual-time-budget=" in command, f"{page}: {command}"


def test_the_list_of_model_types_is_where_the_guide_says() -> None:
    line = "from rankdecay.compress.types import CHECKED"
    assert f"`{line}`" in (ROOT / "docs/guides/compress.md").read_text(encoding="utf-8")
    known: dict[str, object] = {}
    exec(line, known)
    assert "llama" in cast("frozenset[str]", known["CHECKED"])
