"""One embedded Prefect for all flow tests of a worker, without heartbeats."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings


@pytest.fixture(scope="session")
def prefect(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Loads the whole server: only where it is wanted.
    from prefect.testing import utilities

    def folder_with_database() -> str:
        folder = tmp_path_factory.mktemp("prefect")
        shutil.copy(prefect_database, folder / "prefect-test.db")
        return str(folder)

    with pytest.MonkeyPatch.context() as patch:
        # The harness has no setting for where its database comes from.
        patch.setattr(utilities, "mkdtemp", folder_with_database)
        with (
            utilities.prefect_test_harness(server_startup_timeout=90),
            temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        ):
            yield
