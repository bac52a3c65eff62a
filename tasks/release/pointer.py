"""Publishing: blobs first, the manifest last, and one compare-and-swap that names the champion.

A release exists when its manifest does. Everything before that is invisible to readers and can be repeated; everything
is written at most once, so that a publish that died is finished by doing it again.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from tasks.clients.object_store import ObjectStore
from tasks.errors import Conflict, ObjectCorrupt, ObjectMissing, PointerMoved, ReleaseRefused
from tasks.release.manifest import (
    LARGEST_MANIFEST,
    Manifest,
    Pointer,
    blob_key,
    describe,
    manifest_key,
    pointer_key,
)
from tasks.release.strict_json import canonical


@dataclass(frozen=True)
class Published:
    """What a publish did.

    Attributes:
        release: the release's id.
        new: whether this call made it visible; False where it was there already.
        written: names of the files whose bytes were new to the store.
        reused: names of the files that an earlier release shares.
    """

    release: str
    new: bool
    written: tuple[str, ...]
    reused: tuple[str, ...]


def publish_release(
    store: ObjectStore, pipeline: str, folder: Path, manifest: Manifest, extra: Mapping[str, bytes]
) -> Published:
    """Make a release visible under its id, without moving the pointer.

    Args:
        store: where.
        pipeline: the pipeline, part of every key.
        folder: the release's content files.
        manifest: describes them.
        extra: what is laid beside the manifest, such as `run.json` and `report.html`; first write wins.

    Raises:
        ReleaseRefused: the manifest would be refused by a reader.
        ObjectCorrupt: the folder, or a blob that is there already, is not what the manifest says.
        StoreError: the store refused; the release is not visible, and publishing again is safe.
    """
    written = manifest.serialise()
    if len(written) > LARGEST_MANIFEST:
        raise ReleaseRefused(
            f"the manifest has {len(written)} bytes, limit {LARGEST_MANIFEST}; put less into its metrics"
        )
    if Manifest.parse(written, pipeline, manifest.release) != manifest:
        raise ReleaseRefused(f"the manifest of release {manifest.release[:12]} does not survive being written and read")
    if (found := describe(folder)) != manifest.files:
        changed = ", ".join(sorted({file.name for file in set(found) ^ set(manifest.files)}))
        raise ObjectCorrupt(f"the release folder {folder} is not what its manifest says: {changed}; export again")
    new: list[str] = []
    reused: list[str] = []
    for file in manifest.files:
        key = blob_key(pipeline, file.sha256)
        (new if store.put_file_if_absent(key, folder / file.name) else reused).append(file.name)
        if (size := store.size(key)) != file.bytes:
            raise ObjectCorrupt(
                f"{store.url}/{key} ({file.name}) has {size} bytes, expected {file.bytes}; delete it and publish again"
            )
    for name, data in sorted(extra.items()):
        store.put_if_absent(f"{pipeline}/releases/{manifest.release}/{name}", data)
    visible = store.put_if_absent(manifest_key(pipeline, manifest.release), written)
    if not visible:
        _published(store, pipeline, manifest.release)
    return Published(manifest.release, visible, tuple(new), tuple(reused))


def _published(store: ObjectStore, pipeline: str, release: str) -> Manifest:
    stored = store.find(manifest_key(pipeline, release))
    if stored is None:
        raise ObjectMissing(
            f"{store.url} has no release {release} of pipeline {pipeline!r}; publish it first, "
            f"or look at `nightrank releases`"
        )
    return Manifest.parse(stored.data, pipeline, release)


def read_manifest(store: ObjectStore, pipeline: str, release: str) -> Manifest:
    """The manifest of a published release.

    Raises:
        ObjectMissing: it was never published.
        ReleaseRefused: its manifest is damaged.
    """
    return _published(store, pipeline, release)


def read_pointer(store: ObjectStore, pipeline: str) -> Pointer | None:
    """The pointer, or None where nothing was promoted yet.

    Raises:
        ReleaseRefused: it is damaged.
    """
    stored = store.find(pointer_key(pipeline))
    return None if stored is None else Pointer.parse(stored.data)


def promote(
    store: ObjectStore,
    pipeline: str,
    release: str,
    night: date,
    token: int,
    force: bool = False,
    reason: str = "promoted",
    expected: int | None = None,
) -> Pointer:
    """Make a published release the champion, by one compare-and-swap.

    Args:
        store: where.
        pipeline: the pipeline.
        release: id of a published release.
        night: its night.
        token: fencing token of the lease that the caller holds.
        force: allow an earlier night than the champion's (a rollback).
        reason: why; kept in the pointer and in the ledger.
        expected: generation that the pointer must still have (0: there must be none), so that nothing is replaced that
            the caller did not compare with; None for any.

    Returns:
        The pointer as it now stands. Where it names the release already, nothing is written to it.

    Raises:
        ObjectMissing: the release was never published.
        ReleaseRefused: it is of another night.
        PointerMoved: the champion is of a later night and `force` is off, or was promoted under a newer lease, or
            changed while this call was at it.
    """
    manifest = _published(store, pipeline, release)
    if manifest.night != night:
        raise ReleaseRefused(f"release {release[:12]} is of night {manifest.night}, not {night}; name the night it has")
    key = pointer_key(pipeline)
    stored = store.find(key)
    current = None if stored is None else Pointer.parse(stored.data)
    if current is not None:
        if current.release == release:
            _enter(store, pipeline, current)
            return current
        if current.fencing_token > token:
            raise PointerMoved(
                f"{store.url}/{key} was moved under lease token {current.fencing_token}, this run holds {token}: "
                f"a newer run took over; the pointer names release {current.release[:12]} of night {current.night}"
            )
        if current.night > night and not force:
            raise PointerMoved(
                f"{store.url}/{key} names release {current.release[:12]} of night {current.night}, later than {night}; "
                f"the pointer moves to an earlier night only with force"
            )
    generation = 0 if current is None else current.generation
    if expected is not None and generation != expected:
        named = "is gone" if current is None else f"names release {current.release[:12]} of night {current.night}"
        raise PointerMoved(
            f"{store.url}/{key} {named} (generation {generation}), it had generation {expected} when this run began: "
            f"somebody moved it meanwhile; run the night again to be compared with what it names now"
        )
    pointer = Pointer(
        release=release,
        night=night,
        generation=1 if current is None else current.generation + 1,
        previous=None if current is None else current.release,
        fencing_token=token,
        moved_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        reason=reason,
    )
    try:
        store.swap(key, pointer.serialise(), None if stored is None else stored.etag)
    except Conflict as conflict:
        pointer = _winner(store, pipeline, release, conflict)
    _enter(store, pipeline, pointer)
    return pointer


def _winner(store: ObjectStore, pipeline: str, release: str, conflict: Conflict) -> Pointer:
    now = read_pointer(store, pipeline)
    if now is None:
        raise PointerMoved(
            f"{store.url}/{pointer_key(pipeline)} vanished while it was moved to release {release[:12]}; promote again"
        ) from conflict
    if now.release != release:
        raise PointerMoved(
            f"{store.url}/{pointer_key(pipeline)} was moved by somebody else while it was moved to release "
            f"{release[:12]}: it names {now.release[:12]} of night {now.night} (generation {now.generation}); "
            f"look who else runs this pipeline, then promote again"
        ) from conflict
    return now


def _enter(store: ObjectStore, pipeline: str, pointer: Pointer) -> None:
    """Enter a move into the ledger.

    The key follows from the pointer, so that an entry that a crash lost is made up for by the next call, and none is
    made twice.
    """
    stamp = pointer.moved_at.replace(":", "").replace("-", "").replace("+0000", "Z")
    entry = uuid.uuid5(uuid.NAMESPACE_OID, f"{pipeline}/{pointer.generation}/{pointer.release}")
    data = canonical({"what": "promote", "pipeline": pipeline, "pointer": pointer.serialise().decode().strip()})
    store.put_if_absent(f"{pipeline}/ledger/{stamp}-{entry}.json", data)
