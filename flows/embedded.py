"""Prefect's own server for the length of one command, where no other one is configured.

Prefect would start the same server by itself at the first flow run, but to do so it loads all of it into the run's own
process as well, which takes seconds of every command.
"""

import atexit
import http.client
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http import HTTPStatus
from typing import IO

import prefect
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
    temporary_settings,
)

from flows.guard import end_with_this_process
from tasks.errors import NightrankError, PrefectUnavailable

_HOST = "127.0.0.1"
_TRIES = 3
"""A port that was free may be taken by the time the server listens."""
_LAST_WORDS = 2000
"""Bytes of what a server said before it failed."""
_STOP_SECONDS = 5.0


@contextmanager
def embedded() -> Iterator[None]:
    """Flows in this block have a server: the configured one, or one that ends with this process.

    Raises:
        PrefectUnavailable: no server is configured, and none could be started, or it ended before the block did.
    """
    if PREFECT_API_URL.value():
        yield
        return
    if not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        raise PrefectUnavailable(
            "no Prefect server: this profile has no PREFECT_API_URL, and PREFECT_SERVER_EPHEMERAL_ENABLED is false in "
            "it; set PREFECT_API_URL to a server's, or PREFECT_SERVER_EPHEMERAL_ENABLED to true"
        )
    for worker in ("EventsWorker", "APILogWorker"):  # at the end they count what they still have to send
        logging.getLogger(worker).setLevel(logging.ERROR)
    end_with_this_process()
    with tempfile.TemporaryFile() as said:
        process, url = _started(said)
        # Nobody watches it for heartbeats, and each flow run would wait a second for their thread to end.
        with temporary_settings({PREFECT_API_URL: url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            try:
                yield
            except NightrankError:
                raise
            except Exception as error:
                if process.poll() is None:
                    raise
                raise PrefectUnavailable(
                    f"the embedded Prefect server ended during the run (exit status {process.returncode}); run it "
                    f"again: finished steps are kept. It said:\n{_last_words(said)}"
                ) from error


def _started(said: IO[bytes]) -> "tuple[subprocess.Popen[bytes], str]":
    """Start a server that writes to a file; returns it and the URL of its API once it answers."""
    patience = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    marks = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    for _ in range(_TRIES):
        port = _free_port()
        # In a session of its own it outlives a Ctrl-C: the run has its own end to report.
        process = subprocess.Popen(
            [
                sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app",
                "--app-dir", str(prefect.__module_path__.parent), "--host", _HOST, "--port", str(port),
                "--log-level", "error", "--lifespan", "on",
            ],
            env={**os.environ, **marks, **settings},
            stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        # After what Prefect registers later: its threads send what they still have before the server goes.
        atexit.register(_stop, process)
        deadline = time.monotonic() + patience
        while process.poll() is None and time.monotonic() < deadline:
            if _answers(port):
                return process, f"http://{_HOST}:{port}/api"
            time.sleep(0.05)
        late = process.poll() is None
        _stop(process)
        if late:
            break
    raise PrefectUnavailable(
        f"the embedded Prefect server did not answer (exit status {process.returncode}, "
        f"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS {patience}); mend what it says, or start `prefect server "
        f"start` and set PREFECT_API_URL. It said:\n{_last_words(said)}"
    )


def _last_words(said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - _LAST_WORDS))
    return said.read().decode(errors="replace").strip() or "nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with closing(http.client.HTTPConnection(_HOST, port, timeout=5)) as connection:
        try:
            connection.request("GET", "/api/health")
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False  # it does not listen yet, or something else does


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
