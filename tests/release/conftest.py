"""Releases that the tests of this folder share; exporting one takes seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.data.contract import DataConfig
from tasks.release.external import ExternalFiles
from tasks.release.lookups import lookup_graph, wires
from tasks.release.nodes import ENCODER_KEYS
from tasks.release.tables import ServingTables
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


Lookup = Callable[[DataConfig, ServingTables], Path]


@pytest.fixture(params=["keys in nodes", "keys in tables"])
def lookup(request: pytest.FixtureRequest, tmp_path: Path) -> Lookup:
    """Writes a look-up graph whose keys lie where those of few and of many keys do."""

    def write(data: DataConfig, tables: ServingTables) -> Path:
        few = ENCODER_KEYS if request.param == "keys in nodes" else 0
        model = lookup_graph(data, tables, wires(data, tables), ExternalFiles(tmp_path), few)
        (tmp_path / "lookup.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "lookup.onnx"

    return write
