"""Catalogues and lists against loops over users and items, and what of the night and later they may not depend on."""

from collections import Counter
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import torch

from tasks.data.statistics import StatisticsTables
from tasks.learning import catalogue as module
from tasks.learning.adapters import Adaptation, AdapterConfig, Precisions
from tasks.learning.bank import fill_bank
from tasks.learning.base import Base
from tasks.learning.catalogue import catalogue, ranked, sampled
from tasks.learning.exams import Night
from tasks.learning.factorisation import Factorisation
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.networks import Ranker, RankerConfig
from tests.learning.small_rows import FIRST, LADDER, contract, ladder_of, opposed, shape, with_labels

NIGHT = 3
KINDS = ("binary", "rating")
DATA = contract(*KINDS)
METHODS = ["candidate", "zero steps", "popularity", "matrix factorisation"]


@pytest.fixture(scope="module")
def rows():
    """Five nights, of which the fourth is examined; 12 items whose genre and price change from row to row."""
    world = opposed(nights=5, users=14, each=8)
    random = np.random.default_rng(3)
    genre, price = random.integers(0, 4, len(world)), random.uniform(1, 9, len(world)).astype(np.float32)
    return replace(world, candidate_ids=np.c_[world.item, genre], candidate_numbers=price[:, None])


def tables(rows):
    """Item statistics as of the night, and a user's: what the rows of the night say; no cohort x item pair is known."""
    tonight = rows.night == FIRST + NIGHT
    item, user = (np.zeros((15 if ids is rows.item else 30, 3), np.float32) for ids in (rows.item, rows.user))
    item[rows.item[tonight]] = rows.statistics[tonight, :3]
    user[rows.user[tonight]] = np.random.default_rng(5).normal(size=(tonight.sum(), 3))
    return StatisticsTables(
        names=rows.statistics_names, base=np.zeros(2, np.float32), item=item, user=user, cohort_columns=("market",),
        cohort_radices=(4, 15), cohort_item_keys=np.zeros(0, np.int64), cohort_item=np.zeros((1, 3), np.float32),
    )  # fmt: skip


def base_of(rows):
    torch.manual_seed(1)
    ranker = RankerConfig(embedding=3, hidden=4, factors=2, category_factors=1, features=2, user_statistics=True)
    network = Ranker(shape(rows, *KINDS), ranker)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.4)
    config = AdapterConfig()
    precisions = Precisions(2, 2, network.width, config)
    return Base(network.eval(), precisions, LADDER, config, date.fromordinal(FIRST))


class Asked:
    """Everything that lists are made from, for one table of rows."""

    def __init__(self, rows, base):
        self.base, self.statistics = base, tables(rows)
        self.ladder, material = Ladder(rows, ladder_of(), "shopper"), Material(rows)
        with torch.no_grad():
            self.bank = fill_bank(
                *(self.ladder, material, material.scorer(base.network), base.table()),
                *(Adaptation.of(base.network, base.adapter), FIRST + NIGHT),
            )
        self.night = Night.among(DATA, self.ladder, material, FIRST + NIGHT)
        earlier = np.flatnonzero(rows.night < FIRST + NIGHT)
        held = {"factors": 2, "strength": 3.0, "sweeps": 4, "seed": 0}
        self.factorisation = Factorisation(self.ladder, material, KINDS, earlier, **held)
        self.candidates = catalogue(rows, FIRST + NIGHT, 0)
        self.visits = self.night.visits

    def lists(self, length=5):
        given = (self.night, self.base, self.bank, self.factorisation, self.statistics, self.candidates, self.visits)
        return ranked(*given, length)


@pytest.fixture(scope="module")
def asked(rows):
    return Asked(rows, base_of(rows))


def test_candidates_are_the_most_counted_and_some_of_the_others(rows):
    earlier = [row for row in range(len(rows)) if rows.night[row] < FIRST + NIGHT]
    count = Counter(rows.item[earlier].tolist())
    order = sorted(count, key=lambda item: (-count[item], item))
    found = catalogue(rows, FIRST + NIGHT, 0, counted=5, others=3)
    assert found.items[:5].tolist() == order[:5]
    assert set(found.items[5:].tolist()) < set(order[5:])
    assert len(found) == len(set(found.items.tolist())) == 8
    assert found.known == len(count) == 12
    assert found.items[5:].tolist() == [item for item in order if item in found.items[5:]]
    for item, ids, at in zip(found.items, found.ids, found.newest, strict=True):
        newest = max(
            (row for row in earlier if rows.item[row] == item), key=lambda row: (rows.time[row], rows.tie[row])
        )
        assert ids.tolist() == rows.candidate_ids[newest].tolist()
        assert at == newest
    drawn = {tuple(catalogue(rows, FIRST + NIGHT, seed, counted=5, others=3).items[5:].tolist()) for seed in range(9)}
    assert len(drawn) > 3
    everything = catalogue(rows, FIRST + NIGHT, 0)
    assert everything.items.tolist() == order


def test_of_rows_of_one_moment_the_greatest_tie_is_the_newest_and_the_unknown_are_no_candidates(rows):
    tied = replace(rows, time=np.zeros_like(rows.time), tie=np.random.default_rng(0).permutation(len(rows)))
    tied = replace(tied, item=np.where(rows.item == 4, 0, rows.item))
    found = catalogue(tied, FIRST + NIGHT, 0)
    assert set(found.items.tolist()) == set(range(1, 13)) - {4}
    for item, ids in zip(found.items, found.ids, strict=True):
        mine = [row for row in range(len(tied)) if tied.item[row] == item and tied.night[row] < FIRST + NIGHT]
        assert ids.tolist() == tied.candidate_ids[max(mine, key=lambda row: tied.tie[row])].tolist()


def test_users_are_drawn_once_each_and_otherwise_every_time(asked):
    some = [sampled(asked.night.visits, FIRST + NIGHT, seed, most=4) for seed in (0, 0, 1, 2, 3)]
    assert [len(one) for one in some] == [4] * 5
    starts = [tuple(one.rows.start.tolist()) for one in some]
    assert starts[0] == starts[1]
    assert len(set(starts)) > 2
    assert all(list(one) == sorted(set(one)) for one in starts)
    whole = sampled(asked.night.visits, FIRST + NIGHT, 0, most=10_000)
    assert whole.rows.start.tolist() == asked.night.visits.rows.start.tolist()


def test_every_list_is_that_of_a_loop_over_users_and_items(rows, asked):
    """Each pair alone through the network, with the request of the user's first row and statistics as of the night."""
    lists = asked.lists()
    assert list(lists) == METHODS
    served = set()
    for user, start in enumerate(asked.visits.rows.start):
        slot = int(asked.bank.slots_of(rows, np.array([start]))[0])
        served.add(slot)
        scores = {method: [] for method in METHODS[:3]}
        for item, ids, newest in zip(
            asked.candidates.items, asked.candidates.ids, asked.candidates.newest, strict=True
        ):
            rates = asked.statistics.item[item]
            statistics = np.r_[rates, asked.statistics.user[rows.user[start]], rates[:2], 0]
            row = (
                rows.request_ids[start],
                ids,
                rows.request_numbers[start],
                rows.candidate_numbers[newest],
                statistics,
            )
            with torch.no_grad():
                logits, features = asked.base.network(*(torch.from_numpy(np.asarray(part)[None]) for part in row))
            logits, features = logits[0].numpy(), features[0].numpy()
            scores["candidate"].append(logits + asked.bank.weights[slot] @ features)
            scores["zero steps"].append(logits)
            scores["popularity"].append(rates[:2])
        for method, said in scores.items():
            for aim in range(2):
                mine = np.array(said)[:, aim]
                best = sorted(range(len(mine)), key=lambda at: (-mine[at], at))[:5]
                np.testing.assert_allclose(mine[lists[method][aim, user]], mine[best], atol=1e-5)
    assert len(served) > 4
    assert (lists["popularity"] == lists["popularity"][:, :1]).all()
    assert len(np.unique(lists["candidate"][0], axis=0)) > 3


def test_the_factorisation_says_of_a_candidate_what_it_says_of_a_row(rows, asked):
    rates = torch.from_numpy(asked.statistics.item[asked.candidates.items, :2])
    every = asked.factorisation.catalogue_scores(asked.visits, asked.candidates.items, rates).numpy()
    said = asked.factorisation.scores(asked.visits, np.zeros(len(asked.visits), np.int64)).numpy()
    at, visit = asked.visits.rows.flat()
    place = {item: number for number, item in enumerate(asked.candidates.items.tolist())}
    for row, user, expected in zip(at, visit, said, strict=True):
        np.testing.assert_allclose(every[user, place[rows.item[row]]], expected, atol=1e-5)
    lists = asked.lists()["matrix factorisation"]
    for aim in range(2):
        assert lists[aim].tolist() == np.argsort(-every[..., aim], axis=1, kind="stable")[:, :5].tolist()


def test_equal_scores_stay_in_the_order_of_the_catalogue():
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (4, 200, 2)).astype(np.float32))
    best = module._best(scores, 10)
    for aim in range(2):
        for user in range(4):
            order = sorted(range(200), key=lambda at: (-scores[user, at, aim].item(), at))
            assert best[aim, user].tolist() == order[:10]


@pytest.mark.parametrize(("bound", "most"), [("PAIRS", 30), ("NUMBERS", 30 * 15)])
def test_parts_are_as_good_as_the_whole(asked, monkeypatch, bound, most):
    whole = asked.lists()
    assert asked.night.material.width == 15
    assert len(list(module._blocks(14, 12, 15))) == 1
    monkeypatch.setattr(module, bound, most)
    assert [len(block) for block in module._blocks(14, 12, 15)] == [2] * 7
    parts = asked.lists()
    for method in METHODS:
        assert parts[method].tolist() == whole[method].tolist()


def test_no_label_of_the_night_and_nothing_later_changes_a_list(rows, asked):
    """Labels of the night are shuffled, its rows are of other items, and what comes later is something else."""
    random, before = np.random.default_rng(0), rows.night < FIRST + NIGHT
    tonight = rows.night == FIRST + NIGHT
    labels = np.where(before[:, None], rows.labels, random.permutation(rows.labels))
    item = np.where(before, rows.item, random.permutation(rows.item))
    ids = np.where(before[:, None], rows.candidate_ids, np.c_[item, random.integers(0, 4, len(rows))])
    numbers = np.where(before[:, None], rows.candidate_numbers, np.float32(77))
    later = np.where((before | tonight)[:, None], rows.request_ids, 1)
    changed = replace(
        with_labels(rows, labels), item=item, candidate_ids=ids, candidate_numbers=numbers, request_ids=later
    )
    other = Asked(changed, asked.base)
    other.statistics = asked.statistics  # as of the night: not of these rows
    expected, found = asked.lists(), other.lists()
    assert other.candidates.items.tolist() == asked.candidates.items.tolist()
    for method in METHODS:
        assert found[method].tolist() == expected[method].tolist()
    forgot = Asked(with_labels(rows, random.permutation(rows.labels)), asked.base)
    assert forgot.candidates.items.tolist() == asked.candidates.items.tolist()
    assert forgot.lists()["candidate"].tolist() != expected["candidate"].tolist()  # labels before the night do count
