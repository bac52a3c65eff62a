"""Exams of many nights side by side: every method per night and pooled, as a whole and by slices of the rows.

A slice says whose rows they are: by how many rows had supported the user's weights, by whether user and item were
known, and the rows after each user's 20th, which every size of first contact has in common.

Shapes: N rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import inf, nan
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data.contract import DataConfig, ObjectiveConfig
from tasks.learning.exams import CANDIDATE, COMMON, CONDITIONS, PARENT, SUPPORTS
from tasks.learning.intervals import Interval, paired_intervals, sum_by_user
from tasks.release.evidence import figures, losses, ranked_apart

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
        auc_difference: AUC of `adapted` minus this method's, paired by user's night; above zero `adapted` ranks better.
        auc_low: lower 95 % bound, bootstrapped by user: all of a user's nights are drawn together.
        auc_high: upper bound.
        ndcg_difference: the same of NDCG@10.
        ndcg_low: lower bound.
        ndcg_high: upper bound.
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
    auc_difference: float | None
    auc_low: float | None
    auc_high: float | None
    ndcg_difference: float | None
    ndcg_low: float | None
    ndcg_high: float | None

    @property
    def loss(self) -> float:
        """The figure that methods are ordered by: log-loss or RMSE."""
        found = self.log_loss if self.log_loss is not None else self.rmse
        return float("inf") if found is None else found

    @property
    def apart(self) -> str:
        """The difference in loss and its bounds, for people; empty where there is none."""
        return _in_words(self.difference, self.low, self.high)

    @property
    def auc_apart(self) -> str:
        """The same of AUC."""
        return _in_words(self.auc_difference, self.auc_low, self.auc_high)

    @property
    def ndcg_apart(self) -> str:
        """The same of NDCG@10."""
        return _in_words(self.ndcg_difference, self.ndcg_low, self.ndcg_high)


def _in_words(difference: float | None, low: float | None, high: float | None) -> str:
    if difference is None:
        return ""
    bounded = low is not None and high is not None
    return f"{difference:+.4f} " + (f"[{low:+.4f}, {high:+.4f}]" if bounded else "(too few users)")


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
    against = _against(table, exam, list(told), objective, seed)
    for method, one in sorted(told.items(), key=lambda entry: (entry[0] != CANDIDATE, entry[0])):
        if not one["rows"]:
            continue
        bounds = [{} if method == CANDIDATE else interval.as_json() for interval in against[method]]
        yield Line(
            exam=exam,
            slice=name,
            method=ADAPTED if method == CANDIDATE else method,
            objective=objective.name,
            night=night,
            rows=int(one["rows"]),
            users=against[method][0].users,
            user_nights=int(one["users"] or 0),
            log_loss=one.get("log_loss"),
            rmse=one.get("rmse"),
            auc=one.get("auc"),
            ndcg=one.get("ndcg_at_10"),
            calibration=one.get("calibration_error"),
            **{
                f"{figure}{name}": interval.get(field)
                for figure, interval in zip(("", "auc_", "ndcg_"), bounds, strict=True)
                for name, field in (("difference", "estimate"), ("low", "low"), ("high", "high"))
            },
        )


def _against(
    table: pa.Table, exam: str, methods: Sequence[str], objective: ObjectiveConfig, seed: int
) -> dict[str, tuple[Interval, Interval, Interval]]:
    """The candidate's loss minus each method's on the rows that both predicted, and minus its own; AUC and NDCG@10.

    Methods that predicted the same rows, as nearly always all of them did, share one set of resampled users. Of a
    rating nothing is ranked: it has no AUC and no NDCG.
    """
    loss = {method: losses(table, exam, method, objective) for method in methods}
    users = table["user"].to_numpy(zero_copy_only=False).astype(str)
    lists = pc.dictionary_encode(table["list"].combine_chunks()).indices.to_numpy()
    alike: dict[bytes, list[str]] = {}
    for method, each in loss.items():
        alike.setdefault(np.isnan(each).tobytes(), []).append(method)
    found: dict[str, tuple[Interval, Interval, Interval]] = {}
    for together in alike.values():
        differences = np.column_stack([loss[CANDIDATE] - loss[method] for method in together])
        by_loss = paired_intervals(sum_by_user(users, differences), seed)
        by_auc = by_ndcg = (Interval(nan, -inf, inf),) * len(together)
        if objective.kind == "binary":
            auc, ndcg = ranked_apart(table, exam, together, objective, lists)
            by_auc, by_ndcg = paired_intervals(auc, seed), paired_intervals(ndcg, seed)
        found |= dict(zip(together, zip(by_loss, by_auc, by_ndcg, strict=True), strict=True))
    return found
