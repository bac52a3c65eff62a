"""One small interface to the place where lakes are read and releases are written: a directory, or S3.

The interface has exactly what a commit protocol needs: objects that are written once (`put_if_absent`), one mutable
object that is compared and swapped (`swap`), and plain reads. Every failure leaves here as a member of
`tasks.errors`; no foreign exception crosses this seam.
"""

import logging
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tasks.clients.local_files import write_local
from tasks.errors import ConditionsIgnored, Conflict, InvalidConfig, ObjectCorrupt, StoreError, StoreUnwritable

MAX_KEY_BYTES = 900
MAX_PART_BYTES = 255
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
"""Control characters (Unicode's category Cc), and the backslash: some servers read it as a slash, and two keys would be
one object."""
LEFTOVER_AGE_S = 24 * 3600.0
"""What a process left half done is freed when it is this old: no process takes that long for it."""
CHECKS = ".nightrank-check/"
"""Where `check` writes."""
_SCRATCH = re.compile(re.escape(CHECKS) + "[0-9a-f]{32}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """An object as it was read: its bytes, and the tag that a later `swap` compares with."""

    data: bytes
    etag: str


def checked_key(key: str) -> str:
    """The key itself, if it can name an object on every kind of store.

    Args:
        key: parts joined by `/`, at most 900 bytes of UTF-8 and 255 per part (the limit of file systems).

    Raises:
        StoreError: an absolute key, an empty, `.` or `..` part, a backslash, a control character, or too long a key.

    >>> checked_key("movielens/current.json")
    'movielens/current.json'
    >>> checked_key("../current.json")
    Traceback (most recent call last):
    tasks.errors.StoreError: key '../current.json' has the part '..', which could leave the store; use plain names
    """
    try:
        encoded = key.encode("utf-8")
    except UnicodeEncodeError as error:
        raise StoreError(f"key {key!r} is not valid Unicode ({error.reason}); use plain names") from error
    if len(encoded) > MAX_KEY_BYTES:
        raise StoreError(f"key {key[:60]!r}... has {len(encoded)} bytes, limit {MAX_KEY_BYTES}; use a shorter one")
    if _UNFIT.search(key):
        raise StoreError(f"key {key!r} has a backslash or a control character; use plain names")
    for part in key.split("/"):
        if part == "":
            raise StoreError(f"key {key!r} is absolute or has an empty part; use parts joined by single slashes")
        if part in (".", ".."):
            raise StoreError(f"key {key!r} has the part {part!r}, which could leave the store; use plain names")
        if len(part.encode()) > MAX_PART_BYTES:
            raise StoreError(f"key {key[:60]!r}... has a part of more than {MAX_PART_BYTES} bytes; use shorter names")
    return key


def checked_prefix(prefix: str) -> str:
    """The prefix itself, if some valid key can start with it; the empty prefix means everything.

    Raises:
        StoreError: no valid key starts with it.
    """
    if prefix:
        checked_key(prefix.removesuffix("/"))
    return prefix


class ObjectStore(ABC):
    """Objects by key: write once, compare and swap, read, list.

    Attributes:
        url: where the store is; `open_store(store.url)` opens it again. Never holds a secret.
    """

    url: str

    @abstractmethod
    def find(self, key: str, most: int | None = None) -> Stored | None:
        """The object, or None when there is none.

        Args:
            key: the object.
            most: bytes; a larger object is not read. None for any size.

        Raises:
            ObjectCorrupt: it is larger.
        """

    @abstractmethod
    def get(self, key: str, most: int | None = None) -> Stored:
        """The object; `ObjectMissing` when there is none. Otherwise as `find`."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None when there is none."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a new object. True: this call wrote it. False: an object is there already and stays as it is.

        Raises:
            OutcomeUnknown: the store fell silent and cannot be asked what it did.
            StoreUnwritable, StoreUnavailable: nothing was written.
        """

    @abstractmethod
    def put_file_if_absent(self, key: str, path: Path) -> bool:
        """`put_if_absent` with a local file's content, streamed."""

    @abstractmethod
    def swap(self, key: str, data: bytes, etag: str | None) -> str:
        """Replace the object if it is still the one with this etag; None means that it must be absent.

        A key that already holds exactly these bytes counts as done, because that is what a success with a lost answer
        looks like; writers that must be told apart put something unique into the data.

        Returns:
            The new etag.

        Raises:
            Conflict: the object is another one.
            OutcomeUnknown: the store fell silent and cannot be asked what it did.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[str]:
        """All keys that start with the prefix, sorted by their bytes."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """The object as a file in place, to be read only; None where the store is not on this host's disk.

        Raises:
            ObjectMissing: the store is local and there is no such object.
        """

    @abstractmethod
    def _stream(self, key: str) -> Generator[bytes, None, None]:
        """The object's content in chunks; `ObjectMissing` when there is none."""

    def is_made(self) -> bool:
        """Whether the place of the objects is there; of one that is remote, each answer tells."""
        return True

    def exists(self, key: str) -> bool:
        """Whether there is an object under the key."""
        return self.size(key) is not None

    def download(
        self, key: str, path: Path, sha256: str | None = None, between: Callable[[], object] | None = None
    ) -> None:
        """Copy an object to a local file, which appears whole or not at all.

        Args:
            key: the object.
            path: the file to make or replace; missing parents are made.
            sha256: what the content must hash to, if known.
            between: called behind each chunk of at most 1 MiB. What it raises gives the copy up, and passes as it is.

        Raises:
            ObjectMissing: there is no such object.
            ObjectCorrupt: the content hashes to something else.
            StoreUnwritable: the local disk refuses.
        """
        chunks = self._stream(key) if between is None else _called_behind(self._stream(key), between)
        write_local(path, chunks, sha256, f"{self.url}/{key}")

    def sweep(self) -> None:
        """Free what processes that died a day ago or earlier left: half-written objects, and scratch objects of checks.

        Never what may still become visible. What may not be removed is left, and told to the log.

        Raises:
            StoreError: the store cannot be asked.
        """
        horizon = time.time() - LEFTOVER_AGE_S
        try:
            for key in tuple(self._written_before(CHECKS, horizon)):
                if _SCRATCH.fullmatch(key):
                    self.delete(key)
        except StoreUnwritable as error:
            _log.warning("scratch objects of old checks stay in %s: %s", self.url, error)
        self._free(horizon)

    @abstractmethod
    def _written_before(self, prefix: str, moment: float) -> Iterator[str]:
        """Keys that start with the prefix, of objects that were written before the moment (seconds since 1970)."""

    @abstractmethod
    def _free(self, horizon: float) -> None:
        """Free what was begun before the horizon (seconds since 1970) and never became an object."""

    def check(self) -> None:
        """Prove with scratch objects that the store can be written and honours conditions; sweep.

        A store that gives no answer is not asked any more: what may be there of scratch objects is left to `sweep`.

        Raises:
            ConditionsIgnored: a conditional write did what its condition forbids, or a write did not arrive.
            StoreUnwritable, StoreUnavailable, OutcomeUnknown: the store cannot be written, or not reached.
        """
        first, second, third = (uuid.uuid4().bytes for _ in range(3))
        with self._scratch(2) as (key, never):
            self._expect(self.put_if_absent(key, first), "a new object was reported as already there")
            self._expect_content(key, first, "an object written with success is not there or reads differently")
            self._expect(not self.put_if_absent(key, second), "If-None-Match did not protect an object")
            self._expect_conflict(key, second, None, "If-None-Match did not protect an object from a swap")
            stale = self.get(key).etag
            current = self.swap(key, second, stale)
            self._expect_content(key, second, "a swap reported as done is not there")
            self._expect(self.get(key).etag == current != stale, "a swap did not return the object's new ETag")
            self._expect_conflict(key, third, stale, "If-Match let an old ETag replace a newer object")
            self._expect_conflict(never, third, current, "If-Match made an object that was absent")
            self._expect_content(key, second, "a refused write changed the object")
        self.sweep()

    @contextmanager
    def _scratch(self, count: int) -> Iterator[tuple[str, ...]]:
        """Keys for a check's objects, which are removed at its end, unless the store has stopped answering."""
        keys = tuple(f"{CHECKS}{uuid.uuid4().hex}" for _ in range(count))
        try:
            yield keys
        except StoreError as failure:
            if not failure.transient:
                self._discard(keys)
            raise
        for key in keys:
            self.delete(key)

    def _discard(self, keys: tuple[str, ...]) -> None:
        """Remove what a failed check wrote, as far as the store lets us: its own failure is what has to be told."""
        try:
            for key in keys:
                self.delete(key)
        except StoreError as error:
            _log.info("scratch objects of a check stay in %s until they are swept: %s", self.url, error)

    def _too_large(self, key: str, size: int | None, most: int) -> ObjectCorrupt:
        found = "more" if size is None else size
        return ObjectCorrupt(
            f"{self.url}/{key} has {found} bytes, limit {most}, and is not read: it is not what nightrank wrote; look "
            f"who can write there, and restore it"
        )

    def _expect_conflict(self, key: str, data: bytes, etag: str | None, otherwise: str) -> None:
        try:
            self.swap(key, data, etag)
        except Conflict:
            return
        self._expect(False, otherwise)

    def _expect_content(self, key: str, data: bytes, otherwise: str) -> None:
        found = self.find(key)
        self._expect(found is not None and found.data == data, otherwise)

    def _expect(self, held: bool, otherwise: str) -> None:
        if not held:
            raise ConditionsIgnored(
                f"store {self.url} does not honour conditional writes: {otherwise}; two runs could overwrite each "
                "other unseen. Use a directory, or a server with If-None-Match and If-Match on PUT, also of parts"
            )


def _called_behind(chunks: Generator[bytes, None, None], between: Callable[[], object]) -> Iterator[bytes]:
    with closing(chunks):  # a copy that is given up leaves no connection open
        for chunk in chunks:
            yield chunk
            between()


def open_store(url: str) -> ObjectStore:
    """Open the store that a URL names; nothing is contacted or made yet.

    Args:
        url: a path, `file:///absolute/path`, or `s3://bucket/prefix`. Endpoint and credentials of S3 come from the
            usual AWS environment and files, never from here.

    Raises:
        InvalidConfig: another scheme, no bucket, or credentials or options inside the URL.
    """
    from tasks.clients.directory_store import DirectoryStore

    scheme, separator, _ = url.partition("://")
    if not separator:
        if not url:
            raise InvalidConfig("the store's URL is empty; give a path or s3://bucket/prefix")
        return DirectoryStore(Path(url))
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InvalidConfig(
            f"the {scheme} store's URL holds credentials or options, which would end up in logs; give only "
            "s3://bucket/prefix and put credentials and endpoint in the AWS environment"
        )
    if scheme == "file" and not parts.netloc and parts.path:
        return DirectoryStore(Path(unquote(parts.path)))
    if scheme == "s3" and parts.netloc:
        from tasks.clients.s3_store import S3Store

        return S3Store(parts.netloc, parts.path.strip("/"))
    raise InvalidConfig(f"store {url!r} is none of: a path, file:///path, s3://bucket/prefix")
