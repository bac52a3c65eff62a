"""A command's own Prefect server: not started where one is configured, and named with its last words where it fails."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from flows import embedded
from tasks.errors import PrefectUnavailable
from tests.prefect_homes import home_with, servers_of

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The guard is for a process of its own; this one goes on.
    monkeypatch.setattr(embedded, "end_with_this_process", lambda: None)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


def instead_of_python(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Let servers be this shell script; returns a file with a line per start."""
    program, started = folder / "python", folder / "started"
    program.write_text(f"#!/bin/sh\necho $$ >> {started}\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    return started


def test_a_configured_server_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = instead_of_python(tmp_path, monkeypatch, "exit 1")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}), embedded.embedded():
        assert PREFECT_API_URL.value() == "http://127.0.0.1:1/api"
    assert not started.exists()


@pytest.mark.usefixtures("nothing_configured")
def test_a_server_that_fails_is_tried_again_and_then_told_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = instead_of_python(tmp_path, monkeypatch, "echo the disk is full >&2; exit 3")
    with pytest.raises(PrefectUnavailable, match=r"exit status 3(?s:.*)PREFECT_API_URL(?s:.*)the disk is full"):
        embedded.embedded().__enter__()
    assert len(started.read_text().splitlines()) == 3


@pytest.mark.usefixtures("nothing_configured")
def test_a_server_that_does_not_answer_in_time_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = instead_of_python(tmp_path, monkeypatch, "exec sleep 60")
    with (
        temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 1}),
        pytest.raises(PrefectUnavailable, match="STARTUP_TIMEOUT_SECONDS 1"),
    ):
        embedded.embedded().__enter__()
    (pid,) = started.read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.usefixtures("nothing_configured")
def test_where_prefect_may_start_none_the_settings_are_named() -> None:
    with (
        temporary_settings({PREFECT_SERVER_EPHEMERAL_ENABLED: False}),
        pytest.raises(PrefectUnavailable, match=r"PREFECT_API_URL(?s:.*)PREFECT_SERVER_EPHEMERAL_ENABLED to true"),
    ):
        embedded.embedded().__enter__()


@pytest.mark.usefixtures("nothing_configured")
def test_a_server_that_ends_during_the_run_is_named_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "once.py").write_text(_ONCE)
    started = instead_of_python(tmp_path, monkeypatch, f'{sys.executable} {tmp_path}/once.py "$@"; exit 4')

    def run() -> None:
        with embedded.embedded():
            os.waitid(os.P_PID, int(started.read_text()), os.WEXITED | os.WNOWAIT)
            raise ConnectionError("nobody there")

    with pytest.raises(PrefectUnavailable, match=r"exit status 4(?s:.*)the disk is full") as caught:
        run()
    assert isinstance(caught.value.__cause__, ConnectionError)


_ONCE = """
import http.server, sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).handle_request()
print("the disk is full", flush=True)
"""
"""A server that answers one request and dies."""


@pytest.mark.usefixtures("nothing_configured")
def test_something_else_on_the_port_is_no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(embedded, "_free_port", lambda: other.getsockname()[1])
        greeter = Thread(target=greet, args=(other,))
        greeter.start()
        started = instead_of_python(tmp_path, monkeypatch, "sleep 0.3; echo the port is taken; exit 3")
        with pytest.raises(PrefectUnavailable, match="the port is taken"):
            embedded.embedded().__enter__()
        assert len(started.read_text().splitlines()) == 3
        other.shutdown(socket.SHUT_RDWR)
        greeter.join()


def greet(listener: socket.socket) -> None:
    """Speak like an SSH server to whoever calls, until nobody listens any more."""
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        with caller:
            caller.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


_RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from time import sleep
from urllib.request import urlopen
from prefect.settings import PREFECT_API_URL
from flows.embedded import embedded
with embedded():
    try:
        print("up", flush=True)
        sys.stdin.readline()
    except KeyboardInterrupt:
        # As long as it takes a server that was sent the same signal to end.
        sleep(2)
        print(urlopen(f"{PREFECT_API_URL.value()}/health", timeout=10).read().decode(), flush=True)
        raise
"""


@pytest.fixture
def run(prefect_database: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process in a group of its own, in which an embedded server is up."""
    home = home_with(prefect_database, tmp_path / "prefect")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _RUN],
        env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_EPHEMERAL_ENABLED": "true"},
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", process.communicate()
    assert len(servers_of(home)) == 1
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()
    assert servers_of(home) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_after_a_ctrl_c_the_server_is_there_until_the_run_has_told_it(run: "subprocess.Popen[str]") -> None:
    os.killpg(run.pid, signal.SIGINT)
    told, error = run.communicate(timeout=60)
    assert told == "true\n", error
    assert run.returncode == -signal.SIGINT
