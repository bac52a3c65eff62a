"""What stands in a store: releases by the names that people give them, who names them, and whether they are whole."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from tasks.clients.object_store import ObjectStore
from tasks.errors import NoRelease, ObjectCorrupt, ObjectMissing
from tasks.release.manifest import Manifest, Pointer, blob_key
from tasks.release.notes import find_night
from tasks.release.pointer import read_pointer
from tasks.release.signing import manifest_bytes

_PREFIX = re.compile(r"[0-9a-f]{4,64}")
ROLES = ("champion", "previous", "challenger")
"""What the pointer can name a release as; each is also a name that commands take."""


def releases_prefix(pipeline: str) -> str:
    """Where the folders of releases lie."""
    return f"{pipeline}/releases/"


def blobs_prefix(pipeline: str) -> str:
    """Where blobs lie."""
    return f"{pipeline}/blobs/"


def nights_prefix(pipeline: str) -> str:
    """Where each night keeps the newest release that was made of it."""
    return f"{pipeline}/state/released/"


def night_key(pipeline: str, night: date) -> str:
    """Where a night keeps it."""
    return f"{nights_prefix(pipeline)}night={night.isoformat()}.json"


@dataclass(frozen=True)
class Folders:
    """The folders below `releases/`.

    Attributes:
        visible: ids of the releases that have a manifest.
        unfinished: names of the folders that have none: a publish is at it, or died.
    """

    visible: tuple[str, ...]
    unfinished: tuple[str, ...]


def folders(store: ObjectStore, pipeline: str) -> Folders:
    """Every folder of a release in the store, by name."""
    prefix = releases_prefix(pipeline)
    inside = [key.removeprefix(prefix).partition("/") for key in store.list(prefix)]
    visible = {name for name, _, rest in inside if rest == "manifest.json"}
    return Folders(tuple(sorted(visible)), tuple(sorted({name for name, _, _ in inside} - visible)))


def roles(pointer: Pointer | None) -> Mapping[str, tuple[str, ...]]:
    """What the pointer names each release as."""
    found: dict[str, tuple[str, ...]] = {}
    if pointer is not None:
        named = (pointer.release, pointer.previous, pointer.challenger)
        for role, release in zip(ROLES, named, strict=True):
            if release is not None:
                found[release] = (*found.get(release, ()), role)
    return found


def no_releases(store: ObjectStore, pipeline: str) -> str:
    """What is said where a pipeline has none.

    Another name in the command or the config looks the same as a pipeline whose first night is to come.
    """
    return (
        f"no releases of pipeline {pipeline!r} in {store.url}: the first night publishes one (`nightrank run`); where "
        f"there should be some, look at --store and --pipeline, or at the config's"
    )


def resolve(store: ObjectStore, pipeline: str, name: str) -> str:
    """The id of the release that a person means.

    Args:
        store: where.
        pipeline: the pipeline.
        name: an id or the first digits of one (at least 4), `champion`, `previous`, `challenger`, or a night
            (YYYY-MM-DD) for the newest release that was made of it.

    Raises:
        NoRelease: the pipeline has no release at all.
        ObjectMissing: there is no such release, or the name fits several.
        ObjectCorrupt: it is a night, whose note cannot be read.
    """
    where = f"{store.url} of pipeline {pipeline!r}"
    if name in ROLES:
        held = [release for release, given in roles(read_pointer(store, pipeline)).items() if name in given]
        if not held:
            _visible(store, pipeline)
            raise ObjectMissing(f"the pointer in {where} names no {name}; give an id: see `nightrank releases list`")
        return held[0]
    try:
        night = date.fromisoformat(name) if len(name) == 10 else None
    except ValueError:
        night = None
    visible = _visible(store, pipeline)
    if night is not None:
        noted = find_night(store, night_key(pipeline, night))
        if noted is None or noted.release not in visible:
            raise ObjectMissing(f"night {night} has no release in {where}; see `nightrank releases list`")
        return noted.release
    if not _PREFIX.fullmatch(name):
        raise ObjectMissing(
            f"{name!r} names no release; give an id or its first digits (at least 4), a night (YYYY-MM-DD), "
            f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
        )
    fitting = [release for release in visible if release.startswith(name)]
    if len(fitting) != 1:
        found = f"{len(fitting)} releases, {', '.join(one[:12] for one in fitting[:4])}" if fitting else "no release"
        raise ObjectMissing(f"{name!r} fits {found} in {where}; see `nightrank releases list`")
    return fitting[0]


def _visible(store: ObjectStore, pipeline: str) -> tuple[str, ...]:
    """Ids of the releases, of which there must be one for a remedy to name it."""
    if found := folders(store, pipeline).visible:
        return found
    raise NoRelease(no_releases(store, pipeline))


def stored_manifest(store: ObjectStore, pipeline: str, release: str) -> Manifest:
    """The manifest as it stands, whoever signed it.

    Raises:
        ObjectMissing: there is none.
        ReleaseRefused: it is damaged.
    """
    return Manifest.parse(manifest_bytes(store, pipeline, release), pipeline, release)


def beside_of(store: ObjectStore, manifest: Manifest, name: str) -> bytes | None:
    """What lies beside a release under a name; None where its manifest names no such file.

    Raises:
        ObjectCorrupt: it is not what the manifest says.
        ObjectMissing: it is gone.
    """
    file = next((one for one in manifest.beside if one.name == name), None)
    if file is None:
        return None
    key = f"{releases_prefix(manifest.pipeline)}{manifest.release}/{name}"
    data = store.get(key).data
    found = hashlib.sha256(data).hexdigest()
    if (len(data), found) != (file.bytes, file.sha256):
        raise ObjectCorrupt(
            f"{store.url}/{key} has {len(data)} bytes with SHA-256 {found[:12]}, the manifest says {file.bytes} with "
            f"{file.sha256[:12]}: somebody changed it after it was published; rankers do not read it, and a person "
            f"should not trust it; put the published bytes back from a copy, or promote another release"
        )
    return data


def lacking(store: ObjectStore, manifest: Manifest) -> tuple[str, ...]:
    """Content files of a release whose blob is absent or of another size, with what was found."""
    found = []
    for file in manifest.files:
        size = store.size(blob_key(manifest.pipeline, file.sha256))
        if size != file.bytes:
            found.append(f"{file.name} ({'absent' if size is None else f'{size} bytes'}, expected {file.bytes})")
    return tuple(found)


def check_whole(store: ObjectStore, manifest: Manifest) -> None:
    """Look that every blob of a release is there, by size.

    Raises:
        ObjectCorrupt: one is not.
    """
    if missing := lacking(store, manifest):
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ObjectCorrupt(
            f"release {manifest.release[:12]} of night {manifest.night} in {store.url} lacks {len(missing)} of "
            f"{len(manifest.files)} files: {shown}; run its night again, which puts them back"
        )
