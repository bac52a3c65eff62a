"""Visits that are adapted and scored again and again, under one choice of precisions after the other.

Shapes: V visits, T query rows, L levels, K objectives, D adapter features.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from tasks.learning.adapters import Adaptation
from tasks.learning.episodes import Scores
from tasks.learning.ladder import Ladder, Read, Stage, inherit, own_weights, read
from tasks.learning.material import I64, Material, Scorer, Visits

REMEMBERED = 32_000_000
"""Most numbers that the adapters read of a history, kept in memory with their scores while precisions are looked for;
beyond it they are read anew."""


class Rehearsal:
    """`episodes.score_visits` for one base and many precisions, with the same answers.

    Supports are read and scored once, and a level is solved again only if its precisions or a coarser level's have
    changed.

    Args:
        ladder: the segments.
        visits: whose rows are scored [V].
        after: rows of each visit that are support [V].
        scorer: logits and features of positions.
        material: labels of the support.
        like: precisions as they will be given ``[L, K, D]``, for their shape; D is at least 1.
        adaptation: how to solve.
        most: numbers of the supports that are kept in memory; beyond it they are read anew.
    """

    def __init__(
        self,
        ladder: Ladder,
        visits: Visits,
        after: I64,
        scorer: Scorer,
        material: Material,
        like: Tensor,
        adaptation: Adaptation,
        most: int = REMEMBERED,
    ) -> None:
        self._adaptation = adaptation
        self._rows, self._visit = visits.split(after)[1].flat()
        self._logits, self._features = scorer(self._rows)
        self._stages = ladder.plan(visits, after)
        size = adaptation.size(like[0])
        self._reads: list[Callable[[], Iterable[Read]]] = [
            partial(read, stage, scorer, material, size) for stage in self._stages
        ]
        width = self._features.shape[-1] + 2 * self._logits.shape[-1] + 1
        if sum(int(stage.windows.lengths.sum()) for stage in self._stages) * width <= most:
            self._reads = [partial(list[Read], list(reads())) for reads in self._reads]
        self._solved: list[tuple[Tensor, Tensor]] = []

    def scores(self, precisions: Tensor) -> Scores:
        """Scores of the query rows under precisions ``[L, K, D]``."""
        solved: list[tuple[Tensor, Tensor]] = []
        for number, (stage, reads) in enumerate(zip(self._stages, self._reads, strict=True)):
            precision = precisions[stage.level]
            known = self._solved[number] if number < len(self._solved) else None
            if known is None or not torch.equal(known[0], precision):
                self._solved = []  # what is finer stands on this level
                known = precision.clone(), self._weights(stage, reads(), [own for _, own in solved], precisions)
            solved.append(known)
        self._solved = solved
        adapted = self._adaptation.scores(self._logits, self._features, solved[-1][1], self._visit)
        return Scores(self._rows, self._logits, adapted)

    def _weights(self, stage: Stage, reads: Iterable[Read], above: list[Tensor], precisions: Tensor) -> Tensor:
        inherited = inherit(stage, above, precisions)
        given = (part for one in reads for part in one.padded(inherited, self._adaptation))
        return inherited + own_weights(given, inherited, precisions[stage.level], self._adaptation)
