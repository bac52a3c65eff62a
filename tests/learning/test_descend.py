"""Gradient steps against hand arithmetic, a plain loop per segment, their limit (the ridge) and finite differences."""

import numpy as np
import pytest
import torch

from tasks.errors import InvalidConfig
from tasks.learning.adapters import Adaptation, AdapterConfig, apply, check_width
from tasks.learning.episodes import row_loss, score_visits
from tasks.learning.ladder import Ladder, climb
from tasks.learning.material import Material, visits_of
from tasks.learning.solvers import descend, solve
from tests.learning.slow_ladder import THREE, precisions_of, world
from tests.learning.small_rows import ladder_of, told
from tests.learning.test_adapters import KINDS, SEEDS, segments, sigmoid

GRADIENT = AdapterConfig(kind="gradient")


def slow(features, offsets, labels, weights, precision, steps, told_slopes=None):
    """One segment in plain Python: weights [K, D], and the slopes of the data at every step [K][steps][D].

    With `told_slopes`, those are taken instead: what is left of the definition when they are constants.
    """
    solution, slopes = np.zeros(precision.shape), [[] for _ in KINDS]
    for k, kind in enumerate(KINDS):
        w = np.zeros(precision.shape[1])
        for step in range(steps):
            slope, curve = np.zeros_like(w), []
            for phi, o, y, mass in zip(features, offsets[:, k], labels[:, k], weights, strict=True):
                if np.isnan(y):
                    continue
                score = o + phi @ w
                slope = slope + mass * phi * (y - (sigmoid(score) if kind == "binary" else score))
                curve.append((phi, mass * (0.25 if kind == "binary" else 1.0)))
            if told_slopes is not None:
                slope = told_slopes[k][step]
            slopes[k].append(slope)
            down = slope - precision[k] * w
            way = down / precision[k]
            gain, bend = down @ way, sum(c * (phi @ way) ** 2 for phi, c in curve)
            w = w + way * (gain / (gain + bend) if gain > 0 else 0.0)
        solution[k] = w
    return solution, slopes


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_batch_is_the_plain_loop_over_segments(seed, steps):
    """With row weights, a missing label and padding whose numbers would show."""
    parts = segments(seed)
    parts[2][:, 3, 1] = torch.nan
    features, offsets, labels, weights, precision = parts
    weights[1, 5:] = 0.0
    solved = descend(*parts, KINDS, steps).numpy()
    for at in range(len(features)):
        rows = (part[at].numpy() for part in (features, offsets, labels, weights))
        np.testing.assert_allclose(solved[at], slow(*rows, precision.numpy(), steps)[0], rtol=1e-9)


def test_one_step_by_hand():
    """Rows (1, 2) and (1, 0) of a rating, 3 and 1 above their offsets, rates 1/2 and 1/4.

    g = (4, 6), v = (2, 1.5), gain 17, along it the rows move by 5 and 2: length 17 / (17 + 29).
    """
    features = torch.tensor([[[1.0, 2.0], [1.0, 0.0]]])
    offsets, labels = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[4.0], [2.0]]])
    moved = descend(features, offsets, labels, torch.ones(1, 2), torch.tensor([[2.0, 4.0]]), ["rating"], 1)
    torch.testing.assert_close(moved, torch.tensor([[[2.0, 1.5]]]) * 17 / 46)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_no_steps_no_rates_and_no_support_are_the_parent(steps, first_order):
    features, offsets, labels, weights, precision = segments(0)
    precision.requires_grad_()
    nothing = torch.zeros(4, 2, 3, dtype=torch.float64)
    empty = [
        descend(features, offsets, labels, 0 * weights, precision, KINDS, steps, first_order),
        descend(features, offsets, labels * torch.nan, weights, precision, KINDS, steps, first_order),
        descend(features[:, :0], offsets[:, :0], labels[:, :0], weights[:, :0], precision, KINDS, steps, first_order),
    ]
    for solved in empty:
        assert torch.equal(solved, nothing)
        if steps:
            (flow,) = torch.autograd.grad(solved.sum(), precision)
            assert torch.equal(flow, torch.zeros_like(flow))
    if steps == 0:
        assert torch.equal(descend(features, offsets, labels, weights, precision, KINDS, 0, first_order), nothing)
    held = descend(features, offsets, labels, weights, 1e20 * precision, KINDS, steps, first_order)
    assert held.abs().max() < 1e-18


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_rows_and_of_segments_changes_nothing(seed):
    random = np.random.default_rng(seed)
    *parts, precision = segments(seed)
    solved = descend(*parts, precision, KINDS, 3)
    rows, batch = (torch.from_numpy(random.permutation(size)) for size in (9, 4))
    torch.testing.assert_close(descend(*(p[:, rows] for p in parts), precision, KINDS, 3), solved, rtol=1e-9, atol=0)
    torch.testing.assert_close(descend(*(p[batch] for p in parts), precision, KINDS, 3), solved[batch])


@pytest.mark.parametrize("seed", SEEDS)
def test_every_step_lowers_the_penalised_loss_and_many_end_in_the_ridge(seed):
    """With numbers far beyond the usual as well: a rate that suits others would overshoot."""
    features, offsets, labels, weights, precision = segments(seed)
    features[:, 4] *= 20.0

    def loss(solution):
        scores = apply(offsets, features, solution[:, None])
        entropy = torch.nn.functional.softplus(scores) - labels * scores
        each = torch.where(torch.tensor([True, False]), entropy, 0.5 * (scores - labels) ** 2)
        return (each * weights[..., None]).sum(dim=1) + 0.5 * (precision * solution**2).sum(dim=-1)

    losses = torch.stack(
        [loss(descend(features, offsets, labels, weights, precision, KINDS, steps)) for steps in range(12)]
    )
    assert (losses[1:] <= losses[:-1] + 1e-12).all()
    parts = segments(seed)
    ridge = solve(*parts, KINDS, 30)
    torch.testing.assert_close(descend(*parts, KINDS, 3000), ridge, rtol=1e-3, atol=1e-4)


def test_a_row_of_weight_two_counts_as_two_rows():
    features, offsets, labels, _, precision = segments(1, support=4)
    twice = torch.cat([torch.arange(4), torch.tensor([3])])
    double = torch.ones(4, 4, dtype=torch.float64)
    double[:, 3] = 2.0
    repeated = descend(
        *(part[:, twice] for part in (features, offsets, labels)), torch.ones(4, 5).double(), precision, KINDS, 2
    )
    torch.testing.assert_close(descend(features, offsets, labels, double, precision, KINDS, 2), repeated)


def test_the_config_says_which_way_is_taken():
    parts = segments(2)
    for kind, way in (("gradient", descend), ("ridge", solve)):
        how = Adaptation(KINDS, AdapterConfig(kind=kind, steps=3))
        assert torch.equal(how.solve(*parts, torch.zeros(4, 2, 3)), way(*parts, KINDS, 3))
    assert GRADIENT.width(6) == 6
    assert GRADIENT.in_closed_form.kind == "ridge"
    assert AdapterConfig(kind="bias").in_closed_form.kind == "bias"
    dense = AdapterConfig(kind="gradient", bends="dense")
    assert dense.in_closed_form == dense
    with pytest.raises(InvalidConfig, match=r"adapter\.kind: 'gradient' weighs"):
        check_width(GRADIENT, 1)


# What flows back


@pytest.mark.parametrize("steps", [1, 3])
def test_second_order_flows_through_all_of_it(steps):
    features, offsets, labels, weights, precision = segments(3, batch=2, support=4)

    def loss(features, offsets, labels, weights, precision):
        return descend(features, offsets, labels, weights, precision, KINDS, steps).sin().sum()

    inputs = tuple(part.clone().requires_grad_() for part in (features, offsets, labels, weights, precision))
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_first_order_is_its_definition(seed, steps):
    """The slopes of the data are numbers: nothing flows into the support, and the rates' gradient is that of the plain
    loop with the slopes written in."""
    parts = segments(seed, batch=2, support=4)
    for part in parts:
        part.requires_grad_()
    precision = parts[-1]
    solved = descend(*parts, KINDS, steps, first_order=True)
    assert torch.equal(solved, descend(*parts, KINDS, steps))
    flows = torch.autograd.grad(solved.sin().sum(), parts, allow_unused=True)
    assert all(flow is None for flow in flows[:-1])
    rows = [[part[at].detach().numpy() for part in parts[:-1]] for at in range(2)]
    told_slopes = [slow(*row, precision.detach().numpy(), steps)[1] for row in rows]

    def loss(held):
        return sum(
            np.sin(slow(*row, held, steps, slopes)[0]).sum() for row, slopes in zip(rows, told_slopes, strict=True)
        )

    held, expected = precision.detach().numpy(), np.zeros(precision.shape)
    for place in np.ndindex(*held.shape):
        shift = np.zeros_like(held)
        shift[place] = 1e-6
        expected[place] = (loss(held + shift) - loss(held - shift)) / 2e-6
    np.testing.assert_allclose(flows[-1].numpy(), expected, rtol=1e-5, atol=1e-8)


class Shaped:
    """A scorer whose logits and features hang on shared numbers theta [2, 3]."""

    def __init__(self, rows, theta):
        self.plain, self.theta = told(rows), theta

    def __call__(self, at):
        logits, features = self.plain(at)
        return logits * self.theta[0, :2] + self.theta[0, 2], features * self.theta[1]


def query_loss(rows, theta, precisions, config, first_order=False):
    """The query loss of every visit of a world of three levels, two rows of each as support."""
    visits = visits_of(rows)
    after = np.minimum(2, visits.rows.lengths - 1)
    scores = score_visits(
        *(Ladder(rows, ladder_of(THREE), "shopper"), visits, after, Shaped(rows, theta), Material(rows), precisions),
        Adaptation(KINDS, config, first_order=first_order),
    )
    labels = Material(rows).labels(scores.rows).double()
    return row_loss(scores.adapted, labels, KINDS, torch.tensor([1.0, 0.5]).double()), scores


@pytest.mark.parametrize("kind", ["ridge", "gradient"])
def test_the_meta_gradient_of_second_order_is_that_of_finite_differences(kind):
    """Through three levels, with respect to the shared numbers and to the precisions of every level."""
    rows, config = world(1), AdapterConfig(kind=kind)
    theta = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    inputs = (theta.requires_grad_(), precisions_of(3).double().requires_grad_())
    assert torch.autograd.gradcheck(lambda *given: query_loss(rows, *given, config)[0], inputs, atol=1e-6)


def test_the_meta_gradient_of_first_order_is_that_of_weights_held_constant():
    """By finite differences of the query loss, the weights that serve each row written in as numbers."""
    rows = world(1)
    theta = (torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5).requires_grad_()
    precisions = precisions_of(3).double().requires_grad_()
    loss, scores = query_loss(rows, theta, precisions, GRADIENT, first_order=True)
    flow, rates = torch.autograd.grad(loss, (theta, precisions))
    visits = visits_of(rows)
    after = np.minimum(2, visits.rows.lengths - 1)
    served = climb(
        Ladder(rows, ladder_of(THREE), "shopper").plan(visits, after),
        *(Shaped(rows, theta), Material(rows), precisions, Adaptation(KINDS, GRADIENT)),
    )[-1].detach()[torch.from_numpy(visits.split(after)[1].flat()[1])]
    labels = Material(rows).labels(scores.rows).double()

    def constant(theta):
        adapted = apply(*Shaped(rows, theta)(scores.rows), served)
        return row_loss(adapted, labels, KINDS, torch.tensor([1.0, 0.5]).double()).item()

    expected = torch.zeros_like(theta)
    with torch.no_grad():
        for place in np.ndindex(2, 3):
            shift = torch.zeros_like(theta)
            shift[place] = 1e-6
            expected[place] = (constant(theta + shift) - constant(theta - shift)) / 2e-6
    torch.testing.assert_close(flow, expected, rtol=1e-6, atol=1e-9)
    assert (rates.abs().sum(dim=(1, 2)) > 0).all()  # the rates of every level are learned
    whole, _ = query_loss(rows, theta, precisions, GRADIENT)
    assert whole.item() == pytest.approx(loss.item(), rel=1e-12)
    through = torch.autograd.grad(whole, (theta, precisions))
    assert not torch.allclose(through[0], flow, rtol=1e-2)
    assert not torch.allclose(through[1], rates, rtol=1e-2)  # the slopes are constant on every level of the ladder


def test_a_segment_without_support_has_exactly_its_parent_s_weights():
    rows = world(0)
    ladder = Ladder(rows, ladder_of(THREE, min_support=4), "shopper")
    visits = visits_of(rows)
    stages = ladder.plan(visits, np.zeros(len(visits), np.int64))
    weights = climb(stages, told(rows), Material(rows), precisions_of(3), Adaptation(KINDS, GRADIENT))
    alone = stages[-1].windows.lengths == 0
    assert alone.any()
    assert torch.equal(weights[-1][alone], weights[-2][stages[-1].parent[alone]])
    assert not torch.equal(weights[-1][~alone], weights[-2][stages[-1].parent[~alone]])
