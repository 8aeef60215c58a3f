"""Result of a compression and its cost: the table of head sizes, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rankdecay.text import aligned, shown_lines

#: Windows on which a loss is measured below which a note says that small differences are noise.
FEWEST_WINDOWS = 8


@dataclass(frozen=True)
class Size:
    """Cost and saving of one head size.

    Attributes:
        head_dim: d'.
        bytes_per_token: of keys and values in the cache, in the type of the weights.
        plane_energy: share of the planes' energy that is dropped, the largest over tables of frequencies.
        value_energy: share of the squared singular values of W_O W_V that is dropped, mean over key heads.
        loss: nats per token on the text's second half; None without a text.
    """

    head_dim: int
    bytes_per_token: int
    plane_energy: float
    value_energy: float
    loss: float | None = None


@dataclass(frozen=True)
class Sample:
    """Sample of text that a loss was measured on.

    Attributes:
        windows: number of windows of the text, those that did not choose.
        tokens: of a window.
    """

    windows: int
    tokens: int

    def __str__(self) -> str:
        """Return how large it is, in words."""
        return f"{self.windows} window{'' if self.windows == 1 else 's'} of {self.tokens} tokens"

    def notes(self) -> list[str]:
        """Return a note if so few windows tell small differences from chance as little as these."""
        if self.windows >= FEWEST_WINDOWS:
            return []
        return [
            f"the loss was measured on {self}, fewer than {FEWEST_WINDOWS}: differences of a few thousandths are "
            "noise. Give a longer text, or more windows (windows=, --windows), of which half are measured."
        ]


def usual_sizes(head_dim: int) -> list[int]:
    """Return the head sizes that are shown where none are asked for: 7/8, 3/4 and 1/2, in steps that kernels like."""
    step = 8 if head_dim >= 32 else 2
    return [size for part in (7, 6, 4) if (size := head_dim * part // 8 // step * step) > 0]


@dataclass(frozen=True)
class Compression:
    """Compressed model and its cost.

    Attributes:
        source: the path, or the class of the model.
        model_type: ``model_type`` of its configuration.
        head_dim: size of a head before.
        new_head_dim: size of a head now; None if only the sizes were asked for.
        sizes: what each size costs, the original first.
        kept: the rotary planes that stay, by kind of layer, "all" where there is one table of frequencies.
        chosen_by: "loss" with a text, else "energy".
        measured_on: the windows of the text on which the losses were measured; None without a text.
        exact: whether nothing but zeros was dropped.
        parameters: number of parameters before and now.
        notes: what a reader has to know.
        out: where it was written.
    """

    source: str
    model_type: str
    head_dim: int
    new_head_dim: int | None
    sizes: list[Size]
    kept: dict[str, list[int]] = field(default_factory=dict)
    chosen_by: str = "energy"
    measured_on: Sample | None = None
    exact: bool = False
    parameters: tuple[int, int] = (0, 0)
    notes: list[str] = field(default_factory=list)
    out: str | None = None

    def all_notes(self) -> list[str]:
        """Return the notes, and one on the loss if it was measured on few windows."""
        return [*self.notes, *([] if self.measured_on is None else self.measured_on.notes())]

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain numbers, strings and lists."""
        return {
            "source": self.source,
            "model_type": self.model_type,
            "head_dim": self.head_dim,
            "new_head_dim": self.new_head_dim,
            "sizes": [vars(size) for size in self.sizes],
            "kept": self.kept,
            "chosen_by": self.chosen_by,
            "measured_on": None if self.measured_on is None else vars(self.measured_on),
            "exact": self.exact,
            "parameters": list(self.parameters),
            "notes": self.all_notes(),
            "out": self.out,
        }

    def __str__(self) -> str:
        """Return the table of sizes, what was chosen, and the notes."""
        lines = [
            f"{self.source}: {self.model_type}, heads of {self.head_dim}",
            "",
            *size_table(self.sizes, self.measured_on),
        ]
        if self.new_head_dim is not None:
            planes = "; ".join(f"{name}: {', '.join(map(str, kept))}" for name, kept in self.kept.items())
            before, after = self.parameters
            lines += [
                "",
                f"head size {self.head_dim} → {self.new_head_dim}, parameters {before:,} → {after:,}; chosen by "
                + ("the loss on the text" if self.chosen_by == "loss" else "the energy of the weights"),
                *([f"planes that stay: {planes}"] if planes else []),
                *(["nothing but zeros was dropped: the logits are the same, up to rounding"] if self.exact else []),
            ]
        lines += [f"note: {note}" for note in self.all_notes()]
        if self.out is not None:
            lines += ["", f"{self.out}  is an ordinary checkpoint of transformers; its README.md says how to heal it"]
        return shown_lines(lines)


def size_table(sizes: Sequence[Size], measured_on: Sample | None = None) -> list[str]:
    """Return the table of sizes as lines, with what its losses were measured on below it."""
    with_loss = any(size.loss is not None for size in sizes)
    cells = [["head size", "cache bytes/token", "of original", "planes' energy lost", "values' energy lost"]]
    if with_loss:
        cells[0] += ["loss", "Δ loss"]
    for size in sizes:
        row = [
            str(size.head_dim),
            f"{size.bytes_per_token:,}",
            f"{size.bytes_per_token / sizes[0].bytes_per_token:.1%}",
            f"{size.plane_energy:.2%}",
            f"{size.value_energy:.2%}",
        ]
        if with_loss:
            first = sizes[0].loss
            row += ["—" if size.loss is None else f"{size.loss:.4f}"]
            row += ["" if size.loss is None or first is None else f"{size.loss - first:+.4f}"]
        cells.append(row)
    feet = ["low energy does not mean low loss: a head may find the previous token by a low-energy plane"]
    if measured_on is not None:
        feet.append(f"loss: nats per token on {measured_on}, not used to choose")
    return ["  " + line for line in aligned(cells)] + [f"  ({foot})" for foot in feet]
