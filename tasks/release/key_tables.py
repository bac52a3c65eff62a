"""Look-ups of many keys: a hash table in arrays that a graph gathers from, and the same look-up in numpy.

A key becomes a 64-bit integer: an integer is its own, so that an unknown one is never taken for another; a string is
hashed twice. Integers lie in the order of their buckets, and a look-up compares all places where its bucket's may lie:
as many in every bucket as there are in the fullest. What it costs does not grow with the number of keys, and nothing
is built when a release is loaded: the arrays are mapped as they lie.

Hashes of neighbouring seeds are not independent: a tenth of the strings that collide under one collide under the next.
So seeds are far apart, and the second hash is that of the string behind a prefix, which shifts it against the blocks
of four bytes that are mixed in.

Shapes: N keys, B buckets, P places that a look-up compares.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.errors import ParityBroken
from tasks.release.murmur import finish, hash_int64, hash_strings

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
PREFIX = "\x01"
"""Stands before a string where it is hashed for the second time."""
FULLEST = 16
"""Keys in a bucket at most; ten million random ones have eleven in their fullest."""
ATTEMPTS = 1000
"""Seeds that are tried."""
MOST = 2**30
"""Keys of a table at most: places are 32-bit integers."""


@dataclass(frozen=True)
class KeyTable:
    """The arrays of a look-up.

    Attributes:
        strings: whether keys are strings.
        seeds: of the hash of an integer, or of the two of a string.
        starts: place of each bucket's first key, int32 [B, 1]; B is a power of two.
        keys: 64-bit integers in the order of their buckets, int64 [N + P]; the last P are there so that every bucket
            has P places behind its start.
        values: what is found at each place, less `default`, int32 [N + P].
        probes: P.
        default: what is found of unknown keys.
    """

    strings: bool
    seeds: tuple[int, ...]
    starts: I32
    keys: I64
    values: I32
    probes: int
    default: int

    @property
    def mask(self) -> int:
        """Bits of a hash that name its bucket."""
        return len(self.starts) - 1

    def find(self, wanted: pa.Array | I64) -> I64:
        """What is found of keys [N]: the graph's own look-up, in numpy.

        >>> table = build_table(pa.array(["red", "blue"]), np.array([1, 2]), default=-1)
        >>> table.find(pa.array(["blue", "green", "red"])).tolist()
        [2, -1, 1]
        """
        integers, hashes = _integers(wanted, self.seeds)
        places = self.starts[hashes & np.uint32(self.mask)] + np.arange(self.probes)
        found = np.where(self.keys[places] == integers[:, None], self.values[places], 0)
        result: I64 = found.sum(axis=-1, dtype=np.int64) + self.default
        return result


def build_table(keys: pa.Array | I64, values: I64, default: int) -> KeyTable:
    """Lay keys out so that none of them is taken for another.

    Args:
        keys: distinct strings or integers, one or more [N].
        values: what is found of each, 32-bit integers [N].
        default: what is found of every other key.

    Returns:
        A table under the first seeds for which no two keys have the same 64 bits and no bucket holds more than
        `FULLEST` of them; equal keys in equal order give equal arrays.

    Raises:
        ParityBroken: there are no such seeds among the first `ATTEMPTS`, or too many keys.
    """
    listed = keys if isinstance(keys, pa.Array) and pa.types.is_string(keys.type) else np.asarray(keys, np.int64)
    strings = isinstance(listed, pa.Array)
    buckets = 1 << (len(listed) - 1).bit_length()
    if buckets > MOST:
        raise ParityBroken(f"a look-up has {len(listed)} keys, the limit is {MOST}; shorten the window of nights")
    if twice := len(listed) - int(pc.count_distinct(listed).as_py()) if strings else _repeats(listed):
        raise ParityBroken(
            f"{twice} of {len(listed)} keys of a look-up stand there twice; this is a defect of the export"
        )
    for attempt in range(ATTEMPTS):
        seeds = seeds_of(attempt, 2 if strings else 1)
        integers, hashes = _integers(listed, seeds)
        bucket = (hashes & np.uint32(buckets - 1)).astype(np.int64)
        sizes = np.bincount(bucket, minlength=buckets)
        probes = int(sizes.max())
        if probes <= FULLEST and not (strings and _repeats(integers)):
            break
    else:
        raise ParityBroken(
            f"{len(listed)} keys of a look-up cannot be told apart under any of {ATTEMPTS} seeds ({probes} in the "
            f"fullest bucket, limit {FULLEST}): look for keys in the lake that somebody made to collide"
        )
    order = np.argsort(bucket, kind="stable")
    starts = np.cumsum(sizes) - sizes
    # Behind the end stand the first keys again, with nothing to add: whoever asks for one has added it at its place.
    behind = np.arange(probes) % len(order)
    return KeyTable(
        strings=strings,
        seeds=seeds,
        starts=starts.astype(np.int32)[:, None],
        keys=np.concatenate([integers[order], integers[order][behind]]),
        values=np.concatenate([(values - default)[order], np.zeros(probes, np.int64)]).astype(np.int32),
        probes=probes,
        default=default,
    )


def seeds_of(attempt: int, number: int) -> tuple[int, ...]:
    """Seeds of an attempt, far apart.

    >>> seeds_of(0, 1), seeds_of(1, 2)
    ((1364076727,), (2247144487, 614249093))
    """
    return tuple(finish(np.arange(attempt * number, (attempt + 1) * number, dtype=np.uint32) + np.uint32(1)).tolist())


def _repeats(values: I64) -> int:
    """How many values stand in front of an equal one; by sorting: numpy's own way takes ten times as long."""
    ordered = np.sort(values)
    return int((ordered[1:] == ordered[:-1]).sum())


def _integers(keys: pa.Array | I64, seeds: tuple[int, ...]) -> tuple[I64, npt.NDArray[np.uint32]]:
    """The 64-bit integers of keys, and the hashes that name their buckets."""
    if not isinstance(keys, pa.Array):
        return keys, hash_int64(keys, seeds[0])
    low = hash_strings(keys, seeds[0])
    behind = pc.binary_join_element_wise(pa.scalar(PREFIX), keys, "")
    high = hash_strings(behind, seeds[1]).view(np.int32).astype(np.int64)
    return low.view(np.int32) + (high << 32), low
