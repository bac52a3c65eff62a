"""Plans and weights of the ladder against one visit at a time in plain Python, finite differences and gradients."""

import numpy as np
import pytest
import torch

from tasks.learning import material as module
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.episodes import score_visits
from tasks.learning.ladder import Ladder, climb, inherit, learned_levels, supports
from tasks.learning.material import Material, visits_of
from tests.learning.slow_ladder import CROSSED, KINDS, THREE, SlowLadder, precisions_of, world
from tests.learning.small_rows import FIRST, Told, ladder_of, table, told

SEEDS = range(6)
RIDGE = Adaptation(KINDS, AdapterConfig())


def slow(rows, segments, scorer, precisions, **more):
    return SlowLadder(rows, segments, scorer.logits, scorer.features, precisions, KINDS, **more)


class Differentiable(Material):
    """Labels as one double-precision tensor that gradients reach."""

    def __init__(self, rows):
        super().__init__(rows)
        self.table = torch.from_numpy(rows.labels.astype(np.float64)).requires_grad_()

    def labels(self, at):
        return self.table[torch.from_numpy(at)]


# Weights and support


@pytest.mark.parametrize("levels", [THREE, CROSSED])
@pytest.mark.parametrize("limits", [{}, {"min_support": 3}, {"max_support": 4}, {"min_support": 2, "max_support": 6}])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_visit_is_served_by_the_weights_of_the_slow_ladder(seed, levels, limits):
    rows, segments = world(seed, levels), ladder_of(levels, **limits)
    scorer, precisions = told(rows, seed=seed), precisions_of(3, seed=seed)
    visits = visits_of(rows)
    after = np.random.default_rng(seed).integers(0, 4, len(visits))
    scores = score_visits(Ladder(rows, segments, "shopper"), visits, after, scorer, Material(rows), precisions,
                          RIDGE)  # fmt: skip
    oracle = slow(rows, segments, scorer, precisions)
    border, query = visits.split(after)
    expected = {}
    for number in range(len(visits)):
        weights, _ = oracle.visit(visits.first[number], visits.rows.start[number], border[number], visits.night[number])
        for row in range(query.start[number], query.stop[number]):
            expected[row] = oracle.logits[row] + weights @ oracle.features[row]
    assert scores.rows.tolist() == list(expected)
    np.testing.assert_allclose(scores.adapted.numpy(), np.array(list(expected.values())), atol=2e-6)
    np.testing.assert_array_equal(scores.base.numpy(), scorer.logits[scores.rows].numpy())


@pytest.mark.parametrize("levels", [THREE, CROSSED])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_labels_that_reach_a_query_are_those_of_its_support_and_no_others(seed, levels):
    """By gradient: none of the same night behind the first k, of later nights, or of others' same night."""
    rows, segments = world(seed, levels), ladder_of(levels, max_support=7)
    scorer, precisions, material = told(rows), precisions_of(3), Differentiable(rows)
    ladder, visits = Ladder(rows, segments, "shopper"), visits_of(rows)
    oracle = slow(rows, segments, scorer, precisions)
    after = np.minimum(np.random.default_rng(seed).integers(0, 4, len(visits)), visits.rows.lengths - 1)
    scores = score_visits(ladder, visits, after, scorer, material, precisions, RIDGE)
    border, _ = visits.split(after)
    reached = 0
    for number in range(0, len(visits), 3):
        mine = np.flatnonzero(scores.rows == border[number])
        (slope,) = torch.autograd.grad(scores.adapted[mine].sum(), material.table, retain_graph=True)
        _, used = oracle.visit(visits.first[number], visits.rows.start[number], border[number], visits.night[number])
        given = ~np.isnan(rows.labels)
        expected = np.zeros_like(given)
        expected[sorted(used)] = given[sorted(used)]
        np.testing.assert_array_equal(slope.numpy() != 0, expected)
        reached += len(used)
    assert reached > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_visit_is_served_alike_alone_and_among_others(seed):
    rows, segments = world(seed, CROSSED), ladder_of(CROSSED, min_support=2)
    ladder, visits, scorer, precisions = (
        Ladder(rows, segments, "shopper"),
        visits_of(rows),
        told(rows),
        precisions_of(3),
    )
    after = np.ones(len(visits), np.int64)

    def adapted(chosen):
        return score_visits(
            ladder, visits.take(chosen), after[chosen], scorer, Material(rows), precisions, RIDGE
        ).adapted

    together = adapted(np.arange(len(visits)))
    alone = torch.cat([adapted(np.array([number])) for number in range(len(visits))])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-10)


def test_visits_of_one_new_segment_keep_their_own_parents():
    """Nobody was in region 1 before, so it hands on the weights of each visit's own market."""
    rows = table(
        [1, 2, 3, 4], [0, 0, 1, 1], market=[1, 2, 1, 2], region=[2, 2, 1, 1], levels=CROSSED,
        labels=np.array([[1, 1.0], [0, -1.0], [0, 0], [0, 0]]),
    )  # fmt: skip
    visits = visits_of(rows).of_nights(FIRST + 1, FIRST + 1)
    stages = Ladder(rows, ladder_of(CROSSED), "shopper").plan(visits, np.zeros(2, np.int64))
    weights = climb(stages, told(rows), Material(rows), precisions_of(3), RIDGE)[-1]
    oracle = slow(rows, ladder_of(CROSSED), told(rows), precisions_of(3))
    assert not torch.equal(weights[0], weights[1])
    for number, row in enumerate((2, 3)):
        np.testing.assert_allclose(weights[number].numpy(), oracle.coarse(1, row, FIRST + 1, set()), atol=2e-6)


def test_batches_of_segments_are_cut_without_a_trace(monkeypatch):
    rows, segments = world(0), ladder_of(THREE)
    ladder, visits, scorer, precisions = (
        Ladder(rows, segments, "shopper"),
        visits_of(rows),
        told(rows),
        precisions_of(3),
    )
    after = np.ones(len(visits), np.int64)
    whole = score_visits(ladder, visits, after, scorer, Material(rows), precisions, RIDGE)
    monkeypatch.setattr(module, "PADDED_ROWS", 16)
    cut = score_visits(ladder, visits, after, scorer, Material(rows), precisions, RIDGE)
    torch.testing.assert_close(cut.adapted, whole.adapted, rtol=1e-10, atol=1e-12)


def test_batches_hold_every_segment_once_and_little_padding(monkeypatch):
    monkeypatch.setattr(module, "PADDED_ROWS", 64)
    lengths = np.sort(np.random.default_rng(0).integers(1, 200, 300))
    segments = np.arange(300) + 1000
    batches = module.batches(segments, lengths, 9)
    assert np.concatenate(batches).tolist() == segments.tolist()
    for batch in batches:
        longest = lengths[batch - 1000].max()
        assert len(batch) == 1 or len(batch) * max(longest, 9) <= 64
        assert longest < 2 * lengths[batch - 1000].min() or longest == 1
    reads = list(module.reads([batch - 1000 for batch in batches], lengths))
    assert sum(map(len, reads)) == len(batches)
    assert np.concatenate([np.concatenate(read) for read in reads]).tolist() == list(range(300))
    for read in reads:
        assert len(read) == 1 or lengths[np.concatenate(read)].sum() <= 64


@pytest.mark.parametrize("kind", ["ridge", "bias", "gradient", "matching"])
def test_a_few_rows_are_one_batch_and_the_same_answer(monkeypatch, kind):
    rows, segments, scorer, precisions = world(0), ladder_of(THREE), told(world(0)), precisions_of(3)
    visits, how = visits_of(rows), Adaptation(KINDS, AdapterConfig(kind=kind))
    after = np.ones(len(visits), np.int64)
    answers = []
    for few in (module.FEW_ROWS, 0):
        monkeypatch.setattr(module, "FEW_ROWS", few)
        ladder = Ladder(rows, segments, "shopper")
        answers.append(score_visits(ladder, visits, after, scorer, Material(rows), precisions, how).adapted)
    torch.testing.assert_close(*answers, rtol=1e-10, atol=1e-12)


def test_few_are_counted_with_their_padding_and_by_what_a_row_or_a_system_takes():
    lengths, segments = np.array([1, 1, 2, 5, 64]), np.arange(5)
    assert [len(batch) for batch in module.batches(segments, lengths, 9)] == [5]  # 320 padded rows
    assert [len(batch) for batch in module.batches(segments, lengths, 1, row=4)] == [2, 1, 1, 1]  # 1,280
    assert [len(batch) for batch in module.batches(segments, lengths, 300)] == [2, 1, 1, 1]  # 1,500
    assert module.batches(segments[:0], lengths[:0], 9) == []


@pytest.mark.parametrize("limits", [{}, {"min_support": 3}, {"max_support": 4}])
@pytest.mark.parametrize("padded", [16, 131_072])
@pytest.mark.parametrize("seed", range(3))
def test_supports_are_each_segment_s_rows_once_and_padding_of_no_weight(monkeypatch, seed, padded, limits):
    monkeypatch.setattr(module, "PADDED_ROWS", padded)
    rows, segments = world(seed), ladder_of(THREE, **limits)
    scorer, precisions, visits = told(rows, seed=seed), precisions_of(3), visits_of(rows)
    after = np.random.default_rng(seed).integers(0, 4, len(visits))
    stages = Ladder(rows, segments, "shopper").plan(visits, after)
    solved = climb(stages, scorer, Material(rows), precisions, RIDGE)
    oracle, (border, _) = slow(rows, segments, scorer, precisions), visits.split(after)
    expected = [{}, {}, {}]  # rows of every segment by stage
    for number in range(len(visits)):
        own = list(range(visits.first[number], border[number]))[-segments.max_support :]
        thin = len(own) < segments.min_support
        expected[2][number] = [] if thin else own
        row, at = visits.rows.start[number] if thin else border[number] - 1, stages[2].parent[number]
        for level in (1, 2):
            earlier = oracle.earlier(level, row, visits.night[number])
            used = min(oracle.ids[level][row]) > 0 and len(earlier) >= segments.min_support
            assert expected[2 - level].setdefault(at, earlier if used else []) == (earlier if used else [])
            row, at = earlier[-1] if earlier else row, stages[2 - level].parent[at]
    for number, stage in enumerate(stages):
        inherited = inherit(stage, solved[:number], precisions).numpy()
        found = {}
        for given in supports(stage, torch.from_numpy(inherited), scorer, Material(rows), RIDGE):
            for place, segment in enumerate(given.segments):
                mine = expected[number][segment]
                rest = len(mine)
                assert segment not in found
                found[segment] = mine
                np.testing.assert_array_equal(given.weights[place, :rest], rows.weights[mine])
                assert not given.weights[place, rest:].any()
                np.testing.assert_array_equal(given.features[place, :rest], scorer.features[mine])
                np.testing.assert_array_equal(given.labels[place, :rest], rows.labels[mine])
                offsets = scorer.logits[mine].numpy() + scorer.features[mine].numpy() @ inherited[segment].T
                np.testing.assert_allclose(given.offsets[place, :rest], offsets, atol=1e-12)
        assert found == {segment: mine for segment, mine in expected[number].items() if mine}


# Windows, by hand


def test_own_support_ends_exactly_before_the_query_and_keeps_the_newest_rows():
    rows = table([1] * 8, [0, 0, 0, 1, 1, 1, 1, 2])
    visits = visits_of(rows).of_nights(FIRST + 1, FIRST + 1)
    ladder = Ladder(rows, ladder_of(max_support=4), "shopper")
    for k, window in [(0, (0, 3)), (1, (0, 4)), (2, (1, 5)), (3, (2, 6))]:
        own = ladder.plan(visits, np.array([k]))[-1]
        assert (own.level, own.support) == (0, None)
        assert (own.windows.start.tolist(), own.windows.stop.tolist()) == ([window[0]], [window[1]])


def test_coarse_support_is_of_earlier_nights_only_and_keeps_the_newest_rows():
    rows = table([1, 2, 3, 1, 2, 3, 4], [0, 0, 1, 2, 2, 2, 3])
    ladder = Ladder(rows, ladder_of(max_support=2), "shopper")
    visits = visits_of(rows)
    market, own = ladder.plan(visits, np.full(len(visits), 1))
    assert (market.level, own.level) == (1, 0)
    for number in range(len(visits)):
        at = own.parent[number]
        rows_of = market.support[market.windows.start[at] : market.windows.stop[at]]
        earlier = np.flatnonzero(rows.night < visits.night[number])
        newest = earlier[np.argsort(rows.time[earlier])][-2:]
        assert rows_of.tolist() == newest.tolist()


def test_fewer_rows_than_min_support_are_no_support():
    rows = table([1, 1, 1, 2], [0, 1, 1, 1])
    visits = visits_of(rows).of_nights(FIRST + 1, FIRST + 1)
    ladder = Ladder(rows, ladder_of(min_support=2), "shopper")
    lengths = [ladder.plan(visits, np.full(2, k))[-1].windows.lengths.tolist() for k in (0, 1, 2)]
    assert lengths == [[0, 0], [2, 0], [3, 0]]


@pytest.mark.parametrize("key", [(0, 1), (1, 0), (0, 0)])
def test_a_segment_with_an_unknown_value_gets_nothing(key):
    levels = (("shopper",), ("market", "region"))
    rows = table([1, 2, 3, 4], [0, 0, 0, 1], market=[key[0]] * 4, region=[key[1]] * 4, levels=levels)
    stages = Ladder(rows, ladder_of(levels), "shopper").plan(visits_of(rows), np.zeros(4, np.int64))
    assert stages[0].windows.lengths.max() == 0


def test_the_parent_is_that_of_the_newest_support_row_even_if_the_user_moves_on_the_exam_night():
    rows = table([1, 1, 1, 2, 3], [0, 1, 1, 0, 0], market=[1, 2, 2, 1, 2])
    visits = visits_of(rows).of_nights(FIRST + 1, FIRST + 1)
    ladder = Ladder(rows, ladder_of(), "shopper")

    def market_of(k):
        market, own = ladder.plan(visits, np.array([k]))
        at = own.parent[0]
        newest = market.support[market.windows.stop[at] - 1]
        return rows.request_ids[newest, 0]

    assert market_of(0) == 1  # his support is of the night before, when he was there
    assert market_of(1) == 2


def test_a_user_without_support_is_served_by_the_segment_of_his_first_row():
    rows = table([1, 2, 3, 3], [0, 0, 1, 1], market=[1, 2, 2, 1])
    visits = visits_of(rows).of_nights(FIRST + 1, FIRST + 1)
    market, own = Ladder(rows, ladder_of(), "shopper").plan(visits, np.array([0]))
    assert own.windows.lengths.tolist() == [0]
    assert rows.user[market.support[market.windows.start[own.parent[0]]]] == 2


def test_visits_of_one_segment_and_night_share_its_solve():
    rows = table([1, 2, 3, 1, 2, 3], [0, 0, 0, 1, 1, 1])
    market, own = Ladder(rows, ladder_of(), "shopper").plan(visits_of(rows), np.zeros(6, np.int64))
    assert len(market.windows) == 2  # one market, two nights
    assert len(own.windows) == 6


def test_a_ladder_without_the_user_is_learned_with_him_below():
    assert learned_levels(ladder_of(THREE), "shopper") == THREE
    assert learned_levels(ladder_of(THREE[1:]), "shopper") == THREE
    rows = world(1, THREE[1:])
    segments = ladder_of(THREE[1:])
    ladder, visits = Ladder(rows, segments, "shopper"), visits_of(rows)
    stages = ladder.plan(visits, np.ones(len(visits), np.int64))
    assert [stage.level for stage in stages] == [2, 1, 0]


def test_a_segment_without_support_has_exactly_its_parents_weights():
    rows = world(2)
    ladder, visits = Ladder(rows, ladder_of(THREE), "shopper"), visits_of(rows)
    stages = ladder.plan(visits, np.zeros(len(visits), np.int64))
    *_, region, own = climb(stages, told(rows), Material(rows), precisions_of(3), RIDGE)
    empty = np.flatnonzero(stages[-1].windows.lengths == 0)
    assert len(empty) > 0
    assert torch.equal(own[empty], region[stages[-1].parent[empty]])


# Gradients


@pytest.mark.parametrize("steps", [1, 2])
def test_the_query_loss_flows_back_through_two_levels(steps):
    """With respect to features, offsets and precisions of support and query, by finite differences."""
    rows = table(
        [1, 1, 1, 2, 2, 3, 3], [0, 1, 1, 0, 1, 0, 1], market=[1, 1, 1, 1, 1, 2, 2],
        labels=np.array([[1, 0.3], [0, 0.1], [1, -1], [1, np.nan], [0, 2], [np.nan, 0.5], [1, 1]]),
    )  # fmt: skip
    ladder, visits = Ladder(rows, ladder_of(), "shopper"), visits_of(rows).of_nights(FIRST + 1, FIRST + 1)
    start, how = told(rows), Adaptation(KINDS, AdapterConfig(steps=steps))
    truth = torch.nan_to_num(torch.from_numpy(rows.labels.astype(np.float64)))

    def loss(logits, features, precisions):
        scores = score_visits(ladder, visits, np.array([1, 0, 0]), Told(logits, features), Material(rows), precisions,
                              how)  # fmt: skip
        return (torch.nn.functional.softplus(scores.adapted) - truth[scores.rows] * scores.adapted).mean()

    inputs = tuple(part.clone().requires_grad_() for part in (start.logits, start.features, precisions_of(2)))
    assert torch.autograd.gradcheck(loss, inputs)
    slopes = torch.autograd.grad(loss(*inputs), inputs)
    assert all((slope != 0).any() for slope in slopes)
    assert (slopes[2] != 0).all()  # every precision of both levels is learned
