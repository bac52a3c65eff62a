"""Small requests of several callers, answered by one run of their release.

Nobody waits for company: whoever finds a free lane runs at once. Those who come meanwhile queue up, and the first of
them takes along whatever fits when the lane is free again. Under light load that costs nothing, under heavy load
batches form by themselves. Requests of different releases never meet in one run.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tasks.errors import ReleaseRefused
from tasks.serving.events import Events
from tasks.serving.loaded import LoadedRelease
from tasks.serving.requests import Arrays

F32 = npt.NDArray[np.float32]
log = logging.getLogger("nightrank.ranker")
SMALL = 4_096
"""Candidates; a call with more of them runs by itself."""
MOST = 64
"""Requests in one run."""
PADDING = 1.25
"""Largest ratio of candidates that are computed to those that were asked for; lists of unlike length run apart."""


class _Call:
    """A caller who waits."""

    def __init__(self, release: LoadedRelease, inputs: Arrays, shape: tuple[int, int]) -> None:
        self.release, self.inputs, self.shape = release, inputs, shape
        per = {spec.name: spec.per for spec in release.manifest.interface.inputs}
        self.like = tuple(
            (name, one.dtype.kind, one.shape[2 if per[name] == "candidate" else 1 :]) for name, one in inputs.items()
        )
        self.ready = threading.Event()
        self.leads = False
        self.scores: F32 | None = None
        self.error: Exception | None = None


class Batcher:
    """Runs releases for many threads."""

    def __init__(self, events: Events, lanes: int = 1) -> None:
        """Open the lanes.

        Args:
            events: hears how large batches are.
            lanes: runs at the same time: 1 where a run uses all cores, one per core where it uses one.
        """
        self._events = events
        self._lock = threading.Lock()
        self._waiting: deque[_Call] = deque()
        self._free = lanes

    def run(self, release: LoadedRelease, inputs: Arrays, shape: tuple[int, int]) -> F32:
        """`release.run`, perhaps together with others."""
        if 0 in shape or shape[0] * shape[1] > SMALL:
            return release.run(inputs, shape)
        call = _Call(release, inputs, shape)
        with self._lock:
            if self._free:
                self._free -= 1
                call.leads = True
            else:
                self._waiting.append(call)
        if not call.leads:
            call.ready.wait()
        if call.leads:
            self._lead(call)
        if call.error is not None:
            raise call.error
        assert call.scores is not None
        return call.scores

    def _lead(self, call: _Call) -> None:
        """Run a batch with this call, then hand the lane to the first who waits."""
        with self._lock:
            batch = self._batch(call)
        try:
            _answer(batch)
            self._events.batched(sum(one.shape[0] for one in batch))
        finally:
            for one in batch[1:]:
                if one.scores is None and one.error is None:
                    one.error = ReleaseRefused("the run that this request was part of was interrupted; ask again")
                one.ready.set()
            with self._lock:
                if self._waiting:
                    following = self._waiting.popleft()
                    following.leads = True
                    following.ready.set()
                else:
                    self._free += 1

    def _batch(self, call: _Call) -> list[_Call]:
        """This call and those of the same release and kinds of inputs that fit beside it, in their order."""
        batch, rows, widest = [call], call.shape[0], call.shape[1]
        asked = call.shape[0] * call.shape[1]
        stay: deque[_Call] = deque()
        for one in self._waiting:
            requests, candidates = one.shape
            total, wide = rows + requests, max(widest, candidates)
            more = asked + requests * candidates
            fits = one.release is call.release and one.like == call.like and total <= MOST
            if fits and total * wide <= min(PADDING * more, SMALL):
                batch.append(one)
                rows, widest, asked = total, wide, more
            else:
                stay.append(one)
        self._waiting = stay
        return batch


def _answer(batch: Sequence[_Call]) -> None:
    """Give every call of a batch its scores; where the batch fails, each runs by itself, so that one harms no other."""
    if len(batch) > 1:
        try:
            scores = _together(batch)
        except Exception:  # whatever it is, those whose request it is meet it again
            log.info("a batch of %d calls failed; each runs by itself", len(batch), exc_info=True)
            scores = None
        if scores is not None:
            start = 0
            for call in batch:
                requests, candidates = call.shape
                call.scores = scores[start : start + requests, :candidates]
                start += requests
            return
    for call in batch:
        try:
            call.scores = call.release.run(call.inputs, call.shape)
        except Exception as error:  # noqa: BLE001 - theirs, and raised where they wait
            call.error = error


def _together(batch: Sequence[_Call]) -> F32:
    """Scores of all requests of a batch, each with as many candidates as the longest list; the last one fills up."""
    release, widest = batch[0].release, max(call.shape[1] for call in batch)
    rows = sum(call.shape[0] for call in batch)
    per = {spec.name: spec.per for spec in release.manifest.interface.inputs}

    def stacked(name: str) -> npt.NDArray[np.generic]:
        parts = [call.inputs[name] for call in batch]
        if per[name] == "candidate":
            parts = [np.take(one, np.minimum(np.arange(widest), one.shape[1] - 1), axis=1) for one in parts]
        return np.concatenate(parts)

    return release.run({name: stacked(name) for name in batch[0].inputs}, (rows, widest))
