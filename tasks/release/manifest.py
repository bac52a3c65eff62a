"""The manifest: what a release says about itself, and how strictly it is read.

Pure standard library, so that a ranker can read a release without anything else of ours.

A release's id is the digest of its content files' names, sizes and digests. `interface.json` is one of them and says
what goes in and comes out, so that a manifest cannot claim another interface than the one that was built.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path

from tasks.errors import ReleaseRefused
from tasks.release.interface import InputSpec as InputSpec  # serving imports from here alone
from tasks.release.interface import Interface, Json, read_interface
from tasks.release.interface import Objective as Objective
from tasks.release.interface import Personal as Personal
from tasks.release.manifest_parts import GRAPH_SUFFIX as GRAPH_SUFFIX
from tasks.release.manifest_parts import LARGEST_DIFFERENCE as LARGEST_DIFFERENCE
from tasks.release.manifest_parts import (
    LevelSegments,
    Requires,
    read_graphs,
    read_requires,
    read_segments,
    read_variants,
)
from tasks.release.manifest_parts import Variant as Variant
from tasks.release.pointer_json import Pointer as Pointer
from tasks.release.pointer_json import pointer_key as pointer_key
from tasks.release.strict_json import (
    HISTORY_VERSION,
    LISTS_VERSION,
    MANIFEST_VERSION,
    REMEDY,
    SCHEMA_VERSION,
    VARIANTS_VERSION,
    Reader,
    canonical,
)

CONTENT = frozenset(
    {
        "model.onnx", "lookup.onnx", "score.onnx", "base.bin", "statistics.bin", "bank.bin", "base.safetensors",
        "base.json", "vocabulary.parquet", "statistics_item.parquet", "statistics_user.parquet",
        "statistics_cohort_item.parquet", "segments.parquet", "tables.json", "interface.json", "golden.json",
    }
)  # fmt: skip
"""The files that every release has."""
OPTIONAL = {
    "large look-ups": frozenset({"lookup_vocabulary.bin", "lookup_segments.bin", "lookup_cohort.bin"}),
    "feedback": frozenset({"model_feedback.onnx", "lookup_feedback.onnx", "score_feedback.onnx"}),
    "fp16": frozenset({"score_fp16.onnx", "base_fp16.bin", "bank_fp16.bin"}),
    "int8": frozenset({"score_int8.onnx", "base_int8.bin", "bank_int8.bin"}),
}
"""The files that a release may have since `VARIANTS_VERSION`, by what they are for. Any other is refused."""
TOGETHER = ("feedback", "fp16", "int8")
"""Of these either all files are there or none."""
BESIDE = frozenset({"run.json", "report.html", "lift.parquet"})
"""What lies beside a manifest, for people; its bytes are no content, and the manifest has their digests."""
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
        requires: what a host must have to load it; None of schema versions 1 to 3.
        segments: who is served by what, finest level first; empty where it is not told.
        variants: graphs in another arithmetic, by name, and how they were judged.
        beside: what lies beside the manifest for people, by name.
        graphs: each graph's file to the other files that it opens; empty of schema versions 1 to 4, which tell none.
        schema_version: of the manifest; what is written anew has the newest.
    """

    pipeline: str
    release: str
    files: tuple[ReleaseFile, ...]
    interface: Interface
    parity: Json = field(default_factory=dict)
    metrics: Json = field(default_factory=dict)
    provenance: Json = field(default_factory=dict)
    requires: Requires | None = None
    segments: tuple[LevelSegments, ...] = ()
    variants: Mapping[str, Variant] = field(default_factory=dict)
    beside: tuple[ReleaseFile, ...] = ()
    graphs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    schema_version: int = MANIFEST_VERSION

    @property
    def night(self) -> date:
        """The newest night that the release has learned from."""
        return self.interface.night

    @property
    def size(self) -> int:
        """Bytes of all content files."""
        return sum(file.bytes for file in self.files)

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
        if self.schema_version >= VARIANTS_VERSION:
            written |= {
                "requires": None if self.requires is None else self.requires.as_json(),
                "segments": [level.as_json() for level in self.segments],
                "variants": {name: variant.as_json() for name, variant in self.variants.items()},
                "beside": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in self.beside},
            }
        if self.schema_version >= MANIFEST_VERSION:
            written["graphs"] = {name: list(files) for name, files in self.graphs.items()}
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
        version = read.mapping(found, "manifest").get("schema_version")
        newer: tuple[str, ...] = ()
        if version in (VARIANTS_VERSION, MANIFEST_VERSION):
            newer = ("requires", "segments", "variants", "beside")
        if version == MANIFEST_VERSION:
            newer = (*newer, "graphs")
        names = ("pipeline", "release", "files", "interface", "parity", "metrics", "provenance", *newer)
        known = (SCHEMA_VERSION, LISTS_VERSION, HISTORY_VERSION, VARIANTS_VERSION, MANIFEST_VERSION)
        values = read.fields(found, "manifest", names, versions=known)
        if values["pipeline"] != pipeline:
            read.refuse(f"it belongs to pipeline {values['pipeline']!r}, not {pipeline!r}")
        if values["release"] != release:
            read.refuse(f"it is the manifest of release {values['release']!r}")
        files = tuple(_file(read, one) for one in read.sequence(values["files"], "files"))
        named = [file.name for file in files]
        if named != sorted(set(named)):
            read.refuse("its files are doubled or out of order")
        _complete(set(named), read.what, frozenset().union(*OPTIONAL.values()) if newer else frozenset())
        if (total := sum(file.bytes for file in files)) > LARGEST_RELEASE:
            read.refuse(f"its files are {total} bytes, more than the limit of {LARGEST_RELEASE}")
        if (digest := content_digest(files)) != release:
            read.refuse(f"its files add up to release {digest}")
        parity, metrics, provenance = (read.mapping(values[name], name) for name in ("parity", "metrics", "provenance"))
        interface = read_interface(read, values["interface"])
        manifest = cls(pipeline, release, files, interface, parity, metrics, provenance)
        if any(spec.per == "feedback" for spec in interface.inputs) != (not OPTIONAL["feedback"].isdisjoint(named)):
            read.refuse("its inputs and its graphs do not agree whether requests bring feedback")
        if version != MANIFEST_VERSION and any(objective.bounded for objective in interface.objectives):
            read.refuse("an objective has bounds, which its schema version does not have")
        if not newer:
            if any(spec.optional or spec.personal is not None for spec in interface.inputs):
                read.refuse("an input is optional or hashed, which its schema version does not have")
            if version != (expected := _older_version(interface)):
                read.refuse(f"its schema version is {version!r}, its inputs are of {expected}")
            return replace(manifest, schema_version=expected)
        return replace(
            manifest,
            requires=read_requires(read, values["requires"]),
            segments=read_segments(read, values["segments"], [level.columns for level in interface.levels]),
            variants=read_variants(read, values["variants"], named),
            beside=_beside(read, values["beside"]),
            graphs=read_graphs(read, values["graphs"], named) if "graphs" in newer else {},
            schema_version=MANIFEST_VERSION if "graphs" in newer else VARIANTS_VERSION,
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


def _complete(names: set[str], what: str, optional: frozenset[str]) -> None:
    if missing := sorted(CONTENT - names):
        raise ReleaseRefused(f"{what} is refused: it lacks {', '.join(missing)}; {REMEDY}")
    if extra := sorted(names - CONTENT - optional):
        shown = ", ".join(repr(name[:80]) for name in extra[:5])
        raise ReleaseRefused(f"{what} is refused: it names {shown}, which no release has; {REMEDY}")
    for feature in TOGETHER:
        if lacking := sorted(OPTIONAL[feature] - names) if OPTIONAL[feature] & names else []:
            raise ReleaseRefused(f"{what} is refused: of {feature} it lacks {', '.join(lacking)}; {REMEDY}")


def _older_version(interface: Interface) -> int:
    """The schema version, of 1 to 3, whose readers know all that an interface says."""
    if any(spec.recalls for spec in interface.inputs):
        return HISTORY_VERSION
    return LISTS_VERSION if any(spec.values is not None for spec in interface.inputs) else SCHEMA_VERSION


def _beside(read: Reader, value: object) -> tuple[ReleaseFile, ...]:
    told = read.mapping(value, "beside")
    if odd := sorted(set(told) - BESIDE):
        read.refuse(f"{odd[0]!r:.80} lies beside it, which lies beside no release")
    found = []
    for name in sorted(told):
        values = read.fields(told[name], name, ("bytes", "sha256"), versioned=False)
        found.append(ReleaseFile(name, read.count(values["bytes"], "bytes"), read.digest(values["sha256"], "sha256")))
    return tuple(found)


def _file(read: Reader, value: object) -> ReleaseFile:
    values = read.fields(value, "file", ("name", "bytes", "sha256"), versioned=False)
    size = read.count(values["bytes"], "bytes")
    return ReleaseFile(read.text(values["name"], "file name"), size, read.digest(values["sha256"], "sha256"))
