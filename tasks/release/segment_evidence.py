"""What nightly exams say about segments: visits, and the steps of the support curve that segments stand on.

Shapes: E entries, S segments of a level, V visits.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.learning.intervals import F64, I64
from tasks.release.shrinkage import Posteriors, posteriors

LEAST = (1, 2, 4, 8, 16, 32, 64)
"""Least support rows of each step of the support curve; the last one is open."""
STEPS = (*((least, above - 1) for least, above in itertools.pairwise(LEAST)), (LEAST[-1], None))
"""Least and most support rows of segments that are judged together where they have too few exam rows of their own."""


@dataclass(frozen=True)
class SegmentEvidence:
    """What the pooled nightly exams say about segments: an entry per exam, segment and user, in any order.

    An entry is a visit: the rows of one user's night, which resemble each other, as far as the segment served them.
    """

    level: I64
    """[E] ladder level, 0 the finest."""
    key: NDArray[Any]
    """[E] the segment's raw key, which means the same segment in every exam and in every bank."""
    user: NDArray[Any]
    """[E] the user's raw key."""
    support: I64
    """[E] support rows behind the adapter that was examined."""
    rows: I64
    """[E] exam rows."""
    sums: F64
    """[E] sum over those rows of (log-loss with its adapter - log-loss with its parent's)."""
    squares: F64
    """[E] sum over those rows of that difference squared."""


@dataclass(frozen=True)
class LevelVisits:
    """A level's segments and every visit of them.

    A user who is a segment of his own visits it once a night; one of many in a market is one visit of it in all.

    Attributes:
        keys: raw keys of the segments, ascending [S].
        support: most support rows that each was examined with [S].
        owner: whose visit it is, as a number of the segments [V].
        rows: exam rows of each visit [V].
        sums: of the differences over them [V].
        squares: of the differences squared [V].
    """

    keys: NDArray[Any]
    support: I64
    owner: I64
    rows: I64
    sums: F64
    squares: F64

    @classmethod
    def of(cls, evidence: SegmentEvidence, level: int) -> "LevelVisits":
        """The visits of one level."""
        here = evidence.level == level
        keys, segment = np.unique(evidence.key[here], return_inverse=True)
        support = np.zeros(len(keys), np.int64)
        np.maximum.at(support, segment, evidence.support[here])
        columns = (evidence.rows[here], evidence.sums[here], evidence.squares[here])
        user = np.unique(evidence.user[here], return_inverse=True)[1]
        pair, first = groups(segment, user)
        if len(first) == len(keys):
            return cls(keys, support, segment, *columns)
        rows, sums, squares = sums_by(pair, len(first), *columns)
        return cls(keys, support, segment[first], rows.astype(np.int64), sums, squares)

    @cached_property
    def exam_rows(self) -> I64:
        """Exam rows of each segment [S]."""
        return np.bincount(self.owner, self.rows, minlength=len(self.keys)).astype(np.int64)

    def posteriors(self) -> Posteriors:
        """What is known of the segments' lifts."""
        return posteriors(self.owner, step_of(self.support), self.rows, self.sums, self.squares)


def step_of(support: I64) -> I64:
    """Index into `STEPS`."""
    return np.searchsorted(LEAST[1:], support, side="right").astype(np.int64)


def step_name(least: int, most: int | None) -> str:
    """A step in words.

    >>> step_name(1, 1), step_name(4, 7), step_name(64, None)
    ('support 1', 'support 4 to 7', 'support 64+')
    """
    if most is None:
        return f"support {least}+"
    return f"support {least}" if most == least else f"support {least} to {most}"


def groups(major: I64, minor: I64) -> tuple[I64, I64]:
    """Dense index of each pair, and the first place where each distinct pair stands."""
    pair = major * (int(minor.max(initial=0)) + 1) + minor
    _, first, index = np.unique(pair, return_index=True, return_inverse=True)
    return index, first


def sums_by(index: I64, count: int, *columns: NDArray[Any]) -> list[F64]:
    """Sums of columns over the rows of each index."""
    return [np.bincount(index, weights=column, minlength=count).astype(np.float64) for column in columns]
