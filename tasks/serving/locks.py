"""Locks in a cache's folder, which several processes share. The kernel frees those of a process that ends."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.errors import ReleaseRefused

PATIENCE_S = 20.0
"""Seconds for which a lock is waited for. Nobody holds one against others for long, unless he was stopped."""
_POLL_S = 0.005


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold a lock for as long as the block runs.

    Args:
        path: its file; made where there is none.
        shared: together with others who share it.

    Raises:
        ReleaseRefused: another process does not let go of it.
        OSError: the disk refuses.
    """
    deadline = time.monotonic() + PATIENCE_S
    with path.open("ab") as file:
        while not _taken(file.fileno(), fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise ReleaseRefused(
                    f"another process has held the lock {path} for {PATIENCE_S:g} s, it is probably stopped: find it "
                    f"with `fuser {path}` or `lslocks`, then let it go on (SIGCONT) or end it"
                )
            time.sleep(_POLL_S)
        yield


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold a lock with nobody beside, if that can be had at once; whether it can.

    Args:
        path: its file; made where there is none.

    Raises:
        OSError: the disk refuses.
    """
    with path.open("ab") as file:
        yield _taken(file.fileno(), fcntl.LOCK_EX)


def _taken(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
