"""Operators and the collector beside a night that runs: who wins, what is left, and that rankers see whole releases."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli
from flows.backfill import plan
from flows.config import RetrainConfig
from tasks.clients.directory_store import DirectoryStore
from tasks.clients.lease import Lease
from tasks.clients.object_store import ObjectStore
from tasks.errors import ObjectMissing
from tasks.release.garbage import Collected, collect
from tasks.release.manifest import manifest_key
from tasks.release.moves import rollback, unhold
from tasks.release.pointer import read_pointer
from tasks.release.published import check_whole, folders, stored_manifest
from tasks.serving.ranker import Ranker
from tests.faults.test_kill import (
    PIPELINE,
    Ready,
    assert_done_once,
    assert_no_reader_sees_a_part,
    ledger_of,
    store_of,
)
from tests.faults.victims import Nursery, Trap, moved, pipes
from tests.faults.warm import ROOT
from tests.finished import Finished
from tests.steps.plain import plain_night

MANIFEST = "^tiny/releases/.*/manifest.json$"
AT_ONCE = timedelta(0)


@pytest.fixture(scope="module")
def ready(finished: Finished, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """A pipeline before the first blob of its next night, and after it."""
    folder = tmp_path_factory.mktemp("life")
    tree = finished.copy(folder / "world").world.config
    config = {**tree, "gate": {**tree["gate"], "when_unsure": "promote", "margin": 10.0}}
    trap = Trap("before", "^tiny/blobs/", wait=pipes(folder / "pipes"))
    running = nursery.start(config, finished.next_night, trap)
    go = running.reached()
    moved(config, folder / "world", folder / "exported")
    go()
    undisturbed = running.end()
    return Ready(
        *(nursery, finished, finished.pointer, ledger_of(finished.store)),
        *(config, folder / "world", folder / "exported", undisturbed),
    )


def collected(store: ObjectStore, scratch: Path, **more: Any) -> Collected:
    """A collector's run in this process, under a lease of its own."""
    with Lease(store, f"{PIPELINE}/lease", "collector", term_seconds=2.0) as lease:
        given = {"keep": 1, "grace": AT_ONCE, "now": datetime.now(UTC), "held": lease.held}
        return collect(store, PIPELINE, scratch, **(given | more))


class TestRollback:
    """An operator moves the pointer while a night is about to."""

    def test_a_night_that_began_before_a_rollback_refuses_its_own_move(self, ready: Ready, tmp_path: Path) -> None:
        config = moved(ready.config, ready.exported, tmp_path)
        store = store_of(config)
        running = ready.nursery.start(
            config, ready.night, Trap("before", "^tiny/current.json$", wait=pipes(tmp_path / "pipes"))
        )
        go = running.reached()
        assert ready.before is not None
        back = rollback(store, PIPELINE, None, "clicks halved")
        assert (back.release, back.previous) == (ready.before.previous, ready.before.release)
        assert (back.generation, back.fencing_token) == (ready.before.generation + 1, ready.before.fencing_token)
        go()
        assert [line["error"] for line in running.end().of("refused")] == ["PointerMoved"]
        assert read_pointer(store, PIPELINE) == back
        assert_no_reader_sees_a_part(ready, store)
        again = ready.nursery.run(config, ready.night)
        assert again.result["promoted"]
        now = read_pointer(store, PIPELINE)
        assert now is not None
        assert (now.release, now.previous) == (ready.undisturbed.result["release"], back.release)
        assert now.generation == back.generation + 1
        assert len(ledger_of(store)) == len(ready.ledger) + 2

    def test_nights_run_and_publish_and_do_not_promote_while_the_pointer_is_held(
        self, ready: Ready, tmp_path: Path
    ) -> None:
        config = moved(ready.config, ready.exported, tmp_path)
        store = store_of(config)
        held = rollback(store, PIPELINE, None, "clicks halved", hold=True)
        first = ready.nursery.run(config, ready.night)
        assert (first.result["promoted"], "clicks halved" in first.result["why"]) == (False, True)
        assert read_pointer(store, PIPELINE) == held
        check_whole(store, stored_manifest(store, PIPELINE, first.result["release"]))
        free = unhold(store, PIPELINE, "cause found")
        assert (free.hold, free.release, free.generation) == (None, held.release, held.generation + 1)
        again = ready.nursery.run(config, ready.night)
        assert again.result["promoted"]

    def test_a_warm_ranker_is_back_on_the_release_before_and_fetches_nothing(
        self, ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it asks the store for: the pointer and a manifest."""
        config = moved(ready.config, ready.begun, tmp_path)
        store, reads = store_of(config), []
        for name in ("find", "get", "size", "_stream"):
            call = getattr(DirectoryStore, name)

            def counted(self: Any, key: str, *most: Any, call: Any = call, name: str = name) -> Any:
                reads.append((name, key))
                return call(self, key, *most)

            monkeypatch.setattr(DirectoryStore, name, counted)
        back = rollback(store, PIPELINE, None, "to have both on the ranker's disk")
        with Ranker(config["store"], PIPELINE, cache=tmp_path / "cache") as ranker:
            assert ranker.release == back.release
            forward = rollback(store, PIPELINE, None, "and the newest again")
            assert ranker.refresh()
            assert ranker.release == forward.release == ready.undisturbed.result["release"]
            rollback(store, PIPELINE, None, "clicks halved")
            reads.clear()
            assert ranker.refresh()
            assert ranker.release == back.release
            assert ranker.refusal is None
        assert set(reads) == {("find", f"{PIPELINE}/current.json"), ("find", manifest_key(PIPELINE, back.release))}


class TestCollector:
    """The collector beside a publisher that sleeps, and one that is killed."""

    @pytest.mark.parametrize(
        "trap",
        [pytest.param("after ^tiny/releases/.*/run.json$", marks=pytest.mark.soak), f"before {MANIFEST}"],
        ids=["before it looks", "after it looked"],
    )
    def test_a_publisher_that_wakes_up_after_its_blobs_are_gone_publishes_nothing_torn(
        self, ready: Ready, tmp_path: Path, trap: str
    ) -> None:
        """It sleeps before it last looks at its lease, or between that look and the manifest's write."""
        config = moved(ready.config, ready.exported, tmp_path)
        store = store_of(config)
        when, key = trap.split(" ")
        sleeper = ready.nursery.start(config, ready.night, Trap(when, key, wait=pipes(tmp_path / "pipes")), term=2.0)
        go = sleeper.reached()
        os.kill(sleeper.pid, signal.SIGSTOP)
        release = ready.undisturbed.result["release"]
        marked = collected(store, tmp_path)
        assert f"releases/{release}" in marked.marked
        done = collected(store, tmp_path)
        assert set(done.removed) == set(marked.marked)
        assert_no_reader_sees_a_part(ready, store)
        os.kill(sleeper.pid, signal.SIGCONT)
        go()
        assert [line["error"] for line in sleeper.end().of("refused")] == ["LeaseLost"]
        assert (release in folders(store, PIPELINE).visible) == (when == "before")
        for one in folders(store, PIPELINE).visible:
            check_whole(store, stored_manifest(store, PIPELINE, one))
        assert read_pointer(store, PIPELINE) == ready.before
        assert_done_once(ready, store, ready.nursery.run(config, ready.night))

    def test_a_collector_that_is_killed_is_made_good_by_the_next_and_keeps_nobody_waiting(
        self, ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = moved(ready.config, ready.begun, tmp_path)
        store = store_of(config)
        for number in range(3):
            store.put_if_absent(f"{PIPELINE}/releases/{'ab' * 32}/part-{number}", b"left")
            store.put_if_absent(f"{PIPELINE}/blobs/{number:064x}", b"left")
        collected(store, tmp_path)
        code = """
import os, signal, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tasks.clients.directory_store import DirectoryStore
from tasks.clients.lease import Lease
from tasks.release.garbage import collect
delete, count = DirectoryStore.delete, iter(range(2))
def dies(self, key):
    if next(count, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    delete(self, key)
DirectoryStore.delete = dies
store = DirectoryStore(Path(sys.argv[1]))
with Lease(store, "tiny/lease", "collector") as lease:
    collect(store, "tiny", Path(sys.argv[2]), 1, timedelta(0), datetime.now(UTC), lease.held)
"""
        dead = subprocess.run(
            [sys.executable, "-c", code, config["store"], str(tmp_path)], cwd=ROOT, check=False, capture_output=True
        )
        assert dead.returncode == -signal.SIGKILL, dead.stderr
        left = [key for key in store.list(PIPELINE) if store.get(key).data == b"left"]
        assert len(left) == 4  # two objects of the folder are gone
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        cli.main(["releases", "gc", "--config", str(tmp_path / "config.yaml"), "--keep", "1"])
        assert "marked   1 releases: abababababab, 3 blobs" in capsys.readouterr().out
        assert len(collected(store, tmp_path).removed) == 4
        assert not [key for key in store.list(PIPELINE) if store.get(key).data == b"left"]
        assert_no_reader_sees_a_part(ready, store)

    @pytest.mark.soak
    def test_a_night_whose_release_was_removed_is_finished_and_makes_it_again_when_it_is_run(
        self, ready: Ready, tmp_path: Path
    ) -> None:
        tree = moved(ready.config, ready.begun, tmp_path)
        config, store = RetrainConfig.model_validate(tree), store_of(tree)
        last = ready.finished.world.nights[-1]
        newest = plain_night(config, last)
        first, second = (made.published for made in ready.finished.results)
        for _ in range(2):
            done = collected(store, tmp_path)
        assert [name for name in done.removed if name.startswith("releases/")] == [f"releases/{first.release}"]
        assert first.release not in folders(store, PIPELINE).visible
        assert second.release in done.found.kept
        entry = plan(as_they_were_run(ready, config), first.night, first.night, promote=True)[0]
        assert (entry.runs, "removed since" in entry.why) == (False, True)
        with pytest.raises(ObjectMissing, match="which this night starts from, is no longer in"):
            plain_night(config, second.night)
        again = plain_night(as_they_were_run(ready, config), first.night)
        assert again.published.release == first.release
        assert [step.step for step in again.steps if not step.reused] == ["publish"]
        check_whole(store, stored_manifest(store, PIPELINE, first.release))
        assert not again.published.promoted
        pointer = read_pointer(store, PIPELINE)
        assert pointer is not None
        assert pointer.release == newest.published.release
        assert plain_night(config, second.night).published.release == second.release


def as_they_were_run(ready: Ready, config: RetrainConfig) -> RetrainConfig:
    """The config that the finished nights were run with, on another store."""
    return ready.finished.config.model_copy(update={"store": config.store, "scratch": config.scratch})
