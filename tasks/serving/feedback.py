"""Feedback in a request: what its user has just done, checked and filled up to the tensors that a release takes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from tasks.errors import RequestRejected
from tasks.release.manifest import InputSpec, Objective
from tasks.serving.columns import Arrays, read_column, require_same_rows, rows_of, shielded

LARGEST = 1e6
"""Where a contract says nothing: a label of a rating is no larger. Stars, minutes and prices are smaller, and what is
solved from a label is squared in float32, which has seven digits and ends at 3e38."""
Bounds = tuple[float, float]
"""Of an objective the smallest and the largest label."""


def bounds_of(objective: Objective) -> Bounds:
    """Between what labels of feedback lie: what the contract says, else `LARGEST` from zero or from its other bound.

    >>> bounds_of(Objective("stars", "rating", 1.0, 5.0)), bounds_of(Objective("seconds", "rating", minimum=0.0))
    ((1.0, 5.0), (0.0, 1000000.0))
    """
    low, high = objective.minimum, objective.maximum
    if low is None:
        low = -LARGEST if high is None else min(high, 0.0) - LARGEST
    return low, max(low, 0.0) + LARGEST if high is None else high


def read_feedback(
    specs: Sequence[InputSpec],
    request: Mapping[str, object],
    requests: int,
    binary: Sequence[bool],
    bounds: Sequence[Bounds] = (),
) -> Arrays:
    """Check feedback and give its columns their types.

    Of every column a value is a list with one entry per row, newest first, None or empty for a request without any; of
    longer ones the newest rows are taken. Arrays may be filled up: a row without any label is none.

    Args:
        specs: the inputs of the feedback: a candidate's columns, then a label per objective.
        request: column name to values; what is no feedback is not looked at.
        requests: R.
        binary: of each objective, whether its labels are 0 and 1.
        bounds: of each objective, between what its labels lie; of golden requests none, whatever is finite goes.

    Returns:
        Arrays by column, [R, F] and of lists [R, F, V]; empty where nobody brings a row with a label.

    Raises:
        RequestRejected: names the column, what came, and what was expected.
    """
    brought = {spec.name: request[spec.name] for spec in specs if request.get(spec.name) is not None}
    if not brought:
        return {}
    if lacking := [spec.name for spec in specs if spec.name not in brought]:
        raise RequestRejected(
            f"the request brings feedback in {', '.join(brought)} and lacks {', '.join(lacking)}; give every column "
            f"of the feedback, None where a value is missing, or none of them"
        )
    arrays: Arrays = {spec.name: shielded(spec, partial(_filled, spec, brought[spec.name], requests)) for spec in specs}
    require_same_rows(brought, "feedback", "rows")
    labels = {spec.name: arrays[spec.name] for spec in specs[len(specs) - len(binary) :]}
    between = bounds or [(-np.inf, np.inf)] * len(binary)
    for (name, values), chance, limits in zip(labels.items(), binary, between, strict=True):
        _require_labels(name, values, chance, limits)
    return arrays if any((~np.isnan(values)).any() for values in labels.values()) else {}


def _filled(spec: InputSpec, values: object, requests: int) -> npt.NDArray[np.generic]:
    """A column's newest rows, as long as the longest request's."""
    cells = rows_of(spec.name, values)
    if len(cells) != requests:
        raise RequestRejected(
            f"column {spec.name!r} has feedback of {len(cells)} requests, expected {requests}; give None for a request "
            f"without any"
        )
    plain = replace(spec, per="candidate", of=None, rows=None, optional=False)
    if isinstance(values, np.ndarray) and values.ndim == len(spec.shape):
        return read_column(plain, values[:, : spec.rows])
    newest = [cell[: spec.rows] for cell in cells]
    longest = max((len(cell) for cell in newest), default=0)
    if not longest:
        shape = (requests, 0) if spec.values is None else (requests, 0, spec.values)
        return np.zeros(shape, spec.dtype.replace("string", "object"))
    return read_column(plain, [[*cell, *[None] * (longest - len(cell))] for cell in newest])


def _require_labels(name: str, values: npt.NDArray[np.generic], binary: bool, limits: Bounds) -> None:
    """Refuse labels that are no numbers, out of bounds, or of a binary objective neither 0 nor 1; NaN is a missing one.

    Bounds are rounded to float32 as labels were, so that a label may be just as large as its bound.
    """
    given = ~np.isnan(values)
    with np.errstate(over="ignore"):
        low, high = np.array(limits).astype(np.float32)
    good = np.isin(values, (0.0, 1.0)) if binary else np.isfinite(values) & (values >= low) & (values <= high)
    wrong = given & ~good
    if wrong.any():
        request, row = np.argwhere(wrong)[0].tolist()
        bounded = f"a number from {low:.9g} to {high:.9g}" if np.isfinite((low, high)).all() else "a finite number"
        raise RequestRejected(
            f"column {name!r} holds the label {values[request, row]} in row {row} of request {request}, expected "
            f"{'0 or 1' if binary else bounded}, or None where it is missing"
        )
