"""What a person sees while a sweep runs: a bar with the time left, and the phase map of every arm as it fills."""

import time
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from rankdecay.lab.progress import Screen, duration

if TYPE_CHECKING:
    from rankdecay.lab.ensemble.sweep import Trial

SHADES = "·░▒▓█"  # of the seeds run so far: none generalised … all did
WAITING = " "
LEGEND = "up: more data; right: stronger; · no seed … █ every seed generalised"
ESTIMATE_FROM = 0.15  # of all runs ended: before, those under way have taken most of the time
PLAIN_EVERY = 30.0  # seconds between lines when there is no terminal
Cell = tuple[float, float, float]  # rest decay, train fraction, strength


class PhaseProgress(Screen):
    """Progress of a sweep; use as a context after `begin`.

    Args:
        title: what is running.
        arms: names, in display order.
        options: of `Screen`.
    """

    def __init__(self, title: str, arms: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self._title, self._arms = title, arms
        self._cells: dict[str, dict[Cell, list[bool]]] = {arm: defaultdict(list) for arm in arms}
        self._bar = Progress(
            TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"), auto_refresh=False
        )
        self._task = self._bar.add_task("", total=0, left="")
        self._live = Live(console=self.console, auto_refresh=False) if self.is_live else None
        self._entered = False
        self._waiting = self._ended = 0
        self._started = self._spoken = time.monotonic()

    def begin(self, rows: Sequence[dict[str, Any]], missing: Sequence["Trial"], steps: int) -> None:
        """States what is there and what is still to run.

        Args:
            rows: of the runs that have ended.
            missing: trials still to run.
            steps: budget of each.
        """
        for cells in self._cells.values():
            cells.clear()
        for trial in missing:
            self._cells[trial.member.arm][trial.key[2], trial.train_fraction, trial.strength]
        for row in rows:
            self._add(row)
        self._waiting, self._ended, self._started = len(missing), 0, time.monotonic()
        self._bar.update(self._task, total=len(rows) + len(missing), completed=len(rows), left="")
        if missing:
            self.line(f"{self._title}: {len(missing)} runs to do" + (f", {len(rows)} there" if rows else ""))
        self._start()
        self._show()

    def __enter__(self) -> "PhaseProgress":
        self._entered = True
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, row: dict[str, Any]) -> None:
        """A run has ended."""
        self._add(row)
        self._ended += 1
        share = self._ended / self._waiting if self._waiting else 0
        if share >= ESTIMATE_FROM:
            self.estimate(time.monotonic() - self._started, share)
        left = (time.monotonic() - self._started) / self._ended * max(0, self._waiting - self._ended)
        said = f"ETA {duration(left)}" if left else ""
        self._bar.update(self._task, advance=1, left=said)
        self._show()
        if time.monotonic() - self._spoken > PLAIN_EVERY or self._ended == self._waiting:
            self._spoken = time.monotonic()
            generalised = sum(sum(seeds) for cells in self._cells.values() for seeds in cells.values())
            self.line(f"{self._ended} of {self._waiting} runs, {generalised} of all generalised  {said}")

    def _start(self) -> None:
        if self._live and self._entered and self._waiting:
            self._live.start()

    def _add(self, row: dict[str, Any]) -> None:
        if row["arm"] in self._cells:
            cell = (row["rest_decay"], row["train_fraction"], row["strength"])
            self._cells[row["arm"]][cell].append(row["outcome"] == "generalised")

    def _show(self) -> None:
        if self._live:
            maps = [phase_map(arm, cells) for arm, cells in self._cells.items() if cells]
            self._live.update(Group(self._bar, Columns(maps, padding=(1, 3)), Text(LEGEND, "dim")), refresh=True)


def phase_map(arm: str, cells: dict[Cell, list[bool]]) -> Text:
    """One arm's map in characters: fractions upward, strengths to the right, a block per rest decay.

    Args:
        arm: its name.
        cells: whether each seed run so far generalised.
    """
    lines = [arm]
    strengths = sorted({cell[2] for cell in cells})
    for rest in sorted({cell[0] for cell in cells}):
        for fraction in sorted({cell[1] for cell in cells}, reverse=True):
            shades = [_shade(cells.get((rest, fraction, strength), [])) for strength in strengths]
            lines.append("".join(shade * 2 for shade in shades))
    return Text("\n".join(lines))


def _shade(seeds: list[bool]) -> str:
    if not seeds:
        return WAITING
    share = sum(seeds) / len(seeds)
    return SHADES[0] if share == 0 else SHADES[1 + min(3, int(share * 4 - 1e-9))]
