"""The row table: what it holds, what may not reach it, and what it costs."""

import hashlib
import tracemalloc
from datetime import timedelta
from pathlib import Path
from random import Random

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data import vocabulary
from tasks.data.columns import Rows, build_rows, open_rows, tie_digest
from tasks.data.contract import ColumnConfig, DataConfig, ObjectiveConfig, SegmentsConfig, StatisticsConfig
from tasks.data.states import night_state, save_state
from tasks.data.statistics import serving_tables
from tasks.errors import InvalidConfig, ObjectCorrupt
from tests.data.small_nights import (
    DAY_US,
    STATISTICS,
    Row,
    contract,
    expected_statistics,
    midnight_us,
    night,
    worlds,
    write_all,
)

SEGMENTS = SegmentsConfig(levels=(("shopper",), ("device", "band")))
WIDTHS = ("request_ids", "candidate_ids", "request_numbers", "candidate_numbers", "statistics", "labels")
ARRAYS = (*WIDTHS, "weights", "time", "night", "user", "item", "tie")


class Built:
    """A world's rows with everything that they were built from."""

    def __init__(self, data: DataConfig, world: list[list[Row]], folder: Path, statistics: StatisticsConfig) -> None:
        self.nights = write_all(data, world, folder)
        self.states = [(day, folder / f"{day}.state") for day, _ in self.nights]
        for (_, clean), (_, state) in zip(self.nights, self.states, strict=True):
            save_state(night_state(data, statistics, clean), state)
        self.vocabularies = vocabulary.extend(vocabulary.empty(data), [path for _, path in self.nights])
        self.rows = build_rows(data, SEGMENTS, statistics, self.nights, self.states, self.vocabularies, folder / "rows")


def same_numbers(left: Rows, right: Rows) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name), equal_nan=True) for name in ARRAYS) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for one, other in zip(left.levels, right.levels, strict=True)
        for name in ("segment", "order", "offsets", "keys", "parent", "columns", "radices")
    )


def digest(rows: list[Row], data: DataConfig) -> list[int]:
    with duckdb.connect() as connection:
        return tie_digest(
            pa.chunked_array([[row[data.user] for row in rows]]),
            pa.chunked_array([[row[data.item] for row in rows]]),
            np.array([row[data.time] for row in rows], np.int64),
            connection,
        ).tolist()


@pytest.mark.parametrize("key", ["int64", "string"])
def test_the_table_equals_a_slow_one_row_by_row(key: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = contract(key)

    def number(value: float | None) -> float:
        return np.nan if value is None else float(value)

    @settings(max_examples=15)
    @given(world=worlds(key=key))
    def holds(world: list[list[Row]]) -> None:
        built = Built(data, world, tmp_path_factory.mktemp("world"), STATISTICS)
        ids = {
            name: {value: position + 1 for position, value in enumerate(known.keys.to_pylist())}
            for name, known in built.vocabularies.items()
        }
        flat = [(n, row) for n, rows in enumerate(world) for row in rows]
        ties = digest([row for _, row in flat], data)
        history = [[row for rows in world[:n] for row in rows] for n in range(len(world))]
        expected = sorted(
            (
                (ids["shopper"][row["shopper"]], row["at"], tie, n, row)
                for (n, row), tie in zip(flat, ties, strict=True)
            ),
            key=lambda entry: entry[:3],
        )
        rows = built.rows
        assert len(rows) == len(expected)
        assert rows.user.tolist() == [user for user, *_ in expected]
        assert rows.time.tolist() == [time for _, time, *_ in expected]
        assert rows.tie.tolist() == [tie for _, _, tie, *_ in expected]
        assert rows.night.tolist() == [night(n).toordinal() for *_, n, _ in expected]
        table = [row for *_, row in expected]
        assert rows.item.tolist() == [ids["product"][row["product"]] for row in table]
        assert rows.request_ids.tolist() == [[ids[c].get(row[c], 0) for c in ("device", "band")] for row in table]
        assert rows.candidate_ids.tolist() == [[ids[c].get(row[c], 0) for c in ("product", "brand")] for row in table]
        for name, of in (
            ("request_numbers", ("hour", "member")),
            ("candidate_numbers", ("price",)),
            ("labels", ("clicked", "stars")),
        ):
            np.testing.assert_array_equal(getattr(rows, name), [[number(row[c]) for c in of] for row in table])
        assert rows.weights.tolist() == [1.0 if row["importance"] is None else row["importance"] for row in table]
        np.testing.assert_allclose(
            rows.statistics,
            [expected_statistics(data, STATISTICS, history[n], row) for *_, n, row in expected],
            rtol=1e-5,
            atol=1e-6,
        )
        fine, coarse = rows.levels
        np.testing.assert_array_equal(fine.keys[fine.segment], rows.user)
        np.testing.assert_array_equal(
            coarse.keys[coarse.segment], rows.request_ids[:, 0] * coarse.radices[1] + rows.request_ids[:, 1]
        )
        assert fine.radices == (built.vocabularies["shopper"].rows,)

    holds()


@settings(max_examples=10)
@given(world=worlds(least=2), changed=st.data())
def test_a_nights_labels_reach_nothing_but_its_labels_and_the_statistics_of_later_nights(
    world: list[list[Row]], changed: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = contract()
    number = changed.draw(st.integers(0, len(world) - 1))
    other = [
        [
            {
                **row,
                "clicked": changed.draw(st.none() | st.booleans()),
                "stars": changed.draw(st.none() | st.just(4.5)),
            }
            if n == number
            else row
            for row in rows
        ]
        for n, rows in enumerate(world)
    ]
    before, after = (Built(data, these, tmp_path_factory.mktemp("world"), STATISTICS).rows for these in (world, other))
    for name in set(ARRAYS) - {"labels", "statistics"}:
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    for one, two in zip(before.levels, after.levels, strict=True):
        np.testing.assert_array_equal(one.order, two.order)
        np.testing.assert_array_equal(one.parent, two.parent)
    not_later = before.night <= night(number).toordinal()
    np.testing.assert_array_equal(before.statistics[not_later], after.statistics[not_later])
    elsewhere = before.night != night(number).toordinal()
    np.testing.assert_array_equal(before.labels[elsewhere], after.labels[elsewhere])
    counts = [at for at, name in enumerate(before.statistics_names) if name.endswith("_count")]
    np.testing.assert_array_equal(before.statistics[:, counts], after.statistics[:, counts])


def test_a_changed_label_does_reach_the_next_night(tmp_path: Path) -> None:
    # The control of the test above: it would also pass if statistics ignored labels.
    data = contract()
    worlds_ = [[[example(0, clicked=clicked)], [example(1)]] for clicked in (True, False)]
    before, after = (Built(data, w, tmp_path / str(n), STATISTICS).rows for n, w in enumerate(worlds_))
    at = before.statistics_names.index("item_rate:click")
    assert before.statistics[1, at] > after.statistics[1, at]


def example(number: int, offset: int = 0, **values: object) -> Row:
    return {
        **{"shopper": 1, "product": 10, "clicked": True, "stars": 3.0, "device": "web", "band": 1},
        **{"at": midnight_us(number) + offset, "price": 1.0, "brand": "a", "importance": 1.0, "hour": 1},
        **{"member": True, "note": None},
        **values,
    }


@settings(max_examples=10)
@given(world=worlds(least=2))
def test_served_tables_equal_the_features_of_the_rows_of_the_following_night(
    world: list[list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = contract()
    built = Built(data, world, tmp_path_factory.mktemp("world"), STATISTICS)
    earlier = vocabulary.extend(vocabulary.empty(data), [path for _, path in built.nights[:-1]])
    tables = serving_tables(data, STATISTICS, earlier, built.states[:-1])
    rows = world[-1]
    raw = {name: pa.array([row[name] for row in rows]) for name in (data.user, data.item, *STATISTICS.cohort)}
    ids = {name: earlier[name].encode(values) for name, values in raw.items()}
    served = tables.features(ids[data.user], ids[data.item], [ids[name] for name in STATISTICS.cohort])
    of_last = built.rows.night == built.nights[-1][0].toordinal()
    place = {
        key: at
        for at, key in enumerate(
            zip(built.rows.user[of_last], built.rows.item[of_last], built.rows.time[of_last], strict=True)
        )
    }
    late = built.vocabularies
    keys = zip(late[data.user].encode(raw[data.user]), late[data.item].encode(raw[data.item]), rows, strict=True)
    order = [place[(user, item, row["at"])] for user, item, row in keys]
    np.testing.assert_allclose(served, built.rows.statistics[of_last][order], rtol=1e-6)


@settings(max_examples=10)
@given(world=worlds(least=2), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_files_states_and_rows_does_not_matter(
    world: list[list[Row]], shuffle: Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = contract()
    one = Built(data, world, tmp_path_factory.mktemp("world"), STATISTICS)
    mixed = [list(rows) for rows in world]
    for rows in mixed:
        shuffle.shuffle(rows)
    other = Built(data, mixed, tmp_path_factory.mktemp("world"), STATISTICS)
    nights, states = list(other.nights), list(other.states)
    shuffle.shuffle(nights)
    shuffle.shuffle(states)
    folder = tmp_path_factory.mktemp("rows")
    again = build_rows(data, SEGMENTS, STATISTICS, nights, states, other.vocabularies, folder)
    assert same_numbers(one.rows, again)


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    data = contract()
    world = [[example(0), example(0, 5, device=None)], [example(1, product=20, price=None)]]
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        Built(data, world, folder, STATISTICS)
    files = [sorted(folder.glob("rows/*")) for folder in folders]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_ties_in_time_are_ordered_by_the_digest_and_not_by_label_item_or_file(tmp_path: Path) -> None:
    data = contract()
    tied = [example(0, product=product, clicked=product % 2 == 0, stars=float(product % 5)) for product in range(1, 41)]
    flipped = [{**row, "clicked": not row["clicked"], "stars": 5.0 - row["stars"]} for row in reversed(tied)]
    one, other = (Built(data, [rows], tmp_path / name, STATISTICS).rows for name, rows in (("a", tied), ("b", flipped)))
    assert sorted(digest(tied, data)) == one.tie.tolist() == other.tie.tolist()
    assert one.item.tolist() == other.item.tolist() != sorted(one.item.tolist())
    np.testing.assert_array_equal(one.labels[:, 0], 1 - other.labels[:, 0])


def test_the_rows_of_a_user_are_together_and_in_time_order_across_nights(tmp_path: Path) -> None:
    world = [[example(n, offset, shopper=shopper) for shopper in (3, 1) for offset in (9, 2)] for n in range(3)]
    rows = Built(contract(), world, tmp_path, STATISTICS).rows
    assert (np.diff(rows.user) >= 0).all()
    assert (np.diff(rows.time)[np.diff(rows.user) == 0] > 0).all()
    assert rows.levels[0].order.tolist() == list(range(12))


def test_missing_inputs_are_nan_and_id_zero(tmp_path: Path) -> None:
    missing = example(0, price=None, hour=None, brand=None, device=None, importance=None, clicked=None, stars=None)
    rows = Built(contract(), [[missing]], tmp_path, STATISTICS).rows
    assert np.isnan(rows.candidate_numbers).all()
    np.testing.assert_array_equal(rows.request_numbers, [[np.nan, 1.0]])
    assert rows.candidate_ids.tolist() == [[1, 0]]
    assert rows.request_ids.tolist() == [[0, 1]]
    assert np.isnan(rows.labels).all()
    assert rows.weights.tolist() == [1.0]


@pytest.mark.parametrize("kind", [pa.timestamp("ms"), pa.timestamp("ns", tz="Europe/Berlin"), pa.timestamp("s")])
def test_any_unit_or_zone_of_the_time_is_read_as_microseconds_in_utc(tmp_path: Path, kind: pa.DataType) -> None:
    data = contract()
    path = write_all(data, [[example(0, 7_000_000)]], tmp_path)[0][1]
    table = pq.read_table(path)
    at = table.column_names.index("at")
    converted = table["at"].cast(pa.timestamp("us", tz=kind.tz)).cast(kind)
    pq.write_table(table.set_column(at, "at", converted), path, coerce_timestamps=None)
    known = vocabulary.extend(vocabulary.empty(data), [path])
    rows = build_rows(data, SEGMENTS, STATISTICS, [(night(0), path)], [], known, tmp_path / "rows")
    assert rows.time.tolist() == [midnight_us(0) + 7_000_000]


def test_a_contract_without_inputs_weight_or_cohort_has_tables_of_width_zero(tmp_path: Path) -> None:
    data = DataConfig(
        source="lake",
        columns=(
            ColumnConfig(name="u", role="user", dtype="string"),
            ColumnConfig(name="i", role="item", dtype="int64"),
            ColumnConfig(name="t", role="time", dtype="timestamp"),
            ColumnConfig(name="y", role="label", dtype="int64"),
        ),
        objectives=(ObjectiveConfig(name="y", column="y"),),
    )
    path = write_all(data, [[{"u": "a", "i": 1, "t": midnight_us(0), "y": 1}]], tmp_path)[0][1]
    known = vocabulary.extend(vocabulary.empty(data), [path])
    config = SegmentsConfig(levels=(("u",),))
    rows = build_rows(data, config, StatisticsConfig(), [(night(0), path)], [], known, tmp_path / "rows")
    assert {name: getattr(rows, name).shape for name in WIDTHS} == {
        **{"request_ids": (1, 0), "candidate_ids": (1, 1), "request_numbers": (1, 0), "candidate_numbers": (1, 0)},
        **{"statistics": (1, 4), "labels": (1, 1)},
    }
    assert rows.weights.tolist() == [1.0]


def test_progress_counts_rows_night_by_night(tmp_path: Path) -> None:
    built = Built(contract(), [[example(0), example(0, 1)], [example(1)]], tmp_path, STATISTICS)
    told: list[tuple[float, float | None, str]] = []
    build_rows(
        *(contract(), SEGMENTS, STATISTICS, built.nights, built.states, built.vocabularies, tmp_path / "again"),
        progress=lambda *numbers: told.append(numbers),
    )
    assert told == [(2, 3, "rows"), (3, 3, "rows")]


def test_no_nights_are_no_rows(tmp_path: Path) -> None:
    data = contract()
    rows = build_rows(data, SEGMENTS, STATISTICS, [], [], vocabulary.empty(data), tmp_path)
    assert len(rows) == 0
    assert [level.size for level in rows.levels] == [0, 0]


def test_rows_are_read_only_memory_maps_and_open_again_as_they_were(tmp_path: Path) -> None:
    built = Built(contract(), [[example(0)], [example(1, product=20)]], tmp_path, STATISTICS)
    again = open_rows(tmp_path / "rows")
    assert same_numbers(built.rows, again)
    assert again.statistics_names == built.rows.statistics_names
    assert all(isinstance(getattr(again, name), np.memmap) for name in ARRAYS)
    with pytest.raises(ValueError, match="read-only"):
        again.labels[0] = 1.0


def test_a_folder_of_another_version_or_length_is_refused(tmp_path: Path) -> None:
    Built(contract(), [[example(0)]], tmp_path, STATISTICS)
    folder = tmp_path / "rows"
    np.save(folder / "time.npy", np.zeros(2, np.int64))
    with pytest.raises(ObjectCorrupt, match=r"time.npy has 2 rows, the index 1"):
        open_rows(folder)
    (folder / "index.json").write_text('{"version": 0}')
    with pytest.raises(ObjectCorrupt, match="has version 0, expected 1"):
        open_rows(folder)


def test_a_night_named_twice_is_refused(tmp_path: Path) -> None:
    data = contract()
    path = write_all(data, [[example(0)]], tmp_path)[0][1]
    known = vocabulary.extend(vocabulary.empty(data), [path])
    twice = [(night(0), path), (night(0), tmp_path / "other.parquet")]
    with pytest.raises(ValueError, match="nights name a date twice"):
        build_rows(data, SEGMENTS, STATISTICS, twice, [], known, tmp_path / "rows")


def test_a_label_can_be_no_segment_and_no_cohort(tmp_path: Path) -> None:
    data = contract()
    arguments = ([], [], vocabulary.empty(data), tmp_path)
    with pytest.raises(InvalidConfig, match="names clicked"):
        build_rows(data, SegmentsConfig(levels=(("clicked",),)), STATISTICS, *arguments)
    with pytest.raises(InvalidConfig, match="names clicked"):
        build_rows(data, SEGMENTS, StatisticsConfig(cohort=("clicked",)), *arguments)


def test_one_night_of_columns_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(
        source="lake",
        columns=(
            ColumnConfig(name="u", role="user", dtype="int64"),
            ColumnConfig(name="i", role="item", dtype="int64"),
            ColumnConfig(name="t", role="time", dtype="timestamp"),
            ColumnConfig(name="y", role="label", dtype="float64"),
            *(ColumnConfig(name=f"x{n}", role="candidate", dtype="float64", kind="numeric") for n in range(60)),
        ),
        objectives=(ObjectiveConfig(name="y", column="y"),),
    )
    nights, per_night = 12, 8_000
    random = np.random.default_rng(0)
    paths = []
    for number in range(nights):
        table = {"u": random.integers(0, 500, per_night), "i": random.integers(0, 300, per_night)}
        table["t"] = pa.array(midnight_us(number) + random.integers(0, DAY_US, per_night), pa.timestamp("us", tz="UTC"))
        table |= {"y": random.random(per_night).round(), **{f"x{n}": random.random(per_night) for n in range(60)}}
        paths.append((night(0) + timedelta(days=number), tmp_path / f"{number}.parquet"))
        pq.write_table(pa.table(table), paths[-1][1])
    known = vocabulary.extend(vocabulary.empty(data), [path for _, path in paths])
    one_night = per_night * 60 * 8
    config = SegmentsConfig(levels=(("u",),))
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        rows = build_rows(data, config, StatisticsConfig(), paths, [], known, tmp_path / "rows")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert len(rows) == nights * per_night
    assert pool.max_memory() < 2.5 * one_night
    assert peak < nights * per_night * 200  # a few integers per row; the columns would be 1,500 bytes per row


@pytest.mark.parametrize("key", ["int64", "string"])
def test_the_digest_sorts_as_the_md5_of_the_clean_files(key: str) -> None:
    users = range(20) if key == "int64" else [f"é{n}" for n in range(20)]
    rows = [{"shopper": user, "product": item, "at": at} for user in users for item in users for at in (5, -7)]
    texts = [f"{row['shopper']}\x1f{row['product']}\x1f{row['at']}" for row in rows]
    expected = sorted(range(len(rows)), key=lambda at: hashlib.md5(texts[at].encode()).hexdigest())
    assert np.argsort(digest(rows, contract(key))).tolist() == expected
