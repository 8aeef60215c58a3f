"""Checkpoints of a GPT for Hugging Face transformers: ``config.json`` and ``model.safetensors``.

| the GPT | the class of transformers | how it is loaded |
|---|---|---|
| rotary | Llama | ``AutoModelForCausalLM`` |
| rotary, QK-norm | Qwen 3 | ``AutoModelForCausalLM`` |
| learned positions | ImageGPT, the only GPT-2 there with RMSNorm | ``ImageGPTForCausalImageModeling`` |
| learned positions, QK-norm; scores of positions alone | none | `rankdecay inspect` reads it, and `load_state_dict` |

The first two have the parameters of our GPT under the same names. ImageGPT has one token more than it predicts, the
start of an image: an embedding of zeros that no text has. Attention without MLPs gets MLPs of one unit that is zero.

Writing needs no transformers; the tests load the files with it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankdecay.lab.session.gpt import EPSILON, GPT, ROTARY_BASE, GPTConfig

OWN_TYPE = "rankdecay_gpt"  # the model_type of what transformers has no class for
LLAMA_TYPES = {"Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}


def architecture(config: GPTConfig) -> str | None:
    """Class of transformers that computes the same, or None."""
    if config.scores == "positions":
        return None
    if config.positions == "rotary":
        return "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    return None if config.qk_norm else "ImageGPTForCausalImageModeling"


def save_checkpoint(model: GPT, directory: Path) -> None:
    """Write a model, in float32, into a directory that exists.

    Args:
        model: trained or not, on any device.
        directory: of ``config.json`` and ``model.safetensors``, which are replaced.
    """
    config = model.config
    weights = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    kind = architecture(config)
    if kind == "ImageGPTForCausalImageModeling":
        tensors, settings = _image_gpt_weights(weights, config), _image_gpt_settings(config)
    else:
        weights.pop("lm_head.weight")  # tied: the same tensor as the embedding
        tensors, settings = weights, _llama_settings(config, LLAMA_TYPES.get(kind or "", OWN_TYPE))
        if kind is not None and not config.mlp_width:
            tensors |= _no_mlp(config)
    common = {
        "architectures": [kind or "GPT"],
        "initializer_range": config.initial,
        "vocab_size": config.vocabulary,
        "dtype": "float32",
        # no special tokens: by default token 2, here a byte, would end a text for Llama
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(common | settings, indent=1) + "\n", encoding="utf-8")


def _llama_settings(config: GPTConfig, model_type: str) -> dict[str, Any]:
    rotary = config.positions == "rotary"
    return {
        "model_type": model_type,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width or 1,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "hidden_act": "silu" if rotary else "gelu",
        "rms_norm_eps": EPSILON,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    } | ({"rope_theta": ROTARY_BASE} if rotary else {})


def _no_mlp(config: GPTConfig) -> dict[str, Tensor]:
    shapes = {"gate_proj": (1, config.width), "up_proj": (1, config.width), "down_proj": (config.width, 1)}
    tensors = {}
    for layer in range(config.depth):
        tensors |= {f"model.layers.{layer}.mlp.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = torch.ones(config.width)
    return tensors


def _image_gpt_settings(config: GPTConfig) -> dict[str, Any]:
    return {
        "model_type": "imagegpt",
        "vocab_size": config.vocabulary + 1,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.mlp_width or 1,
        "n_positions": config.context,
        "activation_function": "gelu",
        "layer_norm_epsilon": EPSILON,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,  # its embedding has one row more
    }


def _image_gpt_weights(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Weights under ImageGPT's names; its linear maps are Conv1D: the transposed matrix, and a bias."""
    embedding = weights["model.embed_tokens.weight"]
    tensors = {
        "transformer.wte.weight": torch.cat([embedding, torch.zeros(1, config.width)]),
        "transformer.wpe.weight": weights["model.embed_positions.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
        "lm_head.weight": embedding,
    }
    for layer in range(config.depth):
        ours, theirs = f"model.layers.{layer}.", f"transformer.h.{layer}."
        attention = [weights[f"{ours}self_attn.{name}_proj.weight"] for name in "qkv"]
        nothing = torch.zeros(1, config.width)
        matrices = {
            "attn.c_attn": torch.cat(attention),
            "attn.c_proj": weights[f"{ours}self_attn.o_proj.weight"],
            "mlp.c_fc": weights.get(f"{ours}mlp.up_proj.weight", nothing),
            "mlp.c_proj": weights.get(f"{ours}mlp.down_proj.weight", nothing.T),
        }
        for name, matrix in matrices.items():
            tensors[f"{theirs}{name}.weight"] = matrix.T
            tensors[f"{theirs}{name}.bias"] = torch.zeros(len(matrix))
        tensors[f"{theirs}ln_1.weight"] = weights[f"{ours}input_layernorm.weight"]
        ones = torch.ones(config.width)
        tensors[f"{theirs}ln_2.weight"] = weights.get(f"{ours}post_attention_layernorm.weight", ones)
    return tensors
