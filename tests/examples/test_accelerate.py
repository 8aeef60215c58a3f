"""Attaching before `prepare`, after it, to the wrapper or to what is in it: all the same run."""

import torch

import rankdecay as rd
from tests import needs

accelerate = needs.package("accelerate")


def train(attach_to: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    optimizer = torch.optim.AdamW(rd.param_groups(model, query_key=rd.LowRank(10.0, every=3)), lr=1e-2)
    if attach_to == "before prepare":
        rd.attach(optimizer)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    model, wrapper, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(torch.randn(32, 5, 8), batch_size=2)
    )
    if attach_to != "before prepare":
        rd.attach(wrapper if attach_to == "the wrapper" else optimizer)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward((model(batch) - batch.flip(1)).square().mean())
            wrapper.step()
            wrapper.zero_grad()
    [group] = [group for group in optimizer.param_groups if "query_key_rule" in group]
    return model.state_dict(), {key: group[key] for key in ("query_key_steps", "query_key_pending")}


def test_order_of_attach_and_prepare_does_not_matter() -> None:
    weights, state = train("before prepare")
    assert state["query_key_steps"] == 8  # 16 batches, two to a step
    for attach_to in ("the wrapper", "what it wraps"):
        others, its_state = train(attach_to)
        torch.testing.assert_close(others, weights, rtol=0, atol=0)
        assert its_state == state
