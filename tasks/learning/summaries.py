"""Every figure of a method on an exam, by name, as JSON knows them: None where one is undefined."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.learning.metrics import (
    FloatArray,
    auc_by_user,
    calibration_error,
    decisions,
    log_loss,
    mean_absolute_error,
    ndcg_by_user,
    ratio,
    root_mean_squared_error,
)


def binary_summary(
    labels: FloatArray, probabilities: FloatArray, users: NDArray[Any], ties: NDArray[Any]
) -> dict[str, float | None]:
    """Every figure of a binary objective; None where one is undefined.

    Args:
        labels: [N] 0 or 1, NaN where missing.
        probabilities: [N] predicted probability of 1.
        users: [N] whose row it is.
        ties: [N] a digest of each row that knows nothing of labels.

    >>> for name, value in binary_summary(np.array([1.0, 0]), np.array([0.8, 0.4]), np.ones(2), np.arange(2)).items():
    ...     print(name, round(value, 4))
    rows 2
    users 1
    log_loss 0.367
    calibration_error 0.3
    auc 1.0
    auc_users 1
    ndcg_at_10 1.0
    ndcg_users 1
    accuracy 1.0
    precision 1.0
    recall 1.0
    f1 1.0
    """
    known = ~np.isnan(labels)
    ranked, listed = auc_by_user(labels, probabilities, users), ndcg_by_user(labels, probabilities, users, ties)
    called = decisions(labels, probabilities)
    return _defined(
        {
            "rows": int(known.sum()),
            "users": len(np.unique(users[known])),
            "log_loss": ratio(float(np.nansum(log_loss(labels, probabilities))), int(known.sum())),
            "calibration_error": calibration_error(labels, probabilities),
            "auc": ranked.mean,
            "auc_users": len(ranked.users),
            "ndcg_at_10": listed.mean,
            "ndcg_users": len(listed.users),
            "accuracy": called.accuracy,
            "precision": called.precision,
            "recall": called.recall,
            "f1": called.f1,
        }
    )


def rating_summary(labels: FloatArray, predictions: FloatArray, users: NDArray[Any]) -> dict[str, float | None]:
    """Every figure of a rating objective; None where one is undefined.

    >>> rating_summary(np.array([3.0, 5.0, np.nan]), np.array([4.0, 12.0, 1.0]), np.array([1, 1, 2]))
    {'rows': 2, 'users': 1, 'mae': 4.0, 'rmse': 5.0}
    """
    known = ~np.isnan(labels)
    return _defined(
        {
            "rows": int(known.sum()),
            "users": len(np.unique(users[known])),
            "mae": mean_absolute_error(labels, predictions),
            "rmse": root_mean_squared_error(labels, predictions),
        }
    )


def _defined(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in figures.items()}
