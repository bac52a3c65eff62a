"""The JSON Schemas say what the strict reader says, as far as a schema can."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tasks.errors import ReleaseRefused
from tasks.release.interface import Personal
from tasks.release.manifest import Manifest, Pointer
from tasks.release.signature import Signature
from tasks.release.strict_json import canonical
from tests.release.test_manifest import FORMATS, NEWER, ODD, POINTER, manifest

FOLDER = Path(__file__).parents[2] / "tasks" / "release"
ONLY_THE_READER = {
    "schema version of lists without any", "another pipeline", "another release", "files out of order",
    "another digest", "another size", "oversize", "doubled input", "another shape", "segments that do not add up",
    "segments of another ladder", "segments of more levels", "a variant of files that are not there",
    "size is a float", "a float as schema version", "no word of what a graph opens", "a graph that is not there",
    "a graph that opens what is not there", "a graph that opens files in disorder", "bounds in disorder",
}  # fmt: skip
"""Oddities that follow from other fields, from the place of the document, or from sums; 1.0 is an integer there."""

__all__ = ["manifest"]


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def accepts(name: str, document: object) -> bool:
    return bool(validator(name).is_valid(document))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_real_manifests_of_older_versions_fit(version: int) -> None:
    told = json.loads((FORMATS / f"manifest-{version}.json").read_text())
    assert accepts("manifest", told)
    assert not accepts("manifest", told | {"schema_version": 4})
    assert not accepts("manifest", told | {"schema_version": 5})
    assert not accepts("manifest", told | {"variants": {}})
    told["interface"]["inputs"][0]["optional"] = True
    assert not accepts("manifest", told)
    del told["interface"]["inputs"][0]["optional"]
    told["interface"]["objectives"][-1].update(kind="rating", minimum=1.0)
    assert not accepts("manifest", told)


def test_a_real_manifest_of_the_version_before_fits() -> None:
    told = json.loads((FORMATS / "manifest-4.json").read_text())
    assert accepts("manifest", told)
    for version in (1, 3, 5):
        assert not accepts("manifest", told | {"schema_version": version})
    assert not accepts("manifest", told | {"graphs": {}})
    told["interface"]["objectives"][-1].update(kind="rating", minimum=1.0)
    assert not accepts("manifest", told)


def test_a_manifest_of_today_fits_with_all_that_it_may_say(manifest: Manifest) -> None:
    assert accepts("manifest", json.loads(manifest.serialise()))
    (first, *rest) = manifest.interface.inputs
    marked = replace(first, personal=Personal("k1"), optional=True)
    binary, rating = manifest.interface.objectives
    bounded = (binary, replace(rating, minimum=1.0, maximum=5.0))
    interface = replace(manifest.interface, inputs=(marked, *rest), objectives=bounded)
    rich = replace(manifest, interface=interface)
    assert Manifest.parse(rich.serialise(), "shop", rich.release) == rich
    assert accepts("manifest", json.loads(rich.serialise()))


@pytest.mark.parametrize("oddity", list(ODD))
def test_what_the_reader_refuses_the_schema_refuses_too(manifest: Manifest, oddity: str) -> None:
    told = json.loads(manifest.serialise())
    ODD[oddity](told)
    with pytest.raises(ReleaseRefused):
        Manifest.parse(json.dumps(told).encode(), "shop", manifest.release)
    assert accepts("manifest", told) == (oddity in ONLY_THE_READER)


CHANGES: list[Callable[[dict[str, Any]], object]] = [
    lambda one: one.update(release="latest"),
    lambda one: one.update(night="20260301"),
    lambda one: one.update(night=20260301),
    lambda one: one.update(generation=-1),
    lambda one: one.update(generation="4"),
    lambda one: one.update(previous="x"),
    lambda one: one.update(fencing_token=None),
    lambda one: one.update(moved_at="now"),
    lambda one: one.update(moved_at="2026-03-02T01:02:03"),
    lambda one: one.update(reason="x" * 4001),
    lambda one: one.update(note="hi"),
    lambda one: one.pop("reason"),
    lambda one: one.update(share=-1),
    lambda one: one.update(share=0.5),
    lambda one: one.update(share=10_001),
    lambda one: one.update(challenger="x"),
    lambda one: one.update(schema_version=3),
    lambda one: one.update(hold=7),
    lambda one: one.update(move_id="f" * 31),
    lambda one: one.update(signature={"key_id": "0" * 16}),
    lambda one: one.update(signature={"key_id": "0" * 16, "signature": "?" * 88}),
    lambda one: one.update(challenger=None, share=3),
    lambda one: one.update(hold=None, challenger=None, share=0, signature=None),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
@pytest.mark.parametrize("version", [1, 2])
def test_reader_and_schema_agree_on_odd_pointers(number: int, version: int) -> None:
    whole = replace(NEWER, signature=Signature("0" * 16, bytes(64)))
    told = json.loads((POINTER if version == 1 else whole).serialise())
    CHANGES[number](told)
    with pytest.raises(ReleaseRefused):
        Pointer.parse(canonical(told) + b"\n")
    assert not accepts("pointer", told)


def test_good_pointers_fit() -> None:
    first = json.loads((FORMATS / "pointer-1.json").read_text())
    signed = replace(POINTER, move_id="f" * 32, signature=Signature("0" * 16, bytes(64)))
    held = replace(POINTER, move_id="f" * 32, hold="look")
    for told in (first, *(json.loads(one.serialise()) for one in (POINTER, NEWER, signed, held))):
        assert accepts("pointer", told)


def test_the_schemas_are_part_of_the_package() -> None:
    import tomllib

    found = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())
    assert found["tool"]["setuptools"]["package-data"] == {"tasks.release": ["*.schema.json"]}
