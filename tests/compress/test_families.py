"""Which model types can have a smaller head, found by trying: logits beside the original's, of which only zeros went.

The named families are compared here, every other type in the slow tests (a quarter of an hour on a busy core)::

    pytest -q -m slow tests/compress/test_families.py
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch

import rankdecay as rd
from rankdecay.compress import NotReducible
from rankdecay.compress.types import CHECKED, REASONS, check_type
from tests import needs
from tests.compress import emptied

transformers = needs.package("transformers")

#: The families that are named, and what is odd in others: sinks, a gate by head, norms of what has no positions.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-no-bias": ("llama", {"attention_bias": False}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-no-bias": ("qwen3", {"attention_bias": False}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}),
    "cohere": ("cohere", {}),
    "sinks": ("gpt_oss", {}),
    "gate": ("laguna", {}),
    "interleaved-partial": ("glm", {}),
    "norm-without-positions": ("exaone4", {}),
    "norm-partial": ("glm4_moe", {"use_qk_norm": True}),
    "hybrid": ("lfm2", {}),
}
#: Types of which a small model does not show the reason: no indexer, a text alone, lists that do not match.
_UNSEEN = {"minimax_m3_vl_text", "git", "zamba2"}
#: Types whose attention makes up too little of the logits of a small model for a hundredth of the keys to show.
_CALM = 1e-5


def _checked(result: emptied.Comparison, float32: float = 1e-5) -> None:
    assert result.algebra < 1e-9
    assert result.float32 < float32
    assert not result.float64 > 1e-5  # no number where the class does not run in float64
    assert result.sensitivity > _CALM
    assert result.cache == emptied.NEW / emptied.HEAD


@pytest.mark.parametrize("name", NAMED)
def test_named_families_are_the_same(name):
    kind, extra = NAMED[name]
    _checked(emptied.compared(kind, extra))


def test_every_type_of_transformers_is_in_a_table():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    assert not CHECKED & set(REASONS)
    if transformers.__version__.startswith("5.23."):
        assert set(CAUSAL) == CHECKED | set(REASONS)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("gpt2", "from the width"),
        ("phi3", "against the width"),
        ("deepseek_v3", "latent"),
        ("mamba", "no attention"),
        ("vit", "not a causal language model"),
        ("lama", "has not been compared.* did you mean 'llama'"),
    ],
)
def test_types_that_are_refused(kind, says):
    with pytest.raises(NotReducible, match=f"{kind}.*{says}"):
        check_type(kind)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("cohere", {"use_qk_norm": True}), ("phi", {"qk_layernorm": True})],
)
def test_a_layer_norm_of_queries_is_refused(kind, extra):
    with pytest.raises(NotReducible, match="mean"):
        emptied.compared(kind, extra)


def test_clipped_projections_are_refused():
    with pytest.raises(NotReducible, match=r"clip_qkv=0\.2"):
        emptied.compared("olmo", {"clip_qkv": 0.2})


#: Types whose files have other names than their models, which :func:`rd.compress` does not read.
_OTHER_NAMES = {"nemotron_h"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CHECKED))
def test_checked_types_are_the_same(kind, tmp_path):
    _checked(emptied.compared(kind))
    model: Any = emptied.build(kind, dtype=torch.float32)
    kept = emptied.emptied(emptied.original(model), model)
    model.save_pretrained(tmp_path / "model")
    if kind in _OTHER_NAMES:
        with pytest.raises(ValueError, match="has no model"):
            rd.compress(tmp_path / "model", emptied.NEW, tmp_path / "made")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = rd.compress(tmp_path / "model", emptied.NEW, tmp_path / "made")
    assert made.exact
    assert made.kept == {key or "all": planes.tolist() for key, planes in kept.items()}
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", attn_implementation="eager")
    emptied.check_same(model, small.eval())


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CHECKED))
def test_every_switch_of_a_checked_type_is_the_same_or_refused(kind):
    """Switches of attention that a type has and its defaults do not show."""
    config = transformers.CONFIG_MAPPING[kind](**emptied.settings(kind))
    for name, value in vars(config).items():
        if isinstance(value, bool) and not name.startswith("_") and name not in emptied.OTHER_SWITCHES:
            try:
                result = emptied.compared(kind, {name: not value})
            except (NotReducible, emptied.NotBuilt):
                continue
            # one switch of Gemma 3 doubles what float32 rounds; `algebra` is exact
            _checked(result, 2e-5 if kind == "gemma3_text" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(REASONS.keys() - _UNSEEN))
def test_the_rest_is_refused_without_the_table_too(kind, monkeypatch):
    monkeypatch.setattr(sys.modules["rankdecay.compress.original"], "check_type", lambda kind: None)
    with pytest.raises((NotReducible, emptied.NotBuilt)):
        emptied.compared(kind)
