"""From one release to the next: what goes first, what is given up for a newer pointer, what is looked at once more."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import StoreUnavailable
from tasks.release.manifest import Manifest, Pointer, blob_key, manifest_key, pointer_key
from tasks.release.pointer import move, promote, read_pointer
from tasks.release.publishing import publish_release
from tasks.serving import following
from tasks.serving.events import Events
from tasks.serving.ranker import Ranker
from tests.releases import NIGHT, PIPELINE, Made, next_night
from tests.serving.test_refresher import SOON, eventually


class Heard(Events):
    """Which releases got a role, in order."""

    def __init__(self) -> None:
        self.swaps: list[tuple[str, str | None]] = []

    def swapped(self, role: str, manifest: Manifest | None, device: str, seconds: float) -> None:
        self.swaps.append((role, None if manifest is None else manifest.release))


class Trickle:
    """A release's own files begin to arrive, and never end."""

    def __init__(self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, made: Made, *others: Made) -> None:
        shared = {file.sha256 for other in others for file in other.manifest.files}
        self._keys = {blob_key(PIPELINE, file.sha256) for file in made.manifest.files if file.sha256 not in shared}
        assert self._keys
        self._real = store._stream
        self.began, self.given_up = threading.Event(), threading.Event()
        monkeypatch.setattr(store, "_stream", self._stream)

    def end(self) -> None:
        """From now on they arrive."""
        self._keys = set()

    def _stream(self, key: str) -> Iterator[bytes]:
        if key not in self._keys:
            yield from self._real(key)
            return
        limit = time.monotonic() + 20
        self.began.set()
        try:
            while time.monotonic() < limit:
                yield b""
                time.sleep(0.001)
        except GeneratorExit:
            self.given_up.set()
            raise
        raise StoreUnavailable("the fetch was never given up")


@pytest.fixture(scope="module")
def third(tonight: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return next_night(tonight, tmp_path_factory.mktemp("third") / "release", NIGHT + timedelta(days=2), seed=7)


def point(store: ObjectStore, made: Made) -> None:
    promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1, force=True)


def publish(store: ObjectStore, *made: Made) -> None:
    for one in made:
        publish_release(store, PIPELINE, one.folder, one.manifest, {})


def test_a_champion_that_is_on_its_way_is_given_up_for_a_rollback_and_counts_as_no_bad_release(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(store, tomorrow)
    heard, slow = Heard(), Trickle(store, monkeypatch, tomorrow, tonight)
    with Ranker(store, PIPELINE, cache=tmp_path / "cache", refresh_every=SOON, events=heard) as ranker:
        point(store, tomorrow)
        assert slow.began.wait(20)
        point(store, tonight)
        assert slow.given_up.wait(10)
        eventually(lambda: ranker.generation == 3)
        assert (ranker.release, ranker.refusal) == (tonight.manifest.release, None)
        assert heard.swaps == [("champion", tonight.manifest.release)]
        slow.end()
        point(store, tomorrow)
        eventually(lambda: ranker.release == tomorrow.manifest.release)
        assert (ranker.generation, ranker.warnings) == (4, ())


def test_a_refresh_by_hand_gives_up_as_a_thread_does(
    store: ObjectStore, tonight: Made, tomorrow: Made, monkeypatch: pytest.MonkeyPatch
):
    publish(store, tomorrow)
    monkeypatch.setattr(following, "LOOK_S", SOON)
    slow, told = Trickle(store, monkeypatch, tomorrow, tonight), []
    with Ranker(store, PIPELINE) as ranker:
        point(store, tomorrow)
        thread = threading.Thread(target=lambda: told.append(ranker.refresh()))
        thread.start()
        assert slow.began.wait(20)
        point(store, tonight)
        thread.join(10)
        assert told == [False]
        assert slow.given_up.is_set()
        assert (ranker.release, ranker.generation, ranker.refusal) == (tonight.manifest.release, 3, None)


def test_the_champion_does_not_wait_for_its_challenger_and_a_rollback_for_neither(
    store: ObjectStore, tonight: Made, tomorrow: Made, third: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(store, tomorrow, third)
    slow = Trickle(store, monkeypatch, third, tonight, tomorrow)

    def both(now: Pointer) -> Pointer:
        champion = tomorrow.manifest
        named = {"release": champion.release, "night": champion.night, "previous": now.release}
        return replace(now, **named, challenger=third.manifest.release, share=5_000)

    with Ranker(store, PIPELINE, cache=tmp_path / "cache", refresh_every=SOON) as ranker:
        move(store, PIPELINE, both, "a try", "challenger")
        assert slow.began.wait(20)
        eventually(lambda: ranker.release == tomorrow.manifest.release, 10)
        assert (ranker.generation, ranker.challenger, ranker.refusal) == (2, None, None)
        assert not slow.given_up.is_set()
        point(store, tonight)
        eventually(lambda: ranker.release == tonight.manifest.release, 10)
        assert slow.given_up.is_set()
        assert ranker.warnings == ()
        slow.end()
        move(store, PIPELINE, both, "a try", "challenger")
        eventually(lambda: (ranker.release, ranker.challenger) == (tomorrow.manifest.release, third.manifest.release))
        assert ranker.warnings == ()


def test_files_that_are_fetched_ahead_are_given_up_for_a_pointer_that_moves(
    store: ObjectStore, tonight: Made, tomorrow: Made, third: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(store, tomorrow, third)
    point(store, tomorrow)
    slow = Trickle(store, monkeypatch, tonight, tomorrow, third)
    with Ranker(store, PIPELINE, cache=tmp_path / "cache", refresh_every=SOON) as ranker:
        assert slow.began.wait(20)
        point(store, third)
        eventually(lambda: ranker.release == third.manifest.release, 10)
        assert slow.given_up.is_set()
        assert ranker.warnings == ()


def test_a_pointer_that_moves_behind_the_last_file_is_seen_before_the_swap(
    store: ObjectStore, tonight: Made, tomorrow: Made, monkeypatch: pytest.MonkeyPatch
):
    publish(store, tomorrow)
    monkeypatch.setattr(following, "LOOK_S", 1e9)  # nobody looks while files arrive
    heard, real = Heard(), store.download
    with Ranker(store, PIPELINE, events=heard) as ranker:
        point(store, tomorrow)
        back = iter([lambda: point(store, tonight)])
        monkeypatch.setattr(store, "download", lambda *rest: (real(*rest), next(back, lambda: None)()))
        assert not ranker.refresh()
        assert next(back, None) is None
        assert (ranker.generation, ranker.refusal) == (3, None)
        assert heard.swaps == [("champion", tonight.manifest.release)]


def test_a_champion_is_not_loaded_twice_because_a_challenger_is_named_meanwhile(
    store: ObjectStore, tonight: Made, tomorrow: Made, third: Made, monkeypatch: pytest.MonkeyPatch
):
    publish(store, tomorrow, third)
    monkeypatch.setattr(following, "LOOK_S", 1e-9)
    heard, real = Heard(), store.download
    with Ranker(store, PIPELINE, events=heard) as ranker:
        point(store, tomorrow)
        rival = third.manifest.release
        named = iter([lambda: move(store, PIPELINE, lambda now: replace(now, challenger=rival, share=1), "a", "b")])
        monkeypatch.setattr(store, "download", lambda *rest: (real(*rest), next(named, lambda: None)()))
        load, loaded = ranker._source.load, []

        def noted(release: str, *rest: object, **more: object) -> object:
            loaded.append(release)
            return load(release, *rest, **more)

        monkeypatch.setattr(ranker._source, "load", noted)
        assert ranker.refresh()
        assert (ranker.generation, ranker.release, ranker.refusal) == (2, tomorrow.manifest.release, None)
        ranker.refresh()
        assert (ranker.generation, ranker.challenger) == (3, rival)
    assert loaded == [tomorrow.manifest.release, rival]


def test_a_pointer_that_moves_faster_than_releases_load_is_followed_all_the_same(
    store: ObjectStore, tonight: Made, tomorrow: Made, third: Made, monkeypatch: pytest.MonkeyPatch
):
    publish(store, tomorrow, third)
    with Ranker(store, PIPELINE) as ranker:
        point(store, tomorrow)
        load, loaded, moves = ranker._source.load, [], iter([third, tomorrow, third, tomorrow, tonight])

        def overtaken(release: str, *rest: object, **more: object) -> object:
            found = load(release, *rest, **more)
            loaded.append(release)
            point(store, next(moves))
            return found

        monkeypatch.setattr(ranker._source, "load", overtaken)
        assert ranker.refresh()
        assert (ranker.release, ranker.generation) == (third.manifest.release, 3)
        assert loaded == [tomorrow.manifest.release, third.manifest.release]


def test_a_pointer_that_cannot_be_read_while_files_arrive_stops_nothing(
    store: ObjectStore, tomorrow: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    publish(store, tomorrow)
    monkeypatch.setattr(following, "LOOK_S", 1e-9)
    real, looks = store.find, []

    def once(key: str, most: int | None = None) -> object:
        looks.append(key)
        if key == pointer_key(PIPELINE) and looks.count(key) > 1:
            raise StoreUnavailable("no answer in 25 s")
        return real(key, most)

    with Ranker(store, PIPELINE) as ranker:
        point(store, tomorrow)
        monkeypatch.setattr(store, "find", once)
        assert ranker.refresh()
        assert ranker.refusal is None
    assert looks.count(pointer_key(PIPELINE)) > 2
    assert "whether the pointer has moved meanwhile is unknown: no answer in 25 s" in caplog.text


class Queue:
    """A lock that says when somebody comes to wait for it."""

    def __init__(self) -> None:
        self._lock, self.waited_for = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waited_for.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_refresh_that_waited_for_a_poll_of_a_silent_store_does_not_wait_again(
    store: ObjectStore, tomorrow: Made, monkeypatch: pytest.MonkeyPatch
):
    publish(store, tomorrow)
    hangs, asked = threading.Event(), []
    with Ranker(store, PIPELINE) as ranker:
        queue = ranker._follower._refreshing = Queue()

        def silent(key: str, most: int | None = None) -> object:
            asked.append(key)
            hangs.set()
            assert queue.waited_for.wait(20)
            raise StoreUnavailable("no answer in 25 s")

        with monkeypatch.context() as patch:
            patch.setattr(store, "find", silent)
            poll = threading.Thread(target=ranker._follower.poll)
            poll.start()
            assert hangs.wait(20)
            assert not ranker.refresh()
            poll.join()
        assert len(asked) == 1
        assert "no answer in 25 s" in (ranker.refusal or "")
        point(store, tomorrow)
        assert ranker.refresh()  # which begins after it


@pytest.mark.parametrize("refused", [False, True])
def test_a_refresh_that_waited_for_a_poll_that_had_its_answer_looks_for_itself(
    store: ObjectStore, tomorrow: Made, third: Made, monkeypatch: pytest.MonkeyPatch, refused: bool
):
    """Its answer may be older than the pointer that the caller has just moved."""
    publish(store, tomorrow, third)
    real, read = store.find, threading.Event()
    with Ranker(store, PIPELINE) as ranker:
        queue = ranker._follower._refreshing = Queue()
        if refused:
            point(store, third)
            store.delete(manifest_key(PIPELINE, third.manifest.release))

        def slow(key: str, most: int | None = None) -> object:
            found = real(key, most)
            read.set()
            assert queue.waited_for.wait(20)
            return found

        monkeypatch.setattr(store, "find", slow)
        poll = threading.Thread(target=ranker._follower.poll)
        poll.start()
        assert read.wait(20)
        point(open_store(store.url), tomorrow)
        assert ranker.refresh()
        assert (ranker.release, ranker.refusal) == (tomorrow.manifest.release, None)
        poll.join()


def test_a_generation_that_names_another_release_than_it_did_is_refused(
    store: ObjectStore, tonight: Made, tomorrow: Made
):
    publish(store, tomorrow)
    with Ranker(store, PIPELINE) as ranker:
        pointer = read_pointer(store, PIPELINE)
        assert pointer is not None
        other = replace(pointer, release=tomorrow.manifest.release, night=tomorrow.manifest.night)
        key = pointer_key(PIPELINE)
        store.swap(key, other.serialise(), store.get(key).etag)
        assert not ranker.refresh()
        assert (ranker.release, ranker.generation) == (tonight.manifest.release, 1)
        named, was = other.release[:12], tonight.manifest.release[:12]
        assert f"names release {named} in generation 1, which named {was}; promote {was}, then" in (
            ranker.refusal or ""
        )
        point(store, tomorrow)  # which it names already
        assert not ranker.refresh()
        point(store, tonight)
        assert not ranker.refresh()
        assert (ranker.generation, ranker.refusal) == (2, None)
        point(store, tomorrow)
        assert ranker.refresh()
