"""A model to be made smaller, and the same with a smaller head, once its class is sure to compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rankdecay.compress.choice import PlaneScores, plane_scores
from rankdecay.compress.reduction import Layer, Moments, NotReducible, Read, reduced
from rankdecay.compress.rotary import STANDING, smaller_configuration
from rankdecay.compress.skeleton import Skeleton, changed_shapes
from rankdecay.compress.types import check_type

#: Type that turns by the default frequencies in transformers 4.57, whatever the configuration says.
_OTHERWISE_BEFORE_5 = "nemotron"


class Original:
    """A causal language model of transformers, whose head can be made smaller.

    Attributes:
        kind: its class.
        config: its configuration.
        skeleton: what its class says of its attention.
        head_dim: d.
    """

    def __init__(self, kind: type[nn.Module], config: Any) -> None:
        """Check that the identities hold for every layer.

        Raises:
            NotReducible: If they do not, with the reason.
        """
        if getattr(config, "get_text_config", lambda: config)() is not config:
            raise NotReducible(
                f"{kind.__name__} has parts beside a language model: compress the language model alone, which "
                "docs/guides/compress.md takes out of it."
            )
        check_type(str(config.model_type))
        self.kind, self.config = kind, config
        self.skeleton = Skeleton(kind, config)
        self.skeleton.check()
        self.head_dim = self.skeleton.found[0].head_dim
        self.warnings: list[str] = []
        self._check_turned()
        if any(rope.attention_factor != 1.0 for rope in self.skeleton.ropes.values()):
            self.warnings.append(
                "its sines and cosines are multiplied by an attention_factor, which transformers reads beside longrope "
                "factors; readers that know short_mscale and long_mscale alone ignore it."
            )
        several = bool(self.skeleton.ropes) and None not in self.skeleton.ropes
        if several or config.model_type == _OTHERWISE_BEFORE_5:
            turns = "its layers turn by tables of several kinds" if several else f"{config.model_type} turns by a table"
            self.warnings.append(
                f"{turns}, which transformers before 5 does not read: it would turn the smaller model by other "
                "frequencies without a word."
            )
        if any(rope.kind == "dynamic" for rope in self.skeleton.ropes.values()):
            self.warnings.append(
                "rope_type 'dynamic' changes frequencies beyond "
                f"max_position_embeddings={config.max_position_embeddings}, which no table of a configuration says: up "
                "to that length the smaller model is the same, not beyond."
            )

    def turned(self) -> dict[str | None, int]:
        """Return the number of rotary planes of a head, by table of frequencies."""
        return {
            self.skeleton.rope_key(number): found.rotary.dims // 2
            for number, found in enumerate(self.skeleton.found)
            if found.rotary is not None
        }

    def _check_turned(self) -> None:
        for number, found in enumerate(self.skeleton.found):
            if found.rotary is None:
                continue
            if found.planes_assumed:
                raise NotReducible(f"{found.name}: it is unknown which rows RoPE rotates together.")
            planes, has = found.rotary.dims // 2, len(self.skeleton.ropes[self.skeleton.rope_key(number)].short)
            if planes != has:
                raise NotReducible(f"{found.name} rotates {planes} planes, but the class has {has} frequencies.")

    def with_positions(self, layers: Sequence[Layer]) -> tuple[list[Layer], list[str | None]]:
        """Return the layers with rotary positions, and the table of frequencies of each."""
        numbers = [number for number, layer in enumerate(layers) if layer.found.rotary is not None]
        return [layers[number] for number in numbers], [self.skeleton.rope_key(number) for number in numbers]

    @cached_property
    def layers(self) -> list[Layer]:
        """Its layers, with the scale they have now."""
        ours = self.skeleton
        scales = [ours.scale(found) for found in ours.found]
        return [
            Layer(found, *ours.norms(found), scale, new_scale=scale, sums_to_one=ours.sums_to_one(found))
            for found, scale in zip(ours.found, scales, strict=True)
        ]

    def scores(self, read: Read) -> dict[str | None, PlaneScores]:
        """Return what the weights say of the rotary planes, by table of frequencies."""
        return plane_scores(*self.with_positions(self.layers), read)

    def smaller(self, head_dim: int, kept: Mapping[str | None, Tensor], config: Mapping[str, Any]) -> Smaller:
        """Return the same model with a smaller head, once its class is sure to compute what it should.

        Args:
            head_dim: d'.
            kept: the planes that stay, by table of frequencies.
            config: what ``config.json`` holds, with ``rope_parameters``.

        Raises:
            NotReducible: If its class does something else with the smaller configuration.
        """
        names = getattr(type(self.config), "attribute_map", None) or {}
        written = smaller_configuration(config, head_dim, self.skeleton.ropes, kept, names)
        try:
            # as a file has it, infinity and the like are written in a form of their own
            new_config = type(self.config).from_dict(type(self.config)._decode_special_floats(dict(written)))
        except Exception as error:  # of the many checks that configurations make
            reason = " ".join(str(error).split())[:200]
            raise NotReducible(
                f"{type(self.config).__name__} does not take head_dim={head_dim} with the frequencies of the kept "
                f"planes: {reason}"
            ) from None
        skeleton = Skeleton(self.kind, new_config)
        layers = [
            replace(layer, new_scale=skeleton.scale(small))
            for layer, small in zip(self.layers, skeleton.found, strict=True)
        ]
        self._check(skeleton, layers, head_dim, kept)
        return Smaller(head_dim, dict(kept), written, new_config, skeleton, layers, self)

    def _check(self, new: Skeleton, layers: Sequence[Layer], head_dim: int, kept: Mapping[str | None, Tensor]) -> None:
        name = self.kind.__name__
        ours = {parameter for layer in layers for parameter in layer.parameters}
        changed = changed_shapes(self.skeleton.shapes, new.shapes)
        if any(found.head_dim != head_dim for found in new.found) or not changed:
            raise NotReducible(
                f"{name} does not take head_dim={head_dim} from its configuration: its heads are "
                f"{new.found[0].head_dim} wide, so that a smaller head cannot be written in this class."
            )
        fixed = {layer.found.places["output"].bias for layer in layers}
        if others := sorted(changed - ours):
            raise NotReducible(
                f"{name} has {others[0]}, whose shape follows the size of a head, and it is not known how."
            )
        if others := sorted(ours - changed - fixed):
            raise NotReducible(f"{name} does not give {others[0]} another shape with a smaller head.")
        for number, small in enumerate(new.found):
            turned = small.rotary.dims // 2 if small.rotary is not None else 0
            left = 0 if self.skeleton.found[number].rotary is None else len(kept[self.skeleton.rope_key(number)])
            if turned != left:
                raise NotReducible(f"{name} would turn {turned} planes of a head of {head_dim}, and {left} are kept.")
        for key, planes in kept.items():
            old, rope = self.skeleton.ropes[key], new.ropes.get(key)
            if rope is None or len(rope.short) != len(planes):
                raise NotReducible(f"{name} does not take the {len(planes)} frequencies of the kept planes.")
            for one, other in ((old.short, rope.short), (old.long, rope.long)):
                if not torch.allclose(one[planes].clamp_min(STANDING), other, rtol=1e-5, atol=0.0):
                    raise NotReducible(f"{name} does not turn the kept planes by the frequencies of its configuration.")
            if abs(old.attention_factor - rope.attention_factor) > 1e-6:
                raise NotReducible(f"{name} does not take attention_factor={old.attention_factor} for its frequencies.")


@dataclass(frozen=True)
class Smaller:
    """A model with a smaller head, without its weights.

    Attributes:
        head_dim: d'.
        kept: the planes that stay, by table of frequencies.
        written: its ``config.json``.
        config: its configuration, an object of transformers.
        skeleton: what its class says of it.
        layers: the layers, as they become smaller.
        original: what it is made from.
    """

    head_dim: int
    kept: dict[str | None, Tensor]
    written: dict[str, Any]
    config: Any
    skeleton: Skeleton
    layers: list[Layer]
    original: Original

    def planes(self, number: int) -> Tensor | None:
        """Return the planes that stay in a layer, by its place; None if it has no rotary positions."""
        if self.layers[number].found.rotary is None:
            return None
        return self.kept[self.original.skeleton.rope_key(number)]

    def parameters(self, number: int, read: Read, moments: Sequence[Moments] | None) -> dict[str, Tensor]:
        """Return the parameters of a layer, by its place."""
        own = moments[number] if moments is not None else None
        return reduced(self.layers[number], read, self.head_dim, self.planes(number), own)

    def model(self, read: Read, moments: Sequence[Moments] | None, say: Callable[[int], None]) -> nn.Module:
        """Return the smaller model with its weights, of the class of the original.

        Args:
            read: reads a parameter of the original.
            moments: of the inputs of each layer.
            say: is told how many layers are done.
        """
        state = {name: read(name).clone() for name in self.original.skeleton.own_names if name not in self._ours}
        for number in range(len(self.layers)):
            state |= self.parameters(number, read, moments)
            say(number + 1)
        needed = set(self.skeleton.own_names)
        if state.keys() != needed:  # what is missing would be drawn at random
            odd = sorted(state.keys() ^ needed)
            raise NotReducible(f"{self.original.kind.__name__} with a smaller head has other parameters: {odd[0]}.")
        kind: Any = self.original.kind
        # as the original runs: not every kernel computes all that a class does, soft caps for one
        kernels = getattr(self.original.config, "_attn_implementation", None)
        given = {} if kernels is None else {"attn_implementation": kernels}
        dtype = next(iter(state.values())).dtype
        made = kind.from_pretrained(None, config=self.config, state_dict=state, dtype=dtype, **given)
        for name, tensor in made.state_dict(keep_vars=True).items():
            if name in state and tensor.dtype != state[name].dtype:  # of several types loading makes one
                tensor.data = state[name]
        return made

    @cached_property
    def _ours(self) -> set[str]:
        return {name for layer in self.layers for name in layer.parameters}
