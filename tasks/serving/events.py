"""What a ranker tells whoever watches it. Here nobody does; `metrics.Metrics` counts it for Prometheus."""

from typing import Literal

from tasks.release.manifest import Manifest

Role = Literal["champion", "challenger"]


class Events:
    """Calls that a ranker makes, from any of its threads. They must not raise, nor take long."""

    def answered(self, role: Role, requests: int, candidates: int, seconds: float) -> None:
        """A release answered requests with so many candidates in all."""

    def rejected(self) -> None:
        """A request did not fit the release's inputs."""

    def failed(self, role: Role) -> None:
        """A release gave something that is no answer."""

    def constant(self, role: Role, share: float) -> None:
        """Share of a release's recent answers that gave all candidates the same score."""

    def batched(self, requests: int) -> None:
        """So many requests of several callers were answered by one run."""

    def polled(self, generation: int, refusal: str | None, signed: bool) -> None:
        """The pointer was looked at; or why what it names does not serve. Whether a trusted key vouches for it."""

    def swapped(self, role: Role, manifest: Manifest | None, device: str, seconds: float) -> None:
        """Another release has the role now, after so many seconds of fetching, loading and proving; or none."""

    def fell_back(self, reason: str) -> None:
        """The challenger's users get the champion's answers, until the pointer moves."""
