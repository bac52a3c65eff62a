"""Nights of several lakes: one base for all of them."""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flows.config import RetrainConfig
from tasks.serving.ranker import Ranker
from tests.finished import Finished
from tests.shared import lend_graph
from tests.steps.plain import plain_night
from tests.world import THIN_MARKET

MARKETS = ("north", "south", THIN_MARKET)


def cut_by_market(lake: Path, folder: Path) -> None:
    """The same rows as a lake for each market, which no file names; some nights are without the thin one."""
    for night in lake.iterdir():
        for file in night.iterdir():
            table = pq.ParquetFile(file).read()
            for market in MARKETS:
                rows = table.filter(pc.equal(table["market"], market)).drop_columns(["market"])
                if rows.num_rows:
                    (folder / market / night.name).mkdir(parents=True, exist_ok=True)
                    pq.write_table(rows, folder / market / night.name / file.name)


def of_lakes(tree: dict[str, Any], folder: Path) -> RetrainConfig:
    """The config of the world cut by market."""
    lakes = [{"name": market, "source": str(folder / market), "optional": market == THIN_MARKET} for market in MARKETS]
    data = {name: value for name, value in tree["data"].items() if name != "source"}
    places = {"store": str(folder / "store"), "scratch": str(folder / "scratch")}
    return RetrainConfig.model_validate(
        {**tree, **places, "data": {**data, "lakes": lakes, "lake_column": "market"}}
    )  # fmt: skip


@pytest.fixture
def cut(finished: Finished, tmp_path: Path) -> Path:
    cut_by_market(Path(finished.world.config["data"]["source"]), tmp_path)
    return tmp_path


def test_lakes_give_the_release_that_one_lake_with_their_names_in_a_column_gives(finished: Finished, cut: Path) -> None:
    tree, first = finished.world.config, finished.results[0]
    config = of_lakes(tree, cut)
    lend_graph(tree["store"], config.store)
    made = plain_night(config, first.night)
    assert made.published.release == first.published.release
    assert made.steps[0].digest != first.steps[0].digest
    assert [step.digest for step in made.steps[1:-1]] == [step.digest for step in first.steps[1:-1]]
    with Ranker(config.store, config.pipeline, device="cpu") as ranker:
        assert ranker.release == first.published.release
