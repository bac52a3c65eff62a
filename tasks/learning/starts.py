"""Where training begins: normalisation, and what of the network can be solved in closed form from the history.

Shapes: N rows, S statistics, K objectives.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tasks.data.columns import F32, Rows
from tasks.data.contract import DataConfig
from tasks.errors import TrainingDiverged
from tasks.learning.adapters import AdapterConfig
from tasks.learning.closed_form import Rated, calibrate, factorise, factorise_lists, fit_warm_up
from tasks.learning.layers import SMALLEST_SCALE, Normaliser
from tasks.learning.lists import VectorNormaliser
from tasks.learning.material import I64, Material, Visits, newest_of_each
from tasks.learning.networks import Ranker

PART = 65_536
"""About how many rows the network scores at a time."""
VECTOR_NUMBERS = 1 << 23
"""About how many numbers of vectors are read at a time."""


SOLVED = ("wide.", "factor_tables.", "warm_up.")
"""How the names of the parameters begin that the start solves in closed form."""


def newest(rows: Rows, visits: Visits, most: int) -> I64:
    """Positions of the newest rows of some visits, ascending [N].

    Args:
        rows: the table.
        visits: whose rows.
        most: how many at most.
    """
    at = visits.rows.flat()[0]
    if len(at) <= most:
        return at
    return np.sort(at[np.argsort(np.asarray(rows.time)[at], kind="stable")[-most:]])


def normalise(network: Ranker, data: DataConfig, rows: Rows, at: I64) -> None:
    """Fit a network's means and scales on the rows at positions [N].

    Raises:
        TrainingDiverged: a column holds a number that is not finite as float32.
    """
    tables: tuple[tuple[Normaliser, F32, Sequence[str]], ...] = (
        (network.request_normaliser, rows.request_numbers, data.named("request", "numeric")),
        (network.candidate_normaliser, rows.candidate_numbers, data.named("candidate", "numeric")),
        (network.statistics_normaliser, rows.statistics, rows.statistics_names),
    )
    if network.attention is not None:
        tables += ((network.attention.labels, rows.labels[:, :1], (data.objectives[0].column,)),)
    for normaliser, table, names in tables:
        values = np.asarray(table[at], np.float64)
        if (infinite := np.isinf(values)).any():
            worst = int(infinite.sum(axis=0).argmax())
            raise TrainingDiverged(
                f"{names[worst]} is infinite as float32 in {int(infinite[:, worst].sum())} of {len(at)} training rows, "
                f"and has no mean to normalise by; give its column a minimum and a maximum in data.columns"
            )
        given = ~np.isnan(values)
        count = np.maximum(given.sum(axis=0), 1)
        mean = np.where(given, values, 0.0).sum(axis=0) / count
        scale = np.sqrt(np.where(given, (values - mean) ** 2, 0.0).sum(axis=0) / count)
        normaliser.fit(torch.from_numpy(mean), torch.from_numpy(scale))
    for lists, vectors in (
        (network.request_lists, rows.request_vectors),
        (network.candidate_lists, rows.candidate_vectors),
    ):
        if lists is not None and vectors is not None:
            for own, place in zip(lists.normalisers, lists.vector_places, strict=True):
                assert isinstance(own, VectorNormaliser)
                own.fit(*_spread(vectors, at, place))


def _spread(vectors: F32, at: I64, place: slice) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each number of the vectors that are there, read part by part: [L], [L]."""
    width = place.stop - place.start
    count, total, square = 0, np.zeros(width), np.zeros(width)
    parts = np.array_split(at, max(1, len(at) * width // VECTOR_NUMBERS))
    for part in parts:
        values = vectors[part, place].astype(np.float64)
        values = values[~np.isnan(values).any(axis=1)]
        count += len(values)
        total += values.sum(axis=0)
    mean = total / max(count, 1)
    # A second pass: a large number that varies little would lose its variance to rounding in the first.
    for part in parts:
        square += np.nansum((vectors[part, place] - mean) ** 2, axis=0)
    return torch.from_numpy(mean), torch.from_numpy(np.sqrt(square / max(count, 1)))


def spread(network: Ranker, material: Material, at: I64) -> None:
    """Scale and shift what goes into the units that adapters bend: mean 0 and deviation 1 over rows at positions [N].

    Untrained towers differ little from row to row; units that all say the same leave nothing to weigh differently.
    Source: the data-dependent start of Salimans and Kingma, Weight Normalization, 2016. Reads the newest `PART` rows.
    Linear adapters have no such units, and nothing is changed.
    """
    layers = network.perceptron()
    if layers is None:
        return
    network.eval()
    with torch.no_grad():
        _, inputs = material.scorer(network)(at[-PART:])
        before = inputs @ layers.first.mT + layers.shift
        scale = before.std(dim=0, correction=0)
        # A unit that does not vary has no scale of its own, and is left alone but for its mean.
        scale = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale))
        layers.shift.sub_(before.mean(dim=0)).div_(scale)
        layers.first.div_(scale[:, None])
        if layers.down is not None:
            count = min(*inputs.shape, len(layers.down))
            _, spans, ways = torch.pca_lowrank(inputs, q=count)
            spans = spans / len(inputs) ** 0.5
            scale = torch.where(spans > SMALLEST_SCALE, spans, torch.ones_like(spans))
            layers.down[:count] = ways.mT / scale[:, None]


def solve_start(
    network: Ranker,
    material: Material,
    at: I64,
    adapter: AdapterConfig,
    sweeps: int,
    counts: npt.NDArray[np.float64] | None = None,
    worth: Sequence[float] = (),
) -> None:
    """Solve the calibration of the statistics, then every table of factors, with the rest of the network as it is.

    The tables are solved from what the calibration leaves of every objective, see `closed_form.Rated`.

    Args:
        network: is changed.
        material: the rows.
        at: positions of the rows that are read [N].
        adapter: how strongly the factors are held.
        sweeps: passes of the factorisation.
        counts: what each row counts, times its own weight [N]; None for 1.
        worth: weight of each objective; none for 1 each.
    """
    network.eval()
    kinds, wide = network.shape.kinds, network.wide
    with torch.no_grad():
        labels, weights = material.labels(at), material.weights(at)
        if counts is not None:
            weights = weights * torch.from_numpy(counts).to(weights)
        # The linear layer is solved anew, on top of everything else.
        wide.weight.zero_()
        wide.bias.zero_()
        scores, normal = _scores(network, material, at)
        solution = calibrate(normal, scores, labels, weights, kinds).float()
        wide.weight.copy_(solution[:, :-1])
        wide.bias.copy_(solution[:, -1])
        scores = scores + wide(normal)
        users, user = np.unique(np.asarray(material.rows.user)[at], return_inverse=True)
        rated = Rated(
            users=torch.from_numpy(user.astype(np.int64)).to(scores.device),
            offsets=scores,
            labels=labels,
            weights=weights,
            kinds=kinds,
            count=len(users),
            strength=adapter.precision,
            bias_strength=adapter.precision,
            sweeps=sweeps,
            worth=tuple(worth),
        )
        ids = np.asarray(material.rows.candidate_ids)[at]
        tables = [_weight(module) for module in network.factor_tables]
        of_ids, of_values = tables[: len(network.factored)], tables[len(network.factored) :]
        for column, table in zip(network.factored, of_ids, strict=True):
            keys = torch.from_numpy(np.ascontiguousarray(ids[:, column])).to(table.device)
            tell = _teller(network, material, at) if column == 0 else None
            factors = factorise(rated, _within(table, keys), _begin(table), tell)
            table.copy_(factors)
            if tell is not None:
                tell(factors)
        for column, table in enumerate(of_values):
            assert network.candidate_lists is not None
            row, value = _values_of(material, at, network.candidate_lists.value_places[column])
            keys = _within(table, value.to(table.device))
            table.copy_(factorise_lists(rated, row.to(table.device), keys, _begin(table)))


def _weight(table: nn.Module) -> Tensor:
    assert isinstance(table, nn.Embedding)
    return table.weight


def _within(table: Tensor, keys: Tensor) -> Tensor:
    """Keys that a table has a row for, 0 for the others."""
    return torch.where(keys < len(table), keys, torch.zeros_like(keys))


def _begin(table: Tensor) -> Tensor:
    """Where the solution of a table begins: where it is, or at random where it is nothing yet."""
    return table if table.abs().sum() > 0 else torch.randn_like(table) * 0.1


def _teller(network: Ranker, material: Material, at: I64) -> Callable[[Tensor], Tensor] | None:
    """What fits the warm-up to factors of the items, each described by its newest row; None if there is no warm-up."""
    if (warm_up := network.warm_up) is None:
        return None
    time, ids = np.asarray(material.rows.time)[at], np.asarray(material.rows.candidate_ids)[at]
    tables = network.shape.candidate_vocabularies
    ids = np.where(ids < np.array(tables), ids, 0)
    last = newest_of_each(ids[:, 0], time, np.arange(len(at)))
    items = torch.from_numpy(ids[last, 0])
    given = material.inputs(at[last])[3]
    numbers = given.new_zeros(tables[0], 2 * network.shape.candidate_numbers)
    numbers[items] = network.candidate_normaliser(given)
    categories = items.new_zeros(tables[0], len(tables) - 1)
    categories[items] = torch.from_numpy(ids[last, 1:])
    return partial(fit_warm_up, warm_up, numbers=numbers, categories=categories.to(numbers.device))


def _values_of(material: Material, at: I64, place: slice) -> tuple[Tensor, Tensor]:
    """Every value of a column's lists: which of the rows at positions it belongs to, and its id: [T], [T]."""
    table = material.rows.candidate_values
    assert table is not None
    rows, values, before = [], [], 0
    for part in np.array_split(at, max(1, len(at) // PART)):
        ids = table[part, place]
        row, where = np.nonzero(ids >= 0)
        rows.append(row.astype(np.int64) + before)
        values.append(ids[row, where].astype(np.int64))
        before += len(part)
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(values))


def _scores(network: Ranker, material: Material, at: I64) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and normalised statistics [N, S] of many rows, part by part."""
    logits, normal = [], []
    for part in np.array_split(at, max(1, len(at) // PART)):
        logits.append(material.scorer(network)(part)[0])
        normal.append(network.normal_statistics(material.statistics(part)))
    return torch.cat(logits), torch.cat(normal)
