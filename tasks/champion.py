"""What the champion would have said about tonight's rows: through its own published graph, and by its own solver."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data import vocabulary
from tasks.data.columns import Rows, microseconds
from tasks.data.contract import DataConfig, SegmentsConfig
from tasks.data.lists import is_list, padded, values_of
from tasks.data.vocabulary import Vocabularies
from tasks.errors import FormatUnknown, NightrankError, ReleaseRefused
from tasks.learning.base import shape_of
from tasks.learning.exams import CHAMPION, Night, column, sit_contact
from tasks.learning.history import histories
from tasks.learning.ladder import Ladder, learned_levels
from tasks.learning.material import I64, Dialect, Material
from tasks.learning.training import steady
from tasks.meta_train import rows_of
from tasks.parents import base_of, release_file
from tasks.references import IngestRef, Place, PrepareRef, ValidateRef
from tasks.release.manifest import InputSpec, Manifest
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
        # Clean rows are in order of time; the exam's are by user, then time.
        user = vocabularies[data.user].encode(file.read(columns=[data.user])[data.user])
        order = np.argsort(user, kind="stable")
        at = np.empty_like(order)
        at[order] = night.at
        answers, start = [], 0
        for batch in file.iter_batches(BATCH):
            past = _past(champion, data, rows, night, vocabularies, at[start : start + batch.num_rows])
            answers.append(_ask(champion, pa.Table.from_batches([batch]), past))
            start += batch.num_rows
    said: F32 = np.concatenate(answers)[order]
    return {
        column("nightly", CHAMPION, objective.name): said[:, names.index(objective.name)]
        for objective in data.objectives
        if objective.name in names
    }


def _past(
    champion: LoadedRelease, data: DataConfig, rows: Rows, night: Night, vocabularies: Vocabularies, at: I64
) -> dict[str, npt.NDArray[np.generic]]:
    """What the champion takes of the users' histories, as raw keys, for rows at positions [N]; by input [N, H]."""
    specs = [spec for spec in champion.manifest.interface.inputs if spec.recalls]
    if not specs:
        return {}
    assert specs[0].values is not None
    # The night's visits are all that these rows are of, and each is asked for when it began.
    visit = np.searchsorted(night.visits.rows.start, at, side="right") - 1
    past: dict[str, npt.NDArray[np.generic]] = {data.time: np.asarray(rows.time)[night.visits.rows.start[visit]]}
    found = histories(rows, night.visits.rows.start, night.visits.first, at, specs[0].values)
    places = found.at[found.row]
    columns = (data.item, *data.named("candidate", "categorical"))
    labels = [objective.column for objective in data.objectives]
    for spec in specs:
        if spec.of in columns:
            keys = vocabularies[spec.of].decode(np.asarray(rows.candidate_ids[places.ravel(), columns.index(spec.of)]))
            known = keys.cast(pa.string() if spec.dtype == "string" else pa.int64())
            values = pc.fill_null(known, spec.missing).to_numpy(zero_copy_only=False).reshape(places.shape)
        elif spec.of in labels:
            values = np.asarray(rows.labels[:, labels.index(spec.of)][places])
        elif spec.of == data.time:
            values = np.asarray(rows.time[places])
        else:
            raise ReleaseRefused(f"its history is of the column {spec.of!r}, which the contract no longer has")
        fill = np.nan if spec.missing is None else spec.missing
        past[spec.name] = np.where(places < 0, np.array(fill, values.dtype), values)
    return past


def _ask(champion: LoadedRelease, table: pa.Table, past: Mapping[str, npt.NDArray[np.generic]] | None = None) -> F32:
    """Scores [N, K] of rows, each as a request with one candidate, and with what the users' histories were."""
    request: dict[str, object] = dict(past or {})
    for spec in champion.manifest.interface.inputs:
        if spec.name in request or spec.per == "feedback":
            continue
        if spec.name not in table.column_names:
            raise ReleaseRefused(f"it asks for the column {spec.name!r}, which the contract no longer has")
        values = table[spec.name]
        if is_list(values.type) != (spec.values is not None):
            raise ReleaseRefused(f"the column {spec.name!r} holds lists in one of contract and release only")
        if spec.values is not None:
            raw = _lists(spec, values)
            request[spec.name] = raw if spec.per == "request" else raw[:, None]
            continue
        if spec.dtype == "float32":
            raw = pc.fill_null(values.cast(pa.float64()), float("nan")).to_numpy().astype(np.float32)
        elif pa.types.is_timestamp(values.type):
            raw = microseconds(values)
        elif spec.dtype == "int64":
            raw = pc.fill_null(values.cast(pa.int64()), spec.missing).to_numpy()
        else:
            raw = pc.fill_null(values.cast(pa.string()), spec.missing).to_numpy(zero_copy_only=False)
        request[spec.name] = raw if spec.per == "request" else raw[:, None]
    inputs, shape = read_request(champion.manifest.interface.inputs, request)
    return champion.run(inputs, shape)[:, 0]


def _lists(spec: InputSpec, lists: pa.ChunkedArray) -> npt.NDArray[np.generic]:
    """A column of lists [N, V], as a reader pads them."""
    assert spec.values is not None
    values, lengths = values_of(lists)
    asked = lengths[lengths > 0] if spec.dtype == "float32" else lengths
    if wrong := asked[asked != spec.values if spec.dtype == "float32" else asked > spec.values].tolist():
        raise ReleaseRefused(f"it takes lists of {spec.values} values in {spec.name!r}, and tonight's have {wrong[0]}")
    if spec.dtype == "float32":
        return padded(values.cast(pa.float32()).to_numpy(), lengths, spec.values, np.nan)
    flat = values.cast(pa.int64() if spec.dtype == "int64" else pa.string()).to_numpy(zero_copy_only=False)
    return padded(flat, lengths, spec.values, spec.missing)


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
