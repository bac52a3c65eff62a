"""List columns as rectangles: one row of places per list, and where each column's places lie in a shared table.

Shapes: N rows, T values in all lists, W places.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

I64 = npt.NDArray[np.int64]
NOTHING = -1
"""The id behind a list's end, in tables and in graphs; 0 is a value that nobody knows."""
LARGEST_FLOAT32 = 3.4028234663852886e38
"""What a dense vector may hold at most, for it is kept as float32."""


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a list of whatever make.

    >>> is_list(pa.list_(pa.string())), is_list(pa.list_(pa.float32(), 8)), is_list(pa.string())
    (True, True, False)
    """
    fixed = pa.types.is_fixed_size_list(kind)
    return bool(fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind))


def values_of(lists: pa.Array | pa.ChunkedArray) -> tuple[pa.Array | pa.ChunkedArray, I64]:
    """All values of N lists, and how many each list has; a missing list has none: [T], [N].

    >>> values, lengths = values_of(pa.array([["a", "b"], None, [], ["a"]]))
    >>> values.to_pylist(), lengths.tolist()
    (['a', 'b', 'a'], [2, 0, 0, 1])
    """
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0), np.int64)
    return pc.list_flatten(lists), lengths


def padded(values: npt.NDArray[np.generic], lengths: I64, width: int, fill: object) -> npt.NDArray[np.generic]:
    """Values [T] of lists with given lengths [N] as a table [N, width], filled up behind each list's end.

    Raises:
        ValueError: a list is longer than the table is wide.

    >>> padded(np.array([5, 6, 7]), np.array([2, 0, 1]), 2, NOTHING).tolist()
    [[5, 6], [-1, -1], [7, -1]]
    """
    if len(lengths) and (longest := int(lengths.max())) > width:
        raise ValueError(f"a list of {longest} values does not fit into the {width} places of its column")
    table = np.full((len(lengths), width), fill, values.dtype)
    table[np.arange(width) < lengths[:, None]] = values
    return table


def spans(widths: Sequence[int]) -> Iterator[slice]:
    """Where columns of given widths lie, side by side.

    >>> list(spans([2, 3]))
    [slice(0, 2, None), slice(2, 5, None)]
    """
    ends = accumulate(widths)
    return (slice(end - width, end) for end, width in zip(ends, widths, strict=True))
