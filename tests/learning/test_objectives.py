"""Several objectives in the start: factors that are shared by all, against dense least squares and in worlds."""

from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import torch

from tasks.data.contract import DataConfig
from tasks.learning import closed_form, starts
from tasks.learning.adapters import AdapterConfig
from tasks.learning.baselines import FACTORISATION, POPULARITY, Baselines, BaselinesConfig
from tasks.learning.closed_form import Rated, factorise
from tasks.learning.episodes import score_visits
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tasks.learning.networks import Ranker, RankerConfig
from tasks.learning.setting import Setting
from tasks.learning.training import meta_train
from tasks.learning.training_config import TrainingConfig
from tests.learning.small_rows import FIRST, contract, ladder_of, one_aim, opposed, shape, table

KINDS, WORTH = ("binary", "rating"), (1.5, 0.6)
HELD, BIAS = 2.0, 3.0
SHORT = TrainingConfig(seed=3, threads=1, epochs=1, steps_per_epoch=4, visits_per_step=16, stop_nights=1)


def sigmoid(score):
    return 1 / (1 + np.exp(-score))


def two_aims(users=12, items=9, count=240, factors=2):
    """Users, items, offsets, labels with holes, weights, and where factors begin; some items are unknown."""
    random = np.random.default_rng(0)
    user, item = random.integers(0, users, count), random.integers(0, items, count)
    labels = np.c_[random.integers(0, 2, count), random.normal(3, 4, count)].astype(float)
    labels[random.random(labels.shape) < 0.25] = np.nan
    offsets, start = random.normal([0, 3], 1, (count, 2)), random.normal(size=(items, factors))
    return user, item, offsets, labels, random.uniform(0.5, 2, count), start


def solved(user, item, offsets, labels, weights, start, kinds=KINDS, worth=WORTH, sweeps=3):
    users, items, *rest, start = map(torch.from_numpy, (user, item, offsets, labels, weights, start))
    return factorise(Rated(users, *rest, kinds, int(user.max()) + 1, HELD, BIAS, sweeps, worth), items, start).numpy()


def dense(user, item, offsets, labels, weights, start, sweeps):
    """The same with a matrix of users and items per objective, and one system of equations at a time."""
    shape, factors = (user.max() + 1, len(start)), start.copy()
    factors[0] = 0.0
    sides = []
    for aim, kind in enumerate(KINDS):
        given = ~np.isnan(labels[:, aim])
        u, i, o, y, w = (one[given] for one in (user, item, offsets[:, aim], labels[:, aim], weights))
        if kind == "binary":
            residual, curve = w * (y - sigmoid(o)), w * sigmoid(o) * (1 - sigmoid(o))
        else:
            residual, curve = w * (y - o) / np.sqrt(np.average((y - o) ** 2, weights=w)), w
        sums, curves = np.zeros(shape), np.zeros(shape)
        np.add.at(sums, (u, i), residual)
        np.add.at(curves, (u, i), curve)
        sides.append((sums, curves, WORTH[aim] / max(WORTH)))
    for _ in range(sweeps):
        wide = np.c_[np.ones(len(factors)), factors]
        prior = np.diag([BIAS, HELD, HELD])
        tastes = [
            [
                np.linalg.solve(wide.T @ (c[:, None] * wide) + prior, wide.T @ r)
                for r, c in zip(sums, curves, strict=True)
            ]
            for sums, curves, _ in sides
        ]
        for one in range(1, len(factors)):
            system, right = HELD * np.eye(2), np.zeros(2)
            for (sums, curves, worth), theirs in zip(sides, np.array(tastes), strict=True):
                bias, taste, c = theirs[:, 0], theirs[:, 1:], worth * curves[:, one]
                system = system + taste.T @ (c[:, None] * taste)
                right = right + taste.T @ (worth * sums[:, one] - c * bias)
            factors[one] = np.linalg.solve(system, right)
    return factors


@pytest.mark.parametrize("sweeps", [1, 3])
def test_factors_are_those_of_dense_least_squares_over_all_objectives(sweeps, monkeypatch):
    made = two_aims()
    expected = dense(*made, sweeps)
    np.testing.assert_allclose(solved(*made, sweeps=sweeps), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(closed_form, "CHUNK", 37)
    np.testing.assert_allclose(solved(*made, sweeps=sweeps), expected, rtol=1e-5, atol=1e-6)


def plain(users, items, offsets, labels, weights, factors, kind, sweeps):
    """One objective: a ridge per user, then one per item, on sums over its rows."""
    weights, given = weights * ~labels.isnan(), labels.nan_to_num()
    chance = torch.sigmoid(offsets)
    residual = weights * (given - (offsets if kind == "rating" else chance))
    curve = weights if kind == "rating" else weights * (chance * (1 - chance)).clamp_min(1e-3)
    held = torch.tensor([BIAS, HELD, HELD], dtype=torch.float64)

    def ridges(owner, count, inputs, right, held):
        sums = inputs.new_zeros(count, inputs.shape[1]).index_add_(0, owner, inputs * right[:, None])
        outer = inputs[:, :, None] * (inputs * curve[:, None])[:, None, :]
        system = inputs.new_zeros(count, held.numel() ** 2).index_add_(0, owner, outer.reshape(len(inputs), -1))
        factor = torch.linalg.cholesky(system.reshape(count, len(held), -1) + torch.diag(held))
        return torch.cholesky_solve(sums[..., None], factor)[..., 0]

    factors = factors.clone()
    factors[0] = 0.0
    for _ in range(sweeps):
        inputs = torch.cat([torch.ones_like(factors[items, :1]), factors[items]], dim=1)
        tastes = ridges(users, int(users.max()) + 1, inputs, residual, held)
        rest = residual - curve * tastes[users, 0]
        factors = ridges(items, len(factors), tastes[users, 1:], rest, held[1:])
        factors[0] = 0.0
    return factors.float().numpy()


@pytest.mark.parametrize("aim", [0, 1])
def test_one_objective_is_solved_to_the_bit_as_if_there_were_no_others(aim):
    """Whatever it is worth: there is nothing that it is worth more or less than. A rating is in deviations."""
    user, item, offsets, labels, weights, start = two_aims()
    offsets, labels = offsets[:, [aim]], labels[:, [aim]]
    if KINDS[aim] == "rating":
        given = ~np.isnan(labels[:, 0])
        unit = np.sqrt(np.average((labels - offsets)[given, 0] ** 2, weights=weights[given]))
        offsets, labels = offsets / unit, labels / unit
    found = solved(user, item, offsets, labels, weights, start, KINDS[aim : aim + 1], (0.3,))
    flat = (user, item, offsets[:, 0], labels[:, 0], weights, start)
    assert np.array_equal(found, plain(*map(torch.from_numpy, flat), KINDS[aim], 3))


def test_neither_the_unit_of_a_rating_nor_that_of_all_weights_matters():
    user, item, offsets, labels, weights, start = two_aims()
    found = solved(user, item, offsets, labels, weights, start)
    stars = solved(user, item, offsets * [1, 10], labels * [1, 10], weights, start)
    np.testing.assert_allclose(stars, found, rtol=1e-5, atol=1e-6)
    louder = solved(user, item, offsets, labels, weights, start, worth=tuple(7 * one for one in WORTH))
    np.testing.assert_allclose(louder, found, rtol=1e-5, atol=1e-6)


def test_an_objective_that_is_worth_little_or_has_no_labels_says_as_little():
    """A rating of which nothing is known, or that is worth nothing beside the clicks, leaves them to themselves."""
    user, item, offsets, labels, weights, start = two_aims()
    alone = solved(user, item, offsets[:, :1], labels[:, :1], weights, start, KINDS[:1], ())
    quiet = solved(user, item, offsets, labels, weights, start, worth=(1.0, 1e-12))
    np.testing.assert_allclose(quiet, alone, rtol=1e-5, atol=1e-6)
    unknown = solved(user, item, offsets, labels * [1, np.nan], weights, start)
    np.testing.assert_allclose(unknown, alone, rtol=1e-6, atol=1e-7)
    assert abs(solved(user, item, offsets, labels, weights, start) - alone).max() > 0.1
    perfect = solved(user, item, offsets, np.c_[labels[:, 0], offsets[:, 1]], weights, start)  # a variance of 0
    assert np.isfinite(perfect).all()


def test_a_network_starts_with_the_same_factors_whether_stars_go_up_to_5_or_to_50():
    rows, config = opposed(nights=4, users=30), RankerConfig(embedding=4, hidden=8, factors=2, category_factors=2)
    tables = []
    for unit in (1, 10):
        units = np.array([1, unit])
        statistics = np.array(rows.statistics) * np.tile([1, unit, 1], 3)
        told = replace(rows, labels=(rows.labels * units).astype(np.float32), statistics=statistics.astype(np.float32))
        torch.manual_seed(0)
        network = Ranker(shape(told, *KINDS), config)
        starts.normalise(network, contract(*KINDS), told, np.arange(len(told)))
        starts.solve_start(network, Material(told), np.arange(len(told)), AdapterConfig(), 3, None, WORTH)
        tables.append(network.factor_tables[0].weight.detach().numpy())
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-4, atol=1e-5)
    assert tables[0][1:].any(axis=1).all()


# Through learning


def world(kinds, users=60, nights=6, items=24, each=12):
    """Tastes for items, which no column tells, in the last objective; the first one is drawn for everybody alike."""
    random = np.random.default_rng(0)
    taste, nature = random.normal(size=(users, 2)), random.normal(0, 1.5, (items, 2))
    who = np.repeat(np.arange(users), each)
    user, night = np.tile(who, nights), np.repeat(np.arange(nights), len(who))
    item = np.concatenate([random.permutation(items)[:each] for _ in range(users * nights)])
    pull = (taste[user] * nature[item]).sum(axis=1)
    labels = np.empty((len(user), 2))
    for aim, (kind, score) in enumerate(zip(kinds, (0 * pull, pull), strict=True)):
        binary = kind == "binary"
        labels[:, aim] = (
            random.random(len(user)) < sigmoid(score) if binary else 3 + score + random.normal(size=len(user))
        )
    statistics = np.zeros((len(user), 9))
    for number in range(nights):
        earlier, tonight = night < number, night == number
        count = np.bincount(item[earlier], minlength=items)
        for aim, kind in enumerate(kinds):
            prior = 0.5 if kind == "binary" else 3.0
            rate = (np.bincount(item[earlier], labels[earlier, aim], items) + 10 * prior) / (count + 10)
            statistics[tonight, aim] = (np.log(rate / (1 - rate)) if kind == "binary" else rate)[item[tonight]]
        statistics[tonight, 2] = np.log1p(count)[item[tonight]]
    return table(user + 1, night, item=item + 1, labels=labels, statistics=statistics)


def test_what_the_config_says_that_objectives_are_worth_is_what_factors_are_solved_with():
    """Worth next to nothing, the objective with all the tastes leaves the factors to one without any."""
    rows, kinds, tables = world(KINDS[:1] * 2, users=20), KINDS[:1] * 2, []
    for weight in (1.0, 1e-9):
        data = contract(*kinds).model_dump()
        data["objectives"][1]["weight"] = weight
        setting = Setting(
            *(DataConfig.model_validate(data), ladder_of(), RankerConfig(), AdapterConfig()),
            *(SHORT.model_copy(update={"epochs": 0}), rows, shape(rows, *kinds), date.fromordinal(FIRST + 5)),
        )
        tables.append(meta_train(setting).base.network.factor_tables[0].weight.detach().numpy())
    assert np.linalg.norm(tables[1]) < 0.7 * np.linalg.norm(tables[0])


def told(rows, kinds, night):
    """Mean loss of every objective on a night: adapted, by matrix factorisation and by popularity ``[3, K]``."""
    setting = Setting(
        *(contract(*kinds), ladder_of(), RankerConfig(), AdapterConfig(), SHORT, rows, shape(rows, *kinds)),
        date.fromordinal(FIRST + night),
    )
    base, material, ladder = meta_train(setting).base, Material(rows), Ladder(rows, ladder_of(), "shopper")
    visits = visits_of(rows).of_nights(FIRST + night, FIRST + night)
    none = np.zeros(len(visits), np.int64)
    baselines = Baselines(BaselinesConfig(), ladder, material, kinds, FIRST + night)
    with torch.no_grad():
        scorer = material.scorer(base.network)
        scores = score_visits(ladder, visits, none, scorer, material, base.table(), base.adaptation)
        rivals = baselines.score(visits, none)
    binary, labels = np.array(kinds) == "binary", rows.labels[scores.rows]
    losses = []
    adapted = np.where(binary, sigmoid(np.where(binary, scores.adapted.numpy(), 0.0)), scores.adapted)
    for said in (adapted, *(rivals[name][1].numpy() for name in (FACTORISATION, POPULARITY))):
        chance = np.where(binary, said, 0.5)
        entropy = -(labels * np.log(chance) + (1 - labels) * np.log1p(-chance))
        losses.append(np.where(binary, entropy, (said - labels) ** 2).mean(axis=0))
    return np.array(losses)


@pytest.mark.parametrize("kinds", [("binary", "binary"), ("rating", "binary"), ("binary", "rating")])
def test_tastes_of_one_objective_are_learned_wherever_it_is_listed(kinds):
    """Listed second and listed first. 1 % of the loss is what the seed of a training makes of it."""
    rows, night = world(kinds), 5
    last = told(rows, kinds, night)
    turned = replace(rows, labels=rows.labels[:, ::-1].copy(), statistics=rows.statistics[:, [1, 0, *range(2, 9)]])
    first = told(turned, kinds[::-1], night)[:, ::-1]
    for adapted, factorised, popular in (last[:, 1], first[:, 1]):
        assert adapted < 1.01 * factorised < 0.85 * popular
    np.testing.assert_allclose(first, last, rtol=0.01)


def test_the_unit_of_a_rating_is_not_felt_in_the_tastes_for_another_objective():
    """Stars without any taste, up to 5 and up to 50, beside clicks that are all taste, through start and training."""
    kinds, units = ("rating", "binary"), np.array([10, 1])
    rows = world(kinds)
    statistics = rows.statistics * np.tile([10, 1, 1], 3).astype(np.float32)
    stars = replace(rows, labels=(rows.labels * units).astype(np.float32), statistics=statistics)
    np.testing.assert_allclose(told(stars, kinds, 5)[:, 1], told(rows, kinds, 5)[:, 1], rtol=0.01)


@pytest.mark.parametrize("unit", [0.03, 30.0])
def test_the_unit_of_a_rating_alone_does_not_matter(unit):
    """Seconds, stars or shares: what adapters leave of the variance is the same, through start and training."""
    rows = world(("binary", "rating"))
    alone = one_aim(
        replace(rows, labels=rows.labels[:, ::-1].copy(), statistics=rows.statistics[:, [1, 0, *range(2, 9)]])
    )
    counted = np.array(["rate" in name for name in alone.statistics_names])
    statistics = np.where(counted, alone.statistics * unit, alone.statistics).astype(np.float32)
    other = replace(alone, labels=(alone.labels * unit).astype(np.float32), statistics=statistics)
    losses = [told(one, ("rating",), 5)[:, 0] / scale**2 for one, scale in ((alone, 1.0), (other, unit))]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    assert losses[0][0] < 1.02 * losses[0][1] < 0.85 * losses[0][2]
