"""Low-rank decay in a plain PyTorch loop, with checkpoints to resume from.

    python examples/plain_loop.py                             # 60 steps, checkpoints in runs/plain_loop
    python examples/plain_loop.py runs/plain_loop/step_40.pt  # continues from one of them

It takes a few seconds on one core, most of them to import transformers.
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import rankdecay as rd


def make_batch(step: int) -> torch.Tensor:
    """Three random tokens again and again: from the fourth on, the model can look back at what comes next.

    Drawn from the step alone, so that a resumed run goes on with the batches it would have had.
    """
    three = torch.randint(32, (32, 3), generator=torch.Generator().manual_seed(step))
    return three.repeat(1, 5)


def main(steps=60, directory="runs/plain_loop", strength=3.0, resume=None):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 15, "n_embd": 64, "n_layer": 2, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # else random states belong in checkpoints
    model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0))

    # Low rank for W_Q and W_K, L2 for every other matrix. With every=3, three steps are decayed in one go: cheaper.
    groups = rd.param_groups(model, rd.Frobenius(0.1), query_key=rd.LowRank(strength, every=3))
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    attachment = rd.attach(optimizer)  # decays after each optimizer.step() from now on
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    trained = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    start = 0
    if resume is not None:
        saved = torch.load(resume, weights_only=True)
        start = saved.pop("step")
        for name, state in saved.items():
            trained[name].load_state_dict(state)

    print(f"Step {start}:\n{attachment.describe(ranks=True)}\n")
    for step in range(start, steps):
        batch = make_batch(step)
        logits = model(batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:  # not a multiple of 3: the optimizer's state says how far the decay's cycle is
            print(f"step {step + 1}: loss {loss.item():.3f}")
            Path(directory).mkdir(parents=True, exist_ok=True)
            states = {name: part.state_dict() for name, part in trained.items()}
            torch.save({"step": step + 1, **states}, Path(directory) / f"step_{step + 1}.pt")
    print(f"\nStep {steps}:\n{attachment.describe(ranks=True)}")
    return model, optimizer


if __name__ == "__main__":
    main(resume=sys.argv[1] if len(sys.argv) > 1 else None)
