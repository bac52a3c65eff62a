"""A market that came every night and does not come tonight is missed, whoever's weights served it."""

from dataclasses import replace

import numpy as np
import pytest

from tasks.data import vocabulary
from tasks.learning.exams import segment_names
from tasks.meta_train import rows_of
from tasks.night_alarms import of_lost_segments
from tasks.steps import open_workspace, recalled
from tests.finished import Finished


@pytest.mark.parametrize(
    ("absent", "least", "missed"),
    [((), 1, False), ((0,), 1, True), ((0, 1), 1, False), ((0, 2), 1, False), ((0,), 100_000, False)],
    ids=["there", "gone", "gone before", "not always there", "few rows"],
)
def test_what_is_missed(finished: Finished, absent: tuple[int, ...], least: int, missed: bool) -> None:
    """The rows of the market north are taken away from nights, counted back from tonight."""
    config, made = finished.config, finished.results[-1]
    workspace, tonight = open_workspace(config.place()), made.night.toordinal()
    layout = recalled(config.place(), "prepare", next(one.key for one in made.steps if one.step == "prepare"))
    words = vocabulary.load(config.data, workspace.file(layout, "vocabulary.parquet"))
    rows = rows_of(config.place(), layout)
    market, night = rows.levels[1], np.array(rows.night)
    names = segment_names(market.keys, market.columns, market.radices, words).to_pylist()
    north = np.asarray(market.segment) == names.index("north")
    before = int((north & (night == tonight - 1)).sum())
    assert min((north & (night == tonight - back)).sum() for back in range(3)) > 0
    for back in absent:
        night[north & (night == tonight - back)] = tonight - 100
    gate = config.gate.model_copy(update={"min_exam_rows": least, "pool_nights": 3})
    told = list(of_lost_segments(config.data, gate, replace(rows, night=night), tonight, words))
    assert [f"have none tonight: north ({before:,} rows)" in alarm.message for alarm in told] == [True] * missed
