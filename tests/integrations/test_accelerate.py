"""Decays by role in Accelerate loops: before or after `prepare`, with accumulation, saved in the middle of a cycle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rankdecay as rd
from tests import needs
from tests.ranks import on_ranks

accelerate = needs.package("accelerate")

SAVED, STEPS = 4, 7  # every=3: the cycle is at 1 of 3 when it is saved
ROLES = {"query_key": rd.LowRank(2.0, every=3), "value_output": rd.Frobenius(0.0)}
BATCHES = torch.randn(STEPS, 4, 5, 8, generator=torch.Generator().manual_seed(1))  # of each, half in each process


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch.flip(1)).square().mean()


def alone() -> dict[str, np.ndarray]:
    """The weights without Accelerate."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rd.attach(optimizer, model, **ROLES)
    for batch in BATCHES.double():
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


def train(order: str, passes: int, folder: str) -> dict[str, np.ndarray]:
    """In this process, or in each of several; in two runs, where the second goes on from the first."""
    for start, stop in ((0, SAVED), (SAVED, STEPS)):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=passes)
        model = made = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if order == "before":
            attachment = rd.attach(optimizer, model, **ROLES)
        model, wrapped = accelerator.prepare(model, optimizer)
        if order == "after":
            attachment = rd.attach(wrapped, model, **ROLES)
        if start:
            accelerator.load_state(folder)
        if order == "last":
            attachment = rd.attach(wrapped, model, **ROLES)
        each = 4 // accelerator.num_processes
        for batch in BATCHES[start:stop].double():
            mine = batch[accelerator.process_index * each :][:each]
            for part in torch.arange(passes):
                with accelerator.accumulate(model):
                    chunk = mine if passes > each else mine.chunk(passes)[part]
                    accelerator.backward(loss_of(model, chunk))
                    wrapped.step()
                    wrapped.zero_grad()
        [steps] = {n for key, n in attachment.state_dict().items() if key.endswith("query_key_steps")}
        assert steps == stop
        if not start:
            accelerator.save_state(folder)
            accelerator.wait_for_everyone()
        attachment.detach()
        accelerator.free_memory()
    return {name: weight.numpy() for name, weight in made.state_dict().items()}


@pytest.mark.parametrize("order", ["before", "after", "last"])
@pytest.mark.parametrize("passes", [1, 2, 12])
def test_goes_on_in_the_middle_of_a_cycle(order: str, passes: int, tmp_path: Path) -> None:
    """Warnings are errors here; that no step had come after ten of twelve passes would be one."""
    weights, expected = train(order, passes, str(tmp_path)), alone()
    for name in expected:
        np.testing.assert_allclose(weights[name], expected[name], rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("order", ["before", "after"])
def test_every_replica_decays_its_copy(order: str, tmp_path: Path) -> None:
    expected = alone()
    for weights in on_ranks(2, train, order, 2, str(tmp_path)):
        for name in expected:
            np.testing.assert_allclose(weights[name], expected[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_step_that_never_comes_is_still_noticed() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rd.attach(optimizer, model, **ROLES)
    model = accelerator.prepare(model)
    for _ in range(9):
        accelerator.backward(loss_of(model, BATCHES[0].double()))
    loss = loss_of(model, BATCHES[0].double())
    with pytest.warns(UserWarning, match=r"10 backward passes without a step\(\)"):
        accelerator.backward(loss)
