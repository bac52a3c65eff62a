"""Alarms: each by name, on and off, and quiet where nothing can be known."""

import numpy as np
import pytest

from tasks.learning.intervals import Interval, paired_interval
from tasks.release.alarms import (
    convicted,
    forgetting,
    halves,
    harmful,
    inert,
    leaking,
    rates_by_category,
    rates_by_values,
    rates_by_vector,
    vanished,
)
from tasks.release.segment_gate import LevelHarm


def test_adaptation_that_changes_nothing_is_inert():
    scores = np.random.default_rng(0).random((50, 2)).astype(np.float32)
    alarm = inert(scores + 5e-7, scores)
    assert alarm is not None
    assert alarm.name == "inert"
    assert "over 100 predictions" in alarm.message


def test_one_changed_prediction_is_adaptation():
    scores = np.full((50, 2), 0.5)
    changed = scores.copy()
    changed[3, 1] += 1e-5
    assert inert(changed, scores) is None


def test_no_predictions_are_no_alarm():
    assert inert(np.empty((0, 1)), np.empty((0, 1))) is None


@pytest.mark.parametrize(
    ("interval", "alarms"),
    [
        (Interval(0.02, 0.001, 0.04, 50, 700), True),
        (Interval(0.02, 0.0, 0.04, 50, 700), False),
        (Interval(0.02, -0.001, 0.04, 50, 700), False),
        (Interval(-0.02, -0.04, -0.001, 50, 700), False),
        (paired_interval(np.empty(0), np.empty(0, np.int64), seed=0), False),
    ],
)
def test_only_an_interval_wholly_above_zero_is_harm(interval, alarms):
    found = harmful({"liked": interval}, 0.1)
    assert bool(found) is alarms
    assert all("+0.0200 [+0.0010, +0.0400]" in alarm.message for alarm in found)


def test_harm_to_one_of_many_objectives_is_held_to_the_false_discovery_rate():
    """One-sided p values of 0.0125 and 0.023: among eight without harm the limits of the first two ranks at a rate of
    0.1 are 0.01 and 0.02."""
    quiet = {f"objective {number}": Interval(0.0, -0.02, 0.02, 50, 700) for number in range(8)}
    harm = {"a": Interval(0.0224, 0.0028, 0.042, 50, 700), "b": Interval(0.02, 0.0004, 0.0396, 50, 700)}
    assert not harmful(quiet | harm, 0.1)
    first, second = harmful(quiet | harm, 0.2)
    assert "of objective a:" in first.message
    assert "of objective b:" in second.message


def test_a_convicted_step_and_segments_are_named_with_what_follows():
    tested = [
        {"tested": "support 1", "harmful": True, "estimate": 0.03, "rows": 90},
        {"tested": "support 2 to 3", "harmful": False, "estimate": 0.01, "rows": 40},
        *({"tested": f"zone {n}", "harmful": n < 7, "estimate": 0.1, "rows": 100 + n} for n in range(9)),
    ]
    harm = LevelHarm(convicted=tuple(f"zone {n}" for n in range(7)), steps=((1, 1),))
    alarm = convicted("zone", harm, tested, 0.1)
    assert alarm is not None
    assert alarm.name == "harmful"
    assert "to all with support 1 (+0.0300 per row over 90 rows) and to 7 by themselves, zone 0 (" in alarm.message
    assert "zone 4 (+0.1000 per row over 104 rows); they fall back" in alarm.message
    assert "support 2 to 3" not in alarm.message
    assert convicted("zone", LevelHarm(), tested, 0.1) is None
    alone, told = LevelHarm(convicted=("zone 0",)), tested[2:]
    assert [convicted("zone", alone, told, 0.1, share) is None for share in (0.01, 0.011, None)] == [True, False, False]
    assert convicted("zone", harm, tested, 0.1, 0.0) is not None  # a step that is proven is more than some users


def test_a_level_that_changes_nothing_is_named_beside_its_objective():
    same = np.full(30, 0.25)
    alarm = inert(same, same, "market", "stars")
    assert alarm is not None
    assert alarm.message.startswith("level market changes no prediction of objective stars: largest change 0.0e+00")
    assert "segments.levels" in alarm.message


def test_a_rating_that_is_given_away_is_heard_by_its_halves():
    stars = np.random.default_rng(0).integers(1, 6, 400).astype(float)
    labels = halves(stars)
    assert labels.tolist() == (stars > stars.mean()).astype(float).tolist()
    found = leaking(labels, {"copy": stars * 10, "honest": np.random.default_rng(1).random(400)}, "stars")
    assert [alarm.message.split(" apart")[0] for alarm in found] == [
        "input 'copy' alone tells tonight's labels of objective stars"
    ]


def test_only_an_interval_wholly_beyond_the_margin_is_forgetting():
    more, level = Interval(0.02, 0.006, 0.03, 50, 700), Interval(0.02, 0.005, 0.04, 60, 800)
    assert forgetting({0: level, 5: level}, 0.005) is None
    assert forgetting({}, 0.005) is None
    alarm = forgetting({0: level, 5: more}, 0.005)
    assert alarm is not None
    assert alarm.name == "forgetting"
    assert "+0.0200 [+0.0060, +0.0300] per row after 5 rows of support, over 50 users and 700 rows" in alarm.message
    better = Interval(-0.02, -0.04, -0.006, 50, 700)
    assert forgetting({0: better, 5: better, 20: paired_interval(np.empty(0), np.empty(0, np.int64), 0)}, 0.0) is None


def test_large_segments_that_are_gone_are_named_largest_first():
    alarm = vanished("market", np.array(["de", "fr", "it", "es"]), np.array([150, 99, 900, 400]), np.array(["es"]), 100)
    assert alarm is not None
    assert "of 3 market segments" in alarm.message
    assert "2 have none tonight: it (900 rows), de (150 rows);" in alarm.message


def test_a_hundred_lost_segments_are_counted_and_five_named():
    alarm = vanished("market", np.arange(100), np.full(100, 200), np.empty(0, np.int64), 100)
    assert alarm is not None
    assert "100 have none tonight: 0 (200 rows), 1 (200 rows), 2" in alarm.message
    assert alarm.message.count("(200 rows)") == 5


@pytest.mark.parametrize("rows", [[99, 99], []])
def test_small_segments_may_go_without_an_alarm(rows):
    assert vanished("market", np.arange(len(rows)), np.array(rows, np.int64), np.empty(0, np.int64), 100) is None


def world(rows=400, seed=0):
    random = np.random.default_rng(seed)
    labels = (random.random(rows) < 0.3).astype(np.float32)
    honest = labels + random.normal(0, 1.0, rows)
    return labels, honest.astype(np.float32)


def test_a_planted_leak_is_caught_whichever_way_it_points():
    labels, honest = world()
    named = [
        alarm.message.split("'")[1] for alarm in leaking(labels, {"honest": honest, "copy": labels, "inverse": -labels})
    ]
    assert named == ["copy", "inverse"]


def test_a_value_that_is_missing_where_the_label_is_one_leaks():
    labels, honest = world()
    (alarm,) = leaking(labels, {"seconds_watched": np.where(labels == 1, np.nan, honest)})
    assert alarm.name == "leaking"
    assert "'seconds_watched'" in alarm.message


def test_a_category_is_heard_through_the_rows_beside_it():
    """By a loop over the rows: the mean of the other half's rows of the category, and one row of the mean.

    Of a single row's label only the other half hears: that tells the halves.
    """
    random = np.random.default_rng(0)
    labels, ids = (random.random(61) < 0.4).astype(float), random.integers(0, 9, 61)
    labels[::10] = np.nan
    first = np.zeros(61)
    first[1] = 1.0  # row 0 has no label
    other = rates_by_category(first, np.zeros(61, int)) > 0
    assert abs(int(other.sum()) - 30.5) == 0.5
    assert not other[1]
    expected = []
    for row in range(61):
        others = [at for at in range(61) if other[at] != other[row] and not np.isnan(labels[at])]
        alike = [labels[at] for at in others if ids[at] == ids[row]]
        expected.append((sum(alike) + np.mean(labels[others])) / (len(alike) + 1))
    np.testing.assert_allclose(rates_by_category(labels, ids), expected)


def test_a_category_that_is_the_outcome_leaks_and_one_of_a_row_each_does_not():
    labels, _ = world()
    outcome, session = np.where(labels > 0, 3, 1), np.arange(len(labels))
    noise = np.random.default_rng(1).integers(0, 40, len(labels))
    told = {"outcome": outcome, "session": session, "noise": noise}
    (alarm,) = leaking(labels, {name: rates_by_category(labels, ids) for name, ids in told.items()})
    assert "'outcome'" in alarm.message


def test_nothing_leaks_because_positives_and_negatives_take_turns():
    """One sampled negative behind each positive, as logs have it."""
    labels = np.tile([1.0, 0.0], 200)
    told = {"constant": np.zeros(400, int), "noise": np.random.default_rng(1).integers(0, 40, 400)}
    assert leaking(labels, {name: rates_by_category(labels, ids) for name, ids in told.items()}) == ()


def test_infinite_values_do_not_break_the_search():
    labels, honest = world()
    assert leaking(labels, {"odd": np.where(np.arange(400) % 3 == 0, np.inf, honest)}) == ()


def test_rows_without_a_label_are_left_out():
    labels, _ = world()
    (alarm,) = leaking(np.append(labels, np.full(50, np.nan)), {"copy": np.append(labels, np.zeros(50))})
    assert "AUC 1.000 over 400 rows" in alarm.message


@pytest.mark.parametrize("positives", [0, 19, 381, 400])
def test_too_few_rows_of_a_class_prove_nothing(positives):
    labels = (np.arange(400) < positives).astype(np.float32)
    assert leaking(labels, {"copy": labels}) == ()


def lists(labels, leak):
    """Up to four values a row of forty that say nothing, and one more where a leak is to be."""
    values = np.random.default_rng(2).integers(-1, 40, (len(labels), 5))
    values[:, 4] = np.where((labels > 0) & leak, 40, -1)
    return values


def test_one_value_that_gives_the_outcome_away_leaks_among_others_that_do_not():
    labels, _ = world()
    (alarm,) = leaking(
        labels, {name: rates_by_values(labels, lists(labels, name == "leak")) for name in ("ok", "leak")}
    )
    assert "'leak'" in alarm.message


def test_having_no_values_may_be_the_leak():
    labels, _ = world()
    values = np.where(labels[:, None] > 0, -1, np.random.default_rng(2).integers(0, 40, (len(labels), 3)))
    assert leaking(labels, {"tags": rates_by_values(labels, values)})


def test_lists_of_one_value_rank_rows_as_their_categories_do():
    labels, _ = world()
    ids = np.random.default_rng(3).integers(0, 9, len(labels))
    told, rates = rates_by_values(labels, ids[:, None]), rates_by_category(labels, ids)
    for mine in (rates_by_category(np.arange(400) == 1, np.zeros(400, int)) > 0,):
        for half in (mine, ~mine):
            assert np.array_equal(np.argsort(told[half], kind="stable"), np.argsort(rates[half], kind="stable"))


def test_a_vector_that_points_to_the_outcome_leaks_and_one_that_does_not_is_quiet():
    labels, _ = world()
    vectors = np.random.default_rng(4).normal(size=(400, 30)).astype(np.float32)
    leaking_ones = vectors.copy()
    leaking_ones[:, :10] += 2 * labels[:, None]  # no number of it leaks by itself
    assert leaking(labels, {str(at): leaking_ones[:, at] for at in range(30)}) == ()
    told = {"honest": rates_by_vector(labels, vectors), "leak": rates_by_vector(labels, leaking_ones)}
    (alarm,) = leaking(labels, told)
    assert "'leak'" in alarm.message
    holed = np.where(labels[:, None] > 0, np.nan, vectors)
    assert leaking(labels, {"missing": rates_by_vector(labels, holed)})
