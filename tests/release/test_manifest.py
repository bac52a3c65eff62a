"""The manifest, the pointer, and everything that makes a reader refuse them."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ReleaseRefused
from tasks.release.interface import InputSpec, Interface, LevelSpec, Objective
from tasks.release.manifest import CONTENT, Manifest, Pointer, content_digest, describe

INTERFACE = Interface(
    night=date(2026, 3, 1),
    inputs=(
        InputSpec("user", "request", "string", "user key", "", "ann"),
        InputSpec("age", "request", "float32", "request number", None, 31.5),
        InputSpec("item", "candidate", "int64", "item key", -(2**63), 7),
    ),
    output="scores",
    objectives=(Objective("liked", "binary"), Objective("stars", "rating")),
    wires={"slot": "slot_"},
    levels=(LevelSpec(("user",), 12),),
)
POINTER = Pointer("a" * 64, date(2026, 3, 1), 4, "b" * 64, 9, "2026-03-02T01:02:03.000004+00:00", "gate: go")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    for name in CONTENT - {"interface.json"}:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "interface.json").write_bytes(INTERFACE.serialise())
    files = describe(tmp_path)
    told = ({"largest": 1e-7}, {"log_loss": 0.5}, {"commit": "abc"})
    return Manifest("shop", content_digest(files), files, INTERFACE, *told)


def tampered(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> bytes:
    found = json.loads(manifest.serialise())
    change(found)
    return json.dumps(found).encode()


def test_a_manifest_reads_back_as_it_was_written(manifest: Manifest):
    assert Manifest.parse(manifest.serialise(), "shop", manifest.release) == manifest
    assert manifest.night == date(2026, 3, 1)
    assert manifest.size == sum(file.bytes for file in manifest.files)


def test_the_id_is_the_digest_of_names_sizes_and_digests_alone(manifest: Manifest):
    assert manifest.release == content_digest(reversed(manifest.files))
    for change in ({"name": "x"}, {"bytes": 1}, {"sha256": "0" * 64}):
        assert content_digest([replace(manifest.files[0], **change), *manifest.files[1:]]) != manifest.release
    assert replace(manifest, metrics={"log_loss": 0.4}).release == manifest.release


def first_file(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda found: found["files"][0].update(changes)


HOSTILE = ["../model.onnx", "/etc/passwd", "a/b", "", ".", "model.onnx\x00", "C:\\x", "𝕞odel.onnx", "m" * 5000, "-rf"]
ODD: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown schema version": lambda found: found.update(schema_version=4),
    "schema version of lists without any": lambda found: found.update(schema_version=2),
    "no schema version": lambda found: found.pop("schema_version"),
    "true as schema version": lambda found: found.update(schema_version="1"),
    "unknown field": lambda found: found.update(extra=1),
    "lacking field": lambda found: found.pop("metrics"),
    "another pipeline": lambda found: found.update(pipeline="bank"),
    "another release": lambda found: found.update(release="0" * 64),
    "missing file": lambda found: found["files"].pop(),
    "extra file": lambda found: found["files"].append({"name": "zzz", "bytes": 1, "sha256": "0" * 64}),
    "doubled file": lambda found: found["files"].insert(0, found["files"][0]),
    "files out of order": lambda found: found["files"].reverse(),
    "files are no list": lambda found: found.update(files={}),
    "short digest": first_file(sha256="abc"),
    "upper-case digest": first_file(sha256="A" * 64),
    "digest with a path": first_file(sha256="../" * 21 + "a"),
    "another digest": first_file(sha256="0" * 64),
    "another size": first_file(bytes=99),
    "negative size": first_file(bytes=-1),
    "size is a float": first_file(bytes=1.0),
    "size is true": first_file(bytes=True),
    "oversize": first_file(bytes=10**15),
    "field in a file": first_file(url="http://example.org"),
    "interface without inputs": lambda found: found["interface"].update(inputs=[]),
    "interface without items": lambda found: found["interface"]["inputs"].pop(),
    "doubled input": lambda found: found["interface"]["inputs"].append(found["interface"]["inputs"][0]),
    "hostile input name": lambda found: found["interface"]["inputs"][0].update(name="user;rm"),
    "unknown dtype": lambda found: found["interface"]["inputs"][0].update(dtype="float64"),
    "dtype is a list": lambda found: found["interface"]["inputs"][0].update(dtype=["int64"]),
    "unknown per": lambda found: found["interface"]["inputs"][0].update(per="night"),
    "another shape": lambda found: found["interface"]["inputs"][0].update(shape=["requests", "candidates"]),
    "missing marker of another type": lambda found: found["interface"]["inputs"][0].update(missing=0),
    "unknown objective kind": lambda found: found["interface"]["objectives"][0].update(kind="rank"),
    "no objective": lambda found: found["interface"].update(objectives=[]),
    "output of another type": lambda found: found["interface"]["output"].update(dtype="float16"),
    "night is no date": lambda found: found["interface"].update(night="yesterday"),
    "night is a number": lambda found: found["interface"].update(night=20260301),
    "metrics is a list": lambda found: found.update(metrics=[]),
    "levels with a negative count": lambda found: found["interface"]["levels"][0].update(segments=-1),
} | {f"file called {name[:16]!r}": first_file(name=name) for name in HOSTILE}


@pytest.mark.parametrize("oddity", list(ODD))
def test_anything_odd_is_refused(manifest: Manifest, oddity: str):
    with pytest.raises(ReleaseRefused, match="manifest of release"):
        Manifest.parse(tampered(manifest, ODD[oddity]), "shop", manifest.release)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}', b'{"a": 1, "a": 2}', b" " * (2**24 + 1)],
    ids=["empty", "cut", "list", "null", "not UTF-8", "deep", "NaN", "doubled key", "oversize"],
)
def test_what_is_no_json_object_is_refused(data: bytes):
    with pytest.raises(ReleaseRefused):
        Manifest.parse(data, "shop", "0" * 64)
    with pytest.raises(ReleaseRefused):
        Pointer.parse(data)


def test_no_byte_of_a_manifest_can_flip_into_another_release(manifest: Manifest):
    """Flips outside digested parts may change prose, never files, interface or identity."""
    written = manifest.serialise()
    for position in range(0, len(written), 7):
        flipped = bytearray(written)
        flipped[position] ^= 1
        try:
            read = Manifest.parse(bytes(flipped), "shop", manifest.release)
        except ReleaseRefused:
            continue
        assert read.files == manifest.files


def test_a_pointer_reads_back_as_it_was_written():
    assert Pointer.parse(POINTER.serialise()) == POINTER
    first = replace(POINTER, previous=None, generation=1)
    assert Pointer.parse(first.serialise()) == first


@pytest.mark.parametrize(
    "change",
    [
        {"release": "latest"}, {"release": "../" + "a" * 61}, {"night": "2026-13-01"}, {"generation": -1},
        {"generation": "4"}, {"previous": 3},
        {"fencing_token": None}, {"challenger": "c" * 64}, {"share": 0.1}, {"schema_version": 2},
        {"note": "hi"}, {"moved_at": 0}, {"reason": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_odd_pointer_is_refused(change: dict[str, object]):
    found = json.loads(POINTER.serialise()) | change
    with pytest.raises(ReleaseRefused, match=r"pointer current\.json"):
        Pointer.parse(json.dumps(found).encode())


def test_sizes_and_digests_are_those_of_the_files(tmp_path: Path):
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"abc")
    a, b = describe(tmp_path)
    assert (a.name, a.bytes, a.sha256[:8]) == ("a", 3, "ba7816bf")
    assert (b.name, b.bytes, b.sha256[:8]) == ("b", 0, "e3b0c442")
