"""A pytest plugin: a run ends with what was skipped, by reason, after everything else that pytest has to say.

The reasons of `tests/needs.py` name the remedy themselves.
"""

from collections import Counter, defaultdict
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest's own, so that ours comes last
def pytest_terminal_summary(terminalreporter: Any) -> Generator[None, Any, Any]:
    result = yield
    lines = summary(terminalreporter.stats.get("skipped", []))
    if lines:
        terminalreporter.section("skipped, and how to have it run")
        for line in lines:
            terminalreporter.line(line)
    return result


def summary(reports: list[pytest.TestReport | pytest.CollectReport]) -> list[str]:
    """A line for each reason, that of the most first. What a skipped file holds is not known: it counts as a file."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for report in reports:
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")  # pyright: ignore[reportIndexIssue, reportOptionalSubscript] - file, line, reason
        found[reason]["test" if isinstance(report, pytest.TestReport) else "file"] += 1
    lines = []
    for reason, kinds in sorted(found.items(), key=lambda item: -item[1].total()):
        counts = (f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in sorted(kinds.items(), reverse=True))
        lines.append(f"{' and '.join(counts)} skipped: {reason}")
    return lines
