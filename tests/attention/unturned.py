"""Tables of model types: all, and those without rotary positions or with partial ones. As a program, it writes them."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from rankdecay.attention import known, partial_rotary, unturned
from rankdecay.attention.checkpoints import Checkpoint, _natural
from rankdecay.attention.locate import locate
from rankdecay.attention.model_types import PARTIAL_ROTARY, ROTARY_UNSAID
from rankdecay.attention.module.found import Found
from rankdecay.attention.source import ModuleSource

from . import every_type


def nothing(_: str) -> Any:
    """A loader of a checkpoint of which only shapes are read."""
    raise AssertionError


def checkpoint_of(kind: str, model: Any, state: Mapping[str, Tensor] | None = None) -> Checkpoint:
    """A file of a model: the names and shapes of its state, or of one with other names, and its configuration."""
    tensors: Mapping[str, Tensor] = model.state_dict() if state is None else state
    shapes = {name: tuple(tensors[name].shape) for name in sorted(tensors, key=_natural)}
    return Checkpoint(Path(kind), shapes, json.loads(model.config.to_json_string(use_diff=False)), nothing)


def without_positions(checkpoint: Checkpoint, live: Sequence[Found]) -> set[str]:
    """The types of a model's parts that have attention without rotary positions, and no settings that say so."""
    kinds = {layer.name: checkpoint.kind_of_part(layer.name) for layer in live}
    turned = {kinds[layer.name] for layer in live if layer.rotary is not None}
    return {
        kind for name, kind in kinds.items()
        if kind and kind not in turned and kind not in ROTARY_UNSAID and not checkpoint.states_positions(name)
    }  # fmt: skip


_FAMILIES = Path(transformers.__file__).parent / "models"


def _types_of(folder: Path, indent: str = " +") -> set[str]:
    text = "".join(file.read_text("utf-8") for file in folder.glob("configuration_*.py"))
    return set(re.findall(rf"^{indent}model_type[^=\n]*= *[\"']([^\"']+)", text, re.MULTILINE))


def known_types() -> set[str]:
    """The types that transformers has a configuration for, of whole models and of their parts."""
    return {kind for folder in _FAMILIES.iterdir() for kind in _types_of(folder)}


def partial_rotary_types() -> set[str]:
    """The types whose modeling code reads the share of a head that rotary positions rotate."""
    code = {folder: "".join(file.read_text("utf-8") for file in folder.glob("modeling_*.py"))
            for folder in _FAMILIES.iterdir()}  # fmt: skip
    reading = re.compile("|".join(PARTIAL_ROTARY))
    return {kind for folder, text in code.items() if reading.search(text) for kind in _types_of(folder, " {4}")}


def write() -> None:
    """Write the tables."""
    found: set[str] = set()
    for kind in every_type.types():
        if kind not in every_type.ELSEWHERE:
            model = every_type.describe(kind)
            found |= without_positions(checkpoint_of(kind, model), locate(ModuleSource(model))[0])
    _write(Path(unturned.__file__), found)
    _write(Path(known.__file__), known_types())
    _write(Path(partial_rotary.__file__), partial_rotary_types())


def _write(file: Path, kinds: set[str]) -> None:
    before, _, rest = file.read_text("utf-8").partition('"""\n    ')
    lines = textwrap.wrap(" ".join(sorted(kinds)), 110, break_on_hyphens=False)
    table = textwrap.indent("\n".join(lines), "    ").lstrip()
    file.write_text(f'{before}"""\n    {table}\n    """{rest.partition(chr(34) * 3)[2]}', "utf-8")


if __name__ == "__main__":
    write()
