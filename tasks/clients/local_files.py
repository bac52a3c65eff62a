"""Local files on their way into a store or out of it."""

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from tasks.errors import ObjectCorrupt, ObjectMissing, StoreUnwritable

CHUNK_BYTES = 1 << 20
"""How much of an object is held in memory while it is copied."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, 64 hexadecimal digits, read in blocks.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_local(path: Path) -> BinaryIO:
    """Open a local file that is to be stored.

    Raises:
        ObjectMissing: it is not there or cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise ObjectMissing(
            f"local file {path} cannot be stored: {error.strerror}; repeat the step that made it"
        ) from error


def write_local(path: Path, chunks: Iterable[bytes], sha256: str | None, name: str) -> None:
    """Write chunks to a local file that appears whole and durable under its name, or not at all.

    Args:
        path: the file to make or replace; missing parents are made.
        chunks: the content in order.
        sha256: what the content must hash to, if known.
        name: how messages call the object that the chunks come from.

    Raises:
        ObjectCorrupt: the content hashes to something else; nothing is left behind.
        StoreUnwritable: the local disk refuses.
    """
    part = path.parent / f".{uuid.uuid4().hex}.part"
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ObjectCorrupt(
                f"{name} has SHA-256 {digest.hexdigest()}, expected {sha256}: its bytes changed since they were "
                "written; restore it, or delete it and repeat the step that made it"
            )
        part.replace(path)
    except OSError as error:
        raise StoreUnwritable(
            f"cannot write {path} while fetching {name}: {error.strerror or error}; free space or grant access there"
        ) from error
    finally:
        if part.exists():
            part.unlink()


def is_there(path: Path) -> bool:
    """Whether there is a regular file of that name."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; anything else (a folder, a pipe that would block) counts as absent."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def make_directories(path: Path) -> None:
    """`mkdir -p`, durable: each new directory's parent is synced too."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a directory") from error
        sync_directory(folder.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
