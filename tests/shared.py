"""Things that are made once per test session, however many workers there are."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name, filled by the first worker that asks while the others wait."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / f"{name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            shutil.rmtree(shared / name, ignore_errors=True)  # of an attempt that failed
            make(shared / name)
            lock.write("made")
    return shared / name


def migrate(home: Path) -> None:
    """Make Prefect's database in a home of its own: hundreds of migrations, more work than a small night."""
    home.mkdir()
    done = subprocess.run(
        [str(Path(sys.executable).parent / "prefect"), "server", "database", "upgrade", "-y"],
        env={**os.environ, "PREFECT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Everything is in the one file, which is what the copies are made of.
    assert not [path.name for path in home.iterdir() if path.name.startswith("prefect.db-")]


def lend_graph(lender: str, store: str) -> None:
    """Give a directory store of the tiny world the graph that another one has traced: nights that are not about it."""
    shutil.copytree(Path(lender) / "tiny/work/graph", Path(store) / "tiny/work/graph")
