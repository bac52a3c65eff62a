"""A ranker's files on its own disk: blobs by digest, and one folder per release in which they have their names."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.clients.object_store import ObjectStore
from tasks.errors import NightrankError, ObjectCorrupt, ReleaseRefused
from tasks.release.manifest import Manifest, blob_key, sha256_of

KEPT = 2
"""Releases kept on disk: the one that serves, and the one before it, so that a rollback fetches nothing."""


class ReleaseCache:
    """A folder of verified release files. Several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def fetched(self, store: ObjectStore, pipeline: str, manifest: Manifest) -> Iterator[Path]:
        """A folder with the release's files, every byte verified, for as long as the block runs.

        Blobs that are there already are verified and not fetched. Once the block ends well, releases other than the
        newest two are removed; a block that fails leaves the others alone.

        Raises:
            ReleaseRefused: a blob is missing, damaged or of another size, or the disk refuses.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / "lock").open("wb")
        except OSError as error:
            raise _refused(manifest, error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # nobody prunes what another process is loading
            try:
                folder = self._lay_out(store, pipeline, manifest)
            except OSError as error:
                raise _refused(manifest, error) from error
            except NightrankError as error:
                raise ReleaseRefused(f"release {manifest.release[:12]} cannot be fetched: {error}") from error
            yield folder
            self._prune(folder)

    def _lay_out(self, store: ObjectStore, pipeline: str, manifest: Manifest) -> Path:
        folder = self._folder / "releases" / manifest.release
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for file in manifest.files:
            blob = self._folder / "blobs" / file.sha256
            if not (blob.is_file() and not blob.is_symlink() and sha256_of(blob) == file.sha256):
                key = blob_key(pipeline, file.sha256)
                if (size := store.size(key)) != file.bytes:  # looked at first: nobody fetches a bomb
                    raise ReleaseRefused(f"{file.name} has {size} bytes in the store, the manifest says {file.bytes}")
                try:
                    store.download(key, blob, file.sha256)
                except ObjectCorrupt as error:
                    raise ReleaseRefused(f"{file.name} is damaged: {error}") from error
            if (size := blob.stat().st_size) != file.bytes:
                raise ReleaseRefused(f"{file.name} has {size} bytes, the manifest says {file.bytes}")
            (folder / file.name).hardlink_to(blob)
        return folder

    def _prune(self, newest: Path) -> None:
        """Remove all but the newest releases, and the blobs that only those had."""
        releases = sorted(newest.parent.iterdir(), key=lambda one: one.stat().st_mtime_ns, reverse=True)
        for old in [one for one in releases if one != newest][KEPT - 1 :]:
            shutil.rmtree(old)
        for blob in (self._folder / "blobs").iterdir():
            if blob.stat().st_nlink == 1:
                blob.unlink()


def _refused(manifest: Manifest, error: OSError) -> ReleaseRefused:
    return ReleaseRefused(
        f"release {manifest.release[:12]} cannot be laid out in the cache: {error}; "
        f"free space there or name another folder"
    )
