"""Training in a world of opposed tastes: repeatable, causal, warm or cold, and worth it."""

import copy
from dataclasses import replace
from datetime import date, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from tasks.errors import InvalidConfig, NotEnoughHistory, TrainingDiverged
from tasks.learning import epochs, initialisation
from tasks.learning.adapters import AdapterConfig
from tasks.learning.base import save_base
from tasks.learning.episodes import draw, score_visits
from tasks.learning.ladder import Ladder
from tasks.learning.losses import STOP_SUPPORT, Losses
from tasks.learning.material import Material, visits_of
from tasks.learning.networks import RankerConfig
from tasks.learning.priors import LEAST, MOST
from tasks.learning.setting import Setting
from tasks.learning.starts import newest, solve_start
from tasks.learning.training import meta_train, steady
from tasks.learning.training_config import TrainingConfig
from tests.learning.small_rows import (
    FIRST,
    before,
    contract,
    ladder_of,
    one_aim,
    opposed,
    part,
    shape,
    table,
    with_labels,
)

RIDGE = AdapterConfig()
SMALL = RankerConfig(embedding=4, hidden=8, factors=2, features=3)
SHORT = TrainingConfig(epochs=2, steps_per_epoch=4, visits_per_step=12, stop_nights=2, patience=9, min_stop_rows=50,
                       learning_rate=5e-3)  # fmt: skip
NIGHTS = 6


@pytest.fixture(scope="module")
def world():
    return one_aim(opposed(nights=8, users=45))


@pytest.fixture(scope="module")
def history(world):
    return before(world, NIGHTS)


def day(number):
    return date.fromordinal(FIRST + number)


def train(rows, *, config=SHORT, ranker=SMALL, adapter=RIDGE, night=NIGHTS, parent=None, more=0, kinds=(), device="cpu",
          **rest):  # fmt: skip
    sized = shape(rows, *kinds, more=more)
    setting = Setting(contract(*kinds), ladder_of(), ranker, adapter, config, rows, sized, day(night), device)
    return meta_train(setting, parent, **rest)


@pytest.fixture(scope="module")
def trained(history):
    return train(history)


def bytes_of(trained, folder):
    folder.mkdir()
    return b"".join(path.read_bytes() for path in save_base(trained.base, folder).values())


def stop_losses(trained, rows, nights=(NIGHTS - 2, NIGHTS - 1)):
    """Log-loss with and without adapters on some nights, for every support of the exams."""
    ladder, base = Ladder(rows, ladder_of(), "shopper"), trained.base
    visits = visits_of(rows).of_nights(FIRST + nights[0], FIRST + nights[1])
    losses = []
    with torch.no_grad():
        for support in STOP_SUPPORT:
            longer = visits.take(np.flatnonzero(visits.rows.lengths > support))
            if len(longer) == 0:
                continue
            after = np.full(len(longer), support)
            scores = score_visits(ladder, longer, after, Material(rows).scorer(base.network), Material(rows),
                                  base.table(), base.adaptation)  # fmt: skip
            label = rows.labels[scores.rows, 0]
            losses.append([reference.log_loss(label, torch.sigmoid(part[:, 0]).double().numpy())
                           for part in (scores.adapted, scores.base)])  # fmt: skip
    return np.array(losses)


# What it is worth


def test_adapted_the_stop_nights_are_told_far_better_than_unadapted(trained, history):
    losses = stop_losses(trained, history)
    assert len(losses) == 2  # nobody has more than 20 rows in a night
    assert (losses[:, 0] < 0.8 * losses[:, 1]).all()
    assert losses[:, 1] == pytest.approx(np.log(2), abs=0.05)  # nothing but his rows tells a user's taste


def test_the_kept_base_has_the_lowest_stop_loss_of_the_curve(trained, history):
    assert trained.epoch == min(trained.curve, key=lambda point: point[2])[0]


def test_the_kept_base_ends_with_its_closed_forms_solved_on_the_whole_history(history):
    """Without epochs the base is its closed forms, so solving on from where they stand moves them little."""
    kept = train(history, config=SHORT.model_copy(update={"epochs": 0}))
    at = newest(history, visits_of(history), 10**6)
    again = copy.deepcopy(kept.base.network)
    with steady(0, 1):
        solve_start(again, Material(history), at, RIDGE, 1)
    np.testing.assert_allclose(again.wide.weight.detach(), kept.base.network.wide.weight.detach(), atol=2e-3)
    assert "whole history" in kept.why


def test_labels_of_the_stop_nights_reach_the_closed_forms_alone(history):
    """They choose the epoch, scale the precisions part by part and enter the last solve; nothing else sees them."""
    stop = np.asarray(history.night) >= FIRST + NIGHTS - 1
    flipped = with_labels(history, np.where(stop[:, None], 1 - history.labels, history.labels))
    config = SHORT.model_copy(update={"epochs": 0, "stop_nights": 1})
    first, second = (train(rows, config=config) for rows in (history, flipped))
    ours, theirs = (run.base.network.state_dict() for run in (first, second))
    for name in ours:
        same = torch.equal(ours[name], theirs[name])
        assert same == (not name.startswith(("wide.", "factor_tables.", "warm_up."))), name
    held = torch.stack([run.base.table()[:, 0] for run in (first, second)])
    bound = ((held < 1.001 * LEAST) | (held > 0.999 * MOST)).any(dim=0)
    powers = torch.where(bound, torch.nan, (held[0] / held[1]).log() / np.log(4)).numpy()
    places = [powers[:1, part] for part in first.base.network.parts.values()] + list(powers[1:, None])
    found = {float(np.round(power, 4)) for place in places for power in np.unique(place[~np.isnan(place)].round(4))}
    assert all(np.nanmax(place) - np.nanmin(place) < 1e-4 for place in places if not np.isnan(place).all())
    assert all(power == round(power) for power in found)
    assert len(found) > 1


def test_the_curve_starts_in_closed_form_and_has_a_point_for_every_epoch(trained):
    assert [epoch for epoch, _, _ in trained.curve] == [0, 1, 2]
    assert trained.curve[0][1] is None
    assert all(np.isfinite(train) and np.isfinite(stop) for _, train, stop in trained.curve[1:])
    assert "closed form" in trained.why
    assert trained.base.trained_through == day(NIGHTS - 1)
    assert not trained.base.network.training


def test_with_a_half_life_the_newest_nights_say_more(history):
    """Everybody likes the dear of late and the cheap before that: most nights say the one, the newest two the other."""
    dear = (history.candidate_numbers[:, :1] > np.median(history.candidate_numbers)).astype(float)
    lately = np.asarray(history.night)[:, None] >= FIRST + NIGHTS - 2
    turned = with_labels(history, np.where(lately, dear, 1 - dear))
    config = SHORT.model_copy(update={"epochs": 0})
    says = {}
    for half_life in (None, 1.0):
        base = train(
            turned, config=config.model_copy(update={"half_life_nights": half_life}), adapter=AdapterConfig(kind="none")
        ).base
        with torch.no_grad():
            logits = Material(turned).scorer(base.network)(np.arange(len(turned)))[0][:, 0].numpy()
        says[half_life] = logits[dear[:, 0] == 1].mean() - logits[dear[:, 0] == 0].mean()
    assert says[None] < says[1.0]


@pytest.mark.parametrize(("half_life", "gap"), [(1.0, 0), (1.0, 60)])
def test_an_age_is_counted_from_the_newest_row(history, trained, half_life, gap):
    """Where nothing ever turns, fewer rows that count cost little, however long ago the last of them was."""
    plain = trained
    config = SHORT.model_copy(update={"epochs": 0, "half_life_nights": half_life})
    faded = train(history, config=config, night=NIGHTS + gap)
    assert faded.curve[0][2] < plain.curve[0][2] + 0.02 < 0.5
    tables = [run.base.network.factor_tables[0].weight.norm().item() for run in (plain, faded)]
    assert tables[1] > 0.5 * tables[0]


@pytest.mark.parametrize("outer", ["second_order", "joint"])
def test_episodes_and_both_solves_are_of_nights_that_count_by_their_age(history, monkeypatch, outer):
    drawn, solved = [], []

    def draws(visits, count, random, chances=None):
        drawn.append(dict(zip(visits.night - FIRST, chances, strict=True)))
        return draw(visits, count, random, chances)

    def solves(network, material, at, adapter, sweeps, counts=None, worth=()):
        solved.append(dict(zip(np.asarray(material.rows.night)[at] - FIRST, counts, strict=True)))
        solve_start(network, material, at, adapter, sweeps, counts, worth)

    monkeypatch.setattr(epochs, "draw", draws)
    monkeypatch.setattr(initialisation, "solve_start", solves)
    changed = {"half_life_nights": 2.0, "outer": outer, "epochs": 1, "stop_nights": 1}
    train(history, config=SHORT.model_copy(update=changed))
    fit = {night: 0.5 ** ((NIGHTS - 2 - night) / 2) for night in range(NIGHTS - 1)}
    whole = {night: 0.5 ** ((NIGHTS - 1 - night) / 2) for night in range(NIGHTS)}
    assert drawn == [pytest.approx(fit)] * SHORT.steps_per_epoch
    assert solved == [pytest.approx(fit), pytest.approx(whole)]


def test_what_a_market_likes_is_known_of_users_without_rows():
    """One market likes the dear and the other the cheap; only the price is an adapter feature."""
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(1, 121), 10)
    night, market, price = (user - 1) // 20, user % 2 + 1, random.uniform(0, 6, len(user))
    likes = np.where(market == 1, 1.0, -1.0)
    labels = (random.random(len(user)) < 1 / (1 + np.exp(-likes * (price - 3)))).astype(float)
    rows = table(user, night, labels=labels, market=market, price=price, levels=[["shopper"]])
    ranker = RankerConfig(embedding=4, hidden=8, factors=0, category_factors=0, prior=True, request_dropout=0.2)
    config = SHORT.model_copy(update={"epochs": 12, "steps_per_epoch": 20, "average": 0.5, "learning_rate": 1e-2})
    base = train(rows, config=config, ranker=ranker, night=6).base
    network, told = base.network, {}
    network.request_tower.register_forward_hook(lambda module, given, left: told.update(left=left))
    with torch.no_grad():
        network(*Material(rows).inputs(np.array([0, 10])))
        weights = (network.prior @ told["left"].mT)[0, 0]
    # A unit of the feature is a standard deviation of the price.
    assert weights[0] < -0.3 < 0.3 < weights[1]


@pytest.mark.parametrize(("evenness", "half_life"), [(1.0, None), (0.5, 2.0)])
def test_episodes_are_drawn_more_evenly_by_a_column(history, monkeypatch, evenness, half_life):
    """Every visit's chance is n to the power of minus the evenness, times what its night counts."""
    drawn = []

    def draws(visits, count, random, chances=None):
        drawn.append((visits, chances))
        return draw(visits, count, random, chances)

    monkeypatch.setattr(epochs, "draw", draws)
    few = replace(history, request_ids=np.where(np.asarray(history.user)[:, None] % 9 == 0, 2, 1).repeat(2, axis=1))
    changes = {"even": "region", "evenness": evenness, "half_life_nights": half_life, "epochs": 1}
    train(few, config=SHORT.model_copy(update=changes))
    for visits, chances in drawn:
        region = few.request_ids[visits.rows.start, 1]
        count = {value: int((region == value).sum()) for value in (1, 2)}
        assert count[1] > 4 * count[2] > 0
        age = visits.night.max() - visits.night
        expected = [
            count[value] ** -evenness * (1.0 if half_life is None else 0.5 ** (years / half_life))
            for value, years in zip(region, age, strict=True)
        ]
        np.testing.assert_allclose(chances, expected, rtol=1e-12)
    if evenness == 1 and half_life is None:
        shares = [sum(chance for chance, one in zip(chances, region, strict=True) if one == value) for value in (1, 2)]
        assert shares == pytest.approx([1.0, 1.0])


def test_a_pull_keeps_a_warm_start_near_its_parent_and_a_cold_one_as_it_is(
    world, history, trained, tmp_path, monkeypatch
):
    """Each step goes 90 % of the way back, so that a step's length and a ninth of it is all that can add up."""
    # Decay makes a step longer than the learning rate.
    longer, held = before(world, NIGHTS + 2), SHORT.model_copy(update={"average": 0.0, "weight_decay": 0.0})
    falling = iter(range(0, -99, -1))
    ends = {}
    with monkeypatch.context() as patch:
        patch.setattr(Losses, "of_stop", lambda *_: next(falling))  # so that the last epoch is kept
        for pull in (0.9, 0.0):
            config = held.model_copy(update={"pull": pull})
            after = train(longer, config=config, night=NIGHTS + 2, parent=trained.base)
            assert after.epoch == SHORT.epochs
            ours, theirs = after.base.network.state_dict(), trained.base.network.state_dict()
            layers = [part for part in ours if "tower" in part or part.startswith(("joint.", "head."))]
            ends[pull] = max(float((ours[part] - theirs[part]).abs().max()) for part in layers)
    assert ends[0.9] <= SHORT.learning_rate / 9 * 1.2
    assert ends[0.0] > 2 * SHORT.learning_rate
    cold = train(history, config=SHORT.model_copy(update={"pull": 0.9}))
    assert bytes_of(cold, tmp_path / "cold") == bytes_of(trained, tmp_path / "plain")


def test_training_leaves_the_factors_of_items_without_rows_at_nothing(history, monkeypatch):
    """To the bit, as that is how the network tells them; what their columns say is trained beside."""
    monkeypatch.setattr(initialisation.Initialisation, "refreshed", lambda self, network, *rest: network)
    network = train(history, more=3, ranker=SMALL.model_copy(update={"id_dropout": 0.3, "warm_up": True})).base
    factors = network.factor_tables[0].weight
    assert not factors[0].any()
    assert not factors[-3:].any()
    assert factors[1:-3].any(dim=1).all()
    assert network.warm_up.constant.any()


def test_joint_training_and_no_adapters_are_trained_as_well(history):
    joint = train(history, config=SHORT.model_copy(update={"outer": "joint", "epochs": 1}))
    losses = stop_losses(joint, history)
    assert (losses[:, 0] < losses[:, 1]).all()
    none = train(history, adapter=AdapterConfig(kind="none"), config=SHORT.model_copy(update={"epochs": 1}))
    losses = stop_losses(none, history)
    assert (losses[:, 0] == losses[:, 1]).all()
    assert none.base.table().shape == (2, 1, 0)


def test_a_rating_beside_a_click_is_learned_too():
    rows = opposed(nights=4, users=30)
    made = train(rows, kinds=("binary", "rating"), night=4, config=SHORT.model_copy(update={"epochs": 1}))
    ladder, visits = Ladder(rows, ladder_of(), "shopper"), visits_of(rows).of_nights(FIRST + 3, FIRST + 3)
    with torch.no_grad():
        scores = score_visits(ladder, visits, np.full(len(visits), 5), Material(rows).scorer(made.base.network),
                              Material(rows), made.base.table(), made.base.adaptation)  # fmt: skip
    stars = rows.labels[scores.rows, 1]
    errors = [((said[:, 1].numpy() - stars) ** 2).mean() for said in (scores.adapted, scores.base)]
    assert errors[0] < 0.5 * errors[1]


def test_progress_is_told_in_epochs(history):
    told = []
    train(history, report=lambda done, total, unit: told.append((done, total, unit)))
    assert told == [(1, 2, "epochs"), (2, 2, "epochs"), (2, 2, "epochs")]


def test_training_moves_every_precision_but_those_on_solved_factors(history, monkeypatch):
    """The factors were solved from the very rows that training reads, which make them look better than they are."""
    kept = train(history, config=SHORT.model_copy(update={"epochs": 0}))
    falling = iter(range(9, 0, -1))
    monkeypatch.setattr(Losses, "of_stop", lambda *given: float(next(falling)))
    made = train(history, config=SHORT.model_copy(update={"epochs": 1, "average": 0.0}))
    assert (kept.epoch, made.epoch) == (0, 1)
    first, last = kept.base.table(), made.base.table()
    for name, where in made.base.network.parts.items():
        stays = name in ("item factors", "category factors")
        assert torch.equal(first[:, :, where], last[:, :, where]) == stays, name


def test_patience_ends_training_early(history):
    """Steps far too large to help, and no average to calm them."""
    lazy = SHORT.model_copy(update={"patience": 1, "epochs": 9, "learning_rate": 1.0, "average": 0.0})
    made = train(history, config=lazy)
    numbers = [epoch for epoch, _, _ in made.curve]
    assert len(numbers) < 10
    assert numbers[-1] - made.epoch == 1


def test_without_epochs_the_closed_form_start_is_kept(history):
    made = train(history, config=SHORT.model_copy(update={"epochs": 0}))
    assert (made.epoch, len(made.curve)) == (0, 1)
    assert "closed-form start" in made.why


# Repeatable


def test_two_runs_are_equal_bytes_and_leave_torch_as_it_was(trained, history, tmp_path):
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    again = train(history)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert bytes_of(again, tmp_path / "a") == bytes_of(trained, tmp_path / "b")
    assert again.curve == trained.curve


@pytest.mark.parametrize("other", [{"night": NIGHTS + 1}, {"config": SHORT.model_copy(update={"seed": 1})}])
def test_another_night_or_seed_is_another_base(trained, history, other, tmp_path):
    assert bytes_of(train(history, **other), tmp_path / "a") != bytes_of(trained, tmp_path / "b")


# Causal


def test_rows_of_the_night_and_later_change_nothing(world, trained, tmp_path):
    """There, with other labels, or gone: the base is the same bytes."""
    late = np.asarray(world.night) >= FIRST + NIGHTS
    flipped = with_labels(world, np.where(late[:, None], 1 - world.labels, world.labels))
    expected = bytes_of(trained, tmp_path / "gone")
    assert bytes_of(train(world), tmp_path / "there") == expected
    assert bytes_of(train(flipped), tmp_path / "flipped") == expected


@pytest.mark.parametrize("nights", [1, 2], ids=["long", "short"])
def test_the_stop_nights_are_never_trained_on(monkeypatch, history, nights):
    """Their labels changed, and how they scale the precisions set aside: every training loss is the same number, every
    stop loss another."""
    for name in ("scaled", "cautious"):
        monkeypatch.setattr(initialisation, name, lambda precisions, parts, loss: (precisions, {}))
    stop = np.asarray(history.night) >= FIRST + NIGHTS - 1
    flipped = with_labels(history, np.where(stop[:, None], 1 - history.labels, history.labels))
    config = SHORT.model_copy(update={"stop_nights": nights})
    ours, theirs = (train(rows, config=config).curve for rows in (history, flipped))
    assert [loss for _, loss, _ in ours] == [loss for _, loss, _ in theirs]
    assert all(mine[2] != other[2] for mine, other in zip(ours, theirs, strict=True))


def test_what_is_learned_from_the_training_nights_does_come_from_their_labels(trained, history):
    fit = np.asarray(history.night) < FIRST + NIGHTS - 2
    other = train(with_labels(history, np.where(fit[:, None], 1 - history.labels, history.labels)))
    assert [loss for _, loss, _ in other.curve[1:]] != [loss for _, loss, _ in trained.curve[1:]]


def test_stop_nights_are_the_newest_and_one_night_is_left_to_train_on(monkeypatch, history):
    """Where they would have more than a quarter of the rows, strengths are chosen by them, and fewer are stopped on.
    `stop_nights` beyond the history leaves its first night to solve the folds' start on."""
    seen = {}
    descend = epochs.Descent.run

    def spy(self, plan, seed):
        seen.update({name: visits if visits is None else sorted({*visits.night - FIRST})
                     for name, visits in (("fit", plan.fit), ("stop", plan.stop), ("asked", plan.asked))})  # fmt: skip
        return descend(self, plan, seed)

    monkeypatch.setattr(epochs.Descent, "run", spy)
    for nights, asked in ((1, None), (2, [4, 5]), (99, [1, 2, 3, 4, 5])):
        made = train(history, config=SHORT.model_copy(update={"stop_nights": nights, "epochs": 0}))
        assert seen == {"fit": [0, 1, 2, 3, 4], "stop": [5], "asked": asked}
        assert made.base.begun_on == (None if asked is None else NIGHTS)


# Warm


@pytest.fixture(scope="module")
def tomorrow(world):
    return before(world, NIGHTS + 1)


def test_a_warm_start_goes_on_from_the_parent_and_stops_on_newer_nights(trained, tomorrow):
    made = train(tomorrow, night=NIGHTS + 1, parent=trained.base)
    assert [epoch for epoch, _, _ in made.curve][:2] == [-1, 0]
    assert "started from the parent's base" in made.why
    assert made.base.trained_through == day(NIGHTS)
    # Epoch -1 is the parent as it is, on the nights that it has never seen.
    losses = stop_losses(trained, tomorrow, (NIGHTS, NIGHTS))
    assert made.curve[0][2] == pytest.approx(losses[:, 0].mean(), abs=1e-5)
    assert made.epoch == min(made.curve, key=lambda point: point[2])[0]


def test_a_warm_start_trains_on_nothing_newer_than_the_parent_has_seen(trained, tomorrow):
    newer = np.asarray(tomorrow.night) > trained.base.trained_through.toordinal()
    flipped = with_labels(tomorrow, np.where(newer[:, None], 1 - tomorrow.labels, tomorrow.labels))
    mine, theirs = (train(rows, night=NIGHTS + 1, parent=trained.base) for rows in (tomorrow, flipped))
    assert [loss for _, loss, _ in mine.curve] == [loss for _, loss, _ in theirs.curve]
    assert mine.curve[0][2] != theirs.curve[0][2]


def test_with_few_new_rows_the_parent_s_base_is_kept_as_it_is(trained, tomorrow, tmp_path):
    fresh = int((np.asarray(tomorrow.night) == FIRST + NIGHTS).sum())
    enough, few = (SHORT.model_copy(update={"min_stop_rows": rows, "epochs": 0}) for rows in (fresh, fresh + 1))
    kept = train(tomorrow, night=NIGHTS + 1, parent=trained.base, config=few)
    assert (kept.epoch, kept.curve) == (-1, ())
    assert f"{fresh} rows are newer" in kept.why
    assert bytes_of(kept, tmp_path / "a") == bytes_of(trained, tmp_path / "b")
    assert kept.base.trained_through == trained.base.trained_through
    assert len(train(tomorrow, night=NIGHTS + 1, parent=trained.base, config=enough).curve) == 2


def test_a_parent_s_base_grows_with_the_vocabularies(trained, tomorrow):
    kept = train(tomorrow, night=NIGHTS + 1, parent=trained.base, more=7,
                 config=SHORT.model_copy(update={"min_stop_rows": 10**9}))  # fmt: skip
    assert kept.base.network.shape == shape(tomorrow, more=7)
    np.testing.assert_array_equal(stop_losses(kept, tomorrow), stop_losses(trained, tomorrow))


def test_the_parent_s_base_is_not_changed_by_training_on_it(trained, tomorrow, tmp_path):
    first = bytes_of(trained, tmp_path / "before")
    train(tomorrow, night=NIGHTS + 1, parent=trained.base)
    assert bytes_of(trained, tmp_path / "after") == first


@pytest.mark.parametrize(
    "change",
    [
        {"ranker": SMALL.model_copy(update={"hidden": 9})},
        {"adapter": AdapterConfig(steps=3)},
        {"night": NIGHTS - 1},
    ],
)
def test_a_parent_of_another_kind_or_of_the_future_is_no_start(trained, history, change):
    config = SHORT.model_copy(update={"epochs": 0})
    made = train(history, parent=trained.base, config=config, **({"night": NIGHTS + 1} | change))
    assert "the parent's base does not fit" in made.why
    assert [epoch for epoch, _, _ in made.curve] == [0]


def test_a_parent_older_than_the_window_is_no_start(trained, world):
    """No night is left that it has seen, so a start from it would have nothing to train on."""
    rows = part(world, np.asarray(world.night) > FIRST + NIGHTS - 1)
    old = replace(trained.base, trained_through=day(NIGHTS - 1))
    made = train(rows, night=8, parent=old, more=0, config=SHORT.model_copy(update={"epochs": 0}))
    assert "as old as its training" in made.why
    assert [epoch for epoch, _, _ in made.curve] == [0]


# Refused


@pytest.mark.parametrize("nights", [0, 1])
def test_one_night_is_too_little_history(history, nights):
    rows = part(history, np.asarray(history.night) < FIRST + nights)
    with pytest.raises(NotEnoughHistory, match=rf"rows of {nights} night\(s\)"):
        meta_train(Setting(contract(), ladder_of(), SMALL, AdapterConfig(), SHORT, rows, shape(history), day(NIGHTS)))


def test_a_ridge_over_nothing_is_refused(history):
    with pytest.raises(InvalidConfig, match="has none but the constant"):
        train(
            history,
            ranker=SMALL.model_copy(update={"factors": 0, "category_factors": 0, "direct": False, "features": 0}),
        )


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_huge_learning_rate_ends_with_what_was_best_before(history, rate):
    config = SHORT.model_copy(update={"learning_rate": rate, "epochs": 9})
    made, start = train(history, config=config), train(history, config=config.model_copy(update={"epochs": 0}))
    assert "4 epoch(s) left the finite numbers and were taken back, and it ended with the best before" in made.why
    assert (made.epoch, made.curve[0]) == (0, start.curve[0])
    assert all(np.isfinite(stop) for _, _, stop in made.curve)
    after, before = made.base.network.state_dict(), start.base.network.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_an_epoch_that_leaves_the_finite_numbers_is_taken_back_and_the_next_is_slower(history, monkeypatch):
    """Its second step sees a loss that is no number; the next step starts where the epoch before ended."""
    seen, rates, real = [], [], Losses.of_step

    def of_step(self, network, *rest):
        seen.append(copy.deepcopy(network.state_dict()))
        adapted, loss = real(self, network, *rest)
        return (adapted * torch.nan, loss * torch.nan) if len(seen) == 10 else (adapted, loss)

    def told(epoch, numbers):
        rates.append(numbers.get("learning rate"))

    monkeypatch.setattr(Losses, "of_step", of_step)
    falling = iter(range(99, 0, -1))
    monkeypatch.setattr(Losses, "of_stop", lambda *given: float(next(falling)))
    config = SHORT.model_copy(update={"epochs": 4, "steps_per_epoch": 4, "average": 0.0})
    made = train(history, config=config, scalars=SimpleNamespace(begin=lambda first: None, write=told))
    assert [epoch for epoch, _, _ in made.curve] == [0, 1, 2, 3, 4]
    assert made.epoch == 4
    assert "; 1 epoch(s) left the finite numbers and were taken back;" in made.why
    assert len(seen) == 2 * 4 + 2 + 2 * 4
    assert all(torch.equal(value, seen[8][name]) for name, value in seen[10].items())
    assert any(not torch.equal(value, seen[8][name]) for name, value in seen[9].items())
    assert rates == pytest.approx([None, 0.005, 0.005, 0.0005, 0.0005])


@pytest.mark.parametrize(
    ("table", "column"), [("request_numbers", "age"), ("candidate_numbers", "price"), ("statistics", "item_rate:aim0")]
)
@pytest.mark.parametrize("number", [np.inf, -np.inf])
def test_an_infinite_input_is_named(history, table, column, number):
    values = np.array(getattr(history, table))
    values[np.flatnonzero(history.night < FIRST + 2)[3], 0] = number
    with pytest.raises(TrainingDiverged, match=rf"{column} is infinite as float32 in 1 of"):
        train(replace(history, **{table: values}))


def test_a_label_that_is_not_finite_diverges_by_name(history):
    labels = history.labels.copy()
    labels[5, 0] = np.inf
    with pytest.raises(TrainingDiverged, match="extreme numbers"):
        train(with_labels(history, labels))


def test_nights_may_have_gaps(world):
    rows = part(world, np.isin(np.asarray(world.night) - FIRST, [0, 3, 7]))
    made = train(rows, night=9, config=SHORT.model_copy(update={"epochs": 0, "stop_nights": 1}))
    assert made.base.trained_through == day(7) == day(9) - timedelta(days=2)


@pytest.mark.parametrize(("pace", "rows_held"), [(5e-4, 10**6), (2e-2, 10**6), (5e-3, None)])
def test_layers_lose_the_same_share_a_step_at_any_learning_rate_and_less_beyond_so_many_rows(
    history, monkeypatch, pace, rows_held
):
    """A quarter of the rows up to which layers are held as configured, then four times as many."""
    monkeypatch.setattr(initialisation, "HOLDING_ROWS", rows_held or len(history) / 4)
    config = SHORT.model_copy(update={"learning_rate": pace, "weight_decay": 8.0})
    setting = Setting(contract(), ladder_of(), SMALL, RIDGE, config, history, shape(history), day(NIGHTS))
    begun = initialisation.Initialisation(setting, Losses(setting))
    network, precisions = begun.fresh()
    before_step = network.joint[0].weight.detach().clone()
    optimiser = begun.optimiser(network, precisions)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    share = 8.0 * 5e-4 * (1 if rows_held else 1 / 4)
    torch.testing.assert_close(network.joint[0].weight.detach(), before_step * (1 - share))
