"""Smaller forms of the score graph: what their numbers are, against numpy and against the network itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from tasks.learning.bending import Bent
from tasks.learning.networks import Ranker
from tasks.release.export_config import VariantName
from tasks.release.golden import reference_scores
from tasks.release.graphs import export
from tasks.release.half_graph import halves, to_half
from tasks.release.int8_graph import quantise
from tasks.release.lookups import encode, wires
from tasks.release.manifest import OPTIONAL, TOGETHER
from tasks.release.scorer import PREFIX, trace
from tasks.release.variants import build, built_from, files_of
from tests.releases import Made, make_parts

NAMES: tuple[VariantName, ...] = ("fp16", "int8")


def built(made: Made, folder: Path) -> Path:
    """The release's own score graph and its variants, in a new folder."""
    folder.mkdir()
    for name in ("score.onnx", "base.bin", "statistics.bin", "bank.bin"):
        (folder / name).write_bytes((made.folder / name).read_bytes())
    for name in NAMES:
        build(name, folder, len(made.data.objectives))
    return folder


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory, release_of: Callable[[str], Made]) -> Callable[[str], Path]:
    """The folder of a kind of release, made once."""
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = built(release_of(kind), tmp_path_factory.mktemp("variants") / kind)
        return folders[kind]

    return of


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def wired(made: Made, request: int) -> dict[str, np.ndarray]:
    """What the score graphs are given for a golden request."""
    names = wires(made.data, made.tables).between()
    return {names[role]: values for role, values in encode(made.data, made.tables, made.golden[request].inputs).items()}


def apart(made: Made, scores: np.ndarray, expected: np.ndarray) -> float:
    rating = np.array([objective.kind == "rating" for objective in made.data.objectives])
    return float((np.abs(scores - expected) / np.where(rating, 1 + np.abs(expected), 1)).max())


def with_weights(kind: str, change: Callable[[np.ndarray], np.ndarray]) -> tuple[Ranker, np.ndarray]:
    """The network and the bank of a kind of release with other weights, where they have two or more axes."""
    _, network, bank, _, _ = make_parts(kind)
    state = {
        name: torch.from_numpy(change(one.numpy().copy())) if one.ndim > 1 else one
        for name, one in network.state_dict().items()
    }
    network.load_state_dict(state)
    return network, change(bank)


def rounded_to_bytes(values: np.ndarray) -> np.ndarray:
    """Rows rounded to 255 steps of a scale of their own, in double precision: the oracle."""
    largest = np.abs(values.astype(np.float64)).max(axis=-1, keepdims=True)
    step = np.where(largest > 0, largest / 127, 1.0)
    return (np.round(values / step) * step).astype(np.float32)


@pytest.mark.parametrize("kind", ["full", "clashing"])
def test_int8_says_what_the_network_says_with_rounded_rows(
    release_of: Callable[[str], Made], variants: Callable[[str], Path], kind: str
):
    """The whole graph against torch: tables, layers and bank are rounded row by row, and nothing else differs."""
    made, score = release_of(kind), session(variants(kind) / "score_int8.onnx")
    (network, bank), moved = with_weights(kind, rounded_to_bytes), 0.0
    for number, golden in enumerate(made.golden):
        expected = reference_scores(network, bank, made.tables, made.data, golden.inputs)
        scores = score.run(None, wired(made, number))[0]
        assert apart(made, scores, expected) < 1e-5
        moved = max(moved, apart(made, scores, golden.scores))
    assert 1e-4 < moved < 0.1


@pytest.mark.parametrize("kind", ["full", "clashing"])
def test_fp16_says_what_numpy_says_in_halves(
    release_of: Callable[[str], Made], variants: Callable[[str], Path], kind: str
):
    """ONNX's reference evaluator computes each node with numpy, in halves where the graph says so."""
    made, path = release_of(kind), variants(kind) / "score_fp16.onnx"
    score, reference = session(path), ReferenceEvaluator(str(path))
    for number in (-1, -2):
        inputs = wired(made, number)
        scores, expected = score.run(None, inputs)[0], reference.run(None, inputs)[0]
        assert apart(made, scores, expected) < 2e-3
        assert 1e-6 < apart(made, expected, made.golden[number].scores) < 5e-3


def test_fp16_is_close_to_the_network_with_rounded_weights(full: Made, variants: Callable[[str], Path]):
    network, bank = with_weights("full", lambda values: values.astype(np.float16).astype(np.float32))
    score = session(variants("full") / "score_fp16.onnx")
    for number, golden in enumerate(full.golden):
        expected = reference_scores(network, bank, full.tables, full.data, golden.inputs)
        assert apart(full, score.run(None, wired(full, number))[0], expected) < 3e-3


def test_fp16_normalises_raw_numbers_in_single_precision(full: Made, tmp_path: Path):
    """Years in seconds are far beyond the largest half, and their differences far below a half's steps."""
    data, network, bank, tables, _ = make_parts("full")
    network.request_normaliser.fit(torch.tensor([1e9, 0.5]), torch.tensor([30.0, 0.5]))
    network.candidate_normaliser.fit(torch.tensor([2e8]), torch.tensor([50.0]))
    export(network, bank, tables, data, tmp_path, lambda *_: full.graph)
    build("fp16", tmp_path, len(data.objectives))
    inputs = dict(full.golden[-2].inputs)
    random = np.random.default_rng(0)
    inputs["age"] = (1e9 + 30 * random.normal(size=inputs["age"].shape)).astype(np.float32)
    inputs["year"] = (2e8 + 50 * random.normal(size=inputs["year"].shape)).astype(np.float32)
    expected = reference_scores(network, bank, tables, data, inputs)
    names = wires(data, tables).between()
    given = {names[role]: values for role, values in encode(data, tables, inputs).items()}
    assert apart(full, session(tmp_path / "score_fp16.onnx").run(None, given)[0], expected) < 5e-3
    # The same, had they been rounded to as many bits as a half has.
    blurred = {name: np.ldexp(np.round(np.ldexp(inputs[name], -19)), 19) for name in ("age", "year")}
    assert apart(full, reference_scores(network, bank, tables, data, inputs | blurred), expected) > 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["full", "past"])
def test_a_request_alone_has_the_scores_that_it_has_in_a_batch(
    release_of: Callable[[str], Made], variants: Callable[[str], Path], kind: str, name: VariantName
):
    made, score = release_of(kind), session(variants(kind) / f"score_{name}.onnx")
    inputs = wired(made, -1)
    together = score.run(None, inputs)[0]
    for request in range(len(together)):
        alone = score.run(None, {key: values[request : request + 1] for key, values in inputs.items()})[0]
        np.testing.assert_allclose(alone[0], together[request], rtol=1e-6, atol=1e-6)


def test_activations_quantised_by_the_batch_would_not_have(full: Made, tmp_path: Path):
    """The negative control: onnxruntime's dynamic quantisation measures its scale over the whole batch."""
    from onnxruntime.quantization import quantize_dynamic

    for name in ("base.bin", "statistics.bin", "bank.bin"):
        (tmp_path / name).write_bytes((full.folder / name).read_bytes())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # layers become constants
    options.optimized_model_filepath = str(tmp_path / "whole.onnx")
    onnxruntime.InferenceSession(full.folder / "score.onnx", options, providers=["CPUExecutionProvider"])
    quantize_dynamic(tmp_path / "whole.onnx", tmp_path / "dynamic.onnx", op_types_to_quantize=["MatMul"])
    score, inputs = session(tmp_path / "dynamic.onnx"), wired(full, -1)
    together = score.run(None, inputs)[0]
    alone = [score.run(None, {key: v[one : one + 1] for key, v in inputs.items()})[0][0] for one in range(4)]
    assert np.abs(np.stack(alone) - together[:4]).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (33, 4)])
def test_any_shape_is_answered(full: Made, variants: Callable[[str], Path], name: VariantName, shape: tuple[int, int]):
    requests, candidates = np.arange(shape[0]) % 16, np.arange(shape[1]) % 9
    wide = ("candidate_ids", "candidate_numbers", "cohort_item_row")
    inputs = {key: v[requests][:, candidates] if key in wide else v[requests] for key, v in wired(full, -2).items()}
    scores = session(variants("full") / f"score_{name}.onnx").run(None, inputs)[0]
    assert scores.shape == (*shape, 2)
    if 0 not in shape:
        assert apart(full, scores, full.golden[-2].scores[requests][:, candidates]) < 0.05


@pytest.mark.parametrize(
    "bent", ["film", *(pytest.param(how, marks=pytest.mark.soak) for how in ("lora", "dense", "matching"))]
)
def test_adapters_of_every_kind_have_variants(bent: str, tmp_path: Path):
    how = None if bent == "matching" else Bent(bent, 2 if bent == "lora" else 0)  # type: ignore[arg-type]
    data, network, bank, tables, _ = make_parts("lean", bent=how, prototypes=3 if bent == "matching" else 0)
    bank = bank * np.float32(0.3)
    names = wires(data, tables)
    graph = trace(network.shape, network.config, names, how, network.prototypes)
    export(network, bank, tables, data, tmp_path, lambda *_: graph)
    random = np.random.default_rng(0)
    inputs = {
        "candidate_ids": random.integers(11, size=(5, 7, 1)),
        "slot": random.integers(len(bank), size=5),
        "user_row": random.integers(11, size=5),
    }
    expected = session(tmp_path / "score.onnx").run(None, inputs)[0]
    for name in NAMES:
        build(name, tmp_path, len(data.objectives))
        difference = np.abs(session(tmp_path / f"score_{name}.onnx").run(None, inputs)[0] - expected).max()
        assert 0 < difference < 0.05, (name, difference)


def test_weights_are_a_half_and_about_a_quarter_of_their_size_and_statistics_are_shared(
    release_of: Callable[[str], Made], variants: Callable[[str], Path]
):
    made, folder = release_of("full"), variants("full")
    size = {path.name: path.stat().st_size for path in folder.iterdir()}
    numbers, scales = made.bank.size, 2 * len(made.bank)
    assert size["bank_fp16.bin"] == 2 * numbers
    assert numbers + 4 * scales <= size["bank_int8.bin"] < numbers + 4 * scales + 64
    for name in NAMES:
        graph, *parts = files_of(name)
        model = onnx.load(folder / graph, load_external_data=False)
        outside = {
            entry.value for one in model.graph.initializer for entry in one.external_data if entry.key == "location"
        }
        assert outside == {*parts, "statistics.bin"}
        left = [one.name for one in model.graph.initializer if one.data_type == TensorProto.FLOAT and len(one.dims) > 1]
        assert all(one.endswith("/scale") or one.startswith(f"{PREFIX}statistics") for one in left)
        stored = onnx.numpy_helper.to_array(
            next(one for one in onnx.load(folder / graph).graph.initializer if one.name.startswith(f"{PREFIX}bank"))
        )
        if name == "fp16":
            assert stored.tobytes() == made.bank.astype("<f2").tobytes()
        else:
            assert (stored == quantise(made.bank)[0].reshape(stored.shape)).all()


def test_the_same_weights_give_the_same_bytes_and_nothing_of_the_host(
    full: Made, variants: Callable[[str], Path], tmp_path: Path
):
    again = built(full, tmp_path / "elsewhere")
    for name in NAMES:
        for file in files_of(name):
            data = (variants("full") / file).read_bytes()
            assert (again / file).read_bytes() == data
            assert not [one for one in (b"/tmp", b"site-packages", str(tmp_path).encode()) if one in data]
    assert built_from(("int8",)) != built_from(("fp16",))


def test_one_objectives_large_weights_do_not_blur_anothers(full: Made, tmp_path: Path):
    """Each objective of a slot has a scale of its own."""
    data, network, bank, tables, _ = make_parts("full")
    bank[:, 1] *= 1000.0
    export(network, bank, tables, data, tmp_path, lambda *_: full.graph)
    build("int8", tmp_path, 2)
    inputs = wired(full, -2)
    scores = session(tmp_path / "score_int8.onnx").run(None, inputs)[0]
    plain = session(tmp_path / "score.onnx").run(None, inputs)[0]
    assert np.abs(scores - plain)[..., 0].max() < 0.05
    assert np.abs(plain[..., 1]).max() > 1000


def test_a_manifest_knows_the_files_of_each_variant():
    assert {name: OPTIONAL[name] for name in NAMES} == {name: set(files_of(name)) for name in NAMES}
    assert set(NAMES) <= set(TOGETHER)


def test_a_row_of_zeros_stays_one_and_the_smallest_number_none():
    """Items without factors are told by rows of zeros, and get factors by their columns."""
    values = np.array([[0.0, 0.0], [1e-30, -1e-38], [1e-40, 0.0], [5e4, 1e5]], np.float32)
    assert (halves(values) != 0).any(axis=1).tolist() == [False, True, True, True]
    assert np.isfinite(halves(values)).all()
    q, scale = quantise(values)
    assert (q * scale != 0).any(axis=1).tolist() == [False, True, True, True]
    np.testing.assert_allclose(q[3] * scale[3], values[3], rtol=0.01)


def test_only_the_ends_of_a_graph_are_summed_in_single_precision():
    """A hand-made graph: the last product is exact where halves would lose a thousandth."""
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["hidden"], "a"),
        helper.make_node("Relu", ["hidden"], ["active"], "b"),
        helper.make_node("MatMul", ["active", "last"], ["change"], "c"),
        helper.make_node("Add", ["offset", "change"], ["scores"], "d"),
    ]
    value = helper.make_tensor_value_info
    numbers = {"first": np.float16([[0.1, -0.3]]), "last": np.float16([[0.7], [0.2]])}
    graph = helper.make_graph(
        nodes, "hand", [value("x", TensorProto.FLOAT, [1, 1]), value("offset", TensorProto.FLOAT, [1, 1])],
        [value("scores", TensorProto.FLOAT, [1, 1])],
        [onnx.numpy_helper.from_array(one, name) for name, one in numbers.items()],
    )  # fmt: skip
    floats = frozenset({"x", "offset", "first", "last", "hidden", "active", "change", "scores"})
    to_half(graph, floats, frozenset(numbers))
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model, full_check=True)
    x, offset = np.float32([[1.234567]]), np.float32([[100.03]])
    hidden = np.maximum(x.astype(np.float16) @ numbers["first"], np.float16(0))
    expected = offset + hidden.astype(np.float32) @ numbers["last"].astype(np.float32)
    found = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x, "offset": offset}
    )[0]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert abs(float(np.float16(expected[0, 0])) - expected[0, 0]) > 1e-3


def test_large_tables_are_read_part_by_part(
    full: Made, variants: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tasks.release.variants.CHUNK", 7)
    parts = built(full, tmp_path / "parts")
    for name in NAMES:
        for file in files_of(name):
            assert (parts / file).read_bytes() == (variants("full") / file).read_bytes()
