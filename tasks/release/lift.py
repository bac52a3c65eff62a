"""What each segment gains from weights of its own, shrunk by empirical Bayes: who is served best, and who worst.

A segment's mean difference over a handful of rows is mostly noise, and the best of a thousand such means is nothing
but noise. All segments of a level together tell how much their true lifts differ; each mean is drawn towards theirs by
how unsure it is.

Shapes: N rows, E segments.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data.contract import DataConfig
from tasks.data.segments import level_name
from tasks.learning.intervals import MIN_CLUSTERS
from tasks.release.evidence import segment_evidence
from tasks.release.segment_evidence import LevelVisits
from tasks.release.segment_gate import UNNAMED

SURE = NormalDist().inv_cdf(0.95)
"""Standard deviations from nothing at which a segment counts as better or worse off."""
SURE_95 = NormalDist().inv_cdf(0.975)
"""Standard deviations to either side of a mean that make a 95 % interval."""
SHOWN = 5
"""Most segments at either end that a summary names."""
TOO_FEW = (
    f"fewer than {MIN_CLUSTERS} segments were served by own weights in two visits or more: they cannot be compared"
)
"""What there is to say of a level that `lifts` leaves out."""


@dataclass(frozen=True)
class Served:
    """A segment's lift: loss per row with its own weights minus its parent's; below zero it is better off.

    Attributes:
        objective: which.
        level: columns of the ladder's level, joined by ` x `.
        segment: its raw key.
        rows: rows with label that it was served.
        difference: mean over them.
        shrunk: expected true lift given the rows and all other segments of the level.
        deviation: standard deviation of the true lift around it.
    """

    objective: str
    level: str
    segment: str
    rows: int
    difference: float
    shrunk: float
    deviation: float


@dataclass(frozen=True)
class Summary:
    """A level's segments together.

    Attributes:
        objective: which.
        level: columns of the ladder's level, joined by ` x `.
        segments: segments that were served by weights of their own.
        rows: rows with label that they were served.
        mean: mean shrunk lift of a segment.
        better: segments that are better off with a probability of 95 % or more.
        worse: segments that are worse off, likewise.
        best: those with the least shrunk lift, least first.
        worst: those with the greatest, greatest first.
    """

    objective: str
    level: str
    segments: int
    rows: int
    mean: float
    better: int
    worse: int
    best: tuple[Served, ...]
    worst: tuple[Served, ...]

    @property
    def gap(self) -> float:
        """Between the segments that are served worst and best."""
        return self.worst[0].shrunk - self.best[0].shrunk

    def in_words(self) -> str:
        """What the level's own weights do for its segments."""
        if self.gap == 0:
            return (
                f"{self.better:,} of {self.segments:,} segments are better off, {self.worse:,} worse; "
                f"{self.mean:+.4f} on average, no difference between them can be told from noise"
            )
        return (
            f"{self.better:,} of {self.segments:,} segments are better off, {self.worse:,} worse; "
            f"{self.mean:+.4f} on average, {self.gap:.4f} between the best and the worst served"
        )


_TYPES: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64()}
SCHEMA = pa.schema([(one.name, _TYPES[one.type]) for one in fields(Served)])


def lifts(tables: Sequence[pa.Table], data: DataConfig, levels: Sequence[Sequence[str]]) -> pa.Table:
    """The lift of every segment that was served by weights of its own, pooled over nights; best first in each level.

    Args:
        tables: exam tables, a night each.
        data: the contract.
        levels: columns of the ladder's levels, finest first.

    Returns:
        A table of `SCHEMA`. Levels with fewer than `MIN_CLUSTERS` segments that were served in two visits or more are
        left out: there is no telling what is the segment's and what the visit's. What a visit is, and among whom a
        segment is shrunk, say `tasks.release.segment_evidence` and `tasks.release.shrinkage`.
    """
    parts = [SCHEMA.empty_table()]
    for objective in data.objectives:
        told = segment_evidence(tables, objective)
        for number, columns in enumerate(levels):
            visits = LevelVisits.of(told, number)
            segments, count, known = visits.keys, visits.exam_rows, visits.posteriors()
            there = ~np.isnan(known.shrunk)
            if not there.any():
                continue
            segments, count = segments[there], count[there]
            mean, shrunk, deviation = known.mean[there], known.shrunk[there], known.deviation[there]
            order = np.lexsort((segments, shrunk))
            parts.append(
                pa.table(
                    {
                        "objective": [objective.name] * len(order),
                        "level": [level_name(columns)] * len(order),
                        "segment": segments[order],
                        "rows": count[order],
                        "difference": mean[order],
                        "shrunk": shrunk[order],
                        "deviation": deviation[order],
                    },
                    schema=SCHEMA,
                )
            )
    return pa.concat_tables(parts)


def unnamed_levels(data: DataConfig, levels: Sequence[Sequence[str]]) -> list[str]:
    """Levels whose segments are single users: nobody's business by name, so summaries count them.

    Args:
        data: the contract.
        levels: columns of the ladder's levels.
    """
    return [level_name(columns) for columns in levels if data.user in columns]


def summaries(found: pa.Table, unnamed: Collection[str] = ()) -> list[Summary]:
    """Each objective's levels, from what `lifts` found.

    Args:
        found: the table.
        unnamed: levels whose segments' keys are not to be shown: a user's is nobody's business.
    """
    told: list[Summary] = []
    kinds = found.group_by(["objective", "level"], use_threads=False).aggregate([]).to_pylist()
    for objective, level in (kind.values() for kind in kinds):
        chosen = pc.and_(pc.equal(found["objective"], objective), pc.equal(found["level"], level))
        mine = found.filter(chosen)
        shrunk, least = mine["shrunk"].to_numpy(), SURE * mine["deviation"].to_numpy()
        shown = min(SHOWN, len(shrunk) // 2)  # nobody stands at both ends
        ends = (mine.slice(0, shown), mine.slice(len(shrunk) - shown))
        shown_as = {"segment": UNNAMED} if level in unnamed else {}
        best, worst = ([Served(**row | shown_as) for row in end.to_pylist()] for end in ends)
        told.append(
            Summary(
                objective=objective,
                level=level,
                segments=len(shrunk),
                rows=int(mine["rows"].to_numpy().sum()),
                mean=float(shrunk.mean()),
                better=int(((shrunk < 0) & (shrunk <= -least)).sum()),
                worse=int(((shrunk > 0) & (shrunk >= least)).sum()),
                best=tuple(best),
                worst=tuple(reversed(worst)),
            )
        )
    return told


def save(found: pa.Table, path: Path) -> None:
    """Write what `lifts` found."""
    pq.write_table(found, path, compression="zstd")


def load(path: Path) -> pa.Table:
    """Read what `save` wrote."""
    return pq.read_table(path, schema=SCHEMA)
