"""A publish through a network that loses answers: every verdict is true, and nothing is deleted before it is known.

The server finishes, or never sees the call, and the publisher hears nothing, half, or something else. Whoever publishes
is told that he has published where he has, and that he was beaten where he was; the truth is read past the network.
"""

import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tasks.clients import s3_failures, s3_multipart, s3_store
from tasks.clients.object_store import open_store
from tasks.clients.s3_client import s3_client
from tasks.clients.s3_store import S3Store
from tasks.errors import OutcomeUnknown, PointerMoved, StoreError, StoreUnavailable
from tasks.release.manifest import blob_key
from tasks.release.pointer import promote, read_pointer
from tasks.release.publishing import publish_release, read_manifest
from tests.clients.fault_proxy import BEGIN, END, PART, Fault, FaultProxy
from tests.faults.publishers import EXTRA, PIPELINE, SMALLEST_PART, Prepared, prepared
from tests.releases import Made, make_release, shared_graph
from tests.s3_server import S3Server

SAID = (None, 500, 502, 503, 504, 409, 429)
"""What the publisher hears in place of the server's answer: nothing, or a status of something in between."""


@dataclass
class Network:
    """A store behind a proxy, and the same store past it."""

    proxy: FaultProxy
    store: S3Store
    direct: S3Store
    made: Made
    folder: Path
    count: int = 0

    def next(self, padding: int = 0) -> Prepared:
        self.count += 1
        folder = self.folder / f"release-{self.count}"
        return prepared(self.made.folder, self.made.manifest, folder, self.count, padding)

    def publish(self, release: Prepared) -> bool:
        return publish_release(self.store, PIPELINE, release.folder, release.manifest, EXTRA).new

    def move(self, release: Prepared, past: bool = False) -> int:
        store = self.direct if past else self.store
        return promote(store, PIPELINE, release.release, release.night, token=1).generation

    def generation(self) -> int:
        pointer = read_pointer(self.direct, PIPELINE)
        return 0 if pointer is None else pointer.generation

    def champion(self) -> str | None:
        pointer = read_pointer(self.direct, PIPELINE)
        return None if pointer is None else pointer.release

    def assert_there(self, release: Prepared) -> None:
        found = read_manifest(self.direct, PIPELINE, release.release)
        for file in found.files:
            assert self.direct.size(blob_key(PIPELINE, file.sha256)) == file.bytes

    def deleted(self) -> list[str]:
        """What was deleted or aborted, but for notes on uploads that were seen to end."""
        return [call for call in self.proxy.calls if call.startswith("DELETE") and s3_store.UPLOADS not in call]


@pytest.fixture(scope="module")
def network(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("network")
    made = make_release(folder / "lean", shared_graph(tmp_path_factory, "lean"), "lean")
    prefix = uuid.uuid4().hex
    with FaultProxy(s3_server.endpoint) as proxy, pytest.MonkeyPatch.context() as environment:
        for name, value in s3_server.environment().items():
            environment.setenv(name, value)
        direct = S3Store("tests", prefix, s3_client())
        environment.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield Network(proxy, S3Store("tests", prefix, s3_client()), direct, made, folder)


@pytest.fixture(autouse=True)
def calm(network: Network, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(s3_store, "SINGLE_PUT_BYTES", SMALLEST_PART)
    monkeypatch.setattr(s3_multipart, "PART_BYTES", SMALLEST_PART)
    yield
    network.proxy.calm()


def writes_of(release: Prepared, padding: int) -> list[tuple[str, str]]:
    """The calls that a publish and a move consist of, by method and a piece of the path."""
    bank, shared = (
        next(file.sha256 for file in release.manifest.files if file.name == name) for name in ("bank.bin", "base.bin")
    )
    blobs = [("PUT", f"blobs/{shared}")] + ([BEGIN, PART, END] if padding else [("PUT", f"blobs/{bank}")])
    beside = [("PUT", f"{release.release}/run.json"), ("PUT", f"{release.release}/manifest.json")]
    return [*blobs, *beside, ("PUT", "current.json"), ("PUT", "/ledger/")]


def injected(network: Network, draw: random.Random) -> str:
    """One publish with one or two answers of one of its writes lost; what was done."""
    padding = draw.choice([0, 0, 0, SMALLEST_PART])
    release = network.next(padding)
    method, path = draw.choice(writes_of(release, padding))
    fault = Fault(method, served=draw.random() < 0.6, status=draw.choice(SAID), path=path)
    if (method, path) == END and draw.random() < 0.3:
        fault = replace(fault, status=None, served=True, cut=True)
    network.proxy.calm()
    network.proxy.plan = [fault] * draw.choice([1, 1, 2])
    before = network.generation()
    assert network.publish(release), "what was written is told to have been there"
    assert network.move(release) == before + 1
    assert network.proxy.plan == [], f"{fault} never came"
    network.assert_there(release)
    assert (network.generation(), network.champion()) == (before + 1, release.release)
    assert network.deleted() == []
    kind = "blob" if path.startswith("blobs/") else path.strip("/").rsplit("/", 1)[-1]
    return f"{kind}, {'server finished' if fault.served else 'server never saw it'}"


def beaten(network: Network, draw: random.Random, monkeypatch: pytest.MonkeyPatch) -> str:
    """One move of the pointer that another makes first, with its answer lost."""
    release, rival = network.next(), network.next()
    assert network.publish(release)
    publish_release(network.direct, PIPELINE, rival.folder, rival.manifest, EXTRA)
    before = network.generation()
    swap = network.store.swap

    def late(key: str, data: bytes, etag: str | None) -> str:
        network.move(rival, past=True)
        network.proxy.calm()
        status = draw.choice(SAID)
        network.proxy.plan = [Fault(served=draw.random() < 0.6, status=status, path="current.json")]
        return swap(key, data, etag)

    with monkeypatch.context() as patch:
        patch.setattr(network.store, "swap", late)
        with pytest.raises(PointerMoved):
            network.move(release)
    assert network.proxy.plan == []
    assert (network.generation(), network.champion()) == (before + 1, rival.release)
    assert network.deleted() == []
    return "beaten"


def silent(network: Network, draw: random.Random, monkeypatch: pytest.MonkeyPatch) -> str:
    """One publish in which nothing is answered from a write on: unknown, nothing undone, and done by asking again."""
    padding = draw.choice([0, 0, SMALLEST_PART])
    release = network.next(padding)
    method, path = draw.choice([call for call in writes_of(release, padding)[1:] if call not in (BEGIN, PART)])
    before, served = network.generation(), draw.random() < 0.5
    network.proxy.calm()
    network.proxy.from_then_on = Fault(method, served=served, path=path)

    def both() -> None:
        network.publish(release)
        network.move(release)

    with monkeypatch.context() as patch:
        patch.setattr(s3_failures, "PATIENCE_S", 0.2)
        with pytest.raises((OutcomeUnknown, StoreUnavailable)):
            both()
    assert network.deleted() == []
    network.proxy.calm()
    both()
    network.assert_there(release)
    assert (network.generation(), network.champion()) == (before + 1, release.release)
    return "silent"


def test_every_verdict_is_the_truth(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    for _ in range(6):
        injected(network, draw)
    for _ in range(2):
        beaten(network, draw, monkeypatch)
        silent(network, draw, monkeypatch)


@pytest.mark.soak
def test_200_answers_are_lost(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, done = random.Random(0), Counter[str]()
    for number in range(200):
        if number % 10 < 7:
            done[injected(network, draw)] += 1
        elif number % 10 < 9:
            done[beaten(network, draw, monkeypatch)] += 1
        else:
            done[silent(network, draw, monkeypatch)] += 1
            print(f"{number + 1} injections:", dict(done), flush=True)
    assert done.total() == 200
    ledger = list(network.direct.list(f"{PIPELINE}/ledger/"))
    assert len(ledger) == network.generation(), "a move without its entry, or an entry without its move"


@pytest.mark.soak
def test_no_call_to_a_server_that_stopped_hangs_for_30_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real time-outs; the server is stopped, so that connections are taken by the kernel and nobody answers."""
    (tmp_path / "f").write_bytes(b"x" * 1000)
    (tmp_path / "large").write_bytes(b"x" * (SMALLEST_PART + 1))
    with S3Server(tmp_path / "server") as server:
        server.make_bucket("tests")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://tests/x")
        etag = store.swap("k", b"1", None)
        calls: dict[str, Any] = {
            "find": lambda: store.find("k"),
            "size": lambda: store.size("k"),
            "list": lambda: list(store.list("")),
            "delete": lambda: store.delete("k"),
            "download": lambda: store.download("k", tmp_path / "copy"),
            "put": lambda: store.put_if_absent("new", b"1"),
            "put file": lambda: store.put_file_if_absent("f", tmp_path / "f"),
            "put in parts": lambda: store.put_file_if_absent("large", tmp_path / "large"),
            "swap": lambda: store.swap("k", b"2", etag),
            "check": store.check,
        }
        took: dict[str, float] = {}
        raised: dict[str, str] = {}

        def timed(name: str) -> None:
            began = time.monotonic()
            try:
                calls[name]()
            except StoreError as error:
                raised[name] = type(error).__name__
            took[name] = time.monotonic() - began

        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            threads = [threading.Thread(target=timed, args=(name,)) for name in calls]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            os.kill(server.pid, signal.SIGCONT)
    print({name: (round(seconds, 1), raised.get(name)) for name, seconds in took.items()})
    assert set(raised) == set(calls)
    assert max(took.values()) < 30


@pytest.mark.soak
@pytest.mark.parametrize("silent", [PART, END, ("GET", "")], ids=["part", "end", "check"])
def test_no_call_to_a_server_that_stops_midway_hangs_for_30_seconds(network: Network, silent: tuple[str, str]) -> None:
    """The real time-outs; the server answers until an upload's part, its end, or the first read of a check."""
    (network.folder / "large").write_bytes(b"x" * (SMALLEST_PART + 1))
    network.proxy.from_then_on = Fault(silent[0], served=False, hang=True, path=silent[1])
    upload = partial(network.store.put_file_if_absent, uuid.uuid4().hex, network.folder / "large")
    call = network.store.check if silent[0] == "GET" else upload
    began = time.monotonic()
    with pytest.raises((StoreUnavailable, OutcomeUnknown)):
        call()
    print(silent, round(time.monotonic() - began, 1))
    assert time.monotonic() - began < 30
