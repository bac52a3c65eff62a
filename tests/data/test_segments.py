"""The ladder: keys, groups, order and parents."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.contract import SegmentsConfig
from tasks.data.segments import build_levels, check_levels, mixed_radix, split_keys
from tasks.errors import InvalidConfig
from tests.data.small_nights import contract

ROWS = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(0, 2), st.integers(0, 1), st.integers(0, 2), st.integers(-(2**63), 2**63 - 1)
    ),
    max_size=30,
    unique_by=lambda row: row[4],
)  # user, device, band, time, tie


@given(data=st.data(), radices=st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_a_key_is_the_number_whose_digits_are_the_ids(data: st.DataObject, radices: list[int]) -> None:
    rows = data.draw(st.lists(st.tuples(*(st.integers(0, radix - 1) for radix in radices)), min_size=1, max_size=9))
    ids = np.array(rows, np.int64)
    keys = mixed_radix(list(ids.T), radices, "test")
    weights = [math.prod(radices[position + 1 :]) for position in range(len(radices))]
    assert keys.tolist() == [sum(w * i for w, i in zip(weights, row, strict=True)) for row in rows]
    assert split_keys(keys, radices).tolist() == ids.tolist()


def test_the_largest_key_that_fits_is_taken() -> None:
    ids = [np.array([2**32 - 1]), np.array([2**31 - 1])]
    keys = mixed_radix(ids, (2**32, 2**31), "test")
    assert keys.tolist() == [2**63 - 1]
    assert split_keys(keys, (2**32, 2**31)).tolist() == [[2**32 - 1, 2**31 - 1]]


def test_keys_that_would_not_fit_are_refused_by_name_and_number() -> None:
    with pytest.raises(InvalidConfig, match=r"segment level \[a, b\] has 4294967296 x 2147483649 = .* possible keys"):
        mixed_radix([np.zeros(1, np.int64)] * 2, (2**32, 2**31 + 1), "segment level [a, b]")


@given(rows=ROWS)
def test_the_levels_equal_a_slow_grouping(rows: list[tuple[int, int, int, int, int]]) -> None:
    table = np.array(rows, np.int64).reshape(-1, 5)
    user, device, band, time, tie = table.T
    config = SegmentsConfig(levels=(("shopper",), ("device", "band")))
    ids = {"shopper": user, "device": device, "band": band}
    fine, coarse = build_levels(config, ids, {"shopper": 5, "device": 3, "band": 2}, time, tie)
    for level, key_of in ((fine, lambda row: row[0]), (coarse, lambda row: row[1] * 2 + row[2])):
        groups: dict[int, list[int]] = {}
        for position in sorted(range(len(rows)), key=lambda position: rows[position][3:]):
            groups.setdefault(key_of(rows[position]), []).append(position)
        assert level.keys.tolist() == sorted(groups)
        assert level.size == len(groups)
        assert level.segment.tolist() == [sorted(groups).index(key_of(row)) for row in rows]
        assert [level.order[level.offsets[g] : level.offsets[g + 1]].tolist() for g in range(level.size)] == [
            groups[key] for key in sorted(groups)
        ]
        assert level.offsets[-1] == len(rows)
    newest = fine.order[fine.offsets[1:] - 1]
    assert fine.parent.tolist() == coarse.segment[newest].tolist()
    assert coarse.parent.tolist() == [-1] * coarse.size
    assert (fine.columns, fine.radices) == (("shopper",), (5,))
    assert (coarse.columns, coarse.radices) == (("device", "band"), (3, 2))


def test_a_segment_whose_rows_moved_stands_on_the_parent_of_its_newest_row() -> None:
    config = SegmentsConfig(levels=(("shopper",), ("device",)))
    ids = {"shopper": np.array([1, 1, 1]), "device": np.array([2, 1, 2])}
    fine, coarse = build_levels(config, ids, {"shopper": 2, "device": 3}, np.array([5, 9, 7]), np.array([0, 0, 0]))
    assert fine.order.tolist() == [0, 2, 1]
    assert coarse.keys[fine.parent].tolist() == [1]


@pytest.mark.parametrize(
    ("levels", "complaint"),
    [
        ((("hour",),), "names hour: a segment is made of the user column or categorical request columns"),
        ((("product",),), "names product"),
        ((("clicked",),), "names clicked"),
        ((("brand",),), "names brand"),
        ((("device", "device"),), "names a column twice: device, device"),
        ((("device", "band"), ("band", "device")), "repeats an earlier level: band, device"),
    ],
)
def test_a_ladder_that_no_request_can_climb_is_refused(levels: tuple[tuple[str, ...], ...], complaint: str) -> None:
    with pytest.raises(InvalidConfig, match=complaint):
        check_levels(contract(), SegmentsConfig(levels=levels))


def test_a_ladder_of_user_and_categorical_request_columns_is_taken() -> None:
    check_levels(contract(), SegmentsConfig(levels=(("shopper",), ("device", "band"), ("device",))))
