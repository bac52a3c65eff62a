"""Exams of many nights side by side: every method per night and pooled, as a whole and by slices of the rows.

A slice says whose rows they are: by how many rows had supported the user's weights, by whether user and item were
known, and the rows after each user's 20th, which every size of first contact has in common.

Shapes: N rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data.contract import DataConfig, ObjectiveConfig
from tasks.learning.exams import CANDIDATE, COMMON, CONDITIONS, PARENT, SUPPORTS
from tasks.learning.intervals import F64, Interval, paired_intervals, sum_by_user
from tasks.release.evidence import figures, losses

ADAPTED = "adapted"
"""What a person calls the candidate."""
POOLED = "pooled"
"""Stands where a night's date would."""
EVERYTHING, COMMON_ROWS = "all", f"after the {COMMON}th row"
BY_SUPPORT = {"support 0": (0, 0), "support 1-5": (1, 5), "support 6-20": (6, 20), "support 21+": (21, None)}
"""Support rows of the user, from and to."""
BY_NOVELTY = {
    "new user": (True, False),
    "new item": (False, True),
    "new user and item": (True, True),
    "both known": (False, False),
}
"""Whether the user is new, and whether the item is; each row is in exactly one of these slices."""
SLICES = (EVERYTHING, *BY_SUPPORT, *BY_NOVELTY, COMMON_ROWS)
GIVEN = dict(zip(CONDITIONS, (0, *SUPPORTS), strict=True))
"""Same-night support rows of each exam."""

Mask = npt.NDArray[np.bool_]
Progress = Callable[[float, float | None, str], None]


@dataclass(frozen=True)
class Line:
    """One method on some rows of one exam; figures are None where they are undefined or of another kind of objective.

    Attributes:
        exam: `nightly` or `contact k`.
        slice: which rows, one of `SLICES`.
        method: `adapted`, a baseline or zero steps.
        objective: which.
        night: its date, or `pooled`.
        rows: rows with label and prediction.
        users: their users.
        user_nights: their users, counted anew each night; AUC and NDCG are means over these.
        log_loss: per row, of a binary objective.
        rmse: of a rating.
        auc: area under the curve.
        ndcg: NDCG@10.
        calibration: expected calibration error.
        difference: loss of `adapted` minus this method's per row: log-loss, or squared error of a rating.
        low: lower 95 % bound, bootstrapped by user; None where there are too few to tell.
        high: upper bound.
    """

    exam: str
    slice: str
    method: str
    objective: str
    night: str
    rows: int
    users: int
    user_nights: int
    log_loss: float | None
    rmse: float | None
    auc: float | None
    ndcg: float | None
    calibration: float | None
    difference: float | None
    low: float | None
    high: float | None

    @property
    def loss(self) -> float:
        """The figure that methods are ordered by: log-loss or RMSE."""
        found = self.log_loss if self.log_loss is not None else self.rmse
        return float("inf") if found is None else found


_TYPES: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64()}
SCHEMA = pa.schema([(one.name, _TYPES.get(one.type, pa.float64())) for one in fields(Line)])


def compared(
    tables: Mapping[str, pa.Table],
    data: DataConfig,
    max_support: int,
    seed: int,
    progress: Progress = lambda done, total, unit: None,
) -> list[Line]:
    """Every method in every exam and slice: each night by itself, then all of them pooled.

    Args:
        tables: exam tables by night, in order.
        data: the contract.
        max_support: most rows that a user's weights are solved from.
        seed: of the bootstrap by user.
        progress: called with (exams done, exams in all, "exams"): one per objective, condition and night.

    Returns:
        Lines by objective, exam, slice, night and method, adapted first; none where a slice has no rows.
    """
    parts = [_listed(table, night) for night, table in tables.items()]
    nights = dict(zip(tables, parts, strict=True)) | {POOLED: pa.concat_tables(parts, promote_options="default")}
    lines: list[Line] = []
    sittings = list(product(data.objectives, CONDITIONS, nights.items()))
    for done, (objective, exam, (night, table)) in enumerate(sittings, start=1):
        for name, mask in slices(table, GIVEN[exam], max_support).items():
            if mask.any():
                lines += _lines(table.filter(pa.array(mask)), exam, name, night, objective, seed)
        progress(done, len(sittings), "exams")
    return lines


def slices(table: pa.Table, given: int, max_support: int) -> dict[str, Mask]:
    """Which rows [N] of an exam table are in which slice.

    Args:
        table: an exam table.
        given: support rows that each user is given of the night itself.
        max_support: most rows that a user's weights are solved from.
    """
    history, item_history, at = (table[name].to_numpy() for name in ("history", "item_history", "at"))
    support = np.minimum(history + given, max_support)
    chosen: dict[str, Mask] = {EVERYTHING: np.ones(len(at), bool)}
    for name, (least, most) in BY_SUPPORT.items():
        chosen[name] = (support >= least) & (support <= (max_support if most is None else most))
    for name, (user, item) in BY_NOVELTY.items():
        chosen[name] = ((history == 0) == user) & ((item_history == 0) == item)
    return chosen | {COMMON_ROWS: at >= COMMON}


def save(lines: Sequence[Line], path: Path) -> None:
    """Write the lines as one Parquet table, a column per field; equal lines give equal bytes."""
    columns = {name: [getattr(line, name) for line in lines] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def load(path: Path) -> list[Line]:
    """Read what `save` wrote."""
    return [Line(**row) for row in pq.read_table(path).to_pylist()]


def _listed(table: pa.Table, night: str) -> pa.Table:
    """The table with `list`: the user's list of that night. Scores of two nights, by two models, are not compared."""
    lists = pc.binary_join_element_wise(table["user"].cast(pa.string()), night, "@")
    return table.append_column("list", lists)


def _lines(table: pa.Table, exam: str, name: str, night: str, objective: ObjectiveConfig, seed: int) -> Iterator[Line]:
    """The lines of some rows of an exam."""
    told = figures(table.drop_columns(["user"]).rename_columns({"list": "user"}), exam, objective)
    told.pop(PARENT, None)
    users = table["user"].to_numpy(zero_copy_only=False).astype(str)
    against = _against({method: losses(table, exam, method, objective) for method in told}, users, seed)
    for method, one in sorted(told.items(), key=lambda entry: (entry[0] != CANDIDATE, entry[0])):
        if not one["rows"]:
            continue
        bounds = against[method].as_json() if method != CANDIDATE else {}
        yield Line(
            exam=exam,
            slice=name,
            method=ADAPTED if method == CANDIDATE else method,
            objective=objective.name,
            night=night,
            rows=int(one["rows"]),
            users=against[method].users,
            user_nights=int(one["users"] or 0),
            log_loss=one.get("log_loss"),
            rmse=one.get("rmse"),
            auc=one.get("auc"),
            ndcg=one.get("ndcg_at_10"),
            calibration=one.get("calibration_error"),
            difference=bounds.get("estimate"),
            low=bounds.get("low"),
            high=bounds.get("high"),
        )


def _against(loss: Mapping[str, F64], users: npt.NDArray[np.str_], seed: int) -> dict[str, Interval]:
    """The candidate's loss minus each method's on the rows that both predicted, and minus its own.

    Methods that predicted the same rows, as nearly always all of them did, share one set of resampled users.
    """
    alike: dict[bytes, list[str]] = {}
    for method, each in loss.items():
        alike.setdefault(np.isnan(each).tobytes(), []).append(method)
    found: dict[str, Interval] = {}
    for together in alike.values():
        differences = np.column_stack([loss[CANDIDATE] - loss[method] for method in together])
        found |= dict(zip(together, paired_intervals(sum_by_user(users, differences), seed), strict=True))
    return found
