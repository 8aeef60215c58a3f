"""The examples of compressing: a decay that makes the cut free, and a model that one has, cut and healed."""

from pathlib import Path

import pytest
import torch

from tests import needs
from tests.examples.test_examples import example

needs.package("transformers")

SMALL = {"steps": (10, 40, 4), "strength": 60.0, "lr": 4e-3}
SHAPE = {"width": 32, "layers": 2, "heads": 2, "original_head_dim": 16}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_has_decayed_to_zero_is_left_out_for_nothing(kind: str, tmp_path: Path) -> None:
    found = example("compress_decayed").main(kind, 8, str(tmp_path / "out"), **SMALL, **SHAPE)
    assert found["exact"]
    assert found["error"] < 1e-5
    assert found["cut"] == pytest.approx(0, abs=1e-5)
    assert found["cache"] == 0.5


def test_without_the_decay_the_cut_costs_something(tmp_path: Path) -> None:
    found = example("compress_decayed").main(
        "llama", 8, str(tmp_path / "out"), **{**SMALL, "steps": (4, 4, 2), "strength": 0.0}, **SHAPE
    )  # fmt: skip
    assert not found["exact"]
    assert found["error"] > 1e-3


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small Llama beside a tokenizer of bytes, in files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
        )
    )  # fmt: skip
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("teacher", [False, True])
def test_a_model_that_one_has_is_cut_and_healed(checkpoint: Path, teacher: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    needs.package("accelerate")
    pretrained, out = example("compress_pretrained"), tmp_path / "healed"
    text = tmp_path / "text.txt"
    text.write_text("def answer(question):\n    return 42\n" * 100)
    settings = {"text": text, "steps": 30, "window": 32, "windows": 4, "measured": 4, "lr": 1e-2}
    before, after = pretrained.main(str(checkpoint), 8, str(out), teacher=teacher, **settings)
    assert after < before - 0.5
    healed = AutoModelForCausalLM.from_pretrained(out)
    assert type(healed) is LlamaForCausalLM
    assert healed.config.head_dim == 8


def test_the_control_trains_the_original_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    needs.package("accelerate")
    out = tmp_path / "control"
    settings = {"steps": 30, "window": 32, "windows": 4, "measured": 4, "lr": 1e-2}
    before, after = example("compress_pretrained").main(str(checkpoint), 8, str(out), control=True, **settings)
    assert after < before - 0.5
    assert not list(out.glob("*.safetensors"))


def test_with_a_teacher_the_loss_is_half_that_of_its_distribution(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    needs.package("accelerate")
    healer = example("compress_pretrained").Healer.__new__(example("compress_pretrained").Healer)
    healer.teacher = model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokens = torch.arange(16)[None]
    inputs = {"input_ids": tokens, "labels": tokens}
    own = model(**inputs).loss
    torch.testing.assert_close(healer.compute_loss(model, inputs), own / 2)  # it agrees with itself
