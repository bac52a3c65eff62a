"""What holds of adaptation whatever its kind: batches, padding and order leave no trace, and nothing is nothing."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy import optimize

from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.episodes import score_visits
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tests.learning.slow_ladder import THREE, precisions_of, world
from tests.learning.small_rows import Told, ladder_of, told
from tests.learning.test_adapters import segments, sigmoid
from tests.learning.test_bending import INPUTS, KINDS, perceptron, width_of
from tests.learning.test_outer import ADAPTERS

EVERY = pytest.mark.parametrize("kind", ADAPTERS)


def how(kind, first_order=False):
    config = AdapterConfig(**ADAPTERS[kind])
    return Adaptation(KINDS, config, perceptron() if config.bent else None, first_order)


def width(kind):
    config = AdapterConfig(**ADAPTERS[kind])
    return width_of(config) if config.bent else config.matching or config.width(INPUTS)


@cache
def given(kind, seed=0):
    """Support of four segments, its precision and what they inherit; a label is missing, and a segment is padded."""
    *parts, _ = segments(seed, width=INPUTS)
    random = np.random.default_rng(seed + 1)
    parts[0][..., 0] = 1.0
    if kind == "matching":
        parts[0] = torch.softmax(parts[0], dim=-1)
    elif kind in ("none", "bias"):
        parts[0] = parts[0][..., : width(kind)]
    parts[2][:, 3, 1] = torch.nan
    parts[3][1, 5:] = 0.0
    precision = torch.from_numpy(random.uniform(0.5, 4.0, (2, width(kind))))
    return *parts, precision, torch.from_numpy(0.3 * random.normal(size=(4, 2, width(kind))))


@EVERY
@pytest.mark.parametrize("first_order", [False, True])
def test_a_batch_is_a_loop_and_the_order_of_rows_and_segments_and_padding_change_nothing(kind, first_order):
    *parts, precision, origin = given(kind)
    solver = how(kind, first_order)
    solved = solver.solve(*parts, precision, origin)
    assert solved.shape == (4, 2, width(kind))
    assert kind == "none" or solved.abs().amax(dim=-1).min() > 1e-3
    each = [solver.solve(*(p[at : at + 1] for p in parts), precision, origin[at : at + 1]) for at in range(4)]
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(torch.cat(each), solved, **close)
    rows, batch = torch.tensor([4, 8, 0, 3, 7, 1, 6, 2, 5]), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(solver.solve(*(p[:, rows] for p in parts), precision, origin), solved, **close)
    turned = solver.solve(*(p[batch] for p in parts), precision, origin[batch])
    torch.testing.assert_close(turned, solved[batch], **close)
    padded = [torch.cat([part, 5 * torch.ones_like(part[:, :3])], dim=1) for part in parts]
    padded[3][:, 9:] = 0.0
    torch.testing.assert_close(solver.solve(*padded, precision, origin), solved, **close)


@EVERY
def test_without_support_nothing_is_added_and_nothing_added_is_zero_steps_to_the_bit(kind):
    features, offsets, labels, weights, precision, origin = given(kind)
    solver = how(kind)
    for rows in (
        (features, offsets, labels, 0 * weights),
        (features, offsets, labels * torch.nan, weights),
        (features[:, :0], offsets[:, :0], labels[:, :0], weights[:, :0]),
    ):
        assert torch.equal(solver.solve(*rows, precision, origin), torch.zeros_like(origin))
    assert torch.equal(solver.scores(offsets[0], features[0], 0 * origin, np.zeros(9, np.int64)), offsets[0])


@EVERY
def test_visits_are_served_alike_alone_in_any_order_and_without_support_as_by_zero_steps(kind):
    """Through three levels of the ladder."""
    rows, scorer = world(1, count=40), told(world(1, count=40))
    if kind == "matching":
        scorer = Told(scorer.logits, torch.softmax(scorer.features, dim=-1))
    ladder, visits = Ladder(rows, ladder_of(THREE), "shopper"), visits_of(rows)
    after = np.minimum(2, visits.rows.lengths - 1)
    precisions = precisions_of(3, width=width(kind))

    def adapted(chosen, ladder=ladder):
        parts = (visits.take(chosen), after[chosen], scorer, Material(rows), precisions, how(kind))
        said = score_visits(ladder, *parts)
        return said.adapted[np.argsort(said.rows)], said.base[np.argsort(said.rows)]

    together, base = adapted(np.arange(len(visits)))
    assert torch.equal(together, base) == (kind == "none")
    close = {"rtol": 1e-8, "atol": 1e-9}
    for number in range(0, len(visits), 4):
        alone = adapted(np.array([number]))[0]
        first = int((visits.rows.lengths - after)[:number].sum())
        torch.testing.assert_close(alone, together[first : first + len(alone)], **close)
    torch.testing.assert_close(adapted(np.random.default_rng(0).permutation(len(visits)))[0], together, **close)
    assert torch.equal(*adapted(np.arange(len(visits)), Ladder(rows, ladder_of(THREE, min_support=99), "shopper")))


def test_a_constant_in_many_steps_is_where_the_derivative_of_its_penalised_loss_is_zero():
    """By scipy's root finder, for a click; for a rating, and in one step, by hand."""
    features, offsets, labels, weights, precision, origin = given("bias")
    many = Adaptation(KINDS, AdapterConfig(kind="bias", steps=10))
    solved = many.solve(features, offsets, labels, weights, precision, origin).numpy()
    for at in range(4):
        (o, r), (y, s), w = offsets[at].numpy().T, labels[at].numpy().T, weights[at].numpy()
        held, stars = precision[:, 0].numpy(), ~np.isnan(s)

        def slope(b, o=o, y=y, w=w, held=held):
            return (w * (y - sigmoid(o + b))).sum() - held[0] * b

        assert solved[at, 0, 0] == pytest.approx(optimize.brentq(slope, -20, 20, xtol=1e-13), abs=1e-10)
        by_hand = (w * (s - r))[stars].sum() / (w[stars].sum() + held[1])
        assert solved[at, 1, 0] == pytest.approx(by_hand, rel=1e-12)
