"""A DuckDB dialect of SQLAlchemy under which Great Expectations gives the verdicts that it gives on pandas.

duckdb-engine's own dialect fails there for two reasons. Its cursor *is* the connection, so results are gone when the
caller closes the connection before fetching, as Great Expectations does. And its compiler renders regular expressions
with PostgreSQL's `~`, which in DuckDB must match the whole string: wrong answers, no error.
"""

from collections import deque
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import duckdb
import sqlalchemy as sa
from duckdb_engine import DBAPI, DuckDBIdentifierPreparer
from duckdb_engine import Dialect as DuckDBDialect
from sqlalchemy.dialects.postgresql.base import PGCompiler
from sqlalchemy.pool import StaticPool

_URL = "duckdb+gx://"
# DuckDB's names of the types that a night's view can have
_TYPES: dict[str, Any] = {
    "BIGINT": sa.BIGINT,
    "DOUBLE": sa.DOUBLE,
    "VARCHAR": sa.VARCHAR,
    "BOOLEAN": sa.BOOLEAN,
    "TIMESTAMP": sa.TIMESTAMP,
}


class BufferedCursor:
    """A cursor that fetches its rows at once, so that they outlive the connection's return to the pool."""

    arraysize = 1
    rowcount = -1

    def __init__(self, connection: "BufferedConnection") -> None:
        self.connection = connection
        self._rows: deque[tuple[Any, ...]] = deque()
        self.description: list[tuple[Any, ...]] | None = None

    def execute(self, statement: str, parameters: Sequence[Any] | None = None) -> None:
        """Runs one statement on a DuckDB cursor of its own and keeps its rows."""
        with self.connection.duckdb.cursor() as cursor:
            cursor.execute(statement, list(parameters or ()))
            # DuckDB's type objects are not strings, and SQLAlchemy's row processing wants names it can compare
            self.description = [
                (str(name), str(kind), None, None, None, None, None) for name, kind, *_ in cursor.description or ()
            ]
            self._rows = deque(cursor.fetchall())

    def fetchone(self) -> tuple[Any, ...] | None:
        """The next row, or None."""
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[tuple[Any, ...]]:
        """Up to `size` rows."""
        return [self._rows.popleft() for _ in range(min(size or self.arraysize, len(self._rows)))]

    def fetchall(self) -> list[tuple[Any, ...]]:
        """All rows that are left."""
        return self.fetchmany(len(self._rows)) if self._rows else []

    def close(self) -> None:
        """Drops the rows that are left."""
        self._rows.clear()


class BufferedConnection:
    """What SQLAlchemy's pool holds; the DuckDB connection below it belongs to the caller and stays open."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.duckdb = connection
        self.notices: list[str] = []

    def cursor(self) -> BufferedCursor:
        """A cursor with rows of its own."""
        return BufferedCursor(self)

    def close(self) -> None:
        """Leaves the DuckDB connection to its owner."""


class SearchingCompiler(PGCompiler):
    """Renders PostgreSQL's `~` and `!~` as DuckDB's search, which need not match the whole string."""

    def visit_custom_op_binary(self, element: Any, operator: Any, **keywords: Any) -> str:
        """The binary expression in SQL."""
        if operator.opstring not in ("~", "!~"):
            return str(super().visit_custom_op_binary(element, operator, **keywords))  # type: ignore[no-untyped-call]
        left, right = self.process(element.left, **keywords), self.process(element.right, **keywords)
        return f"{'NOT ' if operator.opstring == '!~' else ''}regexp_matches({left}, {right})"


class QuotingPreparer(DuckDBIdentifierPreparer):
    """Quotes every name: DuckDB has words, such as `at`, that duckdb-engine does not take for reserved."""

    def _requires_quotes(self, value: str) -> bool:
        return True


class BufferedDialect(DuckDBDialect):
    """duckdb-engine's dialect over buffered cursors, without transactions: nothing is ever written through it."""

    driver = "gx"
    supports_statement_cache = False
    statement_compiler = SearchingCompiler
    preparer = QuotingPreparer

    @classmethod
    def import_dbapi(cls) -> Any:
        """duckdb-engine's stand-in for a DB-API module."""
        return DBAPI

    def get_columns(self, connection: Any, table_name: str, schema: Any = None, **keywords: Any) -> list[Any]:
        """Columns of a table or view, from DuckDB's own catalogue instead of its imitation of PostgreSQL's."""
        columns = sa.text(
            "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = :name ORDER BY column_index"
        )
        return [
            {"name": name, "type": _TYPES.get(kind, sa.types.NullType)(), "nullable": True, "default": None}
            for name, kind in connection.execute(columns, {"name": table_name})
        ]

    def get_pk_constraint(self, connection: Any, table_name: str, schema: Any = None, **keywords: Any) -> Any:
        """No table has a primary key."""
        return {"constrained_columns": [], "name": None}

    def do_begin(self, connection: Any) -> None:
        """Nothing to begin."""

    def do_commit(self, connection: Any) -> None:
        """Nothing to commit."""

    def do_rollback(self, connection: Any) -> None:
        """Nothing to roll back."""


def dialect_module() -> ModuleType:
    """What Great Expectations calls a dialect's module: the dialect, and DuckDB's type names as SQLAlchemy's types.

    >>> dialect_module().DOUBLE.__name__
    'DOUBLE'
    """
    module = ModuleType("duckdb_gx")
    vars(module).update(_TYPES, dialect=BufferedDialect)
    return module


def engine(connection: duckdb.DuckDBPyConnection) -> sa.Engine:
    """An SQLAlchemy engine on an open DuckDB connection.

    Args:
        connection: stays the caller's: the engine never closes it. Views and tables must not be temporary, since
            every statement runs on a cursor of its own.

    >>> with duckdb.connect() as connection, engine(connection).connect() as session:
    ...     session.execute(sa.text("SELECT 6 * 7")).scalar()
    42
    """
    sa.dialects.registry.register("duckdb.gx", __name__, BufferedDialect.__name__)
    return sa.create_engine(_URL, creator=lambda: BufferedConnection(connection), poolclass=StaticPool)
