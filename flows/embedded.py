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
from tasks.errors import PrefectUnavailable

_HOST = "127.0.0.1"
_TRIES = 3
"""A port that was free may be taken by the time the server listens."""
_LAST_WORDS = 2000
"""Characters of what a server said before it failed."""
_STOP_SECONDS = 5.0


@contextmanager
def embedded() -> Iterator[None]:
    """Flows in this block have a server: the configured one, or one that ends with this process.

    Raises:
        PrefectUnavailable: no server is configured, and none could be started.
    """
    if PREFECT_API_URL.value() is not None:
        yield
        return
    if not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        raise PrefectUnavailable(
            "no Prefect server: PREFECT_API_URL is not set, and PREFECT_SERVER_EPHEMERAL_ENABLED is false; "
            "set the one, or leave out the other"
        )
    for worker in ("EventsWorker", "APILogWorker"):  # at the end they count what they still have to send
        logging.getLogger(worker).setLevel(logging.ERROR)
    end_with_this_process()
    url = _started()
    # Nobody watches an embedded server for heartbeats, and each flow run would wait a second for their thread to end.
    with temporary_settings({PREFECT_API_URL: url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def _started() -> str:
    """Start a server; returns the URL of its API once it answers."""
    patience = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    marks = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    last_words = ""
    for _ in range(_TRIES):
        port = _free_port()
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app",
                    "--app-dir", str(prefect.__module_path__.parent), "--host", _HOST, "--port", str(port),
                    "--log-level", "error", "--lifespan", "on",
                ],
                env={**os.environ, **marks, **settings},
                stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip
            # After what Prefect registers later: its threads send what they still have before the server goes.
            atexit.register(_stop, process)
            deadline = time.monotonic() + patience
            while process.poll() is None and time.monotonic() < deadline:
                if _answers(port):
                    return f"http://{_HOST}:{port}/api"
                time.sleep(0.05)
            _stop(process)
            said.seek(0)
            last_words = said.read().decode(errors="replace")[-_LAST_WORDS:]
        if process.returncode < 0:  # it ran out of time, and was stopped
            break
    raise PrefectUnavailable(
        f"the embedded Prefect server did not answer (exit status {process.returncode}, "
        f"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS {patience}); mend what it says, or start `prefect server "
        f"start` and set PREFECT_API_URL. It said:\n{last_words}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with closing(http.client.HTTPConnection(_HOST, port, timeout=5)) as connection:
        try:
            connection.request("GET", "/api/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False  # it does not listen yet


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
