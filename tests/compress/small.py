"""A small Llama and Qwen3 whose attention matters, in a directory and alive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import needs

VOCABULARY = 50


def model(kind: str = "Llama", seed: int = 0, **settings: Any) -> Any:
    """Return a model of two layers, heads of 16, with matrices large enough that scores differ."""
    transformers = needs.package("transformers")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings,
        }
    )  # fmt: skip
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return made


def saved(folder: Path, kind: str = "Llama", **settings: Any) -> Path:
    """Return a directory with a model."""
    model(kind, **settings).save_pretrained(folder)
    return folder


def tokens(windows: int = 4, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Return windows of tokens, (windows, length)."""
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def text_tokenizer(folder: Path) -> Any:
    """Return a tokenizer with a token for each word of a few, saved in a directory."""
    transformers = needs.package("transformers")
    tokenizers = needs.package("tokenizers")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w3", pad_token="w0")
    fast.save_pretrained(folder)
    return fast
