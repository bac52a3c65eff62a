"""What nightrank notes about its own work, read without trust: `run.json`, a night's note, an entry of the ledger.

They are small objects for people and for later nights, and an old one that was damaged is told by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import NoReturn

from tasks.clients.object_store import ObjectStore
from tasks.errors import ObjectCorrupt, ObjectMissing, ReleaseRefused
from tasks.release.pointer_json import Pointer
from tasks.release.strict_json import Reader

LARGEST_NOTE = 2**28
"""Bytes; a note that is longer is refused unread."""


@dataclass(frozen=True)
class Run:
    """What a release's `run.json` says for other commands; the report in it is for people.

    Attributes:
        night: the night that it was made of.
        created: UTC time, ISO 8601.
        go: whether the gate, or an operator, let it through.
        decided_by: the gate's word, or `operator`; empty where nobody wrote it down.
        parent: the release that its night started from.
        champion: the release beside which it was examined.
        config: digest of the config that made it.
        override: the reason of the operator who made it by a fallback.
    """

    night: date
    created: str
    go: bool
    decided_by: str
    parent: str | None
    champion: str | None
    config: str
    override: str | None


@dataclass(frozen=True)
class NightNote:
    """The newest release of a night, as publish notes it for the nights after.

    Attributes:
        release: its id.
        go: whether the gate, or an operator, let it through.
        exam: key of the step record of its exams.
        verdict: key of that of the gate's verdict.
        config: digest of the config that made it last.
        override: an operator's reason, where there is one.
    """

    release: str
    go: bool
    exam: str
    verdict: str
    config: str
    override: str | None


@dataclass(frozen=True)
class Resolved:
    """What a night has resolved, as far as it names releases.

    Attributes:
        release: what it was about to promote; None before it had made one.
        names: releases that it names as parent, champion or as what it replaces.
    """

    release: str | None
    names: frozenset[str]


@dataclass(frozen=True)
class Entry:
    """A move of the pointer, as the ledger has it: the ledger's word for it, and the pointer afterwards."""

    what: str
    pointer: Pointer


class _Note(Reader):
    """Reads a note; whatever is odd is an `ObjectCorrupt` that says what to do."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self._remedy = remedy

    def refuse(self, why: str, remedy: str | None = None) -> NoReturn:
        raise ObjectCorrupt(f"{self.what} is damaged: {why}"[:500] + f"; {remedy or self._remedy}")

    def optional(self, value: object, what: str) -> str | None:
        return None if value is None else self.text(value, what)

    def truth(self, value: object, what: str) -> bool:
        if not isinstance(value, bool):
            self.refuse(f"{what} is {value!r:.80}, neither true nor false")
        return value

    def moment(self, value: object, what: str) -> str:
        text = self.text(value, what)
        try:
            zone = datetime.fromisoformat(text).tzinfo
        except ValueError:
            zone = None
        if zone is None:
            self.refuse(f"{what} is {text!r:.80}, no time with a zone")
        return text

    def note(self, data: bytes, needed: tuple[str, ...]) -> dict[str, object]:
        found = self.mapping(self.document(data, LARGEST_NOTE), "all of it")
        if absent := [name for name in needed if name not in found]:
            self.refuse(f"it lacks {', '.join(absent)}")
        return found


def read_run(store: ObjectStore, pipeline: str, release: str) -> Run:
    """A release's `run.json`.

    Raises:
        ObjectMissing: it is gone.
        ObjectCorrupt: it is not what publish writes.
    """
    folder = f"{pipeline}/releases/{release}"
    remedy = (
        "put the published bytes back from a copy (manifest.json has their SHA-256, `nightrank releases verify` "
        f"compares them); without a copy, and where neither the pointer nor a night to come needs the release, delete "
        f"{folder}/manifest.json, and `nightrank releases gc` removes the rest"
    )
    stored = store.find(f"{folder}/run.json", LARGEST_NOTE)
    if stored is None:
        raise ObjectMissing(f"{store.url}/{folder}/run.json is gone; {remedy}")
    read = _Note(f"{store.url}/{folder}/run.json", remedy)
    found = read.note(stored.data, ("night", "created", "go", "parent", "config"))
    return Run(
        night=read.night(found["night"]),
        created=read.moment(found["created"], "created"),
        go=read.truth(found["go"], "go"),
        decided_by=read.text(found.get("decided_by", ""), "decided_by"),
        parent=read.optional(found["parent"], "parent"),
        champion=read.optional(found.get("champion"), "champion"),
        config=read.text(found["config"], "config"),
        override=read.optional(found.get("override"), "override"),
    )


def find_night(store: ObjectStore, key: str) -> NightNote | None:
    """A night's note, None where the night has no release.

    Args:
        store: where.
        key: as `tasks.release.published.night_key` has it.

    Raises:
        ObjectCorrupt: it is not what publish writes.
    """
    stored = store.find(key, LARGEST_NOTE)
    if stored is None:
        return None
    read = _Note(
        f"{store.url}/{key}",
        "put it back from a copy, or delete it and run that night again, which writes it anew (with --override where "
        "an operator had released it)",
    )
    found = read.note(stored.data, ("release", "go", "exam", "verdict", "config"))
    return NightNote(
        release=read.text(found["release"], "release"),
        go=read.truth(found["go"], "go"),
        exam=read.text(found["exam"], "exam"),
        verdict=read.text(found["verdict"], "verdict"),
        config=read.text(found["config"], "config"),
        override=read.optional(found.get("override"), "override"),
    )


def read_night(store: ObjectStore, key: str) -> NightNote:
    """A night's note that was listed.

    Raises:
        ObjectMissing: it is gone since.
        ObjectCorrupt: as for `find_night`.
    """
    found = find_night(store, key)
    if found is None:
        raise ObjectMissing(f"{store.url}/{key} was listed and is gone; somebody removes it meanwhile: do it again")
    return found


def read_resolved(store: ObjectStore, key: str) -> Resolved:
    """What a night has resolved, from the object that it left.

    Raises:
        ObjectMissing: it is gone.
        ObjectCorrupt: it is not what a night writes.
    """
    read = _Note(f"{store.url}/{key}", "delete it and run that night again, or delete it where it never will be")
    found = read.note(store.get(key, LARGEST_NOTE).data, ("release",))
    named = (read.optional(found.get(name), name) for name in ("parent", "champion", "replaces"))
    return Resolved(read.optional(found["release"], "release"), frozenset(one for one in named if one is not None))


def ledger_keys(store: ObjectStore, pipeline: str) -> Iterator[str]:
    """Keys of the ledger's entries, oldest first."""
    yield from sorted(store.list(f"{pipeline}/ledger/"))


def read_entry(store: ObjectStore, key: str) -> Entry:
    """An entry of the ledger.

    Raises:
        ObjectMissing: it is gone.
        ObjectCorrupt: it is not what a move enters.
    """
    read = _Note(
        f"{store.url}/{key}",
        "put it back from a copy, or delete it: the pointer does not depend on it, and the move that it told is lost",
    )
    found = read.note(store.get(key, LARGEST_NOTE).data, ("what", "pointer"))
    try:
        pointer = Pointer.parse((read.text(found["pointer"], "pointer") + "\n").encode())
    except (ReleaseRefused, UnicodeEncodeError) as refused:
        read.refuse(str(refused).partition("; ")[0])
    return Entry(read.text(found["what"], "what"), pointer)
