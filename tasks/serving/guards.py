"""Guards against releases that answer, and whose answers are worth nothing: no numbers, or the same for everything.

A digest proves that a release is as it was built, a golden request that it computes here what it computed there.
Neither says that a ranking comes out of it. So a release whose golden requests do not tell one candidate from another
is refused, and while it serves its answers are watched.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence

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
SPREAD = 10
"""Users, and lists of candidates, that constant answers must come from: one caller who probes is no proof."""


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


def candidates_differ(manifest: Manifest, inputs: Arrays) -> npt.NDArray[np.bool_]:
    """Which requests have candidates that differ in a column [R]; two missing numbers do not."""
    columns = [inputs[spec.name] for spec in manifest.interface.inputs if spec.per == "candidate"]
    differ = np.zeros(len(columns[0]), bool)
    for column in columns:
        values = column.reshape(*column.shape[:2], -1)
        differ |= ((values != values[:, :1]) & ((values == values) | (values[:, :1] == values[:, :1]))).any((1, 2))
    return differ


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
    judged = 0
    for (inputs, _, _), answer in zip(golden, answers, strict=True):
        differ = candidates_differ(manifest, inputs)
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
    """The share of a release's recent answers that ranked nothing. Any number of threads may add to it.

    A constant answer counts where the candidates differ, and the same user with the same candidates counts once among
    the answers that are looked back on. Other answers have told candidates apart and all count.
    """

    def __init__(self, lists: int = SPREAD) -> None:
        """Begin with nothing.

        Args:
            lists: different lists of candidates that constant answers must come from before there is a verdict.
        """
        self._lists = lists
        self._lock = threading.Lock()
        self._recent: deque[tuple[int, int] | None] = deque(maxlen=WINDOW)
        self._constant: set[tuple[int, int]] = set()
        self._users: Counter[int] = Counter()
        self._candidates: Counter[int] = Counter()

    def add(
        self,
        manifest: Manifest,
        inputs: Arrays,
        scores: F32,
        told_apart: Callable[[npt.NDArray[np.bool_]], npt.NDArray[np.bool_]] | None = None,
    ) -> None:
        """Look at an answer.

        Args:
            manifest: of the release.
            inputs: what it was asked, R requests.
            scores: what it answered [R, M, K].
            told_apart: asked for constant answers that would count: given which requests [R] they are of, says for each
                of these whether another release tells its candidates apart. Where not, the answer does not count.
        """
        same = constant(scores)
        new = same.copy()
        if same.any():
            new[same] = candidates_differ(manifest, {name: values[same] for name, values in inputs.items()})
        asked = {at: _asked(manifest, inputs, at) for at in np.flatnonzero(new).tolist()}
        with self._lock:
            for at, key in asked.items():
                new[at] = key not in self._constant
        if told_apart is not None and new.any():
            new[new] = told_apart(new)
        with self._lock:
            for at, one in enumerate(same.tolist()):
                if not one:
                    self._append(None)
                elif new[at] and asked[at] not in self._constant:
                    self._append(asked[at])

    def _append(self, key: tuple[int, int] | None) -> None:
        if len(self._recent) == WINDOW and (gone := self._recent[0]) is not None:
            self._constant.remove(gone)
            for counted, part in zip((self._users, self._candidates), gone, strict=True):
                counted[part] -= 1
                if not counted[part]:
                    del counted[part]
        self._recent.append(key)
        if key is not None:
            self._constant.add(key)
            self._users[key[0]] += 1
            self._candidates[key[1]] += 1

    @property
    def share(self) -> float:
        """Share of the last answers that were constant; 0 before there were any."""
        with self._lock:
            return len(self._constant) / len(self._recent) if self._recent else 0.0

    @property
    def broken(self) -> bool:
        """Whether too many of enough answers were constant, of enough users and lists of candidates."""
        with self._lock:
            spread = len(self._users) >= SPREAD and len(self._candidates) >= self._lists
            return spread and len(self._recent) >= LEAST and len(self._constant) > MOST * len(self._recent)


def _asked(manifest: Manifest, inputs: Arrays, request: int) -> tuple[int, int]:
    """Who asks, and about what: hashes of the user, or of all that is known of him where he has no key; of the list."""
    specs = manifest.interface.inputs
    user = next(spec for spec in specs if spec.per == "request")
    nobody = inputs[user.name][request] == user.missing
    own = [spec.name for spec in specs if spec.per == "request"] if nobody else [user.name]
    candidates = [spec.name for spec in specs if spec.per == "candidate"]

    def hashed(names: Sequence[str]) -> int:
        return hash(tuple(_hashable(inputs[name][request]) for name in names))

    return hashed(own), hashed(candidates)


def _hashable(values: npt.NDArray[np.generic]) -> Hashable:
    """The values of a column in one request as something that equals itself, missing numbers included."""
    array = np.asarray(values)
    return tuple(array.ravel().tolist()) if array.dtype == object else array.tobytes()
