"""Texts: where they are, how they are split, and what is refused."""

import importlib.util
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from rankdecay.lab.errors import SettingError
from rankdecay.lab.experiments.attention.language.text import (
    Corpus,
    Document,
    check_length,
    even_windows,
    load,
    random_windows,
    read_text,
    split,
    standard_library,
)
from tests import needs

SENTENCE = "the rank of attention falls as the weights decay, and the rest goes on as before. "


def loaded(**given) -> Corpus:
    return load(**({"text": None, "dataset": None, "tokenizer": None, "share": 0.1} | given))


def folder(path: Path, files: int = 20) -> Path:
    path.mkdir()
    for i in range(files):
        (path / f"{i:02d}.txt").write_text(f"{i:02d} " + SENTENCE * (i + 1))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer of whole words, built here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(SENTENCE.replace(",", " , ").replace(".", " . ").split()))
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *words])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    path = tmp_path_factory.mktemp("tokenizer")
    built.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "unk_token": "<unk>"})
    )
    return path


# --- where texts are ---


def test_the_default_is_the_standard_library_without_tests_and_packages():
    documents = standard_library()
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not any({"site-packages", "test", "tests", "encodings"} & set(name.split("/")) for name in names)
    size = sum(len(document.content) for document in documents)
    assert 5e6 < size < 30e6
    corpus = loaded()
    assert (corpus.vocabulary, corpus.tokenizer) == (256, None)
    assert len(corpus.training) + len(corpus.validation) == size + len(documents) - 2  # a zero between files
    assert 0.04 < len(corpus.validation) / size < 0.2
    root = Path(sysconfig.get_path("stdlib"))
    held = [document.name for document in split(documents, 0.1)[1]]
    assert len(held) == round(len(documents) * 0.1)
    assert b"\0".join((root / name).read_bytes() for name in held) == bytes(corpus.validation)


def test_a_file_is_split_by_place(tmp_path):
    path = tmp_path / "text"
    path.write_text(SENTENCE * 10)
    corpus = loaded(text=str(path), share=0.25)
    whole = path.read_bytes()
    assert bytes(corpus.training) + bytes(corpus.validation) == whole
    assert len(corpus.validation) == round(len(whole) * 0.25)


def test_a_directory_is_split_by_file_the_same_every_time(tmp_path):
    documents = read_text(folder(tmp_path / "texts"))
    training, validation = split(documents, 0.2)
    assert (len(training), len(validation)) == (16, 4)
    assert {d.name for d in training}.isdisjoint(d.name for d in validation)
    assert sorted([*training, *validation]) == sorted(documents)
    again, held = split(documents[::-1], 0.2)  # whatever the order
    assert (sorted(again), sorted(held)) == (sorted(training), sorted(validation))
    more = read_text(folder(tmp_path / "more", 21))
    moved = {d.name for d in split(more, 0.2)[1]} ^ {d.name for d in validation}
    assert len(moved) <= 2  # a new file does not shuffle the others
    assert [len(part) for part in split(documents, 0.001)] == [19, 1]
    assert [len(part) for part in split(documents, 0.999)] == [1, 19]


def test_files_below_and_hidden_ones(tmp_path):
    path = folder(tmp_path / "texts", 2)
    (path / "below").mkdir()
    (path / "below" / "third.txt").write_text("third")
    (path / ".hidden").write_text("hidden")
    (path / ".git").mkdir()
    (path / ".git" / "config").write_bytes(b"\0")
    assert [d.name for d in read_text(path)] == ["00.txt", "01.txt", "below/third.txt"]


def test_the_fingerprint_tells_texts_and_splits_apart(tmp_path):
    path = tmp_path / "text"
    path.write_text(SENTENCE * 10)
    first = loaded(text=str(path)).sha1
    assert loaded(text=str(path)).sha1 == first
    assert loaded(text=str(path), share=0.2).sha1 != first
    path.write_text(SENTENCE * 10 + ".")
    assert loaded(text=str(path)).sha1 != first


# --- what is refused ---


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_of_nothing_or_of_all_is_refused(share):
    with pytest.raises(SettingError, match=r"--valid-share .*between 0 and 1.*0\.1"):
        loaded(share=share)


def test_texts_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(SettingError, match="does not exist: give a text file"):
        loaded(text=str(tmp_path / "none"))
    (tmp_path / "empty").write_text("")
    with pytest.raises(SettingError, match="is empty: give a text file"):
        loaded(text=str(tmp_path / "empty"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingError, match="is empty"):
        loaded(text=str(tmp_path / "folder"))
    (tmp_path / "folder" / "image.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(SettingError, match=r"image\.png is not a text"):
        loaded(text=str(tmp_path / "folder"))
    with pytest.raises(SettingError, match="give one of them"):
        loaded(text=str(tmp_path / "folder"), dataset="wikitext")


def test_a_text_shorter_than_a_context_is_refused(tmp_path):
    path = tmp_path / "text"
    path.write_text("x" * 100)
    corpus = loaded(text=str(path), share=0.5)
    check_length(corpus, 24)  # 2 · 24 + 1 ≤ 50
    with pytest.raises(SettingError, match=r"50 bytes for validation.*--context 25.*--valid-share"):
        check_length(corpus, 25)
    with pytest.raises(SettingError, match=r"50 bytes to train on.*--context 50.*smaller --context"):
        check_length(corpus, 50)


def test_without_datasets_the_extra_is_named():
    if importlib.util.find_spec("datasets") is not None:
        with pytest.raises(SettingError, match="cannot be loaded"):
            loaded(dataset="/nowhere/at/all")
        return
    with pytest.raises(SettingError, match=r"pip install 'rankdecay\[datasets\]'"):
        loaded(dataset="wikitext")


def test_data_sets_on_this_machine(tmp_path):
    datasets = needs.package("datasets")
    rows = [f"{i} {SENTENCE}" for i in range(30)]
    plain = datasets.Dataset.from_dict({"id": list(range(30)), "text": rows})
    plain.save_to_disk(tmp_path / "plain")
    corpus = loaded(dataset=str(tmp_path / "plain"))
    assert bytes(corpus.training).count(b"\0") == 26
    assert bytes(corpus.validation).count(b"\0") == 2
    parts = datasets.DatasetDict(train=plain, validation=datasets.Dataset.from_dict({"text": ["held back"]}))
    parts.save_to_disk(tmp_path / "parts")
    corpus = loaded(dataset=str(tmp_path / "parts"))
    assert bytes(corpus.validation) == b"held back"
    assert bytes(corpus.training) == "\0".join(rows).encode()
    datasets.Dataset.from_dict({"number": [1, 2]}).save_to_disk(tmp_path / "none")
    with pytest.raises(SettingError, match=r"no column 'text' but number"):
        loaded(dataset=str(tmp_path / "none"))


# --- tokens ---


@pytest.mark.parametrize("form", ["directory", "file"])
def test_a_tokenizer_of_this_machine(tmp_path, tokenizer, form):
    path = tmp_path / "text"
    path.write_text(SENTENCE * 10)
    given = tokenizer if form == "directory" else tokenizer / "tokenizer.json"
    corpus = loaded(text=str(path), tokenizer=str(given), share=0.5)
    assert corpus.vocabulary == len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    assert corpus.training.dtype == np.uint16
    assert corpus.training.max() < corpus.vocabulary
    ends = (corpus.training == 1).sum()
    assert ends == (1 if form == "directory" else 0)  # a tokenizer.json alone does not say what ends a text
    assert len(corpus.training) - ends == 5 * 18  # words and stops of five sentences


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path, tokenizer):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingError, match=r"--tokenizer .*folder cannot be loaded"):
        loaded(tokenizer=str(tmp_path / "folder"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SettingError, match=r"tokenizer\.json cannot be loaded"):
        loaded(tokenizer=str(tmp_path / "tokenizer.json"))
    (tmp_path / "latin").write_bytes(SENTENCE.encode() + b"\xe9t\xe9 " + SENTENCE.encode())
    with pytest.raises(SettingError, match=r"is not UTF-8 \(byte 8\d\): convert it"):
        loaded(text=str(tmp_path / "latin"), tokenizer=str(tokenizer))
    assert bytes(loaded(text=str(tmp_path / "latin")).training).count(b"\xe9") == 2  # as bytes it will do


# --- windows ---


def test_random_windows_depend_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    first = random_windows(tokens, 8, 16, seed=1, step=5)
    assert first.shape == (16, 9)
    assert first.dtype == torch.int64
    assert (first.diff(dim=1) == 1).all()
    np.random.default_rng().random()
    assert torch.equal(first, random_windows(tokens, 8, 16, seed=1, step=5))
    for other in (random_windows(tokens, 8, 16, 1, 6), random_windows(tokens, 8, 16, 2, 5)):
        assert not torch.equal(first, other)
    many = random_windows(tokens[:12], 8, 1000, 0, 0)
    assert set(many[:, 0].tolist()) == {0, 1, 2, 3}  # every place, to the last


@pytest.mark.parametrize(("length", "most", "count"), [(1000, 10, 10), (1000, 10**6, 124), (17, 99, 2), (24, 99, 2)])
def test_even_windows_cover_the_text_and_predict_no_token_twice(length, most, count):
    windows = even_windows(np.arange(length, dtype=np.uint32), 8, most)
    assert windows.shape == (count, 9)
    assert (windows[0, 0], windows[-1, -1]) == (0, length - 1)
    predicted = windows[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted)


def test_documents_are_apart():
    corpus = Corpus("", *(np.frombuffer(b"ab\0cd", np.uint8),) * 2)
    assert corpus.training.tolist() == [97, 98, 0, 99, 100]
    assert split([Document("a", b"ab"), Document("b", b"cd")], 0.5)[0] != []
