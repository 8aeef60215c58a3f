"""Low-rank decay with transformers.Trainer, with checkpoints to resume from.

    python examples/hf_trainer.py                                # 60 steps, checkpoints in runs/hf_trainer
    python examples/hf_trainer.py runs/hf_trainer/checkpoint-40  # continues from one of them

It takes a few seconds on one core, most of them to import transformers.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import rankdecay as rd
from rankdecay.integrations.transformers import RankDecay


def make_examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Three random tokens again and again: from the fourth on, the model can look back at what comes next."""
    three = torch.randint(32, (count, 3), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in three.repeat(1, 5)]


def main(steps=60, directory="runs/hf_trainer", strength=3.0, resume=None):
    set_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 15}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_dropout=0.1))

    # Low rank for W_Q and W_K; the rest keeps weight_decay. With every=3, three steps are decayed in one go: cheaper.
    callback = RankDecay(query_key=rd.LowRank(strength, every=3))

    arguments = TrainingArguments(
        directory,
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,  # the decay follows the optimizer: one per two batches
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="linear",  # the decay follows the learning rate too
        logging_steps=20,
        save_steps=20,
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=make_examples(960), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)  # attaches when it begins, detaches when it ends
    assert callback.attachment is not None
    print(f"\n{callback.attachment.describe(ranks=True)}")
    return model, trainer.optimizer.optimizer


if __name__ == "__main__":
    main(resume=sys.argv[1] if len(sys.argv) > 1 else None)
