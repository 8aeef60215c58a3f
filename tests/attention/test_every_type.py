"""Every model type of the installed transformers: found whole, or named with the reason; and the same from files alone.

A new type that is neither fails, with what is missing. `every_type` builds them, `whole_types` judges without the
library's tables which of their modules look like attention.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rankdecay.attention.checkpoints import Checkpoint, _natural
from rankdecay.attention.locate import Unhandled, locate
from rankdecay.attention.source import ModuleSource
from rankdecay.attention.windows import Found
from tests import needs

from . import every_type, whole_types

needs.package("transformers")

#: Types whose positions or head sizes a configuration alone does not say as the model has them.
FILES_DIFFER = {
    "moonshine_streaming": "cross-attention takes the decoder's setting of positions",
    "neucodec": "positions of the encoder inside are its own", "xcodec2": "positions of the encoder inside are its own",
}  # fmt: skip
_counts: Counter[str] = Counter()


def _explained(model: nn.Module, module: Unhandled) -> bool:
    kind = type(model.get_submodule(module.name)).__name__
    return any(kind.endswith(end) and said in module.reason for end, said in whole_types.NAMED.items())


def _shown(layer: Found) -> dict[str, Any]:
    places = {role: (place.parameter, str(place.window)) for role, place in layer.places.items()}
    return layer._asdict() | {"places": places, "unknown": "", "no_output": ""}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a model whose default has no such layer
@pytest.mark.parametrize("kind", [kind for kind in every_type.types() if kind not in every_type.ELSEWHERE])
def test_every_attention_is_found_or_named(kind: str) -> None:
    model = every_type.describe(kind)
    found, unhandled = locate(ModuleSource(model))
    alike = whole_types.look_alikes(model)
    spoken_of = {layer.module for layer in found} | {module.name for module in unhandled}
    silent = {path: cls for path, cls in alike.items() if path not in spoken_of}
    silent = {path: cls for path, cls in silent.items() if cls not in whole_types.NO_PROJECTIONS}
    assert not silent, "neither found nor named: add a row to attention/names.py, or a mark of why it has no scores"
    unexplained = [module for module in unhandled if not _explained(model, module)]
    assert not unexplained, "named, and not in whole_types.NAMED"
    _counts["part" if unhandled else "whole" if found else "none"] += 1
    _check_files(kind, model, found)


def _check_files(kind: str, model: Any, found: list[Found]) -> None:
    """The names and shapes of a checkpoint, with its configuration, say the same, or refuse by name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: shapes[name] for name in sorted(shapes, key=_natural)}
    config = json.loads(model.config.to_json_string(use_diff=False))
    stored, refused = locate(Checkpoint(Path(kind), shapes, config, nothing))
    live = {layer.name: _shown(layer) for layer in found}
    for layer in stored:
        if kind not in FILES_DIFFER:
            assert _shown(layer) == live[layer.name]
    missing = live.keys() - {layer.name for layer in stored} - {module.name for module in refused}
    assert not missing


def nothing(_: str) -> Any:
    """A loader of a checkpoint of which only shapes are read."""
    raise AssertionError


def test_nearly_all_types_are_found_whole() -> None:
    """Of 600 types 513 have attention and all of it is found, 37 have none; the rest is mostly without such scores."""
    if sum(_counts.values()) > 590:  # not after a choice of types by `-k`
        assert _counts["whole"] >= 488
