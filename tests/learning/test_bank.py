"""Banks against the slow ladder, the plan of a visit without rows of its own night, and themselves on disk."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tasks.learning import bank as module
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.bank import Bank, fill_bank
from tasks.learning.episodes import score_visits
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tests.learning.slow_ladder import CROSSED, KINDS, THREE, SlowLadder, precisions_of, world
from tests.learning.small_rows import FIRST, ladder_of, part, table, told, with_labels

SEEDS = range(6)
RIDGE = AdapterConfig()


def bank_of(rows, segments, night, scorer=None, harmful=None, config=RIDGE, width=3):
    ladder, levels = Ladder(rows, segments, "shopper"), len(segments.levels)
    return fill_bank(
        ladder, Material(rows), scorer or told(rows), precisions_of(levels, width=width),
        Adaptation(KINDS, config), FIRST + night, harmful,
    )  # fmt: skip


def oracle_of(rows, segments, scorer, **more):
    return SlowLadder(
        rows, segments, scorer.logits, scorer.features, precisions_of(len(segments.levels)), KINDS, **more
    )


def key(rows, level, *ids):
    """Mixed-radix key of a segment."""
    number = 0
    for value, radix in zip(ids, rows.levels[level].radices, strict=True):
        number = number * radix + value
    return number


@pytest.mark.parametrize("levels", [THREE, CROSSED])
@pytest.mark.parametrize("limits", [{}, {"min_support": 4}, {"max_support": 5}])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_is_served_by_the_weights_of_the_slow_ladder(seed, levels, limits):
    """Where a region lies in several markets, a row without a bank entry resolves through its own columns."""
    rows, segments, scorer = world(seed, levels), ladder_of(levels, **limits), None
    scorer = told(rows, seed=seed)
    bank = bank_of(rows, segments, 3, scorer)
    oracle = oracle_of(rows, segments, scorer)
    slots = bank.slots_of(rows, np.arange(len(rows)))
    checked = 0
    for row, slot in enumerate(slots):
        thin = len(oracle.earlier(0, row, FIRST + 3)) < segments.min_support
        if levels is CROSSED and thin and oracle.earlier(1, row, FIRST + 3):
            continue  # its region's weights stand on the market of the region's newest row
        np.testing.assert_allclose(bank.weights[slot], oracle.serving(row, FIRST + 3), atol=2e-6)
        checked += 1
    assert checked > len(rows) / 2


@pytest.mark.parametrize("levels", [THREE, CROSSED])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_bank_says_what_the_plan_says_for_users_with_support(seed, levels):
    rows, segments, scorer = world(seed, levels), ladder_of(levels, min_support=2), told(world(seed, levels))
    ladder, visits = Ladder(rows, segments, "shopper"), visits_of(rows).of_nights(FIRST + 3, FIRST + 3)
    visits = visits.take(np.flatnonzero(visits.rows.start - visits.first >= 2))
    assert len(visits) > 0
    scores = score_visits(
        ladder,
        visits,
        np.zeros(len(visits), np.int64),
        scorer,
        Material(rows),
        precisions_of(3),
        Adaptation(KINDS, RIDGE),
    )
    bank = bank_of(rows, segments, 3, scorer)
    weights = bank.weights[bank.slots_of(rows, scores.rows)]
    said = scorer.logits[scores.rows].numpy() + np.einsum("td,tkd->tk", scorer.features[scores.rows].numpy(), weights)
    np.testing.assert_allclose(said, scores.adapted.numpy(), atol=2e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_the_night_and_later_change_nothing(seed):
    rows, segments, scorer = world(seed), ladder_of(THREE), told(world(seed))
    bank = bank_of(rows, segments, 3, scorer)
    late = np.asarray(rows.night) >= FIRST + 3
    other = bank_of(with_labels(rows, np.where(late[:, None], 1 - rows.labels, rows.labels)), segments, 3, scorer)
    assert np.array_equal(bank.weights, other.weights)
    kept = np.flatnonzero(~late)
    earlier = type(scorer)(scorer.logits[kept], scorer.features[kept])
    without = bank_of(part(rows, kept, THREE), segments, 3, earlier)
    np.testing.assert_allclose(bank.weights, without.weights, atol=1e-7)
    for mine, theirs in zip(bank.levels, without.levels, strict=True):
        for name in vars(mine):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


def test_the_base_is_slot_0_and_slots_are_numbered_from_the_coarsest_by_key():
    bank = bank_of(world(0), ladder_of(THREE), 3)
    assert not bank.weights[0].any()
    assert bank.weights.dtype == np.float32
    numbered = np.concatenate([level.slots for level in reversed(bank.levels)])
    assert numbered.tolist() == list(range(1, len(bank.weights)))
    for at, level in enumerate(bank.levels):
        assert (np.diff(level.keys) > 0).all()
        assert (level.support >= 1).all()
        assert set(level.parent) <= {0}.union(*(above.slots for above in bank.levels[at + 1 :]))


def test_support_counts_the_rows_that_were_read():
    rows = table([1] * 5 + [2], [0] * 5 + [0])
    bank = bank_of_one(rows, ladder_of(max_support=3))
    assert bank.levels[0].support.tolist() == [3, 1]
    assert bank.levels[1].support.tolist() == [3]


def bank_of_one(rows, segments, night=1, **more):
    levels = len(segments.levels)
    return fill_bank(Ladder(rows, segments, "shopper"), Material(rows), told(rows), precisions_of(levels, 1),
                     Adaptation(("binary",), RIDGE), FIRST + night, **more)  # fmt: skip


def test_a_night_without_history_has_only_the_base():
    bank = bank_of_one(table([1, 2], [1, 1]), ladder_of())
    assert bank.weights.shape == (1, 1, 3)
    assert bank.slots_of(table([1, 2], [1, 1]), np.arange(2)).tolist() == [0, 0]


def test_the_leaves_with_most_support_stay_and_the_rest_use_their_parent():
    rows = table([1, 2, 2, 2, 3, 3, 4, 4], [0] * 8)
    bank = bank_of_one(rows, ladder_of(max_leaves=2))
    assert bank.levels[0].keys.tolist() == [2, 3]  # of 3 and 4, which have as many rows, the smaller key
    market = bank.levels[1].slots[0]
    slots = bank.slots_of(rows, np.arange(len(rows)))
    assert [slot == market for slot in slots] == [user not in (2, 3) for user in rows.user]


def test_max_leaves_does_not_bound_the_coarser_levels():
    rows = table([1, 2, 3], [0] * 3, market=[1, 2, 3])
    bank = bank_of_one(rows, ladder_of(max_leaves=1))
    assert [len(level.keys) for level in bank.levels] == [1, 3]


def test_unknown_users_and_segments_get_no_slot():
    rows = table([0, 0, 1, 2], [0, 0, 0, 0], market=[1, 0, 0, 0])
    bank = bank_of_one(rows, ladder_of())
    assert bank.levels[0].keys.tolist() == [1, 2]
    assert bank.levels[1].keys.tolist() == [1]
    by_row = bank.slots_of(rows, np.arange(4))
    known = {"user": bank.levels[0].slots, "market": bank.levels[1].slots}
    at = {(int(u), int(m)): int(s) for u, m, s in zip(rows.user, rows.request_ids[:, 0], by_row, strict=True)}
    assert at == {(0, 1): known["market"][0], (0, 0): 0, (1, 0): known["user"][0], (2, 0): known["user"][1]}
    assert bank.levels[0].parent.tolist() == [0, 0]


def test_a_thin_segment_between_hands_its_parents_weights_on():
    """The user's region has too few rows for weights of its own; his weights stand on those of his market."""
    rows = table([1] * 3 + [2] * 5, [0] * 8, market=[1] * 8, region=[1] * 3 + [2] * 5, levels=THREE)
    segments = ladder_of(THREE, min_support=4)
    bank = bank_of_one(rows, segments)
    assert [len(level.keys) for level in bank.levels] == [1, 1, 1]
    thin = bank_of_one(table([1] * 3 + [2], [0] * 4, market=[1] * 4, region=[1, 1, 1, 2], levels=THREE),
                       ladder_of(THREE, min_support=2))  # fmt: skip
    assert [len(level.keys) for level in thin.levels] == [1, 1, 1]
    rows = table([1, 1, 2, 2], [0] * 4, market=[1] * 4, region=[1, 2, 3, 4], levels=THREE)
    bank = bank_of_one(rows, ladder_of(THREE, min_support=2))
    assert [len(level.keys) for level in bank.levels] == [2, 0, 1]
    market = bank.levels[2].slots[0]
    assert bank.levels[0].parent.tolist() == [market, market]


@pytest.mark.parametrize("seed", SEEDS)
def test_harmful_segments_fall_back_to_their_parent_and_children_are_solved_on_that(seed):
    rows, segments, scorer = world(seed), ladder_of(THREE), told(world(seed))
    refused = [(0, (3,)), (1, (1, 1)), (1, (2, 3)), (2, (2,))]
    keys_of = [sorted(key(rows, level, *ids) for at, ids in refused if at == level) for level in range(3)]
    bank = bank_of(rows, segments, 4, scorer, lambda level, keys, support: np.isin(keys, keys_of[level]))
    oracle = oracle_of(rows, segments, scorer, refused=refused)
    everything = bank_of(rows, segments, 4, scorer)
    for mine, theirs, keys in zip(bank.levels, everything.levels, keys_of, strict=True):
        assert mine.refused.tolist() == [one for one in keys if one in theirs.keys]
        assert mine.keys.tolist() == [one for one in theirs.keys if one not in keys]
    slots = bank.slots_of(rows, np.arange(len(rows)))
    for row, slot in enumerate(slots):
        np.testing.assert_allclose(bank.weights[slot], oracle.serving(row, FIRST + 4), atol=2e-6)
    assert len(everything.weights) > len(bank.weights)
    for level in bank.levels:  # nobody stands on a slot that is not there
        assert level.parent.max(initial=0) < len(bank.weights)


def test_where_nobody_is_refused_nothing_changes():
    plain = bank_of(world(0), ladder_of(THREE), 4)
    same = bank_of(world(0), ladder_of(THREE), 4, harmful=lambda level, keys, support: np.zeros(len(keys), bool))
    assert np.array_equal(plain.weights, same.weights)
    assert [len(level.refused) for level in (*plain.levels, *same.levels)] == [0] * 6


def test_it_is_asked_about_segments_that_have_the_rows_with_the_rows_that_are_read():
    rows = table([1] * 5 + [2] * 3 + [3], [0] * 9, market=[1] * 8 + [2])
    asked = {}

    def refuse(level, keys, support):
        asked[level] = dict(zip(keys.tolist(), support.tolist(), strict=True))
        return support == 3

    bank = bank_of_one(rows, ladder_of(min_support=2, max_support=4), harmful=refuse)
    assert asked == {0: {1: 4, 2: 3}, 1: {1: 4}}
    assert [level.keys.tolist() for level in bank.levels] == [[1], [1]]
    assert [level.refused.tolist() for level in bank.levels] == [[2], []]


def test_slots_resolve_the_finest_level_that_knows_the_row():
    rows = world(0)
    bank = bank_of(rows, ladder_of(THREE, min_support=4), 2)
    place = {(at, int(k)): int(s) for at, lv in enumerate(bank.levels) for k, s in zip(lv.keys, lv.slots, strict=True)}
    seen = set()
    for row, slot in enumerate(bank.slots_of(rows, np.arange(len(rows)))):
        keys = [(at, int(level.keys[level.segment[row]])) for at, level in enumerate(rows.levels)]
        known = [pair for pair in keys if pair in place]
        assert slot == (place[known[0]] if known else 0)
        seen.add(known[0][0] if known else -1)
    assert seen == {0, 1, 2, -1}


@pytest.mark.parametrize("kind", ["none", "bias", "ridge", "gradient"])
def test_a_bank_comes_back_from_disk_and_equal_banks_are_equal_bytes(kind, tmp_path):
    rows, config = world(0), AdapterConfig(kind=kind)
    banks = [bank_of(rows, ladder_of(THREE), 3, config=config, width=config.width(3)) for _ in range(2)]
    for number, bank in enumerate(banks):
        bank.save(tmp_path / f"{number}")
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    back = Bank.load(tmp_path / "0")
    assert np.array_equal(back.weights, banks[0].weights)
    assert back.weights.shape[1:] == (2, config.width(3))
    assert len(back.levels) == 3
    for mine, theirs in zip(back.levels, banks[0].levels, strict=True):
        for name in vars(mine):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
    at = np.arange(len(rows))
    assert np.array_equal(back.slots_of(rows, at), banks[0].slots_of(rows, at))


def test_bytes_are_those_on_disk(tmp_path):
    bank = bank_of(world(0), ladder_of(THREE, min_support=4), 3)
    bank.save(tmp_path / "bank")
    tables = load_file(tmp_path / "bank")
    of_level = [
        sum(table.nbytes for name, table in tables.items() if name.startswith(f"level{at}.")) for at in range(3)
    ]
    slot = 2 * 3 * 4  # objectives, features, bytes of a float32
    assert bank.bytes == [own + slot * len(level.keys) for own, level in zip(of_level, bank.levels, strict=True)]
    assert sum(bank.bytes) + slot == sum(table.nbytes for table in tables.values())


def test_milliseconds_of_a_level_are_those_of_its_own_rows(monkeypatch):
    """By a clock that moves by a second for every row that is scored."""
    rows, clock = world(0), [0.0]
    scorer = told(rows)

    def slow(at):
        clock[0] += len(at)
        return scorer(at)

    monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    milliseconds = []
    segments = ladder_of(THREE, min_support=4)
    bank = fill_bank(
        *(Ladder(rows, segments, "shopper"), Material(rows), slow, precisions_of(3)),
        *(Adaptation(KINDS, RIDGE), FIRST + 3),
        milliseconds=milliseconds,
    )
    support = [level.support.sum() for level in bank.levels]
    assert len(set(support)) > 1
    assert milliseconds == [1000.0 * rows for rows in support]


def test_filling_a_bank_leaves_no_gradient_behind():
    rows = world(0)
    scorer = told(rows)
    scorer.features.requires_grad_()
    bank = bank_of(rows, ladder_of(THREE), 3, scorer)
    assert isinstance(bank.weights, np.ndarray)
    assert torch.is_grad_enabled()
