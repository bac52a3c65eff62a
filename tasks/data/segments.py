"""The ladder of segments: which rows belong together at each level, and which coarser segment stands behind each.

A segment's key is the mixed-radix integer of its columns' vocabulary ids, first column most significant:
``key = ((id_0) * r_1 + id_1) * r_2 + id_2 …`` with ``r_c = vocabulary rows of column c``.

Shapes: N rows, C columns of a level, G segments of a level.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.data.contract import DataConfig, SegmentsConfig
from tasks.errors import InvalidConfig

I64 = npt.NDArray[np.int64]
LARGEST_KEY = 2**63 - 1


@dataclass(frozen=True)
class Level:
    """One level of the ladder over a table of rows.

    Attributes:
        columns: the columns that make the key.
        segment: dense segment index of each row [N], 0 to G-1 in the order of the keys. A missing value (id 0) is a
            value like any other here.
        order: rows sorted by (segment, time, tie) [N].
        offsets: the rows of segment ``g`` are ``order[offsets[g]:offsets[g + 1]]``, oldest first [G+1].
        keys: mixed-radix key of each segment, ascending [G].
        radices: vocabulary rows of each column.
        parent: dense index in the next level, -1 for the base [G].
    """

    columns: tuple[str, ...]
    segment: I64
    order: I64
    offsets: I64
    keys: I64
    radices: tuple[int, ...]
    parent: I64

    @property
    def size(self) -> int:
        """Number of segments."""
        return len(self.keys)


def check_levels(data: DataConfig, segments: SegmentsConfig) -> None:
    """Refuse a ladder whose columns cannot make a segment.

    Raises:
        InvalidConfig: a level names a column that is neither the user nor a categorical request column, names one
            twice, or repeats another level.
    """
    possible = (data.user, *data.named("request", "categorical"))
    for number, columns in enumerate(segments.levels):
        if unknown := [name for name in columns if name not in possible]:
            raise InvalidConfig(
                f"segments.levels[{number}] names {', '.join(unknown)}: a segment is made of the user column or "
                f"categorical request columns ({', '.join(possible)})"
            )
        if len(set(columns)) != len(columns):
            raise InvalidConfig(f"segments.levels[{number}] names a column twice: {', '.join(columns)}")
        if set(columns) in [set(earlier) for earlier in segments.levels[:number]]:
            raise InvalidConfig(f"segments.levels[{number}] repeats an earlier level: {', '.join(columns)}")


def level_name(columns: Sequence[str]) -> str:
    """What people call a level.

    >>> level_name(("occupation", "age_band"))
    'occupation x age_band'
    """
    return " x ".join(columns)


def mixed_radix(ids: Sequence[I64], radices: Sequence[int], what: str) -> I64:
    """One int64 key per row from one id per column.

    Args:
        ids: ids of each column, each [N], with ``0 <= ids[c] < radices[c]``.
        radices: number of values of each column.
        what: the object to name in an error.

    Returns:
        Keys [N]; equal keys mean equal ids in every column.

    Raises:
        InvalidConfig: the largest key does not fit into int64.

    >>> mixed_radix([np.array([1, 2]), np.array([0, 3])], (3, 4), "example").tolist()
    [4, 11]
    """
    if (values := math.prod(radices)) - 1 > LARGEST_KEY:
        raise InvalidConfig(
            f"{what} has {' x '.join(map(str, radices))} = {values} possible keys, more than the {LARGEST_KEY} that an "
            f"int64 holds: use fewer or coarser columns"
        )
    key = np.zeros_like(ids[0], dtype=np.int64)
    for column, radix in zip(ids, radices, strict=True):
        key = key * np.int64(radix) + column
    return key


def split_keys(keys: I64, radices: Sequence[int]) -> I64:
    """Column ids [G, C] of mixed-radix keys [G]: the inverse of `mixed_radix`.

    >>> split_keys(np.array([4, 11]), (3, 4)).tolist()
    [[1, 0], [2, 3]]
    """
    ids = np.empty((len(keys), len(radices)), dtype=np.int64)
    rest = keys
    for position in range(len(radices) - 1, -1, -1):
        rest, ids[:, position] = np.divmod(rest, np.int64(radices[position]))
    return ids


def build_levels(
    segments: SegmentsConfig, ids: Mapping[str, I64], radices: Mapping[str, int], time: I64, tie: I64
) -> tuple[Level, ...]:
    """Group rows at every level of the ladder.

    Args:
        segments: the ladder, finest level first.
        ids: vocabulary ids [N] of every column that a level names.
        radices: vocabulary rows of the same columns.
        time: microseconds [N].
        tie: digest of (user, item, time) [N]; orders rows of equal time.

    Returns:
        One `Level` per configured level. A segment's parent is the next level's segment of its newest row.

    Raises:
        InvalidConfig: a level's keys do not fit into int64.
    """
    levels: list[Level] = []
    parent_rows: I64 | None = None
    for columns in reversed(segments.levels):
        sizes = tuple(radices[name] for name in columns)
        row_keys = mixed_radix([ids[name] for name in columns], sizes, f"segment level [{', '.join(columns)}]")
        keys, segment, counts = np.unique(row_keys, return_inverse=True, return_counts=True)
        segment = segment.astype(np.int64, copy=False)
        order = np.lexsort((tie, time, segment)).astype(np.int64, copy=False)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        parent = np.full(len(keys), -1, np.int64) if parent_rows is None else parent_rows[order[offsets[1:] - 1]]
        levels.append(Level(columns, segment, order, offsets, keys, sizes, parent))
        parent_rows = segment
    return tuple(reversed(levels))
