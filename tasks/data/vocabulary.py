"""Append-only vocabularies: raw key to small integer id, one per key, categorical or multi-valued column.

Id 0 means unknown or missing; the key at position ``p`` has id ``p + 1``. Keys are appended in the order (night, key)
and never move, so an id once given means the same key in every later release.

Shapes: N rows, V keys.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data.contract import DataConfig
from tasks.data.lists import is_list, values_of
from tasks.errors import ObjectCorrupt

I64 = npt.NDArray[np.int64]
MISSING: dict[str, int | str] = {"int64": -(2**63), "string": ""}
"""What stands for a missing value in a ranking request; never a key, so that training and serving agree."""
_TYPES: dict[str, pa.DataType] = {"int64": pa.int64(), "string": pa.string()}


@dataclass(frozen=True)
class Vocabulary:
    """The keys of one column, in the order of their ids.

    Attributes:
        column: the column's name.
        keys: distinct keys [V], int64 or string, without nulls; the id of ``keys[p]`` is ``p + 1``.

    >>> colours = Vocabulary("colour", pa.array([], pa.string())).extend(pa.array(["red", None, "blue", "red"]))
    >>> colours.keys.to_pylist(), colours.size, colours.rows
    (['blue', 'red'], 2, 3)
    >>> colours.encode(pa.array(["red", "green", None, "blue", ""])).tolist()
    [2, 0, 0, 1, 0]
    >>> colours.extend(pa.array(["azure"])).keys.to_pylist()
    ['blue', 'red', 'azure']
    """

    column: str
    keys: pa.Array

    @property
    def size(self) -> int:
        """How many keys are known; also the largest id."""
        return len(self.keys)

    @property
    def rows(self) -> int:
        """Rows of a table that is indexed by id: the keys and the unknown row 0."""
        return len(self.keys) + 1

    def encode(self, values: pa.Array | pa.ChunkedArray) -> I64:
        """Ids of raw values [N]; 0 where the value is null, the missing marker or not known."""
        positions = pc.index_in(values.cast(self.keys.type), value_set=self.keys)
        ids: I64 = np.asarray(pc.fill_null(positions, -1), dtype=np.int64) + 1
        return ids

    def decode(self, ids: I64) -> pa.Array:
        """Raw keys of ids [N]; null for id 0.

        Raises:
            pyarrow.ArrowIndexError: an id is beyond the vocabulary.
        """
        return self.keys.take(pa.array(ids - 1, mask=ids == 0))

    def extend(self, values: pa.Array | pa.ChunkedArray) -> "Vocabulary":
        """This vocabulary with the unseen ones of one night's values [N] appended in key order (strings by bytes)."""
        distinct = pc.unique(values.cast(self.keys.type))
        marker = MISSING["string" if pa.types.is_string(self.keys.type) else "int64"]
        known = pa.concat_arrays([self.keys, pa.array([marker], self.keys.type)])
        fresh = distinct.filter(pc.invert(pc.or_(pc.is_in(distinct, value_set=known), pc.is_null(distinct))))
        if len(fresh) == 0:
            return self
        return Vocabulary(self.column, pa.concat_arrays([self.keys, fresh.take(pc.sort_indices(fresh))]))


Vocabularies = Mapping[str, Vocabulary]
"""Column name to vocabulary, in the order of `DataConfig.vocabularies`."""


def empty(data: DataConfig) -> dict[str, Vocabulary]:
    """A vocabulary without keys for each column that has one."""
    return {name: Vocabulary(name, pa.array([], _TYPES[data.column(name).dtype])) for name in data.vocabularies}


def extend(vocabularies: Vocabularies, nights: Iterable[Path]) -> dict[str, Vocabulary]:
    """The vocabularies with the keys of further nights appended, ordered by (night, key).

    Args:
        vocabularies: what is known so far; not changed.
        nights: clean Parquet files, one per night, oldest first. Only the vocabularies' columns are read, one night
            and one column at a time.

    Returns:
        Vocabularies in which every id of the given ones still means the same key.
    """
    extended = dict(vocabularies)
    for path in nights:
        with pq.ParquetFile(path) as file:
            for name, vocabulary in extended.items():
                values = file.read(columns=[name])[name]
                extended[name] = vocabulary.extend(values_of(values)[0] if is_list(values.type) else values)
    return extended


def sizes(vocabularies: Vocabularies) -> dict[str, int]:
    """Known keys per column: what freezes the exam's view before the newest night is appended."""
    return {name: vocabulary.size for name, vocabulary in vocabularies.items()}


def save(vocabularies: Vocabularies, path: Path) -> None:
    """Write all columns into one Parquet file with columns (column, id, key_int64, key_string)."""
    parts = []
    for name, vocabulary in vocabularies.items():
        keys = {dtype: pa.nulls(vocabulary.size, arrow) for dtype, arrow in _TYPES.items()}
        keys["string" if pa.types.is_string(vocabulary.keys.type) else "int64"] = vocabulary.keys
        columns = {
            "column": pa.repeat(pa.scalar(name, pa.string()), vocabulary.size),
            "id": pa.array(np.arange(1, vocabulary.rows, dtype=np.int64)),
            **{f"key_{dtype}": values for dtype, values in keys.items()},
        }
        parts.append(pa.table(columns))
    pq.write_table(pa.concat_tables(parts).combine_chunks(), path, compression="zstd")


def load(data: DataConfig, path: Path) -> dict[str, Vocabulary]:
    """Read what `save` wrote. Columns that the contract has gained since start empty; those that it lost are dropped.

    Raises:
        ObjectCorrupt: the ids of a column are not 1, 2, 3, …, or its keys are of another type than the contract's.
    """
    table = pq.read_table(path)
    vocabularies = {}
    for name in data.vocabularies:
        dtype = data.column(name).dtype
        rows = table.filter(pc.equal(table["column"], name))
        keys = rows[f"key_{dtype}"].combine_chunks()
        ids = rows["id"].to_numpy()
        if not np.array_equal(ids, np.arange(1, len(ids) + 1)) or keys.null_count:
            raise ObjectCorrupt(
                f"vocabulary of {name!r} in {path}: ids or {dtype} keys are not complete ({len(ids)} ids, "
                f"{keys.null_count} keys missing); the column changed its type or the file is damaged: start a new "
                f"pipeline"
            )
        vocabularies[name] = Vocabulary(name, keys)
    return vocabularies
