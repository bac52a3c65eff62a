"""The closed-form starts against scikit-learn, scipy and planted worlds."""

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.linear_model import LogisticRegression, Ridge

from tasks.learning import closed_form
from tasks.learning.closed_form import HELD, Rated, calibrate, factorise, fit_warm_up, noise
from tasks.learning.layers import WarmUp

SEEDS = range(3)


def sigmoid(score):
    return 1 / (1 + np.exp(-score))


def rows_of(seed, count=400, width=3):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(count, width))
    offset = random.normal(size=count)
    truth = offset + inputs @ np.array([1.0, -0.5, 0.0])[:width] + 0.3
    clicks = (random.random(count) < sigmoid(truth)).astype(float)
    return inputs, offset, clicks, truth + random.normal(size=count), random.uniform(0.5, 2.0, count)


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_of_a_binary_objective_is_the_penalised_logistic_regression_with_an_offset(seed):
    inputs, offset, clicks, _, weights = rows_of(seed)
    solved = calibrate(*tensors(inputs, offset[:, None], clicks[:, None], weights), ["binary"], strength=20.0, steps=12)
    wide = np.c_[inputs, np.ones(len(inputs))]

    def loss(w):
        score = offset + wide @ w
        return (weights * (np.logaddexp(0, score) - clicks * score)).sum() + 10.0 * w @ w

    best = optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(solved[0].numpy(), best.x, atol=1e-5)


def test_calibration_without_an_offset_is_scikit_learn_s_logistic_regression():
    inputs, offset, clicks, _, weights = rows_of(0)
    solved = calibrate(*tensors(inputs, 0 * offset[:, None], clicks[:, None], weights), ["binary"], 20.0, 12)
    wide = np.c_[inputs, np.ones(len(inputs))]
    model = LogisticRegression(C=1 / 20.0, fit_intercept=False, tol=1e-10).fit(wide, clicks, sample_weight=weights)
    np.testing.assert_allclose(solved.numpy(), model.coef_, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_of_a_rating_is_the_ridge_on_what_the_offset_leaves(seed):
    inputs, offset, _, stars, weights = rows_of(seed)
    solved = calibrate(*tensors(inputs, offset[:, None], stars[:, None], weights), ["rating"], strength=5.0, steps=1)
    wide = np.c_[inputs, np.ones(len(inputs))]
    model = Ridge(alpha=5.0, fit_intercept=False).fit(wide, stars - offset, sample_weight=weights)
    np.testing.assert_allclose(solved[0].numpy(), model.coef_, rtol=1e-8)


def test_objectives_are_calibrated_apart_and_missing_labels_are_left_out():
    inputs, offset, clicks, stars, weights = rows_of(1)
    holed = clicks.copy()
    holed[::3] = np.nan
    offsets = np.c_[offset, offset]
    both = calibrate(*tensors(inputs, offsets, np.c_[holed, stars], weights), ["binary", "rating"])
    known = ~np.isnan(holed)
    first = calibrate(
        *tensors(*(part[known] for part in (inputs, offsets[:, :1], holed[:, None], weights))), ["binary"]
    )
    second = calibrate(*tensors(inputs, offsets[:, 1:], stars[:, None], weights), ["rating"])
    torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-9, atol=1e-10)


def test_chunks_leave_no_trace(monkeypatch):
    inputs, offset, clicks, _, weights = rows_of(2)
    users, items, labels, start = planted(0)
    calibrated = calibrate(*tensors(inputs, offset[:, None], clicks[:, None], weights), ["binary"])
    factors = run(users, items, labels, start, "rating")
    monkeypatch.setattr(closed_form, "CHUNK", 37)
    again = calibrate(*tensors(inputs, offset[:, None], clicks[:, None], weights), ["binary"])
    torch.testing.assert_close(again, calibrated, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(run(users, items, labels, start, "rating"), factors, rtol=1e-5, atol=1e-6)


# Factors


def planted(seed, users=60, items=25, factors=2, each=15, missed=0.1):
    """Ratings of a low-rank world: what a user gives is his taste times the item's nature."""
    random = np.random.default_rng(seed)
    taste, nature = random.normal(size=(users, factors)), random.normal(size=(items + 1, factors))
    user = np.repeat(np.arange(users), each)
    item = np.concatenate([random.permutation(items)[:each] + 1 for _ in range(users)])
    labels = (taste[user] * nature[item]).sum(axis=1) + random.normal(0, missed, len(user))
    return user, item, labels, random.normal(0, 0.1, (items + 1, factors))


def run(user, item, labels, start, kind, sweeps=10, strength=1.0, bias=2.0, weights=None, offsets=None, mean=None):
    weights = np.ones(len(user)) if weights is None else weights
    offsets = np.zeros(len(user)) if offsets is None else offsets
    users, items, *rest = tensors(user, item, offsets, labels, weights)
    offset, label, weight = rest
    rated = Rated(users, offset[:, None], label[:, None], weight, (kind,), int(user.max()) + 1, strength, bias, sweeps)
    return factorise(rated, items, torch.from_numpy(start), mean)


def unit_of(labels, offsets=0.0, weights=None):
    """What a rating is counted in: the deviation of its residuals."""
    return np.sqrt(np.average((labels - offsets) ** 2, weights=weights))


def best_tastes(user, item, residual, curve, factors, strength, bias):
    """Each user's ridge on the factors of his items, the bias first [U, 1 + F]: one user at a time."""
    tastes = np.zeros((user.max() + 1, factors.shape[1] + 1))
    held = np.diag([bias, *[strength] * factors.shape[1]])
    for who in np.unique(user):
        mine = user == who
        phi = np.c_[np.ones(mine.sum()), factors[item[mine]]]
        tastes[who] = np.linalg.solve(phi.T @ (phi * curve[mine, None]) + held, phi.T @ residual[mine])
    return tastes


def objective(user, item, residual, curve, factors, strength, bias):
    """Regularised squares of the residuals, at the best tastes for these factors."""
    tastes = best_tastes(user, item, residual, curve, factors, strength, bias)
    said = tastes[user, 0] + (tastes[user, 1:] * factors[item]).sum(axis=1)
    squares = (0.5 * curve * said**2 - residual * said).sum()
    return squares + 0.5 * (bias * (tastes[:, 0] ** 2).sum() + strength * ((tastes[:, 1:] ** 2).sum()
                                                                         + (factors**2).sum()))  # fmt: skip


@pytest.mark.parametrize("kind", ["binary", "rating"])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_sweep_lowers_the_regularised_objective(seed, kind):
    random = np.random.default_rng(seed)
    user, item, labels, start = planted(seed)
    item = np.where(random.random(len(item)) < 0.05, 0, item)
    offsets, weights = random.normal(0, 0.5, len(user)), random.uniform(0.5, 2.0, len(user))
    labels = (labels > 0).astype(float) if kind == "binary" else labels
    chance = sigmoid(offsets)
    residual = weights * (labels - (chance if kind == "binary" else offsets))
    curve = weights * (chance * (1 - chance) if kind == "binary" else 1.0)
    residual = residual if kind == "binary" else residual / unit_of(labels, offsets, weights)
    start[0] = 0.0
    values = [objective(user, item, residual, curve, start, 1.0, 2.0)]
    for sweeps in range(1, 8):
        factors = run(user, item, labels, start, kind, sweeps, weights=weights, offsets=offsets).numpy()
        values.append(objective(user, item, residual, curve, factors.astype(np.float64), 1.0, 2.0))
    assert (np.diff(values) < 1e-6 * abs(values[0])).all()
    assert values[-1] < values[0]
    assert not factors[0].any()


@pytest.mark.parametrize("bias", [0.5, 50.0])
def test_a_sweep_is_one_ridge_per_user_and_then_one_per_item(bias):
    user, item, labels, start = planted(0)
    start[0] = 0.0
    residual = labels / unit_of(labels)
    tastes = best_tastes(user, item, residual, np.ones(len(user)), start, 1.0, bias)
    expected = np.zeros_like(start)
    for one in np.unique(item):
        mine = item == one
        phi, rest = tastes[user[mine], 1:], residual[mine] - tastes[user[mine], 0]
        expected[one] = np.linalg.solve(phi.T @ phi + np.eye(2), phi.T @ rest)
    np.testing.assert_allclose(run(user, item, labels, start, "rating", 1, bias=bias).numpy(), expected, atol=1e-5)


def test_noise_is_what_tastes_and_factors_leave_over_the_rows_that_did_not_fit_them():
    """Users and items one at a time: what each is free to fit is the trace of (H + Lambda)^-1 H."""
    user, item, labels, start = planted(1)
    weights, start[0] = np.random.default_rng(0).uniform(0.5, 2.0, len(user)), 0.0
    offsets, unit = np.zeros(len(user)), unit_of(labels, weights=weights)
    factors = run(user, item, labels, start, "rating", weights=weights).numpy().astype(np.float64)
    tastes = best_tastes(user, item, weights * labels / unit, weights, factors, 1.0, 2.0)
    free = 0.0
    for keys, inputs, held in ((user, np.c_[np.ones(len(user)), factors[item]], np.diag([2.0, 1.0, 1.0])),
                               (item, tastes[user, 1:], np.eye(2))):  # fmt: skip
        for one in np.unique(keys):
            phi = inputs[keys == one]
            seen = phi.T @ (phi * weights[keys == one, None])
            free += np.trace(np.linalg.solve(seen + held, seen))
    said = tastes[user, 0] + (tastes[user, 1:] * factors[item]).sum(axis=1)
    expected = unit**2 * (weights * (labels / unit - said) ** 2).sum() / (weights.sum() - free)
    rated = Rated(*tensors(user, offsets[:, None], labels[:, None], weights), ("rating",), user.max() + 1, 1.0, 2.0)
    assert noise(rated, *tensors(item, start)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("unit", [1.0, 0.01, 40.0])
def test_the_noise_of_a_planted_world_is_found_in_any_unit(unit):
    user, item, labels, start = planted(0, users=200, each=20, missed=0.5)
    offsets = np.zeros((len(user), 1))
    columns = tensors(user, offsets, unit * labels[:, None], np.ones(len(user)))
    found = noise(Rated(*columns, ("rating",), 200, 1.0, 1.0), *tensors(item, start))
    assert np.sqrt(found) / unit == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_low_rank_world_is_recovered(seed):
    """Half of every user's rows teach; the other half is told far better than by the items' means."""
    user, item, labels, start = planted(seed, users=300, each=20)
    taught = np.arange(len(user)) % 2 == 0
    factors = run(user[taught], item[taught], labels[taught], start, "rating", sweeps=30).numpy()
    ones = np.ones(taught.sum())
    tastes = best_tastes(user[taught], item[taught], labels[taught], ones, factors, 1.0, 2.0)
    rest = ~taught
    said = tastes[user[rest], 0] + (tastes[user[rest], 1:] * factors[item[rest]]).sum(axis=1)
    count = np.maximum(np.bincount(item[taught], minlength=len(start)), 1)
    popularity = (np.bincount(item[taught], labels[taught], len(start)) / count)[item[rest]]
    assert ((labels[rest] - said) ** 2).mean() < 0.2 * ((labels[rest] - popularity) ** 2).mean()


def test_rows_without_label_or_weight_are_as_absent():
    user, item, labels, start = planted(0)
    random = np.random.default_rng(0)
    gone = random.random(len(user)) < 0.3
    holed, weights = np.where(gone, np.nan, labels), np.where(random.random(len(user)) < 0.1, 0.0, 1.0)
    kept = ~gone & (weights > 0)
    for kind, values in (("rating", holed), ("binary", np.where(np.isnan(holed), np.nan, holed > 0))):
        torch.testing.assert_close(
            run(user, item, values, start, kind, weights=weights),
            run(user[kept], item[kept], values[kept], start, kind),
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip


def test_the_unknown_item_and_items_without_rows_have_no_factors():
    user, item, labels, start = planted(0)
    factors = run(user, np.where(item < 4, 0, item), labels, start + 1.0, "rating")
    assert not factors[:4].any()
    assert factors[4:].any(dim=1).all()


def test_what_row_0_starts_from_is_not_read():
    user, item, labels, start = planted(0)
    item = np.where(item < 4, 0, item)
    loud = start.copy()
    loud[0] = 50.0
    assert torch.equal(run(user, item, labels, start, "rating", 2), run(user, item, labels, loud, "rating", 2))


def test_the_starting_factors_are_left_alone_and_no_factors_stay_none():
    user, item, labels, start = planted(0)
    before = start.copy()
    run(user, item, labels, start, "rating")
    assert np.array_equal(start, before)
    assert run(user, item, labels, start[:, :0], "rating").shape == (26, 0)


# What columns say of factors


def items_with_columns(seed=0, items=40):
    """Factors of items, two numbers and two categories of each; items 0, 7 and 11 have no rows."""
    random = np.random.default_rng(seed)
    numbers = random.normal(size=(items, 2))
    categories = np.c_[random.integers(0, 4, items), random.integers(0, 3, items)]
    factors = random.normal(size=(items, 3)) + numbers @ random.normal(size=(2, 3))
    factors[[0, 7, 11]] = 0.0
    return factors, numbers, categories


def test_columns_are_told_by_a_ridge_on_numbers_and_known_categories():
    factors, numbers, categories = items_with_columns()
    warm_up = WarmUp(2, (4, 3), 3)
    said = fit_warm_up(warm_up, *tensors(factors, numbers, categories), sweeps=200)
    known = factors.any(axis=1)
    hot = [(categories[:, [at]] == np.arange(1, rows)).astype(float) for at, rows in enumerate((4, 3))]
    design = np.c_[np.ones(len(numbers)), numbers, *hot]
    model = Ridge(alpha=HELD, fit_intercept=False).fit(design[known], factors[known])
    expected = design @ model.coef_.T
    np.testing.assert_allclose(said.numpy()[known], expected[known], atol=1e-8)
    assert not said.numpy()[~known].any()
    with torch.no_grad():
        layer = warm_up(*tensors(numbers.astype(np.float32)), list(torch.from_numpy(categories).T))
    np.testing.assert_allclose(layer.numpy(), expected, atol=1e-5)  # of items without rows as well
    few = fit_warm_up(WarmUp(2, (4, 3), 3), *tensors(factors, numbers, categories))
    np.testing.assert_allclose(few.numpy()[known], expected[known], atol=0.02)


def test_numbers_alone_are_exact_in_one_pass_and_categories_need_no_numbers():
    factors, numbers, categories = items_with_columns(1)
    known, none = factors.any(axis=1), np.zeros((len(factors), 0))
    design = np.c_[np.ones(len(numbers)), numbers]
    model = Ridge(alpha=HELD, fit_intercept=False).fit(design[known], factors[known])
    said = fit_warm_up(WarmUp(2, (), 3), *tensors(factors, numbers, none.astype(np.int64)))
    np.testing.assert_allclose(said.numpy()[known], (design @ model.coef_.T)[known], atol=1e-9)
    warm_up = WarmUp(0, (4,), 3)
    said = fit_warm_up(warm_up, *tensors(factors, none, categories[:, :1]), sweeps=200)
    hot = np.c_[np.ones(len(factors)), categories[:, [0]] == np.arange(1, 4)]
    model = Ridge(alpha=HELD, fit_intercept=False).fit(hot[known], factors[known])
    np.testing.assert_allclose(said.numpy()[known], (hot @ model.coef_.T)[known], atol=1e-8)
    with torch.no_grad():
        assert warm_up(torch.zeros(2, 0), [torch.tensor([0, 0])]).tolist() == [warm_up.constant.tolist()] * 2


def test_factors_are_held_to_what_is_told_of_them_and_rows_take_over():
    """Each item's ridge towards its mean, one item at a time; the more rows, the less the mean matters."""
    user, item, labels, start = planted(3)
    keep = (item != 4) | (np.cumsum(item == 4) <= 1)  # one row of item 4, none of item 9
    keep &= item != 9
    user, item, labels = user[keep], item[keep], labels[keep]
    mean = np.random.default_rng(1).normal(size=start.shape) * 3
    seen = []

    def told(factors):
        seen.append(factors.clone())
        return torch.from_numpy(np.where(factors.numpy().any(axis=1, keepdims=True), mean, 0.0))

    found = run(user, item, labels, start, "rating", sweeps=2, strength=0.3, mean=told).numpy()
    residual, curve = labels / unit_of(labels), np.ones(len(labels))
    before = seen[1].numpy()
    tastes = best_tastes(user, item, residual, curve, before, 0.3, 2.0)
    for one in range(1, len(start)):
        mine = item == one
        phi, rest = tastes[user[mine], 1:], residual[mine] - tastes[user[mine], 0]
        system, told_and_seen = phi.T @ phi + 0.3 * np.eye(2), phi.T @ rest + 0.3 * mean[one]
        expected = np.linalg.solve(system, told_and_seen) if mine.any() else np.zeros(2)
        np.testing.assert_allclose(found[one], expected, atol=1e-4)
    assert not found[[0, 9]].any()
    plain = run(user, item, labels, start, "rating", sweeps=2, strength=0.3).numpy()
    moved = np.linalg.norm(found - plain, axis=1) / np.linalg.norm(mean, axis=1)
    assert moved[4] > 3 * np.median(moved[1:])
