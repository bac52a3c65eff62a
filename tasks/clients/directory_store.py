"""A store in a local directory: nothing to install, one host, the same promises as S3.

An object is a file under its key. A new one is written beside (`.nightrank/tmp`), synced, and hard-linked to its name:
the link fails if the name is taken, and no reader sees half a file. A swap compares and renames under `flock`, which
the kernel releases when the process dies. What a killed process leaves is under `.nightrank` and is never listed.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tasks.clients.local_files import (
    CHUNK_BYTES,
    is_there,
    make_directories,
    open_local,
    open_regular,
    sync_directory,
)
from tasks.clients.object_store import ObjectStore, Stored, checked_key, checked_prefix
from tasks.errors import ConditionsIgnored, Conflict, ObjectMissing, StoreError, StoreUnavailable, StoreUnwritable

_OWN = ".nightrank"
_LOCK_PATIENCE_S = 25.0
_LOCK_POLL_S = 0.005
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.EEXIST,
)  # fmt: skip


class DirectoryStore(ObjectStore):
    """Objects as files below one directory, which is made by the first write.

    Args:
        root: the directory; a relative one is taken from the current directory now, not later.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()
        self.url = str(self._root)

    def find(self, key: str, most: int | None = None) -> Stored | None:
        """The object, or None when there is none; `ObjectCorrupt`, unread, when it is larger than `most` bytes."""
        path = self._path(key)
        with self._reading(key):
            try:
                with open_regular(path) as file:
                    if most is not None and (size := os.fstat(file.fileno()).st_size) > most:
                        raise self._too_large(key, size, most)
                    data = file.read(-1 if most is None else most + 1)
            except OSError as error:
                if error.errno in _ABSENT:
                    return None
                raise
        if most is not None and len(data) > most:  # it grew meanwhile
            raise self._too_large(key, None, most)
        return Stored(data, _etag(data))

    def get(self, key: str, most: int | None = None) -> Stored:
        """The object; `ObjectMissing` when there is none. Otherwise as `find`."""
        found = self.find(key, most)
        if found is None:
            raise self._missing(key)
        return found

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None when there is none."""
        path = self._path(key)
        with self._reading(key):
            try:
                status = path.stat()
            except OSError as error:
                if error.errno in _ABSENT:
                    return None
                raise
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a new object; False if one is there already."""
        path = self._path(key)
        with self._writing(key):
            return not is_there(path) and self._link_new(path, _writer(data))

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        """Write a new object with a local file's content; False if one is there already."""
        target = self._path(key)
        with open_local(path) as source, self._writing(key):
            return not is_there(target) and self._link_new(
                target, lambda file: shutil.copyfileobj(source, file, CHUNK_BYTES)
            )

    def swap(self, key: str, data: bytes, etag: str | None) -> str:
        """Replace the object with this etag, None meaning an absent one; `Conflict` if it is another."""
        path, new = self._path(key), _etag(data)
        with self._writing(key), self._lock(key):
            found = self.find(key)
            now = found.etag if found else None
            if now == new:
                return new
            if now != etag:
                raise Conflict(
                    f"{self.url}/{key} has ETag {now}, the swap expected {etag}: another writer was here; read it "
                    "again and decide anew"
                )
            if etag is None:
                if not self._link_new(path, _writer(data)):
                    raise Conflict(f"{self.url}/{key} was made by another writer meanwhile; read it and decide anew")
            else:
                with self._temporary(_writer(data)) as temporary:
                    temporary.replace(path)
                sync_directory(path.parent)
        return new

    def list(self, prefix: str) -> Iterator[str]:
        """All keys that start with the prefix, sorted by their bytes."""
        folder = checked_prefix(prefix).rpartition("/")[0]
        with self._reading(prefix or "the root"):
            keys = [key for key in self._walk(self._root / folder, folder, ()) if key.startswith(prefix)]
        yield from sorted(keys)

    def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""
        path = self._path(key)
        with self._writing(key):
            if not is_there(path):
                return
            with self._lock(key):
                path.unlink(missing_ok=True)
                sync_directory(path.parent)

    def local_path(self, key: str) -> Path | None:
        """The object as a file in place, to be read only; `ObjectMissing` when there is none."""
        if self.size(key) is None:
            raise self._missing(key)
        return self._path(key)

    def is_made(self) -> bool:
        """Whether there is the directory."""
        with self._reading("its directory"):
            return self._root.is_dir()

    def _written_before(self, prefix: str, moment: float) -> Iterator[str]:
        for key in self.list(prefix):
            with self._reading(key), suppress(FileNotFoundError):  # another has just removed it
                if self._path(key).stat().st_mtime < moment:
                    yield key

    def _free(self, horizon: float) -> None:
        """Remove temporary files that killed runs left long ago."""
        folder = self._root / _OWN / "tmp"
        with self._writing("leftover temporary files"):
            for leftover in folder.iterdir() if folder.is_dir() else ():
                with suppress(FileNotFoundError):  # its process lives, and has just ended it
                    if leftover.stat().st_mtime < horizon:
                        leftover.unlink()

    def _stream(self, key: str) -> Generator[bytes, None, None]:
        path = self._path(key)
        try:
            file = open_regular(path)
        except OSError as error:
            if error.errno in _ABSENT:
                raise self._missing(key) from error
            raise self._unreadable(key, error) from error
        with file:
            while chunk := self._read_chunk(key, file):
                yield chunk

    def _read_chunk(self, key: str, file: BinaryIO) -> bytes:
        with self._reading(key):
            return file.read(CHUNK_BYTES)

    def _path(self, key: str) -> Path:
        if checked_key(key).partition("/")[0] == _OWN:
            raise StoreError(f"key {key!r} is inside {_OWN}/, which the store keeps for itself; use another name")
        return self._root / key

    def _walk(self, folder: Path, key: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Keys of regular files below a folder; links are followed, since lakes are often linked together."""
        try:
            status = folder.stat()
            entries = list(os.scandir(folder))
        except OSError as error:
            if error.errno in _ABSENT:  # never there, or removed while we walk
                return
            raise
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise StoreError(f"{folder} links to a folder above itself; remove the link")
        for entry in entries:
            name = f"{key}/{entry.name}" if key else entry.name
            if name == _OWN:
                continue
            if entry.is_dir():
                yield from self._walk(folder / entry.name, name, (*above, identity))
            elif entry.is_file():
                yield name

    def _link_new(self, path: Path, fill: Callable[[BinaryIO], object]) -> bool:
        """Write a new file beside and link it to its name; False if the name is taken by then."""
        make_directories(path.parent)
        with self._temporary(fill) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS):
                    raise ConditionsIgnored(
                        f"the file system of {path} cannot hard-link ({error.strerror}), so that two writers could "
                        "not be told apart; use a local POSIX file system or S3"
                    ) from error
                raise
        sync_directory(path.parent)
        return True

    @contextmanager
    def _temporary(self, fill: Callable[[BinaryIO], object]) -> Iterator[Path]:
        path = self._root / _OWN / "tmp" / uuid.uuid4().hex
        make_directories(path.parent)
        try:
            with path.open("xb") as file:
                fill(file)
                file.flush()
                # Objects are never edited in place: readers map them, and work folders hard-link them.
                os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & ~0o222)
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        path = self._root / _OWN / "locks" / hashlib.sha256(key.encode()).hexdigest()[:2]
        make_directories(path.parent)
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        with path.open("ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise StoreUnavailable(
                            f"the lock {path} has been held for {_LOCK_PATIENCE_S:.0f} s by another process, which is "
                            "probably stopped; see `lslocks`, then try again"
                        ) from error
                    time.sleep(_LOCK_POLL_S)
            yield

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unreadable(key, error) from error

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"cannot write {key} to {self.url}: {error.strerror or error}"
            if error.errno in _REFUSED:
                raise StoreUnwritable(f"{reason}; free space or grant write access there, then run again") from error
            raise StoreUnavailable(f"{reason}; check the disk, then try again") from error

    def _unreadable(self, key: str, error: OSError) -> StoreError:
        reason = f"cannot read {key} from {self.url}: {error.strerror or error}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
            return StoreError(f"{reason}; grant read access there")
        return StoreUnavailable(f"{reason}; check the disk, then try again")

    def _missing(self, key: str) -> ObjectMissing:
        return ObjectMissing(f"there is no {key} in {self.url}; check the store's path, or restore the object")


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _writer(data: bytes) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(data)
