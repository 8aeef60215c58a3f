"""A smaller head for a model that one has, healed with transformers.Trainer, beside the original trained as long.

    python examples/compress_pretrained.py MODEL --head-dim 48 --text FILE
    python examples/compress_pretrained.py MODEL --head-dim 48 --text FILE --teacher  # the original's logits as targets
    python examples/compress_pretrained.py MODEL --head-dim 48 --text FILE --control  # the original, trained as long

MODEL is a directory of `save_pretrained` with its tokenizer, in full precision; FILE any text like that of the model's
training, whose last tenth is for measuring. Without a text it is the modules of Python's standard library. The healed
model is in --out, an ordinary checkpoint. On a CPU a step of 512 tokens of 135 million parameters takes seconds.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import rankdecay as rd


def windows_of_text(tokenizer, path, length, most=10_000):
    """Windows of a text to train on, and others to measure with: (windows, length) each."""
    if path is None:
        library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "\n".join(file.read_text(errors="replace") for file in library[::4])
    else:
        text = Path(path).read_text(errors="replace")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // length * length].view(-1, length)[:most]
    last = max(1, len(windows) // 10)
    order = torch.randperm(len(windows) - last, generator=torch.Generator().manual_seed(0))
    return windows[:-last][order], windows[-last:]


@torch.no_grad()
def loss_on(model, windows):
    """Nats per token."""
    model.eval()
    each = [model(input_ids=row[None], labels=row[None], use_cache=False).loss for row in windows]
    return float(torch.stack(each).mean())


class Healer(Trainer):
    """Trainer with the original as a teacher: the smaller model learns its distribution beside the next token."""

    def __init__(self, *arguments, teacher=None, **more):
        super().__init__(*arguments, **more)
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        loss = outputs.loss
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits.log_softmax(-1)
            logits = outputs.logits.log_softmax(-1).flatten(0, 1)
            loss = (loss + F.kl_div(logits, wanted.flatten(0, 1), log_target=True, reduction="batchmean")) / 2
        return (loss, outputs) if return_outputs else loss


def heal(model, windows, directory, *, steps, batch_size=2, lr=1e-4, teacher=None):
    """Train a model on windows of a text in place."""
    set_seed(0)
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        warmup_steps=max(1, steps // 20),
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        logging_steps=max(1, steps // 8),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    examples = [{"input_ids": row, "labels": row} for row in windows]
    Healer(model, arguments, train_dataset=examples, teacher=teacher).train()
    return model


def main(
    model,
    head_dim,
    directory="runs/compress_pretrained",
    text=None,
    steps=200,
    teacher=False,
    control=False,
    window=256,
    windows=12,
    measured=32,
    batch_size=2,
    lr=1e-4,
):
    tokenizer = AutoTokenizer.from_pretrained(model)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    training, validation = windows_of_text(tokenizer, text, window)
    validation = validation[:measured]
    before = loss_on(original, validation)
    print(f"{model}: loss {before:.4f} on {validation.numel()} tokens of text that nothing is chosen by or trained on")
    if control:
        healed = original
    else:
        # Planes and values are chosen on training text; the rest of the original is in the smaller one as it is.
        healed = rd.compress(original, head_dim, calibration=training[:windows], sizes=[], progress=progress)
        print(f"\nhead {healed.compression.head_dim} → {head_dim}: loss {loss_on(healed, validation):.4f} at once")
    heal(
        healed,
        training[windows:],
        directory,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        teacher=original if teacher and not control else None,
    )
    after = loss_on(healed, validation)
    print(f"{'the original' if control else f'head {head_dim}'} after {steps} steps: loss {after:.4f}")
    if not control:
        healed.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return before, after


def progress(what, done, of):
    print(f"\r{what}: {done} of {of} ", end="", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--text")
    parser.add_argument("--out", default="runs/compress_pretrained")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--teacher", action="store_true")
    parser.add_argument("--control", action="store_true", help="train the original instead, as long")
    given = parser.parse_args()
    main(
        given.model, given.head_dim, given.out, given.text, given.steps, given.teacher, given.control, given.window,
        lr=given.lr,
    )  # fmt: skip
