"""Small random nights, their contract, and a slow oracle of everything that is computed from them."""

import math
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from tasks.data.contract import ColumnConfig, DataConfig, ObjectiveConfig, StatisticsConfig

FIRST = date(2026, 3, 1)
DAY_US = 86_400_000_000
Row = dict[str, Any]
STATISTICS = StatisticsConfig(cohort=("device", "band"), item_strength=3.0, user_strength=2.0, cohort_item_strength=5.0)
ARROW = {
    "int64": pa.int64(),
    "string": pa.string(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


def contract(key: str = "int64") -> DataConfig:
    """Two objectives, a weight, nullable inputs of every dtype, and keys of the given dtype."""
    columns: tuple[tuple[str, str, str, str | None, bool], ...] = (
        ("price", "candidate", "float64", "numeric", True),
        ("shopper", "user", key, None, False),
        ("device", "request", "string", "categorical", True),
        ("clicked", "label", "bool", None, True),
        ("band", "request", "int64", "categorical", False),
        ("product", "item", key, None, False),
        ("at", "time", "timestamp", None, False),
        ("stars", "label", "float64", None, True),
        ("brand", "candidate", "string", "categorical", True),
        ("importance", "weight", "float64", None, True),
        ("hour", "request", "int64", "numeric", True),
        ("member", "request", "bool", "numeric", False),
        ("note", "ignored", "string", None, True),
    )
    limits = {"stars": {"minimum": 1.0, "maximum": 5.0}}
    return DataConfig.model_validate(
        {
            "source": "lake",
            "columns": [
                ColumnConfig.model_validate(
                    {"name": name, "role": role, "dtype": dtype, "kind": kind, "nullable": nullable}
                    | limits.get(name, {})
                )
                for name, role, dtype, kind, nullable in columns
            ],
            "objectives": [
                ObjectiveConfig(name="click", column="clicked"),
                ObjectiveConfig(name="taste", column="stars", kind="rating", weight=0.5),
            ],
        }
    )


def night(number: int) -> date:
    return FIRST + timedelta(days=number)


def midnight_us(number: int) -> int:
    return (night(number) - date(1970, 1, 1)).days * DAY_US


_KEYS = {"int64": st.sampled_from([7, -3, 2**40]), "string": st.sampled_from(["u", "ü", "U 1"])}


@st.composite
def worlds(draw: st.DrawFn, key: str = "int64", nights: int = 4, least: int = 1) -> list[list[Row]]:
    """Rows of consecutive nights; each (user, item, time) at most once, times that often tie."""
    row = st.fixed_dictionaries(
        {
            "price": st.none() | st.sampled_from([0.5, 12.25]),
            "shopper": _KEYS[key],
            "device": st.none() | st.sampled_from(["web", "app"]),
            "clicked": st.none() | st.booleans(),
            "band": st.integers(1, 2),
            "product": _KEYS[key],
            "at": st.integers(0, 3),
            "stars": st.none() | st.sampled_from([1.0, 2.5, 5.0]),
            "brand": st.none() | st.sampled_from(["a", "b"]),
            "importance": st.none() | st.sampled_from([0.0, 2.0]),
            "hour": st.none() | st.integers(0, 23),
            "member": st.booleans(),
            "note": st.none() | st.just("n"),
        }
    )
    world = []
    for number in range(draw(st.integers(least, nights))):
        rows = draw(
            st.lists(row, min_size=1, max_size=7, unique_by=lambda row: (row["shopper"], row["product"], row["at"]))
        )
        world.append([{**row, "at": midnight_us(number) + row["at"]} for row in rows])
    return world


def write(data: DataConfig, rows: Sequence[Row], path: Path) -> Path:
    """The rows as a Parquet file, in the given order."""
    schema = pa.schema([(column.name, ARROW[column.dtype]) for column in data.columns])
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return path


def write_all(data: DataConfig, world: Sequence[Sequence[Row]], folder: Path) -> list[tuple[date, Path]]:
    """One file per night, with the nights' dates."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        (night(number), write(data, rows, folder / f"{night(number)}.parquet")) for number, rows in enumerate(world)
    ]


def expected_statistics(data: DataConfig, config: StatisticsConfig, history: Sequence[Row], row: Row) -> list[float]:
    """Features of one row from all rows of earlier nights, recomputed from scratch with the formulas of the module."""

    def sums(column: str, rows: Sequence[Row]) -> tuple[float, int]:
        labels = [float(other[column]) for other in rows if other[column] is not None]
        return sum(labels), len(labels)

    def unit(kind: str, rate: float) -> float:
        clipped = min(max(rate, 1e-4), 1 - 1e-4)
        return math.log(clipped / (1 - clipped)) if kind == "binary" else rate

    def same(columns: Sequence[str]) -> list[Row]:
        return [other for other in history if all(other[name] == row[name] for name in columns)]

    of_item, of_user = same([data.item]), same([data.user])
    complete = all(row[name] is not None for name in config.cohort)
    of_pair = same([*config.cohort, data.item]) if complete else []
    item, user, pair = [], [], []
    for objective in data.objectives:
        total, count = sums(objective.column, history)
        held = config.item_strength if objective.kind == "binary" else 0.0
        base = (total + held * 0.5) / (count + held) if count else (0.5 if objective.kind == "binary" else 3.0)
        total, count = sums(objective.column, of_item)
        item_rate = (total + config.item_strength * base) / (count + config.item_strength)
        total, count = sums(objective.column, of_user)
        user_rate = (total + config.user_strength * base) / (count + config.user_strength)
        total, count = sums(objective.column, of_pair)
        pair_rate = (total + config.cohort_item_strength * item_rate) / (count + config.cohort_item_strength)
        item.append(unit(objective.kind, item_rate))
        user.append(unit(objective.kind, user_rate))
        pair.append(unit(objective.kind, pair_rate))
    features = [*item, math.log1p(len(of_item)), *user, math.log1p(len(of_user))]
    return [*features, *pair, math.log1p(len(of_pair))] if config.cohort else features
