"""A ranker's numbers for Prometheus.

>>> from prometheus_client import CollectorRegistry, generate_latest
>>> registry = CollectorRegistry()
>>> Metrics(registry, "movielens").answered("champion", 1, 200, 0.0004)
>>> [line for line in generate_latest(registry).decode().splitlines() if "candidates_total{" in line]
['nightrank_candidates_total{pipeline="movielens",role="champion"} 200.0']
"""

import threading
import weakref
from datetime import UTC, datetime
from datetime import time as clock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tasks.release.manifest import Manifest
from tasks.serving.events import Events, Role

SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class _Collectors:
    """The collectors of a registry, which several rankers of one process may share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        of, by_role = ("pipeline",), ("pipeline", "role")
        self.requests = Counter(
            "nightrank_requests", "Requests by outcome.", (*by_role, "outcome"), registry=registry
        )  # fmt: skip
        self.candidates = Counter("nightrank_candidates", "Candidates that were scored.", by_role, registry=registry)
        self.seconds = Histogram(
            "nightrank_answer_seconds",
            "Seconds of a release for one call.",
            by_role,
            buckets=SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            "nightrank_batch_requests", "Requests in one run of a release.", of, buckets=BATCHES, registry=registry
        )
        self.constant = Gauge(
            "nightrank_constant_share", "Recent answers that ranked nothing, 0 to 1.", by_role, registry=registry
        )
        self.release = Gauge(
            "nightrank_release",
            "1 for the release that has the role.",
            (*by_role, "release", "device"),
            registry=registry,
        )
        self.night = Gauge(
            "nightrank_release_night_seconds", "Start of its night in UTC, Unix time.", by_role, registry=registry
        )
        self.load = Gauge("nightrank_load_seconds", "Fetching, loading, proving it.", by_role, registry=registry)
        self.swaps = Counter("nightrank_swaps", "Releases that came into a role.", by_role, registry=registry)
        self.generation = Gauge("nightrank_pointer_generation", "Generation that serves.", of, registry=registry)
        self.polls = Counter("nightrank_polls", "Looks at the pointer.", (*of, "outcome"), registry=registry)
        self.polled = Gauge("nightrank_polled_seconds", "When it was last looked at, Unix time.", of, registry=registry)
        self.refused = Gauge(
            "nightrank_refused", "1 while what the pointer names does not serve.", of, registry=registry
        )
        self.signed = Gauge(
            "nightrank_signed", "1 where a trusted key vouches for what serves, 0 where no keys are named.", of,
            registry=registry,
        )  # fmt: skip
        self.fallbacks = Counter("nightrank_challenger_fallbacks", "Challengers given up.", of, registry=registry)


_SHARED: "weakref.WeakKeyDictionary[CollectorRegistry, _Collectors]" = weakref.WeakKeyDictionary()
_SHARING = threading.Lock()


class Metrics(Events):
    """Counts a ranker's events in a registry."""

    def __init__(self, registry: CollectorRegistry, pipeline: str) -> None:
        """Enter the collectors, unless another ranker has.

        Args:
            registry: what a service exposes, such as `prometheus_client.REGISTRY`.
            pipeline: a label of every number.
        """
        with _SHARING:
            if registry not in _SHARED:
                _SHARED[registry] = _Collectors(registry)
            self._to = _SHARED[registry]
        self._pipeline = pipeline
        self._now: dict[Role, tuple[str, str]] = {}

    def answered(self, role: Role, requests: int, candidates: int, seconds: float) -> None:
        """A release answered requests with so many candidates in all."""
        self._to.requests.labels(self._pipeline, role, "answered").inc(requests)
        self._to.candidates.labels(self._pipeline, role).inc(candidates)
        self._to.seconds.labels(self._pipeline, role).observe(seconds)

    def rejected(self) -> None:
        """A request did not fit the release's inputs."""
        self._to.requests.labels(self._pipeline, "champion", "rejected").inc()

    def failed(self, role: Role) -> None:
        """A release gave something that is no answer."""
        self._to.requests.labels(self._pipeline, role, "failed").inc()

    def constant(self, role: Role, share: float) -> None:
        """Share of a release's recent answers that gave all candidates the same score."""
        self._to.constant.labels(self._pipeline, role).set(share)

    def batched(self, requests: int) -> None:
        """So many requests of several callers were answered by one run."""
        self._to.batches.labels(self._pipeline).observe(requests)

    def polled(self, generation: int, refusal: str | None, signed: bool) -> None:
        """The pointer was looked at; or why what it names does not serve. Whether a trusted key vouches for it."""
        self._to.signed.labels(self._pipeline).set(signed)
        self._to.polls.labels(self._pipeline, "refused" if refusal else "good").inc()
        self._to.refused.labels(self._pipeline).set(refusal is not None)
        self._to.generation.labels(self._pipeline).set(generation)
        self._to.polled.labels(self._pipeline).set_to_current_time()

    def swapped(self, role: Role, manifest: Manifest | None, device: str, seconds: float) -> None:
        """Another release has the role now, after so many seconds of fetching, loading and proving; or none."""
        labels = (self._pipeline, role)
        if (before := self._now.pop(role, None)) is not None:
            self._to.release.remove(*labels, *before)
        if manifest is None:
            return
        self._now[role] = (manifest.release, device)
        self._to.release.labels(*labels, *self._now[role]).set(1)
        self._to.night.labels(*labels).set(datetime.combine(manifest.night, clock(), UTC).timestamp())
        self._to.load.labels(*labels).set(seconds)
        self._to.swaps.labels(*labels).inc()

    def fell_back(self, reason: str) -> None:
        """The challenger's users get the champion's answers, until the pointer moves."""
        self._to.fallbacks.labels(self._pipeline).inc()
