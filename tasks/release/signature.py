"""Signatures as they lie in the store: what is signed, under which name, and how strictly one is read.

Pure standard library; `signing` has the keys. A signature of a manifest is an object of its own, named by the bytes
that it signs, so that it can be written before them and a second key can sign the same release later.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Literal

from tasks.release.strict_json import SCHEMA_VERSION, Reader, canonical

ALGORITHM = "ed25519"
SIGNATURE_BYTES = 64
LARGEST_SIGNATURE = 4096
"""Bytes of the object that holds one."""
_KEY_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Signature:
    """Who signed, and the 64 bytes."""

    key_id: str
    signature: bytes

    def as_json(self) -> dict[str, object]:
        """The signature inside a document."""
        return {"key_id": self.key_id, "signature": base64.b64encode(self.signature).decode()}

    def serialise(self) -> bytes:
        """The bytes of a signature that is an object of its own."""
        return canonical({"schema_version": SCHEMA_VERSION, "algorithm": ALGORITHM, **self.as_json()})

    @classmethod
    def read(cls, read: Reader, value: object) -> "Signature":
        """Read a signature inside a document.

        Raises:
            ReleaseRefused: it is malformed.
        """
        values = read.fields(value, "signature", ("key_id", "signature"), versioned=False)
        return cls(read_key_id(read, values["key_id"]), read_bytes(read, values["signature"], SIGNATURE_BYTES))

    @classmethod
    def parse(cls, data: bytes, what: str) -> "Signature":
        """Read a signature that is an object of its own; messages call it ``what``.

        Raises:
            ReleaseRefused: it is malformed, or of another algorithm.
        """
        read = Reader(what)
        document = read.document(data, LARGEST_SIGNATURE)
        values = read.fields(document, "signature", ("algorithm", "key_id", "signature"))
        if values["algorithm"] != ALGORITHM:
            read.refuse(f"its algorithm is {values['algorithm']!r}, this version knows {ALGORITHM}")
        found = cls.read(read, {name: values[name] for name in ("key_id", "signature")})
        if found.serialise() != data:
            read.refuse("it is not spelt as nightrank spells it")
        return found


def signed_bytes(what: Literal["manifest", "pointer"], pipeline: str, data: bytes) -> bytes:
    r"""What is signed: the document under the name of its kind and of its pipeline, so that it is good for no other.

    >>> signed_bytes("pointer", "shop", b"{}")
    b'nightrank/pointer/1\nshop\n{}'
    """
    return f"nightrank/{what}/1\n{pipeline}\n".encode() + data


def signatures_prefix(pipeline: str, release: str, sha256: str) -> str:
    """Below which the signatures of a manifest with this SHA-256 lie."""
    return f"{pipeline}/releases/{release}/signatures/{sha256}/"


def signature_key(pipeline: str, release: str, sha256: str, key_id: str) -> str:
    """Where the signature of a manifest with this SHA-256 by this key lies in the store."""
    return f"{signatures_prefix(pipeline, release, sha256)}{key_id}.sig"


def read_key_id(read: Reader, value: object) -> str:
    """The value, if it can name a key.

    Raises:
        ReleaseRefused: it cannot.
    """
    if not isinstance(value, str) or not _KEY_ID.fullmatch(value):
        read.refuse(f"key id {value!r:.80} is not 16 hexadecimal digits")
    return value


def read_bytes(read: Reader, value: object, length: int) -> bytes:
    """The value's bytes, if it is base64 of so many.

    Raises:
        ReleaseRefused: it is not.
    """
    try:
        found = base64.b64decode(read.text(value, "base64"), validate=True)
    except (binascii.Error, ValueError):
        read.refuse("base64 is expected, and something else is there")
    if len(found) != length:
        read.refuse(f"{len(found)} bytes of base64 are there, {length} are expected")
    return found
