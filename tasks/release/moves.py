"""What an operator does to the pointer by hand: one compare-and-swap each, without a lease.

A night that runs meanwhile finds another generation than the one that it began with, and refuses its own move.
"""

from dataclasses import replace

from tasks.clients.object_store import ObjectStore
from tasks.errors import InvalidConfig, NoRelease, ReleaseRefused
from tasks.release.manifest import Manifest, Pointer
from tasks.release.marks import names_of, spare
from tasks.release.pointer import move, read_pointer
from tasks.release.pointer import promote as first_promotion
from tasks.release.published import check_whole
from tasks.release.publishing import read_manifest


def promote(store: ObjectStore, pipeline: str, release: str, reason: str) -> Pointer:
    """Make a release the champion, whatever the gate said; the reason is kept in pointer and ledger.

    Args:
        store: where.
        pipeline: the pipeline.
        release: id of a release of the champion's night or a later one; to an earlier one leads `rollback`.
        reason: why.

    Raises:
        ObjectMissing, ObjectCorrupt: it was never published, or lacks files.
        ReleaseRefused: it is of an earlier night, is not signed by a trusted key, or is being removed.
        PointerMoved: somebody else moved the pointer at the same time.
        InvalidConfig: there is no reason.
    """
    manifest = _counted_on(store, pipeline, release)
    pointer = read_pointer(store, pipeline)
    if pointer is None:
        return first_promotion(
            *(store, pipeline, release, manifest.night, 0), reason=_said(reason), expected=0, by_operator=True
        )
    if manifest.night < pointer.night:
        raise ReleaseRefused(
            f"release {release[:12]} is of night {manifest.night}, the champion {pointer.release[:12]} of night "
            f"{pointer.night}; to an earlier night leads `nightrank releases rollback --to {release[:12]}`"
        )
    return _named(store, pipeline, manifest, reason, "promote", None)


def rollback(store: ObjectStore, pipeline: str, to: str | None, reason: str, hold: bool = False) -> Pointer:
    """Make an earlier champion, or any release, the champion again.

    Args:
        store: where.
        pipeline: the pipeline.
        to: id of the release; None for the champion before this one.
        reason: why.
        hold: whether nights may no longer promote from now on, for the same reason.

    Raises:
        NoRelease: there is no champion, or none before it.
        ObjectMissing, ObjectCorrupt, ReleaseRefused, PointerMoved, InvalidConfig: as for `promote`.
    """
    pointer = read_pointer(store, pipeline)
    if pointer is None:
        raise NoRelease(f"{store.url} has no champion for pipeline {pipeline!r}; promote a release first")
    target = pointer.previous if to is None else to
    if target is None:
        raise NoRelease(
            f"release {pointer.release[:12]} is the first champion of pipeline {pipeline!r}: there is none before it; "
            f"name a release with --to, see `nightrank releases list`"
        )
    manifest = _counted_on(store, pipeline, target)
    return _named(store, pipeline, manifest, reason, "rollback", reason if hold else None, pointer.generation)


def hold(store: ObjectStore, pipeline: str, reason: str) -> Pointer:
    """Let no night promote until `unhold`; nights run and publish as ever.

    Raises:
        NoRelease: there is no champion.
        PointerMoved: somebody else moved the pointer at the same time.
        InvalidConfig: there is no reason.
    """
    why = _said(reason)
    return move(store, pipeline, lambda now: replace(now, hold=why), why, "hold")


def unhold(store: ObjectStore, pipeline: str, reason: str) -> Pointer:
    """Let nights promote again.

    Raises:
        NoRelease: there is no champion.
        PointerMoved: somebody else moved the pointer at the same time.
    """
    return move(store, pipeline, lambda now: replace(now, hold=None), _said(reason), "unhold")


def challenge(store: ObjectStore, pipeline: str, release: str | None, share: int, reason: str) -> Pointer:
    """Let another release answer a share of the users.

    Args:
        store: where.
        pipeline: the pipeline.
        release: id of the challenger; None: from now on there is none.
        share: basis points of the users, 1 to 10,000; 0 where there is no challenger.
        reason: why.

    Raises:
        NoRelease: there is no champion.
        ObjectMissing, ObjectCorrupt, ReleaseRefused, PointerMoved: as for `promote`.
        InvalidConfig: there is no reason, the share fits no challenger, or the challenger is the champion.
    """
    why = _said(reason)
    if release is not None:
        if share < 1:
            raise InvalidConfig(
                f"challenger {release[:12]} with a share of {share} basis points would answer nobody; allowed: 1 to "
                f"10,000 (0.01 % to 100 %)"
            )
        _counted_on(store, pipeline, release)
    return move(store, pipeline, lambda now: replace(now, challenger=release, share=share), why, "challenger")


def _named(
    store: ObjectStore,
    pipeline: str,
    manifest: Manifest,
    reason: str,
    what: str,
    hold: str | None,
    expected: int | None = None,
) -> Pointer:
    why = _said(reason)

    def change(now: Pointer) -> Pointer:
        stays = now.challenger != manifest.release
        return replace(
            now,
            release=manifest.release,
            night=manifest.night,
            challenger=now.challenger if stays else None,
            share=now.share if stays else 0,
            hold=now.hold if hold is None else hold,
        )

    return move(store, pipeline, change, why, what, expected)


def _counted_on(store: ObjectStore, pipeline: str, release: str) -> Manifest:
    """The manifest of a release that rankers are about to be sent to: whole, and nobody's garbage from now on."""
    manifest = read_manifest(store, pipeline, release)
    spare(store, pipeline, names_of(manifest), leased=False)
    check_whole(store, manifest)
    return manifest


def _said(reason: str) -> str:
    if not reason.strip():
        raise InvalidConfig("a move of the pointer needs a reason, which is kept in the ledger; found a blank one")
    return reason.strip()
