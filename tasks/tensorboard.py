"""Event files of a night for TensorBoard (the optional extra `tensorboard`): one run for each pipeline and night.

The numbers of a training lie in ``<directory>/<pipeline>/<night>``, of a replay's in ``<pipeline>/replay/<night>``,
those of an ensemble's members in folders below it, and the exams' in ``verdict`` below it. Nothing reads them but
people: they are no part of a step's record, and a night whose training is reused writes none. So a directory that
fails while a night runs does not stop it: the rest is not written, and that is said.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from tasks.errors import InvalidConfig, StoreUnwritable
from tasks.learning.scalars import NoScalars
from tasks.learning.training_config import TrainingConfig
from tasks.references import Place, VerdictRef

log = logging.getLogger("nightrank.tensorboard")


def check(training: TrainingConfig) -> None:
    """Find out before a night begins whether its numbers can be written.

    Raises:
        InvalidConfig: a directory is named, and TensorBoard is not installed.
        StoreUnwritable: the directory cannot be made, or not be written to.
    """
    if training.tensorboard is None:
        return
    _writer_class()
    try:
        Path(training.tensorboard).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=training.tensorboard) as file:
            file.write(b"0")
    except OSError as error:
        raise StoreUnwritable(
            f"{_cannot(training.tensorboard, error)}; free space or give permission, or remove training.tensorboard"
        ) from error


@contextmanager
def scalars_of(
    training: TrainingConfig, place: Place, night: date, replayed: bool = False
) -> Iterator["EventFiles | NoScalars"]:
    """Where the numbers of a night's training go; the files are closed behind the block.

    Raises:
        InvalidConfig: a directory is named, and TensorBoard is not installed.
    """
    if training.tensorboard is None:
        yield NoScalars()
        return
    files = EventFiles(_run(training.tensorboard, place, night, replayed))
    try:
        yield files
    finally:
        files.close()


def write_verdict(training: TrainingConfig, place: Place, night: date, verdict: VerdictRef) -> None:
    """Write what the exams said of every method, and what the gate did, at the night's own step and time.

    All nights of a pipeline then make one chart, a point each.
    """
    if training.tensorboard is None:
        return
    numbers = {"gate/go": float(verdict.go), "gate/alarms": float(len(verdict.alarms))}
    for row in verdict.scores:
        figures = {"loss": row.log_loss, "calibration error": row.calibration, "AUC": row.auc, "NDCG@10": row.ndcg}
        told = {f"{row.exam}/{name}/{row.method}": value for name, value in figures.items() if value is not None}
        numbers |= told
    files = EventFiles(_run(training.tensorboard, place, night) / "verdict", at=night)
    try:
        files.begin(night.toordinal())
        files.write(night.toordinal(), numbers)
    finally:
        files.close()


def _run(directory: str, place: Place, night: date, replayed: bool = False) -> Path:
    # A replay begins its epochs anew, and would void the curves of the night that was published.
    pipeline = Path(directory) / place.pipeline
    return (pipeline / "replay" if replayed else pipeline) / night.isoformat()


class EventFiles:
    """Numbers of one TensorBoard run, and of the runs below it.

    Every session writes a file of its own into the folder. Its first event says from which epoch on it counts, and
    TensorBoard drops what an earlier session has written of that epoch and of later ones: a training that died after
    its last checkpoint leaves no epoch twice.

    Where the folder fails, a warning says so once, and nothing more is written by this run and those below it.

    Args:
        folder: of the run.
        at: whose midnight the numbers are dated to; None for the time at which they are written.
    """

    def __init__(self, folder: Path, at: date | None = None) -> None:
        self._folder = folder
        self._lost: list[str] = []
        self._writer: Any = None
        self._parts: list[EventFiles] = []
        self._time = None if at is None else datetime(at.year, at.month, at.day, tzinfo=UTC).timestamp()

    def begin(self, epoch: int) -> None:
        """Void what an earlier session has written of an epoch and of later ones."""
        self.close()
        if not self._lost:
            with self._going_on():
                self._writer = _writer_class()(str(self._folder), purge_step=epoch)

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write numbers of an epoch; they are in the file when this returns."""
        if self._lost:
            return
        assert self._writer is not None, "begin first"
        with self._going_on():
            for name, value in values.items():
                self._writer.add_scalar(name, value, epoch, walltime=self._time)
            self._writer.flush()

    def part(self, name: str) -> "EventFiles":
        """A run below this one."""
        part = EventFiles(self._folder / name)
        part._lost = self._lost
        self._parts.append(part)
        return part

    def close(self) -> None:
        """Close the files of this run and of those below it."""
        for part in self._parts:
            part.close()
        if self._writer is not None:
            with self._going_on():
                self._writer.close()
            self._writer = None

    @property
    def lost(self) -> str:
        """Why numbers of this run, or of one below it, were not written; empty if all were."""
        return "".join(self._lost)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._lost:
                self._lost.append(
                    f"{_cannot(self._folder, error)}; no more is written there, and the night goes on; free space or "
                    "give permission before the next one, or remove training.tensorboard"
                )
                log.warning("%s", self.lost)


def _cannot(folder: str | Path, error: OSError) -> str:
    return f"{folder} cannot be written to for TensorBoard: {error.strerror or error}"


def _writer_class() -> Any:
    """The class that writes event files.

    Raises:
        InvalidConfig: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InvalidConfig(
            f"training.tensorboard is set, but TensorBoard cannot be loaded ({error}); install it with "
            "pip install 'nightrank[tensorboard]', or remove training.tensorboard"
        ) from error
    return SummaryWriter
