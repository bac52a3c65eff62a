"""A whole night on a lake of hashed users and markets, and rankers that are asked about raw ones."""

import hmac
import logging
from base64 import b64encode
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows import cli
from flows.config import RetrainConfig
from tasks.clients.object_store import open_store
from tasks.errors import InvalidConfig
from tasks.release.holds import held_segments
from tasks.release.pointer import read_pointer
from tasks.release.published import stored_manifest
from tasks.serving.ranker import Ranker
from tests.finished import DONE, FEEDBACK, Finished
from tests.shared import lend_graph
from tests.steps.plain import plain_night
from tests.world import write_world

VARIABLE = "NIGHTRANK_HASH_KEY_k1"
MARKETS = ("isle", "north", "south")
USERS = ("islander", *(f"user-{number:03d}" for number in range(40)))


def digest(key: bytes, value: str) -> str:
    """By the standard library alone."""
    return hmac.new(key, value.encode(), "sha256").hexdigest()


def in_order() -> tuple[bytes, dict[str, str]]:
    """A key, and a name for each user, whose digests are in the order of what they are digests of.

    Ids are given in the order of keys, and by ids training draws its episodes. In another order a night is as good, and
    another one, as with another seed; in the same order it has to be the same.
    """
    keys = (sha256(bytes([number])).digest() for number in range(256))
    key = next(one for one in keys if sorted(MARKETS, key=lambda market: digest(one, market)) == list(MARKETS))
    named = {}
    for at, user in enumerate(USERS):
        tries = (f"{user}/{number}" for number in range(10_000))
        named[user] = next(one for one in tries if int(digest(key, one)[:8], 16) * len(USERS) >> 32 == at)
    return key, named


def lake(folder: Path, fed: Finished, users: Mapping[str, str], markets: Mapping[str, str]) -> dict[str, Any]:
    """Write the tiny world with its users and markets called otherwise; returns its config, with feedback."""
    world = write_world(folder, nights=8)
    for path in (folder / "lake").rglob("*.parquet"):
        table = pq.read_table(path)
        for column, called in (("user_id", users), ("market", markets)):
            values = pa.array([called[value] for value in table[column].to_pylist()])
            table = table.set_column(table.schema.get_field_index(column), column, values)
        pq.write_table(table, path)
    lend_graph(fed.world.config["store"], world.config["store"])
    return world.config | {"export": {"feedback": FEEDBACK}}


def texts(folder: Path) -> Iterator[bytes]:
    """What the files below a folder say: their bytes, and those of tables also as they are when unpacked."""
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        data = path.read_bytes()
        yield data
        if data.startswith(b"PAR1"):
            yield repr([column.unique().to_pylist() for column in pq.read_table(path).columns]).encode()


def test_a_hashed_lake_serves_raw_requests_as_its_raw_twin_does_and_never_says_a_raw_key(
    tmp_path: Path,
    fed: Finished,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    key, named = in_order()
    monkeypatch.delenv(VARIABLE, raising=False)
    trees = {
        "raw": lake(tmp_path / "raw", fed, named, {market: market for market in MARKETS}),
        "hashed": lake(
            *(tmp_path / "hashed", fed),
            {user: digest(key, name) for user, name in named.items()},
            {market: digest(key, market) for market in MARKETS},
        ),
    }
    for column in trees["hashed"]["data"]["columns"]:
        if column["name"] in ("user_id", "market"):
            column["personal"] = {"key_id": "k1"}
    configs = {name: RetrainConfig.model_validate(tree) for name, tree in trees.items()}
    # A night reads what the lake holds, and needs no key.
    results = {"hashed": plain_night(configs["hashed"], fed.world.nights[DONE[0]])}
    said = [*capsys.readouterr(), caplog.text]
    results["raw"] = plain_night(configs["raw"], fed.world.nights[DONE[0]])
    stores = {name: open_store(config.store) for name, config in configs.items()}
    raw, hashed = (
        {file.name: file.sha256 for file in stored_manifest(stores[name], "tiny", result.published.release).files}
        for name, result in reversed(results.items())
    )
    differ = {name for name in raw if raw[name] != hashed[name]}
    assert raw.keys() == hashed.keys()
    # Those that hold keys; not weights, statistics, slots, supports.
    assert differ == {
        *("lookup.onnx", "model.onnx", "lookup_feedback.onnx", "model_feedback.onnx"),
        *("vocabulary.parquet", "golden.json", "interface.json"),
    }

    who, other = named["user-003"], named["user-004"]
    request = {
        "user_id": [who, other, "nobody", None], "market": ["north", "south", "isle", "nowhere"],
        "age": [40, None, 33, 20], "item_id": [[100, 102, 999]] * 4, "genre": [["comedy"] * 3] * 4,
        "length": [["long", "short", "long"]] * 4, "price": [[5.0, 5.0, 1.0]] * 4,
    }  # fmt: skip
    brought = request | {
        "feedback_item_id": [[100, 101]] * 4, "feedback_genre": [["comedy", "drama"]] * 4,
        "feedback_length": [["long", "short"]] * 4, "feedback_price": [[5.0, 2.0]] * 4,
        "feedback_clicked": [[1, 0]] * 4,
    }  # fmt: skip

    def scores(name: str) -> list[np.ndarray]:
        with Ranker(stores[name], "tiny", device="cpu") as ranker:
            return [ranker.score(request), ranker.score(brought)]

    with pytest.raises(InvalidConfig, match=rf"hashed with key k1, and {VARIABLE} is not set; give this host the key"):
        scores("hashed")
    monkeypatch.setenv(VARIABLE, b64encode(key).decode())
    before = scores("raw")
    np.testing.assert_array_equal(scores("hashed"), before)

    def fallback(name: str, user: str, *words: str) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(trees[name]))
        cli.main(["releases", "fallback", "--config", str(path), f"user_id={user}", *words])
        return capsys.readouterr().out

    fallback("raw", who, "--reason", "complaints")
    capsys.readouterr()
    caplog.clear()
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(SystemExit):
        fallback("hashed", who, "--reason", "complaints")
    said.append(capsys.readouterr().err)
    assert f"{VARIABLE} is not set" in said[-1]
    assert not held_segments(stores["hashed"], "tiny")
    monkeypatch.setenv(VARIABLE, b64encode(key).decode())
    said.append(fallback("hashed", who, "--reason", "complaints"))
    pointer = read_pointer(stores["hashed"], "tiny")
    assert [one.name for one in held_segments(stores["hashed"], "tiny")] == [digest(key, who)]
    after = scores("raw")
    caplog.clear()
    np.testing.assert_array_equal(scores("hashed"), after)
    assert (np.abs(np.array(after) - before).max(axis=(2, 3)) > 1e-3).tolist() == [[True, False, False, False]] * 2
    monkeypatch.delenv(VARIABLE)
    said.append(fallback("hashed", digest(key, who), "--reason", "complaints"))
    assert read_pointer(stores["hashed"], "tiny") == pointer
    said.append(fallback("hashed", digest(key, who), "--undo"))
    assert not held_segments(stores["hashed"], "tiny")
    assert all(f"user_id={digest(key, who)[:12]}" in one for one in said[-3:])

    names = [name.encode() for name in (*named.values(), *MARKETS)]
    told = [*texts(tmp_path / "hashed"), caplog.text.encode(), *(one.encode() for one in said)]
    assert sum(digest(key, who).encode() in one for one in told) > 5
    assert not [name for name in (*names, b64encode(key)) if any(name in one for one in told)]
    known = [*texts(tmp_path / "raw")]
    assert [name for name in names if any(name in one for one in known)] == names  # so they would have been found
