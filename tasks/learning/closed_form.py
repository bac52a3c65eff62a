"""Closed-form starts of a base: the calibration of its item rates, and factors of the items.

Both are streamed over the history in chunks and cost a few passes; gradient descent goes on from there. A ranker that
starts from them begins about where factor models end.

Shapes: N rows, S statistics, K objectives, F factors, I items, U users, C categorical columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks.learning.layers import SMALLEST_SCALE, WarmUp
from tasks.learning.solvers import SMALLEST_CURVATURE, ObjectiveKind

CHUNK = 262_144
LEAST_FREE, LEAST_NOISE = 0.05, 0.01
"""Least share of the rows that is left to tell noise by, and of the variance that is taken to be noise."""
HELD = 10.0
"""Precision of what columns say of an item's factors, in items."""


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def weighted_residual(offset: Tensor, label: Tensor, weight: Tensor, kind: ObjectiveKind) -> tuple[Tensor, Tensor]:
    """Weighted residual and curvature of each row; both 0 where the label is missing."""
    given = ~torch.isnan(label)
    target = torch.where(given, label, torch.zeros_like(label))
    mass = weight * given
    if kind == "rating":
        return mass * (target - offset), mass
    chance = torch.sigmoid(offset)
    return mass * (target - chance), mass * (chance * (1 - chance)).clamp_min(SMALLEST_CURVATURE)


def calibrate(
    inputs: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    kinds: Sequence[ObjectiveKind],
    strength: float = 100.0,
    steps: int = 6,
) -> Tensor:
    """Coefficients that correct each objective's offset: regularised (logistic) regression by Newton steps.

    Args:
        inputs: normalised statistics ``[N, S]``.
        offsets: ``[N, K]``.
        labels: ``[N, K]``, NaN where missing.
        weights: ``[N]``.
        kinds: kind of each objective.
        strength: precision of the coefficients' prior, in rows.
        steps: Newton steps.

    Returns:
        Coefficients ``[K, S + 1]``, the constant last.
    """
    width = inputs.shape[1] + 1
    solution = torch.zeros(len(kinds), width, dtype=torch.float64, device=inputs.device)
    for objective, kind in enumerate(kinds):
        for _ in range(steps):
            hessian = strength * torch.eye(width, dtype=torch.float64, device=inputs.device)
            gradient = -strength * solution[objective]
            for part in _chunks(len(inputs)):
                rows = torch.cat([inputs[part], torch.ones_like(inputs[part, :1])], dim=1).double()
                score = offsets[part, objective].double() + rows @ solution[objective]
                residual, curvature = weighted_residual(
                    score, labels[part, objective].double(), weights[part].double(), kind
                )
                gradient = gradient + rows.T @ residual
                hessian = hessian + rows.T @ (rows * curvature[:, None])
            solution[objective] += torch.linalg.solve(hessian, gradient)
    return solution


@dataclass(frozen=True)
class Stacked:
    """The rows of all objectives, one objective's behind the other's, M = K N.

    Attributes:
        row: which row each is, int64 ``[M]``.
        owner: whose taste it tells of, int64 ``[M]``: every user has one for each objective.
        residual: weighted residual, 0 where the label is missing ``[M]``.
        curvature: ``[M]``.
        voice: what it counts where factors are solved, which all objectives share ``[M]``.
        tastes: K U.
    """

    row: Tensor
    owner: Tensor
    residual: Tensor
    curvature: Tensor
    voice: Tensor
    tastes: int


@dataclass(frozen=True)
class Rated:
    """Rows of users whose residuals factors are solved from, and how strongly all that is solved is held.

    A factor is a feature that the adapters of every objective weigh in their own way. So factors are solved from the
    rows of all objectives at once, with a taste per user and objective: a collective factorisation whose factors are
    shared (Singh and Gordon, Relational Learning via Collective Matrix Factorization, 2008).

    - What an objective is worth is said relative to the one that is worth most. It is how loud its rows are where
      factors are solved; a taste is of one objective, and held to its own rows as if that were the only one.
    - Log-loss has no unit. The squared error of a rating has, and is divided by a variance, as in the likelihood of a
      Gaussian, and its tastes are in deviations: that stars are counted up to 50 in place of 5 changes nothing.

    Attributes:
        users: dense user index of each row, int64 ``[N]``.
        offsets: ``[N, K]``.
        labels: ``[N, K]``, NaN where missing.
        weights: ``[N]``.
        kinds: kind of each objective.
        count: U.
        strength: precision of every factor, in rows.
        bias_strength: precision of the users' bias, in rows.
        sweeps: passes over both sides.
        worth: weight of each objective, positive; none for 1 each.
        noise: variance that each rating's residuals are divided by; none for all of theirs.
    """

    users: Tensor
    offsets: Tensor
    labels: Tensor
    weights: Tensor
    kinds: tuple[ObjectiveKind, ...]
    count: int
    strength: float = 4.0
    bias_strength: float = 4.0
    sweeps: int = 10
    worth: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()

    def stacked(self) -> Stacked:
        """Residuals of the offsets and curvatures of every row and objective."""
        count, objectives = len(self.users), len(self.kinds)
        residuals, curvatures = zip(*map(self._residuals, range(objectives)), strict=True)
        worth = self.users.new_tensor(self.worth or (1.0,) * objectives, dtype=torch.float64)
        return Stacked(
            row=torch.arange(count, device=self.users.device).repeat(objectives),
            owner=torch.cat([self.users + at * self.count for at in range(objectives)]),
            residual=torch.cat(residuals),
            curvature=torch.cat(curvatures),
            voice=(worth / worth.max()).repeat_interleave(count),
            tastes=objectives * self.count,
        )

    def _residuals(self, at: int) -> tuple[Tensor, Tensor]:
        """Weighted residuals and curvatures of one objective ``[N]``, in units that all have in common."""
        offsets, labels, weights = self.offsets[:, at].double(), self.labels[:, at].double(), self.weights.double()
        residual, curvature = weighted_residual(offsets, labels, weights, self.kinds[at])
        if self.kinds[at] == "binary":
            return residual, curvature
        scale = residual.new_tensor(self.noise[at] if self.noise else self.variance(at)).sqrt()
        return residual / torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale)), curvature

    def variance(self, at: int) -> float:
        """Variance of the residuals of one objective, a rating."""
        offsets, labels, weights = self.offsets[:, at].double(), self.labels[:, at].double(), self.weights.double()
        residual, curvature = weighted_residual(offsets, labels, weights, self.kinds[at])
        return float(torch.nansum(residual * (labels - offsets)) / curvature.sum().clamp_min(SMALLEST_SCALE))

    def held(self, width: int) -> Tensor:
        """Precisions of a user's bias and of factors ``[1 + F]``."""
        prior = torch.full((width + 1,), self.strength, dtype=torch.float64, device=self.users.device)
        prior[0] = self.bias_strength
        return prior


def factorise(rated: Rated, items: Tensor, factors: Tensor, mean: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Item factors by alternating least squares on the residuals of the offsets, of all objectives together.

    Each row is weighted by its curvature, so a sweep is one Newton step of the logistic model per side (for ratings,
    exact least squares). Users get a bias besides their tastes. Hu, Koren, Volinsky, Collaborative Filtering for
    Implicit Feedback Datasets, 2008; Zhou et al., Large-scale Parallel Collaborative Filtering, 2008.

    Args:
        rated: the rows.
        items: item id of each row, int64 ``[N]``; item 0 stands for unknown and stays 0.
        factors: where to start from, ``[I, F]``; row 0 is not read.
        mean: from the item factors of the sweep before ``[I, F]`` to what each is held to ``[I, F]``; None for 0.

    Returns:
        Item factors ``[I, F]``.
    """
    rows = rated.stacked()
    owner, item, residual, curvature = rows.owner, items[rows.row], rows.residual, rows.curvature
    heard = curvature * rows.voice
    factors = factors.double().clone()
    factors[torch.bincount(items, minlength=len(factors)) == 0] = 0.0
    factors[0] = 0.0
    width = factors.shape[1]
    if width == 0:
        return factors.float()
    prior = rated.held(width)
    for _ in range(rated.sweeps):
        tastes = _one_side(owner, rows.tastes, residual, curvature, prior, factors, item, constant=True)
        left = [residual[part] - curvature[part] * tastes[owner[part], 0] for part in _chunks(len(owner))]
        rest = torch.cat(left).mul_(rows.voice)
        towards = 0.0 if mean is None else mean(factors)
        factors = _one_side(
            item, len(factors), rest, heard, prior[1:], tastes[:, 1:], owner, constant=False, mean=towards
        )
        factors[0] = 0.0
    return factors.float()


def noise(rated: Rated, items: Tensor, factors: Tensor) -> float:
    """Variance of a rating that neither its users' tastes nor the items' factors explain.

    Factors solved in units of all the variance are held as if there were nothing but noise. They explain a part; what
    they leave, over the rows less what was free to fit them, is the noise (MacKay, Bayesian Interpolation, 1992).

    Args:
        rated: rows of one objective, a rating.
        items: item id of each row, int64 ``[N]``.
        factors: where a solution begins, ``[I, F]``.

    Returns:
        The variance, in the rating's own unit squared; `LEAST_NOISE` of all the variance at least.
    """
    factors = factorise(rated, items, factors).double()
    rows, prior = rated.stacked(), rated.held(factors.shape[1])
    mass = rows.curvature
    tastes, free = _one_side_freely(rows.owner, rows.tastes, rows.residual, mass, prior, factors, items, constant=True)
    _, shared = _one_side_freely(
        items, len(factors), rows.residual, mass, prior[1:], tastes[:, 1:], rows.owner, constant=False
    )
    said = tastes[rows.owner, 0] + (tastes[rows.owner, 1:] * factors[items]).sum(dim=1)
    # In units of the deviation: rows of mass m have a residual of m times theirs.
    squares = ((rows.residual - mass * said) ** 2 / mass.clamp_min(SMALLEST_SCALE)).sum()
    count = mass.sum().clamp_min(SMALLEST_SCALE)
    left = (count - free.sum() - shared.sum()).clamp_min(LEAST_FREE * count)
    return float((squares / left).clamp(LEAST_NOISE, 1.0)) * rated.variance(0)


@torch.no_grad()
def fit_warm_up(warm_up: WarmUp, factors: Tensor, numbers: Tensor, categories: Tensor, sweeps: int = 5) -> Tensor:
    """Solve what the items' columns say of their factors: a ridge on the numbers, and shrunk means by category in turn.

    Args:
        warm_up: is changed.
        factors: ``[I, F]``; items whose factors are all 0 have no rows: they are neither read nor told.
        numbers: of each item, normalised ``[I, ...]``.
        categories: ids of each item, int64 ``[I, C]``; what is unknown (0) says nothing.
        sweeps: passes over the columns; without categories one is exact.

    Returns:
        What the columns say of every item's factors ``[I, F]``; 0 for items without rows.
    """
    known = torch.nonzero((factors != 0).any(dim=-1))[:, 0]
    target, ids = factors[known].double(), categories[known]
    inputs = torch.cat([torch.ones_like(target[:, :1]), numbers[known].double()], dim=1)
    system = inputs.T @ inputs + HELD * torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
    tables = [target.new_zeros(table.weight.shape) for table in _embeddings(warm_up)]
    for _ in range(sweeps if tables else 1):
        told = sum((table[ids[:, at]] for at, table in enumerate(tables)), torch.zeros_like(target))
        solution = torch.linalg.solve(system, inputs.T @ (target - told))
        rest = target - told - inputs @ solution
        for at, table in enumerate(tables):
            rest = rest + table[ids[:, at]]
            count = torch.bincount(ids[:, at], minlength=len(table)).to(rest)
            table.zero_().index_add_(0, ids[:, at], rest).div_((count + HELD)[:, None])
            table[0] = 0.0
            rest = rest - table[ids[:, at]]
    warm_up.constant.copy_(solution[0])
    if warm_up.line is not None:
        warm_up.line.weight.copy_(solution[1:].T)
    for module, table in zip(_embeddings(warm_up), tables, strict=True):
        module.weight.copy_(table)
    mean = torch.zeros_like(factors, dtype=torch.float64)
    mean[known] = target - rest
    return mean


def _embeddings(warm_up: WarmUp) -> list[nn.Embedding]:
    return [table for table in warm_up.tables if isinstance(table, nn.Embedding)]


def factorise_lists(rated: Rated, rows: Tensor, values: Tensor, factors: Tensor) -> Tensor:
    """Factors of values, where a row has a list of them and what it has to do with a taste is their mean.

    As `factorise`, to which it comes down where every list has one value. A list ties its values' solutions together;
    each sweep solves each value by itself against what all of them said before, with its row's curvature shared out:

        (r - t . mean of d_v)^2 <= mean of (r - t . d_v)^2        for changes d_v of the factors of v

    by Jensen's inequality, so a sweep never makes the regularised squared loss larger, and where nothing moves, it is
    the joint solution. Separable surrogates: De Pierro, A modified expectation maximization algorithm, 1995.

    Args:
        rated: the rows.
        rows: the row of each value, ascending, int64 ``[T]``.
        values: id of each value, int64 ``[T]``; 0 stands for unknown and stays 0.
        factors: where to start from, ``[I, F]``; row 0 is not read.

    Returns:
        Factors of the values ``[I, F]``.
    """
    of, count, objectives = rated.stacked(), len(rated.users), len(rated.kinds)
    residual, curvature = of.residual, of.curvature
    factors = factors.double().clone()
    factors[0] = 0.0
    width = factors.shape[1]
    if width == 0:
        return factors.float()
    prior = rated.held(width)
    share = 1.0 / torch.bincount(rows, minlength=count).clamp_min(1).double()
    # A value tells of its row's taste for every objective.
    told = torch.cat([rows + at * count for at in range(objectives)])
    value, owner, part = values.repeat(objectives), of.owner[told], share[rows].repeat(objectives)
    mass, voice = part * curvature[told], of.voice[told]
    heard = mass * voice
    for _ in range(rated.sweeps):
        mean = factors.new_zeros(count, width)
        for some in _chunks(len(rows)):
            mean.index_add_(0, rows[some], factors[values[some]] * part[some, None])
        tastes = _one_side(of.owner, of.tastes, residual, curvature, prior, mean, of.row, constant=True)
        said = [(tastes[of.owner[some], 1:] * mean[of.row[some]]).sum(dim=1) for some in _chunks(len(of.row))]
        left = residual - curvature * (tastes[of.owner, 0] + torch.cat(said))
        own = [(tastes[owner[some], 1:] * factors[value[some]]).sum(dim=1) for some in _chunks(len(told))]
        rest = (part * left[told] + mass * torch.cat([*own, mass[:0]])).mul_(voice)
        factors = _one_side(value, len(factors), rest, heard, prior[1:], tastes[:, 1:], owner, constant=False)
        factors[0] = 0.0
    return factors.float()


def _one_side(
    owner: Tensor,
    count: int,
    residual: Tensor,
    curvature: Tensor,
    prior: Tensor,
    others: Tensor,
    other: Tensor,
    constant: bool,
    mean: Tensor | float = 0.0,
) -> Tensor:
    """Ridge solutions ``[count, W]`` of all owners, by batched normal equations over the rows of the other side.

    A row's inputs are ``others[other]``, behind a 1 where there is a `constant`. Every owner is held to its `mean`.
    """
    gradient, system = _normal_equations(owner, count, residual, curvature, prior, others, other, constant)
    gradient = gradient + prior * mean
    return torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(system))[..., 0]


def _one_side_freely(
    owner: Tensor,
    count: int,
    residual: Tensor,
    curvature: Tensor,
    prior: Tensor,
    others: Tensor,
    other: Tensor,
    constant: bool,
) -> tuple[Tensor, Tensor]:
    """The same, held to 0, and how many numbers of each owner's solution its rows decide ``[count]``."""
    gradient, system = _normal_equations(owner, count, residual, curvature, prior, others, other, constant)
    factor = torch.linalg.cholesky(system)
    held = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1) @ prior
    return torch.cholesky_solve(gradient[..., None], factor)[..., 0], len(prior) - held


def _normal_equations(
    owner: Tensor,
    count: int,
    residual: Tensor,
    curvature: Tensor,
    prior: Tensor,
    others: Tensor,
    other: Tensor,
    constant: bool,
) -> tuple[Tensor, Tensor]:
    """Right sides ``[count, W]`` and systems ``[count, W, W]``, the prior included."""
    width = len(prior)
    gradient = residual.new_zeros(count, width)
    hessian = residual.new_zeros(count, width * width)
    for part in _chunks(len(owner)):
        rows = others[other[part]]
        if constant:
            rows = torch.cat([torch.ones_like(rows[:, :1]), rows], dim=1)
        gradient.index_add_(0, owner[part], rows * residual[part, None])
        outer = (rows[:, :, None] * (rows * curvature[part, None])[:, None, :]).reshape(len(rows), -1)
        hessian.index_add_(0, owner[part], outer)
    return gradient, hessian.reshape(count, width, width) + torch.diag(prior)
