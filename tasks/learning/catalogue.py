"""What a night's users would be shown: one set of candidates, ranked for each of a sample of users by every method.

The exams ask about the rows that happened; here every user of the sample is asked about the same items. Candidates and
what is known of them come from nights before the exam's, and of the night's rows only who came, in which context:
no label of the night is read, and nothing of a later one. Items that a user has already had are not left out: that
alone would make lists differ which a method ranks the same.

What a night takes is bounded by `USERS`, `COUNTED` and `OTHERS`: at most 300,000 scores of the network, whatever its
size, and one pass over the columns `item`, `night` and `time` to count the items.

Shapes: U users, C candidates, L items of a list, K objectives, S statistics, D adapter features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tasks.data.columns import Rows
from tasks.data.contract import DataConfig
from tasks.data.statistics import StatisticsTables
from tasks.learning.adapters import Adaptation
from tasks.learning.bank import Bank
from tasks.learning.base import Base
from tasks.learning.baselines import FACTORISATION, POPULARITY
from tasks.learning.exams import CANDIDATE, ZERO_STEPS, Night
from tasks.learning.factorisation import Factorisation
from tasks.learning.material import I64, Material, Visits, newest_of_each

USERS = 200
"""Most users of a night that are asked; more are drawn at random."""
COUNTED, OTHERS = 1_000, 500
"""Candidates: the items with most rows before the night, and some of all others, drawn at random."""
LENGTH = 10
"""Items of a list."""
PAIRS = 65_536
"""About how many pairs of user and candidate are scored at a time."""
NUMBERS = 1 << 23
"""About how many numbers such pairs may have; with wide lists and vectors there are fewer pairs."""


@dataclass(frozen=True)
class Catalogue:
    """The candidates, most counted first; equal counts in the order of their ids.

    Attributes:
        items: vocabulary ids [C].
        ids: vocabulary ids of the item and of its categorical candidate columns, int64 [C, 1+Cc].
        newest: positions of the rows that say so, and all else that candidates are [C].
        known: items with a row before the night, from which the candidates were taken.
    """

    items: I64
    ids: I64
    newest: I64
    known: int

    def __len__(self) -> int:
        return len(self.items)


def catalogue(rows: Rows, night: int, seed: int, counted: int = COUNTED, others: int = OTHERS) -> Catalogue:
    """The candidates as of a night: items by how many rows they have on earlier nights, as their newest such row says.

    Args:
        rows: a window of nights.
        night: ordinal; rows of that night and later are not read.
        seed: of the draw among the items that are not the most counted.
        counted: most items that are taken by their count.
        others: most items that are drawn.
    """
    earlier = np.flatnonzero(np.asarray(rows.night) < night)
    item, time = np.asarray(rows.item)[earlier], np.asarray(rows.time)[earlier]
    count = np.bincount(item, minlength=1)
    count[0] = 0  # the unknown are no item
    known = np.flatnonzero(count)
    known = known[np.argsort(-count[known], kind="stable")]
    rest = np.random.default_rng((seed, night)).permutation(np.arange(min(counted, len(known)), len(known)))
    chosen = known[np.r_[np.arange(min(counted, len(known))), np.sort(rest[:others])]]
    last = newest_of_each(item, time, np.asarray(rows.tie)[earlier])
    at = earlier[last[np.searchsorted(item[last], chosen)]]
    return Catalogue(chosen, np.asarray(rows.candidate_ids[at]), at, len(known))


def sampled(visits: Visits, night: int, seed: int, most: int = USERS) -> Visits:
    """Some of a night's visits, drawn at random and kept in their order."""
    drawn = np.random.default_rng((seed, night)).permutation(len(visits))[:most]
    return visits.take(np.sort(drawn))


def ranked(
    night: Night,
    base: Base,
    bank: Bank,
    factorisation: Factorisation,
    statistics: StatisticsTables,
    candidates: Catalogue,
    visits: Visits,
    length: int = LENGTH,
) -> dict[str, I64]:
    """The best candidates of every user by every method, best first; equal scores in the catalogue's order.

    Args:
        night: the exam's.
        base: the base.
        bank: the exam bank; a user's slot is that of his first row of the night.
        factorisation: fitted on earlier nights.
        statistics: as of the night.
        candidates: the catalogue.
        visits: of the night, one per user.
        length: most items of a list.

    Returns:
        Method to numbers of candidates, int64 ``[K, U, L]``.
    """
    device, objectives, history = night.material.device, len(base.kinds), base.network.config.history
    rates = torch.from_numpy(statistics.item[candidates.items, :objectives]).to(device)
    weights = torch.from_numpy(bank.weights).to(device)
    adaptation = Adaptation.of(base.network, base.adapter)
    slots = bank.slots_of(night.ladder.rows, visits.rows.start)
    same = _best(rates[None], length)
    parts: dict[str, list[I64]] = {CANDIDATE: [], ZERO_STEPS: [], POPULARITY: [], FACTORISATION: []}
    with torch.no_grad():
        for block in _blocks(len(visits), len(candidates), night.material.width + history * base.network.config.hidden):
            some = visits.take(block)
            shape = (len(block), len(candidates), -1)
            inputs = _inputs(night.data, night.material, statistics, candidates, some, history)
            logits, features = (part.reshape(shape) for part in base.network(*inputs))
            own = weights[torch.from_numpy(slots[block]).to(device)]
            adapted = logits + base.network.change(adaptation.used(features, own), own)
            parts[CANDIDATE].append(_best(adapted, length))
            parts[ZERO_STEPS].append(_best(logits, length))
            parts[POPULARITY].append(np.repeat(same, len(block), axis=1))
            folded = factorisation.catalogue_scores(some, candidates.items, rates)
            parts[FACTORISATION].append(_best(folded, length))
    return {method: np.concatenate(lists, axis=1) for method, lists in parts.items()}


def _blocks(users: int, candidates: int, width: int) -> Iterator[I64]:
    """Numbers of users that are asked together, each about so many candidates of so many numbers a pair."""
    most = max(1, min(PAIRS, NUMBERS // max(width, 1)) // max(candidates, 1))
    return (np.arange(start, min(start + most, users), dtype=np.int64) for start in range(0, users, most))


def _inputs(
    data: DataConfig,
    material: Material,
    statistics: StatisticsTables,
    candidates: Catalogue,
    visits: Visits,
    history: int,
) -> tuple[Tensor, ...]:
    """What `Ranker.forward` takes for every pair of user and candidate, user by user: tensors ``[U * C, ...]``."""
    rows = material.rows
    at = np.repeat(visits.rows.start, len(candidates))
    every = np.tile(np.arange(len(candidates)), len(visits))
    names = data.named("request", "categorical")
    cohort = [np.asarray(rows.request_ids[at, names.index(name)]) for name in statistics.cohort_columns]
    asked = statistics.features(np.asarray(rows.user)[at], candidates.items[every], cohort)
    return material.pairs(at, candidates.newest[every], asked, history)


def _best(scores: Tensor, length: int) -> I64:
    """Numbers of the best candidates ``[K, U, L]`` by scores ``[U, C, K]``."""
    said = np.moveaxis(scores.float().cpu().numpy(), -1, 0)
    order: I64 = np.argsort(-said, axis=-1, kind="stable")[..., :length]
    return order
