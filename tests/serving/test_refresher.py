"""The background refresh: it follows the pointer, survives anything, is patient with bad releases, and ends."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore
from tasks.errors import InvalidConfig, NoRelease, StoreUnavailable
from tasks.release.manifest import manifest_key
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.serving import refresher as refreshers
from tasks.serving.ranker import Ranker
from tasks.serving.refresher import Patience, Refresher
from tests.releases import NIGHT, PIPELINE, Made

SOON = 0.02


def eventually(true: Callable[[], object], limit_s: float = 60.0) -> None:
    """Wait until it is; what never comes fails."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


class Polled:
    def __init__(self, then: Callable[[int], object] = lambda _: None) -> None:
        self.times: list[float] = []
        self._then = then

    def poll(self) -> None:
        self.times.append(time.monotonic())
        self._then(len(self.times))


def test_it_polls_until_it_is_stopped_and_survives_whatever_is_raised(caplog: pytest.LogCaptureFixture):
    def fails(turn: int) -> None:
        if turn < 3:
            raise StoreUnavailable("no answer") if turn == 1 else ZeroDivisionError

    polled = Polled(fails)
    refresher = Refresher(polled.poll, SOON)
    eventually(lambda: len(polled.times) >= 5)
    assert "a poll for new releases failed" in caplog.text
    refresher.stop()
    assert not refresher.alive
    count = len(polled.times)
    time.sleep(5 * SOON)
    assert len(polled.times) == count


def test_polls_are_spread_by_the_jitter():
    waits = [refreshers.jittered(30.0) for _ in range(400)]
    assert min(waits) >= 24
    assert max(waits) <= 36
    assert max(waits) - min(waits) > 9
    assert sum(waits) / len(waits) == pytest.approx(30, abs=1)


def test_a_closed_or_forgotten_object_ends_the_thread():
    def closed(turn: int) -> None:
        if turn == 2:
            raise NoRelease("closed")

    refresher = Refresher(Polled(closed).poll, SOON)  # nobody else holds it
    gc.collect()
    eventually(lambda: not refresher.alive)
    polled = Polled(closed)
    refresher = Refresher(polled.poll, SOON)
    eventually(lambda: not refresher.alive)
    assert len(polled.times) == 2


@pytest.mark.parametrize("every", [0.0, -1.0, float("nan"), float("inf")])
def test_an_interval_that_is_none_is_refused(every: float):
    with pytest.raises(InvalidConfig, match="refresh_every is"):
        Refresher(Polled().poll, every)


def test_what_is_refused_again_and_again_is_tried_less_and_less_often(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(refreshers.time, "monotonic", lambda: now[0])
    patience, tried = Patience(30.0), []
    for second in range(0, 4000, 5):
        now[0] = float(second)
        if patience.due("bad"):
            tried.append(second)
            patience.refused("bad")
    assert tried == [0, 30, 90, 210, 450, 930, 1530, 2130, 2730, 3330, 3930]
    assert patience.due("another")
    patience.refused("another")
    now[0] += 30
    assert patience.due("another")


def test_a_ranker_follows_the_pointer_by_itself_and_has_the_release_before_at_hand(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
    promote(store, PIPELINE, tomorrow.manifest.release, tomorrow.manifest.night, token=1)
    before = threading.active_count()
    with Ranker(store, PIPELINE, cache=tmp_path / "cache", refresh_every=SOON) as ranker:
        assert ranker.release == tomorrow.manifest.release
        kept = tmp_path / "cache/releases" / tonight.manifest.release / "cpu-fp32/golden.json"
        eventually(kept.is_file)  # it has never served here
        with monkeypatch.context() as patch:
            patch.setattr(store, "download", lambda *_: pytest.fail("fetched for a rollback"))
            promote(store, PIPELINE, tonight.manifest.release, NIGHT, token=1, force=True)
            eventually(lambda: ranker.release == tonight.manifest.release)
        assert (ranker.refusal, ranker.generation) == (None, 3)
    assert threading.active_count() == before
    with pytest.raises(NoRelease, match="closed"):
        ranker.score({})


def test_a_bad_release_is_not_fetched_at_every_poll_and_what_follows_it_is_at_once(
    store: ObjectStore, tonight: Made, tomorrow: Made, monkeypatch: pytest.MonkeyPatch
):
    publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
    key = manifest_key(PIPELINE, tomorrow.manifest.release)
    manifest, looked = store.get(key).data, []
    real = store.find
    monkeypatch.setattr(store, "find", lambda key, most=None: looked.append(key) or real(key, most))
    with Ranker(store, PIPELINE, refresh_every=SOON) as ranker:
        promote(store, PIPELINE, tomorrow.manifest.release, tomorrow.manifest.night, token=1)
        store.delete(key)
        eventually(lambda: ranker.refusal)
        looked.clear()
        eventually(lambda: len([one for one in looked if one.endswith("current.json")]) >= 40)
        assert 1 <= len([one for one in looked if one == key]) <= 14  # after 20, 40, 80, 160 ms and so on
        assert "has no manifest" in (ranker.refusal or "")
        assert ranker.warnings == (ranker.refusal,)
        promote(store, PIPELINE, tonight.manifest.release, NIGHT, token=1, force=True)
        eventually(lambda: ranker.refusal is None)
        assert store.put_if_absent(key, manifest)
        promote(store, PIPELINE, tomorrow.manifest.release, tomorrow.manifest.night, token=1)
        eventually(lambda: ranker.release == tomorrow.manifest.release)


def test_files_that_could_not_be_fetched_ahead_are_fetched_at_a_later_poll(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
    promote(store, PIPELINE, tomorrow.manifest.release, tomorrow.manifest.night, token=1)
    key, real, tries = manifest_key(PIPELINE, tonight.manifest.release), store.find, []

    def ailing(wanted: str, most: int | None = None) -> object:
        if wanted == key:
            tries.append(wanted)
            raise StoreUnavailable("no answer in 25 s")
        return real(wanted, most)

    with Ranker(store, PIPELINE, cache=tmp_path / "cache", refresh_every=SOON) as ranker:
        with monkeypatch.context() as patch:
            patch.setattr(store, "find", ailing)
            eventually(lambda: len(tries) >= 3)
            eventually(lambda: ranker.warnings)
            assert "kept at hand: StoreUnavailable: no answer in 25 s" in ranker.warnings[0]
            assert ranker.refusal is None
        kept = tmp_path / "cache/releases" / tonight.manifest.release / "cpu-fp32/golden.json"
        eventually(kept.is_file)
        eventually(lambda: not ranker.warnings)


def test_a_ranker_that_nobody_holds_ends_its_thread(store: ObjectStore):
    before = threading.active_count()
    ranker = Ranker(store, PIPELINE, refresh_every=SOON)
    gone = weakref.ref(ranker._follower)
    del ranker
    gc.collect()
    eventually(lambda: gone() is None)
    eventually(lambda: threading.active_count() == before)


def test_closing_does_not_wait_for_a_store_that_hangs(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    hangs, let_go = threading.Event(), threading.Event()
    ranker = Ranker(store, PIPELINE, refresh_every=SOON)

    def hang(*_: object) -> None:
        hangs.set()
        let_go.wait()
        raise StoreUnavailable("no answer in 25 s")

    monkeypatch.setattr(store, "find", hang)
    assert hangs.wait(60)
    ranker.close()  # returns although the poll has not
    assert ranker._refresher is not None
    assert ranker._refresher.alive
    let_go.set()
    eventually(lambda: not ranker._refresher.alive)
