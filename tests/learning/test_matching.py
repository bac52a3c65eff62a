"""Attention over the support against its plain formula, a constant, finite differences, and a world that needs it."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tasks.errors import InvalidConfig
from tasks.learning import initialisation
from tasks.learning.adapters import Adaptation, AdapterConfig, Precisions, check_width
from tasks.learning.descent import optimiser_of
from tasks.learning.episodes import score_visits
from tasks.learning.initialisation import Initialisation
from tasks.learning.ladder import Ladder, climb
from tasks.learning.layers import Matching
from tasks.learning.losses import Losses
from tasks.learning.material import Material, visits_of
from tasks.learning.networks import Ranker, RankerConfig
from tasks.learning.outer import check_outer, thaw
from tasks.learning.prototypes import place, unmatched
from tasks.learning.solvers import match, solve
from tests.learning.slow_ladder import THREE, precisions_of, world
from tests.learning.small_rows import Told, before, ladder_of, one_aim, opposed, shape, told, with_labels
from tests.learning.test_adapters import KINDS, segments, sigmoid
from tests.learning.test_ensemble import setting_of
from tests.learning.test_outer import loop
from tests.learning.test_training import SHORT, stop_losses, train

MATCHING = AdapterConfig(kind="matching", prototypes=5)
NIGHTS = 4


def shared(seed=0, **more):
    """Support as for the linear kinds, rows by their shares in five prototypes."""
    features, *parts, precision = segments(seed, width=5, **more)
    return torch.softmax(2 * features, dim=-1), *parts, precision


# The formula


def test_a_row_reads_an_average_of_the_support_weighted_by_its_likeness():
    """Row by row as attention, with row weights, a missing label, and padding whose numbers would show."""
    shares, offsets, labels, weights, precision = shared()
    labels[:, 3, 1] = torch.nan
    weights[1, 5:] = 0.0
    solved = match(shares, offsets, labels, weights, precision, KINDS)
    query = torch.softmax(torch.randn(3, 5, dtype=torch.float64), dim=-1).numpy()
    for at, (k, kind) in ((at, one) for at in range(4) for one in enumerate(KINDS)):
        o, y, w = offsets[at, :, k].numpy(), labels[at, :, k].numpy(), weights[at].numpy()
        phi = shares[at].numpy()
        given = [row for row in range(9) if w[row] > 0 and not np.isnan(y[row])]
        chance = sigmoid(o)
        residual, curve = (y - chance, chance * (1 - chance)) if kind == "binary" else (y - o, np.ones(9))
        for q in range(3):
            heard = np.zeros(9)
            for prototype in range(5):
                seen = {row: w[row] * phi[row, prototype] * curve[row] for row in given}
                for row in given:
                    heard[row] += query[q, prototype] * seen[row] / (precision[k, prototype] + sum(seen.values()))
            assert (heard >= 0).all()
            assert heard.sum() < 1
            expected = sum(heard[row] * residual[row] / curve[row] for row in given)
            assert query[q] @ solved[at, k].numpy() == pytest.approx(expected, rel=1e-9)
    # Held by nothing, what is heard adds up to 1: where all rows say the same, every row reads exactly that.
    same = match(shares, offsets, offsets + 3.0, weights, 1e-12 * precision, ("rating", "rating"))
    torch.testing.assert_close(same, torch.full_like(same, 3.0))


def test_one_prototype_is_one_step_of_a_constant():
    shares, offsets, labels, weights, precision = shared(1)
    ones = torch.ones_like(shares[..., :1])
    rows = (offsets, labels, weights, precision[:, :1], KINDS)
    torch.testing.assert_close(match(ones, *rows), solve(ones, *rows, steps=1))


def test_prototypes_that_share_no_row_are_the_ridge_and_others_never_lose():
    """The denominators are row sums of the ridge's system: alike where it is diagonal, an upper bound elsewhere."""
    shares, offsets, labels, weights, precision = shared(2, batch=30)
    ratings = (offsets, labels, weights, precision, ("rating", "rating"))
    whole = torch.nn.functional.one_hot(shares.argmax(dim=-1), 5).double()
    torch.testing.assert_close(match(whole, *ratings), solve(whole, *ratings))
    solved = match(shares, *ratings)

    def loss(v):
        left = labels - offsets - torch.einsum("bsd,bkd->bsk", shares, v)
        return (0.5 * weights[..., None] * left**2).sum(dim=1) + 0.5 * (precision * v**2).sum(dim=-1)

    assert (loss(solved) < loss(torch.zeros_like(solved))).all()


def test_the_order_of_rows_and_of_segments_and_padding_change_nothing_and_a_batch_is_a_loop():
    *parts, precision = shared(3)
    solved = match(*parts, precision, KINDS)
    rows, batch = torch.randperm(9), torch.randperm(4)
    torch.testing.assert_close(match(*(part[:, rows] for part in parts), precision, KINDS), solved)
    torch.testing.assert_close(match(*(part[batch] for part in parts), precision, KINDS), solved[batch])
    padded = [torch.cat([part, 5 * torch.ones_like(part[:, :3])], dim=1) for part in parts]
    padded[3][:, 9:] = 0.0
    torch.testing.assert_close(match(*padded, precision, KINDS), solved)
    each = [match(*(part[at : at + 1] for part in parts), precision, KINDS) for at in range(4)]
    torch.testing.assert_close(torch.cat(each), solved)


def test_no_support_is_the_parent_and_twice_the_support_goes_further():
    shares, offsets, labels, weights, precision = shared(4)
    for rows in (
        (shares, offsets, labels, 0 * weights),
        (shares, offsets, labels * torch.nan, weights),
        (shares[:, :0], offsets[:, :0], labels[:, :0], weights[:, :0]),
    ):
        assert torch.equal(match(*rows, precision, KINDS), torch.zeros(4, 2, 5).double())
    once = match(shares, offsets, labels, weights, precision, KINDS)
    twice = match(*(torch.cat([part, part], dim=1) for part in (shares, offsets, labels, weights)), precision, KINDS)
    assert torch.equal(once.sign(), twice.sign())
    assert (twice.abs() > once.abs()).all()


# What flows back, and the ladder


def test_second_order_flows_through_all_of_it():
    parts = [part.clone().requires_grad_() for part in shared(5, batch=2, support=4)]
    assert torch.autograd.gradcheck(lambda *given: match(*given, KINDS), parts)


@pytest.fixture(scope="module")
def seen():
    """Rows of three levels, and who has which support."""
    rows = world(1, count=60)
    return rows, Ladder(rows, ladder_of(THREE, min_support=3), "shopper"), visits_of(rows)


def sharing(scorer, prototypes):
    """A scorer whose features are shares."""
    return Told(scorer.logits, torch.softmax(scorer.features @ prototypes.mT, dim=-1))


def test_the_meta_gradient_through_the_ladder_is_that_of_finite_differences(seen):
    """Of scores of later rows, with respect to prototypes, features and precisions at once."""
    rows, ladder, visits = seen
    after, material = np.minimum(2, visits.rows.lengths - 1), Material(rows)
    random = np.random.default_rng(0)
    begin = (told(rows).features, torch.from_numpy(random.normal(size=(5, 3))), precisions_of(3, width=5))
    ways = [torch.from_numpy(random.normal(size=part.shape)) for part in begin]

    def loss(features, prototypes, precisions):
        scorer = sharing(Told(told(rows).logits, features), prototypes)
        solver = Adaptation(KINDS, MATCHING)
        return score_visits(ladder, visits, after, scorer, material, precisions, solver).adapted.sin().sum()

    leaves = [part.clone().requires_grad_() for part in begin]
    flows = torch.autograd.grad(loss(*leaves), leaves)
    up, down = (loss(*(p + length * w for p, w in zip(begin, ways, strict=True))) for length in (1e-5, -1e-5))
    expected = ((up - down) / 2e-5).item()
    assert all(flow.abs().max() > 1e-3 for flow in flows)
    assert sum((flow * way).sum().item() for flow, way in zip(flows, ways, strict=True)) == pytest.approx(expected)


def test_a_child_hears_what_its_parent_leaves_over_and_without_rows_is_its_parent(seen):
    """Every segment of three levels against its own rows alone, at the scores that it inherits."""
    rows, ladder, visits = seen
    material, precisions = Material(rows), precisions_of(3, width=5)
    scorer = sharing(told(rows), torch.from_numpy(np.random.default_rng(1).normal(size=(5, 3))))
    stages = ladder.plan(visits, np.minimum(1, visits.rows.lengths - 1))
    solved = climb(stages, scorer, material, precisions, Adaptation(KINDS, MATCHING))
    still = moved = 0
    for number, stage in enumerate(stages):
        for segment, (start, stop) in enumerate(zip(stage.windows.start, stage.windows.stop, strict=True)):
            at = np.arange(start, stop) if stage.support is None else stage.support[start:stop]
            above = torch.zeros(2, 5).double()
            if number and stage.parent[segment] >= 0:
                above = solved[number - 1][stage.parent[segment]]
            if len(at) == 0:
                assert torch.equal(solved[number][segment], above)
                still += bool(above.any())
                continue
            logits, shares = scorer(at)
            support = (shares, logits + shares @ above.mT, material.labels(at).double(), material.weights(at).double())
            own = match(*(part[None] for part in support), precisions[stage.level], KINDS)[0]
            torch.testing.assert_close(solved[number][segment], above + own, rtol=1e-5, atol=1e-6)
            moved += bool(above.any())
    assert still > 3
    assert moved > 3


# Where it starts


def test_prototypes_are_placed_where_segments_differ_about_rows():
    """Two clusters in what tells of tastes; what tells nothing varies a hundred times as much, and is not looked at."""
    random = np.random.default_rng(0)
    cluster = np.arange(60) % 2
    told_by = np.stack(
        [np.ones(60), 3.0 * cluster + 0.1 * random.normal(size=60), 100 * random.normal(size=60)], axis=1
    )
    matching = Matching(3, 2).double()
    place(matching, torch.from_numpy(told_by), torch.tensor([[1.0, 1.0, 1e12]]), random)
    shares = matching(torch.from_numpy(told_by)).detach().numpy()
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    own = shares.argmax(axis=1)
    assert (own == (cluster if own[1] == 1 else 1 - cluster)).all()
    assert shares.max(axis=1).min() > 0.9
    assert shares.max() < 1 - 1e-6  # a row that is all in one prototype would leave no gradient


def test_shares_are_those_of_equal_gaussians_around_the_centres():
    """Ratios of shares by hand, of rows that lie on and between two centres."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 4.0]] * 20, dtype=torch.float64)
    matching = Matching(2, 2).double()
    place(matching, rows, torch.tensor([[1.0, 1.0]]), np.random.default_rng(0))
    at = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 4.0]], dtype=torch.float64)
    odds = (matching(at)[:, 0] / matching(at)[:, 1]).log().detach()
    assert odds[1].item() == pytest.approx(0, abs=0.5)  # half-way, but for how far centres are moved at random
    assert (odds[0] - odds[1]).item() == pytest.approx((odds[1] - odds[2]).item())
    # Two fits deviate from their mean by half of what they differ.
    assert odds[[0, 2]].abs().mean().item() == pytest.approx(2 * 2.0, rel=1e-6)


def test_with_fewer_kinds_of_rows_than_prototypes_no_two_of_them_are_equal():
    """Equal prototypes would get equal gradients and never part."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0]] * 5)
    for features in (rows, rows[:1]):
        matching = Matching(2, 6)
        place(matching, features, torch.ones(1, 2), np.random.default_rng(0))
        assert torch.isfinite(matching.prototypes).all()
    matching = Matching(2, 6)
    place(matching, rows, torch.ones(1, 2), np.random.default_rng(0))
    assert torch.pdist(matching.prototypes.detach()).min() > 1e-3


def test_a_network_gives_shares_of_what_linear_adapters_would_read():
    rows = opposed(nights=2, users=9)
    torch.manual_seed(0)
    ranker = RankerConfig(embedding=3, hidden=6, factors=2, features=3)
    network = Ranker(shape(rows, *KINDS), ranker, prototypes=4).eval()
    linear = unmatched(network)
    at = np.arange(9)
    logits, shares = Material(rows).scorer(network)(at)
    plain, keys = Material(rows).scorer(linear)(at)
    assert torch.equal(logits, plain)
    assert network.parts == {"prototypes": slice(0, 4)}
    assert (network.width, network.matching.width, network.prototypes, linear.prototypes) == (4, linear.width, 4, 0)
    fits = keys @ network.matching.prototypes.mT
    torch.testing.assert_close(shares, fits.exp() / fits.exp().sum(dim=1, keepdim=True))


def test_precisions_start_so_that_one_row_moves_all_prototypes_together_as_it_would_a_constant():
    rows = opposed(nights=2, users=9)
    setting = setting_of(one_aim(rows), SHORT, MATCHING, RankerConfig(embedding=3, hidden=6))
    held = Initialisation(setting, Losses(setting)).fresh()[1]().detach()
    torch.testing.assert_close(held[:, 0], torch.tensor([[4.0 / 5] * 5, [150.0 / 5] * 5]))
    even, row = torch.full((1, 1, 5), 0.2), (torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1))
    together = (match(even, *row, held[0], ["rating"]) * even).sum()
    assert together.item() == pytest.approx(1 / (4.0 + 1))


# Training


@pytest.fixture(scope="module")
def history():
    """Half of the users like items whose price is near the middle, and the other half those that are far from it."""
    rows = one_aim(opposed(nights=NIGHTS, users=24))
    price = np.asarray(rows.candidate_numbers)[:, 0]
    far = np.abs(price - np.median(price))
    pull = 2.0 * np.where(np.asarray(rows.user) % 2 == 0, 1, -1) * np.where(far > np.median(far), 1, -1)
    return with_labels(rows, (np.random.default_rng(5).random(len(pull)) < 1 / (1 + np.exp(-pull)))[:, None])


@pytest.fixture
def unscaled(monkeypatch):
    """Precisions as the config has them: the stop nights do not scale them, which takes longer than all else."""
    monkeypatch.setattr(initialisation, "scaled", lambda precisions, parts, loss: (precisions, {}))


NO_FACTORS = RankerConfig(embedding=4, hidden=8, factors=0, category_factors=0)
"""The price alone tells rows apart."""


@pytest.mark.parametrize("outer", ["second_order", "joint"])
def test_training_keeps_prototypes_apart_and_tells_what_a_constant_cannot(unscaled, history, outer):
    """On later rows, where opposed tastes are no straight line: the ridge has the same features."""
    config, made = loop(outer, steps_per_epoch=4), {}
    for kind in ("matching", "bias", "ridge"):
        made[kind] = train(history, adapter=AdapterConfig(kind=kind), ranker=NO_FACTORS, night=NIGHTS, config=config)
    losses = {kind: stop_losses(one, history, (NIGHTS - 2, NIGHTS - 1))[:, 0] for kind, one in made.items()}
    assert "precisions as configured" in made["matching"].why
    network = made["matching"].base.network
    with torch.no_grad():
        shares = Material(history).scorer(network)(np.arange(len(history)))[1]
    apart = torch.pdist(shares.mT) / len(shares) ** 0.5
    assert apart.min() > 0.01, apart
    assert shares.std(dim=0).max() > 0.1
    assert (losses["matching"] < losses["bias"]).all(), losses
    assert losses["matching"][-1] < losses["ridge"][-1], losses


@pytest.mark.parametrize("outer", ["second_order", "joint"])
def test_only_a_loss_that_knows_of_adapters_moves_prototypes(unscaled, monkeypatch, history, outer):
    kept = []
    stop_loss = Losses.of_stop

    def spy(self, network, precisions, stop):
        kept.append(network.matching.prototypes.detach().clone())
        return stop_loss(self, network, precisions, stop)

    monkeypatch.setattr(Losses, "of_stop", spy)
    config = loop(outer, steps_per_epoch=1, stop_nights=1)
    train(before(history, 3), adapter=MATCHING, night=3, config=config)
    assert torch.equal(kept[0], kept[-1]) == (outer == "joint")


def test_prototypes_are_trained_where_only_the_head_is_and_do_not_decay():
    network = Ranker(shape(opposed(nights=1, users=2), *KINDS), RankerConfig(hidden=4), prototypes=3)
    prototypes = network.matching.prototypes
    thaw(network, "all_but_head")
    assert prototypes.requires_grad
    groups = optimiser_of(network, Precisions(2, 2, 3, MATCHING), 1e-3, 0.5, 0.7).param_groups
    assert [group["weight_decay"] for group in groups if any(one is prototypes for one in group["params"])] == [0.0]


def test_equal_inputs_train_to_equal_numbers_and_a_night_goes_on_from_its_parents_prototypes(unscaled, history):
    rows, short = before(history, 3), loop("second_order", steps_per_epoch=1, stop_nights=1)
    first, second = (train(rows, adapter=MATCHING, night=3, config=short) for _ in range(2))
    state = second.base.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.base.network.state_dict().items())
    kept = short.model_copy(update={"epochs": 0, "min_stop_rows": 1})
    later = train(history, adapter=MATCHING, night=NIGHTS, config=kept, parent=first.base)
    assert "trained through" in later.why
    prototypes = [one.base.network.matching.prototypes for one in (first, later)]
    assert torch.equal(*prototypes)
    for other in (AdapterConfig(), AdapterConfig(kind="matching", prototypes=4)):
        assert "the parent's base does not fit" in train(
            history, adapter=other, night=NIGHTS, config=kept, parent=first.base
        ).why  # fmt: skip


# The config


def test_the_config_refuses_what_belongs_to_another_kind():
    assert AdapterConfig(kind="matching").matching == 8
    assert AdapterConfig().matching == 0
    assert MATCHING.bent is None
    for wrong, said in (
        ({"kind": "ridge", "prototypes": 4}, r"adapter\.prototypes = 4 belongs to adapter\.kind 'matching'"),
        ({"kind": "matching", "rank": 2}, r"adapter\.rank = 2 belongs to adapter\.kind 'lora'"),
        ({"kind": "matching", "bends": "dense"}, r"adapter\.bends = 'dense' belongs to adapter\.kind 'gradient'"),
        ({"kind": "matching", "steps": 3}, r"adapter\.steps = 3 does nothing for adapter\.kind 'matching'"),
        ({"kind": "matching", "prototypes": 0}, r"greater than or equal to 1"),
        ({"kind": "matching", "prototypes": 257}, r"less than or equal to 256"),
    ):
        with pytest.raises(ValidationError, match=said):
            AdapterConfig(**wrong)
    assert AdapterConfig(kind="matching").model_dump().keys() == {"kind", "precision", "coarse_precision", "steps"}
    assert MATCHING.model_dump()["prototypes"] == 5
    with pytest.raises(InvalidConfig, match=r"adapter\.kind: 'matching' weighs"):
        check_width(MATCHING, 1)
    for outer in ("second_order", "joint"):
        check_outer(outer, MATCHING)
    for outer in ("first_order", "reptile"):
        with pytest.raises(InvalidConfig, match=r"adapter\.kind 'matching' takes none; set adapter\.kind to"):
            check_outer(outer, MATCHING)


def test_a_segment_has_a_number_for_each_prototype():
    network = Ranker(shape(opposed(nights=1, users=2), *KINDS), RankerConfig(hidden=4), prototypes=5)
    assert MATCHING.width(network.width) == 5
    assert Precisions(2, 2, network.width, MATCHING)().shape == (2, 2, 5)
    assert Adaptation.of(network, MATCHING).size(torch.zeros(3, 2, 5)) == (10, 1)
