"""Whether a base has forgotten: found where it has, told exactly where it has not, and never by rows of the night."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from flows.config import RetrainConfig
from tasks.data import vocabulary
from tasks.evaluate import judge
from tasks.ingest import ingest
from tasks.learning.base import Base, grow, save_base, shape_of
from tasks.meta_train import rows_of
from tasks.parents import parent_base
from tasks.references import BaseRef, ExamRef, IngestRef, RetentionRef
from tasks.release.retention import against_parent
from tasks.retention import check_retention
from tasks.steps import open_workspace, recalled, record_of
from tests.finished import Finished


class Second:
    """The second of the finished nights, whose base started from the first one's."""

    def __init__(self, copied: Finished) -> None:
        self.finished, self.made = copied, copied.results[-1]
        self.night, self.world = self.made.night, copied.world
        self.config = self.with_golden(nights=self.world.nights[1:3])
        self.ingested: IngestRef = ingest.fn(
            *(self.config.place(), self.config.data, self.config.gate, self.night, copied.config.digest())
        )
        assert self.ingested.reused
        assert self.ingested.parent is not None
        self.base = self.reference("meta-train", BaseRef, epochs=1, stop_loss=None, parameters=1)

    def with_golden(self, **golden: Any) -> RetrainConfig:
        tree = self.finished.world.config
        return RetrainConfig.model_validate({**tree, "gate": {**tree["gate"], "golden": golden}})

    def reference(self, step: str, kind: Any, **fields: Any) -> Any:
        found = next(one for one in self.made.steps if one.step == step)
        return kind(**found.model_dump(), **fields)

    def compared(self, base: BaseRef | None = None, **golden: Any) -> tuple[RetentionRef, dict[str, Any] | None]:
        config = self.with_golden(**golden) if golden else self.config
        sections = (config.place(), config.data, config.segments, config.gate)
        ref = check_retention.fn(*sections, self.ingested, self.made.prepared, base or self.base)
        figures: dict[str, Any] | None = record_of(config.place(), ref).content["figures"]
        return ref, figures

    def parent(self) -> Base:
        """The parent's base with rows for tonight's keys, as training started from it."""
        place, data = self.config.place(), self.config.data
        history = recalled(place, "history", self.made.prepared.history)
        words = vocabulary.load(data, open_workspace(place).file(history, "vocabulary.parquet"))
        assert self.ingested.parent is not None
        grown = grow(parent_base(place, self.ingested.parent), shape_of(data, rows_of(place, history), words))
        assert grown is not None
        return grown

    def left(self, base: Base, key: str, folder: Path) -> BaseRef:
        """A base as a training that started from the parent might have left it."""
        folder.mkdir()
        content = {"epoch": 1, "parameters": 1, "trained_through": base.trained_through.isoformat()}
        notes = {"curve": [[-1, None, 0.6], [0, None, 0.6], [1, 0.6, 0.5]], "why": "", "seconds": 0.0, "peak_mib": 0.0}
        record = open_workspace(self.config.place()).remember(
            "meta-train", key * 64, content, notes, save_base(base, folder)
        )
        return self.base.model_copy(update={"key": record.key, "digest": record.digest})

    def alarms(self, retention: RetentionRef, config: RetrainConfig) -> list[str]:
        exam = self.reference("evaluate", ExamRef, rows=1, users=1)
        validated = self.made.validated
        sections = (config.place(), config.data, config.segments, config.adapter, config.gate)
        made = judge.fn(*sections, self.ingested, validated, self.made.prepared, exam, retention)
        return [alarm.split(":")[0] for alarm in made.alarms]


@pytest.fixture
def second(damageable: Finished) -> Second:
    return Second(damageable)


def test_a_base_that_is_its_parents_differs_by_exactly_nothing(second: Second, tmp_path: Path) -> None:
    ref, figures = second.compared(second.left(second.parent(), "a", tmp_path / "kept"))
    assert ref.compared
    assert figures is not None
    found = against_parent(figures)
    assert sorted(found) == [0, 5]  # nobody has more than 16 rows in a night of this world
    assert [(vs.estimate, vs.low, vs.high) for vs in found.values()] == [(0.0, 0.0, 0.0)] * 2
    assert found[0].rows == sum(second.world.rows[night] for night in second.world.nights[1:3])
    assert second.alarms(ref, second.config) == []


def test_a_base_that_has_lost_what_its_parent_knew_sounds_the_alarm(second: Second, tmp_path: Path) -> None:
    """The layer that reads both towers is overwritten, and the one beside it is as it was."""
    lost = second.parent()
    with torch.no_grad():
        last = lost.network.joint[-1]
        assert isinstance(last, torch.nn.Linear)
        last.weight.normal_(std=30.0, generator=torch.Generator().manual_seed(0))
    ref, figures = second.compared(second.left(lost, "b", tmp_path / "lost"))
    assert figures is not None
    assert all(vs.low > 0.05 for vs in against_parent(figures).values())
    assert second.alarms(ref, second.config) == ["forgetting"]
    # A wide margin lets it pass, and nothing is compared again for it.
    wide = second.with_golden(nights=second.world.nights[1:3], margin=1e6)
    assert second.alarms(ref, wide) == []


def test_nothing_of_the_night_is_read(second: Second, finished: Finished, tmp_path: Path) -> None:
    """With the night's files absurd and what was made of them gone, the same bytes come out."""
    here = second.compared()[0]
    other = Second(finished.copy(tmp_path / "other"))
    work = Path(other.config.store) / other.config.pipeline / "work"
    for night in (one for one in other.world.nights if one >= other.night):
        for path in other.finished.files_of(night):
            path.write_bytes(b"absurd")
    for step in ("prepare", "evaluate", "export"):
        shutil.rmtree(work / step)
    there = other.compared()[0]
    assert not here.reused
    assert not there.reused
    assert here.compared
    assert there.digest == here.digest
    assert there.told == here.told


def test_a_golden_night_that_was_written_again_is_told_and_not_compared(second: Second) -> None:
    first, figures = second.compared()
    assert figures is not None
    assert [one["night"] for one in figures["nights"]] == [one.isoformat() for one in second.world.nights[1:3]]
    changed = second.world.nights[2]
    path = second.finished.files_of(changed)[0]
    table = pq.read_table(path, partitioning=None)
    before = path.read_bytes()
    pq.write_table(table.slice(1), path)
    again, figures = second.compared()
    assert figures is not None
    assert [one["night"] for one in figures["nights"]] == [second.world.nights[1].isoformat()]
    told = f"left out: {changed} (its files have changed since it was first compared, for night {second.night}"
    assert told in again.told
    assert f"tiny/state/golden/night={changed}.json" in again.told
    only = second.compared(nights=[changed])[0]
    assert not only.compared
    assert only.told.startswith(f"not compared: no golden night; left out: {changed} (its files have changed")
    path.write_bytes(before)
    assert second.compared()[0].told == first.told


def test_a_base_that_started_cold_is_not_compared(second: Second) -> None:
    parent = second.ingested.parent
    assert parent is not None
    place, why = second.config.place(), "started in closed form: the parent's base does not fit"
    content, notes = {"epoch": 0}, {"curve": [[0, None, 0.6]], "why": why}
    cold = open_workspace(place).remember("meta-train", "c" * 64, content, notes, {})
    ref, figures = second.compared(second.base.model_copy(update={"key": cold.key, "digest": cold.digest}))
    assert (ref.compared, figures) == (False, None)
    assert ref.told == f"not compared: the base did not start from {parent.name}: {why}"
