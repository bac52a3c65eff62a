import hashlib
import math
import struct
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings

from tasks.data.contract import ColumnConfig, DataConfig, LakeConfig
from tasks.data.interactions import footers
from tasks.data.quarantine import REASONS, Split, clean_schema, night_view, reading, split
from tasks.data.rules import night_bounds, rules
from tasks.errors import CorruptFile, InvalidConfig, ValidatorBroken
from tests.data.nights import NIGHT, SCHEMA, contract, row, table, write


def divide(folder: Path, files: list[Path], data: DataConfig | None = None, night: date = NIGHT) -> Split:
    data = data or contract()
    held = footers(data, files)
    with night_view(data, files, held, folder) as connection, reading(files):
        rows = sum(footer.rows for footer in held)
        return split(connection, data, rules(data, night), rows, folder / "clean.parquet", folder / "bad.parquet")


def one(tmp_path: Path, **changes: Any) -> Split:
    """A good row and one that is changed."""
    return divide(tmp_path, [write(tmp_path / "0.parquet", [row(0), row(1) | changes])])


def test_rows_of_several_lakes_say_which_and_have_keys_of_their_own(tmp_path: Path) -> None:
    lakes = (LakeConfig(name="free", source="f"), LakeConfig(name="a-b_2", source="g"))
    note = {"role": "candidate", "kind": "categorical", "nullable": True}
    columns = [
        column.model_copy(update={"allowed": None} | (note if column.name == "note" else {}))
        for column in contract().columns
    ]
    data = contract(source="", lakes=lakes, lake_column="plan", own_keys=("item", "note"), columns=tuple(columns))
    schema = pa.schema([field for field in SCHEMA if field.name != "plan"])
    notes: list[str | None] = ["x", "", None]
    rows = [{**row(number), "note": notes[number]} for number in range(3)]
    files = [write(tmp_path / f"{number}.parquet", rows, schema) for number in range(2)]
    with night_view(data, files, footers(data, files), tmp_path, ["a-b_2", "free"]) as connection:
        found = connection.execute('SELECT plan, item, note, "user" FROM interactions ORDER BY 1, 2').fetchall()
    assert found == [
        ("a-b_2", "a-b_2/i0", "a-b_2/x", 0), ("a-b_2", "a-b_2/i1", "", 1), ("a-b_2", "a-b_2/i2", None, 2),
        ("free", "free/i0", "free/x", 0), ("free", "free/i1", "", 1), ("free", "free/i2", None, 2),
    ]  # fmt: skip


def test_good_rows_come_back_as_they_were_in_the_contracts_columns(tmp_path: Path) -> None:
    rows = [row(number) for number in range(50)]
    parts = divide(tmp_path, [write(tmp_path / "0.parquet", rows[::-1])])
    assert (parts.rows, parts.clean, parts.bad, parts.reasons) == (50, 50, 0, {})
    clean = pq.read_table(tmp_path / "clean.parquet")
    assert clean.schema == clean_schema(contract())
    assert clean.equals(table(rows))
    assert not (tmp_path / "bad.parquet").exists()


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"user": None}, {"null:user"}),
        ({"item": None}, {"null:item"}),
        ({"at": None}, {"null:at"}),
        ({"liked": None}, {"null:liked"}),
        ({"age": None}, {"null:age"}),
        ({"plan": None}, {"null:plan"}),
        ({"weight": None}, {"null:weight"}),
        ({"age": -1}, {"range:age"}),
        ({"age": 121}, {"range:age"}),
        ({"rating": 0.99}, {"range:rating"}),
        ({"rating": math.nan}, {"not_finite:rating"}),
        ({"price": math.nan}, {"not_finite:price"}),
        ({"price": math.inf}, {"not_finite:price"}),
        ({"price": -math.inf}, {"not_finite:price"}),
        ({"plan": "gold"}, {"allowed:plan"}),
        ({"plan": ""}, {"allowed:plan"}),
        ({"liked": 2}, {"domain:liked"}),
        ({"liked": -1}, {"domain:liked"}),
        ({"weight": -0.5}, {"negative:weight"}),
        ({"at": datetime(2026, 3, 9, 23, 59, 59, 999999, UTC)}, {"outside_night"}),
        ({"at": datetime(2026, 3, 11, tzinfo=UTC)}, {"outside_night"}),
        ({"age": 200, "liked": 7, "user": None}, {"range:age", "domain:liked", "null:user"}),
    ],
)
def test_a_bad_row_goes_to_quarantine_with_its_reasons(
    tmp_path: Path, changes: dict[str, Any], reasons: set[str]
) -> None:
    parts = one(tmp_path, **changes)
    assert (parts.clean, parts.bad) == (1, 1)
    assert parts.reasons == dict.fromkeys(reasons, 1)
    bad = pq.read_table(tmp_path / "bad.parquet")
    assert bad.schema.names == [*SCHEMA.names, REASONS]
    assert set(bad[REASONS][0].as_py()) == reasons
    assert bad["note"].to_pylist() == ["n1"]
    assert set(parts.examples[0]["reasons"]) == reasons
    assert pq.read_table(tmp_path / "clean.parquet")["note"].to_pylist() == ["n0"]


@pytest.mark.parametrize(
    "changes",
    [
        {"rating": None},
        {"price": None},
        {"plan": "it's; --"},
        {"age": 0},
        {"age": 120},
        {"rating": 1.0},
        {"rating": 5.0},
        {"weight": 0.0},
        {"at": datetime(2026, 3, 10, tzinfo=UTC)},
        {"at": datetime(2026, 3, 10, 23, 59, 59, 999999, UTC)},
    ],
)
def test_what_the_contract_allows_is_clean(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert one(tmp_path, **changes).bad == 0


@pytest.mark.parametrize(
    ("night", "hours"),
    [(date(2026, 3, 28), 24), (date(2026, 3, 29), 23), (date(2026, 10, 25), 25), (date(2026, 7, 1), 24)],
)
def test_a_night_is_the_zones_calendar_day_also_when_clocks_change(tmp_path: Path, night: date, hours: int) -> None:
    data = contract(time_zone="Europe/Berlin")
    first, following = night_bounds(data, night)
    assert following - first == timedelta(hours=hours)
    assert first.astimezone(ZoneInfo("Europe/Berlin")).replace(tzinfo=None) == datetime(
        night.year, night.month, night.day
    )
    second = timedelta(seconds=1)
    times = [first - second, first, following - second, following]
    path = write(tmp_path / "0.parquet", [row(number) | {"at": at} for number, at in enumerate(times)])
    assert divide(tmp_path, [path], data, night).reasons == {"outside_night": 2}
    assert pq.read_table(tmp_path / "clean.parquet")["at"].to_pylist() == times[1:3]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_timestamps_of_every_unit_and_zone_mean_the_same_instant(tmp_path: Path, unit: str, zone: str | None) -> None:
    schema = SCHEMA.set(2, pa.field("at", pa.timestamp(unit, zone)))
    at = row(0)["at"] if zone else row(0)["at"].replace(tzinfo=None)
    divide(tmp_path, [write(tmp_path / "0.parquet", [row(0) | {"at": at}], schema)])
    assert pq.read_table(tmp_path / "clean.parquet").equals(table([row(0)]))


@pytest.mark.parametrize("instant", [2**63 - 1, -(2**63), -(2**63) + 1, 253402300800000000])
def test_a_timestamp_beyond_the_calendar_reads_as_missing(tmp_path: Path, instant: int) -> None:
    rows = table([row(0)]).set_column(2, "at", pa.array([instant], pa.int64()).cast(pa.timestamp("us", "UTC")))
    pq.write_table(rows, tmp_path / "0.parquet")
    assert divide(tmp_path, [tmp_path / "0.parquet"]).reasons == {"null:at": 1}


def test_one_of_exact_copies_is_kept(tmp_path: Path) -> None:
    parts = divide(tmp_path, [write(tmp_path / "0.parquet", [row(1), row(2), row(1), row(1)])])
    assert (parts.clean, parts.reasons) == (2, {"duplicate": 2})
    assert pq.read_table(tmp_path / "clean.parquet").equals(table([row(1), row(2)]))


def test_copies_that_differ_all_go(tmp_path: Path) -> None:
    parts = divide(tmp_path, [write(tmp_path / "0.parquet", [row(1), row(2), row(1, liked=0), row(1)])])
    assert (parts.clean, parts.reasons) == (1, {"conflicting_duplicate": 3})


def test_copies_that_differ_where_nothing_is_read_are_exact(tmp_path: Path) -> None:
    parts = divide(tmp_path, [write(tmp_path / "0.parquet", [row(1, note="b"), row(1, note="a")])])
    assert (parts.clean, parts.reasons) == (1, {"duplicate": 1})
    assert pq.read_table(tmp_path / "clean.parquet")["note"].to_pylist() == ["a"]


def test_copies_that_differ_by_a_missing_value_conflict(tmp_path: Path) -> None:
    parts = divide(tmp_path, [write(tmp_path / "0.parquet", [row(1, price=None), row(1, price=1.0)])])
    assert parts.reasons == {"conflicting_duplicate": 2}


def test_rows_with_the_same_partly_missing_key_are_not_copies(tmp_path: Path) -> None:
    parts = divide(tmp_path, [write(tmp_path / "0.parquet", [row(1, user=None), row(1, user=None)])])
    assert parts.reasons == {"null:user": 2}


def test_a_file_delivered_twice_counts_its_rows_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", [row(number) for number in range(5)])
    parts = divide(tmp_path, [path, path])
    assert (parts.rows, parts.clean, parts.reasons) == (10, 5, {"duplicate": 5})


def test_clean_rows_are_ordered_by_time_then_by_digest_of_the_key(tmp_path: Path) -> None:
    at = row(0)["at"]
    rows = [row(number, at=at, user=number) for number in range(40)]
    divide(tmp_path, [write(tmp_path / "0.parquet", rows)])
    micros = int(at.timestamp() * 1_000_000)

    def digest(one: dict[str, Any]) -> str:
        return hashlib.md5(f"{one['user']}\x1f{one['item']}\x1f{micros}".encode(), usedforsecurity=False).hexdigest()

    assert pq.read_table(tmp_path / "clean.parquet").to_pylist() == table(sorted(rows, key=digest)).to_pylist()


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "number": st.integers(0, 9),
            "user": st.sampled_from([1, 2, None]),
            "liked": st.sampled_from([0, 1, 3]),
            "price": st.sampled_from([None, 1.0, math.nan, math.inf]),
            "plan": st.sampled_from(["free", "it's; --", "'; DROP TABLE interactions; --"]),
        }
    ),
    min_size=1,
    max_size=30,
)


@given(rows=ROWS, seed=st.randoms(use_true_random=False), cuts=st.lists(st.integers(0, 30), max_size=3))
@settings(max_examples=25)
@example(rows=[{"number": 0, "user": 1, "liked": 0, "price": None, "plan": "free"}] * 3, seed=None, cuts=[1, 1])
def test_bad_and_clean_are_all_rows_and_the_bytes_do_not_depend_on_the_files(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], seed: Any, cuts: list[int]
) -> None:
    made = [row(one["number"]) | {name: one[name] for name in one if name != "number"} for one in rows]
    whole, parted = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parted")
    first = divide(whole, [write(whole / "0.parquet", made)])
    if seed is not None:
        seed.shuffle(made)
    ends = [0, *sorted(min(cut, len(made)) for cut in cuts), len(made)]
    pieces = [made[start:end] for start, end in pairwise(ends)]
    second = divide(parted, [write(parted / f"{number}.parquet", piece) for number, piece in enumerate(pieces)])
    assert first.clean + first.bad == first.rows == len(rows)
    assert (first.rows, first.clean, first.bad, first.reasons) == (
        second.rows,
        second.clean,
        second.bad,
        second.reasons,
    )
    for name in ("clean.parquet", "bad.parquet"):
        assert (whole / name).exists() == (parted / name).exists()
        if (whole / name).exists():
            assert (whole / name).read_bytes() == (parted / name).read_bytes()


def test_files_of_different_types_and_column_orders_read_as_one(tmp_path: Path) -> None:
    kinds = {"user": pa.int16(), "at": pa.timestamp("ns"), "rating": pa.float32(), "item": pa.large_string()}
    other = pa.schema([field.with_type(kinds.get(field.name, field.type)) for field in SCHEMA][::-1])
    large = 2**40
    naive = row(1) | {"at": row(1)["at"].replace(tzinfo=None)}
    paths = [write(tmp_path / "0.parquet", [naive], other), write(tmp_path / "1.parquet", [row(2, user=large)])]
    assert divide(tmp_path, paths).clean == 2
    assert pq.read_table(tmp_path / "clean.parquet").equals(table([row(1), row(2, user=large)]))


HOSTILE = ["'); DROP TABLE copies; --", '"; SELECT 1; --', "$first", "%s {0} \\", "a\x00b", "null", "\U0001f600'\n"]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_only_ever_values(tmp_path: Path, value: str) -> None:
    rows = [row(0, item=value, note=value), row(1, plan=value), row(2)]
    parts = divide(tmp_path, [write(tmp_path / "0.parquet", rows)])
    assert parts.reasons == {"allowed:plan": 1}
    assert pq.read_table(tmp_path / "clean.parquet").equals(table([rows[0], rows[2]]))


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_allowed_sets_allow_just_their_values(tmp_path: Path, value: str) -> None:
    plan = ColumnConfig(name="plan", role="request", kind="categorical", dtype="string", allowed=(value, "x"))
    data = contract(columns=tuple(plan if column.name == "plan" else column for column in contract().columns))
    rows = [row(0, plan=value), row(1, plan="x"), row(2)]
    parts = divide(tmp_path, [write(tmp_path / "0.parquet", rows)], data)
    assert parts.reasons == {"allowed:plan": 1}
    assert pq.read_table(tmp_path / "clean.parquet")["plan"].to_pylist() == [value, "x"]


def test_columns_may_be_called_like_our_own_and_like_sql_words(tmp_path: Path) -> None:
    names = ["reasons", "number", "conflicting", "select", "filename", "file_row_number", "copies"]
    extra = tuple(ColumnConfig(name=name, role="ignored", dtype="int64") for name in names)
    schema = pa.schema([*SCHEMA, *(pa.field(name, pa.int64()) for name in names)])
    rows = [row(0) | dict.fromkeys(names, 1), row(0) | dict.fromkeys(names, 2)]
    parts = divide(
        tmp_path, [write(tmp_path / "0.parquet", rows, schema)], contract(columns=contract().columns + extra)
    )
    assert parts.reasons == {"duplicate": 1}
    assert pq.read_table(tmp_path / "clean.parquet")["reasons"].to_pylist() == [1]


def test_paths_with_wildcards_and_quotes_mean_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "night=2026-03-09" / "a[b]*c'?"
    write(folder.with_name("abxc'y") / "0.parquet", [row(5)])
    assert divide(tmp_path, [write(folder / "0.parquet", [row(1)])]).rows == 1


def test_keys_beyond_a_doubles_precision_stay_apart(tmp_path: Path) -> None:
    user = ColumnConfig(name="user", role="user", dtype="int64", maximum=float(2**53))
    data = contract(columns=(user, *contract().columns[1:]))
    rows = [row(0, user=2**53), row(0, user=2**53 + 1)]
    parts = divide(tmp_path, [write(tmp_path / "0.parquet", rows)], data)
    assert parts.reasons == {"range:user": 1}


def test_pages_that_cannot_be_read_are_a_corrupt_file(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", [row(number) for number in range(500)])
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"cannot be read from 1 file.*0.parquet.*deliver the night again"):
        divide(tmp_path, [path])


def test_statistics_in_a_footer_are_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", [row(1, age=20), row(2, age=500)])
    content = path.read_bytes()
    start = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    footer = content[start:].replace(struct.pack("<q", 500), struct.pack("<q", 100))
    assert footer != content[start:]
    path.write_bytes(content[:start] + footer)
    assert divide(tmp_path, [path]).reasons == {"range:age": 1}
    data = contract()
    with night_view(data, [path], footers(data, [path]), tmp_path) as connection:
        assert connection.execute("SELECT age FROM interactions WHERE age > 120").fetchall() == [(500,)]


def test_comparisons_see_nan(tmp_path: Path) -> None:
    data, path = contract(), write(tmp_path / "0.parquet", [row(1, price=2.5), row(2, price=math.nan)])
    with night_view(data, [path], footers(data, [path]), tmp_path) as connection:
        assert connection.execute("SELECT count(*) FROM interactions WHERE price > 3").fetchone() == (1,)
        assert connection.execute("SELECT sum(CAST(NOT price <= 3 AS INT)) FROM interactions").fetchone() == (1,)


def test_rows_that_do_not_add_up_to_the_footers_break_the_validator(tmp_path: Path) -> None:
    data, files = contract(), [write(tmp_path / "0.parquet", [row(0)])]
    with (
        night_view(data, files, footers(data, files), tmp_path) as connection,
        pytest.raises(ValidatorBroken, match="1 clean and 0 bad rows are not the 2 rows"),
    ):
        split(connection, data, rules(data, NIGHT), 2, tmp_path / "clean.parquet", tmp_path / "bad.parquet")


def test_labels_missing_in_every_clean_row_are_named(tmp_path: Path) -> None:
    rows = [row(number, rating=None) for number in range(3)]
    assert divide(tmp_path, [write(tmp_path / "0.parquet", rows)]).empty_labels == ("rating",)


def test_columns_that_differ_by_case_alone_are_refused(tmp_path: Path) -> None:
    extra = ColumnConfig(name="AGE", role="ignored", dtype="int64")
    data = contract(columns=(*contract().columns, extra))
    with pytest.raises(InvalidConfig, match="age"), night_view(data, [], [], tmp_path):
        pass


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dtype": "string", "kind": "categorical", "minimum": 1}, "is string and cannot have minimum"),
        ({"dtype": "int64", "kind": "numeric", "allowed": ("1",)}, "allowed values do not fit"),
        ({"dtype": "int64", "kind": "numeric", "allowed": ()}, "there are none"),
        ({"dtype": "float64", "kind": "numeric", "maximum": math.inf}, "must be finite"),
        ({"dtype": "int64", "kind": "numeric", "minimum": 0.2, "maximum": 0.8}, "no value lies between"),
    ],
)
def test_bounds_that_do_not_fit_their_column_are_an_invalid_config(settings: dict[str, Any], told: str) -> None:
    column = ColumnConfig(name="extra", role="request", **settings)
    with pytest.raises(InvalidConfig, match=told):
        rules(contract(columns=(*contract().columns, column)), NIGHT)
