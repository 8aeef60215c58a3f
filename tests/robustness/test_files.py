"""What is read of a stranger's files, and what is left of a file that could not be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rankdecay import files
from rankdecay.text import cell, json_text, shown_lines, visible
from tests import needs


def put(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind == "growing":
        path.symlink_to("/proc/self/maps")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pipe", "a pipe"),
        ("directory", "a directory"),
        ("circle", "a symlink loop"),
        ("device", "a device"),
        ("large", "1099511627776 bytes"),
        ("growing", "over the limit of 100"),
        ("missing", "No such file"),
    ],
)
def test_only_regular_files_of_a_size_that_makes_sense_are_read(kind: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    put(kind, path)
    with pytest.raises(ValueError, match=words) as error:
        files.read_bytes(path, 100)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "not list"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 5000, "not valid JSON"),
    ],
)
def test_a_json_file_holds_one_object(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        files.read_json(path, 10_000)
    assert str(path) in str(error.value)


@needs.full_disk
def test_what_is_written_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    files.write(path, b"first")

    def full(part: Path) -> object:
        return open("/dev/full", "wb")

    monkeypatch.setattr(files, "fresh", full)
    with pytest.raises(OSError, match="No space") as error:
        files.write(path, b"second")
    assert error.value.filename == str(path)
    assert "disk is full" in files.unwritable(error.value)
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_link_in_place_of_the_part_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "page.html.part").symlink_to(victim)
    files.write(tmp_path / "page.html", b"page")
    assert victim.read_text() == "mine"
    assert (tmp_path / "page.html").read_bytes() == b"page"
    assert not (tmp_path / "page.html.part").exists()


@pytest.mark.parametrize("name", ["missing/page.html", "x" * 300, "directory"])
def test_a_place_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match=r".+") as error:
        files.write(tmp_path / name, b"page")
    assert str(tmp_path / name) in files.unwritable(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["directory"]


def test_a_pipe_is_written_to_if_somebody_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match=r".+") as error:
        files.write(path, b"page")
    assert error.value.errno == errno.ENXIO
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    files.write(path, b"page")
    assert os.read(reader, 10) == b"page"
    os.close(reader)


def test_nothing_in_a_text_does_more_than_stand_there() -> None:
    assert visible("a\x1b[2J\nb\t\x85\u202e\u2028\ud800é") == r"a\x1b[2J\nb\t\x85\u202e\u2028\ud800é"
    assert shown_lines(["one", "two\nthree"]) == "one\ntwo\\nthree"
    assert json_text({"a": "\x7f\x1b\n"}) == r'{"a": "\u007f\u001b\n"}'


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_computes_no_text(text: str) -> None:
    assert str(cell(text)).startswith("'")


@pytest.mark.parametrize("value", [-1, -0.5, 3, None, "model.layers.0"])
def test_numbers_and_plain_texts_are_cells_as_they_are(value: object) -> None:
    assert cell(value) == value
