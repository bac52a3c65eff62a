"""What ranked lists are like beside accurate: how much of a catalogue they show, how evenly, how much to each his own.

A model that shows everybody the same ten items can be as accurate as one that does not. Everything here is computed
from how often each item is shown; nothing compares users, or a list's items, pair by pair.

Shapes: U users (one list each), L items of a list, C candidates, F categorical columns.
"""

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]


def coverage(lists: I64, candidates: int) -> float:
    """Share of the candidates that anybody is shown: catalogue coverage.

    It is at most ``U L / C``, so it compares methods on the same users and candidates, never nights of different size.
    Herlocker et al., Evaluating Collaborative Filtering Recommender Systems, 2004; Ge, Delgado-Battenfeld and Jannach,
    Beyond Accuracy: Evaluating Recommender Systems by Coverage and Serendipity, 2010.

    Args:
        lists: numbers of the candidates shown ``[U, L]``, distinct within a list.
        candidates: C.

    >>> coverage(np.array([[0, 1], [1, 2]]), 6)
    0.5
    """
    return len(np.unique(lists)) / candidates


def gini(lists: I64, candidates: int) -> float:
    """How unevenly exposure is spread: 0 where each candidate is shown as often, near 1 where few have it all.

    The Gini index: with exposures n ascending, ``Σ_i (2 i - C - 1) n_i / (C Σ_i n_i)``; candidates that nobody is shown
    count. Everybody shown the same L gives ``1 - L / C``, and no spread of U L places is below ``1 - U L / C``. Shani
    and Gunawardana, Evaluating Recommendation Systems, 2011, who divide by C - 1 instead of C.

    Args:
        lists: numbers of the candidates shown ``[U, L]``.
        candidates: C.

    >>> gini(np.array([[0, 1], [0, 1]]), 8), gini(np.array([[0, 1], [2, 3]]), 4)
    (0.75, 0.0)
    """
    shown = np.sort(np.bincount(lists.ravel(), minlength=candidates)).astype(np.float64)
    place = 2.0 * np.arange(1, candidates + 1) - candidates - 1
    return float(place @ shown / (candidates * shown.sum()))


def personalisation(lists: I64) -> float | None:
    """One minus the share of their lists that two users have in common, on average over all pairs of users.

    An item that n users are shown is common to ``n (n - 1) / 2`` pairs, so the sum over pairs is one over items. Zhou
    et al., Solving the Apparent Diversity-Accuracy Dilemma of Recommender Systems, 2010 (there: inter-user diversity).

    Args:
        lists: numbers of the candidates shown ``[U, L]``, distinct within a list.

    Returns:
        0 where all are shown the same, 1 where no two share an item; None with fewer than two users.

    >>> personalisation(np.array([[0, 1], [1, 2], [3, 4]]))
    0.8333333333333334
    """
    users, length = lists.shape
    if users < 2:
        return None
    shown = np.bincount(lists.ravel()).astype(np.float64)
    return float(1.0 - (shown * (shown - 1.0)).sum() / (users * (users - 1.0) * length))


def diversity(lists: I64, categories: I64) -> float | None:
    """How often two items of a list differ in a category, on average over lists and columns: intra-list diversity.

    With ``n_g`` items of a list in category g, ``1 - Σ_g n_g (n_g - 1) / (L (L - 1))``. A missing category is one of
    its own. Ziegler et al., Improving Recommendation Lists Through Topic Diversification, 2005, with distances 0 and 1.

    Args:
        lists: numbers of the candidates shown ``[U, L]``.
        categories: categories of the candidates, any non-negative ids ``[C, F]``.

    Returns:
        None without a column, and for lists of one item.

    >>> diversity(np.array([[0, 1, 2]]), np.array([[7], [7], [9]]))
    0.6666666666666667
    """
    users, length = lists.shape
    if categories.shape[1] == 0 or length < 2 or users == 0:
        return None
    found: list[float] = []
    owner = np.repeat(np.arange(users), length)
    for column in categories.T:
        group = np.unique(column, return_inverse=True)[1]
        alike = np.unique(owner * len(group) + group[lists.ravel()], return_counts=True)[1]
        found.append(float(1.0 - (alike * (alike - 1.0)).sum() / (users * length * (length - 1.0))))
    return float(np.mean(found))
