"""Metrics: what Prometheus is told is what happened."""

import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tasks.clients.object_store import ObjectStore
from tasks.errors import RequestRejected
from tasks.release.manifest import manifest_key
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.serving.metrics import Metrics
from tasks.serving.ranker import Ranker
from tasks.serving.refresher import Patience
from tests.releases import NIGHT, PIPELINE, Made


def test_what_prometheus_is_told_is_what_happened(store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path):
    registry = CollectorRegistry()

    def told(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"nightrank_{name}", {"pipeline": PIPELINE, **labels})

    golden, first, second = tonight.golden[-2], tonight.manifest.release, tomorrow.manifest.release
    with Ranker(store, PIPELINE, "cpu", batching=True, events=Metrics(registry, PIPELINE)) as ranker:
        assert told("release", role="champion", release=first, device="cpu") == 1
        for _ in range(3):
            ranker.score(golden.inputs)
        with pytest.raises(RequestRejected):
            ranker.score({})
        assert told("requests_total", role="champion", outcome="answered") == 48
        assert told("requests_total", role="champion", outcome="rejected") == 1
        assert told("candidates_total", role="champion") == 3 * 16 * 9
        assert told("answer_seconds_count", role="champion") == 3
        assert told("batch_requests_sum") == 48
        assert told("constant_share", role="champion") == 0
        assert (told("signed"), ranker.signed) == (0, False)
        assert told("release_night_seconds", role="champion") == 1772323200  # 2026-03-01
        publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
        promote(store, PIPELINE, second, tomorrow.manifest.night, token=1)
        key = manifest_key(PIPELINE, second)
        data = store.get(key).data
        store.delete(key)
        ranker.refresh()
        assert (told("refused"), told("pointer_generation"), told("polls_total", outcome="refused")) == (1, 1, 1)
        store.put_if_absent(key, data)
        ranker.refresh()
        assert (told("refused"), told("pointer_generation"), told("polls_total", outcome="good")) == (0, 2, 2)
        assert told("release", role="champion", release=first, device="cpu") is None
        assert told("release", role="champion", release=second, device="cpu") == 1
        assert told("swaps_total", role="champion") == 2
        assert (told("load_seconds", role="champion") or 0) > 0
        assert (told("polled_seconds") or 0) > 1.7e9
    assert NIGHT.isoformat() not in generate_latest(registry).decode()


def test_looks_at_the_pointer_are_told_while_a_refused_release_waits(store: ObjectStore, tomorrow: Made):
    registry = CollectorRegistry()

    def told(name: str, **labels: str) -> float:
        return registry.get_sample_value(f"nightrank_{name}", {"pipeline": PIPELINE, **labels}) or 0

    with Ranker(store, PIPELINE, events=Metrics(registry, PIPELINE)) as ranker:
        publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
        promote(store, PIPELINE, tomorrow.manifest.release, tomorrow.manifest.night, token=1)
        store.delete(manifest_key(PIPELINE, tomorrow.manifest.release))
        ranker._follower._patience = Patience(3600.0)
        for looks in (1, 2, 3):
            before = told("polled_seconds")
            ranker._follower.poll()
            assert told("polls_total", outcome="refused") == looks
            assert told("polled_seconds") > before
        assert told("refused") == 1


def test_rankers_of_one_process_share_a_registry_and_threads_lose_no_count():
    registry = CollectorRegistry()
    both = [Metrics(registry, "films"), Metrics(registry, "books")]

    def count(one: Metrics) -> None:
        for _ in range(500):
            one.answered("champion", 1, 7, 0.001)

    threads = [threading.Thread(target=count, args=(one,)) for one in both for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for pipeline in ("films", "books"):
        labels = {"pipeline": pipeline, "role": "champion"}
        assert registry.get_sample_value("nightrank_candidates_total", labels) == 4 * 500 * 7
