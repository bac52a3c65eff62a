"""First contact through a request: what a ranker says whose users bring what they have just done.

The bank is that of the night before, and everything else that a request says is as of the night itself: its request
columns, the statistics of every row of the feedback, and the newest of the user's rows, which are the feedback. It is
solved by the function that is traced into a release's graphs, from the weights of the user's coarser segment.

Shapes: V visits, T query rows, F rows of feedback, K objectives, D adapter features.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tasks.data.statistics import StatisticsTables
from tasks.learning.bank import Bank
from tasks.learning.base import Base
from tasks.learning.exams import F32, SUPPORTS, Night, contact, gather, probability
from tasks.learning.feedback import adapted
from tasks.learning.material import I64, PADDED_ROWS, Visits, Windows

FEEDBACK, NIGHTLY_BANK = "feedback", "nightly bank"


def sit_feedback(night: Night, base: Base, bank: Bank, statistics: StatisticsTables, most: int) -> dict[str, F32]:
    """Predictions in first contact of users with feedback, and of the same rows under the nightly bank alone.

    Args:
        night: whose visits are scored.
        base: with adapters that a graph solves from feedback, the user's level the finest.
        bank: everybody's weights from earlier nights.
        statistics: as of the night.
        most: rows of feedback that a request holds, the newest of the user's earlier nights and of his visit's first.

    Returns:
        Column name to predictions [N], NaN where the row is not query.
    """
    predictions: dict[str, F32] = {}
    for support in SUPPORTS:

        def asked(visits: Visits, support: int = support) -> dict[str, tuple[I64, Tensor]]:
            _, query = visits.split(np.full(len(visits), support, np.int64))
            visits = visits.take(np.flatnonzero(query.lengths > 0))
            border, query = visits.split(np.full(len(visits), support, np.int64))
            at, visit = query.flat()
            logits, features = night.material.scorer(base.network)(at)
            weights = torch.from_numpy(bank.weights).to(logits.device)
            own = _solved(night, base, bank, statistics, visits, border, most)
            said = {
                FEEDBACK: base.adaptation.scores(logits, features, own, visit),
                NIGHTLY_BANK: base.adaptation.scores(logits, features, weights, bank.slots_of(night.ladder.rows, at)),
            }
            return {name: (at, probability(scores, base.kinds)) for name, scores in said.items()}

        predictions |= gather(night, contact(support), asked)
    return predictions


def _solved(
    night: Night, base: Base, bank: Bank, statistics: StatisticsTables, visits: Visits, border: I64, most: int
) -> Tensor:
    """Weights ``[V, K, D]`` that serve visits which bring their rows before a border."""
    rows, material = night.ladder.rows, night.material
    table = torch.from_numpy(bank.weights).to(material.device)
    above = replace(rows, levels=rows.levels[1:])
    parents = table[torch.from_numpy(Bank(bank.weights, bank.levels[1:]).slots_of(above, border)).to(table.device)]
    own = table[torch.from_numpy(bank.slots_of(rows, border)).to(table.device)]
    windows = Windows(np.maximum(visits.first, border - most), border)
    found = [own[:0]]
    size = max(1, PADDED_ROWS // most)
    for begin in range(0, len(visits), size):
        part = slice(begin, begin + size)
        some = windows.take(np.arange(len(visits))[part])
        at, visit = some.flat()
        asked = border[part][visit]
        logits, features = base.network(*material.pairs(asked, at, _as_of(night, statistics, asked, at)))
        # A caller gives the newest first; the oldest are behind them, and then nothing.
        cell = tuple(torch.from_numpy(one).to(logits.device) for one in (visit, some.stop[visit] - 1 - at))
        longest = int(some.lengths.max(initial=0))
        filled = (
            part_of.new_full((len(some), longest, part_of.shape[-1]), fill).index_put(cell, part_of)
            for part_of, fill in (
                (logits, 0.0),
                (features[:, : table.shape[-1]], 0.0),
                (material.labels(at), torch.nan),
            )
        )
        padded, of_rows, labels = filled
        precision, steps = base.table()[0], base.adapter.steps
        found.append(adapted(padded, of_rows, labels, parents[part], own[part], precision, base.kinds, steps, most))
    return torch.cat(found)


def _as_of(night: Night, statistics: StatisticsTables, asked: I64, at: I64) -> F32:
    """Statistics [T, S] of rows' items, as of the night, for who asks and in the segment that he is in."""
    rows, names = night.ladder.rows, night.data.named("request", "categorical")
    cohort = [np.asarray(rows.request_ids[asked, names.index(name)]) for name in statistics.cohort_columns]
    return statistics.features(np.asarray(rows.user)[asked], np.asarray(rows.item)[at], cohort)
