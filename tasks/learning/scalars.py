"""Where the numbers of a training go while it runs, epoch by epoch, for whoever looks on."""

from collections.abc import Mapping
from typing import Protocol


class Scalars(Protocol):
    """Somewhere that numbers are written to."""

    def begin(self, epoch: int) -> None:
        """The training goes on with an epoch: what an earlier run has written of it and of later ones is void."""

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Numbers of an epoch, by name."""

    def part(self, name: str) -> "Scalars":
        """The numbers of a part of the training, such as one member of an ensemble."""


class NoScalars:
    """Writes nothing."""

    lost = ""
    """Nothing is lost of nothing."""

    def begin(self, epoch: int) -> None:
        """Nothing begins."""

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Forget them."""

    def part(self, name: str) -> "NoScalars":
        """Nothing either."""
        return self
