"""Publishing: blobs first, then signatures, the manifest last.

A release exists when its manifest does. Everything before that is invisible to readers and can be repeated; everything
is written at most once, so that a publish that died is finished by doing it again.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.clients.object_store import ObjectStore
from tasks.errors import ObjectCorrupt, ReleaseRefused
from tasks.release.manifest import (
    BESIDE,
    GRAPH_SUFFIX,
    LARGEST_MANIFEST,
    Manifest,
    ReleaseFile,
    blob_key,
    describe,
    manifest_key,
)
from tasks.release.signature import signature_key
from tasks.release.signing import UNSIGNED, Keyring, SigningKey, check_manifest, manifest_bytes, signer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What a publish did.

    Attributes:
        release: the release's id.
        new: whether this call made it visible; False where it was there already.
        written: names of the files whose bytes were new to the store.
        reused: names of the files that an earlier release shares.
        signed_by: id of the key that signed it, None where it is unsigned.
    """

    release: str
    new: bool
    written: tuple[str, ...]
    reused: tuple[str, ...]
    signed_by: str | None = None


def publish_release(
    store: ObjectStore,
    pipeline: str,
    folder: Path,
    manifest: Manifest,
    extra: Mapping[str, bytes],
    held: Callable[[], None] = lambda: None,
) -> Published:
    """Make a release visible under its id, without moving the pointer.

    Args:
        store: where.
        pipeline: the pipeline, part of every key.
        folder: the release's content files.
        manifest: describes them; what lies beside it is filled in here.
        extra: what is laid beside the manifest, such as `run.json` and `report.html`; first write wins.
        held: raises where the caller's lease is no longer his; asked before the release becomes visible.

    Raises:
        LeaseLost: what `held` raises; the release is not visible.
        ReleaseRefused: the manifest would be refused by a reader, or says of a graph that it opens other files than it
            does, so that readers would not have them.
        ObjectCorrupt: the folder, a blob or a signature that is there already is not what it has to be.
        InvalidConfig: the signing key cannot be used.
        StoreError: the store refused; the release is not visible, and publishing again is safe.
    """
    key = signer()
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
    _check_opened(folder, manifest)
    new: list[str] = []
    reused: list[str] = []
    for file in manifest.files:
        blob = blob_key(pipeline, file.sha256)
        (new if store.put_file_if_absent(blob, folder / file.name) else reused).append(file.name)
        if (size := store.size(blob)) != file.bytes:
            raise ObjectCorrupt(
                f"{store.url}/{blob} ({file.name}) has {size} bytes, expected {file.bytes}; delete it and publish again"
            )
    manifest = replace(manifest, beside=_laid_beside(store, manifest, extra))
    written = manifest.serialise()
    if key is None:
        log.warning("release %s is %s", manifest.release[:12], UNSIGNED)
    else:
        write_signature(store, pipeline, manifest.release, written, key)
    held()
    visible = store.put_if_absent(manifest_key(pipeline, manifest.release), written)
    _settled(store, manifest, written, key)
    _put_back(store, folder, manifest, extra)
    signed_by = None if key is None else key.key_id
    return Published(manifest.release, visible, tuple(new), tuple(reused), signed_by)


def _check_opened(folder: Path, manifest: Manifest) -> None:
    """Hold what a manifest says of the files that its graphs open against what they open."""
    from tasks.release.external import opened_by  # onnx takes most of a second to import, and rollbacks come by here

    for graph, opens in opened_by(sorted(folder.glob(f"*{GRAPH_SUFFIX}"))).items():
        if opens != (told := manifest.graphs.get(graph)):
            raise ReleaseRefused(
                f"{graph} of release {manifest.release[:12]} opens {_listed(opens)}, the manifest says "
                f"{_listed(told or ())}: a ranker that fetched these could not load it; export the release again"
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{name!r:.80}" for name in names) or "no other file"


def read_manifest(store: ObjectStore, pipeline: str, release: str) -> Manifest:
    """The manifest of a published release; signed by a trusted key where the environment names a keyring.

    Raises:
        ObjectMissing: it was never published.
        ReleaseRefused: its manifest is damaged, or not signed by a trusted key.
        InvalidConfig: the keyring cannot be used.
    """
    return check_manifest(
        store, Keyring.from_environment(), pipeline, release, manifest_bytes(store, pipeline, release)
    )


def write_signature(store: ObjectStore, pipeline: str, release: str, data: bytes, key: SigningKey) -> bool:
    """Sign the bytes of a manifest and lay the signature where rankers look for it.

    Returns:
        Whether it is new.

    Raises:
        ObjectCorrupt: something else lies there; equal bytes have equal signatures.
    """
    name = signature_key(pipeline, release, hashlib.sha256(data).hexdigest(), key.key_id)
    signature = key.sign_manifest(pipeline, data).serialise()
    if store.put_if_absent(name, signature):
        return True
    if store.get(name).data != signature:
        raise ObjectCorrupt(
            f"{store.url}/{name} is not the signature of key {key.key_id} over the manifest: somebody else wrote it; "
            f"delete it, look who can write there, and publish again"
        )
    return False


def _settled(store: ObjectStore, manifest: Manifest, written: bytes, key: SigningKey | None) -> None:
    """Make sure that the manifest which is visible has a signature.

    Another attempt, with another provenance, may have been first. Its signature was written before it, unless that
    attempt had no key or another one.
    """
    data = manifest_bytes(store, manifest.pipeline, manifest.release)
    Manifest.parse(data, manifest.pipeline, manifest.release)  # names our pipeline and our files, whoever wrote it
    if key is not None and data != written:
        write_signature(store, manifest.pipeline, manifest.release, data, key)


def _put_back(store: ObjectStore, folder: Path, manifest: Manifest, extra: Mapping[str, bytes]) -> None:
    """Whoever slept between his last look at the lease and the manifest may find that a collector took the rest."""
    for file in manifest.files:
        if store.size(blob := blob_key(manifest.pipeline, file.sha256)) is None:
            log.warning("%s of release %s was removed meanwhile; it is put back", file.name, manifest.release[:12])
            store.put_file_if_absent(blob, folder / file.name)
    for name, data in extra.items():
        if not store.exists(beside := f"{manifest.pipeline}/releases/{manifest.release}/{name}"):
            store.put_if_absent(beside, data)


def _laid_beside(store: ObjectStore, manifest: Manifest, extra: Mapping[str, bytes]) -> tuple[ReleaseFile, ...]:
    """Write what lies beside the manifest, and tell what is there now: an earlier attempt's files stay."""
    found = []
    for name, data in sorted(extra.items()):
        key = f"{manifest.pipeline}/releases/{manifest.release}/{name}"
        stored = data if store.put_if_absent(key, data) else store.get(key).data
        if name in BESIDE:
            found.append(ReleaseFile(name, len(stored), hashlib.sha256(stored).hexdigest()))
    return tuple(found)
