"""Lifts by segment: measured as a loop over the rows measures them, and drawn towards what is true."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tasks.learning.intervals import MIN_CLUSTERS
from tasks.release.lift import SCHEMA, SHOWN, lifts, load, save, shrink, summaries
from tests.releases import contract

LEVELS = (("user",), ("job", "zone"))


def exam(seed: int, rows: int = 3000, segments: int = 40) -> pa.Table:
    """Random rows of two levels; own weights help the segments of even number; some labels are missing."""
    random = np.random.default_rng(seed)
    level, number = random.integers(-1, 2, rows), random.integers(0, segments, rows)
    own = np.where(number % 2 == 0, 0.8, 0.4) + random.uniform(-0.1, 0.1, rows)
    return pa.table(
        {
            "level": level,
            "segment": [f"segment {value}" for value in number],
            "user": [f"user {value}" for value in random.integers(0, 90, rows)],
            "label/liked": np.where(random.random(rows) < 0.1, np.nan, 1.0),
            "label/stars": np.full(rows, np.nan),
            "nightly/candidate/liked": own.astype(np.float32),
            "nightly/parent/liked": random.uniform(0.5, 0.7, rows).astype(np.float32),
            "nightly/candidate/stars": np.full(rows, np.nan, np.float32),
            "nightly/parent/stars": np.full(rows, np.nan, np.float32),
        }
    )


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


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5])
def test_shrunk_lifts_are_nearer_to_the_truth_and_say_how_near(spread: float) -> None:
    """True values with a known spread, measured with as little or as much noise as segments have rows."""
    random = np.random.default_rng(3)
    true = 0.1 + spread * random.normal(size=4000)
    variance = 0.5 / random.integers(1, 200, len(true))
    mean = true + np.sqrt(variance) * random.normal(size=len(true))
    shrunk, deviation = shrink(mean, variance)
    error = shrunk - true
    assert np.mean(error**2) < np.mean((mean - true) ** 2)
    # No estimate can do better than that of the prior that drew them.
    best = 0.1 + (mean - 0.1) * spread**2 / (spread**2 + variance)
    assert np.mean(error**2) <= 1.02 * np.mean((best - true) ** 2) + 1e-4
    if spread > 0:
        assert np.mean(np.abs(error) < 1.96 * deviation) == pytest.approx(0.95, abs=0.015)


def test_noise_alone_makes_nobody_better_off() -> None:
    """Own weights that differ from the parent's at random, in whole nights of a user at a time."""
    random = np.random.default_rng(5)
    users, each = 300, 20
    who = np.repeat(np.arange(users), each)
    tables = []
    for _ in range(2):
        shift = np.repeat(random.normal(0, 0.3, users), each)
        own = 1 / (1 + np.exp(-(0.5 + shift)))
        # In the mean over what may happen no shift is worth anything.
        loss = -np.log(own)
        parent = np.exp(-(loss - (shift - shift.mean()) * 0.4))
        tables.append(
            pa.table(
                {
                    "level": np.zeros(len(who), np.int8),
                    "segment": [f"{one}" for one in who],
                    "user": [f"{one}" for one in who],
                    "label/liked": np.ones(len(who)),
                    "label/stars": np.full(len(who), np.nan),
                    "nightly/candidate/liked": own,
                    "nightly/parent/liked": np.clip(parent, 1e-6, 1 - 1e-6),
                    "nightly/candidate/stars": np.full(len(who), np.nan),
                    "nightly/parent/stars": np.full(len(who), np.nan),
                }
            )
        )
    (told,) = summaries(lifts(tables, contract("full"), LEVELS))
    assert told.segments == users
    assert told.better + told.worse <= 0.1 * users


def test_few_segments_cannot_tell_how_much_they_differ() -> None:
    for segments, wanted in ((MIN_CLUSTERS - 1, 0), (MIN_CLUSTERS, 2)):
        assert len(summaries(lifts([exam(0, segments=segments)], contract("full"), LEVELS))) == wanted


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found = lifts([exam(0)], contract("full"), LEVELS)
    save(found, tmp_path / "lift.parquet")
    assert load(tmp_path / "lift.parquet").equals(found)
    assert found.schema.equals(SCHEMA)
    assert pc.all(pc.equal(found["objective"], "liked")).as_py()
