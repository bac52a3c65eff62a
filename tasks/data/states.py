"""What one night leaves behind for the as-of statistics: sums per raw key, which merge by adding.

A state knows raw keys only, never vocabulary ids, so it stays valid whatever the parent of a later night is.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data.contract import DataConfig, StatisticsConfig
from tasks.data.vocabulary import MISSING
from tasks.errors import InvalidConfig

F64 = npt.NDArray[np.float64]


def check_cohort(data: DataConfig, config: StatisticsConfig) -> None:
    """Refuse a cohort that could identify a user's own row.

    Raises:
        InvalidConfig: the cohort names a column that is not a categorical request column, or names one twice.
    """
    possible = data.named("request", "categorical")
    if unknown := [name for name in config.cohort if name not in possible]:
        raise InvalidConfig(
            f"statistics.cohort names {', '.join(unknown)}: a cohort is made of categorical request columns "
            f"({', '.join(possible) or 'there are none'})"
        )
    if len(set(config.cohort)) != len(config.cohort):
        raise InvalidConfig(f"statistics.cohort names a column twice: {', '.join(config.cohort)}")


def label_values(data: DataConfig, rows: pa.Table) -> F64:
    """Labels of all objectives [N, K] as float64, NaN where missing. `rows` must hold the label columns."""
    labels = np.empty((rows.num_rows, len(data.objectives)), np.float64)
    for position, objective in enumerate(data.objectives):
        values = pc.fill_null(rows[objective.column].cast(pa.float64()), float("nan"))
        labels[:, position] = values.to_numpy()
    return labels


def night_state(data: DataConfig, config: StatisticsConfig, path: Path) -> pa.Table:
    """The mergeable state of one night.

    Args:
        data: the contract.
        config: which columns make the cohort.
        path: the night's clean Parquet file; only keys, cohort and labels are read.

    Returns:
        A table ordered by key, with columns `table` (global, item, user or cohort_item), one `key:<column>` per user,
        item and cohort column (null where the table has no such key), `rows`, and per objective `labels:<name>` (how
        many are not missing) and `sum:<name>` (their float64 sum, added in the file's order).
    """
    check_cohort(data, config)
    keys = (data.user, data.item, *config.cohort)
    needed = list(dict.fromkeys([*keys, *(objective.column for objective in data.objectives)]))
    with pq.ParquetFile(path) as file:
        rows = file.read(columns=needed)
    labels = label_values(data, rows)
    known = ~np.isnan(labels)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        f"key:{name}": rows[name].cast(_arrow_type(data, name)) for name in keys
    }
    columns["rows"] = pa.array(np.ones(rows.num_rows, np.int64))
    for position, objective in enumerate(data.objectives):
        columns[f"labels:{objective.name}"] = pa.array(known[:, position].astype(np.int64))
        columns[f"sum:{objective.name}"] = pa.array(np.where(known[:, position], labels[:, position], 0.0))
    single = pa.table(columns)
    tables = {"global": (), "item": (data.item,), "user": (data.user,)}
    if config.cohort:
        tables["cohort_item"] = (*config.cohort, data.item)
    parts = []
    for table, of in tables.items():
        part = single
        for name in of:
            marker = pa.scalar(MISSING[data.column(name).dtype], _arrow_type(data, name))
            part = part.filter(pc.fill_null(pc.not_equal(part[f"key:{name}"], marker), False))
        for name in keys:
            if name not in of:
                at = part.column_names.index(f"key:{name}")
                part = part.set_column(at, f"key:{name}", pa.nulls(part.num_rows, _arrow_type(data, name)))
        parts.append(part.add_column(0, "table", pa.repeat(pa.scalar(table, pa.string()), part.num_rows)))
    return _added(pa.concat_tables(parts))


def merge(states: Sequence[pa.Table]) -> pa.Table:
    """The state of several nights together: a sum per key.

    The order and grouping of the states do not matter, exactly where labels are whole numbers (or halves, quarters
    and so on) and to rounding elsewhere.

    Raises:
        ValueError: there is no state to merge.
    """
    if not states:
        raise ValueError("merge needs at least one state")
    return _added(pa.concat_tables(states))


def _added(rows: pa.Table) -> pa.Table:
    """Rows with equal keys added up, ordered by key; single-threaded, so that sums are equal every time."""
    keys = [name for name in rows.column_names if name == "table" or name.startswith("key:")]
    values = [name for name in rows.column_names if name not in keys]
    total = rows.group_by(keys, use_threads=False).aggregate([(name, "sum") for name in values])
    total = total.select([*keys, *(f"{name}_sum" for name in values)]).rename_columns([*keys, *values])
    return total.sort_by([(name, "ascending") for name in keys]).combine_chunks()


def _arrow_type(data: DataConfig, name: str) -> pa.DataType:
    return pa.int64() if data.column(name).dtype == "int64" else pa.string()


def save_state(state: pa.Table, path: Path) -> None:
    """Write a state as Parquet; equal bytes for equal states."""
    pq.write_table(state, path, compression="zstd")


def load_state(path: Path) -> pa.Table:
    """Read what `save_state` wrote."""
    with pq.ParquetFile(path) as file:
        return file.read()
