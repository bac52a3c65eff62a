"""Sessions: where their nodes run, and the path of a GPU with the CPU in its place."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tasks.clients.object_store import ObjectStore
from tasks.errors import DeviceUnavailable, InvalidConfig, ReleaseRefused
from tasks.release.pointer import promote
from tasks.release.publishing import publish_release
from tasks.serving import loaded, runners, sessions
from tasks.serving.loaded import load
from tasks.serving.ranker import Ranker
from tasks.serving.runners import Halves
from tasks.serving.sessions import CPU, CUDA, TENSORRT, Engine, Placement, open_session, providers, read_profile
from tests.releases import NIGHT, PIPELINE, Made, next_night


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of the GPU."""
    monkeypatch.setattr(loaded, "require_gpu", lambda: None)
    monkeypatch.setattr(runners, "_DEVICE", "cpu")
    monkeypatch.setattr(runners, "GPU", "cpu")


def test_the_split_graphs_answer_alike_through_io_binding(store: ObjectStore, tonight: Made, stand_in: None):
    with Ranker(store, PIPELINE, "cuda") as ranker:
        assert ranker.device == "cuda"
        assert isinstance(ranker._follower.serving().release.runner, Halves)
        for golden in tonight.golden:
            np.testing.assert_allclose(ranker.score(golden.inputs), golden.scores, rtol=1e-5, atol=1e-5)


def shapes(tonight: Made, most: int) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """The last golden request cut to 1 to `most` candidates, with its scores."""
    golden, specs = tonight.golden[-1], tonight.manifest.interface.inputs
    per = {spec.name: spec.per for spec in specs}
    return [
        (
            {name: one if per[name] == "request" else one[:, :width] for name, one in golden.inputs.items()},
            golden.scores[:, :width],
        )
        for width in range(1, most + 1)
    ]


def test_buffers_at_fixed_addresses_answer_as_the_network_does_for_every_shape_and_thread(
    tonight: Made, stand_in: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runners, "MOST_SHAPES", 4)
    release = load(tonight.folder, tonight.manifest, "cuda", Engine(cuda_graphs=True))
    cut = shapes(tonight, 9)

    def ask(at: int) -> None:
        inputs, expected = cut[at]
        swapped = {name: one[::-1].copy() for name, one in inputs.items()}
        for given, answer in ((inputs, expected), (swapped, expected[::-1])):  # other numbers at the same addresses
            np.testing.assert_allclose(release.run(given, answer.shape[:2]), answer, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(4) as threads:
        for at in np.random.default_rng(0).integers(len(cut), size=60).tolist():
            threads.submit(ask, at).result()
        list(threads.map(ask, [0, 1, 2, 0, 1, 2] * 6))
    runner = release.runner
    assert isinstance(runner, Halves)
    assert len(runner._buffers) <= 4
    assert sum(one is not None for one in runner._buffers.values()) >= 3


def test_a_shape_gets_buffers_when_it_comes_again(tonight: Made, stand_in: None):
    release = load(tonight.folder, tonight.manifest, "cuda", Engine(cuda_graphs=True))
    runner = release.runner
    assert isinstance(runner, Halves)
    runner._buffers.clear()
    captured = runner._captured
    inputs, expected = shapes(tonight, 7)[-1]
    answers = [release.run(inputs, expected.shape[:2]) for _ in range(3)]
    for answer in answers:
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)
    assert answers[1] is not answers[2]
    assert not np.shares_memory(answers[1], answers[2])
    assert runner._captured == captured + 1


def test_a_gpu_that_does_not_compute_is_noticed(tonight: Made, monkeypatch: pytest.MonkeyPatch, caplog):
    """A session that asks for CUDA on this host runs on the CPU, and onnxruntime says so in its log only."""
    monkeypatch.setattr(loaded, "require_gpu", lambda: None)
    monkeypatch.setattr(runners, "GPU", "cpu")
    monkeypatch.setattr(sessions, "providers", lambda *_: [CPU])  # what is left of the list when CUDA does not load
    told = r"gives CPUExecutionProvider, and when it was asked all \d+ nodes ran on CPUExecutionProvider"
    with pytest.raises(DeviceUnavailable, match=told):
        load(tonight.folder, tonight.manifest, "cuda")
    release = load(tonight.folder, tonight.manifest, "auto")
    assert release.device == "cpu"
    assert "the GPU of this host does not serve, the CPU does" in caplog.text


def test_nodes_are_counted_as_they_ran(tonight: Made, tmp_path: Path):
    lookup = open_session(tonight.folder / "lookup.onnx", Engine(), "cpu")
    score = open_session(tonight.folder / "score.onnx", Engine(threads=1), "cpu", tmp_path / "run")
    assert score.get_session_options().intra_op_num_threads == 1
    names = [one.name for one in score.get_inputs()]
    score.run(None, dict(zip(names, lookup.run(names, dict(tonight.golden[-1].inputs)), strict=True)))
    data = Path(score.end_profiling()).read_bytes()
    here = read_profile(data, "cpu")
    assert (set(here.nodes), here.strays) == ({CPU}, ())
    assert here.nodes[CPU] > 50
    assert {"MatMul", "Sigmoid", "Gather"} <= set(read_profile(data, "cuda").strays)


def test_shapes_and_ids_may_be_the_processors_and_numbers_may_not():
    def event(index: int, name: str, provider: str, made: str) -> dict[str, object]:
        args = {"op_name": name, "provider": provider, "node_index": str(index), "output_type_shape": [{made: [3]}]}
        return {"cat": "Node", "name": f"n{index}_kernel_time", "args": args}

    events = [{"cat": "Session", "name": "model_run"}, event(0, "MatMul", CUDA, "float")]
    events += [event(1, "Shape", CPU, "int64"), event(1, "Shape", CPU, "int64"), event(2, "Gather", CPU, "float")]
    events += [event(3, "TRTKernel", TENSORRT, "float16"), event(4, "Cast", CPU, "float16")]
    found = read_profile(json.dumps(events).encode(), "cuda")
    assert found == Placement({CUDA: 1, CPU: 3, TENSORRT: 1}, ("Cast", "Gather"))
    for damaged in (b"", b"[1]", b'[{"cat": "Node", "name": 1, "args": {"provider": "x"}}]'):
        with pytest.raises(ReleaseRefused, match="profile cannot be read"):
            read_profile(damaged, "cuda")


def test_providers_are_asked_for_in_order_with_their_options(tmp_path: Path):
    assert providers(Engine()) == [(CUDA, {}), CPU]
    assert providers(Engine(cuda_graphs=True)) == [(CUDA, {"enable_cuda_graph": "1"}), CPU]
    first, *rest = providers(Engine(cuda_graphs=True, tensorrt=tmp_path / "engines").of("shop", "a1b2"))
    assert rest == [(CUDA, {"enable_cuda_graph": "1"}), CPU]
    assert first[0] == TENSORRT
    folder = tmp_path / "engines/shop/a1b2"
    assert folder.is_dir()
    assert first[1] == {
        **{"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder), "trt_cuda_graph_enable": "1"},
    }
    assert {TENSORRT, CUDA} <= set(onnxruntime.get_all_providers())


def test_engines_go_with_the_releases_that_they_were_built_for(
    store: ObjectStore, tonight: Made, tomorrow: Made, stand_in: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A ranker follows two nights and goes back, with TensorRT's part of writing a file played."""
    real, engines = runners.proved, tmp_path / "engines"

    def building(path: Path, engine: Engine, on: str, ask: object) -> object:
        assert engine.tensorrt is not None
        engine.tensorrt.mkdir(parents=True, exist_ok=True)
        (engine.tensorrt / "score.engine").write_bytes(b"built")
        return real(path, engine, on, ask)

    monkeypatch.setattr(runners, "proved", building)
    others = [engines / "films" / ("f" * 64) / "theirs.engine", engines / PIPELINE / "notes" / "mine.txt"]
    for other in others:
        other.parent.mkdir(parents=True)
        other.write_bytes(b"not ours")
    third = next_night(tonight, tmp_path / "third", NIGHT + timedelta(days=2), seed=5)
    ids = [made.manifest.release for made in (tonight, tomorrow, third)]
    gone = engines / PIPELINE / ("0" * 64)  # of a release from before this process
    gone.mkdir()

    def built() -> set[str]:
        return {one.parent.name for one in (engines / PIPELINE).glob("*/score.engine")}

    with Ranker(store, PIPELINE, "cuda", tmp_path / "cache", engine=Engine(tensorrt=engines)) as ranker:
        assert (built(), gone.exists()) == ({ids[0]}, False)
        for made, expected in ((tomorrow, ids[:2]), (third, ids[1:]), (tomorrow, ids[1:])):
            publish_release(store, PIPELINE, made.folder, made.manifest, {})
            promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1, force=True)
            assert ranker.refresh()
            assert built() == set(expected) == {one.name for one in (tmp_path / "cache/releases").iterdir()}
    assert all(other.read_bytes() == b"not ours" for other in others)


def test_what_only_a_gpu_has_is_refused_on_the_cpu(store: ObjectStore, tmp_path: Path):
    with pytest.raises(InvalidConfig, match="threads is -1"):
        Engine(threads=-1)
    for engine in (Engine(cuda_graphs=True), Engine(tensorrt=tmp_path)):
        with pytest.raises(InvalidConfig, match="need a GPU"):
            Ranker(store, PIPELINE, "cpu", engine=engine)


def test_one_thread_answers_as_many_do(store: ObjectStore, tonight: Made):
    golden = tonight.golden[-1]
    with Ranker(store, PIPELINE, engine=Engine(threads=1)) as ranker:
        np.testing.assert_allclose(ranker.score(golden.inputs), golden.scores, rtol=1e-5, atol=1e-5)
    before = threading.active_count()
    with Ranker(store, PIPELINE, engine=Engine(threads=1)):
        assert threading.active_count() == before
