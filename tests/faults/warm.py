"""A warm parent: a process that has imported everything, and forks a child for each job, which then costs little.

A module that is run by `python -m` and calls `serve` is the parent; a `WarmParent` in the tests' own process starts it
and talks to it. What a child has to tell it writes into its diary, a file; how it ended, its parent tells.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Ended:
    """How a child ended."""

    status: int
    """Exit status, or minus the signal that killed it."""

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class WarmParent:
    """The tests' end of it.

    Args:
        module: what is run as the parent; it calls `serve`.
        log: where parent and children say what went wrong; diaries lie beside it.
        environment: variables that differ from those of now.
    """

    def __init__(self, module: str, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._module, self._folder, self._count = module, log.parent, 0
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], cwd=ROOT, env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._log.close()

    def begin(self, job: Mapping[str, Any]) -> tuple[int, Path]:
        """Give a job to a child of its own; the child's process id, and its diary, which the job names from now on."""
        self._count += 1
        diary = self._folder / f"diary-{self._count}.json"
        return self._ask({"job": {**job, "diary": str(diary)}}), diary

    def end_of(self, pid: int) -> int:
        """Wait for a child; its exit status, or minus the signal that killed it."""
        return self._ask({"wait": pid})

    def said(self) -> str:
        """The last of what went wrong."""
        return Path(self._log.name).read_text()[-3000:]

    def _ask(self, question: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"{self._module} died: {self.said()}"
        return int(answer)


def serve(live: Callable[[dict[str, Any]], None]) -> None:
    """The parent's life: a line in is a job for a new child, or a child to wait for.

    Args:
        live: a child's life, given its job.
    """
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
            continue
        if (pid := os.fork()) == 0:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(2, 1)
                live(asked["job"])
                status = 0
            except BaseException:  # noqa: BLE001  (nothing may come back to the parent's own loop)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
