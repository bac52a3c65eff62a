"""Publishers that die at a given call, system call or moment, and crowds of them that race: real processes.

For each job a warm parent forks a child, which publishes one prepared release and moves the pointer to it. Releases are
made from a real one by exchanging the bank and the night: nobody loads them, but every byte of them is checked.
"""

import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from tasks.clients import directory_store, s3_multipart, s3_store  # noqa: F401  (a child imports nothing)
from tasks.clients.object_store import ObjectStore, open_store
from tasks.clients.s3_client import s3_client
from tasks.errors import NightrankError
from tasks.release.manifest import Manifest, content_digest, describe
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tests.faults.warm import Ended, WarmParent, serve

PIPELINE = "shop"
"""That of `tests.releases`, which imports too much for a process that only publishes."""
EXTRA = {"run.json": b"{}", "report.html": b"<html>"}
SMALLEST_PART = 5 * 2**20
"""What servers take as a part that is not the last."""


@dataclass(frozen=True)
class Prepared:
    """A release that lies ready to be published."""

    folder: Path
    manifest: Manifest

    @property
    def release(self) -> str:
        return self.manifest.release

    @property
    def night(self) -> date:
        return self.manifest.night

    def job(self, store: str, **more: Any) -> dict[str, Any]:
        """What a child is told to publish it."""
        where = {"store": store, "folder": str(self.folder), "manifest": str(self.folder) + ".json"}
        return where | {"release": self.release, "night": self.night.isoformat(), **more}


def prepared(source: Path, manifest: Manifest, folder: Path, number: int, padding: int = 0) -> Prepared:
    """Another release like this one, `number` nights later; every number is a release of its own.

    Args:
        source: the release's folder.
        manifest: its manifest.
        folder: the new one's.
        number: which one.
        padding: bytes that its bank has more.
    """
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in ("bank.bin", "interface.json"):
            (folder / file.name).hardlink_to(file)
    (folder / "bank.bin").write_bytes(number.to_bytes(8, "little") * 64 + os.urandom(padding))
    interface = replace(manifest.interface, night=manifest.night + timedelta(days=number))
    (folder / "interface.json").write_bytes(interface.serialise())
    files = describe(folder)
    made = replace(manifest, release=content_digest(files), files=files, interface=interface)
    Path(f"{folder}.json").write_bytes(made.serialise())
    return Prepared(folder, made)


@dataclass(frozen=True)
class Cut:
    """Where a publisher to S3 dies: at the nth call that fits, before it is sent, half-way through its body, or after
    the server has finished and before the publisher has heard of it."""

    when: str
    method: str
    path: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.when} {self.method} {self.path}" + (f" number {self.nth}" if self.nth > 1 else "")


class Publishers(WarmParent):
    """Starts publishers, in the environment as it is now.

    Args:
        folder: for its log and their diaries.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("tests.faults.publishers", folder / "publishers.log")

    def start(self, job: dict[str, Any]) -> "Publisher":
        """Begin a publish in a process of its own."""
        return Publisher(self, *self.begin(job))

    def run(self, job: dict[str, Any]) -> "Outcome":
        """A whole publish, to its end."""
        return self.start(job).end()

    def race(self, jobs: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
        """Rounds of publishes that all begin at once, a writer each; what each writer was told, by round."""
        pid, diary = self.begin({"race": jobs})
        assert self.end_of(pid) == 0, self.said()
        told: list[list[dict[str, Any]]] = json.loads(diary.read_text())
        return told


@dataclass
class Outcome(Ended):
    """How a publish ended, and what the publisher was told."""

    told: dict[str, Any]


@dataclass
class Publisher:
    """A publish that was begun."""

    parent: Publishers
    pid: int
    diary: Path

    def end(self) -> Outcome:
        status = self.parent.end_of(self.pid)
        # One that was killed may have been killed while it wrote its diary.
        return Outcome(status, json.loads(self.diary.read_text()) if status == 0 else {})


def _cut_at(cut: Cut, store: ObjectStore) -> None:
    """Set the trap on the client of an S3 store."""
    assert isinstance(store, s3_store.S3Store)
    events, count = store._client.meta.events, 0

    def fits(request: Any) -> bool:
        nonlocal count
        count += (hit := request.method == cut.method and re.search(cut.path, request.url) is not None)
        return hit and count == cut.nth

    def before(request: Any, **_: Any) -> None:
        if not fits(request):
            return
        if cut.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        elif cut.when == "half":
            request.body = _Half(request.body)
        else:
            # The server answers, and the process dies before it has read a byte of what was said.
            events.register("before-parse.s3", lambda **_: os.kill(os.getpid(), signal.SIGKILL))

    events.register("before-send.s3", before)


class _Half:
    """A body that kills whoever sends it, after its first half."""

    def __init__(self, body: Any) -> None:
        self._data, self._read = body.read() if hasattr(body, "read") else bytes(body), False

    def read(self, size: int = -1) -> bytes:
        if self._read:
            time.sleep(0.05)  # so that the first half has left
            os.kill(os.getpid(), signal.SIGKILL)
        self._read = True
        return self._data[: len(self._data) // 2]


def _publish(store: ObjectStore, job: dict[str, Any]) -> dict[str, Any]:
    """Publish and promote; what came of it."""
    manifest = Manifest.parse(Path(job["manifest"]).read_bytes(), PIPELINE, job["release"])
    told: dict[str, Any] = {}
    try:
        told["new"] = publish_release(store, PIPELINE, Path(job["folder"]), manifest, EXTRA).new
        pointer = promote(
            *(store, PIPELINE, manifest.release, manifest.night, job.get("token", 1)), expected=job.get("expected")
        )
        told["generation"] = pointer.generation
        told["won"] = pointer.release == manifest.release
    except NightrankError as error:
        told |= {"error": type(error).__name__, "message": str(error)}
    return told


def _live(job: dict[str, Any]) -> None:
    """The life of a child."""
    if "race" in job:
        _race(job["race"], Path(job["diary"]))
        return
    if job.get("parts"):
        s3_store.SINGLE_PUT_BYTES, s3_multipart.PART_BYTES = SMALLEST_PART, SMALLEST_PART
    store = open_store(job["store"])
    if job.get("cut"):
        _cut_at(Cut(**job["cut"]), store)
    if job.get("go"):
        with open(job["go"]) as pipe:  # opens when the other end is opened
            pipe.read()
    Path(job["diary"]).write_text(json.dumps(_publish(store, job)))


def _race(jobs: list[list[dict[str, Any]]], diary: Path) -> None:
    """Every writer in a process of its own; rounds begin when all have ended the one before."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(len(jobs[0])), context.SimpleQueue()

    def write(writer: int) -> None:
        store = open_store(jobs[0][writer]["store"])
        store.exists("connection")
        for number, crowd in enumerate(jobs):
            barrier.wait(600)
            queue.put((number, writer, _publish(store, crowd[writer])))

    crowd = [context.Process(target=write, args=(writer,)) for writer in range(len(jobs[0]))]
    for one in crowd:
        one.start()
    told: list[list[dict[str, Any]]] = [[{} for _ in crowd] for _ in jobs]
    for _ in range(len(jobs) * len(crowd)):
        number, writer, said = queue.get()
        told[number][writer] = said
    for one in crowd:
        one.join()
    diary.write_text(json.dumps(told))


def main() -> None:
    """The warm parent."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        s3_client().close()  # reads the descriptions of the service, which children then have
    serve(_live)


if __name__ == "__main__":
    main()
