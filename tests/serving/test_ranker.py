"""The reference reader: what it answers, what it refuses, and that it never stops answering."""

import json
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.clients.object_store import ObjectStore
from tasks.errors import (
    DeviceUnavailable,
    NightrankError,
    NoRelease,
    ReleaseRefused,
    RequestRejected,
    StoreUnavailable,
)
from tasks.release.manifest import CONTENT, Pointer, blob_key, manifest_key, pointer_key
from tasks.release.pointer import promote, read_pointer
from tasks.release.publishing import publish_release, read_manifest
from tasks.release.strict_json import canonical
from tasks.serving import loaded, sessions
from tasks.serving.ranker import Ranker
from tasks.verify import verify
from tests.releases import NIGHT, PIPELINE, Made, described_anew, smuggle

ROOT = Path(__file__).parents[2]


def release(store: ObjectStore, made: Made) -> str:
    """Publish and promote."""
    publish_release(store, PIPELINE, made.folder, made.manifest, {})
    token = read_pointer(store, PIPELINE)
    assert token is not None
    promote(store, PIPELINE, made.manifest.release, made.manifest.night, token.fencing_token)
    return made.manifest.release


def point_at(store: ObjectStore, name: str, night: Any = NIGHT, generation: int | None = None) -> None:
    """Move the pointer by hand, as somebody would who ignores our rules."""
    stored = store.get(pointer_key(PIPELINE))
    now = Pointer.parse(stored.data)
    moved = replace(now, release=name, night=night, generation=now.generation + 1 if generation is None else generation)
    store.swap(pointer_key(PIPELINE), moved.serialise(), stored.etag)


def same(ranker: Ranker, made: Made) -> None:
    """The ranker serves this release, and answers as its network does."""
    assert ranker.release == made.manifest.release
    for golden in made.golden[-2:]:
        np.testing.assert_allclose(ranker.score(golden.inputs), golden.scores, rtol=1e-5, atol=1e-5)


def overwrite(store: ObjectStore, made: Made, name: str, change: Callable[[bytes], bytes]) -> None:
    """Damage a blob in the store."""
    key = blob_key(PIPELINE, next(file.sha256 for file in made.manifest.files if file.name == name))
    data = change(store.get(key).data)
    store.delete(key)
    store.put_if_absent(key, data)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def test_it_answers_as_the_network_does(store: ObjectStore, tonight: Made):
    with Ranker(store.url, PIPELINE) as ranker:
        for golden in tonight.golden:
            np.testing.assert_allclose(ranker.score(golden.inputs), golden.scores, rtol=1e-5, atol=1e-5)
        assert (ranker.night, ranker.device, ranker.refusal) == (NIGHT, "cpu", None)
        options = ranker._follower.serving().release.runner._session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert ranker.manifest == tonight.manifest


def test_plain_lists_and_none_are_a_request(store: ObjectStore, tonight: Made):
    golden = tonight.golden[-1]
    listed = {}
    for spec in tonight.manifest.interface.inputs:
        flat = golden.inputs[spec.name].astype(object)
        missing = (flat != flat) if spec.missing is None else (flat == spec.missing)
        flat[missing] = None
        listed[spec.name] = flat.tolist()
    with Ranker(store, PIPELINE, "cpu") as ranker:
        np.testing.assert_allclose(ranker.score(json.loads(json.dumps(listed))), golden.scores, rtol=1e-5, atol=1e-5)


def test_candidates_are_ranked_by_the_first_objective_and_ties_keep_their_order(store: ObjectStore, tonight: Made):
    inputs = {name: values.copy() for name, values in tonight.golden[-2].inputs.items()}
    for spec in tonight.manifest.interface.inputs:
        if spec.per == "candidate":
            inputs[spec.name][:, 3] = inputs[spec.name][:, 1]  # twins
    with Ranker(store, PIPELINE) as ranker:
        scores, ranked = ranker.score(inputs), ranker.rank(inputs)
    assert len(ranked) == len(scores)
    for row, ranking in enumerate(ranked):
        order = sorted(range(9), key=lambda one: -scores[row, one, 0])  # sorted is stable, too
        assert [one.item for one in ranking] == inputs["item"][row][order].tolist()
        assert [one.position for one in ranking] == list(range(1, 10))
        assert [one.scores["liked"] for one in ranking] == [pytest.approx(scores[row, one, 0]) for one in order]
        assert set(ranking[0].scores) == {"liked", "stars"}


def test_an_answer_names_the_release_that_gave_it(store: ObjectStore, tonight: Made, tomorrow: Made):
    golden = tonight.golden[-2]
    with Ranker(store, PIPELINE) as ranker:
        before = ranker.answer(golden.inputs)
        release(store, tomorrow)
        assert ranker.refresh()
        after = ranker.answer(golden.inputs)
        assert after.ranked() == ranker.rank(golden.inputs)
    assert (before.manifest, after.manifest) == (tonight.manifest, tomorrow.manifest)
    np.testing.assert_array_equal(before.items, golden.inputs["item"])
    np.testing.assert_allclose(before.scores, golden.scores, rtol=1e-5, atol=1e-5)
    assert np.abs(after.scores - before.scores).max() > 0.01


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (0, 0)])
def test_no_candidates_or_no_requests_are_an_empty_answer(store: ObjectStore, tonight: Made, shape: tuple[int, int]):
    requests, candidates = shape
    inputs = {
        spec.name: tonight.golden[-2].inputs[spec.name][:requests]
        if spec.per == "request"
        else tonight.golden[-2].inputs[spec.name][:requests, :candidates]
        for spec in tonight.manifest.interface.inputs
    }
    with Ranker(store, PIPELINE) as ranker:
        assert ranker.score(inputs).shape == (requests, candidates, 2)
        assert ranker.rank(inputs) == [[]] * requests


REJECTED: dict[str, tuple[dict[str, object], str]] = {
    "digit strings": ({"zone": ["1"] * 16}, r"'zone' holds '1' of type str, expected int64"),
    "digit string array": ({"zone": np.array(["1"] * 16)}, r"'zone' has dtype <U1 .*expected int64"),
    "floats for integers": ({"item": np.ones((16, 9))}, r"'item' has dtype float64 .*expected int64"),
    "booleans for integers": ({"item": [[True] * 9] * 16}, r"'item' holds True of type bool, expected int64"),
    "numbers for strings": ({"job": [7] * 16}, r"'job' holds 7 of type int, expected string"),
    "number array for strings": ({"job": np.ones(16, np.int64)}, r"'job' has dtype int64 .*expected string"),
    "strings for numbers": ({"age": ["31"] * 16}, r"'age' holds '31' of type str, expected float32"),
    "bytes": ({"job": [b"cook"] * 16}, r"'job' holds b'cook' of type bytes, expected string"),
    "too many requests": ({"job": ["cook"] * 17}, r"'job' has shape \[17\], expected \[16\]"),
    "too few candidates": ({"genre": [["a"] * 8] * 16}, r"'genre' has shape \[16, 8\], expected \[16, 9\]"),
    "one axis too few": ({"item": [1, 2, 3]}, r"'item' has 1 axes .*expected 2: \[requests, candidates\]"),
    "one axis too many": ({"zone": [[1]] * 16}, r"'zone' has 2 axes .*expected 1: \[requests\]"),
    "ragged": ({"item": [[1] * 9] * 15 + [[1] * 8]}, r"'item' .*ragged"),
    "too large": ({"zone": [2**63] * 16}, r"'zone' holds a number that does not fit into int64"),
    "a scalar": ({"zone": 7}, r"'zone' has 0 axes"),
    "a dictionary": ({"zone": {"a": 1}}, r"'zone' has 0 axes"),
    "an unknown column": ({"colour": ["red"] * 16}, r"holds colour, which the release does not know"),
    "half a character": ({"job": ["cook"] * 15 + ["cook \ud800"]}, r"'job' holds a string with half of a surrogate"),
    "half a character in an array": ({"job": np.array(["\udfff"] * 16)}, r"'job' holds a string with half of a surr"),
    "dates": ({"age": np.zeros(16, "datetime64[D]")}, r"'age' has dtype datetime64\[D\] .*expected float32"),
}


@pytest.mark.parametrize("case", list(REJECTED))
def test_a_request_that_does_not_fit_is_rejected_by_column(store: ObjectStore, tonight: Made, case: str):
    change, message = REJECTED[case]
    with Ranker(store, PIPELINE) as ranker:
        with pytest.raises(RequestRejected, match=message):
            ranker.score({**tonight.golden[-2].inputs, **change})
        same(ranker, tonight)


def test_a_request_without_a_column_is_rejected(store: ObjectStore, tonight: Made):
    lacking = {name: values for name, values in tonight.golden[-2].inputs.items() if name != "age"}
    with Ranker(store, PIPELINE) as ranker, pytest.raises(RequestRejected, match="lacks age"):
        ranker.score(lacking)


def test_integers_of_any_width_and_odd_numbers_are_fine(store: ObjectStore, tonight: Made):
    golden = tonight.golden[-2]
    inputs = dict(golden.inputs) | {"year": np.full((16, 9), 1e300), "member": np.ones(16, bool)}
    inputs["item"] = inputs["item"].astype(np.int32)
    with Ranker(store, PIPELINE) as ranker:
        assert np.isfinite(ranker.score(inputs)).all()
        assert np.isfinite(ranker.score(inputs | {"year": np.full((16, 9), np.inf)})).all()


def test_a_refresh_swaps_to_the_new_night_and_then_has_nothing_to_do(store: ObjectStore, tonight: Made, tomorrow: Made):
    with Ranker(store, PIPELINE) as ranker:
        assert not ranker.refresh()
        release(store, tomorrow)
        same(ranker, tonight)
        assert ranker.refresh()
        same(ranker, tomorrow)
        assert ranker.night == tomorrow.manifest.night
        assert not ranker.refresh()


def test_a_rollback_is_picked_up_and_fetches_nothing(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with Ranker(store, PIPELINE, cache=tmp_path / "cache") as ranker:
        release(store, tomorrow)
        assert ranker.refresh()
        promote(store, PIPELINE, tonight.manifest.release, NIGHT, token=1, force=True)
        monkeypatch.setattr(store, "download", lambda *_: pytest.fail("fetched again"))
        assert ranker.refresh()
        same(ranker, tonight)
    assert len(list((tmp_path / "cache" / "releases").iterdir())) == 2


def test_the_cache_keeps_two_releases_and_mends_itself(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path
):
    cache = tmp_path / "cache"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / ("0" * 64)).write_bytes(b"of a release long gone")
    bank = next(file.sha256 for file in tonight.manifest.files if file.name == "bank.bin")
    (cache / "blobs" / bank).write_bytes(b"rotten")
    with Ranker(store, PIPELINE, cache=cache) as ranker:
        same(ranker, tonight)
    assert not (cache / "blobs" / ("0" * 64)).exists()
    with Ranker(store, PIPELINE, cache=cache) as ranker:
        same(ranker, tonight)


def test_the_temporary_cache_goes_when_the_ranker_closes(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ranker = Ranker(store, PIPELINE)
    assert list(tmp_path.glob("nightrank-*"))
    ranker.close()
    assert not list(tmp_path.glob("nightrank-*"))
    for use in (lambda: ranker.release, ranker.refresh, lambda: ranker.score({})):
        with pytest.raises(NoRelease, match="closed"):
            use()


def manifest_of(store: ObjectStore, made: Made, change: Callable[[dict[str, Any]], object]) -> None:
    key = manifest_key(PIPELINE, made.manifest.release)
    found = json.loads(store.get(key).data)
    change(found)
    store.delete(key)
    store.put_if_absent(key, json.dumps(found).encode())


def drop_blob(store: ObjectStore, made: Made) -> None:
    store.delete(blob_key(PIPELINE, next(f.sha256 for f in made.manifest.files if f.name == "bank.bin")))


def replay_manifest(store: ObjectStore, made: Made) -> None:
    """Lay an old manifest under the new release's id."""
    pointer = read_pointer(store, PIPELINE)
    assert pointer is not None
    old = store.get(manifest_key(PIPELINE, pointer.previous or "")).data
    key = manifest_key(PIPELINE, made.manifest.release)
    store.delete(key)
    store.put_if_absent(key, old)


DAMAGE: dict[str, Callable[[ObjectStore, Made], object]] = {
    "bit flip in the bank": lambda s, m: overwrite(s, m, "bank.bin", flipped),
    "bit flip in the golden requests": lambda s, m: overwrite(s, m, "golden.json", flipped),
    "bit flip in the interface": lambda s, m: overwrite(s, m, "interface.json", flipped),
    "truncated": lambda s, m: overwrite(s, m, "bank.bin", lambda data: data[:-1]),
    "empty": lambda s, m: overwrite(s, m, "bank.bin", lambda data: b""),
    "grown": lambda s, m: overwrite(s, m, "bank.bin", lambda data: data + b"\0"),
    "blob missing": drop_blob,
    "manifest missing": lambda s, m: s.delete(manifest_key(PIPELINE, m.manifest.release)),
    "manifest replayed": replay_manifest,
    "manifest cut": lambda s, m: manifest_of(s, m, lambda found: found.clear()),
    "wrong digest": lambda s, m: manifest_of(s, m, lambda found: found["files"][0].update(sha256="0" * 64)),
    "wrong size": lambda s, m: manifest_of(s, m, lambda found: found["files"][0].update(bytes=1)),
    "file missing": lambda s, m: manifest_of(s, m, lambda found: found["files"].pop()),
    "file extra": lambda s, m: manifest_of(
        s, m, lambda found: found["files"].append({"name": "zzz", "bytes": 1, "sha256": "0" * 64})
    ),
    "hostile name": lambda s, m: manifest_of(s, m, lambda found: found["files"][0].update(name="../../evil")),
    "another interface": lambda s, m: manifest_of(
        s, m, lambda found: found["interface"]["objectives"].reverse()
    ),
    "another night": lambda s, m: manifest_of(s, m, lambda found: found["interface"].update(night="2026-03-09")),
    "unknown schema": lambda s, m: manifest_of(s, m, lambda found: found.update(schema_version=6)),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_release_is_refused_and_the_old_one_keeps_serving(
    store: ObjectStore, tonight: Made, tomorrow: Made, damage: str, caplog: pytest.LogCaptureFixture
):
    with Ranker(store, PIPELINE) as ranker:
        release(store, tomorrow)
        DAMAGE[damage](store, tomorrow)
        assert not ranker.refresh()
        assert ranker.refusal is not None
        assert ranker.refusal.startswith("ReleaseRefused")
        assert ranker.refusal in caplog.text
        same(ranker, tonight)
    with pytest.raises(ReleaseRefused):
        Ranker(store, PIPELINE)


@pytest.mark.parametrize("name", sorted(CONTENT))
def test_no_bit_flip_is_loaded(store: ObjectStore, tonight: Made, name: str):
    """Of files that a ranker on a CPU opens; of the others nothing is claimed by it, and `verify` refuses them."""
    random = np.random.default_rng(len(name))
    whole = (tonight.folder / name).read_bytes()
    for position in random.integers(len(whole) * 8, size=6).tolist():
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        overwrite(store, tonight, name, lambda _, data=data: bytes(data))
        if name in OPENED:
            with pytest.raises(ReleaseRefused, match="SHA-256"):
                Ranker(store, PIPELINE)
    if name not in OPENED:
        with Ranker(store, PIPELINE) as ranker:
            same(ranker, tonight)
    checks = {check.name: check for check in verify(store, PIPELINE, tonight.manifest.release)}
    assert not checks["files"].fine
    assert f"{name} is damaged" in checks["files"].told
    overwrite(store, tonight, name, lambda _: whole)
    with Ranker(store, PIPELINE) as ranker:
        same(ranker, tonight)


def test_a_blob_that_rots_after_it_was_verified_harms_no_warm_ranker(store: ObjectStore, tonight: Made, tomorrow: Made):
    """What both nights share is not fetched twice, so the warm ranker swaps on the bytes that it verified."""
    with Ranker(store, PIPELINE) as ranker:
        release(store, tomorrow)
        overwrite(store, tomorrow, "base.bin", flipped)
        assert ranker.refresh()
        same(ranker, tomorrow)
    with pytest.raises(ReleaseRefused, match="SHA-256"):
        Ranker(store, PIPELINE)


def edit_golden(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads((folder / "golden.json").read_bytes())
    change(found)
    (folder / "golden.json").write_bytes(canonical(found))


def edit_weights(folder: Path, name: str, value: float) -> None:
    weights = np.fromfile(folder / name, np.float32)
    weights[:] = value
    weights.tofile(folder / name)


def edit_location(folder: Path, to: bytes) -> None:
    """Point external data elsewhere, to a name of the same length, so that the file stays valid protobuf."""
    assert len(to) == len(b"bank.bin")
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data.replace(b"bank.bin", to))


def edit_interface(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads((folder / "interface.json").read_bytes())
    change(found)
    (folder / "interface.json").write_bytes(canonical(found))


OPENED = {"bank.bin", "base.bin", "golden.json", "interface.json", "model.onnx", "statistics.bin"}
"""What a ranker on a CPU opens of the fixtures' releases."""
CRAFTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN weights": (lambda f: edit_weights(f, "base.bin", np.nan), "golden request 0 is answered nan off"),
    "infinite statistics": (lambda f: edit_weights(f, "statistics.bin", np.inf), "golden request 0 is answered"),
    "zero bank": (lambda f: edit_weights(f, "bank.bin", 0.0), "golden request"),
    "external data above": (lambda f: edit_location(f, b"../k.bin"), "does not load"),
    "external data absolute": (lambda f: edit_location(f, b"/bank.bi"), "does not load"),
    "external data elsewhere": (lambda f: edit_location(f, b"bonk.bin"), "does not load"),
    "short external data": (lambda f: (f / "bank.bin").write_bytes(b"1234"), "does not load"),
    "no graph": (lambda f: (f / "model.onnx").write_bytes(b"hello"), "does not load"),
    "empty graph": (lambda f: (f / "model.onnx").write_bytes(b""), "is refused"),
    "another graph": (lambda f: shutil.copyfile(f / "score.onnx", f / "model.onnx"), "takes other inputs"),
    "no golden requests": (lambda f: edit_golden(f, lambda g: g.update(requests=[])), "golden requests cannot be read"),
    "golden of NaN": (lambda f: edit_golden(f, lambda g: g["requests"][0]["scores"].__setitem__(0, None)), "golden"),
    "golden of another shape": (lambda f: edit_golden(f, lambda g: g["requests"][0]["shape"].append(1)), "golden"),
    "golden that lacks a column": (lambda f: edit_golden(f, lambda g: g["requests"][0]["inputs"].pop("age")), "golden"),
    "golden that is no JSON": (lambda f: (f / "golden.json").write_bytes(b"{"), "golden"),
    "golden that is a list": (lambda f: (f / "golden.json").write_bytes(b"[]"), "golden"),
    "golden with other answers": (
        lambda f: edit_golden(f, lambda g: g["requests"][3]["scores"].__setitem__(0, 0.123)),
        "golden request 3 is answered",
    ),
    "interface that differs": (
        lambda f: edit_interface(f, lambda i: i["inputs"][0].update(meaning="something else")),
        "interface.json says something else",
    ),
}


@pytest.mark.parametrize("case", list(CRAFTED))
def test_a_bad_release_whose_digests_fit_is_refused_all_the_same(
    store: ObjectStore, tonight: Made, tomorrow: Made, tmp_path: Path, case: str
):
    change, message = CRAFTED[case]
    folder = tmp_path / "crafted"
    shutil.copytree(tomorrow.folder, folder)
    change(folder)
    manifest = described_anew(tomorrow, folder)
    with Ranker(store, PIPELINE, cache=tmp_path / "cache") as ranker:
        smuggle(store, folder, manifest)
        promote(store, PIPELINE, manifest.release, manifest.night, token=1)
        outside = tmp_path / "cache/releases" / manifest.release / "k.bin"  # what `../k.bin` would find
        outside.parent.mkdir()
        outside.write_bytes((tomorrow.folder / "bank.bin").read_bytes())
        assert not ranker.refresh()
        assert ranker.refusal is not None
        assert message in ranker.refusal
        same(ranker, tonight)
        assert outside.exists()


def test_a_replayed_pointer_is_refused(store: ObjectStore, tonight: Made, tomorrow: Made):
    old = store.get(pointer_key(PIPELINE)).data
    with Ranker(store, PIPELINE) as ranker:
        release(store, tomorrow)
        assert ranker.refresh()
        store.delete(pointer_key(PIPELINE))
        store.put_if_absent(pointer_key(PIPELINE), old)
        assert not ranker.refresh()
        assert "went back from generation 2 to 1" in (ranker.refusal or "")
        same(ranker, tomorrow)


@pytest.mark.parametrize("data", [b"", b"{}", b"\x00" * 100])
def test_a_damaged_or_vanished_pointer_leaves_the_old_release(store: ObjectStore, tonight: Made, data: bytes):
    with Ranker(store, PIPELINE) as ranker:
        store.delete(pointer_key(PIPELINE))
        if data:
            store.put_if_absent(pointer_key(PIPELINE), data)
        assert not ranker.refresh()
        assert ranker.refusal
        same(ranker, tonight)


@pytest.mark.parametrize("what", ["pointer", "manifest"])
def test_what_is_too_long_is_refused_unread(store: ObjectStore, tonight: Made, tomorrow: Made, what: str):
    publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
    with Ranker(store, PIPELINE) as ranker:
        key = pointer_key(PIPELINE) if what == "pointer" else manifest_key(PIPELINE, tomorrow.manifest.release)
        if what == "manifest":
            promote(store, PIPELINE, tomorrow.manifest.release, tomorrow.manifest.night, token=1)
        store.delete(key)
        with (Path(store.url) / key).open("wb") as file:
            file.truncate(700 * 2**20)  # a hole: it takes no space
        tracemalloc.start()
        try:
            assert not ranker.refresh()
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
        assert re.match(
            rf"ReleaseRefused: {what} .* has {700 * 2**20} bytes, limit \d+, and is not read", ranker.warnings[0]
        )
        same(ranker, tonight)
        with pytest.raises(ReleaseRefused, match="is not read"):
            read_pointer(store, PIPELINE) if what == "pointer" else read_manifest(
                store, PIPELINE, tomorrow.manifest.release
            )


def test_a_pointer_to_a_release_under_another_id_or_night_is_refused(store: ObjectStore, tonight: Made, tomorrow: Made):
    publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
    with Ranker(store, PIPELINE) as ranker:
        store.put_if_absent(manifest_key(PIPELINE, "1" * 64), tomorrow.manifest.serialise())
        point_at(store, "1" * 64, tomorrow.manifest.night)
        assert not ranker.refresh()
        point_at(store, tomorrow.manifest.release, NIGHT)
        assert not ranker.refresh()
        assert "promote it again" in (ranker.refusal or "")
        same(ranker, tonight)


def test_an_ailing_store_is_a_refusal_that_passes(
    store: ObjectStore, tonight: Made, tomorrow: Made, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise StoreUnavailable("no answer in 25 s")

    with Ranker(store, PIPELINE) as ranker:
        release(store, tomorrow)
        for method in ("find", "download"):
            with monkeypatch.context() as patch:
                patch.setattr(store, method, fails)
                assert not ranker.refresh()
                assert "no answer in 25 s" in (ranker.refusal or "")
                same(ranker, tonight)
        assert ranker.refresh()
        assert ranker.refusal is None
        same(ranker, tomorrow)


def test_a_full_disk_is_a_refusal(store: ObjectStore, tonight: Made, tomorrow: Made, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Ranker(store, PIPELINE) as ranker:
        release(store, tomorrow)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "hardlink_to", full)
            assert not ranker.refresh()
        assert "No space left" in (ranker.refusal or "")
        same(ranker, tonight)


def test_without_a_champion_there_is_nothing_to_load(store: ObjectStore):
    with pytest.raises(NoRelease, match="no champion for pipeline 'other'"):
        Ranker(store, "other")


def test_demanding_a_gpu_where_there_is_none_fails(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(sessions.ctypes, "CDLL", no_driver)
    with pytest.raises(DeviceUnavailable, match="no NVIDIA driver"):
        Ranker(store, PIPELINE, "cuda")
    with Ranker(store, PIPELINE, "auto") as ranker:
        assert ranker.device == "cpu"


def test_scores_that_are_no_numbers_never_leave(store: ObjectStore, tonight: Made, monkeypatch: pytest.MonkeyPatch):
    with Ranker(store, PIPELINE) as ranker:
        serving = ranker._follower.serving().release
        poisoned = serving.run(dict(tonight.golden[-2].inputs), (16, 9))
        poisoned[2, 5, 1] = np.nan
        monkeypatch.setattr(loaded.LoadedRelease, "run", lambda *_: poisoned)
        with pytest.raises(ReleaseRefused, match="gives nan for request 2, candidate 5, objective 1"):
            ranker.score(tonight.golden[-2].inputs)


def test_every_answer_is_whole_while_releases_swap(store: ObjectStore, tonight: Made, tomorrow: Made):
    """Threads score while others refresh: each answer is exactly one release's, none fails."""
    golden = [tonight.golden[-2], tomorrow.golden[-2]]
    inputs, expected = golden[0].inputs, [one.scores for one in golden]
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    publish_release(store, PIPELINE, tomorrow.folder, tomorrow.manifest, {})
    stop, wrong, served = threading.Event(), [], [0, 0]

    def score(ranker: Ranker) -> None:
        while not stop.is_set():
            try:
                scores = ranker.score(inputs)
                which = int(np.argmin([np.abs(scores - one).max() for one in expected]))
                served[which] += 1
                if np.abs(scores - expected[which]).max() > 1e-5:
                    wrong.append(scores)
            except NightrankError as error:
                wrong.append(error)

    with Ranker(store, PIPELINE) as ranker:
        threads = [threading.Thread(target=score, args=(ranker,)) for _ in range(3)]
        [thread.start() for thread in threads]
        try:
            for turn in range(12):
                made = (tomorrow, tonight)[turn % 2]
                promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1, force=True)
                with ThreadPoolExecutor(3) as refreshers:
                    swaps = list(refreshers.map(lambda _: ranker.refresh(), range(3)))
                assert sorted(swaps) == [False, False, True]
                assert ranker.release == made.manifest.release
        finally:
            stop.set()
            [thread.join() for thread in threads]
    assert not wrong
    assert min(served) > 0


def test_importing_it_pulls_in_nothing_that_trains_or_schedules():
    forbidden = [
        "torch",
        "prefect",
        "pandas",
        "onnx",
        "onnxscript",
        "pydantic",
        "pyarrow",
        "duckdb",
        "great_expectations",
        "boto3",
        "botocore",
    ]
    forbidden += ["safetensors", "tasks.data", "tasks.learning"]
    code = f"import sys, tasks.serving.ranker; print([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
