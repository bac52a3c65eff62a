"""Outer loops: Reptile against a plain loop, what is frozen, what is refused, and a world in which each is worth it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tasks.errors import InvalidConfig
from tasks.learning import outer as module
from tasks.learning.adapters import Adaptation, AdapterConfig, Precisions, apply
from tasks.learning.base import Base
from tasks.learning.episodes import row_loss
from tasks.learning.initialisation import Initialisation
from tasks.learning.ladder import Ladder, climb
from tasks.learning.losses import Losses
from tasks.learning.material import Material, visits_of
from tasks.learning.networks import Ranker, RankerConfig
from tasks.learning.outer import PATH_RATE, check_outer, reptile, thaw
from tasks.learning.solvers import descend
from tests.learning.small_rows import ladder_of, one_aim, opposed, shape, with_labels
from tests.learning.test_training import NIGHTS, SHORT, SMALL, stop_losses, train

GRADIENT = AdapterConfig(kind="gradient")
LOOPS = ("second_order", "first_order", "reptile", "joint")
ALLOWED = [
    *((kind, loop) for kind in ("bias", "ridge") for loop in ("second_order", "joint")),
    *(("gradient", loop) for loop in LOOPS),
]
KINDS = ("binary", "rating")
STILL = RankerConfig(embedding=4, hidden=6, factors=2, features=2, dropout=0, request_dropout=0, id_dropout=0)


@pytest.fixture(scope="module")
def history():
    """Users differ in which items they like and in how much they like at all."""
    rows = one_aim(opposed(nights=NIGHTS, users=45))
    random = np.random.default_rng(5)
    user, item = np.asarray(rows.user), np.asarray(rows.item)
    pull = np.where(user % 2 == item % 2, 1.5, -1.5) + np.where(user % 3 == 0, 1.5, -0.75)
    return with_labels(rows, (random.random(len(user)) < 1 / (1 + np.exp(-pull)))[:, None])


def loop(name, **more):
    return SHORT.model_copy(update={"outer": name, "epochs": 1} | more)


# Reptile


@pytest.fixture(scope="module")
def episodes():
    """Rows with weights and missing labels, some of their visits, and a network whose features are no zeros."""
    rows = opposed(nights=3, users=9)
    random = np.random.default_rng(0)
    labels = rows.labels.copy()
    labels[random.random(len(rows)) < 0.2, 1] = np.nan
    rows = replace(with_labels(rows, labels), weights=random.uniform(0.2, 2, len(rows)).astype(np.float32))
    visits = visits_of(rows).of_nights(int(rows.night.min()) + 1, int(rows.night.max()))
    torch.manual_seed(0)
    network = Ranker(shape(rows, *KINDS), STILL).train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return rows, visits.take(random.permutation(len(visits))[:11]), network


def told(rows, visits, network, steps=3, base_weight=0.5):
    precisions = Precisions(2, 2, network.width, GRADIENT)()
    return reptile(
        *(Ladder(rows, ladder_of(), "shopper"), visits, network, Material(rows), precisions),
        *(GRADIENT.model_copy(update={"steps": steps}), torch.tensor([1.0, 0.3]), base_weight),
    )


def slow(rows, visits, network, steps=3, base_weight=0.5, most=512):
    """One visit after the other, each with a network of its own and plain SGD."""
    material, config = Material(rows), GRADIENT.model_copy(update={"steps": steps})
    precisions = Precisions(2, 2, network.width, GRADIENT)().detach()
    ladder = Ladder(rows, ladder_of(), "shopper")
    with torch.no_grad():
        stages = ladder.plan(visits, np.zeros(len(visits), np.int64))
        begin = climb(stages, material.scorer(network), material, precisions, Adaptation(KINDS, config))[-1]
    losses, ends = [], {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    for number in range(len(visits)):
        own, weights = copy.deepcopy(network), begin[number]
        optimiser = torch.optim.SGD(own.parameters(), lr=PATH_RATE)
        at = np.arange(visits.rows.start[number], visits.rows.stop[number])[:most]
        labels, mass = material.labels(at), material.weights(at)
        for _ in range(steps):
            logits, features = own(*material.inputs(at, network.config.history))
            scores = apply(logits, features, weights)
            adapted, base = (row_loss(said, labels, KINDS, torch.tensor([1.0, 0.3]), mass) for said in (scores, logits))
            optimiser.zero_grad()
            (adapted + base_weight * base).backward()
            optimiser.step()
            rows_of_it = (features, scores, labels, mass)
            weights = weights + descend(*(p.detach()[None] for p in rows_of_it), precisions[0], KINDS, 1)[0]
        losses.append(adapted.item())
        for name, value in own.named_parameters():
            ends[name] += value.detach() / len(visits)
    moved = {name: (value.detach() - ends[name]) / (PATH_RATE * steps) for name, value in network.named_parameters()}
    return float(np.mean(losses)), moved


@pytest.mark.parametrize("steps", [1, 3])
def test_reptile_is_the_plain_loop_over_visits(episodes, steps):
    before_it = copy.deepcopy(episodes[2].state_dict())
    said, found = told(*episodes, steps=steps)
    loss, expected = slow(*episodes, steps=steps)
    assert said == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=name)
    assert max(value.abs().max() for value in found.values()) > 0.01
    assert all(torch.equal(value, before_it[name]) for name, value in episodes[2].state_dict().items())


def test_reptile_of_a_transformer_is_the_plain_loop_over_visits_each_with_its_history(episodes):
    rows, visits, _ = episodes
    torch.manual_seed(0)
    network = Ranker(
        shape(rows, *KINDS), RankerConfig.model_validate({**dict(STILL), "kind": "transformer", "history": 3})
    ).train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    said, found = told(rows, visits, network, steps=2)
    loss, expected = slow(rows, visits, network, steps=2)
    assert said == pytest.approx(loss, rel=1e-5)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=5e-5, msg=name)
    assert max(value.abs().max() for name, value in found.items() if name.startswith("attention")) > 0.002


def test_reptile_of_parts_and_of_visits_in_another_order_is_the_same(monkeypatch, episodes):
    rows, visits, network = episodes
    loss, whole = told(*episodes)
    for numbers, order in ((1, np.arange(11)), (3 * 700, np.arange(11)), (10**9, np.arange(11)[::-1])):
        monkeypatch.setattr(module, "PATH_NUMBERS", numbers)
        again, parts = told(rows, visits.take(order), network)
        assert again == pytest.approx(loss, rel=1e-5)
        for name, value in parts.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=2e-5, msg=name)


def test_reptile_reads_no_more_rows_of_a_visit_than_the_others_do(monkeypatch, episodes):
    monkeypatch.setattr(module, "QUERY_ROWS", 4)
    assert told(*episodes)[0] == pytest.approx(slow(*episodes, most=4)[0], rel=1e-5)


def test_reptile_copies_and_moves_only_what_is_trained(episodes):
    rows, visits, network = episodes
    everything = told(*episodes)[1]
    frozen = copy.deepcopy(network)
    thaw(frozen, "embeddings")
    found = told(rows, visits, frozen, steps=1)[1]
    assert found.keys() == {name for name in everything if "tables." not in name}


# Freezing


@pytest.mark.parametrize("freeze", ["nothing", "embeddings", "all_but_head"])
@pytest.mark.parametrize(("kind", "outer"), [("ridge", "second_order"), ("gradient", "reptile")])
def test_what_is_frozen_stays_as_it_is_to_the_bit(monkeypatch, history, kind, outer, freeze):
    """From the closed-form start on; the rest moves. The last closed forms are set aside."""
    starts = []
    start = Losses.of_stop

    def spy(self, network, *rest):
        starts.append(copy.deepcopy(network.state_dict()))
        return start(self, network, *rest)

    def as_trained(self, network, precisions, through):
        return Base(network, precisions, self.setting.levels, self.setting.adapter, through)

    monkeypatch.setattr(Losses, "of_stop", spy)
    monkeypatch.setattr(Initialisation, "refreshed", as_trained)
    train(history, adapter=AdapterConfig(kind=kind), config=loop(outer, freeze=freeze))
    first, last = starts[0], starts[-1]
    for name, _ in Ranker(shape(history), SMALL).named_parameters():
        moves = {
            "nothing": True,
            "embeddings": "tables." not in name,
            "all_but_head": name.startswith(("wide.", "head.", "joint.3.", "warm_up.constant", "warm_up.line")),
        }[freeze]
        if name.startswith("candidate_tables.0") and outer == "reptile" and freeze == "nothing":
            moves = True
        assert torch.equal(first[name], last[name]) == (not moves), name


def test_a_frozen_base_is_no_shackle_to_the_next_night(monkeypatch, history):
    losses = iter((0.9, 0.8))  # the trained epoch is the one that is kept
    monkeypatch.setattr(Losses, "of_stop", lambda *given: next(losses))
    made = train(history, config=loop("second_order", freeze="all_but_head"))
    assert made.epoch == 1
    assert all(parameter.requires_grad for parameter in made.base.network.parameters())


# What fits what


@pytest.mark.parametrize("kind", ["none", "bias", "ridge"])
@pytest.mark.parametrize("outer", ["first_order", "reptile"])
def test_loops_of_gradient_steps_need_an_adapter_that_takes_some(history, outer, kind):
    with pytest.raises(InvalidConfig, match=rf"{outer}.*'{kind}' takes none; set adapter\.kind to 'gradient'"):
        check_outer(outer, AdapterConfig(kind=kind))
    with pytest.raises(InvalidConfig, match=r"training\.outer"):
        train(history, adapter=AdapterConfig(kind=kind), config=loop(outer))


@pytest.mark.parametrize(("kind", "outer"), [*ALLOWED, ("none", "second_order"), ("none", "joint")])
def test_everything_else_fits(kind, outer):
    check_outer(outer, AdapterConfig(kind=kind))


# What each is worth


@pytest.fixture(scope="module")
def made(history):
    return {pair: train(history, adapter=AdapterConfig(kind=pair[0]), config=loop(pair[1])) for pair in ALLOWED}


@pytest.mark.parametrize("pair", ALLOWED, ids="-".join)
def test_every_adapter_under_every_loop_beats_zero_steps(made, history, pair):
    losses = stop_losses(made[pair], history)
    assert (losses[:, 0] < (0.97 if pair[0] == "bias" else 0.9) * losses[:, 1]).all()
    (_, trained_on, stop) = made[pair].curve[-1]
    assert stop < losses[:, 1].mean()  # the epoch itself, whether or not it was kept
    assert np.isfinite(trained_on)


def test_every_loop_trains_in_its_own_way(made):
    losses = [made["gradient", name].curve[-1][2] for name in LOOPS]
    assert len(set(losses)) == len(LOOPS)


@pytest.mark.parametrize("name", LOOPS)
def test_joint_training_and_reptile_leave_the_rates_and_the_others_learn_them(history, monkeypatch, name):
    """The epoch is kept whatever it is worth; rates of solved factors stay in every loop."""
    start = train(history, adapter=GRADIENT, config=loop(name).model_copy(update={"epochs": 0}))
    falling = iter(range(9, 0, -1))
    monkeypatch.setattr(Losses, "of_stop", lambda *given: float(next(falling)))
    one = loop(name).model_copy(update={"epochs": 1, "average": 0.0})
    trained = train(history, adapter=GRADIENT, config=one)
    assert (start.epoch, trained.epoch) == (0, 1)
    for part, where in trained.base.network.parts.items():
        stays = name in ("joint", "reptile") or part in ("item factors", "category factors")
        assert torch.equal(start.base.table()[:, :, where], trained.base.table()[:, :, where]) == stays, part


def test_rates_on_a_cold_start_are_as_good_as_the_ridge(history):
    """One over the precisions that the history and the stop nights give: nothing is guessed."""
    kept = SHORT.model_copy(update={"epochs": 0})
    gradient, ridge = (
        train(history, adapter=AdapterConfig(kind=k), config=kept).curve[0][2] for k in ("gradient", "ridge")
    )
    assert gradient < 1.02 * ridge


def test_a_night_is_the_same_twice_under_reptile(history):
    runs = [train(history, adapter=GRADIENT, config=loop("reptile")) for _ in range(2)]
    assert runs[0].curve == runs[1].curve
    first, second = (run.base.network.state_dict() for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
