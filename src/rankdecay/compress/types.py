"""Model types whose smaller head has been compared with the original, and what stands in the way of others."""

from __future__ import annotations

from rankdecay.checks import suggestion
from rankdecay.compress.reduction import NotReducible

CHECKED = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "qwen2", "olmo2", "granite", "smollm3", "cohere")
REASONS: dict[str, str] = {}


def check_type(model_type: str) -> None:
    if model_type in CHECKED:
        return
    reason = REASONS.get(model_type, "it has not been compared with its original")
    raise NotReducible(f"model type {model_type!r} cannot be compressed: {reason}. {suggestion(model_type, CHECKED)}")
