"""Which segments keep their own adapter: it stays unless evidence pooled over nightly exams shows that it harms."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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
    """[E] the segment's key; it must mean the same segment in every exam and in the bank (ints or strings)."""
    support: I64
    """[E] support rows behind the adapter that was examined."""
    rows: I64
    """[E] exam rows."""
    sums: F64
    """[E] sum over those rows of (log-loss with its adapter - log-loss with its parent's)."""
    squares: F64
    """[E] sum over those rows of that difference squared."""


@dataclass(frozen=True)
class Hypotheses:
    """What was tested: single segments and buckets, one row each."""

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
    """[H] segments of the bank that the verdict speaks for."""


@dataclass(frozen=True)
class SegmentVerdicts:
    """Which adapters of a bank ship."""

    keep: BoolArray
    """[S] False: the segment falls back to its parent's adapter or the base."""
    hypothesis: I64
    """[S] row of `tested` that speaks for the segment, -1 if no evidence does (it ships)."""
    tested: Hypotheses
    """What was tested."""

    def table(self, limit: int = 20) -> list[dict[str, object]]:
        """Every bucket, then the single segments most suspect of harm, as rows for a report."""
        tested = self.tested
        buckets = np.flatnonzero(tested.bucket >= 0)
        single = np.flatnonzero(tested.bucket < 0)
        chosen = np.concatenate((buckets, single[np.argsort(tested.p[single], kind="stable")][:limit]))
        return [
            {
                "level": int(tested.level[row]),
                "tested": _bucket_name(tested.bucket[row]) if tested.bucket[row] >= 0 else str(tested.key[row]),
                "rows": int(tested.rows[row]),
                "estimate": float(tested.estimate[row]),
                "p": float(tested.p[row]),
                "harmful": bool(tested.harmful[row]),
                "segments": int(tested.segments[row]),
            }
            for row in chosen
        ]


def decide_segments(
    config: GateConfig, evidence: SegmentEvidence, level: I64, key: NDArray[Any], support: I64
) -> SegmentVerdicts:
    """Which segments of a bank keep their own adapter.

    A segment with `min_exam_rows` pooled rows is tested by itself, its rows being the sample. The others are tested
    together by level and support bucket, the segments being the sample (ratio estimate, variance between segments).
    A test is one-sided against harm; the convicted are chosen by Benjamini–Hochberg over all tests at
    `false_discovery`. What is not convicted ships, and so does what nothing speaks for.

    Args:
        config: the gate's section.
        evidence: pooled over the last nightly exams.
        level: [S] level of each segment of the bank to ship.
        key: [S] its key, of the evidence's kind.
        support: [S] its support rows.
    """
    exam = len(evidence.level)
    levels, keys = np.concatenate((evidence.level, level)), np.concatenate((evidence.key, key))
    segment, example = _groups(levels, np.unique(keys, return_inverse=True)[1])
    rows, sums, squares = _sums_by(segment[:exam], len(example), evidence.rows, evidence.sums, evidence.squares)
    own = np.flatnonzero(rows >= config.min_exam_rows)
    own_rows, own_sums = rows[own], sums[own]
    variance = np.maximum(squares[own] - own_sums**2 / own_rows, 0) / (own_rows - 1)
    own_p = _harm_p(own_sums / own_rows, variance / own_rows, own_rows - 1)

    thin = np.flatnonzero(rows[segment[:exam]] < config.min_exam_rows)
    cell = evidence.level[thin] * len(SUPPORT_BUCKETS) + _bucket(evidence.support[thin])
    cells, cell_rows, cell_estimate, cell_p = _test_cells(cell, segment[thin], evidence.rows[thin], evidence.sums[thin])

    by_own = np.full(len(example), -1)
    by_own[own] = np.arange(len(own))
    spoken = by_own[segment[exam:]]
    wanted = level * len(SUPPORT_BUCKETS) + _bucket(support)
    place = np.searchsorted(cells, wanted)
    by_cell = np.where(np.append(cells, -1)[place] == wanted, len(own) + place, -1)
    hypothesis = np.where(spoken >= 0, spoken, by_cell)

    p = np.concatenate((own_p, cell_p))
    harmful = benjamini_hochberg(p, config.false_discovery)
    tested = Hypotheses(
        level=np.concatenate((levels[example[own]], cells // len(SUPPORT_BUCKETS))),
        bucket=np.concatenate((np.full(len(own), -1), cells % len(SUPPORT_BUCKETS))),
        key=np.concatenate((keys[example[own]], np.zeros(len(cells), keys.dtype))),
        rows=np.concatenate((own_rows, cell_rows)).astype(np.int64),
        estimate=np.concatenate((own_sums / own_rows, cell_estimate)),
        p=p,
        harmful=harmful,
        segments=np.bincount(hypothesis[hypothesis >= 0], minlength=len(p)),
    )
    return SegmentVerdicts(~np.append(harmful, False)[hypothesis], hypothesis, tested)


def _test_cells(cell: I64, segment: I64, rows: I64, sums: F64) -> tuple[I64, F64, F64, F64]:
    """Tests each cell (level and bucket) by its segments; cells with fewer than `MIN_CLUSTERS` of them are left out.

    A cluster is a segment within a cell: one whose support grew from night to night counts in both cells.

    Returns:
        Cells ascending, their rows, difference per row and p value.
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
    return cells, cell_rows, estimate, _harm_p(estimate, variance, clusters - 1)


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
