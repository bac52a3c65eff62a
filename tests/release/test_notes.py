"""Damaged notes of an old release or night: what they say, and that no other release is hidden by them."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import NoRelease, ObjectCorrupt, ObjectMissing, StoreError
from tasks.references import Place
from tasks.release.about import about
from tasks.release.garbage import collect
from tasks.release.pointer import sign_pointer
from tasks.release.published import night_key, resolve
from tasks.release.signing import SigningKey
from tasks.releases import collected, releases
from tests.releases import NIGHT, PIPELINE, Made, deliver, next_night

DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "cut short": lambda data: b"{",
    "empty": lambda data: b"",
    "no text": lambda data: b"\xff\xfe\x00",
    "a list": lambda data: b"[]",
    "a number": lambda data: b"1",
    "null": lambda data: b"null",
    "too deep": lambda data: b"[" * 100_000,
    "no keys": lambda data: b"{}",
    "a key less": lambda data: json.dumps({n: one for n, one in json.loads(data).items() if n != "go"}).encode(),
    "another type": lambda data: json.dumps(json.loads(data) | {"config": 3}).encode(),
}
"""What became of an object's bytes."""
TIME: dict[str, Callable[[bytes], bytes]] = {
    "no date": lambda data: json.dumps(json.loads(data) | {"night": "soon"}).encode(),
    "no zone": lambda data: json.dumps(json.loads(data) | {"created": "2026-03-05T06:00:00"}).encode(),
}
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def nights(full: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    return full, next_night(full, tmp_path_factory.mktemp("nights") / "second", NIGHT + timedelta(days=1))


@pytest.fixture(scope="module")
def whole(nights: tuple[Made, Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights; the second is the champion."""
    folder = tmp_path_factory.mktemp("whole")
    deliver(open_store(str(folder)), nights)
    return folder


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> ObjectStore:
    """A copy to do damage to."""
    shutil.copytree(whole, tmp_path / "store")
    return open_store(str(tmp_path / "store"))


def rewrite(store: ObjectStore, key: str, change: Callable[[bytes], bytes | None]) -> None:
    data = change(store.get(key).data)
    store.delete(key)
    if data is not None:
        store.put_if_absent(key, data)


def run_key(made: Made) -> str:
    return f"{PIPELINE}/releases/{made.manifest.release}/run.json"


def gc(store: ObjectStore, tmp_path: Path) -> None:
    collect(store, PIPELINE, tmp_path, 1, timedelta(hours=1), NOON, lambda: None)


def place(store: ObjectStore, tmp_path: Path) -> Place:
    return Place(store=store.url, pipeline=PIPELINE, scratch=str(tmp_path / "scratch"))


@pytest.mark.parametrize("how", [*DAMAGE, *TIME, "gone"])
def test_a_damaged_run_marks_its_own_row_and_stops_the_collector(
    store: ObjectStore, nights: tuple[Made, Made], tmp_path: Path, how: str
) -> None:
    old, new = (made.manifest.release for made in nights)
    key = run_key(nights[0])
    rewrite(store, key, (DAMAGE | TIME | {"gone": lambda data: None})[how])
    first, second = releases(place(store, tmp_path))
    # The manifest has the night, and the night's note has the gate's word and the config.
    assert (first.release, first.night, first.go, first.config, first.roles) == (old, NIGHT, True, "c", ("previous",))
    assert (first.created, first.parent) == (None, None)
    assert len(first.damaged) == 1
    assert key in first.damaged[0]
    assert (second.release, second.damaged, second.parent) == (new, (), old)
    before = {name: store.get(name).data for name in store.list("")}
    with pytest.raises(ObjectMissing if how == "gone" else ObjectCorrupt, match=f"{key} is .*put the published bytes"):
        gc(store, tmp_path)
    assert {name: store.get(name).data for name in store.list("")} == before
    found = about(store, PIPELINE, old)
    assert (found.damaged, found.created, found.go, found.night) == (first.damaged, "", True, NIGHT.isoformat())
    assert [one.generation for one in found.moves] == [1]
    assert about(store, PIPELINE, new).damaged == ()


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_note_of_a_night_marks_its_own_row_and_stops_the_collector(
    store: ObjectStore, nights: tuple[Made, Made], tmp_path: Path, how: str
) -> None:
    old, new = (made.manifest.release for made in nights)
    key = night_key(PIPELINE, NIGHT)
    rewrite(store, key, DAMAGE[how])
    first, second = releases(place(store, tmp_path))
    assert (first.release, first.night, first.go, first.config) == (old, NIGHT, True, "c")  # from `run.json`
    assert first.created is not None
    assert len(first.damaged) == 1
    assert (second.release, second.damaged) == (new, ())
    assert about(store, PIPELINE, old).damaged == first.damaged
    before = {name: store.get(name).data for name in store.list("")}
    for ask in (
        lambda: gc(store, tmp_path),
        lambda: collected(place(store, tmp_path), "c"),
        lambda: resolve(store, PIPELINE, NIGHT.isoformat()),
    ):
        with pytest.raises(ObjectCorrupt, match=f"{key} is damaged: .*; put it back from a copy, or delete it and run"):
            ask()
    assert {name: store.get(name).data for name in store.list("")} == before
    store.delete(key)  # as it says
    assert [one.damaged for one in releases(place(store, tmp_path))] == [(), ()]
    gc(store, tmp_path)


def test_a_release_of_which_nothing_can_be_read_is_a_row_still(
    store: ObjectStore, nights: tuple[Made, Made], tmp_path: Path
) -> None:
    for key in (run_key(nights[0]), f"{PIPELINE}/releases/{nights[0].manifest.release}/manifest.json"):
        rewrite(store, key, DAMAGE["cut short"])
    rewrite(store, night_key(PIPELINE, NIGHT), DAMAGE["empty"])
    rows = releases(place(store, tmp_path))
    assert [(one.release, one.night, one.go, one.config) for one in rows] == [
        (nights[0].manifest.release, None, None, None),
        (nights[1].manifest.release, NIGHT + timedelta(days=1), True, "c"),
    ]


@pytest.mark.parametrize("how", [one for one in DAMAGE if one not in ("a key less", "another type")])
def test_a_damaged_entry_of_the_ledger_is_told_and_not_signed_by(
    store: ObjectStore, nights: tuple[Made, Made], how: str
) -> None:
    key = next(iter(sorted(store.list(f"{PIPELINE}/ledger/"))))
    rewrite(store, key, DAMAGE[how])
    for made in nights:
        (told,) = about(store, PIPELINE, made.manifest.release).damaged
        assert f"{key} is damaged" in told
    with pytest.raises(ObjectCorrupt, match=f"{key} is damaged: .*; put it back from a copy, or delete it"):
        sign_pointer(store, PIPELINE, SigningKey.generate(), None)


@pytest.mark.parametrize("change", [{"pointer": "{}"}, {"pointer": "\ud800"}, {"pointer": 1}, {"what": None}])
def test_an_entry_of_the_ledger_with_an_odd_pointer_is_damaged(
    store: ObjectStore, nights: tuple[Made, Made], change: dict[str, object]
) -> None:
    key = next(iter(sorted(store.list(f"{PIPELINE}/ledger/"))))
    rewrite(store, key, lambda data: json.dumps(json.loads(data) | change).encode())
    assert len(about(store, PIPELINE, nights[1].manifest.release).damaged) == 1


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'{"release": 1}', b'{"release": null, "parent": []}'])
def test_what_a_night_has_resolved_stops_the_collector_where_it_is_damaged(
    store: ObjectStore, tmp_path: Path, data: bytes
) -> None:
    key = f"{PIPELINE}/work/intent/{NIGHT}/frozen-config.json"
    store.put_if_absent(key, data)
    with pytest.raises(StoreError, match=f"{key} is damaged: .*; delete it and run that night again"):
        gc(store, tmp_path)


@pytest.mark.parametrize("name", ["champion", "previous", "2026-03-05", "abcd"])
def test_where_there_are_no_releases_no_name_leads_to_the_list_of_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(NoRelease, match=r"no releases of pipeline 'movielen' in .*look at --store and --pipeline"):
        resolve(open_store(str(tmp_path)), "movielen", name)
