"""Starts against numpy, and the closed form against its own pieces."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from tasks.learning import starts
from tasks.learning.adapters import AdapterConfig
from tasks.learning.closed_form import Rated, calibrate, factorise, fit_warm_up
from tasks.learning.material import Material, visits_of
from tasks.learning.networks import Ranker, RankerConfig
from tasks.learning.solvers import solve
from tests.learning.small_rows import contract, one_aim, opposed, shape, table

SMALL = RankerConfig(embedding=4, hidden=8, factors=2, category_factors=2, features=3, warm_up=True)


@pytest.fixture(scope="module")
def history():
    return one_aim(opposed(nights=4, users=30))


def test_normalisation_is_the_mean_and_spread_of_the_newest_rows(history):
    visits = visits_of(history)
    at = starts.newest(history, visits, 100)
    by_time = np.argsort(history.time, kind="stable")[-100:]
    assert at.tolist() == sorted(by_time.tolist())
    assert starts.newest(history, visits, len(history)).tolist() == list(range(len(history)))
    numbers = np.array(history.request_numbers)
    numbers[::4] = np.nan
    network = Ranker(shape(history), SMALL)
    starts.normalise(network, contract(), replace(history, request_numbers=numbers), at)
    known = numbers[at][~np.isnan(numbers[at])]
    assert network.request_normaliser.mean.item() == pytest.approx(known.mean(), rel=1e-5)
    assert network.request_normaliser.scale.item() == pytest.approx(known.std(), rel=1e-5)
    # A constant column is centred and left alone; one that is always missing too.
    assert network.statistics_normaliser.scale[2:].tolist() == [1.0] * 4
    starts.normalise(network, contract(), replace(history, request_numbers=numbers * np.nan), at)
    assert (network.request_normaliser.mean.item(), network.request_normaliser.scale.item()) == (0.0, 1.0)


def started(rows, more=0, sweeps=2, ranker=SMALL):
    """A fresh network and the same one started in closed form."""
    at = np.arange(len(rows))
    torch.manual_seed(0)
    networks = [Ranker(shape(rows, more=more), ranker) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    for network in networks:
        starts.normalise(network, contract(), rows, at)
    starts.solve_start(networks[1], Material(rows), at, AdapterConfig(), sweeps)
    return networks


def test_the_linear_layer_is_the_calibration_of_what_the_fresh_network_says(history):
    fresh, network = started(history)
    material, at = Material(history), np.arange(len(history))
    with torch.no_grad():
        offsets = material.scorer(fresh.eval())(at)[0]
        normal = fresh.normal_statistics(material.inputs(at)[4])
    solved = calibrate(normal, offsets, material.labels(at), material.weights(at), ["binary"]).float()
    torch.testing.assert_close(network.wide.weight.detach(), solved[:, :-1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network.wide.bias.detach(), solved[:, -1], rtol=1e-4, atol=1e-6)


def test_solving_the_start_again_gives_the_same_linear_layer(history):
    """What the layer was before does not enter."""
    _, network = started(history)
    before = network.wide.weight.detach().clone()
    starts.solve_start(network, Material(history), np.arange(len(history)), AdapterConfig(), 1)
    assert torch.equal(network.wide.weight, before)


def test_nothing_but_the_linear_layer_and_the_factors_is_touched(history):
    fresh, network = started(history)
    for (name, before), after in zip(fresh.state_dict().items(), network.state_dict().values(), strict=True):
        moved = name.startswith(("wide.", "factor_tables.", "warm_up."))
        assert torch.equal(before, after) != moved, name


def test_unknown_items_and_items_beyond_the_table_have_no_factors(history):
    sized = shape(history)
    smaller = sized.model_copy(update={"candidate_vocabularies": (9, sized.candidate_vocabularies[1] - 1)})
    network = Ranker(smaller, SMALL)
    starts.solve_start(network, Material(history), np.arange(len(history)), AdapterConfig(), 1)
    for factors in network.factor_tables:
        assert not factors.weight[0].any()
        assert factors.weight[1:].any(dim=1).all()


def described(network, rows):
    """Of every item its newest row: normalised numbers, and categories; one row at a time."""
    items, columns = network.shape.candidate_vocabularies[0], len(network.shape.candidate_vocabularies) - 1
    numbers = torch.zeros(items, 2 * network.shape.candidate_numbers)
    categories = torch.zeros(items, columns, dtype=torch.int64)
    for at in np.argsort(rows.time, kind="stable"):
        item, *rest = rows.candidate_ids[at].tolist()
        with torch.no_grad():
            numbers[item] = network.candidate_normaliser(torch.from_numpy(rows.candidate_numbers[at].copy()))
        categories[item] = torch.tensor(rest)
    return {"numbers": numbers, "categories": categories}


@pytest.mark.parametrize("column", [0, 1])
def test_every_table_is_the_factorisation_of_its_own_column(history, column):
    """By the residuals behind the calibration, from the factors of the pass before."""
    _, network = started(history)
    material, at = Material(history), np.arange(len(history))
    before = [table.weight.detach().clone() for table in network.factor_tables]
    with torch.no_grad():
        network.wide.weight.zero_()
        network.wide.bias.zero_()
        offsets = material.scorer(network)(at)[0]
        normal = network.normal_statistics(material.inputs(at)[4])
    solved = calibrate(normal, offsets, material.labels(at), material.weights(at), ["binary"]).float()
    scores = offsets + normal @ solved[:, :-1].T + solved[:, -1]
    told = partial(fit_warm_up, copy.deepcopy(network.warm_up), **described(network, history)) if column == 0 else None
    starts.solve_start(network, material, at, AdapterConfig(precision=3.0), 2)
    users = torch.from_numpy(np.unique(history.user, return_inverse=True)[1])
    rated = Rated(
        *(users, scores, material.labels(at), material.weights(at), ("binary",), int(users.max()) + 1, 3.0, 3.0, 2)
    )
    expected = factorise(rated, torch.from_numpy(history.candidate_ids[:, column].copy()), before[column], told)
    torch.testing.assert_close(network.factor_tables[column].weight.detach(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("warm_up", "aims"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_what_a_user_likes_of_new_items_is_known_by_their_columns_alone(warm_up, aims):
    """Tastes for a price and a genre, learned through items that were seen; 20 of 60 items are new to the base.

    They stand in the last objective; a first one is of no taste.
    """
    random = np.random.default_rng(0)
    item = np.concatenate([random.permutation(60)[:30] + 1 for _ in range(80)])
    user = np.repeat(np.arange(80), 30)
    price, genre = random.normal(size=61), random.integers(1, 3, 61)
    taste = random.choice([-2.0, 2.0], (80, 2))
    pull = taste[user, 0] * price[item] + taste[user, 1] * np.where(genre[item] == 1, 1, -1)
    clicks = (random.random(len(user)) < 1 / (1 + np.exp(-pull))).astype(np.float32)
    labels = np.stack([random.integers(0, 2, len(user)), clicks], axis=1)[:, -aims:]
    rows = table(user + 1, 0 * user, item=item, labels=labels, price=price[item], genre=genre[item])
    seen, new = (np.flatnonzero(mask) for mask in (rows.item <= 40, rows.item > 40))
    kinds = ("binary",) * aims
    sized = shape(rows, *kinds).model_copy(update={"candidate_vocabularies": (41, 3)})
    torch.manual_seed(0)
    config = RankerConfig(embedding=4, hidden=8, factors=2, category_factors=0, direct=False, warm_up=warm_up)
    network, material = Ranker(sized, config), Material(rows)
    starts.normalise(network, contract(*kinds), rows, seen)
    starts.solve_start(network, material, seen, AdapterConfig(), 10)
    with torch.no_grad():
        logits, features = material.scorer(network.eval())(np.arange(len(rows)))
    logits, said = logits[:, [-1]], material.labels(np.arange(len(rows)))[:, [-1]]
    held, losses = torch.full((1, 3), 4.0), []
    for who in range(1, 81):
        mine, theirs = (torch.from_numpy(part[rows.user[part] == who]) for part in (seen, new))
        support = (features[mine], logits[mine], said[mine], torch.ones(len(mine)))
        own = solve(*(part[None] for part in support), held, ["binary"], 2)[0]
        scores = (logits[theirs], logits[theirs] + features[theirs] @ own.T)
        losses += [binary_cross_entropy_with_logits(one, said[theirs]).item() for one in scores]
    unadapted, adapted = np.array(losses).reshape(80, 2).mean(axis=0)
    assert (adapted < 0.8 * unadapted) == warm_up, (adapted, unadapted)


def test_parts_of_the_rows_leave_no_trace(history, monkeypatch):
    _, whole = started(history)
    monkeypatch.setattr(starts, "PART", 100)
    _, cut = started(history)
    torch.testing.assert_close(cut.wide.weight, whole.wide.weight, rtol=1e-5, atol=1e-6)
    for one, other in zip(cut.factor_tables, whole.factor_tables, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)


def test_a_network_without_factors_is_calibrated_all_the_same(history):
    fresh, network = started(history, ranker=SMALL.model_copy(update={"factors": 0, "category_factors": 0}))
    assert not torch.equal(network.wide.weight, fresh.wide.weight)


def test_what_a_row_counts_is_a_factor_of_its_weight(history):
    counts = np.random.default_rng(0).uniform(0.1, 2.0, len(history))
    weighed = replace(history, weights=(history.weights * counts).astype(np.float32))
    at, networks = np.arange(len(history)), []
    for rows, more in ((history, (counts,)), (weighed, ())):
        torch.manual_seed(0)
        networks.append(Ranker(shape(history), SMALL))
        starts.solve_start(networks[-1], Material(rows), at, AdapterConfig(), 2, *more)
    counted, plain = (network.state_dict() for network in networks)
    for name in ("wide.weight", "factor_tables.0.weight", "factor_tables.1.weight"):
        torch.testing.assert_close(counted[name], plain[name], rtol=1e-4, atol=1e-5)
        assert counted[name].abs().sum() > 0
