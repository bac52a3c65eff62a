"""Joint: what the same network says of a night when adaptation has had no part in its training."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.contract import DataConfig, SegmentsConfig
from tasks.learning.bank import Bank
from tasks.learning.exams import JOINT, Night, joined, sit_contact, sit_nightly
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.training_config import TrainingConfig
from tasks.meta_train import rows_of, trained_base
from tasks.references import BankRef, BaseRef, IngestRef, JointRef, Place, PrepareRef
from tasks.steps import Product, Progress, carry_out, device_of, open_workspace, record_of, verb

VERSION = 3
ANSWERS = "joint.parquet"
ALONE = ("members", "distill", "tensorboard")
"""Settings of a training that joint training has nothing to do with."""


def jointly(training: TrainingConfig) -> TrainingConfig:
    """The same training without adaptation in its loss: one base, whose curves are not written anywhere.

    >>> jointly(TrainingConfig(seed=3, members=4)) == TrainingConfig(seed=3, outer="joint")
    True
    """
    kept = {name: value for name, value in training if name not in ALONE}
    return TrainingConfig.model_validate(kept | {"outer": "joint"})


@verb
def examine_joint(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    ingested: IngestRef,
    prepared: PrepareRef,
    base: BaseRef,
    bank: BankRef,
) -> JointRef:
    """Ask a base that was trained jointly, with the same adapters solved on it afterwards, in both exams.

    Args:
        place: where.
        data: the contract.
        segments: the ladder.
        ingested: the night.
        prepared: the columns.
        base: trained as `jointly` says, from what the replay made so of the night before.
        bank: its exam bank.
    """
    layout, device = record_of(place, prepared), device_of(place)
    section = {
        "objectives": [objective.model_dump(mode="json") for objective in data.objectives],
        "segments": segments.model_dump(mode="json"),
        "device": device,
    }

    def work(folder: Path, progress: Progress) -> Product:
        trained = trained_base(place, base).to(device)
        weights = Bank.load(open_workspace(place).file(record_of(place, bank), "bank.safetensors"))
        rows = rows_of(place, layout)
        night = Night.among(data, Ladder(rows, segments, data.user), Material(rows, device), ingested.night.toordinal())
        answers = sit_nightly(night, trained, weights, JOINT) | sit_contact(night, trained, JOINT)
        table = pa.table({name: pa.array(values) for name, values in answers.items()})
        pq.write_table(table, folder / ANSWERS, compression="zstd")
        progress(table.num_rows, table.num_rows, "rows")
        return Product({"rows": table.num_rows}, {}, {ANSWERS: folder / ANSWERS})

    inputs = {"layout": layout.digest, "base": base.digest, "bank": bank.digest}
    _, shared = carry_out(place, "joint", VERSION, ingested.night, inputs, section, work)
    return JointRef(**shared)


def with_joint(place: Place, exam: pa.Table, answers: JointRef | None) -> pa.Table:
    """A night's exam with the answers of joint training beside the others, where it was asked."""
    if answers is None:
        return exam
    found = pq.read_table(open_workspace(place).file(record_of(place, answers), ANSWERS))
    return joined(exam, {name: found[name].to_numpy() for name in found.column_names})
