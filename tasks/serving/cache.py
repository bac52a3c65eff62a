"""A ranker's files on its own disk: blobs by digest, and folders per release in which they have their names.

    blobs/<sha256>                       every file that a ranker of this folder opens, once
    releases/<release>/cpu-int8/<name>   links to the files that one choice of device and graph opens, and no others
    verified/<sha256>                    stamps

Rankers that share the folder and choose otherwise have folders of their own, over the same blobs. They do not wait for
each other's fetches: whoever fetches or loads holds `lock` with the others, what is to go is removed by one who has it
alone, and `layout.lock` is held only while a file gets its name. Two that fetch one blob write a part each, and the
later one replaces the earlier.

A blob is verified when it is fetched. Hashing gigabytes again at every load would make a rollback slow, so that a large
blob that was found whole is stamped: with its inode, size and time of change, and with when that was. A stamp that fits
stands for a day, then the blob is hashed again, so that a disk that rots is noticed.
"""

import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks.clients.object_store import ObjectStore
from tasks.errors import NightrankError, ObjectCorrupt, ReleaseRefused
from tasks.release.manifest import Manifest, ReleaseFile, blob_key, sha256_of
from tasks.serving.locks import alone, locked
from tasks.serving.variants import LayOut, Selection

log = logging.getLogger("nightrank.ranker")
_RELEASE = re.compile(r"[0-9a-f]{64}")
SMALL = 2**20
"""Bytes; smaller blobs are hashed at every load, larger ones are stamped."""
STAMPED_S = 24 * 3600.0
"""Seconds for which a stamp stands for a blob's digest."""


class ReleaseCache:
    """A folder of verified release files of one pipeline. Several processes may share it."""

    def __init__(self, folder: Path, engines: Path | None = None) -> None:
        """Use a folder.

        Args:
            folder: of the releases' files.
            engines: where TensorRT's engines of the same releases lie, see `Engine.of`; None where there are none.
        """
        self._folder, self._engines = folder, engines

    @contextmanager
    def opened(
        self,
        store: ObjectStore,
        pipeline: str,
        manifest: Manifest,
        keep: Collection[str] = (),
        between: Callable[[], object] | None = None,
    ) -> Iterator[LayOut]:
        """A function that gives folders with files of a release, every byte verified, for as long as the block runs.

        It may be called again, for files that turn out to be needed as well. It raises `ReleaseRefused` where a blob is
        missing, damaged or of another size, the store cannot be read, or the disk refuses. Blobs that are there already
        are verified and not fetched. However the block ends, releases that are neither this one nor to be kept are
        removed afterwards, so that one bad release after the other fills no disk; where another process is fetching or
        loading, by the next block.

        Args:
            store: where the blobs are.
            pipeline: the pipeline.
            manifest: of the release.
            keep: ids of releases that have a role: the one that serves, the one before it, the challenger.
            between: called before each file and between the chunks of one that is fetched. What it raises gives the
                fetch up, and passes as it is; blobs that are whole by then stay.

        Raises:
            ReleaseRefused: the disk refuses, or a process that was stopped holds a lock.
        """

        def lay_out(selection: Selection) -> Path:
            try:
                return self._lay_out(store, pipeline, manifest, selection, between or _nothing)
            except OSError as error:
                raise _refused(manifest, error) from error
            except NightrankError as error:
                raise ReleaseRefused(f"release {manifest.release[:12]} cannot be fetched: {error}") from error

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            busy = ExitStack()
            busy.enter_context(locked(self._folder / "lock", shared=True))  # nobody prunes what another one is loading
        except OSError as error:
            raise _refused(manifest, error) from error
        try:
            with busy:
                yield lay_out
        finally:
            try:
                with alone(self._folder / "lock") as idle:
                    if idle:
                        self._prune(pipeline, {manifest.release, *keep})
            except OSError as error:  # no reason to refuse a release; a temporary folder goes with its ranker
                log.warning("what has no role stays in the cache %s: %s", self._folder, error)

    def _lay_out(
        self,
        store: ObjectStore,
        pipeline: str,
        manifest: Manifest,
        selection: Selection,
        between: Callable[[], object],
    ) -> Path:
        folder = self._folder / "releases" / manifest.release / selection.name
        wanted = set(selection.files)
        for file in (file for file in manifest.files if file.name in wanted):
            between()
            blob = self._folder / "blobs" / file.sha256
            if not self._whole(blob, file):
                _free(blob)
                key = blob_key(pipeline, file.sha256)
                if (size := store.size(key)) != file.bytes:  # looked at first: nobody fetches a bomb
                    raise ReleaseRefused(f"{file.name} has {size} bytes in the store, the manifest says {file.bytes}")
                try:
                    store.download(key, blob, file.sha256, between)
                except ObjectCorrupt as error:
                    raise ReleaseRefused(f"{file.name} is damaged: {error}") from error
                self._stamp(blob, file)
            if (size := blob.stat().st_size) != file.bytes:
                raise ReleaseRefused(f"{file.name} has {size} bytes, the manifest says {file.bytes}")
            self._link(blob, folder / file.name)
        with locked(self._folder / "layout.lock"):
            for one in folder.iterdir():
                if one.name not in wanted:
                    _remove(one)
        return folder

    def _link(self, blob: Path, name: Path) -> None:
        """Give a blob its name. A folder that others may be loading is mended file by file, and never emptied."""
        with locked(self._folder / "layout.lock"):
            for folder in (self._folder / "releases", name.parent.parent, name.parent):
                if not folder.is_dir():
                    _remove(folder)
                    folder.mkdir()
            if name.is_file() and name.samefile(blob) and not name.is_symlink():
                return
            part = name.parent / f".{uuid.uuid4().hex}"
            part.hardlink_to(blob)
            _free(name)
            part.replace(name)

    def _whole(self, blob: Path, file: ReleaseFile) -> bool:
        """Whether the blob is on the disk as it was published."""
        if blob.is_symlink() or not blob.is_file():
            return False
        if self._stamped(blob, file):
            return True
        if sha256_of(blob) != file.sha256:
            return False
        self._stamp(blob, file)
        return True

    def _stamped(self, blob: Path, file: ReleaseFile) -> bool:
        try:
            *identity, when = map(int, (self._folder / "verified" / file.sha256).read_text().split())
        except (OSError, ValueError):
            return False
        return identity == _identity(blob) and 0 <= time.time() - when <= STAMPED_S

    def _stamp(self, blob: Path, file: ReleaseFile) -> None:
        if file.bytes < SMALL:
            return
        stamp = self._folder / "verified" / file.sha256
        stamp.parent.mkdir(exist_ok=True)
        _free(stamp)
        part = stamp.parent / f".{uuid.uuid4().hex}"
        part.write_text(" ".join(map(str, [*_identity(blob), int(time.time())])))
        part.replace(stamp)

    def _prune(self, pipeline: str, keep: Collection[str]) -> None:
        """Remove releases that are not to be kept, blobs and stamps that only those had, and their engines."""
        for kind in ("releases", "blobs", "verified"):
            if not (folder := self._folder / kind).is_dir():
                continue
            for one in folder.iterdir():
                if kind == "releases":
                    if one.name not in keep:
                        shutil.rmtree(one, ignore_errors=True)
                elif kind == "blobs":
                    if one.lstat().st_nlink == 1:
                        _remove(one)
                elif not (self._folder / "blobs" / one.name).exists():
                    _remove(one)
        if self._engines is None or not (built := self._engines / pipeline).is_dir():
            return
        for one in built.iterdir():
            # The folder is the caller's: nothing goes but what is called as a release is.
            if _RELEASE.fullmatch(one.name) and one.name not in keep:
                shutil.rmtree(one, ignore_errors=True)


def _nothing() -> None:
    pass


def _free(place: Path) -> None:
    """Remove a folder that stands where a file belongs: a file does not replace it."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)


def _remove(one: Path) -> None:
    """Remove what is there, whatever it is."""
    _free(one)
    one.unlink(missing_ok=True)


def _identity(blob: Path) -> list[int]:
    """What changes when somebody replaces or edits a file; links to it change none of it."""
    status = os.stat(blob)
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _refused(manifest: Manifest, error: OSError) -> ReleaseRefused:
    return ReleaseRefused(
        f"release {manifest.release[:12]} cannot be laid out in the cache: {error}; "
        f"free space there or name another folder"
    )
