"""List columns on their way in: schema, rules, vocabularies and tables, against lists written out by hand."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tasks.data import columns, quarantine, vocabulary
from tasks.data.columns import build_rows
from tasks.data.contract import ColumnConfig, DataConfig, SegmentsConfig, StatisticsConfig
from tasks.data.interactions import footers
from tasks.data.lists import padded, values_of
from tasks.data.quarantine import REASONS, Split, night_view, split
from tasks.data.rules import rules
from tasks.errors import SchemaBroken
from tests.data import nights
from tests.data.nights import NIGHT, row

TAGS = {"name": "tags", "role": "candidate", "dtype": "string", "kind": "multi", "max_values": 3, "nullable": True}
CODES = {"name": "codes", "role": "request", "dtype": "int64", "kind": "multi"}
MOODS = {"name": "moods", "role": "request", "dtype": "string", "kind": "multi", "max_values": 2}
LOOK = {"name": "look", "role": "candidate", "dtype": "float64", "kind": "dense", "length": 3, "nullable": True}
VOICE = {"name": "voice", "role": "candidate", "dtype": "float64", "kind": "dense", "length": 2}
IGNORED = (
    {"name": "opened", "role": "ignored", "dtype": "bool", "kind": "multi"},
    {"name": "instants", "role": "ignored", "dtype": "timestamp", "kind": "multi", "max_values": 1},
    {"name": "raw", "role": "ignored", "dtype": "float64", "kind": "dense", "length": 2},
)
"""Whatever is in them, no row is bad for it."""
KINDS = {
    "opened": pa.list_(pa.bool_()),
    "instants": pa.large_list(pa.timestamp("ms")),
    "raw": pa.list_(pa.float64()),
    "tags": pa.list_(pa.string()),
    "codes": pa.list_(pa.int64()),
    "moods": pa.list_(pa.string()),
    "look": pa.list_(pa.float32()),
    "voice": pa.list_(pa.float32()),
}
UNREAD: dict[str, Any] = {
    "opened": [True, None] * 20, "instants": [datetime(1, 1, 1, tzinfo=UTC), None], "raw": [1e300, None, 0.1],
}  # fmt: skip
GOOD = UNREAD | {"tags": ["a", "b"], "codes": [7], "moods": ["calm"], "look": [1.0, 2.0, 3.0], "voice": [0.5, 0.25]}


def contract() -> DataConfig:
    plain = nights.contract()
    lists = tuple(ColumnConfig.model_validate(column) for column in (LOOK, TAGS, CODES, VOICE, *IGNORED, MOODS))
    return DataConfig.model_validate(plain.model_dump() | {"columns": (*plain.columns, *lists)})


def write(path: Path, rows: list[dict[str, Any]], **kinds: pa.DataType) -> Path:
    schema = pa.schema([*nights.SCHEMA, *(pa.field(name, kind) for name, kind in (KINDS | kinds).items())])
    return nights.write(path, rows, schema)


def divide(folder: Path, *files: Path) -> Split:
    data, held = contract(), footers(contract(), list(files))
    with night_view(data, files, held, folder) as connection:
        rows = sum(footer.rows for footer in held)
        return split(connection, data, rules(data, NIGHT), rows, folder / "clean.parquet", folder / "bad.parquet")


MARKER = -(2**63)
BAD: list[tuple[dict[str, Any], set[str]]] = [
    ({"tags": list("abcd")}, {"too_many:tags"}),
    ({"tags": ["a", None]}, {"empty_value:tags"}),
    ({"tags": [""]}, {"empty_value:tags"}),
    ({"tags": ["", None, "a", "b"]}, {"too_many:tags", "empty_value:tags"}),
    ({"codes": list(range(17))}, {"too_many:codes"}),
    ({"codes": [3, MARKER]}, {"empty_value:codes"}),
    ({"codes": None}, {"null:codes"}),
    ({"look": [1.0, 2.0]}, {"wrong_length:look"}),
    ({"look": []}, {"wrong_length:look"}),
    ({"look": [1.0, math.nan, 3.0]}, {"not_finite:look"}),
    ({"look": [1.0, None, 3.0]}, {"not_finite:look"}),
    ({"look": [-math.inf, 2.0, 3.0, 4.0]}, {"wrong_length:look", "not_finite:look"}),
    ({"voice": None}, {"null:voice"}),
]
FINE: list[dict[str, Any]] = [
    {"tags": None}, {"tags": []}, {"tags": ["a", "a", "a"]}, {"codes": []}, {"codes": list(range(16))},
    {"opened": None, "instants": None, "raw": None}, {"raw": [math.inf]}, {"opened": [], "raw": []},
    {"look": None}, {"look": [3.4e38, -3.4e38, 0.0]}, {"tags": ["'); DROP TABLE copies; --", "{}"]},
]  # fmt: skip


def test_each_bad_list_goes_to_quarantine_with_its_reasons_and_all_others_are_clean(tmp_path: Path) -> None:
    """The rows of both kinds together, a row each; one of the clean ones comes twice."""
    changes = [one for one, _ in BAD] + FINE
    rows = [row(number, note=str(number)) | GOOD | change for number, change in enumerate(changes)]
    parts = divide(tmp_path, write(tmp_path / "0.parquet", [*rows, rows[-1]]))
    assert (parts.rows, parts.clean, parts.bad) == (len(changes) + 1, len(FINE), len(BAD) + 1)
    bad = pq.read_table(tmp_path / "bad.parquet")
    found = {int(one["note"]): set(one[REASONS]) for one in bad.to_pylist()}
    assert found.pop(len(changes) - 1) == {"duplicate"}
    assert found == {number: reasons for number, (_, reasons) in enumerate(BAD)}
    clean = {int(one["note"]): one for one in pq.read_table(tmp_path / "clean.parquet").to_pylist()}
    for number, change in enumerate(FINE, start=len(BAD)):
        expected = GOOD | change
        if expected["look"] is not None:
            expected["look"] = np.array(expected["look"], np.float32).tolist()
        assert {name: clean[number][name] for name in GOOD} == expected
    shown = next(one for one in parts.examples if one["reasons"] == ["too_many:codes"])
    assert shown["row"]["codes"] == [*range(8), "and 9 more"]


def test_spans_of_time_leave_no_trace_in_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a time, copies, good and bad ones, sorted at once and in spans of a few rows."""
    rows = [row(number % 17, user=number % 5) | GOOD | {"codes": [1] * (number % 20)} for number in range(60)]
    rows += [row(3) | GOOD | {"at": None, "user": user} for user in (2, 1)]
    found = []
    for name, most in (("whole", quarantine._SLICE), ("spans", 200)):
        monkeypatch.setattr(quarantine, "_SLICE", most)
        folder = tmp_path / name
        parts = divide(folder, write(folder / "0.parquet", rows))
        assert parts.clean + parts.bad == len(rows)
        assert {"too_many:codes", "null:at"} <= parts.reasons.keys()
        found.append((parts, *((folder / file).read_bytes() for file in ("clean.parquet", "bad.parquet"))))
    assert found[0] == found[1]


def test_a_number_that_no_float32_can_hold_is_not_finite(tmp_path: Path) -> None:
    rows = [row(0) | GOOD, row(1) | GOOD | {"look": [1e39, 0.0, 0.0]}]
    assert divide(tmp_path, write(tmp_path / "0.parquet", rows, look=pa.list_(pa.float64()))).reasons == {
        "not_finite:look": 1
    }


def test_copies_that_differ_in_a_list_conflict(tmp_path: Path) -> None:
    rows = [row(1) | GOOD, row(1) | GOOD | {"tags": ["b", "a"]}, row(2) | GOOD]
    assert divide(tmp_path, write(tmp_path / "0.parquet", rows)).reasons == {"conflicting_duplicate": 2}


def test_lists_of_every_make_read_as_one_and_a_row_group_holds_fewer_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "_ROW_GROUP_VALUES", 2 * (3 + 16 + 2 + 3 + 2 + 16 + 1 + 2))
    others = {
        "tags": pa.large_list(pa.large_string()),
        "codes": pa.list_(pa.int8()),
        "look": pa.list_(pa.float16(), 3),
        "voice": pa.list_(pa.float64(), 2),
    }
    paths = [
        write(tmp_path / "0.parquet", [row(0) | GOOD]),
        write(tmp_path / "1.parquet", [row(n) | GOOD for n in (1, 2)], **others),
    ]
    assert divide(tmp_path, *paths).clean == 3
    clean = pq.ParquetFile(tmp_path / "clean.parquet")
    assert [clean.metadata.row_group(at).num_rows for at in range(clean.num_row_groups)] == [2, 1]
    assert [{name: one[name] for name in GOOD} for one in clean.read().to_pylist()] == [GOOD] * 3


def test_a_night_of_vectors_that_is_larger_than_the_memory_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,500 vectors of 512 numbers are 43 MB as doubles."""
    monkeypatch.setitem(quarantine._SETTINGS, "memory_limit", "40MB")
    monkeypatch.setitem(quarantine._SETTINGS, "threads", "1")
    monkeypatch.setattr(quarantine, "_SLICE", 1 << 20)
    count, length = 10_500, 512
    plain = nights.contract()
    look = ColumnConfig.model_validate(LOOK | {"length": length})
    data = DataConfig.model_validate(plain.model_dump() | {"columns": (*plain.columns, look)})
    table = nights.table([row(number) for number in range(count)][::-1])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(count * length, np.float32)), length)
    path = tmp_path / "0.parquet"
    pq.write_table(table.append_column("look", lists), path, row_group_size=1000)
    with night_view(data, [path], footers(data, [path]), tmp_path) as connection:
        parts = split(connection, data, rules(data, NIGHT), count, tmp_path / "clean", tmp_path / "bad")
    assert (parts.clean, parts.bad) == (count, 0)
    notes = pq.read_table(tmp_path / "clean", columns=["note"])["note"].to_pylist()
    assert notes == [f"n{number}" for number in range(count)]


@pytest.mark.parametrize(
    ("column", "kind", "told"),
    [
        ("tags", pa.string(), "column 'tags' is string, the contract says list of string"),
        ("tags", pa.list_(pa.int64()), "the contract says list of string"),
        ("codes", pa.list_(pa.uint64()), "the contract says list of int64"),
        ("look", pa.float64(), "column 'look' is double, the contract says list of 3 float64"),
        ("look", pa.list_(pa.float32(), 4), "[4], the contract says list of 3 float64"),
        ("age", pa.list_(pa.int64()), "the contract says int64"),
    ],
)
def test_a_footer_of_another_type_is_refused(tmp_path: Path, column: str, kind: pa.DataType, told: str) -> None:
    schema = pa.schema([*nights.SCHEMA, *(pa.field(name, one) for name, one in KINDS.items())])
    at = schema.get_field_index(column)
    path = nights.write(tmp_path / "0.parquet", [], schema.set(at, pa.field(column, kind)))
    with pytest.raises(SchemaBroken) as caught:
        footers(contract(), [path])
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (LOOK | {"length": None}, "'look' is dense and must say the length of its vectors"),
        (LOOK | {"dtype": "int64"}, "'look' is dense and must be float64, not int64"),
        (TAGS | {"dtype": "float64"}, "'tags' is multi and must be int64 or string, not float64"),
        (TAGS | {"kind": "categorical"}, "'tags' is not multi: remove max_values"),
        (TAGS | {"length": 3}, "'tags' is not dense: remove length"),
        (TAGS | {"allowed": ("a",)}, "'tags' holds lists, and allowed speaks of single values"),
        (LOOK | {"minimum": 0.0}, "'look' holds lists, and minimum speaks of single values"),
        (TAGS | {"role": "item", "nullable": False}, "'tags' has role 'item', which is no input"),
        ({"name": "note", "role": "ignored", "dtype": "string", "kind": "categorical"}, "no input: remove kind"),
        (TAGS | {"role": "label"}, "'tags' has role 'label', which is no input"),
        (TAGS | {"role": "user", "nullable": False}, "'tags' has role 'user', which is no input"),
    ],
)
def test_columns_that_cannot_be_are_refused_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ColumnConfig.model_validate(changes)


def test_other_columns_say_nothing_of_lists() -> None:
    """Keys of steps are digests of what a column says."""
    for column in nights.contract().columns:
        assert not {"max_values", "length"} & set(column.model_dump(mode="json"))
    assert ColumnConfig.model_validate(CODES).width == 16


def test_a_vocabulary_of_values_is_append_only_over_nights_and_apart_per_column(tmp_path: Path) -> None:
    first = [row(0) | GOOD | {"tags": ["pop", "jazz"], "moods": ["jazz"]}, row(1) | GOOD | {"tags": None, "moods": []}]
    second = [row(2) | GOOD | {"tags": ["folk", "pop", "acid"], "codes": [9, 8]}]
    data = contract()
    paths = [write(tmp_path / f"{at}.parquet", rows) for at, rows in enumerate((first, second))]
    one = vocabulary.extend(vocabulary.empty(data), paths[:1])
    two = vocabulary.extend(one, paths[1:])
    assert list(two)[-3:] == ["codes", "moods", "tags"]
    assert one["tags"].keys.to_pylist() == ["jazz", "pop"]
    assert two["tags"].keys.to_pylist() == ["jazz", "pop", "acid", "folk"]
    assert two["codes"].keys.to_pylist() == [7, 8, 9]
    assert two["moods"].keys.to_pylist() == ["jazz", "calm"]
    vocabulary.save(two, tmp_path / "vocabulary.parquet")
    loaded = vocabulary.load(data, tmp_path / "vocabulary.parquet")
    assert {name: one.keys for name, one in loaded.items()} == {name: one.keys for name, one in two.items()}


@pytest.mark.parametrize("part", [1, 1 << 22])
def test_rows_hold_ids_and_vectors_side_by_side_in_the_order_of_users_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(columns, "READ_AT_ONCE", part)
    data = contract()
    rows = [
        row(1, user=5) | GOOD | {"tags": ["b", "new"], "codes": [], "look": None},
        row(2, user=3) | GOOD | {"tags": None, "codes": [7, 7, 99]},
        row(3, user=5) | GOOD | {"tags": ["a", "b", "a"], "moods": ["calm", "wild"], "look": [4.0, 5.0, 6.0]},
    ]
    path = write(tmp_path / "0.parquet", rows)
    known = vocabulary.extend(vocabulary.empty(data), [write(tmp_path / "1.parquet", [row(0, user=5) | GOOD])])
    known |= {name: known[name].extend(pa.array([3, 5])) for name in ("user",)}
    built = build_rows(
        data, SegmentsConfig(levels=(("user",),)), StatisticsConfig(), [(NIGHT, path)], [], known, tmp_path / "rows"
    )
    # user 5 was known first; of the codes only 7, of the tags only a and b, of the moods only calm
    nothing = [-1] * 13
    order = [0, 2, 1]
    codes = [[-1] * 3, [1, -1, -1], [1, 1, 0]]
    moods = [[1, -1], [1, 0], [1, -1]]
    assert built.request_values is not None
    assert built.candidate_values is not None
    assert built.request_values.dtype == built.candidate_values.dtype == np.int32
    assert built.request_values.tolist() == [[*a, *nothing, *b] for a, b in zip(codes, moods, strict=True)]
    assert built.candidate_values.tolist() == [[2, 0, -1], [1, 2, 1], [-1, -1, -1]]
    assert built.request_vectors is None
    expected = np.array([[*(rows[at]["look"] or [np.nan] * 3), *rows[at]["voice"]] for at in order], np.float32)
    np.testing.assert_array_equal(built.candidate_vectors, expected, strict=True)
    assert isinstance(built.candidate_vectors, np.memmap)


def test_a_contract_without_lists_has_no_tables_of_them(tmp_path: Path) -> None:
    data = nights.contract()
    path = nights.write(tmp_path / "0.parquet", [row(0)])
    known = vocabulary.extend(vocabulary.empty(data), [path])
    folder = tmp_path / "rows"
    built = build_rows(
        data, SegmentsConfig(levels=(("user",),)), StatisticsConfig(), [(NIGHT, path)], [], known, folder
    )
    assert built.candidate_values is built.candidate_vectors is None
    assert "lists" not in (folder / "index.json").read_text()
    assert not list(folder.glob("*_values.npy")) + list(folder.glob("*_vectors.npy"))


def test_a_list_longer_than_its_places_is_an_error_and_not_cut() -> None:
    values, lengths = values_of(pa.array([[1, 2, 3], None]))
    with pytest.raises(ValueError, match="a list of 3 values does not fit into the 2 places"):
        padded(values.to_numpy(), lengths, 2, -1)
