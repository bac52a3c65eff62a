"""The memory of a pipeline's steps: what a step made from the same inputs before is not made again.

A step's result is a record and its files below `<pipeline>/work/<step>/<key>/`. Files go first, under their SHA-256,
the record last and only if there is none: its existence means that the step is complete, and the first write wins.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.clients.local_files import file_sha256
from tasks.clients.object_store import ObjectStore, Stored, checked_key
from tasks.errors import ObjectCorrupt, ObjectMissing, StoreError, StoreUnwritable

SCHEMA_VERSION = 1
_DIGITS = frozenset("0123456789abcdef")

_log = logging.getLogger(__name__)


def canonical_json(value: object) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces, UTF-8.

    Raises:
        ValueError: NaN or infinity, which JSON lacks.
        TypeError: something that is not JSON.

    >>> canonical_json({"b": [1, 2.5], "a": "é"}).decode()
    '{"a":"é","b":[1,2.5]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: object) -> str:
    """SHA-256 of the canonical JSON, 64 hexadecimal digits.

    >>> digest_of({})[:12]
    '44136fa355b3'
    """
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True)
class StepRecord:
    """What a step left behind.

    Attributes:
        step: the step's name.
        key: digest of everything the result depends on.
        content: the result; `content["files"]` maps each file's name to its `sha256` and `bytes`.
        notes: what may differ between equal results: timings, metrics, versions.
        digest: SHA-256 of the canonical JSON of `content`; later steps take it into their keys.
    """

    step: str
    key: str
    content: dict[str, Any]
    notes: dict[str, Any]
    digest: str


class Workspace:
    """The step records of one pipeline.

    Args:
        store: where records and files are kept.
        pipeline: the pipeline's name, the first part of every key.
        scratch: a local folder for copies; may be removed at any time between runs.
    """

    def __init__(self, store: ObjectStore, pipeline: str, scratch: Path) -> None:
        self._store, self._root, self._scratch = store, f"{_plain(pipeline)}/work", scratch
        self._verified: set[tuple[str, int, int, int, int]] = set()

    def key(self, step: str, version: int, inputs: Mapping[str, str], section: Mapping[str, object]) -> str:
        """The key of a step's result: 64 hexadecimal digits.

        Args:
            step: the step's name.
            version: raised by hand when the step's code changes what it makes.
            inputs: digests of what it reads, by role.
            section: its own config section, as JSON.
        """
        return digest_of({"step": step, "version": version, "inputs": dict(inputs), "section": dict(section)})

    def recall(self, step: str, key: str) -> StepRecord | None:
        """What the step left under this key, or None.

        Raises:
            ObjectCorrupt: the record is damaged.
        """
        where = f"{self._folder(step, key)}/record.json"
        found = self._store.find(where)
        return self._parsed(step, key, where, found) if found else None

    def remember(
        self,
        step: str,
        key: str,
        content: dict[str, Any],
        notes: dict[str, Any],
        files: Mapping[str, Path],
        anew: bool = False,
    ) -> StepRecord:
        """Store a step's result, files first, and return the record that is there afterwards: the first one written.

        Args:
            step: the step's name.
            key: from `key()`.
            content: JSON; must not hold `files`, which is added here.
            notes: JSON.
            files: local files by name; names may have folders (`rows/labels.npy`).
            anew: replace a record that is there: what it tells of is gone from where the step had put it.

        Raises:
            StoreError: content already holds `files`, or a name is not a plain relative one.
            StoreUnwritable: the store refuses.
            Conflict: somebody else replaces it at the same time.
        """
        folder = self._folder(step, key)
        if "files" in content:
            raise StoreError(f"content of step {step} holds 'files', which is added by the workspace; rename it")
        described = {
            checked_key(name): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            for name, path in sorted(files.items())
        }
        for name, path in sorted(files.items()):
            self._store.put_file_if_absent(f"{folder}/{described[name]['sha256']}", path)
        full = {**content, "files": described}
        record = StepRecord(step, key, full, notes, digest_of(full))
        where, written = f"{folder}/record.json", canonical_json({"schema_version": SCHEMA_VERSION, **asdict(record)})
        if anew and (before := self._store.find(where)) is not None:
            self._store.swap(where, written, before.etag)
        elif not self._store.put_if_absent(where, written):
            _log.info("step %s %s was stored by another run first; using that", step, key[:12])
        return self._parsed(step, key, where, self._store.get(where))

    def file(self, record: StepRecord, name: str) -> Path:
        """A file of the record on the local disk, to be read only: in place if the store is local, else a copy.

        Its digest is checked once per process and file.

        Raises:
            ObjectMissing: the store has lost it.
            ObjectCorrupt: its bytes are not the ones that were stored.
            StoreError: the record has no such file.
        """
        files = record.content["files"]
        if name not in files:
            raise StoreError(f"record {record.step} {record.key[:12]} has no file {name!r}; it has {sorted(files)}")
        sha256 = files[name]["sha256"]
        where = f"{self._folder(record.step, record.key)}/{sha256}"
        try:
            place = self._store.local_path(where)
            if place is None:
                place = self._scratch / sha256
                if not (place.is_file() and self._is_intact(place, sha256)):
                    self._store.download(where, place, sha256)
        except ObjectMissing as error:
            raise ObjectMissing(
                f"{name} of step {record.step} ({self._store.url}/{where}) is gone although its record is there; "
                f"restore it, or delete {self._folder(record.step, record.key)}/ and run again: the step is repeated"
            ) from error
        if not self._is_intact(place, sha256):
            raise ObjectCorrupt(
                f"{name} of step {record.step} ({self._store.url}/{where}) no longer has its SHA-256 {sha256}; delete "
                f"{self._folder(record.step, record.key)}/ and run again: the step is repeated"
            )
        return place

    def folder(self, record: StepRecord, prefix: str) -> Path:
        """All files named `<prefix>/...` as a folder on the local disk, to be read only.

        Raises:
            StoreError: the record has no such file.
        """
        names = sorted(name for name in record.content["files"] if name.startswith(f"{prefix}/"))
        if not names:
            raise StoreError(f"record {record.step} {record.key[:12]} has no files below {prefix!r}/")
        inside = {name.removeprefix(f"{prefix}/"): self.file(record, name) for name in names}
        digests = {name: record.content["files"][f"{prefix}/{name}"]["sha256"] for name in inside}
        target = self._scratch / digest_of(digests)
        try:
            if not self._is_laid_out(target, digests):
                self._lay_out(target, inside, digests)
        except OSError as error:
            raise StoreUnwritable(f"cannot lay out {target}: {error.strerror}; free space there") from error
        return target

    def records(self, step: str) -> Iterator[StepRecord]:
        """All complete records of a step, by key."""
        prefix = f"{self._root}/{_plain(step)}/"
        for where in self._store.list(prefix):
            key, _, name = where.removeprefix(prefix).partition("/")
            if name == "record.json":
                yield self._parsed(step, key, where, self._store.get(where))

    def _folder(self, step: str, key: str) -> str:
        return f"{self._root}/{_plain(step)}/{_plain(key)}"

    def _is_laid_out(self, target: Path, digests: Mapping[str, str]) -> bool:
        if not target.is_dir():
            return False
        return all((target / name).is_file() and self._is_intact(target / name, digests[name]) for name in digests)

    def _lay_out(self, target: Path, inside: Mapping[str, Path], digests: Mapping[str, str]) -> None:
        new, old = (self._scratch / f".{uuid.uuid4().hex}" for _ in range(2))
        try:
            for name, source in inside.items():
                link = new / name
                link.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, link)
                except OSError:  # another file system, or one without hard links
                    shutil.copyfile(source, link)
            try:
                new.rename(target)
            except OSError:
                # Another process was quicker, and may read it by now; or it is damaged, or a previous run's half copy.
                if not self._is_laid_out(target, digests):
                    target.rename(old)
                    new.rename(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def _is_intact(self, path: Path, sha256: str) -> bool:
        """Whether a file has its digest; a file seen before is known by inode, time and size."""
        status = path.stat()
        seen = (sha256, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        if seen not in self._verified:
            if file_sha256(path) != sha256:
                return False
            self._verified.add(seen)
        return True

    def _parsed(self, step: str, key: str, where: str, found: Stored) -> StepRecord:
        try:
            fields = json.loads(found.data)
            version = fields.pop("schema_version")
            record = StepRecord(**fields)
            fine = (
                version == SCHEMA_VERSION
                and (record.step, record.key) == (step, key)
                and record.digest == digest_of(record.content)
                and all(_is_described(name, about) for name, about in record.content["files"].items())
            )
        except (ValueError, TypeError, KeyError, AttributeError, StoreError) as error:
            raise self._broken(where) from error
        if not fine:
            raise self._broken(where)
        return record

    def _broken(self, where: str) -> ObjectCorrupt:
        return ObjectCorrupt(
            f"{self._store.url}/{where} is no record of schema {SCHEMA_VERSION}, or was changed after it was written; "
            f"delete {where.rpartition('/')[0]}/ and run again: the step is repeated"
        )


def _is_described(name: str, about: dict[str, Any]) -> bool:
    checked_key(name)
    return len(about["sha256"]) == 64 and _DIGITS.issuperset(about["sha256"]) and about["bytes"] >= 0


def _plain(name: str) -> str:
    if "/" in checked_key(name):
        raise StoreError(f"{name!r} must be a single name without '/'")
    return name
