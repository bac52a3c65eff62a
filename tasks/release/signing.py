"""Keys: who may sign a pipeline's releases and its pointer, and the check that they are what was signed.

Ed25519 (RFC 8032) by the package `cryptography`, which is loaded where a key is used and not before: a host that names
keys and lacks the package refuses everything. A private key is a PKCS#8 PEM file that only its owner can read, named by
`NIGHTRANK_SIGNING_KEY`; the public ones stand in a keyring, a JSON file named by `NIGHTRANK_TRUSTED_KEYS`.
"""

import base64
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from tasks.clients.object_store import ObjectStore, Stored
from tasks.errors import InvalidConfig, ObjectCorrupt, ObjectMissing, ReleaseRefused
from tasks.release.manifest import LARGEST_MANIFEST, Manifest, manifest_key
from tasks.release.pointer_json import LARGEST_POINTER, Pointer, pointer_key
from tasks.release.signature import (
    LARGEST_SIGNATURE,
    Signature,
    read_bytes,
    read_key_id,
    signature_key,
    signed_bytes,
)
from tasks.release.strict_json import REMEDY, SCHEMA_VERSION, Reader, canonical

KEY_VARIABLE = "NIGHTRANK_SIGNING_KEY"
"""Environment variable: path of the private key that signs."""
KEYS_VARIABLE = "NIGHTRANK_TRUSTED_KEYS"
"""Environment variable: path of the keyring."""
STATES = ("active", "verify_only", "revoked")
PUBLIC_BYTES = 32
LARGEST_KEYRING = 2**18
State = Literal["active", "verify_only", "revoked"]
UNSIGNED = "unsigned: who can write to the store can change what rankers load"
"""What is said wherever releases are published or served without keys."""


@dataclass(frozen=True)
class TrustedKey:
    """A public key.

    Attributes:
        key_id: first 16 hexadecimal digits of the SHA-256 of its bytes.
        public_key: 32 bytes.
        state: `active` signs and verifies; what a `verify_only` one has signed stays good; `revoked` is refused.
        created: UTC time, ISO 8601.
        comment: for people.
    """

    key_id: str
    public_key: bytes
    state: State
    created: str
    comment: str


@dataclass(frozen=True)
class Keyring:
    """The public keys that a publisher or a ranker trusts."""

    keys: tuple[TrustedKey, ...]

    def serialise(self) -> bytes:
        """The bytes of the keyring file."""
        keys = [{**vars(key), "public_key": base64.b64encode(key.public_key).decode()} for key in self.keys]
        return canonical({"schema_version": SCHEMA_VERSION, "keys": keys}) + b"\n"

    @classmethod
    def parse(cls, data: bytes, what: str) -> "Keyring":
        """Read a keyring; messages call it ``what``.

        Raises:
            InvalidConfig: it is malformed, or an id is not that of its key.
        """
        read = Reader(what)
        try:
            values = read.fields(read.document(data, LARGEST_KEYRING), "keyring", ("keys",))
            keys = tuple(_trusted(read, one) for one in read.sequence(values["keys"], "keys"))
            if len({key.key_id for key in keys}) != len(keys):
                read.refuse("a key is doubled")
        except ReleaseRefused as refused:
            reason = str(refused).removesuffix(f"; {REMEDY}")
            raise InvalidConfig(
                f"{reason}; `nightrank keys list` reads it, or take the one of a host it works on"
            ) from refused
        return cls(keys)

    @classmethod
    def load(cls, path: Path) -> "Keyring":
        """Read a keyring file, and make sure that this host can verify.

        Raises:
            InvalidConfig: it cannot be read, is malformed, or the package `cryptography` is missing.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidConfig(f"keyring {path} cannot be read: {error.strerror}; look at {KEYS_VARIABLE}") from error
        _ed25519()
        return cls.parse(data, f"keyring {path}")

    @classmethod
    def from_environment(cls) -> "Keyring | None":
        """The keyring that the environment names, None where it names none.

        Raises:
            InvalidConfig: as for `load`.
        """
        path = os.environ.get(KEYS_VARIABLE)
        return None if not path else cls.load(Path(path))

    def find(self, key_id: str) -> TrustedKey | None:
        """The key of an id, None where it is unknown."""
        return next((key for key in self.keys if key.key_id == key_id), None)

    def verify(self, signature: Signature, message: bytes, refuse: Callable[[str], NoReturn]) -> None:
        """Return if a trusted key has signed these bytes; call ``refuse`` with the reason otherwise."""
        from cryptography.exceptions import InvalidSignature

        key = self.find(signature.key_id)
        if key is None:
            refuse(
                f"key {signature.key_id} has signed it, which is not trusted here: add it to the keyring if it is yours"
            )
        if key.state == "revoked":
            refuse(f"key {key.key_id} has signed it, which is revoked: sign it with the active key if it is good")
        try:
            _ed25519().Ed25519PublicKey.from_public_bytes(key.public_key).verify(signature.signature, message)
        except InvalidSignature:
            refuse(f"the signature of key {key.key_id} is not over these bytes: they were changed, or are another's")


class SigningKey:
    """A private key. It is never shown, not even by `repr`."""

    def __init__(self, private: Any) -> None:
        self._private = private
        self.public_key: bytes = private.public_key().public_bytes_raw()
        self.key_id = key_id_of(self.public_key)

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new key."""
        return cls(_ed25519().Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> "SigningKey":
        """Read a private key.

        Raises:
            InvalidConfig: it cannot be read, can be read by others than its owner, is no Ed25519 key in PKCS#8 without
                a pass phrase, or the package `cryptography` is missing.
        """
        ed25519 = _ed25519()
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                data = file.read(LARGEST_KEYRING)
        except OSError as error:
            raise InvalidConfig(
                f"signing key {path} cannot be read: {error.strerror}; look at {KEY_VARIABLE}"
            ) from error
        if mode & 0o077:
            raise InvalidConfig(
                f"signing key {path} has mode {mode:04o}: others than its owner can reach it; chmod 600 it, and make a "
                f"new key if somebody may have read it"
            )
        try:
            private = load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            private = None
        if not isinstance(private, ed25519.Ed25519PrivateKey):
            raise InvalidConfig(
                f"signing key {path} is no Ed25519 key in PKCS#8 PEM without a pass phrase; make one with "
                f"`nightrank keys create`"
            )
        return cls(private)

    def save(self, path: Path) -> None:
        """Write the key to a new file that only its owner can read.

        Raises:
            FileExistsError: there is a file already; a key is never overwritten.
        """
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        data = self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def sign(self, message: bytes) -> Signature:
        """Sign bytes; equal bytes have equal signatures."""
        return Signature(self.key_id, self._private.sign(message))

    def sign_manifest(self, pipeline: str, data: bytes) -> Signature:
        """Sign the bytes of a `manifest.json`."""
        return self.sign(signed_bytes("manifest", pipeline, data))

    def sign_pointer(self, pipeline: str, pointer: Pointer) -> Pointer:
        """The pointer with a signature over all that it says."""
        return replace(pointer, signature=self.sign(signed_bytes("pointer", pipeline, pointer.unsigned())))


def key_id_of(public_key: bytes) -> str:
    """The name of a public key.

    >>> key_id_of(bytes(32))
    '66687aadf862bd77'
    """
    return hashlib.sha256(public_key).hexdigest()[:16]


def signer() -> SigningKey | None:
    """The key that signs what this host publishes, None where neither key nor keyring is named.

    Raises:
        InvalidConfig: the key cannot be used, a keyring is named and no key, or the key is not active in it: rankers
            with that keyring would refuse what is published.
    """
    path, keyring = os.environ.get(KEY_VARIABLE), Keyring.from_environment()
    if not path:
        if keyring is not None:
            raise InvalidConfig(
                f"{KEYS_VARIABLE} is set and {KEY_VARIABLE} is not: rankers with those keys would refuse what is "
                f"published unsigned; name the private key, or unset both"
            )
        return None
    key = SigningKey.load(Path(path))
    if keyring is not None:
        known = keyring.find(key.key_id)
        if known is None or known.state != "active":
            state = "not in" if known is None else f"{known.state} in"
            raise InvalidConfig(
                f"signing key {path} has id {key.key_id}, which is {state} the keyring of {KEYS_VARIABLE}: rankers "
                f"would refuse what it signs; name the active key"
            )
    return key


def find_manifest(store: ObjectStore, pipeline: str, release: str) -> Stored | None:
    """A release's manifest as it is stored, unchecked; None where there is none.

    Raises:
        ReleaseRefused: it is longer than any manifest; it is not read.
        StoreError: the store cannot be read.
    """
    return _found(store, manifest_key(pipeline, release), LARGEST_MANIFEST, f"manifest of release {release[:12]}")


def manifest_bytes(store: ObjectStore, pipeline: str, release: str) -> bytes:
    """The bytes of a release's manifest, unchecked.

    Raises:
        ObjectMissing: it was never published.
        ReleaseRefused: it is longer than any manifest.
    """
    stored = find_manifest(store, pipeline, release)
    if stored is None:
        raise ObjectMissing(
            f"{store.url} has no release {release} of pipeline {pipeline!r}; publish it first, "
            f"or look at `nightrank releases list`"
        )
    return stored.data


def find_pointer(store: ObjectStore, pipeline: str) -> Stored | None:
    """The pointer as it is stored, unchecked; None where there is none.

    Raises:
        ReleaseRefused: it is longer than any pointer; it is not read.
        StoreError: the store cannot be read.
    """
    return _found(store, pointer_key(pipeline), LARGEST_POINTER, f"pointer {pointer_key(pipeline)}")


def _found(store: ObjectStore, key: str, most: int, what: str) -> Stored | None:
    try:
        return store.find(key, most)
    except ObjectCorrupt as error:
        raise ReleaseRefused(f"{what} is refused: {error}") from error


def check_manifest(store: ObjectStore, keyring: Keyring | None, pipeline: str, release: str, data: bytes) -> Manifest:
    """A manifest that is well formed and, where there is a keyring, signed by a key of it.

    Args:
        store: where its signatures are.
        keyring: None asks for no signature.
        pipeline: the pipeline that it was looked for in.
        release: the id that it was looked for under.
        data: the bytes of `manifest.json`.

    Raises:
        ReleaseRefused: it is malformed, unsigned, or signed by no key that is trusted.
        StoreError: the store cannot be read.
    """
    if keyring is not None:
        vouching_key(store, keyring, pipeline, release, data)
    return Manifest.parse(data, pipeline, release)


def check_pointer(keyring: Keyring | None, pipeline: str, data: bytes) -> Pointer:
    """A pointer that is well formed and, where there is a keyring, signed by a key of it.

    Raises:
        ReleaseRefused: it is malformed, unsigned, or signed by no key that is trusted.
    """
    pointer = Pointer.parse(data)
    if keyring is not None:
        read = Reader(f"pointer {pointer_key(pipeline)}")
        if pointer.signature is None:
            named = pointer.release[:12]
            _refuse(
                read,
                f"it is not signed, and keys are named: look at release {named}, which it names (`nightrank releases "
                f"verify {named}`); if it is good, `nightrank releases sign {named} --pointer --unsigned` signs both "
                f"(champion, previous and challenger are names that only a signed pointer gives)",
            )
        message = signed_bytes("pointer", pipeline, pointer.unsigned())
        keyring.verify(pointer.signature, message, lambda why: _refuse(read, why))
    return pointer


def vouching_key(store: ObjectStore, keyring: Keyring, pipeline: str, release: str, data: bytes) -> TrustedKey:
    """The key of a keyring that has signed a manifest.

    Args, Raises: as for `check_manifest`.
    """
    read = Reader(f"manifest of release {release[:12]}")
    if len(data) > LARGEST_MANIFEST:
        read.refuse(f"it has {len(data)} bytes, more than the limit of {LARGEST_MANIFEST}")
    message, digest = signed_bytes("manifest", pipeline, data), hashlib.sha256(data).hexdigest()
    why = "no trusted key has signed it: `nightrank releases sign` signs what is known to be good"
    # By name and not by a list: a ranker need not be allowed to list, and whoever can write could make lists long.
    for key in sorted(keyring.keys, key=lambda one: STATES.index(one.state)):
        name = signature_key(pipeline, release, digest, key.key_id)
        size = store.size(name)
        if size is None:
            continue
        try:
            if size > LARGEST_SIGNATURE:
                read.refuse(f"{name} has {size} bytes, limit {LARGEST_SIGNATURE}")
            stored = store.find(name, LARGEST_SIGNATURE)
            signature = Signature.parse(b"" if stored is None else stored.data, f"signature {name}")
            if signature.key_id != key.key_id:
                read.refuse(f"{name} is by key {signature.key_id}")
            keyring.verify(signature, message, lambda reason: _refuse(read, reason))
            return key
        except ReleaseRefused as refused:
            why = str(refused).removeprefix(f"{read.what} is refused: ")
    raise ReleaseRefused(f"{read.what} is refused: {why}")


def _refuse(read: Reader, why: str) -> NoReturn:
    raise ReleaseRefused(f"{read.what} is refused: {why}")


def _trusted(read: Reader, value: object) -> TrustedKey:
    values = read.fields(value, "key", ("key_id", "public_key", "state", "created", "comment"), versioned=False)
    key_id, public = read_key_id(read, values["key_id"]), read_bytes(read, values["public_key"], PUBLIC_BYTES)
    if key_id != (expected := key_id_of(public)):
        read.refuse(f"key {key_id} has the id {expected}")
    state = cast(State, read.choice(values["state"], f"state of key {key_id}", STATES))
    return TrustedKey(
        *(key_id, public, state, read.text(values["created"], "created", 40)),
        read.text(values["comment"], "comment", 200),
    )


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise InvalidConfig(
            "keys are named, and the package cryptography is not installed: nothing can be verified or signed; "
            "install it, it is in the extras serving and retrain"
        ) from error
    return ed25519
