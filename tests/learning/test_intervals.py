"""Intervals: coverage in a world whose truth is known, and a plain bootstrap as reference."""

import tracemalloc
from math import inf

import numpy as np
import pytest
from scipy import stats

from tasks.learning import intervals
from tasks.learning.intervals import Interval, UserSums, paired_interval, paired_intervals, pool, sum_by_user


def world(random, users: int, truth: float) -> tuple[np.ndarray, np.ndarray]:
    """Per-user sums and rows: each user has a heavy-tailed number of rows and an effect of his own."""
    rows = 1 + random.geometric(0.1, users)
    effect = truth + random.normal(0, 0.05, users)
    noise = random.normal(0, 0.3, users) * np.sqrt(rows)
    return effect * rows + noise, rows


@pytest.mark.parametrize("users", [8, 30, 150])
def test_ninety_five_percent_intervals_cover_the_truth_that_often(users):
    random = np.random.default_rng(users)
    found = [paired_interval(*world(random, users, -0.02), seed=trial, samples=1000) for trial in range(600)]
    covered = np.mean([interval.low <= -0.02 <= interval.high for interval in found])
    assert 0.92 <= covered <= 0.975  # 600 trials: three standard errors are 0.027


def test_intervals_clustered_by_user_cover_where_intervals_by_row_do_not():
    random = np.random.default_rng(0)
    clustered, by_row = 0, 0
    for trial in range(100):
        users = np.repeat(np.arange(40), random.integers(5, 40, 40))
        rows = random.normal(0, 1, 40)[users] + random.normal(0, 0.5, len(users))
        every_row_a_user = UserSums(np.arange(len(rows)), rows[:, None], np.ones(len(rows), np.int64))
        clustered += _covers(paired_intervals(sum_by_user(users, rows[:, None]), seed=trial, samples=300)[0], 0.0)
        by_row += _covers(paired_intervals(every_row_a_user, seed=trial, samples=300)[0], 0.0)
    assert clustered >= 90
    assert by_row <= 60


def _covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def test_intervals_equal_a_plain_bootstrap_loop_within_its_own_noise():
    random = np.random.default_rng(5)
    sums, rows = world(random, 400, 0.01)
    ratios = []
    for _ in range(20_000):
        drawn = random.integers(0, 400, 400)
        ratios.append(sums[drawn].sum() / rows[drawn].sum())
    low, high = np.quantile(ratios, (0.025, 0.975))
    interval = paired_interval(sums, rows, seed=1, samples=20_000)
    assert interval.estimate == pytest.approx(sums.sum() / rows.sum())
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_tails_are_those_of_student():
    for users in (5, 6, 10, 30, 300):
        expected = stats.norm.cdf(stats.t.ppf(0.025, users - 1) * np.sqrt(users / (users - 1)))
        assert stats.norm.ppf(intervals._tail(users)) == pytest.approx(stats.norm.ppf(expected), rel=3e-3)


def test_several_differences_share_their_resampled_users():
    random = np.random.default_rng(2)
    sums, rows = world(random, 60, 0.0)
    both = UserSums(np.arange(60), np.column_stack((sums, 2 * sums)), rows)
    one, two = paired_intervals(both, seed=3)
    assert (two.estimate, two.low, two.high) == pytest.approx((2 * one.estimate, 2 * one.low, 2 * one.high))
    assert one == paired_interval(sums, rows, seed=3)


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    sums, rows = world(np.random.default_rng(0), 50, 0.0)
    assert paired_interval(sums, rows, seed=4) == paired_interval(sums, rows, seed=4)
    assert paired_interval(sums, rows, seed=4) != paired_interval(sums, rows, seed=5)


def test_the_order_of_rows_does_not_matter():
    random = np.random.default_rng(1)
    users, differences = random.integers(0, 30, 500), random.integers(-8, 9, (500, 2)) / 8
    shuffle = random.permutation(500)
    one = sum_by_user(users, differences)
    other = sum_by_user(users[shuffle], differences[shuffle])
    assert np.array_equal(one.sums, other.sums)
    assert paired_intervals(one, seed=0) == paired_intervals(other, seed=0)


def test_sums_by_user_equal_a_loop():
    random = np.random.default_rng(1)
    users, differences = random.integers(0, 30, 500), random.normal(size=(500, 3))
    differences[random.random(500) < 0.2] = np.nan
    result = sum_by_user(users, differences)
    for index, user in enumerate(result.users):
        mine = differences[(users == user) & ~np.isnan(differences[:, 0])]
        assert result.sums[index] == pytest.approx(mine.sum(axis=0))
        assert result.rows[index] == len(mine)


def test_a_user_of_several_nights_is_one_cluster():
    sums, rows = world(np.random.default_rng(3), 40, 0.0)
    night = UserSums(np.array([f"user {n:02}" for n in range(40)]), sums[:, None], rows)
    thrice = pool([night, night, night])
    assert (thrice.users.tolist(), thrice.rows.tolist()) == (night.users.tolist(), (3 * rows).tolist())
    once, pooled = paired_intervals(night, seed=0)[0], paired_intervals(thrice, seed=0)[0]
    # Seen three times is no more certain: what varies between users is not averaged away.
    assert (pooled.estimate, pooled.low, pooled.high) == pytest.approx((once.estimate, once.low, once.high))
    assert pooled.rows == 3 * once.rows


def test_nights_with_different_users_are_joined():
    pooled = pool(
        [
            UserSums(np.array([2, 5]), np.array([[1.0], [2.0]]), np.array([1, 2])),
            UserSums(np.array([1, 5]), np.array([[4.0], [8.0]]), np.array([4, 8])),
        ]
    )
    assert pooled.users.tolist() == [1, 2, 5]
    assert pooled.sums.tolist() == [[4.0], [1.0], [10.0]]
    assert pooled.rows.tolist() == [4, 1, 10]


def test_too_few_users_give_an_estimate_without_bounds():
    interval = paired_interval(np.array([1.0, 1.0, 1.0, 1.0]), np.full(4, 2), seed=0)
    assert interval == Interval(0.5, -inf, inf, 4, 8)


def test_no_rows_give_no_estimate():
    empty = sum_by_user(np.empty(0, np.int64), np.empty((0, 2)))
    one, two = paired_intervals(pool([empty, empty]), seed=0)
    assert np.isnan([one.estimate, two.estimate]).all()
    assert (one.low, one.high, one.users, one.rows) == (-inf, inf, 0, 0)


def test_users_without_rows_do_not_count():
    sums, rows = world(np.random.default_rng(0), 20, 0.0)
    padded = paired_interval(np.append(sums, np.zeros(80)), np.append(rows, np.zeros(80, np.int64)), seed=0)
    assert padded == paired_interval(sums, rows, seed=0)


def test_methods_that_agree_everywhere_differ_by_exactly_zero():
    interval = paired_interval(np.zeros(50), np.full(50, 3), seed=0)
    assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_an_interval_survives_json():
    for interval in (Interval(0.1, -0.2, 0.3, 9, 90), Interval(0.1, -inf, inf, 3, 9)):
        assert Interval.from_json(interval.as_json()) == interval


def test_random_groups_of_many_users_give_the_interval_that_the_users_give(monkeypatch):
    sums, rows = world(np.random.default_rng(0), 6000, 0.0)
    full = paired_interval(sums, rows, seed=0)
    monkeypatch.setattr(intervals, "MAX_CLUSTERS", 700)
    grouped = paired_interval(sums, rows, seed=0)
    assert grouped.estimate == full.estimate
    assert (grouped.users, grouped.rows) == (6000, rows.sum())
    assert grouped.high - grouped.low == pytest.approx(full.high - full.low, rel=0.12)


def test_memory_stays_bounded_however_many_users_there_are(monkeypatch):
    monkeypatch.setattr(intervals, "CHUNK", 50_000)
    sums, rows = world(np.random.default_rng(0), 10_000, 0.0)
    tracemalloc.start()
    small_chunks = paired_interval(sums, rows, seed=0, samples=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000  # all weights at once would be 8 MB, and as much again for what is drawn
    monkeypatch.undo()
    whole = paired_interval(sums, rows, seed=0, samples=100)
    assert (small_chunks.low, small_chunks.high) == pytest.approx((whole.low, whole.high), rel=1e-9)
