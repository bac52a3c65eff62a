"""As-of statistics against a slow recomputation, and the tables that a release carries."""

import math
from itertools import permutations
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data import vocabulary
from tasks.data.contract import DataConfig, StatisticsConfig
from tasks.data.states import check_cohort, label_values, load_state, merge, night_state, save_state
from tasks.data.statistics import RunningStatistics, StatisticsTables, serving_tables, statistics_names
from tasks.data.vocabulary import Vocabularies
from tasks.errors import InvalidConfig
from tests.data.small_nights import (
    STATISTICS,
    Row,
    contract,
    expected_statistics,
    midnight_us,
    night,
    worlds,
    write,
    write_all,
)


def prepared(
    data: DataConfig, config: StatisticsConfig, world: list[list[Row]], folder: Path
) -> tuple[list[pa.Table], Vocabularies]:
    paths = [path for _, path in write_all(data, world, folder)]
    return [night_state(data, config, path) for path in paths], vocabulary.extend(vocabulary.empty(data), paths)


def ids(data: DataConfig, vocabularies: Vocabularies, rows: list[Row], name: str) -> np.ndarray:
    dtype = pa.int64() if data.column(name).dtype == "int64" else pa.string()
    return vocabularies[name].encode(pa.array([row[name] for row in rows], dtype))


def features(
    statistics: RunningStatistics | StatisticsTables,
    data: DataConfig,
    config: StatisticsConfig,
    vocabularies: Vocabularies,
    rows: list[Row],
) -> np.ndarray:
    return statistics.features(
        ids(data, vocabularies, rows, data.user),
        ids(data, vocabularies, rows, data.item),
        [ids(data, vocabularies, rows, name) for name in config.cohort],
    )


@pytest.mark.parametrize("key", ["int64", "string"])
@pytest.mark.parametrize("config", [STATISTICS, StatisticsConfig()], ids=["cohort", "no cohort"])
def test_running_features_and_served_tables_equal_a_recomputation_from_all_earlier_rows(
    key: str, config: StatisticsConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = contract(key)

    @settings(max_examples=40)
    @given(world=worlds(key=key))
    def holds(world: list[list[Row]]) -> None:
        states, vocabularies = prepared(data, config, world, tmp_path_factory.mktemp("nights"))
        running = RunningStatistics(data, config, vocabularies)
        history: list[Row] = []
        for rows, state in zip(world, states, strict=True):
            expected = np.array([expected_statistics(data, config, history, row) for row in rows])
            asked = features(running, data, config, vocabularies, rows)
            assert asked.dtype == np.float32
            np.testing.assert_allclose(asked, expected, rtol=1e-5, atol=1e-6)
            served = features(running.tables(), data, config, vocabularies, rows)
            np.testing.assert_allclose(served, asked, rtol=1e-6)
            running.add(state)
            history += rows

    holds()


@settings(max_examples=30)
@given(world=worlds(least=3))
def test_merging_is_associative_and_commutative(
    world: list[list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    states, _ = prepared(contract(), STATISTICS, world, tmp_path_factory.mktemp("nights"))
    total = merge(states)
    assert all(merge(order).equals(total) for order in permutations(states))
    assert merge([merge(states[:2]), *states[2:]]).equals(total)
    assert merge([states[0], merge(states[1:])]).equals(total)
    assert merge([total]).equals(total)


@settings(max_examples=30)
@given(world=worlds(least=2))
def test_a_merged_state_gives_the_features_of_its_nights(
    world: list[list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = contract()
    states, vocabularies = prepared(data, STATISTICS, world, tmp_path_factory.mktemp("nights"))
    stepwise, at_once = (RunningStatistics(data, STATISTICS, vocabularies) for _ in range(2))
    for state in states:
        stepwise.add(state)
    at_once.add(merge(states))
    rows = [row for night in world for row in night]
    np.testing.assert_array_equal(
        features(stepwise, data, STATISTICS, vocabularies, rows),
        features(at_once, data, STATISTICS, vocabularies, rows),
    )


@settings(max_examples=30)
@given(world=worlds(nights=1), seed=st.randoms(use_true_random=False))
def test_the_order_of_rows_in_a_file_does_not_matter(
    world: list[list[Row]], seed: Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, folder = contract(), tmp_path_factory.mktemp("nights")
    shuffled = list(world[0])
    seed.shuffle(shuffled)
    states = [
        night_state(data, STATISTICS, write(data, rows, folder / name))
        for name, rows in (("a", world[0]), ("b", shuffled))
    ]
    assert states[0].equals(states[1])


def row(user: int, item: int, clicked: bool | None, stars: float | None, device: str | None = "web") -> Row:
    return {
        **{"shopper": user, "product": item, "clicked": clicked, "stars": stars, "device": device, "band": 1},
        **{
            "at": midnight_us(0),
            "price": 1.0,
            "brand": "a",
            "importance": 1.0,
            "hour": 1,
            "member": True,
            "note": None,
        },
    }


def test_the_formulas_by_hand(tmp_path: Path) -> None:
    data = contract()
    world = [[row(1, 10, True, 5.0), row(2, 10, False, None), row(1, 20, None, 2.0, device="app")]]
    states, vocabularies = prepared(data, STATISTICS, world, tmp_path)
    running = RunningStatistics(data, STATISTICS, vocabularies)
    running.add(states[0])
    asked = [row(1, 10, None, None)]
    # Clicks: global 1/2. Item 10: (1 + 3*.5) / (2 + 3) = .5; user 1: (1 + 2*.5) / (1 + 2) = 2/3;
    # (web, 1, 10): (1 + 5*.5) / (2 + 5) = .5. Stars: global 7/2; item (5 + 10.5) / 4; user (7 + 7) / 4; pair by item.
    stars = 15.5 / 4
    expected = [0.0, stars, math.log(3), math.log(2), 3.5, math.log(3), 0.0, (5 + 5 * stars) / 6, math.log(3)]
    np.testing.assert_allclose(features(running, data, STATISTICS, vocabularies, asked)[0], expected, rtol=1e-6)
    assert statistics_names(data, STATISTICS) == (
        *("item_rate:click", "item_rate:taste", "item_count", "user_rate:click", "user_rate:taste", "user_count"),
        *("cohort_item_rate:click", "cohort_item_rate:taste", "cohort_item_count"),
    )
    assert statistics_names(data, StatisticsConfig()) == statistics_names(data, STATISTICS)[:6]


def test_without_history_a_click_is_a_coin_and_a_rating_the_middle_of_its_range() -> None:
    data = contract()
    running = RunningStatistics(data, STATISTICS, vocabulary.empty(data))
    nobody = np.zeros(1, np.int64)
    assert running.features(nobody, nobody, [nobody, nobody]).tolist() == [[0.0, 3.0, 0.0] * 3]
    assert running.tables().base.tolist() == [0.0, 3.0]
    unbounded = data.model_copy(update={"columns": tuple(c.model_copy(update={"minimum": None}) for c in data.columns)})
    assert RunningStatistics(unbounded, STATISTICS, vocabulary.empty(data)).tables().base.tolist() == [0.0, 0.0]


def test_a_window_that_begins_with_one_row_does_not_say_all_or_none(tmp_path: Path) -> None:
    data = contract()
    states, vocabularies = prepared(data, STATISTICS, [[row(1, 10, True, None)]], tmp_path)
    running = RunningStatistics(data, STATISTICS, vocabularies)
    running.add(states[0])
    # One of one, held by three at a half: 2.5 / 4.
    np.testing.assert_allclose(running.tables().base[0], math.log(0.625 / 0.375), rtol=1e-6)


def test_a_rate_of_none_or_all_is_clipped_before_its_logit(tmp_path: Path) -> None:
    data = contract()
    states, vocabularies = prepared(data, STATISTICS, [[row(1, 10, True, None)]], tmp_path)
    running = RunningStatistics(data, STATISTICS.model_copy(update={"item_strength": 1e-9}), vocabularies)
    running.add(states[0])
    np.testing.assert_allclose(running.tables().base[0], math.log(0.9999 / 0.0001), rtol=1e-6)


def test_a_night_without_labels_counts_rows_and_changes_no_rate(tmp_path: Path) -> None:
    data = contract()
    states, vocabularies = prepared(data, STATISTICS, [[row(1, 10, None, None)]], tmp_path)
    running = RunningStatistics(data, STATISTICS, vocabularies)
    running.add(states[0])
    tables = running.tables()
    np.testing.assert_allclose(tables.item[1], [0.0, 3.0, math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(tables.item[0], [0.0, 3.0, 0.0], rtol=1e-6)


def test_an_unknown_user_item_or_cohort_falls_back_and_never_borrows_a_missing_value(tmp_path: Path) -> None:
    data = contract()
    world = [[row(1, 10, True, 5.0, device=None), row(2, 10, False, 1.0), row(2, 20, True, 4.0)]]
    states, vocabularies = prepared(data, STATISTICS, world, tmp_path)
    running = RunningStatistics(data, STATISTICS, vocabularies)
    running.add(states[0])
    strangers = [row(99, 10, None, None, device="tv"), row(2, 99, None, None), row(1, 10, None, None, device=None)]
    for source in (running, running.tables()):
        asked = features(source, data, STATISTICS, vocabularies, strangers)
        # The global rate is two of three, held by three at a half: 3.5 / 6, odds of 1.4.
        # Of an item that is known, a cohort that is not repeats the item's rates with a count of 0.
        np.testing.assert_array_equal(asked[[0, 2], 6:8], asked[[0, 2], 0:2])
        np.testing.assert_array_equal(asked[:, 8], 0.0)
        np.testing.assert_allclose(asked[0, 3:6], [math.log(1.4), 10 / 3, 0.0], rtol=1e-6)
        np.testing.assert_allclose(asked[1, 0:3], [math.log(1.4), 10 / 3, 0.0], rtol=1e-6)


def test_keys_that_the_vocabulary_lacks_are_an_error_and_not_a_silent_loss(tmp_path: Path) -> None:
    data = contract()
    states, _ = prepared(data, STATISTICS, [[row(1, 10, True, 5.0)]], tmp_path)
    with pytest.raises(ValueError, match="vocabulary of 'product' lacks 1 of the state's 1 keys"):
        RunningStatistics(data, STATISTICS, vocabulary.empty(data)).add(states[0])


def test_the_missing_marker_is_no_key_of_a_state(tmp_path: Path) -> None:
    data = contract("string")
    world = [[{**row(1, 10, True, 5.0), "shopper": "", "product": "p"}]]
    states, vocabularies = prepared(data, STATISTICS, world, tmp_path)
    assert states[0]["table"].to_pylist() == ["cohort_item", "global", "item"]
    RunningStatistics(data, STATISTICS, vocabularies).add(states[0])


def test_a_state_survives_its_file_and_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    data = contract()
    world = [[row(1, 10, True, 5.0), row(2, 10, None, 1.0, device=None)]]
    states, vocabularies = prepared(data, STATISTICS, world, tmp_path)
    for name in ("a", "b"):
        save_state(states[0], tmp_path / name)
    assert load_state(tmp_path / "a").equals(states[0])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    served = serving_tables(data, STATISTICS, vocabularies, [(night(0), tmp_path / "a")])
    assert served.item.shape == (2, 3)
    assert served.cohort_item.shape == (2, 3)
    assert served.cohort_radices == (2, 2, 2)


def test_serving_tables_take_nights_in_any_order(tmp_path: Path) -> None:
    data = contract()
    world = [[row(1, 10, True, 5.0)], [row(2, 20, False, 1.1)], [row(1, 20, None, 2.3)]]
    states, vocabularies = prepared(data, STATISTICS, world, tmp_path)
    files = [(night(number), tmp_path / f"{number}.state") for number in range(3)]
    for state, (_, path) in zip(states, files, strict=True):
        save_state(state, path)
    tables = [serving_tables(data, STATISTICS, vocabularies, order) for order in permutations(files)]
    assert all(np.array_equal(table.item, tables[0].item) for table in tables)


def test_merging_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one state"):
        merge([])


def test_labels_are_read_as_numbers_with_nan_where_missing(tmp_path: Path) -> None:
    rows = pa.table({"clicked": pa.array([True, None, False]), "stars": pa.array([None, 2.5, 1.0])})
    np.testing.assert_array_equal(label_values(contract(), rows), [[1.0, np.nan], [np.nan, 2.5], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("cohort", "complaint"),
    [
        (("shopper",), "names shopper: a cohort is made of categorical request columns"),
        (("product",), "names product"),
        (("clicked",), "names clicked"),
        (("hour",), "names hour"),
        (("device", "device"), "names a column twice: device, device"),
    ],
)
def test_a_cohort_that_would_name_one_row_is_refused(cohort: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(InvalidConfig, match=complaint):
        check_cohort(contract(), StatisticsConfig(cohort=cohort))
