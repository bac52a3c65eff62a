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
from tasks.release.manifest import CONTENT, OPTIONAL, Manifest, Pointer, ReleaseFile, content_digest, describe
from tasks.release.manifest_parts import LevelSegments, Lift, Requires, Support, Variant
from tasks.release.signature import Signature
from tasks.release.strict_json import REMEDY, canonical
from tasks.serving.variants import choose, selected

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
REQUIRES = Requires("1.31", {"": 20, "ai.onnx.ml": 4}, 10, "nightrank 0.1.0")
LEVEL = LevelSegments(("user",), "ridge", 15, 12, 2, 1, Support(4.0, 31.5, 97), Lift(-0.01, -0.03, 0.01, 5))
VARIANT = Variant(("bank.bin",), "CPUExecutionProvider", {"tolerance": 0.01}, {"auc": -0.0001}, "passed", "close")
POINTER = Pointer("a" * 64, date(2026, 3, 1), 4, "b" * 64, 9, "2026-03-02T01:02:03.000004+00:00", "gate: go")


WEIGHTS = ("bank.bin", "base.bin", "statistics.bin")
NEWER = replace(POINTER, challenger="c" * 64, share=250, hold="look at it", move_id="f" * 32)
FORMATS = Path(__file__).parent / "formats"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    for name in CONTENT - {"interface.json"}:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "interface.json").write_bytes(INTERFACE.serialise())
    files = describe(tmp_path)
    told = ({"largest": 1e-7}, {"log_loss": 0.5}, {"commit": "abc"})
    return Manifest(
        *("shop", content_digest(files), files, INTERFACE, *told, REQUIRES, (LEVEL,)),
        variants={"int8": VARIANT},
        beside=(ReleaseFile("run.json", 2, "c" * 64),),
        graphs={"lookup.onnx": (), "model.onnx": WEIGHTS, "score.onnx": WEIGHTS},
    )


def tampered(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> bytes:
    found = json.loads(manifest.serialise())
    change(found)
    return json.dumps(found).encode()


def test_a_manifest_reads_back_as_it_was_written(manifest: Manifest):
    assert Manifest.parse(manifest.serialise(), "shop", manifest.release) == manifest
    assert manifest.night == date(2026, 3, 1)
    assert manifest.size == sum(file.bytes for file in manifest.files)


@pytest.mark.parametrize("bounds", [{"minimum": 1.0, "maximum": 5.0}, {"minimum": 0.0}, {"maximum": -2.5}])
def test_bounds_of_ratings_read_back_and_those_that_are_not_named_are_not_there(manifest: Manifest, bounds):
    binary, rating = manifest.interface.objectives
    interface = replace(manifest.interface, objectives=(binary, replace(rating, **bounds)))
    told = json.loads(interface.serialise())["objectives"]
    assert told == [{"name": "liked", "kind": "binary"}, {"name": "stars", "kind": "rating"} | bounds]
    bounded = replace(manifest, interface=interface)
    assert Manifest.parse(bounded.serialise(), "shop", manifest.release) == bounded


def test_the_id_is_the_digest_of_names_sizes_and_digests_alone(manifest: Manifest):
    assert manifest.release == content_digest(reversed(manifest.files))
    for change in ({"name": "x"}, {"bytes": 1}, {"sha256": "0" * 64}):
        assert content_digest([replace(manifest.files[0], **change), *manifest.files[1:]]) != manifest.release
    assert replace(manifest, metrics={"log_loss": 0.4}).release == manifest.release


def first_file(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda found: found["files"][0].update(changes)


HOSTILE = ["../model.onnx", "/etc/passwd", "a/b", "", ".", "model.onnx\x00", "C:\\x", "𝕞odel.onnx", "m" * 5000, "-rf"]
ODD: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown schema version": lambda found: found.update(schema_version=6),
    "an older schema version with newer fields": lambda found: found.update(schema_version=1),
    "the version before with newer fields": lambda found: found.update(schema_version=4),
    "no word of what graphs open": lambda found: found.pop("graphs"),
    "no word of what a graph opens": lambda found: found["graphs"].pop("score.onnx"),
    "a graph that is not there": lambda found: found["graphs"].update({"score_int8.onnx": []}),
    "a graph that is none": lambda found: found["graphs"].update({"bank.bin": []}),
    "a graph that opens what is not there": lambda found: found["graphs"]["model.onnx"].append("zoo.bin"),
    "a graph that opens a hostile name": lambda found: found["graphs"].update({"model.onnx": ["../k.bin"]}),
    "a graph that opens a file twice": lambda found: found["graphs"]["model.onnx"].append("statistics.bin"),
    "a graph that opens files in disorder": lambda found: found["graphs"]["model.onnx"].reverse(),
    "a graph that opens no list": lambda found: found["graphs"].update({"lookup.onnx": "bank.bin"}),
    "no schema version": lambda found: found.pop("schema_version"),
    "text as schema version": lambda found: found.update(schema_version="1"),
    "a float as schema version": lambda found: found.update(schema_version=float(found["schema_version"])),
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
    "a bound that is no number": lambda found: found["interface"]["objectives"][1].update(maximum="5"),
    "a bound of null": lambda found: found["interface"]["objectives"][1].update(minimum=None),
    "bounds in disorder": lambda found: found["interface"]["objectives"][1].update(minimum=5.5, maximum=5.0),
    "a bound of a binary objective": lambda found: found["interface"]["objectives"][0].update(maximum=1.0),
    "an objective with another field": lambda found: found["interface"]["objectives"][1].update(median=3.0),
    "no objective": lambda found: found["interface"].update(objectives=[]),
    "output of another type": lambda found: found["interface"]["output"].update(dtype="float16"),
    "night is no date": lambda found: found["interface"].update(night="yesterday"),
    "night is a number": lambda found: found["interface"].update(night=20260301),
    "metrics is a list": lambda found: found.update(metrics=[]),
    "no requirements": lambda found: found.update(requires=None),
    "onnxruntime of no version": lambda found: found["requires"].update(onnxruntime="newest"),
    "a hostile domain": lambda found: found["requires"]["opsets"].update({"../x": 1}),
    "an opset that is no count": lambda found: found["requires"]["opsets"].update({"": "20"}),
    "segments that do not add up": lambda found: found["segments"][0].update(own=13),
    "segments of another ladder": lambda found: found["segments"][0].update(columns=["item"]),
    "segments of more levels": lambda found: found["segments"].append(found["segments"][0]),
    "a lift that is no number": lambda found: found["segments"][0]["lift"].update(mean="-1"),
    "support with another field": lambda found: found["segments"][0]["support"].update(mean=1),
    "a variant of files that are not there": lambda found: found["variants"]["int8"].update(files=["score_int8.onnx"]),
    "a variant with an odd verdict": lambda found: found["variants"]["int8"].update(verdict="maybe"),
    "a variant with a hostile name": lambda found: found["variants"].update({"../int8": found["variants"]["int8"]}),
    "something else beside it": lambda found: found["beside"].update({"x.sh": found["beside"]["run.json"]}),
    "a short digest beside it": lambda found: found["beside"]["run.json"].update(sha256="c"),
    "an input that is optional by a word": lambda found: found["interface"]["inputs"][0].update(optional="yes"),
    "an input that is not optional in words": lambda found: found["interface"]["inputs"][0].update(optional=False),
    "a hashed input of another method": lambda found: found["interface"]["inputs"][0].update(
        personal={"key_id": "k1", "method": "md5"}
    ),
    "a hashed integer": lambda found: found["interface"]["inputs"][2].update(
        personal={"key_id": "k1", "method": "hmac-sha256"}
    ),
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
        {"fencing_token": None}, {"challenger": "c" * 64}, {"share": 0.1}, {"share": 0}, {"schema_version": 2},
        {"note": "hi"}, {"moved_at": 0}, {"moved_at": "2026-03-02T01:02:03"}, {"moved_at": "now"}, {"reason": None},
        {"reason": "x" * 4001}, {"night": "20260301"},
    ],
    ids=str,
)  # fmt: skip
def test_an_odd_pointer_is_refused(change: dict[str, object]):
    found = json.loads(POINTER.serialise()) | change
    with pytest.raises(ReleaseRefused, match=r"pointer current\.json"):
        Pointer.parse(canonical(found) + b"\n")


@pytest.mark.parametrize(
    "change",
    [
        {"challenger": POINTER.release}, {"challenger": "x"}, {"challenger": None}, {"share": 10_001}, {"share": 0.5},
        {"share": True}, {"share": -1}, {"hold": 7}, {"hold": "x" * 4001}, {"move_id": None}, {"move_id": "f" * 31},
        {"move_id": "g" * 32}, {"signature": "x"}, {"signature": {"key_id": "0" * 16}},
        {"signature": {"key_id": "0" * 15, "signature": "A" * 86 + "=="}}, {"signature": {"key_id": "0" * 16,
        "signature": "A" * 84}}, {"signature": {"key_id": "0" * 16, "signature": "?" * 88}}, {"schema_version": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_odd_pointer_with_a_challenger_is_refused(change: dict[str, object]):
    found = json.loads(NEWER.serialise()) | change
    with pytest.raises(ReleaseRefused, match=r"pointer current\.json"):
        Pointer.parse(canonical(found) + b"\n")


def test_a_pointer_has_one_spelling():
    for pointer in (POINTER, NEWER):
        told = json.loads(pointer.serialise())
        assert Pointer.parse(canonical(told) + b"\n") == pointer
        for other in (
            json.dumps(told).encode(),
            canonical(told),
            canonical(told) + b"\n\n",
            b" " + canonical(told) + b"\n",
        ):
            with pytest.raises(ReleaseRefused, match="spelt"):
                Pointer.parse(other)
    escaped = POINTER.serialise().replace(b"gate", rb"g\u0061te")
    with pytest.raises(ReleaseRefused, match="spelt"):
        Pointer.parse(escaped)


def test_only_a_pointer_that_older_readers_would_misread_has_the_newer_version():
    assert POINTER.schema_version == 1
    assert json.loads(POINTER.serialise())["schema_version"] == 1
    signature = Signature("0" * 16, bytes(64))
    for change in ({"challenger": "c" * 64}, {"hold": "look at it"}, {"signature": signature}):
        newer = replace(POINTER, move_id="f" * 32, **change)
        assert newer.schema_version == 2
        assert Pointer.parse(newer.serialise()) == newer


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_manifests_that_older_versions_wrote_are_read_and_written_as_they_were(version: int):
    """Of real releases: keys alone, lists, histories, variants."""
    data = (FORMATS / f"manifest-{version}.json").read_bytes()
    told = json.loads(data)
    found = Manifest.parse(data, told["pipeline"], told["release"])
    assert found.serialise() == data
    assert (found.schema_version, found.graphs) == (version, {})
    assert set(selected(found, choose(found, "auto", "cpu"), "cpu").files) == {file.name for file in found.files}
    bounds = told | {"interface": json.loads(json.dumps(told["interface"]))}
    bounds["interface"]["objectives"][-1].update(kind="rating", minimum=1.0)
    with pytest.raises(ReleaseRefused, match="an objective has bounds, which its schema version does not have"):
        Manifest.parse(json.dumps(bounds).encode(), told["pipeline"], told["release"])
    if version == 4:
        assert found.requires is not None
        assert (set(found.variants), len(found.beside)) == ({"fp16", "int8"}, 3)
        return
    assert (found.requires, found.beside) == (None, ())
    told["interface"]["inputs"][0]["optional"] = True
    with pytest.raises(ReleaseRefused, match="optional or hashed, which its schema version does not have"):
        Manifest.parse(json.dumps(told).encode(), told["pipeline"], told["release"])


def test_a_pointer_that_an_older_version_wrote_is_read_and_written_as_it_was():
    data = (FORMATS / "pointer-1.json").read_bytes()
    assert Pointer.parse(data).serialise() == data


def with_files(manifest: Manifest, *names: str) -> Manifest:
    files = tuple(
        sorted((*manifest.files, *(ReleaseFile(name, 1, "0" * 64) for name in names)), key=lambda one: one.name)
    )
    return replace(manifest, files=files, release=content_digest(files))


def test_files_of_a_feature_may_be_there_and_others_may_not(manifest: Manifest):
    for names in (
        ["lookup_segments.bin"],
        ["lookup_cohort.bin", "lookup_vocabulary.bin"],
    ):
        more = with_files(manifest, *names)
        assert Manifest.parse(more.serialise(), "shop", more.release) == more
        older = replace(more, schema_version=1)
        with pytest.raises(ReleaseRefused, match="which no release has"):
            Manifest.parse(older.serialise(), "shop", older.release)
    for names, told in (
        (["score_feedback.onnx"], "of feedback it lacks"),
        (sorted(OPTIONAL["feedback"]), "do not agree whether requests bring feedback"),
        (["more.bin"], "which no release has"),
    ):
        odd = with_files(manifest, *names)
        with pytest.raises(ReleaseRefused, match=told):
            Manifest.parse(odd.serialise(), "shop", odd.release)


def test_sizes_and_digests_are_those_of_the_files(tmp_path: Path):
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"abc")
    a, b = describe(tmp_path)
    assert (a.name, a.bytes, a.sha256[:8]) == ("a", 3, "ba7816bf")
    assert (b.name, b.bytes, b.sha256[:8]) == ("b", 0, "e3b0c442")


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        (6, "update nightrank on this host"),
        (2**70, "update nightrank on this host"),
        *((odd, REMEDY) for odd in (0, -1, "6", None, 6.0, True, "x" * 999)),
    ],
)
def test_a_newer_schema_version_asks_for_a_newer_reader_and_an_odd_one_for_another_manifest(
    manifest: Manifest, version: object, remedy: str
) -> None:
    data = json.dumps(json.loads(manifest.serialise()) | {"schema_version": version}).encode()
    with pytest.raises(ReleaseRefused) as refused:
        Manifest.parse(data, manifest.pipeline, manifest.release)
    assert str(refused.value).endswith(f"; {remedy}")
    assert "update the reader" not in str(refused.value)
