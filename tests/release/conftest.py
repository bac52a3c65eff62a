"""Releases that the tests of this folder share; exporting one takes seconds."""

from collections.abc import Callable

import pytest

from tests.releases import Made, make_release, shared_graph


@pytest.fixture(scope="session")
def release_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A release of a kind, exported once."""
    exported: dict[str, Made] = {}

    def of(kind: str) -> Made:
        if kind not in exported:
            folder = tmp_path_factory.mktemp(kind) / "release"
            exported[kind] = make_release(folder, shared_graph(tmp_path_factory, kind), kind)
        return exported[kind]

    return of


@pytest.fixture(scope="session", params=["full", "lean", "clashing"])
def made(request: pytest.FixtureRequest, release_of: Callable[[str], Made]) -> Made:
    """A release of each kind."""
    return release_of(request.param)


@pytest.fixture(scope="session")
def full(release_of: Callable[[str], Made]) -> Made:
    """A release with everything that one can have."""
    return release_of("full")
