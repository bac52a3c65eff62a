"""The epochs of one descent: gradient steps, the average of the weights, the stop loss, the checkpoint."""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from tasks.errors import TrainingDiverged
from tasks.learning.adapters import Precisions
from tasks.learning.averaging import blend, share_kept
from tasks.learning.checkpoint import Checkpoint, Point, TrainingState, Weights
from tasks.learning.descent import pull_back
from tasks.learning.episodes import draw
from tasks.learning.initialisation import FITTED, Initialisation, Plan
from tasks.learning.losses import Losses
from tasks.learning.material import Visits
from tasks.learning.networks import Ranker
from tasks.learning.outer import reptile
from tasks.learning.scalars import Scalars
from tasks.learning.setting import Setting
from tasks.learning.starts import SOLVED

Report = Callable[[float, float | None, str], None]
"""Called as ``report(done, total or None, unit)``."""

MOST_SETBACKS, SLOWER = 3, 0.1
"""How often a descent goes back to its best epoch before it ends there, and how much slower it goes on each time."""
LONGER = 3
"""How many times longer a descent is waited for that has to find what its adapters read, until it first does."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Descended:
    """Where a descent ended, before the closed forms are solved once more.

    Attributes:
        best: what did best on the stop nights.
        curve: per epoch: number, mean training loss, stop loss.
        epoch: the epoch that did best.
        how: how it started.
        plan: what it started from, read and was stopped on.
    """

    best: Weights
    curve: tuple[Point, ...]
    epoch: int
    how: str
    plan: Plan

    @property
    def loss(self) -> float:
        """The lowest stop loss."""
        return min(stop for _, _, stop in self.curve)


class Descent:
    """One descent from start to end.

    Args:
        setting: what it reads.
        initialisation: makes the weights.
        losses: what it minimises, and what it is stopped on.
        report: progress.
        checkpoint: where it keeps its checkpoint.
        scalars: where its numbers go.
        keep_end: whether its end is kept as a checkpoint too, for a training of which this is a part.
    """

    def __init__(
        self,
        setting: Setting,
        initialisation: Initialisation,
        losses: Losses,
        report: Report,
        checkpoint: Checkpoint,
        scalars: Scalars,
        keep_end: bool = False,
    ) -> None:
        self.setting, self.initialisation, self.losses, self.report = setting, initialisation, losses, report
        self.checkpoint, self.scalars, self.keep_end = checkpoint, scalars, keep_end

    def run(self, plan: Plan, seed: int) -> Descended:
        """Go from where the plan starts, or from the checkpoint, to where the stop loss falls no more.

        Args:
            plan: what to start from, train on and stop on.
            seed: of the episodes.

        An epoch that leaves the finite numbers is taken back: the descent goes on from the best one, slower.

        Raises:
            TrainingDiverged: the loss that it starts with is not finite.
        """
        random, config = np.random.default_rng(seed), self.setting.training
        state = self._resumed(random)
        fresh = state is None
        if state is None:
            state = self.initialisation.begun(plan, random)
        self._tell_start(state, fresh)
        chances = self.setting.chances(plan.fit)
        saved, saved_epoch = time.monotonic(), -1 if fresh else state.epoch
        while (
            state.epoch < config.epochs
            and state.epoch - max(state.kept, 0) < config.patience * (LONGER if _unheard(state) else 1)
            and state.setbacks <= MOST_SETBACKS
        ):
            try:
                told = self._epoch(state, plan, chances)
            except (TrainingDiverged, LinAlgError) as error:
                logger.warning("epoch %s of night %s is taken back: %s", state.epoch + 1, self.setting.night, error)
                state.set_back(self.initialisation.optimiser(*state.weights))
                if state.silenced is not None:
                    self.initialisation.loosen(state)
                continue
            self.scalars.write(state.epoch, _losses_at(state.curve[-1]) | told)
            if time.monotonic() - saved >= config.checkpoint_seconds:
                self.checkpoint.save(state.dump())
                saved, saved_epoch = time.monotonic(), state.epoch
            self.report(state.epoch, config.epochs, "epochs")
        if self.keep_end and saved_epoch < state.epoch:
            self.checkpoint.save(state.dump())
        self.report(config.epochs, config.epochs, "epochs")
        return Descended(state.best, tuple(state.curve), state.kept, state.how + _taken_back(state), plan)

    def _epoch(self, state: TrainingState, plan: Plan, chances: npt.NDArray[np.float64] | None) -> dict[str, float]:
        """One epoch, with its point of the curve; what else there is to tell of it.

        Raises:
            TrainingDiverged: a loss or a gradient is not finite.
            LinAlgError: an adapter's system of equations is not.
        """
        config, begun = self.setting.training, time.monotonic()
        (network, precisions), average = state.weights, state.average
        losses: list[float] = []
        norms: list[float] = []
        for step in range(state.epoch * config.steps_per_epoch, (state.epoch + 1) * config.steps_per_epoch):
            for group in state.optimiser.param_groups:
                ramp = min(1.0, (step + 1) / config.steps_per_epoch)
                group["lr"] = group["peak"] * SLOWER**state.setbacks * ramp
            loss, norm = self._step(network, precisions, state.optimiser, plan.fit, chances, state.random)
            losses.append(loss)
            norms.append(norm)
            if plan.start is not None and config.pull > 0:
                pull_back(network, plan.start.network, config.pull, SOLVED)
            keep = share_kept(config, step)
            blend(average[0], network, keep)
            blend(average[1], precisions, keep)
        scored = self.initialisation.settled(state, plan.stop)
        state.curve.append((state.epoch + 1, sum(losses) / len(losses), self.losses.of_stop(*scored, plan.stop)))
        state.keep_best(scored)
        return {
            "learning rate": state.optimiser.param_groups[0]["lr"],
            "gradient norm": sum(norms) / len(norms),
            "seconds": time.monotonic() - begun,
        }

    def _tell_start(self, state: TrainingState, fresh: bool) -> None:
        self.scalars.begin(state.curve[0][0] if fresh else state.epoch + 1)
        for point in state.curve if fresh else ():
            self.scalars.write(point[0], _losses_at(point))

    def _resumed(self, random: np.random.Generator) -> TrainingState | None:
        """Where an earlier run of this very training stood when it was last saved, if that can be read."""
        data = self.checkpoint.load()
        if data is None:
            return None
        before = random.bit_generator.state, torch.get_rng_state()
        weights = self.initialisation.fresh()
        average, best = copy.deepcopy(weights), copy.deepcopy(weights)
        state = TrainingState(weights, average, best, self.initialisation.optimiser(*weights), random, [], "")
        try:
            state.restore(data)
        except ValueError as error:
            logger.warning(
                "the checkpoint of night %s is left aside: %s; training begins anew", self.setting.night, error
            )
            random.bit_generator.state, generator = before
            torch.set_rng_state(generator)
            return None
        state.how = f"{state.how}; resumed after epoch {state.epoch}"
        return state

    def _step(
        self,
        network: Ranker,
        precisions: Precisions,
        optimiser: torch.optim.Optimizer,
        fit: Visits,
        chances: npt.NDArray[np.float64] | None,
        random: np.random.Generator,
    ) -> tuple[float, float]:
        """One gradient step; the adapted loss, and the gradient's length before it is cut to 1."""
        setting, training = self.setting, self.setting.training
        network.train()
        visits, after = draw(fit, training.visits_per_step, random, chances)
        optimiser.zero_grad()
        if training.outer == "reptile":
            told, slopes = reptile(
                *(setting.ladder, visits, network, setting.material, precisions(), setting.adapter),
                *(setting.objectives, training.base_weight),
            )
            for name, slope in slopes.items():
                network.get_parameter(name).grad = slope
        else:
            adapted, loss = self.losses.of_step(network, precisions, visits, after)
            told = adapted.item() if torch.isfinite(loss) else loss.item()
            loss.backward()  # type: ignore[no-untyped-call]
        if not np.isfinite(told):
            raise TrainingDiverged(
                f"the training loss of night {setting.night} is {told}; lower training.learning_rate (now "
                f"{training.learning_rate}) or look for extreme numbers among the inputs"
            )
        if precisions.logarithm.grad is not None:
            for name in FITTED.intersection(network.parts):
                precisions.logarithm.grad[:, :, network.parts[name]] = 0.0
        norm = float(nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0))
        if not np.isfinite(norm):
            raise TrainingDiverged(f"the gradient of night {setting.night} has the length {norm}")
        optimiser.step()
        return told, norm


def _losses_at(point: Point) -> dict[str, float]:
    """A point of the curve by name."""
    _, trained, stop = point
    return {"stop loss": stop} | ({} if trained is None else {"training loss": trained})


def _unheard(state: TrainingState) -> bool:
    """Whether features that said nothing at the start have led to nothing better yet."""
    return state.silenced is not None and state.kept < 1


def _taken_back(state: TrainingState) -> str:
    if not state.setbacks:
        return ""
    ended = ", and it ended with the best before" if state.setbacks > MOST_SETBACKS else ""
    return (
        f"; {state.setbacks} epoch(s) left the finite numbers and were taken back{ended}; lower training.learning_rate"
    )
