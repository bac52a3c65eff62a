"""Meta-training: the base is trained so that a few steps on a segment's support serve its later rows best.

By default the query loss flows back through the solve into embeddings, towers and precisions. Training starts in closed
form (or from the parent), reads nights before the stop nights, and keeps what did best on the stop nights. With
`training.members` an ensemble is trained first, and one student of it is what comes out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from tasks.errors import TrainingDiverged
from tasks.learning.base import Base
from tasks.learning.checkpoint import Checkpoint, NoCheckpoint, Point, Weights
from tasks.learning.descent import steady as steady  # other verbs compute under it as well
from tasks.learning.epochs import Descended, Descent, Report
from tasks.learning.initialisation import Initialisation, Plan
from tasks.learning.losses import Losses
from tasks.learning.outer import check_outer
from tasks.learning.scalars import NoScalars, Scalars
from tasks.learning.setting import Setting
from tasks.learning.training_config import TrainingConfig

REFRESHED = "its closed forms were solved once more on the whole history"
NO_CHECKPOINT, NO_SCALARS = NoCheckpoint(), NoScalars()


@dataclass(frozen=True)
class Trained:
    """What training made.

    Attributes:
        base: the best base by stop loss.
        curve: per epoch of what was kept: number, mean training loss, stop loss. Epoch 0 is the closed-form start,
            epoch -1 the parent.
        epoch: the epoch that was kept.
        why: how it started and ended, and what an ensemble came to.
    """

    base: Base
    curve: tuple[Point, ...]
    epoch: int
    why: str


def meta_train(
    setting: Setting,
    parent: Base | None = None,
    report: Report = lambda done, total, unit: None,
    checkpoint: Checkpoint = NO_CHECKPOINT,
    scalars: Scalars = NO_SCALARS,
) -> Trained:
    """Train a base for a night on the nights before it.

    Args:
        setting: what is trained, how, on which rows and for which night.
        parent: the base to start from.
        report: progress, in epochs.
        checkpoint: keeps the checkpoint of this very training: of equal arguments, and nobody else's.
        scalars: where losses, learning rate, gradient norm and seconds of every epoch go.

    Returns:
        The best base and its learning curve.

    Raises:
        NotEnoughHistory: rows of fewer than two nights.
        TrainingDiverged: the loss, or an adapter's system of equations, is not finite.
        InvalidConfig: a linear head without features, or an outer loop that does not fit the adapter.
    """
    check_outer(setting.training.outer, setting.adapter)
    train = _train_one if setting.training.members == 1 else _train_ensemble
    try:
        return train(setting, parent, report, checkpoint, scalars)
    except LinAlgError as error:
        # Numbers that are not finite reach the solver's factorisation before they reach a loss.
        raise TrainingDiverged(
            f"an adapter of night {setting.night} cannot be solved: {error}; lower training.learning_rate (now "
            f"{setting.training.learning_rate}) or look for extreme numbers among the inputs"
        ) from error


def seed_of(training: TrainingConfig, night: date, member: int = 0) -> int:
    """Seed of a member's training for a night: the first is trained as it would be alone."""
    entropy = [training.seed, night.toordinal(), *([member] if member else [])]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _train_one(
    setting: Setting, parent: Base | None, report: Report, checkpoint: Checkpoint, scalars: Scalars
) -> Trained:
    seed, losses = seed_of(setting.training, setting.night), Losses(setting)
    initialisation = Initialisation(setting, losses)
    with steady(seed, setting.training.threads):
        plan = initialisation.plan(parent)
        if not plan.enough:
            return _untouched(plan)
        made = Descent(setting, initialisation, losses, report, checkpoint, scalars).run(plan, seed)
        return _finished(initialisation, made, made.how)


def _train_ensemble(
    setting: Setting, parent: Base | None, report: Report, checkpoint: Checkpoint, scalars: Scalars
) -> Trained:
    """Train members that differ in their seeds, one after the other, and a student of all; keep what is best.

    Every member starts as a single training would, from the parent where there is one: what differs is which episodes
    are drawn and which units are dropped. Members teach, and are compared with the student, as they did best on the
    stop nights: their closed forms have not been solved on these very nights yet.
    """
    training, count = setting.training, setting.training.members
    with steady(seed_of(training, setting.night), training.threads):
        plan = Initialisation(setting, Losses(setting)).plan(parent)
    if not plan.enough:
        return _untouched(plan)

    def descend(number: int, name: str, who: str, teachers: Sequence[Weights] = ()) -> Descended:
        losses, seed = Losses(setting, teachers), seed_of(training, setting.night, number)
        descent = Descent(
            *(setting, Initialisation(setting, losses), losses),
            *(lambda done, total, unit: report(done, total, f"{unit} of {who}"), checkpoint.part(name)),
            *(scalars.part(name), True),
        )
        with steady(seed, training.threads):
            return descent.run(plan, seed)

    members = [descend(at, f"member-{at + 1}", f"member {at + 1} of {count}") for at in range(count)]
    teachers = [member.best for member in members]
    student = descend(count, "student", "the student", teachers)
    losses, best = Losses(setting, teachers), min(members, key=lambda member: member.loss)
    kept, who = (student, "the student") if student.loss < best.loss else (best, f"member {members.index(best) + 1}")
    with steady(seed_of(training, setting.night), training.threads):
        together = losses.of_teachers(plan.stop)
        scalars.begin(0)
        scalars.write(0, {"stop loss of the ensemble": together, "stop loss of what was kept": kept.loss})
        each = ", ".join(f"{member.loss:.5f}" for member in members)
        how = (
            f"of {count} members and their student kept {who} (stop losses: members {each}; their mean prediction "
            f"{together:.5f}; student {student.loss:.5f}); {kept.how}"
        )
        return _finished(Initialisation(setting, losses), kept, how)


def _untouched(plan: Plan) -> Trained:
    """The parent's base to the bit: a refresh would let the stop nights in, which are to stop a later night's."""
    assert plan.start is not None
    return Trained(plan.start, (), -1, plan.how)


def _finished(initialisation: Initialisation, made: Descended, how: str) -> Trained:
    """The base of what did best, its closed forms solved once more."""
    end = {-1: "kept the parent's base, which did best", 0: "kept the closed-form start, which did best"}
    why = f"{how}; {end.get(made.epoch, f'kept epoch {made.epoch}')} on the stop nights; {REFRESHED}"
    return Trained(initialisation.refreshed(*made.best, made.plan), made.curve, made.epoch, why)
