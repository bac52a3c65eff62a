"""Feedback in a request: a user's adapter solved on the spot, in operators that a graph has.

Traced into the release's graphs and called by the replay: one function for both.

Shapes: R requests, F rows of feedback, K objectives, D adapter features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.learning.positive import inverse
from tasks.learning.solvers import ObjectiveKind, bent_by, by_rows, likelihood, newton


def adapted(
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    parent: Tensor,
    own: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
    steps: int,
    most: int,
) -> Tensor:
    """Weights that serve each request: solved from its rows of feedback, or its own where it brings none.

    The rows are the user's whole support: nothing is added to what the bank has solved from earlier ones. They are
    filled up to `most`, so that systems have a size that is known when a graph is traced, the smaller of `most` and D.

    Args:
        logits: of the rows, before adaptation ``[R, F, K]``.
        features: of the rows ``[R, F, D]``.
        labels: ``[R, F, K]``; NaN where missing. A row without any is none.
        parent: weights of the user's coarser segment ``[R, K, D]``, which his own are solved from.
        own: weights of the user ``[R, K, D]``.
        precision: of the user's level ``[K, D]``.
        kinds: of the objectives.
        steps: Newton steps.
        most: rows that count; of more, the first.

    Returns:
        Weights ``[R, K, D]``. An objective without labels keeps the parent's where another has some.

    Two requests of a user whose segment expects 0; one of them says that he gave 2 once, held by a precision of 1.

    >>> one = torch.ones(2, 1, 1)
    >>> labels = torch.tensor([[[2.0]], [[torch.nan]]])
    >>> adapted(0 * one, one, labels, 0 * one, 7 * one, torch.ones(1, 1), ["rating"], 1, 4).flatten().round()
    tensor([1., 7.])
    """
    shape = features.shape[0], most
    rows, offsets, said = (
        torch.cat([part, part.new_full((*shape, part.shape[-1]), fill)], dim=1)[:, :most]
        for part, fill in ((features, 0.0), (logits + features @ parent.mT, 0.0), (labels, torch.nan))
    )
    solved = parent + _solved(rows, offsets, said, precision, kinds, steps)
    brought = (~torch.isnan(said)).sum(dim=(1, 2)) > 0
    return torch.where(brought[:, None, None], solved, own)


def _solved(
    features: Tensor, offsets: Tensor, labels: Tensor, precision: Tensor, kinds: Sequence[ObjectiveKind], steps: int
) -> Tensor:
    """The weights of `solvers.solve`, by the same Newton steps; rows weigh 1, and their number is fixed.

    Each step is corrected once by what the rows themselves say is left of it: of rows that are alike or weakly held,
    the rounding of the system is more than there is to be said.
    """
    weights = torch.ones_like(offsets[..., 0])
    rows = (features, offsets, labels, weights, precision, kinds)
    solution = torch.zeros_like(precision).expand(features.shape[0], *precision.shape)
    for _ in range(steps):
        bent = bent_by(features, solution)
        if features.shape[1] < features.shape[2]:
            root, target, spread, system = by_rows(*rows, bent)
            back = inverse(system)
            dual = _times(back, target)
            solution = torch.einsum("bks,bksd->bkd", root * dual, spread)
            left = target - dual - root * bent_by(features, solution).mT
            solution = solution + torch.einsum("bks,bksd->bkd", root * _times(back, left), spread)
        else:
            slope, hessian = newton(*rows, solution, bent)
            residual, curvature, mass = likelihood(offsets + bent, labels, weights, kinds)
            back = inverse(hessian)
            moved = solution + _times(back, slope)
            left = mass * (residual - curvature * (bent_by(features, moved) - bent))
            solution = moved + _times(back, torch.einsum("bsd,bsk->bkd", features, left) - precision * moved)
    return solution


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]
