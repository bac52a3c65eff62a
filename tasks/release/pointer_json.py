"""`current.json`, the one object that names the champion: its fields, and how strictly they are read."""

from dataclasses import dataclass, replace
from datetime import date, datetime

from tasks.release.signature import Signature
from tasks.release.strict_json import POINTER_VERSION, SCHEMA_VERSION, Reader, canonical

LARGEST_POINTER = 2**16
"""Bytes; a longer pointer is refused unread."""
LARGEST_REASON = 4000
"""Characters of a reason, and of what a hold says."""
WHOLE = 10_000
"""Basis points of all traffic."""
_FIELDS = ("release", "night", "generation", "previous", "fencing_token", "moved_at", "reason", "challenger", "share")


@dataclass(frozen=True)
class Pointer:
    """`current.json`.

    Attributes:
        release: id of the champion.
        night: its night.
        generation: grows by one with every move, in whatever direction, also one of the challenger or the hold alone.
        previous: id of the champion before, None at first.
        fencing_token: token of the lease under which a night moved it last; an operator's move keeps it.
        moved_at: UTC time of the move, ISO 8601.
        reason: why it was moved.
        challenger: id of a release that answers a share of the users, None where there is none.
        share: that share in basis points, 0 to 10,000.
        hold: why no night may promote until an operator lifts it, None where nights may.
        move_id: identity of the move, 32 hexadecimal digits; None in a pointer of schema version 1.
        signature: over all other fields and the pipeline's name, None where the store is not signed.
    """

    release: str
    night: date
    generation: int
    previous: str | None
    fencing_token: int
    moved_at: str
    reason: str
    challenger: str | None = None
    share: int = 0
    hold: str | None = None
    move_id: str | None = None
    signature: Signature | None = None

    @property
    def schema_version(self) -> int:
        """The oldest version whose readers know all that the pointer says."""
        told = (self.challenger, self.hold, self.signature)
        return SCHEMA_VERSION if all(one is None for one in told) else POINTER_VERSION

    def serialise(self) -> bytes:
        """The bytes of `current.json`."""
        return self._written(self.schema_version) + b"\n"

    def unsigned(self) -> bytes:
        """What its signature is over: the pointer as it is signed, without the signature."""
        return replace(self, signature=None)._written(POINTER_VERSION)

    def _written(self, version: int) -> bytes:
        told = {name: getattr(self, name) for name in _FIELDS}
        told |= {"night": self.night.isoformat(), "schema_version": version}
        if version == SCHEMA_VERSION:
            return canonical(told | {"share": 0.0})
        signature = None if self.signature is None else self.signature.as_json()
        return canonical(told | {"hold": self.hold, "move_id": self.move_id, "signature": signature})

    @classmethod
    def parse(cls, data: bytes) -> "Pointer":
        """Read a pointer.

        Raises:
            ReleaseRefused: it is damaged, of an unknown schema version, or says what cannot be.
        """
        read = Reader("pointer current.json")
        document = read.mapping(read.document(data, LARGEST_POINTER), "pointer")
        newer = document.get("schema_version") == POINTER_VERSION
        names = (*_FIELDS, "hold", "move_id", "signature") if newer else _FIELDS
        values = read.fields(document, "pointer", names, versions=(SCHEMA_VERSION, POINTER_VERSION))
        if not newer and (values["challenger"] is not None or values["share"] != 0):
            read.refuse("it names a challenger, which its schema version does not have")
        previous, challenger, hold = (values.get(name) for name in ("previous", "challenger", "hold"))
        found = cls(
            release=read.digest(values["release"], "release"),
            night=read.night(values["night"]),
            generation=read.count(values["generation"], "generation"),
            previous=None if previous is None else read.digest(previous, "previous"),
            fencing_token=read.count(values["fencing_token"], "fencing_token"),
            moved_at=_moment(read, values["moved_at"]),
            reason=read.text(values["reason"], "reason", LARGEST_REASON),
            challenger=None if challenger is None else read.digest(challenger, "challenger"),
            share=read.count(values["share"], "share") if newer else 0,
            hold=None if hold is None else read.text(hold, "hold", LARGEST_REASON),
            move_id=read.digest(values["move_id"], "move_id", 32) if newer else None,
            signature=Signature.read(read, values["signature"]) if newer and values["signature"] is not None else None,
        )
        if odd := found.odd():
            read.refuse(odd)
        if found.serialise() != data:
            read.refuse("it is not spelt as nightrank spells it")
        return found

    def odd(self) -> str | None:
        """What cannot be in its fields together, None where all is well."""
        if self.share > WHOLE:
            return f"share is {self.share} basis points, limit {WHOLE}"
        if self.share and self.challenger is None:
            return f"share is {self.share} basis points, and there is no challenger"
        if self.challenger == self.release:
            return f"its challenger {self.release[:12]} is its champion"
        return None


def pointer_key(pipeline: str) -> str:
    """Where the pointer lies in the store."""
    return f"{pipeline}/current.json"


def _moment(read: Reader, value: object) -> str:
    text = read.text(value, "moved_at", 40)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        read.refuse(f"moved_at is {text!r}, not a time")
    if moment.tzinfo is None:
        read.refuse(f"moved_at is {text!r}, without a time zone")
    return text
