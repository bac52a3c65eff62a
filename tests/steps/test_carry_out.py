"""Steps are remembered, measured, watched, cleaned up after, and retried only where that can help."""

import json
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.errors import DataRejected, DeviceUnavailable, LeaseLost, OutcomeUnknown, StoreUnavailable
from tasks.references import Place
from tasks.steps import Product, Progress, _a_retry_can_help, carry_out, device_of, hold, store_of, verb, watched_by

NIGHT = date(2026, 3, 1)


class Diary:
    """A watcher that writes everything down."""

    def __init__(self) -> None:
        self.lines: list[tuple[object, ...]] = []

    def started(self, step: str, why: str) -> None:
        self.lines.append(("started", step, why))

    def progressed(self, step: str, done: float, total: float | None, unit: str) -> None:
        self.lines.append(("progressed", step, done, total, unit))

    def finished(self, step: str, reused: bool, seconds: float) -> None:
        self.lines.append(("finished", step, reused))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(store=str(tmp_path / "store"), pipeline="tiny", scratch=str(tmp_path / "scratch"), device="cpu")


def count_rows(folder: Path, progress: Progress) -> Product:
    progress(1, 2, "rows")
    (folder / "rows.txt").write_text("two")
    return Product(content={"rows": 2}, notes={"colour": "blue"}, files={"rows.txt": folder / "rows.txt"})


def refuse(folder: Path, progress: Progress) -> Product:
    (folder / "half.txt").write_text("half")
    raise DataRejected("no")


def never(folder: Path, progress: Progress) -> Product:
    raise AssertionError("this step was done before")


def test_a_step_of_the_same_key_is_not_done_again(place: Place) -> None:
    diary = Diary()
    with watched_by(diary):
        first, fields = carry_out(place, "count", 1, NIGHT, {"files": "a"}, {"window": 3}, count_rows)
        again, repeated = carry_out(place, "count", 1, NIGHT, {"files": "a"}, {"window": 3}, never)
    assert again == first
    assert first.content["rows"] == 2
    assert repeated == {**fields, "reused": True}
    assert diary.lines == [
        ("started", "count", "for the first time for 2026-03-01"),
        ("progressed", "count", 1, 2, "rows"),
        ("finished", "count", False),
        ("finished", "count", True),
    ]


@pytest.mark.parametrize(
    ("version", "inputs", "section", "named"),
    [
        (2, {"files": "a"}, {"window": 3}, "step version"),
        (1, {"files": "b"}, {"window": 3}, "files"),
        (1, {"files": "a"}, {"window": 4}, "config window"),
        (1, {"files": "a", "parent": "c"}, {}, "config window, parent"),
    ],
)
def test_a_step_says_what_changed(
    place: Place, version: int, inputs: dict[str, str], section: dict[str, object], named: str
) -> None:
    carry_out(place, "count", 1, NIGHT, {"files": "a"}, {"window": 3}, count_rows)
    diary = Diary()
    with watched_by(diary):
        carry_out(place, "count", version, NIGHT, inputs, section, count_rows)
    assert diary.lines[0] == ("started", "count", f"changed since last time: {named}")


def test_another_night_is_another_step(place: Place) -> None:
    carry_out(place, "count", 1, NIGHT, {}, {}, count_rows)
    _, fields = carry_out(place, "count", 1, date(2026, 3, 2), {}, {}, count_rows)
    assert not fields["reused"]


def test_a_step_leaves_nothing_in_scratch_whether_it_ends_well_or_not(place: Place) -> None:
    carry_out(place, "count", 1, NIGHT, {}, {}, count_rows)
    with pytest.raises(DataRejected):
        carry_out(place, "refuse", 1, NIGHT, {}, {}, refuse)
    assert list((Path(place.scratch) / "steps").iterdir()) == []
    assert not any("/refuse/" in key for key in store_of(place).list(""))


def test_time_and_memory_are_measured_outside_the_digest(place: Place) -> None:
    record, fields = carry_out(place, "count", 1, NIGHT, {}, {}, count_rows)
    assert record.notes["peak_mib"] > 1
    assert record.notes["colour"] == "blue"
    assert fields["digest"] == record.digest
    assert "seconds" not in json.dumps(record.content)


def test_a_step_inside_another_does_not_hide_its_peak_and_is_the_same_every_night(place: Place) -> None:
    def outer(folder: Path, progress: Progress) -> Product:
        np.ones(25_000_000)  # 200 MB for a moment
        inner, _ = carry_out(place, "inner", 1, None, {}, {"layers": 2}, count_rows)
        assert inner.notes["peak_mib"] > before + 150
        return count_rows(folder, progress)

    before = carry_out(place, "count", 1, NIGHT, {}, {}, count_rows)[0].notes["peak_mib"]
    record, _ = carry_out(place, "outer", 1, NIGHT, {}, {}, outer)
    assert record.notes["peak_mib"] > before + 150
    later, fields = carry_out(place, "inner", 1, None, {}, {"layers": 2}, never)
    assert fields["reused"]
    assert "for night" not in later.notes["made_from"]
    assert carry_out(place, "small", 1, NIGHT, {}, {}, count_rows)[0].notes["peak_mib"] < before + 150


def test_a_step_that_lost_the_lease_writes_nothing(place: Place) -> None:
    def lose(folder: Path, progress: Progress) -> Product:
        store = store_of(place)
        before = store.get("tiny/lease")
        taken = {**json.loads(before.data), "holder": "another", "token": 99}
        store.swap("tiny/lease", json.dumps(taken).encode(), before.etag)
        lease._renew()
        return count_rows(folder, progress)

    with pytest.raises(LeaseLost), hold(place) as lease:
        carry_out(place, "count", 1, NIGHT, {}, {}, lose)
    assert not any("/count/" in key for key in store_of(place).list(""))


def test_the_lease_is_free_again_afterwards(place: Place) -> None:
    with hold(place) as first:
        token = first.token
    with hold(place) as second:
        assert second.token > token


def test_what_a_killed_run_left_in_scratch_is_swept_after_a_day(place: Place) -> None:
    room = Path(place.scratch) / "steps"
    for name in ("old", "new"):
        (room / name).mkdir(parents=True)
        (room / name / "part").write_text("left behind")
    yesterday = time.time() - 86_401
    os.utime(room / "old", (yesterday, yesterday))
    with hold(place):
        assert [folder.name for folder in room.iterdir()] == ["new"]


def test_what_a_killed_run_left_half_written_in_the_store_is_swept_after_a_day(place: Place) -> None:
    room = Path(place.store) / ".nightrank" / "tmp"
    room.mkdir(parents=True)
    for name in ("old", "new"):
        (room / name).write_text("half")
    yesterday = time.time() - 86_401
    os.utime(room / "old", (yesterday, yesterday))
    with hold(place):
        assert [file.name for file in room.iterdir()] == ["new"]


def test_a_retry_is_tried_only_where_the_error_says_that_it_can_help() -> None:
    from prefect.client.schemas.objects import TaskRun
    from prefect.states import Failed

    def some_function() -> object: ...

    some_step: Any = verb(some_function)
    run = TaskRun(task_key="some-step", dynamic_key="0")
    assert _a_retry_can_help(some_step, run, Failed(data=StoreUnavailable("busy")))
    assert _a_retry_can_help(some_step, run, Failed(data=OutcomeUnknown("no answer")))  # it reads what came of it first
    assert not _a_retry_can_help(some_step, run, Failed(data=DataRejected("bad rows")))
    assert not _a_retry_can_help(some_step, run, Failed(data=KeyError("a bug")))


def test_a_verb_is_a_task_that_persists_and_caches_nothing() -> None:
    from prefect.cache_policies import NO_CACHE

    @verb
    def some_step() -> None: ...

    assert (some_step.name, some_step.persist_result, some_step.cache_policy) == ("some-step", False, NO_CACHE)


def test_a_device_that_is_demanded_and_absent_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(place) == "cpu"
    assert device_of(place.model_copy(update={"device": "auto"})) == "cpu"
    with pytest.raises(DeviceUnavailable, match="device: auto"):
        device_of(place.model_copy(update={"device": "cuda"}))
