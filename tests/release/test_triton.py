"""A release as a model repository of Triton: what its own schema, its rules of shapes and the golden requests say."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import InvalidConfig, ObjectCorrupt, ParityBroken, ReleaseRefused
from tasks.release import nodes
from tasks.release.manifest import blob_key
from tasks.release.publishing import publish_release
from tasks.release.triton import Served, raw_bytes, write_repository
from tests.release.triton_rules import NUMPY, Arrays, answer_of, as_sent, read_config, type_of
from tests.releases import (
    NIGHT,
    PIPELINE,
    Made,
    described_anew,
    make_release,
    next_night,
    shared_feedback_graph,
    shared_graph,
)

KINDS = ("full", "lean", "past", "clashing")


@pytest.fixture(scope="session")
def store_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ObjectStore]:
    """A store with a release."""

    def of(made: Made) -> ObjectStore:
        store = open_store(str(tmp_path_factory.mktemp("store")))
        publish_release(store, PIPELINE, made.folder, made.manifest, {})
        return store

    return of


@pytest.fixture(scope="session", params=KINDS)
def written(request: pytest.FixtureRequest, release_of, store_of, tmp_path_factory) -> tuple[Made, Path]:
    """A release of each kind, and its model repository."""
    made = release_of(request.param)
    out = tmp_path_factory.mktemp("models") / "repository"
    write_repository(store_of(made), made.manifest, out, Served("shop", max_batch=16))
    return made, out


def test_the_ensemble_as_it_is_wired_answers_every_golden_request(written: tuple[Made, Path]):
    made, out = written
    for golden in made.golden:
        scores = answer_of(out, "shop", as_sent(made.manifest.interface, golden.inputs))[made.manifest.interface.output]
        np.testing.assert_allclose(scores, golden.scores, rtol=1e-5, atol=1e-5)


def test_configs_say_what_the_interface_says(written: tuple[Made, Path]):
    made, out = written
    config = read_config(out / "shop" / "config.pbtxt")
    words = {"string": "TYPE_STRING", "int64": "TYPE_INT64", "float32": "TYPE_FP32"}
    found = {tensor.name: (type_of(tensor), tuple(tensor.dims)) for tensor in config.input}
    axes = {spec.name: tuple(-1 if isinstance(one, str) else one for one in spec.shape[1:]) or (1,)
            for spec in made.manifest.interface.inputs}  # fmt: skip
    assert found == {spec.name: (words[spec.dtype], axes[spec.name]) for spec in made.manifest.interface.inputs}
    objectives = len(made.manifest.interface.objectives)
    assert [(tensor.name, list(tensor.dims)) for tensor in config.output] == [
        (made.manifest.interface.output, [-1, objectives])
    ]
    lookup, score = (read_config(out / step.model_name / "config.pbtxt") for step in config.ensemble_scheduling.step)
    between = {tensor.name: (type_of(tensor), list(tensor.dims)) for tensor in lookup.output}
    assert between == {tensor.name: (type_of(tensor), list(tensor.dims)) for tensor in score.input}
    assert set(between) == set(made.manifest.interface.wires.values())
    assert list(config.version_policy.specific.versions) == [20260301]
    assert json.loads((out / "shop" / "20260301" / "release.json").read_text())["release"] == made.manifest.release


def test_warmup_is_the_first_request_of_a_golden_one_alone_and_as_the_largest_batch(written: tuple[Made, Path]):
    made, out = written
    config = read_config(out / "shop" / "config.pbtxt")
    first: Arrays = as_sent(
        made.manifest.interface, {name: values[:1] for name, values in made.golden[2].inputs.items()}
    )
    for step in config.ensemble_scheduling.step:
        inner = read_config(out / step.model_name / "config.pbtxt")
        assert [(sample.name, sample.batch_size) for sample in inner.model_warmup] == [("one", 1), ("full", 16)]
        for sample in inner.model_warmup:
            assert sample.inputs.keys() == first.keys()
            for tensor in inner.input:
                told = sample.inputs[tensor.name]
                assert told.data_type == tensor.data_type
                assert list(told.dims) == list(first[tensor.name].shape[1:])
                data = (out / step.model_name / "warmup" / told.input_data_file).read_bytes()
                np.testing.assert_array_equal(from_bytes(data, tensor).reshape(1, *told.dims), first[tensor.name])
        first = answer_of(out, step.model_name, first)


def from_bytes(data: bytes, tensor: Any) -> npt.NDArray[Any]:
    """A file of a warm-up as Triton's schema describes it."""
    if type_of(tensor) != "TYPE_STRING":
        return np.frombuffer(data, np.dtype(NUMPY[type_of(tensor)]).newbyteorder("<"))
    found = []
    while data:
        size = int.from_bytes(data[:4], "little")
        found.append(data[4 : 4 + size].decode())
        data = data[4 + size :]
    return np.array(found, object)


def test_only_scores_may_be_put_together_and_moved_to_the_gpu(full: Made, store_of, tmp_path: Path):
    served = Served("shop", device="cuda", max_batch=8, instances=3)
    (found,) = write_repository(store_of(full), full.manifest, tmp_path, served)
    lookup, score = (read_config(tmp_path / model / "config.pbtxt") for model in found.models)
    kinds = [(group.count, group.Kind.Name(group.kind)) for one in (lookup, score) for group in one.instance_group]
    assert kinds == [(3, "KIND_CPU"), (3, "KIND_GPU")]
    assert [one.HasField("dynamic_batching") for one in (lookup, score)] == [False, True]
    assert {read_config(path).max_batch_size for path in tmp_path.glob("*/config.pbtxt")} == {8}
    assert not read_config(tmp_path / "shop" / "config.pbtxt").instance_group  # Triton refuses one on an ensemble


def test_requests_put_together_along_the_first_axis_score_as_they_do_alone(written: tuple[Made, Path]):
    """What dynamic batching relies on: calls of equal shape, and nothing of one in the scores of another."""
    made, out = written
    one, other = ({name: values[:7] for name, values in golden.inputs.items()} for golden in made.golden[6:8])
    both = {name: np.concatenate([one[name], other[name]]) for name in one}
    name = made.manifest.interface.output
    together = answer_of(out, "shop", as_sent(made.manifest.interface, both))[name]
    for at, alone in enumerate((one, other)):
        found = answer_of(out, "shop", as_sent(made.manifest.interface, alone))[name]
        np.testing.assert_allclose(together[7 * at : 7 * at + 7], found, rtol=1e-5, atol=1e-6)


def test_the_next_release_comes_beside_the_last_and_the_ensemble_names_it(full: Made, tmp_path: Path):
    after = next_night(full, tmp_path / "release", NIGHT + timedelta(days=1))
    store, out = open_store(str(tmp_path / "store")), tmp_path / "models"
    for made in (full, after):
        publish_release(store, PIPELINE, made.folder, made.manifest, {})
    (first,) = write_repository(store, full.manifest, out, Served("shop"))
    before = {path: path.read_bytes() for model in first.models for path in (out / model).rglob("*") if path.is_file()}
    (second,) = write_repository(store, after.manifest, out, Served("shop"))
    assert {path: path.read_bytes() for path in before} == before
    assert not set(first.models) & set(second.models)
    config = read_config(out / "shop" / "config.pbtxt")
    assert [step.model_name for step in config.ensemble_scheduling.step] == list(second.models)
    assert list(config.version_policy.specific.versions) == [20260302] == [second.version]
    golden = after.golden[-2]
    scores = answer_of(out, "shop", as_sent(after.manifest.interface, golden.inputs))["scores"]
    np.testing.assert_allclose(scores, golden.scores, rtol=1e-5, atol=1e-5)
    (again,) = write_repository(
        store, full.manifest, out, Served("shop", device="cuda")
    )  # a rollback, served otherwise
    assert read_config(out / again.models[1] / "config.pbtxt").instance_group[0].kind == 1
    assert [path for path in out.iterdir() if path.name.startswith(".")] == []


def test_look_ups_that_are_tables_come_with_their_files(full: Made, tmp_path: Path):
    made, store = make_release(tmp_path / "release", full.graph, encoder_keys=0), open_store(str(tmp_path / "store"))
    publish_release(store, PIPELINE, made.folder, made.manifest, {})
    (found,) = write_repository(store, made.manifest, tmp_path / "models", Served("shop"))
    beside = {path.name for path in (tmp_path / "models" / found.models[0] / "1").iterdir()}
    assert beside == {"lookup.onnx", nodes.VOCABULARY, nodes.SEGMENTS, nodes.COHORT}
    for golden in made.golden:
        scores = answer_of(tmp_path / "models", "shop", as_sent(made.manifest.interface, golden.inputs))["scores"]
        np.testing.assert_allclose(scores, golden.scores, rtol=1e-5, atol=1e-5)


def test_requests_with_feedback_have_an_ensemble_of_their_own(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    graph, solved = shared_graph(tmp_path_factory, "full"), shared_feedback_graph(tmp_path_factory, "full")
    made, store = make_release(tmp_path / "release", graph, with_feedback=solved), open_store(str(tmp_path / "store"))
    publish_release(store, PIPELINE, made.folder, made.manifest, {})
    found = write_repository(store, made.manifest, tmp_path / "models", Served("shop"))
    assert [one.ensemble for one in found] == ["shop", "shop_feedback"]
    plain = {spec.name for spec in made.manifest.interface.inputs if not spec.optional}
    asked = [0, 0]
    for golden in made.golden:
        brings = golden.inputs.keys() != plain
        sent = as_sent(made.manifest.interface, golden.inputs)
        scores = answer_of(tmp_path / "models", found[brings].ensemble, sent)["scores"]
        np.testing.assert_allclose(scores, golden.scores, rtol=1e-4, atol=1e-4)
        asked[brings] += 1
    assert min(asked) > 1


def test_a_release_that_answers_otherwise_is_not_left_there(full: Made, tmp_path: Path):
    wrong = tmp_path / "wrong"
    shutil.copytree(full.folder, wrong)
    golden = json.loads((wrong / "golden.json").read_bytes())
    golden["requests"][3]["scores"][0] += 0.01
    (wrong / "golden.json").write_text(json.dumps(golden))
    store, manifest = open_store(str(tmp_path / "store")), described_anew(full, wrong)
    publish_release(store, PIPELINE, wrong, manifest, {})
    with pytest.raises(ParityBroken, match=r"golden requests 0\.01 off as look-up and score, limit 0\.0001"):
        write_repository(store, manifest, tmp_path / "models", Served("shop"))
    assert list((tmp_path / "models").iterdir()) == []


def test_a_damaged_blob_is_not_left_there(full: Made, store_of, tmp_path: Path):
    store = store_of(full)
    key = blob_key(PIPELINE, next(file.sha256 for file in full.manifest.files if file.name == "bank.bin"))
    data = store.get(key).data
    store.delete(key)
    store.put_if_absent(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ObjectCorrupt):
        write_repository(store, full.manifest, tmp_path / "models", Served("shop"))
    assert list((tmp_path / "models").iterdir()) == []


def test_a_graph_that_cannot_be_batched_is_refused_by_tensor(full: Made, tmp_path: Path):
    odd = tmp_path / "odd"
    shutil.copytree(full.folder, odd)
    graph = onnx.load(odd / "lookup.onnx", load_external_data=False)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "users"
    (odd / "lookup.onnx").write_bytes(graph.SerializeToString())
    store, manifest = open_store(str(tmp_path / "store")), described_anew(full, odd)
    publish_release(store, PIPELINE, odd, manifest, {})
    with pytest.raises(ParityBroken, match=r"lookup\.onnx has 'user' of type STRING and shape \['users'\]"):
        write_repository(store, manifest, tmp_path / "models", Served("shop"))


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        ([], "there are none"),
        (
            [{"shape": [1, 1, 2], "scores": [0.5, 3.0], "inputs": {"user": ["ann"]}}],
            "a golden request .* lacks age, genre",
        ),
    ],
)
def test_golden_requests_that_cannot_be_read_are_refused(full: Made, tmp_path: Path, golden: list[Any], message: str):
    odd = tmp_path / "odd"
    shutil.copytree(full.folder, odd)
    (odd / "golden.json").write_text(json.dumps({"requests": golden, "schema_version": 1}))
    store, manifest = open_store(str(tmp_path / "store")), described_anew(full, odd)
    publish_release(store, PIPELINE, odd, manifest, {})
    with pytest.raises(ReleaseRefused, match=message):
        write_repository(store, manifest, tmp_path / "models", Served("shop"))


def test_a_file_that_the_graph_reads_and_the_release_lacks_is_named(full: Made, store_of, tmp_path: Path):
    files = tuple(file for file in full.manifest.files if file.name != "bank.bin")
    with pytest.raises(ReleaseRefused, match=r"has no bank\.bin, which its graphs read"):
        write_repository(store_of(full), replace(full.manifest, files=files), tmp_path / "models", Served("shop"))


def test_somebody_elses_model_is_left_alone(full: Made, store_of, tmp_path: Path):
    theirs = tmp_path / "shop" / "config.pbtxt"
    theirs.parent.mkdir()
    theirs.write_text('backend: "python"')
    with pytest.raises(InvalidConfig, match="holds a model that was not written here; give another name"):
        write_repository(store_of(full), full.manifest, tmp_path, Served("shop"))
    assert theirs.read_text() == 'backend: "python"'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../shop"}, "'../shop' cannot name a Triton model here"),
        ({"name": "shop", "max_batch": 0}, "max_batch is 0; give a number from 1 to 4096"),
        ({"name": "shop", "instances": 65}, "instances is 65; give a number from 1 to 64"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InvalidConfig, match=message.replace(".", r"\.")):
        Served(**options)


def test_a_file_where_the_repository_should_be_is_refused(full: Made, store_of, tmp_path: Path):
    (tmp_path / "models").write_text("")
    with pytest.raises(InvalidConfig, match="cannot be written"):
        write_repository(store_of(full), full.manifest, tmp_path / "models", Served("shop"))


def test_strings_lie_behind_their_length():
    assert raw_bytes(np.array([["é", ""]], object)) == b"\x02\x00\x00\x00\xc3\xa9\x00\x00\x00\x00"
    assert raw_bytes(np.array([[1, -1]])) == b"\x01" + bytes(7) + b"\xff" * 8
