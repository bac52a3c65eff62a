"""How a pipeline stands, as an operator asks: keys, pointer, who runs, and what was left behind."""

from collections.abc import Iterator
from pathlib import Path

from tasks.clients.lease import read_lease
from tasks.clients.object_store import ObjectStore
from tasks.references import Place
from tasks.release.garbage import Found, find
from tasks.release.holds import held_segments
from tasks.release.manifest import blob_key
from tasks.release.marks import read_marks
from tasks.release.pointer import read_pointer
from tasks.release.published import check_whole
from tasks.release.publishing import read_manifest
from tasks.release.signing import UNSIGNED, Keyring, signer
from tasks.steps import store_of

KEEP = 14
"""Releases that `nightrank releases gc` keeps unless it is told otherwise."""


def standing(place: Place) -> Iterator[tuple[str, str]]:
    """What to tell, by subject, in order: `keys`, `pointer`, `held`, `lease`, `left`.

    Raises:
        InvalidConfig: keys are named that cannot be used.
        ReleaseRefused: pointer, champion or challenger are damaged, or not signed by a trusted key.
        ObjectMissing, ObjectCorrupt: one that the pointer names is gone, or lacks files.
    """
    store, pipeline = store_of(place), place.pipeline
    yield "keys", _keys()
    yield "pointer", _pointer(store, pipeline)
    for one in held_segments(store, pipeline):
        yield "held", f"segment {one.told} at its parent's weights, by {one.by} since {one.since[:16]}: {one.reason}"
    lease = read_lease(store, f"{pipeline}/lease")
    if lease is None or lease.free:
        yield "lease", "nobody runs"
    else:
        yield "lease", f"held by {lease.holder} (pid {lease.pid} on {lease.host}), token {lease.token}"
    left = list(_left(store, pipeline, find(store, pipeline, Path(place.scratch), KEEP)))
    for told in left or ["nothing"]:
        yield "left", told


def _keys() -> str:
    key, keyring = signer(), Keyring.from_environment()
    if key is None:
        return UNSIGNED
    trusted = f"one of {len(keyring.keys)} in the keyring" if keyring is not None else "no keyring is named"
    return f"{key.key_id} signs, {trusted}"


def _pointer(store: ObjectStore, pipeline: str) -> str:
    pointer = read_pointer(store, pipeline)
    if pointer is None:
        return "nothing was promoted yet"
    told = f"release {pointer.release[:12]} of night {pointer.night}, generation {pointer.generation}"
    check_whole(store, read_manifest(store, pipeline, pointer.release))
    if pointer.challenger is not None:
        check_whole(store, read_manifest(store, pipeline, pointer.challenger))
        told += f"; challenger {pointer.challenger[:12]} for {pointer.share / 100:g} % of the users"
    if pointer.hold is not None:
        told += f"; held, no night promotes: {pointer.hold}"
    return told


def _left(store: ObjectStore, pipeline: str, found: Found) -> Iterator[str]:
    """What runs that died left, and what waits to be removed, each with what to do about it."""
    for intent in found.unknown:
        yield (
            f"night {intent.night} was about to promote release {str(intent.release)[:12]}, and nothing says whether "
            f"it did: run it again"
        )
    for release, count in found.torn.items():
        yield f"release {release[:12]} lacks {count} files: run its night again"
    collect = "`nightrank releases gc` removes them in time"
    if found.unfinished:
        named = ", ".join(one[:12] for one in found.unfinished[:4])
        yield f"{len(found.unfinished)} releases without a manifest, of publishes that died ({named}): {collect}"
    if found.releases:
        yield f"{len(found.releases)} releases that nothing names, beyond the newest {KEEP}: {collect}"
    if found.blobs:
        size = sum(store.size(blob_key(pipeline, one)) or 0 for one in found.blobs)
        yield f"{len(found.blobs)} blobs, {size:,} bytes, that only these name or none: {collect}"
    marks, _ = read_marks(store, pipeline)
    if marks.since:
        yield f"{len(marks.since)} of these are marked, the first since {min(marks.since.values()):%Y-%m-%d %H:%M} UTC"
    if marks.removing:
        yield f"{len(marks.removing)} objects were being removed when a collector died, or are: run it again"
