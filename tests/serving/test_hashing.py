"""Personal columns: raw values from callers, keyed digests in releases, and nothing of them in errors."""

import base64
import hmac
import traceback

import numpy as np
import pytest

from tasks.data.contract import ColumnConfig, DataConfig
from tasks.errors import InvalidConfig, RequestRejected
from tasks.release.interface import Personal
from tasks.release.lookups import input_specs
from tasks.release.manifest import InputSpec
from tasks.serving.hashing import Hasher, digest
from tasks.serving.requests import read_request
from tests.releases import COLUMNS, contract

KEY = bytes(range(32))
MARK = Personal("k1")
SPECS = (
    InputSpec("user", "request", "string", "", "", personal=MARK),
    InputSpec("tags", "request", "string", "", "", values=3, personal=MARK),
    InputSpec("item", "candidate", "int64", "", -1),
    InputSpec("seller", "candidate", "string", "", "", personal=MARK),
    InputSpec("history_seller", "request", "string", "", "", values=2, of="seller", personal=MARK),
)
REQUEST = {
    "user": ["Ann é", None], "tags": [["red", "blue"], None], "item": [[1, 2], [3, 4]],
    "seller": [["s1", None], ["s2", "s1"]], "history_seller": [["s1"], ["s2", None, "s3"]],
}  # fmt: skip


@pytest.fixture
def hasher(monkeypatch: pytest.MonkeyPatch) -> Hasher:
    monkeypatch.setenv("NIGHTRANK_HASH_KEY_k1", base64.b64encode(KEY).decode())
    return Hasher.of(SPECS)


def reference(value: str) -> str:
    return hmac.new(KEY, value.encode(), "sha256").hexdigest()


def test_digests_are_those_of_the_standard() -> None:
    """RFC 4231, test cases 1 and 2."""
    assert digest(b"\x0b" * 20, "Hi There") == "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
    said = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert digest(b"Jefe", "what do ya want for nothing?") == said


def test_raw_values_are_hashed_in_place_and_missing_ones_stay(hasher: Hasher) -> None:
    arrays, shape = read_request(SPECS, REQUEST, hasher)
    assert shape == (2, 2)
    assert arrays["user"].tolist() == [reference("Ann é"), ""]
    assert arrays["tags"].tolist() == [[reference("red"), reference("blue"), ""], ["", "", ""]]
    assert arrays["seller"].tolist() == [[reference("s1"), ""], [reference("s2"), reference("s1")]]
    assert arrays["history_seller"].tolist() == [[reference("s1"), ""], [reference("s2"), ""]]
    np.testing.assert_array_equal(arrays["item"], [[1, 2], [3, 4]])


def test_what_the_lake_holds_goes_in_as_it_is() -> None:
    """Golden requests and a champion's replay are asked with what was stored."""
    arrays, _ = read_request(SPECS, REQUEST)
    assert arrays["user"].tolist() == ["Ann é", ""]


@pytest.mark.parametrize(
    "change",
    [
        {"user": [b"secret", "x"]}, {"user": [["secret"], ["x"]]}, {"user": "secret"}, {"tags": ["secret", None]},
        {"tags": [["secret"] * 4, None]}, {"tags": [["secret", None], None]}, {"seller": [["secret"], ["a", "b"]]},
        {"seller": [[7, "secret"], ["a", "b"]]}, {"history_seller": ["secret", None]}, {"user": np.array([7.5, 1])},
    ],
    ids=str,
)  # fmt: skip
def test_no_error_holds_a_personal_value(hasher: Hasher, change: dict[str, object]) -> None:
    with pytest.raises(RequestRejected) as caught:
        read_request(SPECS, REQUEST | change, hasher)
    (column,) = change
    assert f"'{column}'" in str(caught.value)
    assert caught.value.__context__ is None
    assert "secret" not in "".join(traceback.format_exception(caught.value)).split("RequestRejected")[-1]


@pytest.mark.parametrize(
    ("value", "told"),
    [(None, "is not set"), ("no base64!", "no base64"), (base64.b64encode(bytes(31)).decode(), "31 bytes, limit 32")],
)
def test_a_host_without_a_good_key_refuses_to_load(
    monkeypatch: pytest.MonkeyPatch, value: str | None, told: str
) -> None:
    monkeypatch.delenv("NIGHTRANK_HASH_KEY_k1", raising=False)
    if value is not None:
        monkeypatch.setenv("NIGHTRANK_HASH_KEY_k1", value)
    with pytest.raises(InvalidConfig, match=told) as caught:
        Hasher.of(SPECS)
    assert value is None or value not in str(caught.value)
    Hasher.of([spec for spec in SPECS if spec.personal is None])


def test_a_contract_marks_the_inputs_of_a_release_and_nothing_else() -> None:
    plain, columns = contract("past"), []
    for column in COLUMNS["past"]:
        hashed = column["dtype"] == "string" and column["role"] in ("user", "candidate")
        columns.append(column | ({"personal": {"key_id": "k1"}} if hashed else {}))
    data = DataConfig.model_validate(plain.model_dump(mode="json") | {"columns": columns})
    marked = {column["name"] for column in columns if "personal" in column}
    assert "user" in marked
    for spec, before in zip(input_specs(data, history=2), input_specs(plain, history=2), strict=True):
        assert (spec.personal == MARK) == ((spec.of or spec.name) in marked)
        assert "personal" not in before.as_json()
    assert "personal" not in str(plain.model_dump(mode="json"))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int64"}, {"role": "item"}, {"role": "ignored"}, {"allowed": ["a"], "role": "request"},
        {"personal": {"key_id": "../k"}}, {"personal": {}}, {"personal": {"key_id": "k", "key": "secret"}},
    ],
    ids=str,
)  # fmt: skip
def test_only_hashed_strings_are_personal(change: dict[str, object]) -> None:
    column = {"name": "x", "role": "user", "dtype": "string", "personal": {"key_id": "k1"}}
    if change.get("role") == "request":
        column |= {"role": "request", "kind": "categorical"}
    ColumnConfig.model_validate(column)
    with pytest.raises(ValueError):
        ColumnConfig.model_validate(column | change)
