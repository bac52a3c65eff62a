"""How good predictions are: per row, per user, and one number last.

Every function takes the rows of one objective as flat arrays of equal length N. A row whose label is NaN (missing)
counts nowhere. A figure that is undefined on the rows given (an AUC without negatives, a precision without positive
predictions) is NaN here (None in `summaries`), never a flattering or damning constant.

Nothing loops over users: rows are sorted once and reduced segment by segment.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import TrainingDiverged

FloatArray = NDArray[np.floating[Any]]
F64 = NDArray[np.float64]

CLIP = 1e-7
"""Probabilities are kept this far from 0 and 1: about where a float32 sigmoid saturates."""
BINS = 15
"""Bins of the calibration error."""
CUT = 10
"""Length of the ranked list that NDCG looks at."""


@dataclass(frozen=True)
class ByUser:
    """One figure per user it is defined for, ordered by user."""

    users: NDArray[Any]
    """[U] the users' keys."""
    values: F64
    """[U] the figure of each."""

    @property
    def mean(self) -> float:
        """Mean over users, each counting once; NaN without users."""
        return float(self.values.mean()) if len(self.values) else float("nan")


def log_loss(labels: FloatArray, probabilities: FloatArray) -> F64:
    """Logistic loss of each row: ``-(y log p + (1 - y) log(1 - p))`` in nats, p kept `CLIP` away from 0 and 1.

    Args:
        labels: [N] 0 or 1, NaN where missing.
        probabilities: [N] predicted probability of 1.

    Returns:
        [N] losses, NaN where the label is.

    Raises:
        TrainingDiverged: if a probability of a labelled row is not finite.

    >>> log_loss(np.array([1.0, 0.0, np.nan]), np.array([0.8, 0.8, 0.8])).round(4)
    array([0.2231, 1.6094,    nan])
    """
    known = _known(labels, probabilities)
    p = np.clip(np.where(known, probabilities, 0.5).astype(np.float64), CLIP, 1 - CLIP)
    y = labels.astype(np.float64)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def squared_error(labels: FloatArray, predictions: FloatArray) -> F64:
    """Squared error of each row: ``(prediction - label)²``, NaN where the label is.

    >>> squared_error(np.array([3.0, np.nan]), np.array([5.0, 1.0]))
    array([ 4., nan])
    """
    _known(labels, predictions)
    return (predictions.astype(np.float64) - labels.astype(np.float64)) ** 2


def calibration_error(labels: FloatArray, probabilities: FloatArray, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal mass: ``Σ_bins |Σ (p - y)| / N``.

    Rows are cut into bins by the rank of their probability. Equal probabilities share a bin, so the order of the rows
    does not matter; a constant prediction has one bin, whose error is its bias.

    Args:
        labels: [N] 0 or 1, NaN where missing.
        probabilities: [N] predicted probability of 1.
        bins: how many bins of equal mass.

    Returns:
        The error, in [0, 1]; NaN without labelled rows. Source: Naeini et al. 2015, with equal-mass bins as in
        Nixon et al. 2019.

    >>> calibration_error(np.array([0.0, 1.0, 1.0, 1.0]), np.array([0.1, 0.1, 0.9, 0.9]), bins=2)
    0.25
    """
    y, p = _labelled(labels, probabilities)
    if not len(y):
        return float("nan")
    order = np.argsort(p, kind="stable")
    ranked = p[order]
    first_rank = np.searchsorted(ranked, ranked, side="left")
    gaps = np.bincount(first_rank * bins // len(y), weights=ranked.astype(np.float64) - y[order], minlength=bins)
    return float(np.abs(gaps).sum() / len(y))


def auc_by_user(labels: FloatArray, scores: FloatArray, users: NDArray[Any]) -> ByUser:
    """Area under the ROC curve of each user: the chance that a liked row outscores a disliked one, ties counting half.

    ``(R - P (P + 1) / 2) / (P Q)`` with P positives, Q negatives and R the positives' summed mid-ranks (Mann–Whitney).

    Args:
        labels: [N] 0 or 1, NaN where missing.
        scores: [N] higher means more likely.
        users: [N] whose row it is.

    Returns:
        The users that have both classes.

    >>> auc_by_user(np.array([1.0, 0, 0, 1, 0, 1]), np.array([3.0, 2, 3, 1, 0, 0]), np.array([7, 7, 7, 8, 8, 9]))
    ByUser(users=array([7, 8]), values=array([0.75, 1.  ]))
    """
    known = _known(labels, scores)
    y, s, u = labels[known].astype(np.float64), scores[known], users[known]
    if not len(y):
        return ByUser(u, np.empty(0))
    order = np.lexsort((s, u))
    y, s, u = y[order], s[order], u[order]
    user_starts = _starts(u)
    tie_starts = np.flatnonzero(_changes(u) | _changes(s))
    tie_sizes = np.diff(np.append(tie_starts, len(y)))
    position = tie_starts + (tie_sizes - 1) / 2 + 1
    mid_rank = np.repeat(position, tie_sizes) - np.repeat(user_starts, np.diff(np.append(user_starts, len(y))))
    positives = np.add.reduceat(y, user_starts)
    negatives = np.add.reduceat(1 - y, user_starts)
    rank_sums = np.add.reduceat(y * mid_rank, user_starts)
    both = (positives > 0) & (negatives > 0)
    positives, negatives, rank_sums = positives[both], negatives[both], rank_sums[both]
    return ByUser(u[user_starts][both], (rank_sums - positives * (positives + 1) / 2) / (positives * negatives))


def auc(labels: FloatArray, scores: FloatArray) -> float:
    """Area under the ROC curve over all rows, whoever they are from; NaN unless both classes are there.

    >>> auc(np.array([1.0, 0, 1, 0]), np.array([0.9, 0.1, 0.5, 0.5]))
    0.875
    """
    return auc_by_user(labels, scores, np.zeros(len(labels), np.int64)).mean


def ndcg_by_user(
    labels: FloatArray, scores: FloatArray, users: NDArray[Any], ties: NDArray[Any], cut: int = CUT
) -> ByUser:
    """Normalised discounted cumulative gain of each user's first `cut` rows, ranked by score.

    ``Σ_r y_r / log2(r + 1)`` over ranks 1 to `cut`, divided by the same sum of the best order. Gains are the labels.

    Args:
        labels: [N] 0 or 1, NaN where missing.
        scores: [N] higher means ranked earlier.
        users: [N] whose row it is.
        ties: [N] a digest of each row that knows nothing of labels; the smaller one goes first among equal scores.
        cut: length of the list.

    Returns:
        The users that have at least one positive. Source: Järvelin and Kekäläinen 2002.

    >>> labels, scores, users = np.array([0.0, 1, 1, 0]), np.array([9.0, 8, 1, 1]), np.array([4, 4, 4, 5])
    >>> ndcg_by_user(labels, scores, users, ties=np.arange(4)).values.round(4)
    array([0.6934])
    """
    known = _known(labels, scores)
    y, s, u, tie = labels[known].astype(np.float64), scores[known].astype(np.float64), users[known], ties[known]
    if not len(y):
        return ByUser(u, np.empty(0))
    order = np.lexsort((tie, -s, u))
    y, u = y[order], u[order]
    starts = _starts(u)
    sizes = np.diff(np.append(starts, len(u)))
    rank = np.arange(len(u)) - np.repeat(starts, sizes)
    discount = np.where(rank < cut, 1 / np.log2(rank + 2.0), 0.0)
    gained = np.add.reduceat(y * discount, starts)
    positives = np.add.reduceat(y, starts).astype(np.int64)
    best = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(cut) + 2.0))))[np.minimum(positives, cut)]
    some = positives > 0
    return ByUser(u[starts][some], gained[some] / best[some])


@dataclass(frozen=True)
class Decisions:
    """What follows from calling every row with a probability of at least one half positive."""

    accuracy: float
    """Share of rows called rightly."""
    precision: float
    """Share of positive calls that are right; NaN if nothing is called positive."""
    recall: float
    """Share of positives that are called; NaN if there are none."""
    f1: float
    """``2 TP / (2 TP + FP + FN)``; NaN if there is neither a positive nor a positive call."""


def decisions(labels: FloatArray, probabilities: FloatArray) -> Decisions:
    """Accuracy, precision, recall and F1 at the threshold 0.5.

    >>> decisions(np.array([1.0, 1, 0, 0, np.nan]), np.array([0.9, 0.2, 0.5, 0.1, 0.9]))
    Decisions(accuracy=0.5, precision=0.5, recall=0.5, f1=0.5)
    """
    y, p = _labelled(labels, probabilities)
    called, positive = p >= 0.5, y > 0.5
    right = int((called & positive).sum())
    calls, positives = int(called.sum()), int(positive.sum())
    return Decisions(
        accuracy=ratio(int((called == positive).sum()), len(y)),
        precision=ratio(right, calls),
        recall=ratio(right, positives),
        f1=ratio(2 * right, calls + positives),
    )


def mean_absolute_error(labels: FloatArray, predictions: FloatArray) -> float:
    """Mean of ``|prediction - label|`` over labelled rows, in the label's unit; NaN without any.

    >>> mean_absolute_error(np.array([3.0, 5.0, np.nan]), np.array([4.0, 2.0, 9.0]))
    2.0
    """
    y, p = _labelled(labels, predictions)
    return ratio(float(np.abs(p.astype(np.float64) - y).sum()), len(y))


def root_mean_squared_error(labels: FloatArray, predictions: FloatArray) -> float:
    """``sqrt(mean (prediction - label)²)`` over labelled rows, in the label's unit; NaN without any.

    >>> root_mean_squared_error(np.array([3.0, 5.0]), np.array([4.0, 12.0]))
    5.0
    """
    y, p = _labelled(labels, predictions)
    return sqrt(ratio(float(((p.astype(np.float64) - y) ** 2).sum()), len(y)))


def adaptation_fitness(after: F64, before: F64) -> float:
    """Loss after adaptation over loss before it, ``Σ after / Σ before``: below 1 means that adapting pays.

    Args:
        after: [N] losses of the adapted predictions, NaN where the label is missing.
        before: [N] losses of the same rows with zero steps.

    Returns:
        The ratio; NaN if there was no loss to begin with.

    >>> adaptation_fitness(np.array([0.25, 0.5, np.nan]), np.array([0.5, 1.0, np.nan]))
    0.5
    """
    known = ~(np.isnan(after) | np.isnan(before))
    return ratio(float(after[known].sum()), float(before[known].sum()))


def _known(labels: FloatArray, scores: FloatArray) -> NDArray[np.bool_]:
    """Rows that have a label.

    Raises:
        TrainingDiverged: if a score of such a row is not finite.
    """
    known: NDArray[np.bool_] = ~np.isnan(labels)
    if broken := int((~np.isfinite(scores[known])).sum()):
        raise TrainingDiverged(
            f"{broken:,} of {int(known.sum()):,} predictions are not finite (limit 0); look at the learning curve and "
            "lower training.learning_rate, or raise adapters' regularisation"
        )
    return known


def _labelled(labels: FloatArray, scores: FloatArray) -> tuple[F64, FloatArray]:
    known = _known(labels, scores)
    return labels[known].astype(np.float64), scores[known]


def _changes(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a new value begins in a non-empty array whose equal values stand together."""
    return np.concatenate(([True], ordered[1:] != ordered[:-1]))


def _starts(ordered: NDArray[Any]) -> NDArray[np.intp]:
    return np.flatnonzero(_changes(ordered))


def ratio(part: float, whole: float) -> float:
    """A quotient, NaN where it is undefined."""
    return part / whole if whole else float("nan")
