"""What no reader, no night and no operator can still ask for, and how it is removed without hurting one who wakes up.

Kept are the newest releases and whatever is named: by the pointer, by nights that are not finished, as the newest one
that the gate let through, and as the parent of one that is kept. A release goes manifest first, so that it is gone for
readers before any of its bytes are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path

from tasks.clients.object_store import ObjectStore
from tasks.clients.workspace import Workspace
from tasks.errors import Conflict, OutcomeUnknown, StoreUnwritable
from tasks.release.manifest import manifest_key
from tasks.release.marks import Marks, blob_name, change_marks, marks_key, read_marks, release_name
from tasks.release.notes import NightNote, read_night, read_resolved, read_run
from tasks.release.pointer import read_pointer
from tasks.release.published import (
    blobs_prefix,
    folders,
    night_key,
    nights_prefix,
    releases_prefix,
    roles,
    stored_manifest,
)


@dataclass(frozen=True)
class Found:
    """What a store holds, parted into what is named and what is not.

    Attributes:
        kept: release to the reasons why it stays.
        releases: ids of the releases that nothing keeps, oldest night first.
        unfinished: folders of releases without a manifest.
        blobs: digests of the blobs that no release that stays names.
        torn: visible releases that name a blob which is not there, with how many.
        unknown: nights that were about to promote a release, and of which nothing says whether they did.
    """

    kept: Mapping[str, tuple[str, ...]]
    releases: tuple[str, ...]
    unfinished: tuple[str, ...]
    blobs: tuple[str, ...]
    torn: Mapping[str, int]
    unknown: tuple["Intent", ...]

    @property
    def names(self) -> frozenset[str]:
        """What marks call all that can go."""
        gone = (*map(release_name, (*self.releases, *self.unfinished)), *map(blob_name, self.blobs))
        return frozenset(gone)


@dataclass(frozen=True)
class Collected:
    """What a collection did, or would do.

    Attributes:
        found: what was found.
        marked: what is marked from now on, by name.
        waiting: what was marked before, and whose grace is not over.
        removed: what was removed.
        bytes: of the blobs among these.
        next: when the next mark is old enough; None where nothing is marked.
    """

    found: Found
    marked: tuple[str, ...]
    waiting: tuple[str, ...]
    removed: tuple[str, ...]
    bytes: int
    next: datetime | None


@dataclass(frozen=True)
class Intent:
    """What a night has resolved, and which release it was about to promote.

    Attributes:
        key: where it stands.
        night: the night.
        release: what it was about to promote; None before it had made one.
        names: releases that it names as parent, champion or as what it replaces.
        done: whether its publish is on record; where it had made no release, whether its night has one.
    """

    key: str
    night: str
    release: str | None
    names: frozenset[str]
    done: bool


def intents(store: ObjectStore, pipeline: str, scratch: Path) -> Iterator[Intent]:
    """Every night's intent, as publish leaves it."""
    nights = _nights(store, pipeline)
    published = {str(one.content["release"]) for one in Workspace(store, pipeline, scratch).records("publish")}
    published |= {one.release for one in nights.values()}
    prefix = f"{pipeline}/work/intent/"
    for key in store.list(prefix):
        noted = read_resolved(store, key)
        release = noted.release
        night = key.removeprefix(prefix).partition("/")[0]
        # One that had no release yet died before it moved anything; the night has been delivered by another since.
        done = night_key(pipeline, date.fromisoformat(night)) in nights if release is None else release in published
        yield Intent(key, night, release, noted.names, done)


def find(store: ObjectStore, pipeline: str, scratch: Path, keep: int) -> Found:
    """Look at everything that a pipeline has published. Reads; changes nothing.

    Args:
        store: where.
        pipeline: the pipeline.
        scratch: a local folder; nothing is written to it.
        keep: how many of the newest releases stay, by night, whatever names them.

    Raises:
        ReleaseRefused: a manifest cannot be read: nobody knows what it names.
        ObjectCorrupt, ObjectMissing: the same of a `run.json`, of a night's note or of its intent.
    """
    present = folders(store, pipeline)
    manifests = {release: stored_manifest(store, pipeline, release) for release in present.visible}
    runs = {release: read_run(store, pipeline, release) for release in manifests}
    by_age = sorted(manifests, key=lambda one: (manifests[one].night, runs[one].created, one))
    noted = tuple(intents(store, pipeline, scratch))
    kept = _kept(store, pipeline, noted, by_age, keep)
    for release in [one for one in kept if one in runs]:
        parent = runs[release].parent
        if parent is not None and parent not in kept:
            kept[parent] = (f"parent of {release[:12]}",)
    gone = tuple(release for release in by_age if release not in kept)
    named = {file.sha256 for release, one in manifests.items() if release in kept for file in one.files}
    prefix = blobs_prefix(pipeline)
    blobs = {key.removeprefix(prefix) for key in store.list(prefix)}
    absent = {release: sum(file.sha256 not in blobs for file in one.files) for release, one in manifests.items()}
    return Found(
        kept={release: why for release, why in kept.items() if release in manifests},
        releases=gone,
        unfinished=tuple(folder for folder in present.unfinished if folder not in kept),
        blobs=tuple(sorted(blobs - named)),
        torn={release: count for release, count in absent.items() if count},
        unknown=tuple(one for one in noted if one.release is not None and not one.done),
    )


def collect(
    store: ObjectStore,
    pipeline: str,
    scratch: Path,
    keep: int,
    grace: timedelta,
    now: datetime,
    held: Callable[[], None],
    dry_run: bool = False,
) -> Collected:
    """Mark what can go, and remove what was marked at least the grace ago.

    A run that dies is made good by the next: what it has not removed is marked anew.

    Args:
        store: where.
        pipeline: the pipeline.
        scratch: as for `find`.
        keep: as for `find`.
        grace: how long after it was marked something is removed; longer than any run sleeps.
        now: the time, with a zone.
        held: raises where the caller's lease is no longer his; asked before anything is removed, and again and again.
        dry_run: only say what would be done. Then `held` is not asked.

    Raises:
        OutcomeUnknown: of a night it is not known whether it promoted its release.
        ReleaseRefused, ObjectCorrupt, ObjectMissing: as for `find`; nothing is marked or removed.
        StoreUnwritable: nothing may be removed; what is marked stays marked, and can still be counted on.
        LeaseLost, StoreError: what is marked stays marked.
    """
    while True:
        before, etag = read_marks(store, pipeline)
        found = find(store, pipeline, scratch, keep)
        for one in found.unknown:
            raise OutcomeUnknown(
                f"night {one.night} was about to promote release {str(one.release)[:12]}, and nothing says whether it "
                f"did; run it again (nightrank run --night {one.night}), or, where it never will be, delete "
                f"{store.url}/{one.key}; then collect again"
            )
        # A release and what lies beside it go together, and a blob with the last release that names it.
        due = {name for name in found.names if name in before.since and now - before.since[name] >= grace}
        staying = [one for one in found.releases if release_name(one) not in due]
        for release in staying:
            due -= {blob_name(file.sha256) for file in stored_manifest(store, pipeline, release).files}
        since = {name: before.since.get(name, now) for name in found.names - due}
        new = tuple(sorted(name for name in since if name not in before.since))
        waiting = tuple(sorted(name for name in since if name in before.since))
        size = sum(store.size(f"{pipeline}/{name}") or 0 for name in due if name.startswith("blobs/"))
        until = min(since.values()) + grace if since else None
        done = Collected(found, new, waiting, tuple(sorted(due)), size, until)
        if dry_run:
            return done
        held()
        try:
            if (after := Marks(since, frozenset(due))) != before:
                store.swap(marks_key(pipeline), after.serialise(), etag)
        except Conflict:
            continue  # somebody counts on one of them since: look again
        break
    marked = {name: before.since[name] for name in due}
    for gone, key in enumerate(_doomed(store, pipeline, done.removed)):
        held()
        try:
            store.delete(key)
        except StoreUnwritable:
            if gone == 0:  # all is whole, and may be counted on again
                change_marks(store, pipeline, lambda marks: Marks({**marked, **marks.since}, marks.removing - due))
            raise
    change_marks(store, pipeline, lambda marks: replace(marks, removing=marks.removing - due))
    return done


def _doomed(store: ObjectStore, pipeline: str, names: tuple[str, ...]) -> Iterator[str]:
    """Keys of releases, each with its manifest first, then of blobs."""
    for name in (one for one in names if one.startswith("releases/")):
        release = name.removeprefix("releases/")
        first = manifest_key(pipeline, release)
        yield from sorted(store.list(f"{releases_prefix(pipeline)}{release}/"), key=lambda one: one != first)
    yield from (f"{pipeline}/{name}" for name in names if name.startswith("blobs/"))


def _kept(
    store: ObjectStore, pipeline: str, noted: Sequence[Intent], by_age: Sequence[str], keep: int
) -> dict[str, tuple[str, ...]]:
    """Releases that stay, with the reasons."""
    kept: dict[str, tuple[str, ...]] = {}

    def because(release: str | None, why: str) -> None:
        if release is not None:
            kept[release] = (*kept.get(release, ()), why)

    for release in by_age[len(by_age) - min(keep, len(by_age)) :]:
        because(release, f"one of the newest {keep}")
    for release, named in roles(read_pointer(store, pipeline)).items():
        for role in named:
            because(release, role)
    passed = [one.release for _, one in sorted(_nights(store, pipeline).items()) if one.go]
    because(passed[-1] if passed else None, "newest that the gate let through")
    for intent in noted:
        if not intent.done:
            for release in (*intent.names, *(() if intent.release is None else (intent.release,))):
                because(release, f"night {intent.night} is not finished")
    return kept


def _nights(store: ObjectStore, pipeline: str) -> dict[str, NightNote]:
    """Each night's newest release, as publish noted it."""
    return {key: read_night(store, key) for key in store.list(nights_prefix(pipeline))}
