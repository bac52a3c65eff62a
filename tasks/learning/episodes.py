"""Episodes: visits whose first rows are support and whose later rows are the query, as in both exams.

Shapes: V visits, T query rows, K objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tasks.learning.adapters import Adaptation
from tasks.learning.ladder import Ladder, climb
from tasks.learning.material import I64, Material, Scorer, Visits, Windows
from tasks.learning.solvers import ObjectiveKind

COLD_SHARE = 0.35
"""Share of episodes without support from the query's own night, as in the nightly exam."""
MOST_SUPPORT = 40
"""Same-night support rows are drawn log-uniformly from 1 to this."""
LEAST_COUNT = 1e-12
"""What a night counts at least, however old, so that every visit can be drawn."""
QUERY_ROWS = 512
"""Most query rows read per visit in training."""


def counts_by_age(night: npt.NDArray[np.signedinteger[Any]], half_life: float | None) -> npt.NDArray[np.float64] | None:
    """What visits or rows count by how much older their night is than the newest; None where all count alike.

    Args:
        night: ordinals [N].
        half_life: nights after which one counts half.

    >>> counts_by_age(np.array([10, 9, 7]), 1.0).tolist()
    [1.0, 0.5, 0.125]
    """
    if half_life is None:
        return None
    counts: npt.NDArray[np.float64] = 0.5 ** ((night.max() - night) / half_life)
    return np.maximum(counts, LEAST_COUNT)


def counts_by_group(group: npt.NDArray[np.signedinteger[Any]], evenness: float) -> npt.NDArray[np.float64]:
    """What visits count where large groups of them are to have less than their share.

    Args:
        group: each visit's [N].
        evenness: 0 leaves the groups their shares, 1 gives all of them the same.

    >>> counts_by_group(np.array([1, 1, 1, 1, 2]), 0.5).tolist()
    [0.5, 0.5, 0.5, 0.5, 1.0]
    """
    _, member, count = np.unique(group, return_inverse=True, return_counts=True)
    shares: npt.NDArray[np.float64] = (count.astype(np.float64) ** -evenness)[member]
    return shares


def draw(
    visits: Visits, count: int, random: np.random.Generator, chances: npt.NDArray[np.float64] | None = None
) -> tuple[Visits, I64]:
    """Visits without replacement, and how many of their first rows are support; at least one row is left to query.

    Args:
        visits: to draw from [V].
        count: how many, if there are so many.
        random: draws.
        chances: how likely each visit is drawn next, relative to the others [V], positive; None for alike.
    """
    share = None if chances is None else chances / chances.sum()
    chosen = visits.take(random.choice(len(visits), min(count, len(visits)), replace=False, p=share))
    warm = np.floor(np.exp(random.random(len(chosen)) * np.log(MOST_SUPPORT))).astype(np.int64)
    after = np.where(random.random(len(chosen)) < COLD_SHARE, 0, warm)
    return chosen, np.minimum(after, chosen.rows.lengths - 1)


@dataclass(frozen=True)
class Scores:
    """Scores of query rows before the sigmoid.

    Attributes:
        rows: their positions, int64 [T].
        base: without adapters ``[T, K]``.
        adapted: under the weights that serve their visit ``[T, K]``.
    """

    rows: I64
    base: Tensor
    adapted: Tensor


def score_visits(
    ladder: Ladder,
    visits: Visits,
    after: I64,
    scorer: Scorer,
    material: Material,
    precisions: Tensor,
    adaptation: Adaptation,
    query_rows: int | None = None,
) -> Scores:
    """Adapt on each visit's support and score its later rows.

    Args:
        ladder: the segments.
        visits: whose rows are scored [V].
        after: rows of each visit that are support [V]; the query begins behind them.
        scorer: logits and features of positions.
        material: labels of the support.
        precisions: ``[L, K, D]``.
        adaptation: how to solve.
        query_rows: most query rows of a visit, the earliest; None for all.
    """
    border, query = visits.split(after)
    if query_rows is not None:
        query = Windows(query.start, np.minimum(query.stop, border + query_rows))
    rows, visit = query.flat()
    stages = ladder.plan(visits, after) if precisions.shape[-1] > 0 else []
    if adaptation.first_order:  # nothing would flow through the support: no graph is needed
        support = torch.no_grad()(scorer)
    elif torch.is_grad_enabled():
        scorer = support = scored_once(scorer, [rows, *(stage.rows for stage in stages)])
    else:
        support = scorer
    logits, features = scorer(rows)
    if not stages:
        return Scores(rows, logits, logits)
    solution = climb(stages, support, material, precisions, adaptation)[-1]
    return Scores(rows, logits, adaptation.scores(logits, features, solution, visit))


def scored_once(scorer: Scorer, asked: Sequence[I64]) -> Scorer:
    """A scorer that has scored every position that will be asked for, once for all who ask.

    A row is query of one episode and support of several, of a user's later visits and of everybody in his segments;
    the network, and the gradient through it, see it once. In training a row has the same dropped units, request tower
    and unknown ids wherever it is asked for in a step. All rows of the step are scored together: as many as episodes
    and `segments.max_support` allow, which the gradient kept in any case.

    Args:
        scorer: of any positions.
        asked: all the positions that will be asked for.
    """
    known = np.unique(np.concatenate(asked))
    logits, features = scorer(known)

    def look_up(at: I64) -> tuple[Tensor, Tensor]:
        here = torch.from_numpy(np.searchsorted(known, at)).to(logits.device)
        return logits.index_select(0, here), features.index_select(0, here)

    return look_up


def row_loss(
    scores: Tensor, labels: Tensor, kinds: tuple[ObjectiveKind, ...], weights: Tensor, mass: Tensor | None = None
) -> Tensor:
    """Mean loss over the rows: log-loss of binary objectives, half the squared error of ratings, summed by weight.

    Args:
        scores: ``[T, K]``, before the sigmoid.
        labels: ``[T, K]``; NaN where missing.
        kinds: kind of each objective.
        weights: of each objective ``[K]``.
        mass: weight of each row ``[T]``; None weighs all alike.
    """
    loss, counted = counted_losses(scores, labels, kinds, mass)
    total = counted.sum(dim=0)
    return (loss.sum(dim=0) / torch.where(total > 0, total, torch.ones_like(total)) * weights).sum()


def counted_losses(
    scores: Tensor, labels: Tensor, kinds: tuple[ObjectiveKind, ...], mass: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of every score times what it counts, and what it counts, 0 where the label is missing: ``[T, K]`` each.

    Arguments as for `row_loss`.
    """
    given = ~torch.isnan(labels)
    counted = given.to(scores.dtype) if mass is None else given * mass[:, None]
    targets = torch.where(given, labels, torch.zeros_like(labels))
    binary = torch.tensor([kind == "binary" for kind in kinds], device=scores.device)
    entropy = torch.nn.functional.softplus(scores) - targets * scores
    return torch.where(binary, entropy, 0.5 * (scores - targets) ** 2) * counted, counted
