"""A night without Prefect: the flow's own function over the plain step functions.

Nothing of the order of steps is repeated here: `flows.nightly.nightly_retrain` runs as it stands, with every Prefect
task that it names replaced by the function inside it.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from prefect import Task

from flows import nightly
from flows.config import RetrainConfig
from flows.nightly import NightResult


@contextmanager
def plain_verbs() -> Iterator[None]:
    """Let `flows.nightly` call plain functions inside the block."""
    verbs = {name: found for name, found in vars(nightly).items() if isinstance(found, Task)}
    assert len(verbs) >= 9, f"flows.nightly names only {sorted(verbs)}"
    vars(nightly).update({name: found.fn for name, found in verbs.items()})
    try:
        yield
    finally:
        vars(nightly).update(verbs)


def plain_night(config: RetrainConfig, night: date, promote: bool = True, override: str | None = None) -> NightResult:
    """Carry a night out in this process."""
    with plain_verbs():
        return nightly.nightly_retrain.fn(config, night, promote, override)


def main() -> None:
    """Carry out a night in a process of its own: `python -m tests.steps.plain CONFIG.json NIGHT OUTCOME.json`."""
    config, night, outcome = sys.argv[1:]
    made = plain_night(RetrainConfig.model_validate_json(Path(config).read_text()), date.fromisoformat(night))
    told = {"release": made.published.release, "digests": {step.step: step.digest for step in made.steps}}
    Path(outcome).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
