"""Guards against releases that answer, and whose answers are worth nothing: no numbers, or the same for everything.

A digest proves that a release is as it was built, a golden request that it computes here what it computed there.
Neither says that a ranking comes out of it. So a release whose golden requests do not tell one candidate from another
is refused, and while it serves its answers are watched.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tasks.errors import ReleaseRefused
from tasks.release.manifest import Manifest

F32 = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[np.generic]]
SAME = 1e-7
"""Scores of one request that differ by no more than this, relative to 1 + the score, are the same."""
WINDOW = 1_000
"""Requests that are looked back on."""
LEAST = 200
"""Requests before there is a verdict."""
MOST = 0.5
"""Share of constant answers above which a release is held to be broken."""


def require_finite(manifest: Manifest, scores: F32) -> None:
    """Refuse scores [R, M, K] that are no numbers.

    Raises:
        ReleaseRefused: names the first of them.
    """
    finite = np.isfinite(scores)
    if not finite.all():
        request, candidate, objective = np.argwhere(~finite)[0].tolist()
        raise ReleaseRefused(
            f"release {manifest.release[:12]} gives {scores[request, candidate, objective]} for request {request}, "
            f"candidate {candidate}, objective {objective}; roll back to an earlier release"
        )


def constant(scores: F32) -> npt.NDArray[np.bool_]:
    """Which requests of scores [R, M, K] have the same first score for all of their candidates, two or more.

    >>> constant(np.array([[[0.5], [0.5]], [[0.5], [0.6]]], np.float32)).tolist()
    [True, False]
    """
    first = scores[..., 0]
    if first.shape[1] < 2:
        return np.zeros(0, bool)
    low, high = first.min(axis=1), first.max(axis=1)
    same: npt.NDArray[np.bool_] = high - low <= SAME * (1.0 + np.abs(high))
    return same


def require_variety(
    manifest: Manifest, golden: Sequence[tuple[Arrays, tuple[int, int], F32]], answers: Sequence[F32]
) -> None:
    """Refuse a release that scores every candidate of every golden request alike.

    Args:
        manifest: of the release.
        golden: inputs, (R, M) and expected scores of its golden requests.
        answers: what it answers [R, M, K] each.

    Raises:
        ReleaseRefused: there are requests with candidates that differ, and none is answered with different scores.
    """
    names = [spec.name for spec in manifest.interface.inputs if spec.per == "candidate"]
    judged = 0
    for (inputs, _, _), answer in zip(golden, answers, strict=True):
        differ = np.zeros(len(answer), bool)
        for name in names:
            values = inputs[name].reshape(*answer.shape[:2], -1)
            differ |= ((values != values[:, :1]) & ((values == values) | (values[:, :1] == values[:, :1]))).any((1, 2))
        if differ.any():
            judged += int(differ.sum())
            if not constant(answer)[differ].all():
                return
    if judged:
        raise ReleaseRefused(
            f"release {manifest.release[:12]} of night {manifest.night} is refused: its scores are constant: {judged} "
            f"golden requests have candidates that differ, and each gives all of them the same; look at its exam"
        )


class ConstantWatch:
    """The share of a release's recent answers that ranked nothing. Any number of threads may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._constant = 0

    def add(self, scores: F32) -> None:
        """Look at scores [R, M, K]."""
        found = constant(scores).tolist()
        with self._lock:
            for one in found:
                if len(self._recent) == WINDOW:
                    self._constant -= self._recent[0]
                self._recent.append(one)
                self._constant += one

    @property
    def share(self) -> float:
        """Share of the last answers that were constant; 0 before there were any."""
        with self._lock:
            return self._constant / len(self._recent) if self._recent else 0.0

    @property
    def broken(self) -> bool:
        """Whether too many of enough answers were constant."""
        with self._lock:
            return len(self._recent) >= LEAST and self._constant > MOST * len(self._recent)
