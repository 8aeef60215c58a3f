"""Find attention by the names and shapes of parameters: the same for a live model and for files.

A module is attention when the parameters under it carry the names of one row of
:data:`~rankdecay.attention.names.KNOWN`. Shapes, and the number of heads, say the rest
(:mod:`rankdecay.attention.windows`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from rankdecay.attention.layer import AttentionLayer, MatrixView
from rankdecay.attention.names import KNOWN, LATENT, AttentionNames
from rankdecay.attention.source import Source, open_source
from rankdecay.attention.windows import Found, ModuleReader, NotHandled, Place


class Unhandled(NamedTuple):
    """Module that looks like attention and cannot be read, with the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.reason}"


def find_attention(
    model: nn.Module | str | Path,
    names: AttentionNames | None = None,
    num_heads: int | None = None,
    *,
    state: str | None = None,
) -> list[AttentionLayer]:
    """Return the attention layers of a model or a checkpoint, in the order of its parameters.

    Recognised by the names and shapes of parameters and by the numbers of heads that modules and configurations
    state (:mod:`rankdecay.attention.names`), not by class; so a model wrapped by ``torch.compile``, DDP or PEFT is
    seen too, and cross-attention counts as a layer of its own. With a PEFT adapter the view reads the effective
    weight. Of a sharded parameter (a DTensor, by FSDP2 or tensor parallelism) names and shapes are those of the whole,
    and reading a view gathers it for that moment: in every process the same, so every process has to read it.

    Args:
        model: the model, or any part of it; or a path to a checkpoint (:mod:`rankdecay.attention.checkpoints`),
            of which nothing but shapes is read until a view is asked for its tensor.
        names: how your own attention names its projections; it is then the only naming looked for.
        num_heads: number of query heads, where neither module nor configuration says it.
        state: which weights, of a checkpoint that holds several sets: a file's name, a dotted key, a prefix of names.

    Returns:
        One :class:`~rankdecay.attention.AttentionLayer` per attention module.

    Raises:
        TypeError: If ``model`` is neither an ``nn.Module`` nor a path.
        ValueError: If no attention is found; the message lists what looked like it, and why it was not taken. Or if
            a checkpoint cannot be read.

    Warns:
        UserWarning: If some modules look like attention and could not be read, with the reason.

    Example:
        >>> attention = nn.MultiheadAttention(64, num_heads=4)
        >>> [layer] = find_attention(attention)
        >>> layer.key.parameter_name, str(layer.key.window), layer.key.heads().shape
        ('in_proj_weight', 'rows[64:128]/192 by 16', torch.Size([4, 16, 64]))
    """
    layers, unhandled = find_layers(open_source(model, state), names, num_heads)
    for module in unhandled:
        warnings.warn(f"{module.name or 'the model'} is not handled: {module.reason}.", stacklevel=2)
    return layers


def find_layers(
    source: Source, names: AttentionNames | None = None, num_heads: int | None = None
) -> tuple[list[AttentionLayer], list[Unhandled]]:
    """Return the attention layers of a source, and the modules that look like attention and cannot be read.

    Raises:
        ValueError: If no attention is found.
    """
    found, unhandled = locate(source, names, num_heads)
    if not found:
        raise ValueError(_nothing(source, names, unhandled))
    return [_layer(layer, source) for layer in found], unhandled


def locate(
    source: Source, names: AttentionNames | None = None, num_heads: int | None = None
) -> tuple[list[Found], list[Unhandled]]:
    """Locate the attention modules of a source, and those that look like attention and cannot be read.

    Args:
        source: the parameters and settings.
        names: the only naming to look for; by default all that are known.
        num_heads: number of query heads, where no setting says it.
    """
    rows = KNOWN if names is None else (names,)
    if num_heads is not None:
        rows = tuple(replace(row, num_heads=num_heads) for row in rows)
    # Adapters keep the wrapped layer under `base_layer`: it is known by the name it had before.
    plain = {name.replace(".base_layer.", "."): name for name in source.shapes}
    found: list[Found] = []
    unhandled: list[Unhandled] = []
    for module in _modules(plain):
        reader = ModuleReader(module, plain, source)
        latent = [child for child in LATENT if reader.parameter(child)]
        if latent:
            unhandled.append(Unhandled(module, _LATENT_REASON.format(names=" and ".join(latent))))
            continue
        row = next((row for row in rows if reader.matches(row)), None)
        if row is None:
            continue
        try:
            found.append(reader.read(row))
        except NotHandled as reason:
            unhandled.append(Unhandled(module, str(reason)))
    return found, unhandled


_LATENT_REASON = (
    "multi-head latent attention ({names}): queries and keys are products of two factors with a normalisation between, "
    "so there is no W_Q and W_K to decay or to take the spectrum of; the factors have the role 'other'"
)


def _modules(names: Iterable[str]) -> list[str]:
    """Return the paths of all modules with parameters, in the order of the parameters, outer modules first."""
    seen: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            seen.setdefault(".".join(parts[:i]))
    return list(seen)


def _layer(found: Found, source: Source) -> AttentionLayer:
    views = {
        role: MatrixView(role, place.parameter, place.window, source.reader(place.parameter), _bias(place, source))
        for role, place in found.places.items()
    }
    return AttentionLayer(
        name=found.name,
        query=views["query"],
        key=views["key"],
        value=views["value"],
        output=views.get("output"),
        head_dim=found.head_dim,
        rotary=found.rotary,
        qk_norm=found.qk_norm,
    )


def _bias(place: Place, source: Source) -> Callable[[], Tensor] | None:
    if place.bias is None or place.bias_window is None:
        return None
    window, read = place.bias_window, source.reader(place.bias)
    return lambda: window.vector(read())


def _nothing(source: Source, names: AttentionNames | None, unhandled: list[Unhandled]) -> str:
    shapes = source.shapes
    text = f"no attention was found in {source}"
    if names is not None:
        text += f" under the names {', '.join(map(repr, names.projections))}"
    if unhandled:
        return text + ". Not handled: " + "; ".join(map(str, unhandled[:4])) + "."
    flat = [n for n, shape in shapes.items() if len(shape) == 1 and n.rpartition(".")[2].startswith("_flat_param")]
    if flat:
        return text + f": {flat[0]} is a flattened FSDP1 parameter; shard with FSDP2 (fully_shard) instead."
    matrices = [f"{name} {shape}" for name, shape in shapes.items() if len(shape) == 2]
    return (
        text + f". Its matrices are: {', '.join(matrices[:12]) or 'none'}{', …' if len(matrices) > 12 else ''}. "
        "Say which are the attention's with names=AttentionNames(query=..., key=..., value=..., output=..., "
        "num_heads=...)."
    )
