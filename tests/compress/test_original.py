"""A smaller model runs as the original does: with a cache and without, static and sliding, in another process."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import rankdecay as rd
from rankdecay.compress import NotReducible
from rankdecay.compress.skeleton import Skeleton
from tests import needs
from tests.compress import emptied

transformers = needs.package("transformers")

_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}  # windows of 8 tokens
FAMILIES: dict[str, dict[str, Any]] = {"qwen3": {}, "gemma3_text": _SLIDING, "gpt_oss": {}}
_PROMPT = torch.randint(3, emptied.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request) -> tuple[Any, Any]:
    """A model, and the same with a smaller head."""
    model: Any = emptied.build(request.param, FAMILIES[request.param], torch.float32)
    original = emptied.original(model)
    kept = emptied.emptied(original, model)
    return model, emptied.with_weights(emptied.smaller(original, model, kept), model)


def _text(model: Any, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(_PROMPT, **options).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 1.3, "top_k": 0}], ids=["greedy", "sampled"]
)
def test_texts_are_the_same_with_a_cache_and_without(pair, options):
    wanted = _text(pair[0], **options)
    assert len({tuple(text) for text in wanted}) == 2
    assert _text(pair[1], **options) == _text(pair[1], use_cache=False, **options) == wanted


def test_a_static_cache_gives_the_same_text(pair):
    assert _text(pair[1], cache_implementation="static") == _text(pair[0])


def test_the_cache_is_smaller_by_the_ratio_exactly(pair):
    model, small = pair
    assert emptied.cache_bytes(small) * emptied.HEAD == emptied.cache_bytes(model) * emptied.NEW
    config = small.config
    assert config.head_dim == emptied.NEW
    cache = small(input_ids=_PROMPT, use_cache=True).past_key_values
    assert cache.layers[1].keys.shape == (2, config.num_key_value_heads, 5, emptied.NEW)


def test_attention_kernels_agree(pair):
    model, small = pair
    wanted = emptied.logits(model)
    if model.config.model_type != "gpt_oss":  # sinks have none here
        small.set_attn_implementation("sdpa")
        assert emptied.error(wanted, emptied.logits(small)) < 1e-5
        small.set_attn_implementation("eager")
    assert emptied.error(wanted, emptied.logits(small)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_in_half_precision_it_is_as_near_as_the_original(kind):
    exact: Any = emptied.build(kind, dtype=torch.float32)
    original = emptied.original(exact)
    kept = emptied.emptied(original, exact)
    wanted = emptied.logits(exact)
    half = emptied.build(kind, dtype=torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    small = emptied.with_weights(emptied.smaller(original, half, kept), half)
    assert small.dtype == torch.bfloat16
    assert emptied.error(wanted, emptied.logits(small)) < 2 * emptied.error(wanted, emptied.logits(half))


def test_a_model_in_several_types_stays_so():
    model: Any = emptied.build("qwen3", dtype=torch.bfloat16)
    model.model.layers[1].self_attn.q_norm.float()
    model.lm_head.float()
    original = emptied.original(model)
    made = emptied.smaller(original, model, emptied.emptied(original, model))
    small: Any = made.model(lambda name: model.state_dict()[name], None, lambda done: None)
    assert {n: p.dtype for n, p in small.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert torch.equal(small.lm_head.weight, model.lm_head.weight)


def test_it_runs_on_the_kernels_of_the_original():
    """Soft caps are not in every one."""
    for kernels in ("eager", "sdpa"):
        model: Any = emptied.build("llama", dtype=torch.float32)
        model.set_attn_implementation(kernels)
        original = emptied.original(model)
        made = emptied.smaller(original, model, emptied.emptied(original, model))
        small: Any = made.model(lambda name, model=model: model.state_dict()[name], None, lambda done: None)
        assert small.config._attn_implementation == kernels


_FRESH = """
import sys
sys.modules["rankdecay"] = None  # so that importing it fails
import torch, transformers
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert type(model).__module__.startswith("transformers.")
    logits = torch.load(folder + "/../logits.pt")
    with torch.no_grad():
        got = model(input_ids=logits["ids"], use_cache=False).logits
    print(float((got - logits["wanted"]).abs().max() / logits["wanted"].abs().max()))
"""


def test_a_process_without_this_library_loads_it(tmp_path):
    folders = []
    ids = torch.randint(3, emptied.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
    for kind in ("llama", "qwen3", "gemma3_text"):
        model: Any = emptied.build(kind, FAMILIES.get(kind), torch.float32)
        emptied.emptied(emptied.original(model), model)
        folder = tmp_path / kind
        model.save_pretrained(folder / "model")
        with torch.no_grad():
            torch.save({"ids": ids, "wanted": model(input_ids=ids, use_cache=False).logits}, folder / "logits.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            rd.compress(folder / "model", emptied.NEW, folder / "made")
        folders.append(str(folder / "made"))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", _FRESH, *folders],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    errors = [float(line) for line in run.stdout.split()]
    assert len(errors) == 3
    assert max(errors) < 1e-5


def test_a_plane_zero_in_the_key_alone_is_priced_under_a_norm():
    """The trap: without a norm such planes go for nothing, under one they do not, and it is said."""
    for kind, exact in (("llama", True), ("qwen3", False)):
        model: Any = emptied.build(kind, dtype=torch.float32)
        original = emptied.original(model)
        whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        emptied.emptied(original, model)
        for found in original.skeleton.found:
            place = found.places["query"]
            for name in (place.parameter, place.bias):
                model.state_dict()[name].copy_(whole[name])  # the queries have all planes again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            small = rd.compress(model, emptied.NEW)
        result = small.compression
        assert result.exact == exact
        assert (result.sizes[-1].plane_energy < 1e-12) == exact
        small.set_attn_implementation("eager")
        error = emptied.error(emptied.logits(model), emptied.logits(small))
        assert error < 1e-5 if exact else error > 1e-3


def test_what_a_class_says_is_asked(pair):
    model, small = pair
    for one, head in ((model, emptied.HEAD), (small, emptied.NEW)):
        skeleton = Skeleton(type(one), one.config)
        found = skeleton.found[0]
        fixed = model.config.model_type == "gemma3_text"  # whose configuration holds the scale
        assert skeleton.scale(found) == pytest.approx((emptied.HEAD if fixed else head) ** -0.5)
        assert skeleton.sums_to_one(found) == (model.config.model_type != "gpt_oss")
        query, key = skeleton.norms(found)
        assert (query is not None) == (key is not None) == (model.config.model_type in ("qwen3", "gemma3_text"))
        if query is not None:
            assert query.offset == (1.0 if fixed else 0.0)


def test_a_gate_by_head_does_not_sum_to_one():
    model: Any = emptied.build("laguna", dtype=torch.float32)
    skeleton = Skeleton(type(model), model.config)
    assert not skeleton.sums_to_one(skeleton.found[0])


def test_a_model_with_other_parameters_is_refused():
    """What is missing would be drawn at random by the class."""
    model: Any = emptied.build("llama", dtype=torch.float32)
    original = emptied.original(model)
    made = emptied.smaller(original, model, emptied.emptied(original, model))
    made.skeleton.own_names.append("another.weight")
    with pytest.raises(NotReducible, match=r"another\.weight"):
        emptied.with_weights(made, model)


@pytest.mark.filterwarnings("ignore:its layers turn by tables of several kinds")
@pytest.mark.parametrize(("kind", "text"), [("gemma3", "gemma3_text"), ("mistral3", "mistral"), ("llava", "llama")])
def test_the_language_model_of_one_that_sees_is_refused_within_and_compressed_alone(kind, text):
    """As the guide takes it out."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    seen = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(
        kind,
        text_config={"model_type": text, **heads, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64},
        vision_config={
            "model_type": {"gemma3": "siglip_vision_model", "mistral3": "pixtral"}.get(kind, "clip_vision_model"),
            **seen,
        },
    )
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(NotReducible, match="has parts beside a language model: compress the language model alone"):
        rd.compress(whole, 8)
    language = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype).eval()
    language.model.load_state_dict(whole.model.language_model.state_dict())
    language.lm_head.load_state_dict(whole.lm_head.state_dict())
    tokens = torch.randint(64, (4, 12))
    torch.testing.assert_close(language(input_ids=tokens).logits, whole(input_ids=tokens).logits, rtol=0, atol=0)
    assert rd.compress(language, 8, calibration=tokens).config.head_dim == 8
