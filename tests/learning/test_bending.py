"""Bent layers against copies of the layers, finite differences, a plain loop per segment, and the linear steps."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tasks.errors import InvalidConfig
from tasks.learning import material as batching
from tasks.learning.adapters import Adaptation, AdapterConfig, apply, check_width
from tasks.learning.bending import Bent, Perceptron
from tasks.learning.episodes import score_visits
from tasks.learning.ladder import Ladder, climb
from tasks.learning.material import Material, visits_of
from tasks.learning.networks import Ranker, RankerConfig
from tasks.learning.solvers import HALVINGS, descend, descend_through
from tests.learning.slow_ladder import THREE, precisions_of, world
from tests.learning.small_rows import ladder_of, opposed, shape, told
from tests.learning.test_adapters import KINDS, segments

INPUTS, HIDDEN = 3, 4
FILM, LORA = AdapterConfig(kind="film"), AdapterConfig(kind="lora", rank=2)
DENSE = AdapterConfig(kind="gradient", bends="dense")
BENDING = pytest.mark.parametrize("config", [FILM, LORA, DENSE], ids=["film", "lora", "dense"])


def perceptron(seed=0):
    """Layers in double precision, for two objectives."""
    random = np.random.default_rng(seed)
    sizes = ((HIDDEN, INPUTS), (HIDDEN,), (2, HIDDEN), (2, INPUTS))
    return Perceptron(*(torch.from_numpy(random.normal(size=size)) for size in sizes))


def width_of(config):
    return list(config.bent.parts(INPUTS, HIDDEN).values())[-1].stop


def bent_segments(config, seed=0, **more):
    """Support as for the linear kinds, precisions of the adapter's width, and weights that segments inherit."""
    *parts, _ = segments(seed, width=INPUTS, **more)
    random = np.random.default_rng(seed + 100)
    width = width_of(config)
    precision = torch.from_numpy(random.uniform(0.5, 4.0, (2, width)))
    return *parts, precision, torch.from_numpy(0.3 * random.normal(size=(len(parts[0]), 2, width)))


def how(config, steps=2, first_order=False, seed=0):
    return Adaptation(KINDS, config.model_copy(update={"steps": steps}), perceptron(seed), first_order)


def slow_scores(config, layers, x, weights):
    """The output of one objective's bent copy of the layers, row by row [S]; its own constant is on top."""
    first, shift, last, down = (part.numpy() for part in layers)
    own = {name: weights[part] for name, part in config.bent.parts(INPUTS, HIDDEN).items()}
    if config.kind == "lora":
        first = first + own["updates"].reshape(HIDDEN, -1) @ down
    if config.bends == "dense":
        first, shift = first + own["first weights"].reshape(HIDDEN, INPUTS), shift + own["shifts"]
        last = last + own["last weights"]
    before = x @ first.T + shift
    if config.kind == "film":
        before = before * (1 + own["scales"]) + own["shifts"]
    return np.maximum(before, 0) @ last + own["constant"][0]


def layers_of(layers, k):
    return layers._replace(last=layers.last[k])


@BENDING
def test_a_change_is_the_score_of_bent_copies_minus_that_of_the_shared_layers(config):
    features, *_, weights = bent_segments(config)
    layers = perceptron()
    change = config.bent.change(layers, features, weights)
    for at, k in np.ndindex(4, 2):
        mine, rest = layers_of(layers, k), np.zeros(width_of(config))
        expected = slow_scores(config, mine, features[at].numpy(), weights[at, k].numpy())
        expected = expected - slow_scores(config, mine, features[at].numpy(), rest)
        np.testing.assert_allclose(change[at, :, k], expected, rtol=1e-10, atol=1e-12)


@BENDING
def test_weights_of_zero_change_nothing_to_the_bit(config):
    """In single precision too, in which two scores would not always cancel."""
    features, *_, weights = (part.float() for part in bent_segments(config))
    layers = Perceptron(*(part.float() for part in perceptron()))
    assert not config.bent.change(layers, features, 0 * weights).any()


def slow(config, layers, features, offsets, labels, weights, precision, origin, steps, told=None):
    """One segment in plain numpy, slopes by central differences: weights [K, P], and what the support said.

    With `told` (slopes of the data, tangents and shares of every objective and step), those are taken instead: what is
    left of the definition when they are constants.
    """
    solution, said = np.zeros(precision.shape), []
    for k, kind in enumerate(KINDS):
        mine, w = layers_of(layers, k), np.zeros(precision.shape[1])
        base = slow_scores(config, mine, features, origin[k])

        def score(w, mine=mine, base=base, k=k):
            return offsets[:, k] + slow_scores(config, mine, features, origin[k] + w) - base

        def support(w, score=score, kind=kind, k=k):
            s, y = score(w), np.nan_to_num(labels[:, k])
            loss = np.logaddexp(0, s) - y * s if kind == "binary" else 0.5 * (s - y) ** 2
            return (loss * weights * ~np.isnan(labels[:, k])).sum()

        for _ in range(steps):
            shifts = 1e-6 * np.eye(len(w))
            data = -np.array([(support(w + e) - support(w - e)) / 2e-6 for e in shifts])
            tangent = np.stack([(score(w + e) - score(w - e)) / 2e-6 for e in shifts], axis=1)
            if told is not None:
                data, tangent, share = told.pop(0)
            down = data - precision[k] * w
            way = down / precision[k]
            curve = weights * ~np.isnan(labels[:, k]) * (0.25 if kind == "binary" else 1.0)
            gain, bend = down @ way, (curve * (tangent @ way) ** 2).sum()
            step = way * gain / (gain + bend) if gain > 0 else 0 * way
            if told is None:
                penalised = lambda v: support(v) + 0.5 * precision[k] @ v**2  # noqa: E731, B023
                shares = [0.5**n for n in range(HALVINGS + 1) if penalised(w + 0.5**n * step) <= penalised(w)]
                share = shares[0] if shares else 0.0
            said.append((data, tangent, share))
            w = w + share * step
        solution[k] = w
    return solution, said


@pytest.mark.parametrize("steps", [1, 3])
@BENDING
def test_the_batch_is_the_plain_loop_over_segments(config, steps):
    """With row weights, a missing label, padding whose numbers would show, and weights that were inherited."""
    features, offsets, labels, weights, precision, origin = bent_segments(config)
    labels[:, 3, 1] = torch.nan
    weights[1, 5:] = 0.0
    solved = how(config, steps).solve(features, offsets, labels, weights, precision, origin)
    for at in range(4):
        rows = (part[at].numpy() for part in (features, offsets, labels, weights))
        expected, _ = slow(config, perceptron(), *rows, precision.numpy(), origin[at].numpy(), steps)
        np.testing.assert_allclose(solved[at].numpy(), expected, rtol=1e-5, atol=1e-7)


def test_through_a_product_with_features_the_steps_are_the_linear_ones():
    features, offsets, labels, weights, precision = segments(1)
    for first_order in (False, True):
        bent = descend_through(
            lambda own: torch.einsum("bsd,bkd->bsk", features, own), offsets, labels, weights, precision, KINDS, 4,
            first_order,
        )  # fmt: skip
        torch.testing.assert_close(bent, descend(features, offsets, labels, weights, precision, KINDS, 4))


@BENDING
def test_the_order_of_rows_and_of_segments_and_padding_change_nothing(config):
    *parts, precision, origin = bent_segments(config, 2)
    solved = how(config, 3).solve(*parts, precision, origin)
    rows, batch = torch.randperm(9), torch.randperm(4)
    torch.testing.assert_close(how(config, 3).solve(*(p[:, rows] for p in parts), precision, origin), solved)
    turned = how(config, 3).solve(*(p[batch] for p in parts), precision, origin[batch])
    torch.testing.assert_close(turned, solved[batch])
    padded = [torch.cat([part, 5 * torch.ones_like(part[:, :3])], dim=1) for part in parts]
    padded[3][:, 9:] = 0.0
    torch.testing.assert_close(how(config, 3).solve(*padded, precision, origin), solved)


@pytest.mark.parametrize("first_order", [False, True])
@BENDING
def test_no_support_and_no_rates_are_the_parent(config, first_order):
    features, offsets, labels, weights, precision, origin = bent_segments(config)
    precision.requires_grad_()
    solver = how(config, 2, first_order)
    for rows in (
        (features, offsets, labels, 0 * weights),
        (features, offsets, labels * torch.nan, weights),
        (features[:, :0], offsets[:, :0], labels[:, :0], weights[:, :0]),
    ):
        solved = solver.solve(*rows, precision, origin)
        assert torch.equal(solved, torch.zeros_like(origin))
        (flow,) = torch.autograd.grad(solved.sum(), precision)
        assert not flow.any()
    assert solver.solve(features, offsets, labels, weights, 1e20 * precision, origin).abs().max() < 1e-18


@BENDING
def test_no_step_loses_and_what_is_learned_is_bounded_by_what_the_support_lost(config):
    """Also where inputs are far beyond the usual and weights hardly held: a tangent alone would overshoot."""
    features, offsets, labels, weights, precision, origin = bent_segments(config, 3, batch=30)
    features, precision = features * 10, precision * 1e-3
    halved = 0

    def losses(solution):
        scores = offsets + config.bent.change(perceptron(), features, origin + solution)
        scores = scores - config.bent.change(perceptron(), features, origin)
        entropy = torch.nn.functional.softplus(scores) - labels * scores
        each = torch.where(torch.tensor([True, False]), entropy, 0.5 * (scores - labels) ** 2)
        held = 0.5 * (precision * solution**2).sum(dim=-1)
        return (each * weights[..., None]).sum(dim=1), held

    before, _ = losses(torch.zeros_like(origin))
    least = before
    for steps in range(1, 6):
        support, held = losses(how(config, steps).solve(features, offsets, labels, weights, precision, origin))
        assert (support + held <= least + 1e-9).all()
        assert (held <= before + 1e-9).all()
        halved += int((support + held > least - 1e-9).sum())
        least = support + held
    assert (least < 0.9 * before).double().mean() > 0.5
    assert halved < 5 * 60  # most steps are taken


# What flows back


def gradient_inputs(config):
    parts = bent_segments(config, 3, batch=2, support=4)
    return tuple(part.clone().requires_grad_() for part in (*parts, *perceptron()))


@BENDING
def test_second_order_flows_through_all_of_it(config):
    """With respect to support, precisions, what was inherited, and the shared layers, by finite differences."""

    def loss(features, offsets, labels, weights, precision, origin, *layers):
        solver = Adaptation(KINDS, config.model_copy(update={"steps": 2}), Perceptron(*layers))
        return solver.solve(features, offsets, labels, weights, precision, origin).sin().sum()

    assert torch.autograd.gradcheck(loss, gradient_inputs(config), fast_mode=True)


@BENDING
def test_first_order_is_its_definition(config):
    """Slopes and tangents of the support are numbers: the rates' gradient is that of the plain loop with them told."""
    parts = gradient_inputs(config)
    layers = Perceptron(*parts[6:])
    solver = Adaptation(KINDS, config.model_copy(update={"steps": 3}), layers, first_order=True)
    solved = solver.solve(*parts[:6])
    torch.testing.assert_close(solved, Adaptation(KINDS, solver.config, layers).solve(*parts[:6]))
    flows = torch.autograd.grad(solved.sin().sum(), parts, allow_unused=True)
    assert [at for at, flow in enumerate(flows) if flow is not None] == [4]
    plain = [part.detach().numpy() for part in parts[:6]]
    rows = [[part[at] for part in plain[:4]] for at in range(2)]
    still = layers.detach()
    told_by = [slow(config, still, *rows[at], plain[4], plain[5][at], 3)[1] for at in range(2)]

    def loss(held):
        told = (slow(config, still, *rows[at], held, plain[5][at], 3, list(told_by[at]))[0] for at in range(2))
        return sum(np.sin(solution).sum() for solution in told)

    held, flow = plain[4], flows[4].numpy()
    for place in ((0, 0), (0, 3), (1, held.shape[1] - 1)):
        shift = np.zeros_like(held)
        shift[place] = 1e-5
        assert flow[place] == pytest.approx((loss(held + shift) - loss(held - shift)) / 2e-5, rel=1e-3, abs=1e-7)


# Rows, segments and the ladder


@BENDING
def test_rows_of_many_segments_are_scored_as_one_by_one(monkeypatch, config):
    random = np.random.default_rng(0)
    which = random.choice(9, 40, p=np.r_[0.6, np.full(8, 0.05)])
    logits, features = torch.randn(40, 2).double(), torch.randn(40, INPUTS).double()
    table = torch.randn(9, 2, width_of(config)).double()
    table[4] = 0.0
    solver = how(config)
    each = [solver.apply(logits[at : at + 1], features[at : at + 1], table[which[at]]) for at in range(40)]
    for padded in (131_072, 4):
        monkeypatch.setattr(batching, "PADDED_ROWS", padded)
        scores = solver.scores(logits, features, table, which)
        torch.testing.assert_close(scores, torch.cat(each))
        assert torch.equal(scores[which == 4], logits[which == 4])
    assert solver.scores(logits[:0], features[:0], table, which[:0]).shape == (0, 2)


@BENDING
def test_a_child_starts_at_its_parents_weights_and_a_segment_without_support_stays_there(config):
    """Every segment of three levels against a solve of its own rows alone; the query is scored with the sum."""
    rows = world(1, count=45)
    ladder, visits, scorer = Ladder(rows, ladder_of(THREE, min_support=3), "shopper"), visits_of(rows), told(rows)
    precisions, solver, labels = precisions_of(3, width=width_of(config)), how(config), Material(rows)
    after = np.minimum(2, visits.rows.lengths - 1)
    stages = ladder.plan(visits, after)
    solved = climb(stages, scorer, labels, precisions, solver)
    moved = 0
    for number, stage in enumerate(stages):
        for segment, (start, stop) in enumerate(zip(stage.windows.start, stage.windows.stop, strict=True)):
            at = np.arange(start, stop) if stage.support is None else stage.support[start:stop]
            above = torch.zeros(2, width_of(config)).double()
            if number and stage.parent[segment] >= 0:
                above = solved[number - 1][stage.parent[segment]]
            if len(at) == 0:
                assert torch.equal(solved[number][segment], above)
                continue
            logits, features = scorer(at)
            offsets = solver.apply(logits, features, above)
            support = (features, offsets, labels.labels(at).double(), labels.weights(at).double())
            own = solver.solve(*(part[None] for part in support), precisions[stage.level], above[None])[0]
            torch.testing.assert_close(solved[number][segment], above + own, rtol=1e-5, atol=1e-6)
            moved += bool(number and above.any())
    assert moved > 10
    scores = score_visits(ladder, visits, after, scorer, labels, precisions, solver)
    one = scores.rows.tolist().index(visits.rows.stop[0] - 1)
    expected = solver.apply(scores.base[one : one + 1], scorer(scores.rows)[1][one : one + 1], solved[-1][0])
    torch.testing.assert_close(scores.adapted[one : one + 1], expected)


@pytest.mark.parametrize(("config", "first_order"), [(FILM, True), (LORA, False), (DENSE, False), (DENSE, True)])
def test_the_meta_gradient_through_the_ladder_is_that_of_finite_differences(config, first_order):
    """Of the query scores, with respect to the shared layers; in first order, with what serves held still."""
    rows = world(1, count=25)
    ladder, visits, scorer = Ladder(rows, ladder_of(THREE), "shopper"), visits_of(rows), told(rows)
    precisions, after = precisions_of(3, width=width_of(config)), np.minimum(2, visits.rows.lengths - 1)
    layers = Perceptron(*(part.requires_grad_() for part in perceptron()))
    solver = Adaptation(KINDS, config, layers, first_order)
    arguments = (ladder, visits, after, scorer, Material(rows), precisions)
    scores = score_visits(*arguments, solver)
    flow = torch.autograd.grad(scores.adapted.sin().sum(), layers[:3])
    served = climb(ladder.plan(visits, after), scorer, Material(rows), precisions, solver)[-1].detach()
    query = visits.split(after)[1].flat()[1]
    random = np.random.default_rng(0)
    ways = [torch.from_numpy(random.normal(size=part.shape)) for part in layers]

    def loss(length):
        moved = Perceptron(*(part.detach() + length * way for part, way in zip(layers, ways, strict=True)))
        moved = moved._replace(down=layers.down.detach())
        there = Adaptation(KINDS, config, moved)
        if first_order:
            logits, features = scorer(scores.rows)
            return there.scores(logits, features, served, query).sin().sum().item()
        return score_visits(*arguments, there).adapted.sin().sum().item()

    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert sum((f * w).sum().item() for f, w in zip(flow, ways, strict=False)) == pytest.approx(expected, rel=1e-5)


# The network and the config


def test_a_new_network_says_nothing_through_the_bent_layers_and_can_be_bent_all_the_same():
    rows = opposed(nights=2, users=9)
    for config, hidden in ((FILM, 6), (LORA, 7), (DENSE, 6)):
        torch.manual_seed(0)
        ranker = RankerConfig(embedding=3, hidden=hidden, factors=2, features=3)
        network = Ranker(shape(rows, *KINDS), ranker, config.bent).eval()
        logits, inputs = Material(rows).scorer(network)(np.arange(5))
        assert inputs.shape == (5, network.joint_inputs)
        torch.testing.assert_close(network.joint(inputs), torch.zeros(5, 2), atol=1e-6, rtol=0)
        weights = torch.zeros(5, 2, network.width).requires_grad_()
        adapted = Adaptation.of(network, config).apply(logits, inputs[:, None], weights)
        flow = torch.autograd.grad(adapted.sum(), weights)[0]
        for name in set(network.parts) - {"constant"}:
            if name != "last weights":
                assert flow[..., network.parts[name]].abs().max() > 1e-4, name
        assert config.width(network.width) == network.width == len(network.fan_in)
        assert not [name for name, _ in network.named_parameters() if name.startswith(("factor_tables", "head"))]
        check_width(config, network.width)


def test_parts_and_what_shares_a_precision():
    assert Bent("film").parts(5, 3) == {"constant": slice(0, 1), "scales": slice(1, 4), "shifts": slice(4, 7)}
    assert Bent("lora", 2).parts(5, 3) == {"constant": slice(0, 1), "updates": slice(1, 7)}
    assert list(Bent("dense").parts(5, 3).values())[-1] == slice(7, 22)
    assert Bent("film").fan_in(5, 3).tolist() == [1] * 7
    assert Bent("lora", 2).fan_in(5, 3).tolist() == [1] + [2] * 6
    assert Bent("dense").fan_in(5, 3).tolist() == [1, 3, 3, 3, 1, 1, 1] + [5] * 15


def test_the_config_says_what_is_bent_and_refuses_what_belongs_to_another_kind():
    assert [config.bent for config in (FILM, LORA, DENSE)] == [Bent("film"), Bent("lora", 2), Bent("dense")]
    assert AdapterConfig(kind="gradient").bent is None
    for wrong, said in (
        ({"kind": "film", "bends": "dense"}, r"adapter\.bends = 'dense' belongs to adapter\.kind 'gradient'"),
        ({"kind": "ridge", "rank": 2}, r"adapter\.rank = 2 belongs to adapter\.kind 'lora'"),
        ({"kind": "lora", "rank": 0}, r"greater than or equal to 1"),
        ({"kind": "gradient", "bends": "towers"}, r"'head' or 'dense'"),
    ):
        with pytest.raises(ValidationError, match=said):
            AdapterConfig(**wrong)
    with pytest.raises(InvalidConfig, match="has none but the constant"):
        check_width(AdapterConfig(kind="gradient"), 1)
    for kind in ("ridge", "gradient", "film", "lora"):
        assert AdapterConfig(kind=kind).model_dump().keys() == {"kind", "precision", "coarse_precision", "steps"}
    assert DENSE.model_dump()["bends"] == "dense"
    assert LORA.model_dump()["rank"] == 2


def test_linear_scores_of_a_table_are_those_of_each_row():
    logits, features = torch.randn(6, 2), torch.randn(6, 5)
    table, which = torch.randn(3, 2, 4), np.array([2, 0, 0, 1, 2, 2])
    expected = apply(logits, features[:, :4], table[which])
    assert torch.equal(Adaptation(KINDS, AdapterConfig()).scores(logits, features, table, which), expected)
