import pytest
import torch

from rankdecay.lab.ensemble import transformer


@pytest.fixture
def batches_seen(monkeypatch):
    """Tokens of every batch an ensemble trains on, each (members, batch, positions)."""
    seen: list[torch.Tensor] = []
    original = transformer.forward

    def spy(parameters, tokens, *arguments, **keywords):
        seen.append(tokens.clone())
        return original(parameters, tokens, *arguments, **keywords)

    monkeypatch.setattr(transformer, "forward", spy)
    return seen
