"""Checkpoint files: safetensors, sharded or not, PyTorch state dicts, the ``config.json`` beside them, and GGUF.

Only shapes are read at first; a tensor is read when a view asks for it. Nothing in a file is executed: safetensors hold
none, and a pickle is loaded with ``weights_only=True``, which refuses anything but tensors and plain containers. Files
are not trusted: whatever is wrong with them becomes a :class:`CheckpointError` that names the file.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.gguf import files_of, read_gguf
from rankdecay.attention.names import NUM_HEADS, PARTS, ROTARY, ROTARY_TYPES

Shape = tuple[int, ...]

#: Files that hold a PyTorch state dict.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
#: Names of such files that trainers write beside the weights.
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state")

_LARGEST_JSON = 64 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """Names and shapes of the tensors of a checkpoint, read on demand, and its configuration.

    Attributes:
        path: what was opened.
        shapes: shape of every tensor, by name.
        config: ``config.json``, empty if there is none.
        load: reads one tensor, to the CPU.
        of_module: returns the settings of the module at a path, where a format states them per module; they come first.
    """

    path: Path
    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]
    load: Callable[[str], Tensor]
    of_module: Callable[[str], Mapping[str, Any]] = field(default=lambda path: {})

    def __str__(self) -> str:
        return str(self.path)

    def setting(self, path: str, attributes: tuple[str, ...]) -> object:
        """Return the nearest value of the attributes: in the configuration of the module's part, then of the whole."""
        known = {key: part for key, part in self.config.items() if key in PARTS.values() and isinstance(part, dict)}
        parts = [known[key] for word, key in PARTS.items() if word in path and key in known]
        if not parts and "text_config" in known:
            parts = [known["text_config"]]
        side = next((side for side in ("encoder", "decoder") if f"{side}." in path), None)
        for holder in [self.of_module(path), *parts, self.config]:
            if attributes == NUM_HEADS and side and isinstance(holder.get(f"{side}_attention_heads"), int):
                return holder[f"{side}_attention_heads"]
            for attribute in attributes:
                if holder.get(attribute) is not None:
                    return holder[attribute]
            if attributes == ROTARY and str(holder.get("model_type", "")).startswith(ROTARY_TYPES):
                return True
        return None

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that reads a tensor."""
        return partial(self.load, name)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: a directory as ``save_pretrained`` leaves it, a ``.safetensors`` file, a PyTorch state dict, or a GGUF
            file.

    Raises:
        CheckpointError: If there is nothing to read, or what is there is damaged or would run code.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a directory, a .safetensors file or a PyTorch state dict.")
    if gguf := _gguf_files(path):
        return _open_gguf(path, gguf)
    folder = path if path.is_dir() else path.parent
    files = _files_in(path) if path.is_dir() else [path]
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    files_of: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    pickled: dict[Path, Mapping[str, Tensor]] = {}
    for file in files:
        _check_inside(file, folder)
        if file.suffix == ".safetensors":
            found = _safetensors_shapes(file)
        elif file.suffix not in _PICKLED:
            raise CheckpointError(f"{file} is not a checkpoint: expected .safetensors or one of {', '.join(_PICKLED)}.")
        else:
            pickled[file] = _state_dict(file)
            found = {name: tuple(tensor.shape) for name, tensor in pickled[file].items()}
        for name, shape in found.items():
            if name in shapes:
                raise CheckpointError(f"{name} is both in {files_of[name].name} and in {file.name} of {folder}.")
            files_of[name], shapes[name] = file, shape
    if not shapes:
        raise CheckpointError(f"{path} contains no tensors.")

    @lru_cache(maxsize=2)  # a fused parameter is read once for its three matrices
    def load(name: str) -> Tensor:
        file = files_of[name]
        if file in pickled:
            return pickled[file][name]
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{name} cannot be read from {file}: {error}") from None

    return Checkpoint(path, {name: shapes[name] for name in sorted(shapes, key=_natural)}, config, load)


def _gguf_files(path: Path) -> list[Path]:
    """Return the parts of a GGUF model; a directory with other weights beside it is not taken for one."""
    files = files_of(path)
    others = (
        [file.name for file in path.iterdir() if file.suffix in (".safetensors", *_PICKLED)] if path.is_dir() else []
    )
    if files and others:
        raise CheckpointError(f"{path} holds both {files[0].name} and {sorted(others)[0]}; give one of these files.")
    return files


def _open_gguf(path: Path, files: list[Path]) -> Checkpoint:
    for file in files:
        _check_inside(file, path if path.is_dir() else file.resolve().parent)  # a link that was asked for is followed
    shapes, config, of_module, load = read_gguf(files)
    if not shapes:
        raise CheckpointError(f"{path} contains no tensors.")
    return Checkpoint(path, {name: shapes[name] for name in sorted(shapes, key=_natural)}, config, load, of_module)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort names as the model is built: layer 2 before layer 10, the encoder before its decoder."""
    name = (
        name.replace("encoder.", "0encoder.").replace("enc.blk.", "0enc.blk.").replace("encoder_attn", "~encoder_attn")
    )
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _files_in(folder: Path) -> list[Path]:
    """Return the weight files of a directory: those in its index, else all safetensors, else all state dicts."""
    for index in sorted(folder.glob("*.index.json")):
        content = _read_json(index).get("weight_map")
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to files.")
        files = [folder / name for name in dict.fromkeys(content.values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{index.name} names {missing[0]}, which is not in {folder}; download it again.")
        return files
    content = sorted(folder.iterdir())
    safetensors = [file for file in content if file.suffix == ".safetensors"]
    pickled = [file for file in content if file.suffix in _PICKLED and file.is_file() and file.stem not in _NO_WEIGHTS]
    if not (safetensors or pickled):
        raise CheckpointError(
            f"{folder} has no weights: expected *.safetensors, an index, or *{', *'.join(_PICKLED)}; found "
            f"{', '.join(file.name for file in content[:8]) or 'nothing'}."
        )
    return safetensors or pickled


def _check_inside(file: Path, folder: Path) -> None:
    """Refuse a link that leads out of the checkpoint, unless into the cache of the hub, and an empty file."""
    real, root = file.resolve(), folder.resolve()
    inside = real.is_relative_to(root)
    in_cache = root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent)
    if not (inside or in_cache):
        raise CheckpointError(f"{file} leads out of {folder}, to {real}; copy the file there if you trust it.")
    if not real.is_file():
        raise CheckpointError(f"{file} is not a regular file.")
    if real.stat().st_size == 0:
        raise CheckpointError(f"{file} is empty; the download or the save was cut short.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, too many for a configuration.")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} contains a JSON {type(content).__name__}, expected an object.")
    return content


def _safetensors_shapes(file: Path) -> dict[str, Shape]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from None


def _state_dict(file: Path) -> dict[str, Tensor]:
    _check_not_compressed(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles; what matters becomes an error
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's whole message would also say how to load it all the same
        unsupported = re.search(r"[Uu]nsupported [^\n]+", str(error))
        reason = unsupported[0].rstrip(".") if unsupported else "not a pickle of tensors"
        raise CheckpointError(
            f"{file} is a pickle that needs to run code, or is damaged, and is not loaded ({reason}); save "
            "its state_dict() as safetensors."
        ) from None
    except Exception as error:  # a damaged archive fails in as many ways as it has bytes
        raise CheckpointError(f"{file} is not a PyTorch state dict: {type(error).__name__}: {error}") from None
    tensors = _largest(content, file)
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > file.stat().st_size:  # strides of 0 make much out of little
            raise CheckpointError(
                f"{name} in {file} claims shape {tuple(tensor.shape)}, which is more than the file holds."
            )
    return tensors


def _check_not_compressed(file: Path) -> None:
    """Refuse a compressed archive, which could expand to any size; PyTorch stores tensors uncompressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return  # the format before torch 1.6, or damaged: torch.load finds out which
    if packed:
        raise CheckpointError(f"{file} is compressed ({packed[0]}), which torch.save does not do; it is not unpacked.")


def _largest(content: object, file: Path) -> dict[str, Tensor]:
    """Return the mapping with the most tensors: a checkpoint often nests its state dict under a key."""
    best: dict[str, Tensor] = {}
    for mapping in _mappings(content, depth=3):
        tensors = {str(name): value for name, value in mapping.items() if isinstance(value, Tensor)}
        if len(tensors) > len(best):
            best = tensors
    if not best:
        raise CheckpointError(f"{file} contains no state dict of tensors.")
    return best


def _mappings(content: object, depth: int) -> Iterator[Mapping[Any, Any]]:
    if isinstance(content, Mapping):
        yield content
        if depth:
            for value in content.values():
                yield from _mappings(value, depth - 1)
