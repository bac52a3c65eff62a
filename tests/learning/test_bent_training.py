"""Training bases whose dense layers are bent: every loop, Reptile against a plain loop, and a world that needs it."""

import copy

import numpy as np
import pytest
import torch

from tasks.learning import initialisation
from tasks.learning.adapters import AdapterConfig, Precisions
from tasks.learning.initialisation import Initialisation
from tasks.learning.ladder import Ladder
from tasks.learning.losses import Losses
from tasks.learning.material import Material, visits_of
from tasks.learning.networks import Ranker, RankerConfig
from tasks.learning.outer import check_outer, reptile, thaw
from tasks.learning.starts import normalise, spread
from tests.learning.reptile_loop import Precise, slow_reptile, stirred
from tests.learning.small_rows import before, contract, ladder_of, one_aim, opposed, shape, table, with_labels
from tests.learning.test_bending import BENDING, DENSE, FILM, LORA
from tests.learning.test_checkpoint import Memory, Stopped, stopped_after
from tests.learning.test_ensemble import setting_of
from tests.learning.test_outer import AIMED, KINDS, LOOPS, STILL, loop
from tests.learning.test_training import SHORT, stop_losses, train

NIGHTS = 4
WEIGHTS = torch.tensor([1.0, 0.3], dtype=torch.float64)


@pytest.fixture(scope="module")
def history():
    """Half of the users like what is dear and the other half what is cheap; nothing but their own rows tells which."""
    rows = one_aim(opposed(nights=NIGHTS, users=24))
    price = np.asarray(rows.candidate_numbers)[:, 0]
    pull = 2.0 * np.where(np.asarray(rows.user) % 2 == 0, 1, -1) * (price - price.mean()) / price.std()
    return with_labels(rows, (np.random.default_rng(5).random(len(pull)) < 1 / (1 + np.exp(-pull)))[:, None])


@pytest.fixture
def unscaled(monkeypatch):
    """Precisions as the config has them: the stop nights do not scale them, which takes longer than all else."""
    monkeypatch.setattr(initialisation, "scaled", lambda precisions, parts, loss: (precisions, {}))


# Where it starts


@BENDING
def test_bent_units_start_alike_in_scale_and_say_nothing_together(history, config):
    torch.manual_seed(0)
    ranker = RankerConfig(embedding=4, hidden=8)
    network, at = Ranker(shape(history), ranker, config.bent), np.arange(len(history))
    normalise(network, contract(), history, at)
    spread(network, Material(history), at)
    with torch.no_grad():
        inputs = network.eval()(*Material(history).inputs(at))[1]
        units = network.joint[0](inputs)
        torch.testing.assert_close(network.joint(inputs), torch.zeros(len(at), 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(units.mean(dim=0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(units.std(dim=0, correction=0), torch.ones(8), atol=1e-3, rtol=0)
    if config is LORA:
        read = inputs @ network.low_rank.mT
        np.testing.assert_allclose(np.cov(read.detach().numpy().T, bias=True), np.eye(2), atol=0.02)
        shares = np.linalg.svd((inputs - inputs.mean(dim=0)).numpy(), compute_uv=False) ** 2
        told = np.linalg.lstsq(read.detach().numpy() - read.detach().numpy().mean(axis=0), inputs - inputs.mean(dim=0))
        assert told[1].sum() == pytest.approx(shares[2:].sum(), rel=0.01)  # no two directions say more


def test_units_that_do_not_vary_keep_their_weights(history):
    """Rows that are all alike: dividing by next to nothing would leave weights that the next night's rows blow up."""
    network = Ranker(shape(history), RankerConfig(embedding=4, hidden=8), FILM.bent)
    was = network.joint[0].weight.detach().clone()
    normalise(network, contract(), history, np.arange(1))
    spread(network, Material(history), np.zeros(5, np.int64))
    torch.testing.assert_close(network.joint[0].weight.detach(), was)


def test_precisions_start_as_configured_times_what_they_share(history):
    for config in (FILM, LORA, DENSE):
        network = Ranker(shape(history), STILL, config.bent)
        setting = setting_of(history, SHORT, config, STILL)
        fresh = Initialisation(setting, Losses(setting)).fresh()[1]().detach()
        expected = torch.tensor([config.precision, config.coarse_precision])[:, None, None] * network.fan_in
        torch.testing.assert_close(fresh, expected)


def test_a_linear_start_is_left_alone(history):
    network = Ranker(shape(history), STILL)
    was = copy.deepcopy(network.state_dict())
    spread(network, Material(history), np.arange(50))
    assert all(torch.equal(value, was[name]) for name, value in network.state_dict().items())


# The outer loops


@pytest.mark.parametrize(
    ("config", "freeze"), [(FILM, "nothing"), (LORA, "all_but_head"), (DENSE, "nothing")], ids=["film", "lora", "dense"]
)
def test_reptile_is_the_plain_loop_over_visits(config, freeze):
    """With a network of each visit's own, and the adapter's steps through that network's layers."""
    rows, config = opposed(nights=2, users=7), config.model_copy(update={"steps": 3})
    visits = visits_of(rows).of_nights(int(rows.night.min()) + 1, int(rows.night.max()))
    torch.manual_seed(0)
    network = stirred(Ranker(shape(rows, *KINDS), STILL, config.bent).double().train())
    thaw(network, freeze)
    precisions = Precisions(2, 2, network.width, config, network.fan_in).double()().detach()
    given = (Ladder(rows, ladder_of(), "shopper"), visits, network, Precise(rows), precisions, config, WEIGHTS, 0.5)
    (said, moved), (loss, expected) = reptile(*given), slow_reptile(*given)
    assert said == pytest.approx(loss, rel=1e-10)
    assert moved.keys() == expected.keys() == {name for name, one in network.named_parameters() if one.requires_grad}
    assert ("low_rank" in moved) == (config.kind == "lora")
    for name, value in moved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("outer", LOOPS)
@BENDING
def test_every_loop_trains_for_every_kind_and_moves_what_it_should(unscaled, monkeypatch, history, config, outer):
    """One step from where precisions start: only loops whose loss knows of the adapter move what is the adapter's."""
    check_outer(outer, config)
    kept = []
    stop_loss = Losses.of_stop

    def spy(self, network, precisions, stop):
        kept.append(copy.deepcopy((network.state_dict(), precisions().detach())))
        return stop_loss(self, network, precisions, stop)

    monkeypatch.setattr(Losses, "of_stop", spy)
    rows = before(history, 3)
    made = train(rows, adapter=config, night=3, config=loop(outer, steps_per_epoch=1, stop_nights=1))
    assert np.isfinite(made.curve[-1][1:]).all()
    assert "precisions as configured" in made.why
    (first, held), (last, moved) = kept[0], kept[-1]
    assert torch.equal(held, moved) == (outer in ("joint", "reptile"))
    assert not torch.equal(first["joint.0.weight"], last["joint.0.weight"])
    if config is LORA:
        assert torch.equal(first["low_rank"], last["low_rank"]) == (outer == "joint")


@pytest.mark.parametrize(
    ("config", "outer"),
    [(FILM, "second_order"), (LORA, "first_order"), (DENSE, "reptile")],
    ids=["film", "lora", "dense"],
)
def test_each_kind_tells_what_no_unadapted_base_can(unscaled, history, config, outer):
    """Trained for a little, its weights held as loosely as such tastes ask for."""
    loose = config.model_copy(update={"precision": 0.02})
    made = train(history, adapter=loose, night=NIGHTS, config=loop(outer, steps_per_epoch=2))
    losses = stop_losses(made, history, (NIGHTS - 2, NIGHTS - 1))
    assert losses[:, 1] == pytest.approx(np.log(2), abs=0.05)
    assert (losses[:, 0] < 0.95 * losses[:, 1]).all()


@pytest.fixture(scope="module")
def secrets():
    """Half of the users like eight of the items and the others the other eight; an id is all that there is to an item,
    and what is drawn for it at the start says nothing."""
    random, users, each = np.random.default_rng(3), 20, 12
    likes = random.permutation(np.repeat([1, -1], 8))
    user = np.repeat(np.arange(1, users + 1), 3 * each)
    item = random.integers(1, 17, len(user))
    pull = 3.0 * np.where(user % 2 == 0, 1, -1) * likes[item - 1]
    labels = (random.random(len(user)) < 1 / (1 + np.exp(-pull)))[:, None].astype(float)
    night, price = np.tile(np.repeat(np.arange(3), each), users), random.uniform(-1, 1, len(user))
    return table(user, night, item=item, price=price, labels=labels)


def sought(rows, config, outer, seed, **more):
    """Trained with as much patience as there is by default."""
    ranker = STILL.model_copy(update={"embedding": 8, "hidden": 16})
    aimed = loop(outer, **{**AIMED, "learning_rate": 0.02, "patience": 2, "seed": seed, **more})
    return train(rows, adapter=config, config=aimed, ranker=ranker, night=3)


@pytest.mark.parametrize(
    ("config", "outer", "seed"),
    [
        (DENSE, "second_order", 3),
        *((LORA, "second_order", seed) for seed in (0, 1, 2)),
        (LORA, "first_order", 1),
        *((FILM, "second_order", seed) for seed in (0, 1)),
        (FILM, "first_order", 1),
        (DENSE, "reptile", 1),
        (LORA, "joint", 1),
    ],
    ids=lambda one: str(one) if not isinstance(one, AdapterConfig) else one.bends if one.bends == "dense" else one.kind,
)
def test_where_bent_layers_tell_nothing_at_the_start_training_for_them_can_and_joint_training_cannot(
    secrets, config, outer, seed
):
    """Visits that the start has not seen have made it hold such layers as good as fast."""
    made = sought(secrets, config, outer, seed, epochs=2)
    start, least = made.curve[0][2], min(stop for _, _, stop in made.curve)
    assert start > 0.67  # a coin's is 0.69
    assert "scaled across folds" in made.why
    assert ("held in training as configured" in made.why) == (outer != "joint")
    assert least > 0.65 if outer == "joint" else least < 0.75 * start


def test_what_training_has_found_no_use_for_is_held_as_it_was(secrets):
    """An epoch of steps too small to learn anything: what was let go meanwhile is scored, and kept, as at the start."""
    still = {"learning_rate": 1e-7, "weight_decay": 0.0, "embedding_decay": 0.0}
    at_once, later = (sought(secrets, LORA, "second_order", 0, epochs=epochs, **still) for epochs in (0, 1))
    assert "held in training as configured: updates" in later.why
    torch.testing.assert_close(later.base.table(), at_once.base.table(), rtol=1e-4, atol=0)
    assert later.curve[1][2] == pytest.approx(later.curve[0][2], abs=1e-4)


def test_the_night_after_a_start_that_found_nothing_looks_again(secrets):
    """Its parent holds the layers fast, and that is no reason to leave them so."""
    parent = sought(before(secrets, 2), LORA, "second_order", 0, epochs=0).base
    config = Initialisation(setting_of(secrets, SHORT, LORA, STILL), None).fresh()[1]().detach()
    assert (parent.table()[0, :, 1:].min() > 8 * config[0, :, 1:].max()).all()
    ranker = STILL.model_copy(update={"embedding": 8, "hidden": 16})
    aimed = loop("second_order", **{**AIMED, "learning_rate": 0.02, "patience": 2, "epochs": 2, "min_stop_rows": 1})
    made = train(secrets, adapter=LORA, config=aimed, ranker=ranker, night=3, parent=parent)
    assert "started from the parent's base" in made.why
    assert "held in training as configured" in made.why
    assert min(stop for epoch, _, stop in made.curve if epoch > 0) < 0.75 * made.curve[0][2]


def test_a_training_that_lets_go_goes_on_from_its_checkpoint_to_the_same_numbers(secrets):
    parts = {"config": loop("second_order", **{**AIMED, "epochs": 2, "checkpoint_seconds": 0.0}), "night": 3}
    whole, checkpoint = train(secrets, adapter=LORA, ranker=STILL, **parts), Memory()
    with pytest.raises(Stopped):
        train(secrets, adapter=LORA, ranker=STILL, checkpoint=checkpoint, report=stopped_after(1), **parts)
    resumed = train(secrets, adapter=LORA, ranker=STILL, checkpoint=checkpoint, **parts)
    assert "held in training as configured" in whole.why
    assert "resumed after epoch 1" in resumed.why
    assert resumed.curve == whole.curve
    assert torch.equal(resumed.base.table(), whole.base.table())


def test_equal_inputs_train_to_equal_numbers(unscaled, history):
    rows, short = before(history, 2), loop("second_order", steps_per_epoch=1, stop_nights=1)
    first, second = (train(rows, adapter=LORA, night=2, config=short) for _ in range(2))
    assert first.curve == second.curve
    state = second.base.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.base.network.state_dict().items())


def test_a_parent_of_another_kind_is_no_start(unscaled, history):
    rows = before(history, 3)
    kept = SHORT.model_copy(update={"epochs": 0, "stop_nights": 1})
    parent = train(before(history, 2), adapter=AdapterConfig(), night=2, config=kept).base
    assert "the parent's base does not fit" in train(rows, adapter=FILM, night=3, config=kept, parent=parent).why
