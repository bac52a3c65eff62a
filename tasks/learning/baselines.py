"""Baselines: what any adaptation has to beat, each with the same support as the candidate.

Global rate and popularity know no user. Bias + offset and matrix factorisation have a user part, solved by the same
closed form from the same support windows as the candidate's adapters; item-kNN reads these windows, too. Logistic
regression and boosted trees know a user by his as-of statistics. Everything is fitted on earlier nights.

Shapes: N rows, T query rows, K objectives.
"""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tasks.data.contract import Section
from tasks.learning.adapters import Adaptation, AdapterConfig
from tasks.learning.episodes import score_visits
from tasks.learning.factorisation import Factorisation, held_but_own, item_rate
from tasks.learning.ladder import Ladder
from tasks.learning.material import I64, Material, Visits
from tasks.learning.neighbours import ItemKnn
from tasks.learning.regression import Regression
from tasks.learning.solvers import ObjectiveKind
from tasks.learning.trees import Trees, library

POPULARITY, FACTORISATION = "popularity", "matrix factorisation"


class BaselinesConfig(Section):
    """How strong the baselines are held, and what they may cost; chosen on nights before those that are reported."""

    offset_strength: Annotated[float, Field(gt=0)] = 6.0
    """Precision of a user's offset, in rows."""
    factors: Annotated[int, Field(ge=1, le=256)] = 4
    """Factors of the matrix factorisation."""
    factor_strength: Annotated[float, Field(gt=0)] = 4.0
    """Precision of its factors and user biases, in rows."""
    sweeps: Annotated[int, Field(ge=1)] = 10
    """Passes of alternating least squares."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of its first factors, and of the trees."""
    neighbours: Annotated[int, Field(ge=1, le=4096)] = 500
    """Neighbours that item-kNN keeps per item."""
    neighbour_shrinkage: Annotated[float, Field(gt=0)] = 20.0
    """Shrinkage of its similarities, in users."""
    neighbour_mass: Annotated[float, Field(gt=0)] = 0.5
    """Shrinkage of its mean residuals, in rows of similarity 1."""
    neighbour_rows: Annotated[int, Field(ge=2)] = 500
    """Most rows of a user that its similarities are counted from, the newest: one who has seen everything would cost
    the square of it."""
    regression_strength: Annotated[float, Field(gt=0)] = 100.0
    """Precision of the coefficients of logistic regression, in rows."""
    regression_steps: Annotated[int, Field(ge=1)] = 12
    """Most Newton steps of it."""
    most_rows: Annotated[int, Field(ge=1)] = 1_000_000
    """Most rows that item-kNN and boosted trees are fitted on, the newest."""
    trees: bool = False
    """Whether boosted trees are among the baselines; they need the extra `trees` (LightGBM)."""
    tree_rounds: Annotated[int, Field(ge=1)] = 50
    """Boosted trees of each objective."""
    tree_leaves: Annotated[int, Field(ge=2, le=1024)] = 7
    """Leaves of a tree."""
    tree_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """How much of each tree's answer is added."""
    tree_leaf_rows: Annotated[int, Field(ge=1)] = 200
    """Fewest rows of a leaf."""

    def check(self) -> None:
        """Find out before a night begins whether what is asked for is installed.

        Raises:
            InvalidConfig: trees are asked for, and LightGBM is not installed.
        """
        if self.trees:
            library()


def global_rate(labels: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> Tensor:
    """Mean of every objective's labels [N, K] of earlier nights: probabilities or mean ratings [K].

    >>> global_rate(np.array([[1.0], [0.0], [np.nan], [1.0]], np.float32))
    tensor([0.6667])
    """
    return torch.from_numpy(np.nanmean(labels, axis=0, dtype=np.float64).astype(np.float32))


class Baselines:
    """Fits the baselines on the nights before one, and scores visits of that night.

    Args:
        config: strengths.
        ladder: the segments over the rows, of which the user's own is used.
        material: history and the night; only rows before `night` are fitted on.
        kinds: kind of each objective.
        night: ordinal of the night to be scored.

    Raises:
        InvalidConfig: trees are asked for, and LightGBM is not installed.
    """

    def __init__(
        self,
        config: BaselinesConfig,
        ladder: Ladder,
        material: Material,
        kinds: tuple[ObjectiveKind, ...],
        night: int,
    ) -> None:
        self.config, self.ladder, self.material, self.kinds = config, ladder, material, kinds
        rows = material.rows
        self._earlier: I64 = np.flatnonzero(np.asarray(rows.night) < night)
        self._rate = global_rate(np.asarray(rows.labels)[self._earlier]).to(material.device)
        self._factorisation = Factorisation(
            *(ladder, material, kinds, self._earlier),
            factors=config.factors,
            strength=config.factor_strength,
            sweeps=config.sweeps,
            seed=config.seed,
        )
        self._regression = Regression(
            material, self._earlier, kinds, config.regression_strength, config.regression_steps
        )
        newest = self._newest()
        self._trees = self._grow(newest) if config.trees else None
        self._knn = ItemKnn(
            *(ladder, material, kinds, newest),
            most=config.neighbours,
            shrinkage=config.neighbour_shrinkage,
            mass=config.neighbour_mass,
            user_rows=config.neighbour_rows,
        )

    def score(self, visits: Visits, after: I64) -> dict[str, tuple[I64, Tensor]]:
        """Scores of each visit's rows after its first `after`, by baseline.

        Returns:
            Positions [T], and probabilities (values of ratings) ``[T, K]``.
        """
        offset = score_visits(
            *(self.ladder, visits, after, self._popularity, self.material, self._held()),
            Adaptation(self.kinds, AdapterConfig(kind="bias")),
        )
        scores = {
            "global rate": self._rate.expand(len(offset.rows), -1),
            POPULARITY: self._probability(offset.base),
            "bias + offset": self._probability(offset.adapted),
        }
        scores[FACTORISATION] = self._probability(self._factorisation.scores(visits, after))
        scores["item-kNN"] = self._probability(self._knn.scores(visits, after))
        scores["logistic regression"] = self._probability(self._regression.scores(offset.rows))
        if self._trees is not None:
            scores["boosted trees"] = self._trees.predictions(offset.rows, scores[POPULARITY])
        return {name: (offset.rows, probability) for name, probability in scores.items()}

    def _held(self) -> Tensor:
        free = held_but_own(self.ladder, len(self.kinds), 1, self.config.offset_strength)
        return free.to(self.material.device)

    def _probability(self, scores: Tensor) -> Tensor:
        binary = torch.tensor([kind == "binary" for kind in self.kinds], device=scores.device)
        return torch.where(binary, torch.sigmoid(scores), scores)

    def _popularity(self, at: I64) -> tuple[Tensor, Tensor]:
        rate = item_rate(self.material, at, len(self.kinds))
        return rate, torch.ones_like(rate[:, :1])

    def _newest(self) -> I64:
        """Positions of the newest rows of earlier nights, in their order."""
        if len(self._earlier) <= self.config.most_rows:
            return self._earlier
        rows = self.material.rows
        by_time = np.lexsort((np.asarray(rows.tie)[self._earlier], np.asarray(rows.time)[self._earlier]))
        return np.sort(self._earlier[by_time[-self.config.most_rows :]])

    def _grow(self, at: I64) -> Trees:
        config = self.config
        return Trees(
            *(self.material, at, self.kinds),
            rounds=config.tree_rounds,
            leaves=config.tree_leaves,
            rate=config.tree_rate,
            leaf_rows=config.tree_leaf_rows,
            seed=config.seed,
        )
