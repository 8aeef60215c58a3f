"""What settings say of one layer: positions that the class decides on where a configuration leaves it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankdecay as rd
from rankdecay.attention.checkpoints import Checkpoint
from rankdecay.attention.locate import find_layers
from rankdecay.attention.settings import ModuleSettings
from tests import needs

_SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
          "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def _of_file(config: dict[str, Any], layers: int) -> list[int]:
    """Coordinates that positions turn in each layer, from a configuration and names alone."""
    shapes = {f"model.layers.{i}.self_attn.{n}_proj.weight": (32, 32) for i in range(layers) for n in "qkvo"}
    found, _ = find_layers(Checkpoint(Path("file"), shapes, config, torch.zeros))
    return [layer.rotary.dims if layer.rotary else 0 for layer in found]


@pytest.mark.parametrize(
    ("configuration", "settings", "expected"),
    [
        ("SmolLM3Config", {}, [8, 8, 8, 0]),
        ("SmolLM3Config", {"no_rope_layer_interval": 2}, [8, 0, 8, 0]),
        ("Cohere2Config", {"sliding_window_pattern": 2}, [8, 0, 8, 0]),
        ("Glm4Config", {"head_dim": 8}, [4, 4, 4, 4]),
        ("PersimmonConfig", {}, [4, 4, 4, 4]),
    ],
)
def test_a_configuration_that_leaves_positions_to_its_class(configuration, settings, expected) -> None:
    transformers = needs.package("transformers")
    config = getattr(transformers, configuration)(**_SMALL, num_hidden_layers=4, **settings)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert [layer.rotary.dims if layer.rotary else 0 for layer in rd.find_attention(model)] == expected
    told = {"model_type": config.model_type, "rope_theta": 1e4, "num_attention_heads": 4, **settings}
    assert _of_file(told, 4) == expected


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("esm", {"position_embedding_type": "absolute"}),
        ("granitemoehybrid", {"position_embedding_type": "nope"}),
        ("zamba2", {"use_mem_rope": False}),
        ("gemma", {"use_rope": False}),
        ("llama", {"alibi": True}),
    ],
)
def test_a_model_that_turns_nothing_though_it_could(kind, settings) -> None:
    told = {"model_type": kind, "rope_theta": 1e4, "num_attention_heads": 4}
    assert _of_file(told | settings, 2) == [0, 0]


def test_a_list_has_a_value_for_each_layer_wherever_the_model_is_held() -> None:
    config = {"num_heads": [1, 2, 3, 4], "text_config": {}}
    for path in ("layers.2.attn", "0.model.layers.2.attn", "stages.2.blocks.7.attn"):
        source = Checkpoint(Path("file"), {f"{path}.q.weight": (1, 1)}, config, torch.zeros)
        assert ModuleSettings(path, source).number(("num_heads",)) == 3
    assert ModuleSettings("attn", source).number(("num_heads",)) is None
