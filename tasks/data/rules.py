"""What must hold of every row of a night: the contract as rules, each in SQL and in Great Expectations' words."""

import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from tasks.data.contract import LISTS, ColumnConfig, DataConfig
from tasks.data.lists import LARGEST_FLOAT32
from tasks.data.vocabulary import MISSING
from tasks.errors import InvalidConfig

SQL_TYPES = {"int64": "BIGINT", "float64": "DOUBLE", "string": "VARCHAR", "bool": "BOOLEAN", "timestamp": "TIMESTAMP"}
"""DuckDB's names of the contract's types."""
HASHED = "[0-9a-f]{64}"
"""What a hashed value looks like."""
LARGEST = 1.7976931348623157e308
"""The largest finite double."""
_ONE = '"value:one"'


@dataclass(frozen=True)
class Rule:
    """One thing that must hold of every row."""

    code: str
    """Reason code, such as `null:movie_id`."""
    column: str | None
    """The column it speaks about; None for rules about the key."""
    predicate: str
    """SQL that is TRUE where the rule holds; a row for which it `IS NOT TRUE` is bad."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Values of the predicate's named parameters: nothing from config or data is ever written into SQL."""
    expectation: str = ""
    """The Great Expectations type that says the same."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Its arguments."""


def night_bounds(data: DataConfig, night: date) -> tuple[datetime, datetime]:
    """First instant of a night and of the next one, in UTC: the night is `[first, next)`, 23 to 25 hours long.

    >>> from types import SimpleNamespace
    >>> first, following = night_bounds(SimpleNamespace(time_zone="Europe/Berlin"), date(2026, 3, 29))
    >>> first.isoformat(), following - first
    ('2026-03-28T23:00:00+00:00', datetime.timedelta(seconds=82800))
    """
    zone = ZoneInfo(data.time_zone)
    first, following = (datetime.combine(night + timedelta(days), time(), zone).astimezone(UTC) for days in (0, 1))
    return first, following


def rules(data: DataConfig, night: date) -> tuple[Rule, ...]:
    """The rules that each row of a night must keep; ignored columns have none.

    Raises:
        InvalidConfig: a column's bounds or allowed values do not fit its type.
    """
    binary = {objective.column for objective in data.objectives if objective.kind == "binary"}
    found: list[Rule] = []
    for column in data.columns:
        if column.role == "ignored":
            continue
        if not column.nullable:
            found.append(
                Rule(
                    f"null:{column.name}",
                    column.name,
                    f"{quoted(column)} IS NOT NULL",
                    {},
                    "expect_column_values_to_not_be_null",
                )
            )
        if column.kind in LISTS:
            found += _list_rules(column)
            continue
        if column.dtype == "float64":
            found.append(_finite(column))
        found += [*_range(column), *_allowed(column)]
        if column.personal is not None:
            found.append(_hashed(column))
        if column.name in binary and column.dtype != "bool":
            found.append(_member(f"domain:{column.name}", column, [0, 1]))
        if column.role == "weight":
            found.append(_between(f"negative:{column.name}", column, 0, None))
    first, following = (instant.replace(tzinfo=None) for instant in night_bounds(data, night))
    when = data.column(data.time)
    found.append(
        Rule(
            "outside_night",
            when.name,
            f"({quoted(when)} IS NULL OR ({quoted(when)} >= $first AND {quoted(when)} < $following))",
            {"first": first, "following": following},
            "expect_column_values_to_be_between",
            {"min_value": first, "max_value": following, "strict_max": True},
        )
    )
    return tuple(found)


def quoted(column: ColumnConfig) -> str:
    """The column's name as an SQL identifier."""
    return '"' + column.name.replace('"', '""') + '"'


def sql_type(column: ColumnConfig) -> str:
    """DuckDB's name of the type that a column is read as."""
    return SQL_TYPES[column.dtype] + ("[]" if column.kind in LISTS else "")


def measures(data: DataConfig) -> dict[str, str]:
    """What expectations read of list columns, which they cannot look into: helper column to SQL, each a count per row.

    `column:values` is how many values the list has, `column:bad` how many of them are none: in a `multi` list missing
    or the marker of missing values (in a personal one what is not hashed), in a `dense` one missing or beyond the
    finite numbers of float32. No contract can name a column so. Where the list is missing, so are the counts.
    """
    read = (column for column in data.columns if column.kind in LISTS and column.role != "ignored")
    return {name: sql for column in read for name, sql in _counts(column).items()}


def _counts(column: ColumnConfig) -> dict[str, str]:
    bad = f"list_filter({quoted(column)}, lambda {_ONE}: {_bad_value(column)})"
    return {f"{column.name}:values": f"len({quoted(column)})", f"{column.name}:bad": f"len({bad})"}


def _bad_value(column: ColumnConfig) -> str:
    if column.kind == "dense":
        return f"(isfinite({_ONE}) AND abs({_ONE}) <= {LARGEST_FLOAT32!r}) IS NOT TRUE"
    if column.personal is not None:
        return f"regexp_full_match({_ONE}, '{HASHED}') IS NOT TRUE"
    marker = MISSING[column.dtype]
    return f"{_ONE} IS NULL OR {_ONE} = " + (str(marker) if isinstance(marker, int) else f"'{marker}'")


def _list_rules(column: ColumnConfig) -> list[Rule]:
    """How long a list is, and what its values are."""
    dense = column.kind == "dense"
    counts = (
        ("wrong_length" if dense else "too_many", "values", column.width if dense else None, column.width),
        ("not_finite" if dense else "empty_value" if column.personal is None else "not_hashed", "bad", None, 0),
    )
    found = []
    for code, measure, low, high in counts:
        helper = f"{column.name}:{measure}"
        sql = _counts(column)[helper]
        tests = [f"{sql} <= {high}", *([] if low is None else [f"{sql} >= {low}"])]
        predicate = f"({quoted(column)} IS NULL OR ({' AND '.join(tests)}))"
        kwargs = {"column": helper, "min_value": low, "max_value": high}
        found.append(
            Rule(f"{code}:{column.name}", column.name, predicate, {}, "expect_column_values_to_be_between", kwargs)
        )
    return found


def _finite(column: ColumnConfig) -> Rule:
    return Rule(
        f"not_finite:{column.name}",
        column.name,
        f"({quoted(column)} IS NULL OR isfinite({quoted(column)}))",
        {},
        # in DuckDB NaN is larger than every number, so the largest finite one bounds it out
        "expect_column_values_to_be_between",
        {"min_value": -LARGEST, "max_value": LARGEST},
    )


def _hashed(column: ColumnConfig) -> Rule:
    name = quoted(column)
    return Rule(
        f"not_hashed:{column.name}",
        column.name,
        f"({name} IS NULL OR regexp_full_match({name}, '{HASHED}'))",
        {},
        "expect_column_values_to_match_regex",
        {"regex": f"^{HASHED}$"},
    )


def _between(code: str, column: ColumnConfig, low: float | None, high: float | None) -> Rule:
    name, prefix, tests, parameters = quoted(column), _parameter(code), [], {}
    if low is not None:
        tests.append(f"{name} >= ${prefix}_low")
        parameters[f"{prefix}_low"] = low
    if high is not None:
        tests.append(f"{name} <= ${prefix}_high")
        parameters[f"{prefix}_high"] = high
    missing = f"{name} IS NULL OR NOT isfinite({name})" if column.dtype == "float64" else f"{name} IS NULL"
    bounds = {"min_value": low, "max_value": high}
    return Rule(
        code,
        column.name,
        f"({missing} OR ({' AND '.join(tests)}))",
        parameters,
        "expect_column_values_to_be_between",
        bounds,
    )


def _member(code: str, column: ColumnConfig, values: list[Any]) -> Rule:
    name, prefix = quoted(column), _parameter(code)
    test = f"({name} IS NULL OR list_contains(CAST(${prefix} AS {SQL_TYPES[column.dtype]}[]), {name}))"
    return Rule(code, column.name, test, {prefix: values}, "expect_column_values_to_be_in_set", {"value_set": values})


def _parameter(code: str) -> str:
    return code.replace(":", "_")


def _range(column: ColumnConfig) -> list[Rule]:
    low, high = column.minimum, column.maximum
    if low is None and high is None:
        return []
    if column.dtype not in ("int64", "float64"):
        raise InvalidConfig(f"column {column.name!r} is {column.dtype} and cannot have minimum or maximum; remove them")
    if any(bound is not None and not math.isfinite(bound) for bound in (low, high)):
        raise InvalidConfig(
            f"column {column.name!r}: minimum {low} and maximum {high} must be finite; leave out the one that is not"
        )
    if column.dtype == "int64":  # compared as integers: a double cannot tell large keys apart
        low, high = (None if low is None else math.ceil(low)), (None if high is None else math.floor(high))
    if low is not None and high is not None and low > high:
        raise InvalidConfig(
            f"column {column.name!r}: no value lies between minimum {column.minimum} and maximum {column.maximum}"
        )
    return [_between(f"range:{column.name}", column, low, high)]


def _allowed(column: ColumnConfig) -> list[Rule]:
    if column.allowed is None:
        return []
    fits: dict[str, tuple[type, ...]] = {"int64": (int,), "float64": (int, float), "string": (str,)}
    wrong = [value for value in column.allowed if not isinstance(value, fits.get(column.dtype, ()))]
    if wrong or not column.allowed:
        raise InvalidConfig(
            f"column {column.name!r} is {column.dtype}; its allowed values do not fit it: {wrong or 'there are none'}"
        )
    return [_member(f"allowed:{column.name}", column, list(column.allowed))]
