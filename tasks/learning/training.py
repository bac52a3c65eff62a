"""Meta-training: the base is trained so that a few steps on a segment's support serve its later rows best.

By default the query loss flows back through the solve into embeddings, towers and precisions. Training starts in closed
form (or from the parent), reads nights before the stop nights, and keeps what did best on the stop nights.
"""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from tasks.data.columns import Rows
from tasks.data.contract import DataConfig, SegmentsConfig
from tasks.errors import NotEnoughHistory, TrainingDiverged
from tasks.learning.adapters import AdapterConfig, Precisions, check_width
from tasks.learning.base import Base, grow
from tasks.learning.checkpoint import Checkpoint, NoCheckpoint, Point, TrainingState
from tasks.learning.descent import blend, optimiser_of, pull_back
from tasks.learning.descent import steady as steady  # other verbs compute under it as well
from tasks.learning.episodes import QUERY_ROWS, counts_by_age, draw, row_loss, score_visits
from tasks.learning.ladder import Ladder, learned_levels
from tasks.learning.material import I64, Material, Scorer, Visits, remembered, visits_of
from tasks.learning.networks import Ranker, RankerConfig, RankerShape
from tasks.learning.outer import check_outer, reptile, thaw
from tasks.learning.priors import MOST_USERS, estimate, scaled
from tasks.learning.starts import SOLVED, newest, normalise, solve_start
from tasks.learning.training_config import TrainingConfig

STOP_SUPPORT = (0, 5, 20)
"""Same-night support rows at which the stop nights are scored: those of the exams."""
SWEEPS, MORE_SWEEPS = 10, 3
"""Passes of the factorisation from nothing, and from the parent's factors."""
FITTED = frozenset({"item factors", "category factors"})
"""Parts of the adapter features that are solved from the history: its rows overstate what they are worth, so training
leaves their precisions alone; the stop nights scale them where a chain of nights starts."""
DRIFTING = frozenset({"constant"})
"""Parts whose weights change from night to night more than the evidence of all nights together knows."""
REMEMBERED = 500_000
"""Most rows of a history whose scores are kept in memory while the precisions are looked for."""
REFRESHED = "its closed forms were solved once more on the whole history"
NO_CHECKPOINT = NoCheckpoint()
Report = Callable[[float, float | None, str], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What training made.

    Attributes:
        base: the best base by stop loss.
        curve: per epoch: number, mean training loss, stop loss. Epoch 0 is the closed-form start, epoch -1 the parent.
        epoch: the epoch that was kept.
        why: one sentence on how it started and ended.
    """

    base: Base
    curve: tuple[tuple[int, float | None, float], ...]
    epoch: int
    why: str


def meta_train(
    data: DataConfig,
    segments: SegmentsConfig,
    ranker: RankerConfig,
    adapter: AdapterConfig,
    training: TrainingConfig,
    rows: Rows,
    shape: RankerShape,
    night: date,
    parent: Base | None = None,
    device: str = "cpu",
    report: Report = lambda done, total, unit: None,
    checkpoint: Checkpoint = NO_CHECKPOINT,
) -> Trained:
    """Train a base for a night on the nights before it.

    Args:
        data: the contract.
        segments: the ladder.
        ranker: the network.
        adapter: the adapters that it is trained for.
        training: how.
        rows: history; rows of `night` and later are not read.
        shape: sizes of the network.
        night: the night that the base is for; combined with the seed.
        parent: the base to start from.
        device: `cpu` or `cuda`.
        report: progress, in epochs.
        checkpoint: keeps the checkpoint of this very training: of equal arguments, and nobody else's.

    Returns:
        The best base and its learning curve.

    Raises:
        NotEnoughHistory: rows of fewer than two nights.
        TrainingDiverged: the loss, or an adapter's system of equations, is not finite.
        InvalidConfig: a linear head without features, or an outer loop that does not fit the adapter.
    """
    check_outer(training.outer, adapter)
    seed = int(np.random.SeedSequence([training.seed, night.toordinal()]).generate_state(1)[0])
    with steady(seed, training.threads):
        run = _Run(data, segments, ranker, adapter, training, rows, shape, night, device, report, checkpoint)
        try:
            return run.train(parent, seed)
        except LinAlgError as error:
            # Numbers that are not finite reach the solver's factorisation before they reach a loss.
            raise TrainingDiverged(
                f"an adapter of night {night} cannot be solved: {error}; lower training.learning_rate (now "
                f"{training.learning_rate}) or look for extreme numbers among the inputs"
            ) from error


class _Run:
    """One training: what every part of it reads."""

    def __init__(
        self,
        data: DataConfig,
        segments: SegmentsConfig,
        ranker: RankerConfig,
        adapter: AdapterConfig,
        training: TrainingConfig,
        rows: Rows,
        shape: RankerShape,
        night: date,
        device: str,
        report: Report,
        checkpoint: Checkpoint,
    ) -> None:
        self.data, self.ranker, self.adapter, self.training = data, ranker, adapter, training
        self.rows, self.shape, self.night, self.device, self.report = rows, shape, night, device, report
        self.checkpoint = checkpoint
        self.ladder = Ladder(rows, segments, data.user)
        self.levels = learned_levels(segments, data.user)
        self.material = Material(rows, device)
        self.visits = visits_of(rows).of_nights(0, night.toordinal() - 1)
        self.weights = torch.tensor([objective.weight for objective in data.objectives], device=device)

    def train(self, parent: Base | None, seed: int) -> Trained:
        nights = np.unique(self.visits.night)
        if len(nights) < 2:
            raise NotEnoughHistory(
                f"night {self.night} has rows of {len(nights)} night(s) before it, and training needs 2: one to train "
                f"on and a later one to stop on; run a later night, or widen data.window_nights"
            )
        start = None if parent is None else self._usable(parent)
        how = "started in closed form" + ("" if parent is None else ": the parent's base does not fit")
        last = int(nights[-1 - min(self.training.stop_nights, len(nights) - 1)])
        if start is not None:
            through = start.trained_through.toordinal()
            seen = int(self.visits.of_nights(through + 1, int(nights[-1])).rows.lengths.sum())
            if seen < self.training.min_stop_rows:
                # Kept to the bit: a refresh would let these nights in, and they are to stop a later night's training.
                return Trained(
                    start,
                    (),
                    -1,
                    f"kept the parent's base: {seen} rows are newer than its training, and stopping on them needs "
                    f"training.min_stop_rows = {self.training.min_stop_rows}",
                )
            if through < int(nights[0]):
                start, how = None, f"{how}: none of the window's nights is as old as its training"
            else:
                last, how = through, f"started from the parent's base, trained through {start.trained_through}"
        fit, stop = self.visits.of_nights(int(nights[0]), last), self.visits.of_nights(last + 1, int(nights[-1]))
        return self._descend(start, fit, stop, date.fromordinal(int(nights[-1])), how, seed)

    def _usable(self, parent: Base) -> Base | None:
        """The parent's base, grown to tonight's vocabularies, if it is of the kind that the config asks for."""
        if (parent.network.config, parent.levels, parent.adapter) != (self.ranker, self.levels, self.adapter):
            return None
        if parent.trained_through >= self.night:
            return None
        grown = grow(parent, self.shape)
        return None if grown is None else grown.to(self.device)

    def _descend(self, start: Base | None, fit: Visits, stop: Visits, through: date, how: str, seed: int) -> Trained:
        random, config = np.random.default_rng(seed), self.training
        state = self._resumed(random) or self._begun(start, fit, stop, how, random)
        (network, precisions), average = state.weights, state.average
        chances = counts_by_age(fit.night, config.half_life_nights)
        saved = time.monotonic()
        while state.epoch < config.epochs and state.epoch - max(state.kept, 0) < config.patience:
            losses: list[float] = []
            for step in range(state.epoch * config.steps_per_epoch, (state.epoch + 1) * config.steps_per_epoch):
                for group in state.optimiser.param_groups:
                    group["lr"] = group["peak"] * min(1.0, (step + 1) / config.steps_per_epoch)
                losses.append(self._step(network, precisions, state.optimiser, fit, chances, random))
                if start is not None and config.pull > 0:
                    pull_back(network, start.network, config.pull, SOLVED)
                keep = min(config.average, (step + 1) / (step + 10))
                blend(average[0], network, keep)
                blend(average[1], precisions, keep)
            epoch = state.epoch + 1
            state.curve.append((epoch, sum(losses) / len(losses), self._stop_loss(*average, stop)))
            state.keep_best()
            if time.monotonic() - saved >= config.checkpoint_seconds:
                self.checkpoint.save(state.dump())
                saved = time.monotonic()
            self.report(epoch, config.epochs, "epochs")
        self.report(config.epochs, config.epochs, "epochs")
        end = {-1: "kept the parent's base, which did best", 0: "kept the closed-form start, which did best"}
        why = f"{state.how}; {end.get(state.kept, f'kept epoch {state.kept}')} on the stop nights; {REFRESHED}"
        return Trained(self._refreshed(*state.best, through), tuple(state.curve), state.kept, why)

    def _begun(
        self, start: Base | None, fit: Visits, stop: Visits, how: str, random: np.random.Generator
    ) -> TrainingState:
        """Training before its first step: started in closed form, or from the parent's base."""
        at = newest(self.rows, fit, self.training.start_rows)
        curve: list[Point] = []
        if start is None:
            network, precisions = self._fresh()
            normalise(network, self.data, self.rows, at)
        else:
            network, precisions = copy.deepcopy(start.network), copy.deepcopy(start.precisions)
            curve.append((-1, None, self._stop_loss(network, precisions, stop)))
        best = copy.deepcopy(network), copy.deepcopy(precisions)
        self._solve(network, at, SWEEPS if start is None else MORE_SWEEPS)
        if start is None:
            how = f"{how}; {self._hold(network, precisions, fit, stop, random)}"
        curve.append((0, None, self._stop_loss(network, precisions, stop)))
        average = copy.deepcopy(network), copy.deepcopy(precisions)
        state = TrainingState(
            (network, precisions), average, best, self._optimiser(network, precisions), random, curve, how
        )
        state.keep_best()
        return state

    def _resumed(self, random: np.random.Generator) -> TrainingState | None:
        """Where an earlier run of this very training stood when it was last saved, if that can be read."""
        data = self.checkpoint.load()
        if data is None:
            return None
        before = random.bit_generator.state, torch.get_rng_state()
        weights = self._fresh()
        average, best = copy.deepcopy(weights), copy.deepcopy(weights)
        state = TrainingState(weights, average, best, self._optimiser(*weights), random, [], "")
        try:
            state.restore(data)
        except ValueError as error:
            logger.warning("the checkpoint of night %s is left aside: %s; training begins anew", self.night, error)
            random.bit_generator.state, generator = before
            torch.set_rng_state(generator)
            return None
        state.how = f"{state.how}; resumed after epoch {state.epoch}"
        return state

    def _fresh(self) -> tuple[Ranker, Precisions]:
        network = Ranker(self.shape, self.ranker).to(self.device)
        check_width(self.adapter, network.width)
        width = self.adapter.width(network.width)
        precisions = Precisions(len(self.levels), len(self.shape.kinds), width, self.adapter)
        return network, precisions.to(self.device)

    def _optimiser(self, network: Ranker, precisions: Precisions) -> torch.optim.Optimizer:
        config = self.training
        thaw(network, config.freeze)
        return optimiser_of(network, precisions, config.learning_rate, config.weight_decay, config.embedding_decay)

    def _hold(
        self, network: Ranker, precisions: Precisions, fit: Visits, stop: Visits, random: np.random.Generator
    ) -> str:
        """Estimate how strongly adapters are held; says what the stop nights changed about it."""
        if precisions.logarithm.shape[-1] == 0:
            return "nothing is adapted"
        network.eval()
        with torch.no_grad():
            scorer = self.material.scorer(network)
            if len(self.rows) <= REMEMBERED:
                scorer = remembered(scorer, len(self.rows))
            found = estimate(
                *(self.ladder, fit, self.material, scorer, precisions(), self.shape.kinds, self.adapter, random)
            )
            width = found.shape[-1]
            parts = {name: part for name, part in network.parts.items() if part.stop <= width}
            for name in sorted((FITTED | DRIFTING).intersection(parts)):
                found[0, :, parts[name]] = found[0, :, parts[name]].clamp_min(self.adapter.precision)
            few = stop
            if len(stop) > MOST_USERS:
                few = stop.take(np.sort(random.choice(len(stop), MOST_USERS, replace=False)))
            found, scales = scaled(found, parts, lambda tried: self._mean_stop_loss(scorer, tried, few))
            precisions.logarithm.copy_(found.log())
        changed = ", ".join(f"{name} by {scale:g}" for name, scale in scales.items() if scale != 1)
        return "precisions by evidence" + (f", scaled on the stop nights ({changed})" if changed else "")

    def _solve(self, network: Ranker, at: I64, sweeps: int) -> None:
        """Solve the closed forms of the start on rows at positions."""
        counts = counts_by_age(np.asarray(self.rows.night)[at], self.training.half_life_nights)
        solve_start(network, self.material, at, self.adapter, sweeps, counts)

    def _refreshed(self, network: Ranker, precisions: Precisions, through: date) -> Base:
        """The base with its closed forms solved once more on every night of the history.

        The stop nights have said how long to train; that they are never learned from would leave the base older than
        any baseline.
        """
        at = newest(self.rows, self.visits, self.training.start_rows)
        self._solve(network, at, MORE_SWEEPS)
        return Base(network.eval(), precisions, self.levels, self.adapter, through)

    def _step(
        self,
        network: Ranker,
        precisions: Precisions,
        optimiser: torch.optim.Optimizer,
        fit: Visits,
        chances: npt.NDArray[np.float64] | None,
        random: np.random.Generator,
    ) -> float:
        network.train()
        visits, after = draw(fit, self.training.visits_per_step, random, chances)
        optimiser.zero_grad()
        if self.training.outer == "reptile":
            told, slopes = reptile(
                *(self.ladder, visits, network, self.material, precisions(), self.adapter, self.weights),
                self.training.base_weight,
            )
            for name, slope in slopes.items():
                network.get_parameter(name).grad = slope
        else:
            adapted, loss = self._losses(network, precisions, visits, after)
            told = adapted.item() if torch.isfinite(loss) else loss.item()
            loss.backward()  # type: ignore[no-untyped-call]
        if not np.isfinite(told):
            raise TrainingDiverged(
                f"the training loss of night {self.night} is {told}; lower training.learning_rate (now "
                f"{self.training.learning_rate}) or look for extreme numbers among the inputs"
            )
        if precisions.logarithm.grad is not None:
            for name in FITTED.intersection(network.parts):
                precisions.logarithm.grad[:, :, network.parts[name]] = 0.0
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        return told

    def _losses(
        self, network: Ranker, precisions: Precisions, visits: Visits, after: I64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of visits after adaptation, and the one that is minimised."""
        scorer = self.material.scorer(network)
        if self.training.outer == "joint":
            at = visits.rows.flat()[0]
            loss = self._loss(scorer(at)[0], at)
            return loss, loss
        scores = score_visits(
            *(self.ladder, visits, after, scorer, self.material, precisions()),
            *(self.shape.kinds, self.adapter, QUERY_ROWS, self.training.outer == "first_order"),
        )
        adapted = loss = self._loss(scores.adapted, scores.rows)
        if self.training.base_weight > 0:
            loss = loss + self.training.base_weight * self._loss(scores.base, scores.rows)
        return adapted, loss

    def _loss(self, scores: torch.Tensor, at: I64) -> torch.Tensor:
        """Loss of scores of the rows at positions, weighed by row and by objective."""
        labels, mass = self.material.labels(at), self.material.weights(at)
        return row_loss(scores, labels, self.shape.kinds, self.weights, mass)

    def _stop_loss(self, network: Ranker, precisions: Precisions, stop: Visits) -> float:
        """Adapted loss on the stop nights, averaged over the supports of the exams."""
        network.eval()
        with torch.no_grad():
            loss = self._mean_stop_loss(self.material.scorer(network), precisions(), stop)
        if not np.isfinite(loss):
            raise TrainingDiverged(
                f"the stop loss of night {self.night} is {loss}; look for extreme numbers in the data"
            )
        return loss

    def _mean_stop_loss(self, scorer: Scorer, precisions: torch.Tensor, stop: Visits) -> float:
        losses: list[float] = []
        for support in STOP_SUPPORT:
            longer = stop.take(np.flatnonzero(stop.rows.lengths > support))
            if len(longer) == 0:
                continue
            scores = score_visits(
                *(self.ladder, longer, np.full(len(longer), support), scorer),
                *(self.material, precisions, self.shape.kinds, self.adapter),
            )
            losses.append(float(self._loss(scores.adapted, scores.rows)))
        return sum(losses) / len(losses)
