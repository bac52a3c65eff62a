"""What every test relies on: no network beyond this host, a home of its own for Prefect, repeatable numerics."""

import gc
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports Prefect, torch or boto3: they read their environment once.
_HOME = tempfile.TemporaryDirectory(prefix="nightrank-tests-")
os.environ.update(
    {
        "PREFECT_HOME": os.path.join(_HOME.name, "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # A home begins with a copy of `prefect_database`.
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DO_NOT_TRACK": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Two workers on two cores: more threads are slower, and sums in another order are other sums.
        "OMP_NUM_THREADS": "1",
    }
)
for _name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "PREFECT_API_URL", "PREFECT_PROFILE"):
    os.environ.pop(_name, None)
for _name in ("NIGHTRANK_SIGNING_KEY", "NIGHTRANK_TRUSTED_KEYS"):
    os.environ.pop(_name, None)

# Dozens of processes load the same modules: whoever is first compiles them for the others.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# What is loaded stays, and looking through all of it for garbage takes a fifth of a second each time.
gc.set_threshold(50_000, 20, 50)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

if TYPE_CHECKING:
    from tests.faults.victims import Nursery
    from tests.finished import Finished
    from tests.s3_server import S3Server

hypothesis.settings.register_profile("nightrank", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("nightrank")

_LONG_FIRST = ("tests/flows/test_scheduled", "tests/faults", "tests/flows", "tests/steps", "tests/serving")
"""Where whole nights are run. Files are handed out in this order, so that no worker gets a long one last."""
_TOGETHER = (
    ("tests/faults/test_kill.py", "tests/steps/test_determinism.py", "tests/flows/test_replay.py"),
    ("tests/flows/test_backfill.py", "tests/flows/test_cli.py", "tests/flows/test_nightly.py"),
    (
        *("tests/steps/test_s3_night.py", "tests/clients/test_lease.py"),
        *("tests/clients/test_object_store.py", "tests/clients/test_s3_store.py"),
        *("tests/clients/test_s3_multipart.py", "tests/faults/test_refused_stores.py"),
        *("tests/faults/test_publish_once.py", "tests/faults/test_lost_answers.py", "tests/faults/test_policies.py"),
        "tests/faults/test_operator.py",
    ),
)
"""Files that share the `nursery`, one embedded `prefect` or the `s3_server`, and so a worker."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; within them nothing moves."""

    def rank(item: pytest.Item) -> int:
        return next((at for at, start in enumerate(_LONG_FIRST) if item.nodeid.startswith(start)), len(_LONG_FIRST))

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)  # xdist may not be there
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: give a worker whole files, and together those that share what is slow to start."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((group[0] for group in _TOGETHER if file in group), file)

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


_LOOPBACK = ("localhost", "::1", "0.0.0.0", "")


def _stays_here(address: object) -> bool:
    if not isinstance(address, tuple):  # a path: a socket of this host
        return True
    host = str(address[0])
    return host in _LOOPBACK or host.startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def no_network_beyond_this_host() -> Iterator[None]:
    """A test that reaches out fails with the address, instead of passing only where there is a network."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(self: socket.socket, address: object) -> None:
        if not _stays_here(address):
            raise AssertionError(f"a test tried to reach {address!r}; tests may only talk to this host")
        connect(self, address)  # type: ignore[arg-type]

    def guarded_ex(self: socket.socket, address: object) -> int:
        if not _stays_here(address):
            raise AssertionError(f"a test tried to reach {address!r}; tests may only talk to this host")
        return connect_ex(self, address)  # type: ignore[arg-type]

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    patch.setattr(socket.socket, "connect_ex", guarded_ex)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """`fsync` does nothing in this process, where a night asks for it three hundred times.

    It is about a power cut, which no test makes: they end processes. What has to follow from its failure is tested by
    failing it, and programs that tests start wait for the disk as users' do.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def one_registry_of_operators() -> None:
    """The exporter's table of operators is kept once it is loaded, not read for every graph: a sixth of one's time."""
    exporter = sys.modules.get("torch.onnx._internal.exporter._registration")
    if exporter is not None and not hasattr(exporter.ONNXRegistry.from_torchlib, "cache_info"):
        exporter.ONNXRegistry.from_torchlib = staticmethod(cache(exporter.ONNXRegistry.from_torchlib))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "Finished":
    """Two nights of the tiny world that have been run; read only."""
    from tests.finished import finished_nights

    return finished_nights(tmp_path_factory)


@pytest.fixture(scope="session")
def fed(tmp_path_factory: pytest.TempPathFactory, finished: "Finished") -> "Finished":
    """They, and the last of them done anew with feedback in requests; read only."""
    from tests.finished import fed_nights

    return fed_nights(tmp_path_factory, finished)


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of Prefect with its tables, to be copied into a home as `prefect.db`."""
    from tests.prefect_homes import migrate
    from tests.shared import made_once

    return made_once(tmp_path_factory, "prefect-home", migrate) / "prefect.db"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[S3Server]":
    """SeaweedFS with the bucket `tests`."""
    from tests.s3_server import S3Server

    with S3Server(tmp_path_factory.mktemp("seaweedfs") / "server") as server:
        server.make_bucket("tests")
        yield server


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Nursery]":
    """Where runs in processes of their own are born; loading everything that a night needs takes its time."""
    from tests.faults.victims import Nursery

    with Nursery(tmp_path_factory.mktemp("nursery")) as found:
        yield found


@pytest.fixture
def damageable(finished: "Finished", tmp_path: Path) -> "Finished":
    """A copy of the finished nights that a test may do anything to."""
    return finished.copy(tmp_path / "world")
