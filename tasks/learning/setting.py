"""What every part of a training reads: the config's sections, the rows, and what is looked up in both."""

from dataclasses import dataclass
from datetime import date
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tasks.data.columns import Rows
from tasks.data.contract import DataConfig, SegmentsConfig
from tasks.learning.adapters import AdapterConfig
from tasks.learning.episodes import counts_by_age, counts_by_group
from tasks.learning.ladder import Ladder, learned_levels
from tasks.learning.material import Material, Visits, visits_of
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.learning.training_config import TrainingConfig


@dataclass(frozen=True)
class Setting:
    """One training's inputs.

    Attributes:
        data: the contract.
        segments: the ladder.
        ranker: the network.
        adapter: the adapters that it is trained for.
        training: how.
        rows: history; rows of `night` and later are not read.
        shape: sizes of the network.
        night: the night that the base is for; combined with the seed.
        device: `cpu` or `cuda`.
    """

    data: DataConfig
    segments: SegmentsConfig
    ranker: RankerConfig
    adapter: AdapterConfig
    training: TrainingConfig
    rows: Rows
    shape: RankerShape
    night: date
    device: str = "cpu"

    @cached_property
    def ladder(self) -> Ladder:
        """Who supports whom."""
        return Ladder(self.rows, self.segments, self.data.user)

    @cached_property
    def levels(self) -> tuple[tuple[str, ...], ...]:
        """Columns of the levels that have precisions, finest first."""
        return learned_levels(self.segments, self.data.user)

    @cached_property
    def material(self) -> Material:
        """The rows as tensors on the device."""
        return Material(self.rows, self.device)

    @cached_property
    def visits(self) -> Visits:
        """The visits of the nights before this one."""
        return visits_of(self.rows).of_nights(0, self.night.toordinal() - 1)

    @cached_property
    def objectives(self) -> Tensor:
        """Weight of each objective ``[K]``."""
        return torch.tensor([objective.weight for objective in self.data.objectives], device=self.device)

    def chances(self, visits: Visits) -> npt.NDArray[np.float64] | None:
        """How likely each visit is an episode, relative to the others [V]; None where all are alike."""
        training = self.training
        counts = counts_by_age(visits.night, training.half_life_nights)
        if training.even is None:
            return counts
        column = self.data.named("request", "categorical").index(training.even)
        shares = counts_by_group(np.asarray(self.rows.request_ids[visits.rows.start, column]), training.evenness)
        return shares if counts is None else shares * counts
