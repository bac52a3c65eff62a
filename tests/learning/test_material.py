"""Visits and windows against plain loops over the rows."""

import numpy as np
import pytest
import torch

from tasks.learning.material import Dialect, Material, Windows, remembered, visits_of
from tasks.learning.networks import Ranker, RankerConfig
from tests.learning.small_rows import FIRST, opposed, shape, table, told

SEEDS = range(5)


def random_table(seed):
    random = np.random.default_rng(seed)
    return table(random.integers(1, 6, 80), random.integers(0, 4, 80), item=random.integers(1, 9, 80))


@pytest.mark.parametrize("seed", SEEDS)
def test_flat_lists_every_position_of_every_window(seed):
    random = np.random.default_rng(seed)
    start = random.integers(0, 20, 7)
    windows = Windows(start, start + random.integers(0, 5, 7))
    expected = [(at, number) for number in range(7) for at in range(windows.start[number], windows.stop[number])]
    at, window = windows.flat()
    assert list(zip(at.tolist(), window.tolist(), strict=True)) == expected
    assert windows.take(np.array([3])).lengths[0] == windows.lengths[3]


@pytest.mark.parametrize("seed", SEEDS)
def test_visits_are_the_runs_of_user_and_night(seed):
    rows = random_table(seed)
    visits = visits_of(rows)
    found = []
    for number in range(len(visits)):
        span = range(visits.rows.start[number], visits.rows.stop[number])
        (who,), (night,) = {int(rows.user[at]) for at in span}, {int(rows.night[at]) for at in span}
        assert night == visits.night[number]
        assert visits.first[number] == np.flatnonzero(rows.user == who)[0]
        found.append((who, night))
    assert found == sorted({(int(who), int(night)) for who, night in zip(rows.user, rows.night, strict=True)})
    assert visits.rows.lengths.sum() == len(rows)


def test_no_rows_have_no_visits():
    assert len(visits_of(table([], []))) == 0


def test_the_query_begins_where_support_ends_and_support_never_leaves_the_visit():
    visits = visits_of(table([1, 1, 1, 2, 2], [0, 1, 1, 1, 1]))
    border, query = visits.split(np.array([0, 1, 5]))
    assert border.tolist() == [0, 2, 5]
    assert query.start.tolist() == [0, 2, 5]
    assert query.stop.tolist() == [1, 3, 5]


def test_nights_are_chosen_with_both_ends():
    visits = visits_of(table([1, 1, 1, 1], [0, 1, 2, 3]))
    assert visits.of_nights(FIRST + 1, FIRST + 2).night.tolist() == [FIRST + 1, FIRST + 2]


def test_a_dialect_reads_the_rows_with_another_base_s_ids():
    rows = opposed(nights=2, users=6)
    random = np.random.default_rng(0)
    of_market, of_region = random.integers(0, 9, 4), np.array([0, 5])
    of_item, of_genre = random.permutation(13), random.integers(0, 9, 4)
    material = Material(rows, dialect=Dialect((of_market, of_region), (of_item, of_genre)))
    at = np.array([3, 0, 11])
    request, candidate, *_ = material.inputs(at)
    assert request.tolist() == [[of_market[a], of_region[b]] for a, b in rows.request_ids[at]]
    assert candidate.tolist() == [[of_item[a], of_genre[b]] for a, b in rows.candidate_ids[at]]


def test_a_scorer_is_the_network_on_the_rows_inputs_and_labels_are_no_input():
    rows = opposed(nights=2, users=6)
    network = Ranker(shape(rows, "binary", "rating"), RankerConfig(embedding=3, hidden=4)).eval()
    at = np.array([5, 2])
    logits, features = Material(rows).scorer(network)(at)
    again = network(
        *(torch.from_numpy(np.asarray(part[at])) for part in (
            rows.request_ids, rows.candidate_ids, rows.request_numbers, rows.candidate_numbers, rows.statistics
        ))
    )  # fmt: skip
    assert torch.equal(logits, again[0])
    assert torch.equal(features, again[1])


@pytest.mark.parametrize("part", [1, 7, 80, 1000])
def test_what_is_remembered_was_asked_once_for_every_position(part):
    rows = random_table(0)
    scorer, asked = told(rows), []

    def counted(at):
        asked.append(at)
        return scorer(at)

    known = remembered(counted, len(rows), part)
    assert np.concatenate(asked).tolist() == list(range(80))
    assert max(map(len, asked)) <= part
    times = len(asked)
    at = np.array([3, 79, 3, 0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(known(at), scorer(at), strict=True))
    assert len(asked) == times
