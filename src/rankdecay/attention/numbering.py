"""Numbers of layers as the model counts them, and the towers they stand in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

#: Names of lists of blocks. A number after one of these counts layers; after another it may count parts of a layer.
LISTS = ("layers", "layer", "blocks", "block", "h", "stages", "levels", "resblocks", "blk", "encoder_layers",
         "decoder_layers")  # fmt: skip


def number_in(part: str) -> int | None:
    """Return the number that a part of a name is; None for what is none, or none that counts layers.

    ``str.isdigit`` is also true of ``²``, which is no number, and of 5,000 digits, which are no layer's.
    """
    return int(part) if part.isascii() and part.isdigit() and len(part) <= 9 else None


@lru_cache(maxsize=2**14)  # the names of a model's tensors have a few parts
def natural_key(text: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts texts by the numbers in them.

    Example:
        >>> sorted(["model-10.bin", "model-9.bin"], key=natural_key)
        ['model-9.bin', 'model-10.bin']
    """
    numbers = ((number_in(part), part) for part in re.split(r"(\d+)", text))
    return tuple((-1, part) if number is None else (number, "") for number, part in numbers)


class LayerNumber(NamedTuple):
    """Place of an attention module in its model.

    Attributes:
        tower: path of the list of layers it is in, without what all towers share; "" if there is one tower.
        number: the model's own number of the layer.
        label: unique name of the layer: its number, with the tower where there are several, and with the module where
            a layer has several attention modules.
    """

    tower: str = ""
    number: int = 0
    label: str = "0"


def number_layers(names: Sequence[str]) -> list[LayerNumber]:
    """Return tower, number and label of each attention module of a model.

    Example:
        >>> [place.label for place in number_layers(["encoder.layers.4.attn", "decoder.layers.0.attn"])]
        ['encoder.4', 'decoder.0']
    """
    places = [_place(name) for name in names]
    if any(number is None for _, number in places):
        alone = all(number is None for _, number in places)
        places = [
            (tower, number) if number is not None else ([] if alone else tower, i if alone else 0)
            for i, (tower, number) in enumerate(places)
        ]
    towers = _distinct([tower for tower, _ in places])
    labels = [f"{tower}.{number}" if tower else str(number) for tower, (_, number) in zip(towers, places, strict=True)]
    count = Counter(labels)
    labels = [
        _with_module(label, name) if count[label] > 1 else label for label, name in zip(labels, names, strict=True)
    ]
    return [
        LayerNumber(tower, number or 0, label) for tower, (_, number), label in zip(towers, places, labels, strict=True)
    ]


def _place(name: str) -> tuple[list[str], int | None]:
    """Return the path of the innermost list of layers that a module is in, and its number there."""
    parts = name.partition(":")[0].split(".")
    digits = [i for i, part in enumerate(parts) if number_in(part) is not None]
    if not digits:
        return parts, None
    layers = [i for i in digits if i and parts[i - 1] in LISTS] or digits[:1]
    if parts[layers[0] - 1] == "block" and parts[layers[-1] - 1] == "layer":
        layers = layers[:1]  # T5: block.4.layer.1 is the second part of block 4
    last = layers[-1]
    inside = last - 1 if last and parts[last - 1] in LISTS else last
    return parts[:inside], int(parts[last])


def _distinct(towers: Sequence[list[str]]) -> list[str]:
    """Return the towers as text, without their common prefix."""
    shortest = min(map(len, towers), default=0)
    common = 0
    while common < shortest and len({tower[common] for tower in towers}) == 1:
        common += 1
    if all(len(tower) == common for tower in towers):
        return ["" for _ in towers]
    return [".".join(tower[common:] or tower[-1:]) for tower in towers]


def _with_module(label: str, name: str) -> str:
    """Return a label with the path of the module in its layer, which is one of several."""
    path, _, projection = name.partition(":")
    before, found, inside = path.rpartition(f".{label.rpartition('.')[2]}.")
    inside = re.sub(r"^layer\.\d+\.", "", inside)  # T5's part of a block
    return ".".join([label, *filter(None, [inside if found else before or path, projection])])


def matches_label(place: LayerNumber, name: int | str) -> bool:
    """Whether a layer is meant by a number, or by a label with or without the module inside the layer."""
    number = name if isinstance(name, int) else number_in(name)
    if number is not None:
        return place.number == number
    return name in (place.label, f"{place.tower}.{place.number}") or place.label.startswith(f"{name}.")


def ranges(labels: Sequence[str]) -> str:
    """Format labels as "layers 0-3, 5", or "layers encoder.0-3, decoder.0"."""
    runs: list[tuple[str, int | str, int | str]] = []
    for text in dict.fromkeys(labels):
        tower, _, last = text.rpartition(".")
        digits = number_in(last)
        number = last if digits is None else digits
        if runs and isinstance(number, int) and runs[-1][0] == tower and runs[-1][2] == number - 1:
            runs[-1] = (tower, runs[-1][1], number)
        else:
            runs.append((tower, number, number))
    words = [(f"{tower}." if tower else "") + (f"{a}" if a == b else f"{a}-{b}") for tower, a, b in runs]
    return f"layer{'s' if len(set(labels)) > 1 else ''} {', '.join(words)}"
