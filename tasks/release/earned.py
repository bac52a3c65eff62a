"""How many support rows a segment needs before weights of its own pay, measured against its parent's weights.

The nightly exams predict every row twice: by the weights that serve it, and by those that would without them. Their
difference, by how many support rows are behind the weights, is a curve per level of the ladder.

Shapes: N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.contract import DataConfig
from tasks.data.segments import level_name
from tasks.learning.intervals import paired_intervals, sum_by_user
from tasks.release.evidence import own_minus_parent
from tasks.release.segment_evidence import LEAST, STEPS, step_name


@dataclass(frozen=True)
class Step:
    """A step of the curve; bounds are None where there are too few segments to tell.

    Attributes:
        objective: which.
        level: columns of the ladder's level, joined by ` x `.
        least: least support rows behind the weights.
        most: most; None: no limit.
        segments: segments that were served by weights with so much support.
        rows: rows with label that they were served.
        difference: loss with the own weights minus loss with the parent's per row; below zero they pay.
        low: lower 95 % bound, bootstrapped by segment.
        high: upper bound.
    """

    objective: str
    level: str
    least: int
    most: int | None
    segments: int
    rows: int
    difference: float
    low: float | None
    high: float | None

    @property
    def name(self) -> str:
        """The step in words.

        >>> Step("liked", "user", 4, 7, 9, 90, -0.01, None, None).name
        'support 4 to 7'
        """
        return step_name(self.least, self.most)


_TYPES: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64(), int | None: pa.int64()}
SCHEMA = pa.schema([(one.name, _TYPES.get(one.type, pa.float64())) for one in fields(Step)])


def curve(tables: Sequence[pa.Table], data: DataConfig, levels: Sequence[Sequence[str]], seed: int) -> list[Step]:
    """The curve of every objective and level, pooled over nights; steps that served no row are left out.

    Args:
        tables: exam tables.
        data: the contract.
        levels: columns of the ladder's levels, finest first.
        seed: of the bootstrap by segment.
    """
    found: list[Step] = []
    level, support = (
        np.concatenate([table[name].to_numpy() for table in tables]).astype(np.int64) for name in ("level", "support")
    )
    key = np.concatenate([table["segment"].to_numpy(zero_copy_only=False).astype(str) for table in tables])
    step = np.searchsorted(LEAST, support, side="right") - 1
    for objective in data.objectives:
        difference = np.concatenate([own_minus_parent(table, objective) for table in tables])
        for number, columns in enumerate(levels):
            for at, least in enumerate(LEAST):
                rows = np.flatnonzero((level == number) & (step == at) & ~np.isnan(difference))
                if not len(rows):
                    continue
                interval = paired_intervals(sum_by_user(key[rows], difference[rows, None]), seed)[0]
                bounds = interval.as_json()
                found.append(
                    Step(
                        objective=objective.name,
                        level=level_name(columns),
                        least=least,
                        most=STEPS[at][1],
                        segments=interval.users,
                        rows=interval.rows,
                        difference=interval.estimate,
                        low=bounds["low"],
                        high=bounds["high"],
                    )
                )
    return found


def pays_from(steps: Sequence[Step]) -> int | None:
    """Support rows from which own weights are proven to pay: the first step that is below zero by its interval.

    Args:
        steps: of one objective and level, in order.

    Returns:
        None if no step is, or if a later one is proven to be worse.
    """
    better = [step.least for step in steps if step.high is not None and step.high < 0]
    worse = [step.least for step in steps if step.low is not None and step.low > 0]
    return better[0] if better and not any(least > better[0] for least in worse) else None


def in_words(steps: Sequence[Step]) -> str:
    """From how many support rows on the own weights of a level pay."""
    least = pays_from(steps)
    if least is None:
        return "own weights are not proven to pay"
    return f"own weights pay from {least:,} support {'row' if least == 1 else 'rows'} on"


def save(steps: Sequence[Step], path: Path) -> None:
    """Write the steps as one Parquet table, a column per field."""
    columns = {name: [getattr(step, name) for step in steps] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def load(path: Path) -> list[Step]:
    """Read what `save` wrote."""
    return [Step(**row) for row in pq.read_table(path).to_pylist()]
