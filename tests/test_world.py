"""The tiny world is what it says it is."""

from math import exp, log
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from flows.config import RetrainConfig
from tests.world import FIRST_NIGHT, THIN_MARKET, World, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), nights=12, users=400)


@pytest.fixture(scope="module")
def table(world: World) -> pa.Table:
    return ds.dataset(world.config["data"]["source"], format="parquet", partitioning="hive").to_table()


@pytest.mark.parametrize("objectives", [1, 2])
def test_the_config_is_a_config(tmp_path: Path, objectives: int) -> None:
    config = RetrainConfig.model_validate(write_world(tmp_path, objectives=objectives).config)
    assert [objective.name for objective in config.data.objectives] == ["clicked", "stars"][:objectives]


def test_equal_arguments_write_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_world(tmp_path / name, seed=3, nights=4) for name in ("a", "b"))
    assert first.rows == second.rows
    for path in sorted((tmp_path / "a" / "lake").rglob("*.parquet")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_rows_are_counted(world: World, table: pa.Table) -> None:
    assert table.num_rows == sum(world.rows.values())
    assert sum(world.bad.values()) == 1


def test_one_row_lies_outside_its_night(world: World, table: pa.Table) -> None:
    days = np.array(table["at"].to_numpy(), "datetime64[D]")
    nights = np.array([str(night) for night in table["night"].to_pylist()], "datetime64[D]")
    assert int((days != nights).sum()) == 1


def test_one_market_is_below_the_minimum_support(world: World, table: pa.Table) -> None:
    rows = table["market"].to_pylist().count(THIN_MARKET)
    assert 0 < rows < world.config["segments"]["min_support"]


def test_every_item_is_liked_by_about_half(table: pa.Table) -> None:
    rates = table.group_by("item_id").aggregate([("clicked", "mean")])["clicked_mean"].to_numpy()
    assert np.abs(rates - 0.5).max() < 0.1


def test_markets_and_tastes_conflict(world: World, table: pa.Table) -> None:
    frame = table.filter(ds.field("market") != THIN_MARKET)
    clicked, market, genre, length, user = (
        np.array(frame[name].to_pylist()) for name in ("clicked", "market", "genre", "length", "user_id")
    )
    taste = np.array([world.tastes[name] for name in user])
    for first, liked, disliked in (("north", "comedy", "drama"), ("south", "drama", "comedy")):
        assert clicked[(market == first) & (genre == liked)].mean() > 0.6
        assert clicked[(market == first) & (genre == disliked)].mean() < 0.4
    for coin in (1, -1):
        assert coin * (clicked[(taste == coin) & (length == "long")].mean() - 0.5) > 0.25
    assert abs(clicked[length == "long"].mean() - 0.5) < 0.05


def test_knowing_the_taste_is_worth_a_lot(world: World) -> None:
    def entropy(chance: float) -> float:
        return -chance * log(chance) - (1 - chance) * log(1 - chance)

    def sigmoid(logit: float) -> float:
        return 1 / (1 + exp(-logit))

    # Market and taste pull together (logit ±3) or against each other (±1), each half of the time.
    assert world.bayes_log_loss == pytest.approx((entropy(sigmoid(3)) + entropy(sigmoid(1))) / 2)
    assert world.blind_log_loss == pytest.approx(entropy((sigmoid(3) + sigmoid(-1)) / 2))
    assert world.blind_log_loss - world.bayes_log_loss > 0.28


def test_newcomers_come_every_night(world: World) -> None:
    assert min(map(len, world.newcomers.values())) > 0
    assert world.nights[0] == FIRST_NIGHT
