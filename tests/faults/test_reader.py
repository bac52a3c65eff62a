"""What a ranker team is promised (P5, P6, P7): no torn release, no request unserved, no bad release, a quick way back.

Short forms of P6 stand in `tests/serving/`, where each kind of bad release has its own reason to be refused.
"""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import ReleaseRefused
from tasks.release.manifest import Manifest, blob_key, manifest_key
from tasks.release.pointer import promote, read_pointer
from tasks.release.publishing import publish_release
from tasks.serving.ranker import Ranker
from tests.faults.publisher import PIPELINE, numbered
from tests.faults.warm import ROOT
from tests.releases import NIGHT, Made, make_release, next_night, shared_graph, smuggle
from tests.serving.test_ranker import CRAFTED, DAMAGE, OPENED, described_anew


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """Two releases of unlike answers, with their manifests beside their folders."""
    room = tmp_path_factory.mktemp("pair")
    one = make_release(room / "one", shared_graph(tmp_path_factory, "full"))
    both = (one, next_night(one, room / "two", NIGHT))
    for made in both:
        made.folder.with_suffix(".json").write_bytes(made.manifest.serialise())
        made.folder.with_suffix(".id").write_text(made.manifest.release)
    return both


@pytest.fixture
def store(tmp_path: Path, pair: tuple[Made, Made]) -> ObjectStore:
    """A store in which the first of them is the champion."""
    (tmp_path / "store").mkdir()
    opened = open_store(str(tmp_path / "store"))
    publish_release(opened, PIPELINE, pair[0].folder, pair[0].manifest, {})
    promote(opened, PIPELINE, pair[0].manifest.release, NIGHT, token=1)
    return opened


class Traffic:
    """Threads that ask one golden request over and over, and know both answers to it."""

    def __init__(self, ranker: Ranker, pair: tuple[Made, Made], threads: int = 2) -> None:
        self._ranker = ranker
        self._inputs = pair[0].golden[-2].inputs
        self._expected = [made.golden[-2].scores for made in pair]
        assert np.abs(self._expected[0] - self._expected[1]).max() > 0.01
        self.answered, self.wrong = [0, 0], []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def ask(self) -> None:
        """One request; its answer is one release's as a whole."""
        try:
            scores = self._ranker.score(self._inputs)
            off = [float(np.abs(scores - one).max()) for one in self._expected]
            self.answered[int(np.argmin(off))] += 1
            if not min(off) < 1e-5:
                self.wrong.append(off)
        except Exception as error:  # noqa: BLE001 - of any kind: nobody may go unserved
            self.wrong.append(error)

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.ask()

    def __enter__(self) -> "Traffic":
        [thread.start() for thread in self._threads]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        [thread.join() for thread in self._threads]


def whole(store: ObjectStore) -> str:
    """The release that the pointer names, every byte of it fetched and held against its digest."""
    pointer = read_pointer(store, PIPELINE)
    assert pointer is not None
    manifest = Manifest.parse(store.get(manifest_key(PIPELINE, pointer.release)).data, PIPELINE, pointer.release)
    for file in manifest.files:
        data = store.get(blob_key(PIPELINE, file.sha256)).data
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256), file.name
    return pointer.release


@contextmanager
def publishing(store: ObjectStore, pair: tuple[Made, Made], room: Path, count: int) -> Iterator["Publisher"]:
    publisher = Publisher(store.url, [made.folder for made in pair], room, count)
    try:
        yield publisher
    finally:
        publisher.end()


class Publisher:
    """A process that publishes; killed and started again where it was."""

    def __init__(self, url: str, made: list[Path], room: Path, count: int) -> None:
        self._url, self._made, self._room, self.left, self.first = url, made, room, count, 1
        self.kills = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.faults.publisher", self._url, ":".join(map(str, self._made))]
        self.process = subprocess.Popen(
            [*command, str(self._room), str(self.first), str(self.left)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        self._told = threading.Thread(target=self._listen, args=(self.process.stdout,))
        self._told.start()

    def _listen(self, lines) -> None:
        for line in lines:
            self.left -= 1
            self.first = int(line) + 1

    def end(self) -> None:
        """Kill it wherever it is."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._told.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill(self) -> None:
        """Kill it, and start another that goes on."""
        self.end()
        self.kills += 1
        if self.left:
            self.start()

    @property
    def done(self) -> bool:
        return self.process.poll() is not None and not self.left


@pytest.mark.parametrize(
    ("publishes", "polls", "kills"),
    [(7, 40, 1), pytest.param(501, 10_000, 50, marks=pytest.mark.soak)],
    ids=["short", "soak"],
)
def test_p5_no_poll_sees_part_of_a_release_and_no_request_goes_unserved(
    store: ObjectStore, pair: tuple[Made, Made], tmp_path: Path, publishes: int, polls: int, kills: int
):
    """A publisher is killed at random times; two readers poll, verify and answer all the while."""
    dice, seen, verified = random.Random(5), Counter(), 0
    with (
        Ranker(store, PIPELINE, cache=tmp_path / "cache") as ranker,
        Traffic(ranker, pair) as traffic,
        publishing(store, pair, tmp_path / "room", publishes) as publisher,
    ):
        left = [publishes - (one + 1) * publishes // (kills + 1) for one in range(kills)]  # how far it is by then
        while verified < polls or not publisher.done:
            if left and publisher.left <= left[0]:
                time.sleep(dice.random() * 0.02)  # anywhere in the publish that it is at
                publisher.kill()
                left.pop(0)
            seen[whole(store)] += 1
            ranker.refresh()
            assert ranker.refusal is None
            verified += 1
        ranker.refresh()
        traffic.ask()  # the last publish is the other release's: readers may pass over what another one follows at once
        # It ended by itself, or was killed behind its last publish, before it was over.
        assert publisher.process.returncode in (0, -signal.SIGKILL)
        assert not publisher.left
        assert ranker.release == whole(store)
    print(f"{verified} polls, {publishes} publishes, {publisher.kills} kills, {len(seen)} releases seen, "
          f"{sum(traffic.answered)} requests answered, {len(traffic.wrong)} not")  # fmt: skip
    assert publisher.kills == kills
    assert traffic.wrong == []
    assert min(traffic.answered) > 0
    manifests = [key for key in store.list(f"{PIPELINE}/releases/") if key.endswith("manifest.json")]
    assert len(manifests) == publishes + 1  # each number once, whatever was killed
    pointer = read_pointer(store, PIPELINE)
    assert pointer is not None
    assert pointer.generation == publishes + 1


BAD = [*(("damage", name) for name in DAMAGE), *(("crafted", name) for name in CRAFTED)]


@pytest.mark.parametrize(
    "count", [pytest.param(12, id="short"), pytest.param(1_000, id="soak", marks=pytest.mark.soak)]
)
def test_p5_bad_releases_fail_no_request(store: ObjectStore, pair: tuple[Made, Made], tmp_path: Path, count: int):
    """One bad release after the other becomes the champion; the good one answers all the while."""
    refused: Counter[str] = Counter()
    with Ranker(store, PIPELINE, cache=tmp_path / "cache") as ranker, Traffic(ranker, pair) as traffic:
        for number in range(count):
            how, name = BAD[number * 7 % len(BAD)]
            folder, manifest = numbered(pair[1].folder, tmp_path / "room", number)
            made = replace(pair[1], folder=folder, manifest=manifest)
            if how == "crafted":
                for file in folder.iterdir():  # its files are links to the good ones
                    data = file.read_bytes()
                    file.unlink()
                    file.write_bytes(data)
                CRAFTED[name][0](folder)
                made = replace(made, manifest=described_anew(made, folder))
            smuggle(store, folder, made.manifest)
            promote(store, PIPELINE, made.manifest.release, NIGHT, token=1, force=True)
            own = None
            if how == "damage":
                keys = [blob_key(PIPELINE, file.sha256) for file in made.manifest.files]
                own = {key: store.get(key).data for key in keys}
                DAMAGE[name](store, made)
                shutil.rmtree(tmp_path / "cache/blobs", ignore_errors=True)  # or what is there would not be fetched
            assert not ranker.refresh(), (how, name)
            assert ranker.refusal is not None
            refused[name] += 1
            for key, data in (own or {}).items():
                store.delete(key)
                store.put_if_absent(key, data)
            shutil.rmtree(folder)
        promote(store, PIPELINE, pair[0].manifest.release, NIGHT, token=1, force=True)
        ranker.refresh()
        assert ranker.refusal is None
    print(f"{sum(refused.values())} bad releases of {len(refused)} kinds refused, {sum(traffic.answered)} requests "
          f"answered, {len(traffic.wrong)} not")  # fmt: skip
    assert traffic.wrong == []
    assert traffic.answered[0] > 0
    assert traffic.answered[1] == 0
    assert len(list((tmp_path / "cache/releases").iterdir())) <= 3  # what serves, what is named, what was before


@pytest.mark.soak
def test_p6_of_a_thousand_random_bit_flips_none_is_loaded(store: ObjectStore, pair: tuple[Made, Made]):
    """In blobs, in the manifest and in the pointer, each as likely as it is long, but every file at least 20 times.

    In blobs that this ranker does not open, a flip changes nothing.
    """
    random = np.random.default_rng(6)
    made = pair[0]
    keys = {file.name: blob_key(PIPELINE, file.sha256) for file in made.manifest.files}
    keys |= {"manifest.json": manifest_key(PIPELINE, made.manifest.release), "current.json": f"{PIPELINE}/current.json"}
    lengths = np.array([len(store.get(key).data) for key in keys.values()])
    names = [*list(keys) * 20, *random.choice(list(keys), 1_000 - 20 * len(keys), p=lengths / lengths.sum()).tolist()]
    with Ranker(store, PIPELINE) as ranker:
        good = ranker.score(made.golden[-1].inputs)
    loaded: Counter[str] = Counter()
    for name in names:
        key = keys[name]
        data = store.get(key).data
        bit = int(random.integers(len(data) * 8))
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        store.delete(key)
        store.put_if_absent(key, bytes(bad))
        try:
            with Ranker(store, PIPELINE) as ranker:
                loaded[name] += 1
                # What an unsigned manifest or pointer says of times and reasons binds nobody: the release is the same.
                assert ranker.release == made.manifest.release
                np.testing.assert_array_equal(ranker.score(made.golden[-1].inputs), good)
        except ReleaseRefused:
            pass
        store.delete(key)
        store.put_if_absent(key, data)
    print(f"{len(names)} flips, loaded all the same: {dict(loaded)}")
    unopened = {file.name for file in made.manifest.files} - OPENED
    assert unopened <= set(loaded) <= unopened | {"manifest.json", "current.json"}


@pytest.mark.parametrize(
    "rollbacks", [pytest.param(2, id="short"), pytest.param(50, id="soak", marks=pytest.mark.soak)]
)
def test_p7_a_warm_ranker_goes_back_by_itself_and_fetches_nothing(
    store: ObjectStore, pair: tuple[Made, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rollbacks: int
):
    every, took = 0.5, []
    publish_release(store, PIPELINE, pair[1].folder, pair[1].manifest, {})
    with (
        Ranker(store, PIPELINE, cache=tmp_path / "cache", refresh_every=every) as ranker,
        Traffic(ranker, pair, 1) as traffic,
    ):
        for turn in range(2 * rollbacks):
            made = pair[1 - turn % 2]
            if turn == 1:
                monkeypatch.setattr(store, "download", lambda *_: pytest.fail("fetched"))
            began = time.monotonic()
            promote(store, PIPELINE, made.manifest.release, NIGHT, token=1, force=True)
            moved = time.monotonic()
            while ranker.release != made.manifest.release:
                assert ranker.refusal is None
                time.sleep(0.002)
            if turn % 2:
                took.append((moved - began, time.monotonic() - moved))
    moves, follows = zip(*took, strict=True)
    print(f"{rollbacks} rollbacks: moved in at most {max(moves):.3f} s, followed in at most {max(follows):.2f} s, "
          f"{np.median(follows):.2f} s in the median, with a poll every {every} s")  # fmt: skip
    assert traffic.wrong == []
    assert min(traffic.answered) > 0
