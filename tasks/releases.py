"""What a pipeline has published: read only, for lists and for a backfill's plan."""

import json
from collections.abc import Iterator
from datetime import date, datetime

from tasks.ingest import released_prefix
from tasks.references import Place, ReleaseRow
from tasks.release.manifest import Pointer
from tasks.release.pointer import read_pointer
from tasks.release.published import folders, roles
from tasks.steps import store_of


def releases(place: Place) -> tuple[ReleaseRow, ...]:
    """All releases of a pipeline, by night, then by when they were made."""
    pointer = read_pointer(store_of(place), place.pipeline)
    return tuple(sorted(_rows(place, pointer), key=lambda row: (row.night, row.created)))


def collected(place: Place, config: str) -> dict[date, str]:
    """Nights whose newest release was made with a config, and is no longer in the store: `releases gc` removed it."""
    store = store_of(place)
    visible, prefix = set(folders(store, place.pipeline).visible), released_prefix(place)
    made = {key: json.loads(store.get(key).data) for key in store.list(prefix)}
    return {
        date.fromisoformat(key.removeprefix(f"{prefix}night=").removesuffix(".json")): one["release"]
        for key, one in made.items()
        if one["config"] == config and one["release"] not in visible
    }


def _rows(place: Place, pointer: Pointer | None) -> Iterator[ReleaseRow]:
    store, named = store_of(place), roles(pointer)
    # `run.json` keeps the gate's first word and the first config; an override or another config since, which made the
    # same bytes, stands in the state of its night.
    newest = (json.loads(store.get(key).data) for key in store.list(released_prefix(place)))
    since = {made["release"]: made for made in newest}
    for key in store.list(f"{place.pipeline}/releases/"):
        if not key.endswith("/manifest.json"):
            continue
        folder = key.removesuffix("/manifest.json")
        run = json.loads(store.get(f"{folder}/run.json").data)
        release = folder.rsplit("/", 1)[-1]
        last = since.get(release, run)
        yield ReleaseRow(
            release=release,
            night=date.fromisoformat(run["night"]),
            created=datetime.fromisoformat(run["created"]),
            go=last["go"],
            roles=named.get(release, ()),
            parent=run["parent"],
            config=last["config"],
            report=location(place, f"{folder}/report.html"),
        )


def location(place: Place, key: str) -> str:
    """Where a person finds an object: a path of a directory store, a URL otherwise."""
    store = store_of(place)
    path = store.local_path(key)
    return f"{store.url.rstrip('/')}/{key}" if path is None else str(path)
