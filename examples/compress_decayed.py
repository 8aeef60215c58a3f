"""The way to a smaller head that costs nothing at the cut: decay rotary planes and values to zero, then leave them out.

    python examples/compress_decayed.py                # a small Llama, about five minutes on two slow cores
    python examples/compress_decayed.py --model qwen3  # the same with QK-norm

A model learns the bytes of some modules of Python's standard library, and goes on under two decays: `Planes` takes the
weakest rotary planes of W_Q and W_K to zero, the same ones in all layers, and `LowRank` all but the d' strongest
directions of each key head's W_V and each query head's W_O. `rd.compress` then drops zeros alone: the logits stay
what they were; what it writes is an ordinary checkpoint, which `from_pretrained` loads without this library. It is
checked, generates, and is trained on.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rankdecay as rd

KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def read_bytes(files=40):
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: file.stat().st_size)
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in library[-files:])), dtype=torch.uint8)


def windows_of(text, count, length, seed):
    starts = torch.randint(len(text) - length, (count, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(length)].long()


def train(model, text, steps, lr, decays=None, length=128):
    """Train with AdamW on a cosine that ends at a tenth of the learning rate, under the decays of some roles."""
    groups = rd.param_groups(model, rd.Frobenius(0.1), **(decays or {}))
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 10)
    attachment = rd.attach(optimizer)
    model.train()
    for step in range(steps):
        windows = windows_of(text, 8, length, step)
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if decays:
        print(attachment.describe(ranks=True))
    attachment.detach()
    return model.eval()


@torch.no_grad()
def loss_on(model, windows):
    return float(model(input_ids=windows, labels=windows).loss)


@torch.no_grad()
def generate(model, prompt, **options):
    tokens = torch.tensor([list(prompt.encode())])
    mask = torch.ones_like(tokens)
    made = model.generate(tokens, attention_mask=mask, max_new_tokens=48, do_sample=False, pad_token_id=0, **options)
    return bytes(made[0].tolist()).decode(errors="replace")


def main(
    kind="llama",
    head_dim=16,
    directory="runs/compress_decayed",
    steps=(300, 200, 100),
    strength=30.0,
    lr=2e-3,
    width=128,
    layers=4,
    heads=4,
    original_head_dim=32,
):
    """Train for some steps, under the decay for others, and after the cut for the last; return what was measured."""
    torch.manual_seed(0)
    config, model_class = KINDS[kind]
    model = model_class(
        config(
            vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=original_head_dim,
            max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    text = read_bytes()
    text, validation = text[:-100_000], windows_of(text[-100_000:], 16, 128, seed=-1)

    train(model, text, steps[0], lr)
    print(f"trained: loss {loss_on(model, validation):.4f}")

    # What stays is named in the units of an ordinary checkpoint: d'/2 planes for the whole model, d' directions a head.
    # Query heads share the W_V of a key head, so that rank d' there is what makes W_O W_V low rank in all of them.
    decays = {
        "query_key": rd.Planes(strength, keep=head_dim // 2, scope="model"),
        "value_output": rd.LowRank(strength, keep=head_dim, unit="head"),
    }
    train(model, text, steps[1], lr / 2, decays)
    whole = loss_on(model, validation)
    print(f"with {head_dim // 2} planes and {head_dim} directions of the values left: loss {whole:.4f}")

    # A text decides nothing here, since there are zeros enough to drop; it would if some planes had not vanished.
    small = rd.compress(model, head_dim, directory, calibration=windows_of(text, 4, 128, seed=-2), sizes=[])
    print(f"cut: exact is {small.compression.exact}; planes kept: {small.compression.kept['all']}")

    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits, expected = loaded(validation).logits, model(validation).logits
        cached = [m(validation[:1], use_cache=True).past_key_values for m in (loaded, model)]
    error = float((logits - expected).norm() / expected.norm())
    new, old = (sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) for cache in cached)
    print(
        f"{type(loaded).__name__} of {directory}: relative error of the logits {error:.1e}, cache {new / old:.3f} of it"
    )
    print(generate(loaded, "import "))
    assert generate(loaded, "import ") == generate(loaded, "import ", use_cache=False)

    cut = loss_on(loaded, validation)
    train(loaded, text, steps[2], lr / 4)
    healed = loss_on(loaded, validation)
    print(f"loss {cut:.4f} at the cut, {healed:.4f} after {steps[2]} steps more")
    return {"exact": small.compression.exact, "error": error, "cache": new / old, "cut": cut - whole, "healed": healed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=KINDS, default="llama")
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--out", default="runs/compress_decayed")
    given = parser.parse_args()
    main(given.model, given.head_dim, given.out)
