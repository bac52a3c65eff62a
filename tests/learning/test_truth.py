"""Worlds whose truth is known: adaptation against the best that anybody could say from the same rows."""

from datetime import date

import numpy as np
import pytest
import torch

from tasks.learning.adapters import AdapterConfig
from tasks.learning.episodes import score_visits
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tasks.learning.networks import RankerConfig
from tasks.learning.setting import Setting
from tasks.learning.solvers import solve
from tasks.learning.training import meta_train
from tasks.learning.training_config import TrainingConfig
from tests.learning.small_rows import FIRST, contract, ladder_of, shape, table

TASTES, SUPPORT = 8, 50
RIDGE = AdapterConfig()


def sigmoid(score):
    return 1 / (1 + np.exp(-score))


def expected_loss(truth, said):
    """Log-loss of probabilities, expected under the true ones."""
    return float(-(truth * np.log(said) + (1 - truth) * np.log1p(-said)).mean())


def lift(truth, said):
    """What is saved over saying 1/2."""
    return np.log(2) - expected_loss(truth, said)


def posterior_predictive(x, y, asked, random, draws=1000, freedom=8):
    """Bayes' answer for one segment whose tastes are N(0, I), and the effective share of the draws.

    By importance sampling: a Student t about the posterior's mode, shaped by its curvature there.

    Args:
        x: support [S, d].
        y: its labels [S].
        asked: rows to predict [T, d].
        random: of the draws.
        draws: how many.
        freedom: of the Student t.
    """
    width = x.shape[1]
    mode = np.zeros(width)
    for _ in range(30):
        chance = sigmoid(x @ mode)
        hessian = (x * (chance * (1 - chance))[:, None]).T @ x + np.eye(width)
        mode += np.linalg.solve(hessian, x.T @ (y - chance) - mode)
    normal = random.normal(size=(draws, width)) / np.sqrt(random.chisquare(freedom, (draws, 1)) / freedom)
    drawn = mode + np.linalg.solve(np.linalg.cholesky(hessian).T, normal.T).T
    score = drawn @ x.T
    posterior = (y * score - np.logaddexp(0, score)).sum(axis=1) - 0.5 * (drawn**2).sum(axis=1)
    proposal = -0.5 * (freedom + width) * np.log1p((normal**2).sum(axis=1) / freedom)
    weight = np.exp(posterior - proposal - (posterior - proposal).max())
    weight /= weight.sum()
    return weight @ sigmoid(drawn @ asked.T), 1 / (weight**2).sum() / draws


def tasteful(segments, later, seed=0):
    """Features [E, S + later, d], true probabilities and drawn labels [E, S + later] of a logistic world."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(segments, SUPPORT + later, TASTES)).astype(np.float32).astype(np.float64)
    truth = sigmoid(np.einsum("esd,ed->es", features, random.normal(size=(segments, TASTES))))
    return features, truth, (random.random(truth.shape) < truth).astype(np.float64)


def bayes(features, labels):
    """Posterior predictive of every segment's later rows [E, T]; the draws have to be worth something."""
    random = np.random.default_rng(1)
    told = [
        posterior_predictive(x[:SUPPORT], y[:SUPPORT], x[SUPPORT:], random)
        for x, y in zip(features, labels, strict=True)
    ]
    assert min(share for _, share in told) > 0.3
    return np.stack([said for said, _ in told])


def test_the_oracle_is_the_integral_where_one_taste_can_be_integrated():
    random = np.random.default_rng(0)
    x, asked = random.normal(size=(20, 1)), np.linspace(-2, 2, 9)[:, None]
    y = (random.random(20) < sigmoid(1.5 * x[:, 0])).astype(float)
    grid = np.linspace(-12, 12, 20_001)
    score = grid[:, None] * x[:, 0]
    density = np.exp((y * score - np.logaddexp(0, score)).sum(axis=1) - 0.5 * grid**2)
    expected = density @ sigmoid(grid[:, None] * asked[:, 0]) / density.sum()
    said, share = posterior_predictive(x, y, asked, random, draws=200_000)
    np.testing.assert_allclose(said, expected, atol=2e-3)
    assert share > 0.8


def test_the_solve_reaches_what_bayes_reaches_from_the_same_rows():
    """The config's own steps, and the precision that the world has."""
    features, truth, labels = tasteful(240, 150)
    x, y = torch.from_numpy(features[:, :SUPPORT]), torch.from_numpy(labels[:, :SUPPORT, None])
    weights = solve(
        *(x, torch.zeros_like(y), y, torch.ones_like(y[..., 0]), torch.ones(1, TASTES).double(), ["binary"]),
        RIDGE.steps,
    )[:, 0].numpy()
    asked, true = features[:, SUPPORT:], truth[:, SUPPORT:]
    reached = lift(true, sigmoid(np.einsum("esd,ed->es", asked, weights)))
    best = lift(true, bayes(features, labels))
    assert reached < best < lift(true, true)
    assert reached > 0.97 * best


# Through learning

NIGHTS, LATER = 25, 20


def history(features, labels, nights=NIGHTS):
    """Each segment is a user: his support is spread evenly over the nights, the later rows are the night behind it."""
    count, each = labels.shape
    night = np.r_[np.arange(SUPPORT) * nights // SUPPORT, np.full(each - SUPPORT, nights)]
    return table(
        np.repeat(np.arange(count) + 1, each), np.tile(night, count), labels=labels.reshape(-1, 1),
        price=features.reshape(count * each, -1),
    )  # fmt: skip


def learned(rows, nights=NIGHTS, **training):
    """Scores of the rows of the night behind the history: positions, without and with adaptation, as probabilities."""
    data = contract(prices=rows.candidate_numbers.shape[1])
    config = TrainingConfig(seed=3, threads=1, **training)
    made = meta_train(
        Setting(data, ladder_of(), RankerConfig(), RIDGE, config, rows, shape(rows), date.fromordinal(FIRST + nights))
    )
    assert made.base.trained_through.toordinal() < FIRST + nights
    visits = visits_of(rows).of_nights(FIRST + nights, FIRST + nights)
    with torch.no_grad():
        scores = score_visits(
            *(Ladder(rows, ladder_of(), "shopper"), visits, np.zeros(len(visits), np.int64)),
            *(Material(rows).scorer(made.base.network), Material(rows), made.base.table(), made.base.adaptation),
        )
    return scores.rows, *(sigmoid(part[:, 0].double().numpy()) for part in (scores.base, scores.adapted))


def test_learning_reaches_what_bayes_reaches_from_the_same_rows():
    features, truth, labels = tasteful(240, LATER, seed=1)
    rows = history(features, labels)
    at, base, adapted = learned(rows)
    assert at.tolist() == np.flatnonzero(rows.night == FIRST + NIGHTS).tolist()
    true = truth[:, SUPPORT:].reshape(-1)
    best = lift(true, bayes(features, labels).reshape(-1))
    assert lift(true, adapted) > 0.97 * best
    assert lift(true, base) < 0.01  # tastes cancel out over the users


def test_opposed_tastes_are_told_apart_which_no_blind_prediction_can():
    """Users in pairs see the very same rows; one likes what the other dislikes, by a logit of 1 ± 2 z."""
    users, nights, later = 80, 10, 30
    random = np.random.default_rng(5)
    features = np.tile(random.normal(size=(users // 2, SUPPORT + later, 2)).astype(np.float32), (2, 1, 1))
    taste = np.repeat([2.0, -2.0], users // 2)
    truth = sigmoid(1.0 + taste[:, None] * features[..., 0])
    rows = history(features, (random.random(truth.shape) < truth).astype(float), nights)
    _, base, adapted = (part.reshape(users, later) for part in learned(rows, nights))
    asked = truth[:, SUPPORT:]
    # Whoever does not know the user can say no better than the mean of both: by Gauss-Hermite over all rows, and here.
    z, weight = np.polynomial.hermite_e.hermegauss(60)
    mean = (sigmoid(1 + 2 * z) + sigmoid(1 - 2 * z)) / 2
    by_hand = float(weight @ -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)) / weight.sum())
    blind = expected_loss(asked, np.tile((asked[: users // 2] + asked[users // 2 :]) / 2, (2, 1)))
    assert blind == pytest.approx(by_hand, abs=0.005)
    np.testing.assert_allclose(base[: users // 2], base[users // 2 :], rtol=1e-6)
    known = expected_loss(asked, asked)
    assert expected_loss(asked, base) >= blind
    assert blind - expected_loss(asked, adapted) > 0.85 * (blind - known)
