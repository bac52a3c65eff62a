"""One release as an operator reads it, and two of them side by side."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tasks.clients.object_store import ObjectStore
from tasks.errors import InvalidConfig, ObjectCorrupt, ObjectMissing, ReleaseRefused
from tasks.release.manifest import InputSpec, Manifest, ReleaseFile
from tasks.release.manifest_parts import LevelSegments, Requires, Variant
from tasks.release.notes import NightNote, Run, find_night, ledger_keys, read_entry, read_run
from tasks.release.pointer import read_pointer
from tasks.release.published import night_key, releases_prefix, roles
from tasks.release.signature import signatures_prefix
from tasks.release.signing import UNSIGNED, Keyring, manifest_bytes, vouching_key


@dataclass(frozen=True)
class Move:
    """A move of the pointer that named a release, as the ledger has it."""

    what: str
    generation: int
    moved_at: str
    reason: str


@dataclass(frozen=True)
class Level:
    """A level of the ladder, and how many of its segments have weights of their own."""

    name: str
    segments: int


@dataclass(frozen=True)
class Signed:
    """Who has signed a release's manifest.

    Attributes:
        keys: ids of the keys whose signatures lie beside it.
        vouching: the key of this host's keyring that has signed these bytes; None where none has, or no keys are named.
        told: one sentence.
    """

    keys: tuple[str, ...]
    vouching: str | None
    told: str


@dataclass(frozen=True)
class About:
    """A release.

    Attributes:
        release: its id.
        night: its night, ISO 8601.
        created: when it was made; empty where nobody wrote it down.
        roles: what the pointer names it as.
        go: whether the gate, or an operator, let it through; None where nothing that can be read says so.
        decided_by: the gate's word, or `operator`.
        override: an operator's reason, where there is one.
        parent: the release that its night started from.
        compared_with: the champion of its exams.
        config: digest of the config that made it.
        schema_version: of its manifest.
        bytes: of all content files.
        files: content files.
        inputs: name to all that a request has to know of it.
        objectives: name to kind.
        levels: finest first.
        segments: who is served by what at each level; empty where the manifest does not tell.
        variants: name to smaller graphs and their verdict.
        requires: what a host must have to load the graphs; None where the manifest does not tell.
        signed: by whom.
        metrics: objective to method to figures, of the nightly exam.
        parity: how closely the graphs agree with the network.
        provenance: commit, package versions, what training did.
        moves: of the pointer to it, oldest first.
        report: key of its report.
        damaged: what could not be read of all this, one sentence each; then what it would have told is empty here.
    """

    release: str
    night: str
    created: str
    roles: tuple[str, ...]
    go: bool | None
    decided_by: str
    override: str | None
    parent: str | None
    compared_with: str | None
    config: str
    schema_version: int
    bytes: int
    files: tuple[ReleaseFile, ...]
    inputs: Mapping[str, str]
    objectives: Mapping[str, str]
    levels: tuple[Level, ...]
    segments: tuple[LevelSegments, ...]
    variants: Mapping[str, Variant]
    requires: Requires | None
    signed: Signed
    metrics: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    parity: Mapping[str, object]
    provenance: Mapping[str, object]
    moves: tuple[Move, ...]
    report: str
    damaged: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def loss(self, objective: str, method: str) -> float | None:
        """Log-loss, or of a rating the root of the mean squared error, of a method in the nightly exam."""
        figures = self.metrics.get(objective, {}).get(method, {})
        return figures["log_loss"] if "log_loss" in figures else figures.get("rmse")


def about(store: ObjectStore, pipeline: str, release: str) -> About:
    """Everything that a store says about a release.

    Raises:
        ObjectMissing: there is no such release.
        ReleaseRefused: its manifest is damaged.
    """
    data = manifest_bytes(store, pipeline, release)
    manifest = Manifest.parse(data, pipeline, release)
    folder = f"{releases_prefix(pipeline)}{release}"
    damaged: list[str] = []
    run: Run | None = None
    noted: NightNote | None = None
    try:
        run = read_run(store, pipeline, release)
    except (ObjectCorrupt, ObjectMissing) as error:
        damaged.append(str(error))
    try:
        noted = find_night(store, night_key(pipeline, manifest.night))
    except ObjectCorrupt as error:
        damaged.append(str(error))
    # `run.json` keeps the first word; an override since, which made the same bytes, stands in the state of the night.
    last = noted if noted is not None and noted.release == release else run
    override = None if last is None else last.override
    moves, unreadable = ledger(store, pipeline)
    metrics: Mapping[str, Any] = manifest.metrics
    return About(
        release=release,
        night=manifest.night.isoformat(),
        created="" if run is None else run.created,
        roles=roles(read_pointer(store, pipeline)).get(release, ()),
        go=None if last is None else last.go,
        decided_by="operator" if override is not None else "" if run is None else run.decided_by,
        override=override,
        parent=None if run is None else run.parent,
        compared_with=None if run is None else run.champion,
        config="" if last is None else last.config,
        schema_version=manifest.schema_version,
        bytes=manifest.size,
        files=manifest.files,
        inputs={one.name: _needs(one) for one in manifest.interface.inputs},
        objectives={one.name: one.kind for one in manifest.interface.objectives},
        levels=tuple(Level(", ".join(one.columns), one.segments) for one in manifest.interface.levels),
        segments=manifest.segments,
        variants=manifest.variants,
        requires=manifest.requires,
        signed=_signed(store, pipeline, release, data),
        metrics=metrics if all(isinstance(one, Mapping) for one in metrics.values()) else {},
        parity=manifest.parity,
        provenance=manifest.provenance,
        moves=tuple(one for named, one in moves if named == release),
        report=f"{folder}/report.html",
        damaged=(*damaged, *unreadable),
    )


def _signed(store: ObjectStore, pipeline: str, release: str, data: bytes) -> Signed:
    """Who has signed these bytes of a manifest, and whether this host believes it."""
    prefix = signatures_prefix(pipeline, release, hashlib.sha256(data).hexdigest())
    keys = tuple(key.removeprefix(prefix).removesuffix(".sig") for key in store.list(prefix))
    if not keys:
        return Signed((), None, UNSIGNED)
    by = f"by {', '.join(keys)}"
    try:
        keyring = Keyring.from_environment()
        if keyring is None:
            return Signed(keys, None, f"{by}; this host names no keys, so nobody looked")
        vouching = vouching_key(store, keyring, pipeline, release, data).key_id
        return Signed(keys, vouching, f"{by}; {vouching} is trusted here")
    except (InvalidConfig, ReleaseRefused) as error:  # what else there is to be told does not depend on it
        return Signed(keys, None, f"{by}; rankers with this host's keys refuse it: {error}")


def _needs(spec: InputSpec) -> str:
    """All that a request has to know of an input: nothing that is for people alone."""
    told = [f"{spec.dtype} per {spec.per}"]
    if spec.missing is not None:
        told.append(f"missing {spec.missing!r}")
    if spec.values is not None:
        told.append(f"{spec.values} values")
    if spec.rows is not None:
        told.append(f"at most {spec.rows} rows")
    if spec.of is not None:
        told.append(f"of {spec.of}")
    if spec.personal is not None:
        told.append(f"{spec.personal.method} with key {spec.personal.key_id}")
    if spec.optional:
        told.append("optional")
    return ", ".join(told)


def ledger(store: ObjectStore, pipeline: str) -> tuple[tuple[tuple[str, Move], ...], tuple[str, ...]]:
    """Every move of the pointer, oldest first, with the release that it named afterwards; and what cannot be read."""
    found: list[tuple[str, Move]] = []
    damaged: list[str] = []
    for key in ledger_keys(store, pipeline):
        try:
            entry = read_entry(store, key)
        except ObjectCorrupt as error:
            damaged.append(str(error))
            continue
        moved = entry.pointer
        found.append((moved.release, Move(entry.what, moved.generation, moved.moved_at, moved.reason)))
    return tuple(found), tuple(damaged)


@dataclass(frozen=True)
class FileChange:
    """A content file of two releases: its bytes in each, None where one lacks it."""

    name: str
    before: int | None
    after: int | None
    same: bool


@dataclass(frozen=True)
class Change:
    """Something that is one thing before and another after; None where it is not there."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Difference:
    """What changes for a ranker, and what lay behind it, from one release to another.

    Attributes:
        before, after: the releases.
        files: every content file of either.
        fetched: bytes that a ranker with the first fetches for the second.
        interface: inputs and objectives that differ: those who ask have to change.
        levels: levels whose number of segments differs.
        losses: objective and method to the loss in each release's nightly exam, which were of different nights.
        provenance: what differs of commit, packages, config and parent.
    """

    before: About
    after: About
    files: tuple[FileChange, ...]
    fetched: int
    interface: tuple[Change, ...]
    levels: tuple[Change, ...]
    losses: tuple[tuple[str, str, float | None, float | None], ...]
    provenance: tuple[Change, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines: the two releases by id and night only."""
        told = asdict(self)
        named = {name: {part: told[name][part] for part in ("release", "night")} for name in ("before", "after")}
        losses = [dict(zip(("objective", "method", "before", "after"), one, strict=True)) for one in self.losses]
        return told | named | {"losses": losses}


def difference(before: About, after: About) -> Difference:
    """Two releases side by side."""
    then, now = ({file.name: file for file in one.files} for one in (before, after))
    held = {file.sha256 for file in before.files}
    files = tuple(
        FileChange(
            name,
            then[name].bytes if name in then else None,
            now[name].bytes if name in now else None,
            name in then and name in now and then[name].sha256 == now[name].sha256,
        )
        for name in sorted(then.keys() | now.keys())
    )
    fetched = {file.sha256: file.bytes for file in after.files if file.sha256 not in held}
    objectives = dict.fromkeys((*before.objectives, *after.objectives))
    losses = tuple(
        (objective, method, before.loss(objective, method), after.loss(objective, method))
        for objective in objectives
        for method in dict.fromkeys((*before.metrics.get(objective, {}), *after.metrics.get(objective, {})))
    )
    origins = (
        {**one.provenance, "config": one.config, "parent": one.parent, "schema version": one.schema_version}
        for one in (before, after)
    )
    return Difference(
        before,
        after,
        files,
        sum(fetched.values()),
        (*_changes(before.inputs, after.inputs), *_changes(before.objectives, after.objectives)),
        tuple(_changes(*({level.name: level.segments for level in one.levels} for one in (before, after)))),
        losses,
        tuple(_changes(*origins)),
    )


def _changes(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[Change]:
    def said(found: Mapping[str, object], name: str) -> str | None:
        return None if found.get(name) is None else str(found[name])

    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield Change(name, said(before, name), said(after, name))
