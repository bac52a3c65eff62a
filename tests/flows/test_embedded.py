"""A command's own Prefect server: not started where one is configured, and named with its last words where it fails."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from flows import embedded
from tasks.errors import PrefectUnavailable


@pytest.fixture(autouse=True)
def no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is for a process of its own; this one goes on."""
    monkeypatch.setattr(embedded, "end_with_this_process", lambda: None)


@pytest.fixture
def nothing_configured() -> Iterator[None]:
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
        pytest.raises(PrefectUnavailable, match=r"PREFECT_API_URL(?s:.*)PREFECT_SERVER_EPHEMERAL_ENABLED"),
    ):
        embedded.embedded().__enter__()
