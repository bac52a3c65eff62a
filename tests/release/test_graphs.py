"""The exported graphs: what they say, what lies where, and that nothing of the host is left in them."""

import getpass
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tasks.errors import ParityBroken
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.release import scorer
from tasks.release.golden import reference_scores
from tasks.release.graphs import export
from tasks.release.lookups import Wires, encode, input_specs, wires
from tasks.release.scorer import traced_from
from tests.releases import Made, make_graph, make_parts, make_release

ROWS = ("request_vocabularies", "candidate_vocabularies")


def ask(folder: Path, name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def cut(inputs: dict[str, np.ndarray], made: Made, requests: int, candidates: int) -> dict[str, np.ndarray]:
    """The first requests and candidates of a golden request, repeated as often as it takes."""
    per = {spec.name: spec.per for spec in input_specs(made.data)}
    rows, columns = np.arange(requests) % 16, np.arange(candidates) % 9
    return {
        name: values[rows] if per[name] == "request" else values[rows][:, columns] for name, values in inputs.items()
    }


@pytest.mark.parametrize(("requests", "candidates"), [(1, 1), (1, 100), (2, 1), (33, 4), (1, 0), (0, 3)])
@pytest.mark.parametrize("which", [-1, -2])
def test_any_shape_and_mix_equals_torch(made: Made, requests: int, candidates: int, which: int):
    inputs = cut(dict(made.golden[which].inputs), made, requests, candidates)
    expected = reference_scores(made.network, made.bank, made.tables, made.data, inputs)
    assert expected.shape == (requests, candidates, len(made.data.objectives))
    np.testing.assert_allclose(ask(made.folder, "model.onnx", inputs), expected, rtol=1e-5, atol=1e-5)


def test_the_network_and_the_bank_give_the_scores_by_hand(full: Made):
    """Re-computes one score from the network's own outputs, so that reference and graph cannot be wrong together."""
    golden = full.golden[-2]
    ids = {role: values[:1] for role, values in encode(full.data, full.tables, golden.inputs).items()}
    shape, statistics = full.network.shape, full.tables.statistics
    item, row = ids["candidate_ids"][0, 2, 0], ids["cohort_item_row"][0, 2]
    pair = statistics.cohort_item[row] if row else np.append(statistics.item[item][:-1], np.float32(0))
    vector = np.concatenate([statistics.item[item], statistics.user[ids["user_row"][0]], pair])
    clamp = lambda values, rows: np.where(values < np.array(rows), values, 0)  # noqa: E731
    logits, features = full.network(
        torch.from_numpy(clamp(ids["request_ids"][0], shape.request_vocabularies)),
        torch.from_numpy(clamp(ids["candidate_ids"][0, 2], shape.candidate_vocabularies)),
        torch.from_numpy(ids["request_numbers"][0]),
        torch.from_numpy(ids["candidate_numbers"][0, 2]),
        torch.from_numpy(vector),
    )
    values = (logits + torch.from_numpy(full.bank[ids["slot"][0]]) @ features).detach().numpy()
    expected = [1 / (1 + np.exp(-values[0])), values[1]]
    np.testing.assert_allclose(ask(full.folder, "model.onnx", dict(golden.inputs))[0, 2], expected, rtol=1e-5)


def test_changing_one_slot_changes_only_the_requests_that_it_serves(full: Made, tmp_path: Path):
    golden = full.golden[-2]
    slots = encode(full.data, full.tables, golden.inputs)["slot"]
    slot = int(slots[0])
    bank = full.bank.copy()
    bank[slot] += 1.0
    for file in full.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "bank.bin").write_bytes(bank.tobytes())
    changed = np.abs(ask(tmp_path, "model.onnx", dict(golden.inputs)) - golden.scores).max(axis=(1, 2)) > 1e-4
    assert changed.tolist() == (slots == slot).tolist()


def test_a_requests_own_layers_are_run_once_whatever_its_candidates(full: Made, tmp_path: Path):
    """By onnxruntime's profile of one request: rows of each product with a layer, the request tower's among them."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(full.folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    session.run(None, cut(dict(full.golden[-1].inputs), full, 2, 7))
    events = json.loads(Path(session.end_profiling()).read_bytes())
    rows: dict[int, int] = {}
    for event in events:
        told = event.get("args", {})
        if "Gemm" in told.get("op_name", "") and event["name"].endswith("_kernel_time"):
            (made,) = told["output_type_shape"]
            count = made["float"][0]
            rows[count] = rows.get(count, 0) + 1
    assert rows == {2: 2, 14: 7}  # the request tower's two layers; all others
    graph = onnx.load(full.folder / "score.onnx", load_external_data=False).graph
    assert not [node.name for node in graph.node if node.op_type == "CastLike"]


def test_score_holds_only_numbers_and_lookup_no_weights(made: Made):
    score = onnx.load(made.folder / "score.onnx", load_external_data=False)
    kinds = {value.type.tensor_type.elem_type for value in (*score.graph.input, *score.graph.output)}
    assert onnx.TensorProto.STRING not in kinds
    assert not [node.op_type for node in score.graph.node if node.op_type in ("LabelEncoder", "StringNormalizer")]
    lookup = onnx.load(made.folder / "lookup.onnx", load_external_data=False)
    assert all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in lookup.graph.initializer)


def test_weights_lie_once_in_files_that_both_graphs_name_barely(made: Made):
    places = []
    for name in ("score.onnx", "model.onnx"):
        model = onnx.load(made.folder / name, load_external_data=False)
        outside = [one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
        places.append({one.name: tuple((entry.key, entry.value) for entry in one.external_data) for one in outside})
        inside = [
            one for one in model.graph.initializer if one not in outside and one.data_type == onnx.TensorProto.FLOAT
        ]
        assert not [one.name for one in inside if np.prod(one.dims) > 1]  # scalars, and tensors without elements
    assert places[0] == places[1]
    assert {dict(place)["location"] for place in places[0].values()} == {"base.bin", "statistics.bin", "bank.bin"}
    assert (made.folder / "bank.bin").read_bytes() == made.bank.tobytes()
    weights = sum(one.numel() for one in made.network.parameters())
    assert (made.folder / "base.bin").stat().st_size >= 4 * weights


def test_nothing_of_the_host_is_left_in_the_files(made: Made):
    canaries = [
        str(Path(__file__).parents[2]),
        str(made.folder),
        "site-packages",
        "/tmp/",
        getpass.getuser() + "/",
        ".py",
    ]
    for path in made.folder.iterdir():
        data = path.read_bytes()
        assert not [canary for canary in canaries if canary.encode() in data], path.name
    for name in ("model.onnx", "score.onnx", "lookup.onnx"):
        model = onnx.load(made.folder / name, load_external_data=False)
        described = (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.initializer)
        assert not [one for one in described if one.metadata_props or one.doc_string]
        assert not model.graph.value_info
        assert (model.producer_name, model.producer_version) == ("nightrank", "")


def test_a_graph_traced_with_weights_and_rows_in_another_folder_is_the_same_bytes(
    full: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No weight and no number of rows is in what is traced from a blank network: it makes the whole release alike."""
    monkeypatch.setattr(scorer, "_blank", lambda *_: scorer.Scorer(full.network, full.bank, full.tables.statistics))
    again = make_release(tmp_path / "elsewhere" / "deeper", make_graph("full"))
    assert again.graph == full.graph
    assert again.manifest == full.manifest


def test_other_weights_change_only_what_holds_them(full: Made, tmp_path: Path):
    """A graph is traced without weights, so a night that learned nothing new shares the graphs' blobs."""
    data, network, bank, tables, _ = make_parts("full")
    with torch.no_grad():
        network.head.bias.zero_()  # equal and zero tensors are what a clever filling would merge
        for table in network.factor_tables:
            table.weight.zero_()
    export(network, bank, tables, data, tmp_path, lambda *_: full.graph)
    changed = {path.name for path in tmp_path.iterdir() if path.read_bytes() != (full.folder / path.name).read_bytes()}
    assert changed == {"base.bin"}


def test_a_graph_is_traced_again_only_where_its_layers_or_inputs_are_others(full: Made):
    """What it is remembered by says nothing of how many rows the tables have, but how many tables there are."""
    shape, config, names = full.network.shape, full.network.config, wires(full.data, full.tables)
    known = traced_from(shape, config, names)
    more = {name: tuple(rows + 7 for rows in getattr(shape, name)) for name in ROWS}
    assert traced_from(shape.model_copy(update=more), config, names) == known
    for other in (
        traced_from(shape.model_copy(update={"candidate_vocabularies": (*more[ROWS[1]], 3)}), config, names),
        traced_from(shape.model_copy(update={"request_numbers": shape.request_numbers + 1}), config, names),
        traced_from(shape, config.model_copy(update={"hidden": 9}), names),
        traced_from(shape, config, replace(names, request_numbers="age")),
        traced_from(shape, config, replace(names, cohort_item_row=None)),
    ):
        assert other != known


def test_a_graph_is_asked_for_by_places_and_lengths_and_not_by_how_many_values_are_known():
    shape = RankerShape(
        request_vocabularies=(), candidate_vocabularies=(2,), request_numbers=0, candidate_numbers=0,
        request_statistics=(), candidate_statistics=(0,), joint_statistics=(), offsets=(0,), kinds=("binary",),
        request_value_vocabularies=(3,), request_values=(2,), candidate_value_vocabularies=(4, 5),
        candidate_values=(3, 2), candidate_vectors=(2, 1),
    )  # fmt: skip
    config = RankerConfig()
    names = Wires("candidate_ids", "slot", "user_row", None, None, None, None, "scores", candidate_values="values")
    known = traced_from(shape, config, names)
    more = {"request_value_vocabularies": (9,), "candidate_value_vocabularies": (9, 9)}
    assert traced_from(shape.model_copy(update=more), config, names) == known
    for other in ({"candidate_values": (2, 3)}, {"candidate_vectors": (1, 2)}, {"request_values": (1,)}):
        assert traced_from(shape.model_copy(update=other), config, names) != known


@pytest.mark.parametrize("what", ["shape", "dtype", "nan", "slots", "empty"])
def test_parts_that_do_not_fit_are_refused_before_anything_is_written(what: str, tmp_path: Path):
    data, network, bank, tables, _ = make_parts("full")
    broken = {
        "shape": bank[:, :1],
        "dtype": bank.astype(np.float64),
        "nan": np.where(np.arange(network.width) == 2, np.float32("nan"), bank),
        "slots": bank[:3],
        "empty": bank[:0],
    }[what]
    with pytest.raises(ParityBroken, match="bank"):
        export(network, broken, tables, data, tmp_path)
    assert not list(tmp_path.iterdir())


def test_exporting_leaves_the_network_as_it_was(full: Made):
    assert not full.network.training
    assert all(parameter.device.type == "cpu" for parameter in full.network.parameters())
    assert wires(full.data, full.tables).scores == "scores"
