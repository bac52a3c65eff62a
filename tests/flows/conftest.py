"""One embedded Prefect for all flow tests of a worker: the one that a command starts."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prefect(prefect_database: Path) -> Iterator[None]:
    from flows.embedded import embedded

    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(prefect_database, home / "prefect.db")
    with embedded():
        yield
