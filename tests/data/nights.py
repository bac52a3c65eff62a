"""A small contract, nights that keep it, and a folder as a source."""

import shutil
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.contract import ColumnConfig, DataConfig, ObjectiveConfig
from tasks.errors import ObjectMissing

NIGHT = date(2026, 3, 10)


class Folder:
    """A local folder as a Source."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self, prefix: str) -> Iterator[str]:
        keys = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        return iter(sorted(key for key in keys if key.startswith(prefix)))

    def size(self, key: str) -> int | None:
        path = self.root / key
        return path.stat().st_size if path.exists() else None

    def download(self, key: str, path: Path) -> None:
        if not (self.root / key).exists():
            raise ObjectMissing(key)
        shutil.copyfile(self.root / key, path)


def contract(**changes: Any) -> DataConfig:
    columns = (
        ColumnConfig(name="user", role="user", dtype="int64"),
        ColumnConfig(name="item", role="item", dtype="string"),
        ColumnConfig(name="at", role="time", dtype="timestamp"),
        ColumnConfig(name="liked", role="label", dtype="int64"),
        ColumnConfig(name="rating", role="label", dtype="float64", minimum=1, maximum=5, nullable=True),
        ColumnConfig(name="age", role="request", kind="numeric", dtype="int64", minimum=0, maximum=120),
        ColumnConfig(name="plan", role="request", kind="categorical", dtype="string", allowed=("free", "it's; --")),
        ColumnConfig(name="price", role="candidate", kind="numeric", dtype="float64", nullable=True),
        ColumnConfig(name="weight", role="weight", dtype="float64"),
        ColumnConfig(name="note", role="ignored", dtype="string"),
    )
    objectives = (
        ObjectiveConfig(name="liked", column="liked"),
        ObjectiveConfig(name="rating", column="rating", kind="rating"),
    )
    return DataConfig(
        **({"source": "lake", "columns": columns, "objectives": objectives, "max_bad_rows": 0.9} | changes)
    )


def row(number: int, night: date = NIGHT, zone: str = "UTC", **changes: Any) -> dict[str, Any]:
    at = datetime(night.year, night.month, night.day, 9, tzinfo=ZoneInfo(zone)) + timedelta(seconds=number)
    return {
        "user": number % 7,
        "item": f"i{number % 11}",
        "at": at,
        "liked": number % 2,
        "rating": 1.0 + number % 5,
        "age": 18 + number % 50,
        "plan": "free",
        "price": None if number % 3 else 2.5,
        "weight": 1.0,
        "note": f"n{number}",
    } | changes


SCHEMA = pa.schema(
    {
        "user": pa.int64(),
        "item": pa.string(),
        "at": pa.timestamp("us", "UTC"),
        "liked": pa.int64(),
        "rating": pa.float64(),
        "age": pa.int64(),
        "plan": pa.string(),
        "price": pa.float64(),
        "weight": pa.float64(),
        "note": pa.string(),
    }
)


def table(rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(rows, schema), path)
    return path
