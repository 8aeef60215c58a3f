"""What `inspect` says of smaller heads, from names, shapes and weights alone."""

from __future__ import annotations

import pytest
import torch

import rankdecay as rd
from rankdecay.compress import plan
from tests import needs
from tests.compress import small


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_it_says_what_the_plan_says_that_asks_the_class(tmp_path, kind):
    """Bytes and energies of the two agree, alive and in files."""
    folder = small.saved(tmp_path / "model", kind)
    wanted = plan(folder).sizes
    for report in (rd.inspect(folder), rd.inspect(small.model(kind))):
        assert report.smaller is not None
        assert report.smaller.reason == ""
        for size, other in zip(report.smaller.sizes, wanted, strict=True):
            assert (size.head_dim, size.bytes_per_token) == (other.head_dim, other.bytes_per_token)
            assert size.plane_energy == pytest.approx(other.plane_energy, abs=1e-12)
            assert size.value_energy == pytest.approx(other.value_energy, abs=1e-9)
    text = str(rd.inspect(folder))
    assert "cache bytes/token" in text
    assert "low energy does not mean low loss" in text
    assert rd.inspect(folder).to_json()["smaller_heads"]["sizes"][0]["head_dim"] == 16


def test_what_cannot_be_made_smaller_is_said_with_the_reason():
    transformers = needs.package("transformers")
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=50, bos_token_id=1, eos_token_id=2)
    )
    report = rd.inspect(gpt)
    assert report.smaller is not None
    assert "takes the size of a head from the width" in report.smaller.reason
    assert "A smaller head: not possible" in str(report)
    assert "no configuration says of which class it is" in str(rd.inspect(torch.nn.MultiheadAttention(16, 2)))


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "not finite"), (1e200, "too large or too small")])
def test_weights_without_an_energy(value, says):
    model = small.model().double()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(value)
    report = rd.inspect(model)
    assert report.smaller is not None
    assert says in report.smaller.reason


def test_of_a_part_of_a_model_nothing_is_said(tmp_path):
    report = rd.inspect(small.saved(tmp_path / "model"), layers=[0])
    assert report.smaller is None
    assert "smaller head" not in str(report)
    assert "smaller_heads" not in report.to_json()
