"""Figures of ranked lists by hand, and against loops over every pair."""

from itertools import combinations

import numpy as np
import pytest

from tasks.learning.exposure import coverage, diversity, gini, personalisation

SEEDS = range(5)


def drawn(seed, users=9, length=4, candidates=15):
    """Lists of distinct candidates, some of them shown more often than others."""
    random = np.random.default_rng(seed)
    liking = random.exponential(size=candidates)
    return np.stack([np.argsort(-liking * random.random(candidates))[:length] for _ in range(users)])


def test_by_hand():
    """Three users, two items each, of five candidates: exposures 3, 2, 1, 0, 0."""
    lists = np.array([[0, 1], [0, 1], [0, 2]])
    assert coverage(lists, 5) == pytest.approx(3 / 5)
    assert gini(lists, 5) == pytest.approx((-4 * 0 - 2 * 0 + 0 * 1 + 2 * 2 + 4 * 3) / (5 * 6))
    assert personalisation(lists) == pytest.approx(1 - (2 / 2 + 1 / 2 + 1 / 2) / 3)
    colour = np.array([[1], [1], [2], [0], [0]])
    assert diversity(lists, colour) == pytest.approx((0 + 0 + 1) / 3)
    shape = np.array([[1], [2], [3], [0], [0]])
    assert diversity(lists, np.c_[colour, shape]) == pytest.approx((1 / 3 + 1) / 2)


def test_everybody_the_same_and_everybody_another():
    same = np.tile(np.arange(10), (7, 1))
    assert (coverage(same, 40), personalisation(same)) == (0.25, 0.0)
    assert gini(same, 40) == pytest.approx(1 - 10 / 40)
    apart = np.arange(40).reshape(4, 10)
    assert (coverage(apart, 40), gini(apart, 40), personalisation(apart)) == (1.0, 0.0, 1.0)
    assert gini(apart, 80) == pytest.approx(1 - 40 / 80)


@pytest.mark.parametrize("seed", SEEDS)
def test_against_every_pair(seed):
    lists = drawn(seed)
    shared = [len(set(one) & set(two)) / lists.shape[1] for one, two in combinations(lists.tolist(), 2)]
    assert personalisation(lists) == pytest.approx(1 - np.mean(shared))
    exposure = np.bincount(lists.ravel(), minlength=15)
    between = np.abs(exposure[:, None] - exposure[None]).mean()  # the Gini index's own definition: half of it, relative
    assert gini(lists, 15) == pytest.approx(between / (2 * exposure.mean()))
    categories = np.random.default_rng(seed).integers(0, 4, (15, 2))
    unlike = [
        np.mean([categories[one, at] != categories[two, at] for one, two in combinations(row, 2)])
        for row in lists.tolist()
        for at in range(2)
    ]
    assert diversity(lists, categories) == pytest.approx(np.mean(unlike))


def test_what_is_undefined_is_not_told():
    assert personalisation(np.array([[0, 1]])) is None
    assert diversity(np.array([[0], [1]]), np.array([[1], [2]])) is None
    assert diversity(np.array([[0, 1]]), np.zeros((2, 0), np.int64)) is None
