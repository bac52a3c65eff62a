"""Vocabularies: ids are given once and for ever."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data import vocabulary
from tasks.data.contract import DataConfig
from tasks.data.vocabulary import Vocabulary
from tasks.errors import ObjectCorrupt
from tests.data.small_nights import Row, contract, midnight_us, worlds, write, write_all

# From code points: hypothesis's own text first spends seconds on a table of all of Unicode.
CHARACTERS = st.sampled_from("ab") | st.integers(0, 0xD7FF).map(chr) | st.integers(0xE000, sys.maxunicode).map(chr)
WORDS = st.lists(CHARACTERS, max_size=3).map("".join)
NIGHTS_OF_WORDS = st.lists(st.lists(st.none() | WORDS, max_size=6), max_size=5)


def words(*keys: str | None) -> pa.Array:
    return pa.array(keys, pa.string())


@given(nights=NIGHTS_OF_WORDS)
def test_an_id_once_given_never_changes_and_is_never_given_again(nights: list[list[str | None]]) -> None:
    known = Vocabulary("word", words())
    given: dict[str, int] = {}
    for night in nights:
        known = known.extend(words(*night))
        fresh = sorted({word for word in night if word} - set(given), key=str.encode)
        given |= {word: len(given) + position + 1 for position, word in enumerate(fresh)}
        assert {key: position + 1 for position, key in enumerate(known.keys.to_pylist())} == given
    everything = [word for night in nights for word in night]
    assert known.encode(words(*everything)).tolist() == [given.get(word or "", 0) for word in everything]


@settings(max_examples=30)
@given(world=worlds(), later=worlds())
def test_adding_nights_keeps_every_id(
    world: list[list[Row]], later: list[list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, folder = contract(), tmp_path_factory.mktemp("nights")
    before = vocabulary.extend(vocabulary.empty(data), [path for _, path in write_all(data, world, folder / "a")])
    after = vocabulary.extend(before, [path for _, path in write_all(data, later, folder / "b")])
    for name, known in before.items():
        assert after[name].keys.slice(0, known.size).equals(known.keys)
    assert vocabulary.sizes(before) == {name: known.size for name, known in before.items()}


@settings(max_examples=30)
@given(world=worlds(key="string", least=2))
def test_night_by_night_equals_all_nights_at_once_whatever_the_order_of_rows(
    world: list[list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, folder = contract("string"), tmp_path_factory.mktemp("nights")
    paths = [path for _, path in write_all(data, world, folder / "a")]
    reversed_paths = [path for _, path in write_all(data, [night[::-1] for night in world], folder / "b")]
    at_once = vocabulary.extend(vocabulary.empty(data), reversed_paths)
    stepwise = vocabulary.empty(data)
    for path in paths:
        stepwise = vocabulary.extend(stepwise, [path])
    assert all(stepwise[name].keys.equals(at_once[name].keys) for name in data.vocabularies)


def test_new_strings_are_appended_in_the_order_of_their_bytes() -> None:
    assert Vocabulary("w", words()).extend(words("é", "a", "Z", "😀", "ab")).keys.to_pylist() == [
        *("Z", "a", "ab"),
        *("é", "😀"),
    ]


def test_missing_values_and_their_request_markers_are_id_zero_and_never_keys() -> None:
    known = Vocabulary("w", words()).extend(words("", None, "x"))
    assert known.keys.to_pylist() == ["x"]
    assert known.encode(words("", None, "x", "y")).tolist() == [0, 0, 1, 0]
    numbers = Vocabulary("n", pa.array([], pa.int64())).extend(pa.array([-(2**63), None, 0, -1]))
    assert numbers.keys.to_pylist() == [-1, 0]
    assert numbers.encode(pa.array([0, None, -(2**63), 9])).tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_the_width_of_a_string_type_does_not_matter(kind: pa.DataType) -> None:
    known = Vocabulary("w", words("b", "a"))
    values = words("a", None, "b", "c")
    assert known.encode(values.cast(kind)).tolist() == [2, 0, 1, 0]
    assert known.extend(values.cast(kind)).keys.to_pylist() == ["b", "a", "c"]


def test_the_width_of_an_integer_type_does_not_matter() -> None:
    known = Vocabulary("n", pa.array([5, 3], pa.int64()))
    assert known.encode(pa.chunked_array([pa.array([3], pa.int8()), pa.array([5, 4], pa.int8())])).tolist() == [2, 1, 0]


def test_decode_is_the_inverse_of_encode() -> None:
    known = Vocabulary("w", words("b", "a"))
    assert known.decode(np.array([2, 0, 1])).to_pylist() == ["a", None, "b"]


def test_nothing_new_leaves_the_vocabulary_itself() -> None:
    known = Vocabulary("w", words("b", "a"))
    assert known.extend(words("a", None)) is known


def saved(data: DataConfig, folder: Path) -> Path:
    row = {
        **{"shopper": 5, "product": 9, "device": "web", "band": 1, "brand": None, "at": midnight_us(0)},
        **{"price": 1.0, "clicked": True, "stars": 1.0, "importance": 1.0, "hour": 1, "member": True, "note": None},
    }
    extended = vocabulary.extend(vocabulary.empty(data), [write(data, [row], folder / "night.parquet")])
    vocabulary.save(extended, folder / "vocabulary.parquet")
    return folder / "vocabulary.parquet"


def test_what_is_saved_is_loaded_and_equal_vocabularies_have_equal_bytes(tmp_path: Path) -> None:
    data = contract()
    path = saved(data, tmp_path)
    loaded = vocabulary.load(data, path)
    assert {name: known.keys.to_pylist() for name, known in loaded.items()} == {
        **{"shopper": [5], "product": [9], "device": ["web"], "band": [1], "brand": []}
    }
    vocabulary.save(loaded, tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


def test_a_column_that_the_contract_gains_starts_empty_and_one_that_it_loses_is_dropped(tmp_path: Path) -> None:
    data = contract()
    path = saved(data, tmp_path)
    renamed = data.model_copy(
        update={
            "columns": tuple(c.model_copy(update={"name": "tint"}) if c.name == "device" else c for c in data.columns)
        }
    )
    loaded = vocabulary.load(renamed, path)
    assert loaded["tint"].size == 0
    assert "device" not in loaded
    assert loaded["shopper"].keys.to_pylist() == [5]


def test_a_column_that_changed_its_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectCorrupt, match=r"'shopper'.*1 keys missing.*start a new pipeline"):
        vocabulary.load(contract("string"), saved(contract(), tmp_path))


def test_a_file_that_lost_rows_is_refused(tmp_path: Path) -> None:
    data = contract()
    path = saved(data, tmp_path)
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "id", pa.array(np.arange(2, 2 + len(table)))), path)
    with pytest.raises(ObjectCorrupt, match="not complete"):
        vocabulary.load(data, path)
