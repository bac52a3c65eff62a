"""Earlier releases as a night reads them: single files, and the base."""

from pathlib import Path

from tasks.errors import ObjectCorrupt
from tasks.learning.base import DESCRIPTION, WEIGHTS, Base, load_base
from tasks.references import Place
from tasks.release.manifest import blob_key, sha256_of
from tasks.release.pointer import read_manifest
from tasks.steps import store_of


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
