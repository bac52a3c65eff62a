"""Keys, signatures, and what is refused without them."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from flows import cli
from tasks.clients.object_store import ObjectStore, open_store
from tasks.errors import InvalidConfig, ObjectCorrupt, ReleaseRefused
from tasks.release import moves
from tasks.release.key_files import create_key, revoke_key, rotate_key
from tasks.release.manifest import Pointer, manifest_key, pointer_key
from tasks.release.pointer import promote, read_pointer, sign_pointer
from tasks.release.publishing import publish_release, read_manifest
from tasks.release.resigning import sign_releases
from tasks.release.signature import Signature, signature_key, signed_bytes
from tasks.release.signing import (
    KEY_VARIABLE,
    KEYS_VARIABLE,
    Keyring,
    SigningKey,
    State,
    TrustedKey,
    check_pointer,
    key_id_of,
    signer,
)
from tests.releases import NIGHT, PIPELINE, Made, next_night

RFC_8032 = (
    "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
    "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
    "655141438e7a100b",
)
"""Secret key, public key and signature of the empty message: test 1 of section 7.1."""


def trusted(key: SigningKey, state: State = "active") -> TrustedKey:
    return TrustedKey(key.key_id, key.public_key, state, "2026-03-01T00:00:00+00:00", "test")


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, key: SigningKey | None, *ring: TrustedKey) -> Path:
    """Let the environment name a key and a keyring."""
    path = folder / "keyring.json"
    path.write_bytes(Keyring(ring).serialise())
    monkeypatch.setenv(KEYS_VARIABLE, str(path))
    if key is None:
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
    else:
        private = folder / f"{key.key_id}.pem"
        if not private.exists():
            key.save(private)
        monkeypatch.setenv(KEY_VARIABLE, str(private))
    return path


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    (tmp_path / "store").mkdir()
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate()


def refuse(why: str) -> None:
    raise ReleaseRefused(why)


def test_signatures_are_those_of_the_standard() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    secret, public, signature = (bytes.fromhex(one) for one in RFC_8032)
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(secret))
    assert key.public_key == public
    assert key.key_id == hashlib.sha256(public).hexdigest()[:16]
    assert key.sign(b"").signature == signature
    Keyring((trusted(key),)).verify(Signature(key.key_id, signature), b"", refuse)
    for message, other in ((b"x", signature), (b"", signature[:-1] + b"\0")):
        with pytest.raises(ReleaseRefused, match="not over these bytes"):
            Keyring((trusted(key),)).verify(Signature(key.key_id, other), message, refuse)


def test_what_is_signed_names_kind_and_pipeline(key: SigningKey) -> None:
    said = key.sign_manifest("shop", b"{}").signature
    assert said == key.sign(b"nightrank/manifest/1\nshop\n{}").signature
    assert signed_bytes("pointer", "shop", b"{}") != signed_bytes("manifest", "shop", b"{}")


def test_a_key_is_kept_in_a_file_of_its_owner_and_read_back(key: SigningKey, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert SigningKey.load(path).key_id == key.key_id
    with pytest.raises(FileExistsError):
        key.save(path)
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(InvalidConfig, match=f"has mode {mode:04o}.*chmod 600"):
            SigningKey.load(path)


def test_only_an_ed25519_key_signs_and_errors_do_not_show_it(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data in (other, b"", b"secret words", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        path = tmp_path / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(InvalidConfig, match="is no Ed25519 key") as caught:
            SigningKey.load(path)
        assert "secret words" not in str(caught.value)
    with pytest.raises(InvalidConfig, match="cannot be read: No such file"):
        SigningKey.load(tmp_path / "none")


def test_a_keyring_reads_back_and_anything_odd_is_refused(key: SigningKey, tmp_path: Path) -> None:
    ring = Keyring((trusted(key), trusted(SigningKey.generate(), "revoked")))
    assert Keyring.parse(ring.serialise(), "ring") == ring
    assert b"PRIVATE" not in ring.serialise()
    odd: list[Callable[[dict[str, object]], object]] = [
        lambda one: one.update(key_id="0" * 16),
        lambda one: one.update(state="trusted"),
        lambda one: one.update(public_key=base64.b64encode(bytes(31)).decode()),
        lambda one: one.update(secret="x"),
        lambda one: one.pop("comment"),
    ]
    for change in odd:
        found = json.loads(ring.serialise())
        change(found["keys"][0])
        with pytest.raises(InvalidConfig, match="ring is refused"):
            Keyring.parse(json.dumps(found).encode(), "ring")
    doubled = json.dumps(json.loads(Keyring((trusted(key), trusted(key))).serialise())).encode()
    for data in (doubled, b"", b"[]", b"{}", b"x" * 2**19):
        with pytest.raises(InvalidConfig):
            Keyring.parse(data, "ring")
    with pytest.raises(InvalidConfig, match="cannot be read"):
        Keyring.load(tmp_path / "none.json")


def test_a_host_signs_with_an_active_key_or_says_why_not(
    key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert signer() is None
    use(monkeypatch, tmp_path, key, trusted(key))
    assert signer().key_id == key.key_id
    for ring, told in (
        ([trusted(key, "verify_only")], "verify_only in"),
        ([], "not in"),
        ([trusted(key, "revoked")], "revoked"),
    ):
        use(monkeypatch, tmp_path, key, *ring)
        with pytest.raises(InvalidConfig, match=told):
            signer()
    use(monkeypatch, tmp_path, None, trusted(key))
    with pytest.raises(InvalidConfig, match=f"{KEYS_VARIABLE} is set and {KEY_VARIABLE} is not"):
        signer()


def test_a_signed_night_is_published_promoted_and_read(
    store: ObjectStore, full: Made, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tmp_path, key, trusted(key))
    published = publish_release(store, PIPELINE, full.folder, full.manifest, {"run.json": b"{}"})
    assert published.signed_by == key.key_id
    assert read_manifest(store, PIPELINE, full.manifest.release).files == full.manifest.files
    pointer = promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    assert (pointer.schema_version, pointer.signature.key_id) == (2, key.key_id)
    assert read_pointer(store, PIPELINE) == pointer
    # Publishing again signs nothing anew, and changes nothing.
    before = {name: store.get(name).data for name in store.list("")}
    publish_release(store, PIPELINE, full.folder, full.manifest, {"run.json": b"other"})
    assert {name: store.get(name).data for name in store.list("")} == before


def test_another_attempts_manifest_is_never_left_without_a_signature(
    store: ObjectStore, full: Made, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It made the same files, had other provenance and no key, and was first."""
    other = replace(full.manifest, provenance={"commit": "another"})
    publish_release(store, PIPELINE, full.folder, other, {})
    use(monkeypatch, tmp_path, key, trusted(key))
    with pytest.raises(ReleaseRefused, match="no trusted key has signed it"):
        read_manifest(store, PIPELINE, other.release)
    assert not publish_release(store, PIPELINE, full.folder, full.manifest, {}).new
    assert read_manifest(store, PIPELINE, other.release) == other


def test_a_signature_is_written_before_the_manifest(
    store: ObjectStore, full: Made, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tmp_path, key, trusted(key))
    put, written = store.put_if_absent, []

    def noted(name: str, data: bytes) -> bool:
        written.append(name)
        return put(name, data)

    monkeypatch.setattr(store, "put_if_absent", noted)
    publish_release(store, PIPELINE, full.folder, full.manifest, {"run.json": b"{}"})
    assert written[-1] == manifest_key(PIPELINE, full.manifest.release)
    assert written[-2].endswith(f"{key.key_id}.sig")


def test_a_foreign_object_in_a_signatures_place_stops_the_publish(
    store: ObjectStore, full: Made, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tmp_path, key, trusted(key))
    digest = hashlib.sha256(full.manifest.serialise()).hexdigest()
    store.put_if_absent(signature_key(PIPELINE, full.manifest.release, digest, key.key_id), b"{}")
    with pytest.raises(ObjectCorrupt, match="somebody else wrote it"):
        publish_release(store, PIPELINE, full.folder, full.manifest, {})
    assert not store.exists(manifest_key(PIPELINE, full.manifest.release))


def test_a_signed_pointer_is_never_replaced_by_an_unsigned_one(
    store: ObjectStore, full: Made, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    use(monkeypatch, tmp_path, key, trusted(key))
    later = next_night(full, tmp_path / "later", NIGHT + timedelta(days=1))
    for made in (full, later):
        publish_release(store, PIPELINE, made.folder, made.manifest, {})
    pointer = promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    monkeypatch.delenv(KEY_VARIABLE), monkeypatch.delenv(KEYS_VARIABLE)
    with pytest.raises(InvalidConfig, match="is signed, and this host has no key"):
        promote(store, PIPELINE, later.manifest.release, later.manifest.night, token=2)
    assert read_pointer(store, PIPELINE) == pointer


def test_an_unsigned_pointer_is_refused_until_an_operator_signs_it(
    store: ObjectStore, full: Made, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_release(store, PIPELINE, full.folder, full.manifest, {})
    before = promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    use(monkeypatch, tmp_path, key, trusted(key))
    with pytest.raises(ReleaseRefused, match="not signed, and keys are named") as refused:
        read_pointer(store, PIPELINE)
    named = before.release[:12]
    assert f"`nightrank releases verify {named}`" in str(refused.value)
    assert f"`nightrank releases sign {named} --pointer --unsigned`" in str(refused.value)
    ring = Keyring((trusted(key),))
    with pytest.raises(ReleaseRefused, match="not signed"):
        sign_pointer(store, PIPELINE, key, ring)
    signed = sign_pointer(store, PIPELINE, key, None)
    assert read_pointer(store, PIPELINE) == signed
    assert (signed.release, signed.generation) == (before.release, before.generation + 1)
    assert sign_pointer(store, PIPELINE, key, ring) == signed
    # A signature is good for its own pipeline and its own fields.
    data = store.get(pointer_key(PIPELINE)).data
    with pytest.raises(ReleaseRefused, match="not over these bytes"):
        check_pointer(ring, "bank", data)
    with pytest.raises(ReleaseRefused, match="not over these bytes"):
        check_pointer(ring, PIPELINE, replace(Pointer.parse(data), share=0, hold="x").serialise())


def test_keys_without_the_package_refuse_everything(key: SigningKey, tmp_path: Path) -> None:
    ring = tmp_path / "ring.json"
    ring.write_bytes(Keyring((trusted(key),)).serialise())
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from tasks.serving.ranker import Ranker\n"
        "from tasks.errors import InvalidConfig\n"
        "try: Ranker('nowhere', 'shop')\n"
        "except InvalidConfig as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {KEYS_VARIABLE: str(ring)}, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "the package cryptography is not installed: nothing can be verified" in done.stdout


def test_keys_are_made_rotated_and_revoked_and_what_was_signed_stays_good_until_then(
    store: ObjectStore, full: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, later = tmp_path / "ring.json", next_night(full, tmp_path / "later", NIGHT + timedelta(days=1))
    old = create_key(ring, tmp_path / "old.pem", "first")
    monkeypatch.setenv(KEYS_VARIABLE, str(ring)), monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "old.pem"))
    publish_release(store, PIPELINE, full.folder, full.manifest, {})
    before = promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    new = rotate_key(ring, tmp_path / "new.pem", "second")
    assert [(key.key_id, key.state) for key in Keyring.load(ring).keys] == [
        (old.key_id, "verify_only"),
        (new.key_id, "active"),
    ]
    assert read_pointer(store, PIPELINE) == before
    with pytest.raises(InvalidConfig, match="verify_only in"):
        signer()
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "new.pem"))
    publish_release(store, PIPELINE, later.folder, later.manifest, {})
    key, keyring = SigningKey.load(tmp_path / "new.pem"), Keyring.load(ring)
    done = sign_releases(store, PIPELINE, key, keyring)
    assert (done.new, done.already, done.refused) == ((full.manifest.release,), (later.manifest.release,), {})
    assert (done.pointer.generation, done.pointer.signature.key_id) == (before.generation + 1, new.key_id)
    again = sign_releases(store, PIPELINE, key, keyring)
    assert (len(again.already), again.new, again.pointer) == (2, (), done.pointer)
    # With the old key revoked everything is still good, for the new one has signed it.
    assert revoke_key(ring, old.key_id).state == "revoked"
    assert read_pointer(store, PIPELINE) == done.pointer
    read_manifest(store, PIPELINE, full.manifest.release)
    assert revoke_key(ring, new.key_id).state == "revoked"
    for read in (lambda: read_pointer(store, PIPELINE), lambda: read_manifest(store, PIPELINE, later.manifest.release)):
        with pytest.raises(ReleaseRefused, match=f"key {new.key_id} has signed it, which is revoked"):
            read()


def test_what_nobody_vouches_for_is_signed_by_an_operators_word_alone(
    store: ObjectStore, full: Made, key: SigningKey, tmp_path: Path
) -> None:
    publish_release(store, PIPELINE, full.folder, full.manifest, {})
    promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    ring = Keyring((trusted(key),))
    left = sign_releases(store, PIPELINE, key, ring)
    assert (left.new, list(left.refused)) == ((), [full.manifest.release])
    assert "not signed" in left.pointer_refused
    done = sign_releases(store, PIPELINE, key, None)
    assert (done.new, done.pointer_refused) == ((full.manifest.release,), None)
    assert sign_releases(store, PIPELINE, key, ring).already == (full.manifest.release,)


def test_an_unsigned_pointer_that_the_ledger_does_not_have_is_not_signed(
    store: ObjectStore, full: Made, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, later = Keyring((trusted(key),)), next_night(full, tmp_path / "later", NIGHT + timedelta(days=1))
    path, old, new = use(monkeypatch, tmp_path, key, trusted(key)), full.manifest.release, later.manifest.release
    for made in (full, later):
        publish_release(store, PIPELINE, made.folder, made.manifest, {})
        good = promote(store, PIPELINE, made.manifest.release, made.manifest.night, token=1)

    def lies(pointer: Pointer) -> bytes:
        store.delete(pointer_key(PIPELINE))
        store.put_if_absent(pointer_key(PIPELINE), pointer.serialise())
        return pointer.serialise()

    foreign, forged = SigningKey.generate(), replace(good, release=old, night=NIGHT, generation=9, signature=None)
    for bad in (
        *(forged, foreign.sign_pointer(PIPELINE, forged)),
        *(foreign.sign_pointer(PIPELINE, replace(good, **odd)) for odd in ({"generation": 1}, {"move_id": "0" * 32})),
    ):
        data = lies(bad)
        done = sign_releases(store, PIPELINE, key, ring, [old], unsigned=True, with_pointer=False)
        assert (done.already, done.pointer, done.pointer_refused) == ((old,), None, None)
        for known, unsigned in ((ring, True), (None, False), (None, True)):
            done = sign_releases(store, PIPELINE, key, known, unsigned=unsigned)
            told = (bad.release[:12], f"generation {bad.generation} ", new[:12], good.move_id, "/ledger/")
            assert [one for one in told if one not in done.pointer_refused] == [], done.pointer_refused
        assert store.get(pointer_key(PIPELINE)).data == data
    # The remedy: an operator's own move.
    lies(forged)
    monkeypatch.delenv(KEYS_VARIABLE)
    moves.promote(store, PIPELINE, new, "somebody wrote the one before")
    monkeypatch.setenv(KEYS_VARIABLE, str(path))
    mended = read_pointer(store, PIPELINE)
    assert (mended.release, mended.generation) == (new, forged.generation + 1)
    # What the ledger says is signed, whoever signed it before.
    lies(foreign.sign_pointer(PIPELINE, mended))
    assert sign_releases(store, PIPELINE, key, ring, unsigned=True).pointer.generation == mended.generation + 1


def test_a_key_is_never_overwritten_and_an_unknown_one_not_revoked(tmp_path: Path) -> None:
    ring, private = tmp_path / "ring.json", tmp_path / "key.pem"
    made = create_key(ring, private)
    before = (ring.read_bytes(), private.read_bytes())
    for call in (create_key, rotate_key):
        with pytest.raises(InvalidConfig, match="never overwritten"):
            call(ring, private)
    with pytest.raises(InvalidConfig, match=f"has no key '0000'; it has {made.key_id}"):
        revoke_key(ring, "0000")
    with pytest.raises(InvalidConfig, match="comment has 201 characters"):
        create_key(ring, tmp_path / "other.pem", "x" * 201)
    assert (ring.read_bytes(), private.read_bytes()) == before
    assert not (tmp_path / "other.pem").exists()
    with pytest.raises(InvalidConfig, match="cannot be read"):
        rotate_key(tmp_path / "none.json", tmp_path / "other.pem")


def test_a_key_id_is_of_its_key(key: SigningKey) -> None:
    assert key_id_of(key.public_key) == key.key_id
    assert key.key_id not in repr(key)


def test_the_command_that_an_unsigned_store_is_told_to_run_signs_it(
    store: ObjectStore, full: Made, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What each refusal says is run as it stands, from the name `champion` to a store that rankers follow."""
    publish_release(store, PIPELINE, full.folder, full.manifest, {})
    promote(store, PIPELINE, full.manifest.release, NIGHT, token=1)
    use(monkeypatch, tmp_path, key, trusted(key))
    where = ["--store", store.url, "--pipeline", PIPELINE]

    def refused(*words: str) -> list[list[str]]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["releases", *words, *where])
        assert ended.value.code == 2
        block = " ".join(capsys.readouterr().err.split())
        assert block.startswith("ReleaseRefused ")
        return [told.split()[1:] for told in re.findall("`(nightrank [^`]+)`", block)]

    look, sign = refused("sign", "champion", "--unsigned")
    assert refused("sign") == [look]  # the release is what is looked at, and not the pointer that is refused
    with pytest.raises(SystemExit):  # it is not signed yet, and all else is told
        cli.main([*look, *where])
    assert "answer the golden requests" in capsys.readouterr().out
    cli.main([*sign, *where])
    assert read_manifest(store, PIPELINE, full.manifest.release) == full.manifest
    pointer = read_pointer(store, PIPELINE)
    assert pointer is not None
    assert pointer.release == full.manifest.release
