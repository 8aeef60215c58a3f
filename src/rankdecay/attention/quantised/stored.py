"""One quantised weight as it is stored, and the reasons why one is not read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankdecay.attention.tensors import Shape

Load = Callable[[str], Tensor]
FLOAT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
REMEDY = (
    "dequantise it first with the library that wrote it (with transformers: model.dequantize(), then save_pretrained), "
    "or give the original weights"
)


class Weight(NamedTuple):
    """Weight stored as codes.

    Attributes:
        shape: its own.
        read: dequantises it.
        parts: names of the tensors it is made of.
        format: what it is stored as, for a reader.
    """

    shape: Shape
    read: Callable[[], Tensor]
    parts: tuple[str, ...] = ()
    format: str = ""


class Refused(Exception):
    """Reason why a weight is not read."""


@dataclass(frozen=True)
class Stored:
    """Weight as it is stored: the tensors around it, and what the configuration says of quantisation.

    Attributes:
        name: the weight's own name, ``…q_proj.weight``, whether or not a tensor has it.
        shapes: shape of every stored tensor.
        dtypes: type of every stored tensor.
        load: reads a stored tensor.
        settings: the quantisation part of the configuration, empty if there is none.
    """

    name: str
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    load: Load
    settings: Mapping[str, Any]

    def at(self, name: str) -> Stored:
        """Return the same for the weight of that name."""
        return Stored(name, self.shapes, self.dtypes, self.load, self.settings)

    @property
    def method(self) -> str:
        """The name of the format in the configuration."""
        method = self.settings.get("quant_method")
        return str(getattr(method, "value", method) or "")  # an enumeration in a live configuration

    def find(self, *parts: str) -> str | None:
        """Return the first tensor that exists: ``_scale`` and ``.absmax`` continue the name, ``SCB`` lies beside it."""
        owner = self.name.rpartition(".")[0]
        beside = owner + "." if owner else ""
        names = (self.name + part if not part or part[0] in "._" else beside + part for part in parts)
        return next((name for name in names if name in self.shapes), None)

    def need(self, *parts: str) -> str:
        """Return the first tensor that exists.

        Raises:
            Refused: If there is none.
        """
        name = self.find(*parts)
        if name is None:
            raise self.wrong(f"its {' or '.join(part.lstrip('._') for part in parts)} is missing")
        return name

    def number(self, key: str) -> int | None:
        """Return a positive number of the settings, if it is there."""
        value = self.settings.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def wrong(self, why: str) -> Refused:
        """Return the reason that the tensors contradict each other."""
        return Refused(f"{self.name} is quantised and cannot be read: {why}; download or save it again.")

    def refused(self, kind: str) -> Refused:
        """Return the reason that a format is not read."""
        return Refused(f"{self.name} is quantised as {kind}, which is not read; {REMEDY}.")

    def unknown(self) -> Refused:
        """Return the reason for codes that nothing explains."""
        dtype = str(self.dtypes[self.name]).removeprefix("torch.") if self.name in self.dtypes else "integer"
        form = f"quant_method={self.method!r}" if self.method else "an unknown format"
        return self.refused(f"{dtype} codes of {form}")


def present(*names: str | None) -> tuple[str, ...]:
    """Return the names that are not None."""
    return tuple(name for name in names if name)


def settings_in(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a configuration says of quantisation, of the whole model or of its text part."""
    parts = [config, *(part for key in ("text_config", "llm_config") if isinstance(part := config.get(key), Mapping))]
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):
            found = plain(part.get(key))
            if found:
                return plain(found.get("quantization_config")) or found
    named = next((key for key, value in config.items() if "quant" in str(key) and value), None)  # ChatGLM's bits
    return {"quant_method": named} if named else {}


def plain(settings: object) -> Mapping[str, Any]:
    """Return settings as a mapping: a dictionary, or a configuration of transformers."""
    if isinstance(settings, Mapping):
        return settings
    convert = getattr(settings, "to_dict", None)
    content = convert() if callable(convert) and not isinstance(settings, type) else None
    return content if isinstance(content, Mapping) else {}
