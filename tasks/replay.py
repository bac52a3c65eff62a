"""Replay: the exams of replayed nights side by side, as a table and as a page on this host; the store sees nothing."""

import os
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import pyarrow as pa

from tasks.adapt import cost_of
from tasks.data.contract import DataConfig, Section, SegmentsConfig
from tasks.errors import StoreUnwritable
from tasks.evaluate import exam_table
from tasks.feedback import with_feedback
from tasks.joint import with_joint
from tasks.recommend import varieties_of
from tasks.references import BankRef, ExamRef, FeedbackRef, JointRef, ListsRef, ParentRef, Place
from tasks.release import cost, earned, lift, variety
from tasks.release.replay_page import render
from tasks.release.slices import compared, save
from tasks.steps import looked_at, record_of, verb

TABLE, EARNED, LIFT, PAGE = "replay.parquet", "replay-support.parquet", "replay-segments.parquet", "replay.html"
COST, VARIETY = "replay-cost.parquet", "replay-variety.parquet"
FILES = (TABLE, EARNED, LIFT, COST, VARIETY, PAGE)
"""All that a replay writes, the page last: whoever sees a new page finds new tables."""


class Examined(Section):
    """What is known of a night that was examined."""

    bank: BankRef
    exam: ExamRef
    lists: ListsRef
    joint: JointRef | None = None
    feedback: FeedbackRef | None = None

    def table(self, place: Place) -> pa.Table:
        """The night's exam, with all that was asked beside it."""
        table = with_joint(place, exam_table(place, self.exam.key), self.joint)
        return with_feedback(place, table, self.feedback)


class ReplayRef(Section):
    """What a replay left for people."""

    table: str
    """Path of the long table: a line per exam, slice, method, objective and night (`tasks.release.slices.Line`)."""
    earned: str
    """Path of what own weights are worth by support: a line per step of the curve (`tasks.release.earned.Step`)."""
    lift: str
    """Path of what each segment gains from own weights: a line per segment (`tasks.release.lift.Served`)."""
    cost: str
    """Path of what each level costs for its gain: a line per objective and level (`tasks.release.cost.Cost`)."""
    variety: str
    """Path of what ranked lists are like: a line per objective, method and night (`tasks.release.variety.Variety`)."""
    page: str
    """Path of the page."""


@verb
def compare_nights(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    examined: Mapping[date, Examined],
    left_out: Sequence[tuple[date, str]],
    start: ParentRef | None,
    seed: int,
    out: str,
) -> ReplayRef:
    """Compare every method over the nights, and write what was found.

    Args:
        place: where the nights' records are.
        data: the contract.
        segments: the ladder.
        examined: the nights' banks, exams and lists, in order.
        left_out: nights that were not examined, with the reason.
        start: what the first night started from.
        seed: of the bootstrap by user.
        out: folder for the files; it is made.

    Raises:
        ObjectMissing: a record is gone.
        StoreUnwritable: the folder cannot be written.
    """
    tables = {night.isoformat(): one.table(place) for night, one in examined.items()}
    spent = [cost_of(record_of(place, one.bank)) for one in examined.values()]
    shown = variety.with_pooled([line for one in examined.values() for line in varieties_of(place, one.lists)])
    with looked_at("compare", f"{len(tables)} {'night' if len(tables) == 1 else 'nights'}, by slice") as progress:
        lines = compared(tables, data, segments.max_support, seed, progress)
        steps = earned.curve(list(tables.values()), data, segments.levels, seed)
        gained = lift.lifts(list(tables.values()), data, segments.levels)
        paid = cost.costs(spent, gained, list(tables.values()), data, segments.levels, seed)
    unnamed = lift.unnamed_levels(data, segments.levels)
    began = "the first one started cold" if start is None else f"the first one started from {start.name}"
    missing = [(night.isoformat(), why) for night, why in left_out]
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(lines, folder / f".{TABLE}")
        earned.save(steps, folder / f".{EARNED}")
        lift.save(gained, folder / f".{LIFT}")
        cost.save(paid, folder / f".{COST}")
        variety.save(shown, folder / f".{VARIETY}")
        told = render(place.pipeline, began, lines, steps, lift.summaries(gained, unnamed), paid, shown, missing, seed)
        (folder / f".{PAGE}").write_text(told, encoding="utf-8")
        for name in FILES:  # whole or not at all: a reader may have the last one open
            os.replace(folder / f".{name}", folder / name)
    except OSError as error:
        raise StoreUnwritable(
            f"cannot write {error.filename or folder}: {error.strerror}; give another --out"
        ) from error
    return ReplayRef(
        table=str(folder / TABLE),
        earned=str(folder / EARNED),
        lift=str(folder / LIFT),
        cost=str(folder / COST),
        variety=str(folder / VARIETY),
        page=str(folder / PAGE),
    )
