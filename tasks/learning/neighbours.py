"""Item-based nearest neighbours: what a user's residuals on similar items say about a candidate.

Similarity is the shrunk cosine of two items over the users' residuals against the as-of rate of each item, so that it
is adjusted for how much everybody likes them. Sarwar et al., Item-based Collaborative Filtering Recommendation
Algorithms, 2001; with the shrinkage of Ferrari Dacrema et al., Are We Really Making Much Progress?, 2019.

Shapes: N rows, U users, I items, P kept pairs of an item and a neighbour, V visits, T query rows.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tasks.learning.closed_form import weighted_residual
from tasks.learning.ladder import Ladder
from tasks.learning.material import I64, Material, Visits, Windows, visits_of
from tasks.learning.solvers import ObjectiveKind

PAIRS = 2_000_000
"""About how many pairs of rows are in memory at a time."""
HELD_OUT = 0.2
"""Least share of the rows, in whole nights, that the scale of the residuals is fitted on."""
STEPS = 8
"""Newton steps of that fit."""

Residuals = Callable[[I64], tuple[Tensor, Tensor]]
"""Positions [S] to weighted residuals and the weights behind them, each ``[S]``; both 0 without a label."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest items of every item.

    Attributes:
        count: I.
        keys: ``item * count + neighbour``, ascending, int64 ``[P]``.
        values: similarity of each pair, above 0, at most 1, ``[P]``.
    """

    count: int
    keys: Tensor
    values: Tensor

    def between(self, items: Tensor, others: Tensor) -> Tensor:
        """Similarity of items and others, each ``[S]``; 0 where the other is no neighbour of the item, or unknown."""
        known = (items < self.count) & (others < self.count)
        if len(self.keys) == 0:
            return self.values.new_zeros(len(items))
        keys = torch.where(known, items * self.count + others, -1)
        at = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return torch.where(self.keys[at] == keys, self.values[at], 0.0)


def find_neighbours(
    users: Tensor, items: Tensor, residuals: Tensor, user_count: int, item_count: int, most: int, shrinkage: float
) -> Neighbours:
    """Keep the most similar items beside each item, as far as their similarity is above 0.

    With ``r_i`` the vector of all users' summed residuals on item i and ``v`` the mean square of its known entries:

        s_ij = r_i r_j / (|r_i| |r_j| + shrinkage v)

    A sparse product finishes one block of items after the other, so that memory holds about `PAIRS` of them.

    Args:
        users: dense user index of each row, int64 ``[N]``.
        items: item id of each row, int64 ``[N]``; item 0 stands for unknown and has no neighbours.
        residuals: weighted residual of each row ``[N]``.
        user_count: U.
        item_count: I.
        most: neighbours kept per item; of equal similarity, those of smaller id.
        shrinkage: evidence at which a similarity is half of what the cosine says, in users.
    """
    known = items > 0
    both = torch.stack([items[known], users[known]])
    table = torch.sparse_coo_tensor(
        both, residuals[known].double(), (item_count, user_count), check_invariants=False
    ).coalesce()
    (item, user), values = table.indices(), table.values()
    norms = values.new_zeros(item_count).index_add_(0, item, values**2).sqrt()
    shrunk = shrinkage * values.square().mean() if len(values) else 0.0
    by_user = table.t().coalesce()
    # How many products each item takes: its users' rows, all together.
    work = torch.bincount(user, minlength=user_count)[user].double()
    total = torch.cumsum(torch.zeros_like(norms).index_add_(0, item, work), 0)
    bounds = torch.searchsorted(item, torch.arange(item_count + 1, device=item.device)).tolist()
    keys, kept = [item.new_zeros(0)], [values.new_zeros(0)]
    for first, last in _blocks((total // PAIRS).cpu().numpy()):
        mine = slice(bounds[first], bounds[last])
        rows = torch.stack([item[mine] - first, user[mine]])
        block = torch.sparse_coo_tensor(rows, values[mine], (last - first, user_count), check_invariants=False)
        with warnings.catch_warnings():
            # The product of two sparse tables is no beta: the format that it passes through is.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            product = torch.sparse.mm(block, by_user).coalesce()
        (own, other), dots = product.indices(), product.values()
        own = own + first
        alike = (own != other) & (dots > 0)
        own, other, dots = own[alike], other[alike], dots[alike]
        # Only what agrees: among opposites, the mean of what somebody has met would lose how much he likes anything.
        near = dots / (norms[own] * norms[other] + shrunk).clamp_min(torch.finfo(dots.dtype).tiny)
        # Entries come by item and neighbour; two stable sorts bring each item's nearest to the front of its own.
        order = torch.argsort(near, descending=True, stable=True)
        order = order[torch.argsort(own[order], stable=True)]
        start = torch.searchsorted(own[order], own[order])
        order = order[torch.arange(len(order), device=order.device) - start < most].sort().values
        keys.append(own[order] * item_count + other[order])
        kept.append(near[order])
    return Neighbours(item_count, torch.cat(keys), torch.cat(kept))


def _blocks(part: I64) -> Iterator[tuple[int, int]]:
    """Half-open ranges of equal, ascending numbers."""
    bounds = np.flatnonzero(np.r_[True, part[1:] != part[:-1], True]).tolist() if len(part) else []
    return pairwise(bounds)


def pull(
    neighbours: Neighbours,
    windows: Windows,
    query: Windows,
    items: Callable[[I64], Tensor],
    residuals: Residuals,
    shrinkage: float,
) -> Tensor:
    """What each visit's support says about its query rows: the shrunk mean residual over the neighbours it holds.

    With ``w`` the weight and ``e`` the residual of a support row on item j, and i the item of the query row:

        x = sum(s_ij w e) / (sum(s_ij w) + shrinkage)

    Args:
        neighbours: of the items.
        windows: support rows of each visit [V].
        query: rows of each visit that are asked about [V].
        items: item ids of positions.
        residuals: of positions.
        shrinkage: weight of the 0 that every mean starts from, in units of similarity.

    Returns:
        Mean residuals ``[T]``, in the order of the query; 0 without a neighbour in the support.
    """
    at, visit = query.flat()
    told = [torch.zeros(0, dtype=torch.float64, device=neighbours.values.device)]
    for first, last in _blocks(np.cumsum(windows.lengths[visit]) // PAIRS):
        # Rows of a visit follow one another, so these visits do, too: their support is read once for all of them.
        begin = int(visit[first])
        support = Windows(windows.start[begin : visit[last - 1] + 1], windows.stop[begin : visit[last - 1] + 1])
        rows, _ = support.flat()
        before = np.cumsum(support.lengths) - support.lengths
        mine = visit[first:last] - begin
        pairs = Windows(before[mine], before[mine] + support.lengths[mine])
        other, asked = (torch.from_numpy(part).to(told[0].device) for part in pairs.flat())
        near = neighbours.between(items(at[first:last])[asked], items(rows)[other])
        mass, weights = (part.double() for part in residuals(rows))
        sums = near.new_zeros(2, last - first)
        sums[0].index_add_(0, asked, near * mass[other])
        sums[1].index_add_(0, asked, near * weights[other])
        told.append(sums[0] / (sums[1] + shrinkage))
    return torch.cat(told)


class ItemKnn:
    """Scores candidates by their as-of rate and what the user's support says about similar items.

    A score is the item's logit (of a rating: its value) plus ``c x``, with x the `pull` of the support. Both the
    similarities and c come from the history alone.

    Args:
        ladder: whose windows are the support: those that the candidate's adapters have.
        material: the rows.
        kinds: kind of each objective.
        at: positions that are fitted on, in the table's order [N].
        most: neighbours kept per item.
        shrinkage: of the similarities, in users.
        mass: shrinkage of the mean residuals, in units of similarity.
        user_rows: most rows of a user that similarities are counted from, the newest.
    """

    def __init__(
        self,
        ladder: Ladder,
        material: Material,
        kinds: Sequence[ObjectiveKind],
        at: I64,
        *,
        most: int,
        shrinkage: float,
        mass: float,
        user_rows: int,
    ) -> None:
        self.ladder, self.material, self.kinds = ladder, material, tuple(kinds)
        self.most, self.shrinkage, self.mass, self.user_rows = most, shrinkage, mass, user_rows
        self.scale = self._weigh(at)
        """What c is, for each objective, double precision ``[K]``."""
        self.neighbours = self._near(at)
        """Of each objective."""

    def scores(self, visits: Visits, after: I64) -> Tensor:
        """Scores before the sigmoid ``[T, K]`` of each visit's rows after its first `after`."""
        rows, _ = visits.split(after)[1].flat()
        return (self._rates(rows).double() + self.scale * self._pulls(self.neighbours, visits, after)).float()

    def _items(self, at: I64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.material.rows.item[at])).to(self.material.device)

    def _rates(self, at: I64) -> Tensor:
        rates = np.ascontiguousarray(self.material.rows.statistics[at, : len(self.kinds)])
        return torch.from_numpy(rates).to(self.material.device)

    def _residuals(self, at: I64, objective: int) -> tuple[Tensor, Tensor]:
        """Weighted residuals against the items' as-of rates, and the weights behind them; both 0 without a label."""
        label, weight = self.material.labels(at)[:, objective], self.material.weights(at)
        residual, _ = weighted_residual(self._rates(at)[:, objective], label, weight, self.kinds[objective])
        return residual, weight * ~torch.isnan(label)

    def _near(self, at: I64) -> list[Neighbours]:
        """Neighbours of the items in each objective, as some rows have them."""
        user = np.asarray(self.material.rows.user)[at]
        _, dense, count = np.unique(user, return_inverse=True, return_counts=True)
        # Rows are in order of user and time: how many of the user's are still to come.
        newer = np.cumsum(count)[dense] - 1 - np.arange(len(at))
        recent = newer < self.user_rows
        at, users = at[recent], torch.from_numpy(dense[recent].astype(np.int64)).to(self.material.device)
        items = self._items(at)
        found = []
        for objective in range(len(self.kinds)):
            residual, weight = self._residuals(at, objective)
            given = weight > 0
            size = int(items.max()) + 1 if len(items) else 1
            rows = (users[given], items[given], residual[given])
            found.append(find_neighbours(*rows, len(count), size, self.most, self.shrinkage))
        return found

    def _pulls(self, neighbours: Sequence[Neighbours], visits: Visits, after: I64) -> Tensor:
        """What each visit's support says about its later rows ``[T, K]``."""
        support, (_, query) = self.ladder.own_support(visits, after), visits.split(after)
        columns = [
            pull(near, support, query, self._items, partial(self._residuals, objective=objective), self.mass)
            for objective, near in enumerate(neighbours)
        ]
        return torch.stack(columns, dim=1)

    def _weigh(self, at: I64) -> Tensor:
        """The scale c of each objective's pull ``[K]``.

        Similarities have seen the labels that they are made of, so c is fitted on the newest nights, with those of the
        nights before: each row supported by all that its user did before it.
        """
        rows = self.material.rows
        scale = torch.zeros(len(self.kinds), dtype=torch.float64, device=self.material.device)
        night = np.asarray(rows.night)[at]
        nights, count = np.unique(night, return_counts=True)
        if len(nights) < 2:
            return scale
        late = nights[np.cumsum(count[::-1])[::-1] >= HELD_OUT * len(at)][-1]
        held = at[night >= max(late, nights[1])]
        every = visits_of(rows)
        visit = np.searchsorted(every.rows.start, held, side="right") - 1
        single = Visits(Windows(held, held + 1), every.first[visit], every.night[visit])
        pulls = self._pulls(self._near(at[night < max(late, nights[1])]), single, np.zeros(len(held), np.int64))
        rates, labels, weights = self._rates(held).double(), self.material.labels(held), self.material.weights(held)
        for objective, kind in enumerate(self.kinds):
            x = pulls[:, objective]
            for _ in range(STEPS):
                score = rates[:, objective] + scale[objective] * x
                residual, curvature = weighted_residual(score, labels[:, objective].double(), weights.double(), kind)
                scale[objective] += (x @ residual - scale[objective]) / (x @ (curvature * x) + 1.0)
        return scale
