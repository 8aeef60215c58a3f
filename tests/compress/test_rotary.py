"""Frequencies of every scaling, written as `longrope`: the smaller model turns the kept planes as the original did."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch

import rankdecay as rd
from rankdecay.compress import NotReducible
from rankdecay.compress.rotary import _share
from tests import needs
from tests.compress import emptied

transformers = needs.package("transformers")

_THETA = {"rope_theta": 10000.0}
_PLANES = emptied.HEAD // 2
#: Rotary parameters by name, of a model of 64 positions.
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", **_THETA},
    "linear": {"rope_type": "linear", "factor": 4.0, **_THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **_THETA},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, **_THETA,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **_THETA},
    "yarn-attention": {
        "rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, "beta_fast": 4.0,
        "original_max_position_embeddings": 16, **_THETA,
    },
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * plane for plane in range(_PLANES)],
        "long_factor": [2.0 + 0.7 * plane for plane in range(_PLANES)], **_THETA,
    },
}  # fmt: skip


def _made(kind: str, extra: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, dict[Any, Any]]:
    model: Any = emptied.build(kind, extra, dtype)
    original = emptied.original(model)
    kept = emptied.emptied(original, model)
    made = emptied.smaller(original, model, kept)
    return model, emptied.with_weights(made, model), made, kept


@pytest.mark.parametrize(("kind", "name"), [*(("llama", name) for name in SCALINGS), ("qwen3", "yarn-attention")])
def test_every_scaling(kind, name):
    model, small, made, _ = _made(kind, {"rope_parameters": dict(SCALINGS[name])})
    for length in (12, 24, 64):  # before the original length, beyond it, and up to the last position
        emptied.check_same(model, small, length)
    parameters = made.written["rope_parameters"]
    assert parameters["rope_type"] == "longrope"
    assert (parameters["short_factor"] == parameters["long_factor"]) == (name != "longrope")


def test_a_scaling_is_not_the_same_without_its_table():
    """So that what the tests above compare depends on the frequencies at all."""
    model, _, _, _ = _made("llama", {"rope_parameters": dict(SCALINGS["linear"])})
    plain, _, _, _ = _made("llama", {"rope_parameters": dict(SCALINGS["default"])})
    plain.load_state_dict(model.state_dict())
    assert emptied.error(emptied.logits(model), emptied.logits(plain)) > 1e-2


def test_dynamic_frequencies_are_said_to_differ_beyond_the_length():
    model, small, made, _ = _made("llama", {"rope_parameters": dict(SCALINGS["dynamic"])})
    (warning,) = made.original.warnings
    assert "max_position_embeddings=64" in warning
    assert emptied.error(emptied.logits(model, 96), emptied.logits(small, 96)) > 1e-4


def test_a_table_for_each_kind_of_layer():
    kinds = ["sliding_attention", "full_attention"] * 2
    tables = {"sliding_attention": dict(SCALINGS["default"]), "full_attention": dict(SCALINGS["yarn-attention"])}
    model, small, made, kept = _made("gemma3_text", {"layer_types": kinds, "rope_parameters": tables})
    assert not torch.equal(kept["sliding_attention"], kept["full_attention"])
    emptied.check_same(model, small)
    assert made.written["rope_parameters"]["full_attention"]["attention_factor"] == pytest.approx(1.7)
    assert made.written["rope_parameters"]["sliding_attention"]["attention_factor"] == 1.0


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
def test_heads_that_are_partly_turned(share):
    """A share of one is stated too: the classes have one half as their default."""
    for kind in ("phi", "glm", "nemotron"):  # planes of neighbours in the second, else of halves
        extra = {
            "partial_rotary_factor": share,
            "rope_parameters": {**SCALINGS["default"], "partial_rotary_factor": share},
        }
        model, small, _, kept = _made(kind, extra)
        assert len(kept[None]) == round(share * emptied.NEW / 2)
        emptied.check_same(model, small)


@pytest.mark.parametrize("kind", ["jamba", "nemotron_h"])
def test_rotary_settings_that_a_class_does_not_read(kind):
    """Nemotron-H's files have a base and a share of one, and nothing of it turns."""
    model, small, made, kept = _made(kind, {"rope_theta": 10000.0, "partial_rotary_factor": 1.0})
    assert kept == {}
    assert made.written["rope_theta"] == 10000.0
    emptied.check_same(model, small)


def test_a_table_of_two_lengths_switches_where_the_original_does():
    model, small, _, _ = _made("llama", {"rope_parameters": dict(SCALINGS["longrope"])})
    ids = torch.randint(3, emptied.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(3))
    texts = [one.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0) for one in (model, small)]
    assert texts[0].shape[1] > 16
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["yarn-attention", "longrope"])
def test_configurations_as_releases_before_five_write_them(tmp_path, name):
    model, _, _, kept = _made("llama", {"rope_parameters": dict(SCALINGS[name])})
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    config["rope_scaling"] = None if name == "default" else parameters
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert torch.equal(emptied.logits(again), emptied.logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert rd.compress(tmp_path / "model", emptied.NEW, tmp_path / "made").kept == {"all": kept[None].tolist()}
    written = json.loads((tmp_path / "made/config.json").read_text())
    # as those releases read it: the base beside the scaling, with a table of as many factors as there are planes
    assert written["rope_theta"] == 10000.0
    assert written["rope_scaling"]["rope_type"] == "longrope"
    assert len(written["rope_scaling"]["short_factor"]) == emptied.NEW // 2
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", attn_implementation="eager")
    emptied.check_same(model, small)
    written.pop("rope_parameters", None)  # which they do not know
    (tmp_path / "made/config.json").write_text(json.dumps(written))
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", attn_implementation="eager")
    emptied.check_same(model, small)


@pytest.mark.parametrize("live", [False, True])
def test_releases_before_five_find_the_frequencies_under_their_names(tmp_path, live):
    model, _, _, _ = _made("qwen3", {"rope_parameters": {**SCALINGS["default"], "rope_theta": 5e5}})
    model.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rd.compress(model if live else tmp_path / "model", emptied.NEW, tmp_path / "made")
    written = json.loads((tmp_path / "made/config.json").read_text())
    assert written.pop("rope_parameters")["rope_theta"] == written["rope_theta"] == 5e5
    assert written["rope_scaling"]["rope_type"] == "longrope"
    for config in (None, written):  # as it is, and without what they do not know
        if config is not None:
            (tmp_path / "made/config.json").write_text(json.dumps(config))
        small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", attn_implementation="eager")
        emptied.check_same(model, small)


def test_a_gemma_3_as_releases_before_five_write_it(tmp_path):
    """Which had two tables without naming them; head_dim is left to the class, too."""
    settings = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    }
    model: Any = emptied.build("gemma3_text", settings, torch.float32)
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    for name in ("rope_parameters", "head_dim"):
        config.pop(name)
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    original = emptied.original(model)
    assert set(original.skeleton.ropes) == {"sliding_attention", "full_attention"}
    kept = emptied.emptied(original, model, 128)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = rd.compress(tmp_path / "model", 128, tmp_path / "made")
    assert made.kept == {key: planes.tolist() for key, planes in kept.items()}
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", attn_implementation="eager")
    assert small.config.head_dim == 128
    emptied.check_same(model, small)


@pytest.mark.parametrize(("part", "whole"), [(30, 44), (26, 46), (4, 8), (62, 78), (2, 254)])
def test_a_share_of_a_head_gives_the_planes_back(part, whole):
    assert int(whole * _share(part, whole)) == part


def test_planes_that_do_not_turn_can_be_kept():
    extra = {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5, **_THETA}}
    model, small, made, kept = _made("llama", extra)
    assert bool((made.original.skeleton.ropes[None].short[kept[None]] == 0).any())
    emptied.check_same(model, small)


def test_what_is_no_frequency_stays():
    """Ministral 3 scales its queries by position, with numbers that stand among the rotary parameters."""
    extra = {"rope_parameters": {**SCALINGS["yarn"], "llama_4_scaling_beta": 0.5}}
    model, small, made, _ = _made("ministral3", extra)
    assert made.written["rope_parameters"]["llama_4_scaling_beta"] == 0.5
    assert made.written["rope_parameters"]["original_max_position_embeddings"] == 16
    emptied.check_same(model, small, 48)


def test_positions_of_several_kinds_are_refused():
    model: Any = emptied.build("llama", {"rope_parameters": {**SCALINGS["default"], "mrope_section": [2, 3, 3]}})
    original = emptied.original(model)
    with pytest.raises(NotReducible, match="mrope_section"):
        emptied.smaller(original, model, emptied.emptied(original, model))


@pytest.mark.parametrize(
    ("kind", "extra", "said"),
    [
        ("llama", SCALINGS["longrope"], {"original_max_position_embeddings": 16}),
        ("llama", SCALINGS["llama3"], {"original_max_position_embeddings": None}),
        ("phi", {**SCALINGS["default"], "partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.25}),
    ],
)
def test_releases_before_five_find_the_share_and_the_length_beside_the_table(tmp_path, kind, extra, said):
    """There they are of the whole configuration: half of Phi's head would turn, and longrope switch too late."""
    model: Any = emptied.build(kind, {"rope_parameters": dict(extra)}, torch.float32)
    emptied.emptied(emptied.original(model), model)
    model.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rd.compress(tmp_path / "model", emptied.NEW, tmp_path / "made")
    written = json.loads((tmp_path / "made" / "config.json").read_text())
    assert {name: written.get(name) for name in said} == said
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", attn_implementation="eager")
    for length in (12, 40):
        emptied.check_same(model, small.eval(), length)


@pytest.mark.parametrize(
    ("kind", "noted"), [("nemotron", True), ("olmo3", True), ("gemma3_text", True), ("llama", False)]
)
def test_frequencies_that_releases_before_five_do_not_read_are_noted(kind, noted):
    notes = emptied.original(emptied.build(kind)).warnings
    assert any("which transformers before 5 does not read" in note for note in notes) == noted
