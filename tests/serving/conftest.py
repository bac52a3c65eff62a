"""Two nights of one pipeline, published to a fresh store."""

from datetime import timedelta
from pathlib import Path

import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tests.releases import NIGHT, PIPELINE, Made, make_release, next_night, shared_graph


@pytest.fixture(scope="session")
def tonight(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A release."""
    return make_release(tmp_path_factory.mktemp("tonight") / "release", shared_graph(tmp_path_factory, "full"))


@pytest.fixture(scope="session")
def tomorrow(tonight: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The release of the night after: another bank."""
    return next_night(tonight, tmp_path_factory.mktemp("tomorrow") / "release", NIGHT + timedelta(days=1))


@pytest.fixture
def store(tmp_path: Path, tonight: Made) -> ObjectStore:
    """A store in which tonight's release is the champion."""
    (tmp_path / "store").mkdir()
    opened = open_store(str(tmp_path / "store"))
    publish_release(opened, PIPELINE, tonight.folder, tonight.manifest, {})
    promote(opened, PIPELINE, tonight.manifest.release, NIGHT, token=1)
    return opened
