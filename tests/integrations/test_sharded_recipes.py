"""The blocks of docs/guides/distributed.md that several processes run together, fenced `py`: each as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd
from tests.ranks import on_ranks

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trainers.md"
BLOCKS = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, **sizes) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def run_the_blocks(path: str) -> list[float]:
    """One after the other; then a step that decays all there is of W_Q and W_K. Returns their norms after it."""
    torch.manual_seed(0)
    known: dict[str, Any] = {"torch": torch, "rd": rd, "model": Model(), "path": path}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), known)
    model, optimizer = known["model"], known["optimizer"]
    known["attachment"].set(query_key=rd.LowRank(100.0))
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    model(torch.ones(1, 3, 8)).sum().backward()
    optimizer.step()
    return [float(view.tensor().norm()) for layer in rd.find_attention(model) for view in (layer.query, layer.key)]


def test_the_blocks_run_and_leave_a_decay(tmp_path: Path) -> None:
    assert len(BLOCKS) == 2
    for norms in on_ranks(2, run_the_blocks, str(tmp_path / "saved")):
        assert norms == pytest.approx([0.0] * 4, abs=1e-12)
