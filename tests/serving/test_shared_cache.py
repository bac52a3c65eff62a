"""A cache that several processes use at once: nobody waits for another's fetch, nor loses what he is loading."""

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore
from tasks.errors import InvalidConfig, ReleaseRefused
from tasks.release.manifest import blob_key
from tasks.serving import cache as caches
from tasks.serving import locks
from tasks.serving.cache import ReleaseCache
from tasks.serving.ranker import Ranker
from tasks.serving.variants import everything
from tests.faults.warm import ROOT
from tests.releases import NIGHT, PIPELINE, Made, next_night
from tests.serving.test_cache import counted, fetch, publish

USER = """
import hashlib, sys
from pathlib import Path
from tasks.clients.object_store import open_store
from tasks.release.manifest import Manifest, manifest_key
from tasks.serving.cache import ReleaseCache
from tasks.serving.variants import everything

url, pipeline, cache, where, *releases = sys.argv[1:]
store, waited = open_store(url), []

def wait(at):
    if at == where and not waited:
        waited.append(at)
        print(at, flush=True)
        sys.stdin.readline()

for release in releases:
    manifest = Manifest.parse(store.get(manifest_key(pipeline, release)).data, pipeline, release)
    with ReleaseCache(Path(cache)).opened(store, pipeline, manifest, (), lambda: wait("fetching")) as lay_out:
        folder = lay_out(everything(manifest))
        wait("loading")
        for file in manifest.files:
            assert hashlib.sha256((folder / file.name).read_bytes()).hexdigest() == file.sha256
        assert {one.name for one in folder.iterdir()} == {file.name for file in manifest.files}
"""
LOCKS = """
import fcntl, sys, time
with open(sys.argv[1], "ab") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(600)
"""


def user(store: ObjectStore, cache: Path, where: str, *made: Made) -> "subprocess.Popen[str]":
    """A process that fetches and loads releases, and waits once on the way until it is written to."""
    command = [sys.executable, "-c", USER, store.url, PIPELINE, str(cache), where]
    command += [one.manifest.release for one in made]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def waiting(store: ObjectStore, cache: Path, where: str, made: Made) -> Iterator["subprocess.Popen[str]"]:
    with user(store, cache, where, made) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == where
            yield process
        finally:
            process.kill()


def go_on(process: "subprocess.Popen[str]") -> int:
    assert process.poll() is None
    process.communicate("go on\n", 60)
    return process.returncode


def kept(cache: Path) -> set[str]:
    return {one.name for one in (cache / "releases").iterdir()}


def test_a_rollback_waits_for_no_other_process_that_fetches(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    third = next_night(tonight, tmp_path / "third", NIGHT, seed=5)
    publish(store, third, move=False)
    cache = tmp_path / "cache"
    with Ranker(store, PIPELINE, cache=cache) as ranker:
        publish(store, tomorrow)
        assert ranker.refresh()
        with waiting(store, cache, "fetching", third) as process, counted(monkeypatch, store) as (_, fetched):
            publish(store, tonight)
            assert ranker.refresh()
            assert (ranker.release, fetched) == (tonight.manifest.release, [])
            assert go_on(process) == 0


def test_nobody_removes_what_another_process_is_loading_and_the_last_one_tidies(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path
):
    publish(store, tomorrow, move=False)
    cache = ReleaseCache(tmp_path)
    with waiting(store, tmp_path, "loading", tomorrow) as process:
        fetch(cache, store, tonight)
        assert kept(tmp_path) == {tonight.manifest.release, tomorrow.manifest.release}
        assert go_on(process) == 0
    assert kept(tmp_path) == {tomorrow.manifest.release}
    fetch(cache, store, tonight)
    assert kept(tmp_path) == {tonight.manifest.release}


def test_processes_that_lay_out_one_folder_and_prune_at_once_see_it_whole(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path
):
    publish(store, tomorrow, move=False)
    processes = [user(store, tmp_path / "cache", "never", *[tonight, tomorrow] * 15) for _ in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    for process in processes:
        process.communicate()


def test_two_fetch_one_blob_at_once_and_both_have_it(
    store: ObjectStore, tonight: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    key = blob_key(PIPELINE, tonight.manifest.files[0].sha256)
    both, real, failed = threading.Barrier(2, timeout=20), store._stream, []

    def together(asked: str) -> Iterator[bytes]:
        for chunk in real(asked):
            if asked == key:
                both.wait()
            yield chunk

    def one() -> None:
        try:
            fetch(ReleaseCache(tmp_path), store, tonight)
        except BaseException as error:  # noqa: BLE001 - told below
            failed.append(error)

    monkeypatch.setattr(store, "_stream", together)
    threads = [threading.Thread(target=one) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failed == []
    assert {one.name for one in (tmp_path / "blobs").iterdir()} == {file.sha256 for file in tonight.manifest.files}


@pytest.mark.parametrize("name", ["lock", "layout.lock", "seen.lock"])
def test_a_stopped_process_that_holds_a_lock_is_told_and_waited_for_only_so_long(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    with Ranker(store, PIPELINE, cache=tmp_path / "cache") as ranker:
        publish(store, tomorrow)
        path = tmp_path / "cache" / name
        with subprocess.Popen([sys.executable, "-c", LOCKS, str(path)], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "locked\n"
                os.kill(process.pid, signal.SIGSTOP)
                assert not ranker.refresh()
                assert f"has held the lock {path} for 0.1 s, it is probably stopped" in (ranker.refusal or "")
                assert f"`fuser {path}`" in (ranker.refusal or "")
                assert ranker.warnings == (ranker.refusal,)
                assert ranker.release == tonight.manifest.release
            finally:
                process.kill()
        assert ranker.refresh()


def test_one_that_loads_and_is_stopped_blocks_nobody(store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path):
    publish(store, tomorrow, move=False)
    with waiting(store, tmp_path, "loading", tomorrow) as process:
        os.kill(process.pid, signal.SIGSTOP)
        fetch(ReleaseCache(tmp_path), store, tonight)
        with (tmp_path / "lock").open("ab") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def digests(folder: Path) -> dict[str, str]:
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in folder.iterdir()}


def test_a_folder_that_was_left_half_laid_out_is_mended_in_place(store: ObjectStore, tonight: Made, tmp_path: Path):
    cache, files = ReleaseCache(tmp_path), {file.name: file.sha256 for file in tonight.manifest.files}
    with cache.opened(store, PIPELINE, tonight.manifest) as lay_out:
        folder = lay_out(everything(tonight.manifest))
        inode = folder.stat().st_ino
        absent, other, turned, linked, good = (folder / name for name in list(files)[:5])
        known = good.stat()
        for one in (absent, other, turned, linked):
            one.unlink()
        other.write_bytes(b"something else")
        turned.mkdir()
        (turned / "below").write_bytes(b"")
        linked.symlink_to(tmp_path / "blobs" / files[linked.name])
        (folder / "extra.bin").write_bytes(b"")
        (folder / ".part").hardlink_to(good)
        assert lay_out(everything(tonight.manifest)) == folder
        assert digests(folder) == files
        assert not any(one.is_symlink() for one in folder.iterdir())
        assert (folder.stat().st_ino, good.stat().st_ino) == (inode, known.st_ino)


@pytest.mark.parametrize("place", ["blobs", "verified"])
def test_a_folder_in_the_place_of_a_file_is_removed_and_the_file_fetched(
    store: ObjectStore, tonight: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    monkeypatch.setattr(caches, "SMALL", 0)
    file = tonight.manifest.files[0]
    odd = tmp_path / place / file.sha256
    odd.mkdir(parents=True)
    (odd / "below").write_bytes(b"")
    fetch(ReleaseCache(tmp_path), store, tonight)
    assert odd.is_file()
    with counted(monkeypatch, store) as (hashed, fetched):
        fetch(ReleaseCache(tmp_path), store, tonight)
    assert (hashed, fetched) == ([], [])


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_cache_that_is_no_folder_is_refused_with_the_remedy(store: ObjectStore, tmp_path: Path, below: str):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidConfig, match=r"is a file, or lies under one; name a folder") as refused:
        Ranker(store, PIPELINE, cache=tmp_path / "file" / below)
    assert "delete" not in str(refused.value)


def test_a_memory_that_cannot_be_read_is_refused_with_the_remedy(store: ObjectStore, tmp_path: Path):
    (tmp_path / "seen.json").mkdir()
    with pytest.raises(ReleaseRefused, match=r"seen\.json cannot be read \(Is a directory\).* or name another folder"):
        Ranker(store, PIPELINE, cache=tmp_path)


def test_an_object_of_another_size_than_its_manifest_says_is_not_fetched(
    store: ObjectStore, tonight: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tonight.manifest.files[0]
    key = blob_key(PIPELINE, file.sha256)
    bomb = store.get(key).data + bytes(1_000_000)
    store.delete(key)
    store.put_if_absent(key, bomb)
    with (
        counted(monkeypatch, store) as (_, fetched),
        pytest.raises(ReleaseRefused, match=f"has {len(bomb)} bytes in the store, the manifest says {file.bytes}"),
    ):
        fetch(ReleaseCache(tmp_path), store, tonight)
    assert key not in fetched
