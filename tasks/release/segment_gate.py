"""Which segments keep their own adapter: it stays unless evidence pooled over nightly exams shows that it harms.

The evidence is of the banks that were examined, the verdict is carried out on the bank that ships: that one knows
segments that are new on the night, and has seen more rows of the others.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.data.contract import Section
from tasks.learning.intervals import MIN_CLUSTERS
from tasks.release.gate import GateConfig

BoolArray = NDArray[np.bool_]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SUPPORT_BUCKETS = ((1, 5), (6, 20), (21, None))
"""Support sizes that are judged together where a segment has too few exam rows of its own."""


@dataclass(frozen=True)
class SegmentEvidence:
    """What the pooled nightly exams say about segments: one entry per exam and segment, in any order."""

    level: I64
    """[E] ladder level, 0 the finest."""
    key: NDArray[Any]
    """[E] the segment's raw key, which means the same segment in every exam and in every bank."""
    support: I64
    """[E] support rows behind the adapter that was examined."""
    rows: I64
    """[E] exam rows."""
    sums: F64
    """[E] sum over those rows of (log-loss with its adapter - log-loss with its parent's)."""
    squares: F64
    """[E] sum over those rows of that difference squared."""


class LevelHarm(Section):
    """What is proven about one level: enough to say of any bank which of its segments fall back."""

    convicted: tuple[str, ...] = ()
    """Segments whose own weights are proven to do harm, by raw key."""
    buckets: tuple[tuple[int, int | None], ...] = ()
    """Least and most support rows of weights that are proven to do harm together; None: no limit."""
    acquitted: tuple[str, ...] = ()
    """Segments that were tested by themselves and not convicted. None are listed where no bucket is convicted: only
    there do they need protection. Each has `min_exam_rows` exam rows, so they are few beside the rows of the exams."""

    @property
    def proven(self) -> bool:
        """Whether there is anything to refuse."""
        return bool(self.convicted or self.buckets)

    def refuses(self, key: NDArray[Any], support: I64) -> BoolArray:
        """Which segments of a bank fall back to their parent's weights or the base.

        A segment's own verdict goes before that of its bucket, and the bucket is that of the weights that would ship.

        Args:
            key: [S] raw keys.
            support: [S] rows behind the weights in question.
        """
        refused = np.zeros(len(key), bool)
        for least, most in self.buckets:
            refused |= (support >= least) & (most is None or support <= most)
        refused &= ~np.isin(key, np.array(self.acquitted, str))
        return refused | np.isin(key, np.array(self.convicted, str))


@dataclass(frozen=True)
class SegmentVerdicts:
    """What was tested, single segments and buckets, one row each, and what was found."""

    level: I64
    """[H] ladder level."""
    bucket: I64
    """[H] index into `SUPPORT_BUCKETS`, or -1 for a single segment."""
    key: NDArray[Any]
    """[H] the segment's key; of no meaning for a bucket."""
    rows: I64
    """[H] exam rows behind it."""
    estimate: F64
    """[H] difference per row; above zero is harm."""
    p: F64
    """[H] one-sided p value of "the adapter does no harm"."""
    harmful: BoolArray
    """[H] proven, with false discovery controlled over all of them."""
    segments: I64
    """[H] segments that were examined, and make up the sample of a bucket."""

    def harm(self, levels: int) -> tuple[LevelHarm, ...]:
        """What is proven about each level of a ladder of so many, finest first; by key, so that equal is equal."""
        return tuple(self._harm_of(level) for level in range(levels))

    def _harm_of(self, level: int) -> LevelHarm:
        here, single = self.level == level, self.bucket < 0
        buckets = np.unique(self.bucket[here & ~single & self.harmful])
        acquitted = here & single & ~self.harmful if len(buckets) else np.zeros(len(here), bool)
        return LevelHarm(
            convicted=tuple(sorted(map(str, self.key[here & single & self.harmful]))),
            buckets=tuple(SUPPORT_BUCKETS[bucket] for bucket in buckets),
            acquitted=tuple(sorted(map(str, self.key[acquitted]))),
        )

    def table(self, limit: int = 20) -> list[dict[str, object]]:
        """Every bucket, then the single segments most suspect of harm, as rows for a report."""
        buckets = np.flatnonzero(self.bucket >= 0)
        single = np.flatnonzero(self.bucket < 0)
        chosen = np.concatenate((buckets, single[np.argsort(self.p[single], kind="stable")][:limit]))
        return [
            {
                "level": int(self.level[row]),
                "tested": _bucket_name(self.bucket[row]) if self.bucket[row] >= 0 else str(self.key[row]),
                "rows": int(self.rows[row]),
                "estimate": float(self.estimate[row]),
                "p": float(self.p[row]),
                "harmful": bool(self.harmful[row]),
                "segments": int(self.segments[row]),
            }
            for row in chosen
        ]


def decide_segments(config: GateConfig, evidence: SegmentEvidence) -> SegmentVerdicts:
    """Of which segments, and of which groups of them, it is proven that their own weights do harm.

    A segment with `min_exam_rows` pooled rows is tested by itself, its rows being the sample. The others are tested
    together by level and support bucket, the segments being the sample (ratio estimate, variance between segments).
    A test is one-sided against harm; the convicted are chosen by Benjamini–Hochberg over all tests at
    `false_discovery`. What is not convicted ships, and so does what nothing speaks for.

    Args:
        config: the gate's section.
        evidence: pooled over the last nightly exams.
    """
    segment, example = _groups(evidence.level, np.unique(evidence.key, return_inverse=True)[1])
    rows, sums, squares = _sums_by(segment, len(example), evidence.rows, evidence.sums, evidence.squares)
    own = np.flatnonzero(rows >= config.min_exam_rows)
    own_rows, own_sums = rows[own], sums[own]
    variance = np.maximum(squares[own] - own_sums**2 / own_rows, 0) / (own_rows - 1)
    own_p = _harm_p(own_sums / own_rows, variance / own_rows, own_rows - 1)

    thin = np.flatnonzero(rows[segment] < config.min_exam_rows)
    cell = evidence.level[thin] * len(SUPPORT_BUCKETS) + _bucket(evidence.support[thin])
    cells, clusters, cell_rows, cell_estimate, cell_p = _test_cells(
        cell, segment[thin], evidence.rows[thin], evidence.sums[thin]
    )
    p = np.concatenate((own_p, cell_p))
    return SegmentVerdicts(
        level=np.concatenate((evidence.level[example[own]], cells // len(SUPPORT_BUCKETS))),
        bucket=np.concatenate((np.full(len(own), -1), cells % len(SUPPORT_BUCKETS))),
        key=np.concatenate((evidence.key[example[own]], np.zeros(len(cells), evidence.key.dtype))),
        rows=np.concatenate((own_rows, cell_rows)).astype(np.int64),
        estimate=np.concatenate((own_sums / own_rows, cell_estimate)),
        p=p,
        harmful=benjamini_hochberg(p, config.false_discovery),
        segments=np.concatenate((np.ones(len(own)), clusters)).astype(np.int64),
    )


def _test_cells(cell: I64, segment: I64, rows: I64, sums: F64) -> tuple[I64, F64, F64, F64, F64]:
    """Tests each cell (level and bucket) by its segments; cells with fewer than `MIN_CLUSTERS` of them are left out.

    A cluster is a segment within a cell: one whose support grew from night to night counts in both cells.

    Returns:
        Cells ascending, their clusters, rows, difference per row and p value.
    """
    cells, index = np.unique(cell, return_inverse=True)
    cluster, first = _groups(index, segment)
    cluster_cell = index[first]
    cluster_rows, cluster_sums = _sums_by(cluster, len(first), rows, sums)
    clusters, cell_rows, cell_sums = _sums_by(cluster_cell, len(cells), np.ones(len(first)), cluster_rows, cluster_sums)
    estimate = cell_sums / cell_rows
    residual = cluster_sums - estimate[cluster_cell] * cluster_rows
    (spread,) = _sums_by(cluster_cell, len(cells), residual**2)
    judged = clusters >= MIN_CLUSTERS
    cells, clusters, cell_rows, estimate = cells[judged], clusters[judged], cell_rows[judged], estimate[judged]
    variance = clusters / (clusters - 1) * spread[judged] / cell_rows**2
    return cells, clusters, cell_rows, estimate, _harm_p(estimate, variance, clusters - 1)


def benjamini_hochberg(p: F64, rate: float) -> BoolArray:
    """Which of H hypotheses to reject so that at most `rate` of the rejected are expected to be true.

    Rejects the hypotheses with the k smallest p values, k the largest rank with ``p_(k) <= rate k / H``.
    Source: Benjamini and Hochberg 1995.

    >>> benjamini_hochberg(np.array([0.9, 0.049, 0.021, 0.02]), 0.05)
    array([False, False,  True,  True])
    """
    order = np.argsort(p, kind="stable")
    passed = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / max(len(p), 1))
    rejected = np.zeros(len(p), bool)
    rejected[order[: passed[-1] + 1 if len(passed) else 0]] = True
    return rejected


def _harm_p(estimate: F64, variance: F64, degrees: F64) -> F64:
    """One-sided p value of an estimate above zero under Student's t; 1 where the estimate is zero.

    The t value is turned into a normal one by Wallace's formula (1959), within 0.0025 of p from four degrees on. An
    estimate without variance is as sure as its sign.
    """
    sure = np.where(estimate > 0, 1e6, -1e6)
    t = np.divide(estimate, np.sqrt(variance), out=sure, where=(variance > 0) & (estimate != 0))
    z = np.sign(t) * (8 * degrees + 1) / (8 * degrees + 3) * np.sqrt(degrees * np.log1p(t**2 / degrees))
    p: F64 = torch.special.ndtr(torch.from_numpy(-z)).numpy()
    return p


def _groups(major: I64, minor: I64) -> tuple[I64, I64]:
    """Dense index of each pair, and the first place where each distinct pair stands."""
    pair = major * (int(minor.max(initial=0)) + 1) + minor
    _, first, index = np.unique(pair, return_index=True, return_inverse=True)
    return index, first


def _sums_by(index: I64, count: int, *columns: NDArray[Any]) -> list[F64]:
    return [np.bincount(index, weights=column, minlength=count).astype(np.float64) for column in columns]


def _bucket(support: I64) -> I64:
    return np.searchsorted([low for low, _ in SUPPORT_BUCKETS[1:]], support, side="right").astype(np.int64)


def _bucket_name(bucket: int) -> str:
    low, high = SUPPORT_BUCKETS[bucket]
    return f"support {low}+" if high is None else f"support {low} to {high}"
