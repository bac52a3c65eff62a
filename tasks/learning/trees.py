"""Gradient-boosted trees on what is known about a row before its night, by LightGBM (the optional extra `trees`).

They read what the regression reads, and the ids of every categorical column. A user has no part in them beyond his
as-of statistics: his rows of the same night change nothing. Ke et al., LightGBM: A Highly Efficient Gradient Boosting
Decision Tree, 2017.

Shapes: N rows, T positions, F numbers, C categorical columns, K objectives.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.data.columns import F32, Rows
from tasks.errors import InvalidConfig
from tasks.learning.material import I64, Material
from tasks.learning.regression import numbers_of
from tasks.learning.solvers import ObjectiveKind

MOST_IDS = 1 << 24
"""Ids that a float32 tells apart; those beyond are as good as unknown."""


def library() -> Any:
    """LightGBM.

    Raises:
        InvalidConfig: it is not installed, or lacks a library of the system (OpenMP).
    """
    try:
        import lightgbm
    except (ImportError, OSError) as error:
        raise InvalidConfig(
            f"baselines.trees is true, but LightGBM cannot be loaded ({error}); install it with "
            "pip install 'nightrank[trees]', or set baselines.trees to false"
        ) from error
    return lightgbm


def table_of(rows: Rows, at: I64) -> F32:
    """What the trees read at positions: numbers, then ids of request and candidate, [T, F + C], NaN where missing."""
    ids = np.concatenate([rows.request_ids[at], rows.candidate_ids[at]], axis=1)
    categories = np.where((ids > 0) & (ids < MOST_IDS), ids, np.nan).astype(np.float32)
    return np.concatenate([numbers_of(rows, at), categories], axis=1)


class Trees:
    """One booster per objective, on one thread and with fixed seeds, so that equal rows give equal trees.

    Args:
        material: the rows.
        at: positions that are fitted on [N]; all of them are in memory at once.
        kinds: kind of each objective.
        rounds: trees of each booster.
        leaves: leaves of each tree.
        rate: how much of a tree's answer is added.
        leaf_rows: fewest rows of a leaf.
        seed: of everything that LightGBM draws.

    Raises:
        InvalidConfig: LightGBM is not installed.
    """

    def __init__(
        self,
        material: Material,
        at: I64,
        kinds: Sequence[ObjectiveKind],
        *,
        rounds: int,
        leaves: int,
        rate: float,
        leaf_rows: int,
        seed: int,
    ) -> None:
        self.material = material
        lightgbm, rows = library(), material.rows
        table = table_of(rows, at)
        categorical = list(
            range(table.shape[1] - rows.request_ids.shape[1] - rows.candidate_ids.shape[1], table.shape[1])
        )
        labels, weights = np.asarray(rows.labels)[at], np.asarray(rows.weights)[at]
        self.boosters: list[Any] = []
        """One per objective; None where no row has a label."""
        for objective, kind in enumerate(kinds):
            given = ~np.isnan(labels[:, objective])
            if not given.any():
                self.boosters.append(None)
                continue
            params = {
                "objective": "binary" if kind == "binary" else "regression",
                "num_leaves": leaves,
                "learning_rate": rate,
                "min_data_in_leaf": leaf_rows,
                "seed": seed,
                "num_threads": 1,
                "deterministic": True,
                "force_row_wise": True,
                "verbosity": -1,
            }
            data = lightgbm.Dataset(
                table[given], labels[given, objective], weight=weights[given], categorical_feature=categorical
            )
            self.boosters.append(lightgbm.train(params, data, num_boost_round=rounds))

    def predictions(self, at: I64, otherwise: Tensor) -> Tensor:
        """Probabilities (values of ratings) of positions ``[T, K]``; `otherwise` [T, K] where there are no trees."""
        table = table_of(self.material.rows, at)
        columns = [
            otherwise[:, objective]
            if booster is None or len(at) == 0
            else torch.from_numpy(booster.predict(table, num_threads=1)).to(otherwise)
            for objective, booster in enumerate(self.boosters)
        ]
        return torch.stack(columns, dim=1)
