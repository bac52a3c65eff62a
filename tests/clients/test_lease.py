"""One run at a time: against real processes that live, die and freeze, on a directory and on S3."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest

from tasks.clients.lease import Lease
from tasks.clients.object_store import ObjectStore, open_store
from tasks.clients.s3_store import S3Store
from tasks.errors import Conflict, LeaseHeld, LeaseLost, ObjectCorrupt, OutcomeUnknown, StoreUnavailable
from tasks.references import Place
from tasks.release.manifest import Pointer, pointer_key
from tasks.release.pointer import promote
from tasks.steps import hold
from tests.clients.fault_proxy import Fault, FaultProxy
from tests.finished import Finished

ROOT = Path(__file__).parents[2]
KEY = "p/lease"
TERM = 1.2

_HOLD = """
import sys
from tasks.clients.lease import Lease
from tasks.clients.object_store import open_store
with Lease(open_store(sys.argv[1]), "p/lease", "the other", term_seconds=float(sys.argv[2])) as lease:
    print(lease.token, flush=True)
    sys.stdin.readline()
    lease.held()
    print("still held", flush=True)
"""


@pytest.fixture
def other(store: ObjectStore) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Starts a real process that holds the lease until it reads a line."""
    started: list[subprocess.Popen[str]] = []

    def start() -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, store.url, str(TERM)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _change(store: ObjectStore, **fields: object) -> None:
    """What another host would write."""
    while True:
        found = store.get(KEY)
        try:
            store.swap(KEY, json.dumps({**json.loads(found.data), **fields}).encode(), found.etag)
            return
        except Conflict:  # the holder renewed it in between
            continue


def test_each_acquisition_raises_the_token(store: ObjectStore) -> None:
    for token in (1, 2, 3):
        with Lease(store, KEY, "me") as lease:
            assert lease.token == token
            lease.held()
    assert json.loads(store.get(KEY).data)["free"] is True


def test_a_lease_that_was_never_entered_has_no_token(store: ObjectStore) -> None:
    with pytest.raises(LeaseLost, match="enter it first"):
        _ = Lease(store, KEY, "me").token


def test_a_living_holder_is_named_at_once_without_waiting(store: ObjectStore) -> None:
    said = rf"held by first run \(pid {os.getpid()} on .*wait for it to end"
    with Lease(store, KEY, "first run"), pytest.raises(LeaseHeld, match=said):
        Lease(store, KEY, "second run", wait=False).__enter__()


def test_a_living_holder_is_seen_to_be_alive_and_not_disturbed(
    store: ObjectStore, other: Callable[[], "subprocess.Popen[str]"]
) -> None:
    process = other()
    began = time.monotonic()
    with pytest.raises(LeaseHeld, match=r"the other .* was renewed while watched"):
        Lease(store, KEY, "me", term_seconds=TERM).__enter__()
    assert time.monotonic() - began < TERM
    said, _ = process.communicate("\n")
    assert (said.strip(), process.returncode) == ("still held", 0)


def test_the_lease_of_a_killed_process_of_this_host_is_taken_at_once(
    store: ObjectStore, other: Callable[[], "subprocess.Popen[str]"]
) -> None:
    process = other()
    process.kill()  # not reaped yet: a zombie is dead too
    time.sleep(0.05)
    with Lease(store, KEY, "me", term_seconds=60, wait=False) as lease:
        assert lease.token == 2
    process.wait()


def test_a_frozen_holder_is_taken_over_after_the_term_and_told_when_it_wakes(
    store: ObjectStore, other: Callable[[], "subprocess.Popen[str]"]
) -> None:
    process = other()
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(LeaseHeld):
        Lease(store, KEY, "me", term_seconds=TERM, wait=False).__enter__()
    began = time.monotonic()
    with Lease(store, KEY, "me", term_seconds=TERM) as lease:
        assert TERM <= time.monotonic() - began < 3 * TERM + 3
        assert lease.token == 2
        os.kill(process.pid, signal.SIGCONT)
        _, said = process.communicate("\n")
        assert process.returncode == 1
        assert "LeaseLost: lease p/lease of the other was taken over by me" in said
        lease.held()


@pytest.mark.parametrize("elsewhere", [{"host": "x"}, {"boot": "x"}, {"pid_namespace": "pid:[1]"}], ids=str)
def test_a_process_of_another_host_boot_or_container_is_never_called_dead(
    store: ObjectStore, elsewhere: dict[str, str]
) -> None:
    with Lease(store, KEY, "me"):
        pass
    _change(store, free=False, pid=2**22 + 1, **elsewhere)
    with pytest.raises(LeaseHeld):
        Lease(store, KEY, "me", wait=False).__enter__()


def test_a_pid_that_was_given_to_another_process_is_dead(store: ObjectStore) -> None:
    with Lease(store, KEY, "me"):
        pass
    _change(store, free=False, started=1)
    with Lease(store, KEY, "me", wait=False) as lease:
        assert lease.token == 2


def test_a_holder_that_was_replaced_is_told_by_the_next_question_or_at_the_end(store: ObjectStore) -> None:
    lease = Lease(store, KEY, "me", term_seconds=0.3)
    said = r"taken over by thief \(pid .*, token 2\): this run must stop"
    with pytest.raises(LeaseLost, match=said), lease:
        _steal_and_ask(store, lease)
    assert json.loads(store.get(KEY).data)["holder"] == "thief"
    with pytest.raises(LeaseLost, match="someone who deleted it"), Lease(store, "p/other", "me", term_seconds=60):
        store.delete("p/other")


def _steal_and_ask(store: ObjectStore, lease: Lease) -> None:
    _change(store, holder="thief", nonce="another", token=2)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lease.held()
        time.sleep(0.02)
    raise AssertionError("never told")


def test_the_body_s_own_error_is_not_hidden_by_a_lost_lease(store: ObjectStore) -> None:
    def body() -> None:
        with Lease(store, KEY, "me", term_seconds=60):
            store.delete(KEY)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[1]", b"\xff", b'{"schema_version": 2}'])
def test_a_damaged_lease_is_named_with_the_remedy(store: ObjectStore, garbage: bytes) -> None:
    store.put_if_absent(KEY, garbage)
    with pytest.raises(ObjectCorrupt, match="if no run of this pipeline is alive, delete it"):
        Lease(store, KEY, "me").__enter__()


def test_an_outage_longer_than_the_term_is_ridden_out_if_nobody_took_over(
    s3_url: str, proxy: FaultProxy, proxy_client: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.clients.s3_failures.PATIENCE_S", 0.05)
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    with Lease(S3Store(bucket, prefix, proxy_client), KEY, "me", term_seconds=0.6) as lease:
        proxy.always = {"PUT", "GET"}
        time.sleep(1.0)
        with pytest.raises((StoreUnavailable, OutcomeUnknown)):
            lease.held()
        proxy.calm()
        lease.held()


def test_a_renewal_whose_answer_was_lost_keeps_the_lease(s3_url: str, proxy: FaultProxy, proxy_client: object) -> None:
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    with Lease(S3Store(bucket, prefix, proxy_client), KEY, "me", term_seconds=0.3) as lease:
        proxy.plan = [Fault(), Fault(status=500), Fault(served=False)]
        deadline = time.monotonic() + 10
        while proxy.plan and time.monotonic() < deadline:
            time.sleep(0.02)
        assert proxy.plan == []
        lease.held()


def test_tokens_go_on_above_the_floor_where_the_object_was_deleted_or_is_an_old_copy(store: ObjectStore) -> None:
    promoted = 0

    def taken() -> int:
        with Lease(store, KEY, "us", TERM, floor=lambda: promoted) as lease:
            return lease.token

    assert [taken(), taken()] == [1, 2]
    old = store.get(KEY).data
    promoted = 7
    assert [taken(), taken()] == [8, 9]
    store.delete(KEY)
    assert taken() == 8
    store.swap(KEY, old, store.get(KEY).etag)
    assert taken() == 8
    promoted = 3
    assert taken() == 9


def test_a_floor_that_cannot_be_told_leaves_the_lease_untouched(store: ObjectStore) -> None:
    def floor() -> int:
        raise ObjectCorrupt("no pointer")

    with pytest.raises(ObjectCorrupt, match="no pointer"), Lease(store, KEY, "us", TERM, floor=floor):
        pass
    assert store.find(KEY) is None


def test_a_run_holds_a_token_above_the_pointers_where_the_lease_was_deleted(store_url: str, tmp_path: Path) -> None:
    place = Place(store=store_url, pipeline="p", scratch=str(tmp_path / "scratch"))
    pointer = Pointer("a" * 64, date(2026, 3, 6), 3, None, 7, "2026-03-07T04:00:00.000000+00:00", "promoted")
    open_store(store_url).put_if_absent(pointer_key("p"), pointer.serialise())
    with hold(place) as lease:
        assert lease.token == 8


def test_a_run_can_promote_after_the_lease_was_deleted(damageable: Finished) -> None:
    promoted = damageable.pointer
    damageable.store.delete("tiny/lease")
    first = damageable.results[0].published
    with hold(damageable.config.place()) as lease:
        moved = promote(damageable.store, "tiny", first.release, first.night, lease.token, force=True)
    assert moved.release == first.release
    assert moved.fencing_token > promoted.fencing_token > 1
