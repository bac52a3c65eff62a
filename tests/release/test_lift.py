"""Lifts by segment: measured as a loop over the rows measures them, and drawn towards what is true."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tasks.learning.intervals import MIN_CLUSTERS
from tasks.release.lift import SCHEMA, SHOWN, lifts, load, save, summaries
from tests.release.own_weights import exam_of
from tests.releases import contract

LEVELS = (("user",), ("job", "zone"))


def exam(seed: int, rows: int = 3000, segments: int = 40) -> pa.Table:
    """Random rows of two levels; own weights help the segments of even number; some labels are missing."""
    random = np.random.default_rng(seed)
    level, number = random.integers(-1, 2, rows), random.integers(0, segments, rows)
    own = np.where(number % 2 == 0, 0.8, 0.4) + random.uniform(-0.1, 0.1, rows)
    user = [f"user {value}" for value in random.integers(0, 90, rows)]
    liked = np.where(random.random(rows) < 0.1, np.nan, 1.0)
    segment = [f"segment {value}" for value in number]
    parent = random.uniform(0.5, 0.7, rows).astype(np.float32)
    return exam_of(own.astype(np.float32), parent, liked, level=level, segment=segment, user=user)


def test_measured_lifts_are_those_of_a_loop_and_levels_are_apart() -> None:
    tables = [exam(0), exam(1)]
    found = lifts(tables, contract("full"), LEVELS)
    expected: dict[tuple[str, str], list[float]] = {}
    for row in (row for table in tables for row in table.to_pylist()):
        if row["level"] < 0 or np.isnan(row["label/liked"]):
            continue
        difference = np.log(row["nightly/parent/liked"]) - np.log(row["nightly/candidate/liked"])
        expected.setdefault((" x ".join(LEVELS[row["level"]]), row["segment"]), []).append(difference)
    told = {(row["level"], row["segment"]): row for row in found.to_pylist()}
    assert told.keys() == expected.keys()
    for place, values in expected.items():
        assert told[place]["rows"] == len(values)
        assert told[place]["difference"] == pytest.approx(np.mean(values), abs=1e-6)
    for one in summaries(found):
        assert (one.better, one.worse) == (20, 20)
        assert one.gap == one.worst[0].shrunk - one.best[0].shrunk > 0.5
        mine = [row["shrunk"] for row in found.to_pylist() if row["level"] == one.level]
        assert mine == sorted(mine)
        assert [served.shrunk for served in one.best] == mine[:SHOWN]
        assert [served.shrunk for served in one.worst] == mine[: -SHOWN - 1 : -1]


def told(difference: np.ndarray, segment: np.ndarray, visit: np.ndarray) -> pa.Table:
    """A night's exam in which own weights are worse than the parent's by these differences of log-loss."""
    parent = np.full(len(segment), 0.5)
    names = {"segment": [f"{one}" for one in segment], "user": [f"{one}" for one in visit]}
    level = np.zeros(len(segment), np.int8)
    return exam_of(parent * np.exp(-difference), parent, np.ones(len(segment)), level=level, **names)


@pytest.mark.parametrize("longest", [12, 120])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_who_is_better_off_is_seldom_said_of_those_who_are_not(spread: float, longest: int) -> None:
    """Visits of unequal length whose rows move together; three segments in four have one visit, a long one perhaps."""
    called, covered = [], []
    for seed in range(12):
        random = np.random.default_rng(seed)
        true = spread * random.normal(size=200)
        visits = np.where(random.random(200) < 0.75, 1, random.integers(2, 5, 200))
        owner = np.repeat(np.arange(200), visits)
        size = np.where(visits[owner] == 1, random.integers(2, longest, len(owner)), random.integers(2, 12, len(owner)))
        moved = true[owner] + 0.1 * random.normal(size=len(owner))
        visit = np.repeat(np.arange(len(owner)), size)
        difference = moved[visit] + 0.3 * random.normal(size=len(visit))
        found = lifts([told(difference, owner[visit], visit)], contract("full"), LEVELS)
        place = np.array([int(one) for one in found["segment"].to_pylist()])
        shrunk, deviation = found["shrunk"].to_numpy(), found["deviation"].to_numpy()
        (one,) = summaries(found)
        called.append((one.better + one.worse) / one.segments)
        covered.append(np.mean(np.abs(shrunk - true[place]) < 1.96 * deviation))
    assert np.mean(covered) > 0.85
    if spread == 0:
        assert np.mean(called) < 0.12


def test_nobody_stands_at_both_ends_and_single_visits_tell_nothing() -> None:
    segment = np.repeat(np.arange(7), 6)
    difference = np.random.default_rng(0).normal(size=len(segment))
    (one,) = summaries(lifts([told(difference, segment, np.arange(len(segment)) // 3)], contract("full"), LEVELS))
    assert (len(one.best), len(one.worst)) == (3, 3)
    assert not {served.segment for served in one.best} & {served.segment for served in one.worst}
    assert lifts([told(difference, segment, segment)], contract("full"), LEVELS).num_rows == 0


def test_few_segments_cannot_tell_how_much_they_differ() -> None:
    for segments, wanted in ((MIN_CLUSTERS - 1, 0), (MIN_CLUSTERS, 2)):
        assert len(summaries(lifts([exam(0, segments=segments)], contract("full"), LEVELS))) == wanted


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found = lifts([exam(0)], contract("full"), LEVELS)
    save(found, tmp_path / "lift.parquet")
    assert load(tmp_path / "lift.parquet").equals(found)
    assert found.schema.equals(SCHEMA)
    assert pc.all(pc.equal(found["objective"], "liked")).as_py()
