"""Plain regression on what is known about a row before its night: the model that most teams would try first.

Inputs are the as-of statistics (the user's rate and count among them) and the numbers of candidate and request,
standardised; a missing one is its mean and raises its indicator. A user has no part in it beyond his statistics, and
these are as of the start of the night: his rows of the same night change nothing.

Shapes: N rows, T positions, F numbers, W = 2 F + 1 inputs, K objectives.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from tasks.data.columns import F32, Rows
from tasks.learning.layers import Normaliser
from tasks.learning.material import I64, Material
from tasks.learning.solvers import ObjectiveKind

CHUNK = 131_072
"""Rows that are read at a time."""
FREE = 1e-6
"""Precision of the constant, which nothing holds: just enough for a history without labels to have a solution."""
SETTLED = 1e-7
"""A Newton step that moves no coefficient further is the last."""


def numbers_of(rows: Rows, at: I64) -> F32:
    """Statistics and numbers of request and candidate at positions: [T, F], NaN where missing."""
    return np.concatenate([rows.statistics[at], rows.request_numbers[at], rows.candidate_numbers[at]], axis=1)


class Regression:
    """Ridge-penalised logistic (of ratings: linear) regression by Newton's method, streamed over the history.

    Args:
        material: the rows.
        at: positions that are fitted on [N].
        kinds: kind of each objective.
        strength: precision of every coefficient but the constant, in rows.
        steps: most Newton steps; a rating is settled after one.
    """

    def __init__(
        self, material: Material, at: I64, kinds: Sequence[ObjectiveKind], strength: float, steps: int
    ) -> None:
        self.material, self.kinds, self.strength = material, tuple(kinds), strength
        self.normaliser = self._normaliser(at)
        self.coefficients = self._fit(at, steps)
        """Of the inputs, the constant's last, double precision ``[K, W]``."""

    def scores(self, at: I64) -> Tensor:
        """Scores of positions before the sigmoid ``[T, K]``."""
        return (self._inputs(at) @ self.coefficients.T).float()

    def _inputs(self, at: I64) -> Tensor:
        numbers = torch.from_numpy(numbers_of(self.material.rows, at)).to(self.material.device)
        normal = self.normaliser(numbers).double()
        return torch.cat([normal, torch.ones_like(normal[:, :1])], dim=1)

    def _normaliser(self, at: I64) -> Normaliser:
        rows = self.material.rows
        width = numbers_of(rows, at[:0]).shape[1]
        count, total, square = np.zeros(width), np.zeros(width), np.zeros(width)
        for part in _chunks(at):
            values = numbers_of(rows, part)
            count += (~np.isnan(values)).sum(axis=0)
            total += np.nansum(values, axis=0, dtype=np.float64)
        mean = total / np.maximum(count, 1)
        # A second pass: a large number that varies little would lose its variance to rounding in the first.
        for part in _chunks(at):
            square += np.nansum((numbers_of(rows, part) - mean) ** 2, axis=0)
        scale = np.sqrt(square / np.maximum(count, 1))
        normaliser = Normaliser(width)
        normaliser.fit(torch.from_numpy(mean), torch.from_numpy(scale))
        return normaliser.to(self.material.device)

    def _fit(self, at: I64, steps: int) -> Tensor:
        """Newton steps from the global rate; one that makes the loss larger is halved, so that none can run away."""
        width = 2 * len(self.normaliser.mean) + 1
        point = torch.zeros(len(self.kinds), width, dtype=torch.float64, device=self.material.device)
        point[:, -1] = self._rates(at)
        best, lowest = point, torch.full_like(point[:, 0], torch.inf)
        for _ in range(steps + 1):
            loss, move = self._newton(at, point)
            better = loss <= lowest
            best, lowest = torch.where(better[:, None], point, best), torch.minimum(loss, lowest)
            point = torch.where(better[:, None], point + move, (point + best) / 2)
            if bool(better.all()) and float(move.abs().max()) < SETTLED:
                break
        return best

    def _rates(self, at: I64) -> Tensor:
        """Global rate of each objective before the sigmoid ``[K]``."""
        sums = torch.zeros(2, len(self.kinds), dtype=torch.float64, device=self.material.device)
        for part in _chunks(at):
            labels, weights = self.material.labels(part).double(), self.material.weights(part).double()
            given = ~torch.isnan(labels) * weights[:, None]
            sums += torch.stack([given.sum(dim=0), (given * labels.nan_to_num()).sum(dim=0)])
        mean = sums[1] / sums[0].clamp_min(FREE)
        binary = torch.tensor([kind == "binary" for kind in self.kinds], device=mean.device)
        return torch.where(binary, torch.logit(mean, eps=1e-4), mean)

    def _newton(self, at: I64, point: Tensor) -> tuple[Tensor, Tensor]:
        """Penalised loss ``[K]`` at coefficients ``[K, W]``, and the step that Newton would take ``[K, W]``."""
        held = torch.full_like(point[0], self.strength)
        held[-1] = FREE
        loss = 0.5 * (held * point**2).sum(dim=1)
        gradient = -held * point
        hessian = torch.diag(held).repeat(len(point), 1, 1)
        for part in _chunks(at):
            inputs = self._inputs(part)
            labels, weights = self.material.labels(part).double(), self.material.weights(part).double()
            scores = inputs @ point.T
            given, targets = weights[:, None] * ~torch.isnan(labels), labels.nan_to_num()
            for objective, kind in enumerate(self.kinds):
                mass, target, score = given[:, objective], targets[:, objective], scores[:, objective]
                if kind == "binary":
                    # No floor below the curvature, as an adapter has it: where outcomes are rare, it would be all.
                    expected = torch.sigmoid(score)
                    cost, curvature = softplus(score) - target * score, mass * expected * (1 - expected)
                else:
                    expected, curvature = score, mass
                    cost = 0.5 * (target - score) ** 2
                loss[objective] += (mass * cost).sum()
                gradient[objective] += inputs.T @ (mass * (target - expected))
                hessian[objective] += inputs.T @ (inputs * curvature[:, None])
        return loss, torch.linalg.solve(hessian, gradient)


def _chunks(at: I64) -> Iterator[I64]:
    return (at[start : start + CHUNK] for start in range(0, len(at), CHUNK))
