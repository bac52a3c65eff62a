"""Boosted trees by LightGBM itself, in a world made for them, and refused without it."""

import builtins

import numpy as np
import pytest
import torch

from tasks.errors import InvalidConfig
from tasks.learning.baselines import Baselines, BaselinesConfig
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tasks.learning.trees import MOST_IDS, Trees, table_of
from tests.learning.small_rows import FIRST, ladder_of, opposed, table, with_labels

KINDS = ("binary", "rating")
NUMBERS = {"rounds": 20, "leaves": 5, "rate": 0.2, "leaf_rows": 5, "seed": 0}


@pytest.fixture
def lightgbm():
    try:
        import lightgbm
    except (ImportError, OSError) as error:
        pytest.skip(f"LightGBM cannot be loaded: {error}")
    return lightgbm


def holes(world):
    random = np.random.default_rng(2)
    return with_labels(world, np.where(random.random(world.labels.shape) < 0.1, np.nan, world.labels))


def test_the_trees_are_lightgbm_s(lightgbm):
    rows = holes(opposed(nights=4, users=30))
    object.__setattr__(rows, "weights", np.random.default_rng(0).uniform(0.5, 2.0, len(rows)).astype(np.float32))
    at, every = np.arange(0, len(rows), 2), np.arange(len(rows))
    said = Trees(Material(rows), at, KINDS, **NUMBERS).predictions(every, torch.zeros(len(rows), 2)).numpy()
    inputs = np.concatenate(
        [rows.statistics, rows.request_numbers, rows.candidate_numbers, rows.request_ids, rows.candidate_ids], axis=1
    )
    for aim, objective in enumerate(("binary", "regression")):
        given = at[~np.isnan(rows.labels[at, aim])]
        params = {
            "objective": objective, "num_leaves": 5, "learning_rate": 0.2, "min_data_in_leaf": 5, "num_threads": 1,
            "verbosity": -1, "deterministic": True, "force_row_wise": True, "seed": 0,
        }  # fmt: skip
        data = lightgbm.Dataset(
            inputs[given], rows.labels[given, aim], weight=rows.weights[given], categorical_feature=[11, 12, 13, 14]
        )
        expected = lightgbm.train(params, data, num_boost_round=20).predict(inputs)
        np.testing.assert_allclose(said[:, aim], expected, rtol=1e-5)
        assert np.std(expected) > 0.05


def test_unknown_ids_are_missing(lightgbm):
    rows = table([1, 1, 1, 1], [0, 0, 1, 1], item=[0, 5, MOST_IDS - 1, MOST_IDS])
    told = table_of(rows, np.arange(4))
    np.testing.assert_array_equal(told[:, -2], [np.nan, 5, MOST_IDS - 1, np.nan])


def test_equal_rows_give_equal_trees(lightgbm):
    rows = holes(opposed(nights=4, users=30))
    every = np.arange(len(rows))
    one, other = (
        Trees(Material(rows), every, KINDS, **NUMBERS).predictions(every, torch.zeros(len(rows), 2)) for _ in range(2)
    )
    assert torch.equal(one, other)


def test_an_objective_without_labels_is_told_otherwise(lightgbm):
    rows = opposed(nights=4, users=30)
    rows = with_labels(rows, np.where([True, False], np.nan, rows.labels))
    at = np.arange(len(rows))
    said = Trees(Material(rows), at, KINDS, **NUMBERS).predictions(at, torch.full((len(rows), 2), 0.25))
    assert (said[:, 0] == 0.25).all()
    assert (said[:, 1] != 0.25).all()


def test_they_see_what_popularity_does_not(lightgbm):
    """Who is liked turns on a market and a number together: no item rate, and no straight line, says so."""
    random, count = np.random.default_rng(5), 3000
    market, price = random.integers(1, 5, count), random.uniform(0, 1, count)
    liked = (np.isin(market, (1, 4)) == (price > 0.5)) == (random.random(count) < 0.9)
    rows = table(
        random.integers(1, 200, count), random.integers(0, 4, count), item=random.integers(1, 9, count),
        market=market, price=price, labels=liked[:, None],
    )  # fmt: skip
    tonight = visits_of(rows).of_nights(FIRST + 3, FIRST + 3)
    rivals = Baselines(
        BaselinesConfig(trees=True), Ladder(rows, ladder_of(), "shopper"), Material(rows), ("binary",), FIRST + 3
    )
    loss = {}
    for name, (at, said) in rivals.score(tonight, np.zeros(len(tonight), np.int64)).items():
        label, chance = rows.labels[at, 0], said[:, 0].numpy()
        loss[name] = -(label * np.log(chance) + (1 - label) * np.log(1 - chance)).mean()
    assert loss["boosted trees"] < 0.75 * min(value for name, value in loss.items() if name != "boosted trees")


@pytest.mark.parametrize("missing", [ImportError("No module named 'lightgbm'"), OSError("libgomp.so.1: cannot open")])
def test_without_lightgbm_they_are_refused_by_name(monkeypatch, missing):
    load = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "lightgbm":
            raise missing
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    rows = opposed(nights=4, users=10)
    parts = (Ladder(rows, ladder_of(), "shopper"), Material(rows), KINDS, FIRST + 3)
    with pytest.raises(InvalidConfig, match=r"baselines\.trees is true.*pip install 'nightrank\[trees\]'"):
        Baselines(BaselinesConfig(trees=True), *parts)
    with pytest.raises(InvalidConfig, match=r"baselines\.trees is true"):
        BaselinesConfig(trees=True).check()
    BaselinesConfig().check()
    Baselines(BaselinesConfig(), *parts)
