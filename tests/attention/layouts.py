"""Small real models whose attention is stored as in no other family."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests import needs

from .interventions import prepared

_MODEL: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 50,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = _MODEL | {"num_key_value_heads": 2, "head_dim": 8}
_GEMMA = _GROUPED | {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 50,
    "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_EXPERTS = _MODEL | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
_LATENT = _EXPERTS | {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
}  # fmt: skip
_RELATIVE = _MODEL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}

#: name -> (family, settings, architecture)
LAYOUTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma3n": ("Gemma3nText", _GEMMA | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4,
                "intermediate_size": [64] * 4}, "Gemma3nForCausalLM"),
    "gemma4": ("Gemma4Text", _GEMMA | {"global_head_dim": 16}, "Gemma4ForCausalLM"),
    "gemma4-keys-are-values": ("Gemma4Text", _GEMMA | {"num_hidden_layers": 2, "num_kv_shared_layers": 0,
                               "attention_k_eq_v": True, "num_global_key_value_heads": 2, "global_head_dim": 16,
                               "layer_types": ["sliding_attention", "full_attention"]}, "Gemma4ForCausalLM"),
    "qwen3_next": ("Qwen3Next", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16, "layer_types": ["full_attention"]}, "Qwen3NextForCausalLM"),
    "deepseek_v3": ("DeepseekV3", _LATENT, "DeepseekV3ForCausalLM"),
    "deepseek_v2-one-query-factor": ("DeepseekV2", _LATENT | {"q_lora_rank": None, "topk_method": "greedy"},
                                     "DeepseekV2ForCausalLM"),
    "deepseek_v4": ("DeepseekV4", _MODEL | {"head_dim": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "o_groups": 2,
                    "o_lora_rank": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                    "layer_types": ["sliding_attention"]}, "DeepseekV4ForCausalLM"),
    "jetmoe": ("JetMoe", {"hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 8,
               "intermediate_size": 32, "num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": 50,
               "pad_token_id": 0}, "JetMoeForCausalLM"),
    "xlnet": ("XLNet", {"d_model": 32, "n_head": 4, "n_layer": 1, "d_inner": 64, "vocab_size": 50}, "XLNetModel"),
    "levit": ("Levit", {"image_size": 128, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
              "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, "LevitModel"),
    "convbert": ("ConvBert", _MODEL | {"head_ratio": 2}, "ConvBertModel"),
    "funnel": ("Funnel", {"vocab_size": 50, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64,
               "block_sizes": [1, 1], "num_decoder_layers": 1}, "FunnelModel"),
    "deberta": ("Deberta", _RELATIVE, "DebertaModel"),
    "deberta_v2": ("DebertaV2", _RELATIVE, "DebertaV2Model"),
    "moshi": ("Moshi", _MODEL | {"ffn_dim": 64}, "MoshiModel"),
    "cpmant": ("CpmAnt", {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64,
               "num_hidden_layers": 1}, "CpmAntModel"),
}  # fmt: skip
#: Attention layers in each, where it is not one.
LAYERS = {"gemma3n": 4, "gemma4": 4, "gemma4-keys-are-values": 2, "levit": 5, "funnel": 3}


def build_layout(name: str) -> nn.Module:
    """The model of a layout, with weights that tell heads apart."""
    transformers = needs.package("transformers")
    family, settings, architecture = LAYOUTS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # transformers 5.0 with torch 2.13
        if not hasattr(transformers, architecture):
            pytest.skip(needs.OLD_TRANSFORMERS)
        config = getattr(transformers, f"{family}Config")(**settings, attn_implementation="eager")
        model = getattr(transformers, architecture)(config)
    return (
        prepared(model.double(), 0.7) if name == "levit" else prepared(model)
    )  # the softmax of LeViT is soon one token
