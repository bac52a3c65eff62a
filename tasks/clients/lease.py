"""A lease on a pipeline: of all runs on all hosts, one at a time may write.

The lease is one object. Its holder rewrites it every third of the term; whoever wants it watches its ETag on a clock
of his own, and takes it over when the ETag has stood still for the whole term: no two clocks are ever compared. A
holder that is a dead process of this very boot of this very host is replaced at once. Each take-over raises the token,
which goes into the pointer, so that a holder that was frozen and wakes up late can be told from its successor.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tasks.clients.object_store import ObjectStore, Stored
from tasks.errors import Conflict, LeaseHeld, LeaseLost, ObjectCorrupt, OutcomeUnknown, StoreError, StoreUnavailable

SCHEMA_VERSION = 1
_LOOKS_PER_TERM = 30

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseRecord:
    """The lease object's content.

    Attributes:
        schema_version: 1.
        holder: what the holder calls itself, for people.
        nonce: tells two acquisitions by the same holder apart.
        token: raised at every acquisition, kept when the lease is free.
        beat: raised by one at every renewal, so that the ETag moves.
        term_seconds: how long the ETag must stand still before another may take over.
        free: given back by its holder.
        host, boot, pid_namespace, pid, started: which process holds it; `started` in clock ticks since boot.
    """

    schema_version: int
    holder: str
    nonce: str
    token: int
    beat: int
    term_seconds: float
    free: bool
    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: int


class Lease:
    """Hold a lease for the length of a `with` block.

    Args:
        store: where the lease object lives.
        key: its key.
        holder: what to call ourselves in messages to others, for example the flow run's name.
        term_seconds: how long we may be silent before others may take over. At least a few times a write's duration.
        wait: when another holds it, watch for up to the term whether he is alive, and take over if not. False: do not
            watch, but still take over from a dead process of this host.
        floor: tells the largest token known outside of the lease object; asked at every attempt to take the lease, so
            that tokens go on above it when the object was deleted or is an old copy.

    Raises on entry:
        LeaseHeld: another holder is alive, or may be (`wait=False`).
        NightrankError: what `floor` raises.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        holder: str,
        term_seconds: float = 30.0,
        wait: bool = True,
        floor: Callable[[], int] = lambda: 0,
    ) -> None:
        self._store, self._key, self._holder, self._wait, self._floor = store, key, holder, wait, floor
        self._term = term_seconds
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._record: LeaseRecord | None = None
        self._etag: str | None = None
        self._renewed = 0.0
        self._lost: str | None = None

    @property
    def token(self) -> int:
        """The fencing token of this acquisition: larger than that of every earlier holder.

        Raises:
            LeaseLost: the lease was never acquired.
        """
        if self._record is None:
            raise LeaseLost(f"lease {self._key} is not acquired; enter it first")
        return self._record.token

    def held(self) -> None:
        """Return if the lease is ours now; to be called before a write that others rely on.

        When our last renewal is older than the term, others may have taken over: it is renewed here and now.

        Raises:
            LeaseLost: another took it over.
            StoreUnavailable, OutcomeUnknown: our last renewal is too old and the store cannot be asked.
        """
        with self._lock:
            if self._lost is None and time.monotonic() - self._renewed > self._term:
                self._renew()
            if self._lost is not None:
                raise LeaseLost(self._lost)

    def __enter__(self) -> Self:
        self._acquire()
        self._thread = threading.Thread(target=self._beat, name=f"lease {self._key}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._lost is None:
            self._release()
        if self._lost is not None and error is None:
            raise LeaseLost(self._lost)

    def _acquire(self) -> None:
        watched, since = "", 0.0
        while True:
            found = self._store.find(self._key)
            record = self._parsed(found) if found else None
            if found is None or record is None or record.free or _is_dead(record):
                if self._take(found, record):
                    return
                continue  # another was quicker: look at what he wrote
            if not self._wait:
                raise LeaseHeld(f"{self._who(record)}; wait for it to end, or stop it")
            if watched and found.etag != watched:
                raise LeaseHeld(f"{self._who(record)} and was renewed while watched; wait for it to end, or stop it")
            if not watched:
                watched, since = found.etag, time.monotonic()
                _log.info("%s; watching for %.0f s whether it is alive", self._who(record), record.term_seconds)
            elif time.monotonic() - since > max(record.term_seconds, self._term):
                if self._take(found, record):
                    return
                continue
            time.sleep(record.term_seconds / _LOOKS_PER_TERM)

    def _take(self, found: Stored | None, before: LeaseRecord | None) -> bool:
        boot, namespace = _boot()
        record = LeaseRecord(
            schema_version=SCHEMA_VERSION,
            holder=self._holder,
            nonce=uuid.uuid4().hex,
            # Where the object is whole, no holder can bring the floor above its token. Where it was deleted under a
            # live holder, he still can after this look; then ours is the lower token, and what it guards is refused.
            token=max(before.token if before else 0, self._floor()) + 1,
            beat=0,
            term_seconds=self._term,
            free=False,
            host=socket.gethostname(),
            boot=boot,
            pid_namespace=namespace,
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
        )
        began = time.monotonic()
        try:
            etag = self._store.swap(self._key, _serialised(record), found.etag if found else None)
        except Conflict:
            return False
        if before is not None and not before.free:
            _log.warning("took lease %s over from %s, which is dead or silent", self._key, before.holder)
        self._record, self._etag, self._renewed = record, etag, began
        return True

    def _beat(self) -> None:
        while not self._stop.wait(self._term / 3):
            with self._lock:
                if self._lost is not None:
                    return
                try:
                    self._renew()
                except StoreError as error:
                    # Not lost yet: `held()` asks again before anything that others rely on.
                    _log.warning("could not renew lease %s: %s", self._key, error)

    def _renew(self, free: bool = False) -> None:
        """Rewrite our record; sets `_lost` when it is no longer ours."""
        assert self._record is not None
        began = time.monotonic()
        if self._etag is None:  # an earlier renewal got no answer
            found = self._store.find(self._key)
            now = self._parsed(found) if found else None
            if found is None or now is None or now.nonce != self._record.nonce:
                self._lost = self._loss(now)
                return
            self._record, self._etag = now, found.etag
        record = replace(self._record, beat=self._record.beat + 1, free=free)
        try:
            self._etag = self._store.swap(self._key, _serialised(record), self._etag)
        except Conflict:
            found = self._store.find(self._key)
            self._lost = self._loss(self._parsed(found) if found else None)
            return
        except (StoreUnavailable, OutcomeUnknown):
            self._etag = None
            raise
        self._record, self._renewed = record, began

    def _release(self) -> None:
        try:
            self._renew(free=True)
        except StoreError as error:
            _log.warning("could not give lease %s back, others wait %.0f s for it: %s", self._key, self._term, error)

    def _loss(self, now: LeaseRecord | None) -> str:
        taker = f"{now.holder} (pid {now.pid} on {now.host}, token {now.token})" if now else "someone who deleted it"
        return f"lease {self._key} of {self._holder} was taken over by {taker}: this run must stop; run it again"

    def _who(self, record: LeaseRecord) -> str:
        return f"lease {self._store.url}/{self._key} is held by {record.holder} (pid {record.pid} on {record.host})"

    def _parsed(self, found: Stored) -> LeaseRecord:
        try:
            record = LeaseRecord(**json.loads(found.data))
            fine = record.schema_version == SCHEMA_VERSION and record.token >= 1 and 0 < record.term_seconds < 86400
        except (ValueError, TypeError) as error:
            raise self._broken(found) from error
        if not fine:
            raise self._broken(found)
        return record

    def _broken(self, found: Stored) -> ObjectCorrupt:
        return ObjectCorrupt(
            f"lease {self._store.url}/{self._key} is no lease of schema {SCHEMA_VERSION}: {found.data[:80]!r}; if no "
            "run of this pipeline is alive, delete it"
        )


def read_lease(store: ObjectStore, key: str) -> LeaseRecord | None:
    """Who holds a lease, or held it last; None where nobody ever did.

    Raises:
        ObjectCorrupt: the object is no lease.
    """
    found = store.find(key)
    return None if found is None else Lease(store, key, "")._parsed(found)


def _serialised(record: LeaseRecord) -> bytes:
    return json.dumps(asdict(record), sort_keys=True).encode()


def _boot() -> tuple[str, str]:
    """This boot and this namespace of process ids; empty where the system does not say (not Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is not there or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _is_dead(record: LeaseRecord) -> bool:
    """Whether the holder is a process that this host would show if it were alive, and does not.

    Containers on one host share its boot and sometimes its name, but not its process ids: hence the namespace.
    """
    boot, namespace = _boot()
    if not boot or (record.host, record.boot, record.pid_namespace) != (socket.gethostname(), boot, namespace):
        return False
    return _started(record.pid) != record.started
