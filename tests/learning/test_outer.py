"""Outer loops: Reptile against a plain loop, what is frozen, what is refused, and a world in which each is worth it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tasks.errors import InvalidConfig
from tasks.learning import initialisation
from tasks.learning import outer as module
from tasks.learning.adapters import AdapterConfig, Precisions
from tasks.learning.base import Base
from tasks.learning.initialisation import Initialisation
from tasks.learning.ladder import Ladder
from tasks.learning.losses import Losses
from tasks.learning.material import visits_of
from tasks.learning.networks import Ranker, RankerConfig
from tasks.learning.outer import check_outer, reptile, thaw
from tasks.learning.training_config import TrainingConfig
from tests.learning.reptile_loop import Precise, slow_reptile, stirred
from tests.learning.small_rows import ladder_of, one_aim, opposed, shape, table, with_labels
from tests.learning.test_training import NIGHTS, SHORT, stop_losses, train

GRADIENT = AdapterConfig(kind="gradient")
LOOPS = ("second_order", "first_order", "reptile", "joint")
ADAPTERS = {
    "none": {"kind": "none"},
    "bias": {"kind": "bias"},
    "ridge": {"kind": "ridge"},
    "matching": {"kind": "matching", "prototypes": 3},
    "gradient": {"kind": "gradient"},
    "dense": {"kind": "gradient", "bends": "dense"},
    "film": {"kind": "film"},
    "lora": {"kind": "lora", "rank": 2},
}
"""Every adapter, as a config says it."""
PAIRS = [
    *((kind, loop) for kind in ("none", "bias", "ridge", "matching") for loop in ("second_order", "joint")),
    *((kind, loop) for kind in ("gradient", "dense", "film", "lora") for loop in LOOPS),
]
"""Every adapter with every loop that can train for it."""
FREEZES = ("nothing", "embeddings", "all_but_head")
ALLOWED = [pair for pair in PAIRS if pair[0] in ("bias", "ridge", "gradient")]
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
    return rows, visits.take(random.permutation(len(visits))[:11]), network_of(rows)


def network_of(rows, ranker=STILL):
    torch.manual_seed(0)
    return stirred(Ranker(shape(rows, *KINDS), ranker).double().train())


def asked(way, rows, visits, network, steps=3, base_weight=0.5, **more):
    """Reptile, or a loop in its place, in double precision."""
    precisions = Precisions(2, 2, network.width, GRADIENT).double()().detach()
    return way(
        *(Ladder(rows, ladder_of(), "shopper"), visits, network, Precise(rows), precisions),
        *(GRADIENT.model_copy(update={"steps": steps}), torch.tensor([1.0, 0.3]).double(), base_weight),
        **more,
    )


def told(*given, **more):
    return asked(reptile, *given, **more)


def equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-10)
    assert found[1].keys() == expected[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("steps", [1, 3])
def test_reptile_is_the_plain_loop_over_visits(episodes, steps):
    before_it = copy.deepcopy(episodes[2].state_dict())
    found = told(*episodes, steps=steps)
    equal(found, asked(slow_reptile, *episodes, steps=steps))
    assert max(value.abs().max() for value in found[1].values()) > 0.01
    assert all(torch.equal(value, before_it[name]) for name, value in episodes[2].state_dict().items())


def test_reptile_of_a_transformer_is_the_plain_loop_over_visits_each_with_its_history(episodes):
    rows, visits, _ = episodes
    network = network_of(rows, RankerConfig.model_validate({**dict(STILL), "kind": "transformer", "history": 3}))
    found = told(rows, visits, network, steps=2)
    equal(found, asked(slow_reptile, rows, visits, network, steps=2))
    assert max(value.abs().max() for name, value in found[1].items() if name.startswith("attention")) > 0.002


def test_reptile_of_parts_and_of_visits_in_another_order_is_the_same(monkeypatch, episodes):
    rows, visits, network = episodes
    whole = told(*episodes)
    for numbers, order in ((1, np.arange(11)), (3 * 700, np.arange(11)), (10**9, np.arange(11)[::-1])):
        monkeypatch.setattr(module, "PATH_NUMBERS", numbers)
        equal(told(rows, visits.take(order), network), whole)


def test_reptile_reads_no_more_rows_of_a_visit_than_the_others_do(monkeypatch, episodes):
    monkeypatch.setattr(module, "QUERY_ROWS", 4)
    equal(told(*episodes), asked(slow_reptile, *episodes, most=4))


def test_reptile_copies_and_moves_only_what_is_trained(episodes):
    rows, visits, network = episodes
    everything = told(*episodes)[1]
    frozen = copy.deepcopy(network)
    thaw(frozen, "embeddings")
    found = told(rows, visits, frozen, steps=1)[1]
    assert found.keys() == {name for name in everything if "tables." not in name}


# Freezing


@pytest.fixture(scope="module")
def few():
    """One short history for every combination."""
    return one_aim(opposed(nights=3, users=8, each=4))


@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize(("kind", "outer"), PAIRS)
def test_every_combination_trains_and_keeps_what_is_frozen_to_the_bit(monkeypatch, few, kind, outer, freeze):
    """One epoch from the closed-form start, which is kept whatever it is worth; the last closed forms are set aside."""
    starts, falling = [], iter((0.9, 0.8))

    def of_stop(self, network, *rest):
        starts.append(copy.deepcopy(network.state_dict()))
        return next(falling)

    monkeypatch.setattr(Losses, "of_stop", of_stop)
    monkeypatch.setattr(initialisation, "scaled", lambda precisions, parts, loss: (precisions, {}))
    monkeypatch.setattr(
        *(Initialisation, "refreshed"),
        lambda self, network, precisions, plan: Base(
            network, precisions, self.setting.levels, self.setting.adapter, plan.through
        ),
    )
    config = TrainingConfig.model_validate(
        {"outer": outer, "freeze": freeze, "epochs": 1, "steps_per_epoch": 1, "visits_per_step": 4, "stop_nights": 1}
    )
    linear = kind in ("ridge", "gradient")
    ranker = STILL.model_copy(update={"prior": linear})
    made = train(few, adapter=AdapterConfig.model_validate(ADAPTERS[kind]), config=config, ranker=ranker, night=3)
    assert (made.epoch, len(starts)) == (1, 2)
    assert np.isfinite(made.curve[1][1])
    network, moved = made.base.network, set()
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter).all()
        if parameter.detach().numpy().tobytes() != starts[0][name].numpy().tobytes():
            moved.add(name)
    names = {name for name, _ in network.named_parameters()}
    head = ("wide.", "joint.3.", "head.", "low_rank", "matching.", "prior")
    frozen = {
        "nothing": set(),
        "embeddings": {name for name in names if "tables." in name},
        "all_but_head": {name for name in names if not name.startswith(head)},
    }[freeze]
    # What no loss reads: features of adapters that the loss knows nothing of, and factors of one that is a constant.
    unread = ("factor_tables.", "low_rank", "matching.") if outer == "joint" or kind == "none" else ()
    unread += ("head.",) if unread and not linear else ()
    unread += ("factor_tables.",) if kind == "bias" else ()
    assert moved == {name for name in names - frozen if not name.startswith(unread)}
    assert len(moved) > 3


def test_a_frozen_base_is_no_shackle_to_the_next_night(monkeypatch, history):
    losses = iter((0.9, 0.8))  # the trained epoch is the one that is kept
    monkeypatch.setattr(Losses, "of_stop", lambda *given: next(losses))
    made = train(history, config=loop("second_order", freeze="all_but_head"))
    assert made.epoch == 1
    assert all(parameter.requires_grad for parameter in made.base.network.parameters())


# What fits what


@pytest.mark.parametrize("kind", ["none", "bias", "ridge", "matching"])
@pytest.mark.parametrize("outer", ["first_order", "reptile"])
def test_loops_of_gradient_steps_need_an_adapter_that_takes_some(history, outer, kind):
    with pytest.raises(InvalidConfig, match=rf"{outer}.*'{kind}' takes none; set adapter\.kind to 'gradient'"):
        check_outer(outer, AdapterConfig(kind=kind))
    with pytest.raises(InvalidConfig, match=r"training\.outer"):
        train(history, adapter=AdapterConfig(kind=kind), config=loop(outer))


@pytest.mark.parametrize(("kind", "outer"), PAIRS)
def test_everything_else_fits(kind, outer):
    check_outer(outer, AdapterConfig(**ADAPTERS[kind]))


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


def near(each):
    """Half of the users like prices near the middle and the others those far from it: no straight line, and no unit of
    an untrained tower, says so, and nothing of a user but his rows does."""
    random, users = np.random.default_rng(3), 24
    user = np.repeat(np.arange(1, users + 1), 3 * each)
    price = random.uniform(-1, 1, len(user))
    pull = 3.0 * np.where(user % 2 == 0, 1, -1) * np.where(np.abs(price) < 0.5, 1, -1)
    labels = (random.random(len(user)) < 1 / (1 + np.exp(-pull)))[:, None].astype(float)
    return table(user, np.tile(np.repeat(np.arange(3), each), users), price=price, labels=labels)


@pytest.fixture(scope="module")
def nearness():
    return near(20)


TOWERS = STILL.model_copy(update={"hidden": 16, "factors": 0, "category_factors": 0, "direct": False, "features": 6})
"""Adapters on what the towers have learned, and on nothing else."""
AIMED = {
    "epochs": 1, "steps_per_epoch": 20, "visits_per_step": 12, "stop_nights": 1, "learning_rate": 0.03, "average": 0.0,
    "weight_decay": 0.01, "embedding_decay": 0.01, "base_weight": 0.0, "seed": 2,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "outer"), [pair for pair in PAIRS if pair[0] in ("ridge", "gradient")])
def test_where_the_start_cannot_adapt_training_for_adaptation_can_and_joint_training_cannot(nearness, kind, outer):
    """The same adapter, from the closed-form start and behind one epoch."""
    config = loop(outer, **AIMED)
    made = train(nearness, adapter=AdapterConfig(**ADAPTERS[kind]), config=config, ranker=TOWERS, night=3)
    (_, _, start), (_, _, end) = made.curve
    assert start > 0.67  # a coin's is 0.69
    if outer == "joint":
        assert end > 0.63
    else:
        assert made.epoch == 1
        assert end < 0.8 * start


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize(("kind", "outer"), [("ridge", "second_order"), ("gradient", "first_order")])
def test_features_that_the_start_has_no_use_for_are_found(kind, outer, seed):
    """Three units of an untrained tower: the history and the stop nights hold their weights as good as fast."""
    ranker = TOWERS.model_copy(update={"features": 3})
    config = loop(outer, **{**AIMED, "steps_per_epoch": 15, "seed": seed, "patience": 2})
    made = train(near(12), adapter=AdapterConfig(kind=kind), config=config, ranker=ranker, night=3)
    assert "held in training as configured: tower features" in made.why
    assert made.curve[1][2] < 0.75 * made.curve[0][2]


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


@pytest.mark.parametrize(("nights", "bound"), [(1, 1.02), (2, 1.03)], ids=["long", "short"])
def test_rates_on_a_cold_start_are_as_good_as_the_ridge(history, nights, bound):
    """One over the precisions that the history and the stop nights give: nothing is guessed."""
    kept = SHORT.model_copy(update={"epochs": 0, "stop_nights": nights})
    gradient, ridge = (
        train(history, adapter=AdapterConfig(kind=k), config=kept).curve[0][2] for k in ("gradient", "ridge")
    )
    assert gradient < bound * ridge


def test_a_night_is_the_same_twice_under_reptile(history):
    runs = [train(history, adapter=GRADIENT, config=loop("reptile")) for _ in range(2)]
    assert runs[0].curve == runs[1].curve
    first, second = (run.base.network.state_dict() for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
