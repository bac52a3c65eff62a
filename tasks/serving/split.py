"""Which users the challenger answers: a share of them, the same ones every time and in every process."""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

WHOLE = 10_000
"""Basis points."""


def challenged(users: Iterable[object], missing: object, salt: str, share: int) -> npt.NDArray[np.bool_]:
    """Which users belong to the challenger's share.

    A user's place among 10,000 is the SHA-256 of salt, type and key, modulo 10,000, and is his for as long as the salt
    is: when the share grows, those who were in stay in. Another salt deals anew, so that nobody is a guinea pig for
    ever. Requests without a user are the champion's.

    Args:
        users: raw keys, strings or integers, one per request.
        missing: the key that stands for none.
        salt: the challenger's release id.
        share: in basis points.

    >>> challenged(["ann", "bob", "", "eve"], "", "c0ffee", 5_000).tolist()
    [True, False, False, True]
    >>> challenged(["ann", "bob", "", "eve"], "", "c0ffee", 10_000).tolist()
    [True, True, False, True]
    """
    return np.array([user != missing and place(user, salt) < share for user in users], bool)


def place(user: object, salt: str) -> int:
    """A user's place, 0 to 9,999."""
    kind = "s" if isinstance(user, str) else "i"
    digest = hashlib.sha256(f"{salt}\n{kind}\n{user}".encode()).digest()
    return int.from_bytes(digest[:8]) % WHOLE
