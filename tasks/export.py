"""Export: base and ship bank as graphs that a ranker loads, proved equal to the network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data import vocabulary
from tasks.data.columns import Rows
from tasks.data.contract import LISTS, DataConfig, SegmentsConfig, StatisticsConfig
from tasks.data.statistics import serving_tables
from tasks.errors import ParityBroken
from tasks.learning.bank import Bank
from tasks.learning.base import Base, save_base
from tasks.learning.bending import Bent
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.learning.training import steady
from tasks.meta_train import rows_of, trained_base
from tasks.prepare import night_of_record
from tasks.references import BankRef, BaseRef, ExportRef, IngestRef, Place, PrepareRef, ValidateRef
from tasks.release.export_config import ExportConfig, VariantName
from tasks.release.golden import (
    Parity,
    check_parity,
    draw_requests,
    examples,
    make_golden,
    variant_parity,
    write_golden,
)
from tasks.release.graphs import export as write_graphs
from tasks.release.interface import Interface, LevelSpec
from tasks.release.lookups import Request, Wires, input_specs, objectives, wires
from tasks.release.manifest import content_digest, describe
from tasks.release.scorer import Solving, trace, traced_from
from tasks.release.tables import LevelTable, ServingTables, write_tables
from tasks.release.variants import build, built_from, files_of
from tasks.steps import Product, Progress, carry_out, open_workspace, quietly, recalled, record_of, verb
from tasks.validate import clean_file

VERSION = 7
GRAPH_VERSION = 3
GRAPH = "score.onnx"


@verb
def export(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    statistics: StatisticsConfig,
    settings: ExportConfig,
    ingested: IngestRef,
    validated: ValidateRef,
    prepared: PrepareRef,
    base: BaseRef,
    bank: BankRef,
) -> ExportRef:
    """Write the release's files.

    Raises:
        ParityBroken: the graphs do not say what the network says.
    """
    layout, workspace = record_of(place, prepared), open_workspace(place)
    section = {
        "columns": [column.model_dump(mode="json") for column in data.columns],
        "objectives": [objective.model_dump(mode="json") for objective in data.objectives],
        "window": data.window_nights,
        "levels": [list(level) for level in segments.levels],
        "statistics": statistics.model_dump(mode="json"),
        **settings.model_dump(mode="json", include={"feedback"}),
    }
    if settings.variants:
        section["variants"] = built_from(settings.variants)

    def work(folder: Path, progress: Progress) -> Product:
        vocabularies = vocabulary.load(data, workspace.file(layout, "vocabulary.parquet"))
        rows = rows_of(place, layout)
        trained = trained_base(place, base)
        ship = Bank.load(workspace.file(record_of(place, bank), "bank.safetensors"))
        # What a ranker sees tomorrow is as of tomorrow: the window ends with tonight, and its oldest night drops out.
        recent = [recalled(place, "statistics", key) for key in layout.content["states"]][-data.window_nights :]
        begin = ingested.night.toordinal() + 1 - data.window_nights
        kept = [record for record in recent if night_of_record(record).toordinal() >= begin]
        states = [(night_of_record(record), workspace.file(record, "state.parquet")) for record in kept]
        history = trained.network.config.history
        known = serving_tables(data, statistics, vocabularies, states)
        weights, levels = as_served(ship, rows, trained)
        tables = ServingTables(vocabularies, known, levels, history, settings.feedback)
        drawn_from = _some_rows(data, clean_file(place, record_of(place, validated)))
        requests = draw_requests(data, drawn_from, history=history, feedback=settings.feedback)
        release, parity = write_release(
            *(place, data, trained, weights, tables, requests, ingested.night, folder, progress, settings.variants)
        )
        files = describe(release)
        content = {"release": content_digest(files), "bytes": sum(file.bytes for file in files)}
        notes = {"parity": asdict(parity)}
        return Product(content, notes, {f"release/{path.name}": path for path in sorted(release.iterdir())})

    inputs = {"layout": layout.digest, "base": base.digest, "bank": bank.digest}
    record, shared = carry_out(place, "export", VERSION, ingested.night, inputs, section, work)
    parity = record.notes["parity"]
    return ExportRef(
        **shared,
        release=record.content["release"],
        bytes=record.content["bytes"],
        parity=max(parity["model"], parity["split"]),
    )


def as_served(bank: Bank, rows: Rows, base: Base) -> tuple[npt.NDArray[np.float32], tuple[LevelTable, ...]]:
    """A bank as graphs hold it: weights [slots, K, D], as wide as the network takes them, and each level's slots."""
    weights = np.zeros((*bank.weights.shape[:2], base.network.width), np.float32)
    weights[:, :, : bank.weights.shape[2]] = bank.weights
    levels = tuple(
        LevelTable(level.columns, tuple(own.radices.tolist()), own.keys, own.slots, own.support, own.refused)
        for level, own in zip(rows.levels, bank.levels, strict=True)
    )
    return weights, levels


def write_release(
    place: Place,
    data: DataConfig,
    base: Base,
    weights: npt.NDArray[np.float32],
    tables: ServingTables,
    requests: Sequence[Request],
    night: date,
    folder: Path,
    progress: Progress,
    variants: Sequence[VariantName] = (),
) -> tuple[Path, Parity]:
    """Write all content files of a release.

    Args:
        place: where traced graphs are remembered.
        data: the contract.
        base: what serves all segments.
        weights: everybody's adapter weights [slots, K, D], as wide as the network takes them; slot 0 is the base's.
        tables: vocabularies, statistics and slots.
        requests: the golden requests.
        night: the newest night that the release has learned from.
        folder: gets a folder `release` with the files.
        progress: told of three parts.
        variants: smaller forms of the score graph to build beside it.

    Returns:
        The folder with the files, and how closely the graphs agree with the network.

    Raises:
        ParityBroken: the graphs do not say what the network says.
    """
    release = folder / "release"
    release.mkdir()
    network, history, feedback = base.network, tables.history, tables.feedback
    solving = Solving(feedback, base.adapter.steps, base.table()[0].numpy()) if feedback else None
    with steady(0, None), _says_what_to_delete(place):
        write_graphs(network, weights, tables, data, release, partial(traced_once, place), solving=solving)
        progress(1, 3, "parts")
        golden = make_golden(network, weights, tables, data, requests, solving)
    write_golden(data, golden, release, history)
    with _says_what_to_delete(place):
        parity = check_parity(data, tables, golden, release)
    for name in variants:
        build(name, release, len(data.objectives))
    apart: dict[str, float | None] = {
        name: variant_parity(data, tables, golden, release, files_of(name)[0]) for name in variants
    }
    parity = replace(parity, variants=apart)
    progress(2, 3, "parts")
    save_base(base, release)
    write_tables(tables, release)
    shown = dict(examples(data, golden[0], history))
    for one in golden[-2:] if feedback else ():
        shown = {**examples(data, one, history, feedback), **shown}
    interface = Interface(
        night=night,
        inputs=input_specs(data, shown, history, feedback),
        output=wires(data, tables).scores,
        objectives=objectives(data),
        wires=wires(data, tables).between(),
        levels=tuple(LevelSpec(level.columns, len(level.keys)) for level in tables.levels),
    )
    (release / "interface.json").write_bytes(interface.serialise())
    progress(3, 3, "parts")
    return release, parity


def _some_rows(data: DataConfig, clean: Path) -> pa.Table:
    """The rows that golden requests are drawn from: the night's; its first ones where vectors or lists make it long."""
    with pq.ParquetFile(clean) as file:
        lists = any(column.kind in LISTS for column in data.columns)
        return file.read_row_group(0) if lists else file.read()


@contextmanager
def _says_what_to_delete(place: Place) -> Iterator[None]:
    """Add the remedy where the graph that all nights share may be to blame."""
    try:
        yield
    except ParityBroken as error:
        raise ParityBroken(
            f"{error}; to have the graph traced anew, delete {place.pipeline}/work/graph/ in the store and run again"
        ) from error


def traced_once(
    place: Place,
    shape: RankerShape,
    config: RankerConfig,
    names: Wires,
    bent: Bent | None,
    prototypes: int,
    solving: Solving | None,
) -> bytes:
    """The graph of these layers, which every night shares: tracing it takes longer than all else in an export."""

    def work(folder: Path, progress: Progress) -> Product:
        (folder / GRAPH).write_bytes(trace(shape, config, names, bent, prototypes, solving))
        return Product({}, {}, {GRAPH: folder / GRAPH})

    with quietly("export"):
        depends = traced_from(shape, config, names, bent, prototypes, solving)
        record, _ = carry_out(place, "graph", GRAPH_VERSION, None, {}, depends, work)
    return open_workspace(place).file(record, GRAPH).read_bytes()
