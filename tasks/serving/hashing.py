"""Personal columns: callers give raw values, releases know their keyed digests.

HMAC (RFC 2104) with SHA-256: without the key nobody can try values out against what a release holds.
"""

import base64
import binascii
import hmac
import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tasks.errors import InvalidConfig
from tasks.release.manifest import InputSpec

KEY_VARIABLE = "NIGHTRANK_HASH_KEY_"
"""Environment variable, with the key's id behind it: base64 of the key."""
LEAST_BYTES = 32


class Hasher:
    """Hashes the personal columns of requests. It never shows its keys, not even by `repr`."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """Hash columns with these keys, by the column's name."""
        self._keys = dict(keys)

    @classmethod
    def of(cls, specs: Sequence[InputSpec]) -> "Hasher":
        """With the keys that the environment holds for some inputs.

        Raises:
            InvalidConfig: one is missing, no base64, or too short.
        """
        return cls({spec.name: _key(spec.personal.key_id) for spec in specs if spec.personal is not None})

    def hashed(self, spec: InputSpec, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """A column with its values hashed, in its shape; what stands for a missing value stays.

        Args:
            spec: the input.
            values: raw strings.
        """
        key = self._keys.get(spec.name)
        if key is None:
            return values
        found = np.empty(values.size, object)
        found[:] = [one if one == spec.missing else digest(key, one) for one in values.ravel().tolist()]
        return found.reshape(values.shape)


def digest(key: bytes, value: str) -> str:
    """Lower-case hexadecimal HMAC-SHA256 of a value's UTF-8 bytes, which are not normalised.

    >>> digest(b"Jefe", "what do ya want for nothing?")[:16]  # RFC 4231, test case 2
    '5bdcc146bf60754e'
    """
    return hmac.digest(key, value.encode("utf-8", "surrogatepass"), "sha256").hex()


def _key(key_id: str) -> bytes:
    name = f"{KEY_VARIABLE}{key_id}"
    try:
        key = base64.b64decode(os.environ[name], validate=True)
    except KeyError:
        raise InvalidConfig(
            f"the release has personal columns that are hashed with key {key_id}, and {name} is not set; give this "
            f"host the key that the lake was hashed with, in base64"
        ) from None
    except (binascii.Error, ValueError):
        raise InvalidConfig(f"{name} is no base64; it must hold {LEAST_BYTES} bytes or more in base64") from None
    if len(key) < LEAST_BYTES:
        raise InvalidConfig(f"{name} holds {len(key)} bytes, limit {LEAST_BYTES}; a shorter key can be guessed")
    return key
