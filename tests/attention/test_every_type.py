"""Every model type of the installed transformers: found whole, or named with the reason; and the same from files alone.

A new type that is neither fails, with what is missing. `every_type` builds them, `whole_types` judges without the
library's tables which of their modules look like attention. Then, head by head, against what small models of them do on
random input (`running`, `comparison`): a twentieth of the types here, all of them with ``-m slow``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import nn

from rankdecay.attention.checkpoints import Checkpoint
from rankdecay.attention.known import KNOWN_TYPES
from rankdecay.attention.locate import Unhandled, locate
from rankdecay.attention.module.found import Found
from rankdecay.attention.partial_rotary import PARTIAL_ROTARY_TYPES
from rankdecay.attention.source import ModuleSource
from rankdecay.attention.unturned import NO_ROTARY_TYPES
from tests import needs

from . import compared_types, every_type, running, unturned, whole_types

needs.package("transformers")

#: Types whose positions or head sizes a configuration alone does not say as the model has them.
FILES_DIFFER = {
    "moonshine_streaming": "cross-attention takes the decoder's setting of positions",
    "neucodec": "positions of the encoder inside are its own", "xcodec2": "positions of the encoder inside are its own",
}  # fmt: skip
_counts: Counter[str] = Counter()
_unturned: set[str] = set()


def _explained(model: nn.Module, module: Unhandled) -> bool:
    kind = type(model.get_submodule(module.name)).__name__
    return any(kind.endswith(end) and said in module.reason for end, said in whole_types.NAMED.items())


def _shown(layer: Found) -> dict[str, Any]:
    places = {role: (place.parameter, str(place.window)) for role, place in layer.places.items()}
    return layer._asdict() | {"places": places, "unknown": "", "no_output": "", "frequencies": "", "remark": ""}


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
    checkpoint = unturned.checkpoint_of(kind, model)
    stored, refused = locate(checkpoint)
    live = {layer.name: _shown(layer) for layer in found}
    for layer in stored:
        if kind not in FILES_DIFFER:
            assert _shown(layer) == live[layer.name]
    missing = live.keys() - {layer.name for layer in stored} - {module.name for module in refused}
    assert not missing
    _unturned.update(unturned.without_positions(checkpoint, found))
    assert not {layer.name for layer in stored if layer.unknown}, "run python -m tests.attention.unturned"


def _written(kind: str, model: Any) -> tuple[list[Found], list[Unhandled]]:
    """Attention in the file that `save_pretrained` writes, with the names of the original code."""
    loading = needs.package("transformers.core_model_loading")
    state = model.state_dict()
    written = loading.revert_weight_conversion(model, dict(state))
    assert written.keys() != state.keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    checkpoint = unturned.checkpoint_of(kind, model)
    return locate(Checkpoint(checkpoint.path, shapes, checkpoint.config, checkpoint.load))


@pytest.mark.parametrize(
    "kind",
    [
        "conditional_detr",
        "hrm_text",
        "nomic_bert",
        "gte",
        "tipsv2_vision_model",
        "swin",
        "inkling2_text",
        "mistral_large4",
    ],
)
def test_names_that_transformers_writes_are_found_or_named(kind: str) -> None:
    model: Any = every_type.describe(kind)
    found, unhandled = locate(ModuleSource(model))
    stored, refused = _written(kind, model)
    assert len(stored) + len(refused) >= len(found) + len(unhandled)
    roles = Counter(role for layer in found for role in layer.places)
    assert not stored or Counter(role for layer in stored for role in layer.places) == roles


def test_planes_of_rows_that_loading_permutes_are_assumed_and_said() -> None:
    """Rows of wq and wk of a Mistral Large 4 that are neighbours in the file are half a head apart in its class."""
    stored, _ = _written("mistral_large4", every_type.describe("mistral_large4"))
    turned = [layer for layer in stored if layer.rotary is not None and layer.name.startswith("vision_tower.")]
    assert turned
    assert all(layer.planes_assumed for layer in turned)


def test_nearly_all_types_are_found_whole() -> None:
    """Of 600 types 513 have attention and all of it is found, 37 have none; the rest is mostly without such scores."""
    if sum(_counts.values()) > 590:  # not after a choice of types by `-k`
        assert _counts["whole"] >= 488


def test_the_table_of_types_without_positions_is_what_live_models_say() -> None:
    if sum(_counts.values()) > 590:
        assert _unturned == NO_ROTARY_TYPES, "run python -m tests.attention.unturned"


def test_the_table_of_known_types_is_that_of_transformers() -> None:
    if sum(_counts.values()) > 590:
        assert unturned.known_types() == KNOWN_TYPES, "run python -m tests.attention.unturned"
        assert unturned.partial_rotary_types() == PARTIAL_ROTARY_TYPES, "run python -m tests.attention.unturned"


# ---- what the model itself does --------------------------------------------------------------------------


def _types_to_compare() -> list[Any]:
    """Every type with attention; all but a twentieth, by a hash of the name, only in the slow run."""
    kinds = [k for k in every_type.types() if k not in every_type.ELSEWHERE and k not in compared_types.NOT_BUILT]
    always = {kind for kind in kinds if crc32(kind.encode()) % 20 == 0} - running.COSTLY
    return [pytest.param(kind, marks=() if kind in always else pytest.mark.slow) for kind in kinds]


@pytest.mark.filterwarnings("ignore")  # of small models whose settings contradict each other
@pytest.mark.parametrize("kind", _types_to_compare())
def test_each_head_is_what_the_model_uses(kind: str) -> None:
    """A twentieth of all types, chosen by a hash of the name; all of them in the slow run.

    Of a small model with random weights, run on random input: `comparison` says what is compared, `compared_types` what
    cannot be.
    """
    with torch.no_grad(), _without_fast_paths():
        problems = running.compare(kind)
    for module, texts in problems.items():
        if module in compared_types.NOT_RUN:
            assert any(text.startswith("not run") for text in texts), f"{module} runs: strike it from NOT_RUN"
            texts = [text for text in texts if not text.startswith("not run")]
        allowed, _ = compared_types.DIFFERS.get(module, ((), ""))
        unexplained = [text for text in texts if not text.startswith(allowed)] if allowed else texts
        assert not unexplained, module


@contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Lets nn.MultiheadAttention go through a softmax."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
