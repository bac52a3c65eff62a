"""Empirical Bayes: what many segments' means say together about how far each of them is to be believed.

Shapes: S segments, V visits (a visit: rows of one user that resemble each other).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.learning.intervals import F64, I64, MIN_CLUSTERS

TRUSTED = 30
"""Segments, and visits beyond the first of each, from which a stratum can tell its noise and its spread."""


@dataclass(frozen=True)
class Posteriors:
    """What is known of the true lift of each segment; NaN where there are too few beside it to tell.

    Attributes:
        mean: measured [S].
        variance: of that measurement [S].
        shrunk: expected true lift, given the mean and all segments of the stratum [S].
        deviation: standard deviation of the true lift around it [S].
        trusted: whether its stratum has `TRUSTED` segments and as many visits beyond their first [S].
    """

    mean: F64
    variance: F64
    shrunk: F64
    deviation: F64
    trusted: NDArray[np.bool_]


def posteriors(segment: I64, stratum: I64, rows: I64, sums: F64, squares: F64) -> Posteriors:
    """Lifts of one level's segments, measured and shrunk within strata.

    Weights with more support have moved further, and what they change varies more from row to row: segments of another
    stratum tell nothing of their noise. Strata with fewer than `TRUSTED` are taken together.

    Args:
        segment: whose visit it is, from 0 without a gap [V].
        stratum: of each segment, from 0 [S].
        rows: of each visit, at least one [V].
        sums: of the differences over them [V].
        squares: of the differences squared [V].
    """
    more = np.bincount(stratum, np.bincount(segment, minlength=len(stratum)) - 1)
    few = (more < TRUSTED) | (np.bincount(stratum) < TRUSTED)
    pooled = np.where(few[stratum], -1, stratum)
    nothing = [np.full(len(stratum), np.nan) for _ in range(4)]
    found = Posteriors(nothing[0], nothing[1], nothing[2], nothing[3], trusted=np.zeros(len(stratum), bool))
    for one in np.unique(pooled):
        members, here = np.flatnonzero(pooled == one), pooled[segment] == one
        told = measured(np.searchsorted(members, segment[here]), rows[here], sums[here], squares[here])
        if told is None:
            continue
        found.mean[members], found.variance[members] = told
        found.shrunk[members], found.deviation[members] = shrink(*told)
        found.trusted[members] = min(len(members), int(here.sum()) - len(members)) >= TRUSTED
    return found


def measured(segment: I64, rows: I64, sums: F64, squares: F64) -> tuple[F64, F64] | None:
    """Mean of every segment [E] and the variance of that mean, from its visits; None: too few to tell.

    Rows of a visit resemble each other, so a mean has two parts of noise: that of its rows and that of its visits. Few
    segments can tell their own; both variances are those of all segments together, by moments (Searle, Casella and
    McCulloch, Variance Components, 1992, chapter 3, unbalanced data).

    Args:
        segment: whose visit it is, from 0 without a gap [V].
        rows: of each visit, at least one [V].
        sums: of the measured values over them [V].
        squares: of the values squared [V].

    Returns:
        None where fewer than `MIN_CLUSTERS` segments have two visits or more: there is no telling what is the segment's
        and what the visit's.
    """
    visits = np.bincount(segment)
    if np.count_nonzero(visits > 1) < MIN_CLUSTERS:
        return None
    size = rows.astype(np.float64)
    count, of_visit = np.bincount(segment, size), sums / size
    mean = np.bincount(segment, sums) / count
    total, within = float(size.sum()), float(np.maximum(squares - sums * of_visit, 0.0).sum())
    of_a_row = within / max(1.0, total - len(size))
    share = np.bincount(segment, size**2)
    between = float((size * (of_visit - mean[segment]) ** 2).sum()) - (len(size) - len(count)) * of_a_row
    of_a_visit = max(0.0, between / (total - float((share / count).sum())))
    return mean, of_a_row / count + of_a_visit * share / count**2


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
