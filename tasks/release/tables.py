"""What a release knows besides weights: vocabularies, statistics, the slot of every segment.

The graphs carry the same numbers for rankers; these files carry them for people, for the next night's warm start and
for a replay. Equal tables give equal bytes.

Shapes: G segments of a level, S statistics, K objectives, D numbers of an adapter.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data import vocabulary
from tasks.data.contract import DataConfig
from tasks.data.lists import NOTHING
from tasks.data.statistics import StatisticsTables
from tasks.data.vocabulary import MISSING, Vocabulary
from tasks.errors import ObjectCorrupt

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


OWN, ROLLED_BACK = "own", "rolled_back"
"""Whose weights serve a segment: its own, or its parent's because its own are proven to do harm or an operator
holds it. A segment that is not listed is served by its parent's for want of rows."""
NO_SLOT = -1
"""Slot of a segment that the request's own coarser segment serves."""
SEGMENTS = pa.schema(
    [("level", pa.int64()), ("key", pa.int64()), ("slot", pa.int64()), ("support", pa.int64()), ("source", pa.string())]
)
"""Of `segments.parquet`."""


@dataclass(frozen=True)
class LevelTable:
    """Which slot of the bank serves each segment of one level.

    Attributes:
        columns: the columns that make the key.
        radices: vocabulary rows of each column when the keys were made.
        keys: distinct mixed-radix keys, int64 [G].
        slots: slot of each key, int64 [G]; a segment without an adapter of its own names its parent's slot or is
            left out, and then the request's own coarser segment serves it.
        support: rows that the weights of each key were solved from, int64 [G]; None where nobody says.
        rolled_back: further keys, which are refused weights of their own: they are proven to do harm, or an operator
            holds the segment. Only a graph with feedback knows those of users: it solves none for them. int64 [H].
    """

    columns: tuple[str, ...]
    radices: tuple[int, ...]
    keys: I64
    slots: I64
    support: I64 | None = None
    rolled_back: I64 | None = None

    def slot_of(self, key: int) -> int | None:
        """Slot of a key; None where the table does not list it.

        >>> table = LevelTable(("user",), (9,), np.array([2, 5]), np.array([7, 8]))
        >>> table.slot_of(5), table.slot_of(4)
        (8, None)
        """
        found = np.flatnonzero(self.keys == key)
        return int(self.slots[found[0]]) if len(found) else None


@dataclass(frozen=True)
class ServingTables:
    """Everything that turns raw columns into the network's inputs.

    Attributes:
        vocabularies: column to vocabulary, the ship vocabulary.
        statistics: the as-of statistics after the release's night.
        levels: the ladder, finest level first; slot 0 of the bank is the base below the last.
        history: entries of a user's history that a request carries.
        feedback: most rows of feedback that a request carries.
    """

    vocabularies: Mapping[str, Vocabulary]
    statistics: StatisticsTables
    levels: tuple[LevelTable, ...]
    history: int = 0
    feedback: int = 0

    def entries(self, name: str, listed: bool = False) -> tuple[pa.Array, I64]:
        """The keys of a column and their ids; `listed` adds what fills lists up, which is no unknown value."""
        keys, ids = self.vocabularies[name].keys, np.arange(1, self.vocabularies[name].rows)
        if not listed:
            return keys, ids
        marker = MISSING["string" if pa.types.is_string(keys.type) else "int64"]
        return pa.concat_arrays([keys, pa.array([marker], keys.type)]), np.append(ids, NOTHING)

    @property
    def refused(self) -> I64:
        """Keys of the finest level's segments that get no weights of their own, whatever requests bring."""
        back = self.levels[0].rolled_back if self.levels else None
        return np.zeros(0, np.int64) if back is None else back

    def ids(self, name: str, values: npt.NDArray[np.generic]) -> I64:
        """Ids of a column's raw values, in their shape; 0 where they are unknown or missing."""
        keys = self.vocabularies[name]
        return keys.encode(pa.array(values.ravel(), keys.keys.type)).reshape(values.shape)


def without(weights: F32, tables: ServingTables, at: int, key: int) -> tuple[F32, ServingTables]:
    """Bank and slot tables without one segment's weights.

    Requests of the segment are served by their own coarser segment then, also those that bring feedback.

    Args:
        weights: the bank [slots, K, D].
        tables: whose levels name slots, each for one segment.
        at: number of the segment's level.
        key: of the segment, which has a slot.
    """
    mine = tables.levels[at]
    slot, stays = int(mine.slots[mine.keys == key][0]), mine.keys != key
    back = np.zeros(0, np.int64) if mine.rolled_back is None else mine.rolled_back
    levels = list(tables.levels)
    levels[at] = replace(
        mine,
        keys=mine.keys[stays],
        slots=mine.slots[stays],
        support=None if mine.support is None else mine.support[stays],
        rolled_back=np.union1d(back, [key]),
    )
    moved = (replace(level, slots=np.where(level.slots > slot, level.slots - 1, level.slots)) for level in levels)
    return np.delete(weights, slot, axis=0), replace(tables, levels=tuple(moved))


def with_own(
    weights: F32, tables: ServingTables, at: int, key: int, own: F32, support: int | None
) -> tuple[F32, ServingTables]:
    """Bank and slot tables with one segment's own weights, in place of those that it has or as a further slot.

    A further slot is where a bank that was solved with the segment would have it (by level, the coarsest first, and by
    key), so that weights which were taken out and are put back give the same bytes.

    Args:
        weights: the bank [slots, K, D].
        tables: whose levels name slots, each for one segment.
        at: number of the segment's level.
        key: of the segment.
        own: its weights [K, D].
        support: rows that they were solved from; where None, the level tells no segment's support any more.
    """
    levels, weights = list(tables.levels), weights.copy()
    mine = levels[at]
    place = int(np.searchsorted(mine.keys, key))
    slot = mine.slot_of(key)
    if slot is None:
        behind = 1 + max(int(level.slots.max(initial=0)) for level in levels[at:])
        slot = int(mine.slots[place]) if place < len(mine.keys) else behind
        weights = np.insert(weights, slot, own, axis=0)
        levels = [replace(level, slots=np.where(level.slots >= slot, level.slots + 1, level.slots)) for level in levels]
        mine = levels[at]
        mine = replace(
            mine,
            keys=np.insert(mine.keys, place, key),
            slots=np.insert(mine.slots, place, slot),
            support=None if mine.support is None else np.insert(mine.support, place, 0),
        )
    weights[slot] = own
    rows = None if mine.support is None or support is None else np.where(mine.keys == key, support, mine.support)
    back = None if mine.rolled_back is None else mine.rolled_back[mine.rolled_back != key]
    levels[at] = replace(mine, support=rows, rolled_back=back)
    return weights, replace(tables, levels=tuple(levels))


def write_tables(tables: ServingTables, folder: Path) -> None:
    """Write the tables into a release folder; `read_tables` gives them back."""
    statistics = tables.statistics
    vocabulary.save(tables.vocabularies, folder / "vocabulary.parquet")
    groups = ("item", "user", "cohort_item")
    width = statistics.item.shape[1]
    for position, group in enumerate(groups):
        values: F32 = getattr(statistics, group)
        names = statistics.names[position * width : (position + 1) * width]
        columns = {"row": pa.array(np.arange(len(values), dtype=np.int64))}
        if group == "cohort_item":
            columns["key"] = pa.array(np.concatenate([np.full(min(len(values), 1), -1), statistics.cohort_item_keys]))
        columns |= {name: pa.array(values[:, column]) for column, name in enumerate(names)}
        _write(pa.table(columns), folder / f"statistics_{group}.parquet")
    parts = [_segments(number, level) for number, level in enumerate(tables.levels)]
    _write(pa.concat_tables([SEGMENTS.empty_table(), *parts]), folder / "segments.parquet")
    described = {
        "statistics": list(statistics.names),
        "base": statistics.base.astype(float).tolist(),
        "cohort_columns": list(statistics.cohort_columns),
        "cohort_radices": list(statistics.cohort_radices),
        "levels": [{"columns": list(level.columns), "radices": list(level.radices)} for level in tables.levels],
    }
    if tables.history:
        described["history"] = tables.history
    if tables.feedback:
        described["feedback"] = tables.feedback
    _write_json(described, folder / "tables.json")


def read_tables(data: DataConfig, folder: Path) -> ServingTables:
    """Read what `write_tables` wrote.

    Args:
        data: the contract; columns it has gained since have empty vocabularies.
        folder: a release folder.

    Raises:
        ObjectCorrupt: the files do not fit together.
    """
    try:
        described = json.loads((folder / "tables.json").read_bytes())
        names = tuple(described["statistics"])
        groups = {
            group: pq.read_table(folder / f"statistics_{group}.parquet") for group in ("item", "user", "cohort_item")
        }
        statistics = StatisticsTables(
            names=names,
            base=np.array(described["base"], np.float32),
            item=_features(groups["item"], names),
            user=_features(groups["user"], names),
            cohort_columns=tuple(described["cohort_columns"]),
            cohort_radices=tuple(described["cohort_radices"]),
            cohort_item_keys=groups["cohort_item"]["key"].to_numpy()[1:],
            cohort_item=_features(groups["cohort_item"], names, len(described["base"]) + 1),
        )
        segments = pq.read_table(folder / "segments.parquet")
        levels = tuple(
            _level(tuple(one["columns"]), tuple(one["radices"]), segments.filter(pc.field("level") == position))
            for position, one in enumerate(described["levels"])
        )
        vocabularies = vocabulary.load(data, folder / "vocabulary.parquet")
        past = (described.get("history", 0), described.get("feedback", 0))
        return ServingTables(vocabularies, statistics, levels, *past)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise ObjectCorrupt(
            f"the tables of the release in {folder} cannot be read: {error!r}; fetch the release again"
        ) from error


def _segments(number: int, level: LevelTable) -> pa.Table:
    """A level's rows of `segments.parquet`: segments with a slot, then those that were rolled back."""
    back = np.zeros(0, np.int64) if level.rolled_back is None else level.rolled_back
    own, all_ = len(level.keys), len(level.keys) + len(back)
    known = np.zeros(own, np.int64) if level.support is None else level.support
    unknown = np.arange(all_) >= (0 if level.support is None else own)
    return pa.table(
        {
            "level": np.full(all_, number, np.int64),
            "key": np.concatenate([level.keys, back]),
            "slot": np.concatenate([level.slots, np.full(len(back), NO_SLOT, np.int64)]),
            "support": pa.array(np.concatenate([known, np.zeros(len(back), np.int64)]), mask=unknown),
            "source": pa.array(np.where(np.arange(all_) < own, OWN, ROLLED_BACK).tolist(), pa.string()),
        },
        schema=SEGMENTS,
    )


def _level(columns: tuple[str, ...], radices: tuple[int, ...], rows: pa.Table) -> LevelTable:
    keys, slots = rows["key"].to_numpy(), rows["slot"].to_numpy()
    served = slots != NO_SLOT
    told = rows["support"].filter(pa.array(served)) if "support" in rows.column_names else None
    support = told.to_numpy() if told is not None and told.null_count == 0 else None
    back = None if told is None else keys[~served]
    return LevelTable(columns, radices, keys[served], slots[served], support, back)


def _features(table: pa.Table, names: tuple[str, ...], width: int = 0) -> F32:
    columns = [table[name].to_numpy() for name in names if name in table.column_names]
    if not columns:
        return np.zeros((table.num_rows, width), np.float32)
    return np.stack(columns, axis=1)


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table.combine_chunks(), path, compression="zstd")


def _write_json(value: object, path: Path) -> None:
    path.write_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
