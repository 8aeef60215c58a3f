"""Low-rank decay in an Accelerate loop, with checkpoints to resume from.

    python examples/accelerate_loop.py                               # 60 steps, checkpoints in runs/accelerate_loop
    python examples/accelerate_loop.py runs/accelerate_loop/step_40  # continues from one of them
    accelerate launch --num_processes 2 examples/accelerate_loop.py  # every replica decays its copy in the same way

It takes a few seconds on one core, most of them to import transformers.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

import rankdecay as rd

ACCUMULATE = 2


def make_sequences(count: int) -> torch.Tensor:
    """Three random tokens again and again: from the fourth on, the model can look back at what comes next."""
    three = torch.randint(32, (count, 3), generator=torch.Generator().manual_seed(0))
    return three.repeat(1, 5)


def main(steps=60, directory="runs/accelerate_loop", strength=3.0, resume=None):
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 15}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps * accelerator.num_processes)
    sequences = make_sequences(steps * ACCUMULATE * 16 * accelerator.num_processes)
    loader = torch.utils.data.DataLoader(sequences, batch_size=16)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    # Low rank for W_Q and W_K; the rest keeps weight_decay. With every=3, three steps are decayed in one go: cheaper.
    # Before or after `prepare` makes no difference. After it, a set-up that cannot be decayed says so at once.
    attachment = rd.attach(optimizer, model, query_key=rd.LowRank(strength, every=3))

    step = 0
    if resume is not None:
        accelerator.load_state(resume)
        step = int(Path(resume).name.removeprefix("step_"))
        loader = accelerator.skip_first_batches(loader, step * ACCUMULATE)

    accelerator.print(f"Step {step}:\n{attachment.describe(ranks=True)}\n")
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()  # does nothing, and decays nothing, until the gradients are complete
            scheduler.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        if accelerator.sync_gradients and step % 20 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
            accelerator.save_state(str(Path(directory) / f"step_{step}"))
    accelerator.print(f"\nStep {step}:\n{attachment.describe(ranks=True)}")
    return accelerator.unwrap_model(model), optimizer.optimizer


if __name__ == "__main__":
    main(resume=sys.argv[1] if len(sys.argv) > 1 else None)
