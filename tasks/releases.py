"""What a pipeline has published: read only, for lists and for a backfill's plan."""

from collections.abc import Iterator
from datetime import UTC, date, datetime

from tasks.errors import ObjectCorrupt, ObjectMissing, ReleaseRefused
from tasks.ingest import released_prefix
from tasks.references import Place, ReleaseRow
from tasks.release.manifest import Pointer
from tasks.release.notes import NightNote, read_night, read_run
from tasks.release.pointer import read_pointer
from tasks.release.published import folders, releases_prefix, roles, stored_manifest
from tasks.steps import store_of

_FIRST = datetime.min.replace(tzinfo=UTC)


def releases(place: Place) -> tuple[ReleaseRow, ...]:
    """All releases of a pipeline, by night, then by when they were made.

    Where what publish noted of one is gone or damaged, its row says so, and what it would have told is None.
    """
    pointer = read_pointer(store_of(place), place.pipeline)
    return tuple(sorted(_rows(place, pointer), key=lambda row: (row.night or date.min, row.created or _FIRST)))


def collected(place: Place, config: str) -> dict[date, str]:
    """Nights whose newest release was made with a config, and is no longer in the store: `releases gc` removed it.

    Raises:
        ObjectCorrupt: a night's note is damaged: nobody knows whether the night is finished.
    """
    store = store_of(place)
    visible = set(folders(store, place.pipeline).visible)
    made = {key: read_night(store, key) for key in store.list(released_prefix(place))}
    return {
        _night_of(place, key): one.release
        for key, one in made.items()
        if one.config == config and one.release not in visible
    }


def _night_of(place: Place, key: str) -> date:
    return date.fromisoformat(key.removeprefix(f"{released_prefix(place)}night=").removesuffix(".json"))


def _rows(place: Place, pointer: Pointer | None) -> Iterator[ReleaseRow]:
    store, named = store_of(place), roles(pointer)
    # `run.json` keeps the gate's first word and the first config; an override or another config since, which made the
    # same bytes, stands in the state of its night.
    since: dict[str, NightNote] = {}
    unread: dict[date, str] = {}
    for key in store.list(released_prefix(place)):
        try:
            noted = read_night(store, key)
        except ObjectCorrupt as error:
            unread[_night_of(place, key)] = str(error)
        else:
            since[noted.release] = noted
    for release in folders(store, place.pipeline).visible:
        run, why = None, []
        try:
            run = read_run(store, place.pipeline, release)
            night: date | None = run.night
        except (ObjectCorrupt, ObjectMissing) as error:
            why.append(str(error))
            night = _manifests_night(place, release)
        last = since.get(release, run)
        if night in unread:
            why.append(unread[night])
        yield ReleaseRow(
            release=release,
            night=night,
            created=None if run is None else datetime.fromisoformat(run.created),
            go=None if last is None else last.go,
            roles=named.get(release, ()),
            parent=None if run is None else run.parent,
            config=None if last is None else last.config,
            report=location(place, f"{releases_prefix(place.pipeline)}{release}/report.html"),
            damaged=tuple(why),
        )


def _manifests_night(place: Place, release: str) -> date | None:
    try:
        return stored_manifest(store_of(place), place.pipeline, release).night
    except ReleaseRefused:  # `nightrank releases verify` says why; that the release is damaged is told already
        return None


def location(place: Place, key: str) -> str:
    """Where a person finds an object, or would if it is gone: a path of a directory store, a URL otherwise."""
    return f"{store_of(place).url.rstrip('/')}/{key}"
