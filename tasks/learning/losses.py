"""The losses of a training: of an episode, which is minimised, and of the stop nights, which says when to end."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks.errors import TrainingDiverged
from tasks.learning.adapters import Adaptation, Precisions
from tasks.learning.checkpoint import Weights
from tasks.learning.descent import in_mixed_precision
from tasks.learning.ensemble import combined, soft_labels
from tasks.learning.episodes import QUERY_ROWS, Scores, row_loss, score_visits
from tasks.learning.material import I64, Scorer, Visits
from tasks.learning.networks import Ranker
from tasks.learning.rehearsal import Rehearsal
from tasks.learning.setting import Setting

STOP_SUPPORT = (0, 5, 20)
"""Same-night support rows at which the stop nights are scored: those of the exams."""


class Losses:
    """The losses of one training.

    Args:
        setting: what it reads.
        teachers: members of an ensemble, towards whose mean predictions it is trained as well; they stay as they are.
    """

    def __init__(self, setting: Setting, teachers: Sequence[Weights] = ()) -> None:
        self.setting, self.teachers = setting, teachers
        for network, _ in teachers:
            network.eval()

    def of_rows(self, scores: Tensor, labels: Tensor, at: I64) -> Tensor:
        """Loss of scores of the rows at positions, weighed by row and by objective."""
        mass = self.setting.material.weights(at)
        return row_loss(scores, labels, self.setting.shape.kinds, self.setting.objectives, mass)

    def of_step(self, network: Ranker, precisions: Precisions, visits: Visits, after: I64) -> tuple[Tensor, Tensor]:
        """Loss of visits after adaptation, and the one that is minimised.

        The network may run in mixed precision; everything that follows it is float32: the solves, and every loss.
        """
        training, material = self.setting.training, self.setting.material
        if training.outer == "joint":
            at = visits.rows.flat()[0]
            loss = self.of_rows(self._scorer(network)(at)[0], material.labels(at), at)
            return loss, loss
        scores = self._episodes(network, precisions, visits, after)
        labels = material.labels(scores.rows)
        adapted = loss = self.of_rows(scores.adapted, labels, scores.rows)
        if self.teachers:
            taught = soft_labels(self._said(visits, after), labels, self.setting.shape.kinds)
            told = self.of_rows(scores.adapted, taught, scores.rows)
            loss = (1 - training.distill) * adapted + training.distill * told
        if training.base_weight > 0:
            loss = loss + training.base_weight * self.of_rows(scores.base, labels, scores.rows)
        return adapted, loss

    def _scorer(self, network: Ranker) -> Scorer:
        scorer = self.setting.material.scorer(network)
        return in_mixed_precision(scorer, self.setting.device) if self.setting.training.mixed_precision else scorer

    def _episodes(self, network: Ranker, precisions: Precisions, visits: Visits, after: I64) -> Scores:
        setting = self.setting
        adaptation = Adaptation.of(network, setting.adapter, setting.training.outer == "first_order")
        return score_visits(
            *(setting.ladder, visits, after, self._scorer(network), setting.material, precisions()),
            *(adaptation, QUERY_ROWS),
        )

    def _said(self, visits: Visits, after: I64) -> Tensor:
        """What the teachers say of the query rows, each adapted to the support in its own way ``[T, K]``."""
        with torch.no_grad():
            scores = [self._episodes(*teacher, visits, after).adapted for teacher in self.teachers]
        return combined(scores, self.setting.shape.kinds)

    def of_stop(self, network: Ranker, precisions: Precisions, stop: Visits) -> float:
        """Adapted loss on the stop nights, averaged over the supports of the exams.

        Raises:
            TrainingDiverged: it is not finite.
        """
        network.eval()
        with torch.no_grad():
            adaptation = Adaptation.of(network, self.setting.adapter)
            loss = self.mean_stop(self.setting.material.scorer(network), precisions(), adaptation, stop)
        if not np.isfinite(loss):
            raise TrainingDiverged(
                f"the stop loss of night {self.setting.night} is {loss}; look for extreme numbers in the data"
            )
        return loss

    def mean_stop(self, scorer: Scorer, precisions: Tensor, adaptation: Adaptation, stop: Visits) -> float:
        """The same for any scorer, any precisions ``[L, K, D]`` and any way to adapt."""
        return self._mean_stop(lambda *asked: self._adapted(scorer, precisions, adaptation, *asked), stop)

    def rehearsed(
        self, scorer: Scorer, like: Tensor, adaptation: Adaptation, stop: Visits
    ) -> Callable[[Tensor], float]:
        """`mean_stop` of one scorer as a function of precisions alone, quick to ask many times.

        Args:
            scorer: the base.
            like: precisions as they will be given ``[L, K, D]``.
            adaptation: how to solve.
            stop: the visits.
        """
        setting, material = self.setting, self.setting.material
        asked = [
            (Rehearsal(setting.ladder, visits, after, scorer, material, like, adaptation), at, material.labels(at))
            for visits, after, at in contests(stop)
        ]

        def loss(precisions: Tensor) -> float:
            said = (self.of_rows(one.scores(precisions).adapted, labels, at) for one, at, labels in asked)
            return _mean(map(float, said))

        return loss

    def of_teachers(self, stop: Visits) -> float:
        """The same for the teachers' mean predictions."""
        scorers = [
            (self.setting.material.scorer(network), precisions(), Adaptation.of(network, self.setting.adapter))
            for network, precisions in self.teachers
        ]

        def score(visits: Visits, after: I64) -> Tensor:
            return combined([self._adapted(*one, visits, after) for one in scorers], self.setting.shape.kinds)

        with torch.no_grad():
            return self._mean_stop(score, stop)

    def _adapted(
        self, scorer: Scorer, precisions: Tensor, adaptation: Adaptation, visits: Visits, after: I64
    ) -> Tensor:
        setting = self.setting
        return score_visits(setting.ladder, visits, after, scorer, setting.material, precisions, adaptation).adapted

    def _mean_stop(self, score: Callable[[Visits, I64], Tensor], stop: Visits) -> float:
        return _mean(
            float(self.of_rows(score(longer, after), self.setting.material.labels(at), at))
            for longer, after, at in contests(stop)
        )


def contests(stop: Visits) -> Iterator[tuple[Visits, I64, I64]]:
    """For each support of the exams the visits that are longer, how many of their rows are support, and the others."""
    for support in STOP_SUPPORT:
        longer = stop.take(np.flatnonzero(stop.rows.lengths > support))
        if len(longer):
            after = np.full(len(longer), support)
            yield longer, after, longer.split(after)[1].flat()[0]


def _mean(losses: Iterable[float]) -> float:
    found = list(losses)
    return sum(found) / len(found)
