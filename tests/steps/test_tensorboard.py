"""What a night tells TensorBoard, read back with TensorBoard's own reader."""

import builtins
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from flows.config import RetrainConfig
from flows.nightly import nightly_retrain
from flows.replay import replay
from tasks.errors import InvalidConfig, StoreUnwritable
from tasks.learning.training_config import TrainingConfig
from tasks.tensorboard import EventFiles, check
from tests.finished import Finished
from tests.steps.plain import plain_night

TRAINED = {"training loss", "learning rate", "gradient norm", "seconds"}


@pytest.fixture(autouse=True)
def names_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second are read in the order of their numbers, which are counted through the whole process."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Points of every scalar of a run: step and value."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_points_are_read_back_by_name_and_step(tmp_path: Path) -> None:
    files = EventFiles(tmp_path)
    files.begin(-1)
    files.write(-1, {"stop loss": 0.75})
    files.write(0, {"stop loss": 0.5})
    files.write(1, {"stop loss": 0.25, "training loss": 2.0})
    # Read while the writer is still open: nothing waits for the end.
    assert read(tmp_path) == {"stop loss": [(-1, 0.75), (0, 0.5), (1, 0.25)], "training loss": [(1, 2.0)]}
    files.close()


def test_a_session_that_goes_on_from_an_epoch_voids_what_the_dead_one_wrote_of_it(tmp_path: Path) -> None:
    """The dead one came to epoch 3 and its checkpoint to epoch 1; nobody closed its file."""
    dead = EventFiles(tmp_path)
    dead.begin(0)
    for epoch in range(4):
        dead.write(epoch, {"stop loss": float(epoch)})
    alive = EventFiles(tmp_path)
    alive.begin(2)
    alive.write(2, {"stop loss": 20.0})
    alive.write(3, {"stop loss": 30.0})
    assert read(tmp_path) == {"stop loss": [(0, 0.0), (1, 1.0), (2, 20.0), (3, 30.0)]}
    again = EventFiles(tmp_path)
    again.begin(0)
    again.write(0, {"stop loss": 7.0})
    assert read(tmp_path) == {"stop loss": [(0, 7.0)]}
    for files in (dead, alive, again):
        files.close()


def test_parts_are_runs_below(tmp_path: Path) -> None:
    whole = EventFiles(tmp_path)
    part = whole.part("member-1")
    for files, value in ((whole, 1.0), (part, 2.0)):
        files.begin(0)
        files.write(0, {"stop loss": value})
    whole.close()
    assert read(tmp_path / "member-1") == {"stop loss": [(0, 2.0)]}


def gone(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("")


def full(run: Path) -> None:
    (events,) = run.glob("events.*")
    events.unlink()
    events.symlink_to("/dev/full")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
@pytest.mark.parametrize(("break_", "why"), [(gone, "Not a directory"), (full, "No space left on device")])
def test_a_directory_that_fails_is_said_once_and_raises_nothing(
    break_: Callable[[Path], None], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())
    files = EventFiles(tmp_path / "run")
    part = files.part("member-1")
    files.begin(0)
    files.write(0, {"stop loss": 1.0})
    assert files.lost == ""
    break_(tmp_path / "run")
    for epoch in range(1, 4):
        files.write(epoch, {"stop loss": 1.0})
    part.begin(0)
    part.write(0, {"stop loss": 1.0})
    files.close()
    for own in set(threading.enumerate()) - before:  # its last words are of this test, and not of the next
        own.join(10)
        assert not own.is_alive()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    said = caplog.records[0].getMessage()
    assert said == files.lost == part.lost
    assert said.startswith(f"{tmp_path}/run cannot be written to for TensorBoard: {why}; no more is written there")


def told(finished: Finished, folder: Path, **training: Any) -> RetrainConfig:
    tree = finished.world.config
    changed = tree["training"] | {"tensorboard": str(folder), **training}
    return RetrainConfig.model_validate(tree | {"training": changed})


def test_a_night_tells_its_training_and_its_exams_and_is_the_same_night(damageable: Finished, tmp_path: Path) -> None:
    config, night = told(damageable, tmp_path / "runs", members=2, epochs=1), damageable.next_night
    made = plain_night(config, night)
    folder = tmp_path / "runs" / "tiny" / night.isoformat()
    for part in ("member-1", "member-2", "student"):
        numbers = read(folder / part)
        assert numbers.keys() == TRAINED | {"stop loss"}
        assert [step for step, _ in numbers["training loss"]] == [1]
        assert [step for step, _ in numbers["stop loss"]] == [-1, 0, 1]
        assert numbers["learning rate"][0][1] == pytest.approx(config.training.learning_rate)
        assert numbers["gradient norm"][0][1] > 0
    best = min(value for part in ("member-1", "member-2", "student") for _, value in read(folder / part)["stop loss"])
    assert read(folder)["stop loss of what was kept"] == [(0, pytest.approx(best))]
    exams = read(folder / "verdict")
    rows = {(row.exam, row.method): row.log_loss for row in made.verdict.scores}
    assert len(rows) > 4
    for (exam, method), loss in rows.items():
        assert exams[f"{exam}/loss/{method}"] == [(night.toordinal(), pytest.approx(loss))]
    assert exams["gate/go"] == [(night.toordinal(), float(made.verdict.go))]
    # What is told is no part of the night: without it every step of it is there already.
    silent = config.model_copy(update={"training": config.training.model_copy(update={"tensorboard": None})})
    assert silent.digest() == config.digest()
    again = plain_night(silent, night)
    assert [step.reused for step in again.steps] == [True] * len(made.steps)


def test_a_night_whose_directory_fails_is_the_same_night_and_its_report_says_so(
    damageable: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, night = told(damageable, tmp_path / "runs"), damageable.next_night
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").write_text("in the way")
    with caplog.at_level(logging.WARNING, "nightrank.tensorboard"):
        made = plain_night(config, night)
    run = tmp_path / "runs" / "tiny" / night.isoformat()
    warned = [record.getMessage() for record in caplog.records if record.name == "nightrank.tensorboard"]
    assert [one.partition(" cannot be written to")[0] for one in warned] == [str(run), str(run / "verdict")]
    page = damageable.store.get(f"tiny/releases/{made.published.release}/report.html").data.decode()
    assert f"{run} cannot be written to for TensorBoard: Not a directory; no more is written there" in page
    silent = config.model_copy(update={"training": config.training.model_copy(update={"tensorboard": None})})
    again = plain_night(silent, night)
    assert [step.reused for step in again.steps] == [True] * len(made.steps)


def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def importing(name: str, *rest: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_without_the_package_no_night_begins(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, night = told(finished, tmp_path / "runs"), finished.next_night
    without_tensorboard(monkeypatch)
    says = r"training\.tensorboard is set.*pip install 'nightrank\[tensorboard\]', or remove training\.tensorboard"
    with caplog.at_level(logging.INFO, "nightrank"):
        with pytest.raises(InvalidConfig, match=says):
            nightly_retrain.fn(config, night)
        with pytest.raises(InvalidConfig, match=says):
            replay.fn(config, night, night)
    assert caplog.records == []
    check(TrainingConfig())


def test_a_directory_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnwritable, match=r"file/runs cannot be written to .*remove training\.tensorboard"):
        check(TrainingConfig(tensorboard=str(tmp_path / "file" / "runs")))
