"""Canary batches: rows made from the contract whose verdict is known, to prove a validator before it judges a night."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import duckdb

from tasks.data.contract import LISTS, ColumnConfig, DataConfig
from tasks.data.rules import night_bounds, quoted, sql_type
from tasks.data.vocabulary import MISSING
from tasks.errors import InvalidConfig

_NIGHT = date(2000, 1, 1)
_INT64 = range(-(2**63), 2**63)
Row = dict[str, Any]


@dataclass(frozen=True)
class Canary:
    """One batch and the verdicts it must get."""

    name: str
    night: date
    rows: tuple[Row, ...]
    most_rows: int
    """The row-count bound it is judged by."""
    reasons: frozenset[str]
    """Reason codes that its rows must get."""
    failing: frozenset[str]
    """What the expectations that must fail are about."""
    good: bool
    """Whether nothing else may be found wrong."""
    extra: bool
    """Whether the table has a column that the contract does not know."""

    @contextmanager
    def table(self, data: DataConfig) -> Iterator[duckdb.DuckDBPyConnection]:
        """A DuckDB connection whose table `interactions` holds the rows."""
        columns = [f"{quoted(column)} {sql_type(column)}" for column in data.columns]
        marks = ", ".join("?" for _ in data.columns)
        with duckdb.connect(":memory:") as connection:
            connection.execute(f"CREATE TABLE interactions ({', '.join(columns)})")
            values = [[row[column.name] for column in data.columns] for row in self.rows]
            connection.executemany(f"INSERT INTO interactions VALUES ({marks})", values)
            if self.extra:
                connection.execute('ALTER TABLE interactions ADD COLUMN "canary:extra" BIGINT')
            yield connection


def canaries(data: DataConfig) -> tuple[Canary, ...]:
    """A good batch, a bad one that breaks every rule, and one whose labels are all missing.

    Args:
        data: the contract.

    Raises:
        InvalidConfig: no value can satisfy what the contract says about a column.
    """
    good = _good(data)
    bad, codes = _bad(data, good)
    labels = {objective.column for objective in data.objectives}
    unlabelled = tuple(row | dict.fromkeys(labels) for row in good)
    missing = frozenset(f"null:{name}" for name in labels if not data.column(name).nullable)
    none: frozenset[str] = frozenset()
    most = len(good)
    return (
        Canary("good", _NIGHT, good, most, none, none, good=True, extra=False),
        Canary("bad", _NIGHT, bad, most, codes, (codes - {"conflicting_duplicate"}) | {"columns", "rows"}, False, True),
        Canary(
            "unlabelled",
            _NIGHT,
            unlabelled,
            most,
            missing,
            missing | {f"labels:{name}" for name in labels},
            False,
            False,
        ),
    )


def _good(data: DataConfig) -> tuple[Row, ...]:
    """Three rows that keep every rule: at both ends of the night, and between them one that lacks all it may lack."""
    first, following = _bounds(data)
    row = {column.name: _value(data, column) for column in data.columns}
    missing = {c.name: None for c in data.columns if c.nullable and c.role not in ("label", "user", "item", "time")}
    last = following - timedelta(microseconds=1)
    between = first + timedelta(hours=1)
    return (row | {data.time: first}, row | {data.time: last}, row | {data.time: between} | missing)


def _bad(data: DataConfig, good: tuple[Row, ...]) -> tuple[tuple[Row, ...], frozenset[str]]:
    """The good rows, and per way to break a rule one row that breaks it; all keys differ but those of the copies."""
    first, following = _bounds(data)
    broken = [(code, {column.name: value}) for column in data.columns for code, value in _violations(data, column)]
    start = first + timedelta(hours=2)
    rows = [good[0] | {data.time: start + timedelta(microseconds=at)} | wrong for at, (_, wrong) in enumerate(broken)]
    late = [good[0] | {data.time: first - timedelta(microseconds=1)}, good[0] | {data.time: following}]
    label = data.column(data.objectives[0].column)
    other = {label.name: not good[0][label.name] if label.dtype == "bool" else good[0][label.name] + 1}
    twice = good[0] | {data.time: first + timedelta(hours=3)}
    differing = good[0] | {data.time: first + timedelta(hours=4)}
    codes = {code for code, _ in broken} | {"outside_night", "duplicate", "conflicting_duplicate"}
    return (*good, *rows, *late, twice, twice, differing, differing | other), frozenset(codes)


def _bounds(data: DataConfig) -> tuple[datetime, datetime]:
    first, following = night_bounds(data, _NIGHT)
    return first.replace(tzinfo=None), following.replace(tzinfo=None)


def _binary(data: DataConfig, column: ColumnConfig) -> bool:
    return any(objective.column == column.name and objective.kind == "binary" for objective in data.objectives)


def _value(data: DataConfig, column: ColumnConfig) -> Any:
    """A value that the contract accepts."""
    if column.kind in LISTS and column.role == "ignored":
        return []
    if column.kind == "dense":
        return [0.0] * column.width
    if column.kind == "multi":
        return [_text(column) if column.dtype == "string" else 0]
    if column.dtype == "timestamp":
        return _bounds(data)[0]
    if column.dtype == "bool":
        return False
    if column.dtype == "string":
        return column.allowed[0] if column.allowed else _text(column)
    low, high = column.minimum, column.maximum
    bounds = [bound for bound in (low, high) if bound is not None]
    if column.dtype == "int64":
        bounds = [*map(math.ceil, bounds), *map(math.floor, bounds)]
    candidates = column.allowed or (0, 1, *bounds)
    fitting = [
        value
        for value in candidates
        if not isinstance(value, str)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (column.role != "weight" or value >= 0)
        and (not _binary(data, column) or value in (0, 1))
    ]
    if not fitting:
        raise InvalidConfig(
            f"column {column.name!r}: no value keeps its minimum {low}, maximum {high} and allowed values "
            f"{column.allowed} as {column.role}; widen them"
        )
    return fitting[0]


def _text(column: ColumnConfig) -> str:
    return "a" if column.personal is None else "a" * 64


def _unhashed() -> tuple[str, ...]:
    """Nothing, raw text, capitals, a digit too few and one too many, a line end that some read over."""
    return ("", "ann@example.org", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n")


def _violations(data: DataConfig, column: ColumnConfig) -> list[tuple[str, Any]]:
    """Per way to break a rule of the column: its reason code and a value that breaks it."""
    if column.role == "ignored":
        return []
    found: list[tuple[str, Any]] = []
    if not column.nullable:
        found.append((f"null:{column.name}", None))
    if column.kind in LISTS:
        return [*found, *_list_violations(data, column)]
    if column.dtype == "float64":
        found += [(f"not_finite:{column.name}", value) for value in (math.nan, math.inf, -math.inf)]
    if column.minimum is not None:
        below = math.ceil(column.minimum) - 1 if column.dtype == "int64" else math.nextafter(column.minimum, -math.inf)
        found.append((f"range:{column.name}", below))
    if column.maximum is not None:
        above = math.floor(column.maximum) + 1 if column.dtype == "int64" else math.nextafter(column.maximum, math.inf)
        found.append((f"range:{column.name}", above))
    if column.allowed:
        strings = [value for value in column.allowed if isinstance(value, str)]
        numbers = [value for value in column.allowed if not isinstance(value, str)]
        found.append((f"allowed:{column.name}", "".join(strings) + "x" if strings else max(numbers) + 1))
    if column.personal is not None:
        found += [(f"not_hashed:{column.name}", value) for value in _unhashed()]
    if _binary(data, column) and column.dtype != "bool":
        found.append((f"domain:{column.name}", 2))
    if column.role == "weight":
        found.append((f"negative:{column.name}", -1))
    # a bound at the edge of int64 has nothing beyond it
    return [(code, value) for code, value in found if column.dtype != "int64" or value is None or value in _INT64]


def _list_violations(data: DataConfig, column: ColumnConfig) -> list[tuple[str, Any]]:
    good = _value(data, column)
    if column.kind == "multi":
        longer = good * (column.width + 1)
        empty = [[value] for value in (None, MISSING[column.dtype])]
        code = "empty_value"
        if column.personal is not None:
            code, empty = "not_hashed", [*empty, *([*good, value] for value in _unhashed())]
        return [(f"too_many:{column.name}", longer), *((f"{code}:{column.name}", value) for value in empty)]
    lengths = [(f"wrong_length:{column.name}", value) for value in ([*good, 0.0], good[1:], [])]
    bad = (None, math.nan, math.inf, -math.inf, 1e39)
    return [*lengths, *((f"not_finite:{column.name}", [*good[1:], value]) for value in bad)]
