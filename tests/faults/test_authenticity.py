"""P8: whoever can write to the store and has no key that is trusted makes no ranker with keys load anything.

Each case tampers with a release or the pointer, replays an older one, or puts parts together that do not belong
together. A ranker that serves keeps its release and says why; one that starts refuses to.
"""

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from flows import cli
from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import ReleaseRefused
from tasks.release.manifest import Manifest, Pointer, blob_key, content_digest, manifest_key, pointer_key
from tasks.release.pointer import move, promote
from tasks.release.publishing import publish_release
from tasks.release.resigning import sign_releases
from tasks.release.signature import Signature, signature_key, signed_bytes
from tasks.release.signing import KEY_VARIABLE, KEYS_VARIABLE, Keyring, SigningKey, State, TrustedKey
from tasks.release.strict_json import canonical
from tasks.serving.metrics import Metrics
from tasks.serving.ranker import Ranker
from tests.releases import NIGHT, PIPELINE, Made, make_release, next_night, shared_graph

OTHER = "bank"
"""Another pipeline of the same store, whose releases the same key signs."""


@dataclass(frozen=True)
class World:
    """Two signed releases, their pointers, and what an attacker has."""

    folder: Path
    key: SigningKey
    revoked: SigningKey
    foreign: SigningKey
    """The attacker's own."""
    first: Made
    second: Made
    pointers: tuple[bytes, ...]
    """Of the first release, of the second, and of the second with a hold."""
    others: bytes
    """The other pipeline's pointer to the same second release."""

    @property
    def ring(self) -> Path:
        return self.folder / "ring.json"

    def store(self, folder: Path) -> ObjectStore:
        shutil.copytree(self.folder / "store", folder)
        return open_store(str(folder))


def trusted(key: SigningKey, state: State = "active") -> TrustedKey:
    return TrustedKey(key.key_id, key.public_key, state, "2026-03-01T00:00:00+00:00", "")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("authenticity")
    first = make_release(folder / "first", shared_graph(tmp_path_factory, "lean"), "lean")
    second = next_night(first, folder / "second", NIGHT + timedelta(days=1))
    key, revoked, foreign = (SigningKey.generate() for _ in range(3))
    key.save(folder / "key.pem")
    (folder / "ring.json").write_bytes(Keyring((trusted(key), trusted(revoked, "revoked"))).serialise())
    (folder / "store").mkdir()
    store = open_store(str(folder / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, str(folder / "key.pem"))
        patch.setenv(KEYS_VARIABLE, str(folder / "ring.json"))
        for pipeline in (PIPELINE, OTHER):
            for made in (first, second):
                publish_release(store, pipeline, made.folder, replace(made.manifest, pipeline=pipeline), {})
                promote(store, pipeline, made.manifest.release, made.manifest.night, token=1)
                if pipeline == PIPELINE and made is first:
                    pointers = [store.get(pointer_key(PIPELINE)).data]
        pointers.append(store.get(pointer_key(PIPELINE)).data)
        move(store, PIPELINE, lambda now: replace(now, hold="look"), "look", "hold")
    pointers.append(store.get(pointer_key(PIPELINE)).data)
    others = store.get(pointer_key(OTHER)).data
    write(store, pointer_key(PIPELINE), pointers[0])
    return World(folder, key, revoked, foreign, first, second, tuple(pointers), others)


def write(store: ObjectStore, key: str, data: bytes) -> None:
    store.delete(key)
    store.put_if_absent(key, data)


def point(store: ObjectStore, world: World, **changes: Any) -> None:
    """The pointer to the second release, with fields changed under its signature."""
    write(store, pointer_key(PIPELINE), replace(Pointer.parse(world.pointers[1]), **changes).serialise())


def signed_by(key: SigningKey, world: World, store: ObjectStore) -> None:
    """A pointer that another key has signed."""
    pointer = key.sign_pointer(PIPELINE, Pointer.parse(world.pointers[1]))
    write(store, pointer_key(PIPELINE), pointer.serialise())


def signature(store: ObjectStore, world: World, data: bytes | None, name: str | None = None) -> None:
    """Put something in the place of the signature of the second release, or remove it; then point there."""
    manifest = store.get(manifest_key(PIPELINE, release(world))).data
    digest = hashlib.sha256(manifest).hexdigest()
    store.delete(signature_key(PIPELINE, release(world), digest, world.key.key_id))
    if data is not None:
        write(store, signature_key(PIPELINE, release(world), digest, name or world.key.key_id), data)
    point(store, world)


def release(world: World) -> str:
    return world.second.manifest.release


def manifest_of(store: ObjectStore, world: World) -> bytes:
    return store.get(manifest_key(PIPELINE, release(world))).data


def stored_signature(store: ObjectStore, world: World, of: str | None = None) -> bytes:
    """The good signature of a release."""
    named = of or release(world)
    digest = hashlib.sha256(store.get(manifest_key(PIPELINE, named)).data).hexdigest()
    return store.get(signature_key(PIPELINE, named, digest, world.key.key_id)).data


def manifest(store: ObjectStore, world: World, change: Callable[[dict[str, Any]], object], carry: bool = False) -> None:
    """Change the second release's manifest, perhaps with its signature carried over to the new bytes; point there."""
    told, good = json.loads(manifest_of(store, world)), stored_signature(store, world)
    change(told)
    data = json.dumps(told, sort_keys=True, indent=1).encode() + b"\n"
    write(store, manifest_key(PIPELINE, release(world)), data)
    if carry:
        write(store, signature_key(PIPELINE, release(world), hashlib.sha256(data).hexdigest(), world.key.key_id), good)
    point(store, world)


def evil(store: ObjectStore, world: World, carry: bool) -> None:
    """A release of the attacker's, whole and with digests that fit: another bank."""
    bank = bytes(world.second.bank.nbytes)
    digest = hashlib.sha256(bank).hexdigest()
    store.put_if_absent(blob_key(PIPELINE, digest), bank)
    files = tuple(
        replace(file, sha256=digest) if file.name == "bank.bin" else file for file in world.second.manifest.files
    )
    made = replace(world.second.manifest, files=files, release=content_digest(files))
    data = made.serialise()
    store.put_if_absent(manifest_key(PIPELINE, made.release), data)
    name = signature_key(PIPELINE, made.release, hashlib.sha256(data).hexdigest(), world.key.key_id)
    if carry:
        store.put_if_absent(name, stored_signature(store, world))
    # As if he had got hold of a signed pointer to it, too.
    moved = replace(Pointer.parse(world.pointers[1]), release=made.release)
    write(store, pointer_key(PIPELINE), world.key.sign_pointer(PIPELINE, moved).serialise())


def under_another_id(store: ObjectStore, world: World) -> None:
    """The first release's manifest, with its signature, where the second's was."""
    old = store.get(manifest_key(PIPELINE, world.first.manifest.release)).data
    good = stored_signature(store, world, world.first.manifest.release)
    write(store, manifest_key(PIPELINE, release(world)), old)
    digest = hashlib.sha256(old).hexdigest()
    write(store, signature_key(PIPELINE, release(world), digest, world.key.key_id), good)
    point(store, world)


def from_another_pipeline(store: ObjectStore, world: World, rename: bool) -> None:
    """The other pipeline's manifest of the very same files, with its signature."""
    data = store.get(manifest_key(OTHER, release(world))).data
    digest = hashlib.sha256(data).hexdigest()
    good = store.get(signature_key(OTHER, release(world), digest, world.key.key_id)).data
    if rename:
        told = json.loads(data)
        told["pipeline"] = PIPELINE
        data = json.dumps(told, sort_keys=True, indent=1).encode() + b"\n"
        data += b" "  # not the bytes that were signed for this pipeline
        digest = hashlib.sha256(data).hexdigest()
    write(store, manifest_key(PIPELINE, release(world)), data)
    write(store, signature_key(PIPELINE, release(world), digest, world.key.key_id), good)
    point(store, world)


def flipped(data: bytes, at: int = -1) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + (data[at + 1 :] if at != -1 else b"")


def blob(store: ObjectStore, world: World, name: str) -> None:
    file = next(file for file in world.second.manifest.files if file.name == name)
    write(store, blob_key(PIPELINE, file.sha256), flipped(store.get(blob_key(PIPELINE, file.sha256)).data))
    point(store, world)


def of_manifest(key: SigningKey, store: ObjectStore, world: World, name: str | None = None) -> bytes:
    """A signature of the second release's manifest, perhaps under another key's name."""
    said = key.sign_manifest(PIPELINE, manifest_of(store, world))
    return replace(said, key_id=name or key.key_id).serialise()


def crossed(store: ObjectStore, world: World) -> None:
    """The pointer with a true signature by the true key, over a manifest."""
    said = world.key.sign_manifest(PIPELINE, Pointer.parse(world.pointers[1]).unsigned())
    point(store, world, signature=said)


def other_algorithm(store: ObjectStore, world: World) -> None:
    told = json.loads(stored_signature(store, world)) | {"algorithm": "none"}
    signature(store, world, canonical(told))


TAMPER: dict[str, tuple[Callable[[ObjectStore, World], None], str]] = {
    "signature removed": (lambda s, w: signature(s, w, None), "no trusted key has signed it"),
    "signature empty": (lambda s, w: signature(s, w, b""), "not JSON"),
    "signature cut": (lambda s, w: signature(s, w, stored_signature(s, w)[:-10]), "not JSON"),
    "signature flipped": (
        lambda s, w: signature(s, w, Signature(w.key.key_id, flipped(w.key.sign(b"").signature)).serialise()),
        "not over these bytes",
    ),
    "signature of another algorithm": (other_algorithm, "algorithm is 'none'"),
    "signature oversized": (lambda s, w: signature(s, w, b" " * 5000), "limit 4096"),
    "signed by an unknown key": (
        lambda s, w: signature(s, w, of_manifest(w.foreign, s, w), w.foreign.key_id), "no trusted key has signed it"
    ),
    "signed by an unknown key under a trusted name": (
        lambda s, w: signature(s, w, of_manifest(w.foreign, s, w, w.key.key_id)), "not over these bytes"
    ),
    "signed by an unknown key in a trusted place": (
        lambda s, w: signature(s, w, of_manifest(w.foreign, s, w)), "is by key"
    ),
    "signed by a revoked key": (
        lambda s, w: signature(s, w, of_manifest(w.revoked, s, w), w.revoked.key_id), "which is revoked"
    ),
    "metrics changed": (lambda s, w: manifest(s, w, lambda m: m.update(metrics={"auc": 1})), "no trusted key"),
    "metrics changed, signature carried over": (
        lambda s, w: manifest(s, w, lambda m: m.update(metrics={"auc": 1}), carry=True), "not over these bytes"
    ),
    "requirements lowered": (
        lambda s, w: manifest(s, w, lambda m: m["requires"].update(onnxruntime="1.0"), carry=True),
        "not over these bytes",
    ),
    "manifest of an older schema": (
        lambda s, w: manifest(s, w, lambda m: [m.pop(n) for n in ("requires", "segments", "variants", "beside")]
                              and m.update(schema_version=1)),
        "no trusted key",
    ),
    "another bank with digests that fit": (lambda s, w: evil(s, w, False), "no trusted key has signed it"),
    "another bank with the signature of the good one": (lambda s, w: evil(s, w, True), "not over these bytes"),
    "bank flipped under a good signature": (lambda s, w: blob(s, w, "bank.bin"), "bank.bin is damaged"),
    "golden requests flipped under a good signature": (
        lambda s, w: blob(s, w, "golden.json"), "golden.json is damaged"
    ),
    "pointer unsigned": (lambda s, w: point(s, w, signature=None, move_id=None), "not signed"),
    "pointer flipped": (
        lambda s, w: point(s, w, signature=Signature(w.key.key_id, bytes(64))), "not over these bytes"
    ),
    "pointer to another release": (lambda s, w: point(s, w, release="e" * 64), "not over these bytes"),
    "pointer with another night": (lambda s, w: point(s, w, night=NIGHT), "not over these bytes"),
    "pointer of a later generation": (lambda s, w: point(s, w, generation=99), "not over these bytes"),
    "pointer with a challenger": (
        lambda s, w: point(s, w, challenger=w.first.manifest.release, share=9999), "not over these bytes"
    ),
    "pointer signed by an unknown key": (lambda s, w: signed_by(w.foreign, w, s), "which is not trusted"),
    "pointer signed by a revoked key": (lambda s, w: signed_by(w.revoked, w, s), "which is revoked"),
}  # fmt: skip
MIXED: dict[str, tuple[Callable[[ObjectStore, World], None], str]] = {
    "an older release's manifest under a newer one's id": (under_another_id, "it is the manifest of release"),
    "another pipeline's manifest": (lambda s, w: from_another_pipeline(s, w, False), "not over these bytes"),
    "another pipeline's manifest, renamed": (lambda s, w: from_another_pipeline(s, w, True), "not over these bytes"),
    "another pipeline's pointer": (
        lambda s, w: write(s, pointer_key(PIPELINE), w.others), "not over these bytes"
    ),
    "a manifest's signature on the pointer": (crossed, "not over these bytes"),
    "a hold taken from under its signature": (
        lambda s, w: write(s, pointer_key(PIPELINE), replace(Pointer.parse(w.pointers[2]), hold=None).serialise()),
        "not over these bytes",
    ),
}  # fmt: skip
CASES = TAMPER | MIXED


@pytest.mark.parametrize("case", list(CASES))
def test_what_no_trusted_key_vouches_for_is_never_loaded(world: World, tmp_path: Path, case: str) -> None:
    store, registry = world.store(tmp_path / "store"), CollectorRegistry()
    attack, told = CASES[case]
    with Ranker(store, PIPELINE, "cpu", keys=world.ring, events=Metrics(registry, PIPELINE)) as ranker:
        assert ranker.signed
        assert registry.get_sample_value("nightrank_signed", {"pipeline": PIPELINE}) == 1
        attack(store, world)
        assert not ranker.refresh()
        assert ranker.release == world.first.manifest.release
        assert ranker.refusal is not None
        assert told in ranker.refusal
    with pytest.raises(ReleaseRefused):
        Ranker(store, PIPELINE, "cpu", keys=world.ring)


def test_the_same_world_untouched_is_loaded(world: World, tmp_path: Path) -> None:
    """What makes the cases above mean something."""
    store = world.store(tmp_path / "store")
    with Ranker(store, PIPELINE, "cpu", keys=world.ring) as ranker:
        for pointer, swaps in ((world.pointers[1], True), (world.pointers[2], False)):
            write(store, pointer_key(PIPELINE), pointer)
            assert ranker.refresh() == swaps
            assert ranker.refusal is None
        assert ranker.release == release(world)
        assert isinstance(ranker.manifest, Manifest)


@pytest.mark.parametrize("replayed", [0, 1])
def test_a_pointer_that_was_good_once_is_refused_by_who_has_seen_a_later_one(
    world: World, tmp_path: Path, replayed: int
) -> None:
    """Its signature is good: only memory helps, of a ranker, of its cache folder, or of who starts it."""
    store, cache = world.store(tmp_path / "store"), tmp_path / "cache"
    write(store, pointer_key(PIPELINE), world.pointers[2])
    with Ranker(store, PIPELINE, "cpu", cache=cache, keys=world.ring) as ranker:
        write(store, pointer_key(PIPELINE), world.pointers[replayed])
        assert not ranker.refresh()
        assert "went back from generation 3" in str(ranker.refusal)
    for told in ({"cache": cache}, {"min_generation": 3}):
        with pytest.raises(ReleaseRefused, match="went back from generation 3"):
            Ranker(store, PIPELINE, "cpu", keys=world.ring, **told)


def test_a_key_that_is_revoked_while_a_ranker_serves_is_refused_at_the_next_look(world: World, tmp_path: Path) -> None:
    store, ring, registry = world.store(tmp_path / "store"), tmp_path / "ring.json", CollectorRegistry()
    shutil.copy(world.ring, ring)

    def signed() -> tuple[bool, float | None]:
        return ranker.signed, registry.get_sample_value("nightrank_signed", {"pipeline": PIPELINE})

    with Ranker(store, PIPELINE, "cpu", keys=ring, events=Metrics(registry, PIPELINE)) as ranker:
        assert signed() == (True, 1)
        ring.write_bytes(Keyring((trusted(world.key, "revoked"),)).serialise())
        write(store, pointer_key(PIPELINE), world.pointers[1])
        assert not ranker.refresh()
        assert "which is revoked" in str(ranker.refusal)
        assert signed() == (False, 0)
        shutil.copy(world.ring, ring)
        write(store, pointer_key(PIPELINE), world.pointers[0])
        assert not ranker.refresh()
        assert (signed(), ranker.refusal) == ((True, 1), None)
        # With the old key revoked, what a second one has signed stays good.
        ring.write_bytes(Keyring((trusted(world.key, "revoked"), trusted(world.foreign))).serialise())
        sign_releases(store, PIPELINE, world.foreign, None, with_pointer=False)
        assert not ranker.refresh()
        assert "which is revoked" in str(ranker.refusal)
        assert signed() == (True, 1)
        ring.write_bytes(b"{")
        assert not ranker.refresh()
        assert "InvalidConfig" in str(ranker.refusal)
        assert signed() == (False, 0)
        assert ranker.release == world.first.manifest.release


def test_a_revoked_key_shows_also_while_a_bad_release_is_not_tried_again(world: World, tmp_path: Path) -> None:
    store, ring, registry = world.store(tmp_path / "store"), tmp_path / "ring.json", CollectorRegistry()
    ring.write_bytes(Keyring((trusted(world.key), trusted(world.foreign))).serialise())
    with Ranker(
        *(store, PIPELINE, "cpu"), keys=ring, refresh_every=36_000, events=Metrics(registry, PIPELINE)
    ) as ranker:
        signed_by(world.foreign, world, store)
        store.delete(manifest_key(PIPELINE, release(world)))
        ranker._follower.poll()
        assert ranker.signed
        assert "has no manifest" in str(ranker.refusal)
        ring.write_bytes(Keyring((trusted(world.key, "revoked"), trusted(world.foreign))).serialise())
        ranker._follower.poll()
        assert "has no manifest" in str(ranker.refusal)
        assert (ranker.signed, registry.get_sample_value("nightrank_signed", {"pipeline": PIPELINE})) == (False, 0)


def test_an_operator_who_signs_a_release_signs_no_pointer_that_an_attacker_left(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, old = world.store(tmp_path / "store"), world.first.manifest.release
    monkeypatch.setenv(KEY_VARIABLE, str(world.folder / "key.pem")), monkeypatch.setenv(KEYS_VARIABLE, str(world.ring))
    forged = replace(Pointer.parse(world.pointers[0]), generation=9, signature=None).serialise()
    write(store, pointer_key(PIPELINE), forged)
    words = ["releases", "sign", "--store", str(tmp_path / "store"), "--pipeline", PIPELINE, "--unsigned"]
    cli.main([*words, old])
    assert "left as it is: releases were named" in capsys.readouterr().out
    for asked in ([*words, old, "--pointer"], words):
        with pytest.raises(SystemExit) as ended:
            cli.main(asked)
        assert (ended.value.code, "the ledger ends with" in capsys.readouterr().err.replace("\n", " ")) == (2, True)
    assert store.get(pointer_key(PIPELINE)).data == forged


def test_without_keys_a_ranker_serves_and_says_that_nothing_is_vouched_for(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = world.store(tmp_path / "store")
    with Ranker(store, PIPELINE, "cpu") as ranker:
        assert not ranker.signed
        assert "unsigned: who can write to the store" in caplog.text


VICTIM = """
import os, signal, sys
from pathlib import Path
from tasks.clients.object_store import open_store
from tasks.release.manifest import Manifest, manifest_key
from tasks.release.publishing import publish_release
url, folder, written, pipeline, release, when = sys.argv[1:]
store, manifest = open_store(url), Manifest.parse(Path(written).read_bytes(), pipeline, release)
put = store.put_if_absent
def killed(key, data):
    if key == manifest_key(pipeline, release):
        if when == "after":
            put(key, data)
        os.kill(os.getpid(), signal.SIGKILL)
    return put(key, data)
store.put_if_absent = killed
publish_release(store, pipeline, Path(folder), manifest, {"run.json": b"first"})
"""


@pytest.mark.parametrize("key_of_the_dead", ["the same", "none"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publish_that_is_killed_around_the_manifest_and_resumed_with_another_provenance_is_signed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, key_of_the_dead: str
) -> None:
    """Between signature and manifest, and just after it: what is visible in the end has its signature."""
    (tmp_path / "store").mkdir()
    made, store = world.first, open_store(str(tmp_path / "store"))
    (tmp_path / "manifest.json").write_bytes(made.manifest.serialise())
    keys = {KEY_VARIABLE: str(world.folder / "key.pem"), KEYS_VARIABLE: str(world.ring)}
    dead = subprocess.run(
        [sys.executable, "-c", VICTIM, store.url, str(made.folder), str(tmp_path / "manifest.json"), PIPELINE,
         made.manifest.release, when],
        env=os.environ | (keys if key_of_the_dead == "the same" else {}), cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert dead.returncode == -signal.SIGKILL
    assert store.exists(manifest_key(PIPELINE, made.manifest.release)) == (when == "after")
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    resumed = replace(made.manifest, provenance={"commit": "another"})
    published = publish_release(store, PIPELINE, made.folder, resumed, {"run.json": b"second"})
    assert published.new == (when == "before")
    promote(store, PIPELINE, made.manifest.release, NIGHT, token=1)
    with Ranker(store, PIPELINE, "cpu", keys=world.ring) as ranker:
        assert ranker.signed
        expected = resumed if when == "before" else made.manifest
        assert ranker.manifest.provenance == expected.provenance
        # What lies beside is the dead one's, and the manifest vouches for just that.
        (run,) = ranker.manifest.beside
        assert run.sha256 == hashlib.sha256(b"first").hexdigest()
        assert store.get(f"{PIPELINE}/releases/{made.manifest.release}/run.json").data == b"first"


def test_there_are_25_cases_or_more_and_signatures_are_64_bytes(world: World) -> None:
    assert len(CASES) + 2 >= 25
    said = json.loads(world.key.sign_manifest(PIPELINE, b"{}").serialise())["signature"]
    assert len(base64.b64decode(said)) == 64
    assert signed_bytes("manifest", PIPELINE, b"{}").startswith(b"nightrank/manifest/1\n")
