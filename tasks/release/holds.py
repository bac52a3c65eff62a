"""Segments that an operator holds at their parent's weights, night after night, until he lets them go."""

import re
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from tasks.clients.object_store import ObjectStore
from tasks.clients.workspace import canonical_json
from tasks.data.contract import Section
from tasks.data.segments import mixed_radix
from tasks.data.vocabulary import Vocabulary
from tasks.errors import Conflict, InvalidConfig, ObjectCorrupt

JOINT = " | "
"""Between the raw keys of a segment's columns, as `tasks.learning.exams.segment_names` joins them."""
_DIGEST = re.compile("[0-9a-f]{64}")


class HeldSegment(Section):
    """A segment that gets no weights of its own."""

    columns: tuple[str, ...]
    """Columns of its level."""
    name: str
    """Raw keys of the columns, of personal ones their digests, joined by a bar."""
    reason: str
    """Why."""
    by: str
    """Who said so."""
    since: str
    """UTC time, ISO 8601."""

    @property
    def told(self) -> str:
        """For people; of a digest, its first digits.

        >>> HeldSegment(columns=("market", "device"), name="north | tv", reason="", by="", since="").told
        'market=north device=tv'
        """
        keys = (key[:12] if _DIGEST.fullmatch(key) else key for key in self.name.split(JOINT))
        return " ".join(map("=".join, zip(self.columns, keys, strict=False)))


_HELD = TypeAdapter(tuple[HeldSegment, ...])


def holds_key(pipeline: str) -> str:
    """Where they are kept."""
    return f"{pipeline}/state/holds.json"


def held_segments(store: ObjectStore, pipeline: str) -> tuple[HeldSegment, ...]:
    """The segments that are held, by level and name.

    Raises:
        ObjectCorrupt: the object that holds them was changed by hand.
    """
    return _read(store, pipeline)[0]


def change_holds(
    store: ObjectStore, pipeline: str, change: Callable[[Sequence[HeldSegment]], Sequence[HeldSegment]]
) -> tuple[HeldSegment, ...]:
    """Rewrite them as a function of what they are, however many write at once.

    Raises:
        ObjectCorrupt: the object that holds them was changed by hand.
    """
    while True:
        before, etag = _read(store, pipeline)
        after = tuple(sorted(change(before), key=lambda one: (one.columns, one.name)))
        if after == before:
            return before
        try:
            store.swap(holds_key(pipeline), canonical_json([one.model_dump(mode="json") for one in after]), etag)
        except Conflict:
            continue
        return after


def segment_of(levels: Sequence[Sequence[str]], named: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """The level whose columns are named, and the name of the segment.

    Args:
        levels: columns of the ladder's levels.
        named: column to raw key.

    Raises:
        InvalidConfig: no level has just these columns, or a key would be taken for two.

    >>> segment_of([["user"], ["market", "device"]], {"device": "tv", "market": "north"})
    (('market', 'device'), 'north | tv')
    """
    columns = next((tuple(one) for one in levels if set(one) == set(named)), None)
    if columns is None:
        ladder = "; ".join(" ".join(f"{column}=..." for column in level) for level in levels)
        raise InvalidConfig(f"{', '.join(named) or 'nothing'} names no level of the ladder; allowed: {ladder}")
    if len(columns) > 1 and (odd := [key for key in named.values() if JOINT in key]):
        raise InvalidConfig(f"key {odd[0]!r} holds {JOINT!r}, by which keys are joined: it cannot be held by name")
    return columns, JOINT.join(named[column] for column in columns)


def key_of(
    name: str, columns: Sequence[str], radices: Sequence[int], vocabularies: Mapping[str, Vocabulary]
) -> int | None:
    """The mixed-radix key of a segment; None where the vocabularies do not know it.

    Args:
        name: as a hold has it.
        columns: of its level.
        radices: of the level's keys.
        vocabularies: by column.
    """
    keys = name.split(JOINT) if len(columns) > 1 else [name]
    if len(keys) != len(columns):
        return None
    ids = []
    for column, key in zip(columns, keys, strict=True):
        known = vocabularies[column]
        try:
            ids.append(known.encode(pa.array([key]).cast(known.keys.type)))
        except pa.ArrowInvalid:  # an integer column has no such key
            return None
    if any(int(one[0]) == 0 or int(one[0]) >= radix for one, radix in zip(ids, radices, strict=True)):
        return None
    return int(mixed_radix(ids, list(radices), "held segments")[0])


def _read(store: ObjectStore, pipeline: str) -> tuple[tuple[HeldSegment, ...], str | None]:
    found = store.find(holds_key(pipeline))
    if found is None:
        return (), None
    try:
        return _HELD.validate_json(found.data), found.etag
    except ValidationError as error:
        raise ObjectCorrupt(
            f"{store.url}/{holds_key(pipeline)} holds no list of held segments ({error.error_count()} faults): "
            f"somebody changed it by hand; restore it, or delete it and hold the segments anew"
        ) from error
