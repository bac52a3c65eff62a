"""Fallback: a segment whose own weights are not to serve, at once by a new release, and on every night to come.

The new release is the champion's but for that segment: its base, its tables, everybody else's weights. Its requests are
answered anew by network and graphs. It takes seconds and reads neither the lake nor what steps have left.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from getpass import getuser
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.clients.workspace import canonical_json
from tasks.data.contract import DataConfig
from tasks.data.rules import HASHED
from tasks.errors import InvalidConfig, NoRelease, ObjectMissing, PointerMoved, ReleaseRefused
from tasks.export import write_release
from tasks.learning.base import DESCRIPTION, WEIGHTS, load_base
from tasks.parents import release_file
from tasks.references import Place
from tasks.release import agreement
from tasks.release.external import opened_by
from tasks.release.golden import Parity
from tasks.release.golden_read import read_requests
from tasks.release.holds import HeldSegment, change_holds, held_segments, key_of, segment_of
from tasks.release.interface import Interface, read_interface
from tasks.release.lookups import input_specs
from tasks.release.manifest import (
    BESIDE,
    LARGEST_MANIFEST,
    Manifest,
    Pointer,
    Variant,
    content_digest,
    describe,
    sha256_of,
)
from tasks.release.manifest_parts import LevelSegments
from tasks.release.marks import names_of, spare
from tasks.release.pointer import move, read_pointer
from tasks.release.published import beside_of, night_key
from tasks.release.publishing import publish_release, read_manifest
from tasks.release.requirements import requirements
from tasks.release.segments_table import level_segments
from tasks.release.strict_json import MANIFEST_VERSION, Reader
from tasks.release.tables import read_tables, with_own, without
from tasks.release.variants import JUDGED, PROVIDERS, parity_of
from tasks.serving.hashing import Hasher
from tasks.steps import hold, still_held, store_of

F32 = npt.NDArray[np.float32]
BY_PARENT = "by its parent"
LIFT = "lift.parquet"
"""Beside a release: what each segment gains from weights of its own."""


@dataclass(frozen=True)
class FellBack:
    """What a fallback came to.

    Attributes:
        pointer: as it stands now.
        segment: who it is about.
        new: whether there is another champion; False where the champion served the segment so already.
        held: whether nights to come keep it.
        variants: smaller graphs of the champion, by name; empty where it is no other one.
        ended: the hold that ended, because the segment has weights of its own again.
    """

    pointer: Pointer
    segment: str
    new: bool
    held: bool
    variants: Mapping[str, Variant] = field(default_factory=dict)
    ended: HeldSegment | None = None


def fall_back(
    place: Place,
    data: DataConfig,
    levels: tuple[tuple[str, ...], ...],
    named: Mapping[str, str],
    reason: str,
    to: str | None = None,
) -> FellBack:
    """Serve a segment by its parent's weights, or by its own of an earlier release, from now on.

    Args:
        place: where.
        data: the contract that the champion was made with.
        levels: columns of the ladder's levels.
        named: the segment: column to raw key; of a personal column the digest will do.
        reason: why; kept in the manifest's provenance, the pointer, the ledger and with the hold.
        to: id of the earlier release; None: the parent's weights, and nights to come keep it so. A base that is trained
            anew knows nothing of earlier weights, so with a release the next night solves the segment as ever: where it
            was held, the hold ends, as the last of all that is written.

    Raises:
        NoRelease: there is no champion.
        InvalidConfig: no level has these columns, there is no reason, or a personal column's key is not in the
            environment.
        ObjectMissing: the segment has no weights of its own in the release that they are taken from, or the champion
            does not know it.
        ObjectCorrupt: a file of the champion, or what lies beside it, is not what its manifest says.
        ReleaseRefused: the earlier release has another base: its weights mean nothing here.
        PointerMoved: somebody else moved the pointer meanwhile; nothing serves the new release.
        LeaseHeld: a night runs.
        ParityBroken: the new graphs do not say what the network says.
    """
    columns, name = segment_of(levels, _hashed(data, named))
    if not reason.strip():
        raise InvalidConfig("a fallback needs a reason, which is kept with the release; say it with --reason")
    store = store_of(place)
    with hold(place):
        pointer = read_pointer(store, place.pipeline)
        if pointer is None:
            raise NoRelease(f"{store.url} has no champion for pipeline {place.pipeline!r}; promote a release first")
        champion = read_manifest(store, place.pipeline, pointer.release)
        _require_level(champion, columns)
        beside = {one: read for one in sorted(BESIDE) if (read := beside_of(store, champion, one)) is not None}
        held = HeldSegment(
            columns=columns, name=name, reason=reason, by=_operator(), since=datetime.now(UTC).isoformat("T", "seconds")
        )
        with tempfile.TemporaryDirectory(dir=_room(place), prefix="fallback-") as room:
            known = _laid_out(place, champion, Path(room) / "champion")
            tables = read_tables(data, known)
            at = [level.columns for level in tables.levels].index(columns)
            key = key_of(name, columns, tables.levels[at].radices, tables.vocabularies)
            slot = None if key is None else tables.levels[at].slot_of(key)
            standing = held_segments(store, place.pipeline)
            kept = next((one for one in standing if (one.columns, one.name) == (columns, name)), None)
            told = f"{held.told} {BY_PARENT if to is None else f'by its weights of release {to[:12]}'}"
            if slot is None and to is None and kept is not None:
                pointer = _told_again(place, f"{told}: {kept.reason}")
                return FellBack(pointer, held.told, new=False, held=True)
            if key is None or (slot is None and to is None):
                raise ObjectMissing(
                    f"segment {held.told} has no weights of its own in release {champion.release[:12]}: its parent's "
                    f"serve it already; look at its spelling"
                )
            base = load_base({file: known / file for file in (WEIGHTS, DESCRIPTION)})
            weights = _weights(known / "bank.bin", base.network.width, len(data.objectives))
            if to is None:
                weights, tables = without(weights, tables, at, key)
            else:
                own, support = _earlier(place, data, champion, to, held, Path(room) / "earlier", weights.shape)
                if slot is not None and np.array_equal(weights[slot], own):
                    pointer = _told_again(place, f"{told}: {reason}")
                    return FellBack(pointer, held.told, new=False, held=False, ended=_ended(place, kept))
                weights, tables = with_own(weights, tables, at, key, own, support)
            requests = read_requests(data, (known / "golden.json").read_bytes(), tables.history)
            folder, parity = write_release(
                *(place, data, base, weights, tables, requests, champion.night, Path(room), lambda *_: None),
                variants=[name for name in PROVIDERS if name in champion.variants],
            )
            made = replace(
                champion,
                release=content_digest(describe(folder)),
                files=describe(folder),
                interface=_interface(folder / "interface.json"),
                parity={name: value for name, value in vars(parity).items() if name != "variants"},
                provenance={**champion.provenance, "fallback": f"{told}, decided by {held.by}, because: {reason}"},
                requires=requirements(sorted(folder.glob("*.onnx"))),
                segments=_segments(champion, folder, data, beside.get(LIFT)),
                variants=_variants(champion, folder, parity),
                beside=(),
                graphs=opened_by(sorted(folder.glob("*.onnx"))),
                schema_version=MANIFEST_VERSION,
            )
            if to is None:
                change_holds(store, place.pipeline, lambda now: [*_without(now, held), held])
            moved = _publish(place, pointer, champion, made, beside, folder, told, held)
            # Where these very bytes were published before, their own manifest has the word.
            variants = read_manifest(store, place.pipeline, moved.release).variants
            ended = None if to is None else _ended(place, kept)
    return FellBack(moved, held.told, new=True, held=to is None, variants=variants, ended=ended)


def let_go(
    place: Place, data: DataConfig, levels: tuple[tuple[str, ...], ...], named: Mapping[str, str]
) -> tuple[HeldSegment, tuple[HeldSegment, ...]]:
    """Let a segment have weights of its own again, from the next night on.

    Returns:
        What was held, and what still is.

    Raises:
        ObjectMissing: it is not held.
        InvalidConfig: no level has these columns, or a personal column's key is not in the environment.
    """
    columns, name = segment_of(levels, _hashed(data, named))
    store = store_of(place)
    now = held_segments(store, place.pipeline)
    found = next((one for one in now if (one.columns, one.name) == (columns, name)), None)
    if found is None:
        listed = "; ".join(one.told for one in now) or "none"
        asked = HeldSegment(columns=columns, name=name, reason="", by="", since="")
        raise ObjectMissing(f"segment {asked.told} is not held; held: {listed}")
    return found, change_holds(store, place.pipeline, lambda before: _without(before, found))


def _hashed(data: DataConfig, named: Mapping[str, str]) -> dict[str, str]:
    """A segment's keys as the lake has them: raw values of personal columns become their digests."""
    raw = {column for column, key in named.items() if not re.fullmatch(HASHED, key)}
    specs = [spec for spec in input_specs(data) if spec.name in raw]
    hasher = Hasher.of(specs)
    return {**named, **{one.name: str(hasher.hashed(one, np.array([named[one.name]], object))[0]) for one in specs}}


def _require_level(manifest: Manifest, columns: tuple[str, ...]) -> None:
    """Refuse a release whose ladder has no such level.

    Raises:
        InvalidConfig: it has none.
    """
    levels = [level.columns for level in manifest.interface.levels]
    if columns not in levels:
        ladder = "; ".join(" x ".join(level) for level in levels)
        raise InvalidConfig(
            f"release {manifest.release[:12]} of night {manifest.night} has no level {' x '.join(columns)}, its ladder "
            f"is {ladder}: it was made with another config; give that one, or run a night with this one first"
        )


def _earlier(
    place: Place,
    data: DataConfig,
    champion: Manifest,
    release: str,
    segment: HeldSegment,
    folder: Path,
    shape: tuple[int, ...],
) -> tuple[F32, int | None]:
    """A segment's own weights [K, D] in an earlier release of the same base, and the rows they were solved from.

    Raises:
        ReleaseRefused: it has another base.
        ObjectMissing: the segment has none there.
    """
    manifest = read_manifest(store_of(place), place.pipeline, release)
    then, now = ({file.name: file.sha256 for file in one.files} for one in (manifest, champion))
    if odd := [name for name in (WEIGHTS, DESCRIPTION) if then[name] != now[name]]:
        raise ReleaseRefused(
            f"release {release[:12]} of night {manifest.night} has another base than the champion "
            f"{champion.release[:12]} of night {champion.night} ({', '.join(odd)} differ): its weights mean nothing "
            f"here; hold the segment at its parent's (without --to), or roll back to the whole release"
        )
    _require_level(manifest, segment.columns)
    known = _laid_out(place, manifest, folder)
    tables = read_tables(data, known)
    level = next(one for one in tables.levels if one.columns == segment.columns)
    key = key_of(segment.name, level.columns, level.radices, tables.vocabularies)
    slot = None if key is None else level.slot_of(key)
    if slot is None:
        raise ObjectMissing(
            f"segment {segment.told} has no weights of its own in release {release[:12]} of night {manifest.night}; "
            f"hold it at its parent's (without --to)"
        )
    support = None if level.support is None else int(level.support[level.keys == key][0])
    return _weights(known / "bank.bin", shape[2], shape[1])[slot], support


def _publish(
    place: Place,
    pointer: Pointer,
    champion: Manifest,
    made: Manifest,
    beside: Mapping[str, bytes],
    folder: Path,
    told: str,
    held: HeldSegment,
) -> Pointer:
    """Make the release visible, note it as its night's, and move the pointer."""
    store, pipeline = store_of(place), place.pipeline
    # A manifest of an earlier version has no digests of what lies beside it, and then that is not taken over.
    run: dict[str, Any] = {"night": champion.night.isoformat(), "parent": None, "config": ""}
    run |= json.loads(beside.get("run.json", b"{}"))
    through = {"go": True, "override": held.reason}  # whatever the gate said of the night, an operator lets it through
    run |= {"created": held.since, "decided_by": "operator", "fallback": told, **through}
    # The night's report is about the exams, in which nothing changes; what was shipped, the head says.
    head, body, rest = beside.get("report.html", b"<main>").decode().partition("<main>")
    note = (
        f"<p><strong>Release {made.release}: {escape(told)}.</strong> {escape(held.reason)} What follows is the report "
    )
    note += f"of release {champion.release}, from which it was made.</p>"
    extra = {"run.json": canonical_json(run), "report.html": f"{head}{body}{note}{rest}".encode()}
    if LIFT in beside:
        extra[LIFT] = beside[LIFT]
    spare(store, pipeline, names_of(made), leased=True)
    publish_release(store, pipeline, folder, made, extra, still_held)
    still_held()
    now = read_pointer(store, pipeline)
    if now is None or now.generation != pointer.generation:
        raise PointerMoved(
            f"the pointer of {pipeline!r} was moved while release {made.release[:12]} was made from "
            f"{champion.release[:12]}; look what it names, then do it again"
        )
    key = night_key(pipeline, made.night)
    noted = store.find(key)
    state: dict[str, Any] = {} if noted is None else json.loads(noted.data)
    if noted is not None and state["release"] == champion.release:
        # Later nights start from it: its base and its vocabulary are the same files.
        store.swap(key, canonical_json(state | {"release": made.release, **through}), noted.etag)
    return move(
        *(store, pipeline, lambda one: replace(one, release=made.release, night=made.night), f"{told}: {held.reason}"),
        "fallback",
        expected=pointer.generation,
    )


def _laid_out(place: Place, manifest: Manifest, folder: Path) -> Path:
    """A release's files under their names, digests verified."""
    folder.mkdir()
    for file in manifest.files:
        (folder / file.name).symlink_to(release_file(place, manifest.release, file.name).resolve())
    return folder


def _segments(champion: Manifest, folder: Path, data: DataConfig, lifts: bytes | None) -> tuple[LevelSegments, ...]:
    """Who is served by what in the release in a folder, by the champion's exams; nothing where that does not tell."""
    if not champion.segments or lifts is None:
        return ()
    listed = pq.read_table(folder / "segments.parquet")["level"].to_numpy()
    return level_segments(
        folder / "segments.parquet",
        pq.read_table(pa.BufferReader(lifts)),
        data.objectives[0].name,
        [level.columns for level in champion.segments],
        # One that is given weights of an earlier release need not be among those that the champion's nights have seen.
        [max(level.segments, int((listed == at).sum())) for at, level in enumerate(champion.segments)],
        champion.segments[0].kind,
        max((level.lift.exams for level in champion.segments if level.lift is not None), default=0),
    )


def _variants(champion: Manifest, folder: Path, parity: Parity) -> dict[str, Variant]:
    """The smaller graphs in a folder, by the champion's verdicts where base and recipe are the same."""
    was = {file.name: file.sha256 for file in champion.files}
    return {
        name: agreement.taken_over(
            champion.variants[name],
            champion.release,
            parity_of(name, parity.variants[name]),
            same=was.get(JUDGED.format(name)) == sha256_of(folder / JUDGED.format(name)),
        )
        for name in PROVIDERS
        if name in parity.variants
    }


def _interface(path: Path) -> Interface:
    read = Reader(f"the exported {path.name}")
    return read_interface(read, read.document(path.read_bytes(), LARGEST_MANIFEST))


def _weights(path: Path, width: int, objectives: int) -> F32:
    return np.fromfile(path, "<f4").reshape(-1, objectives, width).astype(np.float32)


def _told_again(place: Place, why: str) -> Pointer:
    """The pointer as it stands; the ledger may lack the move, where its caller was killed behind the swap."""
    return move(store_of(place), place.pipeline, lambda one: one, why, "fallback")


def _ended(place: Place, kept: HeldSegment | None) -> HeldSegment | None:
    """The hold of a segment, which ends here; None where there is none."""
    if kept is not None:
        change_holds(store_of(place), place.pipeline, lambda now: _without(now, kept))
    return kept


def _without(now: Any, held: HeldSegment) -> list[HeldSegment]:
    return [one for one in now if (one.columns, one.name) != (held.columns, held.name)]


def _room(place: Place) -> Path:
    room = Path(place.scratch) / "steps"
    room.mkdir(parents=True, exist_ok=True)
    return room


def _operator() -> str:
    try:
        return getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return "operator"
