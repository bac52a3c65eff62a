"""Who is served by what, level by level: the summary that a manifest tells of `segments.parquet` and `lift.parquet`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data.segments import level_name
from tasks.release.lift import SURE_95
from tasks.release.manifest_parts import LevelSegments, Lift, Support
from tasks.release.tables import OWN, ROLLED_BACK


def level_segments(
    segments: Path,
    lifts: pa.Table,
    objective: str,
    levels: Sequence[Sequence[str]],
    seen: Sequence[int],
    kind: str,
    exams: int,
) -> tuple[LevelSegments, ...]:
    """What a manifest says of each level, finest first.

    Args:
        segments: `segments.parquet` of the release.
        lifts: each segment's lift, as `tasks.release.lift.lifts` has it.
        objective: whose lift is told.
        levels: columns of the ladder's levels.
        seen: segments of each level that the bank looked at.
        kind: of the adapters.
        exams: nightly exams that the lifts are pooled over.
    """
    table = pq.read_table(segments)
    told = []
    for number, (columns, count) in enumerate(zip(levels, seen, strict=True)):
        rows = table.filter(pc.field("level") == number)
        own, back = (rows.filter(pc.field("source") == source) for source in (OWN, ROLLED_BACK))
        support = own["support"].drop_null().to_numpy()
        here = lifts.filter((pc.field("objective") == objective) & (pc.field("level") == level_name(columns)))
        told.append(
            LevelSegments(
                columns=tuple(columns),
                kind=kind,
                segments=count,
                own=own.num_rows,
                parent=count - own.num_rows - back.num_rows,
                rolled_back=back.num_rows,
                support=_support(support) if len(support) else None,
                lift=_lift(here, exams) if here.num_rows else None,
            )
        )
    return tuple(told)


def _support(rows: np.ndarray) -> Support:
    return Support(float(np.median(rows)), float(np.quantile(rows, 0.9)), int(rows.sum()))


def _lift(segments: pa.Table, exams: int) -> Lift:
    """Mean of the shrunk lifts, with its interval.

    Posteriors count as independent: what they share, the level's own mean and spread, is taken as known.
    """
    mean = float(segments["shrunk"].to_numpy().mean())
    half = SURE_95 * float(np.sqrt(np.square(segments["deviation"].to_numpy()).sum())) / segments.num_rows
    return Lift(mean, mean - half, mean + half, exams)
