"""What answers a request: the champion, and where there is one the challenger for its share of the users."""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.errors import NightrankError, ReleaseRefused, RequestRejected
from tasks.release.manifest import Manifest
from tasks.serving.batcher import Batcher
from tasks.serving.events import Events, Role
from tasks.serving.guards import ConstantWatch, require_finite
from tasks.serving.loaded import LoadedRelease
from tasks.serving.requests import Arrays, read_request
from tasks.serving.split import challenged

F32 = npt.NDArray[np.float32]
log = logging.getLogger("nightrank.ranker")


@dataclass(frozen=True)
class Ranked:
    """A candidate in its place.

    Attributes:
        position: 1 for the best.
        item: the item's raw key.
        scores: objective to probability or expected value.
    """

    position: int
    item: str | int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """Scores, and whose they are.

    Attributes:
        manifest: of the champion.
        items: raw keys of the candidates, [R, M].
        scores: probabilities (binary objectives) or expected values (ratings), float32 [R, M, K].
        releases: id of the release that scored each request [R]: the champion, or its challenger.
    """

    manifest: Manifest
    items: npt.NDArray[np.generic]
    scores: F32
    releases: tuple[str, ...]

    def ranked(self) -> list[list[Ranked]]:
        """The candidates of each request by the first objective, best first; ties keep the request's order."""
        items, values = self.items.tolist(), self.scores.astype(float).tolist()
        names = [objective.name for objective in self.manifest.interface.objectives]
        order = np.argsort(-self.scores[..., 0], axis=1, kind="stable").tolist()
        return [
            [
                Ranked(place, items[request][one], dict(zip(names, values[request][one], strict=True)))
                for place, one in enumerate(ranking, start=1)
            ]
            for request, ranking in enumerate(order)
        ]


class Champion:
    """One state of a ranker: the releases that answer from one look at the pointer to the next.

    Requests in flight finish on the state that they began with.
    """

    def __init__(
        self, release: LoadedRelease, events: Events, batcher: Batcher | None, watch: ConstantWatch | None = None
    ) -> None:
        self.release = release
        self.watch = watch or ConstantWatch()
        self._events, self._batcher = events, batcher

    def answer(self, request: Mapping[str, object]) -> Answer:
        """Score a request.

        Raises:
            RequestRejected: it does not fit the release's inputs.
            ReleaseRefused: the release gives something that is no answer.
        """
        try:
            release = self.release
            inputs, shape = read_request(release.manifest.interface.inputs, request, release.hasher, release.binary)
        except RequestRejected:
            self._events.rejected()
            raise
        return self._score(inputs, shape)

    def _score(self, inputs: Arrays, shape: tuple[int, int]) -> Answer:
        scores = self._run("champion", self.release, self.watch, inputs, shape)
        manifest = self.release.manifest
        return Answer(manifest, inputs[self.release.item], scores, (manifest.release,) * shape[0])

    def _run(
        self, role: Role, release: LoadedRelease, watch: ConstantWatch, inputs: Arrays, shape: tuple[int, int]
    ) -> F32:
        began = time.perf_counter()
        try:
            run = release.run if self._batcher is None else lambda *asked: self._batched(release, *asked)
            scores = run(inputs, shape)
            require_finite(release.manifest, scores)
        except Exception:
            self._events.failed(role)
            raise
        watch.add(scores)
        self._events.answered(role, shape[0], shape[0] * shape[1], time.perf_counter() - began)
        self._events.constant(role, watch.share)
        return scores

    def _batched(self, release: LoadedRelease, inputs: Arrays, shape: tuple[int, int]) -> F32:
        assert self._batcher is not None
        return self._batcher.run(release, inputs, shape)


class Contest(Champion):
    """A champion, and a challenger that answers a share of the users.

    A challenger that gives no numbers, or constant scores to most of its users, has lost: from then on the champion
    answers everybody, until the pointer moves.
    """

    def __init__(
        self,
        release: LoadedRelease,
        challenger: LoadedRelease,
        share: int,
        events: Events,
        batcher: Batcher | None,
        watch: ConstantWatch | None = None,
    ) -> None:
        """Begin.

        Raises:
            ReleaseRefused: the challenger takes other inputs or has other objectives, so that no request fits both.
        """
        super().__init__(release, events, batcher, watch)
        self.challenger, self.share = challenger, share
        self.lost: str | None = None
        self._losing = threading.Lock()
        self._challengers_watch = ConstantWatch()
        if _asks(release) != _asks(challenger):
            raise ReleaseRefused(
                f"challenger {challenger.manifest.release[:12]} takes other inputs or has other objectives than "
                f"champion {release.manifest.release[:12]}; promote it, or challenge with one of its contract"
            )

    def _score(self, inputs: Arrays, shape: tuple[int, int]) -> Answer:
        theirs = self._theirs(inputs)
        if not theirs.any():
            return super()._score(inputs, shape)
        releases = [self.release.manifest.release] * shape[0]
        scores = np.zeros((*shape, len(self.release.manifest.interface.objectives)), np.float32)
        try:
            scores[theirs] = self._challenge(_rows(inputs, theirs), (int(theirs.sum()), shape[1]))
        except Exception as error:  # whatever it is, its users must not be without an answer
            log.warning("the challenger failed", exc_info=None if isinstance(error, NightrankError) else error)
            self._lose(f"{type(error).__name__}: {error}")
            return super()._score(inputs, shape)
        for at in np.flatnonzero(theirs).tolist():
            releases[at] = self.challenger.manifest.release
        if not theirs.all():
            ours = super()._score(_rows(inputs, ~theirs), (int((~theirs).sum()), shape[1]))
            scores[~theirs] = ours.scores
        return Answer(self.release.manifest, inputs[self.release.item], scores, tuple(releases))

    def _theirs(self, inputs: Arrays) -> npt.NDArray[np.bool_]:
        """Requests that are the challenger's."""
        column = self.release.user
        missing = next(spec.missing for spec in self.release.manifest.interface.inputs if spec.name == column)
        users = inputs[column]
        if self.lost is not None:
            return np.zeros(len(users), bool)
        return challenged(users.tolist(), missing, self.challenger.manifest.release, self.share)

    def _challenge(self, inputs: Arrays, shape: tuple[int, int]) -> F32:
        scores = self._run("challenger", self.challenger, self._challengers_watch, inputs, shape)
        if self._challengers_watch.broken:
            raise ReleaseRefused(
                f"challenger {self.challenger.manifest.release[:12]} gave all candidates the same score in "
                f"{self._challengers_watch.share:.0%} of its last answers; look at its exam"
            )
        return scores

    def _lose(self, reason: str) -> None:
        with self._losing:
            if self.lost is not None:
                return
            self.lost = reason
        log.warning("the champion answers the challenger's users: %s", reason)
        self._events.fell_back(reason)


def _rows(inputs: Arrays, which: npt.NDArray[np.bool_]) -> Arrays:
    return {name: values[which] for name, values in inputs.items()}


def _asks(release: LoadedRelease) -> object:
    """What a request must hold, and what the scores mean."""
    interface = release.manifest.interface
    inputs = tuple(
        (one.name, one.per, one.dtype, one.missing, one.values, one.of, one.personal, one.rows)
        for one in interface.inputs
    )
    return inputs, interface.objectives
