"""What may be removed from a store, when, and what a collector that dies leaves."""

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import LeaseLost, ObjectCorrupt, ObjectMissing, OutcomeUnknown, ReleaseRefused, StoreUnwritable
from tasks.release.garbage import Collected, collect, find
from tasks.release.manifest import blob_key, manifest_key, pointer_key
from tasks.release.marks import Marks, blob_name, marks_key, names_of, read_marks, release_name, spare
from tasks.release.moves import rollback
from tasks.release.published import check_whole, folders, night_key, resolve, stored_manifest
from tests.releases import NIGHT, PIPELINE, Made, deliver, next_night, note_night

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
NIGHTS = 4


@pytest.fixture(scope="module")
def nights(full: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, ...]:
    """A release a night; they share all but bank, golden requests and interface."""
    folder = tmp_path_factory.mktemp("nights")
    return full, *(next_night(full, folder / str(one), NIGHT + one * DAY, seed=one) for one in range(1, NIGHTS))


@pytest.fixture
def store(nights: tuple[Made, ...], tmp_path: Path) -> ObjectStore:
    """All of them published and promoted in turn, as nights do it."""
    (tmp_path / "store").mkdir()
    opened = open_store(str(tmp_path / "store"))
    deliver(opened, nights)
    return opened


def intended(store: ObjectStore, night: date, **more: str | None) -> str:
    """What a night leaves that has begun and is not on record as published."""
    key = f"{PIPELINE}/work/intent/{night}/frozen-config.json"
    store.swap(key, json.dumps({"parent": None, "champion": None, "release": None, **more}).encode(), None)
    return key


def ids(nights: tuple[Made, ...]) -> list[str]:
    return [made.manifest.release for made in nights]


def held() -> None:
    """The lease is ours."""


def collected(store: ObjectStore, tmp_path: Path, now: datetime, keep: int = 1, **more: object) -> Collected:
    given = {"grace": DAY, "held": held} | more
    return collect(store, PIPELINE, tmp_path, keep, now=now, **given)  # type: ignore[arg-type]


def everything(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key).data for key in store.list("")}


def test_what_nothing_names_is_marked_first_and_removed_when_the_grace_is_over(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
) -> None:
    first, second, third, fourth = ids(nights)
    marked = collected(store, tmp_path, NOON)
    # The champion is the newest, its predecessor the pointer's previous, and the parent of that one stays with it.
    assert set(marked.found.kept) == {second, third, fourth}
    assert marked.found.kept[fourth] == ("one of the newest 1", "champion", "newest that the gate let through")
    assert marked.found.kept[second] == (f"parent of {third[:12]}",)
    own = {file.sha256 for file in nights[0].manifest.files} - {
        file.sha256 for made in nights[1:] for file in made.manifest.files
    }
    assert len(own) == 3
    assert set(marked.marked) == {release_name(first), *map(blob_name, own)}
    assert marked.removed == ()
    assert marked.next == NOON + DAY
    assert folders(store, PIPELINE).visible == tuple(sorted(ids(nights)))

    waits = collected(store, tmp_path, NOON + DAY - timedelta(seconds=1))
    assert (waits.marked, waits.removed, set(waits.waiting)) == ((), (), set(marked.marked))

    done = collected(store, tmp_path, NOON + DAY)
    assert set(done.removed) == set(marked.marked)
    assert done.bytes == sum(file.bytes for file in nights[0].manifest.files if file.sha256 in own)
    assert first not in {key.split("/")[2] for key in store.list(f"{PIPELINE}/releases/")}
    for made in nights[1:]:
        check_whole(store, stored_manifest(store, PIPELINE, made.manifest.release))
    left = {key.rsplit("/", 1)[-1] for key in store.list(f"{PIPELINE}/blobs/")}
    assert left == {file.sha256 for made in nights[1:] for file in made.manifest.files}
    assert read_marks(store, PIPELINE)[0] == Marks()
    again = collected(store, tmp_path, NOON + 9 * DAY)
    assert (again.marked, again.removed, again.found.torn) == ((), (), {})


def test_a_dry_run_changes_nothing_and_says_what_the_run_then_does(store: ObjectStore, tmp_path: Path) -> None:
    for now in (NOON, NOON + DAY):
        before = everything(store)
        said = collected(store, tmp_path, now, dry_run=True)
        assert everything(store) == before
        assert collected(store, tmp_path, now) == said


def test_what_is_named_stays_however_old(store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path) -> None:
    first, second, third, fourth = ids(nights)
    rollback(store, PIPELINE, first, "bad night")  # the champion is the oldest now, the newest is its predecessor
    kept = find(store, PIPELINE, tmp_path, keep=1).kept
    assert set(kept) == {first, third, fourth}
    assert kept[first] == ("champion",)
    assert kept[fourth] == ("one of the newest 1", "previous", "newest that the gate let through")
    intended(store, NIGHT + 9 * DAY, parent=second)
    assert find(store, PIPELINE, tmp_path, keep=1).kept[second] == (f"night {NIGHT + 9 * DAY} is not finished",)


def test_the_newest_that_the_gate_let_through_stays_when_newer_ones_were_held(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
) -> None:
    for number in (2, 3):
        store.delete(night_key(PIPELINE, NIGHT + number * DAY))
        note_night(store, PIPELINE, NIGHT + number * DAY, nights[number].manifest.release, go=False)
    store.delete(pointer_key(PIPELINE))
    kept = find(store, PIPELINE, tmp_path, keep=1).kept
    assert kept[nights[1].manifest.release] == ("newest that the gate let through",)


def test_nothing_is_collected_while_it_is_unknown_whether_a_night_promoted_its_release(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
) -> None:
    unknown = next_night(nights[0], tmp_path / "unknown", NIGHT + 7 * DAY, seed=7).manifest.release
    key = intended(store, NIGHT + 7 * DAY, release=unknown)
    before = everything(store)
    with pytest.raises(OutcomeUnknown, match=f"night {NIGHT + 7 * DAY} was about to promote release {unknown[:12]}"):
        collected(store, tmp_path, NOON)
    assert everything(store) == before
    note_night(store, PIPELINE, NIGHT + 7 * DAY, unknown)  # its run ends
    assert collected(store, tmp_path, NOON).marked
    store.delete(night_key(PIPELINE, NIGHT + 7 * DAY))
    store.delete(key)  # or it never will
    assert collected(store, tmp_path, NOON).found.unknown == ()


def test_a_night_that_failed_and_was_run_with_other_rows_pins_nothing(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
) -> None:
    """Its first run named a release before it had made one; the second has another key."""
    first, night = ids(nights)[0], NIGHT + 9 * DAY
    intended(store, night, parent=first)
    assert find(store, PIPELINE, tmp_path, keep=1).kept[first] == (f"night {night} is not finished",)
    note_night(store, PIPELINE, night, ids(nights)[3])
    assert first not in find(store, PIPELINE, tmp_path, keep=1).kept


def test_a_manifest_that_nobody_can_read_stops_the_collector(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
) -> None:
    key = manifest_key(PIPELINE, ids(nights)[0])
    store.delete(key)
    store.put_if_absent(key, b'{"schema_version": 99}')
    with pytest.raises(ReleaseRefused, match="schema version is 99"):
        collected(store, tmp_path, NOON)


def test_a_publish_that_died_leaves_a_folder_and_blobs_that_are_removed_in_time(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
) -> None:
    dead = "ab" * 32
    store.put_if_absent(f"{PIPELINE}/releases/{dead}/run.json", b"{}")
    store.put_if_absent(blob_key(PIPELINE, "cd" * 32), b"half")
    assert find(store, PIPELINE, tmp_path, keep=9).names == {release_name(dead), blob_name("cd" * 32)}
    collected(store, tmp_path, NOON, keep=9)
    assert set(collected(store, tmp_path, NOON + DAY, keep=9).removed) == {release_name(dead), blob_name("cd" * 32)}
    assert not [key for key in store.list("") if dead in key or "cd" * 32 in key]
    assert len(folders(store, PIPELINE).visible) == NIGHTS


def test_a_collector_that_dies_after_any_object_is_made_good_by_the_next(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
) -> None:
    """Each run gets one object further; whatever is visible is whole, and a manifest is the first of its release."""
    collected(store, tmp_path, NOON)
    delete, left = store.delete, iter(())

    class Died(Exception):
        """The process is gone."""

    def dies(key: str) -> None:
        if next(left, None) is None:
            raise Died
        delete(key)

    deaths, now, patch = 0, NOON + DAY, pytest.MonkeyPatch()
    patch.setattr(store, "delete", dies)
    while True:
        left = iter(range(1))
        try:
            done = collected(store, tmp_path, now)
        except Died:
            deaths += 1
        else:
            if not (done.marked or done.waiting):
                break
        now += DAY
        visible = folders(store, PIPELINE).visible
        assert ids(nights)[0] not in visible or deaths == 0
        for release in visible:
            check_whole(store, stored_manifest(store, PIPELINE, release))
    patch.undo()
    assert deaths >= 3  # a manifest, what lies beside it, blobs
    assert find(store, PIPELINE, tmp_path, keep=1).names == set()
    assert read_marks(store, PIPELINE)[0] == Marks()


def test_a_collector_that_lost_its_lease_removes_nothing_more(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
) -> None:
    collected(store, tmp_path, NOON)

    def lost() -> Iterator[None]:
        yield from (None, None)  # before the marks, and before the manifest
        raise LeaseLost("another run took it")

    looks = lost()
    with pytest.raises(LeaseLost):
        collected(store, tmp_path, NOON + DAY, held=lambda: next(looks))
    assert not store.exists(manifest_key(PIPELINE, ids(nights)[0]))
    assert store.exists(f"{PIPELINE}/releases/{ids(nights)[0]}/run.json")
    assert len(list(store.list(f"{PIPELINE}/blobs/"))) == len(
        {file.sha256 for made in nights for file in made.manifest.files}
    )


def test_a_collector_that_may_not_delete_leaves_releases_that_can_be_counted_on(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ids(nights)[0]
    collected(store, tmp_path, NOON)
    marked = read_marks(store, PIPELINE)[0]

    def denied(key: str) -> None:
        raise StoreUnwritable(f"{key}: access denied")

    with monkeypatch.context() as rights:
        rights.setattr(store, "delete", denied)
        with pytest.raises(StoreUnwritable):
            collected(store, tmp_path, NOON + DAY)
    assert read_marks(store, PIPELINE)[0] == marked
    rollback(store, PIPELINE, first, "bad nights")
    assert resolve(store, PIPELINE, "champion") == first
    check_whole(store, nights[0].manifest)


class TestCountedOn:
    """Somebody counts on what is marked, before it goes, while it goes, and after."""

    def test_a_rollback_to_a_marked_release_takes_its_marks_off(
        self, store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
    ) -> None:
        first = ids(nights)[0]
        collected(store, tmp_path, NOON)
        rollback(store, PIPELINE, first, "bad nights")
        assert not read_marks(store, PIPELINE)[0].since.keys() & names_of(nights[0].manifest)
        assert release_name(first) not in collected(store, tmp_path, NOON + DAY).removed
        check_whole(store, nights[0].manifest)

    def test_a_rollback_between_a_collectors_look_and_its_marks_is_seen(
        self, store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
    ) -> None:
        """The collector has looked at the pointer and is about to remove; its swap is refused, and it looks again."""
        first = ids(nights)[0]
        collected(store, tmp_path, NOON)
        looks = iter([lambda: rollback(store, PIPELINE, first, "bad nights")])
        done = collected(store, tmp_path, NOON + DAY, held=lambda: next(looks, held)() and None)
        assert release_name(first) not in done.removed
        assert done.found.kept[first] == ("champion",)
        check_whole(store, nights[0].manifest)

    def test_a_rollback_to_a_release_that_is_being_removed_is_refused(
        self, store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
    ) -> None:
        first = ids(nights)[0]
        collected(store, tmp_path, NOON)
        asked = iter([held, lambda: rollback(store, PIPELINE, first, "bad nights")])
        with pytest.raises(ReleaseRefused, match="are being removed"):
            collected(store, tmp_path, NOON + DAY, held=lambda: next(asked)() and None)
        assert resolve(store, PIPELINE, "champion") == ids(nights)[3]

    def test_a_publisher_who_holds_the_lease_counts_on_what_a_dead_collector_was_removing(
        self, store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
    ) -> None:
        names = names_of(nights[0].manifest)
        store.swap(marks_key(PIPELINE), Marks({}, names | {blob_name("ef" * 32)}).serialise(), None)
        with pytest.raises(ReleaseRefused):
            spare(store, PIPELINE, names, leased=False)
        spare(store, PIPELINE, names, leased=True)
        assert read_marks(store, PIPELINE)[0] == Marks({}, frozenset({blob_name("ef" * 32)}))


def test_marks_that_were_changed_by_hand_are_refused(store: ObjectStore, tmp_path: Path) -> None:
    good = json.loads(Marks({"blobs/aa": NOON}).serialise())
    for odd in ({"since": {"blobs/aa": "soon"}}, {"since": {"blobs/aa": "2026-06-01"}}, {"removing": [1]}, {"more": 1}):
        with pytest.raises(ReleaseRefused, match=r"gc\.json"):
            Marks.parse(json.dumps(good | odd).encode())
    assert Marks.parse(json.dumps(good).encode()) == Marks({"blobs/aa": NOON})


class TestNames:
    """What a person may call a release."""

    def test_every_name_leads_to_the_release(self, store: ObjectStore, nights: tuple[Made, ...]) -> None:
        _, _, third, fourth = ids(nights)
        assert resolve(store, PIPELINE, fourth) == fourth
        assert resolve(store, PIPELINE, fourth[:6]) == fourth
        assert resolve(store, PIPELINE, "champion") == fourth
        assert resolve(store, PIPELINE, "previous") == third
        assert resolve(store, PIPELINE, str(NIGHT + 2 * DAY)) == third

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("challenger", "names no challenger"),
            ("2020-01-01", "night 2020-01-01 has no release"),
            ("0000", "fits no release"),
            ("abc", "give an id or its first digits"),
            ("latest", "give an id or its first digits"),
            ("../../x", "give an id or its first digits"),
        ],
    )
    def test_a_name_that_fits_nothing_says_what_would(self, store: ObjectStore, name: str, said: str) -> None:
        with pytest.raises(ObjectMissing, match=said):
            resolve(store, PIPELINE, name)

    def test_digits_that_fit_two_are_not_guessed_at(self, store: ObjectStore) -> None:
        for last in "01":
            store.put_if_absent(manifest_key(PIPELINE, "f" * 63 + last), b"{}")
        with pytest.raises(ObjectMissing, match="fits 2 releases"):
            resolve(store, PIPELINE, "f" * 63)


def test_a_release_that_lacks_a_blob_is_told_with_what_it_lacks(
    store: ObjectStore, nights: tuple[Made, ...], tmp_path: Path
) -> None:
    file = next(one for one in nights[3].manifest.files if one.name == "bank.bin")
    store.delete(blob_key(PIPELINE, file.sha256))
    assert find(store, PIPELINE, tmp_path, keep=9).torn == {nights[3].manifest.release: 1}
    with pytest.raises(ObjectCorrupt, match=r"lacks 1 of \d+ files: bank.bin \(absent, expected") as refused:
        check_whole(store, nights[3].manifest)
    assert "run its night again" in str(refused.value)
    store.put_if_absent(blob_key(PIPELINE, file.sha256), b"short")
    with pytest.raises(ObjectCorrupt, match="5 bytes, expected"):
        check_whole(store, nights[3].manifest)
