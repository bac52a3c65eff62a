"""What levels cost for their gain, by hand; and where there is no gain to divide by, that is said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.learning.intervals import MIN_CLUSTERS
from tasks.release.cost import SCHEMA, Cost, Spent, costs, load, save
from tasks.release.lift import TOO_FEW, lifts
from tests.release.own_weights import exam_of
from tests.releases import contract

LEVELS = (("user",), ("job", "zone"))
USER = Spent("user", 40, 4_000, 20.0, "a CPU")
JOB = Spent("job x zone", 3, 600, 6.0, "a CPU")
COST = Cost("liked", "user", "log-loss", 2, 400, 80_000, 200.0, "a CPU", 1000, 20.0, -0.02, -0.03, -0.01)


def exam(gain: float, level: int = 0, segments: int = 8, each: int = 6) -> pa.Table:
    """Every segment's rows lose less log-loss by `gain` with its own weights: nothing is noise."""
    count = segments * each
    parent = np.full(count, 0.5)
    names = np.repeat(np.arange(segments), each)
    return exam_of(
        *(parent * np.exp(gain), parent, np.ones(count)),
        level=np.full(count, level, np.int8),
        segment=[f"segment {one}" for one in names],
        user=[f"user {one}" for one in names],
    )


def told(tables: list[pa.Table], spent: list[list[Spent]]) -> dict[tuple[str, str], Cost]:
    data = contract("full")
    found = costs(spent, lifts(tables, data, LEVELS), tables, data, LEVELS, seed=0)
    return {(one.objective, one.level): one for one in found}


def test_by_hand() -> None:
    """Two nights of 48 rows each that gain 0.05: 4.8 in all, for 8 kB and 30 ms."""
    found = told([exam(0.05), exam(0.05)], [[USER, JOB], [replace(USER, adapters=60, milliseconds=10.0), JOB]])
    cost = found["liked", "user"]
    assert (cost.nights, cost.adapters, cost.bytes, cost.milliseconds, cost.rows) == (2, 100, 8_000, 30.0, 96)
    assert cost.gain == pytest.approx(4.8)
    assert cost.gain_per_row == pytest.approx(0.05)
    assert (cost.difference, cost.low, cost.high) == pytest.approx((-0.05, -0.05, -0.05))
    assert cost.pays
    assert cost.bytes_per_gain == pytest.approx(8_000 / 4.8)
    assert cost.milliseconds_per_gain == pytest.approx(30 / 4.8)
    assert cost.in_words() == (
        "50 adapters a night, 80 B and 0.30 ms each; gain of 0.0500 per row served: 1.7 kB and 6.2 ms per 0.001 "
        "log-loss on 1,000 rows"
    )
    other = found["liked", "job x zone"]
    assert (other.rows, other.gain, other.bytes) == (0, None, 1_200)
    assert (other.difference, other.low, other.high) == (None, None, None)
    assert other.in_words() == f"3 adapters a night, 200 B and 2.0 ms each; {TOO_FEW}"
    assert found["stars", "user"].unit == "squared error"
    assert found["stars", "user"].gain is None


def test_a_segment_counts_by_its_rows() -> None:
    """Half of the segments gain 0.1 on two rows each, the others nothing on six; measured without noise."""
    parts = [exam(0.1, segments=MIN_CLUSTERS, each=2), exam(0.0, segments=MIN_CLUSTERS, each=6)]
    parts[1] = parts[1].set_column(
        parts[1].column_names.index("segment"), "segment", pa.array([f"other {at // 6}" for at in range(30)])
    )
    night = pa.concat_tables(parts)
    cost = told([night, night], [[USER, JOB]] * 2)["liked", "user"]
    assert cost.gain == pytest.approx(2 * (MIN_CLUSTERS * 2 * 0.1))
    assert cost.gain_per_row == pytest.approx(0.1 * 2 / 8)


def test_a_loss_is_no_gain_and_is_not_divided() -> None:
    cost = told([exam(-0.02), exam(-0.02)], [[USER, JOB]] * 2)["liked", "user"]
    assert cost.gain == pytest.approx(-0.02 * 96)
    assert (cost.pays, cost.bytes_per_gain, cost.milliseconds_per_gain) == (False, None, None)
    assert cost.in_words().endswith("; no gain: log-loss +0.0200 per row served")
    assert not replace(COST, gain=-1.0).pays  # whatever its interval says
    nothing = told([exam(0.0), exam(0.0)], [[USER, JOB]] * 2)["liked", "user"]
    assert nothing.in_words().endswith("; no gain: log-loss +0.0000 per row served")


@pytest.mark.parametrize("high", [0.0, 0.004, None])
def test_a_gain_that_is_not_proven_is_not_divided(high: float | None) -> None:
    cost = replace(COST, high=high)
    assert (cost.pays, cost.bytes_per_gain, cost.milliseconds_per_gain) == (False, None, None)
    assert cost.in_words().endswith("; the gain of 0.0200 per row served is not proven")


def test_a_level_whose_segments_came_once_is_told_as_a_whole() -> None:
    cost = told([exam(0.05)], [[USER, JOB]])["liked", "user"]
    assert (cost.gain, cost.pays) == (None, False)
    assert cost.in_words() == (
        f"40 adapters a night, 100 B and 0.50 ms each; {TOO_FEW}; all together log-loss -0.05000 [-0.05000, -0.05000] "
        "per row served, a gain is proven"
    )
    assert replace(cost, high=0.001).in_words().endswith("[-0.05000, +0.00100] per row served, a gain is not proven")


def test_noise_is_not_proven() -> None:
    """Eight segments, of which a few gain much and the others lose: by the interval, it might be nothing."""
    gains = (0.5, -0.2, 0.3, -0.3, -0.1, 0.2, -0.2, 0.05)
    parts = [exam(gain, segments=1) for gain in gains]
    for at, part in enumerate(parts):
        for column in ("segment", "user"):
            place = part.column_names.index(column)
            parts[at] = parts[at].set_column(place, column, pa.array([f"{column} {at}"] * part.num_rows))
    night = pa.concat_tables(parts)
    cost = told([night, night], [[USER, JOB]] * 2)["liked", "user"]
    assert cost.gain is not None
    assert cost.gain > 0
    assert "is not proven" in cost.in_words()


def test_what_was_not_measured_is_said() -> None:
    """One of two banks was solved before costs were noted; devices that differ are both named."""
    old = Spent("user", 40, None, None, None)
    cost = told([exam(0.05), exam(0.05)], [[old, JOB], [USER, JOB]])["liked", "user"]
    assert (cost.bytes, cost.milliseconds, cost.device) == (None, None, "a CPU")
    assert cost.in_words() == "40 adapters a night, what they cost was not measured; gain of 0.0500 per row served"
    both = told([exam(0.05), exam(0.05)], [[replace(USER, device="a GPU"), JOB], [USER, JOB]])["liked", "user"]
    assert both.device == "a CPU and a GPU"
    assert replace(COST, adapters=0).in_words() == "no segment has weights of its own"


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found = [
        COST,
        replace(COST, bytes=None, milliseconds=None, device=None, gain=None, difference=None, low=None, high=None),
    ]
    save(found, tmp_path / "cost.parquet")
    assert load(tmp_path / "cost.parquet") == found
    assert pq.read_schema(tmp_path / "cost.parquet").equals(SCHEMA)
