"""What a person sees while an experiment runs: something live in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

ESTIMATE_AFTER = 2.0  # seconds of work from which the rest can be estimated


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


@dataclass(frozen=True)
class Promise:
    """How long the help says that a command takes, and how to make it shorter.

    Attributes:
        minutes: of the default, on the slowest machine that counts.
        shorter: the options that shorten it, as a user types them.
    """

    minutes: float
    shorter: str


class Screen:
    """Where a command speaks.

    Args:
        quiet: show nothing but notices.
        to_stderr: keep standard output free, for ``--json``.
        promise: what the help says of the time.
    """

    def __init__(self, *, quiet: bool, to_stderr: bool, promise: Promise | None = None) -> None:
        self.quiet = quiet
        self._promise, self._has_estimated = promise, False
        self.console = Console(file=sys.stderr if to_stderr else sys.stdout, highlight=False)
        self.is_live = self.console.is_terminal and not quiet

    def notice(self, text: str) -> None:
        """A line the user should see even with ``quiet``: it goes to standard error then."""
        if self.quiet:
            print(text, file=sys.stderr)
        else:
            self.console.print(text, markup=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """A line for whoever reads a log: neither in a terminal, which is live, nor with ``quiet``."""
        if not (self.is_live or self.quiet):
            self.notice(text)

    def estimate(self, spent: float, share: float) -> None:
        """States once how long the whole will take, from how long its first steps took.

        Args:
            spent: seconds since the clock started.
            share: of all the work that was done in them.
        """
        if self._has_estimated or spent < ESTIMATE_AFTER or not 0 < share < 1:
            return
        self._has_estimated = True
        whole = spent / share
        text = f"expected time: {duration(whole)}"
        if self._promise is not None and whole > 2 * 60 * self._promise.minutes:
            text += (
                f", more than twice the {self._promise.minutes:g} min that the default may take: "
                f"{self._promise.shorter} shortens it"
            )
        if not self.quiet:
            self.notice(text)


class Progress(Screen):
    """Shows the latest evaluation of every arm, averaged over its members still running.

    Args:
        title: what is running.
        arms: names, in display order.
        options: of `Screen`.
    """

    def __init__(self, title: str, arms: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self._title, self._work, self._done = title, 0, 0
        self._latest: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        self._started = time.monotonic()
        self._live = Live(console=self.console, auto_refresh=False) if self.is_live else None

    def working(self, work: int) -> "Progress":
        """Starts the clock for ``work`` member-steps, of which the ETA is made; use as a context."""
        self._work, self._started = work, time.monotonic()
        return self

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        self.line(self._title)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, records: Sequence[dict[str, Any]], member_steps: int) -> None:
        """New evaluations, after ``member_steps`` more training steps summed over members."""
        self._done += member_steps
        arms = dict.fromkeys(r["arm"] for r in records)
        for arm in arms:
            self._latest[arm] = [r for r in records if r["arm"] == arm]
        if self._live:
            self._live.update(self._table(), refresh=True)
        for arm in arms:
            row = self._row(arm)
            self.line(
                f"{row[0]:<18} step {row[1]:>6}  train {row[2]}  test {row[3]}  stable rank {row[4]:>5}  {row[5]}"
            )

    def interval_ended(self) -> None:
        """Every member has been evaluated at the same step: before that, others' steps were made but not counted."""
        if self._work:
            self.estimate(time.monotonic() - self._started, self._done / self._work)

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


class ArmBar(Screen):
    """A bar for an experiment that is done in seconds, one arm after the other; use as a context.

    Args:
        title: what is running.
        work: steps of all arms together.
        options: of `Screen`.
    """

    def __init__(self, title: str, work: int, **options: Any) -> None:
        super().__init__(**options)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=self.console, disable=not self.is_live)
        self._task = self._bar.add_task(title, total=work)
        self._title, self._work, self._done, self._started = title, work, 0, time.monotonic()

    def __enter__(self) -> "ArmBar":
        self._started = time.monotonic()
        self._bar.start()
        self.line(self._title)
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def at(self, arm: str, step: int) -> None:
        """An arm got to a step."""
        self.estimate(time.monotonic() - self._started, (self._done + step) / self._work)
        self._bar.update(self._task, description=f"{self._title}  {arm}, step {step}", completed=self._done + step)

    def ended(self, arm: str, steps: int, budget: int) -> None:
        """An arm is finished; ``budget`` are the steps it might have taken."""
        self._done += budget
        self.line(f"{arm:<10} {steps:>6} steps  {time.monotonic() - self._started:5.1f} s")


class RunsProgress(Screen):
    """One bar over all steps of runs that follow one another; elsewhere a line per evaluation.

    Args:
        title: what is running.
        unit: what a run counts: tokens, sequences, images.
        options: of `Screen`.
    """

    def __init__(self, title: str, unit: str, **options: Any) -> None:
        super().__init__(**options)
        self._title, self._unit = title, unit
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Bar(*columns, console=self.console, disable=not self.is_live)
        self._task = self._bar.add_task(title, left="")
        self._work = self._done = self._free = self._step = 0
        self._started = time.monotonic()

    def working(self, work: int, done: int) -> "RunsProgress":
        """Starts the clock; use as a context.

        Args:
            work: steps of all runs.
            done: those made before.
        """
        self._work, self._done, self._free, self._started = work, done, done, time.monotonic()
        self._bar.update(self._task, total=work, completed=done)
        return self

    def __enter__(self) -> "RunsProgress":
        self._bar.start()
        self.line(self._title)
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begins(self, step: int) -> None:
        """A run begins, at a step that it had got to before."""
        self._done += step
        self._free += step
        self._step = step

    def at(self, step: int) -> None:
        """The run got to a step."""
        self._done += step - self._step
        self._step = step
        left = self._work - self._free
        self.estimate(time.monotonic() - self._started, (self._done - self._free) / left if left else 0)
        self._bar.update(self._task, completed=self._done, left=self._left())

    def evaluated(self, run: str, record: dict[str, Any]) -> None:
        """A run was evaluated."""
        rate = record[self._unit] / max(record["seconds"], 1e-9)
        accuracy = "" if record["accuracy"] is None else f"  accuracy {record['accuracy']:.1%}"
        text = f"{run}  step {record['step']}  loss {record['loss']:.4f}{accuracy}  {rate:,.0f} {self._unit}/s"
        self._bar.update(self._task, description=f"{self._title}\n{text}")
        self.line(f"{text}  {self._left()}")

    def ended(self, missed: int = 0) -> None:
        """A run is over; ``missed`` are the steps it did not make because it diverged."""
        self._done += missed
        self._free += missed

    def _left(self) -> str:
        made = self._done - self._free
        if not made:
            return ""
        left = (time.monotonic() - self._started) / made * max(0, self._work - self._done)
        return f"ETA {duration(left)}" if left else ""
