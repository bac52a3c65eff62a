"""The bank: the weights of every segment in one table, and the slot that serves a row.

Shapes: G slots, slot 0 the base; K objectives; D numbers of an adapter; N rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from tasks.data.columns import Rows
from tasks.data.segments import mixed_radix, split_keys
from tasks.learning.adapters import Adaptation
from tasks.learning.ladder import Ladder, climb
from tasks.learning.material import I64, Material, Scorer

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
        refused: keys of the segments that had the rows, but whose own weights are proven to do harm.
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
    """Solve every segment from its rows before a night.

    Args:
        ladder: the segments over the rows.
        material: the rows.
        scorer: the base.
        precisions: ``[L, K, D]``.
        adaptation: how to solve.
        night: ordinal; rows of that night and later are not read.
        harmful: which segments get no weights of their own, by level, key and support; asked once per level, about
            those that have the rows for them. None refuses nobody.
        milliseconds: gets the wall time of every level, finest first (`climb`).

    Returns:
        The bank. Slots are numbered level by level, coarsest first, by key.
    """
    stages, chosen = ladder.bank_stages(night)
    levels = ladder.rows.levels
    keep: list[npt.NDArray[np.bool_]] = []
    refused: list[I64] = []
    for number, (stage, segment) in enumerate(zip(stages, chosen, strict=True)):
        at = len(levels) - 1 - number
        keys, support = np.asarray(levels[at].keys)[segment], stage.windows.lengths
        own = support > 0
        guilty = np.zeros(len(own), bool)
        if harmful is not None:
            guilty[own] = harmful(at, keys[own], support[own])
        keep.append(own & ~guilty)
        refused.append(keys[guilty])
    spent: list[float] | None = None if milliseconds is None else []
    with torch.no_grad():
        solutions = climb(stages, scorer, material, precisions, adaptation, keep, milliseconds=spent)
    if milliseconds is not None and spent is not None:
        milliseconds += reversed(spent)
    table = [precisions.new_zeros(1, *precisions.shape[1:])]
    made: list[BankLevel] = []
    size, above = 1, np.zeros(1, np.int64)
    for stage, segment, own, out, solution, level in zip(
        stages, chosen, keep, refused, solutions, reversed(levels), strict=True
    ):
        parent = above[stage.parent]  # -1 picks the last entry, which stands for the base
        slots = np.where(own, size + np.cumsum(own) - 1, parent)
        table.append(solution[torch.from_numpy(own).to(solution.device)])
        made.append(
            BankLevel(
                np.array(level.radices, np.int64),
                np.asarray(level.keys)[segment][own],
                slots[own],
                stage.windows.lengths[own],
                parent[own],
                out,
            )
        )
        size, above = size + int(own.sum()), np.r_[slots, 0]
    weights: F32 = torch.cat(table).float().cpu().numpy()
    return Bank(weights, tuple(reversed(made)))
