"""Writes a smaller checkpoint from another one's files, layer by layer, whole or not at all.

Tensors that stay are copied as they are stored; of the others one layer is in memory at a time. The directory is
written beside its name and renamed at the end.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rankdecay.attention.checkpoints import Checkpoint, open_checkpoint
from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.folders import ADAPTER_CONFIG, check_inside
from rankdecay.attention.model_types import NUM_LAYERS
from rankdecay.attention.tensors import TYPE_NAMES
from rankdecay.compress.original import Smaller
from rankdecay.compress.reduction import Moments, NotReducible
from rankdecay.compress.rotary import with_earlier_names
from rankdecay.files import kind_of, read_bytes, unwritable

#: Types of the tensors that are copied; others are those of quantised weights.
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
#: What a directory holds beside weights and configuration that belongs to the model: tokenizer, generation, licence.
_COPIED = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm", ".md")
_NOT_COPIED = ("config.json", "params.json", "README.md", "trainer_state.json", "optimizer.json")  # two have head sizes
_TEMPLATES = "additional_chat_templates"
#: Which of several sets of weights transformers loads, the first that is there.
_LOADED = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
#: Settings that name the code by which transformers runs a model; a name with a slash is that of a repository.
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_LARGEST_COPY = 2**28
_LONGEST_NAME = 60  # characters of a directory's name that are kept while it is written: at most 255 bytes in all
_MOST = 2**40  # a number that no setting of a configuration reaches
_BIG_SHARD = 4 * 2**30
_AT_WORK: set[str] = set()  # names of directories that this process is writing


class Untold(Exception):
    """Carries an ``OSError`` that a callback raised past those of files, which are said to be of the directory."""


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
        state = next((name for name in _LOADED if (self.path / name).exists()), None)
        if state is None and (gguf := _gguf_file(self.path)):
            raise NotReducible(
                f"{gguf} is GGUF, which is not written: load it with transformers "
                f"(from_pretrained({str(gguf.parent)!r}, gguf_file={gguf.name!r})), and save_pretrained it or give "
                "rankdecay.compress the model."
            )
        if (self.path / ADAPTER_CONFIG).exists():
            raise NotReducible(
                f"{self.path} has an adapter ({ADAPTER_CONFIG}), which transformers loads with the model: merge it "
                "first (merge_and_unload, save_pretrained), or remove its files."
            )
        if not (self.path.is_dir() and (self.path / "config.json").exists()):
            raise NotReducible(
                f"{self.path} is not a directory of save_pretrained with a config.json: a smaller head is written into "
                "the configuration; load the model with transformers and save_pretrained it."
            )
        self.checkpoint: Checkpoint = open_checkpoint(self.path, state, adapters=False)
        self.config = dict(self.checkpoint.config)
        if self.checkpoint.stored_as or self.config.get("quantization_config"):
            formats = ", ".join(sorted(set(self.checkpoint.stored_as.values()))) or "as its quantization_config says"
            raise NotReducible(
                f"{self.path} has quantised weights ({formats}): dequantise it first (model.dequantize(), "
                "save_pretrained), compress that, and quantise again."
            )
        if "auto_map" in self.config:
            raise NotReducible(f"{self.path} needs code of its own (auto_map), which is not run.")
        if kernel := next((name for name in _KERNELS if "/" in str(self.config.get(name))), None):
            raise NotReducible(
                f"{self.path / 'config.json'} names a kernel of the hub ({kernel}={self.config[kernel]!r}), which is "
                f"code and is not run: remove {kernel} from it."
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Refuse a configuration from which a model far larger than its weights would be built."""
        shapes = self.checkpoint.shapes
        config = self.path / "config.json"
        largest = max((side for shape in shapes.values() for side in shape), default=0)
        for name, value in self.config.items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            most = len(shapes) if name in NUM_LAYERS else largest if name == "head_dim" else _MOST
            if value > most:
                raise CheckpointError(
                    f"{config} says {name}={str(value)[:40]}, which the {len(shapes)} tensors there, "
                    f"of at most {largest} rows or columns, do not have: it is not theirs."
                )

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name."""
        return self.checkpoint.load(name)

    def check(self, shapes: Mapping[str, Sequence[int]], names: Sequence[str]) -> None:
        """Refuse weights of other shapes than the configuration says, and without its attention.

        Args:
            shapes: of all parameters, as the class has them; files may hold some under other names.
            names: those that have to be there.
        """
        stored_shapes = self.checkpoint.shapes
        if missing := next((name for name in names if name not in stored_shapes), None):
            raise CheckpointError(
                f"{self.path} has no {missing}, which its configuration says it should have: if transformers renames "
                "what it loads from there, give rankdecay.compress the loaded model."
            )
        for name in stored_shapes.keys() & shapes.keys():
            stored_shape, wanted = tuple(stored_shapes[name]), tuple(shapes[name])
            if stored_shape != wanted:
                raise CheckpointError(
                    f"{name} of {self.path} has shape {stored_shape}, and its configuration says {wanted}: the weights "
                    "are not those of this config.json."
                )

    def extra_files(self) -> Iterator[Path]:
        """Yield the files that a smaller model has too: of the tokenizer, of generation, the licence."""
        for file in sorted([*self.path.iterdir(), *self.path.glob(f"{_TEMPLATES}/*.jinja")]):
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


def _gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that a path is, or the first that a directory without other weights holds."""
    if path.is_dir():
        return next(iter(sorted(path.glob("*.gguf"))), None)
    return path if path.suffix == ".gguf" and path.exists() else None


def check_new(out: Path) -> None:
    """Raise a ``ValueError`` if a directory to write has something in it, is none, or is the current one."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={str(out)!r} exists: name a directory that does not, since nothing is overwritten.")
    # another directory takes its place, and the process would be nowhere
    if os.path.isdir(out) and os.path.samefile(out, os.curdir):
        raise ValueError(f"out={str(out)!r} is the current directory: name one that does not exist.")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Make a directory under another name, and give it its own once all is in it; nothing is left if that fails.

    Raises:
        ValueError: If the directory exists, or cannot be written, with its path and the remedy.
    """
    check_new(out)
    prefix = f".{out.name[:_LONGEST_NAME]}.rankdecay-"
    part = out.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")  # threads may write at once
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            for left in out.parent.glob(f"{glob.escape(prefix)}*"):  # that a kill left
                pid = left.name.removeprefix(prefix).partition("-")[0]
                if pid.isascii() and pid.isdecimal() and left.name not in _AT_WORK and not _is_at_work(int(pid)):
                    shutil.rmtree(left, ignore_errors=True)
            _AT_WORK.add(part.name)
            part.mkdir()
            yield part
            check_new(out)  # somebody else may have been quicker
            if out.is_dir():
                out.rmdir()
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            _AT_WORK.discard(part.name)
    except Untold as untold:
        raise untold.args[0] from None
    except OSError as error:
        named = str(error.filename or out).replace(str(part), str(out))
        failed = OSError(error.errno or errno.EIO, error.strerror or str(error), named)
        raise ValueError(unwritable(failed, "directory")) from None


def _is_at_work(pid: int) -> bool:
    """Whether another process of a number is there; in a container each start of a program may have the same."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or no number that a process has
        return True
    return True


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

    built = smaller.skeleton.shapes
    shapes = {name: tuple(built[name] if name in owner else shape) for name, shape in stored.checkpoint.shapes.items()
              if name in built or not name.endswith("inv_freq")}  # fmt: skip  # the tables that old releases stored
    dtypes = stored.checkpoint.dtypes
    if odd := next((name for name in shapes if dtypes[name] not in _DTYPES), None):
        raise NotReducible(f"{odd} is stored as {dtypes[odd]}, which is not copied: save the model in another type.")
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = _shards(sizes)
    written = 0
    weight_map: dict[str, str] = {}
    with ExitStack() as files, ThreadPoolExecutor(1) as thread:
        writer = _OneBehind(thread)
        for number, names in enumerate(shards):
            many = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else many
            weight_map |= dict.fromkeys(names, file)
            out = files.enter_context(open(folder / file, "wb"))
            header = _header({name: (TYPE_NAMES[dtypes[name]], shapes[name], sizes[name]) for name in names})
            writer.submit(out.write, header)
            for name in names:
                tensor = layer(owner[name])[name] if name in owner else stored.read(name)
                assert tuple(tensor.shape) == shapes[name], name
                data = tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
                writer.submit(out.write, data)
                written += 1
                try:
                    say(written, len(shapes))
                except OSError as error:
                    raise Untold(error) from None
            writer.submit(_to_disk, out)
        writer.wait()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_other_files(stored, smaller, folder, card)


class _OneBehind:
    """Thread that writes one tensor while the next is read or made smaller, and never holds more than one."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._last: Future[object] = thread.submit(lambda: None)

    def submit(self, act: Callable[..., object], *arguments: object) -> None:
        """Have something done once the last is done; raise what that raised."""
        self._last.result()
        self._last = self._thread.submit(act, *arguments)

    def wait(self) -> None:
        """Wait for the last; raise what it raised."""
        self._last.result()


def _write_other_files(stored: StoredModel, smaller: Smaller, folder: Path, card: str) -> None:
    """Write what is beside the weights: the tokenizer's files, the configuration and the card."""
    for file in stored.extra_files():
        content = read_bytes(file, _LARGEST_COPY, CheckpointError, "copy it again from where the model came.")
        copy = folder / file.relative_to(stored.path)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)
    _write_json(folder / "config.json", smaller.written)
    (folder / "README.md").write_text(card, "utf-8")


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Return the tensors of each file, in the order in which they are written, from their bytes."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if total and total + size > _BIG_SHARD:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def _header(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """Return the header of a safetensors file from the type, shape and bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_earlier_names(folder: Path) -> None:
    """Have a configuration that transformers has written read by earlier releases, too."""
    path = folder / "config.json"
    _write_json(path, with_earlier_names(json.loads(path.read_text("utf-8"))))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
