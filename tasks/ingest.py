"""Ingest: freeze a night, and settle once what it starts from and what it will be compared with."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tasks.clients.object_store import ObjectStore, open_store
from tasks.clients.workspace import StepRecord, canonical_json
from tasks.data.contract import DataConfig
from tasks.data.interactions import FrozenFile, FrozenNight, freeze
from tasks.data.lakes import Joined, Source, folders
from tasks.errors import Conflict
from tasks.parents import released_parent, require_same_hashing
from tasks.references import IngestRef, ParentRef, Place
from tasks.release.gate import GateConfig
from tasks.release.holds import HeldSegment, held_segments
from tasks.release.manifest import Pointer
from tasks.release.notes import read_night
from tasks.release.pointer import read_pointer
from tasks.release.published import nights_prefix
from tasks.release.signing import signer
from tasks.steps import Product, Progress, carry_out, open_workspace, store_of, verb

VERSION = 1


@verb
def ingest(place: Place, data: DataConfig, gate: GateConfig, night: date, config: str) -> IngestRef:
    """Freeze a night's files, and resolve parent, champion and the earlier exams that are pooled.

    Args:
        place: where.
        data: the contract.
        gate: how many exams are pooled.
        night: the night.
        config: digest of the whole config: what one config has resolved, another does not inherit.

    Raises:
        DataRejected: the night is missing, changes while it is copied, is corrupt, or breaks the contract's schema.
        InvalidConfig: personal columns are hashed otherwise than in the release that the night starts from.
        ObjectCorrupt: the note of an earlier night is damaged.
    """
    record, shared = freeze_night(place, data, night)
    frozen = thawed(record.content)
    settled = _settle(place, gate, night, frozen.digest, config)
    if settled["parent"] is not None:
        require_same_hashing(place, data, settled["parent"])
    return IngestRef(
        **shared,
        **_counted(frozen),
        parent=None if settled["parent"] is None else released_parent(place, settled["parent"]),
        champion=settled["champion"],
        champion_night=None if settled["champion_night"] is None else date.fromisoformat(settled["champion_night"]),
        generation=settled["generation"],
        exams=tuple(settled["exams"]),
        verdicts=tuple(settled["verdicts"]),
        held=tuple(HeldSegment.model_validate(one) for one in settled.get("held", ())),
    )


@verb
def ingest_replayed(
    place: Place, data: DataConfig, night: date, parent: ParentRef | None, exams: tuple[str, ...]
) -> IngestRef:
    """Freeze a night that is replayed. What it starts from is told, and not looked up; there is no champion.

    Args:
        place: where.
        data: the contract.
        night: the night.
        parent: what the replay made of the night before.
        exams: keys of the replay's earlier exams, newest first.

    Raises:
        DataRejected: as `ingest`.
    """
    record, shared = freeze_night(place, data, night, replayed=True)
    return IngestRef(
        **shared,
        **_counted(thawed(record.content)),
        parent=parent,
        champion=None,
        champion_night=None,
        generation=0,
        exams=exams,
        verdicts=(),
        replayed=True,
    )


def released_before(place: Place, gate: GateConfig, night: date) -> tuple[ParentRef | None, tuple[str, ...]]:
    """What a night would start from now: the newest gate-passed release before it, and the exams that are pooled.

    Raises:
        ReleaseRefused: the release's manifest is damaged.
        ObjectCorrupt: the note of an earlier night is.
    """
    found = _released_before(store_of(place), place, gate, night)
    return None if found.parent is None else released_parent(place, found.parent), tuple(found.exams)


def _counted(frozen: FrozenNight) -> dict[str, Any]:
    return {
        "night": frozen.night,
        "rows": frozen.rows,
        "files": len(frozen.files),
        "bytes": sum(file.bytes for file in frozen.files),
        "frozen": frozen.digest,
    }


def lake(data: DataConfig) -> Source:
    """The lake, or all of them as one, opened for reading."""
    if not data.lakes:
        return open_store(data.source)
    return Joined({lake.name: open_store(lake.source) for lake in data.lakes})


def freeze_night(
    place: Place, data: DataConfig, night: date, replayed: bool = False
) -> tuple[StepRecord, dict[str, object]]:
    """Freeze a night by its bytes; the record of equal bytes under an equal contract is reused."""
    source = lake(data)
    listing = _listing(data, night, source)
    frozen = freeze(data, night, Path(place.scratch), source)

    def work(folder: Path, progress: Progress) -> Product:
        progress(frozen.rows, frozen.rows, "rows")
        return Product({"frozen": _as_json(frozen)})

    record, shared = carry_out(place, "ingest", VERSION, night, {"files": frozen.digest}, schema_section(data), work)
    state = {"listing": listing, "schema": schema_section(data), "key": record.key}
    _note(place, _replay_key(place, night) if replayed else _state_key(place, night), state)
    return record, shared


def frozen_before(place: Place, data: DataConfig, night: date, replayed: bool = False) -> StepRecord:
    """The freeze of a night of history: the last one, while its listing is the same; else a new one.

    Files of history are not read again each night: a lake's files are taken to be written once, and a file that
    changes without changing its size is noticed when its own night is run.
    """
    notes = (_state_key(place, night), *([_replay_key(place, night)] if replayed else []))
    for found in filter(None, map(store_of(place).find, notes)):
        state = json.loads(found.data)
        now = {"listing": _listing(data, night, lake(data)), "schema": json.loads(canonical_json(schema_section(data)))}
        if all(state.get(name) == value for name, value in now.items()):
            record = open_workspace(place).recall("ingest", str(state["key"]))
            if record is not None:
                return record
    return freeze_night(place, data, night, replayed)[0]


def thawed(content: Mapping[str, object]) -> FrozenNight:
    """A frozen night from its record's content."""
    found = content["frozen"]
    assert isinstance(found, dict)
    files = tuple(FrozenFile(**file) for file in found["files"])
    return FrozenNight(date.fromisoformat(found["night"]), files, int(found["rows"]), str(found["digest"]))


def schema_section(data: DataConfig) -> dict[str, object]:
    """What of the contract a freeze depends on."""
    return {"columns": [column.model_dump(mode="json") for column in data.delivered]}


def _as_json(frozen: FrozenNight) -> dict[str, object]:
    return {**asdict(frozen), "night": frozen.night.isoformat()}


def _listing(data: DataConfig, night: date, source: Source) -> list[list[object]]:
    return [[key, source.size(key)] for folder in folders(data, night).values() for key in source.list(folder)]


def _state_key(place: Place, night: date) -> str:
    return f"{place.pipeline}/state/night={night.isoformat()}.json"


def _replay_key(place: Place, night: date) -> str:
    """Where a replay keeps the same: production's word on a night is not its to write."""
    return f"{place.pipeline}/work/replay/night={night.isoformat()}.json"


def _note(place: Place, key: str, state: Mapping[str, object]) -> None:
    """Remember which freeze of a night was the last."""
    store = store_of(place)
    before, after = store.find(key), canonical_json(state)
    if before is None or before.data != after:
        store.swap(key, after, None if before is None else before.etag)


def _settle(place: Place, gate: GateConfig, night: date, frozen: str, config: str) -> dict[str, Any]:
    """Resolve once: a run that resumes a dead one finds what that one had resolved, unless the pointer has moved."""
    signer()  # a key that cannot sign is told before anything is learned
    store = store_of(place)
    key = intent_key(place, night, frozen, config)
    pointer = read_pointer(store, place.pipeline)
    found = store.find(key)
    if found is not None:
        settled: dict[str, Any] = json.loads(found.data)
        # An older version of nightrank may have made another release of the same night.
        ours = pointer is not None and pointer.release in (settled["release"], settled.get("replaces"))
        if ours or settled["generation"] == (0 if pointer is None else pointer.generation):
            return settled
    fresh = {**_resolved(store, place, gate, night, pointer), "release": None}
    try:
        store.swap(key, canonical_json(fresh), None if found is None else found.etag)
    except Conflict:
        return _settle(place, gate, night, frozen, config)
    return fresh


def intent_key(place: Place, night: date, frozen: str, config: str) -> str:
    """Where a night keeps what it has resolved."""
    return f"{place.pipeline}/work/intent/{night.isoformat()}/{frozen}-{config}.json"


def released_prefix(place: Place) -> str:
    """Where each night keeps the newest release that was made of it."""
    return nights_prefix(place.pipeline)


def _resolved(
    store: ObjectStore, place: Place, gate: GateConfig, night: date, pointer: Pointer | None
) -> dict[str, object]:
    if pointer is None:
        # Before a pipeline's first publish: a store that ignores conditions would let two runs both win.
        store.check()
    earlier = _released_before(store, place, gate, night)
    champion, champion_night = earlier.parent, earlier.night
    if pointer is None:
        champion, champion_night = None, None
    elif pointer.night < night:
        champion, champion_night = pointer.release, pointer.night.isoformat()
    return {
        "parent": earlier.parent,
        "champion": champion,
        "champion_night": champion_night,
        "generation": 0 if pointer is None else pointer.generation,
        "exams": earlier.exams,
        "verdicts": earlier.verdicts,
        "held": [one.model_dump(mode="json") for one in held_segments(store, place.pipeline)],
    }


@dataclass(frozen=True)
class _Earlier:
    """The newest gate-passed release before a night, its night, and the newest exams with their verdicts."""

    parent: str | None
    night: str | None
    exams: list[str]
    verdicts: list[str]


def _released_before(store: ObjectStore, place: Place, gate: GateConfig, night: date) -> _Earlier:
    parent: str | None = None
    parent_night: str | None = None
    exams: list[str] = []
    verdicts: list[str] = []
    # Newest first; the loop ends as soon as the parent and the exams of the pool are found.
    for key in sorted(store.list(released_prefix(place)), reverse=True):
        then = key.rsplit("night=", 1)[-1].removesuffix(".json")
        if then >= night.isoformat():
            continue
        made = read_night(store, key)
        if len(exams) < gate.pool_nights - 1:
            exams.append(made.exam)
            verdicts.append(made.verdict)
        if parent is None and made.go:
            parent, parent_night = made.release, then
        if parent is not None and len(exams) >= gate.pool_nights - 1:
            break
    return _Earlier(parent, parent_night, exams, verdicts)
