"""Sections of the page of a run, beside its verdict and its table: charts and other pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rankdecay.lab.report.chart import Chart


@dataclass(frozen=True)
class Html:
    """A piece of a page that no chart is: HTML, what its scripts read, and the files they are in.

    Attributes:
        text: HTML, made by us alone; text of a run must be escaped in it.
        data: by name, what the scripts find in ``run``.
        scripts: files beside the experiment, or of `report/assets`.
        styles: style sheets, likewise.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    scripts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A heading, what is shown under it in a paragraph, and charts or other pieces.

    Attributes:
        title: the heading, also in the navigation.
        text: what a reader sees here (text).
        parts: in order; charts that follow one another stand side by side where there is room.
        name: of the anchor; by default the title in small letters.
    """

    title: str
    text: str
    parts: Sequence[Chart | Html] = ()
    name: str = ""

    @property
    def anchor(self) -> str:
        """The name of the section in an address."""
        return self.name or "-".join(self.title.lower().split())
