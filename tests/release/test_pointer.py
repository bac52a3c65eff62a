"""Publishing and promoting: what is visible when, and who wins."""

import hashlib
import json
import shutil
import threading
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import (
    Conflict,
    InvalidConfig,
    NoRelease,
    ObjectCorrupt,
    ObjectMissing,
    OutcomeUnknown,
    PointerMoved,
    ReleaseRefused,
    StoreUnavailable,
)
from tasks.release.manifest import Pointer, ReleaseFile, blob_key, manifest_key, pointer_key
from tasks.release.pointer import move, promote, read_pointer
from tasks.release.publishing import publish_release, read_manifest
from tests.releases import NIGHT, PIPELINE, Made, next_night

EXTRA = {"run.json": b"{}", "report.html": b"<html>", "data_docs/index.html": b"<html>"}
BESIDE = tuple(
    ReleaseFile(name, len(EXTRA[name]), hashlib.sha256(EXTRA[name]).hexdigest()) for name in ("report.html", "run.json")
)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    (tmp_path / "store").mkdir()
    return open_store(str(tmp_path / "store"))


@pytest.fixture(scope="session")
def later(full: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The release of the night after."""
    return next_night(full, tmp_path_factory.mktemp("later") / "release", NIGHT + timedelta(days=1))


def publish(store: ObjectStore, made: Made, **extra: bytes) -> str:
    return publish_release(store, PIPELINE, made.folder, made.manifest, EXTRA | extra).release


def ledger(store: ObjectStore) -> list[dict[str, object]]:
    return [json.loads(store.get(key).data) for key in store.list(f"{PIPELINE}/ledger/")]


def test_a_published_release_has_every_blob_and_its_manifest(store: ObjectStore, full: Made):
    published = publish_release(store, PIPELINE, full.folder, full.manifest, EXTRA)
    assert published.new
    assert set(published.written) == {file.name for file in full.manifest.files}
    for file in full.manifest.files:
        assert store.get(blob_key(PIPELINE, file.sha256)).data == (full.folder / file.name).read_bytes()
    assert read_manifest(store, PIPELINE, published.release) == replace(full.manifest, beside=BESIDE)
    assert store.get(f"{PIPELINE}/releases/{published.release}/report.html").data == b"<html>"
    assert read_pointer(store, PIPELINE) is None


def test_publishing_again_changes_nothing_and_the_first_report_stays(store: ObjectStore, full: Made):
    publish(store, full)
    before = {key: store.get(key).data for key in store.list(PIPELINE)}
    again = publish_release(
        store, PIPELINE, full.folder, replace(full.manifest, metrics={"log_loss": 0.1}), {"run.json": b"[1]"}
    )
    assert (again.new, again.written) == (False, ())
    assert {key: store.get(key).data for key in store.list(PIPELINE)} == before


def test_unchanged_parts_are_shared_with_the_night_before(store: ObjectStore, full: Made, later: Made):
    publish(store, full)
    second = publish_release(store, PIPELINE, later.folder, later.manifest, EXTRA)
    assert set(second.written) == {"bank.bin", "golden.json", "interface.json"}
    assert {"model.onnx", "base.bin", "statistics.bin"} <= set(second.reused)


def test_a_publish_that_dies_anywhere_is_invisible_and_is_finished_by_doing_it_again(store: ObjectStore, full: Made):
    writes = len(full.manifest.files) + len(EXTRA) + 1
    for survives in range(writes):
        left = iter(range(survives))

        def dies(call, left=left):
            def write(*args, **kwargs):
                if next(left, None) is None:
                    raise StoreUnavailable("the store went away")
                return call(*args, **kwargs)

            return write

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "put_if_absent", dies(store.put_if_absent))
            patch.setattr(store, "put_file_if_absent", dies(store.put_file_if_absent))
            with pytest.raises(StoreUnavailable):
                publish(store, full)
        with pytest.raises(ObjectMissing, match="publish it first"):
            read_manifest(store, PIPELINE, full.manifest.release)
    assert publish(store, full) == full.manifest.release
    assert read_manifest(store, PIPELINE, full.manifest.release) == replace(full.manifest, beside=BESIDE)


def test_a_folder_that_changed_since_it_was_described_is_not_published(store: ObjectStore, full: Made, tmp_path: Path):
    folder = tmp_path / "release"
    shutil.copytree(full.folder, folder)
    (folder / "bank.bin").write_bytes(b"0" * full.bank.nbytes)
    with pytest.raises(ObjectCorrupt, match=r"bank\.bin"):
        publish_release(store, PIPELINE, folder, full.manifest, EXTRA)
    assert not list(store.list(PIPELINE))


def test_a_torn_blob_in_the_store_stops_the_publish(store: ObjectStore, full: Made):
    store.put_if_absent(blob_key(PIPELINE, full.manifest.files[0].sha256), b"torn")
    with pytest.raises(ObjectCorrupt, match="4 bytes"):
        publish(store, full)
    assert not store.exists(manifest_key(PIPELINE, full.manifest.release))


def test_a_manifest_that_readers_would_refuse_is_not_published(store: ObjectStore, full: Made):
    with pytest.raises(ReleaseRefused):
        publish_release(store, PIPELINE, full.folder, replace(full.manifest, release="0" * 64), EXTRA)
    assert not list(store.list(PIPELINE))


def test_promoting_names_the_champion_and_the_one_before(store: ObjectStore, full: Made, later: Made):
    publish(store, full), publish(store, later)
    first = promote(store, PIPELINE, full.manifest.release, full.manifest.night, token=1)
    second = promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=2, reason="gate: go")
    assert (first.generation, first.previous) == (1, None)
    assert (second.generation, second.previous, second.fencing_token) == (2, full.manifest.release, 2)
    assert read_pointer(store, PIPELINE) == second
    assert [json.loads(entry["pointer"])["reason"] for entry in ledger(store)] == ["promoted", "gate: go"]


def test_promoting_twice_changes_nothing(store: ObjectStore, full: Made):
    publish(store, full)
    first = promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    assert promote(store, PIPELINE, full.manifest.release, NIGHT, token=7) == first
    assert len(ledger(store)) == 1


def test_a_ledger_entry_that_a_crash_lost_is_made_up_for(store: ObjectStore, full: Made):
    publish(store, full)
    promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    (entry,) = ledger(store)
    (key,) = store.list(f"{PIPELINE}/ledger/")
    store.delete(key)
    promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    assert ledger(store) == [entry]


def test_the_pointer_moves_to_an_earlier_night_only_with_force(store: ObjectStore, full: Made, later: Made):
    publish(store, full), publish(store, later)
    champion = promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=1)
    with pytest.raises(PointerMoved, match=r"of night 2026-03-02, later than 2026-03-01.*force"):
        promote(store, PIPELINE, full.manifest.release, NIGHT, token=2)
    assert read_pointer(store, PIPELINE) == champion
    back = promote(store, PIPELINE, full.manifest.release, NIGHT, token=2, force=True, reason="rollback")
    assert (back.generation, back.release, back.previous) == (2, full.manifest.release, later.manifest.release)


@pytest.mark.parametrize("force", [False, True])
def test_a_run_whose_lease_was_taken_over_cannot_move_the_pointer(
    store: ObjectStore, full: Made, later: Made, force: bool
):
    publish(store, full), publish(store, later)
    promote(store, PIPELINE, full.manifest.release, NIGHT, token=5)
    with pytest.raises(PointerMoved, match="lease token 5, this run holds 4"):
        promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=4, force=force)


def test_what_was_never_published_or_is_of_another_night_is_not_promoted(store: ObjectStore, full: Made):
    with pytest.raises(ObjectMissing):
        promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    publish(store, full)
    with pytest.raises(ReleaseRefused, match="of night 2026-03-01, not 2026-03-02"):
        promote(store, PIPELINE, full.manifest.release, date(2026, 3, 2), token=1)
    assert read_pointer(store, PIPELINE) is None


def race(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, rival: Pointer | None) -> None:
    """Let a rival move the pointer (or remove it) just before the next swap."""
    swap, find = store.swap, store.find

    def late(key: str, data: bytes, etag: str | None) -> str:
        monkeypatch.setattr(store, "swap", swap)
        now = find(pointer_key(PIPELINE))
        if rival is None:
            store.delete(key)
        else:
            swap(key, rival.serialise(), now.etag if now else None)
        return swap(key, data, etag)

    monkeypatch.setattr(store, "swap", late)


def test_a_lost_race_says_who_won(store: ObjectStore, full: Made, later: Made, monkeypatch: pytest.MonkeyPatch):
    publish(store, full), publish(store, later)
    rival = Pointer(full.manifest.release, NIGHT, 1, None, 1, "2026-03-02T00:00:00.000000+00:00", "rival")
    race(store, monkeypatch, rival)
    with pytest.raises(PointerMoved, match="moved by somebody else") as caught:
        promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=1)
    assert full.manifest.release[:12] in str(caught.value)
    assert read_pointer(store, PIPELINE) == rival
    assert not ledger(store)


def test_a_move_is_known_by_itself_and_not_by_the_release_that_it_names(
    store: ObjectStore, full: Made, monkeypatch: pytest.MonkeyPatch
):
    """One move, one winner: what a twin did is his, and asking again finds the pointer where it is meant to be."""
    publish(store, full)
    twin = Pointer(full.manifest.release, NIGHT, 1, None, 3, "2026-03-02T00:00:00.000000+00:00", "twin")
    race(store, monkeypatch, twin)
    with pytest.raises(PointerMoved, match="moved by somebody else"):
        promote(store, PIPELINE, full.manifest.release, NIGHT, token=3)
    assert promote(store, PIPELINE, full.manifest.release, NIGHT, token=3) == twin


@pytest.mark.parametrize("held", [False, True])
def test_a_move_whose_answer_was_lost_and_that_is_refused_on_the_second_try_is_won(
    store: ObjectStore, full: Made, later: Made, monkeypatch: pytest.MonkeyPatch, held: bool
):
    """What an HTTP client does that repeats a request whose answer it did not get."""
    publish(store, full), publish(store, later)
    first = promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    if held:
        first = move(store, PIPELINE, lambda now: replace(now, hold="look at it"), "look", "hold")
    swap = store.swap

    def twice(key: str, data: bytes, etag: str | None) -> str:
        swap(key, data, etag)
        raise Conflict("the object is another one")

    monkeypatch.setattr(store, "swap", twice)
    told = {"by_operator": True, "move_id": "a" * 32} if held else {}
    moved = promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=1, **told)
    assert moved == read_pointer(store, PIPELINE)
    assert (moved.generation, moved.release) == (first.generation + 1, later.manifest.release)
    assert moved.move_id == ("a" * 32 if held else None)


def test_a_move_that_nobody_answered_is_judged_by_the_pointer_as_it_stands(
    store: ObjectStore, full: Made, later: Made, monkeypatch: pytest.MonkeyPatch
):
    """Made; beaten, since of one generation there is one move; or unknown, since it may still arrive."""
    publish(store, full), publish(store, later)
    swap, ahead = store.swap, [None]

    def unanswered(key: str, data: bytes, etag: str | None) -> str:
        if ahead[0] is not None:
            swap(key, ahead[0], etag)
        raise OutcomeUnknown("no answer")

    monkeypatch.setattr(store, "swap", unanswered)

    def moved() -> Pointer:
        return promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=1)

    with pytest.raises(OutcomeUnknown):
        moved()
    with monkeypatch.context() as patch:
        patch.setattr(store, "swap", lambda key, data, etag: (swap(key, data, etag), unanswered(key, data, etag)))
        won = moved()
    assert (won, won.generation) == (read_pointer(store, PIPELINE), 1)
    promote_back = replace(won, release=full.manifest.release, night=NIGHT, generation=2, reason="rival")
    ahead[0] = promote_back.serialise()
    with pytest.raises(PointerMoved, match="moved by somebody else"):
        promote(store, PIPELINE, full.manifest.release, NIGHT, token=1, force=True)
    assert read_pointer(store, PIPELINE) == promote_back


class TestOperator:
    """Moves by hand: hold, challenger, rollback."""

    @pytest.fixture
    def first(self, store: ObjectStore, full: Made, later: Made) -> Pointer:
        publish(store, full), publish(store, later)
        return promote(store, PIPELINE, full.manifest.release, NIGHT, token=7)

    def test_a_held_pointer_is_moved_by_no_night(self, store: ObjectStore, later: Made, first: Pointer):
        held = move(store, PIPELINE, lambda now: replace(now, hold="sale"), "it is black Friday", "hold")
        assert (held.generation, held.hold, held.fencing_token, held.release) == (2, "sale", 7, first.release)
        with pytest.raises(PointerMoved, match=r"is held \(sale\).*unhold"):
            promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=8)
        moved = promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=8, by_operator=True)
        assert (moved.release, moved.hold, moved.generation) == (later.manifest.release, "sale", 3)
        free = move(store, PIPELINE, lambda now: replace(now, hold=None), "over", "unhold")
        assert (free.schema_version, free.generation, free.previous) == (1, 4, first.release)
        assert read_pointer(store, PIPELINE) == free
        assert [entry["what"] for entry in ledger(store)] == ["promote", "hold", "promote", "unhold"]

    def test_a_night_that_began_before_refuses_its_own_move(self, store: ObjectStore, later: Made, first: Pointer):
        move(store, PIPELINE, lambda now: replace(now, challenger=later.manifest.release), "try", "challenger")
        with pytest.raises(PointerMoved, match="had generation 1 when this run began"):
            promote(*(store, PIPELINE, later.manifest.release, later.manifest.night, 8), expected=first.generation)

    def test_a_challenger_stays_until_it_is_promoted(self, store: ObjectStore, full: Made, later: Made, first: Pointer):
        told = {"challenger": later.manifest.release, "share": 500}
        tried = move(store, PIPELINE, lambda now: replace(now, **told), "try", "challenger")
        assert (tried.challenger, tried.share, tried.schema_version) == (later.manifest.release, 500, 2)
        assert tried.previous is None
        again = replace(full.manifest, provenance={"seed": "other"})
        assert again.release == full.manifest.release
        promoted = promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=8)
        assert (promoted.challenger, promoted.share, promoted.generation) == (None, 0, 3)
        back = move(
            *(store, PIPELINE, lambda now: replace(now, release=full.manifest.release, night=NIGHT), "bad", "rollback")
        )
        assert (back.release, back.previous, back.fencing_token) == (first.release, promoted.release, 8)

    def test_what_cannot_be_is_refused_before_anything_is_written(
        self, store: ObjectStore, later: Made, first: Pointer
    ):
        wrong = [
            (lambda now: replace(now, challenger=now.release), InvalidConfig, "is its champion"),
            (lambda now: replace(now, challenger=later.manifest.release, share=10_001), InvalidConfig, "limit 10000"),
            (lambda now: replace(now, share=1), InvalidConfig, "no challenger"),
            (lambda now: replace(now, hold="x" * 4001), InvalidConfig, "limit 4000"),
            (lambda now: replace(now, challenger="e" * 64), ObjectMissing, "publish it first"),
            (lambda now: replace(now, release="e" * 64), ObjectMissing, "publish it first"),
            (lambda now: replace(now, release=later.manifest.release), ReleaseRefused, "is of night 2026-03-02"),
        ]
        for change, error, told in wrong:
            with pytest.raises(error, match=told):
                move(store, PIPELINE, change, "why", "test")
        assert move(store, PIPELINE, lambda now: now, "why", "test") == first
        assert read_pointer(store, PIPELINE) == first
        assert len(ledger(store)) == 1

    def test_without_a_champion_there_is_nothing_to_move(self, store: ObjectStore):
        with pytest.raises(NoRelease, match="promote a release first"):
            move(store, PIPELINE, lambda now: now, "why", "test")


def test_a_pointer_that_vanished_meanwhile_is_a_lost_race(
    store: ObjectStore, full: Made, later: Made, monkeypatch: pytest.MonkeyPatch
):
    publish(store, full), publish(store, later)
    promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    race(store, monkeypatch, None)
    with pytest.raises(PointerMoved, match="vanished"):
        promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=1)


def test_of_many_at_once_one_moves_the_pointer_from_each_generation(store: ObjectStore, full: Made, later: Made):
    publish(store, full), publish(store, later)
    outcomes: list[str] = []

    def one(made: Made) -> None:
        try:
            promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1)
            outcomes.append("won")
        except PointerMoved:
            outcomes.append("lost")

    threads = [threading.Thread(target=one, args=(made,)) for made in [full, later] * 8]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(outcomes) == 16
    champion = read_pointer(store, PIPELINE)
    assert champion is not None
    assert champion.release in (full.manifest.release, later.manifest.release)
    assert len(ledger(store)) == champion.generation <= 2


def test_a_damaged_pointer_stops_promotion(store: ObjectStore, full: Made):
    publish(store, full)
    store.put_if_absent(pointer_key(PIPELINE), b"{}")
    with pytest.raises(ReleaseRefused, match="pointer"):
        promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)


def test_a_manifest_under_another_id_is_not_read(store: ObjectStore, full: Made):
    other = "1" * 64
    store.put_if_absent(manifest_key(PIPELINE, other), full.manifest.serialise())
    with pytest.raises(ReleaseRefused):
        read_manifest(store, PIPELINE, other)
