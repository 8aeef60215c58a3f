"""GGUF files say what the model says that they were converted from, and damaged ones are refused in one line.

The files are written by ``gguf.GGUFWriter``, with the names that the package maps and the rearrangements that
llama.cpp's ``convert_hf_to_gguf.py`` makes (read as llama-cpp-python 0.3.36 ships it, in ``conversion/*.py``).
"""

from __future__ import annotations

import math
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

import rankdecay as rd
from rankdecay.attention.checkpoints import CheckpointError, open_checkpoint
from rankdecay.cli import main
from tests import needs
from tests.waiting import HANG

from .damage import check_damaged
from .families import build, randomised

gguf = needs.package("gguf")

WIDTH, HEADS, KEY_HEADS = 32, 4, 2


# ---- files, as llama.cpp writes them ---------------------------------------------------------------------


def permuted(name: str, weight: torch.Tensor, heads: int, key_heads: int) -> torch.Tensor:
    """``LlamaModel.permute``: planes half a head apart become neighbours."""
    count = {"q_proj": heads, "k_proj": key_heads}.get(name.split(".")[-2])
    if count is None:
        return weight
    halves = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _contiguous(name: str, weight: torch.Tensor, heads: int, key_heads: int) -> torch.Tensor:
    """``FalconModel``, ``BloomModel`` and ``GPTNeoXModel``: groups of [queries, k, v] become [q, k, v]."""
    if "query_key_value" not in name:
        return weight
    lines = weight.reshape(key_heads, heads // key_heads + 2, WIDTH // heads, *weight.shape[1:])
    parts = [lines[:, :-2], lines[:, -2], lines[:, -1]]
    return torch.cat([part.reshape(-1, *weight.shape[1:]) for part in parts])


def _transposed(name: str, weight: torch.Tensor, heads: int, key_heads: int) -> torch.Tensor:
    """``GPT2Model``: its Conv1D hold (in, out)."""
    return weight.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight


def _as_it_is(name: str, weight: torch.Tensor, heads: int, key_heads: int) -> torch.Tensor:
    return weight


#: Family of tests/attention/families.py -> (architecture, key heads, rearrangement, further metadata).
CONVERTED: dict[str, tuple[str, int, Callable[..., torch.Tensor], dict[str, int]]] = {
    "llama": ("llama", 2, permuted, {"rope.dimension_count": 8}),
    "mistral": ("llama", 2, permuted, {"rope.dimension_count": 8}),
    "qwen2": ("qwen2", 2, _as_it_is, {}),
    "qwen3": ("qwen3", 2, _as_it_is, {"attention.key_length": 16, "attention.value_length": 16}),
    "gemma2": ("gemma2", 2, _as_it_is, {"attention.key_length": 16, "attention.value_length": 16}),
    "gemma3": ("gemma3", 2, _as_it_is, {"attention.key_length": 16, "attention.value_length": 16}),
    "olmo2": ("olmo2", 2, _as_it_is, {}),
    "phi3": ("phi3", 2, _as_it_is, {"rope.dimension_count": 8}),
    "gpt2": ("gpt2", 4, _transposed, {}),
    "gpt_bigcode-multi-query": ("starcoder", 1, _as_it_is, {}),
    "gpt_neox": ("gptneox", 4, _contiguous, {"rope.dimension_count": 2}),
    "falcon-grouped": ("falcon", 2, _contiguous, {}),
    "falcon-multi-head": ("falcon", 4, _contiguous, {}),
    "falcon-multi-query": ("falcon", 1, _contiguous, {}),
    "bloom": ("bloom", 4, _contiguous, {}),
    "mpt": ("mpt", 4, _as_it_is, {}),
    "bert": ("bert", 4, _as_it_is, {}),
    "modernbert": ("modern-bert", 4, _as_it_is, {}),
}


def _written(path: Path, architecture: str, settings: dict[str, Any], tensors: dict[str, Any], **how: Any) -> Path:
    """Writes a file; an array of bytes with its type is a quantised tensor."""
    writer = gguf.GGUFWriter(path, architecture, **how)
    writer.data_alignment = settings.get("general.alignment", writer.data_alignment)
    for key, value in settings.items():
        kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else gguf.GGUFValueType.get_type(value)
        if kind == gguf.GGUFValueType.INT32 and value >= 0:  # as the converter writes numbers of heads
            kind = gguf.GGUFValueType.UINT32
        (writer.add_array(key, value) if isinstance(value, list) else writer.add_key_value(key, value, kind))
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        data = data.detach().numpy() if isinstance(data, torch.Tensor) else data
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _names(architecture: str) -> Any:
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(kind, 8)


def convert(model: torch.nn.Module, path: Path, architecture: str, key_heads: int, change: Any, more: Any) -> Path:
    names, tensors = _names(architecture), {}
    for name, weight in model.state_dict().items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or names.get_name(
            name.partition(".")[2], try_suffixes=(".weight", ".bias")
        )
        if stored:
            tensors[stored] = change(name, weight, HEADS, key_heads)
    assert any("attn_q" in name for name in tensors)
    settings = {"block_count": 2, "attention.head_count": HEADS, "attention.head_count_kv": key_heads} | more
    return _written(path, architecture, {f"{architecture}.{key}": value for key, value in settings.items()}, tensors)


def _same_rows(ours: rd.Inspection, theirs: rd.Inspection) -> None:
    """Every figure of every row is the same, also of the untrained; names aside."""
    assert len(ours.rows) == len(theirs.rows)
    for a, b in zip(ours.rows, theirs.rows, strict=True):
        _same_figures({**a, "name": ""}, {**b, "name": ""})
    assert ours.notes == theirs.notes
    assert not ours.unhandled


def _same_figures(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _same_figures(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _same_figures(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-6, abs=1e-9) if isinstance(b, float) else b)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_model_has_the_rows_of_the_original(name, tmp_path):
    model = build(name)
    _same_rows(rd.inspect(convert(model, tmp_path / "model.gguf", *CONVERTED[name])), rd.inspect(model))


def test_a_real_file_has_the_rows_that_transformers_loads(tmp_path):
    """SmolLM2-135M in Q4_1, whose rows of W_Q and W_K are permuted.

    transformers gets two of its layers, bytes as they are, since it takes a while for all.
    """
    transformers, path = needs.package("transformers"), needs.smollm2()
    reader = gguf.GGUFReader(path)
    settings = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith("llama.") and key not in ("llama.block_count", "llama.vocab_size")
    }
    few = {"token_embd.": "token_embd.", "output_norm.": "output_norm.", "blk.0.": "blk.0.", "blk.29.": "blk.1."}
    tensors = {
        tensor.name.replace(old, new): (tensor.data[:64] if old == "token_embd." else tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
        for old, new in few.items()
        if tensor.name.startswith(old)
    }
    _written(tmp_path / "few.gguf", "llama", settings | {"llama.block_count": 2, "llama.vocab_size": 64}, tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="few.gguf")
    saved = tmp_path / "saved"
    saved.mkdir()
    save_model(model, str(saved / "model.safetensors"))
    model.config.save_pretrained(saved)
    report = rd.inspect(path, layers=[0, 29])
    assert any("weights are stored as Q4_1" in note for note in report.notes)
    ours, theirs = report.rows, rd.inspect(saved).rows
    assert len(ours) == len(theirs) == 2 * 9 * 2
    places = {"name": "", "layer": 0, "label": ""}  # layers 0 and 29 of thirty, and of two
    for a, b in zip(ours, theirs, strict=True):
        _same_figures(a | places, b | places)


def test_the_permutation_is_seen(tmp_path):
    """The same file under an architecture that has its planes half a head apart would be another model."""
    model = build("llama")
    written = convert(model, tmp_path / "a.gguf", *CONVERTED["llama"])
    other = convert(model, tmp_path / "b.gguf", "qwen2", 2, permuted, {})
    ours, theirs = rd.inspect(written).of("query_key"), rd.inspect(other).of("query_key")
    assert [row["nuclear_norm"] for row in ours] == pytest.approx([row["nuclear_norm"] for row in theirs])
    assert abs(ours[0]["imbalance"] - theirs[0]["imbalance"]) > 1e-4


def test_names_are_those_of_the_file(tmp_path):
    [first, _] = rd.find_attention(convert(build("llama"), tmp_path / "model.gguf", *CONVERTED["llama"]))
    assert first.name == "blk.0"
    assert [view.parameter_name for view in first.views] == [
        f"blk.0.attn_{role}.weight" for role in ("q", "k", "v", "output")
    ]


# ---- positions -------------------------------------------------------------------------------------------


def _plain(path: Path, architecture: str, settings: dict[str, Any], depth: int = 2, **more: Any) -> Path:
    """A file of an architecture with random weights, whose heads of 8 are stated."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": WIDTH, "k": KEY_HEADS * 8, "v": KEY_HEADS * 8, "output": WIDTH}
    tensors: dict[str, Any] = {
        f"blk.{i}.attn_{name}.weight": torch.randn(lines, WIDTH, generator=generator)
        for i in range(depth)
        for name, lines in shapes.items()
    }
    stated = {"block_count": depth, "attention.head_count": HEADS, "attention.head_count_kv": KEY_HEADS} | settings
    stated = {key if "general." in key else f"{architecture}.{key}": value for key, value in stated.items()}
    return _written(path, architecture, stated, tensors | more)


@pytest.mark.parametrize(
    ("architecture", "settings", "expected"),
    [
        ("command-r", {}, (8, True)),
        ("chatglm", {"rope.dimension_count": 4}, (4, True)),
        ("glm4", {"rope.dimension_count": 4}, (4, True)),
        ("glm4", {"rope.dimension_sections": [1, 1, 0, 0]}, (8, False)),  # the converter undid the neighbours
        ("stablelm", {"rope.dimension_count": 2}, (2, False)),
        ("qwen2vl", {"rope.dimension_sections": [1, 1, 2, 0]}, (8, False)),
        ("granite", {}, (8, True)),
        ("granitehybrid", {"rope.scaling.finetuned": False}, None),
        ("baichuan", {}, (8, True)),
        ("jais", {}, None),
        ("nemotron_h", {}, None),
    ],
)
def test_how_positions_turn_a_head(architecture, settings, expected, tmp_path):
    for layer in rd.find_attention(_plain(tmp_path / "model.gguf", architecture, settings)):
        assert (layer.rotary and (layer.rotary.dims, layer.rotary.interleaved)) == expected


_THREE_IN_FOUR = [True, True, True, False] * 2


@pytest.mark.parametrize(
    ("architecture", "settings", "turned"),
    [
        ("smollm3", {}, _THREE_IN_FOUR),
        ("cohere2", {"attention.sliding_window": 16}, _THREE_IN_FOUR),
        ("llama4", {}, _THREE_IN_FOUR),
        ("llama4", {"attention.sliding_window": 0}, [True] * 8),  # MobileLLM
        ("exaone4", {}, [True] * 8),
        ("exaone4", {"attention.sliding_window": 16, "attention.sliding_window_pattern": [False, True] * 4},
         [False, True] * 4),
        ("smallthinker", {"attention.sliding_window": 16}, [False, True, True, True] * 2),
        ("granite_swa", {"attention.rope_pattern": [1, 0] * 4}, [True, False] * 4),
    ],
)  # fmt: skip
def test_layers_without_rotary_positions(architecture, settings, turned, tmp_path):
    layers = rd.find_attention(_plain(tmp_path / "model.gguf", architecture, settings, depth=8))
    assert [layer.rotary is not None for layer in layers] == turned
    if architecture == "llama4":  # it normalises where it turns, without weights
        assert [layer.qk_norm for layer in layers] == turned


def test_layers_without_rotary_positions_are_those_of_transformers(tmp_path):
    transformers = needs.package("transformers")
    config = transformers.SmolLM3Config(num_hidden_layers=8)
    layers = rd.find_attention(_plain(tmp_path / "model.gguf", "smollm3", {}, depth=8))
    assert [layer.rotary is not None for layer in layers] == [bool(turned) for turned in config.no_rope_layers]


# ---- what else a file may say ----------------------------------------------------------------------------


def test_heads_of_each_block(tmp_path):
    tensors = {
        f"blk.{i}.attn_{name}.weight": torch.randn(lines, WIDTH)
        for i, (queries, keys) in enumerate([(32, 8), (16, 16)])
        for name, lines in {"q": queries, "k": keys, "v": keys}.items()
    }
    tensors |= {f"blk.{i}.attn_output.weight": torch.randn(WIDTH, 32 // (i + 1)) for i in range(2)}
    settings = {"deci.attention.head_count": [4, 2], "deci.attention.head_count_kv": [1, 2], "deci.block_count": 2}
    layers = rd.find_attention(_written(tmp_path / "model.gguf", "deci", settings, tensors))
    assert [(layer.num_heads, layer.num_key_value_heads, layer.head_dim) for layer in layers] == [(4, 1, 8), (2, 2, 8)]


def test_an_encoder_of_t5(tmp_path):
    transformers = needs.package("transformers")
    config = transformers.T5Config(d_model=WIDTH, d_kv=16, num_heads=HEADS, num_layers=2, d_ff=64, vocab_size=50)
    model = randomised(transformers.T5EncoderModel(config))
    names = _names("t5encoder")
    mapped = {names.get_name(name, (".weight",)): weight for name, weight in model.state_dict().items()}
    tensors = {name: weight for name, weight in mapped.items() if name}
    settings = {"t5encoder.attention.head_count": HEADS, "t5encoder.attention.key_length": 16}
    path = _written(tmp_path / "model.gguf", "t5encoder", settings, tensors)
    _same_rows(rd.inspect(path), rd.inspect(model))


def test_the_encoder_comes_before_the_decoder(tmp_path):
    tensors = {
        f"{side}.blk.{i}.attn_{name}.weight": torch.randn(WIDTH, WIDTH)
        for side in ("dec", "enc")
        for i in range(11)
        for name in "qkvo"
    }
    path = _written(tmp_path / "model.gguf", "t5", {"t5.attention.head_count": HEADS}, tensors)
    layers = rd.find_attention(path)
    assert [layer.name for layer in layers] == [f"{side}.blk.{i}" for side in ("enc", "dec") for i in range(11)]
    assert all(layer.output is not None and layer.rotary is None for layer in layers)


def test_towers_of_a_projector(tmp_path):
    """mmproj files: other names of the output, heads by the tower."""
    tensors = {
        f"{tower}.blk.0.attn_{name}.weight": torch.randn(WIDTH, WIDTH)
        for tower in "va"
        for name in ("q", "k", "v", "out")
    }
    settings: dict[str, Any] = {"clip.vision.attention.head_count": 4, "clip.audio.attention.head_count": 2}
    path = _written(tmp_path / "mmproj.gguf", "clip", settings | {"clip.projector_type": "ultravox"}, tensors)
    layers = rd.find_attention(path)
    assert {layer.name: layer.num_heads for layer in layers} == {"v.blk.0": 4, "a.blk.0": 2}
    assert all(layer.output is not None and layer.rotary is None for layer in layers)


def test_latent_attention_is_named(tmp_path):
    lines = {"attn_q_a": 8, "attn_q_b": 32, "attn_kv_a_mqa": 12, "attn_kv_b": 32, "attn_output": 32}
    tensors = {f"blk.0.{name}.weight": torch.randn(rows, WIDTH) for name, rows in lines.items()}
    path = _written(tmp_path / "model.gguf", "deepseek2", {"deepseek2.attention.head_count": 4}, tensors)
    try:
        said = str(rd.inspect(path))
    except ValueError as error:
        said = str(error)
    assert "blk.0" in said


def test_parts_of_latent_attention_are_joined(tmp_path):
    """``DeepseekV2Model`` writes kv_b as k_b, transposed, and v_b, by head."""
    whole = torch.randn(4 * (6 + 8), 12)
    keys, values = whole.view(4, 6 + 8, 12).split([6, 8], dim=1)
    parts = {"blk.0.attn_k_b.weight": keys.mT, "blk.0.attn_v_b.weight": values}
    opened = open_checkpoint(_written(tmp_path / "model.gguf", "deepseek2", {}, parts))
    assert opened.shapes == {"blk.0.attn_kv_b.weight": (4 * (6 + 8), 12)}
    assert torch.equal(opened.load("blk.0.attn_kv_b.weight"), whole)


def test_a_scale_of_the_whole_matrix(tmp_path):
    """Ternary models, and those in 4-bit floats, have one beside the weight, by which llama.cpp multiplies."""
    path = tmp_path / "model.gguf"
    whole = rd.find_attention(_plain(path, "bitnet", {}))[0].query.tensor()
    scaled = _plain(path, "bitnet", {}, **{"blk.0.attn_q.scale": torch.tensor([3.0])})
    assert torch.equal(rd.find_attention(scaled)[0].query.tensor(), 3 * whole)
    several = _plain(path, "bitnet", {}, **{"blk.0.attn_q.scale": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.scale in .* has shape \(4,\), expected one number"):
        rd.inspect(several)


def test_an_unknown_architecture_states_no_type(tmp_path):
    """So that nothing is taken for known of its positions and norms."""
    assert "model_type" not in open_checkpoint(_plain(tmp_path / "new.gguf", "new", {})).config
    assert "model_type" in open_checkpoint(_plain(tmp_path / "old.gguf", "qwen2", {})).config
    assert rd.find_attention(tmp_path / "new.gguf")[0].num_heads == HEADS


# ---- types -----------------------------------------------------------------------------------------------

_KINDS = [
    kind for kind in gguf.GGMLQuantizationType if kind.name not in ("Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64")
]


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.name)
def test_every_type_is_dequantised_as_the_package_does(kind, tmp_path):
    generator, rows = np.random.default_rng(0), 256
    block, amount = gguf.GGML_QUANT_SIZES[kind]
    if kind.name in ("F64", "F32", "F16"):
        stored = generator.standard_normal((WIDTH, rows)).astype(kind.name.replace("F", "float"))
        expected = stored
    else:  # any bytes mean something
        stored = generator.integers(0, 120, (WIDTH, rows // block * amount)).astype(np.uint8)
        expected = gguf.quants.dequantize(stored, kind)
    tensors = {f"blk.0.attn_{name}.weight": (stored, kind) for name in "qkv"}
    path = _written(tmp_path / "model.gguf", "qwen2", {"qwen2.attention.head_count": 4}, tensors)
    [layer] = rd.find_attention(path)
    assert layer.key.shape == (WIDTH, rows)
    np.testing.assert_array_equal(layer.key.tensor().numpy(), expected)


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "I8"])
def test_a_type_that_the_package_does_not_dequantise_is_refused(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    block, amount = gguf.GGML_QUANT_SIZES[kind]
    stored = np.ones((WIDTH, 256 // block * amount), np.int8 if name == "I8" else np.uint8)
    tensors = {f"blk.0.attn_{name}.weight": (stored, kind) for name in "qkv"}
    path = _written(tmp_path / "model.gguf", "qwen2", {"qwen2.attention.head_count": 4}, tensors)
    assert open_checkpoint(path).shapes["blk.0.attn_q.weight"] == (WIDTH, 256)
    with pytest.raises(CheckpointError, match=rf"attn_. ?.*in .*model.gguf is stored as {name}, which gguf .* convert"):
        rd.inspect(path)


def test_a_type_that_the_package_does_not_know_is_refused_if_it_is_needed(tmp_path):
    path = _plain(tmp_path / "model.gguf", "qwen2", {}, depth=1)
    _patch_kind(path, b"blk.0.attn_output.weight", 4077)
    [layer] = rd.find_attention(path)
    assert layer.query_key().spectrum().stable_rank.isfinite().all()
    with pytest.raises(CheckpointError, match=r"attn_output.weight in .* is of type 4077, which gguf .* does not know"):
        rd.inspect(path)


def _patch_kind(path: Path, name: bytes, kind: int) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", kind)
    path.write_bytes(content)


def test_the_header_is_read_as_the_package_reads_it(tmp_path):
    settings = {
        "general.name": "a name", "general.flag": True, "general.alignment": 64, "general.size": 2.5,
        "general.below": -3, "general.long": ["word"] * 300, "general.numbers": [1, 2, 3],
        "general.many": [0.5] * 70_000,
    }  # fmt: skip
    path = _plain(tmp_path / "model.gguf", "llama", settings, odd=torch.randn(7), deep=torch.randn(2, 3, 4))
    opened, reader = open_checkpoint(path), gguf.GGUFReader(path)
    assert set(opened.shapes) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        assert opened.shapes[tensor.name] == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(opened.load(tensor.name).numpy(), tensor.data)


def test_a_tokenizer_takes_no_time(tmp_path):
    words = {"tokenizer.ggml.tokens": [f"w{i}" for i in range(100_000)], "tokenizer.ggml.scores": [0.0] * 100_000}
    path = _plain(tmp_path / "model.gguf", "llama", {f"general.{key}": value for key, value in words.items()})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(rd.find_attention(path)) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


# ---- files and folders -----------------------------------------------------------------------------------


def test_a_folder_with_one_file(tmp_path):
    path = _plain(tmp_path / "model.gguf", "llama", {})
    (tmp_path / "README.md").write_text("x")
    _same_rows(rd.inspect(tmp_path), rd.inspect(path))
    bare = path.rename(tmp_path / "sha256-0123")  # as Ollama keeps them
    assert len(rd.find_attention(bare)) == 2


def test_a_link(tmp_path):
    """One that was asked for is followed, and of those in a folder only what stays inside, or in the hub's cache."""
    path = _plain(tmp_path / "model.gguf", "llama", {})
    folder = tmp_path / "folder"
    folder.mkdir()
    link = folder / "link.gguf"
    link.symlink_to(path)
    assert len(rd.find_attention(link)) == 2
    with pytest.raises(CheckpointError, match="leads out of"):
        rd.find_attention(folder)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    (snapshot / "model.gguf").symlink_to(path.rename(blobs / "0123"))
    assert len(rd.find_attention(snapshot)) == 2


def test_a_folder_with_several_models_is_refused(tmp_path):
    _plain(tmp_path / "model-Q4_K_M.gguf", "llama", {})
    _plain(tmp_path / "model-Q8_0.gguf", "llama", {})
    with pytest.raises(
        CheckpointError,
        match=r"holds several sets of weights: model-Q4_K_M.gguf, model-Q8_0.gguf; choose one with --state",
    ):
        rd.find_attention(tmp_path)
    (tmp_path / "model-Q8_0.gguf").rename(tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds several sets of weights: model-Q4_K_M.gguf, model.safetensors; choose one"
    ):
        rd.find_attention(tmp_path)


def test_a_split_model(tmp_path):
    whole = _plain(tmp_path / "whole.gguf", "llama", {})
    folder = tmp_path / "split"
    folder.mkdir()
    _split(folder / "model.gguf")
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for given in (folder, *parts):
        _same_rows(rd.inspect(given), rd.inspect(whole))
    lost = parts[1].rename(tmp_path / "lost.gguf")
    with pytest.raises(
        CheckpointError, match=r"is one of 3 files of a model, and model-00002-of-00003.gguf is not in .*split"
    ):
        rd.find_attention(folder)
    lost.rename(parts[1])
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(
        CheckpointError, match=r"alone.gguf is one of 3 files; put all in one directory, named NAME-00001"
    ):
        rd.find_attention(alone)


def _split(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=3)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    for i in range(2):
        for name, lines in {"q": WIDTH, "k": KEY_HEADS * 8, "v": KEY_HEADS * 8, "output": WIDTH}.items():
            writer.add_tensor(f"blk.{i}.attn_{name}.weight", torch.randn(lines, WIDTH, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_command_line(tmp_path, capsys):
    path = _plain(tmp_path / "model.gguf", "llama", {})
    assert main(["inspect", str(path), "--layers", "1"]) == 0
    out = capsys.readouterr().out
    assert "model.gguf: 1 attention layer" in out
    assert "layer 1: RoPE rotates queries and keys" in out


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    path = _plain(tmp_path / "model.gguf", "llama", {})
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        f"from rankdecay.cli import main; sys.exit(main(['inspect', {str(path)!r}]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert answer.returncode != 0
    assert "pip install 'rankdecay[gguf]'" in answer.stderr
    assert answer.stderr.strip().count("\n") == 0


# ---- what is wrong with a file ---------------------------------------------------------------------------


def _head(version: int = 3, tensors: int = 0, settings: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, settings)


def _name(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GG", "was cut short, or is damaged: its header"),
        (b"GGML" + bytes(64), "does not begin with GGUF"),
        (b"GGUF", "was cut short"),
        (_head(1), "is GGUF version 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "is big-endian; convert it with: gguf-convert-endian"),
        (_head(), "contains no tensors"),
        (_head(tensors=2**63), "it claims 9223372036854775808 tensors"),
        (_head(settings=2**40), "it claims 1099511627776 settings"),
        (_head(settings=1) + struct.pack("<Q", 2**60) + bytes(64), "a name has 1152921504606846976 bytes"),
        (_head(settings=1) + _name(b"\xff\xfe") + bytes(64), "a name is not text"),
        (_head(settings=1) + _name(b"k") + struct.pack("<I", 77) + bytes(64), "of type 77, which does not exist"),
        (_head(settings=1) + _name(b"k") + struct.pack("<IIQ", 9, 0, 2**62), "claims 4611686018427387904 numbers"),
        (_head(settings=1) + _name(b"k") + struct.pack("<IIQ", 9, 8, 2**62), "claims 4611686018427387904 strings"),
        (_head(settings=1) + _name(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "it has an array of type 9"),
        (_head(settings=1) + _name(b"k") + struct.pack("<IQ", 8, 2**50) + bytes(64), "was cut short"),
        (_head(settings=2) + (_name(b"k") + struct.pack("<IB", 0, 1)) * 2 + bytes(64), "it states 'k' twice"),
        (_head(settings=1) + _name(b"general.alignment") + struct.pack("<II", 4, 0) + bytes(64), "alignment is 0"),
        (_head(tensors=1) + _name(b"x") + struct.pack("<I", 2**31) + bytes(64), "'x' has 2147483648 dimensions"),
        (_head(tensors=1) + _name(b"x") + struct.pack("<IQQIQ", 2, 8, 0, 0, 0) + bytes(64), r"'x' has shape \(0, 8\)"),
        (_head(tensors=1) + _name(b"x") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0) + bytes(64), "cut short.*x of"),
        (_head(tensors=1) + _name(b"x") + struct.pack("<IQIQ", 1, 8, 0, 2**63) + bytes(64), "cut short.*x of shape"),
        (_head(tensors=1) + _name(b"x") + struct.pack("<IQIQ", 1, 33, 2, 0) + bytes(64), "rows of 33 numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_file_that_is_damaged_or_hostile(content, message, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        rd.find_attention(path)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_download_that_was_cut_short(tmp_path):
    path = _plain(tmp_path / "model.gguf", "llama", {})
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(
        CheckpointError, match=r"model.gguf was cut short, or is damaged: blk.1.attn_output.weight of shape"
    ):
        rd.inspect(path)
    path.write_bytes(content)
    layers = rd.find_attention(path)
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="was cut short since it was opened"):
        layers[1].output.tensor()


@pytest.mark.parametrize(
    ("kind", "message"), [("adapter", "is a LoRA adapter: merge it"), ("imatrix", "has no weights")]
)
def test_what_is_no_model_is_refused(kind, message, tmp_path):
    path = _plain(tmp_path / "model.gguf", "llama", {"general.type": kind})
    with pytest.raises(CheckpointError, match=message):
        rd.inspect(path)


def test_damaged_files_give_an_error_or_numbers_and_nothing_else(tmp_path):
    content = _plain(tmp_path / "whole.gguf", "llama", {"rope.freq_base": 10000.0}).read_bytes()
    check_damaged(content, tmp_path / "damaged.gguf", beginning=800, kilobytes=100_000)


def test_numbers_that_are_not_finite_are_shown_as_such(tmp_path):
    weight = np.full((WIDTH, WIDTH), math.inf, np.float32)
    tensors = {f"blk.0.attn_{name}.weight": weight for name in ("q", "k", "v", "output")}
    path = _written(tmp_path / "model.gguf", "llama", {"llama.attention.head_count": 4}, tensors)
    assert all(row["stable_rank"] is None for row in rd.inspect(path).rows)
