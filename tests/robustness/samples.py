"""Real small checkpoints and run directories, which the fuzzer damages."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, HEADS, KEY_HEADS, DEPTH = 16, 4, 2, 2
RUNS = Path(__file__).parents[1] / "lab" / "directories_02dcd16"


class Sample(NamedTuple):
    """A directory as it should be.

    Attributes:
        name: of the kind.
        root: everything that belongs to it.
        given: what a command is given, below the root.
        again: the command that continues a run, with ``OUT`` for the directory.
    """

    name: str
    root: Path
    given: str
    again: tuple[str, ...] = ()


def samples(where: Path) -> list[Sample]:
    """Write every sample below a directory."""
    made = [*checkpoints(where / "checkpoints"), *runs(where / "runs")]
    return made


def checkpoints(where: Path) -> list[Sample]:
    """Write a checkpoint of every kind."""
    found = []
    for name, (given, write) in CHECKPOINTS.items():
        root = where / name
        root.mkdir(parents=True)
        write(root)
        found.append(Sample(name, root, given))
    return found


def runs(where: Path) -> list[Sample]:
    """Copy run directories, complete and interrupted, each with the command that wrote it."""
    found = []
    for stored in sorted(RUNS.iterdir()):
        if not stored.is_dir():
            continue
        root = where / stored.name
        shutil.copytree(stored, root / "run")
        shutil.copy(RUNS / "text.txt", root / "text.txt")
        words = shlex.split(json.loads((stored / "config.json").read_text())["reproduce"])[1:]
        words = ["OUT" if word == f"runs/{stored.name}" else word for word in words]
        words = ["TEXT" if word == "text.txt" else word for word in words]
        assert "OUT" in words, words
        found.append(Sample(stored.name, root, "run", (*words, "--preset", "standard")))
    return found


def attention() -> nn.Module:
    """A live attention of two heads."""
    model = nn.Module()
    model.num_heads = 2  # pyright: ignore[reportArgumentType]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(model, name, nn.Linear(8, 8))
    return model


def llama(seed: int = 0) -> dict[str, Tensor]:
    """Weights of a Llama with grouped queries."""
    torch.manual_seed(seed)
    size = WIDTH // HEADS
    tensors = {"model.embed_tokens.weight": torch.randn(32, WIDTH)}
    for layer in range(DEPTH):
        path = f"model.layers.{layer}."
        tensors |= {
            f"{path}self_attn.q_proj.weight": torch.randn(WIDTH, WIDTH),
            f"{path}self_attn.k_proj.weight": torch.randn(KEY_HEADS * size, WIDTH),
            f"{path}self_attn.v_proj.weight": torch.randn(KEY_HEADS * size, WIDTH),
            f"{path}self_attn.o_proj.weight": torch.randn(WIDTH, WIDTH),
            f"{path}self_attn.q_proj.bias": torch.randn(WIDTH),
            f"{path}mlp.up_proj.weight": torch.randn(2 * WIDTH, WIDTH),
            f"{path}input_layernorm.weight": torch.ones(WIDTH),
        }
    return tensors


def gpt2(prefix: str = "transformer.") -> dict[str, Tensor]:
    """Weights of a GPT-2, fused and transposed."""
    torch.manual_seed(1)
    tensors = {f"{prefix}wte.weight": torch.randn(32, WIDTH)}
    for layer in range(DEPTH):
        path = f"{prefix}h.{layer}."
        tensors |= {
            f"{path}attn.c_attn.weight": torch.randn(WIDTH, 3 * WIDTH),
            f"{path}attn.c_attn.bias": torch.randn(3 * WIDTH),
            f"{path}attn.c_proj.weight": torch.randn(WIDTH, WIDTH),
            f"{path}mlp.c_fc.weight": torch.randn(WIDTH, 4 * WIDTH),
            f"{path}ln_1.weight": torch.ones(WIDTH),
        }
    return tensors


LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
    "num_hidden_layers": DEPTH, "head_dim": WIDTH // HEADS, "initializer_range": 0.02, "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.5,
    "layer_types": ["full_attention"] * DEPTH, "tie_word_embeddings": False, "text_config": None,
}  # fmt: skip
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": WIDTH, "n_head": HEADS, "n_layer": DEPTH}


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def _whole(root: Path) -> None:
    _json(root / "config.json", LLAMA)
    save_file(llama(), root / "model.safetensors", metadata={"format": "pt"})


def _sharded(root: Path) -> None:
    _json(root / "config.json", LLAMA)
    tensors, files = llama(), {}
    for number, layer in ((1, "layers.0"), (2, "layers.1")):
        name = f"model-{number:05d}-of-00002.safetensors"
        part = {key: value for key, value in tensors.items() if layer in key or (number == 1 and "embed" in key)}
        save_file(part, root / name)
        files |= dict.fromkeys(part, name)
    _json(root / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": files})


def _pickled(root: Path) -> None:
    _json(root / "config.json", GPT2)
    torch.save(gpt2(), root / "pytorch_model.bin")


def _trainer(root: Path) -> None:
    model = gpt2("_orig_mod.transformer.")
    moments = {name: {"step": torch.tensor(3.0), "exp_avg": value} for name, value in list(model.items())[:3]}
    content = {
        "model": model,
        "ema": {name: value + 1 for name, value in model.items()},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]},
        "model_args": {"n_head": HEADS, "n_embd": WIDTH, "n_layer": DEPTH},
        "args": argparse.Namespace(n_head=HEADS),
        "epoch": 3,
    }
    torch.save(content, root / "ckpt.pt")
    (root / "trainer_state.json").write_text("{}")


def _old_pickle(root: Path) -> None:
    _json(root / "config.json", GPT2)
    torch.save({"state_dict": gpt2()}, root / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _adapter(root: Path) -> None:
    base, adapter = root / "base", root / "adapter"
    base.mkdir()
    adapter.mkdir()
    _whole(base)
    torch.manual_seed(2)
    path = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    factors = {}
    for layer in range(DEPTH):
        factors |= {path.format(layer, "A"): torch.randn(2, WIDTH), path.format(layer, "B"): torch.randn(WIDTH, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "../base", "r": 2, "lora_alpha": 4}
    _json(adapter / "adapter_config.json", config | {"rank_pattern": {}, "alpha_pattern": {"q_proj": 4}})


def _cache(root: Path) -> None:
    folder = root / "models--someone--model"
    snapshot = folder / "snapshots" / "0123abcd"
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True)
    whole = root / "whole"
    whole.mkdir()
    _whole(whole)
    for name, blob in (("config.json", "c0ffee"), ("model.safetensors", "5afe")):
        (whole / name).rename(folder / "blobs" / blob)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    whole.rmdir()
    (folder / "refs" / "main").write_text("0123abcd")


def _meta(root: Path) -> None:
    torch.manual_seed(3)
    tensors = {"tok_embeddings.weight": torch.randn(32, WIDTH), "rope.freqs": torch.ones(2)}
    for layer in range(DEPTH):
        path = f"layers.{layer}.attention."
        tensors |= {f"{path}{name}.weight": torch.randn(WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")}
    torch.save(tensors, root / "consolidated.00.pth")
    _json(root / "params.json", {"dim": WIDTH, "n_heads": HEADS, "n_kv_heads": HEADS, "n_layers": DEPTH})


def _lit(root: Path) -> None:
    torch.manual_seed(4)
    tensors = {}
    for layer in range(DEPTH):
        path = f"transformer.h.{layer}.attn."
        tensors |= {
            f"{path}qkv.weight": torch.randn(3 * WIDTH, WIDTH),
            f"{path}proj.weight": torch.randn(WIDTH, WIDTH),
        }
    torch.save({"model": tensors}, root / "lit_model.pth")
    lines = {"name": "tiny", "n_head": HEADS, "n_query_groups": HEADS, "head_size": WIDTH // HEADS}
    lines |= {"rotary_percentage": 1.0, "n_embd": WIDTH}
    (root / "model_config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))


def _eight_bit(root: Path) -> None:
    tensors = llama()
    codes = {}
    for name, value in tensors.items():
        if "proj.weight" in name:
            scale = value.abs().amax() / 400
            codes |= {name: (value / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
        else:
            codes[name] = value
    save_file(codes, root / "model.safetensors")
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    _json(root / "config.json", LLAMA | {"quantization_config": method})


def _gguf(root: Path) -> None:
    import gguf

    torch.manual_seed(5)
    writer = gguf.GGUFWriter(root / "model.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(DEPTH)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_token_list(["a", "b", "c"])
    rows = {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2, "attn_output": WIDTH}
    for layer in range(DEPTH):
        for name, count in rows.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", torch.randn(count, WIDTH).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


#: What a command is given, below the sample's root, and what writes the sample.
CHECKPOINTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "whole": (".", _whole),
    "file": ("model.safetensors", _whole),
    "sharded": (".", _sharded),
    "pickled": (".", _pickled),
    "old_pickle": ("pytorch_model.bin", _old_pickle),
    "trainer": ("ckpt.pt", _trainer),
    "adapter": ("adapter", _adapter),
    "cache": ("models--someone--model", _cache),
    "meta": (".", _meta),
    "lit": (".", _lit),
    "eight_bit": (".", _eight_bit),
    "gguf": ("model.gguf", _gguf),
}
