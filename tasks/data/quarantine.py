"""Which rows of a night may be learned from: one SQL predicate per rule, and the night split in two by them.

Great Expectations cuts the failing rows it returns and keeps no reason per row, so the split has predicates of its
own. The files are read through a DuckDB view and streamed back into Parquet: no table of the night is ever in memory.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.contract import LISTS, ColumnConfig, DataConfig
from tasks.data.interactions import Footer
from tasks.data.rules import Rule, measures, quoted, sql_type
from tasks.errors import CorruptFile, InvalidConfig, ValidatorBroken

VIEW = "interactions"
MEASURED = "measured"
"""The view beside it with counts of what is in the lists, which expectations cannot look into."""
REASONS = "quarantine:reasons"
"""The quarantine file's column of reason codes; like our other helper columns, no contract can name one so."""
_REASONS = f'"{REASONS}"'
_YEARS_1_TO_9999 = "BETWEEN -62135596800000000 AND 253402300799999999"
_SETTINGS = {
    "memory_limit": "1GB",
    "preserve_insertion_order": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    # Both answer comparisons from the statistics in the files' footers, which are claims: they leave NaN out, and a
    # wrong one would let a row pass that breaks its bounds.
    "disabled_optimizers": "statistics_propagation,filter_pushdown",
}
_ROW_GROUP = 1 << 18
_ROW_GROUP_VALUES = 1 << 22
"""Values of lists in a row group: vectors are long, and a group of them is in memory at a time."""
_SLICE = 1 << 24
"""Numbers of lists that are sorted at a time."""
_SHOWN = 8
_ARROW = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
}
NOT_SHOWN = "personal, not shown"
"""What stands for a value of a personal column wherever people or logs would see it."""


@dataclass(frozen=True)
class Split:
    """A night split in two."""

    rows: int
    clean: int
    bad: int
    reasons: dict[str, int]
    """Bad rows by reason code; a row with two reasons counts under both."""
    examples: tuple[dict[str, Any], ...]
    """Up to five bad rows: their reasons, their key, and the values they are bad for."""
    empty_labels: tuple[str, ...]
    """Label columns of objectives that are null in every clean row."""


def clean_schema(data: DataConfig) -> pa.Schema:
    """Arrow schema of a night's clean rows: the contract's columns in its order, timestamps in microseconds of UTC."""
    return pa.schema([(column.name, _arrow(column)) for column in data.columns])


def _arrow(column: ColumnConfig) -> pa.DataType:
    if column.kind in LISTS:
        vector = column.kind == "dense" and column.role != "ignored"
        return pa.list_(pa.float32() if vector else _ARROW[column.dtype])
    return _ARROW[column.dtype]


@contextmanager
def night_view(
    data: DataConfig,
    files: Sequence[Path],
    footers: Sequence[Footer],
    scratch: Path,
    lakes: Sequence[str | None] | None = None,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection whose view `interactions` reads the files with the contract's columns and types.

    Timestamps outside the years 1 to 9999 read as missing.

    Args:
        data: the contract.
        files: local Parquet files, already held against the contract.
        footers: their footers, in the same order.
        scratch: folder for what does not fit into memory.
        lakes: which lake each file is of, in the same order; None for a single lake.

    Raises:
        InvalidConfig: two columns differ by case alone, which SQL cannot tell apart.
    """
    names = [column.name.casefold() for column in data.columns]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidConfig(f"data.columns: names differ by case alone ({', '.join(doubled)}); rename one of them")
    names_of = [lake or "" for lake in lakes or [None] * len(files)]
    kinds = [(footer.types, lake) for footer, lake in zip(footers, names_of, strict=True)]
    pairs = sorted(zip(kinds, files, strict=True))
    selects = [
        f"SELECT {', '.join(_read(data, column, lake) for column in data.columns)} "
        f"FROM read_parquet([{', '.join(_path(path) for _, path in alike)}], hive_partitioning = false)"
        for (_, lake), alike in groupby(pairs, key=lambda pair: pair[0])
    ]
    with duckdb.connect(":memory:", config={**_SETTINGS, "temp_directory": str(scratch / "spill")}) as connection:
        connection.execute("SET GLOBAL TimeZone = 'UTC'")
        connection.execute(f"CREATE VIEW {VIEW} AS {' UNION ALL '.join(selects)}")
        yield connection


@contextmanager
def reading(files: Sequence[Path]) -> Iterator[None]:
    """Translates what DuckDB says about unreadable data into CorruptFile; errors in the SQL itself are not data's."""
    try:
        yield
    except (duckdb.ProgrammingError, duckdb.OutOfMemoryException, duckdb.InterruptException):
        raise
    except duckdb.Error as error:
        names = ", ".join(path.name for path in files[:5])
        raise CorruptFile(
            f"the night's rows cannot be read from {len(files)} file(s) ({names}): {str(error).splitlines()[0][:300]}; "
            "deliver the night again and ingest it again"
        ) from error


def split(
    connection: duckdb.DuckDBPyConnection, data: DataConfig, checks: Sequence[Rule], rows: int, clean: Path, bad: Path
) -> Split:
    """Writes a night's clean rows and its bad rows, with their reasons, as two Parquet files.

    Of exact copies of a row (same user, item and time, and nothing that is read differs) one is kept and the others
    are `duplicate`; copies that differ are all `conflicting_duplicate`. Clean rows are ordered by time, then by a
    digest of (user, item, time), so that the file's bytes do not depend on how the rows were split over files.

    Args:
        connection: has the view `interactions`.
        data: the contract.
        checks: the rules, from `rules`.
        rows: rows the files hold, by their footers.
        clean: file to write; exactly the contract's columns.
        bad: file to write; the contract's columns and a list of reason codes. Not written if no row is bad.

    Raises:
        ValidatorBroken: clean and bad rows do not add up to the rows of the files.
    """
    source = _judged(connection, data, checks)
    parameters = {name: value for rule in checks for name, value in rule.parameters.items()}
    columns = ", ".join(quoted(column) for column in data.columns)
    order = _order(data)
    width = sum(column.width for column in data.columns if column.kind in LISTS)
    group = min(_ROW_GROUP, _ROW_GROUP_VALUES // max(1, width))
    slices = _slices(connection, data, rows * width)
    good = f"SELECT {columns} FROM {source} WHERE len({_REASONS}) = 0"
    count = _write(
        (connection.execute(f"{good} {part} ORDER BY {order}", parameters | bounds) for part, bounds in slices),
        clean_schema(data),
        clean,
        group,
    )
    with_reasons = clean_schema(data).append(pa.field(REASONS, pa.list_(pa.string())))
    # the bad rows' keys need not be unique, so every column takes part in their order
    order = f"{order}, {columns}, {_REASONS}"
    wrong = f"SELECT {columns}, {_REASONS} FROM {source} WHERE len({_REASONS}) > 0"
    asked = (connection.execute(f"{wrong} {part} ORDER BY {order}", parameters | bounds) for part, bounds in slices)
    bad_rows = _write(asked, with_reasons, bad, group) if count != rows else 0
    if count + bad_rows != rows:
        raise ValidatorBroken(
            f"{count} clean and {bad_rows} bad rows are not the {rows} rows that the files' footers promise; "
            "ingest the night again, and report this if it comes back"
        )
    reasons = _tally(connection, bad) if bad_rows else {}
    examples = _examples(data, checks, bad) if bad_rows else ()
    return Split(rows, count, bad_rows, reasons, examples, _empty_labels(connection, data, clean))


def _path(path: Path) -> str:
    """A path as an SQL string; what would be a wildcard is wrapped so that it means itself."""
    text = "".join(f"[{letter}]" if letter in "[*?" else letter for letter in str(path.absolute()))
    return "'" + text.replace("'", "''") + "'"


def _read(data: DataConfig, column: ColumnConfig, lake: str) -> str:
    """A column of the files of a lake as SQL: a lake's own keys with its name before them, an empty one as it is."""
    name = quoted(column)
    if column.name == data.lake_column:
        return f"'{lake}' AS {name}"  # of letters, digits, _ and -
    if column.name in data.own_keys:
        return f"CASE WHEN {name} = '' THEN '' ELSE '{lake}/' || CAST({name} AS VARCHAR) END AS {name}"
    return _cast(column)


def _cast(column: ColumnConfig) -> str:
    name = quoted(column)
    if column.dtype == "timestamp" and column.kind is None:
        # in microseconds: Python has no other instants, and DuckDB calls its largest ones infinite
        instant = f"epoch_us({name})"
        return f"CASE WHEN {instant} {_YEARS_1_TO_9999} THEN make_timestamp({instant}) END AS {name}"
    return f"CAST({name} AS {sql_type(column)}) AS {name}"


def _order(data: DataConfig) -> str:
    user, item, when = (quoted(data.column(name)) for name in (data.user, data.item, data.time))
    digest = (
        f"md5(concat_ws(chr(31), CAST({user} AS VARCHAR), CAST({item} AS VARCHAR), CAST(epoch_us({when}) AS VARCHAR)))"
    )
    return f"{when}, {digest}, {user}, {item}"


def _judged(connection: duckdb.DuckDBPyConnection, data: DataConfig, checks: Sequence[Rule]) -> str:
    """SQL of the view's rows with a list of reason codes each.

    Copies are found by grouping keys, which spills to disk, and only their rows are then numbered by a window.
    """
    parts = [quoted(data.column(name)) for name in (data.user, data.item, data.time)]
    keys, complete = ", ".join(parts), " AND ".join(f"{part} IS NOT NULL" for part in parts)
    read = ", ".join(quoted(column) for column in data.columns if column.role != "ignored")
    columns = ", ".join(quoted(column) for column in data.columns)
    verdicts = [f"CASE WHEN {rule.predicate} IS NOT TRUE THEN '{rule.code}' END" for rule in checks]
    rows = VIEW
    if any(column.kind in LISTS for column in data.columns):  # telling rows apart holds them: then only those of copies
        connection.execute(
            f"CREATE OR REPLACE TABLE twice AS SELECT {keys} FROM {VIEW} WHERE {complete} GROUP BY {keys} "
            "HAVING count(*) > 1"
        )
        rows = f"{VIEW} JOIN twice USING ({keys})"
    connection.execute(
        f'CREATE OR REPLACE TABLE copies AS SELECT {keys}, count(DISTINCT row({read})) > 1 AS "#conflicting" '
        f"FROM {rows} WHERE {complete} GROUP BY {keys} HAVING count(*) > 1"
    )
    copies = connection.execute("SELECT count(*) FROM copies").fetchone()
    if copies == (0,):
        return f"(SELECT *, {_reasons(verdicts)} AS {_REASONS} FROM {VIEW})"
    numbered = (
        f'SELECT {VIEW}.*, "#conflicting", row_number() OVER (PARTITION BY {keys} ORDER BY {columns}) AS "#number" '
        f"FROM {VIEW} JOIN copies USING ({keys})"
    )
    single = f'SELECT *, false AS "#conflicting", 1 AS "#number" FROM {VIEW} ANTI JOIN copies USING ({keys})'
    verdicts.append("""CASE WHEN "#conflicting" THEN 'conflicting_duplicate' WHEN "#number" > 1 THEN 'duplicate' END""")
    return f"(SELECT *, {_reasons(verdicts)} AS {_REASONS} FROM ({single} UNION ALL BY NAME {numbered}))"


def _reasons(verdicts: list[str]) -> str:
    return f"list_filter([{', '.join(verdicts)}]::VARCHAR[], lambda reason: reason IS NOT NULL)"


def measured_view(connection: duckdb.DuckDBPyConnection, data: DataConfig) -> str:
    """The view that expectations read: with counts beside the lists, where the contract has lists."""
    if not (counts := measures(data)):
        return VIEW
    named = ", ".join(f'{sql} AS "{name}"' for name, sql in counts.items())
    connection.execute(f"CREATE OR REPLACE VIEW {MEASURED} AS SELECT *, {named} FROM {VIEW}")
    return MEASURED


def _slices(connection: duckdb.DuckDBPyConnection, data: DataConfig, numbers: int) -> list[tuple[str, dict[str, Any]]]:
    """SQL and parameters of conditions that cut the rows into spans of time with lists of about `_SLICE` numbers each.

    DuckDB's sort holds lists in memory; one span of time is sorted after the other, and those without a time last.
    """
    count = -(-numbers // _SLICE)
    if count <= 1:
        return [("", {})]
    when = quoted(data.column(data.time))
    shares = [number / count for number in range(1, count)]
    found = connection.execute(f"SELECT quantile_disc({when}, $shares) FROM {VIEW}", {"shares": shares}).fetchone()
    bounds = sorted(set((found or ([],))[0] or []))
    slices: list[tuple[str, dict[str, Any]]] = []
    for low, high in zip([None, *bounds], [*bounds, None], strict=True):
        parts = [f"AND {when} IS NOT NULL"]
        parts += [f"AND {when} >= $slice_low"] if low is not None else []
        parts += [f"AND {when} < $slice_high"] if high is not None else []
        named = {"slice_low": low, "slice_high": high}
        slices.append((" ".join(parts), {name: bound for name, bound in named.items() if bound is not None}))
    return [*slices, (f"AND {when} IS NULL", {})]


def _write(queries: Iterable[duckdb.DuckDBPyConnection], schema: pa.Schema, target: Path, group: int) -> int:
    """Streams what queries find into a Parquet file with row groups of a fixed size; returns its rows."""
    rows, held = 0, schema.empty_table()
    with pq.ParquetWriter(target, schema, compression="zstd", write_page_checksum=True) as writer:
        for batch in (batch for query in queries for batch in query.to_arrow_reader(group)):
            rows += batch.num_rows
            held = pa.concat_tables([held, pa.Table.from_batches([batch]).cast(schema)])
            while held.num_rows >= group:
                writer.write_table(held.slice(0, group).combine_chunks())
                held = held.slice(group)
        if held.num_rows or not rows:
            writer.write_table(held.combine_chunks())
    return rows


def _tally(connection: duckdb.DuckDBPyConnection, bad: Path) -> dict[str, int]:
    reasons = f"SELECT unnest({_REASONS}) AS reason FROM read_parquet({_path(bad)})"
    counted = connection.execute(f"SELECT reason, count(*) FROM ({reasons}) GROUP BY reason ORDER BY reason")
    return dict(counted.fetchall())


def _examples(data: DataConfig, checks: Sequence[Rule], bad: Path) -> tuple[dict[str, Any], ...]:
    with pq.ParquetFile(bad) as file:
        rows = next(file.iter_batches(5)).to_pylist()
    about = {rule.code: rule.column for rule in checks}
    personal = {column.name for column in data.columns if column.personal is not None}
    found = []
    for row in rows:
        shown = [data.user, data.item, data.time, *(name for code in row[REASONS] if (name := about.get(code)))]
        told = {name: NOT_SHOWN if name in personal else _plain(row[name]) for name in dict.fromkeys(shown)}
        found.append({"reasons": row[REASONS], "row": told})
    return tuple(found)


def _plain(value: Any) -> Any:
    """A value as JSON can say it."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        more = len(value) - _SHOWN
        return [*map(_plain, value[:_SHOWN]), *([f"and {more} more"] if more > 0 else [])]
    return value[:200] if isinstance(value, str) else value


def _empty_labels(connection: duckdb.DuckDBPyConnection, data: DataConfig, clean: Path) -> tuple[str, ...]:
    labels = tuple(dict.fromkeys(objective.column for objective in data.objectives))
    counts = ", ".join(f"count({quoted(data.column(name))})" for name in labels)
    found = connection.execute(f"SELECT {counts} FROM read_parquet({_path(clean)})").fetchone() or ()
    return tuple(name for name, count in zip(labels, found, strict=True) if count == 0)
