"""What exam tables say: figures per method, paired differences pooled over nights, and evidence about segments.

An exam table has one row per row of its night: who it was, its labels, and what every method predicted under every
condition (`tasks.learning.exams`). Users and segments stand in it by their raw keys, so tables of several nights pool.

Shapes: N rows, M methods.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.data.contract import DataConfig, ObjectiveConfig
from tasks.learning.exams import CANDIDATE, COMMON, CONDITIONS, PARENT, SUPPORTS, ZERO_STEPS, column, contact
from tasks.learning.intervals import Interval, UserSums, paired_intervals, pool, sum_by_user
from tasks.learning.metrics import ByUser, adaptation_fitness, auc_by_user, log_loss, ndcg_by_user, squared_error
from tasks.learning.summaries import binary_summary, rating_summary
from tasks.release.segment_evidence import SegmentEvidence

Figures = dict[str, float | None]
F64 = npt.NDArray[np.float64]
NIGHTLY = CONDITIONS[0]


def methods(table: pa.Table, condition: str, objective: str) -> list[str]:
    """Methods that predicted an objective under a condition, the candidate first."""
    names = [name.split("/") for name in table.column_names if name.count("/") == 2]
    found = [method for kind, method, what in names if kind == condition and what == objective]
    return sorted(found, key=lambda method: method != CANDIDATE)


def losses(table: pa.Table, condition: str, method: str, objective: ObjectiveConfig) -> F64:
    """Loss of every row [N]: log-loss, or the squared error of a rating; NaN without label or prediction."""
    labels = table[f"label/{objective.name}"].to_numpy().astype(np.float64)
    said = table[column(condition, method, objective.name)].to_numpy().astype(np.float64)
    labels = np.where(np.isnan(said), np.nan, labels)
    said = np.where(np.isnan(labels), 0.5, said)
    return log_loss(labels, said) if objective.kind == "binary" else squared_error(labels, said)


def ranked_apart(
    table: pa.Table, condition: str, others: Sequence[str], objective: ObjectiveConfig, lists: npt.NDArray[Any]
) -> tuple[UserSums, UserSums]:
    """AUC and NDCG@10 of each list with the candidate's scores minus those with each of M methods', summed by user.

    A method's own figure is a mean over lists; so is that of sums over counts, and a user of many nights or trainings
    is one cluster.

    Args:
        table: an exam table, or several in one.
        condition: `nightly` or `contact k`.
        others: M methods that predicted the same rows of it.
        objective: a binary one.
        lists: [N] which list of which user a row is in: scores of two nights, by two models, are not compared.

    Returns:
        Differences [U, M] of AUC, over lists with both labels, and of NDCG@10, over lists with a positive one; `rows`
        are lists.
    """
    labels = table[f"label/{objective.name}"].to_numpy()
    said = {name: table[column(condition, name, objective.name)].to_numpy() for name in (CANDIDATE, *others)}
    known = np.flatnonzero(~np.isnan(labels + said[CANDIDATE] + said[others[0]]))
    _, first, lists = np.unique(lists[known], return_index=True, return_inverse=True)
    owners = table["user"].take(pa.array(known[first])).to_numpy(zero_copy_only=False).astype(str)
    labels, ties = labels[known], table["tie"].to_numpy()[known]
    aucs = {name: auc_by_user(labels, scores[known], lists) for name, scores in said.items()}
    ndcgs = {name: ndcg_by_user(labels, scores[known], lists, ties) for name, scores in said.items()}

    def apart(found: dict[str, ByUser]) -> UserSums:
        own = found[CANDIDATE]
        return sum_by_user(owners[own.users], np.column_stack([own.values - found[name].values for name in others]))

    return apart(aucs), apart(ndcgs)


def own_minus_parent(table: pa.Table, objective: ObjectiveConfig) -> F64:
    """What a segment's own weights change [N]: nightly loss with those that serve a row minus that with their parent's.

    NaN without label or prediction; 0 where no own weights serve.
    """
    return losses(table, NIGHTLY, CANDIDATE, objective) - losses(table, NIGHTLY, PARENT, objective)


def figures(table: pa.Table, condition: str, objective: ObjectiveConfig, common: bool = False) -> dict[str, Figures]:
    """Every figure of every method on one night.

    Args:
        table: an exam table.
        condition: `nightly` or `contact k`.
        objective: which.
        common: only the rows after each user's 20th, the same for every k.
    """
    if common:
        table = table.filter(pc.greater_equal(table["at"], COMMON))
    labels = table[f"label/{objective.name}"].to_numpy().astype(np.float64)
    _, users = np.unique(table["user"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    ties = table["tie"].to_numpy()
    told: dict[str, Figures] = {}
    for method in methods(table, condition, objective.name):
        said = table[column(condition, method, objective.name)].to_numpy().astype(np.float64)
        asked = ~np.isnan(said)
        mine = (labels[asked], said[asked], users[asked])
        told[method] = binary_summary(*mine, ties[asked]) if objective.kind == "binary" else rating_summary(*mine)
    if CANDIDATE in told and ZERO_STEPS in told:
        after, before = (losses(table, condition, method, objective) for method in (CANDIDATE, ZERO_STEPS))
        known = ~np.isnan(after)
        if known.any():
            told[CANDIDATE]["fitness"] = float(adaptation_fitness(after[known], before[known]))
    return told


def compare(
    tables: Sequence[pa.Table], condition: str, objective: ObjectiveConfig, seed: int, common: bool = False
) -> dict[str, tuple[Interval, int]]:
    """The candidate against each method of the newest night, pooled over the nights that have it.

    Args:
        tables: exam tables, the newest first.
        condition: `nightly` or `contact k`.
        objective: which.
        seed: of the bootstrap by user.
        common: only the rows after each user's 20th.

    Returns:
        By method, loss of the candidate minus its loss per row, and how many nights were pooled.
    """
    found: dict[str, tuple[Interval, int]] = {}
    for method in methods(tables[0], condition, objective.name):
        if method == CANDIDATE:
            continue
        sums: list[UserSums] = []
        for table in tables:
            if method not in methods(table, condition, objective.name):
                continue
            part = table.filter(pc.greater_equal(table["at"], COMMON)) if common else table
            own, other = (losses(part, condition, name, objective) for name in (CANDIDATE, method))
            users = part["user"].to_numpy(zero_copy_only=False).astype(str)
            sums.append(sum_by_user(users, (own - other)[:, None]))
        found[method] = (paired_intervals(pool(sums), seed=seed)[0], len(sums))
    return found


def segment_evidence(tables: Sequence[pa.Table], objective: ObjectiveConfig) -> SegmentEvidence:
    """What the nightly exams say about each segment's own weights against its parent's, visit by visit."""
    parts: list[pa.Table] = []
    for table in tables:
        difference = own_minus_parent(table, objective)
        keys = ("level", "segment", "support", "user")
        part = pa.table(
            {
                **{name: table[name] for name in keys},
                "difference": difference,
                "square": difference**2,
            }
        )
        served = pc.and_(pc.greater_equal(part["level"], 0), pc.invert(pc.is_nan(part["difference"])))
        part = part.filter(served)
        parts.append(
            part.group_by(keys, use_threads=False).aggregate(
                [("difference", "sum"), ("square", "sum"), ("difference", "count")]
            )
        )
    joined = pa.concat_tables(parts)
    return SegmentEvidence(
        level=joined["level"].to_numpy().astype(np.int64),
        key=joined["segment"].to_numpy(zero_copy_only=False).astype(str),
        user=joined["user"].to_numpy(zero_copy_only=False).astype(str),
        support=joined["support"].to_numpy().astype(np.int64),
        rows=joined["difference_count"].to_numpy().astype(np.int64),
        sums=joined["difference_sum"].to_numpy().astype(np.float64),
        squares=joined["square_sum"].to_numpy().astype(np.float64),
    )


def both_exams(tables: Sequence[pa.Table], data: DataConfig, seed: int) -> list[dict[str, Any]]:
    """Both exams of every objective, ready for a record's notes and for the report."""
    told: list[dict[str, Any]] = []
    for objective in data.objectives:
        comparisons: list[dict[str, Any]] = []
        conditions: list[tuple[str, int | None, bool]] = [(NIGHTLY, None, False)]
        conditions += [(contact(k), k, common) for k in SUPPORTS for common in (False, True)]
        for condition, k, common in conditions:
            for method, (interval, nights) in compare(tables, condition, objective, seed, common).items():
                comparisons.append(
                    {
                        "exam": NIGHTLY if k is None else "first_contact",
                        "k": k,
                        "method": method,
                        "common_rows": common,
                        "nights": nights,
                        "interval": interval.as_json(),
                    }
                )
        told.append(
            {
                "objective": objective.name,
                "kind": objective.kind,
                "nightly": figures(tables[0], NIGHTLY, objective),
                "first_contact": {str(k): figures(tables[0], contact(k), objective) for k in SUPPORTS},
                "common": {str(k): figures(tables[0], contact(k), objective, common=True) for k in SUPPORTS},
                "comparisons": comparisons,
            }
        )
    return told
