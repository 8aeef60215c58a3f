"""Role of each parameter of a model, by which its decay is chosen, and the reason for it.

==============  ==========================================================================================
role            parameters
==============  ==========================================================================================
query_key       W_Q and W_K of every attention layer
value_output    W_V and W_O
mlp             the other matrices of the blocks that hold attention: feed-forward, experts, routers
embedding       token, position and patch embeddings, class tokens, the output embedding
norm            gains of normalisation layers
bias            biases, also those of normalisation layers
other           the rest: task heads, adapters' factors, gates
==============  ==========================================================================================

A fused parameter has one block per matrix in it, each with its own role.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from rankdecay.attention import AttentionNames, Window
from rankdecay.attention.layer import WHOLE
from rankdecay.attention.locate import Unhandled, locate
from rankdecay.attention.source import ModuleSource, named_parameters

ROLES = ("query_key", "value_output", "mlp", "embedding", "norm", "bias", "other")

_ATTENTION_ROLE = {"query": "query_key", "key": "query_key", "value": "value_output", "output": "value_output"}
_EMBEDDING_NAME = re.compile(r"embed|(cls|class|mask|reg|dist|register)_token|pos_emb|lm_head")
_ADAPTER_NAME = re.compile(r"\.lora_|\.adapter|\.ia3_|\.hada_|\.lokr_")


class Block(NamedTuple):
    """Matrix in a parameter: its role, its window, and the reason for the role."""

    role: str
    window: Window
    why: str

    def labelled_window(self) -> Window:
        """Return the window, with the matrix's name where the parameter holds several."""
        return self.window if self.window.is_whole else replace(self.window, label=self.why)


@dataclass
class Assigned:
    """Parameter, with its names and its blocks."""

    parameter: nn.Parameter
    names: list[str]
    blocks: list[Block]


def assign_roles(model: nn.Module, names: AttentionNames | None = None) -> tuple[list[Assigned], list[Unhandled]]:
    """Return every parameter of the model once, with its blocks, and the attention that is not handled.

    A tied parameter collects the blocks of each of its names; a name that says nothing (role other) adds none.
    """
    found, unhandled = locate(ModuleSource(model), names)
    in_attention: dict[str, list[Block]] = {}
    for layer in found:
        for role, place in layer.places.items():
            in_attention.setdefault(place.parameter, []).append(Block(_ATTENTION_ROLE[role], place.window, role))
    blocks_of_layers = {_block(layer.name) for layer in found}
    owners = dict(model.named_modules(remove_duplicate=False))
    output_embedding = _output_embedding(model)

    assigned: dict[int, Assigned] = {}
    for name, parameter in named_parameters(model).items():
        entry = assigned.setdefault(id(parameter), Assigned(parameter, [], []))
        entry.names.append(name)
        owner = owners.get(name.rpartition(".")[0])
        blocks = in_attention.get(name) or [_plain_block(name, parameter, owner, blocks_of_layers)]
        if parameter is output_embedding and not isinstance(owner, nn.Embedding):
            blocks = [Block("embedding", WHOLE, "output embedding")]
        for block in blocks:
            if all(known.role != block.role or known.window != block.window for known in entry.blocks):
                entry.blocks.append(block)
    for entry in assigned.values():
        known = [block for block in entry.blocks if block.role != "other"]
        entry.blocks = known or entry.blocks[:1]
    return list(assigned.values()), unhandled


def _plain_block(name: str, parameter: nn.Parameter, owner: nn.Module | None, layers: set[str]) -> Block:
    """Return the role of a parameter outside attention, from its module, its name and its shape."""
    leaf = name.rpartition(".")[2]
    kind = type(owner).__name__
    if _ADAPTER_NAME.search(name):
        return Block("other", WHOLE, "factor of an adapter: L2 on both is a nuclear norm on their product")
    if leaf.endswith("bias") or leaf in ("bias_k", "bias_v"):
        return Block("bias", WHOLE, "bias")
    if "norm" in kind.lower():
        return Block("norm", WHOLE, f"gain of {kind}")
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return Block("embedding", WHOLE, "embedding table")
    if parameter.ndim < 2:
        return Block("other", WHOLE, f"vector of {kind}")
    if _EMBEDDING_NAME.search(name):
        return Block("embedding", WHOLE, "named as an embedding")
    if any(layer and name.startswith(layer + ".") for layer in layers):
        return Block("mlp", WHOLE, "matrix of a block with attention")
    return Block("other", WHOLE, "outside the blocks with attention")


def _block(attention: str) -> str:
    """Return the transformer block of an attention module: its path up to the first number, or its parent."""
    parts = attention.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1])


def _output_embedding(model: nn.Module) -> nn.Parameter | None:
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return None
    try:
        module = get()
    except (NotImplementedError, AttributeError):
        return None
    return getattr(module, "weight", None)
