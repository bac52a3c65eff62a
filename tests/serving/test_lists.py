"""Requests with lists: what a caller may pass for tags and vectors, and what is refused."""

import json

import numpy as np
import pytest

from tasks.errors import ReleaseRefused, RequestRejected
from tasks.release.interface import read_interface
from tasks.release.manifest import InputSpec
from tasks.release.strict_json import Reader
from tasks.serving.requests import read_request

LEAST = -(2**63)
SPECS = (
    InputSpec("user", "request", "string", "", ""),
    InputSpec("codes", "request", "int64", "", LEAST, values=3),
    InputSpec("mood", "request", "float32", "", None, values=2),
    InputSpec("item", "candidate", "int64", "", LEAST),
    InputSpec("tags", "candidate", "string", "", "", values=2),
    InputSpec("look", "candidate", "float32", "", None, values=2),
)
REQUEST = {
    "user": ["ann", "bob"],
    "codes": [[7], None],
    "mood": [None, [1, 2.5]],
    "item": [[1, 2], [3, 4]],
    "tags": [[["a", "b"], []], [None, ["ü"]]],
    "look": [[[0.5, 1.0], None], [None, [2, 3]]],
}


def test_plain_lists_are_filled_up():
    arrays, shape = read_request(SPECS, json.loads(json.dumps(REQUEST)))
    assert shape == (2, 2)
    assert arrays["codes"].tolist() == [[7, LEAST, LEAST], [LEAST] * 3]
    assert arrays["tags"].tolist() == [[["a", "b"], ["", ""]], [["", ""], ["ü", ""]]]
    np.testing.assert_array_equal(arrays["mood"], np.array([[np.nan] * 2, [1, 2.5]], np.float32), strict=True)
    np.testing.assert_array_equal(
        arrays["look"], np.array([[[0.5, 1], [np.nan] * 2], [[np.nan] * 2, [2, 3]]], np.float32), strict=True
    )


def test_arrays_may_be_padded_already_or_narrower_and_hold_lists():
    plain, _ = read_request(SPECS, REQUEST)
    tags = np.empty((2, 2), object)
    for at, cell in zip(np.ndindex(2, 2), [["a", "b"], [], None, np.array(["ü"])], strict=True):
        tags[at] = cell
    given = plain | {"tags": tags, "codes": np.array([[7], [LEAST]], np.int64)}
    again, _ = read_request(SPECS, given)
    for name, values in plain.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name, strict=True)


def test_no_candidates_are_no_lists():
    arrays, shape = read_request(SPECS, REQUEST | {name: [[], []] for name in ("item", "tags", "look")})
    assert (shape, arrays["tags"].shape, arrays["look"].shape) == ((2, 0), (2, 0, 2), (2, 0, 2))


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("tags", [[["a"] * 3, []], [[], []]], "'tags' holds a list of 3 values, expected at most 2"),
        ("tags", np.full((2, 2, 3), "a"), "'tags' holds a list of 3 values, expected at most 2"),
        ("tags", [[["a", None], []], [[], []]], "'tags' holds a missing value inside a list; leave it out"),
        ("tags", [[["", "a"], []], [[], []]], "'tags' holds a missing value inside a list; leave it out"),
        ("tags", [["a", []], [[], []]], "'tags' holds 'a' of type str, expected a list"),
        ("tags", [[0, []], [[], []]], "'tags' holds 0 of type int, expected a list"),
        ("tags", [[[["a"]], []], [[], []]], "'tags' holds a list inside a list"),
        ("tags", [[[1], []], [[], []]], "'tags' holds 1 of type int, expected string"),
        ("tags", [[["a"]], [[], []]], "'tags' is a ragged list"),
        ("tags", [[["a"]], [["b"]]], r"'tags' has shape \[2, 1, 2\], expected \[2, 2, 2\]"),
        ("tags", [["a"], None], "'tags' must hold a list per request, with a list per candidate"),
        ("tags", "a", "'tags' has 0 axes of lists"),
        ("codes", [["7"], None], "'codes' holds '7' of type str, expected int64"),
        ("codes", [[True], None], "'codes' holds True of type bool, expected int64"),
        ("codes", [[7]], r"'codes' has shape \[1, 3\], expected \[2, 3\]"),
        ("codes", [7, 8], "'codes' holds 7 of type int, expected a list"),
        ("codes", np.ones((2, 3)), "'codes' has dtype float64 .*expected int64"),
        ("mood", [[1.0], None], "'mood' holds a list of 1 values, expected 2"),
        ("mood", [[], None], "'mood' holds a list of 0 values, expected 2"),
        ("mood", [[1.0, None], None], "'mood' holds a missing value inside a list; give the whole vector"),
        ("mood", [[1.0, float("nan")], None], "'mood' holds a vector with a number that is missing or not finite"),
        ("mood", [[1.0, 1e39], None], "'mood' holds a vector with a number that is missing or not finite"),
        ("mood", np.array([[np.nan, 1.0]] * 2), "'mood' holds a vector with a number that is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(column, values, told):
    with pytest.raises(RequestRejected, match=told):
        read_request(SPECS, REQUEST | {column: values})


def interface(**changes):
    """An interface's JSON whose last input is changed."""
    one = InputSpec("tags", "candidate", "string", "of the item", "", ("a", "b"), 4).as_json() | changes
    user = InputSpec("user", "request", "string", "", "", "ann").as_json()
    return json.loads(json.dumps({
        "night": "2026-03-01", "inputs": [user, one], "levels": [], "wires": {},
        "output": {"name": "scores", "dtype": "float32", "shape": ["requests", "candidates", "objectives"]},
        "objectives": [{"name": "liked", "kind": "binary"}],
    }))  # fmt: skip


def test_an_interface_with_lists_is_read_back():
    spec = read_interface(Reader("it"), interface()).inputs[1]
    assert spec == InputSpec("tags", "candidate", "string", "of the item", "", ("a", "b"), 4)


@pytest.mark.parametrize(
    "changes",
    [{"values": 0}, {"values": -1}, {"values": "4"}, {"values": 5}, {"shape": ["requests"]}, {"example": [["a"]]}],
)
def test_an_interface_that_says_odd_things_of_lists_is_refused(changes):
    with pytest.raises(ReleaseRefused):
        read_interface(Reader("it"), interface(**changes))


@pytest.mark.parametrize(
    "tags", [[[["a", "\ud800"], []], [None, ["b"]]], np.array([[["a", "\udfff"]] * 2] * 2, object)]
)
def test_half_a_character_inside_a_list_is_refused_and_not_shown(tags):
    with pytest.raises(RequestRejected, match="'tags' holds a string with half of a surrogate pair") as refusal:
        read_request(SPECS, REQUEST | {"tags": tags})
    assert refusal.value.__context__ is None
