"""Low-rank decay in a LightningModule, with checkpoints to resume from.

    python examples/lightning_module.py                                             # 60 steps, with checkpoints
    python examples/lightning_module.py runs/lightning_module/epoch=1-step=40.ckpt  # continues from one of them

It takes a few seconds on one core, most of them to import Lightning and transformers.
"""

import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

import rankdecay as rd
from rankdecay.integrations.lightning import RankDecay


def make_sequences(count: int) -> torch.Tensor:
    """Three random tokens again and again: from the fourth on, the model can look back at what comes next."""
    three = torch.randint(32, (count, 3), generator=torch.Generator().manual_seed(0))
    return three.repeat(1, 5)


class CopyTask(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 15}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))

    def training_step(self, batch, batch_index):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ShowRanks(L.Callback):
    def __init__(self, decay: RankDecay) -> None:
        self.decay = decay

    def on_train_start(self, trainer, task):
        print(f"Step {trainer.global_step}:\n{self.decay.attachments[0].describe(ranks=True)}\n")

    def on_train_end(self, trainer, task):
        print(f"\nStep {trainer.global_step}:\n{self.decay.attachments[0].describe(ranks=True)}")


def main(epochs=3, directory="runs/lightning_module", strength=3.0, resume=None):
    L.seed_everything(0)
    task = CopyTask()
    # Low rank for W_Q and W_K, the optimizer's own L2 for the rest. With every=3, three steps are decayed in one go.
    decay = RankDecay(query_key=rd.LowRank(strength, every=3))
    loader = torch.utils.data.DataLoader(make_sequences(640), batch_size=16)
    trainer = L.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,  # 40 batches, 20 steps an epoch; the decay follows the steps
        callbacks=[decay, ShowRanks(decay), ModelCheckpoint(directory, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(task, loader, ckpt_path=resume)
    return task.model, task.optimizers(use_pl_optimizer=False)


if __name__ == "__main__":
    main(resume=sys.argv[1] if len(sys.argv) > 1 else None)
