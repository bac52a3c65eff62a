"""What it costs a ranker to verify signatures: at each look at the pointer, and at each release that it loads.

pytest tests/benchmarks/test_verifying.py
"""

from pathlib import Path
from typing import Any

import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.key_files import create_key
from tasks.release.manifest import manifest_key, pointer_key
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.release.signing import KEY_VARIABLE, KEYS_VARIABLE, Keyring, check_manifest, check_pointer
from tests.releases import NIGHT, PIPELINE, Made, make_release, shared_graph


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_release(tmp_path_factory.mktemp("release") / "release", shared_graph(tmp_path_factory, "full"))


@pytest.fixture
def signed(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ObjectStore, Keyring]:
    """A store with a signed champion, and the keyring."""
    (tmp_path / "store").mkdir()
    store = open_store(str(tmp_path / "store"))
    create_key(tmp_path / "ring.json", tmp_path / "key.pem")
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "key.pem"))
    monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "ring.json"))
    publish_release(store, PIPELINE, made.folder, made.manifest, {})
    promote(store, PIPELINE, made.manifest.release, NIGHT, token=1)
    return store, Keyring.load(tmp_path / "ring.json")


@pytest.mark.parametrize("keys", [False, True], ids=["without keys", "with keys"])
def test_pointer(benchmark: Any, signed: tuple[ObjectStore, Keyring], keys: bool) -> None:
    store, ring = signed
    data = store.get(pointer_key(PIPELINE)).data
    assert benchmark(check_pointer, ring if keys else None, PIPELINE, data).release


@pytest.mark.parametrize("keys", [False, True], ids=["without keys", "with keys"])
def test_manifest(benchmark: Any, signed: tuple[ObjectStore, Keyring], made: Made, keys: bool) -> None:
    store, ring = signed
    data = store.get(manifest_key(PIPELINE, made.manifest.release)).data
    assert benchmark(check_manifest, store, ring if keys else None, PIPELINE, made.manifest.release, data).files
