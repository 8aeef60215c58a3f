"""Every block of docs/guides/trainers.md runs as it stands, on a model that it decays.

But those fenced `Python`, for packages that no registry has or that cannot run here: those were run by hand.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankdecay as rd
from rankdecay.decay.attachment import attached
from rankdecay.dtensor import unwrapped
from tests import needs

transformers = needs.package("transformers")

# Lightning 2.6 with torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trainers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def make_model() -> nn.Module:
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    ids = torch.randint(8, (4, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def names(block: str, folder: Path) -> dict[str, Any]:
    """What the page says a block may use."""
    model = make_model()
    ids = torch.randint(8, (16, 8))
    known: dict[str, Any] = {"torch": torch, "rd": rd, "copy": copy, "model": model, "make_model": make_model}
    known |= {"path": folder / "saved.pt", "dataset": [{"input_ids": row, "labels": row} for row in ids]}
    if "Trainer" in block and "L." not in block:
        needs.package("accelerate")
        known["Trainer"] = transformers.Trainer
        known["arguments"] = transformers.TrainingArguments(
            str(folder), max_steps=2, report_to="none", dataloader_pin_memory=False, disable_tqdm=True
        )
    if "L." in block:
        known["L"] = L = needs.package("lightning")
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        known["make_trainer"] = lambda **how: L.Trainer(max_steps=2, log_every_n_steps=1, **quiet, **how)
        known["loader"] = torch.utils.data.DataLoader(ids, batch_size=4)
    if "plain_optimizer" in block:
        known["plain_optimizer"] = torch.optim.AdamW(rd.param_groups(model, rd.Frobenius(0.1)), lr=1e-3)
        train(model, known["plain_optimizer"])
    if not any(part in block for part in ("rd.param_groups", "= torch.optim.", "RankDecay", "L.")):
        known["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-3)
        known["attachment"] = rd.attach(known["optimizer"], model, query_key=rd.LowRank(0.1))
        train(model, known["optimizer"])
    return known


def trained(known: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The model and the optimizer that a block has left behind."""
    if "trainer" in known:
        return known["trainer"].model, known["trainer"].optimizer
    if "module" in known:
        return known["module"].model, known["module"].optimizers(use_pl_optimizer=False)
    return known["model"], known.get("muon") or known["optimizer"]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs_and_leaves_a_decay(block: str, tmp_path: Path) -> None:
    for module in re.findall(r"^from (\w+)", block, flags=re.MULTILINE):
        if module in ("trl", "timm"):
            pytest.skip(needs.BY_HAND.format(module))
    known = names(block, tmp_path)
    exec(compile(block, str(PAGE), "exec"), known)
    model, optimizer = trained(known)
    [layer] = rd.find_attention(model)
    assert layer.query.tensor().abs().min() > 0
    if "callback" in known:  # which has detached
        assert set(known["callback"].attachment.state_dict().values()) == {0, 2}
        rd.attach(optimizer, model, **known["callback"].keywords)
    elif "decay" in known:  # the callback of Lightning, which has detached when its last fit ended
        assert 2 in known["decay"].state_dict()["counts"].values()
        rd.attach(optimizer, model, **known["decay"].arguments)
    [attachment] = [each for each in attached() if each.optimizer is unwrapped(optimizer)]
    attachment.set(query_key=rd.LowRank(100.0))
    for group in optimizer.param_groups:
        group["lr"] = 1.0  # more than every singular value
    train(model, optimizer)
    assert (layer.query.tensor() == 0).all()
    assert (layer.value.tensor() != 0).any()
