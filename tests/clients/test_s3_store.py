"""What only a server can do wrong: lost answers, faults, denials, ignored conditions."""

import os
import time
from pathlib import Path

import moto
import pytest

from tasks.clients import s3_failures, s3_store
from tasks.clients.object_store import CHECKS, ObjectStore, open_store
from tasks.clients.s3_client import s3_client
from tasks.clients.s3_store import S3Store
from tasks.errors import (
    Conflict,
    InvalidConfig,
    ObjectCorrupt,
    OutcomeUnknown,
    StoreError,
    StoreUnavailable,
    StoreUnwritable,
)
from tests.clients.fault_proxy import BEGIN, END, PART, Fault, FaultProxy
from tests.ports import free_ports
from tests.s3_server import READER, S3Server

# The server finished, and then: nothing, an error of its own, an error of something in between.
LOST_ANSWERS = [Fault(), Fault(status=500), Fault(status=502), Fault(status=504), Fault(status=409)]
# The server never saw the call.
LOST_CALLS = [
    Fault(served=False),
    Fault(served=False, status=500),
    Fault(served=False, status=503),
    Fault(served=False, status=429),
    Fault(served=False, status=409),
]


def _bucket_store(url: str) -> S3Store:
    store = open_store(url)
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def direct(s3_url: str, client: object) -> S3Store:
    """The store without the proxy, to see the truth."""
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, client)


@pytest.fixture
def store(s3_url: str, proxy: FaultProxy, proxy_client: object) -> S3Store:
    """The same store through the proxy."""
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, proxy_client)


@pytest.mark.parametrize("fault", LOST_ANSWERS + LOST_CALLS, ids=repr)
def test_a_new_object_is_written_once_whatever_happens_to_the_answer(
    store: S3Store, direct: S3Store, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.plan = [fault]
    assert store.put_if_absent("k", b"mine")
    assert proxy.plan == []
    assert direct.get("k").data == b"mine"


@pytest.mark.parametrize("fault", LOST_ANSWERS + LOST_CALLS, ids=repr)
def test_a_swap_is_done_once_whatever_happens_to_the_answer(
    store: S3Store, direct: S3Store, proxy: FaultProxy, fault: Fault
) -> None:
    etag = store.swap("pointer", b"1", None)
    proxy.plan = [fault]
    assert store.swap("pointer", b"2", etag) == direct.get("pointer").etag
    assert proxy.plan == []
    assert direct.get("pointer").data == b"2"


@pytest.mark.parametrize("fault", [Fault(), Fault(served=False)], ids=str)
def test_a_file_is_written_once_whatever_happens_to_the_answer(
    store: S3Store, direct: S3Store, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2_500_000))
    proxy.plan = [fault, fault]
    assert store.put_file_if_absent("f", source)
    direct.download("f", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("fault", LOST_ANSWERS + LOST_CALLS, ids=repr)
def test_another_s_object_is_never_taken_for_ours(
    store: S3Store, direct: S3Store, proxy: FaultProxy, fault: Fault
) -> None:
    direct.put_if_absent("k", b"another's")
    etag = direct.get("k").etag
    proxy.plan = [fault]
    assert not store.put_if_absent("k", b"mine")
    proxy.plan = [fault]
    with pytest.raises((Conflict, OutcomeUnknown)):
        store.swap("k", b"mine", etag[:-3] + '00"')
    assert direct.get("k").data == b"another's"


def test_a_swap_without_any_answer_is_unknown_and_nothing_is_undone(
    store: S3Store, direct: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.5)
    etag = store.swap("pointer", b"1", None)
    proxy.always = {"PUT", "GET", "HEAD"}
    with pytest.raises(OutcomeUnknown, match=r"got no answer .* a finished write is recognised"):
        store.swap("pointer", b"2", etag)
    with pytest.raises(OutcomeUnknown):
        store.put_if_absent("k", b"mine")
    assert "DELETE" not in proxy.seen
    assert direct.get("pointer").data == b"2"
    proxy.always = set()
    assert store.swap("pointer", b"2", etag) == direct.get("pointer").etag


def test_writes_whose_answers_are_always_lost_are_recognised_by_reading_back(
    store: S3Store, direct: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.3)
    proxy.always = {"PUT"}
    etag = store.swap("pointer", b"1", None)
    assert etag == direct.get("pointer").etag
    assert store.put_if_absent("k", b"mine")


def test_a_write_that_may_still_arrive_is_unknown(
    store: S3Store, direct: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.1)
    proxy.plan = [Fault(served=False)] * 5
    with pytest.raises(OutcomeUnknown, match="there is no k"):
        store.put_if_absent("k", b"mine")
    assert not direct.exists("k")


def test_a_silent_server_costs_the_read_time_out_and_the_write_is_recognised(
    direct: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.clients.s3_client.READ_TIMEOUT_S", 0.5)
    store = _bucket_store(direct.url)
    proxy.plan = [Fault(hang=True)]
    began = time.monotonic()
    assert store.put_if_absent("k", b"mine")
    assert 0.5 <= time.monotonic() - began < 5
    assert direct.get("k").data == b"mine"


def test_a_server_that_never_answers_is_given_up_after_few_calls(
    direct: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Time-outs and limits a fiftieth of the real ones; with those, no operation is silent for 30 s."""
    monkeypatch.setattr("tasks.clients.s3_client.READ_TIMEOUT_S", 10 / 50)
    monkeypatch.setattr(s3_failures, "LAST_START_S", s3_failures.LAST_START_S / 50)
    store = _bucket_store(direct.url)
    (tmp_path / "f").write_bytes(b"1")
    etag = direct.swap("k", b"1", None)
    for call in (
        lambda: store.find("k"),
        lambda: store.size("k"),
        lambda: list(store.list("")),
        lambda: store.delete("other"),
        lambda: store.download("k", tmp_path / "copy"),
        lambda: store.put_if_absent("new", b"1"),
        lambda: store.put_file_if_absent("newer", tmp_path / "f"),
        lambda: store.swap("k", b"2", etag),
    ):
        proxy.calm()
        proxy.hangs = True
        with pytest.raises((StoreUnavailable, OutcomeUnknown)):
            call()
        assert 1 <= len(proxy.seen) <= 3


@pytest.mark.parametrize("call", [("PUT", ""), ("GET", ""), BEGIN, PART, END, ("DELETE", "")], ids=str)
def test_a_check_asks_nothing_more_of_a_server_that_fell_silent(
    call: tuple[str, str], store: S3Store, direct: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It repeats the call, or reads back what that did, until patience ends; what it left is swept a day later."""
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.2)
    proxy.from_then_on = Fault(call[0], path=call[1])
    with pytest.raises((StoreUnavailable, OutcomeUnknown)):
        store.check()
    silent = next(at for at, told in enumerate(proxy.calls) if told.startswith(call[0]) and call[1] in told)
    objects = {told.split()[1].partition("?")[0] for told in proxy.calls[silent:]}
    assert len(objects) == 1
    assert call[0] == "DELETE" or "DELETE" not in proxy.seen[silent:]
    proxy.calm()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    direct.sweep()
    assert list(direct.list("")) == []


def test_a_broken_transfer_is_started_again(store: S3Store, direct: S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    direct.put_if_absent("f", content)
    proxy.plan = [Fault("GET", cut=True), Fault("GET", status=500), Fault("GET", cut=True)]
    store.download("f", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    proxy.plan = [Fault("GET", cut=True), Fault("GET")]
    assert store.get("f").data == content
    proxy.plan = [Fault("GET", cut=True), Fault("GET")]
    assert store.get("f", len(content)).data == content
    assert proxy.plan == []


def test_reads_and_deletes_ride_out_faults(store: S3Store, direct: S3Store, proxy: FaultProxy) -> None:
    direct.put_if_absent("k", b"1")
    proxy.plan = [Fault("HEAD", status=503), Fault("GET", status=500), Fault("DELETE")]
    assert store.size("k") == 1
    assert list(store.list("")) == ["k"]
    store.delete("k")
    assert proxy.plan == []
    assert not direct.exists("k")


def test_nobody_listening_is_unavailable_not_unknown(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.3)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports(1)[0]}")
    store = _bucket_store(s3_url)
    for call in (
        lambda: store.put_if_absent("k", b"1"),
        lambda: store.swap("k", b"1", None),
        lambda: store.find("k"),
        lambda: list(store.list("")),
        lambda: store.delete("k"),
        store.check,
    ):
        with pytest.raises(StoreUnavailable, match="try again later"):
            call()


def test_a_reader_s_credentials_read_and_are_refused_writes(
    s3_server: S3Server, direct: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    direct.put_if_absent("k", b"1")
    for name, value in s3_server.environment(READER).items():
        monkeypatch.setenv(name, value)
    reader = _bucket_store(direct.url)
    assert reader.get("k").data == b"1"
    assert list(reader.list("")) == ["k"]
    for call in (
        lambda: reader.put_if_absent("new", b"1"),
        lambda: reader.swap("k", b"2", reader.get("k").etag),
        lambda: reader.delete("k"),
        reader.check,
    ):
        with pytest.raises(StoreUnwritable, match="check the AWS credentials"):
            call()
    assert direct.get("k").data == b"1"


def test_scratch_objects_that_may_not_be_removed_stop_no_sweep(
    s3_server: S3Server, direct: S3Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = f"{CHECKS}{'0a' * 16}"
    direct.put_if_absent(key, b"1")
    for name, value in s3_server.environment(READER).items():
        monkeypatch.setenv(name, value)
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + 25 * 3600)
        _bucket_store(direct.url).sweep()
    assert f"scratch objects of old checks stay in {direct.url}" in caplog.text
    assert direct.exists(key)


def test_wrong_and_missing_credentials_and_buckets_are_named(
    s3_server: S3Server, s3_bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="create the bucket 'nobucket'"):
        list(open_store("s3://nobucket/x").list(""))
    with pytest.raises(StoreUnwritable, match="create the bucket 'nobucket'"):
        open_store("s3://nobucket/x").check()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-wrong")
    with pytest.raises(StoreUnwritable, match="check the AWS credentials") as denial:
        open_store(s3_bucket_url).put_if_absent("k", b"1")
    assert "canary-wrong" not in str(denial.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StoreUnwritable, match="set AWS_ACCESS_KEY_ID"):
        open_store(s3_bucket_url).put_if_absent("k", b"1")


def test_an_endpoint_that_is_no_url_is_a_config_error(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "not a url")
    with pytest.raises(InvalidConfig, match="correct AWS_ENDPOINT_URL_S3"):
        open_store(s3_url).find("k")


def test_a_secret_inside_the_endpoint_stays_out_of_messages(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:canary@127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(StoreError) as failure:
        open_store(s3_url).find("k")
    assert "canary" not in str(failure.value)


def test_bytes_that_change_on_their_way_in_are_refused(
    direct: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"changed")
    monkeypatch.setattr(s3_store, "file_sha256", lambda path: "0" * 64)
    with pytest.raises(ObjectCorrupt, match="run again"):
        direct.put_file_if_absent("f", tmp_path / "f")
    assert not direct.exists("f")


def test_long_lists_come_in_pages(direct: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = sorted(f"a/{number:02d}/{part}" for number in range(5) for part in "xy")
    for key in keys:
        direct.put_if_absent(key, b"1")
    monkeypatch.setattr(s3_store, "PAGE_KEYS", 3)
    assert list(direct.list("a/")) == keys


def test_a_folder_marker_of_a_console_is_not_listed(direct: S3Store, client: object) -> None:
    direct.put_if_absent("a/b", b"1")
    bucket, _, prefix = direct.url.removeprefix("s3://").partition("/")
    client.put_object(Bucket=bucket, Key=f"{prefix}/empty/", Body=b"")  # type: ignore[attr-defined]
    assert list(direct.list("")) == ["a/b"]


def test_moto_passes_the_check_and_answers_as_the_real_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    with moto.mock_aws():
        client = s3_client()
        client.create_bucket(Bucket="mocked")
        store: ObjectStore = S3Store("mocked", "x", client)
        store.check()
        etag = store.swap("k", b"1", None)
        assert not store.put_if_absent("k", b"2")
        with pytest.raises(Conflict):
            store.swap("absent", b"2", etag)
        client.close()
