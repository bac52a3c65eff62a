"""One embedded Prefect for all flow tests of a worker: the one that a command starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prefect_homes import home_with


@pytest.fixture(scope="session")
def prefect(prefect_database: Path) -> Iterator[None]:
    from flows.embedded import embedded

    home_with(prefect_database, Path(os.environ["PREFECT_HOME"]))
    with embedded():
        yield
