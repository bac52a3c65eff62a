"""Large objects, sent in parts: what is sent, what is made of lost answers, and what is never aborted."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.clients import s3_failures, s3_multipart, s3_store
from tasks.clients.object_store import ObjectStore, open_store
from tasks.clients.s3_multipart import Upload
from tasks.clients.s3_store import UPLOADS, S3Store
from tasks.errors import ConditionsIgnored, ObjectCorrupt, OutcomeUnknown, StoreError, StoreUnavailable, StoreUnwritable
from tests.clients.fault_proxy import BEGIN, END, PART, Fault, FaultProxy
from tests.s3_server import READER, S3Server

ROOT = Path(__file__).parents[2]
SMALLEST = 5 * 2**20
ERROR = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>%s</Code><Message>said late</Message></Error>'


def of(call: tuple[str, str], **fault: Any) -> Fault:
    method, path = call
    return Fault(method, path=path, **fault)


@pytest.fixture
def direct(s3_url: str, client: object) -> S3Store:
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, client)


@pytest.fixture
def store(s3_url: str, proxy: FaultProxy, proxy_client: object) -> S3Store:
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, proxy_client)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that takes two parts, the first of which is as small as servers allow."""
    monkeypatch.setattr(s3_store, "SINGLE_PUT_BYTES", 1000)
    monkeypatch.setattr(s3_multipart, "PART_BYTES", SMALLEST)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(SMALLEST + 500))
    return path


def uploads(store: S3Store) -> list[str]:
    """Keys of uploads that the server still holds parts of."""
    found = store._client.list_multipart_uploads(Bucket=store._bucket).get("Uploads", ())
    return [one["Key"] for one in found if one["Key"].startswith(store._prefix)]


def assert_whole(store: S3Store, file: Path) -> None:
    """The object is there, nothing else is, and nothing is left of its parts."""
    assert list(store.list("")) == ["k"]
    assert store.get("k").data == file.read_bytes()
    assert uploads(store) == []


def test_it_is_sent_in_parts_with_their_digests_and_appears_by_one_conditional_call(
    store: S3Store, direct: S3Store, proxy: FaultProxy, file: Path
) -> None:
    sent: list[tuple[str, str, dict[str, Any]]] = []

    def look(request: Any, **_: Any) -> None:
        sent.append((request.method, request.url, dict(request.headers)))

    store._client.meta.events.register("before-send.s3", look)
    try:
        assert store.put_file_if_absent("k", file)
    finally:
        store._client.meta.events.unregister("before-send.s3", look)
    parts = [headers for method, url, headers in sent if (method, "partNumber=" in url) == ("PUT", True)]
    assert len(parts) == 2
    assert all("x-amz-checksum-sha256" in headers for headers in parts)
    ends = [headers for method, url, headers in sent if (method, "uploadId=" in url) == ("POST", True)]
    assert [headers["If-None-Match"] for headers in ends] == [b"*"]
    assert_whole(direct, file)
    proxy.calls.clear()
    assert not store.put_file_if_absent("k", file)
    assert [call.split()[0] for call in proxy.calls] == ["HEAD"], "what is there is not sent again"


LOST = [  # the server finished, and then said nothing, or something else
    *(of(call, status=status) for call in (BEGIN, PART, END) for status in (None, 500, 502, 504, 409)),
    *(of(END, served=served, status=200, body=ERROR % b"InternalError") for served in (True, False)),
    of(END, served=True, status=200),
    of(END, cut=True),
    # The server never saw the call.
    *(of(call, served=False, status=status) for call in (BEGIN, PART, END) for status in (None, 500, 503, 429, 409)),
]
SHORT = [of(BEGIN), of(PART), of(END), *LOST[15:18], of(END, served=False, status=500)]


def both(faults: list[Fault]) -> list[Any]:
    """The short form, and the others."""
    return [fault if fault in SHORT else pytest.param(fault, marks=pytest.mark.soak) for fault in faults]


@pytest.mark.parametrize("fault", both(LOST), ids=repr)
def test_it_is_written_once_whatever_happens_to_an_answer(
    store: S3Store, direct: S3Store, proxy: FaultProxy, file: Path, fault: Fault
) -> None:
    proxy.plan = [fault]
    assert store.put_file_if_absent("k", file)
    assert proxy.plan == []
    assert list(direct.list("")) == ["k"]
    assert direct.get("k").data == file.read_bytes()


@pytest.mark.parametrize("fault", both([fault for fault in LOST if fault.path == END[1]]), ids=repr)
def test_another_s_object_that_came_meanwhile_is_never_taken_for_ours(
    store: S3Store, direct: S3Store, proxy: FaultProxy, file: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Upload.send

    def beaten(self: Upload, content: Any) -> None:
        send(self, content)
        direct.put_if_absent("k", b"another's")

    monkeypatch.setattr(Upload, "send", beaten)
    proxy.plan = [fault]
    assert not store.put_file_if_absent("k", file)
    assert list(direct.list("")) == ["k"]
    assert direct.get("k").data == b"another's"
    assert uploads(direct) == []


def test_an_end_without_any_answer_is_unknown_and_nothing_is_aborted_until_it_is_known(
    store: S3Store, direct: S3Store, proxy: FaultProxy, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.3)
    proxy.plan = [of(END, served=False, status=500)] * 20
    with pytest.raises(OutcomeUnknown, match=r"got no answer .* a finished write is recognised"):
        store.put_file_if_absent("k", file)
    assert "DELETE" not in proxy.seen
    (note,) = direct.list(UPLOADS)
    said = json.loads(direct.get(note).data)
    assert said["key"] == "k"
    # The call that nobody answered may still arrive: the parts have to be there for it.
    parts = direct._client.list_parts(Bucket=direct._bucket, Key=f"{direct._prefix}k", UploadId=said["upload"])["Parts"]
    assert [part["PartNumber"] for part in parts] == [1, 2]
    proxy.calm()
    assert store.put_file_if_absent("k", file)


def test_an_end_whose_every_answer_is_lost_is_recognised_by_reading_back(
    store: S3Store, direct: S3Store, proxy: FaultProxy, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.3)
    proxy.plan = [of(END)] * 20
    assert store.put_file_if_absent("k", file)
    assert direct.get("k").data == file.read_bytes()


def test_a_server_that_fell_silent_is_not_asked_to_free_parts_and_a_sweep_does_it_a_day_later(
    store: S3Store, direct: S3Store, proxy: FaultProxy, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.3)
    proxy.from_then_on = of(PART, served=False)
    with pytest.raises(StoreUnavailable, match="try again later"):
        store.put_file_if_absent("k", file)
    assert set(proxy.seen[proxy.seen.index("POST") + 2 :]) == {"PUT"}
    assert len(uploads(direct)) == 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    direct.sweep()
    assert uploads(direct) == []
    assert list(direct.list("")) == []


def test_a_sweep_ends_with_the_first_upload_that_a_silent_server_does_not_free(
    store: S3Store, direct: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = [f"{UPLOADS}{number}.json" for number in range(3)]
    for note in notes:
        direct.put_if_absent(note, json.dumps({"key": "k", "upload": "gone", "began": 0}).encode())
    proxy.plan = [Fault("DELETE")]
    store.sweep()
    assert proxy.plan == []
    assert list(direct.list(UPLOADS)) == notes
    store.sweep()
    assert list(direct.list(UPLOADS)) == []


def test_an_upload_that_is_gone_may_be_success_and_may_not(
    store: S3Store, direct: S3Store, proxy: FaultProxy, file: Path
) -> None:
    gone = of(END, status=404, body=ERROR % b"NoSuchUpload")
    proxy.plan = [gone]
    assert store.put_file_if_absent("k", file)  # the server had finished
    assert_whole(direct, file)
    direct.delete("k")
    proxy.plan = [of(END, served=False, status=404, body=ERROR % b"NoSuchUpload")]
    with pytest.raises(StoreUnavailable, match="ended by somebody else: try again"):
        store.put_file_if_absent("k", file)
    assert list(direct.list("")) == []
    assert uploads(direct) == []
    assert store.put_file_if_absent("k", file)


def test_a_part_that_changes_on_its_way_is_refused_and_its_upload_ended(
    direct: S3Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(s3_multipart.base64, "b64encode", lambda digest: b"A" * 43 + b"=")
        with pytest.raises(ObjectCorrupt, match="run again"):
            direct.put_file_if_absent("k", file)
    assert list(direct.list("")) == []
    assert uploads(direct) == []


def test_a_file_that_changes_while_it_is_sent_never_appears(
    direct: S3Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "file_sha256", lambda path: "0" * 64)
    with pytest.raises(ObjectCorrupt, match="changed while it was sent"):
        direct.put_file_if_absent("k", file)
    assert list(direct.list("")) == []
    assert uploads(direct) == []


def test_too_large_a_file_is_refused_before_it_is_sent(
    direct: S3Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "MAX_OBJECT_BYTES", 2000)
    with pytest.raises(StoreUnwritable, match=f"would have {SMALLEST + 500} bytes, limit 2000"):
        direct.put_file_if_absent("k", file)


def test_a_reader_cannot_begin_one(
    s3_server: S3Server, direct: S3Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment(READER).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnwritable, match="check the AWS credentials"):
        open_store(direct.url).put_file_if_absent("k", file)


_DIES = """
import os, signal, sys
from pathlib import Path
from tasks.clients import s3_multipart, s3_store
from tasks.clients.object_store import open_store
s3_store.SINGLE_PUT_BYTES, s3_multipart.PART_BYTES = 1000, 5 * 2**20
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
s3_multipart.Upload.complete = die
open_store(sys.argv[1]).put_file_if_absent("k", Path(sys.argv[2]))
"""


def test_what_a_killed_sender_leaves_is_freed_a_day_later_and_nobody_else_s(
    direct: S3Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = subprocess.run(
        [sys.executable, "-c", _DIES, direct.url, str(file)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert died.returncode == -9
    name = f"{direct._prefix}k"
    foreign = direct._client.create_multipart_upload(Bucket=direct._bucket, Key=name)["UploadId"]
    assert uploads(direct) == [name, name]
    direct.sweep()
    assert uploads(direct) == [name, name], "its sender may be alive"
    now = time.time()
    monkeypatch.setattr(s3_store.time, "time", lambda: now + 25 * 3600)
    direct.sweep()
    left = direct._client.list_multipart_uploads(Bucket=direct._bucket)["Uploads"]
    assert [one["UploadId"] for one in left if one["Key"] == name] == [foreign]
    assert list(direct.list("")) == []
    direct._client.abort_multipart_upload(Bucket=direct._bucket, Key=name, UploadId=foreign)


def test_a_note_that_is_not_ours_is_left_and_stops_nothing(direct: S3Store, caplog: pytest.LogCaptureFixture) -> None:
    direct.put_if_absent(f"{UPLOADS}what.json", b"[]")
    direct.sweep()
    assert list(direct.list(UPLOADS)) == [f"{UPLOADS}what.json"]
    assert "is not a note of ours, delete it" in caplog.text


def test_a_server_that_ignores_only_the_condition_of_the_end_is_refused(store: S3Store, proxy: FaultProxy) -> None:
    proxy.forgets = {("POST", "if-none-match", "uploadId=")}
    with pytest.raises(ConditionsIgnored, match="did not protect an object from one that was sent in parts"):
        store.check()
    assert list(store.list("")) == []


@pytest.mark.soak
def test_a_file_of_70_mb_goes_in_and_out_unchanged_without_being_held_in_memory(
    direct: S3Store, tmp_path: Path
) -> None:
    """The real sizes: five parts."""
    (tmp_path / "large").write_bytes(os.urandom(70 * 2**20 + 1))
    script = (  # `ru_maxrss` would be that of the process which started this one
        "import re, sys; from pathlib import Path; from tasks.clients.object_store import open_store\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "store = open_store(sys.argv[1]); store.exists('k'); before = peak()\n"
        "assert store.put_file_if_absent('k', Path(sys.argv[2])); print(peak() - before)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, direct.url, str(tmp_path / "large")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    print(f"{int(said.stdout) / 1024:.1f} MiB more")
    assert int(said.stdout) < 56 * 1024, "KiB: three parts and a half"
    digest = hashlib.sha256((tmp_path / "large").read_bytes()).hexdigest()
    direct.download("k", tmp_path / "copy", digest)
    assert direct.size("k") == 70 * 2**20 + 1
    assert uploads(direct) == []


@pytest.mark.soak
def test_2500_keys_are_listed_in_order(direct: ObjectStore) -> None:
    keys = [f"blobs/{hashlib.sha256(str(number).encode()).hexdigest()}" for number in range(2500)]
    for key in keys:
        direct.put_if_absent(key, b"1")
    began = time.monotonic()
    assert list(direct.list("blobs/")) == sorted(keys)
    print(f"listed in {time.monotonic() - began:.2f} s")


def test_failures_are_of_our_own_family(store: S3Store, proxy: FaultProxy, file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3_failures, "PATIENCE_S", 0.1)
    for call in (BEGIN, PART, END):
        proxy.plan = [of(call, served=False, status=507)]
        with pytest.raises(StoreError):
            store.put_file_if_absent("k", file)
