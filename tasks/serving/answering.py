"""What answers a request: the champion, and where there is one the challenger for its share of the users."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tasks.errors import NightrankError, ReleaseRefused, RequestRejected
from tasks.release.manifest import Manifest
from tasks.serving.batcher import Batcher
from tasks.serving.events import Events, Role
from tasks.serving.feedback import bounds_of
from tasks.serving.guards import ConstantWatch, constant, require_finite
from tasks.serving.loaded import LoadedRelease, without_feedback
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
        self._bounds = [bounds_of(objective) for objective in release.manifest.interface.objectives]

    def answer(self, request: Mapping[str, object]) -> Answer:
        """Score a request.

        Raises:
            RequestRejected: it does not fit the release's inputs, or its feedback cannot be solved.
            ReleaseRefused: the release gives something that is no answer.
        """
        release = self.release
        specs = release.manifest.interface.inputs
        try:
            inputs, shape = read_request(specs, request, release.hasher, release.binary, self._bounds)
            return self._score(inputs, shape)
        except RequestRejected:
            self._events.rejected()
            raise

    def _score(self, inputs: Arrays, shape: tuple[int, int]) -> Answer:
        scores = self._run("champion", self.release, self.watch, inputs, shape, self._rival())
        manifest = self.release.manifest
        return Answer(manifest, inputs[self.release.item], scores, (manifest.release,) * shape[0])

    def _rival(self) -> LoadedRelease | None:
        """Another release that the champion's answers may be compared with."""
        return None

    def _run(
        self,
        role: Role,
        release: LoadedRelease,
        watch: ConstantWatch,
        inputs: Arrays,
        shape: tuple[int, int],
        rival: LoadedRelease | None,
    ) -> F32:
        """Scores that are numbers, told to whoever listens; a constant one counts where the rival's is none."""
        began = time.perf_counter()
        try:
            scores = self._numbers(release, inputs, shape)
        except RequestRejected:
            raise
        except Exception:
            self._events.failed(role)
            raise
        took = time.perf_counter() - began
        told_apart = None if rival is None else partial(self._told_apart, rival, inputs, shape)
        watch.add(release.manifest, inputs, scores, told_apart)
        self._events.answered(role, shape[0], shape[0] * shape[1], took)
        self._events.constant(role, watch.share)
        return scores

    def _numbers(self, release: LoadedRelease, inputs: Arrays, shape: tuple[int, int]) -> F32:
        """Scores that are numbers; where they are none, it is found out whether feedback is to blame.

        Raises:
            RequestRejected: without their feedback all of the requests in question have scores.
            ReleaseRefused: they have none either.
        """
        scores = self._scores(release, inputs, shape)
        bad: npt.NDArray[np.bool_] = np.asarray(~np.isfinite(scores).all(axis=(1, 2)))
        count, plain = int(bad.sum()), without_feedback(release.manifest, inputs)
        suspect = count > 0 and len(plain) < len(inputs)
        if suspect and np.isfinite(self._scores(release, _rows(plain, bad), (count, shape[1]))).all():
            raise RequestRejected(
                f"the feedback of {count} of {shape[0]} requests cannot be solved: with it release "
                f"{release.manifest.release[:12]} gives scores that are no numbers, without it numbers; look at "
                f"the values in {', '.join(sorted(inputs.keys() - plain.keys()))}, or leave them out"
            )
        require_finite(release.manifest, scores)
        return scores

    def _scores(self, release: LoadedRelease, inputs: Arrays, shape: tuple[int, int]) -> F32:
        return release.run(inputs, shape) if self._batcher is None else self._batcher.run(release, inputs, shape)

    def _told_apart(
        self, rival: LoadedRelease, inputs: Arrays, shape: tuple[int, int], which: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """Of these requests, those whose candidates a rival tells apart."""
        count = int(which.sum())
        try:
            return ~constant(self._scores(rival, _rows(inputs, which), (count, shape[1])))
        except Exception:  # whatever it is, the request is answered already
            log.warning("release %s cannot be compared with", rival.manifest.release[:12], exc_info=True)
            return np.zeros(count, bool)


class Contest(Champion):
    """A champion, and a challenger that answers a share of the users.

    A challenger has lost where two users got no numbers from it and numbers from the champion, or where it gives
    constant scores to most requests whose candidates the champion tells apart: from then on the champion answers
    everybody, until the pointer moves.
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
        self._challengers_watch = ConstantWatch(lists=1)
        self._failed_for: set[object] = set()
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
            unknown = None if isinstance(error, NightrankError) else error
            log.warning("the challenger failed: %s", error, exc_info=unknown)
            answer = super()._score(inputs, shape)  # raises where the champion has none either: no proof then
            self._blame(error, _rows(inputs, theirs), (int(theirs.sum()), shape[1]))
            return answer
        if self._challengers_watch.broken:
            self._lose(
                f"challenger {self.challenger.manifest.release[:12]} gave all candidates the same score in "
                f"{self._challengers_watch.share:.0%} of its last answers, and the champion did not; look at its exam"
            )
            return super()._score(inputs, shape)
        for at in np.flatnonzero(theirs).tolist():
            releases[at] = self.challenger.manifest.release
        if not theirs.all():
            ours = super()._score(_rows(inputs, ~theirs), (int((~theirs).sum()), shape[1]))
            scores[~theirs] = ours.scores
        return Answer(self.release.manifest, inputs[self.release.item], scores, tuple(releases))

    def _rival(self) -> LoadedRelease | None:
        return self.challenger if self.lost is None else None

    def _theirs(self, inputs: Arrays) -> npt.NDArray[np.bool_]:
        """Requests that are the challenger's."""
        column = self.release.user
        missing = next(spec.missing for spec in self.release.manifest.interface.inputs if spec.name == column)
        users = inputs[column]
        if self.lost is not None:
            return np.zeros(len(users), bool)
        return challenged(users.tolist(), missing, self.challenger.manifest.release, self.share)

    def _challenge(self, inputs: Arrays, shape: tuple[int, int]) -> F32:
        return self._run("challenger", self.challenger, self._challengers_watch, inputs, shape, self.release)

    def _blame(self, error: Exception, inputs: Arrays, shape: tuple[int, int]) -> None:
        """Note whom the challenger failed, of several users in a call by halves; of two it loses."""
        if isinstance(error, RequestRejected):
            self._events.failed("challenger")
        users = inputs[self.release.user].tolist()
        new = np.array([at for at, user in enumerate(users) if user not in self._failed_for], np.int64)
        for at, found in self._failures(inputs, new, shape[1], error if len(new) == shape[0] else None):
            with self._losing:
                self._failed_for.add(users[at])
            if len(self._failed_for) > 1:
                self._lose(f"{type(found).__name__}: {found}")
                return

    def _failures(
        self, inputs: Arrays, which: npt.NDArray[np.int64], candidates: int, known: Exception | None = None
    ) -> Iterator[tuple[int, Exception]]:
        """Those of some requests that the challenger does not answer, with the reason; `known` is that of all."""
        found = known or self._failure(_rows(inputs, which), (len(which), candidates))
        if found is not None and len(which) == 1:
            yield int(which[0]), found
        elif found is not None:
            for half in np.array_split(which, 2):
                yield from self._failures(inputs, half, candidates)

    def _failure(self, inputs: Arrays, shape: tuple[int, int]) -> Exception | None:
        """Why the challenger does not answer some requests."""
        try:
            self._numbers(self.challenger, inputs, shape)
        except Exception as error:  # noqa: BLE001 - it is noted
            return error
        return None

    def _lose(self, reason: str) -> None:
        with self._losing:
            if self.lost is not None:
                return
            self.lost = reason
        log.warning("the champion answers the challenger's users: %s", reason)
        self._events.fell_back(reason)


def _rows(inputs: Arrays, which: npt.NDArray[np.bool_ | np.int64]) -> Arrays:
    return {name: values[which] for name, values in inputs.items()}


def _asks(release: LoadedRelease) -> object:
    """What a request must hold, and what the scores mean."""
    interface = release.manifest.interface
    inputs = tuple(
        (one.name, one.per, one.dtype, one.missing, one.values, one.of, one.personal, one.rows)
        for one in interface.inputs
    )
    return inputs, [(objective.name, objective.kind) for objective in interface.objectives]
