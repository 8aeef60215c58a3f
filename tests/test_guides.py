"""The Python of guides runs as it stands. Other pages have tests of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import needs
from tests.walked import python_blocks

needs.package("transformers")
#: What a page prints has to hold this.
SAYS = {
    "docs/guides/choose-a-decay.md": r"query_key: at the present lr of 0\.0003 a step takes 3e-05 of the root mean",
    "docs/guides/inspect.md": r"query_key \d\.\d+",
    "docs/guides/compress.md": r"head size 16 → 8",
    "docs/guides/audit.md": r"q_proj\.weight +query +whole ×2 +scale-invariant, confirmed",
}


@pytest.mark.parametrize("page", SAYS)
def test_the_blocks_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {"__name__": "__main__"}
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), known)
    assert re.search(SAYS[page], capsys.readouterr().out)
