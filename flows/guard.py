"""Ends what a killed run would leave behind: Prefect's embedded server, which would live for ever.

No handler runs after kill -9. So a process of its own waits for the end of a pipe that only the run holds, and then
ends every process that inherited the run's mark. It works where there is `/proc`; elsewhere it finds nothing to end.
"""

import atexit
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

MARK = "NIGHTRANK_RUN"
PATIENCE_SECONDS = 10.0
"""How long a process may take to end by itself once it was asked to."""


def end_with_this_process() -> None:
    """See to it that processes started from here on end when this one does, however it does."""
    mark = uuid.uuid4().hex
    # Isolated, without site packages: it is there in milliseconds, and no setting of the run changes what it does. In
    # a session of its own it outlives a Ctrl-C and a closed terminal.
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).resolve()), mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.environ[MARK] = mark
    # Exit functions run in reverse: the server, which registers its own later, has been stopped before the guard looks.
    atexit.register(guard.communicate)


def main() -> None:
    """Wait for the run to end, then end what it has left: `python flows/guard.py MARK`."""
    entry = f"{MARK}={sys.argv[1]}".encode()
    sys.stdin.buffer.read()
    for sent, patience in ((signal.SIGTERM, PATIENCE_SECONDS), (signal.SIGKILL, 0.0)):
        for pid in _bearing(entry):
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
        deadline = time.monotonic() + patience
        while _bearing(entry) and time.monotonic() < deadline:
            time.sleep(0.1)


def _bearing(entry: bytes) -> list[int]:
    """The processes that have this entry in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's, or gone since
            if entry in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    main()
