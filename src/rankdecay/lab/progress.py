"""What a person sees while an experiment runs: one live line per arm, or plain lines when not in a terminal."""

import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``"48 s"``, ``"3:07 min"``, ``"2:05 h"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _mean(records: Sequence[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in records if r[key] is not None]
    return f"{fmean(values):.3g}" if values else "—"


def _percent(records: Sequence[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in records if r[key] is not None]
    return f"{100 * fmean(values):5.1f} %" if values else "diverged"


class Progress:
    """Shows the latest evaluation of every arm, averaged over its members still running.

    Args:
        title: what is running.
        arms: names, in display order.
        quiet: show nothing.
        to_stderr: keep standard output free, for ``--json``.
    """

    def __init__(self, title: str, arms: Sequence[str], *, quiet: bool, to_stderr: bool) -> None:
        self._title, self._work, self._done = title, 0, 0
        self._latest: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        self._started = time.monotonic()
        self._quiet = quiet
        self._console = Console(file=sys.stderr if to_stderr else sys.stdout, highlight=False)
        self._live = (
            Live(console=self._console, auto_refresh=False) if self._console.is_terminal and not quiet else None
        )

    def working(self, work: int) -> "Progress":
        """Starts the clock for ``work`` member-steps, of which the ETA is made; use as a context."""
        self._work, self._started = work, time.monotonic()
        return self

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        elif not self._quiet:
            self.notice(self._title)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def notice(self, text: str) -> None:
        """A line the user should see even with ``quiet``: it goes to standard error then."""
        if self._quiet:
            print(text, file=sys.stderr)
        else:
            self._console.print(text, markup=False, soft_wrap=True)

    def update(self, records: Sequence[dict[str, Any]], member_steps: int) -> None:
        """New evaluations, after ``member_steps`` more training steps summed over members."""
        self._done += member_steps
        arms = dict.fromkeys(r["arm"] for r in records)
        for arm in arms:
            self._latest[arm] = [r for r in records if r["arm"] == arm]
        if self._live:
            self._live.update(self._table(), refresh=True)
        elif not self._quiet:
            for arm in arms:
                row = self._row(arm)
                self.notice(
                    f"{row[0]:<18} step {row[1]:>6}  train {row[2]}  test {row[3]}  stable rank {row[4]:>5}  {row[5]}"
                )

    def _row(self, arm: str) -> tuple[str, ...]:
        records = self._latest[arm]
        if not records:
            return (arm, "", "", "", "", "waiting")
        left = self._remaining()
        return (
            arm,
            str(records[0]["step"]),
            _percent(records, "train_accuracy"),
            _percent(records, "test_accuracy"),
            _mean(records, "stable_rank"),
            f"ETA {duration(left)}" if left else "",
        )

    def _remaining(self) -> float:
        if not self._done:
            return 0.0
        return (time.monotonic() - self._started) / self._done * max(0, self._work - self._done)

    def _table(self) -> Table:
        table = Table(title=self._title, title_justify="left", box=None, pad_edge=False)
        for heading in ("arm", "step", "train", "test", "stable rank Q, K", ""):
            table.add_column(heading, justify="left" if heading in ("arm", "") else "right")
        for arm in self._latest:
            table.add_row(*self._row(arm))
        return table
