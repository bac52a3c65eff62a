"""Beside accurate: what each method's ranked lists are like, night by night and on average over nights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.learning.catalogue import Catalogue
from tasks.learning.exams import CANDIDATE
from tasks.learning.exposure import coverage, diversity, gini, personalisation
from tasks.learning.material import I64
from tasks.release.slices import ADAPTED, POOLED


@dataclass(frozen=True)
class Variety:
    """One method's lists of one night, or the mean over nights; figures are those of `tasks.learning.exposure`.

    Attributes:
        objective: that was ranked by.
        method: `adapted`, zero steps or a baseline.
        night: its date, or `pooled`.
        users: users that were asked; of all nights together where pooled.
        candidates: items that were ranked for each of them; the mean where pooled.
        length: items of a list.
        coverage: share of the candidates that anybody is shown.
        gini: how unevenly exposure is spread over the candidates.
        personalisation: one minus what two users' lists share; None with a single user.
        diversity: how often two items of a list differ in a categorical column; None without such a column.
    """

    objective: str
    method: str
    night: str
    users: int
    candidates: int
    length: int
    coverage: float
    gini: float
    personalisation: float | None
    diversity: float | None


_TYPES: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64()}
SCHEMA = pa.schema([(one.name, _TYPES.get(one.type, pa.float64())) for one in fields(Variety)])


def varieties(lists: Mapping[str, I64], objectives: Sequence[str], candidates: Catalogue, night: str) -> list[Variety]:
    """A night's figures.

    Args:
        lists: method to numbers of candidates ``[K, U, L]`` (`tasks.learning.catalogue.ranked`).
        objectives: names of the K objectives.
        candidates: what was ranked.
        night: its date.
    """
    return [
        Variety(
            objective=objective,
            method=ADAPTED if method == CANDIDATE else method,
            night=night,
            users=shown.shape[0],
            candidates=len(candidates),
            length=shown.shape[1],
            coverage=coverage(shown, len(candidates)),
            gini=gini(shown, len(candidates)),
            personalisation=personalisation(shown),
            diversity=diversity(shown, candidates.ids[:, 1:]),  # 0 is the item
        )
        for at, objective in enumerate(objectives)
        for method, shown in ((method, by_objective[at]) for method, by_objective in lists.items())
    ]


def with_pooled(found: Sequence[Variety]) -> list[Variety]:
    """The figures of all nights, and behind them their means, each night counting once."""
    pooled: list[Variety] = []
    for objective, method in dict.fromkeys((one.objective, one.method) for one in found):
        mine = [one for one in found if (one.objective, one.method) == (objective, method)]
        pooled.append(
            Variety(
                objective=objective,
                method=method,
                night=POOLED,
                users=sum(one.users for one in mine),
                candidates=round(sum(one.candidates for one in mine) / len(mine)),
                length=max(one.length for one in mine),
                coverage=float(np.mean([one.coverage for one in mine])),
                gini=float(np.mean([one.gini for one in mine])),
                personalisation=_mean([one.personalisation for one in mine]),
                diversity=_mean([one.diversity for one in mine]),
            )
        )
    return [*found, *pooled]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def save(found: Sequence[Variety], path: Path) -> None:
    """Write the figures as one Parquet table, a column per field."""
    columns = {name: [getattr(one, name) for one in found] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def load(path: Path) -> list[Variety]:
    """Read what `save` wrote."""
    return [Variety(**row) for row in pq.read_table(path).to_pylist()]
