"""Weight files of a directory: trainer folders, caches of the hub, shards with an index and without.

A directory is not trusted: a link in it that leads out of it is refused, unless it leads into the cache of the hub that
the directory belongs to. A link that the caller names is followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rankdecay.attention.errors import CheckpointError
from rankdecay.attention.foreign import foreign_file, foreign_folder
from rankdecay.attention.numbering import natural_key
from rankdecay.attention.states import SeveralSets, take
from rankdecay.files import kind_of, read_bytes, real
from rankdecay.files import read_json as read_object

#: Files that hold a PyTorch state dict.
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED, ".gguf")
ADAPTER_CONFIG = "adapter_config.json"

#: Names, without the suffix, of files of trainers that hold no weights.
_NO_WEIGHTS = re.compile(
    r"(?:.*_)?(?:optimizers?|optim|schedulers?|scaler|rng_states?|random_states?|dataloader|sampler|optim_states)"
    r"(?:_state|_dict|_rank)*(?:[_-]?\d)*|train(?:ing|er)?_(?:args|state)|(?:bf16_)?zero_pp_rank_.*|args"
)
#: One of several files of a model, by name: what comes before its number, and how many there are.
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)")
#: Shards of which each holds a part of every matrix.
_SLICE = re.compile(r"(?P<stem>consolidated\.|mp_rank_)\d\d(?P<rest>(?:_model_states)?\.(?:pth|pt))")
#: Most bytes of an index or a configuration: 9 MB are the index of the 92,000 tensors of a DeepSeek V3.
LARGEST_JSON = 32 * 2**20
#: Most files of one model.
_MOST_FILES = 10_000
_DEEP = 3


class Files(NamedTuple):
    """Files of one set of weights.

    Attributes:
        files: the files.
        folders: where their configuration may be, the nearest first.
        state: what is left of the key to be found inside of the files.
        candidates: keys of all sets in the directory.
        listing: the index that was followed, if any: which tensors each of them should hold.
    """

    files: list[Path]
    folders: list[Path]
    state: str | None = None
    candidates: tuple[str, ...] = ()
    listing: Path | None = None


def find_files(path: Path, state: str | None, matrices_in: Callable[[Path], set[str]]) -> Files:
    """Return the weight files of a path.

    Args:
        path: a file or directory, or a link to one.
        state: name of a file or subdirectory, then after a slash the key inside of it.
        matrices_in: returns the names of the matrices in a file.

    Raises:
        CheckpointError: If there are none, or more than one set of them, or a format that is not read.
    """
    if not os.path.exists(path):
        if path.is_symlink():
            where = kind_of(path) or "which does not exist"
            raise CheckpointError(f"{path} is a link to {path.readlink()}, {where}.")
        if path.name and os.path.isfile(f"{path}.index"):
            raise CheckpointError(str(foreign_file(path.with_name(path.name + ".index"))))
        raise CheckpointError(f"{path} does not exist; give a directory, a .safetensors file or a PyTorch state dict.")
    if os.path.isdir(path):
        return _in_folder(path, state, matrices_in, 0)
    folders = [path.parent, *([real(path).parent] if path.is_symlink() else [])]
    file = path if path.suffix in SUFFIXES else real(path)  # a link may have any name
    if text := foreign_file(file):
        raise CheckpointError(text)
    _check_content(path)  # a link that the caller names is followed
    if kind(file) not in SUFFIXES:
        raise CheckpointError(f"{path} is not a checkpoint: expected one of {', '.join(SUFFIXES)}.")
    files = _whole([file], file.parent, state == path.name)
    for other in files:
        if other != file:
            check_inside(other, file.parent)
    return Files(files, folders, None if state == path.name else state)


def kind(file: Path) -> str:
    """Return the suffix of a file; of a blob of the hub's cache, which has none, what its first bytes imply."""
    if file.suffix in SUFFIXES:
        return file.suffix
    with file.open("rb") as opened:
        first = opened.read(9)
    if first[:4] == b"GGUF":
        return ".gguf"
    return ".pt" if first[:4] == b"PK\3\4" else ".safetensors" if first[8:] == b"{" else file.suffix


def check_inside(file: Path, folder: Path) -> None:
    """Refuse a link that leads out of the checkpoint, unless into the cache of the hub, and an empty file.

    Raises:
        CheckpointError: If the file is such a link, or empty, or not a regular file.
    """
    target, root = real(file), real(folder)
    inside = target.is_relative_to(root)
    above = next((above for above in root.parents if above.name == "snapshots"), None)
    in_cache = above is not None and target.is_relative_to(above.parent)
    if not (inside or in_cache):
        raise CheckpointError(f"{file} leads out of {folder}, to {target}; copy the file there if you trust it.")
    _check_content(file)


def _check_content(file: Path) -> None:
    kind = kind_of(file)
    if kind != "file":
        raise CheckpointError(f"{file} is {f'{kind}, ' if kind else ''}not a regular file.")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file} is empty; the download or the save was cut short.")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, which has to be a regular file of its directory, as the weights are.

    Raises:
        CheckpointError: If it cannot be read, or is no object, or leads elsewhere.
    """
    check_inside(file, file.parent)
    return read_object(file, LARGEST_JSON, CheckpointError)


def _in_folder(folder: Path, state: str | None, matrices_in: Callable[[Path], set[str]], depth: int) -> Files:
    sets = _sets(folder)
    if sets and not take(sets, state, "/"):
        sets = _obvious(sets, matrices_in)
    if not sets:
        return _in_subfolder(folder, state, matrices_in, depth)
    found = take(sets, state, "/") or _taken_by_name(folder, state)
    if found:
        key, state = found
        if os.path.isdir(folder / key):
            return _below(folder, key, state, matrices_in, depth)
    elif len(sets) == 1:
        key = next(iter(sets))
    else:
        raise SeveralSets(folder, sets, state)
    files = sets[key]() if key in sets else [folder / key]
    files = _whole(files, folder, key not in sets or key.endswith(".json"))
    for file in files:
        check_inside(file, folder)
    index = folder / key if key.endswith(".json") else None
    return Files(files, [folder], state, tuple(sets) if len(sets) > 1 else (), index)


def _taken_by_name(folder: Path, state: str | None) -> tuple[str, str | None] | None:
    """Return a file or directory that the state names although it is none of the sets."""
    names = [file.name for file in folder.iterdir() if file.suffix in SUFFIXES or os.path.isdir(file)]
    return take(names, state, "/") if state else None


def _in_subfolder(folder: Path, state: str | None, matrices_in: Callable[[Path], set[str]], depth: int) -> Files:
    """Look one level down: checkpoints of a trainer, revisions in a cache of the hub, parts of a pipeline."""
    inside = {sub.name: sub for sub in _subfolders(folder) if _has_weights(sub, depth + 1)}
    alone = os.path.isdir(folder / "snapshots") and _has_weights(folder / "snapshots", depth + 1)
    if alone and folder.name.startswith("models--"):
        return _in_cache(folder, state, matrices_in, depth)
    found = take(inside, state, "/")
    if found:
        return _below(folder, found[0], found[1], matrices_in, depth)
    if len(inside) == 1:
        return _below(folder, next(iter(inside)), state, matrices_in, depth)
    if inside and all(re.fullmatch(r"mp_rank_\d+(_\d+)?", name) for name in inside):
        raise CheckpointError(foreign_folder(folder) or f"{folder} holds slices of a model; merge them.")
    if inside:
        raise SeveralSets(folder, sorted(inside, key=natural_key), state)
    if text := _foreign(folder, depth):
        raise CheckpointError(text)
    content = sorted(file.name for file in folder.iterdir())
    raise CheckpointError(
        f"{folder} has no weights: expected *.safetensors, an index, or *{', *'.join(PICKLED)}; found "
        f"{', '.join(content[:8]) or 'nothing'}."
    )


def _in_cache(folder: Path, state: str | None, matrices_in: Callable[[Path], set[str]], depth: int) -> Files:
    """Read a repository in the cache of the hub: the revision that its main branch had when it was downloaded."""
    revisions = {sub.name: sub for sub in _subfolders(folder / "snapshots") if _has_weights(sub, depth + 1)}
    refs = [file for file in sorted((folder / "refs").glob("*")) if not os.path.isdir(file)][:_MOST_FILES]
    for file in refs:
        check_inside(file, folder)
    branches = {file.name: read_bytes(file, 1000, CheckpointError).decode("utf-8", "replace").strip() for file in refs}
    named = take({*revisions, *branches}, state, "/")
    key, state = named or ("main" if branches.get("main") in revisions else next(iter(revisions)), state)
    if not named and key != "main" and len(revisions) > 1:
        raise SeveralSets(folder, revisions, state)
    revision = branches.get(key, key)
    if revision not in revisions:
        raise CheckpointError(f"{folder} has no snapshot of {key} ({revision}) with weights; download it again.")
    return _below(folder, f"snapshots/{revision}", state, matrices_in, depth)


def _below(folder: Path, name: str, state: str | None, matrices_in: Callable[[Path], set[str]], depth: int) -> Files:
    inner = folder / name
    if not real(inner).is_relative_to(real(folder)):
        raise CheckpointError(f"{inner} leads out of {folder}, to {real(inner)}; give that directory itself.")
    if depth == _DEEP:
        raise CheckpointError(f"{folder} has no weights, nor have the directories above it; give the one that has.")
    found = _in_folder(inner, state, matrices_in, depth + 1)
    return found._replace(folders=[*found.folders, folder])


def _subfolders(folder: Path) -> list[Path]:
    return [
        sub
        for sub in sorted(folder.iterdir())
        if os.path.isdir(sub) and sub.name[0] != "." and not _no_weights(sub.name)
    ]


def _has_weights(folder: Path, depth: int) -> bool:
    if _sets(folder):
        return True
    inside = [sub for sub in _subfolders(folder) if not sub.is_symlink()] if depth < _DEEP else []  # links may circle
    return any(_has_weights(sub, depth + 1) for sub in inside)


def _foreign(folder: Path, depth: int) -> str | None:
    """Return what to say of a directory, or one in it, that is of a known format which is not read."""
    inside = [sub for sub in _subfolders(folder) if not sub.is_symlink()] if depth < _DEEP else []
    below = (_foreign(sub, depth + 1) for sub in inside)
    return foreign_folder(folder) or next(filter(None, below), None)


def _no_weights(name: str) -> bool:
    return _NO_WEIGHTS.fullmatch(name) is not None


# ---- sets of files in one directory ----------------------------------------------------------------------


def _sets(folder: Path) -> dict[str, Callable[[], list[Path]]]:
    """Return the sets of weight files in a directory by their keys: an index, shards, or a file each."""
    sets: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in SUFFIXES and not os.path.isdir(file) and not _no_weights(file.stem):
            sets.setdefault(_key(file), []).append(file)
    result: dict[str, Callable[[], list[Path]]] = {key: lambda files=files: files for key, files in sets.items()}
    for index in sorted(folder.glob("*.index.json")):
        read: Callable[[], list[Path]]
        try:
            found = files_of_index(index)
            listed, read = {file.name for file in found}, lambda found=found: found
        except CheckpointError:  # reported if this index is the one that is read
            stem = index.name.removesuffix(".index.json").partition(".")[0]
            listed = {file.name for files in sets.values() for file in files if file.name.startswith(f"{stem}-")}
            read = partial(files_of_index, index)  # which raises again
        for key, files in sets.items():
            if all(file.name in listed for file in files):
                result.pop(key, None)
        result[index.name] = read
    return result


def _key(file: Path) -> str:
    shard = _SHARD.fullmatch(file.name)
    if shard:
        return f"{shard['stem']}-*-of-{shard['count']}{shard['suffix']}"
    cut = _SLICE.fullmatch(file.name)
    return f"{cut['stem']}*{cut['rest']}" if cut else file.name


def check_listed(index: Path, names: Collection[str]) -> None:
    """Refuse files that lack a weight of a layer which their index lists: its layer would be left out of every page.

    What has no number of a layer, as an embedding that is tied, some libraries list and do not save.

    Raises:
        CheckpointError: If one is missing.
    """
    content = _weight_map(index)
    layers = (name for name in content if name.endswith("weight") and any(map(str.isdigit, name.split("."))))
    if missing := next((name for name in layers if name not in names), None):
        raise CheckpointError(
            f"{index.name} says that {missing[:200]} is in {content[missing][:200]}, which does not have it; download "
            "the file again, or write the index anew."
        )


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files.")
    return content


def files_of_index(index: Path) -> list[Path]:
    """Return the files that an index lists, in its order.

    Raises:
        CheckpointError: If one does not exist, or there are more than any model has.
    """
    names = dict.fromkeys(_weight_map(index).values())
    if len(names) > _MOST_FILES:
        raise CheckpointError(f"{index} names {len(names)} files; a model of more than {_MOST_FILES} is not read.")
    files = [index.parent / name for name in names]
    if missing := next((file for file in files if not os.path.exists(file)), None):
        raise CheckpointError(
            f"{index.name} names {missing.name[:200]}, which is not in {index.parent}; download it again."
        )
    return files


def _obvious(
    sets: dict[str, Callable[[], list[Path]]], matrices_in: Callable[[Path], set[str]]
) -> dict[str, Callable[[], list[Path]]]:
    """Leave out what is no set of its own: files without weights, and the older format of the same weights."""
    if len(sets) > 1:
        stored = {_model(key) for key in sets if ".safetensors" in key}
        sets = {key: of for key, of in sets.items() if ".bin" not in key or _model(key) not in stored}
    if len(sets) > 1:
        single = {key: matrices_in(of()[0]) for key, of in sets.items() if "*" not in key and not key.endswith(".json")}
        sets = {key: of for key, of in sets.items() if key not in single or single[key]}
        names = [name for key in sets for name in single.get(key, ())]
        if len(sets) > 1 and len({re.sub(r"\d+", "#", key) for key in sets}) == 1 and len(set(names)) == len(names):
            files = sorted((file for of in sets.values() for file in of()), key=lambda file: natural_key(file.name))
            return {re.sub(r"\d+", "*", files[0].name): lambda: files}  # numbered, each with other tensors: parts
    return sets


def _model(key: str) -> str:
    """Return the name of a file without its format: ``pytorch_model.bin`` and ``model.safetensors`` are one."""
    return re.sub(r"pytorch_|-\*-of-\d+|\.index\.json$|\.(safetensors|bin)\b", "", key)


def _whole(files: list[Path], folder: Path, insisted: bool) -> list[Path]:
    """Return all shards of the model that files belong to.

    Raises:
        CheckpointError: If one is missing, or each holds a part of every matrix.
    """
    first = files[0]
    if _SLICE.fullmatch(first.name):
        slices = sorted(file.name for file in folder.iterdir() if _key(file) == _key(first))
        if len(slices) > 1:
            raise CheckpointError(
                f"{first.name} is one of {len(slices)} model-parallel shards in {folder} ({', '.join(slices[:3])}, …), "
                "each with a part of every matrix, which are not joined; convert them to one model (for Llama: "
                "python -m transformers.models.llama.convert_llama_weights_to_hf)."
            )
    shard = _SHARD.fullmatch(first.name)
    if shard is None or insisted or len(files) >= int(shard["count"]):
        return files
    names = [
        f"{shard['stem']}-{number:05d}-of-{shard['count']}{shard['suffix']}"
        for number in range(1, min(int(shard["count"]), 10_000) + 1)
    ]
    missing = [name for name in names if not os.path.exists(folder / name)]
    if missing:
        raise CheckpointError(
            f"{first.name} is one of {int(shard['count'])} files of a model, and {missing[0]} is not in {folder}; "
            f"download it, or read this one alone with --state {first.name} (state= in Python)."
        )
    return [folder / name for name in names]
