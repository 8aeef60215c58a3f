"""Progress of an experiment: a live display in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from rankdecay.text import duration, time_left, visible

ESTIMATE_AFTER = 2.0  # seconds of work from which the rest can be estimated


@dataclass(frozen=True)
class Promise:
    """Duration that the help promises, and the option that shortens it.

    Attributes:
        minutes: of the default, on the slowest machine that counts.
        shorter: the options that shorten it, as a user types them.
    """

    minutes: float
    shorter: str


class Screen:
    """Terminal or log of a command, with the clock of its work; a context while something is shown live.

    Args:
        title: what is running.
        quiet: show nothing but notices.
        to_stderr: keep standard output free, for ``--json``.
        promise: what the help says of the time.
    """

    def __init__(self, title: str = "", *, quiet: bool, to_stderr: bool, promise: Promise | None = None) -> None:
        self.title, self.quiet = title, quiet
        self._promise, self._has_estimated = promise, False
        self.console = Console(file=sys.stderr if to_stderr else sys.stdout, highlight=False)
        self.is_live = self.console.is_terminal and not quiet
        self.live = Live(console=self.console) if self.is_live else None
        self.start_clock(0)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self.live:
            self.live.start()
        self.line(self.title)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def notice(self, text: str) -> None:
        """Write a line the user should see even with ``quiet``: it goes to standard error then."""
        if self.quiet:
            print(visible(text), file=sys.stderr)
        else:
            self.console.print(visible(text), markup=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Write a line for whoever reads a log: neither in a terminal, which is live, nor with ``quiet``."""
        if not (self.is_live or self.quiet):
            self.notice(text)

    # --- the clock ---

    def start_clock(self, work: int, done: int = 0) -> None:
        """Start the clock of ``work`` steps, of which ``done`` were made before."""
        self.work, self.done, self._skipped, self._started = work, done, done, time.monotonic()

    def skip(self, steps: int) -> None:
        """Count steps as done that took no time."""
        self.done += steps
        self._skipped += steps

    @property
    def seconds(self) -> float:
        """Time since the clock started."""
        return time.monotonic() - self._started

    def left(self) -> str:
        """The time left in words; empty before the first step and after the last."""
        return time_left(self.seconds, self.done - self._skipped, self.work - self.done)

    def estimate(self) -> None:
        """State once how long the whole will take, from how long its first steps took."""
        made, work, seconds = self.done - self._skipped, self.work - self._skipped, self.seconds
        if self._has_estimated or seconds < ESTIMATE_AFTER or not 0 < made < work:
            return
        self._has_estimated = True
        whole = seconds * work / made
        text = f"expected time: {duration(whole)}"
        if self._promise is not None and whole > 2 * 60 * self._promise.minutes:
            minutes, shorter = self._promise.minutes, self._promise.shorter
            text += f", more than twice the default's {minutes:g} min; use {shorter} to shorten it"
        if not self.quiet:
            self.notice(text)


class Progress(Screen):
    """Table of the latest evaluation of every arm, averaged over its members still running.

    Args:
        title: what is running.
        arms: names, in display order.
        options: of `Screen`.
    """

    def __init__(self, title: str, arms: Sequence[str], **options: Any) -> None:
        super().__init__(title, **options)
        self._latest: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}

    def working(self, work: int) -> Self:
        """Start the clock for ``work`` member-steps; use as a context."""
        self.start_clock(work)
        return self

    def update(self, records: Sequence[dict[str, Any]], member_steps: int) -> None:
        """Show new evaluations, after ``member_steps`` more training steps summed over members."""
        self.done += member_steps
        arms = dict.fromkeys(r["arm"] for r in records)
        for arm in arms:
            self._latest[arm] = [r for r in records if r["arm"] == arm]
        if self.live:
            self.live.update(self._table(), refresh=True)
        for arm in arms:
            name, step, train, test, rank, left = self._row(arm)
            self.line(f"{name:<18} step {step:>6}  train {train}  test {test}  stable rank {rank:>5}  {left}")

    def _row(self, arm: str) -> tuple[str, ...]:
        records = self._latest[arm]
        if not records:
            return (arm, "", "", "", "", "waiting")
        train, test, rank = (
            [record[key] for record in records if record[key] is not None]
            for key in ("train_accuracy", "test_accuracy", "stable_rank")
        )
        percents = [f"{100 * fmean(values):5.1f} %" if values else "diverged" for values in (train, test)]
        return (arm, str(records[0]["step"]), *percents, f"{fmean(rank):.3g}" if rank else "—", self.left())

    def _table(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        for heading in ("arm", "step", "train", "test", "stable rank Q, K", ""):
            table.add_column(heading, justify="left" if heading in ("arm", "") else "right")
        for arm in self._latest:
            table.add_row(*self._row(arm))
        return table


class BarScreen(Screen):
    """Screen with a bar of the steps done, and the time left beside it."""

    def __init__(self, title: str, **options: Any) -> None:
        super().__init__(title, **options)
        left = TextColumn("{task.fields[left]}")
        self.bar = Bar(TextColumn("{task.description}", markup=False), BarColumn(), left, auto_refresh=False)
        self._task = self.bar.add_task(title, left="")
        if self.live:
            self.live.update(self.bar)

    def draw_bar(self, text: str = "", before_left: str = "") -> None:
        """Move the bar to where the work is; ``text`` replaces what is written before it."""
        if self.live:
            left = before_left + self.left()
            self.bar.update(self._task, total=self.work, completed=self.done, description=text or None, left=left)


class ArmBar(BarScreen):
    """Bar of an experiment that is done in seconds, one arm after the other; use as a context.

    Args:
        title: what is running.
        work: steps of all arms together.
        options: of `Screen`.
    """

    def __init__(self, title: str, work: int, **options: Any) -> None:
        super().__init__(title, **options)
        self.start_clock(work)
        self._before = 0  # steps of the arms that have ended

    def at(self, arm: str, step: int) -> None:
        """Show the step of an arm."""
        self.done = self._before + step
        self.estimate()
        self.draw_bar(f"{self.title}  {arm}, step {step}")

    def ended(self, arm: str, steps: int, budget: int) -> None:
        """Write the steps that an arm took, of the ``budget`` it had."""
        self._before += budget
        self.line(f"{arm:<10} {steps:>6} steps  {self.seconds:5.1f} s  {self.left()}")


class RunsProgress(BarScreen):
    """One bar over all steps of runs that follow one another; elsewhere a line per evaluation.

    Args:
        title: what is running.
        unit: what a run counts: tokens, sequences, images.
        options: of `Screen`.
    """

    def __init__(self, title: str, unit: str, **options: Any) -> None:
        super().__init__(title, **options)
        self._unit, self._step = unit, 0

    def working(self, work: int, done: int) -> Self:
        """Start the clock for ``work`` steps of all runs, ``done`` of them made before; use as a context."""
        self.start_clock(work, done)
        self.draw_bar()
        return self

    def begins(self, step: int) -> None:
        """Start a run at the step that it had got to before."""
        self.skip(step)
        self._step = step

    def at(self, step: int) -> None:
        """Show the step of the run."""
        self.done += step - self._step
        self._step = step
        self.estimate()
        self.draw_bar()

    def evaluated(self, run: str, record: dict[str, Any]) -> None:
        """Show an evaluation of a run."""
        rate = record[self._unit] / max(record["seconds"], 1e-9)
        accuracy = "" if record["accuracy"] is None else f"  accuracy {record['accuracy']:.1%}"
        text = f"{run}  step {record['step']}  loss {record['loss']:.4f}{accuracy}  {rate:,.0f} {self._unit}/s"
        self.draw_bar(f"{self.title}\n{text}")
        self.line(f"{text}  {self.left()}")

    def ended(self, missed: int = 0) -> None:
        """End a run; ``missed`` are the steps it did not make because it diverged."""
        self.skip(missed)
