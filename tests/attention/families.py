"""Small real models of every family, built from their configurations, each with an input to run it on.

Positions are all zero where a model has rotary embeddings: rotation by nothing, so that what enters the score product
is the query as the projection formed it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TOKENS = 7
VOCABULARY = 50

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 32,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

#: name -> (configuration class, settings, model class, attention layers)
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "gpt2": ("GPT2Config", _GPT, "GPT2LMHeadModel", 2),
    "gpt2-cross": ("GPT2Config", _GPT | {"add_cross_attention": True}, "GPT2LMHeadModel", 4),
    "gpt_bigcode-multi-query": ("GPTBigCodeConfig", _GPT | {"multi_query": True}, "GPTBigCodeForCausalLM", 2),
    "gpt_bigcode-multi-head": ("GPTBigCodeConfig", _GPT | {"multi_query": False}, "GPTBigCodeForCausalLM", 2),
    "gpt_neox": ("GPTNeoXConfig", _COMMON, "GPTNeoXForCausalLM", 2),
    "falcon-grouped": (
        "FalconConfig",
        _COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        "FalconForCausalLM",
        2,
    ),
    "falcon-multi-head": (
        "FalconConfig",
        _COMMON | {"new_decoder_architecture": False, "multi_query": False},
        "FalconForCausalLM",
        2,
    ),
    "falcon-multi-query": (
        "FalconConfig",
        _COMMON | {"new_decoder_architecture": False, "multi_query": True},
        "FalconForCausalLM",
        2,
    ),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": VOCABULARY},
        "BloomForCausalLM",
        2,
    ),
    "gptj": ("GPTJConfig", _GPT | {"rotary_dim": 4}, "GPTJForCausalLM", 2),
    "codegen": ("CodeGenConfig", _GPT | {"rotary_dim": 4}, "CodeGenForCausalLM", 2),
    "opt": ("OPTConfig", _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "OPTForCausalLM", 2),
    "llama": ("LlamaConfig", _GROUPED, "LlamaForCausalLM", 2),
    "mistral": ("MistralConfig", _GROUPED, "MistralForCausalLM", 2),
    "qwen2": ("Qwen2Config", _GROUPED, "Qwen2ForCausalLM", 2),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 16}, "Qwen3ForCausalLM", 2),
    "gemma2": ("Gemma2Config", _GROUPED | {"head_dim": 16}, "Gemma2ForCausalLM", 2),
    "gemma3": ("Gemma3TextConfig", _GROUPED | {"head_dim": 16}, "Gemma3ForCausalLM", 2),
    "olmo2": ("Olmo2Config", _GROUPED, "Olmo2ForCausalLM", 2),
    "phi3": ("Phi3Config", _GROUPED, "Phi3ForCausalLM", 2),
    "persimmon": ("PersimmonConfig", _COMMON, "PersimmonForCausalLM", 2),
    "mpt": (
        "MptConfig",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY, "max_seq_len": 32},
        "MptForCausalLM",
        2,
    ),
    "bert": ("BertConfig", _COMMON, "BertModel", 2),
    "bert-decoder": ("BertConfig", _COMMON | {"is_decoder": True}, "BertLMHeadModel", 2),
    "roberta": ("RobertaConfig", _COMMON, "RobertaModel", 2),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64, "vocab_size": VOCABULARY},
        "DistilBertModel",
        2,
    ),
    "modernbert": ("ModernBertConfig", _COMMON | {"cls_token_id": 1, "sep_token_id": 2}, "ModernBertModel", 2),
    "vit": (
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "image_size": 16,
            "patch_size": 8,
        },
        "ViTModel",
        2,
    ),
    "clip": (
        "CLIPConfig",
        {
            "text_config": _COMMON,
            "vision_config": {
                "hidden_size": 48,
                "num_attention_heads": 3,
                "num_hidden_layers": 2,
                "intermediate_size": 64,
                "image_size": 16,
                "patch_size": 8,
            },
        },
        "CLIPModel",
        4,
    ),
    "t5": (
        "T5Config",
        {"d_model": 32, "d_kv": 16, "num_heads": 4, "num_layers": 2, "d_ff": 64, "vocab_size": VOCABULARY},
        "T5ForConditionalGeneration",
        6,
    ),
    "bart": ("BartConfig", _ENCODER_DECODER, "BartForConditionalGeneration", 3),
    "whisper": (
        "WhisperConfig",
        _ENCODER_DECODER | {"max_source_positions": 4, "max_target_positions": 16, "num_mel_bins": 8},
        "WhisperForConditionalGeneration",
        3,
    ),
}

#: Families that turn queries and keys by a position: run them all at position 0.
_ROTARY = {"gpt_neox", "gptj", "codegen", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3",
           "persimmon", "modernbert", "falcon-grouped", "falcon-multi-head", "falcon-multi-query"}  # fmt: skip


def build(name: str) -> nn.Module:
    """The model of a family, with random weights and random biases."""
    import transformers

    configuration, settings, architecture, _ = TRANSFORMERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**settings, attn_implementation="eager")
    return randomised(getattr(transformers, architecture)(config))


def randomised(model: nn.Module) -> nn.Module:
    """Weights of a size that tells heads apart, no bias at zero, no dropout."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or name.endswith("bias"):
                parameter.normal_(std=0.3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def run(name: str, model: nn.Module) -> None:
    """One forward pass on random input."""
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    inputs: dict[str, Any] = {"input_ids": ids}
    if name == "vit":
        inputs = {"pixel_values": images}
    elif name == "clip":
        inputs |= {"pixel_values": images}
    elif name in ("t5", "bart"):
        inputs |= {"decoder_input_ids": ids[:, :5]}
    elif name == "whisper":
        inputs = {"input_features": torch.randn(2, 8, 8), "decoder_input_ids": ids[:, :5]}
    elif name == "gpt2-cross":
        inputs |= {"encoder_hidden_states": torch.randn(2, 9, 32)}
    elif name in _ROTARY:
        inputs |= {"position_ids": torch.zeros_like(ids)}
    model(**inputs)
