"""An ensemble of bases and its student: what is taught, what is kept, and how a killed one goes on."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.checkpoint import NoCheckpoint
from tasks.learning.descent import steady
from tasks.learning.ensemble import combined, soft_labels
from tasks.learning.episodes import row_loss, score_visits
from tasks.learning.epochs import Descent
from tasks.learning.initialisation import Initialisation
from tasks.learning.losses import Losses
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.scalars import NoScalars
from tasks.learning.setting import Setting
from tasks.learning.training import seed_of
from tasks.learning.training_config import TrainingConfig
from tests.learning.small_rows import before, contract, ladder_of, one_aim, opposed, shape, with_labels
from tests.learning.test_training import NIGHTS, RIDGE, SHORT, SMALL, bytes_of, day, train

BRIEF = SHORT.model_copy(update={"epochs": 1, "steps_per_epoch": 2, "average": 0.0})
BIAS = AdapterConfig(kind="bias")  # the cheapest to start with: it has least to hold
THREE = BRIEF.model_copy(update={"members": 2, "checkpoint_seconds": 3600.0})
"""Two members and their student."""


class Room:
    """Checkpoints of a training and its parts."""

    def __init__(self, files=None, name=""):
        self.files, self.name = {} if files is None else files, name

    def load(self):
        return self.files.get(self.name)

    def save(self, data):
        self.files[self.name] = data

    def part(self, name):
        return Room(self.files, name)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def history():
    return before(one_aim(opposed(nights=NIGHTS, users=12)), NIGHTS)


@pytest.fixture(scope="module")
def whole(history):
    """An ensemble that was never stopped, what it told, and the checkpoints of its parts."""
    told, room = [], Room()
    made = train(history, adapter=BIAS, config=THREE, checkpoint=room, report=lambda *one: told.append(one))
    return made, told, room.files


# By hand


def test_the_ensemble_says_mean_probabilities_and_mean_values():
    chances = torch.tensor([[[0.2, 1.0]], [[0.6, 2.0]], [[0.1, 6.0]]])
    said = combined([torch.stack([part[:, 0].logit(), part[:, 1]], dim=1) for part in chances], ["binary", "rating"])
    assert said[:, 0].sigmoid().item() == pytest.approx(0.3)
    assert said[:, 1].item() == pytest.approx(3.0)


@pytest.mark.parametrize(("scores", "expected"), [((120.0, 120.0), 120.0), ((-200.0, -100.0), -100 - np.log(2)),
                                                  ((300.0, -300.0), 0.0)])  # fmt: skip
def test_members_that_are_certain_give_a_finite_score(scores, expected):
    assert combined([torch.tensor([[score]]) for score in scores], ["binary"]).item() == pytest.approx(expected)


def test_the_students_loss_is_the_cross_entropy_with_the_teachers_probabilities():
    """Teacher 0.25 and 0.5, student 0.5 and 0.8; the row without a label counts in neither loss."""
    teacher, student = torch.tensor([[0.25], [0.5], [0.9]]).logit(), torch.tensor([[0.5], [0.8], [0.1]]).logit()
    labels = torch.tensor([[1.0], [0.0], [torch.nan]])
    told = row_loss(student, soft_labels(teacher, labels, ["binary"]), ("binary",), torch.ones(1))
    by_hand = -(0.25 * np.log(0.5) + 0.75 * np.log(0.5) + 0.5 * np.log(0.8) + 0.5 * np.log(0.2)) / 2
    assert told.item() == pytest.approx(by_hand)
    values = soft_labels(torch.tensor([[4.0]]), torch.tensor([[1.0]]), ["rating"])
    assert row_loss(torch.tensor([[3.0]]), values, ("rating",), torch.ones(1)).item() == pytest.approx(0.5)


def setting_of(rows, config, adapter=RIDGE, ranker=SMALL):
    return Setting(contract(), ladder_of(), ranker, adapter, config, rows, shape(rows), day(NIGHTS), "cpu")


def drawn(setting, seed):
    """A network with random layers, and its precisions."""
    torch.manual_seed(seed)
    network, precisions = Initialisation(setting, Losses(setting)).fresh()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval(), precisions


@pytest.mark.parametrize(("kind", "outer"), [("ridge", "second_order"), ("gradient", "first_order")])
def test_a_students_step_mixes_labels_and_what_each_member_says_after_its_own_adaptation(history, kind, outer):
    config = BRIEF.model_copy(update={"members": 2, "distill": 0.3, "base_weight": 0.0, "outer": outer})
    setting = setting_of(history, config, AdapterConfig(kind=kind))
    teachers, (network, precisions) = [drawn(setting, seed) for seed in (1, 2)], drawn(setting, 3)
    after = np.minimum(2, setting.visits.rows.lengths - 1)
    adapted, loss = Losses(setting, teachers).of_step(network, precisions, setting.visits, after)
    said = []
    with torch.no_grad():
        for scorer, held in (*teachers, (network, precisions)):
            parts = (setting.ladder, setting.visits, after, setting.material.scorer(scorer), setting.material, held())
            scores = score_visits(*parts, Adaptation(("binary",), setting.adapter))
            said.append(scores.adapted[:, 0].sigmoid().double().numpy())
    labels = history.labels[scores.rows, 0]
    targets = 0.7 * labels + 0.3 * (said[0] + said[1]) / 2
    assert loss.item() == pytest.approx(-(targets * np.log(said[2]) + (1 - targets) * np.log(1 - said[2])).mean())
    assert adapted.item() == pytest.approx(-(labels * np.log(said[2]) + (1 - labels) * np.log(1 - said[2])).mean())
    loss.backward()
    assert all(parameter.grad is None for teacher, _ in teachers for parameter in teacher.parameters())


# What it is worth


class Truth(torch.nn.Module):
    """Knows what the world was made from: whether market and genre of a row go together."""

    shape, config = SimpleNamespace(kinds=("binary",)), RankerConfig()

    def perceptron(self):
        return None

    def forward(self, request_ids, candidate_ids, *_):
        together = (request_ids[..., :1] == 1) == (candidate_ids[..., 1:2] == 1)
        return torch.where(together, 2.0, -2.0), torch.ones(*together.shape[:-1], 1)


def test_the_student_of_a_planted_teacher_does_better_than_a_base_that_had_only_labels():
    """The labels of the training nights are coins; those of the stop nights are true."""
    rows = before(one_aim(opposed(nights=NIGHTS, users=24)), NIGHTS)
    random = np.random.default_rng(0)
    true = torch.sigmoid(Truth()(torch.from_numpy(rows.request_ids), torch.from_numpy(rows.candidate_ids))[0]).numpy()
    chances = np.where(np.asarray(rows.night)[:, None] < day(NIGHTS - 2).toordinal(), 0.5, true)
    rows = with_labels(rows, random.random(chances.shape) < chances)
    config = SHORT.model_copy(update={"steps_per_epoch": 12, "distill": 1.0, "members": 2, "average": 0.0})
    free = {"base_weight": 0.0, "learning_rate": 5e-2, "weight_decay": 0.0, "embedding_decay": 0.0}
    ranker = SMALL.model_copy(update={"request_dropout": 0.0, "dropout": 0.0, "id_dropout": 0.0})
    setting = setting_of(rows, config.model_copy(update=free), AdapterConfig(kind="none"), ranker)
    reached = []
    for teachers in ((), [(Truth(), lambda: torch.zeros(2, 1, 0))]):
        losses = Losses(setting, teachers)
        initialisation = Initialisation(setting, losses)
        with steady(0, 1):
            descent = Descent(setting, initialisation, losses, lambda *_: None, NoCheckpoint(), NoScalars())
            reached.append(descent.run(initialisation.plan(None), 0).loss)
    chance = np.log(2)
    assert reached[0] > 0.9 * chance
    assert reached[1] < 0.85 * chance
    assert losses.of_teachers(initialisation.plan(None).stop) < reached[1]


# What is kept


def shifted(monkeypatch, by):
    """Add to the stop losses of members and student; gives what they came to."""
    ended, run = [], Descent.run

    def spy(self, plan, seed):
        done = run(self, plan, seed)
        curve = tuple((epoch, trained, stop + by[len(ended)]) for epoch, trained, stop in done.curve)
        ended.append(replace(done, curve=curve))
        return ended[-1]

    monkeypatch.setattr(Descent, "run", spy)
    return ended


def test_a_member_that_did_best_is_kept_as_the_training_alone_that_it_was(history, whole, monkeypatch, tmp_path):
    """Members differ in their seeds, and the first has the seed of a training without members."""
    ended = shifted(monkeypatch, (-1.0, 0.0, 0.0))
    made = train(history, adapter=BIAS, config=THREE, checkpoint=Room(dict(whole[2])))
    monkeypatch.undo()
    alone = train(history, adapter=BIAS, config=BRIEF)
    assert "of 2 members and their student kept member 1 (" in made.why
    assert bytes_of(made, tmp_path / "made") == bytes_of(alone, tmp_path / "alone")
    assert made.epoch == alone.epoch
    trained = {one.curve[-1][1] for one in ended}
    assert len(trained) == 3
    assert alone.curve[-1][1] in trained
    tables = [one.best[0].candidate_tables[0].weight for one in ended]
    assert not any(torch.equal(tables[0], other) for other in tables[1:])


def test_a_student_that_did_best_is_kept_and_the_others_are_told_of(history, whole, monkeypatch):
    ended = shifted(monkeypatch, (0.0, 0.0, -1.0))
    made = train(history, adapter=BIAS, config=THREE, checkpoint=Room(dict(whole[2])))
    student = ended[2].best[0].state_dict()
    kept = made.base.network.state_dict()
    for name in student:  # the last closed forms are solved in place
        assert torch.equal(student[name], kept[name]), name
    assert made.curve == ended[2].curve
    losses = Losses(setting_of(history, THREE, BIAS), [one.best for one in ended[:2]])
    together = losses.of_teachers(Initialisation(losses.setting, losses).plan(None).stop)
    told = ", ".join(f"{one.loss:.5f}" for one in ended[:2])
    assert (
        f"of 2 members and their student kept the student (stop losses: members {told}; their mean prediction "
        f"{together:.5f}; student {ended[2].loss:.5f})"
    ) in made.why


def test_too_little_to_stop_on_keeps_the_parents_base_as_it_is(history, whole):
    parent = whole[0].base
    made = train(
        history, adapter=BIAS, config=THREE.model_copy(update={"min_stop_rows": 10**6}), parent=parent, night=NIGHTS + 1
    )
    assert (made.epoch, made.curve) == (-1, ())
    assert made.base.trained_through == parent.trained_through


# Resumed


def test_progress_says_whose_epochs_they_are(whole):
    units = list(dict.fromkeys(unit for _, _, unit in whole[1]))
    assert units == ["epochs of member 1 of 2", "epochs of member 2 of 2", "epochs of the student"]


@pytest.mark.parametrize(("unit", "left"), [("epochs of member 2 of 2", 2), ("epochs of the student", 1)])
def test_a_killed_one_repeats_no_finished_member_and_ends_at_the_same_bytes(
    history, whole, monkeypatch, tmp_path, unit, left
):
    """It dies in the first epoch of a part, of which nothing is kept; what came before it is."""

    def dies(done, _total, now):
        if now == unit and done == 1:
            raise Stopped

    room, steps, step = Room(), [], Descent._step
    monkeypatch.setattr(Descent, "_step", lambda *given: steps.append(1) or step(*given))
    if unit.endswith("student"):
        room.files = {name: data for name, data in whole[2].items() if name != "student"}
    with pytest.raises(Stopped):
        train(history, adapter=BIAS, config=THREE, checkpoint=room, report=dies)
    steps.clear()
    resumed = train(history, adapter=BIAS, config=THREE, checkpoint=room)
    assert len(steps) == left * BRIEF.steps_per_epoch
    assert bytes_of(resumed, tmp_path / "resumed") == bytes_of(whole[0], tmp_path / "whole")
    assert resumed.curve == whole[0].curve


def test_each_member_and_night_has_a_seed_of_its_own():
    config = TrainingConfig(seed=3)
    seeds = [seed_of(config, day(night), member) for night in range(3) for member in range(4)]
    assert len(set(seeds)) == 12
    assert seeds[0] == int(np.random.SeedSequence([3, day(0).toordinal()]).generate_state(1)[0])
