"""Baselines by arithmetic, by hand formula, by a numpy loop, and by what they may not read."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from tasks.errors import InvalidConfig
from tasks.learning.baselines import Baselines, BaselinesConfig
from tasks.learning.closed_form import Rated, noise
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tasks.learning.neighbours import ItemKnn
from tasks.learning.trees import Trees, library
from tests.learning.slow_ladder import SlowLadder
from tests.learning.small_rows import FIRST, ladder_of, one_aim, opposed, part, with_labels
from tests.learning.test_regression import matrix

NIGHT = 3
KINDS = ("binary", "rating")
CONFIG = BaselinesConfig(offset_strength=3.0, factors=2, factor_strength=2.0)
WITHOUT_SUPPORT = ("global rate", "popularity", "logistic regression", "boosted trees")
"""Those that no row of the night can change."""
NAMES = ["global rate", "popularity", "bias + offset", "matrix factorisation", "item-kNN", "logistic regression"]


@pytest.fixture(scope="module")
def rows():
    """Two objectives with some labels missing and unequal weights."""
    world = opposed(nights=5, users=30)
    random = np.random.default_rng(0)
    world = with_labels(world, np.where(random.random(world.labels.shape) < 0.1, np.nan, world.labels))
    object.__setattr__(world, "weights", random.uniform(0.5, 2.0, len(world)).astype(np.float32))
    return world


def baselines(rows, config=CONFIG, kinds=KINDS, levels=None):
    segments = ladder_of() if levels is None else ladder_of(levels)
    return Baselines(config, Ladder(rows, segments, "shopper"), Material(rows), kinds, FIRST + NIGHT)


def lightgbm_is_there():
    try:
        library()
    except InvalidConfig:
        return False
    return True


def visits(rows):
    return visits_of(rows).of_nights(FIRST + NIGHT, FIRST + NIGHT)


def scores(rows, k=0, **more):
    tonight = visits(rows)
    return baselines(rows, **more).score(tonight, np.full(len(tonight), k))


def sigmoid(score):
    return 1 / (1 + np.exp(-score))


def own_support(rows, row):
    """Rows of the same user on earlier nights, at most the newest 128."""
    return np.flatnonzero((rows.user == rows.user[row]) & (rows.night < rows.night[row]))


def test_the_same_rows_are_scored_by_every_baseline(rows):
    said = scores(rows, 4)
    assert list(said) == NAMES
    _, query = visits(rows).split(np.full(len(visits(rows)), 4))
    for at, values in said.values():
        assert at.tolist() == query.flat()[0].tolist()
        assert values.shape == (len(at), 2)
        assert torch.isfinite(values).all()
        assert ((values[:, 0] > 0) & (values[:, 0] < 1)).all()


def test_the_global_rate_is_the_mean_of_earlier_labels(rows):
    _, said = scores(rows)["global rate"]
    earlier = rows.labels[rows.night < FIRST + NIGHT].astype(float)
    np.testing.assert_allclose(said.numpy(), np.broadcast_to(np.nanmean(earlier, axis=0), said.shape), rtol=1e-6)


def test_popularity_is_the_item_s_smoothed_rate_of_earlier_nights():
    """Recomputed from the labels; without holes, since the world's statistics were taken from them."""
    rows = opposed(nights=5, users=30)
    at, said = scores(rows)["popularity"]
    for row, (click, stars) in zip(at, said.numpy(), strict=True):
        mine = (rows.item == rows.item[row]) & (rows.night < FIRST + NIGHT)
        assert click == pytest.approx((rows.labels[mine, 0].sum() + 10 * 0.5) / (mine.sum() + 10), rel=1e-5)
        assert stars == pytest.approx((rows.labels[mine, 1].sum() + 10 * 3.0) / (mine.sum() + 10), rel=1e-5)


@pytest.mark.parametrize("levels", [None, (("market",),)])
@pytest.mark.parametrize("k", [0, 5])
def test_the_offset_is_the_user_s_shrunk_mean_residual_twice_over(rows, k, levels):
    """The residuals are taken once more behind the first step. Also where the ladder has no level of the user's own."""
    if levels is not None:
        rows = type(rows)(**{**vars(rows), "levels": rows.levels[1:]})
    at, said = scores(rows, k, levels=levels)["bias + offset"]
    tonight = visits(rows)
    start = dict(zip(rows.user[tonight.rows.start].tolist(), tonight.rows.start.tolist(), strict=True))
    for row, values in zip(at[::7], said.numpy()[::7], strict=True):
        first = start[int(rows.user[row])]
        support = np.r_[own_support(rows, row), np.arange(first, first + k)]
        for aim, kind in enumerate(KINDS):
            known = support[~np.isnan(rows.labels[support, aim])]
            rate, label, weight = rows.statistics[known, aim], rows.labels[known, aim], rows.weights[known]
            offset = 0.0
            for _ in range(2):
                chance = sigmoid(rate + offset)
                residual = label - (chance if kind == "binary" else rate + offset)
                curve = chance * (1 - chance) if kind == "binary" else np.ones(len(known))
                offset += ((weight * residual).sum() - 3.0 * offset) / ((weight * curve).sum() + 3.0)
            score = rows.statistics[row, aim] + offset
            assert values[aim] == pytest.approx(sigmoid(score) if kind == "binary" else score, abs=2e-5)


@pytest.mark.parametrize("k", [0, 5])
def test_the_factorisation_folds_a_user_in_by_his_ridge_on_the_item_factors(rows, k):
    fitted = baselines(rows)
    at, said = scores(rows, k)["matrix factorisation"]
    tonight = visits(rows)
    for aim, kind in enumerate(KINDS):
        factors = fitted._factorisation.tables[aim].numpy()
        features = np.c_[np.ones(len(rows)), factors[rows.item]]
        slow = SlowLadder(rows, ladder_of(), rows.statistics[:, :2], features, np.full((2, 2, 3), 2.0), KINDS)
        for number in range(0, len(tonight), 4):
            border = tonight.rows.start[number] + k
            own = list(range(tonight.first[number], border))
            taste = slow.ridge(own, np.zeros((2, 3)), 0)[aim] if own else np.zeros(3)
            for row in range(border, tonight.rows.stop[number]):
                score = rows.statistics[row, aim] + taste @ features[row]
                expected = sigmoid(score) if kind == "binary" else score
                assert said[at == row, aim].item() == pytest.approx(expected, abs=2e-5)


def test_a_user_without_support_is_told_the_popularity():
    world = opposed(nights=5, users=30)
    rows = part(world, (world.user > 10) | (world.night >= FIRST + NIGHT))
    tonight = visits(rows)
    new = tonight.take(np.flatnonzero(tonight.first == tonight.rows.start))
    assert len(new) > 3
    said = baselines(rows).score(new, np.zeros(len(new), np.int64))
    for name in ("bias + offset", "matrix factorisation", "item-kNN"):
        torch.testing.assert_close(said[name][1], said["popularity"][1], rtol=0, atol=1e-6)


def test_a_candidate_that_is_seen_for_the_first_time_is_told_the_popularity(rows):
    """By item-kNN, which knows nothing alike: as if its id were unknown, or newer than all others."""
    tonight = rows.night >= FIRST + NIGHT
    for strange in (0, 99):
        fresh = type(rows)(**{**vars(rows), "item": np.where(tonight & (rows.item == 12), strange, rows.item)})
        said = scores(fresh, 5)
        at, values = said["item-kNN"]
        here = fresh.item[at] == strange
        assert here.any()
        torch.testing.assert_close(values[here], said["popularity"][1][here], rtol=0, atol=1e-6)
        assert (values[~here] != said["popularity"][1][~here]).any()


@pytest.mark.parametrize("trees", [False, True])
def test_support_of_the_night_serves_users_and_never_others(rows, trees):
    """Labels of the night behind the first k, and of later nights, change nothing."""
    if trees and not lightgbm_is_there():
        pytest.skip("LightGBM cannot be loaded")
    k, tonight = 5, visits(rows)
    more = {"config": CONFIG.model_copy(update={"trees": trees, "tree_leaf_rows": 10})}
    assert list(scores(rows, k, **more)) == [*NAMES, *(["boosted trees"] if trees else [])]
    border, _ = tonight.split(np.full(len(tonight), k))
    given = rows.night < FIRST + NIGHT
    given[np.concatenate([np.arange(a, b) for a, b in zip(tonight.rows.start, border, strict=True)])] = True
    other = with_labels(rows, np.where(given[:, None], rows.labels, 1.0 - rows.labels))
    for (at, mine), (also, theirs) in zip(
        scores(rows, k, **more).values(), scores(other, k, **more).values(), strict=True
    ):
        assert np.array_equal(at, also)
        assert torch.equal(mine, theirs)
    # Nor does a row of the night that is there no more: the last of each visit.
    stop = np.unique(tonight.rows.stop[tonight.rows.lengths > k + 1]) - 1
    without = part(rows, ~np.isin(np.arange(len(rows)), stop))
    for (at, mine), (also, theirs) in zip(
        scores(rows, k, **more).values(), scores(without, k, **more).values(), strict=True
    ):
        stayed = np.isin(rows.tie[at], without.tie[also])
        assert np.count_nonzero(~stayed) > 0
        torch.testing.assert_close(mine[stayed], theirs, rtol=0, atol=2e-6)
    # One user's support moves his own scores and nobody else's.
    moved = rows.labels.copy()
    moved[tonight.rows.start[0] : border[0], :] = 1.0 - np.nan_to_num(moved[tonight.rows.start[0] : border[0], :])
    changed = scores(with_labels(rows, moved), k, **more)
    his = rows.user[changed["popularity"][0]] == rows.user[tonight.rows.start[0]]
    for name, (_, values) in scores(rows, k, **more).items():
        assert torch.equal(values[~his], changed[name][1][~his])
        assert torch.equal(values[his], changed[name][1][his]) == (name in WITHOUT_SUPPORT)


def test_opposed_tastes_are_seen_by_the_factorisation_and_by_neighbours_alone():
    """Rows of the night behind the first five; the others know nothing of who likes what."""
    rows = one_aim(opposed(nights=5, users=60))
    loss = {}
    for name, (at, said) in scores(rows, 5, kinds=("binary",)).items():
        label, chance = rows.labels[at, 0], said[:, 0].numpy()
        loss[name] = -(label * np.log(chance) + (1 - label) * np.log(1 - chance)).mean()
    blind = min(loss[name] for name in NAMES if name not in ("matrix factorisation", "item-kNN"))
    assert loss["matrix factorisation"] < 0.8 * blind
    assert loss["item-kNN"] < 0.8 * blind


def test_the_newest_rows_are_those_that_neighbours_and_trees_are_fitted_on(rows):
    """Of as many as `most_rows`, in the order of the table; the others see all of them."""
    earlier = np.flatnonzero(rows.night < FIRST + NIGHT)
    fitted = baselines(rows, CONFIG.model_copy(update={"most_rows": 100}))
    chosen = fitted._newest()
    assert len(chosen) == 100
    assert (np.diff(chosen) > 0).all()
    assert rows.time[chosen].min() > rows.time[np.setdiff1d(earlier, chosen)].max()
    assert np.array_equal(baselines(rows)._newest(), earlier)
    same = part(rows, np.isin(np.arange(len(rows)), chosen) | (rows.night >= FIRST + NIGHT))
    for one, other in zip(fitted._knn.neighbours, baselines(same)._knn.neighbours, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_the_seed_decides_the_factors_and_items_first_seen_tonight_have_none(rows):
    one, same, other = (
        scores(rows, 5, config=CONFIG.model_copy(update={"seed": seed, "sweeps": 1})) for seed in (0, 0, 1)
    )
    name = "matrix factorisation"
    assert torch.equal(one[name][1], same[name][1])
    assert not torch.equal(one[name][1], other[name][1])
    late = np.where((rows.night >= FIRST + NIGHT) & (rows.item == 12), 99, rows.item)
    early = rows.night < FIRST + NIGHT
    fresh = type(rows)(**{**vars(rows), "item": np.where(early & (late == 12), 11, late)})
    at, said = scores(fresh, 0)[name]
    assert (fresh.item[at] == 99).any()
    assert torch.isfinite(said).all()


# By reference implementations


def test_the_factors_are_alternating_least_squares_on_what_the_item_rates_leave(rows):
    """One user and one item at a time, from the same start: weights, missing labels, clicks by curvature."""
    fitted, known = baselines(rows), np.flatnonzero(rows.night < FIRST + NIGHT)
    users, user = np.unique(rows.user[known], return_inverse=True)
    item, count = rows.item[known], int(rows.item[known].max()) + 1
    for aim, kind in enumerate(KINDS):
        offset, label = (part[known, aim].astype(float) for part in (rows.statistics, rows.labels))
        given = rows.weights[known] * ~np.isnan(label)
        chance = sigmoid(offset)
        slope = given * np.nan_to_num(label - (chance if kind == "binary" else offset))
        curve = given * (chance * (1 - chance) if kind == "binary" else 1.0)
        if kind == "rating":
            columns = (user, offset[:, None], label[:, None], rows.weights[known].astype(float))
            begun = np.random.default_rng(CONFIG.seed).normal(0.0, 0.1, (count, 2))
            rated = Rated(*map(torch.from_numpy, columns), (kind,), len(users), 2.0, 2.0, CONFIG.sweeps)
            slope /= np.sqrt(noise(rated, torch.from_numpy(item.astype(np.int64)), torch.from_numpy(begun)))
        factors = np.random.default_rng(CONFIG.seed).normal(0.0, 0.1, (count, 2))
        factors[0] = 0.0
        factors[[at for at in range(count) if at not in item]] = 0.0
        for _ in range(CONFIG.sweeps):
            tastes, moved = np.zeros((len(users), 3)), np.zeros_like(factors)
            for who in range(len(users)):
                mine = user == who
                inputs = np.c_[np.ones(mine.sum()), factors[item[mine]]]
                system = inputs.T @ (inputs * curve[mine, None]) + 2.0 * np.eye(3)
                tastes[who] = np.linalg.solve(system, inputs.T @ slope[mine])
            for one in np.unique(item[item > 0]):
                mine = item == one
                inputs, bias = tastes[user[mine], 1:], tastes[user[mine], 0]
                system = inputs.T @ (inputs * curve[mine, None]) + 2.0 * np.eye(2)
                moved[one] = np.linalg.solve(system, inputs.T @ (slope[mine] - curve[mine] * bias))
            factors = moved
        np.testing.assert_allclose(fitted._factorisation.tables[aim].numpy(), factors, atol=1e-5)
        assert np.abs(factors).max() > 0.1


def test_the_regression_among_them_is_scikit_learn_s_on_earlier_nights(rows):
    """On the matrix of `test_regression`, at the strength of the config."""
    config = CONFIG.model_copy(update={"regression_strength": 7.0, "regression_steps": 30})
    at, said = scores(rows, 2, config=config)["logistic regression"]
    known = np.flatnonzero(rows.night < FIRST + NIGHT)
    inputs = matrix(rows, known)
    for aim in range(2):
        given = known[~np.isnan(rows.labels[known, aim])]
        example = (inputs[given], rows.labels[given, aim].astype(float), rows.weights[given].astype(float))
        if aim == 0:
            model = LogisticRegression(C=1 / 7.0, tol=1e-10, max_iter=10_000).fit(*example)
            expected = model.predict_proba(inputs[at])[:, 1]
        else:
            expected = Ridge(alpha=7.0).fit(*example).predict(inputs[at])
        np.testing.assert_allclose(said[:, aim].numpy(), expected, atol=2e-4)


def test_the_neighbours_among_them_are_those_of_the_config(rows):
    """Of earlier nights alone, every number in its place; `test_neighbours` says what they are."""
    config = BaselinesConfig(neighbours=3, neighbour_shrinkage=2.0, neighbour_mass=0.3, neighbour_rows=25)
    tonight, known = visits(rows), np.flatnonzero(rows.night < FIRST + NIGHT)
    parts = (Ladder(rows, ladder_of(), "shopper"), Material(rows), KINDS, known)
    alone = ItemKnn(*parts, most=3, shrinkage=2.0, mass=0.3, user_rows=25)
    expected = alone.scores(tonight, np.full(len(tonight), 5))
    expected = torch.stack([torch.sigmoid(expected[:, 0]), expected[:, 1]], dim=1)
    torch.testing.assert_close(scores(rows, 5, config=config)["item-kNN"][1], expected, rtol=0, atol=1e-6)


def test_the_trees_among_them_are_those_of_the_config(rows):
    """Of earlier nights alone, every number in its place; `test_trees` says what they are."""
    if not lightgbm_is_there():
        pytest.skip("LightGBM cannot be loaded")
    config = BaselinesConfig(trees=True, tree_rounds=20, tree_leaves=5, tree_rate=0.2, tree_leaf_rows=6, seed=4)
    at, said = scores(rows, 5, config=config)["boosted trees"]
    known = np.flatnonzero(rows.night < FIRST + NIGHT)
    alone = Trees(Material(rows), known, KINDS, rounds=20, leaves=5, rate=0.2, leaf_rows=6, seed=4)
    torch.testing.assert_close(said, alone.predictions(at, torch.zeros(len(at), 2)), rtol=0, atol=1e-6)
    assert said.std() > 0.05
