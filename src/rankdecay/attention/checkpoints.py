"""Checkpoint files: safetensors, sharded or not, PyTorch state dicts, and the configuration beside or inside them.

Which files of a directory are read is in :mod:`rankdecay.attention.folders`, which of several sets of weights in
:mod:`rankdecay.attention.states`, the settings in :mod:`rankdecay.attention.configurations`, and adapters on their base
in :mod:`rankdecay.attention.adapter_files`.

Only shapes are read at first; a tensor is read when a view asks for it. Nothing in a file is executed: safetensors hold
no code, and a pickle is loaded with ``weights_only=True``, which refuses anything but tensors and plain containers.
Files are not trusted: whatever is wrong with them becomes a :class:`CheckpointError` that names the file.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankdecay.attention.adapter_files import is_adapter, merge
from rankdecay.attention.configurations import configuration
from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.folders import check_inside, check_listed, find_files, kind
from rankdecay.attention.foreign import check_archive
from rankdecay.attention.gguf import ARCHITECTURES, parts_of, read_gguf
from rankdecay.attention.known import KNOWN_TYPES
from rankdecay.attention.model_types import (
    NUM_HEADS,
    PARTS,
    ROTARY,
    ROTARY_UNSAID,
    WIDTH,
    is_rotary_type,
)
from rankdecay.attention.numbering import natural_key
from rankdecay.attention.quantised import dequantised
from rankdecay.attention.states import (
    LONGEST_NAME,
    MOST_PARTS,
    MOST_TENSORS,
    SeveralSets,
    choose_mapping,
    choose_names,
)
from rankdecay.attention.tensors import Shape, stored_type
from rankdecay.attention.unets import by_module
from rankdecay.attention.unturned import NO_ROTARY_TYPES

#: With which the text begins that Git LFS puts in the place of a file.
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """Names and shapes of the tensors of a checkpoint, read on demand, and its configuration.

    Attributes:
        path: what was opened.
        shapes: shape of every tensor, by name.
        config: the configuration beside or inside the files, empty if there is none.
        load: reads one tensor, to the CPU.
        candidates: keys of the sets of weights that ``state`` can name, where there are several.
        of_module: returns the settings of the module at a path, where a format states them per module; they come first.
        stored_as: what each quantised tensor is stored as, by name.
        dtypes: type of every tensor as it is stored, by name; of GGUF files none.
        types: model types of which names and settings say all; GGUF has architectures of its own.
    """

    path: Path
    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]
    load: Callable[[str], Tensor]
    candidates: tuple[str, ...] = ()
    of_module: Callable[[str], Mapping[str, Any]] = field(default=lambda path: {})
    stored_as: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    types: frozenset[str] = KNOWN_TYPES

    def __str__(self) -> str:
        return str(self.path)

    @property
    def plain(self) -> Mapping[str, str]:
        """Name of every tensor by its name without wrappers: the same, since it was opened without them."""
        return self._plain

    @cached_property
    def _plain(self) -> dict[str, str]:
        return {name: name for name in self.shapes}

    def setting(self, path: str, attributes: tuple[str, ...]) -> object:
        """Return the nearest value of the attributes: in the configuration of the module's part, then of the whole."""
        holders = self._settings_of(path)
        for holder in holders:
            if attributes == NUM_HEADS and (heads := _heads_of_side(holder, path)) is not None:
                return heads
            if attributes == NUM_HEADS and "num_attention_heads_per_stage" in holder:
                return None  # which stage a block is in, its number does not say
            for attribute in attributes:
                if holder.get(attribute) is not None:
                    return holder[attribute]
            if attributes == ROTARY and is_rotary_type(str(holder.get("model_type", ""))):
                return True
            if attributes == ROTARY and holder and holder is not holders[0]:
                return None  # of the whole, positions are those of another part
        return None

    def _settings_of(self, path: str) -> list[Mapping[str, Any]]:
        """Return what speaks of the module at a path, the nearest first; kept, since many settings are asked of one."""
        if path not in self._settings:
            self._settings[path] = [
                self.of_module(path),
                *parts_of_config(self.config, path, partial(self._sides, path)),
            ]
        return self._settings[path]

    @cached_property
    def _settings(self) -> dict[str, list[Mapping[str, Any]]]:
        return {}

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Return a function that reads a tensor."""
        return partial(self.load, name)

    def children(self, path: str) -> Collection[str]:
        """Return the names of what is directly in a module."""
        return self._children.get(path, ())

    @cached_property
    def _children(self) -> dict[str, set[str]]:
        children: dict[str, set[str]] = {}
        for name in self.shapes:
            while name:
                path, _, child = name.rpartition(".")
                children.setdefault(path, set()).add(child)
                name = path
        return children

    def _sides(self, path: str) -> set[int]:
        """Return the sides of all tensors in a module."""
        inside = (self._sides(f"{path}.{child}" if path else child) for child in self.children(path))
        return set(self.shapes.get(path, ())).union(*inside)

    def kind(self, path: str) -> str:
        """Return "": files do not name classes."""
        return ""

    def is_transposed(self, path: str) -> bool | None:
        """Return None: nothing in a file multiplies."""
        return None

    def is_not_plain_linear(self, path: str, transposed: bool) -> bool:
        """Return False, for the same reason."""
        return False

    def is_known(self, path: str) -> bool:
        """Whether the configuration names a model type that the tables cover, and no code of the checkpoint's own."""
        kind = self.kind_of_part(path)
        stated = self.states_positions(path) or kind in NO_ROTARY_TYPES or kind in ROTARY_UNSAID
        return kind in self.types and stated and "auto_map" not in self.config

    def kind_of_part(self, path: str) -> str | None:
        """Return the model type of the part of the model that a module is in."""
        return next((part["model_type"] for part in self._settings_of(path) if part.get("model_type")), None)

    def states_positions(self, path: str) -> bool:
        """Whether the configuration has settings of rotary positions."""
        return self.setting(path, (*ROTARY, "use_rope")) is not None

    def own(self, path: str, attributes: tuple[str, ...]) -> object:
        """Return None: there are no modules, and what a format states of one is not told from a configuration."""
        return None


def parts_of_config(config: Mapping[str, Any], path: str, sides: Callable[[], set[int]]) -> list[Mapping[str, Any]]:
    """Return the configurations that speak of the module at a path, the nearest first, the whole last.

    A part's configuration is nested in that of the whole, under a name that a part of the path resembles:
    ``vision_config`` of ``vision_tower``. Of a model with several parts, one whose path resembles none is of the text
    if it is where a language model is and as wide, and else of nothing that is stated.

    Args:
        config: of the whole.
        path: of the module, in the whole.
        sides: returns the sides of all tensors in the module.
    """
    nested = {
        key: part
        for key, part in config.items()
        if isinstance(part, dict) and ("model_type" in part or key.endswith("_config") or key in ("encoder", "decoder"))
    }
    words = f".{path}.".replace(".encoder_attn.", ".cross_attn.")  # attention of a decoder

    # "sam_encoder" is of sam_config rather than encoder_config, "language_backbone" of text_config
    def fits(key: str) -> Iterator[tuple[bool, int, int]]:
        for name in (key.removesuffix("_config"), *PARTS.get(key, ())):
            if start := words.find(f".{name}") + 1 or max(words.find(name), 0):
                yield words[start - 1] == ".", -start, len(name)

    if best := max(((fit, key) for key in nested for fit in fits(key)), default=None):
        (_, start, length), key = best
        inside = words[length - start :].partition(".")[2].rstrip(".")
        return [*parts_of_config(nested[key], inside, sides), config]
    text = next((key for key in ("text_config", "llm_config", "language_config") if key in nested), None)
    if text and _LANGUAGE_MODEL.match(path):
        width = next((nested[text][name] for name in WIDTH if isinstance(nested[text].get(name), int)), None)
        if width is None or width in sides():  # the blocks of Cosmos 3's vision tower are not in a module of theirs
            return [nested[text], config]
    return [config]


#: Where the layers of a language model are when its part has no name of its own.
_LANGUAGE_MODEL = re.compile(r"(model\.)?(layers|h|blocks|decoder|transformer|language_model|embed)\b")


def _heads_of_side(config: Mapping[str, Any], path: str) -> object:
    """Return the number of heads of the encoder, decoder or predictor that a module is in, where each has its own."""
    sides = {"encoder": ("encoder",), "decoder": ("decoder",), "pred": ("predictor",)}
    stated: dict[str, object] = {}
    for side in sides:
        for key in (f"{side}_attention_heads", f"{side}_num_attention_heads", f"num_{side}_attention_heads"):
            if isinstance(config.get(key), int):
                stated.setdefault(side, config[key])
    inside = [side for side in stated if any(f"{name}." in path for name in sides[side])]
    if inside:
        return stated[max(inside, key=lambda side: path.rfind(sides[side][0]))]
    alone = len(stated) == 1 and not any(config.get(name) for name in NUM_HEADS)
    return next(iter(stated.values())) if alone else None


def open_checkpoint(path: str | Path, state: str | None = None, *, adapters: bool = True) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: a directory as ``save_pretrained`` or a trainer leaves it, one of the hub's cache, a ``.safetensors``
            file, a PyTorch state dict, a GGUF file, or an adapter beside its base; or a link to one of these.
        state: which weights, where there are several sets: the name of a file or directory in the directory, the
            dotted path of a mapping in a pickle, a prefix of the names; of a file and what is in it, ``file/key``.
        adapters: whether an adapter is merged; refused otherwise.

    Raises:
        CheckpointError: If there is nothing to read, or what is there is damaged or would run code.
        SeveralSets: If there are several sets of weights and ``state`` does not say which.
    """
    path = Path(path)
    try:
        return _open(path, state, adapters)
    except OSError as error:  # a name that is too long, a directory without permission, a file gone meanwhile
        where = error.filename if isinstance(error.filename, str) else path
        raise CheckpointError(f"{where} cannot be read ({error.strerror or error}); check the path.") from None


def _open(path: Path, state: str | None, adapters: bool) -> Checkpoint:
    """`open_checkpoint`, but for the errors of the file system."""
    found = find_files(path, state, _matrices_in)
    for file in found.files:
        _check_fetched(file)
    if kind(found.files[0]) == ".gguf":
        parts = parts_of(found.files[0])
        for part in parts[1:]:
            check_inside(part, part.parent)
        return _open_gguf(path, parts, found.candidates)
    state, candidates = found.state, list(found.candidates)
    stored = _StoredTensors()
    content: object = None
    for file in found.files:
        if kind(file) == ".safetensors":
            stored.add(file, *_safetensors_shapes(file, stored.header))
        else:
            content = _content(file)
            tensors, rest, keys = choose_mapping(content, state, file)
            state = rest if len(found.files) == 1 else state
            candidates += keys if len(keys) > 1 else []
            stored.add_pickled(file, tensors)
    if not stored.shapes:
        raise CheckpointError(f"{path} contains no tensors.")
    if found.listing:
        check_listed(found.listing, stored.shapes)
    stored_as, copies = choose_names(stored.shapes, state, path)
    stored_as = _with_dots(stored_as, found.files[0])

    @lru_cache(maxsize=2)  # a fused parameter is read once for its three matrices
    def load_stored(name: str) -> Tensor:
        return stored.load(stored_as[name])

    dtypes = {name: stored.dtypes[key] for name, key in stored_as.items()}
    shapes = {name: stored.shapes[stored_as[name]] for name in sorted(stored_as, key=_natural)}
    config = configuration(found.folders, found.files[0], shapes, content)
    shapes, load, codes = dequantised(shapes, dtypes, config, load_stored, stored.header, CheckpointError)
    if codes:  # the codes of a weight may have stood elsewhere
        shapes = {name: shapes[name] for name in sorted(shapes, key=_natural)}
    config, of_module = by_module(config)
    keys = tuple(dict.fromkeys([*candidates, *copies]))
    opened = Checkpoint(path, shapes, config, load, keys, of_module, codes, dtypes)
    if not is_adapter(found.files[0], shapes):
        return opened
    if not adapters:
        raise CheckpointError(f"{path} is an adapter itself; merge it with its own base first.")
    return replace(opened, **merge(opened, found.files[0], partial(open_checkpoint, adapters=False)))


@dataclass
class _StoredTensors:
    """Tensors in the files of a checkpoint, by the names under which they are stored.

    Attributes:
        files: the file of each.
        shapes: its shape.
        dtypes: its type.
        header: strings in the headers of safetensors files.
        pickled: the tensors of each PyTorch file.
    """

    files: dict[str, Path] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    pickled: dict[Path, Mapping[str, Tensor]] = field(default_factory=dict)

    def add(self, file: Path, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> None:
        """Take up the tensors of a file.

        Raises:
            CheckpointError: If a name is none that is read, or is in an earlier file too.
        """
        _check_names(shapes, file, len(self.shapes))
        for name, shape in shapes.items():
            if name in self.shapes:
                raise CheckpointError(f"{name} is both in {self.files[name].name} and in {file.name} of {file.parent}.")
            self.files[name], self.shapes[name], self.dtypes[name] = file, shape, dtypes[name]

    def add_pickled(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Take up the tensors of a PyTorch file, which are mapped from it, or in memory."""
        _check_tensors(tensors, file)
        self.pickled[file] = tensors
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.add(file, shapes, {name: tensor.dtype for name, tensor in tensors.items()})

    def load(self, name: str) -> Tensor:
        """Return a tensor, read from its file."""
        file = self.files[name]
        if file in self.pickled:
            return self.pickled[file][name]
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{name} cannot be read from {file}: {error}") from None


def _check_fetched(file: Path) -> None:
    """Refuse the line that stands for a file of Git LFS that has not been fetched."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: fetch them with git lfs pull.")


def _matrices_in(file: Path) -> set[str]:
    """Return the names of the matrices in a file; its own name if that cannot be known."""
    try:
        check_inside(file, file.parent)
        if kind(file) == ".safetensors":
            return {name for name, shape in _safetensors_shapes(file, {})[0].items() if len(shape) >= 2}
        return {name for name, tensor in choose_mapping(_content(file), None, file)[0].items() if tensor.ndim >= 2}
    except SeveralSets as several:
        return {f"{file.name}/{key}" for key in several.candidates}
    except CheckpointError as error:
        return set() if "contains no state dict" in str(error) or "is one tensor" in str(error) else {file.name}


def _open_gguf(path: Path, files: list[Path], candidates: Sequence[str]) -> Checkpoint:
    shapes, config, of_module, load, codes = read_gguf(files)
    if not shapes:
        raise CheckpointError(f"{path} contains no tensors.")
    shapes = {name: shapes[name] for name in sorted(shapes, key=_natural)}
    return Checkpoint(path, shapes, config, load, tuple(candidates), of_module, codes, types=ARCHITECTURES)


def _natural(name: str) -> list[tuple[tuple[int, str], ...]]:
    """Sort names as the model is built: layer 2 before layer 10, the encoder before its decoder."""
    name = (
        name.replace("encoder.", "0encoder.").replace("enc.blk.", "0enc.blk.").replace("encoder_attn", "~encoder_attn")
    )
    return [natural_key(part) for part in name.split(".")]


def _safetensors_shapes(file: Path, header: dict[str, str]) -> tuple[dict[str, Shape], dict[str, torch.dtype]]:
    """Return shapes and types of the tensors of a file, and add the strings of its header to ``header``."""
    try:
        with safe_open(file, framework="pt") as opened:
            header.update(opened.metadata() or {})
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
            return shapes, {name: stored_type(tensor.get_dtype()) for name, tensor in slices.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from None


def _content(file: Path) -> object:
    """Return what a PyTorch file holds: tensors, mapped, and plain containers."""
    check_archive(file)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of unusual pickles; what matters becomes an error
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's whole message would also say how to load it all the same
        unsupported = re.search(r"[Uu]nsupported [^\n]+?(?= was not|\n|$)|GLOBAL \S+", str(error))
        reason = unsupported[0].rstrip(".") if unsupported else "not a pickle of tensors"
        raise CheckpointError(
            f"{file} is a pickle that needs to run code, or is damaged, and is not loaded ({reason}); where you trust "
            "it (a whole module perhaps), load it and save its state_dict() as safetensors."
        ) from None
    except Exception as error:  # a damaged archive fails in as many ways as it has bytes
        # the words of other errors are the unpickler's own
        told = str(error) if isinstance(error, (OSError, RuntimeError)) else ""
        reason = re.split(r"\.\s|\n", told)[0].rstrip(".")[:200]
        raise CheckpointError(
            f"{file} is not a PyTorch state dict, or is damaged ({reason or 'its bytes are not a pickle'}): name the "
            "file of the weights, or copy it again from where it came."
        ) from None


def _check_names(names: Collection[str], file: Path, before: int) -> None:
    """Refuse names that no parameter has: what is done with one grows with its length and its parts."""
    if before + len(names) > MOST_TENSORS:
        raise CheckpointError(
            f"{file} brings the tensors to {before + len(names)}; more than {MOST_TENSORS} are not read."
        )
    for name in names:
        if len(name) > LONGEST_NAME or name.count(".") >= MOST_PARTS:
            raise CheckpointError(
                f"{file} names a tensor {name[:60]!r}… of {len(name)} characters and {name.count('.') + 1} parts; more "
                f"than {LONGEST_NAME} characters or {MOST_PARTS} parts are not read."
            )


def _with_dots(stored_as: dict[str, str], file: Path) -> dict[str, str]:
    """Return names with dots in place of slashes where a file has them as Flax does: ``layers/0/query/kernel``."""
    if not any(name.endswith("/kernel") for name in stored_as):
        return stored_as
    dotted = {name.replace("/", "."): stored for name, stored in stored_as.items()}
    _check_names(dotted, file, 0)
    return dotted if len(dotted) == len(stored_as) else stored_as


def _check_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse tensors without a shape of numbers or without numbers, and those that claim more than the file has."""
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.is_meta or tensor.layout is not torch.strided:
            what = "nested" if tensor.is_nested else "on the meta device" if tensor.is_meta else "sparse"
            raise CheckpointError(
                f"{name[:LONGEST_NAME]} in {file} is a {what} tensor, which is not read; save it dense."
            )
        if tensor.numel() * tensor.element_size() > file.stat().st_size:  # strides of 0 need no bytes
            raise CheckpointError(
                f"{name} in {file} claims shape {tuple(tensor.shape)}, which is more than the file holds."
            )
