"""Requests with a user's history: what a caller may pass, what is cut and filled up, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest

from tasks.errors import ReleaseRefused, RequestRejected
from tasks.release.interface import InputSpec, Interface, LevelSpec, Objective, read_interface
from tasks.release.strict_json import Reader
from tasks.serving.requests import read_request
from tests.releases import NIGHT

LEAST = -(2**63)
SPECS = (
    InputSpec("user", "request", "string", "", ""),
    InputSpec("item", "candidate", "int64", "", LEAST),
    InputSpec("at", "request", "int64", "", LEAST),
    InputSpec("history_item", "request", "int64", "", LEAST, (3, 4), 3, "item"),
    InputSpec("history_genre", "request", "string", "", "", ("new", ""), 3, "genre"),
    InputSpec("history_liked", "request", "float32", "", None, (1.0, None), 3, "liked"),
)
REQUEST = {
    "user": ["ann", "bob", "eve"],
    "item": [[1], [2], [3]],
    "at": [9, 9, None],
    "history_item": [[7, 8, 9, 10, 11], [7], None],
    "history_genre": [["new", None, "ü", "old", "old"], ["new"], []],
    "history_liked": [[1, None, 0, 1, 1], [True], None],
}


def test_the_newest_entries_are_taken_and_short_histories_are_filled_up():
    arrays, shape = read_request(SPECS, json.loads(json.dumps(REQUEST)))
    assert shape == (3, 1)
    assert arrays["at"].tolist() == [9, 9, LEAST]
    assert arrays["history_item"].tolist() == [[7, 8, 9], [7, LEAST, LEAST], [LEAST] * 3]
    assert arrays["history_genre"].tolist() == [["new", "", "ü"], ["new", "", ""], [""] * 3]
    liked = np.array([[1, np.nan, 0], [1, np.nan, np.nan], [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(arrays["history_liked"], liked, strict=True)


def test_arrays_may_be_of_any_length():
    plain, _ = read_request(SPECS, REQUEST)
    item = np.array([[7, 8, 9, 10], [7, LEAST, LEAST, LEAST], [LEAST] * 4], np.int64)
    genre = np.array([["new", "", "ü", "old"], ["new", "", "", ""], [""] * 4], object)
    liked = np.array([[1, np.nan, 0, 1], [1, np.nan, np.nan, np.nan], [np.nan] * 4])
    for width in (4, 3):
        cut = {name: part[:, :width] for name, part in zip(list(REQUEST)[3:], (item, genre, liked), strict=True)}
        again, _ = read_request(SPECS, REQUEST | cut)
        for name, values in plain.items():
            np.testing.assert_array_equal(again[name], values, err_msg=name, strict=True)
    none, _ = read_request(SPECS, REQUEST | {name: np.zeros((3, 0)) for name in ("history_item", "history_liked")} | {
        "history_item": np.zeros((3, 0), np.int64), "history_genre": [[], [], []],
    })  # fmt: skip
    assert none["history_item"].tolist() == [[LEAST] * 3] * 3
    assert np.isnan(none["history_liked"]).all()


def test_no_requests_have_no_histories():
    arrays, shape = read_request(SPECS, {name: [] for name in REQUEST} | {"item": np.zeros((0, 2), np.int64)})
    assert shape == (0, 2)
    assert [arrays[name].shape for name in list(REQUEST)[3:]] == [(0, 3)] * 3


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("history_liked", [[1], [1], None], "request 0 has 5 entries in 'history_genre' and 1 in 'history_liked'; giv"),
        ("history_item", [7, [7], None], "'history_item' holds 7 of type int for request 0, expected a list"),
        ("history_item", [np.array(7), [7], None], "'history_item' holds array.7. of type ndarray for request 0"),
        ("history_item", None, "'history_item' is None of type NoneType, expected a list per request"),
        ("history_item", np.array(None), "'history_item' is array.* expected a list per request"),
        ("history_item", pd.Series([[7], [7], None]), "request 0 has 1 entries in 'history_item' and 5 in"),
        ("history_item", "seven", "'history_item' is 'seven' of type str, expected a list per request"),
        ("history_item", [["7"] * 5, [7], None], "'history_item' holds '7' of type str, expected int64"),
        ("history_item", [[[7]] * 5, [7], None], "'history_item'"),
        ("history_item", [[7] * 5], r"'history_item' has shape \[1, 3\], expected \[3, 3\]"),
        ("history_item", np.ones((3, 3)), "'history_item' has dtype float64"),
        ("history_genre", [["a\ud800"] * 5, ["b"], None], "'history_genre' holds a string with half of a surrogate"),
        ("at", ["today"] * 3, "'at' holds 'today' of type str, expected int64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(column, values, told):
    with pytest.raises(RequestRejected, match=told):
        read_request(SPECS, REQUEST | {column: values})


def interface():
    return Interface(NIGHT, SPECS, "scores", (Objective("liked", "binary"),), {}, (LevelSpec(("user",), 1),))


def test_an_interface_with_histories_is_read_back():
    assert read_interface(Reader("it"), json.loads(json.dumps(interface().as_json()))) == interface()


@pytest.mark.parametrize("change", [{"of": "no name"}, {"of": 3}, {"per": "candidate"}, {"values": 4}])
def test_an_interface_that_says_odd_things_of_histories_is_refused(change):
    found = json.loads(json.dumps(interface().as_json()))
    found["inputs"][3] |= change
    with pytest.raises(ReleaseRefused):
        read_interface(Reader("it"), found)
    del found["inputs"][3]["values"]
    with pytest.raises(ReleaseRefused):
        read_interface(Reader("it"), found)


def test_histories_in_the_wrong_order_are_refused():
    """Of a longer one the oldest entries would be read as the newest."""
    specs = (*SPECS, InputSpec("history_at", "request", "int64", "", LEAST, None, 3, "at"))
    told = {**REQUEST, "history_at": [[9, 7, None, 5, 4], [8], None]}
    found = read_request(specs, told)[0]["history_at"]
    assert found.tolist() == [[9, 7, LEAST], [8, LEAST, LEAST], [LEAST] * 3]
    for wrong in ([7, 9, None, 5, 4], [9, 7, 8, 5, 4]):
        with pytest.raises(RequestRejected, match=r"'history_at' has \d behind \d in the history of request 0; give"):
            read_request(specs, {**told, "history_at": [wrong, [8], None]})
