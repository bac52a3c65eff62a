"""Where a training begins and how it ends: closed forms around the descent.

A base starts in closed form or from the parent's, grown to tonight's vocabularies, and what was trained ends with its
closed forms solved once more.
"""

import copy
from dataclasses import dataclass
from datetime import date

import numpy as np
import torch

from tasks.errors import NotEnoughHistory
from tasks.learning.adapters import Adaptation, AdapterConfig, Precisions, check_width
from tasks.learning.base import Base, grow
from tasks.learning.checkpoint import Point, TrainingState, Weights
from tasks.learning.descent import optimiser_of
from tasks.learning.episodes import counts_by_age
from tasks.learning.losses import Losses
from tasks.learning.material import I64, Visits, remembered
from tasks.learning.networks import Ranker
from tasks.learning.outer import thaw
from tasks.learning.priors import MOST_USERS, estimate, scaled
from tasks.learning.prototypes import place, unmatched
from tasks.learning.rehearsal import REMEMBERED
from tasks.learning.setting import Setting
from tasks.learning.starts import newest, normalise, solve_start, spread

SWEEPS, MORE_SWEEPS = 10, 3
"""Passes of the factorisation from nothing, and from the parent's factors."""
FITTED = frozenset({"item factors", "category factors"})
"""Parts of the adapter features that are solved from the history: its rows overstate what they are worth, so training
leaves their precisions alone; the stop nights scale them where a chain of nights starts."""
CLUSTERED = 16_384
"""Most rows, the newest, that prototypes are placed by."""
DRIFTING = frozenset({"constant"})
"""Parts whose weights change from night to night more than the evidence of all nights together knows."""


@dataclass(frozen=True)
class Plan:
    """What a training starts from, is trained on and stopped on.

    Attributes:
        start: the parent's base, if it is one to start from.
        fit: visits that are trained on.
        stop: later visits, which say when to end.
        through: the last night of both.
        how: what there is to say about the start.
        enough: whether there is enough to stop on; if not, the parent's base stays as it is.
    """

    start: Base | None
    fit: Visits
    stop: Visits
    through: date
    how: str
    enough: bool = True


class Initialisation:
    """Makes weights to train, and a base of weights that were trained.

    Args:
        setting: what the training reads.
        losses: its losses.
    """

    def __init__(self, setting: Setting, losses: Losses) -> None:
        self.setting, self.losses = setting, losses

    def plan(self, parent: Base | None) -> Plan:
        """What to start from, and which nights to train and to stop on.

        Raises:
            NotEnoughHistory: rows of fewer than two nights.
        """
        setting, training, visits = self.setting, self.setting.training, self.setting.visits
        nights = np.unique(visits.night)
        if len(nights) < 2:
            raise NotEnoughHistory(
                f"night {setting.night} has rows of {len(nights)} night(s) before it, and training needs 2: one to "
                f"train on and a later one to stop on; run a later night, or widen data.window_nights"
            )
        newest_night, enough = int(nights[-1]), True
        start = None if parent is None else self._usable(parent)
        how = "started in closed form" + ("" if parent is None else ": the parent's base does not fit")
        last = int(nights[-1 - min(training.stop_nights, len(nights) - 1)])
        if start is not None:
            through = start.trained_through.toordinal()
            seen = int(visits.of_nights(through + 1, newest_night).rows.lengths.sum())
            if seen < training.min_stop_rows:
                enough, last = False, through
                how = (
                    f"kept the parent's base: {seen} rows are newer than its training, and stopping on them needs "
                    f"training.min_stop_rows = {training.min_stop_rows}"
                )
            elif through < int(nights[0]):
                start, how = None, f"{how}: none of the window's nights is as old as its training"
            else:
                last, how = through, f"started from the parent's base, trained through {start.trained_through}"
        fit, stop = visits.of_nights(int(nights[0]), last), visits.of_nights(last + 1, newest_night)
        return Plan(start, fit, stop, date.fromordinal(newest_night), how, enough)

    def _usable(self, parent: Base) -> Base | None:
        """The parent's base, grown to tonight's vocabularies, if it is of the kind that the config asks for."""
        setting = self.setting
        if (parent.network.config, parent.levels, parent.adapter) != (setting.ranker, setting.levels, setting.adapter):
            return None
        if parent.trained_through >= setting.night:
            return None
        grown = grow(parent, setting.shape)
        return None if grown is None else grown.to(setting.device)

    def begun(self, plan: Plan, random: np.random.Generator) -> TrainingState:
        """Training before its first step: started in closed form, or from the parent's base."""
        setting = self.setting
        start, fit, stop, how = plan.start, plan.fit, plan.stop, plan.how
        at = newest(setting.rows, fit, setting.training.start_rows)
        curve: list[Point] = []
        if start is None:
            network, precisions = self.fresh()
            normalise(network, setting.data, setting.rows, at)
            spread(network, setting.material, at)
        else:
            network, precisions = copy.deepcopy(start.network), copy.deepcopy(start.precisions)
            curve.append((-1, None, self.losses.of_stop(network, precisions, stop)))
        best = copy.deepcopy(network), copy.deepcopy(precisions)
        self._solve(network, at, SWEEPS if start is None else MORE_SWEEPS)
        if start is None:
            self._place(network, fit, at, random)
            how = f"{how}; {self._hold(network, precisions, fit, stop, random)}"
        curve.append((0, None, self.losses.of_stop(network, precisions, stop)))
        average = copy.deepcopy(network), copy.deepcopy(precisions)
        state = TrainingState(
            (network, precisions), average, best, self.optimiser(network, precisions), random, curve, how
        )
        state.keep_best()
        return state

    def fresh(self) -> Weights:
        """Weights that nothing was learned by yet."""
        setting = self.setting
        network = Ranker(setting.shape, setting.ranker, setting.adapter.bent, setting.adapter.matching)
        network = network.to(setting.device)
        check_width(setting.adapter, network.width if network.matching is None else network.matching.width)
        width = setting.adapter.width(network.width)
        kinds, fan_in = len(setting.shape.kinds), network.fan_in[:width]
        precisions = Precisions(len(setting.levels), kinds, width, setting.adapter, fan_in)
        return network, precisions.to(setting.device)

    def optimiser(self, network: Ranker, precisions: Precisions) -> torch.optim.Optimizer:
        """An optimiser of what the config trains."""
        config = self.setting.training
        thaw(network, config.freeze)
        return optimiser_of(network, precisions, config.learning_rate, config.weight_decay, config.embedding_decay)

    def _place(self, network: Ranker, fit: Visits, at: I64, random: np.random.Generator) -> None:
        """Put the prototypes, if there are any, where rows differ in what segments think of them."""
        setting = self.setting
        if network.matching is None:
            return
        linear = unmatched(network)
        ridge = AdapterConfig(precision=setting.adapter.precision, coarse_precision=setting.adapter.coarse_precision)
        with torch.no_grad():
            scorer = setting.material.scorer(linear)
            features = scorer(at[-CLUSTERED:])[1]
            if len(setting.rows) * linear.width <= REMEMBERED:
                scorer = remembered(scorer, len(setting.rows))
            kinds = len(setting.shape.kinds)
            held = Precisions(len(setting.levels), kinds, linear.width, ridge).to(setting.device)()
            told = Adaptation.of(linear, ridge)
            tastes = estimate(setting.ladder, fit, setting.material, scorer, held, told, random)[0]
            place(network.matching, features, tastes, random)

    def _hold(
        self, network: Ranker, precisions: Precisions, fit: Visits, stop: Visits, random: np.random.Generator
    ) -> str:
        """Estimate how strongly adapters are held; says what the stop nights changed about it."""
        setting = self.setting
        if precisions.logarithm.shape[-1] == 0:
            return "nothing is adapted"
        network.eval()
        adaptation = Adaptation.of(network, setting.adapter)
        with torch.no_grad():
            scorer = setting.material.scorer(network)
            if len(setting.rows) * (network.width if network.bent is None else network.joint_inputs) <= REMEMBERED:
                scorer = remembered(scorer, len(setting.rows))
            found = precisions()
            weighed = network.bent is None and network.matching is None
            if weighed:
                found = estimate(setting.ladder, fit, setting.material, scorer, found, adaptation, random)
            width = found.shape[-1]
            parts = {name: part for name, part in network.parts.items() if part.stop <= width}
            for name in sorted((FITTED | DRIFTING).intersection(parts)):
                found[0, :, parts[name]] = found[0, :, parts[name]].clamp_min(setting.adapter.precision)
            few = stop
            if len(stop) > MOST_USERS:
                few = stop.take(np.sort(random.choice(len(stop), MOST_USERS, replace=False)))
            found, scales = scaled(found, parts, self.losses.rehearsed(scorer, found, adaptation, few))
            precisions.logarithm.copy_(found.log())
        changed = ", ".join(f"{name} by {scale:g}" for name, scale in scales.items() if scale != 1)
        how = "precisions by evidence" if weighed else "precisions as configured"
        return how + (f", scaled on the stop nights ({changed})" if changed else "")

    def _solve(self, network: Ranker, at: I64, sweeps: int) -> None:
        """Solve the closed forms of the start on rows at positions."""
        setting = self.setting
        counts = counts_by_age(np.asarray(setting.rows.night)[at], setting.training.half_life_nights)
        worth = [objective.weight for objective in setting.data.objectives]
        solve_start(network, setting.material, at, setting.adapter, sweeps, counts, worth)

    def refreshed(self, network: Ranker, precisions: Precisions, through: date) -> Base:
        """The base with its closed forms solved once more on every night of the history.

        The stop nights have said how long to train; that they are never learned from would leave the base older than
        any baseline.
        """
        setting = self.setting
        at = newest(setting.rows, setting.visits, setting.training.start_rows)
        self._solve(network, at, MORE_SWEEPS)
        return Base(network.eval(), precisions, setting.levels, setting.adapter, through)
