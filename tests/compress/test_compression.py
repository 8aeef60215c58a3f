"""`rd.compress` and `plan`: a live model, a directory, a text; what is refused, and with which words."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import rankdecay as rd
from rankdecay.compress import NotReducible, plan
from rankdecay.compress.calibration import windows_of
from tests import needs
from tests.compress import emptied, small

needs.package("transformers", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.saved(tmp_path_factory.mktemp("llama"))


def _quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return rd.compress(*arguments, **options)


def test_a_live_model_becomes_one_of_its_own_class():
    model, text = small.model(), small.tokens()
    made = rd.compress(model, 8, calibration=text)
    assert type(made) is type(model)
    assert made.config.head_dim == 8
    assert made.dtype == model.dtype
    assert made.compression.chosen_by == "loss"
    before, after = made.compression.sizes[0], made.compression.sizes[-1]
    assert (before.head_dim, after.head_dim) == (16, 8)
    assert after.bytes_per_token * 2 == before.bytes_per_token == 2 * 2 * 2 * 16 * 4  # k and v, layers, heads, d, bytes
    assert after.loss is not None
    # the loss that is reported is that of what is returned, on the windows that did not choose
    with torch.no_grad():
        own = [
            torch.nn.functional.cross_entropy(made(input_ids=w[None]).logits[0, :-1], w[1:]).item() for w in text[1::2]
        ]
    assert after.loss == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_a_directory_gives_the_same_weights_as_the_live_model(tmp_path, folder):
    transformers = needs.package("transformers")
    text = small.tokens()
    result = rd.compress(folder, 8, tmp_path / "made", calibration=text)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    live = rd.compress(transformers.AutoModelForCausalLM.from_pretrained(folder), 8, calibration=text)
    assert result.kept == live.compression.kept
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert result.out == str(tmp_path / "made")
    assert not (tmp_path / "made.part").exists()


def test_a_text_file_chooses_with_the_tokenizer_beside_the_model(tmp_path):
    folder = small.saved(tmp_path / "model")
    small.text_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number}" for number in small.tokens(1, 400)[0].tolist()))
    seen = []
    result = rd.compress(
        folder, 8, tmp_path / "made", text, window=32, windows=6, progress=lambda *told: seen.append(told)
    )
    assert result.chosen_by == "loss"
    assert all(size.loss is not None for size in result.sizes)
    assert (tmp_path / "made" / "tokenizer.json").exists()
    assert ("leaving out one rotary plane at a time", 8, 8) in seen
    card = (tmp_path / "made" / "README.md").read_text()
    assert "on a text" in card
    for said in (str(result), card):
        assert "(loss: nats per token on 3 windows of 32 tokens, not used to choose)" in said
        assert "fewer than 8: differences of a few thousandths are noise" in said
    assert "the loss on 3 windows of 32 tokens that were not used to choose went from" in card


@pytest.mark.parametrize(("windows", "measured", "noted"), [(2, 1, True), (15, 7, True), (16, 8, False)])
def test_it_says_on_how_much_the_loss_was_measured(windows, measured, noted):
    answer = plan(small.model(), calibration=small.tokens(windows), sizes=[8])
    assert answer.to_json()["measured_on"] == {"windows": measured, "tokens": 24}
    words = f"on {measured} window{'' if measured == 1 else 's'} of 24 tokens"
    assert words in str(answer)
    assert any("noise" in note for note in answer.to_json()["notes"]) == noted
    assert any(words in note for note in answer.to_json()["notes"]) == noted


def test_planes_that_stay_are_those_whose_absence_costs_most():
    model, text = small.model(), small.tokens()
    made = rd.compress(model, 8, calibration=text)
    costs = []
    for plane in range(8):
        without = small.model()
        with torch.no_grad():
            for layer in without.model.layers:
                for matrix in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                    matrix.view(-1, 16, 48)[:, [plane, plane + 8]] = 0
            tokens = text[::2]
            costs.append(float(without(input_ids=tokens, labels=tokens).loss))
    assert made.compression.kept["all"] == sorted(sorted(range(8), key=lambda plane: -costs[plane])[:4])


def test_values_chosen_on_a_text_lose_less_of_what_is_computed():
    """Inputs have a few huge directions, which the weights alone do not show."""
    model, text = small.model(), small.tokens(8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:6] = 30
            for matrix in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                matrix.mul_(0.02)
                matrix.view(-1, 16, 48)[:, [4, 5, 6, 7, 12, 13, 14, 15]] = 0  # those planes go, whoever chooses
        wanted = model(text).logits
        with_text = rd.compress(model, 8, calibration=text)
        without = _quietly(model, 8)
        assert with_text.compression.kept == without.compression.kept == {"all": [0, 1, 2, 3]}
        errors = [float((made(text).logits - wanted).norm() / wanted.norm()) for made in (with_text, without)]
    assert errors[0] < errors[1] / 2


def test_more_sizes_do_not_rank_again(monkeypatch):
    """What does not depend on the head size is computed once: passes of the model, and roots of its moments."""
    model, text = small.model(), small.tokens()
    passes, roots = [], []
    model.register_forward_hook(lambda *_: passes.append(1))
    decompose = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: roots.append(1) or decompose(matrix))
    counts = []
    for sizes in ([], [14, 12, 10]):
        passes.clear()
        roots.clear()
        plan(model, 8, text, sizes=sizes)
        counts.append((len(passes), len(roots)))
    assert counts[0] == counts[1]
    assert counts[0][1] == 2  # of each layer


def test_without_a_text_it_warns():
    with pytest.warns(UserWarning, match="chosen without a text"):
        rd.compress(small.model(), 8)


def test_a_live_model_can_be_written_too(tmp_path):
    transformers = needs.package("transformers")
    made = rd.compress(small.model("Qwen3"), 8, tmp_path / "made", calibration=small.tokens())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    text = small.tokens()
    with torch.no_grad():
        assert torch.equal(made(text).logits, again(text).logits)
    assert "heads of 8" in (tmp_path / "made" / "README.md").read_text()


def test_plan_writes_nothing_and_needs_no_size(folder):
    result = plan(folder)
    assert [size.head_dim for size in result.sizes] == [16, 14, 12, 8]
    assert result.new_head_dim is None
    assert result.kept == {}
    assert "low energy does not mean low loss" in str(result)
    assert plan(folder, 4, sizes=[6]).kept["all"] == sorted(plan(folder, 4).kept["all"])
    assert [size.head_dim for size in plan(folder, 4, sizes=[6]).sizes] == [16, 6, 4]


@pytest.mark.parametrize(
    ("head_dim", "says"),
    [
        (16, "must be smaller than 16"),
        (64, "must be smaller than 16"),
        (7, "must be an even number"),
        (0, "must be an even number"),
        (-8, "must be an even number"),
        (8.0, "must be an even number"),
        (True, "must be an even number"),
    ],
)
def test_sizes_that_no_head_can_have(folder, tmp_path, head_dim, says):
    with pytest.raises(ValueError, match=says):
        rd.compress(folder, head_dim, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_size_that_kernels_do_not_like_is_noted(folder):
    assert any("not a multiple of 8" in note for note in plan(folder, 6).notes)
    assert not any("not a multiple of 8" in note for note in plan(folder, 8).notes)


def test_models_that_are_refused(tmp_path):
    transformers = needs.package("transformers")
    with pytest.raises(TypeError, match="must be a model of transformers"):
        rd.compress(torch.nn.Linear(4, 4), 8)
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=50, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(NotReducible, match="gpt2"):
        rd.compress(gpt, 8)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(small.model().config)
    with pytest.raises(ValueError, match="on the meta device"):
        rd.compress(empty, 8)
    with pytest.raises(ValueError, match="not a directory of save_pretrained"):
        rd.compress(tmp_path / "nothing", 8, tmp_path / "out")
    with pytest.raises(ValueError, match="out is needed"):
        rd.compress(small.saved(tmp_path / "model"), 8)


def test_a_model_that_was_loaded_from_gguf(tmp_path):
    """Transformers calls it quantised, and its weights are plain numbers; unless it keeps them in their blocks."""
    needs.package("gguf")
    from tests.attention.test_gguf import convert, permuted

    transformers, model = needs.package("transformers"), small.model()
    settings = {
        "rope.dimension_count": 16, "rope.freq_base": 10000.0, "attention.key_length": 16, "vocab_size": 50,
        "attention.value_length": 16, "embedding_length": 48, "feed_forward_length": 64, "context_length": 64,
        "attention.layer_norm_rms_epsilon": model.config.rms_norm_eps,
    }  # fmt: skip
    convert(model, tmp_path / "model.gguf", "llama", 2, permuted, settings)
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(NotReducible, match=r"is GGUF.*gguf_file='model\.gguf'"):
            rd.compress(path, 8, tmp_path / "made")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = small.tokens()
    made = rd.compress(loaded, 8, tmp_path / "made", calibration=text)
    wanted = rd.compress(model, 8, calibration=text).state_dict()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made").state_dict()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
        assert torch.equal(tensor, again[name]), name
    assert "quantization_config" not in (tmp_path / "made" / "config.json").read_text()
    assert loaded.config.quantization_config.quant_method == "gguf"  # the model itself stays as it was
    loaded.lm_head.weight = torch.nn.Parameter(torch.zeros(50, 51, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NotReducible, match=r"lm_head\.weight is quantised \(torch\.uint8\): .*GgufConfig\(dequantize"):
        rd.compress(loaded, 8)


def test_a_model_that_says_it_is_quantised_is_refused():
    model = small.model()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(NotReducible, match=r"the model is quantised: .*model\.dequantize\(\)"):
        rd.compress(model, 8)


def test_exact_is_said_of_every_input_and_not_of_the_text():
    """Values of full rank, of which the text shows inputs of low rank alone."""
    model = small.model()
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                matrix.view(-1, 16, 48)[:, [4, 5, 6, 7, 12, 13, 14, 15]] = 0
            layer.self_attn.v_proj.weight.view(2, 16, 48)[:, 7:] = 0
            layer.self_attn.v_proj.weight.view(2, 16, 48)[:, 8:11, 32:] = torch.randn(2, 3, 16) * 1e-3
            layer.self_attn.v_proj.weight.view(2, 16, 48)[:, :7, 32:] = 0
            layer.self_attn.o_proj.weight[32:] = 0
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:40, 32:] = 0
    text = small.tokens() % 37 + 3
    assert not rd.compress(model, 8, calibration=text).compression.exact
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.view(2, 16, 48)[:, 8:11] = 0
    assert rd.compress(model, 8, calibration=text).compression.exact


def test_a_share_that_positions_turn_is_written_even_if_it_is_all():
    """Phi's class has a share of one half as its default."""
    model = small.model("Phi", num_key_value_heads=4, hidden_size=64)
    made = _quietly(model, 2)
    assert made.config.head_dim == 2
    assert made.model.layers[0].self_attn.rotary_ndims == 2
    assert made(small.tokens()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.1), r"layers\.1\.self_attn\.scaling is 0\.1"),
        (lambda m: m.config.rope_parameters.update(rope_theta=1e6), "other frequencies"),
        (lambda m: setattr(m.config, "rms_norm_eps", 0.1), "variance_epsilon"),
        (lambda m: setattr(m.config, "head_dim", 8), "has shape"),
        (lambda m: m.model.rotary_emb.original_inv_freq.mul_(0.5), "other frequencies"),
    ],
)
def test_a_live_model_that_is_not_what_its_configuration_builds(change, says):
    model = small.model()
    change(model)
    with pytest.raises(NotReducible, match=says):
        rd.compress(model, 4)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_are_tied_or_untied_by_hand(tied):
    """The configuration says whether a checkpoint has one matrix or two; what it does not say would be lost."""
    model = small.model(tie_word_embeddings=not tied)
    embeddings = model.model.embed_tokens.weight
    model.lm_head.weight = embeddings if tied else torch.nn.Parameter(torch.randn_like(embeddings))
    with pytest.raises(NotReducible, match=rf"lm_head\.weight and model\.embed_.* set tie_word_embeddings={tied}"):
        rd.compress(model, 8)
    model.config.tie_word_embeddings = tied
    made = _quietly(model, 8)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    assert torch.equal(made.lm_head.weight, model.lm_head.weight)


def test_how_a_model_generates_trains_and_is_trained_stays(tmp_path):
    transformers = needs.package("transformers")
    model = small.model().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.generation_config.max_new_tokens = 7
    modes = [module.training for module in model.modules()]
    made = rd.compress(model, 8, tmp_path / "made", calibration=small.tokens())
    assert [module.training for module in model.modules()] == modes
    assert made.generation_config.max_new_tokens == 7
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "made").max_new_tokens == 7
    assert [name for name, p in made.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_under_inference_mode_the_result_is_an_ordinary_model():
    model, text = small.model(), small.tokens()
    with torch.inference_mode():
        made = rd.compress(model, 8, calibration=text)
    made(input_ids=small.tokens(), labels=small.tokens()).loss.backward()


def test_an_adapter_is_refused_alive_and_in_files(tmp_path):
    peft = needs.package("peft")
    model = peft.get_peft_model(small.model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="merge adapters first"):
        rd.compress(model, 8)
    with pytest.raises(NotReducible, match="merge adapters first"):
        rd.compress(model.base_model.model, 8)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").write_text(small.model().config.to_json_string())
    with pytest.raises(NotReducible, match="has an adapter"):
        rd.compress(tmp_path / "adapter", 8, tmp_path / "out")
    small.model().save_pretrained(tmp_path / "adapter")  # a base beside it, which transformers loads with it
    with pytest.raises(NotReducible, match=r"has an adapter.*merge it"):
        rd.compress(tmp_path / "adapter", 8, tmp_path / "out")


def test_code_that_a_tokenizer_names_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    """Transformers asks on the terminal whether to run it, where nobody has said."""
    folder = small.saved(tmp_path / "model")
    small.text_tokenizer(folder)
    named = json.loads((folder / "tokenizer_config.json").read_text())
    named |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "own.py").write_text("raise SystemExit('run')")
    (tmp_path / "text.txt").write_text("w5 w6 w7 " * 400)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"custom code.*tokenizer="):
        rd.compress(folder, 8, tmp_path / "made", calibration=tmp_path / "text.txt", window=16)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        (torch.arange(30), {"window": 32}, "fewer than two windows of 32"),
        (small.tokens(1), {}, "at least 2"),
        ("text.txt", {}, "pass tokenizer="),
        (small.tokens(), {"window": 1}, "window=1"),
        (small.tokens(), {"windows": 1}, "windows=1"),
        (small.tokens().float(), {}, "expected numbers of tokens"),
        (small.tokens()[:, :1], {}, "windows of 1 tokens"),
        (small.tokens() + 40, {}, "the model knows 0 to 49"),
    ],
)
def test_texts_that_cannot_choose(text, options, says):
    with pytest.raises(ValueError, match=says):
        rd.compress(small.model(), 8, calibration=text, **options)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("w1 w2".encode("utf-16"), r"is UTF-16, by its byte order mark at byte 0.*iconv -f utf-16 -t utf-8"),
        ("w1 w2".encode("utf-32"), r"is UTF-32, .*iconv -f utf-32 -t utf-8"),
        (b"w1 w2 \xff", r"is not UTF-8 text at byte 6: .*iconv"),
        (b"\xef\xbb\xbfw1 \xff", r"is not UTF-8 text at byte 6: .*iconv"),
        ("w1 w2".encode("utf-16-le"), r"is not UTF-8 text at byte 1: .*iconv -f utf-16le"),
        (None, r"cannot be read \(No such file or directory\): name a text file for calibration="),
    ],
)
def test_a_text_that_is_no_utf_8_is_refused(tmp_path, content, says):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as refused:
        rd.compress(small.model(), 8, calibration=path, tokenizer=lambda text, **options: {"input_ids": []})
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_byte_order_mark_of_utf_8_is_dropped(tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 é", "utf-8-sig")
    read: list[str] = []

    def tokenizer(text, **options):
        read.append(text)
        return {"input_ids": list(range(8))}

    assert windows_of(tmp_path / "text.txt", tokenizer, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert read == ["w1 w2 é"]


def test_an_earlier_transformers_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(needs.package("transformers"), "__version__", "4.57.6")
    with pytest.raises(ValueError, match=r"compress needs transformers 5 or later, this is 4\.57\.6: pip install -U"):
        rd.compress(small.model(), 8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [f"{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")] + ["k_norm.weight"]
)
def test_weights_that_are_not_finite_are_named(name, dtype, bad):
    """A gain of a plane that goes would not be missed: the smaller model would be another one than the original."""
    model = small.model("Qwen3", num_hidden_layers=1, attention_bias=True).to(dtype)
    path = f"model.layers.0.self_attn.{name}"
    with torch.no_grad():
        model.get_parameter(path).view(-1)[-1] = bad
    with pytest.raises(NotReducible, match=f"{path} has values that are not finite"):
        _quietly(model, 8, sizes=[])


def test_numbers_that_a_type_does_not_hold_are_refused():
    """Gains of the keys grow by √(d/d'), past the largest number of float16 here."""
    model = small.model("Qwen3").to(torch.float16)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_norm.weight.fill_(60_000)
    with pytest.raises(NotReducible, match=r"layers\.1\.self_attn\.k_norm\.weight .* too large for torch\.float16"):
        _quietly(model, 8)


@pytest.mark.parametrize("number", [needs.package("numpy").int64, torch.tensor])
def test_head_sizes_of_arrays_become_plain_numbers(tmp_path, number):
    made = _quietly(small.saved(tmp_path / "model"), number(8), tmp_path / "made", sizes=[number(4)])
    assert json.loads(json.dumps(made.to_json()))["new_head_dim"] == 8


def test_a_model_loaded_under_inference_mode():
    with torch.inference_mode():
        model = small.model()
    made, same = (rd.compress(one, 8, calibration=small.tokens(), sizes=[]) for one in (model, small.model()))
    assert made.compression.sizes == same.compression.sizes
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in small.model().named_parameters())


def test_buffers_keep_a_type_of_their_own():
    """Weights in bfloat16, and a correction of the router's scores in float32."""
    model = emptied.build("minimax_m2", dtype=torch.float32).to(torch.bfloat16)
    name = "model.layers.0.mlp.e_score_correction_bias"
    model.get_buffer(name).data = torch.tensor([0.1, 0.2, 0.3, 0.4])
    made = _quietly(model, 8, sizes=[])
    assert torch.equal(made.get_buffer(name), model.get_buffer(name))
    assert made.get_buffer(name).dtype == torch.float32
    assert made.dtype == torch.bfloat16


def test_a_live_model_that_was_saved_is_built_again(tmp_path):
    """save_pretrained leaves the type as text in the configuration, with which Apertus cannot be built."""
    try:
        model = emptied.build("apertus", dtype=torch.float32)
    except emptied.NotBuilt:  # by transformers 5.0, without memory
        pytest.skip(needs.OLD_TRANSFORMERS)
    model.save_pretrained(tmp_path / "model")
    assert isinstance(model.config.dtype, str)
    assert _quietly(model, 8, sizes=[]).config.head_dim == 8
