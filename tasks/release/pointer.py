"""The pointer: which release is the champion, moved by one compare-and-swap.

A night promotes its release under its lease; an operator's moves need none. Each raises the generation, so that a night
that began before refuses its own move.
"""

import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime

from tasks.clients.object_store import ObjectStore, Stored
from tasks.errors import Conflict, InvalidConfig, NoRelease, OutcomeUnknown, PointerMoved, ReleaseRefused
from tasks.release.notes import ledger_keys, read_entry
from tasks.release.pointer_json import LARGEST_REASON, Pointer, pointer_key
from tasks.release.publishing import read_manifest
from tasks.release.signing import (
    KEY_VARIABLE,
    KEYS_VARIABLE,
    Keyring,
    SigningKey,
    check_pointer,
    find_pointer,
    signer,
)
from tasks.release.strict_json import canonical


def read_pointer(store: ObjectStore, pipeline: str) -> Pointer | None:
    """The pointer, or None where nothing was promoted yet; signed by a trusted key where a keyring is named.

    Raises:
        ReleaseRefused: it is damaged, or not signed by a trusted key.
        InvalidConfig: the keyring cannot be used.
    """
    return _current(store, pipeline)[0]


def promote(
    store: ObjectStore,
    pipeline: str,
    release: str,
    night: date,
    token: int,
    force: bool = False,
    reason: str = "promoted",
    expected: int | None = None,
    by_operator: bool = False,
    move_id: str | None = None,
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
        by_operator: move it although it is held; the hold stays.
        move_id: identity of the move, 32 hexadecimal digits, for a caller that may have to ask again; None mints one.

    Returns:
        The pointer as it now stands. Where it names the release already, nothing is written to it. A challenger stays
        with its share, unless it is what is promoted.

    Raises:
        ObjectMissing: the release was never published.
        ReleaseRefused: it is of another night.
        PointerMoved: it is held, the champion is of a later night and `force` is off, or was promoted under a newer
            lease, or the pointer changed while this call was at it.
        InvalidConfig: the signing key cannot be used, or the reason is too long.
    """
    manifest = read_manifest(store, pipeline, release)
    if manifest.night != night:
        raise ReleaseRefused(f"release {release[:12]} is of night {manifest.night}, not {night}; name the night it has")
    key = pointer_key(pipeline)
    current, stored = _current(store, pipeline)
    if current is not None:
        if current.release == release:
            _enter(store, pipeline, current)
            return current
        if current.hold is not None and not by_operator:
            raise PointerMoved(
                f"{store.url}/{key} is held ({current.hold}) and keeps naming release {current.release[:12]} of night "
                f"{current.night}; `nightrank releases unhold` lets nights promote again"
            )
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
    _expected(store, key, current, expected)
    named = Pointer(release, night, 0, None, token, "", "") if current is None else current
    stays = current is not None and current.challenger != release
    moved = replace(
        named,
        release=release,
        night=night,
        fencing_token=token,
        challenger=named.challenger if stays else None,
        share=named.share if stays else 0,
    )
    return _swap(store, pipeline, current, stored, moved, reason, move_id, "promote")


def move(
    store: ObjectStore,
    pipeline: str,
    change: Callable[[Pointer], Pointer],
    reason: str,
    what: str,
    expected: int | None = None,
    move_id: str | None = None,
) -> Pointer:
    """Move the pointer by an operator's hand: without a lease, by one compare-and-swap that keeps the fencing token.

    Args:
        store: where.
        pipeline: the pipeline.
        change: the pointer as it stands to the one that is meant; it sets `release` and `night`, `challenger` and
            `share`, or `hold`. Everything else follows here.
        reason: why; kept in the pointer and in the ledger.
        what: the ledger's word for the move, such as `rollback`.
        expected: generation that the pointer must still have; None for any.
        move_id: as for `promote`.

    Returns:
        The pointer as it now stands; untouched where the change changes nothing. The ledger has the move then, too.

    Raises:
        NoRelease: nothing was promoted yet.
        ObjectMissing: the champion or the challenger that is meant was never published.
        ReleaseRefused: the champion that is meant is of another night.
        PointerMoved: the pointer is not the expected one, or changed while this call was at it.
        InvalidConfig: the signing key cannot be used, a text is too long, or the share fits no challenger.
    """
    current, stored = _current(store, pipeline)
    if current is None:
        raise NoRelease(f"{store.url} has no champion for pipeline {pipeline!r}; promote a release first")
    _expected(store, pointer_key(pipeline), current, expected)
    meant = change(current)
    if meant == current:
        if current.reason == reason:  # asked again by a caller that died behind the swap: its entry may be lacking
            _enter(store, pipeline, current, what)
        return current
    if meant.release != current.release:
        found = read_manifest(store, pipeline, meant.release)
        if found.night != meant.night:
            raise ReleaseRefused(
                f"release {meant.release[:12]} is of night {found.night}, not {meant.night}; name the night it has"
            )
    if meant.challenger not in (None, current.challenger):
        read_manifest(store, pipeline, meant.challenger)
    return _swap(store, pipeline, current, stored, meant, reason, move_id, what)


def sign_pointer(
    store: ObjectStore, pipeline: str, key: SigningKey, keyring: Keyring | None, unsigned: bool = False
) -> Pointer | None:
    """Sign the pointer as it stands; None where there is none.

    A pointer that no key vouches for is signed only as the ledger has it: one that an attacker wrote, to an old release
    under a high generation, would have every ranker follow it.

    Args:
        store: where.
        pipeline: the pipeline.
        key: signs it.
        keyring: whose keys vouch for it until now; None vouches for nothing, and takes the caller's word.
        unsigned: take the caller's word also where the keyring does not vouch for it.

    Raises:
        ReleaseRefused: it is damaged, no key of the keyring vouches for it, or it is not what the ledger says.
        ObjectCorrupt: an entry of the ledger that it is held against cannot be read.
        PointerMoved: it changed while this call was at it.
    """
    stored = find_pointer(store, pipeline)
    if stored is None:
        return None
    current = check_pointer(None if unsigned else keyring, pipeline, stored.data)
    if current.signature is not None and current == key.sign_pointer(pipeline, current):
        return current
    if keyring is None or (unsigned and not _vouched(keyring, pipeline, stored.data)):
        _as_entered(store, pipeline, current)
    return _swap(store, pipeline, current, stored, current, f"signed by key {key.key_id}", None, "sign", key)


def _vouched(keyring: Keyring, pipeline: str, data: bytes) -> bool:
    try:
        check_pointer(keyring, pipeline, data)
    except ReleaseRefused:
        return False
    return True


def _as_entered(store: ObjectStore, pipeline: str, pointer: Pointer) -> None:
    """Return if the ledger's newest entry has the pointer, but for its signature.

    Raises:
        ReleaseRefused: it says something else, or there is no entry.
    """
    key, (newest, entered) = f"{store.url}/{pointer_key(pipeline)}", _newest_entry(store, pipeline)
    if entered is not None and replace(entered, signature=None) == replace(pointer, signature=None):
        return
    told = "has no entry" if entered is None else f"ends with {_told(entered)} ({newest})"
    raise ReleaseRefused(
        f"{key} is not signed: it says {_told(pointer)}, and the ledger {told}: somebody else may have written it. "
        f"Look who can write to the store; then move it yourself, {KEYS_VARIABLE} unset for that command: `nightrank "
        f"releases rollback --to R` or `promote R`, or `hold` where it names the right one; a move signs it"
    )


def _told(pointer: Pointer) -> str:
    challenger = f", challenger {pointer.challenger[:12]}" if pointer.challenger else ""
    return (
        f"release {pointer.release[:12]} in generation {pointer.generation} by move {pointer.move_id or 'without id'} "
        f"of {pointer.moved_at}{challenger}"
    )


def _newest_entry(store: ObjectStore, pipeline: str) -> tuple[str, Pointer | None]:
    """The entry of the ledger with the highest generation, the later one of two, and its key."""
    best, found = "", None
    for key in ledger_keys(store, pipeline):
        entry = read_entry(store, key).pointer
        if found is None or entry.generation >= found.generation:
            best, found = key, entry
    return best, found


def _current(store: ObjectStore, pipeline: str) -> tuple[Pointer | None, Stored | None]:
    keyring, stored = Keyring.from_environment(), find_pointer(store, pipeline)
    return (None if stored is None else check_pointer(keyring, pipeline, stored.data)), stored


def _expected(store: ObjectStore, key: str, current: Pointer | None, expected: int | None) -> None:
    generation = 0 if current is None else current.generation
    if expected is not None and generation != expected:
        named = "is gone" if current is None else f"names release {current.release[:12]} of night {current.night}"
        raise PointerMoved(
            f"{store.url}/{key} {named} (generation {generation}), it had generation {expected} when this run began: "
            f"somebody moved it meanwhile; run the night again to be compared with what it names now"
        )


def _swap(
    store: ObjectStore,
    pipeline: str,
    current: Pointer | None,
    stored: Stored | None,
    meant: Pointer,
    reason: str,
    move_id: str | None,
    what: str,
    key: SigningKey | None = None,
) -> Pointer:
    """Replace the pointer that was read by the one that is meant, and enter the move into the ledger.

    It is signed by the key, or by this host's.
    """
    handed, key = key, signer() if key is None else key
    if key is None and current is not None and current.signature is not None:
        raise InvalidConfig(
            f"{store.url}/{pointer_key(pipeline)} is signed, and this host has no key: rankers with keys would refuse "
            f"what it writes; name the private key by {KEY_VARIABLE}"
        )
    if odd := meant.odd():
        raise InvalidConfig(f"the pointer of {pipeline!r} cannot be moved so: {odd}")
    for called, text in (("reason", reason), ("hold", meant.hold or "")):
        if len(text) > LARGEST_REASON:
            raise InvalidConfig(f"the {called} has {len(text)} characters, limit {LARGEST_REASON}; say it shorter")
    pointer = replace(
        meant,
        generation=1 if current is None else current.generation + 1,
        previous=None if current is None else current.previous if current.release == meant.release else current.release,
        moved_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        reason=reason,
        move_id=None,
        signature=None,
    )
    if key is not None or pointer.schema_version > 1:
        pointer = replace(pointer, move_id=uuid.uuid4().hex if move_id is None else move_id)
    if key is not None:
        pointer = key.sign_pointer(pipeline, pointer)
    try:
        store.swap(pointer_key(pipeline), pointer.serialise(), None if stored is None else stored.etag)
    except (Conflict, OutcomeUnknown) as failure:
        pointer = _winner(store, pipeline, pointer, failure, handed)
    _enter(store, pipeline, pointer, what)
    return pointer


def _winner(
    store: ObjectStore,
    pipeline: str,
    meant: Pointer,
    failure: Conflict | OutcomeUnknown,
    handed: SigningKey | None,
) -> Pointer:
    """The pointer that stands after a swap that was refused or not answered, if it is the very move that was meant.

    One that is signed by a key that was handed in need not be good in this host's keyring yet.
    """
    stored = find_pointer(store, pipeline)
    keyring = None if handed is not None else Keyring.from_environment()
    now = None if stored is None else check_pointer(keyring, pipeline, stored.data)
    # Of two moves of one generation one was made: whatever became of the answer, this one was not and cannot be.
    if isinstance(failure, OutcomeUnknown) and (now is None or now.generation != meant.generation):
        raise failure
    if now is None:
        raise PointerMoved(
            f"{store.url}/{pointer_key(pipeline)} vanished while it was moved to release {meant.release[:12]}; "
            f"promote again"
        ) from failure
    # A pointer of schema version 1 has no move_id; its time to the microsecond, token and reason stand for one.
    ours = now == meant if meant.move_id is None else now.move_id == meant.move_id
    if not ours:
        raise PointerMoved(
            f"{store.url}/{pointer_key(pipeline)} was moved by somebody else while it was moved to release "
            f"{meant.release[:12]}: it names {now.release[:12]} of night {now.night} (generation {now.generation}); "
            f"look who else runs this pipeline, then promote again"
        ) from failure
    return now


def _enter(store: ObjectStore, pipeline: str, pointer: Pointer, what: str = "promote") -> None:
    """Enter a move into the ledger.

    The key follows from the pointer, so that an entry that a crash lost is made up for by the next call, and none is
    made twice.
    """
    stamp = pointer.moved_at.replace(":", "").replace("-", "").replace("+0000", "Z")
    entry = uuid.uuid5(uuid.NAMESPACE_OID, f"{pipeline}/{pointer.generation}/{pointer.release}")
    data = canonical({"what": what, "pipeline": pipeline, "pointer": pointer.serialise().decode().strip()})
    store.put_if_absent(f"{pipeline}/ledger/{stamp}-{entry}.json", data)
