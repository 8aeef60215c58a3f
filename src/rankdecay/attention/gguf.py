"""Read GGUF, the files of llama.cpp, through the package ``gguf``.

Tensors keep the names of the file (``blk.3.attn_q.weight``) and are dequantised one at a time. The settings of each
block come from the file's metadata and, where llama.cpp fixes them in its code, from its architecture:

* **Rotary planes** are neighbouring coordinates where llama.cpp turns them so (``LLAMA_ROPE_TYPE_NORM``), and half a
  head apart elsewhere. Its converter permutes the rows of W_Q and W_K of a Llama to make them neighbours; the planes of
  such a file are those of the original model, in the same order.
* **Fused** ``attn_qkv`` is [q, k, v], contiguous, whatever it was in the original model: the converter rearranges it.
* **Layers without rotary positions** are those that llama.cpp does not turn.

The header is read here and not by ``gguf.GGUFReader``, which trusts every count in a file and takes seconds to read
a tokenizer's words. It is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What depends on the
architecture was read in llama.cpp as llama-cpp-python 0.3.36 ships it: ``llama_model_rope_type`` in
``src/llama-model.cpp``, ``src/models/*.cpp``, ``tools/mtmd/clip.cpp`` and ``conversion/*.py``.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.known import KNOWN_TYPES

MAGIC = b"GGUF"

#: Architectures by how the coordinates that positions turn together lie in a head.
_PLANES = {
    "interleaved": """llama llada llama4 deci baichuan internlm2 minicpm xverse command-r cohere2 cohere2moe olmo arctic
        deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 plm chatglm granite granitemoe granitehybrid
        graniteswitch granite_swa chameleon bailingmoe bailingmoe3 neo-bert smollm3 arcee ernie4_5 ernie4_5-moe
        mistral3 mistral4 eagle3 llama-embed maincoder glm-dsa dots3note nanbeige hy_v4 glm4 muse-glimmer""",
    "half": """falcon falcon-h1 grok dbrx jina-bert-v3 modern-bert nomic-bert nomic-bert-moe eurobert stablelm bitnet
        qwen qwen2 dream qwen2moe qwen2vl qwen3 qwen3moe qwen3next qwen3vl qwen3vlmoe qwen35 qwen35moe llada-moe rnd1
        olmo2 olmoe phi2 phi3 phimoe plamo plamo2 plamo3 gemma gemma2 gemma3 gemma3n gemma4 gemma4-assistant gemma-
        embedding starcoder2 openelm gptneox codeshell orion nemotron exaone exaone4 exaone-moe minicpm3 bailingmoe2
        dots1 hunyuan-moe hunyuan-dense hunyuan_vl jais2 gpt-oss hy_v3 lfm2 lfm2moe smallthinker seed_oss grovemoe
        apertus minimax-m2 minimax-m3 cogvlm pangu-embedded afmoe laguna mimo2 step35 spark2_5 talkie mellum maple
        hrm_text glm4moe paddleocr""",
    "none": """gpt2 mpt refact bloom starcoder bert jina-bert-v2 t5 t5encoder jais jamba mamba mamba2 rwkv6 rwkv6qwen2
        rwkv7 arwkv7 wavtokenizer-dec nemotron_h nemotron_h_moe kimi-linear""",
}
_PLANES_OF = {architecture: planes for planes, names in _PLANES.items() for architecture in names.split()}
#: Model types that a file of a known architecture states.
ARCHITECTURES = frozenset(_PLANES_OF) | KNOWN_TYPES
#: Vision and audio towers without rotary positions, by their projector; the others' turn in two dimensions.
_TOWERS_WITHOUT = ("mlp", "ldp", "ldpv2", "resampler", "adapter", "gemma3", "idefics3", "lfm2", "janus_pro", "phi4",
                   "internvl", "nemotron_v2_vl", "ultravox", "voxtral", "qwen2a", "glma", "meralion", "musicflamingo",
                   "cogvlm")  # fmt: skip
#: Interleaved, but half a head apart in files that have sections for positions in several dimensions.
_SECTIONED = ("glm4", "bailingmoe3")
#: Architectures in which only the layers with a sliding window have rotary positions.
_TURNED_IN_WINDOWS = ("llama4", "smollm3", "cohere2", "cohere2moe", "exaone4", "exaone-moe", "smallthinker", "afmoe",
                      "muse-glimmer", "maple")  # fmt: skip
#: Of these, those that turn every layer unless the file states a window.
_WINDOW_IF_STATED = ("exaone4", "smallthinker")
#: Of these, those whose period begins with the layer without a window, where the others' end with it.
_FULL_FIRST = ("cohere2moe", "smallthinker")
#: Architectures whose query projection holds a gate beside each head.
_GATED = ("qwen3next", "qwen35", "qwen35moe")
#: Model types of transformers on which the scale at initialisation depends.
_MODEL_TYPES = {"gpt2": "gpt2", "starcoder": "gpt_bigcode"}
#: Their scale at initialisation where it is not 0.02, as transformers 5.23 has it.
_DEVIATIONS = {"starcoder2": 0.018042, "nemotron": 0.0134, "minicpm3": 0.1, "hy_v3": 0.006}
#: Files that are no models, by their ``general.type``.
_NO_MODEL = {
    "adapter": "a LoRA adapter: merge it into its base (llama-export-lora) and give the result",
    "imatrix": "an importance matrix, which has no weights: give the model",
}

#: Scalars of the metadata, by the number of their type; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: More than any model has; a file that claims more is damaged or hostile.
_MOST_ENTRIES, _MOST_STRINGS, _LONGEST_NAME, _MOST_DIMENSIONS = 2**20, 2**22, 2**16, 8
#: Longer arrays and strings of the metadata are passed over: words of a tokenizer, templates of a chat.
_LONGEST_KEPT = 2**16

_BLOCK = re.compile(r"(?:^|\.)blk\.(\d+)(?:\.|$)")
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class Contents(NamedTuple):
    """Contents of a model in GGUF.

    Attributes:
        shapes: shape of every tensor, by its name in the file.
        config: settings of the whole model under the names that configurations of transformers have for them.
        of_module: returns the settings of the module at a path; GGUF may state them per block.
        load: reads one tensor and dequantises it, in float32 if it was quantised.
        stored_as: the type of each tensor that is quantised, by name, such as "Q4_K".
    """

    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    of_module: Callable[[str], Mapping[str, Any]]
    load: Callable[[str], Tensor]
    stored_as: Mapping[str, str]


class _Entry(NamedTuple):
    """Location of a tensor; its size is None if the package does not know the type."""

    file: Path
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int | None


def parts_of(path: Path) -> list[Path]:
    """Return the files of the model that a file is, or is a part of: itself, or all parts of a split one, in order.

    Raises:
        CheckpointError: If a part is missing.
    """
    split = _SPLIT.fullmatch(path.name)
    if not split:
        return [path]
    base, count = split[1], int(split[3])
    files = [path.with_name(f"{base}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(min(count, _MOST_ENTRIES))]
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise CheckpointError(
            f"{path.name} is one of {count} files, and {(missing or ['none'])[0]} is not in {path.parent}."
        )
    return files


def read_gguf(files: Sequence[Path]) -> Contents:
    """Read the headers of a model, and no tensor.

    Args:
        files: the parts of the model, the first of which has its metadata.

    Raises:
        CheckpointError: If a file is damaged, or holds no model; or the package is missing.
    """
    gguf = _package(files[0])
    headers = [_read_header(file, gguf) for file in files]
    metadata, entries = headers[0].metadata, dict[str, _Entry]()
    for header in headers:
        for name, entry in header.entries.items():
            if name in entries:
                raise CheckpointError(f"{name} is both in {entries[name].file} and in {entry.file.name}.")
            entries[name] = entry
    parts, total = metadata.get("split.count", 0), metadata.get("split.tensors.count")
    if isinstance(parts, int) and parts > len(files):
        raise CheckpointError(
            f"{files[0]} is one of {parts} files; put all in one directory, named NAME-00001-of-{parts:05d}.gguf, ..."
        )
    if isinstance(total, int) and total != len(entries):
        raise CheckpointError(f"{files[0]} and its parts have {len(entries)} tensors, and should have {total}.")
    settings = _Settings(files[0], metadata)

    shapes = {name: entry.shape for name, entry in entries.items()}
    halves = _join_latent(shapes)

    @lru_cache(maxsize=2)  # a fused parameter is read once for its three matrices
    def load(name: str) -> Tensor:
        if name in halves:
            keys, values = map(load, halves[name])
            return torch.cat([keys.mT, values], 1).flatten(0, 1)
        weight = _dequantised(name, entries[name], gguf)
        scale = name.removesuffix(".weight") + ".scale"  # of the whole matrix, beside ternary and 4-bit floats
        if scale not in entries:
            return weight
        factor = _dequantised(scale, entries[scale], gguf)
        if factor.numel() != 1:
            raise CheckpointError(
                f"{scale} in {entries[scale].file} has shape {tuple(factor.shape)}, expected one number."
            )
        return weight * factor.item()

    kinds = {name: _quantised_as(entries[halves.get(name, (name,))[0]], gguf) for name in shapes}
    stored_as = {name: kind for name, kind in kinds.items() if kind}
    return Contents(shapes, settings.of_model(), settings.of_module, load, stored_as)


def _quantised_as(entry: _Entry, gguf: Any) -> str:
    """Return the name of a type whose numbers are codes; "" of floating-point numbers and of types not known."""
    if entry.size is None:
        return ""
    kind = gguf.GGMLQuantizationType(entry.kind).name
    return "" if kind in ("F64", "F32", "F16", "BF16") else kind


def _join_latent(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """Join the factors of multi-head latent attention that newer files split into keys and values.

    Newer files have ``attn_k_b`` (heads, latent, k) and ``attn_v_b`` (heads, k, latent) for ``attn_kv_b``, which is
    (heads · [keys, values], latent); its shape takes the place of theirs.

    Returns:
        The names of both parts, by the name of the whole.
    """
    halves: dict[str, tuple[str, str]] = {}
    for key in [name for name in shapes if name.endswith("attn_k_b.weight")]:
        value, whole = key.replace("attn_k_b", "attn_v_b"), key.replace("attn_k_b", "attn_kv_b")
        a, b = shapes[key], shapes.get(value, ())
        if len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2] and whole not in shapes:
            halves[whole] = key, value
            shapes[whole] = a[0] * (a[2] + b[1]), a[1]
            del shapes[key], shapes[value]
    return halves


def _package(file: Path) -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise CheckpointError(f"{file} needs the package gguf ({error}): pip install 'rankdecay[gguf]'") from None
    return gguf


# ---- settings --------------------------------------------------------------------------------------------


class _Settings:
    """Settings of the modules of a model, from its metadata."""

    def __init__(self, file: Path, metadata: Mapping[str, Any]) -> None:
        self.metadata, self.kind = metadata, str(metadata.get("general.architecture", ""))
        what = _NO_MODEL.get(str(metadata.get("general.type")))
        if what:
            raise CheckpointError(f"{file} is {what}.")
        projector = metadata.get("clip.projector_type") or metadata.get("clip.vision.projector_type")
        without = self.kind == "clip" and projector in _TOWERS_WITHOUT
        self.planes = "none" if without else _PLANES_OF.get(self.kind)

    def of_model(self) -> dict[str, Any]:
        """Return what holds for the whole model."""
        settings = {name: value for name, value in self.of_module("").items() if name.startswith(("num_", "head_"))}
        depth, shared = self._number("block_count"), self._number("attention.shared_kv_layers")
        if depth and shared:  # Gemma 3n and 4: the last layers take keys and values of an earlier one of their kind
            kinds = ["sliding_attention" if self._has_window(i) else "full_attention" for i in range(min(depth, 2**12))]
            settings |= {"num_kv_shared_layers": shared, "layer_types": kinds}
        if self.kind.startswith("gemma4"):  # where there are no values, keys take their place
            settings["attention_k_eq_v"] = True
        if self.planes:  # a model without a type is one of which not everything is known
            settings["model_type"] = _MODEL_TYPES.get(self.kind, self.kind)
        if self.kind in _DEVIATIONS:
            settings["initializer_range"] = _DEVIATIONS[self.kind]
        return settings | ({"num_hidden_layers": depth} if depth else {})

    def of_module(self, path: str) -> dict[str, Any]:
        """Return the settings of a module, under the names that configurations of transformers have for them."""
        found = _BLOCK.search(path)
        block = int(found[1]) if found else None
        tower = {"v": "vision.", "a": "audio."}.get(path.partition(".")[0], "") if self.kind == "clip" else ""
        heads = self._number(f"{tower}attention.head_count", block)
        key_heads = self._number(f"{tower}attention.head_count_kv", block)
        window = "_swa" if self._number("attention.key_length_swa") and self._has_window(block) else ""
        head_dim = self._number(f"attention.key_length{window}", block)
        value_dim = self._number(f"attention.value_length{window}", block)
        settings: dict[str, Any] = {
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": head_dim,
        }
        if head_dim and value_dim and value_dim != head_dim:
            settings["value_dim"] = value_dim
        if self.kind in _GATED:
            settings["attn_output_gate"] = True
        turned = self._is_turned(block)
        if self.planes:
            settings["use_rope"] = turned
        if self.kind == "llama4":  # norms without weights, which the large model has not
            settings["use_qk_norm"] = turned and self._number("expert_count") != 128
        if turned:
            settings |= self._rotary(block)
        return {name: value for name, value in settings.items() if value is not None}

    def _rotary(self, block: int | None) -> dict[str, Any]:
        """Return the settings of rotary positions."""
        sections = self._value("rope.dimension_sections")
        sectioned = self.kind in _SECTIONED and isinstance(sections, list) and any(sections)
        base, dims = self._value("rope.freq_base"), self._number("rope.dimension_count")
        if self._has_window(block):
            dims = self._number("rope.dimension_count_swa") or dims
        return {
            "rope_theta": base if isinstance(base, float) else 10000.0,
            "rotary_dim": dims,
            "partial_rotary_factor": 1.0,  # of a file that does not say how many, all
            "rope_interleaved": self.planes == "interleaved" and not sectioned,
        }

    def _is_turned(self, block: int | None) -> bool:
        """Whether positions turn the queries and keys of a block."""
        if self.planes in (None, "none") or self._value("rope.dimension_count") == 0:
            return False
        if self.kind.startswith("granite") and self._value("rope.scaling.finetuned") is False:
            return False
        if self.kind == "baichuan" and self._number("block_count") == 40:  # the one of 13B, with ALiBi
            return False
        pattern = self._value("attention.rope_pattern")
        if isinstance(pattern, list) and block is not None and block < len(pattern):
            return bool(pattern[block])
        if self.kind not in _TURNED_IN_WINDOWS or block is None:
            return True
        width = self._value("attention.sliding_window")
        if width == 0 or (width is None and self.kind in _WINDOW_IF_STATED):
            return True
        dense = self._number("leading_dense_block_count") if self.kind == "cohere2moe" else None
        return block < (dense or 0) or self._has_window(block)

    def _has_window(self, block: int | None) -> bool:
        """Whether a block attends within a sliding window, or a chunk: three in four, unless the file says which."""
        pattern = self._value("attention.sliding_window_pattern")
        if block is None:
            return False
        if isinstance(pattern, list):
            return block < len(pattern) and bool(pattern[block])
        if self.kind not in _TURNED_IN_WINDOWS and not isinstance(pattern, int):
            return False
        period = pattern if isinstance(pattern, int) and pattern > 0 else 4
        return block % period != (0 if self.kind in _FULL_FIRST else period - 1)

    def _value(self, key: str) -> Any:
        return self.metadata.get(f"{self.kind}.{key}")

    def _number(self, key: str, block: int | None = None) -> int | None:
        """Return a positive whole number; of a list, that of the block."""
        value = self._value(key)
        if isinstance(value, list):
            value = value[block] if block is not None and block < len(value) else None
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


# ---- files -----------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """Metadata and tensors of one file."""

    metadata: dict[str, Any]
    entries: dict[str, _Entry]


def _read_header(file: Path, gguf: Any) -> _Header:
    try:
        with file.open("rb") as opened:
            return _HeaderReader(file, opened).read(gguf)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


class _HeaderReader:
    """Reader of a header, front to back. Each count and offset is checked against the size of the file before use."""

    def __init__(self, file: Path, opened: BinaryIO) -> None:
        self.file, self.opened = file, opened
        self.size, self.at = file.stat().st_size, 0

    def read(self, gguf: Any) -> _Header:
        if self._bytes(4) != MAGIC:
            raise CheckpointError(f"{self.file} is not a GGUF file: it does not begin with {MAGIC.decode()}.")
        version = self._number("I")
        if version & 0xFFFF == 0:  # a version with its bytes reversed
            raise CheckpointError(
                f"{self.file} is big-endian; convert it with: gguf-convert-endian {self.file.name} little"
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.file} is GGUF version {version}; versions 2 and 3 are supported: convert the model again."
            )
        tensors, settings = self._count(24, _MOST_ENTRIES, "tensors"), self._count(13, _MOST_ENTRIES, "settings")
        metadata: dict[str, Any] = {}
        for _ in range(settings):
            key = self._name()
            if key in metadata:
                raise self._damaged(f"it states {key!r} twice")
            metadata[key] = self._setting(self._number("I"))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._name()
            if name in found:
                raise self._damaged(f"it has {name!r} twice")
            dims = self._number("I")
            if dims > _MOST_DIMENSIONS:
                raise self._damaged(f"{name!r} has {dims} dimensions")
            shape = tuple(reversed([self._number("Q") for _ in range(dims)]))  # the fastest comes first in the file
            found[name] = shape, self._number("I"), self._number("Q")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, expected a power of two")
        first = -(-self.at // alignment) * alignment
        return _Header(
            metadata,
            {
                name: self._entry(name, shape, kind, first + offset, gguf)
                for name, (shape, kind, offset) in found.items()
            },
        )

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, start: int, gguf: Any) -> _Entry:
        count = math.prod(shape)
        if count == 0:
            raise self._damaged(f"{name!r} has shape {shape}")
        try:
            block, amount = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            return _Entry(self.file, shape, kind, start, None)  # an error only if it is asked for
        if shape and shape[-1] % block:
            raise self._damaged(f"{name!r} has rows of {shape[-1]} numbers, in blocks of {block}")
        size = count // block * amount
        if start + size > self.size:
            raise CheckpointError(
                f"{self.file} was cut short, or is damaged: {name} of shape {shape} ends at byte {start + size}, and "
                f"the file at {self.size}; download it again."
            )
        return _Entry(self.file, shape, kind, start, size)

    def _setting(self, kind: int) -> Any:
        """Return a value of the metadata, None if it is one that is passed over."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._damaged(f"a setting is of type {kind}, which does not exist")
        kind = self._number("I")
        if kind == _STRING:
            for _ in range(self._count(8, _MOST_STRINGS, "strings")):
                self._skip(self._number("Q"))
            return None
        if kind not in _SCALARS:
            raise self._damaged(f"it has an array of type {kind}")
        each = struct.calcsize("<" + _SCALARS[kind])
        count = self._count(each, self.size, "numbers")
        if count > _LONGEST_KEPT:
            self._skip(count * each)
            return None
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self._bytes(count * each)))

    def _count(self, each: int, most: int, what: str) -> int:
        """Return how many of something follow, of which each takes at least ``each`` bytes."""
        count = self._number("Q")
        if count > most or count * each > self.size - self.at:
            raise self._damaged(f"it claims {count} {what}")
        return count

    def _name(self) -> str:
        length = self._number("Q")
        if length > _LONGEST_NAME:
            raise self._damaged(f"a name has {length} bytes")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self._damaged("a name is not text") from None

    def _text(self) -> str | None:
        length = self._number("Q")
        if length > _LONGEST_KEPT:
            self._skip(length)
            return None
        return self._bytes(length).decode(errors="replace")

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))
        return value

    def _bytes(self, count: int) -> bytes:
        content = self.opened.read(count) if count <= self.size - self.at else b""
        if len(content) != count:
            raise CheckpointError(
                f"{self.file} was cut short, or is damaged: its header extends past the end of the file."
            )
        self.at += count
        return content

    def _skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise CheckpointError(
                f"{self.file} was cut short, or is damaged: its header extends past the end of the file."
            )
        self.opened.seek(count, 1)
        self.at += count

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file} is damaged: {what}; download it again.")


def _dequantised(name: str, entry: _Entry, gguf: Any) -> Tensor:
    version = _version()
    if entry.size is None:
        raise CheckpointError(
            f"{name} in {entry.file} is of type {entry.kind}, which gguf {version} does not know; install a newer one, "
            "or convert the model in another type."
        )
    kind = gguf.GGMLQuantizationType(entry.kind)
    try:
        content = np.fromfile(entry.file, np.uint8, entry.size, offset=entry.start)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read from {entry.file}: {error}") from None
    if len(content) != entry.size:
        raise CheckpointError(f"{name} cannot be read from {entry.file}: the file was cut short since it was opened.")
    content = content.reshape(*entry.shape[:-1], -1)
    try:
        with np.errstate(all="ignore"):  # what is not finite is shown as such
            exact = kind == gguf.GGMLQuantizationType.F64
            values = content.view(np.float64) if exact else gguf.quants.dequantize(content, kind)
    except NotImplementedError:
        raise CheckpointError(
            f"{name} in {entry.file} is stored as {kind.name}, which gguf {version} does not dequantise; convert the "
            "model in another type."
        ) from None
    return torch.from_numpy(np.ascontiguousarray(values).reshape(entry.shape))


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")
