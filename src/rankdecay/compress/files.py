"""Writes a smaller checkpoint from another one's files, layer by layer, whole or not at all.

Tensors that stay are copied as they are stored; of the others one layer is in memory at a time. The directory is
written beside its name and renamed at the end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankdecay.attention.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from rankdecay.attention.folders import check_inside
from rankdecay.compress.original import Smaller
from rankdecay.compress.reduction import Moments, NotReducible
from rankdecay.files import kind_of, unwritable

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
#: What a directory holds beside weights and configuration that belongs to the model: tokenizer, generation, licence.
_COPIED = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".vocab", ".md")
_NOT_COPIED = ("config.json", "README.md", "trainer_state.json", "optimizer.json")
_LARGEST_COPY = 2**28
#: What a configuration calls its number of layers, and a number that none of its settings reaches.
_LAYERS, _MOST = ("num_hidden_layers", "num_layers", "n_layers", "n_layer"), 2**40
_BIG_SHARD = 4 * 2**30


class StoredModel:
    """The checkpoint of a model of transformers, in a directory.

    Attributes:
        path: the directory.
        checkpoint: its tensors.
        config: its ``config.json``.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a directory.

        Raises:
            NotReducible: If it is an adapter, is quantised, or needs code of its own.
            CheckpointError: If it cannot be read.
        """
        self.path = Path(path)
        if not (self.path.is_dir() and (self.path / "config.json").exists()):
            raise NotReducible(
                f"{self.path} is not a directory of save_pretrained with a config.json: a smaller head is written into "
                "the configuration; load the model with transformers and save_pretrained it."
            )
        try:
            self.checkpoint: Checkpoint = open_checkpoint(self.path, adapters=False)
        except CheckpointError as error:
            if "adapter" in str(error):
                raise NotReducible(
                    f"{self.path} is an adapter: merge it first (merge_and_unload, save_pretrained)."
                ) from None
            raise
        self.config = dict(self.checkpoint.config)
        if self.checkpoint.stored_as or "quantization_config" in self.config:
            formats = ", ".join(sorted(set(self.checkpoint.stored_as.values()))) or "as its quantization_config says"
            raise NotReducible(
                f"{self.path} has quantised weights ({formats}): dequantise it first (model.dequantize(), "
                "save_pretrained), compress that, and quantise again."
            )
        if "auto_map" in self.config:
            raise NotReducible(f"{self.path} needs code of its own (auto_map), which is not run.")
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Refuse a configuration from which a model far larger than its weights would be built."""
        shapes = self.checkpoint.shapes
        config = self.path / "config.json"
        largest = max((side for shape in shapes.values() for side in shape), default=0)
        for name, value in self.config.items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            most = len(shapes) if name in _LAYERS else largest if name == "head_dim" else _MOST
            if value > most:
                raise CheckpointError(
                    f"{config} says {name}={str(value)[:40]}, which the {len(shapes)} tensors there, "
                    f"of at most {largest} rows or columns, do not have: it is not theirs."
                )

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name."""
        return self.checkpoint.load(name)

    def check(self, shapes: Mapping[str, Sequence[int]], names: Sequence[str]) -> None:
        """Refuse weights whose attention has other shapes than the configuration says."""
        for name in names:
            held, said = self.checkpoint.shapes.get(name), tuple(shapes[name])
            if held is None:
                raise CheckpointError(f"{self.path} has no {name}, which its configuration says it should have.")
            if tuple(held) != said:
                raise CheckpointError(
                    f"{name} of {self.path} has shape {tuple(held)}, and its configuration says {said}: the weights "
                    "are not those of this config.json."
                )

    def extra_files(self) -> Iterator[Path]:
        """Yield the files that a smaller model has too: of the tokenizer, of generation, the licence."""
        for file in sorted(self.path.iterdir()):
            name = file.name
            if name in _NOT_COPIED or name.endswith(".index.json") or name.startswith("."):
                continue
            if (
                not (name.endswith(_COPIED) or name.upper().startswith(("LICENSE", "NOTICE")))
                or kind_of(file) != "file"
            ):
                continue
            if file.stat().st_size and file.stat().st_size <= _LARGEST_COPY:
                check_inside(file, self.path)
                yield file


def check_new(out: Path) -> None:
    """Raise a ``ValueError`` if a directory to write has something in it, or is none."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out={str(out)!r} exists: name a directory that does not, since nothing is overwritten.")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Make a directory under another name, and give it its own once all is in it; nothing is left if that fails.

    Raises:
        ValueError: If the directory exists, or cannot be written, with its path and the remedy.
    """
    check_new(out)
    part = out.with_name(f"{out.name}.part")
    try:
        try:
            if part.is_dir() and not part.is_symlink():  # that a kill left
                shutil.rmtree(part)
            part.mkdir(parents=True)
            yield part
            if out.is_dir():
                out.rmdir()
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        named = str(error.filename or out).replace(str(part), str(out))
        raise ValueError(unwritable(OSError(error.errno or errno.EIO, error.strerror or str(error), named))) from None


def write_checkpoint(
    stored: StoredModel,
    smaller: Smaller,
    moments: Sequence[Moments] | None,
    folder: Path,
    card: str,
    say: Callable[[int, int], None],
) -> None:
    """Write the smaller model into a directory.

    Args:
        stored: the original.
        smaller: what becomes of it.
        moments: of the inputs of each layer.
        folder: the directory, which exists.
        card: its README.md.
        say: is told how many tensors are written, and how many there are.
    """
    owner = {name: number for number, layer in enumerate(smaller.layers) for name in layer.parameters}

    @lru_cache(maxsize=2)  # the tensors of one layer stand together, but for a shard's end
    def layer(number: int) -> dict[str, Tensor]:
        return smaller.parameters(number, stored.read, moments)

    shapes = dict(stored.checkpoint.shapes)
    for name in owner:
        shapes[name] = smaller.skeleton.shapes[name]
    dtypes, shards = _plan(stored, shapes)
    written = 0
    total = 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            size = _count(shapes[name]) * dtypes[name].itemsize
            header[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [at, at + size]}
            at += size
            weight_map[name] = file
        total += at
        with open(folder / file, "wb") as out:
            head = json.dumps(header).encode()
            head += b" " * (-len(head) % 8)
            out.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                tensor = layer(owner[name])[name] if name in owner else stored.read(name)
                assert tuple(tensor.shape) == tuple(shapes[name]), name
                out.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
                written += 1
                say(written, len(shapes))
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file in stored.extra_files():
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(smaller.written, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(card)


def _plan(stored: StoredModel, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, torch.dtype], list[list[str]]]:
    """Return the type of each tensor, and the tensors of each shard, in the order in which they are written."""
    dtypes = stored.checkpoint.dtypes
    if odd := next((name for name in shapes if dtypes[name] not in _NAMES), None):
        raise NotReducible(f"{odd} is stored as {dtypes[odd]}, which is not copied: save the model in another type.")
    shards: list[list[str]] = [[]]
    size = 0
    for name in shapes:
        own = _count(shapes[name]) * dtypes[name].itemsize
        if size and size + own > _BIG_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return dict(dtypes), shards


def _count(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
