"""Write small checkpoints with a smaller head here, and read them with another version of transformers.

    python .ci/read_elsewhere.py write FOLDER     # with the package and transformers 5
    python .ci/read_elsewhere.py read FOLDER        # without the package, by any transformers

``read`` prints the largest difference of logits of each model, and fails above 1e-5 of the largest logit.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, __version__

FAMILIES = ("llama", "mistral", "qwen3", "gemma2")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TOKENS = torch.arange(20)[None] * 7 % 60


def write(folder: Path) -> None:
    """Write each model, with the logits that it has here beside it."""
    import rankdecay as rd

    for kind in FAMILIES:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **HEADS))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which planes go makes no difference here
            small = rd.compress(model, 8, folder / kind).eval()
            torch.save(small(input_ids=TOKENS).logits, folder / f"{kind}.pt")


def read(folder: Path) -> None:
    """Compare the logits of each model with those that were written."""
    for kind in FAMILIES:
        wanted = torch.load(folder / f"{kind}.pt", weights_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder / kind).eval()
        with torch.no_grad():
            off = float((model(input_ids=TOKENS).logits - wanted).abs().max())
        print(f"transformers {__version__}: {kind} off by {off:.1e} of {float(wanted.abs().max()):.2g}")
        if not off <= 1e-5 * float(wanted.abs().max()):
            raise SystemExit(f"{kind} is read with other logits")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
