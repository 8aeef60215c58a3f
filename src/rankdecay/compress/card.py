"""The model card of a smaller checkpoint: from what, how chosen, what was dropped, what it costs, how to heal it."""

from __future__ import annotations

from pathlib import Path

from rankdecay.compress.result import Compression, size_table
from rankdecay.text import visible


def card(made: Compression) -> str:
    """Return the README.md of a compressed model."""
    assert made.new_head_dim is not None
    source = visible(Path(made.source).absolute().name)
    lost = next(size for size in made.sizes if size.head_dim == made.new_head_dim)
    first = made.sizes[0]
    before, after = made.parameters
    planes = [f"* {name}: {', '.join(map(str, kept))}" for name, kept in made.kept.items()]
    how = (
        "on a text: planes by the loss with one left out at a time, values on what enters the layers"
        if made.chosen_by == "loss"
        else "by the weights alone, without a text; expect a large loss before it is healed"
    )
    cost = "nothing but zeros was dropped: the logits are those of the original, up to the rounding of the weights"
    if not made.exact:
        cost = (
            f"the loss on {made.measured_on} that were not used to choose went from {first.loss:.4f} to "
            f"{lost.loss:.4f} nats a token"
            if lost.loss is not None and first.loss is not None
            else "it was not measured, since no text was given"
        )
    lines = [
        f"# {source} with heads of {made.new_head_dim}",
        "",
        f"Made from {source} ({made.model_type}, heads of {made.head_dim}) by `rankdecay compress`. It is an ordinary "
        "checkpoint: `AutoModelForCausalLM.from_pretrained` loads it, without any other code.",
        "",
        f"* Head size {made.head_dim} → {made.new_head_dim}; parameters {before:,} → {after:,}.",
        f"* KV cache {first.bytes_per_token:,} → {lost.bytes_per_token:,} bytes a token, keys and values together.",
        f"* Chosen {how}.",
        f"* Cost: {cost}.",
        "",
        "Rotary planes that stay, of those of the original:",
        "",
        *planes,
        "",
        "```",
        *size_table(made.sizes, made.measured_on),
        "```",
        "",
        "**To heal it**, train it on for some hundred steps on text like that of its first training, at a tenth of the "
        "first learning rate or less; the original as a teacher helps. Compare it with the original trained for the "
        "same steps.",
    ]
    return "\n".join([*lines, *(f"\nNote: {visible(note)}" for note in made.all_notes())]) + "\n"
