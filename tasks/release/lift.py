"""What each segment gains from weights of its own, shrunk by empirical Bayes: who is served best, and who worst.

A segment's mean difference over a handful of rows is mostly noise, and the best of a thousand such means is nothing
but noise. All segments of a level together tell how much their true lifts differ; each mean is drawn towards theirs by
how unsure it is.

Shapes: N rows, E segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.data.contract import DataConfig
from tasks.data.segments import level_name
from tasks.learning.intervals import F64, I64, MIN_CLUSTERS
from tasks.release.evidence import own_minus_parent

SURE = NormalDist().inv_cdf(0.95)
"""Standard deviations from nothing at which a segment counts as better or worse off."""
SHOWN = 5
"""Most segments at either end that a summary names."""
TOO_FEW = (
    f"fewer than {MIN_CLUSTERS} segments were served by own weights on two nights or more: they cannot be compared"
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
        A table of `SCHEMA`. Levels with fewer than `MIN_CLUSTERS` segments that were served in two visits or more (a
        visit: a user's night) are left out: there is no telling what is the segment's and what the visit's.
    """
    parts = [SCHEMA.empty_table()]
    level = np.concatenate([table["level"].to_numpy() for table in tables])
    key = np.concatenate([_strings(table, "segment") for table in tables])
    # Rows of one user's night resemble each other.
    night = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    visit = np.unique(np.concatenate([_strings(table, "user") for table in tables]), return_inverse=True)[1]
    visit = visit * len(tables) + night
    for objective in data.objectives:
        difference = np.concatenate([own_minus_parent(table, objective) for table in tables])
        for number, columns in enumerate(levels):
            rows = np.flatnonzero((level == number) & ~np.isnan(difference))
            if not len(rows):
                continue
            segments, place, count = np.unique(key[rows], return_inverse=True, return_counts=True)
            found = _measured(place, count, visit[rows], difference[rows])
            if found is None:
                continue
            mean, variance = found
            shrunk, deviation = shrink(mean, variance)
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


def summaries(found: pa.Table) -> list[Summary]:
    """Each objective's levels, from what `lifts` found."""
    told: list[Summary] = []
    kinds = found.group_by(["objective", "level"], use_threads=False).aggregate([]).to_pylist()
    for objective, level in (kind.values() for kind in kinds):
        chosen = pc.and_(pc.equal(found["objective"], objective), pc.equal(found["level"], level))
        mine = found.filter(chosen)
        shrunk, least = mine["shrunk"].to_numpy(), SURE * mine["deviation"].to_numpy()
        shown = min(SHOWN, len(shrunk) // 2)  # nobody stands at both ends
        ends = (mine.slice(0, shown), mine.slice(len(shrunk) - shown))
        best, worst = ([Served(**row) for row in end.to_pylist()] for end in ends)
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


def _strings(table: pa.Table, name: str) -> NDArray[np.str_]:
    return np.asarray(table[name].to_numpy(zero_copy_only=False), np.str_)


def _measured(place: I64, count: I64, visit: I64, difference: F64) -> tuple[F64, F64] | None:
    """Mean difference of every segment [E] and the variance of that mean, from its rows [N]; None: too few visits.

    Rows of a visit resemble each other, so a mean has two parts of noise: that of its rows and that of its visits. Few
    segments can tell their own; both variances are those of all segments together, by moments (Searle, Casella and
    McCulloch, Variance Components, 1992, chapter 3, unbalanced data).
    """
    mean = np.bincount(place, difference) / count
    pairs, cluster = np.unique(place * np.int64(visit.max() + 1) + visit, return_inverse=True)
    owner, size = pairs // np.int64(visit.max() + 1), np.bincount(cluster)
    if np.count_nonzero(np.bincount(owner) > 1) < MIN_CLUSTERS:
        return None
    of_visit = np.bincount(cluster, difference) / size
    of_a_row = float(((difference - of_visit[cluster]) ** 2).sum()) / max(1, len(difference) - len(size))
    squares = np.bincount(owner, size.astype(np.float64) ** 2)
    between = float((size * (of_visit - mean[owner]) ** 2).sum()) - (len(size) - len(count)) * of_a_row
    of_a_visit = max(0.0, between / (len(difference) - float((squares / count).sum())))
    return mean, of_a_row / count + of_a_visit * squares / count.astype(np.float64) ** 2


def shrink(mean: F64, variance: F64) -> tuple[F64, F64]:
    """Posterior mean and standard deviation of each segment's true value [E], under one normal prior for all.

    The prior's variance is estimated by moments (DerSimonian and Laird, 1986), its mean by weighing each segment by
    how sure it is; then each is drawn towards it (Efron and Morris, 1975).

    Args:
        mean: measured values [E].
        variance: of the measurements [E].

    Returns:
        Means and deviations [E]; a deviation counts in how unsure the prior's mean is.

    Two that were measured equally well, and whose difference of 2 is four times what noise explains:

    >>> shrink(np.array([-1.0, 1.0]), np.array([0.5, 0.5]))
    (array([-0.75,  0.75]), array([0.66143783, 0.66143783]))
    """
    if not variance.any():  # nothing is unsure
        return mean.copy(), np.zeros_like(mean)
    variance = np.maximum(variance, variance.max() * 1e-9)
    sure = 1.0 / variance
    middle = (sure * mean).sum() / sure.sum()
    more = (sure * (mean - middle) ** 2).sum() - (len(mean) - 1)
    spread = max(0.0, more / (sure.sum() - (sure**2).sum() / sure.sum()))
    sure = 1.0 / (spread + variance)
    middle = (sure * mean).sum() / sure.sum()
    kept = spread * sure
    return middle + kept * (mean - middle), np.sqrt(kept * variance + (1 - kept) ** 2 / sure.sum())
