"""A ranker's files on its own disk: what is kept, what is fetched, what is hashed, and which generations were seen."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tasks.clients.object_store import ObjectStore
from tasks.errors import InvalidConfig, ReleaseRefused
from tasks.release.manifest import pointer_key
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.serving import cache as caches
from tasks.serving.cache import ReleaseCache
from tasks.serving.ranker import Ranker
from tasks.serving.seen import SeenGeneration
from tasks.serving.variants import everything
from tests.releases import NIGHT, PIPELINE, Made, next_night


def publish(store: ObjectStore, made: Made, move: bool = True) -> str:
    publish_release(store, PIPELINE, made.folder, made.manifest, {})
    if move:
        promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1, force=True)
    return made.manifest.release


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, store: ObjectStore):
    """Names of blobs that are hashed, and keys that are fetched."""
    hashed, fetched = [], []
    real_hash, real_fetch = caches.sha256_of, store.download
    with monkeypatch.context() as patch:
        patch.setattr(caches, "sha256_of", lambda path: hashed.append(path.name) or real_hash(path))
        patch.setattr(store, "download", lambda key, *rest: fetched.append(key) or real_fetch(key, *rest))
        yield hashed, fetched


def fetch(cache: ReleaseCache, store: ObjectStore, made: Made, *keep: str) -> None:
    with cache.opened(store, PIPELINE, made.manifest, keep) as lay_out:
        folder = lay_out(everything(made.manifest))
        assert {path.name: path.stat().st_size for path in folder.iterdir()} == {
            file.name: file.bytes for file in made.manifest.files
        }


def test_releases_with_a_role_stay_and_all_others_go(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    third = next_night(tonight, tmp_path / "third", NIGHT, seed=5)
    first, second = tonight.manifest.release, tomorrow.manifest.release
    for made in (tomorrow, third):
        publish(store, made, move=False)
    cache = ReleaseCache(tmp_path / "cache")
    fetch(cache, store, tonight)
    fetch(cache, store, tomorrow, first)
    fetch(cache, store, third, first, second)
    releases = tmp_path / "cache/releases"
    assert {one.name for one in releases.iterdir()} == {first, second, third.manifest.release}
    with counted(monkeypatch, store) as (_, fetched):
        for made in (tonight, tomorrow, third):
            fetch(cache, store, made, first, second, third.manifest.release)
    assert fetched == []
    fetch(cache, store, tomorrow)
    assert [one.name for one in releases.iterdir()] == [second]
    kept = {file.sha256 for file in tomorrow.manifest.files}
    assert {one.name for one in (tmp_path / "cache/blobs").iterdir()} == kept


def refused(cache: ReleaseCache, store: ObjectStore, made: Made, *keep: str) -> None:
    with cache.opened(store, PIPELINE, made.manifest, keep) as lay_out:
        lay_out(everything(made.manifest))
        raise ReleaseRefused("it is no good")


def test_bad_releases_one_after_the_other_do_not_fill_the_disk(store: ObjectStore, tonight: Made, tmp_path: Path):
    cache = ReleaseCache(tmp_path / "cache")
    fetch(cache, store, tonight)
    good = tonight.manifest.release
    for seed in range(3):
        bad = next_night(tonight, tmp_path / f"bad{seed}", NIGHT, seed=seed + 10)
        publish(store, bad, move=False)
        with pytest.raises(ReleaseRefused, match="no good"):
            refused(cache, store, bad, good)
        assert {one.name for one in (tmp_path / "cache/releases").iterdir()} == {good, bad.manifest.release}


def test_a_large_blob_is_hashed_once_a_day_and_whenever_it_changed(
    store: ObjectStore, tonight: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(caches, "SMALL", 1000)
    large = {file.sha256 for file in tonight.manifest.files if file.bytes >= 1000}
    small = {file.sha256 for file in tonight.manifest.files} - large
    assert large
    assert small
    cache = ReleaseCache(tmp_path / "cache")
    fetch(cache, store, tonight)
    with counted(monkeypatch, store) as (hashed, fetched):
        fetch(cache, store, tonight)
        assert (set(hashed), fetched) == (small, [])
    now = caches.time.time()
    for later, again in ((3600, small), (25 * 3600, small | large), (26 * 3600, small), (-3600, small | large)):
        monkeypatch.setattr(caches.time, "time", lambda later=later: now + later)
        with counted(monkeypatch, store) as (hashed, fetched):
            fetch(cache, store, tonight)
            assert (set(hashed), fetched) == (again, [])
    one = max(tonight.manifest.files, key=lambda file: file.bytes)
    blob = tmp_path / "cache/blobs" / one.sha256
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)  # in place: its size and inode stay
    with counted(monkeypatch, store) as (hashed, fetched):
        fetch(cache, store, tonight)
    assert one.sha256 in hashed
    assert [key.rsplit("/")[-1] for key in fetched] == [one.sha256]
    assert caches.sha256_of(blob) == one.sha256


@pytest.mark.parametrize("stamp", ["", "1 2 3 4", "nonsense", "1 2"])
def test_a_stamp_that_says_something_else_counts_for_nothing(
    store: ObjectStore, tonight: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stamp: str
):
    monkeypatch.setattr(caches, "SMALL", 0)
    cache = ReleaseCache(tmp_path / "cache")
    fetch(cache, store, tonight)
    for one in (tmp_path / "cache/verified").iterdir():
        one.write_text(stamp)
    with counted(monkeypatch, store) as (hashed, fetched):
        fetch(cache, store, tonight)
    assert (set(hashed), fetched) == ({file.sha256 for file in tonight.manifest.files}, [])


RAISED = """
import json, sys
from pathlib import Path
from tasks.serving.seen import SeenGeneration
from tasks.serving.variants import everything
seen = SeenGeneration(Path(sys.argv[1]), sys.argv[2])
for one in json.loads(sys.argv[3]):
    seen.remember(one)
"""


def test_of_many_processes_the_highest_generation_is_remembered(tmp_path: Path):
    orders = [np.random.default_rng(seed).permutation(60).tolist() for seed in range(4)]
    commands = [[sys.executable, "-c", RAISED, str(tmp_path), PIPELINE, json.dumps(order)] for order in orders]
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for command in commands]
    assert [process.wait() for process in processes] == [0] * 4
    assert SeenGeneration(tmp_path, PIPELINE).read() == 59
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seen.json", "seen.lock"]


def test_a_replayed_pointer_is_refused_by_a_ranker_that_starts_anew_with_its_cache(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path
):
    cache, key = tmp_path / "cache", pointer_key(PIPELINE)
    old = store.get(key).data
    publish(store, tomorrow)
    with Ranker(store, PIPELINE, cache=cache) as ranker:
        assert ranker.release == tomorrow.manifest.release
    store.delete(key)
    store.put_if_absent(key, old)
    with pytest.raises(ReleaseRefused, match="went back from generation 2 to 1"):
        Ranker(store, PIPELINE, cache=cache)
    with pytest.raises(ReleaseRefused, match="went back from generation 7 to 1"):
        Ranker(store, PIPELINE, min_generation=7)
    SeenGeneration(cache, PIPELINE).forget()
    with Ranker(store, PIPELINE, cache=cache) as ranker:
        assert ranker.release == tonight.manifest.release
    assert SeenGeneration(cache, PIPELINE).read() == 1


def test_a_generation_counts_as_seen_only_when_its_release_was_found_good(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path
):
    cache = tmp_path / "cache"
    with Ranker(store, PIPELINE, cache=cache) as ranker:
        publish(store, tomorrow)
        store.delete(f"{PIPELINE}/releases/{tomorrow.manifest.release}/manifest.json")
        assert not ranker.refresh()
        assert SeenGeneration(cache, PIPELINE).read() == 1
        promote(store, PIPELINE, tonight.manifest.release, NIGHT, token=1, force=True)
        assert not ranker.refresh()
        assert (ranker.refusal, SeenGeneration(cache, PIPELINE).read()) == (None, 3)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"pipeline": "shop", "generation": -1}', "\x00", "[" * 9999])
def test_a_damaged_memory_is_refused_and_names_the_file(store: ObjectStore, tmp_path: Path, content: str):
    (tmp_path / "seen.json").write_text(content)
    with pytest.raises(ReleaseRefused, match=r"seen\.json cannot be read .*delete the file"):
        Ranker(store, PIPELINE, cache=tmp_path)


def test_a_cache_of_another_pipeline_is_refused(store: ObjectStore, tmp_path: Path):
    (tmp_path / "seen.json").write_text(json.dumps({"pipeline": "films", "generation": 3}))
    with pytest.raises(InvalidConfig, match="belongs to pipeline 'films', not 'shop'"):
        Ranker(store, PIPELINE, cache=tmp_path)


def test_a_disk_that_refuses_keeps_what_serves(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Ranker(store, PIPELINE, cache=tmp_path / "cache") as ranker:
        publish(store, tomorrow)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert not ranker.refresh()
        assert "No space left" in (ranker.refusal or "")
        assert ranker.release == tonight.manifest.release
        assert ranker.refresh()
