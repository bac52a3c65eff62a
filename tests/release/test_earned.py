"""What own weights are worth by support, against a loop over the rows, and from where on they are said to pay."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tasks.release.earned import LEAST, Step, curve, load, pays_from, save
from tests.release.own_weights import exam_of
from tests.releases import contract

LEVELS = (("user",), ("job", "zone"))


def exam(seed: int, rows: int = 6000) -> pa.Table:
    """Random rows; own weights are good from 4 support rows on, and worse before; some labels are missing."""
    random = np.random.default_rng(seed)
    level, support = random.integers(-1, 2, rows), random.integers(1, 90, rows)
    own = np.where(support < 4, 0.4, 0.8)
    liked = np.where(random.random(rows) < 0.1, np.nan, 1.0)
    segment = [f"segment {value}" for value in random.integers(0, 25, rows)]
    return exam_of(
        own.astype(np.float32),
        random.uniform(0.5, 0.7, rows).astype(np.float32),
        liked,
        level=level,
        support=np.where(level < 0, 0, support),
        segment=segment,
    )


def test_the_curve_is_that_of_a_loop_over_the_rows() -> None:
    tables = [exam(0), exam(1)]
    found = {(step.level, step.least): step for step in curve(tables, contract("full"), LEVELS, seed=0)}
    expected: dict[tuple[str, int], list[tuple[str, float]]] = {}
    for row in (row for table in tables for row in table.to_pylist()):
        if row["level"] < 0 or np.isnan(row["label/liked"]):
            continue
        place = (" x ".join(LEVELS[row["level"]]), max(least for least in LEAST if least <= row["support"]))
        difference = np.log(row["nightly/parent/liked"]) - np.log(row["nightly/candidate/liked"])
        expected.setdefault(place, []).append((row["segment"], difference))
    assert found.keys() == expected.keys()
    for place, rows in expected.items():
        step = found[place]
        assert (step.rows, step.segments) == (len(rows), len({segment for segment, _ in rows}))
        assert step.difference == pytest.approx(np.mean([value for _, value in rows]), abs=1e-6)
        assert step.low is not None
        assert step.high is not None
        assert step.low < step.difference < step.high
        assert (step.high < 0) == (step.least >= 4)
        assert (step.low > 0) == (step.least < 4)
    assert found["user", 64].most is None
    assert found["user", 8].most == 15
    for level in ("user", "job x zone"):
        assert pays_from([found[level, least] for least in LEAST]) == 4


def test_own_weights_pay_only_where_it_is_proven_and_nothing_later_speaks_against_it() -> None:
    unsure = Step("liked", "user", 1, 1, 9, 90, -0.01, -0.03, 0.01)
    few = replace(unsure, least=2, most=3, low=None, high=None)
    better, worse = (
        replace(unsure, least=4, most=7, high=-0.001),
        replace(unsure, least=8, most=15, low=0.001, high=0.1),
    )
    assert pays_from([]) is pays_from([unsure, few]) is None
    assert pays_from([unsure, few, better]) == pays_from([better, replace(unsure, least=8)]) == 4
    assert pays_from([better, worse]) is None
    assert pays_from([replace(worse, least=1), better]) == 4


def test_what_was_saved_is_read_again(tmp_path: Path) -> None:
    steps = curve([exam(0)], contract("full"), LEVELS, seed=0)
    save(steps, tmp_path / "steps.parquet")
    assert load(tmp_path / "steps.parquet") == steps
    save([], tmp_path / "none.parquet")
    assert load(tmp_path / "none.parquet") == []
