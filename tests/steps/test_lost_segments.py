"""A market that came every night and does not come tonight is missed; one that finer weights serve is there."""

import pyarrow as pa
import pytest

from tasks.data import vocabulary
from tasks.evaluate import exam_table
from tasks.learning.exams import segment_names
from tasks.meta_train import rows_of
from tasks.night_alarms import of_lost_segments
from tasks.steps import open_workspace, recalled
from tests.finished import Finished


def exam(**rows: int) -> pa.Table:
    """An exam in which markets had so many rows that their own weights served."""
    segment = [name for name, count in rows.items() for _ in range(count)]
    return pa.table({"level": pa.array([1] * len(segment), pa.int8()), "segment": pa.array(segment, pa.string())})


@pytest.mark.parametrize(
    ("earlier", "named"),
    [
        ([exam(atlantis=200), exam(atlantis=1)], ["atlantis (200 rows)"]),
        ([exam(atlantis=200), exam()], []),
        ([exam(atlantis=3), exam(atlantis=900)], []),
        ([], []),
    ],
    ids=["always there", "not always", "few rows", "the first night"],
)
def test_what_is_missed(finished: Finished, earlier: list[pa.Table], named: list[str]) -> None:
    config, made = finished.config, finished.results[-1]
    workspace, night = open_workspace(config.place()), made.night.toordinal()
    step = next(one for one in made.steps if one.step == "prepare")
    layout = recalled(config.place(), "prepare", step.key)
    words = vocabulary.load(config.data, workspace.file(layout, "vocabulary.parquet"))
    rows = rows_of(config.place(), layout)
    tonight = exam_table(config.place(), next(one for one in made.steps if one.step == "evaluate").key)
    there = "north"
    # Users' own weights serve some of its rows, so that exams tell of fewer than there are.
    assert there in segment_names(rows.levels[1].keys, ("market",), rows.levels[1].radices, words).to_pylist()
    assert 0 in tonight["level"].to_pylist()
    also_there = [pa.concat_tables([one, exam(**{there: 500})]) for one in earlier]
    alarms = list(of_lost_segments(config.data, config.gate, rows, night, words, also_there))
    assert [name in alarm.message for name in named for alarm in alarms] == [True] * len(named)
    assert len(alarms) == len(named)
    assert all(there not in alarm.message for alarm in alarms)
