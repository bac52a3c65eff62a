"""A training that stops anywhere and goes on ends where the one that never stopped does, to the byte."""

import logging

import pytest

from tasks.learning.adapters import AdapterConfig
from tasks.learning.epochs import Descent
from tasks.learning.networks import RankerConfig
from tests.learning.small_rows import before, one_aim, opposed
from tests.learning.test_training import NIGHTS, SHORT, SMALL, bytes_of, train

KEEPING = SHORT.model_copy(update={"epochs": 3, "checkpoint_seconds": 0.0})
STEPS = KEEPING.steps_per_epoch


class Memory:
    """A checkpoint that counts."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.saved = 0

    def load(self) -> bytes | None:
        return self.data

    def save(self, data: bytes) -> None:
        self.data, self.saved = data, self.saved + 1


class Told:
    """Scalars that are remembered, in the order of the calls."""

    def __init__(self) -> None:
        self.begun, self.points = [], []

    def begin(self, epoch: int) -> None:
        self.begun.append(epoch)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        self.points.append((epoch, dict(values)))


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def history():
    return before(one_aim(opposed(nights=NIGHTS, users=24)), NIGHTS)


@pytest.fixture(scope="module")
def whole(history):
    """Trainings that never stopped, by what differs from `KEEPING`."""
    return {way: train(history, config=KEEPING.model_copy(update=changed), adapter=adapter)
            for way, (changed, adapter) in WAYS.items()}  # fmt: skip


@pytest.fixture
def steps(monkeypatch):
    """Counts the gradient steps."""
    taken = []
    step = Descent._step
    monkeypatch.setattr(Descent, "_step", lambda *args: taken.append(1) or step(*args))
    return taken


def stopped_after(epoch):
    def report(done, _total, _unit):
        if done == epoch:
            raise Stopped

    return report


WAYS = {
    "second order": ({}, AdapterConfig()),
    "reptile": ({"outer": "reptile", "freeze": "embeddings"}, AdapterConfig(kind="gradient", steps=2)),
    "plain mean, mixed precision": ({"averaging": "swa", "mixed_precision": True}, AdapterConfig(kind="bias")),
    "joint, fading": ({"outer": "joint", "half_life_nights": 2.0}, AdapterConfig()),
}


@pytest.mark.parametrize(
    ("way", "epoch"), [(way, epoch) for way in WAYS for epoch in (1, 2) if epoch == 2 or "mean" not in way]
)
def test_a_cold_start_goes_on_to_the_same_bytes(history, whole, steps, tmp_path, way, epoch):
    changed, adapter = WAYS[way]
    config, checkpoint, told = KEEPING.model_copy(update=changed), Memory(), Told()
    lost = {"checkpoint": checkpoint, "report": stopped_after(epoch), "scalars": told}
    with pytest.raises(Stopped):
        train(history, config=config, adapter=adapter, **lost)
    assert (checkpoint.saved, len(steps)) == (epoch, epoch * STEPS)
    steps.clear()
    resumed = train(history, config=config, adapter=adapter, checkpoint=checkpoint, scalars=told)
    assert len(steps) == (KEEPING.epochs - epoch) * STEPS
    assert (resumed.curve, resumed.epoch) == (whole[way].curve, whole[way].epoch)
    assert bytes_of(resumed, tmp_path / "resumed") == bytes_of(whole[way], tmp_path / "whole")
    assert f"resumed after epoch {epoch}" in resumed.why
    assert told.begun == [0, epoch + 1]
    points = [(at, values.get("training loss"), values["stop loss"]) for at, values in told.points]
    assert points == list(resumed.curve)  # each epoch once


def test_a_warm_start_that_is_pulled_goes_on_to_the_same_bytes(history, tmp_path):
    parent = train(before(history, NIGHTS - 2), night=NIGHTS - 2).base
    config, checkpoint = KEEPING.model_copy(update={"pull": 0.3}), Memory()
    whole = train(history, config=config, parent=parent)
    with pytest.raises(Stopped):
        train(history, config=config, parent=parent, checkpoint=checkpoint, report=stopped_after(1))
    resumed = train(history, config=config, parent=parent, checkpoint=checkpoint)
    assert resumed.curve == whole.curve
    assert bytes_of(resumed, tmp_path / "resumed") == bytes_of(whole, tmp_path / "whole")


@pytest.mark.parametrize("damage", ["a byte", "half of it", "other layers"])
def test_what_cannot_be_read_is_left_aside_and_said(history, whole, tmp_path, caplog, damage):
    checkpoint = Memory()
    layers = RankerConfig(embedding=4, hidden=6, factors=2, features=3) if damage == "other layers" else SMALL
    with pytest.raises(Stopped):
        train(history, config=KEEPING, ranker=layers, checkpoint=checkpoint, report=stopped_after(2))
    if damage == "a byte":
        checkpoint.data = checkpoint.data[:-9] + bytes([checkpoint.data[-9] ^ 1]) + checkpoint.data[-8:]
    elif damage == "half of it":
        checkpoint.data = checkpoint.data[: len(checkpoint.data) // 2]
    with caplog.at_level(logging.WARNING):
        again = train(history, config=KEEPING, checkpoint=checkpoint)
    assert "is left aside: it" in caplog.text
    assert bytes_of(again, tmp_path / "again") == bytes_of(whole["second order"], tmp_path / "whole")


def test_equal_standings_are_equal_bytes_and_a_short_training_saves_none(history):
    one, other, none = Memory(), Memory(), Memory()
    for checkpoint, config in ((one, KEEPING), (other, KEEPING), (none, SHORT)):
        train(history, config=config, checkpoint=checkpoint)
    assert one.data == other.data
    assert (one.saved, none.saved) == (KEEPING.epochs, 0)
