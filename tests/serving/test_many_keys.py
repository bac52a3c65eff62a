"""Releases whose keys lie in tables: a ranker answers alike, refuses tables that are not those, and fetches few."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import ReleaseRefused
from tasks.release.external import ExternalFiles
from tasks.release.lookups import lookup_graph, wires
from tasks.release.manifest import OPTIONAL
from tasks.release.nodes import COHORT, SEGMENTS, VOCABULARY
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.release.requirements import requirements
from tasks.serving.loaded import load
from tasks.serving.ranker import Ranker
from tests.releases import PIPELINE, Made, described_anew, make_release, shared_graph


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The release of `tonight` as it would be exported if a column had many keys from the first one on."""
    graph = shared_graph(tmp_path_factory, "full")
    return make_release(tmp_path_factory.mktemp("many") / "release", graph, encoder_keys=0)


def publish(store: ObjectStore, made: Made) -> set[str]:
    """Publish and promote; gives the files that travelled."""
    written = publish_release(store, PIPELINE, made.folder, made.manifest, {}).written
    promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1)
    return set(written)


def test_a_ranker_answers_as_the_network_does_and_as_with_keys_in_nodes(many: Made, tonight: Made, tmp_path: Path):
    (tmp_path / "store").mkdir()
    store = open_store(str(tmp_path / "store"))
    publish(store, many)
    ranker = Ranker(store, PIPELINE, device="cpu", cache=tmp_path / "cache")
    assert ranker.release == many.manifest.release != tonight.manifest.release
    plain = load(tonight.folder, tonight.manifest, "cpu")
    for golden in many.golden:
        found = ranker.score(golden.inputs)
        np.testing.assert_allclose(found, golden.scores, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found, plain.run(dict(golden.inputs), golden.scores.shape[:2]))


def test_tables_lie_in_files_of_their_own_and_the_rest_is_as_without(many: Made, tonight: Made):
    ours, theirs = ({file.name: file.sha256 for file in made.manifest.files} for made in (many, tonight))
    assert ours.keys() - theirs.keys() == {VOCABULARY, SEGMENTS, COHORT} == OPTIONAL["large look-ups"]
    assert {name for name in theirs if ours[name] != theirs[name]} == {"lookup.onnx", "model.onnx"}
    for name in ("lookup.onnx", "model.onnx"):
        model = onnx.load(many.folder / name, load_external_data=False)
        assert not [node.op_type for node in model.graph.node if node.op_type == "LabelEncoder"]
        assert {one.domain: one.version for one in model.opset_import}["com.microsoft"] == 1
    assert requirements([many.folder / "model.onnx"]).opsets["com.microsoft"] == 1
    assert "com.microsoft" not in requirements([tonight.folder / "model.onnx"]).opsets


def test_a_night_that_only_moves_slots_sends_no_vocabulary(many: Made, tmp_path: Path):
    (tmp_path / "store").mkdir()
    store = open_store(str(tmp_path / "store"))
    assert {VOCABULARY, SEGMENTS, COHORT} <= publish(store, many)
    later = tmp_path / "later"
    shutil.copytree(many.folder, later)
    levels = tuple(replace(level, slots=np.roll(level.slots, 1)) for level in many.tables.levels)
    files = ExternalFiles(later)
    model = lookup_graph(many.data, replace(many.tables, levels=levels), wires(many.data, many.tables), files, 0)
    assert model.SerializeToString(deterministic=True) == (many.folder / "lookup.onnx").read_bytes()
    manifest = described_anew(many, later)
    assert set(publish_release(store, PIPELINE, later, manifest, {}).written) == {SEGMENTS}


BENT: dict[str, Callable[[Path], None]] = {
    "cut": lambda folder: (folder / VOCABULARY).write_bytes((folder / VOCABULARY).read_bytes()[:-4]),
    "missing": lambda folder: (folder / SEGMENTS).unlink(),
    "zeroed": lambda folder: (folder / VOCABULARY).write_bytes(bytes((folder / VOCABULARY).stat().st_size)),
    "starts out of range": lambda folder: (folder / SEGMENTS).write_bytes(
        b"\xff\xff\xff\x7f" * ((folder / SEGMENTS).stat().st_size // 4)
    ),
    "another night's cohorts": lambda folder: (folder / COHORT).write_bytes(bytes((folder / COHORT).stat().st_size)),
}


@pytest.mark.parametrize("how", BENT)
def test_tables_that_are_not_the_releases_own_are_refused_even_with_fitting_digests(
    how: str, many: Made, tmp_path: Path
):
    folder = tmp_path / "bent"
    shutil.copytree(many.folder, folder)
    BENT[how](folder)
    with pytest.raises(ReleaseRefused, match=r"golden request|does not load"):
        load(folder, described_anew(many, folder), "cpu")
