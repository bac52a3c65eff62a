"""Releases and the pointer signed anew, by another key or for the first time."""

from collections.abc import Collection
from dataclasses import dataclass

from tasks.clients.object_store import ObjectStore
from tasks.errors import NightrankError, ReleaseRefused
from tasks.release.manifest import Manifest, Pointer
from tasks.release.pointer import sign_pointer
from tasks.release.publishing import write_signature
from tasks.release.signing import Keyring, SigningKey, check_manifest, manifest_bytes


@dataclass(frozen=True)
class Resigned:
    """What was signed.

    Attributes:
        key_id: by which key.
        new: releases that it had not signed before.
        already: those that it had.
        refused: those that were left as they are, with the reason.
        pointer: as it stands now, None where there is none, or it was not asked for.
        pointer_refused: why the pointer was left as it is, None where it was not.
        pointer_asked: whether it was to be signed, too.
    """

    key_id: str
    new: tuple[str, ...]
    already: tuple[str, ...]
    refused: dict[str, str]
    pointer: Pointer | None
    pointer_refused: str | None
    pointer_asked: bool


def published_releases(store: ObjectStore, pipeline: str) -> list[str]:
    """Ids of all releases of a pipeline that have a manifest."""
    keys = (key for key in store.list(f"{pipeline}/releases/") if key.endswith("/manifest.json"))
    return [key.split("/")[-2] for key in keys]


def sign_releases(
    store: ObjectStore,
    pipeline: str,
    key: SigningKey,
    keyring: Keyring | None,
    releases: Collection[str] | None = None,
    *,
    unsigned: bool = False,
    with_pointer: bool = True,
) -> Resigned:
    """Sign manifests, then the pointer.

    Signatures by other keys stay. A release whose files changed under its manifest is signed, too: digests in the
    manifest keep rankers from it.

    Args:
        store: where.
        pipeline: the pipeline.
        key: signs.
        keyring: whose keys must vouch for each of them until now; None takes the caller's word that whatever the store
            holds is good, which is how a store that was never signed begins.
        releases: their ids; None takes all that have a manifest.
        unsigned: take the caller's word also for what the keyring does not vouch for. A pointer that no key vouches for
            must even so be what the ledger says.
        with_pointer: whether the pointer is signed, too.

    Raises:
        ObjectMissing: one that is named was never published.
        StoreError: the store refused.
    """
    new: list[str] = []
    already: list[str] = []
    refused: dict[str, str] = {}
    for release in published_releases(store, pipeline) if releases is None else releases:
        data = manifest_bytes(store, pipeline, release)
        try:
            found: Manifest = check_manifest(store, None if unsigned else keyring, pipeline, release, data)
        except ReleaseRefused as error:
            refused[release] = str(error)
            continue
        (new if write_signature(store, pipeline, found.release, data, key) else already).append(release)
    pointer, why = None, None
    try:
        pointer = sign_pointer(store, pipeline, key, keyring, unsigned) if with_pointer else None
    except NightrankError as error:
        why = str(error)
    return Resigned(key.key_id, tuple(new), tuple(already), refused, pointer, why, with_pointer)
