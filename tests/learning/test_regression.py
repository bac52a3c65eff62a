"""The regression by scikit-learn on the same matrix and penalty, and by what it may not do."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from tasks.learning import regression
from tasks.learning.material import Material
from tasks.learning.regression import Regression, numbers_of
from tests.learning.small_rows import table, with_labels

KINDS = ("binary", "rating")
STRENGTH = 3.0


@pytest.fixture(scope="module")
def rows():
    """Numbers and labels with holes, unequal weights, and outcomes that depend on the numbers."""
    random, count = np.random.default_rng(3), 400
    statistics = random.normal(size=(count, 9)) * 10.0 ** np.arange(-3, 6)
    statistics[:, 8] = 7.0
    age = np.where(random.random(count) < 0.3, np.nan, random.uniform(18, 80, count))
    pull = statistics[:, 3] + np.nan_to_num((age - 50) / 15) - 1.5
    labels = np.stack([random.random(count) < 1 / (1 + np.exp(-pull)), pull + random.normal(size=count)], axis=1)
    labels = np.where(random.random((count, 2)) < 0.1, np.nan, labels)
    return table(
        random.integers(1, 30, count), random.integers(0, 5, count), labels=labels, statistics=statistics, age=age,
        price=random.uniform(0, 9, count), weights=random.uniform(0.5, 2.0, count),
    )  # fmt: skip


def fitted(rows, at, steps=20, strength=STRENGTH, kinds=KINDS):
    return Regression(Material(rows), at, kinds, strength, steps)


def matrix(rows, at):
    """Standardised on the rows at `at`, clipped, then indicators; for all rows."""
    numbers = np.concatenate([rows.statistics, rows.request_numbers, rows.candidate_numbers], axis=1).astype(float)
    mean, scale = np.nanmean(numbers[at], axis=0), np.nanstd(numbers[at], axis=0)
    normal = np.clip((numbers - mean) / np.where(scale > 1e-6, scale, 1.0), -5, 5)
    return np.concatenate([np.nan_to_num(normal), np.isnan(numbers)], axis=1)


def test_it_equals_scikit_learn_on_the_same_matrix_and_penalty(rows):
    at, inputs = np.arange(300), matrix(rows, np.arange(300))
    said = fitted(rows, at).scores(np.arange(len(rows))).numpy()
    for aim in range(2):
        given = at[~np.isnan(rows.labels[at, aim])]
        example = (inputs[given], rows.labels[given, aim].astype(float), rows.weights[given].astype(float))
        if aim == 0:
            model = LogisticRegression(C=1 / STRENGTH, tol=1e-10, max_iter=10_000).fit(*example)
            expected = model.decision_function(inputs)
        else:
            expected = Ridge(alpha=STRENGTH).fit(*example).predict(inputs)
        np.testing.assert_allclose(said[:, aim], expected, atol=2e-4)
    assert np.std(said[:, 0]) > 0.5


def test_chunks_leave_no_trace(rows, monkeypatch):
    whole = fitted(rows, np.arange(300))
    monkeypatch.setattr(regression, "CHUNK", 37)
    pieces = fitted(rows, np.arange(300))
    torch.testing.assert_close(pieces.normaliser.scale, whole.normaliser.scale)
    torch.testing.assert_close(pieces.coefficients, whole.coefficients, rtol=1e-6, atol=1e-9)


def test_a_number_that_is_missing_counts_as_the_mean_and_says_so(rows):
    """Its column is the last but one: age, then price."""
    model = fitted(rows, np.arange(300))
    inputs = model._inputs(np.flatnonzero(np.isnan(rows.request_numbers[:, 0]))[:1])[0]
    assert numbers_of(rows, np.arange(1)).shape == (1, 11)
    assert (inputs[9], inputs[11 + 9], inputs[-1]) == (0, 1, 1)


@pytest.mark.parametrize("label", [0.0, np.nan])
def test_labels_that_say_nothing_leave_a_finite_answer(rows, label):
    """One outcome alone, and none at all."""
    model = fitted(with_labels(rows, np.full_like(rows.labels, label)), np.arange(300))
    said = model.scores(np.arange(len(rows)))
    assert torch.isfinite(said).all()
    if np.isnan(label):
        assert torch.count_nonzero(model.coefficients[:, :-1]) == 0
    else:
        assert (torch.sigmoid(said[:, 0]) < 0.01).all()
        torch.testing.assert_close(said[:, 1], torch.zeros(len(rows)), atol=1e-6, rtol=0)


def test_rare_outcomes_that_a_number_tells_apart_do_not_run_away():
    """Whole Newton steps overshoot here: 3 in 3,000 rows, told apart by one large number."""
    count = 3000
    labels = np.zeros((count, 1))
    labels[:3] = 1.0
    statistics = np.random.default_rng(0).normal(size=(count, 6))
    statistics[:3, 0] = 60.0
    rows = table(np.arange(count) + 1, np.zeros(count, int), labels=labels, statistics=statistics, age=np.ones(count))
    at, inputs = np.arange(count), matrix(rows, np.arange(count))
    said = fitted(rows, at, steps=60, strength=1e-3, kinds=("binary",)).scores(at)[:, 0]
    model = LogisticRegression(C=1e3, tol=1e-10, max_iter=100_000).fit(inputs, labels[:, 0])
    np.testing.assert_allclose(said.numpy(), model.decision_function(inputs), rtol=0.02, atol=0.02)


def test_nothing_else_is_read(rows):
    """Labels behind the rows that are fitted on, and ids, change nothing."""
    other = with_labels(rows, np.where(np.arange(len(rows))[:, None] < 300, rows.labels, 1 - rows.labels))
    object.__setattr__(other, "item", rows.item + 1)
    assert torch.equal(fitted(rows, np.arange(300)).coefficients, fitted(other, np.arange(300)).coefficients)
