"""A pipeline whose personal columns are hashed with another key is another pipeline."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.clients.object_store import open_store
from tasks.data.contract import DataConfig
from tasks.errors import InvalidConfig
from tasks.parents import require_same_hashing
from tasks.references import Place
from tasks.release.interface import Personal
from tasks.release.manifest import Manifest, manifest_key
from tasks.release.manifest_parts import Requires
from tests.releases import COLUMNS, PIPELINE, contract

OLD = Path(__file__).parents[1] / "release" / "formats" / "manifest-3.json"
"""Of a release whose users are strings and not hashed."""


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (None, None, None),
        ("k1", "k1", None),
        (None, "k1", "'user' is hashed with key k1, and was not hashed in release"),
        ("k1", "k2", "'user' is hashed with key k2, and was hashed with key k1 in release"),
        ("k1", None, "'user' is not hashed, and was hashed with key k1 in release"),
    ],
)
def test_another_key_is_refused_by_name(tmp_path: Path, before: str | None, now: str | None, told: str | None) -> None:
    data = OLD.read_bytes()
    release = json.loads(data)["release"]
    if before is not None:
        found = Manifest.parse(data, PIPELINE, release)
        inputs = tuple(
            replace(one, personal=Personal(before)) if one.name == "user" else one for one in found.interface.inputs
        )
        interface, wanted = replace(found.interface, inputs=inputs), Requires("1.31", {"": 20}, 10, "test")
        data = replace(found, interface=interface, requires=wanted, schema_version=4).serialise()
    (tmp_path / "store").mkdir()
    open_store(str(tmp_path / "store")).put_if_absent(manifest_key(PIPELINE, release), data)
    place = Place(store=str(tmp_path / "store"), pipeline=PIPELINE, scratch=str(tmp_path / "scratch"), device="cpu")
    mark = {} if now is None else {"personal": {"key_id": now}}
    columns = [column | (mark if column["name"] == "user" else {}) for column in COLUMNS["past"]]
    config = DataConfig.model_validate(contract("past").model_dump(mode="json") | {"columns": columns})
    if told is None:
        require_same_hashing(place, config, release)
    else:
        with pytest.raises(InvalidConfig, match=told):
            require_same_hashing(place, config, release)
