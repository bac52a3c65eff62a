"""The reference reader: loads a pipeline's champion, scores candidates, and picks up new nights while it serves.

Pointer, manifest, verify, load, golden requests, swap, drop the old one. A release that fails on the way is refused,
the one in use keeps serving, and `refusal` says why. Needs onnxruntime and numpy, and boto3 for `s3://` stores.

>>> ranker = Ranker("s3://models/nightrank", "movielens")           # doctest: +SKIP
>>> ranker.rank({"user_id": [7], "movie_id": [[50, 181, 258]]})     # doctest: +SKIP
"""

import logging
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import NightrankError, NoRelease, ReleaseRefused
from tasks.release.manifest import Manifest, Pointer
from tasks.serving.cache import ReleaseCache
from tasks.serving.guards import require_finite
from tasks.serving.loaded import LoadedRelease
from tasks.serving.requests import read_request
from tasks.serving.seen import SeenGeneration
from tasks.serving.sessions import Engine
from tasks.serving.source import ReleaseSource

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
    """Scores, and the release that gave all of them.

    Attributes:
        manifest: the release.
        items: raw keys of the candidates, [R, M].
        scores: float32 [R, M, K].
    """

    manifest: Manifest
    items: npt.NDArray[np.generic]
    scores: F32

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
        min_generation: int = 0,
    ) -> None:
        """Load the champion.

        Args:
            store: a directory, `s3://bucket/prefix`, or an opened store.
            pipeline: the pipeline's name.
            device: `cuda` insists on a GPU, `auto` uses one where it works.
            cache: folder for this pipeline's releases, kept between processes; by default a temporary one.
            engine: how sessions run: threads, CUDA graphs, TensorRT.
            min_generation: of the pointer; an older one is refused, as is one older than what the cache remembers.

        Raises:
            NoRelease: nothing was promoted yet.
            ReleaseRefused: the champion is damaged, or does not answer its golden requests.
            DeviceUnavailable: `cuda` was asked for and no GPU works.
            StoreError: the store cannot be read.
        """
        self.pipeline = pipeline
        opened = open_store(store) if isinstance(store, str) else store
        self._temporary = cache is None
        self._folder = Path(tempfile.mkdtemp(prefix="nightrank-")) if cache is None else cache
        self._source = ReleaseSource(opened, pipeline, ReleaseCache(self._folder), device, engine)
        self._seen = SeenGeneration(self._folder, pipeline)
        self._refreshing = threading.Lock()
        self._refusal: str | None = None
        self._loaded: LoadedRelease | None = None
        try:
            self._generation = max(min_generation, self._seen.read())
            self._swap(self._newer_pointer())
        except BaseException:
            self.close()
            raise

    @property
    def release(self) -> str:
        """Id of the release that serves."""
        return self._serving().manifest.release

    @property
    def night(self) -> date:
        """Night of the release that serves."""
        return self._serving().manifest.night

    @property
    def manifest(self) -> Manifest:
        """Manifest of the release that serves."""
        return self._serving().manifest

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where the release that serves really runs."""
        return self._serving().device

    @property
    def refusal(self) -> str | None:
        """Why the last `refresh` kept the old release; None where all was well."""
        return self._refusal

    def score(self, request: Mapping[str, object]) -> F32:
        """Score candidates.

        Args:
            request: every column of the manifest's inputs: R values per request column, R x M per candidate column,
                as arrays or lists. None and NaN are missing values.

        Returns:
            Probabilities (binary objectives) or expected values (ratings), float32 [R, M, K].

        Raises:
            RequestRejected: a column is missing, unknown, or of the wrong type or shape.
            ReleaseRefused: the release answers with something that is not a finite number.
        """
        return self._answer(self._serving(), request)[1]

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

        Args:
            request: as for `score`.

        Raises:
            RequestRejected, ReleaseRefused: as for `score`.
        """
        serving = self._serving()
        inputs, scores = self._answer(serving, request)
        return Answer(serving.manifest, inputs[serving.item], scores)

    def refresh(self) -> bool:
        """Look at the pointer and swap to its release, if it is another one and a good one.

        Requests in flight finish on the release they began with. Concurrent calls wait for each other. Never raises
        for a bad release or an ailing store: the old release keeps serving, and `refusal` says why.

        Returns:
            Whether another release serves now.

        Raises:
            NoRelease: the ranker was closed.
        """
        with self._refreshing:
            before = self._serving().manifest.release
            try:
                self._swap(self._newer_pointer())
            except Exception as error:  # whatever it is, it must not take the release away that serves
                self._refusal = f"{type(error).__name__}: {error}"
                unforeseen = None if isinstance(error, NightrankError) else error
                log.warning(
                    "release %s of night %s keeps serving: %s",
                    *(self.release[:12], self.night, self._refusal),
                    exc_info=unforeseen,
                )
                return False
            self._refusal = None
            return self._serving().manifest.release != before

    def close(self) -> None:
        """Stop serving and remove what only this ranker needed."""
        self._loaded = None
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        """The ranker itself; it is closed where the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the ranker."""
        self.close()

    def _serving(self) -> LoadedRelease:
        loaded = self._loaded
        if loaded is None:
            raise NoRelease(f"the ranker of pipeline {self.pipeline!r} is closed; open another one")
        return loaded

    def _answer(
        self, serving: LoadedRelease, request: Mapping[str, object]
    ) -> tuple[dict[str, npt.NDArray[np.generic]], F32]:
        inputs, shape = read_request(serving.manifest.interface.inputs, request)
        scores = serving.run(inputs, shape)
        require_finite(serving.manifest, scores)
        return inputs, scores

    def _newer_pointer(self) -> Pointer:
        """The pointer, unless it is older than what was seen."""
        pointer = self._source.pointer()
        if pointer.generation < self._generation:
            raise ReleaseRefused(
                f"the pointer of {self.pipeline!r} went back from generation {self._generation} to "
                f"{pointer.generation}: an old one was replayed, or the pipeline was made anew; then restart the "
                f"ranker, with another cache folder or after deleting seen.json in {self._folder}"
            )
        serving = self._loaded
        if serving and pointer.generation == self._generation and pointer.release != serving.manifest.release:
            raise ReleaseRefused(
                f"the pointer of {self.pipeline!r} names release {pointer.release[:12]} in generation "
                f"{pointer.generation}, which named {serving.manifest.release[:12]}; promote one of them again"
            )
        return pointer

    def _swap(self, pointer: Pointer) -> None:
        """Serve what a pointer names, once it is verified, loaded and found good; what served until then goes last."""
        serving = self._loaded
        now = None if serving is None else serving.manifest.release
        if pointer.release != now:
            named = {pointer.release, pointer.previous, now} - {None}
            loaded = self._source.load(pointer.release, [one for one in named if one], pointer.night)
            self._seen.remember(pointer.generation)
            self._loaded = loaded
            log.info("release %s of night %s serves", self.release[:12], self.night)
        elif pointer.generation > self._generation:
            self._seen.remember(pointer.generation)
        self._generation = pointer.generation
