"""Episodes: how they are drawn, what they score, and the loss by hand."""

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.episodes import COLD_SHARE, MOST_SUPPORT, counts_by_age, draw, row_loss, score_visits
from tasks.learning.ladder import Ladder, climb
from tasks.learning.material import Material, visits_of
from tests.learning.small_rows import FIRST, ladder_of, opposed, table, told

RIDGE = AdapterConfig()
KINDS = ("binary", "rating")


def scored(rows, visits, after, config=RIDGE, width=3, **more):
    precisions = torch.ones(2, rows.labels.shape[1], width, dtype=torch.float64)
    kinds = KINDS[: rows.labels.shape[1]]
    return score_visits(
        Ladder(rows, ladder_of(), "shopper"), visits, np.asarray(after), told(rows), Material(rows), precisions,
        Adaptation(kinds, config), **more,
    )  # fmt: skip


def test_visits_are_drawn_once_and_always_leave_a_row_to_query():
    visits = visits_of(opposed(nights=4))
    for seed in range(20):
        chosen, after = draw(visits, 30, np.random.default_rng(seed))
        assert len(set(zip(chosen.first, chosen.night, strict=True))) == 30
        assert (after >= 0).all()
        assert (after < chosen.rows.lengths).all()


def test_more_visits_than_there_are_is_all_of_them():
    visits = visits_of(table([1, 2, 3], [0, 0, 0]))
    chosen, after = draw(visits, 50, np.random.default_rng(0))
    assert sorted(chosen.first.tolist()) == [0, 1, 2]
    assert after.tolist() == [0, 0, 0]


def test_a_night_counts_half_after_its_half_life_and_never_nothing():
    night = FIRST + np.array([0, 30, 27, -4000])
    assert counts_by_age(night, 3.0).tolist() == [2.0**-10, 1.0, 0.5, 1e-12]
    assert counts_by_age(night, None) is None


def test_visits_are_drawn_by_their_chances():
    """One visit of nights that count 1, 2 and 5: drawn in these shares, and without replacement all of them come."""
    visits = visits_of(table([1, 2, 3], [0, 1, 2]))
    chances = np.array([1.0, 2.0, 5.0])[visits.night - FIRST]
    random = np.random.default_rng(0)
    drawn = [int(draw(visits, 1, random, chances)[0].night[0]) - FIRST for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [1 / 8, 2 / 8, 5 / 8], atol=0.03)
    hardly = np.array([1e-12, 1.0, 1.0])[visits.night - FIRST]
    assert sorted(draw(visits, 9, random, hardly)[0].night - FIRST) == [0, 1, 2]


def test_supports_imitate_both_exams():
    """About a third without a row of the night; the others log-uniform from 1 to the most."""
    rows = table(np.repeat(np.arange(4000), 50) + 1, [0] * 200_000)
    _, after = draw(visits_of(rows), 4000, np.random.default_rng(0))
    assert (after == 0).mean() == pytest.approx(COLD_SHARE, abs=0.03)
    warm = after[after > 0]
    assert warm.min() == 1
    assert warm.max() <= MOST_SUPPORT
    for size in (1, 5, 20):  # P(floor(exp(u log M)) <= n) = log(n + 1) / log M
        assert (warm <= size).mean() == pytest.approx(np.log(size + 1) / np.log(MOST_SUPPORT), abs=0.03)


def test_the_same_generator_draws_the_same():
    visits = visits_of(opposed(nights=3))
    one, other = (draw(visits, 20, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one[0].first, other[0].first)
    assert np.array_equal(one[1], other[1])


def test_zero_support_gives_the_base_exactly():
    rows = opposed(nights=1, users=8)
    visits = visits_of(rows)
    scores = scored(rows, visits, [0] * len(visits))
    assert len(scores.rows) == len(rows)
    assert torch.equal(scores.adapted, scores.base)


@pytest.mark.parametrize(("kind", "width"), [("none", 0), ("bias", 1)])
def test_less_than_a_ridge_is_the_base_and_a_shift(kind, width):
    rows = opposed(nights=3, users=8)
    visits = visits_of(rows).of_nights(FIRST + 2, FIRST + 2)
    scores = scored(rows, visits, [3] * len(visits), AdapterConfig(kind=kind), width)
    shift = (scores.adapted - scores.base).numpy()
    if kind == "none":
        assert not shift.any()
    visit = np.repeat(np.arange(len(visits)), visits.rows.lengths - 3)
    for number in range(len(visits)):
        mine = shift[visit == number]
        np.testing.assert_allclose(mine, np.broadcast_to(mine[0], mine.shape), atol=1e-9)


def test_query_rows_are_the_earliest_behind_the_support():
    rows = table([1] * 6 + [2] * 3, [0] * 9)
    visits = visits_of(rows)
    assert scored(rows, visits, [2, 1]).rows.tolist() == [2, 3, 4, 5, 7, 8]
    assert scored(rows, visits, [2, 1], query_rows=2).rows.tolist() == [2, 3, 7, 8]
    everything, some = scored(rows, visits, [2, 1]), scored(rows, visits, [2, 1], query_rows=2)
    torch.testing.assert_close(some.adapted, everything.adapted[np.isin(everything.rows, some.rows)])


def test_a_step_scores_every_row_once_and_has_the_gradient_of_scoring_it_wherever_it_is_asked_for():
    """Rows of earlier nights support several visits and segments, and are queries of others."""
    rows = opposed(nights=3, users=8)
    visits = visits_of(rows).of_nights(FIRST + 1, FIRST + 2)
    after, kinds = np.full(len(visits), 2), torch.ones(2, dtype=torch.float64)
    ladder, material, adaptation = Ladder(rows, ladder_of(), "shopper"), Material(rows), Adaptation(KINDS, RIDGE)
    stages, (query, visit) = ladder.plan(visits, after), visits.split(after)[1].flat()
    asked = []

    def gradients(adapted):
        tables = [part.requires_grad_() for part in told(rows)(np.arange(len(rows)))]
        precisions = torch.full((2, 2, 3), 2.0, dtype=torch.float64, requires_grad=True)

        def scorer(at):
            asked.append(at)
            return tables[0][at], tables[1][at]

        loss = row_loss(adapted(scorer, precisions), material.labels(query).double(), KINDS, kinds)
        return torch.autograd.grad(loss, [*tables, precisions])

    def wherever(scorer, precisions):
        weights = climb(stages, scorer, material, precisions, adaptation)[-1]
        return adaptation.scores(*scorer(query), weights, visit)

    def once(scorer, precisions):
        return score_visits(ladder, visits, after, scorer, material, precisions, adaptation).adapted

    expected = gradients(wherever)
    assert len(np.concatenate(asked)) > 1.3 * len(np.unique(np.concatenate(asked)))
    asked.clear()
    for found, slope in zip(gradients(once), expected, strict=True):
        assert float(slope.abs().max()) > 1e-4
        torch.testing.assert_close(found, slope)
    assert [len(at) for at in asked] == [len(np.unique(np.concatenate([query, *(one.rows for one in stages)])))]


def test_the_loss_is_log_loss_plus_half_the_squared_error_by_weight():
    random = np.random.default_rng(0)
    scores = torch.from_numpy(random.normal(0, 3, (200, 2)))
    labels = np.stack([random.random(200) < 0.4, random.normal(size=200)], axis=1).astype(float)
    labels[random.random((200, 2)) < 0.2] = np.nan
    loss = row_loss(scores, torch.from_numpy(labels), KINDS, torch.tensor([1.0, 0.25]))
    known = ~np.isnan(labels)
    chance = 1 / (1 + np.exp(-scores[:, 0].numpy()[known[:, 0]]))
    entropy = reference.log_loss(labels[known[:, 0], 0], chance)
    squares = ((scores[:, 1].numpy() - labels[:, 1])[known[:, 1]] ** 2).mean()
    assert loss.item() == pytest.approx(entropy + 0.25 * 0.5 * squares, rel=1e-9)


def test_an_objective_without_any_label_costs_nothing():
    loss = row_loss(torch.zeros(3, 2), torch.tensor([[1.0, torch.nan]] * 3), KINDS, torch.ones(2))
    assert loss.item() == pytest.approx(np.log(2))
