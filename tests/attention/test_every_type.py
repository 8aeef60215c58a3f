"""Every model type of the installed transformers: found whole, or named with the reason; and the same from files alone.

A new type that is neither fails, with what is missing. `every_type` builds them, `whole_types` judges without the
library's tables which of their modules look like attention. Then, head by head, against what small models of them do on
random input (`running`, `comparison`): a twentieth of the types here, all of them with ``-m slow``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn

from rankdecay.attention.checkpoints import Checkpoint
from rankdecay.attention.known import KNOWN_TYPES
from rankdecay.attention.locate import Unhandled, find_layers, locate
from rankdecay.attention.module.found import Found
from rankdecay.attention.partial_rotary import PARTIAL_ROTARY_TYPES
from rankdecay.attention.source import ModuleSource
from rankdecay.attention.unturned import NO_ROTARY_TYPES
from tests import needs

from . import compared_types, every_type, running, unturned, whole_types

needs.package("transformers")

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
    _check_written(kind, model, found, unhandled)


def _check_files(kind: str, model: Any, found: list[Found]) -> None:
    """The names and shapes of a checkpoint, with its configuration, say the same, or refuse by name."""
    checkpoint, source = unturned.checkpoint_of(kind, model), ModuleSource(model)
    stored, refused = locate(checkpoint)
    live = {layer.name: _shown(layer) for layer in found}
    for layer in stored:
        assert _shown(layer) == live[layer.name]
        assert _is_of_part(checkpoint, layer, source, layer)
    missing = live.keys() - {layer.name for layer in stored} - {module.name for module in refused}
    assert not missing
    _unturned.update(unturned.without_positions(checkpoint, found))
    assert not {layer.name for layer in stored if layer.unknown}, "run python -m tests.attention.unturned"


def _is_of_part(checkpoint: Checkpoint, layer: Found, source: ModuleSource, live: Found) -> bool:
    """Whether a file's configuration gives a layer the settings of its part; another's numbers may be equal."""
    of_file = checkpoint.kind_of_part(layer.module)
    of_model = source.setting(live.module, ("model_type",))
    also = {"": of_file, "swin": "maskformer-swin"}  # "" is a part whose type has no name
    return of_file in (of_model, also.get(str(of_model)))


def _written(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_pretrained` writes, with the names of the original code; and the model's names of what is the same."""
    loading = needs.package("transformers.core_model_loading")
    state = model.state_dict()
    names = {id(tensor): name for name, tensor in state.items()}
    written = loading.revert_weight_conversion(model, dict(state))
    return written, {name: names[id(tensor)] for name, tensor in written.items() if id(tensor) in names}


def _check_written(kind: str, model: Any, found: list[Found], unhandled: list[Unhandled]) -> None:
    """The file that `save_pretrained` writes says the same of every matrix, by whichever name, or refuses by name."""
    written, called = _written(model)
    if all(name == live for name, live in called.items()) and len(called) == len(written):
        return
    checkpoint, source = unturned.checkpoint_of(kind, model, written), ModuleSource(model)
    stored, refused = locate(checkpoint)
    live = {frozenset(place.parameter for place in layer.places.values()): layer for layer in found}
    converted = Counter[Any]()  # of the layers with matrices that were fused, split or permuted
    for layer in stored:
        names = frozenset(called.get(place.parameter, "") for place in layer.places.values())
        if "" in names:
            converted[_sizes(layer)] += 1
            continue
        same = live.pop(names)
        assert _renamed(layer, called) == _renamed(same)
        assert _is_of_part(checkpoint, layer, source, same)
    files = {name: file for file, name in called.items()}
    for names in list(live):
        if names <= files.keys():
            inside = [module for module in refused if any(files[name].startswith(f"{module.name}.") for name in names)]
            assert inside, "neither found in the file nor named"
            del live[names]
    assert converted <= Counter(_sizes(layer) for layer in live.values())
    assert len(stored) + len(refused) >= len(found) + len(unhandled)


def _renamed(layer: Found, called: dict[str, str] | None = None) -> dict[str, Any]:
    """What is said of a layer, without its name, and with the names of the live model."""

    def live(name: str | None) -> str | None:
        return called.get(name) if called and name else name

    places = {
        role: (live(p.parameter), str(p.window), live(p.bias), str(p.bias_window), live(p.added))
        for role, p in layer.places.items()
    }
    return _shown(layer) | {"name": "", "places": places, "planes_assumed": False}


def _sizes(layer: Found) -> Any:
    """What is said of a layer but for where its matrices are."""
    windows = {role: (place.window.num_heads, place.window.head_dim) for role, place in layer.places.items()}
    return tuple(sorted(windows.items())), layer.rotary, layer.qk_norm, layer.grouping, bool(layer.no_value_product)


def _with_a_head() -> list[Any]:
    """Types with a class for use; all but those whose files have names of their own for its parts in the slow run."""
    kinds = [kind for kind in every_type.heads() if kind not in {*every_type.ELSEWHERE, *every_type.HEADLESS}]
    always = {"cosmos3_omni", "hunyuan_vl", "molmo2", "nemo_speechlm", "pi0", "t5gemma2"}
    return [pytest.param(kind, marks=() if kind in always else pytest.mark.slow) for kind in kinds]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", _with_a_head())
def test_files_of_a_model_with_a_head_are_found_or_named(kind: str) -> None:
    model = every_type.describe(kind, every_type.heads()[kind])
    _check_written(kind, model, *locate(ModuleSource(model)))


#: Types whose files hold matrices of attention in another form than the model, and are read.
_CONVERTED = ["nomic_bert", "tipsv2_vision_model", "gte", "jina_embeddings_v3", "mistral_large4", "molmo2",
              "qianfan_ocr", "radio", "rf_detr", "step3p7", "tipsv2_text_model"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if i > 1 else []) for i, kind in enumerate(_CONVERTED)]
)
def test_matrices_in_files_are_those_of_the_model(kind: str) -> None:
    """Of those that files have fused or split; queries and keys too, unless their rows are permuted and it is said."""
    model: Any = running.build(kind)
    layers, _ = find_layers(ModuleSource(model))
    written, _ = _written(model)
    stored, _ = find_layers(replace(unturned.checkpoint_of(kind, model, written), load=written.__getitem__))
    live = {_numbers(layer.value): layer for layer in layers}
    for layer in stored:
        same = live.pop(_numbers(layer.value))
        assert _numbers(layer.output) == _numbers(same.output)
        if "planes" not in layer.unknown:
            assert _numbers(layer.query) == _numbers(same.query)
            assert _numbers(layer.key) == _numbers(same.key)
    assert not live


def _numbers(view: Any) -> bytes | None:
    return None if view is None else view.heads().numpy().tobytes()


def test_planes_of_rows_that_loading_permutes_are_assumed_and_said() -> None:
    """Rows of wq and wk of a Mistral Large 4 that are neighbours in the file are half a head apart in its class."""
    model: Any = every_type.describe("mistral_large4")
    stored, _ = locate(unturned.checkpoint_of("mistral_large4", model, _written(model)[0]))
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
