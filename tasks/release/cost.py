"""What a level's adapters cost for what they gain: is a level of the ladder worth its bytes and its milliseconds?

Costs are those of the banks of the exams, every night anew. The gain is what the rows that a level serves lose less
loss by than with its parent's weights. A level whose weights are also where finer ones start from gives those more
than is counted here: the figure answers what would be lost if its own rows went to its parent.

Shapes: N rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.data.contract import DataConfig
from tasks.data.segments import level_name
from tasks.learning.intervals import F64, Interval, paired_intervals, sum_by_user
from tasks.release.evidence import own_minus_parent
from tasks.release.lift import TOO_FEW
from tasks.release.page import size

UNMEASURED = "what they cost was not measured"


@dataclass(frozen=True)
class Spent:
    """What one level of one bank took; None where it was not measured.

    Attributes:
        level: columns of the ladder's level, joined by ` x `.
        adapters: segments with weights of their own.
        bytes: of the bank: their weights, and who they are.
        milliseconds: wall time of solving them, their support read and scored.
        device: that it was measured on.
    """

    level: str
    adapters: int
    bytes: int | None
    milliseconds: float | None
    device: str | None


@dataclass(frozen=True)
class Cost:
    """A level of the ladder over all nights; sums are over the nights.

    Attributes:
        objective: which one gains.
        level: columns of the ladder's level, joined by ` x `.
        unit: of the loss: `log-loss`, or `squared error` of a rating.
        nights: banks that were solved.
        adapters: adapters solved, each night's anew.
        bytes: of all banks; None where one was not counted.
        milliseconds: of all solving, for all objectives together; None where one was not measured.
        device: that the milliseconds were measured on; several are joined by ` and `.
        rows: rows with label that the level served.
        gain: loss that they were spared, summed by each segment's shrunk lift (`tasks.release.lift`); None where
            segments are too few to shrink.
        difference: measured loss per row, own minus parent's weights; None where the level served no row.
        low: lower 95 % bound of it, bootstrapped by segment; None where they are too few to tell.
        high: upper bound; below zero the gain is proven.
    """

    objective: str
    level: str
    unit: str
    nights: int
    adapters: int
    bytes: int | None
    milliseconds: float | None
    device: str | None
    rows: int
    gain: float | None
    difference: float | None
    low: float | None
    high: float | None

    @property
    def gain_per_row(self) -> float | None:
        """Loss spared per row served."""
        return None if self.gain is None else self.gain / self.rows

    @property
    def pays(self) -> bool:
        """Whether there is a gain to divide by, and it is proven."""
        return self.gain is not None and self.gain > 0 and self.high is not None and self.high < 0

    @property
    def bytes_per_gain(self) -> float | None:
        """Bytes for 0.001 of loss on each of 1,000 rows, which is 1 in all; None where the level does not pay."""
        return self.bytes / self.gain if self.pays and self.gain is not None and self.bytes is not None else None

    @property
    def milliseconds_per_gain(self) -> float | None:
        """Milliseconds for the same; None where the level does not pay."""
        if not self.pays or self.gain is None or self.milliseconds is None:
            return None
        return self.milliseconds / self.gain

    def in_words(self) -> str:
        r"""What the level costs, and what it gives for that.

        >>> cost = Cost("liked", "user", "log-loss", 2, 400, 80_000, 200.0, "a CPU", 1000, 20.0, -0.02, -0.03, -0.01)
        >>> print(*cost.in_words().split("; "), sep="\n")
        200 adapters a night, 200 B and 0.50 ms each
        gain of 0.0200 per row served: 4.0 kB and 10 ms per 0.001 log-loss on 1,000 rows
        """
        if not self.adapters:
            return "no segment has weights of its own"
        each = self._priced(self.adapters)
        counted = f"{self.adapters / self.nights:,.0f} adapters a night, {f'{each} each' if each else UNMEASURED}"
        if self.gain is None or self.gain_per_row is None:
            return f"{counted}; {TOO_FEW}{self._measured()}"
        if self.gain <= 0:
            return f"{counted}; no gain: {self.unit} {-self.gain_per_row:+.4f} per row served"
        gained = f"gain of {self.gain_per_row:.4f} per row served"
        if not self.pays:
            return f"{counted}; the {gained} is not proven"
        paid = self._priced(self.gain)
        return f"{counted}; {gained}" + (f": {paid} per 0.001 {self.unit} on 1,000 rows" if paid else "")

    def _measured(self) -> str:
        """The level as a whole, where at least that can be told."""
        if self.difference is None or self.low is None or self.high is None:
            return ""
        proven = "proven" if self.high < 0 else "not proven"
        told = f"{self.difference:+.5f} [{self.low:+.5f}, {self.high:+.5f}]"
        return f"; all together {self.unit} {told} per row served, a gain is {proven}"

    def _priced(self, by: float) -> str:
        """Bytes and milliseconds divided, for people; empty where they were not measured."""
        if self.bytes is None or self.milliseconds is None:
            return ""
        took = self.milliseconds / by
        return f"{size(self.bytes / by)} and {took:,.{0 if took >= 9.95 else 1 if took >= 0.995 else 2}f} ms"


_TYPES: dict[object, pa.DataType] = {str: pa.string(), str | None: pa.string(), int: pa.int64(), int | None: pa.int64()}
SCHEMA = pa.schema([(one.name, _TYPES.get(one.type, pa.float64())) for one in fields(Cost)])


def costs(
    spent: Sequence[Sequence[Spent]],
    gained: pa.Table,
    tables: Sequence[pa.Table],
    data: DataConfig,
    levels: Sequence[Sequence[str]],
    seed: int,
) -> list[Cost]:
    """What every level cost and gained, for every objective.

    Args:
        spent: of each night's bank, its levels, finest first.
        gained: what `tasks.release.lift.lifts` found in the same nights.
        tables: exam tables of the same nights.
        data: the contract.
        levels: columns of the ladder's levels, finest first.
        seed: of the bootstrap by segment.
    """
    found: list[Cost] = []
    number = np.concatenate([table["level"].to_numpy() for table in tables])
    key = np.concatenate([table["segment"].to_numpy(zero_copy_only=False).astype(str) for table in tables])
    for objective in data.objectives:
        difference = np.concatenate([own_minus_parent(table, objective) for table in tables])
        for at, columns in enumerate(levels):
            name = level_name(columns)
            mine = [night[at] for night in spent]
            rows = np.flatnonzero((number == at) & ~np.isnan(difference))
            told = _bounds(key[rows], difference[rows], seed)
            count, took = _whole(one.bytes for one in mine), _whole(one.milliseconds for one in mine)
            devices = sorted({one.device for one in mine if one.device is not None})
            found.append(
                Cost(
                    objective=objective.name,
                    level=name,
                    unit="log-loss" if objective.kind == "binary" else "squared error",
                    nights=len(mine),
                    adapters=sum(one.adapters for one in mine),
                    bytes=None if count is None else int(count),
                    milliseconds=took,
                    device=" and ".join(devices) or None,
                    rows=len(rows),
                    gain=_gain(gained, objective.name, name),
                    difference=told["estimate"],
                    low=told["low"],
                    high=told["high"],
                )
            )
    return found


def _bounds(key: NDArray[np.str_], difference: F64, seed: int) -> dict[str, float | int | None]:
    if not len(key):
        return Interval(float("nan"), -np.inf, np.inf).as_json()
    return paired_intervals(sum_by_user(key, difference[:, None]), seed)[0].as_json()


def _gain(gained: pa.Table, objective: str, level: str) -> float | None:
    """Shrunk lifts of a level's segments, each on as many rows as it was served; None where there are none."""
    mine = gained.filter(pc.and_(pc.equal(gained["objective"], objective), pc.equal(gained["level"], level)))
    return None if mine.num_rows == 0 else -float(mine["shrunk"].to_numpy() @ mine["rows"].to_numpy())


def _whole(parts: Iterable[float | None]) -> float | None:
    """The sum, or None where a part is unknown."""
    known = list(parts)
    return None if None in known else sum(one for one in known if one is not None)


def save(found: Sequence[Cost], path: Path) -> None:
    """Write the costs as one Parquet table, a column per field."""
    columns = {name: [getattr(cost, name) for cost in found] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def load(path: Path) -> list[Cost]:
    """Read what `save` wrote."""
    return [Cost(**row) for row in pq.read_table(path).to_pylist()]
