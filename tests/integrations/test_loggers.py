"""Monitor's figures in TensorBoard, W&B, trackio, read back with their own packages, and in the terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.integrations.loggers import TensorBoard, Terminal, Trackio, WandB
from tests import needs
from tests.integrations.logged import EVERY, STEPS
from tests.waiting import HANG

SCRIPT = Path(__file__).with_name("logged.py")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the three packages stored of one training, without a network."""
    needs.loggers()
    folder = tmp_path_factory.mktemp("loggers")
    offline = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), str(folder)],
        cwd=folder, env=os.environ | offline, capture_output=True, text=True, check=False, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_ranks_and_spectra_are_stored_by_step(name: str, stored: dict[str, Any]) -> None:
    found = stored[name]
    steps = [str(step) for step in range(EVERY, STEPS + 1, EVERY)]
    assert list(found["scalars"]) == list(found["histograms"]) == steps
    assert list(found["scalars"].values()) == pytest.approx(found["plain"], rel=1e-6)
    assert found["plain"][-1] < found["plain"][0]
    assert list(found["histograms"].values()) == [16] * len(steps)  # two heads of eight singular values


# --- the terminal ---


def attention(singular_values: list[float]) -> nn.MultiheadAttention:
    """One head whose product W_Kᵀ W_Q has these singular values, and no biases."""
    model = nn.MultiheadAttention(len(singular_values), 1, bias=False)
    with torch.no_grad():
        eye = torch.eye(len(singular_values))
        model.in_proj_weight.copy_(torch.cat([torch.diag(torch.tensor(singular_values)), eye, eye]))
        model.out_proj.weight.copy_(eye)
    return model


def test_the_terminal_draws_a_line_per_product() -> None:
    file = io.StringIO()
    rd.Monitor(attention([1.0, 0.5, 0.25, 0.0]), every=1, log=Terminal(file)).step()
    first, second = file.getvalue().splitlines()
    assert first == "step      1  attention/query_key     █▅▃·  effective rank 2.6"
    assert second == "step      1  attention/value_output  ████  effective rank 4"


def test_a_terminal_without_blocks_gets_levels_in_ascii() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    rd.Monitor(attention([1.0, 0.5, 0.25, 0.0]), every=1, log=Terminal(file), of="query_key").step()
    file.flush()
    assert raw.getvalue() == b"step      1  attention/query_key  @+-.  effective rank 2.6\n"


def test_a_plain_callable_gets_no_spectra() -> None:
    received: list[dict[str, float]] = []
    rd.Monitor(attention([1.0, 0.5]), every=1, log=received.append).step()
    assert all(isinstance(value, int | float) for value in received[0].values())


def test_a_weight_that_is_not_finite_leaves_its_histogram_out() -> None:
    model = attention([1.0, 0.5])
    with torch.no_grad():
        model.in_proj_weight[0, 0] = torch.nan

    class Writer:
        def __init__(self) -> None:
            self.histograms: list[str] = []

        def add_scalar(self, *_: object) -> None: ...

        def add_histogram(self, name: str, *_: object) -> None:
            self.histograms.append(name)

    writer = Writer()
    rd.Monitor(model, every=1, log=TensorBoard(writer)).step()
    assert writer.histograms == ["spectrum/attention/value_output"]
    file = io.StringIO()
    rd.Monitor(model, every=1, log=Terminal(file), of="query_key").step()
    assert "nan" in file.getvalue().lower()


def test_trackio_wants_something_to_call() -> None:
    with pytest.raises(TypeError, match=r"Trackio\(trackio.log\)"):
        Trackio("project")
    assert WandB.takes_spectra
