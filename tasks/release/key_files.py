"""Keys as an operator handles them: made, replaced and revoked in a keyring file.

A keyring has no secret and is handed to every ranker; the private key stays on the host that publishes.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tasks.clients.local_files import write_local
from tasks.errors import InvalidConfig
from tasks.release.signing import Keyring, SigningKey, State, TrustedKey


def create_key(keyring: Path, private: Path, comment: str = "") -> TrustedKey:
    """Make a key that signs and verifies; the keyring is made where there is none.

    Args:
        keyring: the keyring file.
        private: file to be made for the private key.
        comment: for people, up to 200 characters.

    Raises:
        InvalidConfig: there is a file for the private key already, a file cannot be written, the keyring is damaged, or
            the package `cryptography` is missing.
    """
    return _added(keyring, private, comment, _read(keyring))


def rotate_key(keyring: Path, private: Path, comment: str = "") -> TrustedKey:
    """Make a new key in place of those that sign; what they have signed stays good.

    Args, Raises: as for `create_key`; the keyring must be there.
    """
    known = Keyring.load(keyring)
    older = (_in_state(key, "verify_only") if key.state == "active" else key for key in known.keys)
    return _added(keyring, private, comment, tuple(older))


def revoke_key(keyring: Path, key_id: str) -> TrustedKey:
    """Refuse whatever a key has signed and will sign.

    Raises:
        InvalidConfig: the keyring is damaged, cannot be written, or does not have the key.
    """
    known = Keyring.load(keyring)
    key = known.find(key_id)
    if key is None:
        have = ", ".join(one.key_id for one in known.keys) or "none"
        raise InvalidConfig(f"keyring {keyring} has no key {key_id!r}; it has {have}")
    revoked = _in_state(key, "revoked")
    _write(keyring, (revoked if one == key else one for one in known.keys))
    return revoked


def _added(keyring: Path, private: Path, comment: str, known: tuple[TrustedKey, ...]) -> TrustedKey:
    key = SigningKey.generate()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    made = TrustedKey(key.key_id, key.public_key, "active", created, comment)
    _data(keyring, (*known, made))  # what cannot be read back is told before a key is made
    try:
        key.save(private)
    except OSError as error:
        raise InvalidConfig(
            f"signing key {private} cannot be made: {error.strerror}; a key is never overwritten: name a new file"
        ) from error
    _write(keyring, (*known, made))
    return made


def _read(keyring: Path) -> tuple[TrustedKey, ...]:
    return Keyring.load(keyring).keys if keyring.exists() else ()


def _write(keyring: Path, keys: Iterable[TrustedKey]) -> None:
    write_local(keyring, iter([_data(keyring, keys)]), None, f"keyring {keyring}")


def _data(keyring: Path, keys: Iterable[TrustedKey]) -> bytes:
    data = Keyring(tuple(keys)).serialise()
    Keyring.parse(data, f"keyring {keyring}")
    return data


def _in_state(key: TrustedKey, state: State) -> TrustedKey:
    return replace(key, state=state)
