"""Things that are made once per test session, however many workers there are."""

import fcntl
import os
import shutil
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


def lend_graph(lender: str, store: str) -> None:
    """Give a directory store of the tiny world the graph that another one has traced: nights that are not about it."""
    shutil.copytree(Path(lender) / "tiny/work/graph", Path(store) / "tiny/work/graph")
