"""Strengths for a short history: every visit is scored by closed forms that have not seen it.

A night held back to choose by is a night less to solve factors from, and of a short history there are few. So the
visits are dealt into folds; for each fold the closed forms are solved without its visits, and score those. Nearly all
rows take part in solving, and each is asked about once. Source: Stone, Cross-validatory Choice and Assessment of
Statistical Predictions, 1974; Chernozhukov et al., Double/Debiased Machine Learning, 2018 (cross-fitting).

Shapes: V visits, L levels, K objectives, D adapter features.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tasks.learning.adapters import Adaptation
from tasks.learning.episodes import counted_losses
from tasks.learning.losses import contests
from tasks.learning.material import I64, Visits
from tasks.learning.networks import Ranker
from tasks.learning.priors import MOST_USERS
from tasks.learning.rehearsal import REMEMBERED, Rehearsal
from tasks.learning.setting import Setting
from tasks.learning.starts import newest

FOLDS = 4
"""Parts that the visits are dealt into."""


@dataclass(frozen=True)
class Fold:
    """Visits, and a network whose closed forms are solved from all rows but theirs."""

    network: Ranker
    visits: Visits


def dealt(
    setting: Setting,
    begun: Ranker,
    visits: Visits,
    solve: Callable[[Ranker, I64], None],
    random: np.random.Generator,
) -> list[Fold]:
    """Deal visits into folds and solve the closed forms of each without them.

    A user's other visits stay, as do other users' of later nights: of what factors say of an item, no visit's labels
    reach the scores of that visit.

    Args:
        setting: the rows, of which those of the nights before the setting's are read.
        begun: where each solution begins: a network solved from rows of none of the visits.
        visits: to be dealt; where they are many, some of them.
        solve: solves the closed forms of a network on rows at positions.
        random: deals.
    """
    if len(visits) > MOST_USERS:
        visits = visits.take(np.sort(random.choice(len(visits), MOST_USERS, replace=False)))
    fold = random.permutation(len(visits)) % FOLDS
    found = []
    for number in range(min(FOLDS, len(visits))):
        held_out = visits.take(np.flatnonzero(fold == number))
        others = np.flatnonzero(~np.isin(setting.visits.rows.start, held_out.rows.start))
        network = copy.deepcopy(begun)
        solve(network, newest(setting.rows, setting.visits.take(others), setting.training.start_rows))
        found.append(Fold(network.eval(), held_out))
    return found


def losses_by_visit(setting: Setting, folds: Sequence[Fold], like: Tensor) -> Callable[[Tensor], Tensor]:
    """What every visit of the folds adds to the mean loss, as a function of precisions ``[L, K, D]``.

    The mean is over the query rows after every support of the exams alike: a support that few visits go beyond has as
    little say as it has rows.

    Args:
        setting: the rows.
        folds: from `dealt`.
        like: precisions as they will be given ``[L, K, D]``.

    Returns:
        From precisions to parts of the loss ``[V]``, whose sum it is; the visits fold by fold.
    """
    material, kinds = setting.material, setting.shape.kinds
    asked, total, first = [], torch.zeros(len(kinds), dtype=torch.float64, device=setting.device), 0
    for fold in folds:
        adaptation, scorer = Adaptation.of(fold.network, setting.adapter), material.scorer(fold.network)
        for visits, after, at in contests(fold.visits):
            most = REMEMBERED // len(folds)
            rehearsal = Rehearsal(setting.ladder, visits, after, scorer, material, like, adaptation, most)
            labels, mass = material.labels(at), material.weights(at)
            number = first + np.searchsorted(fold.visits.rows.start, visits.rows.start)
            visit = torch.from_numpy(number[visits.split(after)[1].flat()[1]]).to(total.device)
            total += (~torch.isnan(labels) * mass[:, None]).double().sum(dim=0)
            asked.append((rehearsal, labels, mass, visit))
        first += len(fold.visits)
    worth = setting.objectives.double() / torch.where(total > 0, total, torch.ones_like(total))

    def told(precisions: Tensor) -> Tensor:
        found = total.new_zeros(first)
        for rehearsal, labels, mass, visit in asked:
            loss, _ = counted_losses(rehearsal.scores(precisions).adapted, labels, kinds, mass)
            found.index_add_(0, visit, (loss.double() * worth).sum(dim=1))
        return found

    return told
