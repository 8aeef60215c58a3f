"""The newcomer's walk: what it reads of a page, what it runs, and that it fails when a page is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.waiting import HANG
from tests.walked import ROOT, walk

PAGE = """
```python
number = 1
```

Text.

<!-- walk: long hours -->
```sh
sleep 1000
```

<!-- walk: file part.py -->
```python
print("part")
```

```sh
python part.py
```

<!-- walk: printed -->
```text
part
```

```python
print(number + 1)
```
"""


@pytest.mark.parametrize("page", walk.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_is_run_or_says_why_not(page: Path) -> None:
    for block in walk.blocks(page.read_text(encoding="utf-8")):
        assert block.language in walk.RUN + walk.SHOWN


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```\nls\n```\n", "neither run nor shown"),
        ("```bash\nls\n```\n", "neither run nor shown"),
        ("<!-- walk: skip it -->\n```sh\nls\n```\n", "none of long, elsewhere"),
        ("<!-- walk: elsewhere -->\n```sh\nls\n```\n", "no reason"),
        ("<!-- walk: long hours -->\n\n```sh\nls\n```\n", "directly before"),
    ],
)
def test_a_block_that_would_be_left_out_without_a_word_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        walk.blocks(text)


def test_marks_and_lines() -> None:
    found = walk.blocks(PAGE)
    assert [(block.language, block.kind, block.note) for block in found] == [
        ("python", "", ""),
        ("sh", "long", "hours"),
        ("python", "file", "part.py"),
        ("sh", "", ""),
        ("text", "printed", ""),
        ("python", "", ""),
    ]
    assert [block.runs(long=False) for block in found] == [True, False, True, True, False, True]
    assert PAGE.splitlines()[found[0].line - 1] == "number = 1"


def test_what_was_printed_may_differ_in_the_last_digits_alone() -> None:
    assert walk.same("rank 3.71 of 16\n", "rank  3.70 of 16")
    assert not walk.same("rank 3.71 of 16", "rank 3.71 of 32")
    assert not walk.same("rank 3.71", "ranks 3.71")
    assert not walk.same("1 2", "1")
    assert walk.same("heads ▂▃", "heads ▃▃")


def test_lines_may_be_left_out_where_the_page_says_so() -> None:
    printed = "rank 3.71\na note\nof 16\nenergy 2\n"
    assert walk.same("rank 3.70\n…\nof 16\n…\n", printed)
    assert walk.same("…\nenergy 2", printed)
    assert not walk.same("rank 3.71\n…\nof 17\n…\n", printed.replace("16", "32"))
    assert not walk.same("rank 3.71\n…\nof 16", printed)
    assert not walk.same("rank 3.71 … of 16\nenergy 2", printed)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one page, committed."""
    if shutil.which("git") is None:
        pytest.skip(needs.GIT)
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.setattr(walk, "ROOT", folder)
    (folder / "page.md").write_text(PAGE)
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "page"]):
        subprocess.run(["git", *command], cwd=folder, check=True, timeout=HANG)
    return folder


def walked(text: str) -> walk.Result:
    return walk.walk("page.md", walk.blocks(text), Path(sys.prefix), long=False)


def test_a_page_is_walked_in_its_order_and_counted(repository: Path) -> None:
    result = walked(PAGE)
    assert result.error() == "", result.said
    assert result.said.split() == ["part", "2"]
    assert "1 long, 1 printed, 4 ran" in walk.summary([result], long=False)
    assert "page.md:10: long: hours" in walk.summary([result], long=False)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("number + 1", "number + missing", "NameError: name 'missing' is not defined"),
        ("python part.py", "python parts.py", "exit code 2"),
        ("text\npart", "text\nparty", "the page shows what was not printed"),
        ("number = 1", "import os; os._exit(0)", "ended before the last block"),
    ],
)
def test_a_page_that_is_wrong_fails(repository: Path, old: str, new: str, words: str) -> None:
    assert words in walked(PAGE.replace(old, new)).error()
