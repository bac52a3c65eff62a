"""A bank's segments, a bounded number at a time: who has rows enough, which rows those are, who stands behind whom.

Nothing here grows with the rows or the segments of a level: what is asked about a shard is read for that shard.

Shapes: E segments of a shard, G segments of a level.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.data.columns import Rows
from tasks.data.contract import SegmentsConfig
from tasks.data.segments import split_keys
from tasks.learning.material import I64, Windows

SHARD_SEGMENTS = 1 << 15
"""Most segments of a shard."""
SHARD_NUMBERS = 1 << 22
"""Most numbers that the segments of a shard are solved for, so that adapters of many numbers make smaller shards."""


def shard_size(numbers: int) -> int:
    """Segments of a shard, if each is solved for so many numbers (K x D).

    >>> shard_size(29), shard_size(4096), shard_size(10**9)
    (32768, 1024, 1)
    """
    return max(1, min(SHARD_SEGMENTS, SHARD_NUMBERS // max(1, numbers)))


@dataclass(frozen=True)
class Shard:
    """Neighbouring segments of a level.

    Attributes:
        segment: their dense indices in the level, ascending [E].
        windows: each one's support rows in the level's order; none for a segment that gets no weights of its own.
        parent: dense index in the next level, -1 for the base [E].
    """

    segment: I64
    windows: Windows
    parent: I64


class Shards:
    """The segments of one level that have rows before a night.

    A segment of a coarser level that may not have weights of its own is there too, without support: finer ones reach
    its parent through it.

    Args:
        rows: the table.
        at: number of the level, 0 the finest.
        segments: the ladder's limits.
        night: ordinal; rows of that night and later are not read.
        size: most segments of a shard.
    """

    def __init__(self, rows: Rows, at: int, segments: SegmentsConfig, night: int, size: int) -> None:
        self.rows, self.at, self.limits, self.night, self.size = rows, at, segments, night, size
        self.level = rows.levels[at]
        self._least, self._ties, self.own = 0, self.level.size, 0
        best = np.zeros(0, np.int64)
        for first in range(0, self.level.size, size):
            _, support, usable = self._read(first)
            self.own += int(np.count_nonzero(usable))
            if at == 0 and self.level.size > segments.max_leaves:
                best = np.concatenate([best, support[usable]])
                if len(best) > segments.max_leaves:
                    best = np.partition(best, -segments.max_leaves)[-segments.max_leaves :]
        if at == 0 and self.own > segments.max_leaves:
            self.own, self._least = segments.max_leaves, int(best.min())
            self._ties = int(np.count_nonzero(best == self._least))

    def __iter__(self) -> Iterator[Shard]:
        """The shards in the order of the keys; `own` of their segments have support, all in all."""
        level, ties = self.level, self._ties
        for first in range(0, level.size, self.size):
            stop, support, usable = self._read(first)
            # The leaves with most rows; of those that have as many, the smaller keys.
            tied = np.flatnonzero(usable & (support == self._least))
            usable &= support >= self._least
            usable[tied[ties:]] = False
            ties -= min(ties, len(tied))
            kept = np.flatnonzero(usable if self.at == 0 else support > 0)
            segment, stop = first + kept, stop[kept]
            read = np.where(usable[kept], np.minimum(support[kept], self.limits.max_support), 0)
            parent = np.full(len(segment), -1, np.int64)
            if self.at + 1 < len(self.rows.levels):
                # The parent is that of the newest support row: a later row must not move it.
                parent = np.asarray(self.rows.levels[self.at + 1].segment)[np.asarray(level.order)[stop - 1]]
            yield Shard(segment, Windows(stop - read, stop), parent)

    def _read(self, first: int) -> tuple[I64, I64, npt.NDArray[np.bool_]]:
        """Of a shard's segments: where the rows before the night end, how many they are, whether these are enough."""
        level, night = self.level, np.asarray(self.rows.night)
        bounds = np.asarray(level.offsets)[first : first + self.size + 1]
        start, order = bounds[:-1], np.asarray(level.order)
        low, high = start.copy(), bounds[1:].copy()
        # Rows of a segment are in order of time: halve the ranges, all at once, until they are empty.
        while (wide := np.flatnonzero(low < high)).size:
            middle = (low[wide] + high[wide]) // 2
            earlier = night[order[middle]] < self.night
            low[wide[earlier]] = middle[earlier] + 1
            high[wide[~earlier]] = middle[~earlier]
        support = low - start
        known = (split_keys(np.asarray(level.keys)[first : first + self.size], level.radices) > 0).all(axis=1)
        enough = np.minimum(support, self.limits.max_support) >= self.limits.min_support
        return low, support, known & enough
