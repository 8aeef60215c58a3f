"""Progress of a sweep: a bar with the time left, and the phase map of every arm as it fills."""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.columns import Columns
from rich.console import Group
from rich.text import Text

from rankdecay.lab.progress import BarScreen

if TYPE_CHECKING:
    from rankdecay.lab.ensemble.sweep import Trial

SHADES = "·░▒▓█"  # of the seeds run so far: none generalised … all did
WAITING = " "
LEGEND = "up: more data; right: stronger; · no seed … █ every seed generalised"
ESTIMATE_FROM = 0.15  # of all runs ended: before, those under way have taken most of the time
PLAIN_EVERY = 30.0  # seconds between lines when there is no terminal
Cell = tuple[float, float, float]  # rest decay, train fraction, strength


class PhaseProgress(BarScreen):
    """Bar of a sweep over its phase maps; use as a context after `begin`.

    Args:
        title: what is running.
        arms: names, in display order.
        options: of `Screen`.
    """

    def __init__(self, title: str, arms: Sequence[str], **options: Any) -> None:
        super().__init__(title, **options)
        self._cells: dict[str, dict[Cell, list[bool]]] = {arm: defaultdict(list) for arm in arms}
        self._entered = False
        self._missing = 0
        self._last_line = time.monotonic()

    def begin(self, rows: Sequence[dict[str, Any]], missing: Sequence["Trial"]) -> None:
        """Show what is there and what is still to run, and start the clock.

        Args:
            rows: of the runs that have ended.
            missing: trials still to run.
        """
        for cells in self._cells.values():
            cells.clear()
        for trial in missing:
            self._cells[trial.member.arm][trial.key[2], trial.train_fraction, trial.strength]
        for row in rows:
            self._add(row)
        self._missing = len(missing)
        self.start_clock(len(rows) + len(missing), len(rows))
        if missing:
            self.line(f"{self.title}: {len(missing)} runs to do" + (f", {len(rows)} done" if rows else ""))
        self._start()
        self._show()

    def __enter__(self) -> Self:
        self._entered = True
        self._start()
        return self

    def update(self, row: dict[str, Any]) -> None:
        """Add the row of a run that has ended."""
        self._add(row)
        self.done += 1
        ended = self.done - self.work + self._missing
        if ended >= ESTIMATE_FROM * self._missing:
            self.estimate()
        self._show()
        if time.monotonic() - self._last_line > PLAIN_EVERY or ended == self._missing:
            self._last_line = time.monotonic()
            generalised = sum(sum(seeds) for cells in self._cells.values() for seeds in cells.values())
            self.line(f"{ended} of {self._missing} runs, {generalised} of all generalised  {self.left()}")

    def _start(self) -> None:
        if self.live and self._entered and self._missing:
            self.live.start()

    def _add(self, row: dict[str, Any]) -> None:
        if row["arm"] in self._cells:
            cell = (row["rest_decay"], row["train_fraction"], row["strength"])
            self._cells[row["arm"]][cell].append(row["outcome"] == "generalised")

    def _show(self) -> None:
        if self.live:
            self.draw_bar(before_left=f"{self.done}/{self.work}  ")
            maps = [phase_map(arm, cells) for arm, cells in self._cells.items() if cells]
            self.live.update(Group(self.bar, Columns(maps, padding=(1, 3)), Text(LEGEND, "dim")), refresh=True)


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
