"""Runs that die, or wait, exactly where they are told to: real processes, killed by SIGKILL.

A nursery is a warm parent. For each run it forks a victim, which carries a night out by the plain step functions
(`tests.steps.plain`). A trap is set on the writes to the store, by a pattern of keys: what is in the store at that
moment is what a power cut would have left there. Nothing sleeps: a victim that has to wait says so by opening a named
pipe, and goes on when the other end is closed. Strings have other hashes than in the tests' own process.
"""

import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tests.faults.warm import ROOT, Ended, WarmParent, serve

CHECKPOINT = "a checkpoint"
"""What a trap calls the write of a checkpoint, which goes to the scratch folder and has no key."""
WRITES = ("put_if_absent", "put_file_if_absent", "swap")


@dataclass(frozen=True)
class Trap:
    """Where a run dies or waits: at the nth write of a key that the pattern fits, before it or after."""

    when: str
    key: str
    nth: int = 1
    wait: str | None = None
    """Folder for the two pipes of a run that waits there instead of dying."""

    def __str__(self) -> str:
        return f"{self.when} {self.key}" + (f" number {self.nth}" if self.nth > 1 else "")


@dataclass
class Outcome(Ended):
    """How a run ended, and what it told on the way."""

    told: list[dict[str, Any]] = field(default_factory=list)

    @property
    def worked(self) -> list[tuple[str, str]]:
        """Step and key of every record that it had worked for, whether or not the record was written."""
        return [(line["step"], line["key"]) for line in self.told if line["what"] == "worked"]

    def of(self, what: str) -> list[dict[str, Any]]:
        return [line for line in self.told if line["what"] == what]

    @property
    def result(self) -> dict[str, Any]:
        found = self.of("result")
        assert found, f"the run ended with {self.status}: {self.told[-3:]}"
        return found[0]


class Nursery(WarmParent):
    """Starts victims.

    Args:
        folder: for its log and their diaries.
    """

    def __init__(self, folder: Path) -> None:
        environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "4242"}
        super().__init__("tests.faults.victims", folder / "nursery.log", environment)

    def start(
        self,
        config: dict[str, Any],
        night: date,
        trap: Trap | None = None,
        promote: bool = True,
        term: float | None = None,
        folder: Path = ROOT,
        replayed: tuple[date, Path] | None = None,
        fallback: tuple[dict[str, str], str | None] | None = None,
    ) -> "Running":
        """Begin a run.

        Args:
            config: of the pipeline.
            night: the night.
            trap: where the run dies or waits.
            promote: whether the pointer may move.
            term: seconds of its lease, where they are not the usual ones.
            folder: its working directory.
            replayed: the last night and the output folder of a replay, which begins with `night`.
            fallback: the segment that falls back, and the release whose weights it gets; no night is run then.
        """
        pid, diary = self.begin(
            {
                **{"config": config, "night": night.isoformat(), "promote": promote},
                **{"trap": None if trap is None else vars(trap), "term": term, "folder": str(folder)},
                "fallback": fallback,
                "replayed": None if replayed is None else [replayed[0].isoformat(), str(replayed[1])],
            }
        )
        return Running(self, pid, diary, trap)

    def run(self, *args: Any, **kwargs: Any) -> Outcome:
        """A whole run, to its end."""
        return self.start(*args, **kwargs).end()


@dataclass
class Running:
    """A run that was started."""

    nursery: Nursery
    pid: int
    diary: Path
    trap: Trap | None

    def reached(self) -> Callable[[], None]:
        """Return when the run waits at its trap, with a function that lets it go on."""
        assert self.trap is not None
        assert self.trap.wait is not None
        folder = Path(self.trap.wait)
        with (folder / "reached").open() as pipe:  # opens when the victim opens it, ends when he closes it
            said = pipe.read()
        assert said == "here"

        def go() -> None:
            with (folder / "go").open("w"):
                pass

        return go

    def end(self) -> Outcome:
        status = self.nursery.end_of(self.pid)
        return Outcome(status, [json.loads(line) for line in self.diary.read_text().splitlines()])


def pipes(folder: Path) -> str:
    """Make the two pipes of a run that is to wait."""
    folder.mkdir(parents=True)
    for name in ("reached", "go"):
        os.mkfifo(folder / name)
    return str(folder)


def moved(config: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """Copy a pipeline's store and scratch, and return its config for the copy."""
    for name in ("store", "scratch"):
        shutil.copytree(source / name, target / name)
    return {**config, "store": str(target / "store"), "scratch": str(target / "scratch")}


def spring(trap: Trap) -> None:
    """Set a trap on every write to a directory store in this process, and on checkpoints."""
    from tasks.clients.directory_store import DirectoryStore
    from tasks.meta_train import CheckpointFile

    count = 0

    def watch(write: Callable[..., Any]) -> Callable[..., Any]:
        def watched(self: Any, key: str, *args: Any) -> Any:
            nonlocal count
            hit = False
            if re.search(trap.key, key):
                count += 1
                hit = count == trap.nth
            if hit and trap.when == "before":
                _act(trap)
            done = write(self, key, *args)
            if hit and trap.when == "after":
                _act(trap)
            return done

        return watched

    for name in WRITES:
        setattr(DirectoryStore, name, watch(getattr(DirectoryStore, name)))
    save = CheckpointFile.save
    kept = watch(lambda self, _key, data: save(self, data))
    CheckpointFile.save = lambda self, data: kept(self, CHECKPOINT, data)  # type: ignore[method-assign]


def _act(trap: Trap) -> None:
    if trap.wait is None:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")
    with (Path(trap.wait) / "reached").open("w") as pipe:
        pipe.write("here")
    with (Path(trap.wait) / "go").open() as pipe:
        pipe.read()


class _Diary(logging.Handler):
    """Writes what happens, a line at a time, so that nothing is lost with the process."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._file: TextIO = path.open("a", buffering=1)

    def tell(self, what: str, **more: object) -> None:
        self._file.write(json.dumps({"what": what, **more}) + "\n")

    def emit(self, record: logging.LogRecord) -> None:
        self.tell("log", by=record.name, level=record.levelname, message=record.getMessage())


def _live(asked: dict[str, Any]) -> None:
    """The life of a victim."""
    from flows.config import RetrainConfig
    from tasks import steps
    from tasks.clients.lease import Lease
    from tasks.clients.workspace import Workspace
    from tasks.errors import NightrankError
    from tasks.fallback import fall_back
    from tests.steps.plain import plain_night, plain_replay

    os.chdir(asked["folder"])
    diary = _Diary(Path(asked["diary"]))
    logging.getLogger("tasks").addHandler(diary)
    logging.getLogger("tasks").setLevel(logging.INFO)
    remember = Workspace.remember

    def remembered(self: Workspace, step: str, key: str, *args: Any) -> Any:
        diary.tell("worked", step=step, key=key)
        return remember(self, step, key, *args)

    Workspace.remember = remembered  # type: ignore[method-assign]
    if asked["term"] is not None:
        steps.Lease = partial(Lease, term_seconds=asked["term"])  # type: ignore[misc]
    if asked["trap"] is not None:
        spring(Trap(**asked["trap"]))
    config, night = RetrainConfig.model_validate(asked["config"]), date.fromisoformat(asked["night"])
    try:
        if asked["fallback"] is not None:
            named, to = asked["fallback"]
            done = fall_back(config.place(), config.data, config.segments.levels, named, "complaints", to)
            diary.tell("result", release=done.pointer.release, new=done.new)
            return
        if asked["replayed"] is not None:
            end, out = asked["replayed"]
            plain_replay(config, night, date.fromisoformat(end), out=out)
            return
        made = plain_night(config, night, asked["promote"])
    except NightrankError as error:
        diary.tell("refused", error=type(error).__name__, message=str(error))
        return
    diary.tell(
        "result",
        release=made.published.release,
        promoted=made.published.promoted,
        why=made.published.why,
        reused={step.step: step.reused for step in made.steps},
        digests={step.step: step.digest for step in made.steps},
    )


def command_line() -> None:
    """`nightrank` with a trap: `python -m tests.faults.victims TRAP.json run --config ...`."""
    from flows.cli import main as nightrank

    spring(Trap(**json.loads(Path(sys.argv[1]).read_text())))
    nightrank(sys.argv[2:])


def main() -> None:
    """The nursery."""
    warnings.simplefilter("ignore")
    # Loaded once here, so that a victim costs milliseconds. A thread that runs would not come along into a fork.
    import great_expectations  # noqa: F401
    import networkx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch._dynamo  # noqa: F401
    from torch.onnx._internal.exporter import _core, _registration  # noqa: F401

    import tests.steps.plain  # noqa: F401

    _registration.ONNXRegistry.from_torchlib()
    assert threading.active_count() == 1, threading.enumerate()
    serve(_live)


if __name__ == "__main__":
    command_line() if len(sys.argv) > 1 else main()
