"""Who is served by what: `segments.parquet`, and what a manifest tells of it."""

from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.release import lift
from tasks.release.manifest_parts import LevelSegments, Lift, Support
from tasks.release.segments_table import level_segments
from tasks.release.tables import LevelTable, ServingTables, read_tables, with_own, without, write_tables
from tests.releases import contract, make_parts


@pytest.fixture(scope="module")
def tables() -> ServingTables:
    """Ten users with weights of their own and two that were rolled back; one market out of three."""
    made = make_parts("full")[3]
    users = LevelTable(
        *(("user",), (20,), np.arange(1, 11), np.arange(1, 11)),
        support=np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 100]),
        rolled_back=np.array([15, 17]),
    )
    jobs = LevelTable(("job", "zone"), (9, 9), np.array([10]), np.array([11]), np.array([40]), np.zeros(0, np.int64))
    return ServingTables(made.vocabularies, made.statistics, (users, jobs))


def test_segments_that_were_rolled_back_are_listed_and_no_graph_gets_them(tables: ServingTables, tmp_path: Path):
    write_tables(tables, tmp_path)
    listed = pq.read_table(tmp_path / "segments.parquet")
    assert listed["key"].to_pylist() == [*range(1, 11), 15, 17, 10]
    assert listed["slot"].to_pylist() == [*range(1, 11), -1, -1, 11]
    assert listed["support"].to_pylist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 100, None, None, 40]
    assert listed["source"].to_pylist() == ["own"] * 10 + ["rolled_back"] * 2 + ["own"]
    for wrote, read in zip(tables.levels, read_tables(contract("full"), tmp_path).levels, strict=True):
        assert (wrote.columns, wrote.radices) == (read.columns, read.radices)
        for name in ("keys", "slots", "support", "rolled_back"):
            np.testing.assert_array_equal(getattr(wrote, name), getattr(read, name))


@pytest.mark.parametrize(("at", "key"), [(0, 1), (0, 4), (0, 9), (1, 5), (1, 7), (2, 3)])
def test_weights_that_are_taken_out_and_put_back_are_where_they_were(tables: ServingTables, at: int, key: int):
    """Of first, middle, last and only segments of a level; of everybody else, the weights that his slot names stay."""
    none = np.zeros(0, np.int64)
    levels = (
        LevelTable(("user",), (20,), np.array([1, 4, 9]), np.array([4, 5, 6]), np.array([3, 2, 8]), np.array([6])),
        LevelTable(("job",), (9,), np.array([5, 7]), np.array([2, 3]), np.array([30, 20]), none),
        LevelTable(("zone",), (9,), np.array([3]), np.array([1]), np.array([50]), none),
    )
    first, bank = replace(tables, levels=levels), np.arange(14, dtype=np.float32).reshape(7, 1, 2)
    slot = levels[at].slot_of(key)
    assert slot is not None
    fewer, less = without(bank, first, at, key)
    assert less.levels[at].slot_of(key) is None
    assert (less.levels[at].rolled_back == key).sum() == 1
    for level, now in zip(levels, less.levels, strict=True):
        stay = [
            (int(one), bank[level.slot_of(one)].tolist()) for one in level.keys if (one, level) != (key, levels[at])
        ]
        assert [(int(one), fewer[now.slot_of(one)].tolist()) for one in now.keys] == stay
    support = int(levels[at].support[levels[at].keys == key][0])  # type: ignore[index]
    for start in ((fewer, less), (bank * np.float32(2), first)):  # a slot of its own again, or other weights in it
        weights, back = with_own(*start, at, key, bank[slot], support)
        np.testing.assert_array_equal(weights[slot], bank[slot])
        for level, now in zip(levels, back.levels, strict=True):
            for name in ("keys", "slots", "support", "rolled_back"):
                np.testing.assert_array_equal(getattr(level, name), getattr(now, name))
    assert np.array_equal(with_own(fewer, less, at, key, bank[slot], support)[0], bank)
    assert with_own(fewer, less, at, key, bank[slot], None)[1].levels[at].support is None


def test_tables_of_an_older_release_say_nothing_of_support(tables: ServingTables, tmp_path: Path):
    write_tables(tables, tmp_path)
    older = pq.read_table(tmp_path / "segments.parquet").select(["level", "key", "slot"]).slice(0, 10)
    pq.write_table(older, tmp_path / "segments.parquet")
    users, jobs = read_tables(contract("full"), tmp_path).levels
    assert (users.support, users.rolled_back) == (None, None)
    np.testing.assert_array_equal(users.keys, np.arange(1, 11))
    assert len(jobs.keys) == 0


def test_a_manifest_tells_counts_support_and_lift_of_each_level(tables: ServingTables, tmp_path: Path):
    write_tables(tables, tmp_path)
    told = {
        "objective": ["liked", "liked", "stars"], "level": ["user"] * 3, "segment": ["1", "2", "1"],
        "rows": [10, 20, 5], "difference": [-0.2, 0.1, 9.0], "shrunk": [-0.05, 0.01, 9.0],
        "deviation": [0.03, 0.04, 9.0],
    }  # fmt: skip
    lifts = pa.table(told, schema=lift.SCHEMA)
    columns = [("user",), ("job", "zone")]
    found = level_segments(tmp_path / "segments.parquet", lifts, "liked", columns, [30, 3], "ridge", 5)
    half = 1.959963984540054 * sqrt(0.03**2 + 0.04**2) / 2
    (users, jobs) = found
    # Nine tenths of the way through ten numbers: between the ninth and the tenth, a tenth of the gap.
    assert users == LevelSegments(
        *(("user",), "ridge", 30, 10, 18, 2, Support(5.5, pytest.approx(18.1), 145)),
        Lift(pytest.approx(-0.02), pytest.approx(-0.02 - half), pytest.approx(-0.02 + half), 5),
    )
    assert jobs == LevelSegments(("job", "zone"), "ridge", 3, 1, 2, 0, Support(40.0, 40.0, 40), None)
