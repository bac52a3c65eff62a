"""What a process has started ends with it, also where no handler of its own can run any more."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

_RUN = """
import subprocess, sys
from flows.guard import end_with_this_process
asleep = lambda: subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).pid
early = asleep()
end_with_this_process()
print(early, asleep(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def run() -> "Iterator[tuple[subprocess.Popen[str], int]]":
    """A process under guard, and the id of a child of it; another child, older than the guard, ends with the test."""
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    early, child = map(int, process.stdout.readline().split())
    yield process, child
    process.kill()
    process.communicate()
    assert lives(early)
    subprocess.run(["kill", str(early)], check=True)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not lives(pid)


def test_a_child_ends_when_the_process_is_killed(run: "tuple[subprocess.Popen[str], int]") -> None:
    process, child = run
    assert lives(child)
    process.send_signal(signal.SIGKILL)
    assert ends(child)


def test_a_child_ends_when_the_process_ends_by_itself(run: "tuple[subprocess.Popen[str], int]") -> None:
    process, child = run
    process.communicate("\n")
    assert process.returncode == 0
    assert not lives(child)
