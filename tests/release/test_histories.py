"""Histories in requests: the look-up graph against its oracle and against ids and gaps worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest

from tasks.data.vocabulary import Vocabulary
from tasks.errors import ParityBroken
from tasks.release.golden import draw_requests
from tasks.release.graphs import export
from tasks.release.histories import FARTHEST
from tasks.release.lookups import encode, input_specs, wires
from tasks.release.tables import ServingTables, read_tables, write_tables
from tests.release.conftest import Lookup
from tests.release.test_lookups import run
from tests.releases import HISTORY, make_parts

DAY, LEAST = 86_400_000_000, -(2**63)
NOON = 20_000 * DAY + DAY // 2


@pytest.fixture(scope="module")
def parts():
    return make_parts("past")


def test_the_inputs_are_the_columns_of_earlier_rows_and_when_it_is_asked(parts):
    specs = {spec.name: spec for spec in input_specs(parts[0], history=HISTORY)}
    assert [(name, spec.dtype, spec.of) for name, spec in specs.items()] == [
        *(("user", "string", None), ("history_item", "float32", None), ("item", "int64", None)),
        *(("genre", "string", None), ("at", "int64", None)),
        *(("history_item_", "int64", "item"), ("history_genre", "string", "genre")),
        *(("history_stars", "float32", "stars"), ("history_at", "int64", "at")),
    ]
    assert specs["history_genre"].shape == ("requests", HISTORY)
    assert not [spec for spec in input_specs(parts[0]) if spec.of is not None or spec.name == "at"]


def test_the_graph_equals_its_oracle_on_golden_requests(parts, lookup: Lookup):
    data, _, _, tables, rows = parts
    names = wires(data, tables)
    graph = lookup(data, tables)
    requests = draw_requests(data, rows, history=HISTORY)
    for request in requests:
        found, expected = run(graph, dict(request)), encode(data, tables, request)
        for role, name in names.between().items():
            np.testing.assert_array_equal(found[name], expected[role], err_msg=role)
    said = [encode(data, tables, request) for request in requests]
    lengths = [(one["history_ids"][..., 0] >= 0).sum(axis=1) for one in said]
    assert {0, HISTORY} < set(np.concatenate(lengths).tolist())
    assert (np.concatenate([one["history_gaps"].ravel() for one in said]) > 0).any()
    times = [request["history_at"][request["history_item_"] != LEAST] for request in requests]
    assert all((np.diff(one) <= 0).all() for one in (requests[0]["history_at"], requests[2]["history_at"]))
    assert any((one == LEAST).any() for one in times), "no golden request misses a time"


def test_ids_and_gaps_are_those_worked_out_by_hand(parts, lookup: Lookup):
    data, _, _, tables, _ = parts
    keys = {"user": ["ann"], "item": [10, 20, 30], "genre": ["new", "old"]}
    own = {name: Vocabulary(name, pa.array(values)) for name, values in keys.items()}
    small = ServingTables(own, tables.statistics, (), HISTORY)
    request = {
        "user": np.array(["ann", "bob", "eve"], object),
        "history_item": np.zeros(3, np.float32),
        "item": np.array([[10, 20], [99, LEAST], [30, 10]]),
        "genre": np.array([["new", ""]] * 3, object),
        "at": np.array([NOON, LEAST, 2 * FARTHEST]),
        "history_item_": np.array([[20, 99, 10, LEAST], [30, LEAST, LEAST, LEAST], [LEAST] * 4]),
        "history_genre": np.array([["old", "never", "", ""], ["new", "", "", ""], [""] * 4], object),
        "history_stars": np.array([[1, np.nan, 0, np.nan], [1, 1, 1, 1], [np.nan] * 4], np.float32),
        "history_at": np.array([
            [NOON - 1, NOON - DAY // 2 - 2_999_999, NOON - 2 * DAY, LEAST], [NOON - DAY] * 4, [-2 * FARTHEST] * 4
        ]),
    }  # fmt: skip
    found = run(lookup(data, small), request)
    assert found["candidate_ids"][..., 0].tolist() == [[1, 2], [0, 0], [3, 1]]
    assert found["candidate_ids"][..., 1].tolist() == [[1, 0]] * 3
    assert found["history_ids"][..., 0].tolist() == [[2, 0, 1, -1], [3, -1, -1, -1], [-1] * 4]
    assert found["history_ids"][..., 1].tolist() == [[2, 0, 0, 0], [1, 0, 0, 0], [0] * 4]
    # Not a second; half a day, two seconds and a bit; two days; nobody knows.
    farthest = 2 * FARTHEST // 1_000_000
    assert found["history_gaps"].tolist() == [[0, 43_202, 2 * 86_400, 0], [0] * 4, [farthest] * 4]
    np.testing.assert_array_equal(found["history_labels"], request["history_stars"])


def test_gaps_of_every_length_are_exact(parts, lookup: Lookup):
    """A minute, an hour and years, on both sides of every power of two of microseconds."""
    data, _, _, tables, rows = parts
    names = wires(data, tables)
    graph = lookup(data, tables)
    request = dict(draw_requests(data, rows, history=HISTORY)[-1])
    count = len(request["at"])
    gaps = np.array([(1 << power) + off for power in range(1, 60) for off in (-1, 0, 12_345_678)], np.int64)
    request["at"] = np.full(count, NOON)
    for start in range(0, len(gaps), count * HISTORY):
        some = np.resize(gaps[start:], (count, HISTORY))
        request["history_at"] = NOON - some
        found = run(graph, request)[names.between()["history_gaps"]]
        np.testing.assert_array_equal(found, np.maximum(some, 0) // 1_000_000)


def test_tables_say_how_long_histories_are_and_a_network_of_other_ones_is_refused(parts, tmp_path):
    data, network, bank, tables, _ = parts
    write_tables(tables, tmp_path)
    assert read_tables(data, tmp_path).history == HISTORY
    shorter = ServingTables(tables.vocabularies, tables.statistics, tables.levels, 2)
    with pytest.raises(ParityBroken, match=f"carry 2 entries of a history, the network reads {HISTORY}"):
        export(network, bank, shorter, data, tmp_path)
