"""Strengths for a short history: folds that have not seen their visits, and what each visit adds to the loss."""

import copy
import itertools

import numpy as np
import pytest
import torch

from tasks.learning import crossfit
from tasks.learning.adapters import Adaptation
from tasks.learning.crossfit import FOLDS, dealt, losses_by_visit
from tasks.learning.descent import steady
from tasks.learning.episodes import score_visits
from tasks.learning.initialisation import Initialisation
from tasks.learning.losses import Losses, contests
from tasks.learning.material import visits_of
from tasks.learning.setting import Setting
from tasks.learning.starts import solve_start
from tests.learning import test_training
from tests.learning.small_rows import FIRST, contract, ladder_of, one_aim, opposed, part, shape, with_labels
from tests.learning.test_training import RIDGE, SHORT, SMALL, day, train

NIGHTS = 5


def setting_of(rows, kinds=(), weights=(), adapter=RIDGE):
    data = contract(*kinds)
    aims = [aim.model_copy(update={"weight": weight}) for aim, weight in zip(data.objectives, weights, strict=False)]
    data = data.model_copy(update={"objectives": aims}) if aims else data
    return Setting(data, ladder_of(), SMALL, adapter, SHORT, rows, shape(rows, *kinds), day(NIGHTS))


def folds_of(setting, seed=0):
    """Folds of the visits of all nights but the first, from a network in closed form on that."""
    made = Initialisation(setting, Losses(setting))
    visits = setting.visits.of_nights(FIRST + 1, FIRST + NIGHTS)

    def solve(network, at):
        solve_start(network, setting.material, at, setting.adapter, 3)

    with steady(seed, 1), torch.no_grad():
        network, precisions = made.fresh()
        solve(network, setting.visits.of_nights(FIRST, FIRST).rows.flat()[0])
        return dealt(setting, network, visits, solve, np.random.default_rng(seed)), precisions().detach(), visits


@pytest.fixture(scope="module")
def rows():
    return opposed(nights=NIGHTS, users=13)


def test_every_visit_is_dealt_once_into_parts_of_like_size(rows):
    folds, _, visits = folds_of(setting_of(one_aim(rows)))
    found = np.concatenate([fold.visits.rows.start for fold in folds])
    assert sorted(found) == sorted(visits.rows.start)
    sizes = [len(fold.visits) for fold in folds]
    assert len(sizes) == FOLDS
    assert max(sizes) - min(sizes) <= 1


def test_of_many_visits_some_are_dealt_and_of_few_each_is_a_fold(rows, monkeypatch):
    for most, expected in ((6, [2, 2, 1, 1]), (3, [1, 1, 1])):
        monkeypatch.setattr(crossfit, "MOST_USERS", most)
        folds, _, visits = folds_of(setting_of(one_aim(rows)))
        assert [len(fold.visits) for fold in folds] == expected
        assert set(np.concatenate([fold.visits.rows.start for fold in folds])) <= set(visits.rows.start)


def test_a_fold_has_not_seen_the_labels_of_its_visits_and_has_seen_all_others(rows):
    rows = one_aim(rows)
    folds, _, _ = folds_of(setting_of(rows))
    hidden = folds[1].visits.rows.flat()[0]
    labels = rows.labels.copy()
    labels[hidden] = 1 - labels[hidden]
    others, _, _ = folds_of(setting_of(with_labels(rows, labels)))
    for number, (one, other) in enumerate(zip(folds, others, strict=True)):
        mine, theirs = one.network.state_dict(), other.network.state_dict()
        assert np.array_equal(one.visits.rows.start, other.visits.rows.start)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine) == (number == 1)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5)])
def test_what_visits_add_is_the_mean_loss_over_all_rows_that_are_asked_about(rows, weights):
    """Against a loop over folds and supports, with missing labels and rows that count differently."""
    random, kinds = np.random.default_rng(1), ("binary", "rating")
    labels = rows.labels.copy()
    labels[random.random(labels.shape) < 0.2] = np.nan
    rows = with_labels(rows, labels)
    np.asarray(rows.weights)[:] = random.uniform(0.5, 2.0, len(rows))
    setting = setting_of(rows, kinds, weights)
    folds, held, visits = folds_of(setting)
    losses = losses_by_visit(setting, folds, held)
    held = held * torch.from_numpy(random.uniform(0.1, 9.0, held.shape)).float()
    with torch.no_grad():
        found = losses(held)
    assert found.shape == (len(visits),)
    said, asked, owner, first = [], [], [], 0
    with torch.no_grad():
        for fold in folds:
            for longer, after, at in contests(fold.visits):
                told = score_visits(setting.ladder, longer, after, setting.material.scorer(fold.network),
                                    setting.material, held, Adaptation.of(fold.network, RIDGE))  # fmt: skip
                said.append(told.adapted.double().numpy())
                asked.append(at)
                visit = visits_of(rows).rows.start.searchsorted(at, side="right") - 1
                start = visits_of(rows).rows.start[visit]
                owner.append(first + np.searchsorted(fold.visits.rows.start, start))
            first += len(fold.visits)
    said, at, owner = np.concatenate(said), np.concatenate(asked), np.concatenate(owner)
    expected = np.zeros(len(visits))
    for aim, weight in enumerate(weights):
        label, mass = rows.labels[at, aim].astype(float), np.asarray(rows.weights)[at].astype(float)
        there = ~np.isnan(label)
        entropy = -np.log(1 / (1 + np.exp(np.where(label > 0, -1, 1) * said[:, aim])))
        each = entropy if kinds[aim] == "binary" else 0.5 * (said[:, aim] - label) ** 2
        np.add.at(expected, owner[there], weight * (each * mass)[there] / mass[there].sum())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-8)


def test_where_labels_are_coins_adaptation_is_held_back_and_where_tastes_are_opposed_it_is_not():
    """Forty users on five nights: what is found by luck is far from what is there."""
    rows = one_aim(opposed(nights=NIGHTS, users=40))
    random = np.random.default_rng(0)
    coins = with_labels(rows, random.integers(0, 2, (len(rows), 1)).astype(float))
    config = SHORT.model_copy(update={"epochs": 0})
    held, free = (train(one, night=NIGHTS, config=config) for one in (coins, rows))
    assert "the history is short" in held.why
    assert held.curve[0][2] < np.log(2) + 0.01
    assert free.curve[0][2] < 0.55


@pytest.mark.parametrize(
    ("window", "anew"), [(60, {6: 6}), (5, {5: 5}), (3, {})], ids=["doubled", "as long as the window", "never"]
)
def test_a_chain_that_began_on_few_nights_starts_anew_when_they_are_twice_as_many(monkeypatch, window, anew):
    """Or fill the window; once, and not every night from then on."""
    world = one_aim(opposed(nights=7, users=20))
    config = SHORT.model_copy(update={"epochs": 0, "min_stop_rows": 1})
    data = contract().model_copy(update={"window_nights": window})
    monkeypatch.setattr(test_training, "contract", lambda *kinds: data)
    made = train(world, night=3, config=config)
    begun, how = [made.base.begun_on], [made.why]
    for night in (4, 5, 6, 7):
        seen = part(world, np.asarray(world.night) >= FIRST + night - window)
        made = train(seen, night=night, config=config, parent=copy.deepcopy(made.base))
        begun.append(made.base.begun_on)
        how.append(made.why)
    assert begun == list(itertools.accumulate((3, *(anew.get(night, 0) for night in (4, 5, 6, 7))), max))
    assert how[0].startswith("started in closed form")
    for night, one in zip((4, 5, 6, 7), how[1:], strict=True):
        assert one.startswith("started anew in closed form" if night in anew else "started from the parent's base")
        assert (f"of 3 nights of history have become {night}" in one) == (night in anew)
