"""Feedback: what first contact comes to where requests bring what their users have just done."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data import vocabulary
from tasks.data.contract import DataConfig, SegmentsConfig, StatisticsConfig
from tasks.learning.bank import Bank
from tasks.learning.exams import Night, joined
from tasks.learning.feedback_exam import sit_feedback
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.training import steady
from tasks.meta_train import rows_of, trained_base
from tasks.recommend import as_of
from tasks.references import BankRef, BaseRef, FeedbackRef, IngestRef, Place, PrepareRef
from tasks.release.export_config import ExportConfig
from tasks.steps import Product, Progress, carry_out, device_of, open_workspace, recalled, record_of, verb

VERSION = 1
ANSWERS = "feedback.parquet"


@verb
def examine_feedback(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    statistics: StatisticsConfig,
    config: ExportConfig,
    ingested: IngestRef,
    prepared: PrepareRef,
    base: BaseRef,
    bank: BankRef,
) -> FeedbackRef:
    """Ask the exam bank in first contact, with each user's newest rows as feedback and without.

    Args:
        place: where.
        data: the contract.
        segments: the ladder, its finest level the user's.
        statistics: cohort and strengths.
        config: how many rows of feedback a request holds.
        ingested: the night.
        prepared: the columns.
        base: the base.
        bank: the exam bank.
    """
    layout, history = record_of(place, prepared), recalled(place, "history", prepared.history)
    device = device_of(place)
    section = {
        "objectives": [objective.model_dump(mode="json") for objective in data.objectives],
        "segments": segments.model_dump(mode="json"),
        "statistics": statistics.model_dump(mode="json"),
        "feedback": config.feedback,
        "device": device,
    }

    def work(folder: Path, progress: Progress) -> Product:
        workspace = open_workspace(place)
        rows = rows_of(place, layout)
        vocabularies = vocabulary.load(data, workspace.file(layout, "vocabulary.parquet"))
        known = as_of(place, data, statistics, prepared, vocabularies)
        trained = trained_base(place, base).to(device)
        weights = Bank.load(workspace.file(record_of(place, bank), "bank.safetensors"))
        night = Night.among(data, Ladder(rows, segments, data.user), Material(rows, device), ingested.night.toordinal())
        with steady(0, None):
            answers = sit_feedback(night, trained, weights, known, config.feedback)
        table = pa.table({name: pa.array(values) for name, values in answers.items()})
        pq.write_table(table, folder / ANSWERS, compression="zstd")
        progress(table.num_rows, table.num_rows, "rows")
        return Product({"rows": table.num_rows}, {}, {ANSWERS: folder / ANSWERS})

    inputs = {"layout": layout.digest, "history": history.digest, "base": base.digest, "bank": bank.digest}
    _, shared = carry_out(place, "feedback", VERSION, ingested.night, inputs, section, work)
    return FeedbackRef(**shared)


def with_feedback(place: Place, exam: pa.Table, answers: FeedbackRef | None) -> pa.Table:
    """A night's exam with what requests with feedback would have been told beside the others, where it was asked."""
    if answers is None:
        return exam
    found = pq.read_table(open_workspace(place).file(record_of(place, answers), ANSWERS))
    return joined(exam, {name: found[name].to_numpy() for name in found.column_names})
