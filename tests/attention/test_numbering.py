"""Numbers of layers as the model counts them, towers, and labels that no two layers share."""

from __future__ import annotations

import pytest

from rankdecay.attention.numbering import LayerNumber, number_layers


@pytest.mark.parametrize(
    ("names", "labels", "numbers"),
    [
        pytest.param(["h.0.attn", "h.1.attn"], ["0", "1"], [0, 1], id="one tower"),
        pytest.param([f"model.layers.{i}.self_attn" for i in (4, 12, 20)],
                     ["4", "12", "20"], [4, 12, 20], id="a hybrid"),
        pytest.param(["encoder.layers.0.attn", "encoder.layers.1.attn", "decoder.layers.0.attn"],
                     ["encoder.0", "encoder.1", "decoder.0"], [0, 1, 0], id="two towers"),
        pytest.param(["decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn", "decoder.layers.1.self_attn"],
                     ["0.self_attn", "0.encoder_attn", "1"], [0, 0, 1], id="self and cross"),
        pytest.param(["decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention",
                      "decoder.block.1.layer.0.SelfAttention"],
                     ["0.SelfAttention", "0.EncDecAttention", "1"], [0, 0, 1], id="T5"),
        pytest.param(["attn"], ["0"], [0], id="one module"),
        pytest.param([""], ["0"], [0], id="the model itself"),
        pytest.param(["first", "second"], ["0", "1"], [0, 1], id="without numbers"),
        pytest.param(["stages.0.blocks.0.attn", "stages.0.blocks.1.attn", "stages.1.blocks.0.attn"],
                     ["0.0", "0.1", "1.0"], [0, 1, 0], id="stages"),
        pytest.param(["blocks.0.attn", "blocks.0.attn:add_q_proj"],
                     ["0.attn", "0.attn.add_q_proj"], [0, 0], id="joint"),
        pytest.param(["_orig_mod.module.h.3.attn", "_orig_mod.module.h.5.attn"], ["3", "5"], [3, 5], id="wrapped"),
        pytest.param(["layers.0.heads.0", "layers.0.heads.1", "layers.1.heads.0"],
                     ["0.heads.0", "0.heads.1", "1"], [0, 0, 1], id="a module a head"),
    ],
)  # fmt: skip
def test_layers_are_called_as_the_model_counts_them(names: list[str], labels: list[str], numbers: list[int]) -> None:
    places = number_layers(names)
    assert [place.number for place in places] == numbers
    assert [place.label for place in places] == labels


@pytest.mark.parametrize(
    "names",
    [
        ["pool", "blocks.0.attn", "blocks.1.attn"],
        ["text.layers.0.attn", "text.layers.0.cross", "vision.layers.0.attn", "pooler.attn"],
        ["a.0.x", "b.0.x", "a.0.y", "b.1.x"],
        ["model.0.0.attn", "model.0.1.attn", "model.1.0.attn"],
        ["enc.h.0.a", "enc.h.0.a:second", "dec.h.0.a"],
        [
            "down.0.attentions.0.blocks.0.attn1",
            "down.0.attentions.1.blocks.0.attn1",
            "up.0.attentions.0.blocks.0.attn1",
        ],
    ],
)
def test_no_two_layers_have_one_label(names: list[str]) -> None:
    labels = [place.label for place in number_layers(names)]
    assert len(set(labels)) == len(names), labels


def test_towers_are_told_without_what_they_share() -> None:
    places = number_layers(["model.encoder.layers.1.attn", "model.decoder.layers.0.attn"])
    assert places == [LayerNumber("encoder", 1, "encoder.1"), LayerNumber("decoder", 0, "decoder.0")]
