"""MurmurHash3 in its 32-bit form, for whole columns at once: what onnxruntime's operator of that name computes.

The algorithm is Austin Appleby's ``MurmurHash3_x86_32``. Shapes: N keys.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

U32 = npt.NDArray[np.uint32]
BLOCK = 4
"""Bytes that are mixed in at a time."""


def hash_strings(keys: pa.Array, seed: int) -> U32:
    """Hashes of strings by their UTF-8 bytes.

    Args:
        keys: strings without nulls [N].
        seed: 0 to 2^32 - 1.

    >>> hash_strings(pa.array(["", "test", "Hello, world!"]), 0x9747B28C).tolist()
    [3954623016, 1883996636, 612912314]
    """
    listed = keys.cast(pa.large_string())
    offsets = np.frombuffer(listed.buffers()[1], np.int64, len(listed) + 1, 8 * listed.offset)
    text = np.frombuffer(listed.buffers()[2] or b"", np.uint8)
    longest_first = np.argsort(-np.diff(offsets), kind="stable")  # so that those with a next block are the first ones
    starts, lengths = offsets[:-1][longest_first], np.diff(offsets)[longest_first]
    state = np.full(len(lengths), seed, np.uint32)
    for begin in range(0, int(lengths.max(initial=0)) // BLOCK * BLOCK, BLOCK):
        count = int(np.searchsorted(-lengths, -(begin + BLOCK), side="right"))
        block = np.zeros(count, np.uint32)
        for place in range(BLOCK):
            block |= text[starts[:count] + (begin + place)].astype(np.uint32) << np.uint32(8 * place)
        state[:count] = _mixed(state[:count], block)
    rest, tails = np.zeros(len(lengths), np.uint32), lengths % BLOCK
    for place in range(BLOCK - 1):
        has = tails > place
        at = (starts + lengths - tails + place)[has]
        rest[has] |= text[at].astype(np.uint32) << np.uint32(8 * place)
    hashes = np.empty_like(state)
    hashes[longest_first] = finish(state ^ _scrambled(rest) ^ lengths.astype(np.uint32))
    return hashes


def hash_int64(keys: npt.NDArray[np.int64], seed: int) -> U32:
    """Hashes of integers by their eight bytes, least significant first.

    Args:
        keys: integers [N].
        seed: 0 to 2^32 - 1.

    >>> hash_int64(np.array([0x64636261_64636261]), 7).tolist() == hash_strings(pa.array(["abcdabcd"]), 7).tolist()
    True
    """
    whole = keys.astype(np.int64).view(np.uint64)
    state = np.full(whole.shape, seed, np.uint32)
    for shift in (0, 32):
        state = _mixed(state, (whole >> np.uint64(shift)).astype(np.uint32))
    return finish(state ^ np.uint32(8))


def finish(state: U32) -> U32:
    """The last step: a bijection of 32 bits in which each depends on all, so that neighbours become strangers.

    >>> finish(np.arange(3, dtype=np.uint32)).tolist()
    [0, 1364076727, 821347078]
    """
    state = state ^ (state >> np.uint32(16))
    state = state * np.uint32(0x85EBCA6B)
    state = state ^ (state >> np.uint32(13))
    state = state * np.uint32(0xC2B2AE35)
    return state ^ (state >> np.uint32(16))


def _mixed(state: U32, block: U32) -> U32:
    return _turned(state ^ _scrambled(block), 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _scrambled(block: U32) -> U32:
    return _turned(block * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _turned(values: U32, bits: int) -> U32:
    return (values << np.uint32(bits)) | (values >> np.uint32(32 - bits))
