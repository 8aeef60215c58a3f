"""Untrusted files, read within bounds, and files of our own, written whole or not at all. Does not import torch.

A name in a directory may be that of a pipe, a device, a symlink loop or a file of a terabyte. What is read here is
a regular file of at most a stated size. What is written is written beside its name and renamed over it, so that a full
disk harms nothing that was there and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, Literal

#: Endings of the names under which files are written first.
PARTIAL = (".part", ".partial")
_LONGEST = 200  # characters of a file's name that are kept in that of its part: a file system allows 255 bytes


def real(path: str | Path) -> Path:
    """Return a path without links; a symlink loop stays as it is, where ``Path.resolve`` raises."""
    return Path(os.path.realpath(path))


def kind_of(path: str | Path) -> str:
    """Return what is at a path, links followed, in words: ``"file"`` for a regular file, ``""`` if there is nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "a symlink loop" if error.errno == errno.ELOOP else ""
    except ValueError:  # a name that no file can have
        return ""
    kinds = {
        stat.S_IFREG: "file", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "a special file")


def read_bytes(path: str | Path, largest: int, error: type[ValueError] = ValueError, remedy: str = "") -> bytes:
    """Return what a regular file holds.

    Args:
        path: the file.
        largest: most bytes that it may have.
        error: what to raise.
        remedy: what to do if it cannot be read; where none is given, it is to put the file in its place.

    Raises:
        ValueError: (or ``error``) If it is anything but a regular file, is too large, or cannot be read.
    """
    try:
        kind = kind_of(path)
        if kind not in ("file", ""):
            otherwise = remedy or "remove it, or put the file in its place."
            raise error(f"{path} is {kind}, not a regular file: {otherwise}")
        # a pipe put there in this moment must not be waited for
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            content = file.read(largest + 1)
    except OSError as failed:
        what = f"{path} cannot be read ({failed.strerror or failed})"
        raise error(f"{what}: {remedy}" if remedy else f"{what}.") from None
    if len(content) > largest:
        size = os.stat(path).st_size
        raise error(f"{path} is {size} bytes, over the limit of {largest}: not read.")
    return content


def read_json(
    path: str | Path, largest: int, error: type[ValueError] = ValueError, remedy: str = "restore it."
) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file.
        largest: most bytes that it may have.
        error: what to raise.
        remedy: what to do about a damaged one.

    Raises:
        ValueError: (or ``error``) As :func:`read_bytes`, and if the file holds anything but one JSON object.
    """
    content = read_bytes(path, largest, error)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as damaged:
        raise error(f"{path} is not valid JSON ({str(damaged)[:200]}): {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{path} should hold one JSON object, not {type(value).__name__}: {remedy}")
    return value


def write(path: str | Path, content: bytes) -> Path:
    """Put a whole file at a path, or leave what was there, and return the path.

    A pipe or a device, such as ``/dev/stdout``, is written to as it is.

    Raises:
        OSError: with the path as its ``filename``.
    """
    path = Path(path)
    try:
        if "\0" in path.name:
            raise OSError(errno.EINVAL, "a file name cannot contain NUL")
        if kind_of(path) in ("a pipe", "a device"):
            # of a pipe that nobody reads this fails, and would wait otherwise
            handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
            with open(handle, "wb") as file:
                os.set_blocking(handle, True)
                file.write(content)
            return path
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        put(path, path.with_name(f"{path.name[:_LONGEST]}{PARTIAL[0]}"), content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return path


def put(path: Path, part: Path, content: bytes) -> None:
    """Write a file beside its name, then rename it over that; whatever fails, no part of it is left.

    Raises:
        OSError: If it cannot be written. What was there is as it was.
    """
    try:
        with fresh(part) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave the name with an empty file
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def fresh(path: Path) -> Any:
    """Open a new file for writing in place of one that a kill left; a link of that name is removed, never followed.

    Raises:
        OSError: If a directory has the name, or the file cannot be made.
    """
    if os.path.lexists(path):
        path.unlink()
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "wb")


def unwritable(error: OSError, kind: Literal["file", "directory"] = "file") -> str:
    """Return what to say of what could not be written: its path, the reason and the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename} was not written, the disk is full: free some space, or name a {kind} on another disk"
    if error.errno == errno.EFBIG:
        remedy = "raise the limit on the size of files (ulimit -f)"
    elif kind == "directory":
        remedy = "name a directory where you may write"
    elif error.errno == errno.EISDIR:
        remedy = "name a file, not a directory"
    else:
        remedy = "name a file in a directory you may write to"
    return f"{error.filename} cannot be written ({error.strerror}): {remedy}"
