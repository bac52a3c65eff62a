"""The dialect against the pandas engine: the same batch must get the same verdicts and counts."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import duckdb
import pandas as pd
import pytest
import sqlalchemy as sa

from tasks.data import expectations
from tasks.data.duckdb_engine import engine
from tasks.data.rules import LARGEST
from tasks.data.suite import Check

START = datetime(2026, 3, 10)
FRAME = pd.DataFrame(
    {
        "number": [1, 2, 3, 4, 5, 6, 7, 7],
        "real": [0.5, 1.5, None, float("inf"), 2.5, -9.0, 3.0, 3.0],
        "text": ["a", "b", None, "it's; --", "100%", "$1", "ab", "ab"],
        "at": [START + timedelta(hours=hours) for hours in (-1, 0, 1, 2, 23, 24, 5, 5)],
        "flag": [True, False, True, False, True, False, True, True],
    }
)
COLUMNS = {"number": "BIGINT", "real": "DOUBLE", "text": "VARCHAR", "at": "TIMESTAMP", "flag": "BOOLEAN"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *[("expect_column_values_to_not_be_null", {"column": name}) for name in COLUMNS],
    ("expect_column_values_to_not_be_null", {"column": "text", "mostly": 1e-12}),
    ("expect_column_values_to_be_between", {"column": "number", "min_value": 2, "max_value": None}),
    ("expect_column_values_to_be_between", {"column": "number", "min_value": 0, "max_value": 9}),
    ("expect_column_values_to_be_between", {"column": "real", "min_value": 0, "max_value": 3}),
    ("expect_column_values_to_be_between", {"column": "real", "min_value": -LARGEST, "max_value": LARGEST}),
    (
        "expect_column_values_to_be_between",
        {"column": "at", "min_value": START, "max_value": START + timedelta(days=1), "strict_max": True},
    ),
    ("expect_column_values_to_be_in_set", {"column": "number", "value_set": [0, 1]}),
    ("expect_column_values_to_be_in_set", {"column": "text", "value_set": ["a", "it's; --", "100%", "$1", "'"]}),
    ("expect_compound_columns_to_be_unique", {"column_list": ["number", "text", "at"]}),
    ("expect_compound_columns_to_be_unique", {"column_list": ["number", "flag"]}),
    ("expect_compound_columns_to_be_unique", {"column_list": ["real", "at", "text"]}),
    ("expect_table_row_count_to_be_between", {"min_value": 1, "max_value": 7}),
    ("expect_table_row_count_to_be_between", {"min_value": 1, "max_value": 8}),
    ("expect_table_columns_to_match_set", {"column_set": [*COLUMNS], "exact_match": True}),
    ("expect_table_columns_to_match_set", {"column_set": ["number", "more"], "exact_match": True}),
    ("expect_column_values_to_match_regex", {"column": "text", "regex": "b$"}),
    ("expect_column_values_to_not_match_regex", {"column": "text", "regex": "[%$]"}),
    ("expect_column_values_to_be_unique", {"column": "number"}),
    ("expect_column_mean_to_be_between", {"column": "number", "min_value": 4, "max_value": 5}),
    ("expect_column_stdev_to_be_between", {"column": "number", "min_value": 2, "max_value": 3}),
    ("expect_column_max_to_be_between", {"column": "number", "min_value": 8, "max_value": 9}),
    ("expect_column_unique_value_count_to_be_between", {"column": "text", "min_value": 6, "max_value": 6}),
    ("expect_column_distinct_values_to_be_in_set", {"column": "flag", "value_set": [True, False]}),
    ("expect_column_value_lengths_to_be_between", {"column": "text", "min_value": 1, "max_value": 4}),
    ("expect_column_proportion_of_unique_values_to_be_between", {"column": "number", "min_value": 0.9}),
]


@pytest.fixture(scope="module")
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        columns = ", ".join(f'"{name}" {kind}' for name, kind in COLUMNS.items())
        connection.execute(f"CREATE TABLE interactions ({columns})")
        values = FRAME.astype(object).where(FRAME.notna(), None).values.tolist()
        connection.executemany("INSERT INTO interactions VALUES (?, ?, ?, ?, ?)", values)
        yield connection


@pytest.fixture(scope="module")
def verdicts(connection: duckdb.DuckDBPyConnection) -> tuple[list[Any], list[Any]]:
    """What both engines say of each case."""
    context = expectations._gx().context
    from great_expectations.core.batch import Batch
    from great_expectations.execution_engine import PandasExecutionEngine
    from great_expectations.validator.validator import Validator

    suite = [Check(kind, kwargs, "config", True) for kind, kwargs in CASES]
    ours = expectations._evaluate(connection, suite)
    pandas = PandasExecutionEngine()
    validator = Validator(execution_engine=pandas, batches=[Batch(data=FRAME)], data_context=context)
    theirs = expectations._graph(validator, list(enumerate(suite)), {"result_format": "BASIC"})
    return ours, [theirs[number] for number in range(len(suite))]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{number}-{CASES[number][0]}")
def test_verdicts_and_counts_equal_those_on_pandas(verdicts: tuple[list[Any], list[Any]], number: int) -> None:
    ours, theirs = (side[number] for side in verdicts)
    assert ours.success == theirs.success
    assert ours.result.get("unexpected_count") == theirs.result.get("unexpected_count")
    assert ours.result.get("element_count") == theirs.result.get("element_count")
    observed = theirs.result.get("observed_value")
    if isinstance(observed, float):
        assert ours.result["observed_value"] == pytest.approx(observed, rel=1e-12)
    elif "row_count" in CASES[number][0]:
        assert ours.result["observed_value"] == observed


@pytest.mark.parametrize(
    ("kind", "fits"), [("BIGINT", True), ("DOUBLE", False), ("VARCHAR", False), ("NO_TYPE", False)]
)
def test_type_expectations_know_duckdbs_type_names(
    connection: duckdb.DuckDBPyConnection, kind: str, fits: bool
) -> None:
    check = Check("expect_column_values_to_be_of_type", {"column": "number", "type_": kind}, "config", True)
    assert expectations._evaluate(connection, [check])[0].success == fits


def test_rows_outlive_their_connection(connection: duckdb.DuckDBPyConnection) -> None:
    bound = engine(connection)
    with bound.connect() as session:
        result = session.execute(sa.text("SELECT number FROM interactions ORDER BY number"))
        with bound.connect() as other:
            assert other.execute(sa.text("SELECT count(*) FROM interactions")).scalar() == 8
    assert [row[0] for row in result] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_regular_expressions_search_and_keep_their_percent_signs(connection: duckdb.DuckDBPyConnection) -> None:
    text = sa.column("text")
    found = sa.select(text).select_from(sa.table("interactions"))
    with engine(connection).connect() as session:
        assert session.execute(found.where(text.op("~")("0%"))).all() == [("100%",)]
        assert len(session.execute(found.where(text.op("!~")("0%"))).all()) == 6


def test_the_engine_leaves_the_callers_connection_open(connection: duckdb.DuckDBPyConnection) -> None:
    bound = engine(connection)
    with bound.connect():
        pass
    bound.dispose()
    assert connection.execute("SELECT 1").fetchall() == [(1,)]
