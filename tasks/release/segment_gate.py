"""Which segments keep their own adapter: it stays unless evidence pooled over nightly exams shows that it harms.

A segment with rows enough is judged by its lift, shrunk by empirical Bayes; the others by the step of the support curve
that they stand on. The evidence is of the banks that were examined, the verdict is carried out on the bank that ships:
that one knows segments that are new on the night, and has seen more rows of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.data.contract import Section
from tasks.learning.intervals import MIN_CLUSTERS
from tasks.release.gate import GateConfig
from tasks.release.segment_evidence import STEPS, LevelVisits, SegmentEvidence, groups, step_name, step_of, sums_by

BoolArray = NDArray[np.bool_]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

UNNAMED = "a single one"
"""What stands in place of a key that is not to be shown."""


class LevelHarm(Section):
    """What is proven about one level: enough to say of any bank which of its segments fall back."""

    convicted: tuple[str, ...] = ()
    """Segments whose own weights are proven to do harm, by raw key."""
    steps: tuple[tuple[int, int | None], ...] = ()
    """Least and most support rows of weights that are proven to do harm together; None: no limit."""
    acquitted: tuple[str, ...] = ()
    """Segments that were tested by themselves and not convicted. None are listed where no step is convicted: only
    there do they need protection. Each has `min_exam_rows` exam rows, so they are few beside the rows of the exams."""

    @property
    def proven(self) -> bool:
        """Whether there is anything to refuse."""
        return bool(self.convicted or self.steps)

    def refuses(self, key: NDArray[Any], support: I64) -> BoolArray:
        """Which segments of a bank fall back to their parent's weights or the base.

        A segment's own verdict goes before that of its step, and the step is that of the weights that would ship.

        Args:
            key: [S] raw keys.
            support: [S] rows behind the weights in question.
        """
        refused = np.zeros(len(key), bool)
        for least, most in self.steps:
            refused |= (support >= least) & (most is None or support <= most)
        refused &= ~np.isin(key, np.array(self.acquitted, str))
        return refused | np.isin(key, np.array(self.convicted, str))


@dataclass(frozen=True)
class SegmentVerdicts:
    """What was tested, single segments and steps, one row each, and what was found."""

    level: I64
    """[H] ladder level."""
    step: I64
    """[H] index into `STEPS`, or -1 for a single segment."""
    key: NDArray[Any]
    """[H] the segment's key; of no meaning for a step."""
    rows: I64
    """[H] exam rows behind it."""
    estimate: F64
    """[H] difference per row; above zero is harm."""
    shrunk: F64
    """[H] expected true difference of a single segment, given all of its level; NaN where it was not shrunk."""
    p: F64
    """[H] one-sided p value of "the adapter does no harm"; 1 where a shrunk difference is no harm."""
    harmful: BoolArray
    """[H] proven, with false discovery controlled over all of them."""
    segments: I64
    """[H] segments that were examined, and make up the sample of a step."""

    def share(self, level: int) -> float:
        """Of the exam rows of a level that were tested, those of segments that are convicted by themselves."""
        here = self.level == level
        return float(self.rows[here & (self.step < 0) & self.harmful].sum() / max(1, self.rows[here].sum()))

    def harm(self, levels: int) -> tuple[LevelHarm, ...]:
        """What is proven about each level of a ladder of so many, finest first; by key, so that equal is equal."""
        return tuple(self._harm_of(level) for level in range(levels))

    def _harm_of(self, level: int) -> LevelHarm:
        here, single = self.level == level, self.step < 0
        steps = np.unique(self.step[here & ~single & self.harmful])
        acquitted = here & single & ~self.harmful if len(steps) else np.zeros(len(here), bool)
        return LevelHarm(
            convicted=tuple(sorted(map(str, self.key[here & single & self.harmful]))),
            steps=tuple(STEPS[step] for step in steps),
            acquitted=tuple(sorted(map(str, self.key[acquitted]))),
        )

    def table(self, named: Sequence[bool] | None = None, limit: int = 20) -> list[dict[str, object]]:
        """Every step, then of each level the single segments most suspect of harm, as rows for a report.

        Args:
            named: of each level, whether its segments' keys may be shown: a user's is nobody's business. None: all.
            limit: most single segments of a level.
        """
        steps, single = np.flatnonzero(self.step >= 0), np.flatnonzero(self.step < 0)
        suspects = single[np.lexsort((self.p[single], self.level[single]))]
        rank = np.arange(len(suspects)) - np.searchsorted(self.level[suspects], self.level[suspects])
        chosen = np.concatenate((steps, suspects[rank < limit]))
        shown = np.ones(int(self.level.max(initial=0)) + 1, bool) if named is None else np.array(named)
        keys = [str(self.key[row]) if shown[self.level[row]] else UNNAMED for row in chosen]
        return [
            {
                "level": int(self.level[row]),
                "tested": step_name(*STEPS[self.step[row]]) if self.step[row] >= 0 else key,
                "rows": int(self.rows[row]),
                "estimate": float(self.estimate[row]),
                "shrunk": None if np.isnan(self.shrunk[row]) else float(self.shrunk[row]),
                "p": float(self.p[row]),
                "harmful": bool(self.harmful[row]),
                "segments": int(self.segments[row]),
            }
            for row, key in zip(chosen, keys, strict=True)
        ]


def decide_segments(config: GateConfig, evidence: SegmentEvidence) -> SegmentVerdicts:
    """Of which segments, and of which groups of them, it is proven that their own weights do harm.

    A segment with `min_exam_rows` pooled rows is judged by itself, among all segments of its level with about as much
    support (`tasks.release.shrinkage`): its p value is that of its mean, with their noise; it is not convicted where
    its lift, shrunk towards theirs, is no harm. The first keeps the rate of false discoveries, the second only takes
    convictions away. Where too few can be compared, as with three markets, its own visits are the sample, if there are
    `MIN_CLUSTERS` of them. All others are tested together by level and step of the support curve, the segments being
    the sample (ratio estimate, variance between segments). The convicted are chosen by Benjamini-Hochberg over all
    tests at `false_discovery`. What is not convicted ships, and so does what nothing speaks for.

    Args:
        config: the gate's section.
        evidence: pooled over the last nightly exams.
    """
    segment, example = groups(evidence.level, np.unique(evidence.key, return_inverse=True)[1])
    rows, sums = sums_by(segment, len(example), evidence.rows, evidence.sums)
    shrunk, p = _judged(evidence, evidence.level[example])
    own = (rows >= config.min_exam_rows) & ~np.isnan(p)
    thin = ~own[segment]
    cell = evidence.level[thin] * len(STEPS) + step_of(evidence.support[thin])
    cells, clusters, cell_rows, cell_estimate, cell_p = _test_cells(
        cell, segment[thin], evidence.rows[thin], evidence.sums[thin]
    )
    every = np.concatenate((p[own], cell_p))
    return SegmentVerdicts(
        level=np.concatenate((evidence.level[example[own]], cells // len(STEPS))),
        step=np.concatenate((np.full(int(own.sum()), -1), cells % len(STEPS))),
        key=np.concatenate((evidence.key[example[own]], np.zeros(len(cells), evidence.key.dtype))),
        rows=np.concatenate((rows[own], cell_rows)).astype(np.int64),
        estimate=np.concatenate((sums[own] / rows[own], cell_estimate)),
        shrunk=np.concatenate((shrunk[own], np.full(len(cells), np.nan))),
        p=every,
        harmful=benjamini_hochberg(every, config.false_discovery),
        segments=np.concatenate((np.ones(int(own.sum())), clusters)).astype(np.int64),
    )


def _judged(evidence: SegmentEvidence, level: I64) -> tuple[F64, F64]:
    """Shrunk lift of every segment, where it can be, and the p value of no harm [S]; NaN where nobody can tell.

    Args:
        evidence: what the exams say.
        level: of every segment, by level and key [S].
    """
    shrunk, p = np.full(len(level), np.nan), np.full(len(level), np.nan)
    for number in np.unique(level):
        members, visits = np.flatnonzero(level == number), LevelVisits.of(evidence, int(number))
        assert len(visits.keys) == len(members)  # both in the order of their keys
        owner, known = visits.owner, visits.posteriors()
        count, sums = sums_by(owner, len(members), np.ones(len(owner)), visits.sums)
        estimate = sums / visits.exam_rows
        (spread,) = sums_by(owner, len(members), (visits.sums - estimate[owner] * visits.rows) ** 2)
        by_visits = ~known.trusted & (count >= MIN_CLUSTERS)
        n = count[by_visits]
        variance = n / (n - 1) * spread[by_visits] / visits.exam_rows[by_visits] ** 2
        p[members[by_visits]] = _harm_p(estimate[by_visits], variance, n - 1)
        sure = known.trusted
        shrunk[members[sure]] = known.shrunk[sure]
        alone = _tail(known.mean[sure], np.sqrt(known.variance[sure]))
        p[members[sure]] = np.where(known.shrunk[sure] > 0, alone, 1.0)
    return shrunk, p


def _tail(mean: F64, deviation: F64) -> F64:
    """How probable it is that a normal value is not above zero; without deviation it is as sure as its sign."""
    sign = np.where(mean > 0, np.inf, np.where(mean < 0, -np.inf, 0.0))
    z = np.divide(mean, deviation, out=sign, where=deviation > 0)
    p: F64 = torch.special.ndtr(torch.from_numpy(-z)).numpy()
    return p


def _test_cells(cell: I64, segment: I64, rows: I64, sums: F64) -> tuple[I64, F64, F64, F64, F64]:
    """Tests each cell (level and step) by its segments; cells with fewer than `MIN_CLUSTERS` of them are left out.

    A cluster is a segment within a cell: one whose support grew from night to night counts in both cells.

    Returns:
        Cells ascending, their clusters, rows, difference per row and p value.
    """
    cells, index = np.unique(cell, return_inverse=True)
    cluster, first = groups(index, segment)
    cluster_cell = index[first]
    cluster_rows, cluster_sums = sums_by(cluster, len(first), rows, sums)
    clusters, cell_rows, cell_sums = sums_by(cluster_cell, len(cells), np.ones(len(first)), cluster_rows, cluster_sums)
    estimate = cell_sums / cell_rows
    residual = cluster_sums - estimate[cluster_cell] * cluster_rows
    (spread,) = sums_by(cluster_cell, len(cells), residual**2)
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
