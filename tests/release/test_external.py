"""External files: where tensors start, and tables beyond the 2 GB that a graph can hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tasks.errors import ParityBroken, ReleaseRefused
from tasks.release.external import ExternalFiles, opened_by
from tasks.release.golden import TOLERANCE, check_parity, draw_requests, make_golden
from tasks.release.graphs import export
from tasks.release.lookups import as_model, encode
from tests.releases import make_parts


def place_of(tensor: TensorProto) -> tuple[str, int, int]:
    told = {entry.key: entry.value for entry in tensor.external_data}
    return told["location"], int(told["offset"]), int(told["length"])


def rows(folder: Path, *tables: TensorProto) -> onnxruntime.InferenceSession:
    """A graph that gives a row of each table."""
    nodes = [helper.make_node("Gather", [one.name, "row"], [f"{one.name}/row"]) for one in tables]
    row = helper.make_tensor_value_info("row", TensorProto.INT64, [])
    outputs = [helper.make_tensor_value_info(f"{one.name}/row", one.data_type, [one.dims[1]]) for one in tables]
    model = as_model(helper.make_graph(nodes, "rows", [row], outputs, list(tables)))
    (folder / "rows.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / "rows.onnx"), full_check=True)
    return onnxruntime.InferenceSession(folder / "rows.onnx", providers=["CPUExecutionProvider"])


def test_tensors_lie_one_behind_the_other_at_multiples_of_64_bytes(tmp_path: Path):
    files = ExternalFiles(tmp_path)
    first = np.arange(15, dtype=np.float32).reshape(5, 3)
    second, third = np.arange(10).reshape(5, 2), np.arange(5, dtype=np.int32)[:, None]
    placed = [files.place("a.bin", "first", first), files.place("a.bin", "second", second)]
    placed.append(files.place("b.bin", "third", third))
    assert [place_of(one) for one in placed] == [("a.bin", 0, 60), ("a.bin", 64, 80), ("b.bin", 0, 20)]
    assert (tmp_path / "a.bin").read_bytes() == first.tobytes() + bytes(4) + second.tobytes()
    assert files.names == ("a.bin", "b.bin")
    assert [one.tolist() for one in rows(tmp_path, *placed).run(None, {"row": np.array(3)})] == [
        [9, 10, 11],
        [6, 7],
        [3],
    ]


def test_a_tensor_is_written_once_whatever_graphs_name_it(tmp_path: Path):
    files = ExternalFiles(tmp_path)
    table = np.ones((4, 2), np.float32)
    assert files.place("a.bin", "table", table) == files.place("a.bin", "table", table)
    assert (tmp_path / "a.bin").stat().st_size == 32
    with pytest.raises(ParityBroken, match=r"tensor table is \[2, 4\] in one graph, \[4, 2\] in another"):
        files.place("a.bin", "table", table.T)


def test_what_an_earlier_attempt_left_is_replaced(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"left")
    (tmp_path / "b.bin").write_bytes(b"left")
    files = ExternalFiles(tmp_path)
    files.begin("b.bin")
    files.place("a.bin", "table", np.zeros((2, 2), np.float32))
    files.begin("a.bin")
    assert (tmp_path / "a.bin").read_bytes() == bytes(16)
    assert (tmp_path / "b.bin").read_bytes() == b""


@pytest.mark.soak
def test_tables_beyond_two_and_four_gigabytes_are_read_at_their_last_rows(tmp_path: Path):
    """The first ends beyond 2^32 bytes, so that its length and the second's offset need more than 32 bits."""
    files, last = ExternalFiles(tmp_path), 2**32 // 128 + 7
    large = np.zeros((last + 1, 32), np.float32)
    large[last], large[2**31 // 128] = 7, 5
    placed = [files.place("a.bin", "large", large)]
    del large
    placed.append(files.place("a.bin", "behind", np.full((last + 1, 1), 9, np.int32)))
    assert place_of(placed[0])[2] == place_of(placed[1])[1] == 128 * (last + 1) > 2**32
    session = rows(tmp_path, *placed)
    for row, expected in ((last, 7), (2**31 // 128, 5), (1, 0)):
        wide, narrow = session.run(None, {"row": np.array(row)})
        assert wide.tolist() == [expected] * 32
        assert narrow.tolist() == [9]


@pytest.mark.soak
def test_a_release_with_a_bank_beyond_two_gigabytes_answers_as_the_network_does(tmp_path: Path):
    data, network, bank, tables, rows_of_a_night = make_parts("full")
    slots = 2**31 // bank[0].nbytes + 1000
    large = np.zeros((slots, *bank.shape[1:]), np.float32)
    large[: len(bank)], large[-len(bank) :] = bank, bank
    moved = [replace(level, slots=level.slots + slots - len(bank)) for level in tables.levels]
    tables = replace(tables, levels=tuple(moved))
    export(network, large, tables, data, tmp_path, encoder_keys=0)
    assert (tmp_path / "bank.bin").stat().st_size > 2**31
    golden = make_golden(network, large, tables, data, draw_requests(data, rows_of_a_night))
    assert max(encode(data, tables, one.inputs)["slot"].max() for one in golden) * bank[0].nbytes > 2**31
    assert check_parity(data, tables, golden, tmp_path).model <= TOLERANCE


def test_what_a_graph_opens_is_found_wherever_its_tensors_stand(tmp_path: Path):
    """Initialisers, sparse ones, attributes of nodes, also inside branches and functions; what is inside is not."""

    def outside(name: str, file: str) -> TensorProto:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=file)
        return tensor

    def constant(file: str) -> onnx.NodeProto:
        return helper.make_node("Constant", [], ["value"], value=outside("value", file))

    value = helper.make_tensor_value_info("value", TensorProto.FLOAT, [2])
    branch = helper.make_graph([constant("branch.bin")], "branch", [], [value])
    other = helper.make_graph([constant("other.bin")], "other", [], [value])
    chosen = helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=other)
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    inside = helper.make_tensor("inside", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph(
        [constant("node.bin"), chosen], "all", [condition], [value], [outside("held", "held.bin"), inside]
    )
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside("sparse", "values.bin"))
    sparse.indices.CopyFrom(outside("places", "places.bin"))
    model = as_model(graph)
    model.functions.add(name="one", domain="ours").node.append(constant("function.bin"))
    for name, one in (("all.onnx", model), ("none.onnx", as_model(helper.make_graph([], "none", [], [], [inside])))):
        (tmp_path / name).write_bytes(one.SerializeToString())
    files = {"branch", "other", "node", "held", "values", "places", "function"}
    assert opened_by(sorted(tmp_path.glob("*.onnx"))) == {
        "all.onnx": tuple(sorted(f"{name}.bin" for name in files)),
        "none.onnx": (),
    }
    (tmp_path / "words.onnx").write_bytes(b"hello")
    with pytest.raises(ReleaseRefused, match=r"words\.onnx is no ONNX file"):
        opened_by([tmp_path / "words.onnx"])
