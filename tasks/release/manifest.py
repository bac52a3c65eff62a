"""Manifest, interface and pointer: what a release says about itself, and how strictly it is read.

Pure standard library, so that a ranker can read a release without anything else of ours.

A release's id is the digest of its content files' names, sizes and digests. `interface.json` is one of them and says
what goes in and comes out, so that a manifest cannot claim another interface than the one that was built.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from tasks.errors import ReleaseRefused
from tasks.release.interface import InputSpec as InputSpec  # serving imports from here alone
from tasks.release.interface import Interface, Json, read_interface
from tasks.release.strict_json import HISTORY_VERSION, LISTS_VERSION, SCHEMA_VERSION, Reader, canonical

CONTENT = frozenset(
    {
        "model.onnx", "lookup.onnx", "score.onnx", "base.bin", "statistics.bin", "bank.bin", "base.safetensors",
        "base.json", "vocabulary.parquet", "statistics_item.parquet", "statistics_user.parquet",
        "statistics_cohort_item.parquet", "segments.parquet", "tables.json", "interface.json", "golden.json",
    }
)  # fmt: skip
"""The files of a release of schema version 1: these, no more and no less."""
LARGEST_MANIFEST = 16 * 2**20
"""Bytes; a longer manifest is refused unread."""
LARGEST_RELEASE = 256 * 2**30
"""Bytes of all files together; a larger release is refused before anything is fetched."""


@dataclass(frozen=True)
class ReleaseFile:
    """A file of a release and the blob that holds it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A release as it stands in the store.

    Attributes:
        pipeline: the pipeline that it belongs to.
        release: its id, the digest of its files.
        files: its content files, by name.
        interface: what goes in and comes out.
        parity: how closely the graphs agree with the network that was trained.
        metrics: results beside baselines.
        provenance: commit, package versions, parent, config.
    """

    pipeline: str
    release: str
    files: tuple[ReleaseFile, ...]
    interface: Interface
    parity: Json = field(default_factory=dict)
    metrics: Json = field(default_factory=dict)
    provenance: Json = field(default_factory=dict)

    @property
    def night(self) -> date:
        """The newest night that the release has learned from."""
        return self.interface.night

    @property
    def size(self) -> int:
        """Bytes of all content files."""
        return sum(file.bytes for file in self.files)

    @property
    def schema_version(self) -> int:
        """The oldest version whose readers know all that the interface says."""
        if any(spec.of is not None for spec in self.interface.inputs):
            return HISTORY_VERSION
        lists = any(spec.values is not None for spec in self.interface.inputs)
        return LISTS_VERSION if lists else SCHEMA_VERSION

    def serialise(self) -> bytes:
        """The bytes of `manifest.json`."""
        written = {
            "schema_version": self.schema_version,
            "pipeline": self.pipeline,
            "release": self.release,
            "files": [asdict(file) for file in self.files],
            "interface": self.interface.as_json(),
            "parity": self.parity,
            "metrics": self.metrics,
            "provenance": self.provenance,
        }
        return json.dumps(written, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, pipeline: str, release: str) -> "Manifest":
        """Read a manifest, and trust nothing in it.

        Args:
            data: the bytes of `manifest.json`.
            pipeline: the pipeline that it was looked for in.
            release: the id that it was looked for under.

        Raises:
            ReleaseRefused: anything is odd: size, JSON, schema version, another pipeline or id, missing, extra or
                hostile file names, malformed digests, or files that do not add up to the id.
        """
        read = Reader(f"manifest of release {release[:12]}")
        found = read.document(data, LARGEST_MANIFEST)
        names = ("pipeline", "release", "files", "interface", "parity", "metrics", "provenance")
        values = read.fields(found, "manifest", names, versions=(SCHEMA_VERSION, LISTS_VERSION, HISTORY_VERSION))
        if values["pipeline"] != pipeline:
            read.refuse(f"it belongs to pipeline {values['pipeline']!r}, not {pipeline!r}")
        if values["release"] != release:
            read.refuse(f"it is the manifest of release {values['release']!r}")
        files = tuple(_file(read, one) for one in read.sequence(values["files"], "files"))
        named = [file.name for file in files]
        if named != sorted(set(named)):
            read.refuse("its files are doubled or out of order")
        _complete(set(named), read.what)
        if (total := sum(file.bytes for file in files)) > LARGEST_RELEASE:
            read.refuse(f"its files are {total} bytes, more than the limit of {LARGEST_RELEASE}")
        if (digest := content_digest(files)) != release:
            read.refuse(f"its files add up to release {digest}")
        extras = {name: read.mapping(values[name], name) for name in ("parity", "metrics", "provenance")}
        manifest = cls(pipeline, release, files, read_interface(read, values["interface"]), **extras)
        if values["schema_version"] != manifest.schema_version:
            read.refuse(
                f"its schema version is {values['schema_version']}, its inputs are of {manifest.schema_version}"
            )
        return manifest


@dataclass(frozen=True)
class Pointer:
    """`current.json`: the one object that names the champion.

    Attributes:
        release: id of the champion.
        night: its night.
        generation: grows by one with every move, in whatever direction.
        previous: id of the champion before, None at first.
        fencing_token: token of the lease under which it was moved.
        moved_at: UTC time of the move, ISO 8601.
        reason: why it was moved.
        challenger: reserved.
        share: reserved.
    """

    release: str
    night: date
    generation: int
    previous: str | None
    fencing_token: int
    moved_at: str
    reason: str
    challenger: str | None = None
    share: float = 0.0

    def serialise(self) -> bytes:
        """The bytes of `current.json`."""
        return canonical({**asdict(self), "night": self.night.isoformat(), "schema_version": SCHEMA_VERSION}) + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> "Pointer":
        """Read a pointer.

        Raises:
            ReleaseRefused: it is damaged, of an unknown schema version, or uses what is reserved.
        """
        read = Reader("pointer current.json")
        names = tuple(cls.__dataclass_fields__)
        values = read.fields(read.document(data, 2**16), "pointer", names)
        if values["challenger"] is not None or values["share"] != 0:
            read.refuse("it names a challenger, which this version does not know: update the reader")
        previous = values["previous"]
        return cls(
            release=read.digest(values["release"], "release"),
            night=read.night(values["night"]),
            generation=read.count(values["generation"], "generation"),
            previous=None if previous is None else read.digest(previous, "previous"),
            fencing_token=read.count(values["fencing_token"], "fencing_token"),
            moved_at=read.text(values["moved_at"], "moved_at"),
            reason=read.text(values["reason"], "reason"),
        )


def content_digest(files: Iterable[ReleaseFile]) -> str:
    """The release id: SHA-256 over the canonical JSON of the files, sorted by name.

    >>> content_digest([ReleaseFile("a", 1, "0" * 64)])[:12]
    'f1cadd350f0d'
    """
    listed = sorted((file.name, file.bytes, file.sha256) for file in files)
    return hashlib.sha256(canonical({"schema_version": SCHEMA_VERSION, "files": listed})).hexdigest()


def describe(folder: Path) -> tuple[ReleaseFile, ...]:
    """Size and SHA-256 of every file in a folder, by name."""
    return tuple(ReleaseFile(path.name, path.stat().st_size, sha256_of(path)) for path in sorted(folder.iterdir()))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_key(pipeline: str, release: str) -> str:
    """Where a manifest lies in the store."""
    return f"{pipeline}/releases/{release}/manifest.json"


def blob_key(pipeline: str, sha256: str) -> str:
    """Where a file's bytes lie in the store."""
    return f"{pipeline}/blobs/{sha256}"


def pointer_key(pipeline: str) -> str:
    """Where the pointer lies in the store."""
    return f"{pipeline}/current.json"


def _complete(names: set[str], what: str) -> None:
    if missing := sorted(CONTENT - names):
        raise ReleaseRefused(f"{what} is refused: it lacks {', '.join(missing)}; publish the release again")
    if extra := sorted(names - CONTENT):
        shown = ", ".join(repr(name[:80]) for name in extra[:5])
        raise ReleaseRefused(f"{what} is refused: it names {shown}, which no release has; publish the release again")


def _file(read: Reader, value: object) -> ReleaseFile:
    values = read.fields(value, "file", ("name", "bytes", "sha256"), versioned=False)
    size = read.count(values["bytes"], "bytes")
    return ReleaseFile(read.text(values["name"], "file name"), size, read.digest(values["sha256"], "sha256"))
