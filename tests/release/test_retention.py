"""Golden nights: which they are, whose rows are drawn, and what is said of them, by hand on small tables."""

from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest

from tasks.data.contract import ObjectiveConfig
from tasks.learning.intervals import Interval
from tasks.learning.material import Visits, Windows
from tasks.release.gate import GateConfig, GoldenConfig
from tasks.release.retention import Chosen, against_parent, drawn, golden_nights, in_words, retained

CLICKED = ObjectiveConfig(name="clicked", column="clicked", kind="binary")
FIRST = date(2026, 3, 1)
"""Its ordinal is a multiple of 7 and of 28."""


def days(*numbers: int) -> list[date]:
    return [FIRST + timedelta(days=number) for number in numbers]


def test_the_same_nights_are_golden_for_as_long_as_they_are_in_the_window():
    """Night after night for two months, a window of 30 nights, a lake with a gap on a block's first day."""
    lake = [FIRST + timedelta(days=number) for number in range(90) if number not in (14, 15)]
    seen: dict[date, list[date]] = {}
    for number in range(30, 90):
        night = FIRST + timedelta(days=number)
        window = night - timedelta(days=30)
        clean = [one for one in lake if window <= one < night]
        found = golden_nights(GoldenConfig(every=7), window, clean, night - timedelta(days=3)).nights
        assert set(found) <= set(clean)
        for one in found:
            seen.setdefault(one, []).append(night)
    assert sorted(seen) == days(0, 7, 16, *range(21, 86, 7))
    for golden, compared in seen.items():
        assert [one - compared[0] for one in compared] == [timedelta(days=at) for at in range(len(compared))]
        block = golden - timedelta(days=golden.toordinal() % 7)
        last = min(block + timedelta(days=30), FIRST + timedelta(days=89))
        assert (compared[0], compared[-1]) == (max(golden + timedelta(days=3), FIRST + timedelta(days=30)), last)


def test_a_night_that_comes_late_or_is_gone_does_not_change_which_nights_are_golden():
    config, clean = GoldenConfig(every=7), days(1, 2, 8, 9, 10)
    first = golden_nights(config, FIRST, clean, days(9)[0])
    assert first.nights == tuple(days(1, 8))
    later = golden_nights(
        config, FIRST, [*days(0), *(one for one in clean if one != first.nights[1])], days(10)[0], first.nights
    )
    assert later.nights == tuple(days(1))
    assert later.left_out == {days(8)[0]: "it was compared before, and is no clean night any more"}
    # A block that has left the window does not come back, and what the parent has not read is not asked for.
    assert golden_nights(config, days(7)[0], clean, days(9)[0], first.nights).nights == tuple(days(8))
    assert golden_nights(config, FIRST, clean, days(7)[0], first.nights) == Chosen(tuple(days(1)), {})


def test_named_nights_that_cannot_be_compared_are_named_with_the_reason():
    clean = days(0, 1, 2, 3)
    config = GoldenConfig(nights=tuple(days(3, 1, 9, 1)))
    found = golden_nights(config, FIRST, clean, through=days(2)[0])
    assert found.nights == tuple(days(1))
    assert found.left_out == {
        days(3)[0]: "the parent's training has read nights through 2026-03-03 only",
        days(9)[0]: "no clean night of the window",
    }
    assert golden_nights(GoldenConfig(nights=()), FIRST, clean, days(3)[0]).nights == ()


def test_users_are_drawn_whole_until_a_night_has_its_rows_whatever_their_ids_are():
    random = np.random.default_rng(0)
    lengths, night = random.integers(1, 9, 60), np.repeat([10, 20], 30)
    start = np.cumsum(lengths) - lengths
    visits = Visits(Windows(start, start + lengths), start, night)
    tie = random.integers(-(2**62), 2**62, int(lengths.sum()))
    few = drawn(visits, tie, rows=40, seed=0)
    for one in (10, 20):
        mine = few.rows.lengths[few.night == one]
        assert 40 <= mine.sum() < 40 + 9
    assert (np.diff(few.rows.start) > 0).all()

    def first_ties(drawn_ones: Visits, of: np.ndarray) -> set[int]:
        return set(of[drawn_ones.rows.start].tolist())

    # The same rows under other ids, so in another order, are the same draw; another seed is another.
    order = np.concatenate([random.permutation(30), 30 + random.permutation(30)])
    moved = np.cumsum(lengths[order]) - lengths[order]
    tie_moved = np.concatenate([tie[start[at] : start[at] + lengths[at]] for at in order])
    again = drawn(Visits(Windows(moved, moved + lengths[order]), moved, night[order]), tie_moved, rows=40, seed=0)
    assert first_ties(again, tie_moved) == first_ties(few, tie)
    assert first_ties(drawn(visits, tie, rows=40, seed=1), tie) != first_ties(few, tie)
    # More rows only add users.
    assert first_ties(few, tie) < first_ties(drawn(visits, tie, rows=80, seed=0), tie)
    assert len(drawn(visits, tie, rows=10**6, seed=0)) == 60


def golden_rows() -> pa.Table:
    """Six users on one golden night and two of them on another; the candidate errs where the parent did not."""
    said = {
        "candidate": [0.5] * 8,
        "parent": [0.25, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
        "zero steps": [0.5, 0.5, 0.5, 0.5, 0.2, 0.2, 0.5, 0.5],
    }
    columns = {
        "user": ["a", "b", "c", "d", "e", "f", "a", "b"],
        "at": np.zeros(8, np.int32),
        "night": np.array([FIRST.toordinal()] * 6 + [FIRST.toordinal() + 28] * 2, np.int32),
        "label/clicked": np.array([0, 1, 0, 1, 0, 1, 1, 0], np.float32),
    }
    for k in (0, 5, 20):
        for method, values in said.items():
            columns[f"contact {k}/{method}/clicked"] = np.array(values if k < 20 else [np.nan] * 8, np.float32)
    return pa.table(columns)


def test_what_is_retained_of_a_small_table_by_hand():
    figures = retained(golden_rows(), CLICKED)
    found = {(one["k"], one["method"]): Interval.from_json(one["interval"]) for one in figures["pooled"]}
    assert set(found) == {(k, method) for k in (0, 5, 20) for method in ("parent", "zero steps")}
    # log 0.5 where the parent has log 0.75, twice, over eight rows of six users.
    lost = 2 * (np.log(0.75) - np.log(0.5)) / 8
    assert found[0, "parent"].estimate == pytest.approx(lost, rel=1e-6)
    assert (found[0, "parent"].users, found[0, "parent"].rows) == (6, 8)
    assert found[5, "zero steps"].estimate == pytest.approx(
        ((np.log(0.8) - np.log(0.5)) + (np.log(0.2) - np.log(0.5))) / 8, rel=1e-6
    )
    assert found[20, "parent"].rows == 0
    nights = {one["night"]: Interval.from_json(one["interval"]) for one in figures["nights"]}
    assert nights["2026-03-01"].estimate == pytest.approx(lost * 8 / 6, rel=1e-6)
    assert nights["2026-03-29"].estimate == 0.0
    assert (nights["2026-03-29"].users, nights["2026-03-29"].rows) == (2, 2)
    # A support that leaves no rows is no evidence.
    assert sorted(against_parent(figures)) == [0, 5]
    assert in_words(figures, [("2026-01-01", "gone")]).endswith(
        "against the parent, on 2 golden nights; left out: 2026-01-01 (gone)"
    )


def test_a_config_without_golden_settings_is_dumped_as_it_was():
    """Digests of configs and keys of steps are made of dumps."""
    assert "golden" not in GateConfig().model_dump(mode="json")
    assert GateConfig(golden=GoldenConfig(every=7)).model_dump(mode="json")["golden"]["every"] == 7


@pytest.mark.parametrize("window_nights", [2, 7, 14, 21, 28, 55, 120])
def test_every_night_of_a_daily_lake_has_a_golden_one_in_its_window(window_nights: int) -> None:
    config, first = GoldenConfig().within(window_nights), date(2026, 1, 1)
    for day in range(300):
        window = first + timedelta(days=day)
        clean = [window + timedelta(days=at) for at in range(window_nights)]
        chosen = golden_nights(config, window, clean, clean[-1])
        assert chosen.nights
        assert set(chosen.nights) <= set(clean)
