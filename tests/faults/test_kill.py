"""A night that is killed, anywhere, is finished by running it again: once, whole, and to the same bytes."""

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import RetrainConfig
from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.manifest import Pointer, pointer_key
from tasks.release.pointer import promote, read_pointer
from tasks.release.publishing import read_manifest
from tasks.steps import recalled
from tests.faults.victims import CHECKPOINT, Nursery, Outcome, Trap, moved, pipes
from tests.faults.warm import ROOT
from tests.finished import Finished
from tests.prefect_homes import home_with, servers_of

PIPELINE = "tiny"
STEPS = (
    *("ingest", "validate", "docs", "history", "statistics", "prepare", "meta-train", "adapt-exam", "evaluate"),
    *("recommend", "retention", "judge", "adapt-ship", "graph", "export", "publish"),
)
LEASE = "^tiny/lease$"


def record(step: str) -> str:
    """The write that makes a step done."""
    return f"^tiny/work/{step}/[0-9a-f]{{64}}/record.json$"


PUBLISH = (
    Trap("before", "^tiny/blobs/"),
    Trap("after", "^tiny/blobs/", 2),
    Trap("before", "^tiny/releases/.*/data_docs/"),
    Trap("after", "^tiny/releases/.*/run.json$"),
    Trap("before", "^tiny/releases/.*/manifest.json$"),
    Trap("after", "^tiny/releases/.*/manifest.json$"),
    Trap("after", "^tiny/work/intent/"),
    Trap("before", "^tiny/current.json$"),
    Trap("after", "^tiny/current.json$"),
    Trap("after", "^tiny/ledger/"),
    Trap("before", "^tiny/state/released/"),
    Trap("after", "^tiny/state/released/"),
    Trap("before", record("publish")),
    Trap("after", record("publish")),
)
"""Everything that publish writes, in its order."""


@dataclass(frozen=True)
class Ready:
    """A pipeline with finished nights, one night more, and copies of it on the way."""

    nursery: Nursery
    finished: Finished
    """The nights before, each of which was released."""
    before: Pointer | None
    """The pointer that the night finds."""
    ledger: frozenset[str]
    """The entries of the ledger that the night finds."""
    config: dict[str, Any]
    begun: Path
    """Store and scratch before the night."""
    exported: Path
    """Store and scratch before the night's first blob."""
    undisturbed: Outcome
    """The night, which nobody killed."""

    @property
    def night(self) -> date:
        """The night that is killed in the tests."""
        return self.finished.next_night

    @property
    def earlier(self) -> set[str]:
        """The releases of the nights before."""
        return {made.published.release for made in self.finished.results}


def ledger_of(store: ObjectStore) -> frozenset[str]:
    return frozenset(store.list(f"{PIPELINE}/ledger/"))


@pytest.fixture(scope="module")
def ready(finished: Finished, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp("kill")
    tree = finished.copy(folder / "world").world.config
    # The worst case for the pointer: the gate says go every night.
    config = {**tree, "gate": {**tree["gate"], "when_unsure": "promote", "margin": 10.0}}
    begun, exported = folder / "begun", folder / "exported"
    moved(config, folder / "world", begun)
    # Every night after the first shares its graph; where nights are killed it has to be traced.
    shutil.rmtree(begun / "store" / PIPELINE / "work" / "graph")
    trap = Trap("before", "^tiny/blobs/", wait=pipes(folder / "pipes"))
    running = nursery.start(config, finished.next_night, trap)
    go = running.reached()
    moved(config, folder / "world", exported)
    go()
    undisturbed = running.end()
    return Ready(
        *(nursery, finished, finished.pointer, ledger_of(finished.store)),
        *(config, begun, exported, undisturbed),
    )


@pytest.fixture(scope="module")
def unpromoted(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """The same where the releases of the nights before stand, and none was ever promoted."""
    folder = tmp_path_factory.mktemp("unpromoted")
    config = moved(ready.config, ready.exported, folder / "exported")
    (folder / "exported" / "store" / pointer_key(PIPELINE)).unlink()
    shutil.rmtree(folder / "exported" / "store" / PIPELINE / "ledger")
    config = moved(config, folder / "exported", folder / "world")
    undisturbed = ready.nursery.run(config, ready.night)
    return replace(
        ready,
        before=None,
        ledger=frozenset(),
        config=config,
        exported=folder / "exported",
        undisturbed=undisturbed,
    )


def store_of(config: dict[str, Any]) -> ObjectStore:
    return open_store(config["store"])


def assert_no_reader_sees_a_part(ready: Ready, store: ObjectStore) -> None:
    """Whatever has a manifest is whole, and whatever the pointer names has a manifest."""
    pointer = read_pointer(store, PIPELINE)
    manifests = [key for key in store.list(f"{PIPELINE}/releases/") if key.endswith("/manifest.json")]
    releases = [key.split("/")[2] for key in manifests]
    assert ready.earlier <= set(releases)
    assert (pointer is None and ready.before is None) or (pointer is not None and pointer.release in releases)
    for release in releases:
        for file in read_manifest(store, PIPELINE, release).files:
            data = store.get(f"{PIPELINE}/blobs/{file.sha256}").data
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
        for name in ("run.json", "report.html"):
            assert store.exists(f"{PIPELINE}/releases/{release}/{name}")


def assert_done_once(ready: Ready, store: ObjectStore, last: Outcome) -> Pointer:
    """The night's release is the undisturbed one, it is the only one, and the pointer went to it in one move."""
    assert last.status == 0
    assert last.result["promoted"]
    release = last.result["release"]
    assert release == ready.undisturbed.result["release"]
    assert last.result["digests"] == ready.undisturbed.result["digests"]
    assert_no_reader_sees_a_part(ready, store)
    releases = {key.split("/")[2] for key in store.list(f"{PIPELINE}/releases/")}
    assert release not in ready.earlier
    assert releases == {*ready.earlier, release}
    blobs = {file.sha256 for one in releases for file in read_manifest(store, PIPELINE, one).files}
    assert {key.rsplit("/", 1)[-1] for key in store.list(f"{PIPELINE}/blobs/")} == blobs
    pointer = read_pointer(store, PIPELINE)
    assert pointer is not None
    generation, previous = (0, None) if ready.before is None else (ready.before.generation, ready.before.release)
    assert (pointer.release, pointer.generation, pointer.previous) == (release, generation + 1, previous)
    assert pointer.night == ready.night
    ledger = ledger_of(store)
    assert ready.ledger < ledger
    assert len(ledger) == len(ready.ledger) + 1
    assert json.loads(store.get(f"{PIPELINE}/lease").data)["free"]
    return pointer


def assert_not_kept_waiting(outcome: Outcome) -> None:
    """The dead process's lease was taken over at once, not watched for its term."""
    leases = [line["message"] for line in outcome.of("log") if line["by"] == "tasks.clients.lease"]
    assert not any("watching" in message for message in leases)
    assert any("took lease" in message for message in leases)


def killed_then_finished(ready: Ready, source: Path, folder: Path, trap: Trap) -> None:
    config = moved(ready.config, source, folder)
    store = store_of(config)
    dead = ready.nursery.run(config, ready.night, trap)
    assert dead.killed, f"{trap}: nothing was caught; {dead.told[-2:]}"
    assert_no_reader_sees_a_part(ready, store)
    stored = {key for key in store.list(f"{PIPELINE}/work/") if key.endswith("/record.json")}
    last = ready.nursery.run(config, ready.night)
    assert_not_kept_waiting(last)
    for step, key in last.worked:
        assert f"{PIPELINE}/work/{step}/{key}/record.json" not in stored, f"{step} was finished, and done again"
    assert_done_once(ready, store, last)
    again = ready.nursery.run(config, ready.night)
    assert again.worked == []
    assert_done_once(ready, store, again)


def test_the_undisturbed_night_is_promoted_by_its_own_run(ready: Ready) -> None:
    assert_done_once(ready, store_of(ready.config), ready.undisturbed)


def test_a_night_that_is_killed_at_every_boundary_in_turn_does_every_step_once(ready: Ready, tmp_path: Path) -> None:
    """Two deaths per step: its work is done, and its record is not written; its record has just been written."""
    assert ready.before is not None
    config = moved(ready.config, ready.begun, tmp_path)
    store = store_of(config)
    worked: list[tuple[str, str]] = []
    lost: list[tuple[str, str]] = []
    for step in STEPS:
        for when in ("before", "after"):
            trap = Trap(when, record(step))
            dead = ready.nursery.run(config, ready.night, trap)
            assert dead.killed, f"{trap}: nothing was caught; {dead.told[-2:]}"
            assert dead.worked[-1][0] == step
            worked += dead.worked
            lost += dead.worked[-1:] if when == "before" else []
            assert_no_reader_sees_a_part(ready, store)
    last = ready.nursery.run(config, ready.night)
    assert_not_kept_waiting(last)
    assert last.worked == []
    assert set(last.result["reused"].values()) == {True}
    assert Counter(worked) == Counter(set(worked)) + Counter(lost)
    # Every run took the lease once; the last but one died with the pointer moved and publish's record lacking.
    assert assert_done_once(ready, store, last).fencing_token == ready.before.fencing_token + 2 * len(STEPS) - 1


def test_a_training_that_is_killed_goes_on_from_its_last_epoch(ready: Ready, tmp_path: Path) -> None:
    config = moved(ready.config, ready.begun, tmp_path)
    config = {**config, "training": {**config["training"], "checkpoint_seconds": 0}}
    checkpoints = tmp_path / "scratch" / "checkpoints"
    dead = ready.nursery.run(config, ready.night, Trap("after", f"^{CHECKPOINT}$"))
    assert dead.killed
    assert len(list(checkpoints.iterdir())) == 1
    last = ready.nursery.run(config, ready.night, Trap("before", record("adapt-exam")))
    assert [step for step, _ in last.worked] == ["meta-train", "adapt-exam"]
    place = RetrainConfig.model_validate(config).place()
    made = recalled(place, *last.worked[0])
    assert made.digest == ready.undisturbed.result["digests"]["meta-train"]
    assert "resumed after epoch 1" in made.notes["why"]
    assert list(checkpoints.iterdir()) == []


SHORT = (PUBLISH[1], PUBLISH[4], PUBLISH[5], PUBLISH[7], PUBLISH[8], PUBLISH[10])


@pytest.mark.parametrize("trap", SHORT, ids=str)
def test_a_publish_that_is_killed_is_finished_by_the_next_run(ready: Ready, tmp_path: Path, trap: Trap) -> None:
    killed_then_finished(ready, ready.exported, tmp_path, trap)


@pytest.mark.parametrize("trap", [PUBLISH[7], PUBLISH[8]], ids=str)
def test_the_first_move_of_a_pointer_is_made_once_too(unpromoted: Ready, tmp_path: Path, trap: Trap) -> None:
    killed_then_finished(unpromoted, unpromoted.exported, tmp_path, trap)


@pytest.mark.soak
@pytest.mark.parametrize("trap", [trap for trap in PUBLISH if trap not in SHORT], ids=str)
def test_every_other_write_of_a_publish_may_be_the_last(ready: Ready, tmp_path: Path, trap: Trap) -> None:
    killed_then_finished(ready, ready.exported, tmp_path, trap)


@pytest.mark.soak
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_night_that_is_killed_once_repeats_no_finished_step(
    ready: Ready, tmp_path: Path, step: str, when: str
) -> None:
    killed_then_finished(ready, ready.begun, tmp_path, Trap(when, record(step)))


@pytest.mark.soak
def test_a_night_that_is_killed_after_each_single_write_ends_well(ready: Ready, tmp_path: Path) -> None:
    """Every write of the night is once the last of a run; each run gets one write further than the one before."""
    config = moved(ready.config, ready.begun, tmp_path)
    store = store_of(config)
    # What a run rewrites each time although nothing is new, it would die of for ever; so it would of Data Docs, which
    # tell when they were built: a few deaths among their files are enough.
    every, built = "^tiny/(?!lease$|work/last/)", "^tiny/(?!lease$|work/last/|work/docs/[0-9a-f]{64}/[0-9a-f]{64}$)"
    earlier = len(list(store.list(f"{PIPELINE}/work/docs/")))
    deaths = 0
    while True:
        docs = len(list(store.list(f"{PIPELINE}/work/docs/"))) - earlier
        outcome = ready.nursery.run(config, ready.night, fresh(Trap("after", every if docs < 3 else built), store))
        if not outcome.killed:
            break
        deaths += 1
        assert_no_reader_sees_a_part(ready, store)
        assert deaths < 300, "the same write is the last one again and again"
    assert deaths > 60
    assert_done_once(ready, store, outcome)


def fresh(trap: Trap, store: ObjectStore) -> Trap:
    """The trap, on keys only that the store does not have yet."""
    there = "|".join(re.escape(key) for key in store.list(f"{PIPELINE}/"))
    return Trap(trap.when, f"^(?!(?:{there})$){trap.key.removeprefix('^')}", trap.nth)


def until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def task_runs(home: Path) -> list[list[str]]:
    """States of the task runs of each flow run that an embedded server has recorded."""
    with closing(sqlite3.connect(home / "prefect.db")) as database:
        rows = database.execute("SELECT flow_run_id, state_name FROM task_run ORDER BY created").fetchall()
    return [[state for run, state in rows if run == one] for one in dict.fromkeys(run for run, _ in rows)]


def nightrank(folder: Path, *words: str) -> tuple[int, int, str]:
    """Run the command line in a session of its own, with an embedded Prefect of its own; pid, status and output."""
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    # A file, not a pipe: a server that outlived its run would hold the pipe open.
    with (folder / "said.txt").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(180)
            gone = until(lambda: not servers_of(folder / "prefect"), 30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert gone, "the embedded server outlived its run"
        said.seek(0)
        return process.pid, status, said.read()


def test_a_run_through_prefect_that_is_killed_is_finished_by_the_next(
    ready: Ready, prefect_database: Path, tmp_path: Path
) -> None:
    """No server outlives either; the second leaves a clean screen, and every one of its steps on record."""
    home_with(prefect_database, tmp_path / "prefect")
    config = moved(ready.config, ready.exported, tmp_path)
    store = store_of(config)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "trap.json").write_text(json.dumps(vars(Trap("before", "^tiny/releases/.*/manifest.json$"))))
    run = ("run", "--config", str(tmp_path / "config.yaml"), "--night", ready.night.isoformat())
    victim, status, said = nightrank(tmp_path, "-m", "tests.faults.victims", str(tmp_path / "trap.json"), *run)
    assert status == -signal.SIGKILL, said[-3000:]
    assert_no_reader_sees_a_part(ready, store)
    assert read_pointer(store, PIPELINE) == ready.before
    assert json.loads(store.get(f"{PIPELINE}/lease").data)["pid"] == victim
    _, status, said = nightrank(tmp_path, "-c", "from flows.cli import main; main()", *run)
    assert status == 0, said[-3000:]
    assert ready.undisturbed.result["release"] in said
    assert "Traceback" not in said
    assert "prefect.server" not in said
    assert task_runs(tmp_path / "prefect")[-1] == ["Completed"] * 13
    again = ready.nursery.run(config, ready.night)
    assert again.worked == []
    assert_done_once(ready, store, again)


class TestTwoAtOnce:
    """Two runs of one pipeline, and hands that reach into it."""

    def test_the_second_is_refused_while_the_first_is_alive(self, ready: Ready, tmp_path: Path) -> None:
        config = moved(ready.config, ready.exported, tmp_path)
        trap = Trap("before", record("publish"), wait=pipes(tmp_path / "pipes"))
        first = ready.nursery.start(config, ready.night, trap, term=3.0)
        go = first.reached()
        second = ready.nursery.run(config, ready.night, term=3.0)
        refused = second.of("refused")
        assert [line["error"] for line in refused] == ["LeaseHeld"]
        assert f"pid {first.pid}" in refused[0]["message"]
        assert second.worked == []
        go()
        assert_done_once(ready, store_of(config), first.end())

    def test_a_run_that_slept_through_its_lease_changes_nothing_when_it_wakes(
        self, ready: Ready, tmp_path: Path
    ) -> None:
        config = moved(ready.config, ready.exported, tmp_path)
        store = store_of(config)
        trap = Trap("before", "^tiny/releases/.*/manifest.json$", wait=pipes(tmp_path / "pipes"))
        sleeper = ready.nursery.start(config, ready.night, trap, term=2.0)
        go = sleeper.reached()
        os.kill(sleeper.pid, signal.SIGSTOP)
        other = ready.nursery.run(config, ready.night, term=2.0)
        pointer = assert_done_once(ready, store, other)
        objects = {key: store.get(key).etag for key in store.list("")}
        os.kill(sleeper.pid, signal.SIGCONT)
        go()
        woken = sleeper.end()
        assert [line["error"] for line in woken.of("refused")] == ["LeaseLost"]
        assert {key: store.get(key).etag for key in store.list("")} == objects
        assert assert_done_once(ready, store, other) == pointer

    def test_a_pointer_that_an_operator_moved_meanwhile_is_not_overwritten_until_it_was_compared_with(
        self, ready: Ready, tmp_path: Path
    ) -> None:
        config = moved(ready.config, ready.exported, tmp_path)
        store = store_of(config)
        trap = Trap("before", "^tiny/releases/.*/manifest.json$", wait=pipes(tmp_path / "pipes"))
        running = ready.nursery.start(config, ready.night, trap)
        go = running.reached()
        assert ready.before is not None
        back = ready.finished.results[0].published
        token = ready.before.fencing_token
        promote(store, PIPELINE, back.release, back.night, token, force=True, reason="by hand")
        go()
        beaten = running.end()
        assert [line["error"] for line in beaten.of("refused")] == ["PointerMoved"]
        pointer = read_pointer(store, PIPELINE)
        assert pointer is not None
        assert (pointer.release, pointer.generation) == (back.release, ready.before.generation + 1)
        again = ready.nursery.run(config, ready.night)
        assert again.status == 0
        assert [step for step, _ in again.worked] == ["judge", "publish"]
        pointer = read_pointer(store, PIPELINE)
        assert pointer is not None
        assert pointer.release == ready.undisturbed.result["release"]
        assert pointer.generation == ready.before.generation + 2
        assert pointer.previous == back.release
        assert len(ledger_of(store)) == len(ready.ledger) + 2
