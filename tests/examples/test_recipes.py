"""Every block of the guides on trainers, optimizers and resuming runs as it stands, on a model that it decays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.decay.attachment import attached
from rankdecay.dtensor import unwrapped
from tests import needs
from tests.walked import python_blocks

transformers = needs.package("transformers")

# Lightning 2.6 with torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")

#: Pages whose first block of Python makes what the others use.
PAGES = ("trainers", "optimizers", "resuming")


def blocks(page: str) -> list[str]:
    """The Python of a guide that runs here."""
    return python_blocks(f"docs/guides/{page}.md")


BLOCKS = [pytest.param(page, number, id=f"{page}-{number}") for page in PAGES for number in range(1, len(blocks(page)))]


def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    ids = torch.randint(8, (4, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def trained(known: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The model and the optimizer that a block has left behind."""
    if "module" in known:
        return known["module"].model, known["module"].optimizers(use_pl_optimizer=False)
    if "trainer" in known:
        return known["trainer"].model, known["trainer"].optimizer
    return known["model"], known.get("muon") or known["optimizer"]


@pytest.mark.parametrize(("page", "number"), BLOCKS)
def test_block_runs_and_leaves_a_decay(page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"__name__": "__main__"}
    for block in (blocks(page)[0], blocks(page)[number]):
        exec(compile(block, page, "exec"), known)
        if "optimizer" in known:  # of a page that attaches in its first block
            train(known["model"], known["optimizer"])
    model, optimizer = trained(known)
    [layer] = rd.find_attention(model)
    assert layer.query.tensor().abs().min() > 0
    if "callback" in known:  # which has detached
        assert set(known["callback"].attachment.state_dict().values()) == {0, 2}
        rd.attach(optimizer, model, **known["callback"].keywords)
    elif "module" in known:  # the callback of Lightning, which has detached when its last fit ended
        assert 2 in known["decay"].state_dict()["counts"].values()
        rd.attach(optimizer, model, **known["decay"].arguments)
    [attachment] = [each for each in attached() if each.optimizer is unwrapped(optimizer)]
    attachment.set(query_key=rd.LowRank(100.0))
    for group in optimizer.param_groups:
        group["lr"] = 1.0  # more than every singular value
    with pytest.warns(UserWarning, match="at 1 or more a weight vanishes within a few steps"):
        train(model, optimizer)
    assert (layer.query.tensor() == 0).all()
    assert (layer.value.tensor() != 0).any()
