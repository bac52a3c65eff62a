"""How a verb runs: remembered by its key, measured, watched, and retried only where a retry can help.

A verb names its step, says what the step is made from, and hands over one plain function. The rest of what every
step has in common is here, so that the verbs stay thin shells.
"""

import json
import logging
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import lru_cache
from os import getpid
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Literal, ParamSpec, Protocol, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from tasks.clients.lease import Lease
from tasks.clients.object_store import ObjectStore, open_store
from tasks.clients.workspace import StepRecord, Workspace, canonical_json
from tasks.errors import DeviceUnavailable, ObjectMissing
from tasks.references import Place, StepRef
from tasks.release.pointer import read_pointer

P = ParamSpec("P")
R = TypeVar("R")

Progress = Callable[[float, float | None, str], None]
"""Called as ``progress(done, total or None, unit)``, such as ``progress(3, 40, "epochs")``."""

log = logging.getLogger("nightrank.steps")


class Watcher(Protocol):
    """Somebody who looks on while steps run."""

    def started(self, step: str, why: str) -> None:
        """A step has to run, and why."""

    def progressed(self, step: str, done: float, total: float | None, unit: str) -> None:
        """A step has done so much of so much."""

    def finished(self, step: str, reused: bool, seconds: float) -> None:
        """A step's record stands in the store."""


class Logbook:
    """The watcher of unattended runs: a log line where a step starts and where it ends."""

    def started(self, step: str, why: str) -> None:
        """Log that a step runs, and why."""
        log.info("%s: runs, %s", step, why)

    def progressed(self, step: str, done: float, total: float | None, unit: str) -> None:
        """Say nothing: progress is for screens."""

    def finished(self, step: str, reused: bool, seconds: float) -> None:
        """Log that a step's record stands."""
        log.info("%s: reused" if reused else "%s: done in %.1f s", *((step,) if reused else (step, seconds)))


_LOGBOOK = Logbook()
_watcher: ContextVar[Watcher] = ContextVar("watcher", default=_LOGBOOK)
_lease: ContextVar[Lease | None] = ContextVar("lease", default=None)
_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Let ``watcher`` look on while the block's steps run."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def quietly(step: str) -> Iterator[Progress]:
    """Carry out many small steps as one to look at: the watcher sees only ``step`` and its progress."""
    watcher = _watcher.get()
    token = _watcher.set(_Silent())
    try:
        yield lambda done, total, unit: watcher.progressed(step, done, total, unit)
    finally:
        _watcher.reset(token)


@contextmanager
def looked_at(step: str, why: str) -> Iterator[Progress]:
    """Let the watcher look on at something that leaves no record."""
    watcher, begun = _watcher.get(), time.perf_counter()
    watcher.started(step, why)
    yield lambda done, total, unit: watcher.progressed(step, done, total, unit)
    watcher.finished(step, False, time.perf_counter() - begun)


class _Silent:
    def started(self, step: str, why: str) -> None:
        """Say nothing."""

    def progressed(self, step: str, done: float, total: float | None, unit: str) -> None:
        """Say nothing."""

    def finished(self, step: str, reused: bool, seconds: float) -> None:
        """Say nothing."""


@contextmanager
def hold(place: Place) -> Iterator[Lease]:
    """Hold the pipeline's lease, so that no two runs interleave; steps check it before they write.

    Raises:
        LeaseHeld: another run of the pipeline is alive.
        ReleaseRefused: the pointer, above whose fencing token the lease's must be, is damaged.
    """

    def promoted_under() -> int:
        pointer = read_pointer(store_of(place), place.pipeline)
        return 0 if pointer is None else pointer.fencing_token

    _sweep(Path(place.scratch) / "steps")
    holder = f"{socket.gethostname()}:{getpid()}"
    with Lease(store_of(place), f"{place.pipeline}/lease", holder, floor=promoted_under) as lease:
        token = _lease.set(lease)
        try:
            store_of(place).sweep()
            yield lease
        finally:
            _lease.reset(token)


def still_held() -> None:
    """Stop where the lease of the block went to another run.

    Raises:
        LeaseLost: it did.
    """
    lease = _lease.get()
    if lease is not None:
        lease.held()


def _sweep(room: Path) -> None:
    """Remove what killed runs left in scratch; a day is longer than any step, and pipelines may share the folder."""
    limit = time.time() - 86_400
    for folder in room.glob("*"):
        with suppress(FileNotFoundError):  # another pipeline's run may sweep the same folder
            if folder.stat().st_mtime < limit:
                shutil.rmtree(folder)


@lru_cache(maxsize=8)
def store_of(place: Place) -> ObjectStore:
    """The store of a place, opened once per process."""
    return open_store(place.store)


@lru_cache(maxsize=8)
def open_workspace(place: Place) -> Workspace:
    """The step memory of a place, opened once per process."""
    return Workspace(store_of(place), place.pipeline, Path(place.scratch))


def record_of(place: Place, ref: StepRef) -> StepRecord:
    """The record that a reference names.

    Raises:
        ObjectMissing: it is gone.
    """
    return recalled(place, ref.step, ref.key)


def recalled(place: Place, step: str, key: str) -> StepRecord:
    """The record of a step's key.

    Raises:
        ObjectMissing: it is gone.
    """
    record = open_workspace(place).recall(step, key)
    if record is None:
        raise ObjectMissing(
            f"{place.store}/{place.pipeline}/work/{step}/{key} is gone, and a later step needs it; run the night again"
        )
    return record


def device_of(place: Place) -> Literal["cpu", "cuda"]:
    """The device that networks run on here.

    Raises:
        DeviceUnavailable: the config demands CUDA, and there is none.
    """
    import torch

    if place.device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        # cuBLAS is deterministic only with a workspace of fixed size, settled before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return "cuda"
    if place.device == "cuda":
        raise DeviceUnavailable(
            "the config says device: cuda, but torch sees no CUDA device on this host; run on a host that has one, "
            "install a CUDA build of torch, or say device: auto"
        )
    return "cpu"


def device_name(device: Literal["cpu", "cuda"]) -> str:
    """What a timing was taken on: the GPU's name, or the CPU's with the threads that torch uses."""
    import torch

    if device == "cuda":
        return str(torch.cuda.get_device_name())
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{models[0] if models else platform.machine()}, {threads} {'thread' if threads == 1 else 'threads'}"


def _a_retry_can_help(_task: Task[..., object], _run: TaskRun, state: State[object]) -> bool:
    error = state.result(raise_on_failure=False)
    return bool(getattr(error, "transient", False))


def verb(function: Callable[P, R]) -> Task[P, R]:
    """Make a Prefect task of a step function: retried with back-off where the error is transient, never cached."""
    make = task(
        name=function.__name__.replace("_", "-"),
        retries=3,
        retry_delay_seconds=[2.0, 10.0, 30.0],
        retry_condition_fn=_a_retry_can_help,
        persist_result=False,
        cache_policy=NO_CACHE,
    )
    return make(function)


@dataclass(frozen=True)
class Product:
    """What a step made."""

    content: Mapping[str, object]
    """JSON that is digested: equal for equal inputs."""
    notes: Mapping[str, object] = field(default_factory=dict)
    """JSON that is not: metrics, timings, provenance."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Files by name; names may hold slashes."""


@dataclass(frozen=True)
class Measured:
    """The fields that every reference shares."""

    step: str
    key: str
    digest: str
    reused: bool
    seconds: float
    peak_mib: float


def carry_out(
    place: Place,
    step: str,
    version: int,
    night: date | None,
    inputs: Mapping[str, str],
    section: Mapping[str, object],
    work: Callable[[Path, Progress], Product],
    stands: Callable[[StepRecord], bool] = lambda _: True,
) -> tuple[StepRecord, dict[str, object]]:
    """Run a step, unless a record of the same key is there. Inside another step's work it is part of that one.

    Args:
        place: where the pipeline lives.
        step: the step's name.
        version: the step's hand-bumped version.
        night: the night it is done for, part of the key; None for what is the same every night.
        inputs: names to digests of everything that it reads.
        section: the config that it obeys, as JSON.
        work: makes the product; it gets an empty folder, removed afterwards, and a progress callback.
        stands: whether what a record tells of is still there; where it is not, the step is repeated.

    Returns:
        The record, and the fields that every ``StepRef`` shares.

    Raises:
        LeaseLost: the lease of the pipeline went to another run; the step was not recorded.
    """
    workspace, watcher, lease = open_workspace(place), _watcher.get(), _lease.get()
    if night is not None:
        inputs = {**inputs, "for night": night.isoformat()}
    key = workspace.key(step, version, inputs, section)
    record = workspace.recall(step, key)
    anew = record is not None and not stands(record)
    if anew:
        record = None
    reused = record is not None
    if record is None:
        obeyed = {f"config {name}": value for name, value in section.items()}
        sources = {"step version": str(version), **inputs, **obeyed}
        watcher.started(step, _why(place, step, night, sources))
        room = Path(place.scratch) / "steps"
        room.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=room, prefix=f"{step}-"))
        token = _inside.set(True)
        try:
            if token.old_value is not True:  # inside another step the peak is that of both
                _reset_peak()
            begun = time.perf_counter()
            product = work(folder, lambda done, total, unit: watcher.progressed(step, done, total, unit))
            spent = {"seconds": round(time.perf_counter() - begun, 3), "peak_mib": round(_peak_mib(), 1)}
            if lease is not None:
                lease.held()
            notes = {**product.notes, **spent, "made_from": sources}
            record = workspace.remember(step, key, dict(product.content), notes, product.files, anew)
            _remember_sources(place, step, night, sources)
        finally:
            _inside.reset(token)
            shutil.rmtree(folder)
    seconds, peak_mib = float(record.notes["seconds"]), float(record.notes["peak_mib"])
    watcher.finished(step, reused, seconds)
    return record, asdict(Measured(step, key, record.digest, reused, seconds, peak_mib))


def _last_key(place: Place, step: str, night: date | None) -> str:
    return f"{place.pipeline}/work/last/{step}/{'every-night' if night is None else night.isoformat()}.json"


def _remember_sources(place: Place, step: str, night: date | None, sources: Mapping[str, object]) -> None:
    """Note what the step was last made from, so that the next run can say what changed."""
    store, key = store_of(place), _last_key(place, step, night)
    before = store.find(key)
    store.swap(key, canonical_json(sources), None if before is None else before.etag)


def _why(place: Place, step: str, night: date | None, sources: Mapping[str, object]) -> str:
    before = store_of(place).find(_last_key(place, step, night))
    if before is None:
        return f"for the first time for {'every night' if night is None else night.isoformat()}"
    then, now = json.loads(before.data), json.loads(canonical_json(sources))
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return f"changed since last time: {', '.join(changed)}" if changed else "its record is gone"


def _reset_peak() -> None:
    """Let the kernel count the peak of resident memory from here on, where it can."""
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5")


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1024
    return getrusage(RUSAGE_SELF).ru_maxrss / 1024
