"""The reference reader: loads a pipeline's champion, scores candidates, and picks up new nights while it serves.

Pointer, manifest, verify, load, golden requests, swap, drop the old one. A release that fails on the way is refused,
the one in use keeps serving, and `refusal` says why. Needs onnxruntime and numpy, and boto3 for `s3://` stores.

Where the pointer names a challenger, it answers the pointer's share of the users; one that is no good leaves them to
the champion, and `warnings` says so.

>>> ranker = Ranker("s3://models/nightrank", "movielens")           # doctest: +SKIP
>>> ranker.rank({"user_id": [7], "movie_id": [[50, 181, 258]]})     # doctest: +SKIP
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.manifest import Manifest
from tasks.release.signing import UNSIGNED
from tasks.serving.answering import Answer as Answer
from tasks.serving.answering import Contest
from tasks.serving.answering import Ranked as Ranked
from tasks.serving.batcher import Batcher
from tasks.serving.cache import ReleaseCache
from tasks.serving.events import Events
from tasks.serving.following import Follower
from tasks.serving.refresher import Refresher
from tasks.serving.seen import SeenGeneration
from tasks.serving.sessions import Engine
from tasks.serving.source import ReleaseSource
from tasks.serving.variants import VariantChoice

F32 = npt.NDArray[np.float32]
log = logging.getLogger("nightrank.ranker")


class Ranker:
    """Scores candidates with a pipeline's champion. All methods may be called from any number of threads."""

    def __init__(
        self,
        store: str | ObjectStore,
        pipeline: str,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        cache: Path | None = None,
        *,
        engine: Engine | None = None,
        variant: VariantChoice = "auto",
        min_generation: int = 0,
        refresh_every: float | None = None,
        batching: bool = False,
        events: Events | None = None,
        keys: Path | None = None,
    ) -> None:
        """Load the champion.

        Args:
            store: a directory, `s3://bucket/prefix`, or an opened store.
            pipeline: the pipeline's name.
            device: `cuda` insists on a GPU, `auto` uses one where it works.
            cache: folder for this pipeline's releases, kept between processes; by default a temporary one.
            engine: how sessions run: threads, CUDA graphs, TensorRT.
            variant: `auto` takes the smaller graph that is made for the device where a release has one that passed;
                `fp32`, `fp16` (on a GPU) and `int8` (on the CPU) insist.
            min_generation: of the pointer; an older one is refused, as is one older than what the cache remembers.
            refresh_every: seconds between looks at the pointer by a thread of the ranker's own; None leaves them to
                `refresh`. That thread also fetches the release before, so that a rollback need not.
            batching: answer small requests of several threads by one run.
            events: hears what happens; `tasks.serving.metrics.Metrics` counts it for Prometheus.
            keys: keyring of the keys that may sign; by default the one that NIGHTRANK_TRUSTED_KEYS names. Where there
                is one, whatever it does not vouch for is refused. It is read at each refresh.

        Raises:
            InvalidConfig: the keyring cannot be used, or the cache is no folder.
            NoRelease: nothing was promoted yet.
            ReleaseRefused: the champion is damaged, or does not answer its golden requests.
            DeviceUnavailable: `cuda` was asked for and no GPU works.
            StoreError: the store cannot be read.
        """
        self.pipeline = pipeline
        opened = open_store(store) if isinstance(store, str) else store
        self._temporary = cache is None
        self._folder = Path(tempfile.mkdtemp(prefix="nightrank-")) if cache is None else cache
        self._refresher: Refresher | None = None
        events = events or Events()
        one_core = engine is not None and engine.threads == 1
        lanes = len(os.sched_getaffinity(0)) if one_core else 1
        cached = ReleaseCache(self._folder, None if engine is None else engine.tensorrt)
        self._source = ReleaseSource(opened, pipeline, cached, device, engine, variant, keys)
        try:
            self._follower = Follower(
                self._source,
                SeenGeneration(self._folder, pipeline),
                min_generation,
                events,
                Batcher(events, lanes) if batching else None,
                refresh_every or 0.0,
            )
            if refresh_every is not None:
                self._refresher = Refresher(self._follower.poll, refresh_every)
            if not self.signed:
                log.warning("pipeline %s of %s is %s", pipeline, opened.url, UNSIGNED)
        except BaseException:
            self._clear()
            raise

    @property
    def release(self) -> str:
        """Id of the champion that serves."""
        return self._follower.serving().release.manifest.release

    @property
    def night(self) -> date:
        """Night of the champion that serves."""
        return self._follower.serving().release.manifest.night

    @property
    def manifest(self) -> Manifest:
        """Manifest of the champion that serves."""
        return self._follower.serving().release.manifest

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where the champion really runs."""
        return self._follower.serving().release.device

    @property
    def generation(self) -> int:
        """Generation of the pointer that serves."""
        return self._follower.generation

    @property
    def challenger(self) -> str | None:
        """Id of the release that answers a share of the users; None where there is none, or it has lost."""
        state = self._follower.serving()
        return state.challenger.manifest.release if isinstance(state, Contest) and state.lost is None else None

    @property
    def signed(self) -> bool:
        """Whether a trusted key vouched for what serves at the last look; False where no keys are named."""
        return self._follower.signed

    @property
    def variant(self) -> str:
        """Which graph of the champion serves: `fp32`, `fp16` or `int8`."""
        return self._follower.serving().release.variant

    @property
    def spared(self) -> str | None:
        """Why fp32 serves although the champion has a variant that passed; None where that is not so."""
        return self._follower.serving().release.spared

    @property
    def refusal(self) -> str | None:
        """Why the last `refresh` kept the old release; None where all was well."""
        return self._follower.refusal

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should look at although requests are answered."""
        return self._follower.warnings

    def score(self, request: Mapping[str, object]) -> F32:
        """Score candidates.

        Args:
            request: every column of the manifest's inputs: R values per request column, R x M per candidate column,
                as arrays or lists. None and NaN are missing values. Where the release takes feedback, a list of rows
                per request, newest first, may say what each user has just done; his adapter is solved from them.

        Returns:
            Probabilities (binary objectives) or expected values (ratings), float32 [R, M, K].

        Raises:
            RequestRejected: a column is missing, unknown, or of the wrong type or shape.
            ReleaseRefused: the release answers with something that is not a finite number.
        """
        return self.answer(request).scores

    def rank(self, request: Mapping[str, object]) -> list[list[Ranked]]:
        """Rank the candidates of each request by the first objective, best first; ties keep the request's order.

        Args:
            request: as for `score`.

        Raises:
            RequestRejected, ReleaseRefused: as for `score`.
        """
        return self.answer(request).ranked()

    def answer(self, request: Mapping[str, object]) -> Answer:
        """Score candidates, and say which release did: the one that serves may be another one a moment later.

        With a challenger the requests of one call may have been scored by two releases; `Answer.releases` has one for
        each, to be logged beside its outcome.

        Args:
            request: as for `score`.

        Raises:
            RequestRejected, ReleaseRefused: as for `score`.
        """
        return self._follower.serving().answer(request)

    def refresh(self) -> bool:
        """Look at the pointer and swap to its release, if it is another one and a good one.

        Requests in flight finish on the release they began with. Concurrent calls wait for each other, and take it
        for theirs where the store gave the one before no answer. Never raises for a bad release or an ailing store: the
        old release keeps serving, and `refusal` says why.

        Returns:
            Whether another champion serves now.

        Raises:
            NoRelease: the ranker was closed.
        """
        return self._follower.refresh()

    def close(self) -> None:
        """Stop serving and remove what only this ranker needed."""
        self._follower.close()
        self._clear()

    def __enter__(self) -> Self:
        """The ranker itself; it is closed where the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the ranker."""
        self.close()

    def _clear(self) -> None:
        if self._refresher is not None:
            self._refresher.stop()
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)
