"""The night's learning material as memory-mapped tensors: ids, numbers, as-of statistics, labels and the ladder.

Rows are sorted by (user, time, tie), where the tie is a digest of (user, item, time) and never of a label.

Shapes: N rows, Cr/Cc categorical and Fr/Fc numeric request/candidate columns, Vr/Vc places of all their `multi`
columns together, Lr/Lc of their `dense` ones, S statistics, K objectives.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data.contract import DataConfig, Kind, Role, SegmentsConfig, StatisticsConfig
from tasks.data.lists import NOTHING, padded, spans, values_of
from tasks.data.segments import Level, build_levels, check_levels
from tasks.data.states import label_values, load_state
from tasks.data.statistics import RunningStatistics, statistics_names
from tasks.data.vocabulary import Vocabularies
from tasks.errors import ObjectCorrupt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Progress = Callable[[float, float | None, str], None]
Tables = dict[str, "np.memmap[Any, np.dtype[Any]]"]
READ_AT_ONCE = 1 << 22
"""Values of lists that are read at a time."""
_INDEX = "index.json"
_INDEX_VERSION = 1
_TABLES = (
    *("request_ids", "candidate_ids", "request_numbers", "candidate_numbers", "statistics", "labels", "weights"),
    *("time", "night", "user", "item", "tie"),
)
_LISTS = ("request_values", "candidate_values", "request_vectors", "candidate_vectors")
"""Tables of list columns; a contract without such columns has no such table."""
_LEVEL_TABLES = ("segment", "order", "offsets", "keys", "parent")


@dataclass(frozen=True)
class Rows:
    """All rows of a window of nights, sorted by (user, time, tie). Arrays are read-only memory maps.

    Attributes:
        request_ids: vocabulary ids of categorical request columns, int64 [N, Cr].
        candidate_ids: vocabulary ids, the item's first, then categorical candidate columns, int64 [N, 1+Cc].
        request_numbers: numeric request columns, float32 [N, Fr], NaN where missing.
        candidate_numbers: numeric candidate columns, float32 [N, Fc], NaN where missing.
        statistics: as-of statistics in model units, float32 [N, S], from nights before the row's own.
        labels: float32 [N, K], NaN where missing.
        weights: row weights, float32 [N]; 1 where the contract has none or the value is missing.
        time: microseconds since 1970 in UTC, int64 [N].
        night: `date.toordinal` of the row's night, int32 [N].
        user: vocabulary id of the user, int64 [N].
        item: vocabulary id of the item, int64 [N].
        tie: digest of (user, item, time) as int64 [N].
        levels: the ladder over these rows, finest first.
        statistics_names: names of the S statistics.
        request_values: vocabulary ids of `multi` request columns side by side, int32 [N, Vr], -1 behind a list's end;
            None if there are none, as for the rest.
        candidate_values: of candidate columns, int32 [N, Vc].
        request_vectors: `dense` request columns side by side, float32 [N, Lr], NaN where a vector is missing.
        candidate_vectors: of candidate columns, float32 [N, Lc].
    """

    request_ids: I64
    candidate_ids: I64
    request_numbers: F32
    candidate_numbers: F32
    statistics: F32
    labels: F32
    weights: F32
    time: I64
    night: I32
    user: I64
    item: I64
    tie: I64
    levels: tuple[Level, ...]
    statistics_names: tuple[str, ...]
    request_values: I32 | None = None
    candidate_values: I32 | None = None
    request_vectors: F32 | None = None
    candidate_vectors: F32 | None = None

    def __len__(self) -> int:
        return len(self.time)


def build_rows(
    data: DataConfig,
    segments: SegmentsConfig,
    statistics: StatisticsConfig,
    nights: Sequence[tuple[date, Path]],
    states: Sequence[tuple[date, Path]],
    vocabularies: Vocabularies,
    folder: Path,
    progress: Progress = lambda done, total, unit: None,
) -> Rows:
    """Write the rows of some nights as one folder of `.npy` files and open it.

    One night's columns are in memory at a time, besides a few integers per row; of lists, a part of a night's.

    Args:
        data: the contract.
        segments: the ladder.
        statistics: cohort and strengths of the as-of statistics.
        nights: nights with their clean Parquet files, in any order.
        states: nights with their statistics states, in any order; the rows of a night see those of earlier nights.
        vocabularies: ids of all keys; an unknown key gets id 0.
        folder: an empty or absent directory.
        progress: called with (rows written, rows in all, "rows") after each night.

    Returns:
        The rows, memory-mapped from `folder`.

    Raises:
        InvalidConfig: the ladder or the cohort does not fit the contract, or their keys overflow.
        ValueError: a night is named twice, or the vocabularies lack a key of a state.
    """
    check_levels(data, segments)
    nights, states = sorted(nights), sorted(states)
    for what, named in (("nights", nights), ("states", states)):
        if len({night for night, _ in named}) != len(named):
            raise ValueError(f"{what} name a date twice: {', '.join(night.isoformat() for night, _ in named)}")
    running = RunningStatistics(data, statistics, vocabularies)
    with duckdb.connect(config={"threads": 1}) as connection:
        keys = [_read_keys(data, path, vocabularies, connection) for _, path in nights]
    bounds = np.cumsum([0, *(len(users) for users, _, _ in keys)])
    user, time, tie = (np.concatenate([np.zeros(0, np.int64), *(part[at] for part in keys)]) for at in range(3))
    order = np.lexsort((tie, time, user))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    folder.mkdir(parents=True, exist_ok=True)
    tables = _allocate(data, statistics, folder, len(order))
    tables["user"][:], tables["time"][:], tables["tie"][:] = user[order], time[order], tie[order]
    del keys, user, time, tie, order
    waiting = list(reversed(states))
    for number, (night, path) in enumerate(nights):
        while waiting and waiting[-1][0] < night:
            running.add(load_state(waiting.pop()[1]))
        at = place[bounds[number] : bounds[number + 1]]
        _write_night(data, statistics, night, path, vocabularies, running, tables, at)
        _write_lists(data, path, vocabularies, tables, at)
        progress(int(bounds[number + 1]), len(place), "rows")
    ids = {name: tables["request_ids"][:, at] for at, name in enumerate(data.named("request", "categorical"))}
    ids[data.user] = tables["user"]
    radices = {name: vocabulary.rows for name, vocabulary in vocabularies.items()}
    levels = build_levels(segments, ids, radices, tables["time"], tables["tie"])
    for table in tables.values():
        table.flush()
    for number, level in enumerate(levels):
        for name in _LEVEL_TABLES:
            np.save(folder / f"level{number}_{name}.npy", getattr(level, name))
    index = {
        "version": _INDEX_VERSION,
        "rows": len(place),
        "nights": [night.isoformat() for night, _ in nights],
        "statistics_names": statistics_names(data, statistics),
        "levels": [{"columns": level.columns, "radices": level.radices} for level in levels],
    }
    if held := [name for name in _LISTS if name in tables]:
        index["lists"] = held
    (folder / _INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    return open_rows(folder)


def open_rows(folder: Path) -> Rows:
    """Open a folder that `build_rows` wrote, as read-only memory maps.

    Raises:
        ObjectCorrupt: the folder is of another version, or a table's length is not the index's.
    """
    index = json.loads((folder / _INDEX).read_text())
    if index.get("version") != _INDEX_VERSION:
        raise ObjectCorrupt(
            f"{folder / _INDEX} has version {index.get('version')}, expected {_INDEX_VERSION}: build it again"
        )
    named = (*_TABLES, *(name for name in _LISTS if name in index.get("lists", ())))
    tables = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in named}
    for name, table in tables.items():
        if len(table) != index["rows"]:
            raise ObjectCorrupt(f"{folder / name}.npy has {len(table)} rows, the index {index['rows']}: build it again")
    levels = tuple(
        Level(
            columns=tuple(level["columns"]),
            radices=tuple(level["radices"]),
            **{name: np.load(folder / f"level{number}_{name}.npy", mmap_mode="r") for name in _LEVEL_TABLES},
        )
        for number, level in enumerate(index["levels"])
    )
    return Rows(**tables, levels=levels, statistics_names=tuple(index["statistics_names"]))


def _read_keys(
    data: DataConfig, path: Path, vocabularies: Vocabularies, connection: duckdb.DuckDBPyConnection
) -> tuple[I64, I64, I64]:
    """User ids, times and ties of one night's rows, in the file's order."""
    with pq.ParquetFile(path) as file:
        rows = file.read(columns=[data.user, data.item, data.time])
    time = microseconds(rows[data.time])
    return (
        vocabularies[data.user].encode(rows[data.user]),
        time,
        tie_digest(rows[data.user], rows[data.item], time, connection),
    )


def tie_digest(user: pa.ChunkedArray, item: pa.ChunkedArray, time: I64, connection: duckdb.DuckDBPyConnection) -> I64:
    """A digest of (user, item, time) per row, which orders rows of equal time [N].

    The first eight bytes of an MD5, as an integer that sorts as its hexadecimal digits do: the order of the clean
    files. It depends on no label, no file order and no vocabulary.

    Args:
        user: raw user keys [N].
        item: raw item keys [N].
        time: microseconds [N].
        connection: where the digest is computed; opening one costs more than digesting a small night.
    """
    keys = pa.table({"user": user.cast(pa.string()), "item": item.cast(pa.string()), "time": pa.array(time)})
    connection.register("keys", keys)
    query = 'SELECT md5_number_upper(concat_ws(chr(31), "user", item, "time")) AS digest FROM keys'
    little_endian: npt.NDArray[np.uint64] = connection.execute(query).fetchnumpy()["digest"]
    connection.unregister("keys")
    digest: I64 = (little_endian.byteswap() ^ np.uint64(2**63)).view(np.int64)
    return digest


def microseconds(time: pa.ChunkedArray) -> I64:
    """Times of any unit as microseconds since 1970 in UTC [N]; without a zone they are UTC."""
    found: I64 = time.cast(pa.timestamp("us", tz=time.type.tz), safe=False).cast(pa.int64()).to_numpy()
    return found


def _allocate(data: DataConfig, statistics: StatisticsConfig, folder: Path, rows: int) -> Tables:
    widths: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "request_ids": (np.int64, (len(data.named("request", "categorical")),)),
        "candidate_ids": (np.int64, (1 + len(data.named("candidate", "categorical")),)),
        "request_numbers": (np.float32, (len(data.named("request", "numeric")),)),
        "candidate_numbers": (np.float32, (len(data.named("candidate", "numeric")),)),
        "statistics": (np.float32, (len(statistics_names(data, statistics)),)),
        "labels": (np.float32, (len(data.objectives),)),
        "weights": (np.float32, ()),
        "night": (np.int32, ()),
        **dict.fromkeys(("time", "user", "item", "tie"), (np.int64, ())),
    }
    for name, _, places in _list_tables(data):
        widths[name] = (np.int32 if name.endswith("values") else np.float32, (places[-1].stop,))
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(rows, *shape))
        for name, (dtype, shape) in widths.items()
    }


def _write_night(
    data: DataConfig,
    statistics: StatisticsConfig,
    night: date,
    path: Path,
    vocabularies: Vocabularies,
    running: RunningStatistics,
    tables: Tables,
    at: I64,
) -> None:
    """Write one night's rows to their places `at` [n]."""
    with pq.ParquetFile(path) as file:
        unread = {name for _, names, _ in _list_tables(data) for name in names}
        wanted = [c.name for c in data.columns if c.role not in ("time", "ignored") and c.name not in unread]
        rows = file.read(columns=wanted)

    encoded = {name: vocabularies[name].encode(rows[name]) for name in data.vocabularies if name not in unread}
    for table, columns in (
        ("request_ids", data.named("request", "categorical")),
        ("candidate_ids", (data.item, *data.named("candidate", "categorical"))),
    ):
        for position, name in enumerate(columns):
            tables[table][at, position] = encoded[name]
    for table, columns in (
        ("request_numbers", data.named("request", "numeric")),
        ("candidate_numbers", data.named("candidate", "numeric")),
    ):
        for position, name in enumerate(columns):
            tables[table][at, position] = _numbers(rows[name], float("nan"))
    cohort = [encoded[name] for name in statistics.cohort]
    tables["statistics"][at] = running.features(encoded[data.user], encoded[data.item], cohort)
    tables["labels"][at] = label_values(data, rows)
    tables["weights"][at] = 1.0 if data.weight is None else _numbers(rows[data.weight], 1.0)
    tables["item"][at] = encoded[data.item]
    tables["night"][at] = night.toordinal()


def _list_tables(data: DataConfig) -> Iterator[tuple[str, tuple[str, ...], list[slice]]]:
    """Table, columns and their places, for every table of lists that the contract asks for."""
    tables: tuple[tuple[Role, Kind, str], ...] = (
        ("request", "multi", "request_values"),
        ("candidate", "multi", "candidate_values"),
        ("request", "dense", "request_vectors"),
        ("candidate", "dense", "candidate_vectors"),
    )
    for role, kind, name in tables:
        if columns := data.named(role, kind):
            yield name, columns, list(spans(data.widths(role, kind)))


def _write_lists(data: DataConfig, path: Path, vocabularies: Vocabularies, tables: Tables, at: I64) -> None:
    """Write the lists of one night's rows to their places `at` [n], a part of the file at a time."""
    asked = list(_list_tables(data))
    if not asked:
        return
    width = sum(places[-1].stop for _, _, places in asked)
    with pq.ParquetFile(path) as file:
        start = 0
        wanted = [name for _, names, _ in asked for name in names]
        for batch in file.iter_batches(max(1, READ_AT_ONCE // width), columns=wanted):
            here = at[start : start + batch.num_rows]
            start += batch.num_rows
            for table, names, places in asked:
                for name, place in zip(names, places, strict=True):
                    values, lengths = values_of(batch.column(batch.schema.get_field_index(name)))
                    dense = table.endswith("vectors")
                    flat = values.to_numpy() if dense else vocabularies[name].encode(values).astype(np.int32)
                    filled = padded(flat, lengths, place.stop - place.start, np.nan if dense else NOTHING)
                    tables[table][here, place] = filled


def _numbers(values: pa.ChunkedArray, missing: float) -> F32:
    numbers: F32 = pc.fill_null(values.cast(pa.float64()), missing).to_numpy().astype(np.float32)
    return numbers
