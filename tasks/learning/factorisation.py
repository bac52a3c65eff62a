"""Matrix factorisation as a baseline: factors of items from earlier nights, a user folded in from his own support.

Shapes: N rows, T query rows, V visits, C items, K objectives, F factors.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.closed_form import Rated, factorise, noise
from tasks.learning.episodes import score_visits
from tasks.learning.ladder import Ladder, climb
from tasks.learning.material import I64, Material, Scorer, Visits
from tasks.learning.solvers import ObjectiveKind

HELD = 1e9
"""Precision of the ladder's levels that a baseline does not have: their weights stay 0."""
FOLD_IN = AdapterConfig(kind="ridge")


def held_but_own(ladder: Ladder, objectives: int, width: int, strength: float) -> Tensor:
    """Precisions ``[L, K, width]`` that leave only the user's own level free."""
    levels = len(ladder.segments.levels) + (0 if ladder.personal else 1)
    table = torch.full((levels, objectives, width), HELD)
    table[0] = strength
    return table


def item_rate(material: Material, at: I64, objectives: int) -> Tensor:
    """As-of rates of the items of rows at positions [N], in model units ``[N, K]``."""
    rates = np.ascontiguousarray(material.rows.statistics[at, :objectives])
    return torch.from_numpy(rates).to(material.device)


class Factorisation:
    """Factors of items, fitted on the residuals of their as-of rates; a user's weights are a ridge on his support.

    Args:
        ladder: the segments over the rows, of which the user's own is used.
        material: the rows.
        kinds: kind of each objective.
        earlier: positions of the rows that factors are fitted on.
        factors: F.
        strength: precision of factors, users' biases and users' weights, in rows.
        sweeps: passes of alternating least squares.
        seed: of the first factors.
    """

    def __init__(
        self,
        ladder: Ladder,
        material: Material,
        kinds: tuple[ObjectiveKind, ...],
        earlier: I64,
        *,
        factors: int,
        strength: float,
        sweeps: int,
        seed: int,
    ) -> None:
        self.ladder, self.material, self.kinds = ladder, material, kinds
        self._held = held_but_own(ladder, len(kinds), 1 + factors, strength).to(material.device)
        count = int(np.asarray(material.rows.item)[earlier].max(initial=0)) + 1
        self.tables: list[Tensor] = []
        for objective in range(len(kinds)):
            start = np.random.default_rng(seed).normal(0.0, 0.1, (count, factors))
            self.tables.append(self._fitted(objective, earlier, start, strength, sweeps))

    def scores(self, visits: Visits, after: I64) -> Tensor:
        """Scores ``[T, K]``, before the sigmoid, of each visit's rows after its first `after`, which are support."""
        columns = [
            score_visits(
                *(self.ladder, visits, after, scorer, self.material),
                *(self._held, Adaptation(self.kinds, FOLD_IN)),
            ).adapted[:, objective]
            for objective, scorer in enumerate(self._scorers())
        ]
        return torch.stack(columns, dim=1)

    def catalogue_scores(self, visits: Visits, items: I64, rates: Tensor) -> Tensor:
        """Scores of the same items for every visit, before the sigmoid, the users folded in from earlier nights.

        Args:
            visits: whose users are folded in [V].
            items: vocabulary ids [C].
            rates: the items' as-of rates in model units ``[C, K]``.

        Returns:
            ``[V, C, K]``.
        """
        nothing = np.zeros(len(visits), np.int64)
        stages = self.ladder.plan(visits, nothing)
        columns = []
        for objective, scorer in enumerate(self._scorers()):
            solved = climb(stages, scorer, self.material, self._held, Adaptation(self.kinds, FOLD_IN))[-1][:, objective]
            table = self.tables[objective]
            known = table[self._known(torch.from_numpy(items).to(table.device), len(table))]
            columns.append(rates[:, objective] + solved[:, :1] + solved[:, 1:] @ known.T)
        return torch.stack(columns, dim=-1)

    def _scorers(self) -> Iterator[Scorer]:
        return (self._folded(table) for table in self.tables)

    def _folded(self, table: Tensor) -> Scorer:
        def scorer(at: I64) -> tuple[Tensor, Tensor]:
            items = self._items(at, len(table))
            rate = item_rate(self.material, at, len(self.kinds))
            return rate, torch.cat([torch.ones_like(rate[:, :1]), table[items]], dim=1)

        return scorer

    def _items(self, at: I64, known: int) -> Tensor:
        items = torch.from_numpy(np.ascontiguousarray(self.material.rows.item[at])).to(self.material.device)
        return self._known(items, known)

    def _known(self, items: Tensor, known: int) -> Tensor:
        return torch.where(items < known, items, torch.zeros_like(items))

    def _fitted(
        self,
        objective: int,
        at: I64,
        start: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
        strength: float,
        sweeps: int,
    ) -> Tensor:
        users, user = np.unique(np.asarray(self.material.rows.user)[at], return_inverse=True)
        rated = Rated(
            users=torch.from_numpy(user.astype(np.int64)).to(self.material.device),
            offsets=item_rate(self.material, at, len(self.kinds))[:, [objective]],
            labels=self.material.labels(at)[:, [objective]],
            weights=self.material.weights(at),
            kinds=(self.kinds[objective],),
            count=len(users),
            strength=strength,
            bias_strength=strength,
            sweeps=sweeps,
        )
        items, begin = self._items(at, len(start)), torch.from_numpy(start).to(self.material.device)
        if self.kinds[objective] == "rating":
            rated = replace(rated, noise=(noise(rated, items, begin),))
        return factorise(rated, items, begin)
