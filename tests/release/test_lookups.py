"""The look-up graph against its oracle in numpy, and against keys written out by hand."""

from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest

from tasks.data.statistics import StatisticsTables
from tasks.data.vocabulary import Vocabulary
from tasks.release.lookups import encode, input_specs, wires
from tasks.release.tables import LevelTable, ServingTables, read_tables
from tests.release.conftest import Lookup
from tests.releases import Made, contract, make_parts


def run(model: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def tiny() -> tuple[object, ServingTables]:
    """Users ann, bob; items 10, 20, 30; job x age in a ladder user -> zone; pair (job 1, item 2) known."""
    data = contract("full")
    keys = {"user": ["ann", "bob"], "item": [10, 20, 30], "job": ["cook", "smith"], "zone": [7, 9], "genre": ["new"]}
    vocabularies = {name: Vocabulary(name, pa.array(values)) for name, values in keys.items()}
    statistics = StatisticsTables(
        names=(),
        base=np.zeros(2, np.float32),
        item=np.zeros((4, 3), np.float32),
        user=np.zeros((3, 3), np.float32),
        cohort_columns=("job",),
        cohort_radices=(3, 4),
        cohort_item_keys=np.array([1 * 4 + 2]),
        cohort_item=np.zeros((2, 3), np.float32),
    )
    levels = (
        LevelTable(("user",), (3,), np.array([1]), np.array([5])),
        LevelTable(("job", "zone"), (3, 3), np.array([1 * 3 + 2]), np.array([6])),
    )
    return data, ServingTables(vocabularies, statistics, levels)


REQUEST = {
    "user": np.array(["ann", "bob", "eve", ""], object),
    "job": np.array(["cook", "cook", "smith", ""], object),
    "zone": np.array([7, 9, 9, -(2**63)]),
    "age": np.array([30, np.nan, 50, 60], np.float32),
    "member": np.array([0, 1, np.nan, 1], np.float32),
    "item": np.array([[10, 20], [20, 99], [30, -(2**63)], [20, 10]]),
    "genre": np.array([["new", "old"]] * 4, object),
    "year": np.full((4, 2), 1999, np.float32),
}


def test_ids_slots_and_pairs_are_those_worked_out_by_hand(lookup: Lookup):
    data, tables = tiny()
    found = run(lookup(data, tables), REQUEST)
    assert found["user_row"].tolist() == [1, 2, 0, 0]
    assert found["candidate_ids"][..., 0].tolist() == [[1, 2], [2, 0], [3, 0], [2, 1]]
    assert found["candidate_ids"][..., 1].tolist() == [[1, 0]] * 4
    assert found["request_ids"].tolist() == [[1, 1], [1, 2], [2, 2], [0, 0]]
    # ann has an adapter of her own; bob's is that of cooks in zone 9; nobody knows smiths in zone 9
    assert found["slot"].tolist() == [5, 6, 0, 0]
    assert found["cohort_item_row"].tolist() == [[0, 1], [1, 0], [0, 0], [0, 0]]
    np.testing.assert_array_equal(found["request_numbers"], np.stack([REQUEST["age"], REQUEST["member"]], axis=-1))


def test_the_graph_equals_its_oracle_on_golden_requests(made: Made, lookup: Lookup):
    names = wires(made.data, made.tables)
    model = lookup(made.data, made.tables)
    for golden in made.golden:
        found = run(model, dict(golden.inputs))
        expected = encode(made.data, made.tables, golden.inputs)
        assert {names.between()[role] for role in expected} == set(found)
        for role, values in expected.items():
            np.testing.assert_array_equal(found[names.between()[role]], values, err_msg=role)


def test_golden_requests_reach_own_adapters_parents_and_the_base(full: Made):
    slots = np.concatenate([encode(full.data, full.tables, golden.inputs)["slot"] for golden in full.golden])
    own = set(full.tables.levels[0].slots.tolist())
    assert own & set(slots.tolist())
    assert set(full.tables.levels[1].slots.tolist()) & set(slots.tolist())
    assert 0 in slots


@pytest.mark.parametrize("empty", ["user", "item", "job", "genre", "levels", "pairs"])
def test_nothing_known_means_unknown(empty: str, lookup: Lookup):
    data, tables = tiny()
    statistics = tables.statistics
    if empty == "levels":
        none = np.zeros(0, np.int64)
        levels = tuple(LevelTable(level.columns, level.radices, none, none) for level in tables.levels)
        tables = ServingTables(tables.vocabularies, statistics, levels)
    elif empty == "pairs":
        fields = vars(statistics) | {
            "cohort_item_keys": np.zeros(0, np.int64),
            "cohort_item": np.zeros((1, 3), np.float32),
        }
        tables = ServingTables(tables.vocabularies, StatisticsTables(**fields), tables.levels)
    else:
        kept = dict(tables.vocabularies)
        kept[empty] = Vocabulary(empty, kept[empty].keys[:0])
        tables = ServingTables(kept, statistics, tables.levels)
    found = run(lookup(data, tables), REQUEST)
    for role, values in encode(data, tables, REQUEST).items():
        np.testing.assert_array_equal(found[role], values)
    blank = {"user": "user_row", "levels": "slot", "pairs": "cohort_item_row"}
    assert not found[blank[empty]].any() if empty in blank else True


def test_columns_may_be_called_like_tensors_of_ours():
    data, _, _, tables, _ = make_parts("clashing")
    names = wires(data, tables)
    assert (names.slot, names.scores, names.candidate_ids) == ("slot_", "scores_", "candidate_ids_")
    assert not set(names.between().values()) & {spec.name for spec in input_specs(data)}


def test_missing_markers_and_shapes_are_stated():
    specs = {spec.name: spec for spec in input_specs(contract("full"))}
    assert list(specs) == ["user", "job", "zone", "age", "member", "item", "genre", "year"]
    assert (specs["user"].missing, specs["zone"].missing, specs["age"].missing) == ("", -(2**63), None)
    assert specs["genre"].shape == ("requests", "candidates")
    assert specs["member"].dtype == specs["year"].dtype == "float32"


def test_tables_read_back_as_they_were_written(made: Made):
    read = read_tables(made.data, made.folder)
    assert {name: one.keys for name, one in read.vocabularies.items()} == {
        name: one.keys for name, one in made.tables.vocabularies.items()
    }
    for name, value in vars(made.tables.statistics).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(read.statistics, name), value, err_msg=name, strict=True)
        else:
            assert getattr(read.statistics, name) == value
    for ours, theirs in zip(made.tables.levels, read.levels, strict=True):
        assert (ours.columns, ours.radices) == (theirs.columns, theirs.radices)
        np.testing.assert_array_equal(ours.keys, theirs.keys)
        np.testing.assert_array_equal(ours.slots, theirs.slots)


LISTS = {
    "user": np.array(["ann", "eve"], object),
    "codes": np.array([[7, 5], [-(2**63), -(2**63)]]),
    "mood": np.array([[0.5, 1.0], [np.nan, np.nan]], np.float32),
    "request_values": np.array([["x", "", ""], ["z", "y", "x"]], object),
    "item": np.array([[10, 10], [10, 11]]),
    "tags": np.array([[["a", "b", ""], ["", "", ""]], [["new", "b", "b"], ["a", "", "b"]]], object),
    "look": np.arange(8, dtype=np.float32).reshape(2, 2, 2),
    "voice": np.full((2, 2, 1), 9, np.float32),
}


def listed(**keys: list[object]) -> ServingTables:
    known = {"user": ["ann"], "item": [10], "codes": [5, 7], "request_values": ["y", "x"], "tags": ["b", "a"]} | keys
    types = {"item": pa.int64(), "codes": pa.int64()}
    vocabularies = {name: Vocabulary(name, pa.array(one, types.get(name, pa.string()))) for name, one in known.items()}
    statistics = StatisticsTables(
        *((), np.zeros(1, np.float32), np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)),
        *((), (), np.zeros(0, np.int64), np.zeros((0, 2), np.float32)),
    )
    return ServingTables(vocabularies, statistics, (LevelTable(("user",), (2,), np.array([1]), np.array([1])),))


def test_every_value_of_a_list_has_its_id_and_what_fills_it_up_has_none(lookup: Lookup):
    data, tables = contract("lists"), listed()
    names = wires(data, tables)
    assert (names.request_values, names.candidate_values) == ("request_values_", "candidate_values")
    found = run(lookup(data, tables), LISTS)
    assert found["request_values_"].tolist() == [[2, 1, 2, -1, -1], [-1, -1, 0, 1, 2]]
    assert found["candidate_values"].tolist() == [[[2, 1, -1], [-1, -1, -1]], [[0, 1, 1], [2, -1, 1]]]
    np.testing.assert_array_equal(found["request_vectors"], LISTS["mood"])
    expected = [[[0, 1, 9], [2, 3, 9]], [[4, 5, 9], [6, 7, 9]]]
    assert found["candidate_vectors"].tolist() == expected
    for role, values in encode(data, tables, LISTS).items():
        np.testing.assert_array_equal(found[names.between()[role]], values, err_msg=role)


def test_without_a_known_value_all_are_unknown_and_an_empty_list_is_still_empty(lookup: Lookup):
    data, tables = contract("lists"), listed(tags=[])
    found = run(lookup(data, tables), LISTS)
    assert found["candidate_values"].tolist() == [[[0, 0, -1], [-1, -1, -1]], [[0, 0, 0], [0, -1, 0]]]
    np.testing.assert_array_equal(found["candidate_values"], encode(data, tables, LISTS)["candidate_values"])


def test_lists_state_their_places():
    specs = {spec.name: spec for spec in input_specs(contract("lists"), {"tags": ("a", "b")})}
    assert specs["tags"].shape == ("requests", "candidates", 3)
    assert (specs["tags"].dtype, specs["tags"].missing, specs["tags"].values) == ("string", "", 3)
    assert (specs["mood"].dtype, specs["mood"].missing, specs["mood"].shape) == ("float32", None, ("requests", 2))
    assert specs["tags"].as_json()["example"] == ("a", "b")
    assert "values" not in specs["user"].as_json()
