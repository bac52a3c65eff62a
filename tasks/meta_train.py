"""Meta-train: one base for all segments, from the nights before this one."""

import glob
from datetime import date
from pathlib import Path

import torch

from tasks.clients.local_files import write_local
from tasks.clients.workspace import StepRecord, digest_of
from tasks.data import vocabulary
from tasks.data.columns import Rows, open_rows
from tasks.data.contract import DataConfig, SegmentsConfig
from tasks.errors import FormatUnknown
from tasks.learning import training as learning
from tasks.learning.adapters import AdapterConfig
from tasks.learning.base import DESCRIPTION, WEIGHTS, Base, load_base, save_base, shape_of
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.setting import Setting
from tasks.learning.training_config import BESIDE, TrainingConfig
from tasks.parents import parent_base
from tasks.references import BaseRef, IngestRef, ParentRef, Place, PrepareRef
from tasks.steps import Product, Progress, carry_out, device_of, open_workspace, recalled, record_of, verb
from tasks.tensorboard import scalars_of

VERSION = 5
BENT_VERSION = 2
"""Of second-order training through bent layers; the other trainings answer as they did before it."""
LOOSE_STARTS = 1
"""Version of what is added to the keys of those trainings alone that may hold adapters less than their start does."""


@verb
def meta_train(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    ranker: RankerConfig,
    training: TrainingConfig,
    adapter: AdapterConfig,
    ingested: IngestRef,
    prepared: PrepareRef,
) -> BaseRef:
    """Train the base, from the parent's where there is one.

    Raises:
        TrainingDiverged: the loss left the finite numbers.
        DeviceUnavailable: the config demands a device that is not there.
        InvalidConfig: scalars are to be written, and TensorBoard is not installed.
    """
    history = recalled(place, "history", prepared.history)
    device = device_of(place)
    inputs = {"history": history.digest, "parent": ingested.parent.digest if ingested.parent else "none"}
    section: dict[str, object] = {
        "objectives": [objective.model_dump(mode="json") for objective in data.objectives],
        "segments": segments.model_dump(mode="json"),
        "ranker": ranker.model_dump(mode="json"),
        "training": training.model_dump(mode="json", exclude=set(BESIDE)),
        "adapter": adapter.model_dump(mode="json"),
        "device": device,
        **({"bent": BENT_VERSION} if adapter.bent is not None and training.outer == "second_order" else {}),
        **solved_from(data),
    }
    if adapter.reads_learned(ranker.features) and training.outer != "joint":
        section["starts"] = LOOSE_STARTS

    def work(folder: Path, progress: Progress) -> Product:
        rows = rows_of(place, history)
        vocabularies = vocabulary.load(data, open_workspace(place).file(history, "vocabulary.parquet"))
        parent, why = _parent(place, ingested.parent)
        shape = shape_of(data, rows, vocabularies)
        with scalars_of(training, place, ingested.night, ingested.replayed) as scalars:
            trained = learning.meta_train(
                Setting(data, segments, ranker, adapter, training, rows, shape, ingested.night, device),
                parent=parent,
                report=progress,
                checkpoint=checkpoint,
                scalars=scalars,
            )
        files = save_base(trained.base.to("cpu"), folder)
        content = {
            "epoch": trained.epoch,
            "parameters": trained.base.parameters(),
            "trained_through": trained.base.trained_through.isoformat(),
        }
        notes = {"curve": [list(point) for point in trained.curve], "why": why + trained.why}
        return Product(content, notes | ({"unwritten": scalars.lost} if scalars.lost else {}), files)

    checkpoint = CheckpointFile(place, ingested.night, digest_of([VERSION, torch.__version__, inputs, section]))
    record, shared = carry_out(place, "meta-train", VERSION, ingested.night, inputs, section, work)
    checkpoint.clear()
    curve = record.notes["curve"]
    kept = [point[2] for point in curve if point[0] == record.content["epoch"]]
    return BaseRef(
        **shared,
        epochs=sum(point[0] > 0 for point in curve),
        stop_loss=kept[0] if kept else None,
        parameters=record.content["parameters"],
    )


def solved_from(data: DataConfig) -> dict[str, str]:
    """How a start is solved for several objectives, for the key of a training: nothing to say where there is one.

    Factors are solved from all of them, and precisions are scaled for each by itself: no training counts whose factors
    were solved from the first one's rows alone, or whose precisions were scaled for all alike.

    >>> columns = [{"name": name, "role": name, "dtype": "int64"} for name in ("user", "item")]
    >>> columns += [{"name": name, "role": "label", "dtype": "int64"} for name in ("liked", "bought")]
    >>> columns += [{"name": "at", "role": "time", "dtype": "timestamp"}]
    >>> aims = [{"name": name, "column": name} for name in ("liked", "bought")]
    >>> solved_from(DataConfig(source="lake", columns=columns, objectives=aims))
    {'factors': 'all objectives', 'precisions': 'each objective'}
    >>> solved_from(DataConfig(source="lake", columns=columns, objectives=aims[:1]))
    {}
    """
    return {"factors": "all objectives", "precisions": "each objective"} if len(data.objectives) > 1 else {}


class CheckpointFile:
    """The checkpoint of a night's training: one local file, and one for each part, of equal inputs and config only."""

    def __init__(self, place: Place, night: date, made_from: str, part: str = "") -> None:
        self._place, self._night, self._made_from = place, night, made_from
        self._room, self._of_night = Path(place.scratch) / "checkpoints", f"{place.pipeline}-{night}."
        self._file = self._room / f"{self._of_night}{made_from}{part}"

    def load(self) -> bytes | None:
        """What a run that died has left here."""
        return self._file.read_bytes() if self._file.exists() else None

    def save(self, data: bytes) -> None:
        """Replace it; what other configs or inputs of this night have left here goes."""
        write_local(self._file, [data], None, "the checkpoint of a training")
        for other in self._room.glob(f"{glob.escape(self._of_night)}*"):
            if not other.name.startswith(f"{self._of_night}{self._made_from}"):
                other.unlink(missing_ok=True)

    def part(self, name: str) -> "CheckpointFile":
        """The checkpoint of a part, kept beside those of the others until the whole is on record."""
        return CheckpointFile(self._place, self._night, self._made_from, f".{name}")

    def clear(self) -> None:
        """Forget it and its parts: the training is on record."""
        for file in self._room.glob(f"{glob.escape(f'{self._of_night}{self._made_from}')}*"):
            file.unlink(missing_ok=True)


def _parent(place: Place, parent: ParentRef | None) -> tuple[Base | None, str]:
    """The base to start from, and what there is to say if one of another version cannot give it."""
    if parent is None:
        return None, ""
    try:
        return parent_base(place, parent), ""
    except FormatUnknown as error:
        return None, f"{parent.name} gives no start ({error}); "


def rows_of(place: Place, layout: StepRecord) -> Rows:
    """The columns of a layout, memory-mapped."""
    return open_rows(open_workspace(place).folder(layout, "rows"))


def trained_base(place: Place, ref: BaseRef) -> Base:
    """The base that a reference names."""
    record = record_of(place, ref)
    return load_base({name: open_workspace(place).file(record, name) for name in (WEIGHTS, DESCRIPTION)})
