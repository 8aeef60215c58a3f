"""Texts as arrays of tokens, split for training and validation.

Without a tokenizer a token is a byte, so any text will do and nothing is downloaded. Several documents are split whole:
those with the smallest SHA-1 of their name are for validation, the same ones on every machine. Of one document it is
the end. A byte of zero, or the tokenizer's end of text, is between documents.

A batch depends on the seed and the step alone, so that a resumed run sees the texts it would have seen.
"""

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rankdecay.files import read_bytes
from rankdecay.lab.errors import SettingError

LARGEST = 2**31  # bytes of one file: all of a text is in memory, several times
# Not part of the library, or no prose and no program: tables of characters, the topics of pydoc.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
BYTES = 256


class Document(NamedTuple):
    """Name and bytes of one text."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
        name: of its source.
        training: (tokens,) unsigned integers.
        validation: (tokens,) the same, of documents that are not in ``training``.
        vocabulary: number of distinct tokens.
        tokenizer: its name or path; None for bytes.
    """

    name: str
    training: np.ndarray
    validation: np.ndarray
    vocabulary: int = BYTES
    tokenizer: str | None = None

    @property
    def sha1(self) -> str:
        """Fingerprint of the text and its split."""
        digest = hashlib.sha1(self.training.tobytes(), usedforsecurity=False)
        digest.update(b"|" + self.validation.tobytes())
        return digest.hexdigest()[:12]


# --- where texts are ---


def standard_library() -> list[Document]:
    """The modules of the Python that runs, without tests and tables: about 9 MB of programs and prose."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    return [Document(path.relative_to(root).as_posix(), path.read_bytes()) for path in files]


def read_text(path: str | Path) -> list[Document]:
    """Read a file, or every file below a directory but the hidden ones.

    Raises:
        SettingError: If there is nothing, or what is there cannot be read or is no text.
    """
    root = Path(path)
    try:
        files = [file for file in sorted(root.rglob("*")) if file.is_file()] if root.is_dir() else [root]
        names = {file: file.relative_to(root) for file in files}
        visible = [file for file, name in names.items() if not any(part.startswith(".") for part in name.parts)]
        if not os.path.exists(root):
            raise FileNotFoundError
        documents = [Document(names[file].as_posix(), read_bytes(file, LARGEST, SettingError)) for file in visible]
    except FileNotFoundError:
        raise SettingError(f"--text {path} does not exist: give a text file, or a directory of them") from None
    except OSError as error:
        raise SettingError(f"--text {error.filename} cannot be read ({error.strerror}): check the file") from None
    for document in documents:
        if b"\0" in document.content:
            raise SettingError(
                f"--text {root / document.name} is not a text, it has zero bytes: remove it, or give a text file"
            )
    if not any(document.content for document in documents):
        raise SettingError(f"--text {path} is empty: give a text file, or a directory of them")
    return documents


def read_dataset(name: str, share: float) -> tuple[list[Document], list[Document]]:
    """Load a data set of Hugging Face, from the hub or from this machine: documents to train on and to validate with.

    Args:
        name: on the hub, with a configuration perhaps as ``name:configuration``; or a directory of
            ``Dataset.save_to_disk`` or of data files.
        share: of the rows, for validation, if the data set has no split for it.

    Raises:
        SettingError: If `datasets` is not installed, the data set is not found, or has no column of texts.
    """
    datasets = _package("datasets", "dataset", "give --text")
    path, _, configuration = (name, "", "") if Path(name).exists() else name.partition(":")
    saved = any((Path(path) / file).exists() for file in ("dataset_dict.json", "state.json"))
    try:
        data = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, configuration or None)
    except Exception as error:  # of the network, of the hub, of a hundred formats
        raise _not_loaded("dataset", name, error, "check the name, or give --text") from None
    splits: dict[str, Any] = dict(data) if isinstance(data, dict) else {"train": data}
    if "train" not in splits:
        raise SettingError(f"--dataset {name} has no split 'train' but {', '.join(splits)}: give another data set")
    training = _rows(name, "train", splits["train"])
    other = next((split for split in ("validation", "test") if split in splits), None)
    return split(training, share) if other is None else (training, _rows(name, other, splits[other]))


def _package(name: str, setting: str, instead: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        needs = f"--{setting} needs the package {name}: pip install 'rankdecay[{name}]'"
        raise SettingError(f"{needs}, or {instead}") from None


def _not_loaded(setting: str, name: str, error: Exception, instead: str) -> SettingError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return SettingError(f"--{setting} {name} cannot be loaded ({reason}): {instead}")


def _rows(name: str, of: str, data: Any) -> list[Document]:
    columns = [column for column, feature in data.features.items() if getattr(feature, "dtype", "") == "string"]
    column = "text" if "text" in columns else next(iter(columns), None)
    if column is None or ("text" not in columns and len(columns) > 1):
        found = ", ".join(data.features)
        raise SettingError(f"--dataset {name} has no column 'text' but {found}: rename the one with the texts")
    return [Document(f"{of}/{i}", text.encode()) for i, text in enumerate(data[column]) if text]


def split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Split documents for training and validation: whole ones, or the end of the only one.

    Args:
        documents: at least one.
        share: of the documents, or of the bytes of the only one, for validation; at least one.
    """
    if len(documents) == 1:
        name, content = documents[0]
        place = len(content) - round(len(content) * share)
        return [Document(name, content[:place])], [Document(name, content[place:])]
    order = sorted(documents, key=lambda d: hashlib.sha1(d.name.encode(), usedforsecurity=False).digest())
    count = min(max(1, round(share * len(order))), len(order) - 1)
    chosen = {document.name for document in order[:count]}
    return (
        [document for document in documents if document.name not in chosen],
        [document for document in documents if document.name in chosen],
    )


# --- tokens ---


def load(*, text: str | None, dataset: str | None, tokenizer: str | None, share: float) -> Corpus:
    """Load the text that the settings name; by default Python's standard library.

    Raises:
        SettingError: If there is none, or it cannot be read.
    """
    if not 0 < share < 1:
        raise SettingError(f"--valid-share {share:g} must be between 0 and 1, without both: for example 0.1")
    if text is not None and dataset is not None:
        raise SettingError(f"--text {text} and --dataset {dataset} are two texts: give one of them")
    if dataset is not None:
        name, parts = dataset, read_dataset(dataset, share)
    elif text is not None:
        name, parts = text, split(read_text(text), share)
    else:
        name, parts = "Python's standard library", split(standard_library(), share)
    if tokenizer is None:
        return Corpus(name, _bytes(parts[0]), _bytes(parts[1]))
    model = _tokenizer(tokenizer)
    training, validation = (_tokens(part, model, name) for part in parts)
    return Corpus(name, training, validation, len(model), tokenizer)


def _bytes(documents: Sequence[Document]) -> np.ndarray:
    return np.frombuffer(b"\0".join(document.content for document in documents), np.uint8)


def _tokenizer(name: str) -> Any:
    transformers = _package("transformers", "tokenizer", "leave it out")
    try:
        if Path(name).is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=name)
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of the network, of the hub, of a damaged file
        instead = "give a directory, a tokenizer.json, or a name on the hub"
        raise _not_loaded("tokenizer", name, error, instead) from None


def _tokens(documents: Sequence[Document], tokenizer: Any, name: str) -> np.ndarray:
    """Tokens of all documents, each followed by the end of text if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32

    pieces = [np.zeros(0, kind)]
    for document in documents:
        try:
            text = document.content.decode()
        except UnicodeDecodeError as error:
            raise SettingError(
                f"{document.name} of {name} is not UTF-8 (byte {error.start}): convert it, or leave out --tokenizer"
            ) from None
        found = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        pieces.append(np.array([*found, *end], kind))
    return np.concatenate(pieces)


# --- windows ---


def check_length(corpus: Corpus, context: int) -> None:
    """Raise a `SettingError` unless a window fits into the training text, and two into the validation text."""
    unit = "bytes" if corpus.tokenizer is None else "tokens"
    for tokens, before, use, instead in (
        (corpus.training, context, "to train on, too few for one --context", "a longer text,"),
        # of one window alone there is no standard error
        (
            corpus.validation,
            2 * context,
            "for validation, too few for two of --context",
            "a longer text, a larger --valid-share,",
        ),
    ):
        if len(tokens) <= before:
            what = f"{corpus.name} has {len(tokens)} {unit} {use} {context} and the next"
            raise SettingError(f"{what}: give {instead} or a smaller --context")


def random_windows(tokens: np.ndarray, context: int, size: int, seed: int, step: int) -> Tensor:
    """Draw windows (size, context + 1) from anywhere; they depend on the seed and the step alone."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - context, size)
    return _cut(tokens, starts, context)


def even_windows(tokens: np.ndarray, context: int, most: int) -> Tensor:
    """Windows (count, context + 1) at even distances, at most ``most``; their predicted tokens do not overlap."""
    count = min(most, (len(tokens) - 1) // context)
    starts = np.linspace(0, len(tokens) - context - 1, count).astype(np.int64)
    return _cut(tokens, starts, context)


def _cut(tokens: np.ndarray, starts: np.ndarray, context: int) -> Tensor:
    return torch.from_numpy(tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64))
