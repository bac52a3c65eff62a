"""What only a directory can do wrong: crashes, full disks, permissions, strange files."""

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.clients import directory_store
from tasks.clients.directory_store import DirectoryStore
from tasks.clients.object_store import CHECKS
from tasks.errors import ConditionsIgnored, Conflict, OutcomeUnknown, StoreError, StoreUnavailable, StoreUnwritable

ROOT = Path(__file__).parents[2]

_DIE_BEFORE = """
import os, signal, sys
from pathlib import Path
from tasks.clients.directory_store import DirectoryStore
store = DirectoryStore(Path(sys.argv[1]))
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
{patch}
{call}
"""


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.mark.parametrize("patch", ["os.link = die", "os.fsync = die", "os.fchmod = die"])
@pytest.mark.parametrize(
    "call",
    [
        "store.put_if_absent('k', b'new')",
        "store.put_file_if_absent('k', Path('README'))",
        "store.swap('k', b'new', None)",
    ],
)
def test_a_writer_killed_before_its_commit_leaves_nothing_to_see(
    store: DirectoryStore, tmp_path: Path, patch: str, call: str
) -> None:
    store.put_if_absent("other", b"1")
    (tmp_path / "README").write_bytes(b"new")
    script = _DIE_BEFORE.format(patch=patch, call=call)
    died = subprocess.run(
        [sys.executable, "-c", script, store.url], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert died.returncode == -signal.SIGKILL
    assert list(store.list("")) == ["other"]
    assert store.swap("k", b"mine", None) == store.get("k").etag


def test_a_writer_killed_after_its_commit_has_written(store: DirectoryStore, tmp_path: Path) -> None:
    etag = store.swap("k", b"old", None)
    script = _DIE_BEFORE.format(patch="Path.unlink = die", call=f"store.swap('k', b'new', {etag!r})")
    died = subprocess.run([sys.executable, "-c", script, store.url], cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    assert store.get("k").data == b"new"
    with pytest.raises(Conflict):
        store.swap("k", b"mine", etag)


def test_leftovers_are_never_listed_and_old_ones_are_swept_by_the_check(store: DirectoryStore) -> None:
    store.put_if_absent("k", b"1")
    folder = Path(store.url) / ".nightrank" / "tmp"
    old, young = folder / "old", folder / "young"
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert list(store.list("")) == ["k"]
    store.check()
    assert (old.exists(), young.exists()) == (False, True)


def test_the_store_s_own_folder_is_no_key(store: DirectoryStore) -> None:
    store.put_if_absent("k", b"1")
    with pytest.raises(StoreError, match="keeps for itself"):
        store.put_if_absent(".nightrank/tmp/x", b"1")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "link", "mkdir"])
def test_a_full_or_read_only_disk_is_unwritable_and_leaves_nothing(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    store.put_if_absent("old", b"1")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StoreUnwritable, match=f"cannot write deep/k to .*{os.strerror(code)}.*; free space"):
            store.put_if_absent("deep/k", b"2")
    assert list(store.list("")) == ["old"]
    assert list((Path(store.url) / ".nightrank" / "tmp").iterdir()) == []
    assert store.put_if_absent("deep/k", b"2")


def test_a_failing_disk_is_unavailable_and_the_old_object_stays(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    etag = store.swap("k", b"old", None)

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreUnavailable, match="Input/output error"):
            store.swap("k", b"new", etag)
    assert store.get("k").data == b"old"


def test_a_file_size_limit_of_the_kernel_is_unwritable(store: DirectoryStore) -> None:
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from tasks.clients.directory_store import DirectoryStore; from tasks.errors import StoreUnwritable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "store = DirectoryStore(Path(sys.argv[1])); assert store.put_if_absent('small', b'x' * 1000)\n"
        "try: store.put_if_absent('big', b'x' * 1001)\n"
        "except StoreUnwritable as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", script, store.url], cwd=ROOT, capture_output=True, text=True)
    assert "cannot write big" in said.stdout, said.stderr
    assert "File too large" in said.stdout
    assert list(store.list("")) == ["small"]


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Without root's right to ignore permissions, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_missing_permissions_are_named_with_the_remedy(store: DirectoryStore, tmp_path: Path) -> None:
    store.put_if_absent("k", b"1")
    tmp_path.chmod(0o500)
    Path(store.url).chmod(0o500)
    (Path(store.url) / "k").chmod(0)
    try:
        with _as_nobody():
            with pytest.raises(StoreUnwritable, match="Permission denied; free space or grant write access"):
                store.put_if_absent("new", b"1")
            with pytest.raises(StoreUnwritable):
                store.check()
            with pytest.raises(StoreError, match="Permission denied; grant read access"):
                store.get("k")
    finally:
        tmp_path.chmod(0o700)
        Path(store.url).chmod(0o700)


def test_a_root_below_a_file_is_unwritable_and_reads_as_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    store = DirectoryStore(tmp_path / "file" / "store")
    with pytest.raises(StoreUnwritable, match="file is not a directory"):
        store.put_if_absent("k", b"1")
    assert list(store.list("")) == []
    assert store.find("k") is None


def test_a_file_system_without_hard_links_is_refused(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConditionsIgnored, match="cannot hard-link"):
        store.check()


def test_a_swap_waits_for_a_stopped_writer_only_so_long(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.swap("k", b"1", None)
    monkeypatch.setattr(directory_store, "_LOCK_PATIENCE_S", 0.05)
    lock = Path(store.url) / ".nightrank" / "locks" / hashlib.sha256(b"k").hexdigest()[:2]
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match="has been held"):
            store.swap("k", b"2", store.get("k").etag)
    store.swap("k", b"2", store.get("k").etag)


def test_linked_partitions_of_a_lake_are_listed_and_read(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "part-0.parquet").write_bytes(b"x")
    store.put_if_absent("interactions/night=2026-01-01/part-0.parquet", b"y")
    (Path(store.url) / "interactions" / "night=2026-01-02").symlink_to(tmp_path / "elsewhere")
    assert list(store.list("interactions/")) == [
        "interactions/night=2026-01-01/part-0.parquet",
        "interactions/night=2026-01-02/part-0.parquet",
    ]
    assert store.get("interactions/night=2026-01-02/part-0.parquet").data == b"x"


def test_a_link_to_a_folder_above_is_an_error_not_a_loop(store: DirectoryStore) -> None:
    store.put_if_absent("a/b", b"x")
    (Path(store.url) / "a" / "loop").symlink_to(Path(store.url))
    with pytest.raises(StoreError, match="folder above itself"):
        list(store.list(""))


def test_a_pipe_is_no_object_and_does_not_block(store: DirectoryStore) -> None:
    store.put_if_absent("k", b"1")
    os.mkfifo(Path(store.url) / "pipe")
    assert store.find("pipe") is None
    assert store.size("pipe") is None
    assert list(store.list("")) == ["k"]


def test_objects_are_not_writable_in_place(store: DirectoryStore) -> None:
    store.put_if_absent("k", b"1")
    place = store.local_path("k")
    assert place is not None
    assert place.stat().st_mode & 0o222 == 0


class _Careless(DirectoryStore):
    """Overwrites what is there."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.delete(key)
        return super().put_if_absent(key, data)


class _Forgetful(DirectoryStore):
    """Says yes and writes nothing."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return True


class _IgnoresETags(DirectoryStore):
    """Swaps whatever is there."""

    def swap(self, key: str, data: bytes, etag: str | None) -> str:
        found = self.find(key)
        return super().swap(key, data, found.etag if found and etag else etag)


class _IgnoresAbsence(DirectoryStore):
    """Swaps in a new object over an existing one."""

    def swap(self, key: str, data: bytes, etag: str | None) -> str:
        found = self.find(key)
        return super().swap(key, data, found.etag if found and etag is None else etag)


class _MakesOnMatch(DirectoryStore):
    """Makes an object where If-Match should have found none."""

    def swap(self, key: str, data: bytes, etag: str | None) -> str:
        return super().swap(key, data, etag if self.exists(key) else None)


@pytest.mark.parametrize("kind", [_Careless, _Forgetful, _IgnoresETags, _IgnoresAbsence, _MakesOnMatch])
def test_a_store_that_ignores_conditions_is_refused(kind: type[DirectoryStore], tmp_path: Path) -> None:
    store = kind(tmp_path)
    with pytest.raises(ConditionsIgnored, match=f"{tmp_path} does not honour conditional writes: .*Use a directory"):
        store.check()
    assert list(store.list("")) == []


def test_a_failed_check_tells_its_own_failure_and_not_that_of_cleaning_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(key: str) -> None:
        raise StoreUnwritable(f"{key} may not be deleted")

    store = _IgnoresETags(tmp_path)
    monkeypatch.setattr(store, "delete", refuse)
    with pytest.raises(ConditionsIgnored):
        store.check()
    assert len(list(store.list(CHECKS))) == 1


@pytest.mark.parametrize("silence", [StoreUnavailable("no answer"), OutcomeUnknown("no answer")], ids=repr)
def test_a_check_asks_nothing_more_of_a_store_that_stopped_answering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silence: StoreError
) -> None:
    """Whichever of its calls went unanswered; what it left is swept a day later."""
    asked, last = 0, sys.maxsize

    def until_last(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked >= last:
                raise silence
            return call(*arguments)

        return counted

    def opened(name: str) -> DirectoryStore:
        store = DirectoryStore(tmp_path / name)
        for call in ("put_if_absent", "find", "swap", "delete", "list"):
            monkeypatch.setattr(store, call, until_last(getattr(store, call)))
        return store

    opened("good").check()
    calls, left = asked, 0
    assert calls > 15
    for number in range(1, calls + 1):
        asked, last, store = 0, number, opened(str(number))
        with pytest.raises(type(silence)) as told:
            store.check()
        assert told.value is silence
        assert asked == last
        left += len(list(DirectoryStore(tmp_path / str(number)).list(CHECKS)))
    assert left > 10
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    for number in range(1, calls + 1):
        swept = DirectoryStore(tmp_path / str(number))
        swept.sweep()
        assert list(swept.list("")) == []
