"""What the champion would have said about tonight's rows: through its own published graph, and by its own solver."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.asking import columns_of, order_of, past_of
from tasks.data import vocabulary
from tasks.data.columns import Rows
from tasks.data.contract import DataConfig, SegmentsConfig
from tasks.data.vocabulary import Vocabularies
from tasks.errors import FormatUnknown, NightrankError
from tasks.learning.base import shape_of
from tasks.learning.exams import CHAMPION, Night, column, sit_contact
from tasks.learning.ladder import Ladder, learned_levels
from tasks.learning.material import I64, Dialect, Material
from tasks.learning.training import steady
from tasks.meta_train import rows_of
from tasks.parents import base_of, release_file
from tasks.references import IngestRef, Place, PrepareRef, ValidateRef
from tasks.release.manifest import Manifest
from tasks.release.publishing import read_manifest
from tasks.serving.loaded import LoadedRelease, load
from tasks.serving.requests import read_request
from tasks.steps import device_of, open_workspace, record_of, store_of
from tasks.validate import clean_file

F32 = npt.NDArray[np.float32]
BATCH = 8192
"""Rows asked of the champion's graph at a time, each a request with one candidate."""


def champion_scores(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    ingested: IngestRef,
    validated: ValidateRef,
    prepared: PrepareRef,
) -> tuple[dict[str, F32], str]:
    """The champion's predictions in both exams, as columns of the exam table, and what was or was not compared.

    In the nightly exam the champion answers through its published ONNX, with its own vocabularies, statistics and bank.
    In first contact its own base is adapted by its own solver on the same support as the candidate.

    Returns:
        Columns; empty where the champion is not comparable, and one sentence that says why. That is never a win.
    """
    release = ingested.champion
    assert release is not None
    rows = rows_of(place, record_of(place, prepared))
    vocabularies = vocabulary.load(data, open_workspace(place).file(record_of(place, prepared), "vocabulary.parquet"))
    device = device_of(place)
    ladder = Ladder(rows, segments, data.user)
    night = Night.among(data, ladder, Material(rows, device), ingested.night.toordinal())
    try:
        manifest = read_manifest(store_of(place), place.pipeline, release)
        scores = _nightly(
            place, data, manifest, clean_file(place, record_of(place, validated)), rows, night, vocabularies
        )
        words = vocabulary.load(data, release_file(place, release, "vocabulary.parquet"))
        base = base_of(place, release)
    except FormatUnknown as error:
        return scores, f"release {release[:12]} is compared in the nightly exam only: {error}"
    except NightrankError as error:
        return {}, f"release {release[:12]} is not comparable: {error}"
    theirs, ours = base.network.shape, shape_of(data, rows, vocabularies)
    if base.levels != learned_levels(segments, data.user) or (theirs.names, theirs.lists) != (ours.names, ours.lists):
        return (
            scores,
            f"release {release[:12]} has another ladder or other inputs: compared in the nightly exam only",
        )
    own = Night(data, ladder, Material(rows, device, _dialect(data, vocabularies, words)), night.ordinal, night.visits)
    with steady(0, None):
        scores |= sit_contact(own, base.to(device), CHAMPION)
    return scores, f"release {release[:12]} was compared in both exams"


def _nightly(
    place: Place,
    data: DataConfig,
    manifest: Manifest,
    clean: Path,
    rows: Rows,
    night: Night,
    vocabularies: Vocabularies,
) -> dict[str, F32]:
    room = Path(place.scratch) / "steps"
    room.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=room, prefix="champion-"))
    try:
        for file in manifest.files:
            shutil.copyfile(release_file(place, manifest.release, file.name), folder / file.name)
        champion = load(folder, manifest, "cpu")
    finally:
        shutil.rmtree(folder)
    names = [objective.name for objective in manifest.interface.objectives]
    with pq.ParquetFile(clean) as file:  # vectors of a whole night may not fit into memory
        order = order_of(file.read(columns=[data.user])[data.user], data, vocabularies)
        at = np.empty_like(order)
        at[order] = night.at
        answers, start = [], 0
        for batch in file.iter_batches(BATCH):
            specs = champion.manifest.interface.inputs
            past = past_of(specs, data, rows, night, vocabularies, at[start : start + batch.num_rows])
            answers.append(_ask(champion, pa.Table.from_batches([batch]), past))
            start += batch.num_rows
    said: F32 = np.concatenate(answers)[order]
    return {
        column("nightly", CHAMPION, objective.name): said[:, names.index(objective.name)]
        for objective in data.objectives
        if objective.name in names
    }


def _ask(champion: LoadedRelease, table: pa.Table, past: Mapping[str, npt.NDArray[np.generic]] | None = None) -> F32:
    """Scores [N, K] of rows, each as a request with one candidate, and with what the users' histories were."""
    specs = champion.manifest.interface.inputs
    request = {**columns_of(specs, table, past or {}), **(past or {})}
    inputs, shape = read_request(specs, request)
    return champion.run(inputs, shape)[:, 0]


def _dialect(data: DataConfig, ours: Vocabularies, theirs: Vocabularies) -> Dialect:
    """Our ids to the champion's, column by column, by raw key."""

    def table(name: str) -> I64:
        ids: I64 = np.r_[np.zeros(1, np.int64), theirs[name].encode(ours[name].keys)]
        return ids

    return Dialect(
        tuple(table(name) for name in data.named("request", "categorical")),
        tuple(table(name) for name in (data.item, *data.named("candidate", "categorical"))),
        tuple(table(name) for name in data.named("request", "multi")),
        tuple(table(name) for name in data.named("candidate", "multi")),
        data.widths("request", "multi"),
        data.widths("candidate", "multi"),
    )
