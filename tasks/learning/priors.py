"""How strongly adapters are held: precisions estimated from the history, then scaled by what later nights say.

The precision of a weight is one over the variance of that taste among segments. Guessed, it is wrong by orders of
magnitude on a new data set, and everything that adaptation could do is lost or drowned; the history tells it.

Shapes: L levels, K objectives, D adapter features.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import product

import numpy as np
import torch
from torch import Tensor

from tasks.learning.adapters import Adaptation
from tasks.learning.ladder import Ladder, climb, inherit, supports
from tasks.learning.material import Material, Scorer, Visits
from tasks.learning.solvers import solve, variances

MOST_USERS = 2048
"""Users whose rows the estimate reads."""
ROUNDS = 8
"""Passes of the estimate; it settles within a few."""
LEAST, MOST = 0.05, 1e5
"""Bounds of a precision, in rows."""
FACTOR, MOST_STEPS = 4.0, 5
"""How far one step of the scaling goes, and how many it takes at most."""
SMALLEST_NOISE = 1e-12
"""Least variance that a rating is taken to have beside what its weights explain."""
GAIN = 1e-5
"""Loss that a step of the scaling has to save."""
DOUBT, PROOF = 0.5, 2.0
"""Standard errors of a loss by visit: within so many of the least, weights are held more; they are held less only if it
falls by so many."""
SILENT = 8.0
"""Precision of a weight, over that of the config, beyond which its feature has next to no part in a score; one step of
the scaling stays below it."""


def estimate(
    ladder: Ladder,
    visits: Visits,
    material: Material,
    scorer: Scorer,
    precisions: Tensor,
    adaptation: Adaptation,
    random: np.random.Generator,
) -> Tensor:
    r"""Precisions of the users' own level by evidence maximisation, the coarser levels as they are.

    With each user's weights w and their variances v under the current precisions, per objective and feature:

        precision <- noise sum over users of (1 - precision v) / sum over users of w^2

    A precision counts rows, so of a rating `noise` is the variance that the weights leave, whatever its unit; of a
    binary objective, whose rows say how sure they are, it is 1:

        noise <- sum over rows of (y - o - Phi w)^2 / (rows - sum over users and features of (1 - precision v))

    Source: MacKay, Bayesian Interpolation, 1992; Tipping, Sparse Bayesian Learning, 2001. What a feature does not
    explain drives its precision up, so a useless one costs little. Gradient steps have no posterior: their rates are
    one over the precisions of the closed form on the same features.

    Args:
        ladder: the segments.
        visits: the history to read: of each user, the rows up to the end of his last visit.
        material: labels and weights.
        scorer: the base.
        precisions: where to start ``[L, K, D]``.
        adaptation: how adapters are solved; linear ones only, the others have no closed form to weigh them in.
        random: draws the users that are read, where there are many.

    Returns:
        Precisions ``[L, K, D]``.
    """
    adaptation = adaptation.in_closed_form
    last = np.flatnonzero(np.append(visits.first, -1)[1:] != visits.first)
    if len(last) > MOST_USERS:
        last = np.sort(random.choice(last, MOST_USERS, replace=False))
    newest = visits.take(last)
    stages = ladder.plan(newest, newest.rows.lengths)
    above = climb(stages[:-1], scorer, material, precisions, adaptation)
    given = list(supports(stages[-1], inherit(stages[-1], above, precisions), scorer, material, adaptation))
    if not given:
        return precisions
    own = precisions[0]
    rating = torch.tensor([kind == "rating" for kind in adaptation.kinds], device=own.device)
    for _ in range(ROUNDS):
        known, spread = torch.zeros_like(own), torch.zeros_like(own)
        left, count = own.new_zeros(len(own)), own.new_zeros(len(own))
        for part in given:
            rows = (part.features, part.offsets, part.labels, part.weights, own, adaptation.kinds)
            weights = solve(*rows, adaptation.config.steps)
            known = known + (1 - own * variances(*rows, weights)).sum(dim=0)
            spread = spread + (weights**2).sum(dim=0)
            mass = part.weights[..., None] * ~part.labels.isnan()
            missed = torch.nan_to_num(part.labels) - part.offsets - part.features @ weights.mT
            left, count = left + (mass * missed**2).sum(dim=(0, 1)), count + mass.sum(dim=(0, 1))
        noise = torch.where(rating, left / (count - known.sum(dim=1)).clamp_min(1.0), torch.ones_like(left))
        least = noise.clamp_min(SMALLEST_NOISE)[:, None] / MOST
        own = (noise[:, None] * known.clamp_min(LEAST) / spread.clamp_min(least)).clamp(LEAST, MOST)
    return torch.cat([own[None], precisions[1:]])


def scaled(
    precisions: Tensor, parts: Mapping[str, slice], loss: Callable[[Tensor], float]
) -> tuple[Tensor, dict[str, float]]:
    """Precisions whose parts are scaled, one after the other, for as long as a loss on later rows falls.

    Evidence is blind to how tastes change with time, and to factors that were solved from the very same rows.

    Args:
        precisions: ``[L, K, D]``.
        parts: of the features at the users' own level; every coarser level is one part of its own.
        loss: of precisions, on rows that neither they nor the network were solved from.

    Returns:
        Precisions ``[L, K, D]``, and by how much each part was scaled, for each objective where there are several.
    """
    scales: dict[str, float] = {}
    least = loss(precisions)
    places = {name: (slice(0, 1), part) for name, part in reversed(list(parts.items()))}
    places |= {f"level {at}": (slice(at, at + 1), slice(None)) for at in range(1, len(precisions))}
    several = precisions.shape[1] > 1
    # Objective by objective: each has a loss in units of its own, and moves no other's.
    for (place, (level, part)), objective in product(places.items(), range(precisions.shape[1])):
        name = f"{place} of objective {objective + 1}" if several else place
        scales[name] = 1.0
        for factor in (FACTOR, 1 / FACTOR):
            for _ in range(MOST_STEPS):
                tried = precisions.clone()
                tried[level, objective, part] = (tried[level, objective, part] * factor).clamp(LEAST, MOST)
                now = loss(tried)
                if not now < least - GAIN:
                    break
                precisions, least = tried, now
                scales[name] *= factor
            if scales[name] != 1.0:
                break
    return precisions, scales


def cautious(
    precisions: Tensor, parts: Mapping[str, slice], losses: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Precisions with parts scaled up as far as a loss by visit cannot tell from the best, or down where that is sure.

    A few hundred visits tell many strengths apart by luck alone. To hold too strongly loses what adaptation could gain,
    to hold too little makes it worse than none; so the doubt speaks for the stronger. Source: the rule of one standard
    error of Breiman et al., Classification and Regression Trees, 1984, 3.4.3, with half of one.

    Args:
        precisions: ``[L, K, D]``.
        parts: of the features; those of coarser levels are scaled by themselves.
        losses: of precisions: what each visit adds to the loss ``[V]``.

    Returns:
        Precisions ``[L, K, D]``, and by how much each part was scaled, for each objective where there are several.
    """
    scales: dict[str, float] = {}
    now = losses(precisions)
    several = precisions.shape[1] > 1
    places = product(range(len(precisions)), reversed(list(parts.items())), range(precisions.shape[1]))
    for level, (part, place), objective in places:
        name = part + (f" of level {level}" if level else "") + (f" of objective {objective + 1}" if several else "")
        scales[name], least = 1.0, now
        for factor in (FACTOR, 1 / FACTOR):
            for _ in range(MOST_STEPS):
                tried = precisions.clone()
                tried[level, objective, place] = (tried[level, objective, place] * factor).clamp(LEAST, MOST)
                told = losses(tried)
                saved, error = float((least - told).sum()), float((least - told).square().sum().sqrt())
                enough = saved >= -DOUBT * error if factor > 1 else saved > max(GAIN, PROOF * error)
                if torch.equal(tried, precisions) or not enough:
                    break
                precisions, now, least = tried, told, told if saved > 0 else least
                scales[name] *= factor
            if scales[name] != 1.0:
                break
    return precisions, scales


def loosened(precisions: Tensor, usual: Tensor, parts: Iterable[slice]) -> Tensor:
    """Precisions that leave a gradient to features of which nothing is known yet.

    Features that have not been learned explain nothing, so their weights are held down; but how far they move a weight
    is all that tells them what to become (Meta-SGD's rates, at 0, would teach nothing). A part counts as silent where
    the users' own level holds each of its weights beyond `SILENT` times the usual: an objective that hears one of the
    features learns the others beside it.

    Args:
        precisions: ``[L, K, D]``.
        usual: as the config has them ``[L, K, D]``.
        parts: of the features, those that training learns.

    Returns:
        Precisions ``[L, K, D]``: of silent parts those of the config, at every level that is as silent; all others are
        the same numbers.

    >>> held, usual = torch.tensor([[[9.0, 50.0, 50.0, 1.0]]]), torch.ones(1, 1, 4)
    >>> loosened(held, usual, [slice(0, 2), slice(2, 4)]).tolist()
    [[[1.0, 1.0, 50.0, 1.0]]]
    """
    found = precisions.clone()
    for part in parts:
        held, start = precisions[:, :, part], usual[:, :, part]
        silent = (held > SILENT * start).all(dim=2, keepdim=True)
        found[:, :, part] = torch.where(silent & silent[:1], start, held)
    return found
