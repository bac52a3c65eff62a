"""Batches of small requests: who runs with whom, that everybody gets what is his, and that nobody harms another."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tasks.clients.object_store import ObjectStore
from tasks.errors import ReleaseRefused, RequestRejected
from tasks.release.manifest import InputSpec
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.serving.batcher import MOST, SMALL, Batcher
from tasks.serving.events import Events
from tasks.serving.ranker import Ranker
from tests.releases import PIPELINE, Made

SPECS = (InputSpec("user", "request", "int64", "", -1), InputSpec("item", "candidate", "int64", "", -1))


class Slow:
    """A release that scores user + item, and waits to be let go."""

    def __init__(self) -> None:
        self.manifest = SimpleNamespace(interface=SimpleNamespace(inputs=SPECS))
        self.shapes: list[tuple[int, int]] = []
        self.runs, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def run(self, inputs: Any, shape: tuple[int, int]) -> np.ndarray:
        self.shapes.append(shape)
        self.runs.release()
        self.go.acquire()
        if (inputs["user"] == 13).any():
            raise ReleaseRefused("13 brings bad luck")
        assert inputs["item"].shape == shape
        return (inputs["user"][:, None] + inputs["item"]).astype(np.float32)[..., None]


def asked(user: int, items: list[int], rows: int = 1) -> tuple[Any, tuple[int, int]]:
    return {"user": np.full(rows, user), "item": np.tile(np.array(items), (rows, 1))}, (rows, len(items))


class Crowd:
    """Callers that come while a first one runs."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.pool = ThreadPoolExecutor(100)
        self.waiting = 0

    def come(self, release: Slow, user: int, items: list[int], rows: int = 1) -> Callable[[], np.ndarray]:
        future = self.pool.submit(self.batcher.run, release, *asked(user, items, rows))
        return lambda: future.result(60)

    def queued(self, count: int) -> None:
        while len(self.batcher._waiting) < count:
            time.sleep(0.001)


class Heard(Events):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def batched(self, requests: int) -> None:
        self.sizes.append(requests)


def test_those_who_come_while_another_runs_run_together_and_get_what_is_theirs():
    heard, slow = Heard(), Slow()
    crowd = Crowd(Batcher(heard))
    first = crowd.come(slow, 1, [10])
    slow.runs.acquire()
    others = []
    for user in range(2, 12):
        others.append((user, crowd.come(slow, user, list(range(20, 20 + 4 + user % 2)))))
        crowd.queued(user - 1)
    slow.go.release(2)
    assert first().tolist() == [[[11.0]]]
    for user, scores in others:
        assert scores()[..., 0].tolist() == [[user + item for item in range(20, 20 + 4 + user % 2)]]
    assert (slow.shapes, heard.sizes) == ([(1, 1), (10, 5)], [1, 10])


def test_lists_of_unlike_length_other_releases_and_too_many_run_apart():
    slow, other = Slow(), Slow()
    crowd = Crowd(Batcher(Events()))
    waiting = [crowd.come(slow, 1, [10])]
    slow.runs.acquire()
    for count, (release, items, rows) in enumerate(
        [(slow, 3, 2), (slow, 100, 1), (other, 3, 1), (slow, 3, MOST - 2), (slow, 3, 1)], start=1
    ):
        waiting.append(crowd.come(release, 2, list(range(items)), rows))
        crowd.queued(count)
    slow.go.release(9)
    other.go.release(9)
    for scores in waiting:
        assert scores().shape[2] == 1
    assert slow.shapes == [(1, 1), (MOST, 3), (1, 100), (1, 3)]
    assert other.shapes == [(1, 3)]


def test_one_bad_request_harms_no_other():
    slow = Slow()
    crowd = Crowd(Batcher(Events()))
    first = crowd.come(slow, 1, [10])
    slow.runs.acquire()
    waiting = []
    for count, user in enumerate((2, 13, 3), start=1):
        waiting.append(crowd.come(slow, user, [10]))
        crowd.queued(count)
    slow.go.release(9)
    assert [first().item(), waiting[0]().item(), waiting[2]().item()] == [11, 12, 13]
    with pytest.raises(ReleaseRefused, match="bad luck"):
        waiting[1]()
    assert slow.shapes == [(1, 1), (3, 1), (1, 1), (1, 1), (1, 1)]
    slow.go.release()
    assert crowd.come(slow, 5, [5])().item() == 10  # the lane is free again


def test_two_lanes_run_at_the_same_time_and_large_calls_need_none():
    slow = Slow()
    crowd = Crowd(Batcher(Events(), lanes=2))
    waiting = [crowd.come(slow, 1, [1]), crowd.come(slow, 2, [1]), crowd.come(slow, 3, list(range(SMALL)), 2)]
    for _ in range(3):
        assert slow.runs.acquire(timeout=60)
    slow.go.release(3)
    assert [scores().shape for scores in waiting] == [(1, 1, 1), (1, 1, 1), (2, SMALL, 1)]


def test_batched_answers_are_the_networks_while_releases_swap(store: ObjectStore, tonight: Made, tomorrow: Made):
    """Sixteen threads with single requests cut out of the golden ones; every answer is one release's."""
    publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
    specs = tonight.manifest.interface.inputs
    inputs, expected = tonight.golden[-2].inputs, [made.golden[-2].scores for made in (tonight, tomorrow)]
    stop, wrong, served, heard = threading.Event(), [], [0, 0], Heard()

    def ask(seed: int, ranker: Ranker) -> None:
        random = np.random.default_rng(seed)
        while not stop.is_set():
            row, width = int(random.integers(16)), int(random.integers(7, 10))
            one = {
                spec.name: inputs[spec.name][row : row + 1]
                if spec.per == "request"
                else inputs[spec.name][row : row + 1, :width]
                for spec in specs
            }
            scores = ranker.score(one)
            off = [np.abs(scores - whole[row : row + 1, :width]).max() for whole in expected]
            served[int(np.argmin(off))] += 1
            if not min(off) < 1e-5:
                wrong.append((row, width, off))

    with Ranker(store, PIPELINE, batching=True, events=heard) as ranker:
        with pytest.raises(RequestRejected):
            ranker.score({})
        with ThreadPoolExecutor(16) as pool:
            asking = [pool.submit(ask, seed, ranker) for seed in range(16)]
            try:
                for turn in range(4):
                    made = (tomorrow, tonight)[turn % 2]
                    before = sum(served)
                    promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1, force=True)
                    assert ranker.refresh()
                    while sum(served) < before + 200 and not any(one.done() for one in asking):
                        time.sleep(0.001)
            finally:
                stop.set()
        [one.result() for one in asking]
    assert not wrong
    assert min(served) > 0
    assert max(heard.sizes) > 4
