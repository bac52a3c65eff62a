"""Where a training begins and how it ends: closed forms around the descent.

A base starts in closed form or from the parent's, grown to tonight's vocabularies, and what was trained ends with its
closed forms solved once more.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import torch
from torch import Tensor

from tasks.errors import NotEnoughHistory
from tasks.learning.adapters import Adaptation, AdapterConfig, Precisions, check_width
from tasks.learning.base import Base, grow
from tasks.learning.checkpoint import Point, TrainingState, Weights
from tasks.learning.crossfit import Fold, dealt, losses_by_visit
from tasks.learning.descent import optimiser_of
from tasks.learning.episodes import counts_by_age
from tasks.learning.losses import Losses
from tasks.learning.material import I64, Scorer, Visits, remembered
from tasks.learning.networks import Ranker
from tasks.learning.outer import thaw
from tasks.learning.priors import MOST_USERS, cautious, estimate, loosened, scaled
from tasks.learning.prototypes import place, unmatched
from tasks.learning.rehearsal import REMEMBERED
from tasks.learning.setting import Setting
from tasks.learning.starts import newest, normalise, solve_start, spread

SWEEPS, MORE_SWEEPS = 10, 3
"""Passes of the factorisation from nothing, and from the parent's factors."""
SETTLING_SWEEPS, FEW_ROWS = 30, 262_144
"""Passes on a short history of so many rows: until they settle, factors of noise grow from one night to the next."""
SHORT = 0.25
"""A history is short where the nights that a cold start would hold back have more than this share of its rows."""
FITTED = frozenset({"item factors", "category factors"})
"""Parts of the adapter features that are solved from the history: its rows overstate what they are worth, so training
leaves their precisions alone; the stop nights scale them where a chain of nights starts."""
CLUSTERED = 16_384
"""Most rows, the newest, that prototypes are placed by."""
DRIFTING = frozenset({"constant"})
"""Parts whose weights change from night to night more than the evidence of all nights together knows."""
GIVEN = FITTED | DRIFTING | {"numbers"}
"""Parts that say at the start what they ever will, or nearly so; features of all others have to be learned first."""
PACE = 5e-4
"""Learning rate that `training.weight_decay` is told for: at another one layers lose the same share a step."""
HOLDING_ROWS = 100_000
"""Rows of a history up to which layers are held as configured, and beyond which as by a prior: less, the more rows."""
HEARD = 0.01
"""Share of the stop loss that weights must save to be held less than at a start that had no use for them."""


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
        asked: of a short history the visits by which it is chosen how strongly adapters are held; None elsewhere.
        begun_on: nights of the history that the chain of nights began on, where they were few.
    """

    start: Base | None
    fit: Visits
    stop: Visits
    through: date
    how: str
    enough: bool = True
    asked: Visits | None = None
    begun_on: int | None = None


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
        if start is not None and self._outgrown(start, len(nights)):
            how = f"started anew in closed form: of {start.begun_on} nights of history have become {len(nights)}"
            start = None
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
        begun_on, asked = None if start is None else start.begun_on, None
        if start is None:
            rows = np.bincount(np.searchsorted(nights, visits.night), visits.rows.lengths, len(nights))
            behind = np.cumsum(rows[::-1])  # of the newest night, of the newest two, ...
            held_back = int((nights > last).sum())
            if behind[held_back - 1] > SHORT * behind[-1]:
                asked, begun_on = visits.of_nights(last + 1, newest_night), len(nights)
                few = max(1, int((behind <= SHORT * behind[-1]).sum()))
                last = int(nights[-1 - few])
                how = (
                    f"{how}; the history is short: strengths are chosen on its newest {held_back} of {len(nights)} "
                    f"nights by closed forms that have not seen the visit, and training stops on {few}"
                )
        fit, stop = visits.of_nights(int(nights[0]), last), visits.of_nights(last + 1, newest_night)
        return Plan(start, fit, stop, date.fromordinal(newest_night), how, enough, asked, begun_on)

    def _outgrown(self, start: Base, nights: int) -> bool:
        """Whether a chain that began on few nights has twice as many now, or as many as there will ever be."""
        begun_on = start.begun_on
        return (
            begun_on is not None and nights > begun_on and nights >= min(2 * begun_on, self.setting.data.window_nights)
        )

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
        folds = self._folds(network, precisions, plan.asked, random)
        few = plan.asked is not None and len(at) <= FEW_ROWS
        self._solve(network, at, MORE_SWEEPS if start is not None else SETTLING_SWEEPS if few else SWEEPS)
        if start is None:
            self._place(network, fit, at, random)
            how = f"{how}; {self._hold(network, precisions, fit, stop, folds, random)}"
        curve.append((0, None, self.losses.of_stop(network, precisions, stop)))
        average = copy.deepcopy(network), copy.deepcopy(precisions)
        state = TrainingState(
            (network, precisions), average, best, self.optimiser(network, precisions), random, curve, how
        )
        state.keep_best(average)
        self.loosen(state)
        return state

    def loosen(self, state: TrainingState) -> None:
        """Let go, in training, of what the start holds so strongly that it would never be learned.

        The start itself has been scored, and what did best is kept, as they are.
        """
        if self.setting.training.outer == "joint":  # its loss knows of no adapter
            return
        for network, precisions in (state.weights, state.average):
            parts = self._learned(network, precisions)
            with torch.no_grad():
                held = precisions.logarithm.exp()
                freed = loosened(held, self._configured(network).logarithm.exp(), parts.values())
                changed = freed != held
                if state.silenced is None and changed.any():
                    names = ", ".join(name for name, part in parts.items() if changed[..., part].any())
                    state.how = f"{state.how}; held in training as configured: {names}"
                    state.silenced = torch.where(changed, precisions.logarithm, torch.nan)
                precisions.logarithm[changed] = freed[changed].log()

    def settled(self, state: TrainingState, stop: Visits) -> Weights:
        """The average as it would be the night's base.

        What was let go is held as it was at the start, unless the stop nights are told so much better without that it
        is no luck: of the rows that trained it a base knows the labels, so supports of later rows move weights further.
        """
        if state.silenced is None:
            return state.average
        network, precisions = copy.deepcopy(state.average)
        network.eval()
        with torch.no_grad():
            free, parts = precisions(), self._learned(network, precisions)
            loss = self._rehearsed(network, self._scorer(network), free, stop, state.random)
            found, _ = scaled(free, parts, loss)
            held = torch.where(state.silenced.isnan(), free, state.silenced.exp())
            heard = loss(found) < (1 - HEARD) * loss(held)
            precisions.logarithm.copy_((found if heard else held).log())
        return network, precisions

    @staticmethod
    def _learned(network: Ranker, precisions: Precisions) -> dict[str, slice]:
        """Parts whose features training learns, of those that adapters weigh."""
        width = precisions.logarithm.shape[-1]
        return {name: part for name, part in network.parts.items() if part.stop <= width and name not in GIVEN}

    def fresh(self) -> Weights:
        """Weights that nothing was learned by yet."""
        setting = self.setting
        network = Ranker(setting.shape, setting.ranker, setting.adapter.bent, setting.adapter.matching)
        network = network.to(setting.device)
        check_width(setting.adapter, network.width if network.matching is None else network.matching.width)
        return network, self._configured(network)

    def _configured(self, network: Ranker) -> Precisions:
        """Precisions as the config has them."""
        setting, width = self.setting, self.setting.adapter.width(network.width)
        kinds, fan_in = len(setting.shape.kinds), network.fan_in[:width]
        precisions = Precisions(len(setting.levels), kinds, width, setting.adapter, fan_in)
        return precisions.to(setting.device)

    def optimiser(self, network: Ranker, precisions: Precisions) -> torch.optim.Optimizer:
        """An optimiser of what the config trains."""
        config, rows = self.setting.training, len(self.setting.rows)
        thaw(network, config.freeze)
        held = config.weight_decay * (PACE / config.learning_rate) * min(1.0, HOLDING_ROWS / max(rows, 1))
        return optimiser_of(network, precisions, config.learning_rate, held, config.embedding_decay)

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

    def _folds(
        self, network: Ranker, precisions: Precisions, asked: Visits | None, random: np.random.Generator
    ) -> list[Fold]:
        """Closed forms that have not seen the visits which strengths are chosen by, where the history is short.

        All of them, and the network itself, begin where the nights before those visits lead, so that their factors have
        their directions in common.
        """
        setting, rows = self.setting, self.setting.training.start_rows
        if asked is None or precisions.logarithm.shape[-1] == 0:
            return []
        earlier = newest(setting.rows, setting.visits.of_nights(0, int(asked.night.min()) - 1), rows)
        self._solve(network, earlier, SWEEPS)

        def solve(begun: Ranker, at: I64) -> None:
            # Of many rows those of earlier nights lead nearly there.
            self._solve(begun, at, MORE_SWEEPS if len(at) > FEW_ROWS else SETTLING_SWEEPS)

        return dealt(setting, network, asked, solve, random)

    def _hold(
        self,
        network: Ranker,
        precisions: Precisions,
        fit: Visits,
        stop: Visits,
        folds: Sequence[Fold],
        random: np.random.Generator,
    ) -> str:
        """Estimate how strongly adapters are held; says what later nights, or other folds, changed about it."""
        setting = self.setting
        if precisions.logarithm.shape[-1] == 0:
            return "nothing is adapted"
        network.eval()
        with torch.no_grad():
            scorer, found = self._scorer(network), precisions()
            weighed = network.bent is None and network.matching is None
            if weighed:
                adaptation = Adaptation.of(network, setting.adapter)
                found = estimate(setting.ladder, fit, setting.material, scorer, found, adaptation, random)
            width = found.shape[-1]
            parts = {name: part for name, part in network.parts.items() if part.stop <= width}
            for name in sorted((FITTED | DRIFTING).intersection(parts)):
                found[0, :, parts[name]] = found[0, :, parts[name]].clamp_min(setting.adapter.precision)
            if folds:
                found, scales = cautious(found, parts, losses_by_visit(setting, folds, found))
            else:
                found, scales = scaled(found, parts, self._rehearsed(network, scorer, found, stop, random))
            precisions.logarithm.copy_(found.log())
        changed = ", ".join(f"{name} by {scale:g}" for name, scale in scales.items() if scale != 1)
        how = "precisions by evidence" if weighed else "precisions as configured"
        where = "across folds" if folds else "on the stop nights"
        return how + (f", scaled {where} ({changed})" if changed else "")

    def _scorer(self, network: Ranker) -> Scorer:
        """The network as it is; its answers are remembered where they are few."""
        scorer, rows = self.setting.material.scorer(network), len(self.setting.rows)
        few = rows * (network.width if network.bent is None else network.joint_inputs) <= REMEMBERED
        return remembered(scorer, rows) if few else scorer

    def _rehearsed(
        self, network: Ranker, scorer: Scorer, like: Tensor, stop: Visits, random: np.random.Generator
    ) -> Callable[[Tensor], float]:
        """Loss on the stop nights, or on some of their visits where they are many, as a function of precisions."""
        if len(stop) > MOST_USERS:
            stop = stop.take(np.sort(random.choice(len(stop), MOST_USERS, replace=False)))
        return self.losses.rehearsed(scorer, like, Adaptation.of(network, self.setting.adapter), stop)

    def _solve(self, network: Ranker, at: I64, sweeps: int) -> None:
        """Solve the closed forms of the start on rows at positions."""
        setting = self.setting
        counts = counts_by_age(np.asarray(setting.rows.night)[at], setting.training.half_life_nights)
        worth = [objective.weight for objective in setting.data.objectives]
        solve_start(network, setting.material, at, setting.adapter, sweeps, counts, worth)

    def refreshed(self, network: Ranker, precisions: Precisions, plan: Plan) -> Base:
        """The base with its closed forms solved once more on every night of the history.

        The stop nights have said how long to train; that they are never learned from would leave the base older than
        any baseline.
        """
        setting = self.setting
        at = newest(setting.rows, setting.visits, setting.training.start_rows)
        self._solve(network, at, MORE_SWEEPS)
        return Base(network.eval(), precisions, setting.levels, setting.adapter, plan.through, plan.begun_on)
