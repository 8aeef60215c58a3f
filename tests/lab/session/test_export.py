"""Checkpoints that transformers loads with equal logits, and that `rankdecay inspect` reads."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, ImageGPTForCausalImageModeling

import rankdecay as rd
from rankdecay.lab.session.export import architecture, save_checkpoint
from rankdecay.lab.session.gpt import GPT, GPTConfig

KINDS = [(positions, qk_norm) for positions in ("rotary", "learned") for qk_norm in (False, True)]


def trained(positions="rotary", qk_norm=False, mlp_width=24, seed=0, scores="learned") -> GPT:
    """A model whose every parameter, gains too, is as far from its start as training takes it."""
    model = GPT(GPTConfig(40, 12, 16, 2, 2, mlp_width, positions, qk_norm, scores=scores), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def offline(monkeypatch):
    """No test may ask the hub: a socket is an error."""
    import socket

    def refuse(*arguments, **options):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("mlp_width", [24, 0])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotary_loads_as_llama_and_qwen3_with_equal_logits(tmp_path, offline, qk_norm, mlp_width):
    model = trained(qk_norm=qk_norm, mlp_width=mlp_width)
    save_checkpoint(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert (
        type(loaded).__name__ == architecture(model.config) == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mlp_width", [24, 0])
def test_learned_positions_load_as_image_gpt_with_equal_logits(tmp_path, offline, mlp_width):
    model = trained("learned", mlp_width=mlp_width)
    save_checkpoint(model, tmp_path)
    loaded, info = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert architecture(model.config) == type(loaded).__name__
    tokens = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [("learned", True, 24, 0, "learned"), ("rotary", False, 24, 0, "positions")], ids=["qk_norm", "positions"]
)
def test_what_transformers_has_no_class_for_is_whole_all_the_same(tmp_path, kind):
    model = trained(*kind)
    assert architecture(model.config) is None
    save_checkpoint(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "rankdecay_gpt"
    again = GPT(model.config, seed=9)
    missing, unexpected = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(again.eval()(tokens), model(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("mlp_width", [24, 0])
@pytest.mark.parametrize(("positions", "qk_norm"), KINDS)
def test_inspect_reads_in_the_files_what_it_reads_in_the_model(tmp_path, positions, qk_norm, mlp_width):
    model = trained(positions, qk_norm, mlp_width)
    save_checkpoint(model, tmp_path)
    live, stored = rd.inspect(model), rd.inspect(tmp_path)
    assert not stored.unhandled
    assert len(live.rows) == len(stored.rows) > 0
    for one, other in zip(live.rows, stored.rows, strict=True):
        for key in ("layer", "head", "product", "matrix", "head_dim"):
            assert one.get(key) == other.get(key)
        for key in ("nuclear_norm", "pseudo_rank", "effective_rank", "nuclear_gap", "imbalance"):
            assert (one[key] is None) == (other[key] is None)
            if one[key] is not None:
                assert one[key] == pytest.approx(other[key], rel=1e-5)
                # ImageGPT's biases of zero count as a row more of a random matrix
                assert one["untrained"][key] == pytest.approx(other["untrained"][key], rel=0.15)


def test_half_precision_is_stored_as_float32(tmp_path):
    model = trained().to(torch.bfloat16)
    save_checkpoint(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert torch.equal(stored["model.norm.weight"], model.model.norm.weight.float())


def test_nothing_ends_a_text_by_itself(tmp_path, offline):
    save_checkpoint(trained(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    made = loaded.generate(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2), max_new_tokens=10, do_sample=False)
    assert made.shape == (1, 12)  # as long as was asked for, whatever it says
