"""The solve against ridge normal equations, scipy's optimiser, plain loops and finite differences."""

import numpy as np
import pytest
import torch
from scipy import optimize

from tasks.errors import InvalidConfig
from tasks.learning.adapters import AdapterConfig, Precisions, apply, check_width
from tasks.learning.solvers import solve, variances

SEEDS = range(5)
KINDS = ("binary", "rating")
SHAPES = pytest.mark.parametrize(
    "shape", [{"support": 9, "width": 3}, {"support": 4, "width": 7}], ids=["long", "short"]
)
"""More rows than features, and fewer: the solve has a way of its own for each."""


def segments(seed, batch=4, support=9, width=3, kinds=KINDS):
    """Random segments in double precision; labels of binary objectives are 0 and 1."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(batch, support, width))
    offsets = random.normal(size=(batch, support, len(kinds)))
    labels = random.normal(size=offsets.shape)
    binary = np.array([kind == "binary" for kind in kinds])
    labels = np.where(binary, labels > 0, labels)
    weights = random.uniform(0.2, 3.0, (batch, support))
    precision = random.uniform(0.3, 5.0, (len(kinds), width))
    return tuple(torch.from_numpy(np.asarray(value, np.float64)) for value in (features, offsets, labels, weights,
                                                                              precision))  # fmt: skip


def sigmoid(score):
    return 1 / (1 + np.exp(-score))


@SHAPES
@pytest.mark.parametrize("seed", SEEDS)
def test_one_step_is_the_ridge_on_residuals(seed, shape):
    features, offsets, labels, weights, precision = segments(seed, **shape)
    solved = solve(features, offsets, labels, weights, precision, KINDS).numpy()
    for at in range(len(features)):
        phi, w = features[at].numpy(), weights[at].numpy()
        for k, kind in enumerate(KINDS):
            o, y, held = offsets[at, :, k].numpy(), labels[at, :, k].numpy(), np.diag(precision[k].numpy())
            chance = sigmoid(o)
            residual, curve = (y - chance, chance * (1 - chance)) if kind == "binary" else (y - o, np.ones_like(o))
            expected = np.linalg.solve(phi.T @ np.diag(w * curve) @ phi + held, phi.T @ (w * residual))
            np.testing.assert_allclose(solved[at, k], expected, rtol=1e-10)


@SHAPES
@pytest.mark.parametrize("seed", SEEDS)
def test_many_steps_reach_the_penalised_maximum_of_the_logistic_likelihood(seed, shape):
    features, offsets, labels, weights, precision = segments(seed, kinds=("binary",), **shape)
    solved = solve(features, offsets, labels, weights, precision, ["binary"], steps=10).numpy()
    for at in range(len(features)):
        phi, o, y, m = features[at].numpy(), offsets[at, :, 0].numpy(), labels[at, :, 0].numpy(), weights[at].numpy()
        held = precision[0].numpy()

        def loss(w, phi=phi, o=o, y=y, m=m, held=held):
            score = o + phi @ w
            return (m * (np.logaddexp(0, score) - y * score)).sum() + 0.5 * (held * w * w).sum()

        best = optimize.minimize(loss, np.zeros(len(held)), method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(solved[at, 0], best.x, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rating_is_exact_in_one_step(seed):
    parts = segments(seed, kinds=("rating",))
    torch.testing.assert_close(solve(*parts, ["rating"], 1), solve(*parts, ["rating"], 7), rtol=1e-12, atol=1e-12)


@SHAPES
@pytest.mark.parametrize("steps", [1, 4])
def test_no_support_leaves_exactly_nothing(steps, shape):
    features, offsets, labels, weights, precision = segments(0, **shape)
    nothing = solve(features, offsets, labels, torch.zeros_like(weights), precision, KINDS, steps)
    assert torch.equal(nothing, torch.zeros_like(nothing))
    empty = solve(features[:, :0], offsets[:, :0], labels[:, :0], weights[:, :0], precision, KINDS, steps)
    assert torch.equal(empty, torch.zeros_like(empty))
    unlabelled = solve(features, offsets, torch.full_like(labels, torch.nan), weights, precision, KINDS, steps)
    assert torch.equal(unlabelled, torch.zeros_like(unlabelled))


@SHAPES
@pytest.mark.parametrize("seed", SEEDS)
def test_padding_row_order_and_batching_change_nothing(seed, shape):
    random = np.random.default_rng(seed)
    features, offsets, labels, weights, precision = segments(seed, **shape)
    solved = solve(features, offsets, labels, weights, precision, KINDS, 2)
    looped = [
        solve(*(part[at : at + 1] for part in (features, offsets, labels, weights)), precision, KINDS, 2)
        for at in range(len(features))
    ]
    torch.testing.assert_close(torch.cat(looped), solved, rtol=1e-10, atol=1e-12)
    shuffled = torch.from_numpy(random.permutation(features.shape[1]))
    parts = (part[:, shuffled] for part in (features, offsets, labels, weights))
    torch.testing.assert_close(solve(*parts, precision, KINDS, 2), solved, rtol=1e-10, atol=1e-12)
    # Padding of weight 0 holds numbers that would show.
    padded = [torch.cat([part, torch.full_like(part[:, :4], 9.0)], dim=1) for part in (features, offsets, labels)]
    none = torch.cat([weights, torch.zeros_like(weights[:, :4])], dim=1)
    torch.testing.assert_close(solve(*padded, none, precision, KINDS, 2), solved, rtol=1e-10, atol=1e-12)


@SHAPES
@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_label_takes_the_row_out_of_that_objective_only(seed, shape):
    features, offsets, labels, weights, precision = segments(seed, **shape)
    holed = labels.clone()
    holed[:, 2, 0] = torch.nan
    solved = solve(features, offsets, holed, weights, precision, KINDS)
    absent = weights.clone()
    absent[:, 2] = 0.0
    without = solve(features, offsets, labels, absent, precision, KINDS)
    torch.testing.assert_close(solved[:, 0], without[:, 0], rtol=1e-10, atol=1e-12)
    everything = solve(features, offsets, labels, weights, precision, KINDS)
    torch.testing.assert_close(solved[:, 1], everything[:, 1], rtol=1e-10, atol=1e-12)


def test_a_row_of_weight_two_counts_as_two_rows():
    features, offsets, labels, _, precision = segments(1, support=4)
    once, twice = torch.ones(4, 4, dtype=torch.float64), torch.cat([torch.arange(4), torch.tensor([3])])
    double = once.clone()
    double[:, 3] = 2.0
    repeated = solve(
        features[:, twice], offsets[:, twice], labels[:, twice], torch.ones(4, 5).double(), precision, KINDS
    )
    torch.testing.assert_close(solve(features, offsets, labels, double, precision, KINDS), repeated)


def test_more_precision_moves_less_and_much_evidence_moves_to_the_label():
    ones = torch.ones(1, 1000, 1, dtype=torch.float64)
    moved = [
        solve(ones, 0 * ones, 2 * ones, ones[..., 0], torch.full((1, 1), held).double(), ["rating"]).item()
        for held in (0.01, 10.0, 1000.0, 1e6)
    ]
    assert moved[0] == pytest.approx(2.0, abs=1e-4)
    assert moved[2] == pytest.approx(1.0)  # as many pseudo-rows as rows: half-way
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.01


def test_a_saturated_row_does_not_explode():
    ones = torch.ones(1, 3, 1)
    solved = solve(ones, 60 * ones, 0 * ones, ones[..., 0], torch.full((1, 1), 0.01), ["binary"], 3)
    assert torch.isfinite(solved).all()


@SHAPES
@pytest.mark.parametrize("steps", [1, 3])
def test_the_query_loss_flows_back_through_the_solve(steps, shape):
    """With respect to support features, query features, offsets, labels and precisions, by finite differences."""
    features, offsets, labels, weights, precision = segments(3, batch=2, **shape)
    weights[0, 1] = 0.0
    query, truth = torch.randn(2, 3, shape["width"], dtype=torch.float64), torch.randint(0, 2, (2, 3, 2)).double()

    def loss(features, offsets, labels, precision, query):
        solved = solve(features, offsets, labels, weights, precision, KINDS, steps)
        scores = apply(torch.zeros_like(truth), query, solved[:, None])
        return (torch.nn.functional.softplus(scores) - truth * scores).mean()

    inputs = tuple(part.clone().requires_grad_() for part in (features, offsets, labels, precision, query))
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_variances_are_the_diagonal_of_the_inverse_hessian_at_the_solution(seed):
    features, offsets, labels, weights, precision = segments(seed)
    labels[:, 2, 0] = torch.nan
    solution = solve(features, offsets, labels, weights, precision, KINDS, 3)
    said = variances(features, offsets, labels, weights, precision, KINDS, solution).numpy()
    for at, (k, kind) in [(at, pair) for at in range(len(features)) for pair in enumerate(KINDS)]:
        phi, held = features[at].numpy(), np.diag(precision[k].numpy())
        mass = weights[at].numpy() * ~np.isnan(labels[at, :, k].numpy())
        chance = sigmoid(offsets[at, :, k].numpy() + phi @ solution[at, k].numpy())
        curve = chance * (1 - chance) if kind == "binary" else np.ones_like(chance)
        expected = np.diag(np.linalg.inv(phi.T @ np.diag(mass * curve) @ phi + held))
        np.testing.assert_allclose(said[at, k], expected, rtol=1e-9)


def test_without_support_a_weight_is_as_unsure_as_its_precision_says():
    features, offsets, labels, weights, precision = segments(0)
    nothing = torch.zeros(4, 2, 3, dtype=torch.float64)
    for given, mass in ((labels, 0 * weights), (labels * torch.nan, weights)):
        said = variances(features, offsets, given, mass, precision, KINDS, nothing)
        torch.testing.assert_close(said, (1 / precision).expand(4, 2, 3))


def test_applying_is_a_product_per_row_and_objective():
    features, offsets, *_ = segments(4)
    weights = torch.randn(4, 9, 2, 3, dtype=torch.float64)
    scores = apply(offsets, features, weights)
    for b, s, k in np.ndindex(4, 9, 2):
        assert scores[b, s, k].item() == pytest.approx(
            (offsets[b, s, k] + features[b, s] @ weights[b, s, k]).item(), rel=1e-12
        )


def test_precisions_start_from_the_config_and_stay_positive():
    precisions = Precisions(3, 2, 4, AdapterConfig(precision=7.0, coarse_precision=90.0))
    table = precisions()
    assert table.shape == (3, 2, 4)
    torch.testing.assert_close(table[0], torch.full((2, 4), 7.0))
    torch.testing.assert_close(table[1:], torch.full((2, 2, 4), 90.0))
    with torch.no_grad():
        precisions.logarithm.fill_(-1000.0)
    assert (precisions() > 0).all()


@pytest.mark.parametrize(("kind", "width"), [("none", 0), ("bias", 1), ("ridge", 6)])
def test_the_kind_says_how_many_features_are_used(kind, width):
    assert AdapterConfig(kind=kind).width(6) == width


def test_a_ridge_over_nothing_but_the_constant_is_refused():
    with pytest.raises(InvalidConfig, match=r"ranker\.factors to 1 or more"):
        check_width(AdapterConfig(), 1)
    check_width(AdapterConfig(kind="bias"), 1)
    check_width(AdapterConfig(), 2)


@SHAPES
def test_the_second_derivative_is_that_of_finite_differences(shape):
    features, offsets, labels, weights, precision = segments(3, batch=2, **shape)
    inputs = tuple(part.clone().requires_grad_() for part in (features, offsets, labels, precision))
    assert torch.autograd.gradgradcheck(
        lambda features, offsets, labels, precision: solve(features, offsets, labels, weights, precision, KINDS, 2),
        inputs,
    )


@pytest.mark.parametrize(
    ("adapter", "features", "reads"),
    [
        *(({"kind": kind}, 4, kind in ("ridge", "gradient", "film", "lora", "matching"))
          for kind in ("none", "bias", "ridge", "gradient", "film", "lora", "matching")),
        *(({"kind": kind}, 0, kind in ("film", "lora", "matching"))
          for kind in ("none", "bias", "ridge", "gradient", "film", "lora", "matching")),
        ({"kind": "gradient", "bends": "dense"}, 0, True),
    ],
)  # fmt: skip
def test_only_weights_on_towers_layers_and_prototypes_are_on_what_training_learns(adapter, features, reads):
    """The default config's are not: keys of its nights say nothing of how starts are loosened."""
    assert AdapterConfig(**adapter).reads_learned(features) == reads
