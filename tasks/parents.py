"""What a night builds on: the base and the vocabulary of an earlier one, from its release or from its step records."""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from tasks.clients.workspace import digest_of
from tasks.data.contract import DataConfig
from tasks.errors import InvalidConfig, ObjectCorrupt, ObjectMissing
from tasks.learning.base import DESCRIPTION, WEIGHTS, Base, load_base
from tasks.references import BaseRef, ParentRef, Place, PrepareRef
from tasks.release.manifest import Manifest, blob_key, sha256_of
from tasks.release.publishing import read_manifest
from tasks.steps import open_workspace, recalled, record_of, store_of

VOCABULARY = "vocabulary.parquet"


def released_parent(place: Place, release: str) -> ParentRef:
    """A release as a parent.

    Raises:
        ObjectMissing: there is no such release.
        ReleaseRefused: its manifest is damaged.
    """
    files = {file.name: file.sha256 for file in _manifest(place, release).files}
    return ParentRef(digest=_digest(files), release=release)


def require_same_hashing(place: Place, data: DataConfig, release: str) -> None:
    """Refuse to go on from a release whose personal columns were hashed otherwise: all their values would be others.

    Raises:
        InvalidConfig: a column has another key, or one of the two has none.
        ObjectMissing, ReleaseRefused: as `released_parent`.
    """
    inputs = _manifest(place, release).interface.inputs
    before = {spec.name: None if spec.personal is None else spec.personal.key_id for spec in inputs}
    for column in data.columns:
        key = None if column.personal is None else column.personal.key_id
        if column.name in before and before[column.name] != key:
            was, now = (f"hashed with key {one}" if one else "not hashed" for one in (before[column.name], key))
            raise InvalidConfig(
                f"column {column.name!r} is {now}, and was {was} in release {release[:12]}, which this night starts "
                f"from: none of its values would be known again; give the pipeline another name, so that it starts anew"
            )


def replayed_parent(place: Place, prepared: PrepareRef, base: BaseRef) -> ParentRef:
    """The same of a night that has no release: equal files have an equal digest, wherever they lie."""
    records = (record_of(place, ref).content["files"] for ref in (prepared, base))
    files: dict[str, dict[str, Any]] = {name: about for found in records for name, about in found.items()}
    digest = _digest({name: about["sha256"] for name, about in files.items()})
    return ParentRef(digest=digest, base=base.key, layout=prepared.key)


def parent_file(place: Place, parent: ParentRef, name: str) -> Path:
    """A verified local copy of the parent's vocabulary, or of a file of its base.

    Raises:
        ObjectMissing: the release, or the record, is gone.
        ObjectCorrupt: the file is damaged.
    """
    if parent.release is not None:
        return release_file(place, parent.release, name)
    step, key = ("prepare", parent.layout) if name == VOCABULARY else ("meta-train", parent.base)
    assert key is not None
    return open_workspace(place).file(recalled(place, step, key), name)


def parent_base(place: Place, parent: ParentRef) -> Base:
    """The base of a parent.

    Raises:
        FormatUnknown: a version of nightrank wrote it whose bases are others.
    """
    return load_base({name: parent_file(place, parent, name) for name in (WEIGHTS, DESCRIPTION)})


def trained_through(place: Place, parent: ParentRef) -> date:
    """Last night that the training of a parent's base has read; of a base that this version can load."""
    return date.fromisoformat(json.loads(parent_file(place, parent, DESCRIPTION).read_text())["trained_through"])


def release_file(place: Place, release: str, name: str) -> Path:
    """A verified local copy of one file of a release.

    Raises:
        ObjectMissing: there is no such release.
        ReleaseRefused: its manifest is damaged.
        ObjectCorrupt: the file is.
    """
    store = store_of(place)
    file = next(file for file in read_manifest(store, place.pipeline, release).files if file.name == name)
    folder = Path(place.scratch) / "blobs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file.sha256
    if not path.exists() or sha256_of(path) != file.sha256:
        try:
            store.download(blob_key(place.pipeline, file.sha256), path, file.sha256)
        except ObjectCorrupt as error:
            raise ObjectCorrupt(
                f"{name} of release {release[:12]}, which this night builds on, is damaged: {error} "
                f"(its export left the same bytes below {place.pipeline}/work/export/)"
            ) from error
    return path


def base_of(place: Place, release: str) -> Base:
    """The base of a release."""
    return load_base({name: release_file(place, release, name) for name in (WEIGHTS, DESCRIPTION)})


def _manifest(place: Place, release: str) -> Manifest:
    """The manifest of a release that a night starts from."""
    try:
        return read_manifest(store_of(place), place.pipeline, release)
    except ObjectMissing as error:
        raise ObjectMissing(
            f"release {release[:12]}, which this night starts from, is no longer in {place.store}: `nightrank releases "
            f"gc` removes old ones; run its own night again, whose steps are remembered, then this one"
        ) from error


def _digest(files: Mapping[str, str]) -> str:
    """Digest over what a night reads of its parent, by name and SHA-256."""
    return digest_of({name: files[name] for name in (WEIGHTS, DESCRIPTION, VOCABULARY)})
