"""Structured damage of checkpoints and run directories, from a seed.

A damage is a function of a random generator and the root of a copy; it changes files and returns what it did, in words,
or None where there is nothing that it can damage.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

Damage = Callable[[Random, Path], str | None]

HOSTILE = "evil\x1b[2J\x1b]0;owned\x07\nrankdecay: error: a line that is none\r=1+1\u202e"
#: Values that a number, a name or a list in a file may be replaced by; a marker starts with "@".
ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    1e308,
    -1e308,
    0.5,
    1e-320,
    2**31,
    2**63,
    10**30,
    "",
    "x",
    "4",
    "١٢",
    "⁴",
    "½",
    "\ud800",
    HOSTILE,
    [],
    {},
    [[]],
    [None],
    {"a": None},
    [1, 2, 3],
    "a." * 10_000,
    "x" * 20_000,
    "../../../etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "model.safetensors",
    ".",
    "..",
    "@inf",
    "@-inf",
    "@nan",
    "@digits",
    "@deep",
    "@dict",
    3.5,
    -0.0,
]


def files_of(root: Path, *suffixes: str) -> list[Path]:
    """Return the files below a root, links among them, in a fixed order; with suffixes those alone."""
    found = [path for path in sorted(root.rglob("*")) if path.is_symlink() or not path.is_dir()]
    return [path for path in found if not suffixes or path.suffix in suffixes]


def regular(root: Path, *suffixes: str) -> list[Path]:
    """Return the regular files that may be changed: no link that leads out, whose target is not ours."""
    inside = os.path.realpath(root) + os.sep
    found = [path for path in files_of(root, *suffixes) if path.is_file() and os.path.realpath(path).startswith(inside)]
    return [path for path in found if path.stat().st_size < 2**24]


def _one(rng: Random, found: list[Path]) -> Path | None:
    return rng.choice(found) if found else None


# ---- any file ----------------------------------------------------------------------------------------------


def flipped(rng: Random, root: Path) -> str | None:
    return _bytes_changed(rng, root, "bytes changed", lambda data: _flip(rng, data))


def cut_off(rng: Random, root: Path) -> str | None:
    return _bytes_changed(rng, root, "cut off", lambda data: data[: rng.randrange(len(data) + 1)])


def cut_out(rng: Random, root: Path) -> str | None:
    def cut(data: bytes) -> bytes:
        start = rng.randrange(len(data) + 1)
        return data[:start] + data[start + rng.choice([1, 8, 64, 1000]) :]

    return _bytes_changed(rng, root, "cut out", cut)


def put_in(rng: Random, root: Path) -> str | None:
    def put(data: bytes) -> bytes:
        start = rng.randrange(len(data) + 1)
        more = rng.choice([b"\0" * 64, b"\xef\xbb\xbf", b"{", b"\n", b"\xff\xfe", data[:64], b"PK\3\4", b"\x1b[2J"])
        return data[: start if rng.random() < 0.7 else 0] + more + data[start if rng.random() < 0.7 else 0 :]

    return _bytes_changed(rng, root, "put in", put)


def _flip(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    reach = len(changed) if rng.random() < 0.5 else min(len(changed), 400)
    for _ in range(rng.choice([1, 3, 30]) if changed else 0):
        changed[rng.randrange(reach)] = rng.randrange(256)
    return bytes(changed)


def _bytes_changed(rng: Random, root: Path, what: str, change: Callable[[bytes], bytes]) -> str | None:
    path = _one(rng, regular(root))
    if path is None:
        return None
    path.write_bytes(change(path.read_bytes()))
    return f"{path.name}: {what}"


def removed(rng: Random, root: Path) -> str | None:
    path = _any(rng, root)
    if path is None:
        return None
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return f"{path.name}: removed"


def replaced(rng: Random, root: Path) -> str | None:
    """Put something else than a regular file in a file's place, or a link to another."""
    path = _any(rng, root)
    if path is None:
        return None
    (root.parent / "outside.json").write_text('{"model_type": "outside"}')
    others = [other for other in files_of(root) if other != path]
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    kind = rng.choice(
        [
            "directory",
            "full",
            "fifo",
            "socket",
            "circle",
            "zero",
            "random",
            "outside",
            "nowhere",
            "long",
            "huge",
            "empty",
            "other",
            "linked",
            "proc",
        ]
    )
    if kind == "directory":
        path.mkdir()
    elif kind == "full":
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"nothing")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        if len(str(path)) > 100:
            return None
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(rng.choice([2**26 + 1, 2**32, 2**40]))
    elif kind == "empty":
        path.touch()
    elif kind == "other" and others:
        source = rng.choice(others)
        if source.is_file():
            shutil.copy(source, path)
    elif kind == "linked" and others:
        path.symlink_to(rng.choice(others))
    else:
        targets = {
            "circle": path.name,
            "zero": "/dev/zero",
            "random": "/dev/urandom",
            "outside": str(root.parent / "outside.json"),
            "nowhere": "gone",
            "long": "x" * 300,
            "proc": "/proc/self/maps",
        }
        try:
            path.symlink_to(targets.get(kind, "gone"))
        except OSError:
            return None
    return f"{path.name}: {kind}"


def _any(rng: Random, root: Path) -> Path | None:
    found = files_of(root)
    if rng.random() < 0.15:
        found = [path for path in sorted(root.rglob("*")) if path.is_dir()] or found
    return _one(rng, found)


def added(rng: Random, root: Path) -> str | None:
    """Put a file beside the others that may be taken for one of them."""
    beside = _one(rng, files_of(root))
    if beside is None:
        return None
    name = rng.choice(
        [
            "model.safetensors",
            "pytorch_model.bin",
            "model.safetensors.index.json",
            "config.json",
            "params.json",
            "model_config.yaml",
            "open_clip_config.json",
            "adapter_config.json",
            "lit_config.json",
            "00000099.npz",
            "x.npz",
            "checkpoint.safetensors",
            "under_way-7.safetensors",
            "summary.json",
            "metrics.jsonl",
            "report.html",
            "-1.npz",
            "a\x1b[2Jb\nc.safetensors",
            "=1+1.safetensors",
            "\udcff.safetensors",
            "x" * 240 + ".bin",
            "x.partial",
            "99.npz",
            "zarr.json",
            "model.gguf",
            "model-00001-of-99999.safetensors",
            "model-00002-of-00003.bin",
            "config.json.part",
        ]
    )
    path = beside.parent / name
    if path.exists():
        return None
    kind = rng.choice(["copy", "empty", "text", "directory", "fifo"])
    if kind == "copy" and beside.is_file() and beside.stat().st_size < 2**24:
        shutil.copy(beside, path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_text("" if kind == "empty" else rng.choice(["{}", "[]", "null", "1", "{" * 5000, '{"a": [']))
    return f"{name!r} added, {kind}"


def renamed(rng: Random, root: Path) -> str | None:
    path = _any(rng, root)
    if path is None:
        return None
    name = rng.choice(
        [
            f"{HOSTILE[:40].replace('/', '')}{path.suffix}",
            f"{path.stem}2{path.suffix}",
            f"=x{path.suffix}",
            f"{'n' * 230}{path.suffix}",
            f"{path.stem}.bin",
            f"{path.stem}.npz",
            f"{path.stem}.json",
        ]
    )
    if path.with_name(name).exists():
        return None
    path.rename(path.with_name(name))
    return f"{path.name}: renamed to {name!r}"


# ---- JSON --------------------------------------------------------------------------------------------------


def json_changed(rng: Random, root: Path) -> str | None:
    """Change values and keys anywhere in a JSON file, among them some that JSON only just allows."""
    path = _one(rng, regular(root, ".json"))
    if path is None:
        return None
    try:
        value = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError, RecursionError):
        return None
    said = [_changed(rng, value) for _ in range(rng.choice([1, 1, 2, 4]))]
    path.write_text(_text(value), errors="surrogatepass")
    return f"{path.name}: {', '.join(said)}"


def _changed(rng: Random, value: Any) -> str:
    places = list(_places(value))
    if not places:
        return "nothing"
    holder, key = rng.choice(places)
    how = rng.choice(["value", "value", "value", "removed", "key", "number"])
    if how == "number":
        numbers = [(h, k) for h, k in places if isinstance(h[k], (int, float)) and not isinstance(h[k], bool)]
        if not numbers:
            return "nothing"
        holder, key = rng.choice(numbers)
        holder[key] = rng.choice(
            [-1, 0, 1, 10**6, 2**40, 1e308, -0.5, "@inf", "@nan", "@digits", 3.5, holder[key] + 1, "4"]
        )
    elif how == "removed":
        del holder[key]
    elif how == "key" and isinstance(holder, dict):
        holder[rng.choice(["x", "", HOSTILE, "name", "model_type", "a.b.c", "\ud800"])] = holder.pop(key)
    else:
        holder[key] = rng.choice(ODD)
    return f"{key!r} {how}"[:80]


def _places(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return [(value, key) for key in value] + [place for item in value.values() for place in _places(item)]
    if isinstance(value, list):
        return [(value, i) for i in range(len(value))] + [place for item in value for place in _places(item)]
    return []


def _text(value: Any) -> str:
    text = json.dumps(value)
    marks = {
        "@inf": "Infinity",
        "@-inf": "-Infinity",
        "@nan": "NaN",
        "@digits": "9" * 5000,
        "@deep": "[" * 3000 + "]" * 3000,
        "@dict": '{"a":' * 500 + "1" + "}" * 500,
    }
    for mark, text_of in marks.items():
        text = text.replace(f'"{mark}"', text_of)
    return text


# ---- safetensors -------------------------------------------------------------------------------------------


def header_changed(rng: Random, root: Path) -> str | None:
    """Change the header of a safetensors file, which keeps its length field right."""
    path = _one(rng, regular(root, ".safetensors"))
    if path is None:
        return None
    data = path.read_bytes()
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
        names = [name for name in header if name != "__metadata__"]
    except (ValueError, struct.error, UnicodeDecodeError, RecursionError, MemoryError):
        return None
    how = rng.choice(["value", "name", "many", "shape", "dtype", "metadata", "long", "twice"])
    if not names:
        return None
    name = rng.choice(names)
    entry = header[name]
    if not isinstance(entry, dict):
        return None
    if how == "value":
        _changed(rng, header)
    elif how == "name":
        header[
            rng.choice(
                [
                    HOSTILE,
                    "",
                    ".",
                    "..",
                    "a" + ".b" * 2000,
                    name + ".",
                    "." + name,
                    name.upper(),
                    "١.weight",
                    "x" * 10_000,
                    name.replace("0", "9" * 30),
                    name.replace("0", "²"),
                    "model.layers.0.self_attn",
                ]
            )
        ] = header.pop(name)
    elif how == "many":
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        form = rng.choice(["model.layers.{}.self_attn.q_proj.weight", "x{}", "a.{}.b.c.d.e.weight", "encoder{}.q"])
        count = rng.choice([100, 3000])
        header |= {form.format(i): empty for i in range(count)}
    elif how == "shape" and isinstance(entry.get("shape"), list):
        shape = entry["shape"]
        total = int(np.prod([size for size in shape if isinstance(size, int)] or [1]))
        entry["shape"] = rng.choice(
            [
                [total],
                [1, total],
                [total, 1],
                [0, 5],
                [],
                shape[::-1],
                [1, *shape],
                [*shape, 1],
                [2**40, 2**40],
                [-1, -total],
                [2, 2, max(1, total // 4)],
            ]
        )
        if 0 in entry["shape"]:
            entry["data_offsets"] = [0, 0]
    elif how == "dtype":
        entry["dtype"] = rng.choice(
            ["F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X", "U16", "I8"]
        )
    elif how == "metadata":
        header["__metadata__"] = rng.choice(
            [{}, {"checkpoint": "{}"}, {"a": 1}, [], {"checkpoint": _text(ODD[:9])}, {"x": HOSTILE}]
        )
    elif how == "long":
        header["a" * 100 + ".a" * rng.choice([5000, 10_000])] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = _text(header).encode("utf-8", "surrogatepass")
    if how == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return f"{path.name}: header, {how} of {name[:60]!r}"


def tensors_changed(rng: Random, root: Path) -> str | None:
    """Save the tensors of a safetensors file again, one of another shape, kind or content."""
    from safetensors.torch import load, save

    path = _one(rng, regular(root, ".safetensors"))
    if path is None:
        return None
    try:
        tensors = load(path.read_bytes())
    except Exception:  # damaged before
        return None
    if not tensors:
        return None
    name = rng.choice(list(tensors))
    try:
        tensors[name] = _other_tensor(rng, tensors[name]).contiguous()
        path.write_bytes(save(tensors))
    except Exception:  # this kind is none that the format has
        return None
    return f"{path.name}: {name} is {tuple(tensors[name].shape)} {tensors[name].dtype}"


def _other_tensor(rng: Random, tensor: torch.Tensor) -> torch.Tensor:
    shape = tuple(tensor.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rng.choice(
            [
                lambda: torch.zeros(()),
                lambda: torch.zeros(0),
                lambda: torch.zeros((0, *shape[1:])),
                lambda: torch.zeros((*shape[:-1], 0)),
                lambda: torch.zeros(shape),
                lambda: torch.full(shape, torch.nan),
                lambda: torch.full(shape, 1e38),
                lambda: torch.full(shape, 1e-40),
                lambda: torch.full(shape, torch.inf),
                lambda: torch.randn(shape[::-1]),
                lambda: torch.randn((1, *shape)),
                lambda: torch.randn((*shape, 1)),
                lambda: torch.randn((2, *shape)),
                lambda: torch.randn([size + 1 for size in shape]),
                lambda: torch.randn(shape, dtype=torch.complex64),
                lambda: torch.zeros(shape, dtype=torch.bool),
                lambda: torch.ones(shape, dtype=torch.int64),
                lambda: torch.randn(shape).to(torch.float8_e5m2),
                lambda: torch.randn(shape, dtype=torch.float64) * 1e200,
                lambda: torch.randn([2 * size for size in shape]),
                lambda: torch.randn(shape).half(),
                lambda: torch.ones((4096, 1)),
                lambda: torch.ones((1, 4096)),
            ]
        )()


# ---- pickles -----------------------------------------------------------------------------------------------


def pickle_changed(rng: Random, root: Path) -> str | None:
    """Save what a PyTorch file holds again, with tensors and containers that few programs write."""
    path = _one(rng, regular(root, ".bin", ".pt", ".pth"))
    if path is None:
        return None
    try:
        content = torch.load(path, weights_only=False)
    except Exception:  # damaged before
        return None
    if not isinstance(content, dict) or not content:
        return None
    states = [content, *(value for value in content.values() if isinstance(value, dict) and value)]
    state = rng.choice(states)
    key = rng.choice(list(state))
    tensor = state[key] if isinstance(state[key], torch.Tensor) else torch.randn(4, 4)
    kind = rng.choice(
        [
            "tensor",
            "tensor",
            "sparse",
            "nested",
            "expanded",
            "itself",
            "shared",
            "deep",
            "keys",
            "names",
            "parameter",
            "list",
            "quantized",
            "complex",
            "meta",
            "long",
            "alias",
            "scalar",
            "set",
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if kind == "tensor":
                state[key] = _other_tensor(rng, tensor)
            elif kind == "sparse":
                state[key] = tensor.to_sparse() if rng.random() < 0.5 else tensor.to_sparse_csr()
            elif kind == "nested":
                state[key] = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])
            elif kind == "expanded":
                state[key] = torch.ones(1).expand(rng.choice([2**20, 2**14]), 2**14)
            elif kind == "itself":
                state["again"] = content
                if rng.random() < 0.5:
                    state["more"] = [content, state, {"x": state}]
            elif kind == "shared":
                inner: Any = {"a": torch.zeros(2, 2)}
                for _ in range(rng.choice([5, 12, 30])):
                    inner = {str(i): inner for i in range(10)}
                state[rng.choice(["model", "ema", "inner"])] = inner
            elif kind == "deep":
                inner = {"w": tensor}
                for _ in range(rng.choice([5, 100, 300])):
                    inner = {"m": inner}
                state["deep"] = inner
            elif kind == "keys":
                state[rng.choice([3, None, True, 2.5, (1, 2), b"x", "", ".", HOSTILE, "\ud800"])] = tensor
            elif kind == "names":
                state[rng.choice([f"a{'.b' * 10_000}", "x" * 20_000, f"{key}.{key}", f"{key}.0"])] = tensor
            elif kind == "parameter":
                state[key] = torch.nn.Parameter(tensor.float())
            elif kind == "list":
                state[key] = rng.choice([[tensor], [tensor] * 3, (tensor, [tensor]), [], {"weight": tensor}])
            elif kind == "quantized":
                state[key] = torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
            elif kind == "complex":
                state[key] = torch.complex(tensor.float(), tensor.float())
            elif kind == "meta":
                state[key] = torch.empty(tensor.shape, device="meta")
            elif kind == "long":
                state |= {
                    f"{rng.choice(['model.layers', 'x'])}.{i}.q_proj.weight": torch.zeros(1, 1) for i in range(2000)
                }
            elif kind == "alias":
                state["encoder.x"] = state["decoder.x"] = tensor
            elif kind == "set":
                state[key] = {1, 2, 3}
            else:
                state[key] = rng.choice(ODD[:20])
            torch.save(content, path)
        except Exception:  # this cannot be saved
            return None
    return f"{path.name}: {kind} at {str(key)[:60]!r}"


def zip_changed(rng: Random, root: Path) -> str | None:
    """Write an archive again, its members compressed, renamed, missing or of another length."""
    found = [path for path in regular(root, ".bin", ".pt", ".pth", ".npz") if zipfile.is_zipfile(path)]
    if not found:
        return None
    path = rng.choice(found)
    kind = rng.choice(["compressed", "renamed", "missing", "long", "bomb", "twice", "empty"])
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # damaged before
        return None
    if not members:
        return None
    name = rng.choice(list(members))
    if kind == "renamed":
        members[rng.choice(["../../out", "/etc/x", name + "x", HOSTILE])] = members.pop(name)
    elif kind == "missing":
        del members[name]
    elif kind == "long":
        members[name] += members[name]
    elif kind == "empty":
        members[name] = b""
    elif kind == "bomb":
        members[name] = members[name][: rng.choice([0, 128])] + b"\0" * 2**25
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind in ("compressed", "bomb") else 0) as archive,
    ):
        warnings.simplefilter("ignore")
        for member, data in members.items():
            archive.writestr(member, data)
        if kind == "twice":
            archive.writestr(name, b"x")
    return f"{path.name}: archive, {kind} {name!r}"


# ---- GGUF --------------------------------------------------------------------------------------------------


def gguf_changed(rng: Random, root: Path) -> str | None:
    """Replace a number of the header: the whole is a sequence of lengths, types and counts."""
    path = _one(rng, regular(root, ".gguf"))
    if path is None:
        return None
    data = bytearray(path.read_bytes())
    where = rng.randrange(4, min(len(data), 1200))
    number = rng.choice([0, 1, 2**16, 2**31, 2**32 - 1, 2**62, 2**64 - 1])
    form = "<Q" if rng.random() < 0.5 else "<I"
    data[where : where + struct.calcsize(form)] = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
    path.write_bytes(data)
    return f"{path.name}: {number} at {where}"


# ---- run directories ---------------------------------------------------------------------------------------


def lines_changed(rng: Random, root: Path) -> str | None:
    """Change lines of the metrics: missing, twice, out of order, JSON of another kind, no JSON at all."""
    path = _one(rng, regular(root, ".jsonl"))
    if path is None:
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines:
        return None
    number = rng.randrange(len(lines))
    kind = rng.choice(
        ["missing", "twice", "swapped", "other", "value", "value", "cut", "joined", "blank", "first", "digit"]
    )
    if kind == "missing":
        del lines[number]
    elif kind == "twice":
        lines.insert(rng.randrange(len(lines)), lines[number])
    elif kind == "swapped":
        rng.shuffle(lines)
    elif kind == "other":
        lines[number] = rng.choice(
            [
                b"1\n",
                b"null\n",
                b"[]\n",
                b'"x"\n',
                b"{}\n",
                b"NaN\n",
                b"\xff\n",
                b"\n",
                b"{" * 9000 + b"\n",
                b'{"step": 1}\n',
                b"\0" * 100 + b"\n",
                b"x" * 100_000 + b"\n",
            ]
        )
    elif kind == "value":
        try:
            value = json.loads(lines[number])
        except (ValueError, RecursionError):
            return None
        said = _changed(rng, value)
        lines[number] = _text(value).encode("utf-8", "surrogatepass") + b"\n"
        kind = f"value, {said}"
    elif kind == "cut":
        lines[number] = lines[number][: rng.randrange(len(lines[number]))]
    elif kind == "joined":
        lines[number] = lines[number].rstrip(b"\n")
    elif kind == "blank":
        lines.insert(number, b"\n")
    elif kind == "first":
        del lines[number:]
    elif kind == "digit":
        line = bytearray(lines[number])
        digits = [i for i, byte in enumerate(line) if 48 <= byte <= 57]
        if digits:
            line[rng.choice(digits)] = rng.randrange(48, 58)
        lines[number] = bytes(line)
    path.write_bytes(b"".join(lines))
    return f"{path.name}: line {number + 1} {kind}"


def arrays_changed(rng: Random, root: Path) -> str | None:
    """Save the arrays of a snapshot again, one of another shape or kind, missing, or with words of a stranger."""
    path = _one(rng, regular(root, ".npz"))
    if path is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except Exception:  # damaged before
        return None
    if not arrays:
        return None
    name = rng.choice(list(arrays))
    array = arrays[name]
    kind = rng.choice(
        ["missing", "empty", "scalar", "text", "nan", "transposed", "object", "longer", "complex", "bool", "more"]
    )
    if kind == "missing":
        del arrays[name]
    elif kind == "more":
        arrays[HOSTILE.replace("/", "")] = np.zeros(3)
    else:
        arrays[name] = {
            "empty": lambda: array[:0],
            "scalar": lambda: np.float32(1),
            "text": lambda: np.array([HOSTILE] * max(1, len(np.atleast_1d(array)))),
            "nan": lambda: np.full(array.shape, np.nan),
            "transposed": lambda: np.ascontiguousarray(array.T),
            "object": lambda: np.array([{"a": 1}], dtype=object),
            "longer": lambda: np.concatenate([np.atleast_1d(array)] * 2),
            "complex": lambda: np.ones(array.shape, complex),
            "bool": lambda: np.ones(array.shape, bool),
        }[kind]()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue())
    return f"{path.name}: array {name} {kind}"


EVERY: tuple[Damage, ...] = (flipped, cut_off, cut_out, put_in, removed, replaced, replaced, added, renamed)
OF_CHECKPOINTS: tuple[Damage, ...] = (
    *EVERY,
    json_changed,
    json_changed,
    header_changed,
    header_changed,
    tensors_changed,
    pickle_changed,
    pickle_changed,
    zip_changed,
    gguf_changed,
)
OF_RUNS: tuple[Damage, ...] = (
    *EVERY,
    json_changed,
    json_changed,
    json_changed,
    lines_changed,
    lines_changed,
    lines_changed,
    arrays_changed,
    header_changed,
    tensors_changed,
    zip_changed,
)
