"""A night without Prefect: the flow's own function over the plain step functions.

Nothing of the order of steps is repeated here: `flows.nightly.nightly_retrain` runs as it stands, with every Prefect
task that it names replaced by the function inside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from types import ModuleType
from typing import Any

from prefect import Task

from flows import nightly, replay
from flows.config import RetrainConfig
from flows.nightly import NightResult
from flows.replay import ReplayResult


@contextmanager
def plain_verbs(flows: ModuleType, least: int) -> Iterator[None]:
    """Let a module of flows call plain functions inside the block; it must name at least so many steps."""
    verbs = {name: found for name, found in vars(flows).items() if isinstance(found, Task)}
    assert len(verbs) >= least, f"{flows.__name__} names only {sorted(verbs)}"
    vars(flows).update({name: found.fn for name, found in verbs.items()})
    try:
        yield
    finally:
        vars(flows).update(verbs)


def plain_night(config: RetrainConfig, night: date, promote: bool = True, override: str | None = None) -> NightResult:
    """Carry a night out in this process."""
    with plain_verbs(nightly, least=9):
        return nightly.nightly_retrain.fn(config, night, promote, override)


def plain_replay(config: RetrainConfig, start: date, end: date, **options: Any) -> ReplayResult:
    """Replay a range in this process."""
    with plain_verbs(replay, least=7):
        return replay.replay.fn(config, start, end, **options)
