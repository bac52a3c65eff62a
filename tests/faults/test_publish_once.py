"""A publish is all or nothing, and happens once, whatever call, system call or moment is its last.

After every death: what has a manifest is whole, and the pointer names either what it named or the new release. Doing
the same again ends it: the release is there once, the pointer has moved by one, the ledger has one entry more.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.manifest import blob_key
from tasks.release.pointer import read_pointer
from tasks.release.pointer_json import Pointer
from tasks.release.publishing import read_manifest
from tests.faults.publishers import PIPELINE, SMALLEST_PART, Cut, Outcome, Prepared, Publishers, prepared
from tests.releases import Made, make_release, shared_graph
from tests.s3_server import S3Server

CUTS = (
    Cut("before", "PUT", "/blobs/"),
    Cut("half", "PUT", "/blobs/", 3),
    Cut("after", "PUT", "/blobs/", 2),
    Cut("after", "POST", r"/blobs/.*\?uploads"),
    Cut("after", "PUT", "/blobs/.*partNumber=1"),
    Cut("before", "POST", "/blobs/.*uploadId="),
    Cut("after", "POST", "/blobs/.*uploadId="),
    Cut("before", "PUT", "/manifest.json"),
    Cut("after", "PUT", "/manifest.json"),
    Cut("before", "PUT", "/current.json"),
    Cut("after", "PUT", "/current.json"),
    Cut("after", "PUT", "/ledger/"),
)
"""Twelve points of a publish to S3, in its order."""


@dataclass
class Line:
    """A pipeline in which one release after the other is published, each of a later night."""

    store: ObjectStore
    made: Made
    folder: Path
    parent: Publishers
    count: int = 0
    verified: set[str] = field(default_factory=set)
    """Blobs of which every byte was seen; they are shared by releases, and none is ever written again."""

    def next(self, padding: int = 0) -> Prepared:
        self.count += 1
        shutil.rmtree(self.folder / f"release-{self.count - 3}", ignore_errors=True)
        folder = self.folder / f"release-{self.count}"
        return prepared(self.made.folder, self.made.manifest, folder, self.count, padding)

    def pointer(self) -> Pointer | None:
        return read_pointer(self.store, PIPELINE)

    def ledger(self) -> list[str]:
        return list(self.store.list(f"{PIPELINE}/ledger/"))

    def assert_whole(self, release: str) -> None:
        """Every byte of a release is there."""
        for file in read_manifest(self.store, PIPELINE, release).files:
            if file.sha256 in self.verified:
                continue
            data = self.store.get(blob_key(PIPELINE, file.sha256)).data
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
            self.verified.add(file.sha256)
        for name in ("run.json", "report.html"):
            assert self.store.exists(f"{PIPELINE}/releases/{release}/{name}")

    def survives(self, release: Prepared, dead: Outcome, before: Pointer | None, entries: list[str], **job: Any) -> str:
        """All of the promise, after a death and again after the end; returns how far the dead one had come."""
        visible = self.store.exists(f"{PIPELINE}/releases/{release.release}/manifest.json")
        now = self.pointer()
        if visible:
            self.assert_whole(release.release)
        moved = now != before
        assert now is not None or before is None, "the pointer is gone"
        assert not moved or (visible and now is not None and now.release == release.release)
        again = self.parent.run(release.job(self.store.url, expected=0 if before is None else before.generation, **job))
        if moved:  # the same again finds its own move, and makes none
            again = self.parent.run(release.job(self.store.url, **job)) if "error" in again.told else again
        assert again.told.get("won"), (dead, again)
        assert again.told["new"] is not visible
        self.assert_whole(release.release)
        pointer = self.pointer()
        assert pointer is not None
        assert pointer.release == release.release
        assert pointer.generation == (0 if before is None else before.generation) + 1
        assert pointer.previous == (None if before is None else before.release)
        assert len(self.ledger()) == len(entries) + 1
        return "moved" if moved else "visible" if visible else "nothing"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The release that all others are made from."""
    return make_release(tmp_path_factory.mktemp("lean") / "release", shared_graph(tmp_path_factory, "lean"), "lean")


@pytest.fixture(scope="module")
def s3_parent(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publishers]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_server.environment().items():
            environment.setenv(name, value)
        with Publishers(tmp_path_factory.mktemp("publishers")) as parent:
            yield parent


@pytest.fixture(scope="module")
def on_s3(s3_parent: Publishers, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Line:
    return Line(open_store(f"s3://tests/{uuid.uuid4().hex}"), made, tmp_path_factory.mktemp("s3-line"), s3_parent)


@pytest.fixture(scope="module")
def on_disk(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("disk-line")
    with Publishers(tmp_path_factory.mktemp("publishers")) as parent:
        yield Line(open_store(str(folder / "store")), made, folder, parent)


def cut_once(line: Line, cut: Cut) -> str:
    parts = "/blobs/" in cut.path and cut.path != "/blobs/"
    release = line.next(padding=SMALLEST_PART + 1000 if parts else 0)
    before, entries = line.pointer(), line.ledger()
    job = {"expected": 0 if before is None else before.generation, "parts": parts}
    dead = line.parent.run(release.job(line.store.url, cut=vars(cut), **job))
    assert dead.killed, f"{cut}: nothing was cut; {dead}"
    return line.survives(release, dead, before, entries, parts=parts)


SHORT = (1, 2, 4, 6, 8, 10)


@pytest.mark.parametrize("cut", [CUTS[number] for number in SHORT], ids=str)
def test_a_publish_to_s3_that_is_cut_is_ended_by_the_next(on_s3: Line, cut: Cut) -> None:
    came = cut_once(on_s3, cut)
    number = CUTS.index(cut)
    assert came == ("nothing" if number < 8 else "visible" if number < 10 else "moved")


@pytest.mark.soak
def test_300_publishes_to_s3_are_cut(on_s3: Line) -> None:
    came: Counter[str] = Counter()
    for run in range(25):
        came.update(cut_once(on_s3, cut) for cut in CUTS)
        print(f"run {run + 1} of every cut:", dict(came), flush=True)
    on_s3.verified.clear()
    for key in on_s3.store.list(f"{PIPELINE}/releases/"):
        if key.endswith("/manifest.json"):
            on_s3.assert_whole(key.split("/")[2])
    assert came.total() == 300
    assert came == {"nothing": 200, "visible": 50, "moved": 50}


def test_a_publish_whose_last_act_is_a_system_call_is_ended_by_the_next(on_disk: Line) -> None:
    assert system_calls(on_disk, deaths=4).total() == 4


def test_a_publish_that_is_killed_at_any_moment_is_ended_by_the_next(on_disk: Line) -> None:
    assert moments(on_disk, deaths=4).total() == 4


@pytest.mark.soak
def test_200_system_calls_are_the_last_of_a_publish(on_disk: Line) -> None:
    came = system_calls(on_disk, deaths=200)
    print(came)
    assert came.total() == 200
    assert {"nothing", "visible", "moved"} <= set(came)


@pytest.mark.soak
def test_200_publishes_are_killed_at_random_moments(on_disk: Line) -> None:
    came = moments(on_disk, deaths=200)
    print(came)
    assert came.total() == 200


def traced(line: Line, job: dict[str, Any], log: Path, *how: str) -> Outcome:
    """A publish under strace, from its first call of the store on."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no `strace`: apt-get install strace")
    go = line.folder / f"go-{uuid.uuid4().hex}"
    os.mkfifo(go)
    child = line.parent.start({**job, "go": str(go)})
    tracer = subprocess.Popen(
        [strace, "-p", str(child.pid), "-o", str(log), *how], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if b"attached" not in said:
        os.kill(child.pid, signal.SIGKILL)
        child.end()
        pytest.skip(f"strace may not attach here: {said.decode().strip()}")
    with go.open("w"):
        pass
    outcome = child.end()
    tracer.stderr.read()
    tracer.stderr.close()
    tracer.wait()
    go.unlink()
    return outcome


def system_calls(line: Line, deaths: int) -> Counter[str]:
    """Let publishes die at the entry of system calls that are spread evenly over an undisturbed one."""
    log = line.folder / "strace.log"
    release = line.next()
    assert traced(line, release.job(line.store.url), log).told["won"]
    counts: Counter[str] = Counter()
    calls = []
    for name in re.findall(r"^(\w+)\(", log.read_text(), flags=re.MULTILINE):
        counts[name] += 1
        calls.append((name, counts[name]))
    assert counts["fsync"] > 10, "the store's work was not seen"
    came: Counter[str] = Counter()
    steps = iter(range(deaths * 3))
    while came.total() < deaths and (step := next(steps, None)) is not None:
        # From the back: the last calls are those after the pointer's move.
        name, nth = calls[int((1 - (step % deaths + step // deaths / 3) / deaths) * (len(calls) - 1))]
        release = line.next()
        before, entries = line.pointer(), line.ledger()
        job = release.job(line.store.url, expected=0 if before is None else before.generation)
        dead = traced(line, job, log, "-e", f"inject={name}:signal=KILL:when={nth}")
        if came.total() % 20 == 19:
            print(f"{came.total() + 1} deaths:", dict(came), flush=True)
        if dead.killed:  # another publish may have a call less of a kind
            came[line.survives(release, dead, before, entries)] += 1
        else:
            assert dead.told["won"]
    return came


def moments(line: Line, deaths: int) -> Counter[str]:
    """Let publishes die at moments that are drawn from the length of one; which that is, they tell by being faster."""
    draw, came = random.Random(0), Counter[str]()
    began = time.monotonic()
    assert line.parent.run(line.next().job(line.store.url)).told["won"]
    whole = time.monotonic() - began
    while came.total() < deaths:
        release = line.next()
        before, entries = line.pointer(), line.ledger()
        child = line.parent.start(release.job(line.store.url, expected=0 if before is None else before.generation))
        time.sleep(draw.uniform(0, whole))
        os.kill(child.pid, signal.SIGKILL)
        dead = child.end()
        if came.total() % 20 == 19:
            print(f"{came.total() + 1} deaths:", dict(came), flush=True)
        if dead.killed:
            came[line.survives(release, dead, before, entries)] += 1
        else:
            assert dead.told["won"]
        whole *= 1.1 if dead.killed else 0.8
    return came


def crowd(line: Line, writers: int, rounds: int) -> None:
    """Every round one writer moves the pointer, the others are told, and every release is there."""
    before = line.pointer()
    start = 0 if before is None else before.generation
    night = line.count + 1
    jobs = []
    for number in range(rounds):
        releases = [
            prepared(line.made.folder, line.made.manifest, line.folder / f"crowd-{start}-{number}-{writer}", night, 16)
            for writer in range(writers)
        ]
        jobs.append([release.job(line.store.url, expected=start + number) for release in releases])
    line.count = night
    told = line.parent.race(jobs)
    previous = None if before is None else before.release
    moves = {}
    for key in line.ledger():
        entry = Pointer.parse(json.loads(line.store.get(key).data)["pointer"].encode() + b"\n")
        assert entry.generation not in moves, "two moves of one generation"
        moves[entry.generation] = entry
    for number, (said, crowded) in enumerate(zip(told, jobs, strict=True)):
        winners = [job["release"] for one, job in zip(said, crowded, strict=True) if one.get("won")]
        assert len(winners) == 1, [one for one in said if one.get("error") != "PointerMoved"]
        assert {one["error"] for one in said if not one.get("won")} <= {"PointerMoved"}
        assert all(one["new"] for one in said), "a release was lost"
        move = moves[start + number + 1]
        assert (move.release, move.previous) == (winners[0], previous)
        previous = winners[0]
        for job in crowded:
            assert read_manifest(line.store, PIPELINE, job["release"]).release == job["release"]
    pointer = line.pointer()
    assert pointer == moves[start + rounds]


def test_of_a_crowd_of_publishers_one_moves_the_pointer_each_round(on_disk: Line, on_s3: Line) -> None:
    crowd(on_disk, writers=4, rounds=2)
    crowd(on_s3, writers=4, rounds=1)


@pytest.mark.soak
def test_of_32_publishers_one_moves_the_pointer_in_each_of_50_rounds_on_s3(on_s3: Line) -> None:
    for tenth in range(10):
        crowd(on_s3, writers=32, rounds=5)
        print(f"{5 * (tenth + 1)} rounds", flush=True)


@pytest.mark.soak
def test_of_32_publishers_one_moves_the_pointer_in_each_of_50_rounds_on_disk(on_disk: Line) -> None:
    for tenth in range(10):
        crowd(on_disk, writers=32, rounds=5)
        print(f"{5 * (tenth + 1)} rounds", flush=True)
