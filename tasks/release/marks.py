"""What is to be removed from a store, and since when: one object that everybody who counts on a release looks at.

Removal has two phases. A run of the collector marks what nothing names; a later one, not before the grace is over,
takes the marks away, notes what it is about to remove, and removes it. Who publishes or promotes takes the marks off
what he counts on first. Both are compare-and-swaps of the same object, so one of the two always sees the other.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from tasks.clients.object_store import ObjectStore
from tasks.errors import Conflict, ReleaseRefused
from tasks.release.manifest import Manifest
from tasks.release.strict_json import SCHEMA_VERSION, Reader, canonical

LARGEST_MARKS = 64 * 2**20
"""Bytes; about 400,000 marks."""


@dataclass(frozen=True)
class Marks:
    """The content of `state/gc.json`.

    Attributes:
        since: what nothing named when it was looked at, `releases/<id>` or `blobs/<sha256>`, to when it was marked.
        removing: what a collector is removing now, or was when it died.
    """

    since: Mapping[str, datetime] = field(default_factory=dict)
    removing: frozenset[str] = frozenset()

    def serialise(self) -> bytes:
        """The bytes of the object."""
        told = {name: when.isoformat() for name, when in self.since.items()}
        return canonical({"schema_version": SCHEMA_VERSION, "since": told, "removing": sorted(self.removing)}) + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> "Marks":
        """Read the object.

        Raises:
            ReleaseRefused: it is damaged, or of another schema version.
        """
        read = Reader("the marks state/gc.json")
        values = read.fields(read.document(data, LARGEST_MARKS), "marks", ("since", "removing"))
        told = read.mapping(values["since"], "since")
        removing = frozenset(read.text(one, "removing") for one in read.sequence(values["removing"], "removing"))
        try:
            since = {name: datetime.fromisoformat(read.text(when, name)) for name, when in told.items()}
        except ValueError as error:
            read.refuse(f"a mark has no time ({error})")
        if any(when.tzinfo is None for when in since.values()):
            read.refuse("a mark's time has no zone")
        return cls(since, removing)


def release_name(release: str) -> str:
    """What marks call a release.

    >>> release_name("ab12")
    'releases/ab12'
    """
    return f"releases/{release}"


def blob_name(sha256: str) -> str:
    """What marks call a blob.

    >>> blob_name("cd34")
    'blobs/cd34'
    """
    return f"blobs/{sha256}"


def names_of(manifest: Manifest) -> frozenset[str]:
    """What marks call a release and its blobs."""
    return frozenset({release_name(manifest.release), *(blob_name(file.sha256) for file in manifest.files)})


def marks_key(pipeline: str) -> str:
    """Where the marks are kept."""
    return f"{pipeline}/state/gc.json"


def read_marks(store: ObjectStore, pipeline: str) -> tuple[Marks, str | None]:
    """The marks, and the tag of the object that holds them; None where there is none yet."""
    found = store.find(marks_key(pipeline))
    return (Marks(), None) if found is None else (Marks.parse(found.data), found.etag)


def change_marks(store: ObjectStore, pipeline: str, change: Callable[[Marks], Marks]) -> Marks:
    """Rewrite the marks as a function of what they are, however many write at once.

    Args:
        store: where.
        pipeline: the pipeline.
        change: gives the new marks; called again where another writer was quicker.
    """
    while True:
        marks, etag = read_marks(store, pipeline)
        changed = change(marks)
        if changed == marks:
            return marks
        try:
            store.swap(marks_key(pipeline), changed.serialise(), etag)
        except Conflict:
            continue
        return changed


def spare(store: ObjectStore, pipeline: str, names: Iterable[str], leased: bool) -> None:
    """Take the marks off what is counted on from now on; to be called before it is.

    Args:
        store: where.
        pipeline: the pipeline.
        names: of releases and blobs.
        leased: whether the caller holds the lease. Then no collector is at work, and what one that died was removing
            is the caller's to put back.

    Raises:
        ReleaseRefused: without a lease: some of it is being removed.
    """
    wanted = frozenset(names)

    def without(marks: Marks) -> Marks:
        lost = marks.removing & wanted
        if lost and not leased:
            raise ReleaseRefused(
                f"{len(lost)} of {len(wanted)} objects are being removed from {store.url} by `nightrank releases gc`, "
                f"the first is {min(lost)}; wait for it to end (run it again if it died), then look again"
            )
        kept = {name: when for name, when in marks.since.items() if name not in wanted}
        return replace(marks, since=kept, removing=marks.removing - wanted)

    change_marks(store, pipeline, without)
