"""Formats that are not read: one line each that says what it is and what to do."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import rankdecay as rd
from rankdecay.attention.errors import CheckpointError
from rankdecay.cli import main

from .test_states import FIRST


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flax_model.msgpack", "is a Flax checkpoint.*from_flax=True"),
        ("tf_model.h5", "is a TensorFlow or Keras checkpoint.*from_tf=True"),
        ("model.keras", "is a TensorFlow or Keras checkpoint"),
        ("model.onnx", "is an ONNX graph.*exported from"),
        ("weights.npz", "is a NumPy archive.*safetensors.numpy.save_file"),
        ("model.ckpt.index", "is part of a TensorFlow checkpoint"),
        ("model.ckpt.data-00000-of-00001", "is part of a TensorFlow checkpoint"),
        ("__0_0.distcp", "distributed checkpoint.*dcp_to_torch"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "DeepSpeed.*zero_to_fp32.py"),
        ("model.pkl", "is a pickle, which can run code"),
        ("model.nemo", "is a packed archive.*unpack"),
    ],
)
def test_files_and_directories_of_them(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"123")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=message) as e:
            rd.inspect(path)
        assert "\n" not in str(e.value)


def test_a_tensorflow_checkpoint_by_its_prefix(tmp_path):
    (tmp_path / "model.ckpt.index").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="is part of a TensorFlow checkpoint"):
        rd.inspect(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest"), r"DeepSpeed shards.*zero_to_fp32.py"),
        (("default/_CHECKPOINT_METADATA", "default/manifest.ocdbt"), "Orbax"),
        (("saved_model.pb", "variables/variables.index"), "TensorFlow SavedModel"),
        (("iter_0000010/mp_rank_00/x", "latest_checkpointed_iteration.txt"), "Megatron"),
        (
            ("checkpoint-5/pytorch_model_fsdp_0/.metadata", "checkpoint-5/optimizer_0/.metadata"),
            "dcp_to_torch .*fsdp_0",
        ),
    ],
)
def test_directories(files, message, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
    with pytest.raises(CheckpointError, match=message):
        rd.inspect(tmp_path)


@pytest.mark.filterwarnings("ignore")  # of torch about one process
def test_a_distributed_checkpoint_as_torch_writes_it(tmp_path, capsys):
    dcp.save({"model": FIRST}, checkpoint_id=tmp_path / "dcp")
    assert main(["inspect", str(tmp_path / "dcp")]) == 2
    assert "distributed checkpoint (DCP), which is not read; make one file of it: python -m" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # that torch.jit is old
def test_torchscript_and_pickled_modules(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"is a TorchScript archive.*torch.jit.load\(file\).state_dict"):
        rd.inspect(tmp_path / "script.pt")
    torch.save(nn.MultiheadAttention(4, 2), tmp_path / "module.pt")
    with pytest.raises(
        CheckpointError, match=r"needs to run code.*MultiheadAttention.*whole module.*save its state_dict\(\)"
    ):
        rd.inspect(tmp_path / "module.pt")


@pytest.mark.parametrize("separator", ["/", "."])
def test_kernels_of_flax_are_named_and_the_remedy_reads_them(separator, tmp_path, capsys):
    weights = {f"layers.{i}.self_attn.{n}_proj.kernel": torch.randn(8, 8) for i in range(2) for n in "qkvo"}
    bias = weights["layers.1.self_attn.q_proj.bias"] = torch.randn(8)
    save_file({name.replace(".", separator): w for name, w in weights.items()}, tmp_path / "model.safetensors")
    path = str(tmp_path / "model.safetensors")
    assert main(["inspect", path, "--num-heads", "2"]) == 2
    said = capsys.readouterr().err
    assert "k_proj.kernel (8, 8) is a kernel as Flax stores it, (in, out)" in said
    how = (
        "query='q_proj.kernel', key='k_proj.kernel', value='v_proj.kernel', output=..., num_heads=..., transposed=True"
    )
    assert f"names=AttentionNames({how})" in said
    row = "query=q_proj.kernel,key=k_proj.kernel,value=v_proj.kernel,output=o_proj.kernel,num_heads=2,transposed=yes"
    assert main(["inspect", path, "--names", row, "--strict"]) == 0
    names = rd.AttentionNames(
        **{role: f"{n}_proj.kernel" for role, n in zip(("query", "key", "value", "output"), "qkvo", strict=True)},
        num_heads=2,
        transposed=True,
    )
    first, second = rd.find_attention(path, names)
    for view, name in zip(second.views, "qkvo", strict=True):
        assert torch.equal(view.tensor(), weights[f"layers.1.self_attn.{name}_proj.kernel"].T)
    assert first.query.bias() is None
    assert torch.equal(second.query.bias(), bias)


def test_kernels_of_flax_with_a_dimension_for_heads_or_beside_others(tmp_path):
    heads = {f"0.attn.{name}.kernel": torch.randn(8, 2, 4) for name in ("query", "key", "value")}
    save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(
        ValueError, match=r"\(8, 2, 4\) is a kernel as Flax .* store it as \w+.weight, a matrix \(out, in\)"
    ):
        rd.find_attention(tmp_path / "heads.safetensors")
    own = {f"1.attn.{name}.weight": torch.randn(8, 8) for name in ("query", "key", "value")}
    kernels = {f"0.attn.{name}.kernel": torch.randn(8, 8) for name in ("query", "key", "value")}
    save_file(own | kernels, tmp_path / "both.safetensors")
    assert rd.inspect(tmp_path / "both.safetensors", num_heads=2).unhandled[0].startswith("0.attn: key.kernel (8, 8)")


def test_slices_of_megatron_are_refused_one_by_one_and_together(tmp_path):
    arguments = argparse.Namespace(num_attention_heads=4, hidden_size=64, tensor_model_parallel_size=2)
    layer = "decoder.layers.0.self_attention."
    for rank in range(2):
        (tmp_path / f"iter_0000010/mp_rank_0{rank}").mkdir(parents=True)
        weights = {f"{layer}linear_qkv.weight": torch.ones(96, 64), f"{layer}linear_proj.weight": torch.ones(64, 32)}
        torch.save({"args": arguments, "model": weights}, tmp_path / f"iter_0000010/mp_rank_0{rank}/model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    for path in (tmp_path, tmp_path / "iter_0000010"):
        with pytest.raises(ValueError, match=r"Megatron-LM checkpoint, which is not read; convert it"):
            rd.find_attention(path)
    for path, state in ((tmp_path, "iter_0000010/mp_rank_00"), (tmp_path / "iter_0000010/mp_rank_01", None)):
        with pytest.raises(ValueError, match="one of 2 tensor-parallel slices of Megatron-LM"):
            rd.find_attention(path, state=state)
