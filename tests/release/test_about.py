"""Two releases side by side: what those who send requests must know."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flows.display_releases import show_difference, show_release
from tasks.clients.object_store import ObjectStore, open_store
from tasks.release.about import about, difference
from tasks.release.manifest import Manifest, Personal, Variant, manifest_key
from tasks.release.manifest_parts import LevelSegments, Lift, Support
from tasks.release.publishing import publish_release
from tasks.release.signing import KEY_VARIABLE, KEYS_VARIABLE, UNSIGNED, Keyring, SigningKey, TrustedKey
from tests.releases import PIPELINE, Made, manifest_of


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"personal": Personal("spring")}, "hmac-sha256 with key spring"),
        ({"optional": True}, "optional"),
        ({"missing": "absent"}, "missing 'absent'"),
        ({"example": "another", "meaning": "the same, told otherwise"}, None),
    ],
)
def test_whatever_a_request_needs_is_a_difference(full: Made, tmp_path: Path, change: dict, told: str | None) -> None:
    interface, found = full.manifest.interface, []
    store = open_store(str(tmp_path))
    at = next(at for at, one in enumerate(interface.inputs) if one.dtype == "string" and one.values is None)
    spec = replace(interface.inputs[at], **change)
    inputs = (*interface.inputs[:at], spec, *interface.inputs[at + 1 :])
    for one in (interface, replace(interface, inputs=inputs)):
        folder = tmp_path / f"files-{len(found)}"
        folder.mkdir()
        for path in full.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        manifest = manifest_of(folder, one)
        publish_release(store, PIPELINE, folder, manifest, {})
        found.append(about(store, PIPELINE, manifest.release))
    changed = difference(*found).interface
    assert [one.name for one in changed] == ([] if told is None else [spec.name])
    shown = StringIO()
    show_difference(Console(file=shown, width=60), difference(*found))
    assert ("requests have to change" in shown.getvalue()) == (told is not None)
    assert told is None or told in shown.getvalue()


def shown(store: ObjectStore, release: str) -> str:
    screen = StringIO()
    show_release(Console(file=screen, width=160), about(store, PIPELINE, release), store.url)
    return screen.getvalue()


def published(full: Made, store: ObjectStore, **told: object) -> Manifest:
    manifest = replace(full.manifest, **told)  # type: ignore[arg-type]
    publish_release(store, PIPELINE, full.folder, manifest, {})
    return manifest


def test_a_release_tells_whom_it_serves_by_what(full: Made, tmp_path: Path) -> None:
    lift = Lift(-0.0123, -0.02, -0.004, 7)
    support = Support(12, 61, 4321)
    levels = tuple(
        LevelSegments(one.columns, "ridge", 40, 30 - at, 8 + at, 2, support if at == 0 else None, lift if at else None)
        for at, one in enumerate(full.manifest.interface.levels)
    )
    small = full.manifest.files[0].name
    failed = Variant((small,), "CPUExecutionProvider", {"tolerance": 0.01}, {}, "failed", "AUC worse by +0.00300")
    passed = Variant(
        (small,), "CUDAExecutionProvider", {"tolerance": 0.01}, {}, "passed", "AUC falls by at most 0.0001"
    )
    store = open_store(str(tmp_path / "store"))
    manifest = published(full, store, segments=levels, variants={"fp16": passed, "int8": failed})
    lines = [line.split() for line in shown(store, manifest.release).splitlines()]
    first, second = (", ".join(level.columns).split() for level in levels[:2])
    assert [*first, "ridge", "40", "30", "8", "2", "12,", "9", "of", "10", "below", "61"] in lines
    assert [*second, "ridge", "40", "29", "9", "2", "-0.0123", "[-0.0200,", "-0.0040]"] in lines
    assert ["variant", "fp16", "passed:", "AUC", "falls", "by", "at", "most", "0.0001"] in lines
    assert ["variant", "int8", "failed:", "AUC", "worse", "by", "+0.00300"] in lines
    required = manifest.requires
    assert required is not None
    assert any(line[:3] == ["requires", "onnxruntime", f"{required.onnxruntime};"] for line in lines)
    told = about(store, PIPELINE, manifest.release).as_json()
    assert told["segments"][1]["lift"]["mean"] == -0.0123
    assert told["variants"]["int8"]["verdict"] == "failed"
    assert told["requires"]["ir_version"] == required.ir_version


def test_a_release_of_an_older_manifest_tells_what_it_can(full: Made, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    manifest = replace(full.manifest, schema_version=1, segments=(), requires=None)
    assert store.put_if_absent(manifest_key(PIPELINE, manifest.release), manifest.serialise())
    found = shown(store, manifest.release)
    for level in full.manifest.interface.levels:
        assert f"{', '.join(level.columns)}: {level.segments}" in found
    assert "variant   none but fp32" in found
    assert "requires  the manifest does not tell" in found
    assert f"signed    {UNSIGNED}" in found


def test_a_release_tells_who_has_signed_it_and_whether_this_host_believes_it(
    full: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, key, other = open_store(str(tmp_path / "store")), SigningKey.generate(), SigningKey.generate()
    key.save(tmp_path / "key.pem")
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "key.pem"))
    release = published(full, store).release
    monkeypatch.delenv(KEY_VARIABLE)
    assert about(store, PIPELINE, release).signed.keys == (key.key_id,)
    assert f"signed    by {key.key_id}; this host names no keys, so nobody looked" in shown(store, release)

    for trusted, state, vouching, told in (
        (key, "active", key.key_id, f"{key.key_id} is trusted here"),
        (key, "revoked", None, "refuse it: manifest of release"),
        (other, "active", None, "no trusted key has signed it"),
    ):
        ring = Keyring((TrustedKey(trusted.key_id, trusted.public_key, state, "2026-03-01", ""),))  # type: ignore[arg-type]
        (tmp_path / "ring.json").write_bytes(ring.serialise())
        monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "ring.json"))
        signed = about(store, PIPELINE, release).signed
        assert (signed.keys, signed.vouching) == ((key.key_id,), vouching)
        assert told in shown(store, release)
