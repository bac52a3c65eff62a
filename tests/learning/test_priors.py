"""Precisions against a plain numpy loop, worlds whose precisions are known, and losses made by hand."""

from datetime import date

import numpy as np
import pytest
import torch

from tasks.learning import initialisation, priors
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tasks.learning.networks import RankerConfig
from tasks.learning.priors import FACTOR, GAIN, LEAST, MOST, MOST_STEPS, cautious, estimate, loosened, scaled
from tasks.learning.setting import Setting
from tasks.learning.training import meta_train
from tasks.learning.training_config import TrainingConfig
from tests.learning.slow_ladder import KINDS, THREE, SlowLadder, precisions_of, world
from tests.learning.small_rows import (
    FIRST,
    Told,
    contract,
    ladder_of,
    one_aim,
    opposed,
    part,
    shape,
    table,
    told,
    with_labels,
)

ALONE = (("shopper",),)
TRUE = np.array([1.0, 0.25, 4.0, np.inf])
"""Precision of each taste in the simulated world; the last feature is of no use to anybody."""


def found_in(rows, scorer, start, *, kinds=KINDS, levels=ALONE, visits=None, seed=0, steps=2, **limits):
    ladder = Ladder(rows, ladder_of(levels, **limits), "shopper")
    return estimate(
        *(ladder, visits_of(rows) if visits is None else visits, Material(rows), scorer, start),
        *(Adaptation(kinds, AdapterConfig(steps=steps)), np.random.default_rng(seed)),
    )


# One round


def one_round(oracle, visits, start):
    """The formula, user by user; [K, D]."""
    known, spread = np.zeros_like(start[0]), np.zeros_like(start[0])
    left, count = np.zeros(len(KINDS)), np.zeros(len(KINDS))
    last = [at for at in range(len(visits)) if at + 1 == len(visits) or visits.first[at + 1] != visits.first[at]]
    for at in last:
        support = list(range(visits.first[at], visits.rows.stop[at]))[-oracle.segments.max_support :]
        if len(support) < oracle.segments.min_support:
            continue
        inherited = oracle.coarse(1, support[-1], visits.night[at], set())
        own = oracle.ridge(support, inherited, 0)
        phi = oracle.features[support]
        for k, kind in enumerate(KINDS):
            score = oracle.logits[support, k] + phi @ (inherited + own)[k]
            chance = 1 / (1 + np.exp(-score))
            curve = chance * (1 - chance) if kind == "binary" else np.ones(len(support))
            given = oracle.rows.weights[support] * ~np.isnan(oracle.rows.labels[support, k])
            mass = curve * given
            left[k] += (given * np.nan_to_num(oracle.rows.labels[support, k] - score) ** 2).sum()
            count[k] += given.sum()
            spreads = np.diag(np.linalg.inv(phi.T @ (phi * mass[:, None]) + np.diag(start[0, k])))
            known[k] += 1 - start[0, k] * spreads
            spread[k] += own[k] ** 2
    noise = np.where(np.array(KINDS) == "rating", left / (count - known.sum(axis=1)), 1.0)
    return noise[:, None] * known / spread


@pytest.mark.parametrize("limits", [{}, {"min_support": 8}, {"max_support": 4}])
@pytest.mark.parametrize("seed", range(4))
def test_a_round_is_the_formula_user_by_user(monkeypatch, seed, limits):
    """A click and a rating, missing labels, unequal weights, and two coarser levels to start from."""
    monkeypatch.setattr(priors, "ROUNDS", 1)
    rows, start = world(seed), precisions_of(3, seed=seed)
    scorer = told(rows, seed=seed)
    oracle = SlowLadder(rows, ladder_of(THREE, **limits), scorer.logits, scorer.features, start, KINDS)
    expected = one_round(oracle, visits_of(rows), start.numpy())
    assert ((expected > LEAST) & (expected < MOST)).all()
    found = found_in(rows, scorer, start, levels=THREE, **limits)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5)
    assert torch.equal(found[1:], start[1:])


def test_rounds_go_on_from_one_another(monkeypatch):
    rows, start = world(1), precisions_of(3)
    scorer = told(rows)
    monkeypatch.setattr(priors, "ROUNDS", 3)
    thrice = found_in(rows, scorer, start, levels=THREE)
    monkeypatch.setattr(priors, "ROUNDS", 1)
    for _ in range(3):
        start = found_in(rows, scorer, start, levels=THREE)
    torch.testing.assert_close(thrice, start, rtol=1e-10, atol=0)


def test_nothing_to_read_leaves_the_precisions_as_they_are():
    rows, start = world(0), precisions_of(3)
    nobody = visits_of(rows).of_nights(FIRST + 90, FIRST + 99)
    assert torch.equal(found_in(rows, told(rows), start, levels=THREE, visits=nobody), start)
    assert torch.equal(found_in(rows, told(rows), start, levels=THREE, min_support=100), start)


def test_only_rows_up_to_the_last_visit_given_are_read():
    rows, scorer, start = world(2), told(world(2)), precisions_of(3)
    early = np.flatnonzero(rows.night < FIRST + 3)
    without = part(rows, early, THREE)
    given = visits_of(rows).of_nights(FIRST, FIRST + 2)
    found = found_in(rows, scorer, start, levels=THREE, visits=given)
    alone = found_in(without, Told(scorer.logits[early], scorer.features[early]), start, levels=THREE)
    torch.testing.assert_close(found, alone, rtol=1e-9, atol=0)


# Known truth


def simulated(seed=0, users=300, each=40, order=None, names=None):
    """Rows of users with tastes w ~ N(0, 1 / TRUE), as a click and as a rating; and a scorer of their features.

    Args:
        seed: of the world.
        users: how many.
        each: rows of a user.
        order: in which the rows are handed in.
        names: ids that the users go by.
    """
    random = np.random.default_rng(seed)
    features = random.normal(size=(users * each, len(TRUE)))
    features[:, 0] = 1.0
    user = np.repeat(np.arange(users), each)
    score = np.stack([(features * (random.normal(size=(users, 4)) / np.sqrt(TRUE))[user]).sum(1) for _ in KINDS], 1)
    click = random.random(len(user)) < 1 / (1 + np.exp(-score[:, 0]))
    labels = np.stack([click, score[:, 1] + random.normal(size=len(user))], axis=1)
    order = np.arange(len(user)) if order is None else order
    names = np.arange(users) + 1 if names is None else names
    rows = table(names[user][order], np.zeros(len(user), int), labels=labels[order], price=order, levels=ALONE)
    at = rows.candidate_numbers[:, 0].astype(np.int64)
    return rows, Told(torch.zeros(len(user), 2, dtype=torch.float64), torch.from_numpy(features[at]))


START = torch.full((1, 2, 4), 4.0, dtype=torch.float64)


@pytest.mark.parametrize(("steps", "factor"), [(2, 2.25), (10, 1.35)])
@pytest.mark.parametrize("seed", range(3))
def test_precisions_of_a_simulated_world_are_found_again(seed, steps, factor):
    """A rating's within a factor of 1.2. Two steps stop short of a strong taste in clicks, which then seems smaller."""
    click, rating = found_in(*simulated(seed, 1000, 100), START, steps=steps)[0].numpy()
    assert (np.abs(np.log(click[:3] / TRUE[:3])) < np.log(factor)).all()
    assert (np.abs(np.log(rating[:3] / TRUE[:3])) < np.log(1.2)).all()
    assert min(click[3], rating[3]) > 50


def test_the_unit_of_a_rating_does_not_matter():
    """A precision counts rows: of what is told in units of 0.01 or 30 as many as of what is told in its own."""
    rows, scorer = simulated(1, 100, 40)
    expected = found_in(rows, scorer, START)
    for unit in (0.01, 30.0):
        again = with_labels(rows, rows.labels * [1, unit])
        torch.testing.assert_close(found_in(again, scorer, START), expected, rtol=1e-4, atol=0)


def test_the_order_of_users_and_rows_does_not_matter():
    random = np.random.default_rng(0)
    plain = found_in(*simulated(users=50), START)
    mixed = simulated(users=50, order=random.permutation(2000), names=random.permutation(50) + 1)
    torch.testing.assert_close(found_in(*mixed, START), plain, rtol=1e-8, atol=0)


def test_of_many_users_the_generator_draws_some(monkeypatch):
    monkeypatch.setattr(priors, "MOST_USERS", 20)
    rows, scorer = simulated(users=50)
    read = set()

    def spy(at):
        read.update(rows.user[at].tolist())
        return scorer(at)

    found = found_in(rows, spy, START)
    assert len(read) == 20
    assert torch.equal(found_in(rows, scorer, START), found)
    assert not torch.equal(found_in(rows, scorer, START, seed=1), found)
    visits = visits_of(rows)
    some = visits.take(np.flatnonzero(np.isin(rows.user[visits.rows.start], list(read))))
    torch.testing.assert_close(found_in(rows, scorer, START, visits=some, seed=7), found, rtol=1e-10, atol=0)


# Scaling

PARTS = {"constant": slice(0, 1), "numbers": slice(1, 4), "tower features": slice(4, 6)}
COARSE = {"level 1": (1, slice(None)), "level 2": (2, slice(None))}
HELD = torch.linspace(20.0, 90.0, 3 * 2 * 6).reshape(3, 2, 6)


def steps_of(precisions, start=HELD):
    """By how many factors each part of each objective is above where it began; every place of a part alike."""
    power = (precisions / start).log() / np.log(FACTOR)
    places = {
        f"{name} of objective {objective + 1}": power[level, objective, part]
        for name, (level, part) in ({name: (0, part) for name, part in PARTS.items()} | COARSE).items()
        for objective in (0, 1)
    }
    for place in places.values():
        torch.testing.assert_close(place, place.flatten()[0].expand(place.shape), rtol=0, atol=1e-5)
    return {name: place.flatten()[0].item() for name, place in places.items()}


def bowl(best):
    """Lowest where each part is so many factors above where it began."""
    return lambda tried: sum((steps - best[name]) ** 2 for name, steps in steps_of(tried).items())


@pytest.mark.parametrize(
    "best",
    [
        {"constant": (2, 0), "numbers": (-3, 1), "tower features": (0, 0), "level 1": (1, -2), "level 2": (-1, -1)},
        {"constant": (0, 3), "numbers": (0, 0), "tower features": (4, -1), "level 1": (0, 2), "level 2": (3, 0)},
    ],
)
def test_the_lowest_loss_is_found_part_by_part_level_by_level_and_for_each_objective(best):
    best = {f"{name} of objective {at + 1}": one for name, both in best.items() for at, one in enumerate(both)}
    found, scales = scaled(HELD, PARTS, bowl(best))
    assert steps_of(found) == pytest.approx(best, abs=1e-5)
    assert scales == {name: pytest.approx(FACTOR**steps) for name, steps in best.items()}


def test_what_does_not_help_or_not_enough_is_left_alone():
    before = HELD.clone()
    for loss in (
        lambda tried: 0.5,
        lambda tried: float("nan"),
        lambda tried: -0.9 * GAIN * sum(abs(steps) for steps in steps_of(tried).values()),
    ):
        found, scales = scaled(HELD, PARTS, loss)
        assert torch.equal(found, before)
        assert set(scales.values()) == {1.0}
    assert torch.equal(HELD, before)


def test_a_part_goes_no_further_than_its_steps():
    start = torch.ones(1, 1, 6)
    for way in (1, -1):
        _, scales = scaled(start, {"numbers": slice(0, 6)}, lambda tried, way=way: -way * float(tried.log().mean()))
        expected = MOST_STEPS if way == 1 else 3  # 1 / 4 ** 3 is below the least precision
        assert scales == {"numbers": pytest.approx(FACTOR ** (way * expected))}


def test_precisions_stay_within_their_bounds():
    start = torch.tensor([[[3 * LEAST, 30.0, 0.3 * MOST]]])
    loss = {way: lambda tried, way=way: -way * float(tried.log().sum()) for way in (1, -1)}
    high, low = (scaled(start, {"numbers": slice(0, 3)}, loss[way])[0] for way in (1, -1))
    assert high[0, 0].tolist() == pytest.approx([3 * LEAST * FACTOR**5, 30 * FACTOR**5, MOST])
    assert low[0, 0].tolist() == pytest.approx([LEAST, LEAST, 0.3 * MOST / FACTOR**5])
    assert high[0, 0, 2] <= MOST
    assert low.min() >= LEAST


# With a loss by visit

SURE = torch.tensor([1.0, -1.0]).repeat(8).double()
"""What sixteen visits differ by: a standard error of 4 for their sum."""


def by_visit(part, each):
    """A loss that changes by so much for each factor that a part goes up, with an error of 4 beside it."""
    level, place = COARSE_PARTS[part]

    def told(tried):
        steps = float((tried[level, 0, place] / HELD[level, 0, place]).log().mean() / np.log(FACTOR))
        return torch.zeros(16).double() + steps * (each / 16 + SURE)

    return told


COARSE_PARTS = {name: (0, part) for name, part in PARTS.items()}
COARSE_PARTS |= {f"{name} of level {level}": (level, part) for level in (1, 2) for name, part in PARTS.items()}


@pytest.mark.parametrize("part", ["numbers", "constant", "tower features of level 2"])
@pytest.mark.parametrize(
    ("each", "steps"),
    [
        (-9.0, MOST_STEPS),  # to hold it more is better by far
        (0.0, MOST_STEPS),  # nothing is known
        (1.99, MOST_STEPS),  # worse than the best, by less than half an error at every step
        (2.1, 0),  # by more than half an error
        (8.0, 0),  # to hold it less is better, by less than two errors
        (9.6, -MOST_STEPS),
    ],
)
def test_doubt_speaks_for_holding_more(part, each, steps):
    """By hand: sixteen visits, the error of whose sum is 4 for a step and 8 for two."""
    held = HELD[:, :1].clone()
    found, scales = cautious(held, PARTS, by_visit(part, each))
    assert set(scales) == set(COARSE_PARTS)
    assert scales[part] == pytest.approx(FACTOR**steps)
    level, place = COARSE_PARTS[part]
    wanted = (held[level, :, place] * FACTOR**steps).clamp(LEAST, MOST)
    torch.testing.assert_close(found[level, :, place], wanted, rtol=1e-5, atol=0)
    assert torch.equal(held, HELD[:, :1])


# Silent parts


def test_a_part_without_a_use_at_the_users_own_level_is_held_as_configured_and_nothing_else_changes():
    """By hand: two levels, two objectives, three parts of two, the last of which is not asked about."""
    usual = torch.tensor([4.0, 150.0])[:, None, None].expand(2, 2, 6).clone()
    times = torch.tensor([
        [[9.0, 99.0, 9.0, 7.0, 99.0, 99.0], [1.0, 2.0, 64.0, 64.0, 99.0, 99.0]],
        [[64.0, 64.0, 64.0, 64.0, 64.0, 64.0], [64.0, 64.0, 0.5, 9.0, 64.0, 64.0]],
    ])  # fmt: skip
    expected = torch.tensor([
        [[1.0, 1.0, 9.0, 7.0, 99.0, 99.0], [1.0, 2.0, 1.0, 1.0, 99.0, 99.0]],
        [[1.0, 1.0, 64.0, 64.0, 64.0, 64.0], [64.0, 64.0, 0.5, 9.0, 64.0, 64.0]],
    ])  # fmt: skip
    held = usual * times
    assert torch.equal(loosened(held, usual, [slice(0, 2), slice(2, 4)]), usual * expected)
    assert torch.equal(held, usual * times)
    assert torch.equal(loosened(held, usual, []), held)


# In training


def held_by(adapter, nights=5):
    """A base without epochs: the closed forms and the precisions alone."""
    rows = one_aim(opposed(nights=nights, users=30))
    ranker = RankerConfig(embedding=4, hidden=8, factors=2, category_factors=2, features=2)
    config = TrainingConfig(epochs=0, stop_nights=1)
    day = date.fromordinal(FIRST + nights)
    return meta_train(Setting(contract(), ladder_of(), ranker, adapter, config, rows, shape(rows), day))


def test_the_constant_and_weights_on_solved_factors_are_held_at_least_as_the_factors_were(monkeypatch):
    """Whatever the history says; the other parts and levels are as it says. Scaling sees the stop loss."""
    seen = {}

    def spy(precisions, parts, loss):
        seen.update(parts=parts, loss=loss(precisions))
        return precisions, {"numbers": 1.0, "level 1": 4.0}

    monkeypatch.setattr(initialisation, "estimate", lambda *given: torch.full_like(given[4], 0.5))
    monkeypatch.setattr(initialisation, "scaled", spy)
    made = held_by(AdapterConfig(precision=3.0))
    expected = torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0, 0.5, 0.5, 0.5])
    torch.testing.assert_close(made.base.table()[:, 0], torch.stack([expected, torch.full((8,), 0.5)]))
    assert seen["parts"] == made.base.network.parts
    assert seen["loss"] == pytest.approx(made.curve[0][2], rel=1e-5)
    assert "scaled on the stop nights (level 1 by 4)" in made.why


def test_a_bias_has_one_part_and_none_has_nothing_to_hold(monkeypatch):
    called = []
    monkeypatch.setattr(initialisation, "scaled", lambda held, parts, loss: (called.append(parts) or held, {}))
    assert "precisions by evidence;" in held_by(AdapterConfig(kind="bias")).why
    assert called == [{"constant": slice(0, 1)}]
    assert "nothing is adapted" in held_by(AdapterConfig(kind="none")).why
    assert len(called) == 1


def test_scores_that_are_not_remembered_give_the_same_precisions(monkeypatch):
    remembered = held_by(AdapterConfig()).base.table()
    monkeypatch.setattr(initialisation, "REMEMBERED", 0)
    torch.testing.assert_close(held_by(AdapterConfig()).base.table(), remembered, rtol=1e-3, atol=0)


def test_many_stop_visits_are_drawn_from_alike_every_time(monkeypatch):
    everyone = held_by(AdapterConfig()).base.table()
    monkeypatch.setattr(initialisation, "MOST_USERS", 6)
    some = held_by(AdapterConfig()).base.table()
    assert torch.equal(held_by(AdapterConfig()).base.table(), some)
    assert not torch.equal(some, everyone)
