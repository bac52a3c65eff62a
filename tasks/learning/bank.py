"""The bank: the weights of every segment in one table, and the slot that serves a row.

Shapes: G slots, slot 0 the base; K objectives; D numbers of an adapter; N rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from tasks.data.columns import Rows
from tasks.data.segments import mixed_radix, split_keys
from tasks.learning.adapters import Adaptation
from tasks.learning.ladder import Ladder, Stage, solved
from tasks.learning.material import I64, Material, Scorer
from tasks.learning.shards import Shards, shard_size

F32 = npt.NDArray[np.float32]
Harmful = Callable[[int, I64, I64], npt.NDArray[np.bool_]]
"""A level's number, keys and support rows of its segments [S], to whether the weights solved from them do harm [S]."""


@dataclass(frozen=True)
class BankLevel:
    """One level's segments that have weights of their own, ascending by key.

    Attributes:
        radices: of the keys: vocabulary rows of each column when they were made.
        keys: mixed-radix keys of vocabulary ids.
        slots: rows of the bank.
        support: rows that the weights were solved from.
        parent: slot of the parent's weights.
        refused: keys of the segments that get no weights of their own, whatever rows they have: those are proven to do
            harm, or an operator holds the segment. Ascending.
    """

    radices: I64
    keys: I64
    slots: I64
    support: I64
    parent: I64
    refused: I64


@dataclass(frozen=True)
class Bank:
    """Weights ``[G, K, D]`` and, finest level first, who has which."""

    weights: F32
    levels: tuple[BankLevel, ...]

    @property
    def bytes(self) -> list[int]:
        """Bytes of every level, finest first: its segments' weights, and who they are; the base's slot is nobody's."""
        slot = self.weights[0].nbytes
        return [slot * len(one.slots) + sum(table.nbytes for table in vars(one).values()) for one in self.levels]

    def slots_of(self, rows: Rows, at: I64) -> I64:
        """The slot that serves each of the rows at positions [N]: the finest level that knows its segment."""
        slots = np.zeros(len(at), np.int64)
        for own, level in zip(reversed(self.levels), reversed(rows.levels), strict=True):
            if len(own.keys) == 0:
                continue
            segment, ids = np.unique(np.asarray(level.segment)[at], return_inverse=True)
            columns = split_keys(np.asarray(level.keys)[segment], level.radices)
            # Ids are append-only: one beyond the bank's radix is newer than the bank, which does not know it.
            known = np.asarray((columns < own.radices).all(axis=1))
            own_keys = mixed_radix(list(np.where(known[:, None], columns, 0).T), own.radices.tolist(), "bank")
            keys = np.where(known, own_keys, -1)[ids]
            found = np.minimum(np.searchsorted(own.keys, keys), len(own.keys) - 1)
            slots = np.where(own.keys[found] == keys, own.slots[found], slots)
        return slots

    def save(self, path: Path) -> None:
        """Write the bank as one safetensors file; equal banks give equal bytes."""
        tables = {"weights": self.weights}
        for number, level in enumerate(self.levels):
            tables |= {f"level{number}.{name}": value for name, value in vars(level).items()}
        save_file({name: np.ascontiguousarray(table) for name, table in tables.items()}, path)

    @classmethod
    def load(cls, path: Path) -> "Bank":
        """Read what `save` wrote."""
        tables: Mapping[str, npt.NDArray[np.generic]] = load_file(path)
        count = sum(name.endswith(".keys") for name in tables)
        levels = tuple(
            BankLevel(*(tables[f"level{number}.{name}"].astype(np.int64) for name in BankLevel.__dataclass_fields__))
            for number in range(count)
        )
        return cls(tables["weights"].astype(np.float32), levels)


def fill_bank(
    ladder: Ladder,
    material: Material,
    scorer: Scorer,
    precisions: Tensor,
    adaptation: Adaptation,
    night: int,
    harmful: Harmful | None = None,
    milliseconds: list[float] | None = None,
) -> Bank:
    """Solve every segment from its rows before a night, shard by shard.

    Beside the bank itself, memory is bounded by a shard and does not grow with rows or segments, but for one number a
    segment of the level above the one that is solved: who serves it.

    Args:
        ladder: the segments over the rows.
        material: the rows.
        scorer: the base.
        precisions: ``[L, K, D]``.
        adaptation: how to solve.
        night: ordinal; rows of that night and later are not read.
        harmful: which segments get no weights of their own, by level, key and support; asked once per shard, about
            those that have the rows for them. None refuses nobody.
        milliseconds: gets the wall time of every level, finest first: its support read and scored, its systems solved.
            Arithmetic that another device was given is waited for, and only then. The first level of a process also
            pays for what libraries load on first use.

    Returns:
        The bank. Slots are numbered level by level, coarsest first, by key. Memory of segments that were refused stays
        behind its end.
    """
    rows, limits = ladder.rows, ladder.segments
    shape, device = precisions.shape[1:], precisions.device
    size = shard_size(shape.numel())
    shards = [Shards(rows, at, limits, night, size) for at in range(len(rows.levels))]
    table = torch.zeros(1 + sum(of_level.own for of_level in shards), *shape, dtype=precisions.dtype)
    made: list[BankLevel] = []
    spent: list[float] = []
    end, above = 1, np.zeros(1, np.int64)
    for at, level in reversed(list(enumerate(rows.levels))):
        number, order = at + (0 if ladder.personal else 1), np.asarray(level.order)
        tables = {name: np.zeros(shards[at].own, np.int64) for name in ("keys", "slots", "support", "parent")}
        refused = [np.zeros(0, np.int64)]
        # Who serves each of the level's segments; of the finest one nobody asks.
        served = np.zeros(1 + (level.size if at else 0), np.int64)
        begin, took = end, 0.0
        for shard in shards[at]:
            keys, support = np.asarray(level.keys)[shard.segment], shard.windows.lengths
            own = support > 0
            guilty = np.zeros(len(own), bool)
            if harmful is not None:
                guilty[own] = harmful(at, keys[own], support[own])
            kept = own & ~guilty
            parent = above[shard.parent]  # -1 picks the last entry, which stands for the base
            begun = 0.0 if milliseconds is None else _now(precisions)
            with torch.no_grad():
                inherited = table[torch.from_numpy(parent)].to(device)
                stage = Stage(number, order, shard.windows, parent)
                solution = inherited + solved(stage, inherited, scorer, material, precisions[number], adaptation)
                count = int(np.count_nonzero(kept))
                table[end : end + count] = solution[torch.from_numpy(kept).to(device)].cpu()
            took += 0.0 if milliseconds is None else 1000 * (_now(precisions) - begun)
            slots = np.where(kept, end + np.cumsum(kept) - 1, parent)
            place = slice(end - begin, end - begin + count)
            for name, values in {"keys": keys, "slots": slots, "support": support, "parent": parent}.items():
                tables[name][place] = values[kept]
            if at:
                served[shard.segment] = slots
            refused.append(keys[guilty])
            end += count
        radices = np.array(level.radices, np.int64)
        own_tables = {name: values[: end - begin] for name, values in tables.items()}
        made.append(BankLevel(radices=radices, **own_tables, refused=np.concatenate(refused)))
        spent.append(took)
        above = served
    if milliseconds is not None:
        milliseconds += reversed(spent)
    weights: F32 = table[:end].float().numpy()
    return Bank(weights, tuple(reversed(made)))


def _now(near: Tensor) -> float:
    """Seconds of a clock, read when the device that holds a tensor has done what it was given."""
    if near.is_cuda:
        torch.cuda.synchronize(near.device)
    return perf_counter()
