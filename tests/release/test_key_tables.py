"""Look-ups of many keys: tables against dictionaries, graphs against tables, and keys that were made to collide."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tasks.errors import ParityBroken
from tasks.release import key_tables
from tasks.release.external import ExternalFiles
from tasks.release.key_tables import FULLEST, build_table, seeds_of
from tasks.release.lookups import as_model
from tasks.release.murmur import hash_int64, hash_strings
from tasks.release.nodes import PARTS, Graph

Keys = pa.Array | npt.NDArray[np.int64]
STRINGS = pa.array([f"user_{number}" for number in range(3000)])
INTEGERS = np.random.default_rng(0).permutation(9000)[:3000] - 4500
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def asked(folder: Path, keys: Keys, values: npt.NDArray[np.int64], default: int, wanted: npt.NDArray) -> npt.NDArray:
    """What a graph of one look-up answers; its keys lie in a file."""
    graph = Graph(ExternalFiles(folder), 0)
    graph.look_up("wanted", "found", keys, values, default, "table.bin", "keys")
    kind = TensorProto.INT64 if wanted.dtype == np.int64 else TensorProto.STRING
    axes = [f"axis{number}" for number in range(wanted.ndim)]
    given, found = (
        helper.make_tensor_value_info(*one, axes) for one in (("wanted", kind), ("found", TensorProto.INT64))
    )
    model = as_model(helper.make_graph(graph.nodes, "one", [given], [found], list(graph.constants.values())))
    (folder / "one.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / "one.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(folder / "one.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"wanted": wanted})[0])


@settings(max_examples=40)
@given(st.dictionaries(TEXT, st.integers(-1, 2**30), min_size=1), st.lists(TEXT), st.sampled_from([0, -1]))
def test_a_table_of_strings_is_a_dictionary(known: dict[str, int], others: list[str], default: int):
    table = build_table(pa.array(list(known)), np.array(list(known.values())), default)
    wanted = [*known, *others]
    assert table.find(pa.array(wanted, pa.string())).tolist() == [known.get(one, default) for one in wanted]


@settings(max_examples=40)
@given(
    st.dictionaries(st.integers(-(2**63), 2**63 - 1), st.integers(-1, 2**30), min_size=1),
    st.lists(st.integers(-(2**63), 2**63 - 1)),
    st.sampled_from([0, -1]),
)
def test_a_table_of_integers_is_a_dictionary(known: dict[int, int], others: list[int], default: int):
    table = build_table(np.array(list(known), np.int64), np.array(list(known.values())), default)
    wanted = [*known, *others]
    assert table.find(np.array(wanted, np.int64)).tolist() == [known.get(one, default) for one in wanted]


@pytest.mark.parametrize("default", [0, -1])
@pytest.mark.parametrize("shape", [(4000,), (40, 100), (10, 20, 20), (0, 7), (3, 0)])
@pytest.mark.parametrize("kind", ["strings", "integers"])
def test_a_graph_answers_as_the_table_does(kind: str, shape: tuple[int, ...], default: int, tmp_path: Path):
    keys = STRINGS if kind == "strings" else INTEGERS
    values, drawn = np.arange(1, 3001), np.random.default_rng(1).integers(4000, size=shape)
    unknown = [f"user_{number}" for number in range(3000, 4000)] if kind == "strings" else range(9000, 10_000)
    possible = np.array([*(keys.tolist()), *unknown], object if kind == "strings" else np.int64)
    found = asked(tmp_path, keys, values, default, possible[drawn])
    np.testing.assert_array_equal(found, np.where(drawn < 3000, drawn + 1, default))
    flat = possible[drawn].ravel()
    table = build_table(keys, values, default)
    np.testing.assert_array_equal(table.find(pa.array(flat, pa.string()) if kind == "strings" else flat), found.ravel())


def test_the_missing_marker_is_a_key_like_any_other_and_its_value_may_be_below_the_default(tmp_path: Path):
    least = -(2**63)
    found = asked(tmp_path, np.array([5, least]), np.array([1, -1]), 0, np.array([[least, 5, 0, -least - 1]]))
    assert found.tolist() == [[-1, 1, 0, 0]]
    wanted = np.array(["", "a", "\x01", "\x00"], object)
    assert asked(tmp_path, pa.array(["a", ""]), np.array([1, -1]), 0, wanted).tolist() == [-1, 1, 0, 0]


def test_integers_made_to_share_a_bucket_move_to_other_seeds(tmp_path: Path):
    """More of them in one bucket than a look-up compares, under the first seed and under the second."""
    possible, count = np.arange(20_000), 2 * (FULLEST + 1)
    buckets = 1 << (count - 1).bit_length()
    hit = [possible[hash_int64(possible, seeds_of(attempt, 1)[0]) % buckets == 7] for attempt in (0, 1)]
    keys = np.concatenate([hit[0][: FULLEST + 1], np.setdiff1d(hit[1], hit[0])[: FULLEST + 1]])
    table = build_table(keys, np.arange(1, count + 1), 0)
    assert table.seeds == seeds_of(2, 1)
    assert table.probes <= FULLEST
    assert asked(tmp_path, keys, np.arange(1, count + 1), 0, keys).tolist() == list(range(1, count + 1))


def test_strings_that_collide_in_one_hash_are_told_apart_by_the_other(tmp_path: Path):
    many = pa.array([f"item-{number}" for number in range(400_000)])
    first = hash_strings(many, seeds_of(0, 2)[0])
    order = np.argsort(first, kind="stable")
    at = np.flatnonzero(first[order][1:] == first[order][:-1])
    assert len(at) > 5
    pairs = many.take(pa.array(np.stack([order[at], order[at + 1]], axis=1).ravel()))
    values = np.arange(1, len(pairs) + 1)
    assert build_table(pairs, values, 0).seeds == seeds_of(0, 2)
    assert asked(tmp_path, pairs, values, 0, np.array(pairs.tolist(), object)).tolist() == values.tolist()


def test_seeds_that_confuse_two_strings_are_passed_over(monkeypatch: pytest.MonkeyPatch):
    def weak(keys: pa.Array, seed: int) -> npt.NDArray[np.uint32]:
        found = hash_strings(keys, seed)
        return found & np.uint32(0xFF) if seed in (*seeds_of(0, 2), *seeds_of(1, 2)) else found

    monkeypatch.setattr(key_tables, "hash_strings", weak)
    table = build_table(STRINGS, np.arange(1, 3001), 0)  # 3,000 keys have 65,536 values under weak seeds
    assert table.seeds == seeds_of(2, 2)
    assert table.find(STRINGS).tolist() == list(range(1, 3001))


@pytest.mark.parametrize("keys", [np.array([4, 2, 4]), pa.array(["a", "b", "a"])])
def test_keys_that_stand_twice_are_refused(keys: Keys):
    with pytest.raises(ParityBroken, match="1 of 3 keys of a look-up stand there twice"):
        build_table(keys, np.arange(3), 0)


def test_keys_that_no_seed_tells_apart_are_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(key_tables, "ATTEMPTS", 1)
    possible = np.arange(20_000)
    one_bucket = possible[hash_int64(possible, seeds_of(0, 1)[0]) % 32 == 7][: FULLEST + 1]
    with pytest.raises(ParityBroken, match=r"17 keys .* under any of 1 seeds \(17 in the fullest bucket, limit 16\)"):
        build_table(one_bucket, np.arange(len(one_bucket)), 0)


def test_more_keys_than_places_have_numbers_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(key_tables, "MOST", 1024)
    with pytest.raises(ParityBroken, match="3000 keys, the limit is 1024"):
        build_table(INTEGERS, np.arange(3000), 0)


def test_equal_keys_give_equal_files_and_a_key_more_gives_a_table_with_one_more(tmp_path: Path):
    first, again, more = (build_table(STRINGS[:size], np.arange(size), 0) for size in (2048, 2048, 2049))
    for part in PARTS:
        np.testing.assert_array_equal(getattr(first, part), getattr(again, part), strict=True)
    assert [len(one.keys) - one.probes for one in (first, more)] == [2048, 2049]
    assert [len(one.starts) for one in (first, more)] == [2048, 4096]


def test_unknown_strings_are_taken_for_known_ones_as_rarely_as_chance_says():
    """Each half of 64 bits coincides as often as 32 random bits do, and both together for none of half a million."""
    numbers = pa.array(np.arange(600_000)).cast(pa.string())
    keys = pc.binary_join_element_wise("user_", numbers, "")
    known, unknown = keys[:100_000], keys[100_000:]
    table = build_table(known, np.arange(1, 100_001), 0)
    assert not table.find(unknown).any()
    for prefix, seed in zip(("", key_tables.PREFIX), table.seeds, strict=True):
        hashes = hash_strings(pc.binary_join_element_wise(prefix, keys, ""), seed)
        coincide, expected = int(np.isin(hashes[100_000:], hashes[:100_000]).sum()), 5e5 * 1e5 / 2**32
        assert abs(coincide - expected) < 5 * expected**0.5
