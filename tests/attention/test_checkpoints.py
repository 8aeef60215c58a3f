"""Checkpoints as people have them, and files that are damaged, lying or hostile."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import rankdecay as rd
from rankdecay.attention.checkpoints import CheckpointError, open_checkpoint
from tests.waiting import HANG

from .damage import check_damaged
from .families import TRANSFORMERS, build


def _saved(name: str, folder: Path, **how) -> nn.Module:
    model = build(name)
    model.save_pretrained(folder, **how)
    return model


def _same(model: nn.Module, path: Path, **how) -> None:
    live, stored = rd.find_attention(model), rd.find_attention(path, **how)
    assert len(live) == len(stored)
    for ours, theirs in zip(live, stored, strict=True):
        assert (ours.head_dim, ours.rotary, ours.qk_norm) == (theirs.head_dim, theirs.rotary, theirs.qk_norm)
        for a, b in zip(ours.views, theirs.views, strict=True):
            assert str(a.window) == str(b.window)
            assert torch.equal(a.tensor(), b.tensor())
            assert (a.bias() is None) == (b.bias() is None)
            assert a.bias() is None or torch.equal(a.bias(), b.bias())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_files_alone_say_what_the_model_says(name, tmp_path):
    """No class of transformers is asked: names, shapes and config.json have to be enough."""
    _same(_saved(name, tmp_path), tmp_path)


def test_transformers_is_not_needed(tmp_path):
    _saved("llama", tmp_path)
    code = (
        "import sys; sys.modules['transformers'] = None\n"  # importing it would fail
        f"import rankdecay as rd; print(len(rd.inspect({str(tmp_path)!r}).rows))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG)
    assert answer.stdout.strip() == "16"


def test_a_sharded_checkpoint(tmp_path):
    model = _saved("llama", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _same(model, tmp_path)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "step": 3}, lambda s: {"a": {"state_dict": s}}])
def test_a_pytorch_state_dict(wrap, tmp_path):
    model = build("gpt2")
    torch.save(wrap(model.state_dict()), tmp_path / "model.pt")
    _same(model, tmp_path / "model.pt", num_heads=4)
    with pytest.raises(ValueError, match=r"c_attn: the number of heads in its 96 rows is unknown.*num_heads"):
        rd.find_attention(tmp_path / "model.pt")


def test_a_state_dict_of_the_old_format(tmp_path):
    model = build("gpt2")
    torch.save(model.state_dict(), tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    _same(model, tmp_path / "model.bin", num_heads=4)


def test_a_single_file_takes_the_configuration_beside_it(tmp_path):
    model = _saved("gpt_neox", tmp_path)
    _same(model, tmp_path / "model.safetensors")


def test_older_configurations_that_do_not_say_rotary(tmp_path):
    _saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert rd.find_attention(tmp_path)[0].rotary is not None


def test_ones_own_names(tmp_path):
    tensors = {f"{i}.{name}.weight": torch.randn(8, 8) for i in range(2) for name in ("a", "b", "c", "d")}
    save_file(tensors, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"no attention was found in .*own.safetensors.*0.a.weight \(8, 8\).*names="):
        rd.find_attention(tmp_path / "own.safetensors")
    names = rd.AttentionNames(query="a", key="b", value="c", output="d", num_heads=2)
    layers = rd.find_attention(tmp_path / "own.safetensors", names)
    assert torch.equal(layers[1].key.tensor(), tensors["1.b.weight"])


def test_biases_beside_separate_weights(tmp_path):
    """VideoMAE's files have q_bias and v_bias, though its class has biases of the layers."""
    tensors = {f"attention.{name}.weight": torch.randn(8, 8) for name in ("query", "key", "value")}
    biases = {"attention.q_bias": torch.randn(8), "attention.v_bias": torch.randn(8)}
    save_file({**tensors, **biases}, tmp_path / "model.safetensors")
    [layer] = rd.find_attention(tmp_path, num_heads=2)
    for view, name in ((layer.query, "q"), (layer.value, "v")):
        bias = view.bias()
        assert bias is not None
        assert torch.equal(bias, biases[f"attention.{name}_bias"])
    assert layer.key.bias() is None


@pytest.mark.parametrize("called", ["o_proj", "dense", "wo"])
def test_the_output_of_latent_attention_by_any_usual_name(called, tmp_path):
    shapes = {"q_proj": (48, 32), "kv_a_proj_with_mqa": (12, 32), "kv_b_proj": (64, 8), called: (32, 32)}
    save_file(
        {f"layers.0.attn.{name}.weight": torch.ones(shape) for name, shape in shapes.items()},
        tmp_path / "a.safetensors",
    )
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    [layer] = rd.find_attention(tmp_path)
    assert layer.output is not None
    assert layer.output.parameter_name == f"layers.0.attn.{called}.weight"


def test_layers_are_numbered_as_in_the_model(tmp_path):
    """safetensors sorts names, so that layer 10 comes before layer 2."""
    tensors = {f"h.{i}.attn.qkv.weight": torch.full((24, 8), float(i)) for i in range(12)}
    save_file(tensors, tmp_path / "many.safetensors")
    layers = rd.find_attention(tmp_path / "many.safetensors", num_heads=2)
    assert [int(layer.query.tensor()[0, 0]) for layer in layers] == list(range(12))


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    read = []

    class Watched:
        def __init__(self, *arguments, **options):
            self.file = safe_open(*arguments, **options)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            read.append(name)
            return self.opened.get_tensor(name)

    model = _saved("gpt2", tmp_path)
    monkeypatch.setattr("rankdecay.attention.checkpoints.safe_open", Watched)
    assert open_checkpoint(tmp_path).shapes["transformer.wte.weight"] == tuple(model.transformer.wte.weight.shape)
    layers = rd.find_attention(tmp_path)
    assert read == []
    layers[1].query.heads(), layers[1].value.heads()
    assert read == ["transformer.h.1.attn.c_attn.weight"]  # one parameter holds both


# ---- what is wrong with a file ---------------------------------------------------------------------------


class _Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/rankdecay-was-here",)


@pytest.mark.parametrize("content", [b"i" * 40, b"(lp0\ni", bytes(range(105, 256))])
def test_bytes_that_are_no_state_dict_are_refused_with_what_to_do(tmp_path, content):
    file = tmp_path / "junk.bin"
    file.write_bytes(content)
    remedy = "name the file of the weights|save its state_dict"
    with pytest.raises(CheckpointError, match=rf"junk\.bin .*({remedy})") as refused:
        rd.inspect(file)
    assert "Error: " not in str(refused.value)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    marker = Path("/tmp/rankdecay-was-here")
    marker.unlink(missing_ok=True)
    torch.save({"weight": _Hostile()}, tmp_path / "zip.pt")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(_Hostile()))
    for name in ("zip.pt", "raw.bin"):
        with pytest.raises(CheckpointError, match=r"needs to run code, or is damaged.*safetensors") as caught:
            rd.find_attention(tmp_path / name)
        assert "weights_only" not in str(caught.value)
    assert not marker.exists()


def test_little_that_claims_to_be_much_is_refused(tmp_path):
    torch.save({"x.weight": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "strides.pt")
    with pytest.raises(CheckpointError, match=r"x.weight in .* claims shape \(1048576, 1048576\), which is more than"):
        rd.find_attention(tmp_path / "strides.pt")
    torch.save({"x.weight": torch.zeros(2**20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.namelist():
            bomb.writestr(entry, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 2**15
    with pytest.raises(CheckpointError, match=r"is compressed \(.*which torch.save does not do"):
        rd.find_attention(tmp_path / "bomb.pt")


def test_links_out_of_the_directory_are_refused(tmp_path):
    inside, outside = tmp_path / "checkpoint", tmp_path / "outside"
    _saved("gpt2", outside)
    inside.mkdir()
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"leads out of .*checkpoint, to .*outside"):
        rd.find_attention(inside)


def test_the_hubs_own_links_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    model = _saved("gpt2", blobs)
    snapshot.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(blobs / name)
    _same(model, snapshot)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/hostname", "missing.safetensors"])
def test_an_index_cannot_lead_anywhere_else(shard, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match=r"leads out of|is not in"):
        rd.find_attention(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "should hold one JSON object, not list"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"weight_map": 3}', "has no weight_map"),
    ],
)
def test_a_broken_index(content, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        rd.find_attention(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; give a directory"):
        rd.find_attention(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"has no weights: expected \*.safetensors.*found nothing"):
        rd.find_attention(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        rd.find_attention(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        rd.find_attention(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_a_pointer_of_git_lfs_is_told_as_what_it_is(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 1\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the weights: fetch them with git lfs"):
        open_checkpoint(tmp_path)


def test_a_header_that_lies_about_its_length(tmp_path):
    file = tmp_path / "model.safetensors"
    for length in (2**63, 2**40, 10_000, 0):
        file.write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
        with pytest.raises(CheckpointError, match=r"truncated or not a safetensors file|contains no tensors"):
            rd.find_attention(file)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        rd.find_attention(file)


def test_a_configuration_that_contradicts_the_shapes(tmp_path):
    _saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for heads in (7, -3, "four", 10**9, True):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": heads, "head_dim": 5}))
        with pytest.raises(ValueError, match=r"not handled|Not handled|no attention"):
            rd.inspect(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files_give_an_error_or_numbers_and_nothing_else(suffix, tmp_path):
    model = build("gpt2")
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pt":
        torch.save(model.state_dict(), whole)
    else:
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, whole)
    check_damaged(whole.read_bytes(), tmp_path / f"damaged{suffix}", beginning=3000, kilobytes=200_000)
