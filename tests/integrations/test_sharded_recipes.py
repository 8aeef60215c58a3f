"""The blocks of docs/guides/distributed.md, which several processes run together: each as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd
from tests.ranks import on_ranks
from tests.walked import python_blocks

#: But the first, which joins the processes and makes the model.
BLOCKS = python_blocks("docs/guides/distributed.md")[1:]


def make_model() -> nn.Module:
    sizes: dict[str, Any] = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": True}
    return nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, **sizes) for _ in range(2)))


def run_the_blocks(path: str) -> list[float]:
    """One after the other; then a step that decays all there is of W_Q and W_K. Returns their norms after it."""
    torch.manual_seed(0)
    known: dict[str, Any] = {"torch": torch, "rd": rd, "model": make_model(), "path": path}
    for block in BLOCKS:
        exec(compile(block, "distributed.md", "exec"), known)
    model, optimizer = known["model"], known["optimizer"]
    known["attachment"].set(query_key=rd.LowRank(100.0))
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    model(torch.ones(1, 3, 16)).sum().backward()
    optimizer.step()
    return [float(view.tensor().norm()) for layer in rd.find_attention(model) for view in (layer.query, layer.key)]


def test_the_blocks_run_and_leave_a_decay(tmp_path: Path) -> None:
    assert len(BLOCKS) == 3
    for norms in on_ranks(2, run_the_blocks, str(tmp_path / "saved")):
        assert norms == pytest.approx([0.0] * 4, abs=1e-12)
