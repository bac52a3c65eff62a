"""What every store does, on a directory and on a real S3 server alike."""

import hashlib
import os
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.clients.object_store import CHECKS, ObjectStore, checked_key, open_store
from tasks.errors import Conflict, InvalidConfig, ObjectCorrupt, ObjectMissing, StoreError

ROOT = Path(__file__).parents[2]


def test_a_new_object_reads_as_written(store: ObjectStore) -> None:
    assert store.put_if_absent("p/current.json", b'{"a": 1}\x00\xff')
    assert store.get("p/current.json").data == b'{"a": 1}\x00\xff'
    assert store.size("p/current.json") == 10
    assert store.exists("p/current.json")


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    assert store.put_if_absent("empty", b"")
    assert store.get("empty").data == b""
    assert store.size("empty") == 0


def test_the_first_write_wins_and_the_second_is_told(store: ObjectStore) -> None:
    assert store.put_if_absent("k", b"first")
    assert not store.put_if_absent("k", b"second")
    assert not store.put_if_absent("k", b"first")
    assert store.get("k").data == b"first"


def test_an_absent_object_is_none_or_missing(store: ObjectStore, tmp_path: Path) -> None:
    assert store.find("no/such") is None
    assert store.size("no/such") is None
    assert not store.exists("no/such")
    with pytest.raises(ObjectMissing, match="no/such"):
        store.get("no/such")
    with pytest.raises(ObjectMissing, match="no/such"):
        store.download("no/such", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    store.delete("no/such")


def test_an_object_larger_than_it_may_be_is_not_read(store: ObjectStore) -> None:
    store.put_if_absent("large", bytes(3_000_000))
    assert store.get("large", 3_000_000).data == store.get("large").data == bytes(3_000_000)
    assert store.find("none", 7) is None
    tracemalloc.start()
    try:
        for read in (store.find, store.get):
            with pytest.raises(ObjectCorrupt, match=r"/large has 3000000 bytes, limit 65536, .* restore it"):
                read("large", 2**16)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_folder_is_not_an_object(store: ObjectStore) -> None:
    store.put_if_absent("folder/file", b"x")
    assert store.find("folder") is None
    assert store.size("folder") is None
    assert store.find("folder/file/below") is None


def test_a_swap_replaces_exactly_the_object_it_was_conditioned_on(store: ObjectStore) -> None:
    first = store.swap("pointer", b"1", None)
    assert store.get("pointer").etag == first
    second = store.swap("pointer", b"2", first)
    assert second != first
    with pytest.raises(Conflict, match="pointer has ETag"):
        store.swap("pointer", b"3", first)
    with pytest.raises(Conflict):
        store.swap("pointer", b"3", None)
    assert store.get("pointer").data == b"2"
    assert store.get("pointer").etag == second


def test_a_swap_of_an_absent_object_is_a_conflict_and_makes_nothing(store: ObjectStore) -> None:
    etag = store.swap("other", b"1", None)
    with pytest.raises(Conflict, match="has ETag None"):
        store.swap("pointer", b"1", etag)
    assert not store.exists("pointer")


def test_a_swap_to_the_bytes_that_are_there_counts_as_done(store: ObjectStore) -> None:
    first = store.swap("pointer", b"1", None)
    second = store.swap("pointer", b"2", first)
    assert store.swap("pointer", b"2", first) == second
    assert store.swap("pointer", b"2", None) == second


def test_an_etag_of_a_new_object_can_be_swapped_on(store: ObjectStore) -> None:
    store.put_if_absent("pointer", b"1")
    store.swap("pointer", b"2", store.get("pointer").etag)
    assert store.get("pointer").data == b"2"


def test_keys_are_listed_by_prefix_in_byte_order(store: ObjectStore) -> None:
    keys = ["a-b/x", "a/b/c", "a/b-c", "a/b", "a0", "B", "é/1", "a/night=2026-01-02/part 0.parquet"]
    keys.remove("a/b")  # no file system has a file and a folder of one name
    for key in keys:
        store.put_if_absent(key, b"x")
    assert list(store.list("")) == sorted(keys, key=str.encode)
    assert list(store.list("a/")) == ["a/b-c", "a/b/c", "a/night=2026-01-02/part 0.parquet"]
    assert list(store.list("a/night=")) == ["a/night=2026-01-02/part 0.parquet"]
    assert list(store.list("a")) == ["a-b/x", "a/b-c", "a/b/c", "a/night=2026-01-02/part 0.parquet", "a0"]
    assert list(store.list("nothing/")) == []


def test_a_deleted_object_is_gone_and_can_be_written_anew(store: ObjectStore) -> None:
    store.put_if_absent("k", b"1")
    store.delete("k")
    assert not store.exists("k")
    assert list(store.list("")) == []
    assert store.put_if_absent("k", b"2")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1, 5_000_000])
def test_a_file_goes_in_and_out_unchanged(store: ObjectStore, tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    source, copy = tmp_path / "source", tmp_path / "deep" / "copy"
    source.write_bytes(content[:size])
    assert store.put_file_if_absent("f", source)
    assert not store.put_file_if_absent("f", source)
    store.download("f", copy, hashlib.sha256(content[:size]).hexdigest())
    assert copy.read_bytes() == content[:size]


def test_a_local_file_that_is_gone_is_named(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing, match=r"gone\.bin"):
        store.put_file_if_absent("f", tmp_path / "gone.bin")
    assert not store.exists("f")


def test_a_download_replaces_the_file_only_by_the_right_bytes(store: ObjectStore, tmp_path: Path) -> None:
    store.put_if_absent("f", b"tampered")
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(ObjectCorrupt, match="expected " + "0" * 64):
        store.download("f", tmp_path / "copy", "0" * 64)
    assert (tmp_path / "copy").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == ["copy"]
    store.download("f", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"tampered"


def test_a_download_is_given_up_between_its_chunks_and_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    store.put_if_absent("f", content)
    (tmp_path / "copy").write_bytes(b"old")
    calls: list[int] = []

    def second() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        store.download("f", tmp_path / "copy", None, second)
    assert (tmp_path / "copy").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == ["copy"]
    store.download("f", tmp_path / "copy", None, second)
    assert (tmp_path / "copy").read_bytes() == content
    assert len(calls) >= 4


def test_a_file_in_place_has_the_object_s_bytes(store: ObjectStore) -> None:
    store.put_if_absent("a/b", b"x")
    place = store.local_path("a/b")
    assert (place is None) == store.url.startswith("s3://")
    if place is not None:
        assert place.read_bytes() == b"x"
        with pytest.raises(ObjectMissing):
            store.local_path("a/c")


@pytest.mark.parametrize(
    "key",
    ["a b", "night=2026-01-02/part-0.parquet", "ünïcödé/日本/🙂", "per%2Fcent", "pl+us", "#frag?q=1&r=2", "'\"`$(x)",
     "~", ".hidden", "-rf", "a:b", " lead", "x" * 255, "/".join(["y" * 89] * 10)],
)  # fmt: skip
def test_odd_but_honest_keys_work(store: ObjectStore, key: str) -> None:
    assert store.put_if_absent(key, key.encode())
    assert store.get(key).data == key.encode()
    assert list(store.list("")) == [key]
    store.delete(key)
    assert not store.exists(key)


@pytest.mark.parametrize(
    "key",
    ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "./a", "a/./b", "a//b", "a/", "a\x00b", "a\nb",
     "a\x7fb", "a\x85b", "a\\b", "\ud800", "x" * 256, "/".join(["y" * 90] * 10)],
)  # fmt: skip
def test_hostile_keys_are_refused_before_anything_happens(store: ObjectStore, tmp_path: Path, key: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    for call in (
        lambda: store.get(key),
        lambda: store.find(key),
        lambda: store.size(key),
        lambda: store.put_if_absent(key, b"x"),
        lambda: store.put_file_if_absent(key, source),
        lambda: store.swap(key, b"x", None),
        lambda: store.delete(key),
        lambda: store.download(key, tmp_path / "copy"),
        lambda: store.local_path(key),
    ):
        with pytest.raises(StoreError, match=r"^key "):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("prefix", ["/", "../", "a/../", "/etc", "a//", "a\x00"])
def test_hostile_prefixes_are_refused(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(StoreError, match=r"^key "):
        list(store.list(prefix))


# From code points: hypothesis's own text first spends seconds on a table of all of Unicode.
CHARACTERS = st.sampled_from("./\\\0 ab") | st.integers(0, sys.maxunicode).map(chr)


@given(st.lists(CHARACTERS).map("".join))
def test_an_accepted_key_stays_inside_any_root(key: str) -> None:
    try:
        checked_key(key)
    except StoreError:
        return
    assert os.path.normpath(f"/root/{key}") == f"/root/{key}"


def test_of_single_characters_control_characters_and_the_backslash_alone_are_refused() -> None:
    def refused(character: str) -> bool:
        try:
            checked_key(f"a{character}b")
        except StoreError:
            return True
        return False

    characters = [chr(code) for code in range(0x3000)]
    control = {character for character in characters if unicodedata.category(character) == "Cc"}
    assert {character for character in characters if refused(character)} == control | {"\\"}


def test_of_several_processes_one_wins_each_round(store: ObjectStore) -> None:
    etag = store.swap("pointer", b"start", None)
    racers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.clients.racer", store.url, "pointer", f"racer-{number}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for number in range(4)
    ]  # fmt: skip

    def round_of(line: str) -> list[int]:
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(line + "\n")
            racer.stdin.flush()
        said = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
        assert set(said) <= {"won", "lost"}, said
        return [number for number, word in enumerate(said) if word == "won"]

    try:
        assert [racer.stdout.readline().strip() for racer in racers if racer.stdout] == ["ready"] * 4
        for number in range(2 if store.url.startswith("s3://") else 8):  # contended writes on S3 take 3 s
            if number % 2:
                (winner,) = round_of(f"new round-{number}")
                assert store.get(f"round-{number}").data == f"racer-{winner} {number}".encode()
            else:
                (winner,) = round_of(f"swap {etag}")
                now = store.get("pointer")
                assert now.data == f"racer-{winner} {number}".encode()
                etag = now.etag
    finally:
        for racer in racers:
            racer.communicate()


def test_a_good_store_passes_the_check_and_is_left_clean(store: ObjectStore) -> None:
    store.put_if_absent("mine", b"1")
    store.check()
    store.check()
    assert list(store.list("")) == ["mine"]


def test_scratch_objects_that_a_check_left_are_swept_a_day_later_and_nothing_else_is(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, mine = f"{CHECKS}{'0a' * 16}", [f"{CHECKS}mine", f"{CHECKS}{'0a' * 16}/below", "k"]
    if not store.url.startswith("s3://"):
        mine.remove(f"{CHECKS}{'0a' * 16}/below")  # no file system has a file and a folder of one name
    for key in (left, *mine):
        store.put_if_absent(key, b"1")
    store.sweep()
    assert list(store.list("")) == sorted([left, *mine]), "its check may be running"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    store.sweep()
    assert list(store.list("")) == sorted(mine)


def test_the_url_opens_the_same_store_again(store: ObjectStore) -> None:
    store.put_if_absent("k", b"1")
    assert open_store(store.url).get("k").data == b"1"
    assert open_store(store.url).url == store.url


def test_a_path_and_a_file_url_name_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("a b")
    store.put_if_absent("k", b"1")
    monkeypatch.chdir("/")
    assert store.get("k").data == b"1"
    assert open_store(f"file://{tmp_path}/a%20b").get("k").data == b"1"


@pytest.mark.parametrize("url", ["", "gs://bucket/x", "s3://", "s3:///x", "file://host/x", "http://127.0.0.1/x"])
def test_a_url_of_no_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidConfig):
        open_store(url)


@pytest.mark.parametrize("url", ["s3://AKIA:hunter2@bucket/x", "s3://bucket/x?secret=hunter2", "s3://b/x#hunter2"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        open_store(url)
    assert "hunter2" not in str(refusal.value)
