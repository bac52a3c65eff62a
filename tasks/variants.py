"""Try variants: smaller forms of the score graph, asked about a night that neither base nor exam bank has seen.

The recipes that a release's variants are made by are applied to the base and the exam bank, so that what is judged has
not learned from the rows that it is judged on. Rankers may take a variant only if that shows that it costs no more than
the config allows, and if the shipped one answers the golden requests well enough.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.asking import columns_of, order_of, past_of
from tasks.clients.workspace import StepRecord
from tasks.data import vocabulary
from tasks.data.columns import Rows
from tasks.data.contract import DataConfig, SegmentsConfig, StatisticsConfig
from tasks.data.vocabulary import Vocabularies
from tasks.errors import ParityBroken
from tasks.evaluate import exam_table
from tasks.export import as_served, traced_once
from tasks.learning.bank import Bank
from tasks.learning.exams import CANDIDATE, Night, column
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.training import steady
from tasks.meta_train import rows_of, trained_base
from tasks.prepare import night_of_record
from tasks.recommend import as_of
from tasks.references import (
    BankRef,
    BaseRef,
    ExamRef,
    FinishedSteps,
    IngestRef,
    Place,
    PrepareRef,
    ValidateRef,
    VariantsRef,
)
from tasks.release import agreement
from tasks.release.agreement import Compared
from tasks.release.export_config import ExportConfig
from tasks.release.golden import cpu_session, difference
from tasks.release.graphs import export as write_graphs
from tasks.release.interface import InputSpec
from tasks.release.lookups import Wires, input_specs, wires
from tasks.release.manifest import Variant
from tasks.release.tables import ServingTables
from tasks.release.variants import PROVIDERS, build, built_from, files_of, parity_of
from tasks.serving.requests import read_request
from tasks.steps import Product, Progress, carry_out, open_workspace, recalled, record_of, verb
from tasks.validate import clean_file

F32 = npt.NDArray[np.float32]
Answers = dict[str, F32]
"""Scores by graph: `PLAIN`, and each variant."""
VERSION = 1
TABLE, PLAIN = "compared.parquet", "fp32"
BATCH = 8192
"""Rows asked at a time, each a request with one candidate."""
ROWS = 200_000
"""About the most rows of a night that are asked; of more, every n-th batch."""
USERS, ITEMS, TOGETHER = 200, 1000, 8
"""Users and items of the lists that are compared, the first of the night; users asked at a time."""
SAME = 1e-3
"""Largest difference between the exam's predictions and the graph that is to say the same."""


@verb
def try_variants(
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
    exam: ExamRef,
) -> VariantsRef | None:
    """Ask each configured variant of the exam's graph about the night, on the CPU; None where none is configured.

    Raises:
        ParityBroken: the fp32 graph does not say of the night what the exam says.
    """
    if not settings.variants:
        return None

    def work(folder: Path, progress: Progress) -> Product:
        layout, workspace = record_of(place, prepared), open_workspace(place)
        rows = rows_of(place, layout)
        vocabularies = vocabulary.load(data, workspace.file(layout, "vocabulary.parquet"))
        trained = trained_base(place, base)
        weights, levels = as_served(
            Bank.load(workspace.file(record_of(place, bank), "bank.safetensors")), rows, trained
        )
        known = as_of(place, data, statistics, prepared, vocabularies)
        tables = ServingTables(vocabularies, known, levels, trained.network.config.history)
        graphs = folder / "graphs"
        graphs.mkdir()
        with steady(0, None):
            write_graphs(trained.network, weights, tables, data, graphs, partial(traced_once, place))
        for name in settings.variants:
            build(name, graphs, len(data.objectives))
        night = Night.among(data, Ladder(rows, segments, data.user), Material(rows, "cpu"), ingested.night.toordinal())
        asker = _Asker(data, night, rows, vocabularies, input_specs(data, history=tables.history))
        ask = _graphs(graphs, settings, wires(data, tables), asker.specs)
        clean = clean_file(place, record_of(place, validated))
        said, shown = asker.rows(clean, ask), asker.lists(clean, ask)
        progress(len(said[PLAIN]), len(said[PLAIN]), "rows")
        table = exam_table(place, exam.key)
        asked = ~np.isnan(said[PLAIN][:, 0])
        same = _same(data, table, said[PLAIN], asked)
        found = {
            (name, objective.name): agreement.compared(
                objective,
                table["user"].to_numpy(zero_copy_only=False).astype(str)[asked],
                table[f"label/{objective.name}"].to_numpy()[asked],
                said[PLAIN][asked, number],
                said[name][asked, number],
                agreement.in_common(shown[PLAIN][..., number], shown[name][..., number]),
            )
            for name in settings.variants
            for number, objective in enumerate(data.objectives)
        }
        agreement.save(found, folder / TABLE)
        content = {"names": list(settings.variants), "rows": int(asked.sum())}
        notes = {"exam": same, "told": {"/".join(which): _told(one) for which, one in found.items()}}
        return Product(content, notes, {TABLE: folder / TABLE})

    record, shared = carry_out(place, "variants", VERSION, ingested.night, {"exam": exam.key}, _section(settings), work)
    return VariantsRef(**shared, names=tuple(record.content["names"]), rows=record.content["rows"])


def described(place: Place, data: DataConfig, settings: ExportConfig, done: FinishedSteps) -> dict[str, Variant]:
    """The variants of a night's release and their verdicts, by this night and the earlier ones that the gate pools."""
    if done.variants is None:
        return {}
    records = [record_of(place, done.variants)]
    records += filter(None, [_tried(place, settings, key) for key in done.ingested.exams])
    parity: Mapping[str, float | None] = record_of(place, done.exported).notes["parity"]["variants"]
    found: dict[str, Variant] = {}
    for name in settings.variants:
        agreements = []
        for objective in data.objectives:
            nights = [_compared(place, record, name, objective.name) for record in records]
            agreements.append((objective, agreement.agreement(objective, [one for one in nights if one is not None])))
        verdict, why = agreement.judged(settings, parity[name], agreements)
        found[name] = Variant(
            files=files_of(name),
            provider=PROVIDERS[name],
            parity=parity_of(name, parity[name]),
            agreement={"nights": len(records), "objectives": [one.as_json() for _, one in agreements]},
            verdict=verdict,
            why=why,
        )
    return found


def _section(settings: ExportConfig) -> dict[str, object]:
    return {"variants": built_from(settings.variants)}


def _tried(place: Place, settings: ExportConfig, exam: str) -> StepRecord | None:
    """What the same variants said on the night of an earlier exam; None if they were not tried there."""
    workspace, night = open_workspace(place), night_of_record(recalled(place, "evaluate", exam))
    key = workspace.key("variants", VERSION, {"exam": exam, "for night": night.isoformat()}, _section(settings))
    return workspace.recall("variants", key)


def _compared(place: Place, record: StepRecord, name: str, objective: str) -> Compared | None:
    """What a night's record says of a variant and an objective; None if that was asked for otherwise then."""
    told = record.notes["told"].get(f"{name}/{objective}")
    if told is None:
        return None
    largest = float("inf") if told["largest"] is None else told["largest"]
    return agreement.load(open_workspace(place).file(record, TABLE), name, objective, told["lists"], largest)


def _told(one: Compared) -> dict[str, float | None]:
    return {"lists": one.lists, "largest": one.largest if np.isfinite(one.largest) else None}


def _same(data: DataConfig, table: pa.Table, plain: F32, asked: npt.NDArray[np.bool_]) -> float:
    """Largest difference between what the exam says of the rows and what its graph says."""
    names = [column("nightly", CANDIDATE, objective.name) for objective in data.objectives]
    expected = np.column_stack([table[name].to_numpy() for name in names])
    apart = difference(data, expected[asked], plain[asked])
    if not apart <= SAME:
        raise ParityBroken(
            f"the graph of base and exam bank differs from the exam by {apart:.3g}, limit {SAME:g}; nothing can be "
            f"said of its variants: remove export.variants, and report a defect"
        )
    return apart


def _graphs(
    folder: Path, settings: ExportConfig, names: Wires, specs: tuple[InputSpec, ...]
) -> Callable[[Mapping[str, object]], Answers]:
    """A function that gives every graph's scores [R, M, K] of a request."""
    lookup, between = cpu_session(folder / "lookup.onnx"), list(names.between().values())
    scores = {PLAIN: cpu_session(folder / "score.onnx")}
    scores |= {name: cpu_session(folder / files_of(name)[0]) for name in settings.variants}

    def ask(request: Mapping[str, object]) -> Answers:
        inputs, _ = read_request(specs, request)
        found = dict(zip(between, lookup.run(between, inputs), strict=True))
        return {name: score.run([names.scores], found)[0] for name, score in scores.items()}

    return ask


class _Asker:
    """A night's clean rows as requests."""

    def __init__(
        self, data: DataConfig, night: Night, rows: Rows, vocabularies: Vocabularies, specs: tuple[InputSpec, ...]
    ) -> None:
        self._data, self._night, self._rows, self._vocabularies = data, night, rows, vocabularies
        self.specs = specs

    def rows(self, clean: Path, ask: Callable[[Mapping[str, object]], Answers]) -> Answers:
        """Scores [N, K] of the night's rows, in the exam's order; NaN where a row was not asked."""
        said: Answers = {}
        with pq.ParquetFile(clean) as file:
            order, at = self._places(file)
            every, start = ceil(len(order) / ROWS), 0
            for number, batch in enumerate(file.iter_batches(BATCH)):
                stop = start + batch.num_rows
                if number % every == 0:
                    table = pa.Table.from_batches([batch])
                    past = self._past(at[start:stop])
                    for name, scores in ask({**columns_of(self.specs, table, past), **past}).items():
                        if name not in said:
                            said[name] = np.full((len(order), scores.shape[2]), np.nan, np.float32)
                        said[name][start:stop] = scores[:, 0]
                start = stop
        return {name: scores[order] for name, scores in said.items()}

    def lists(self, clean: Path, ask: Callable[[Mapping[str, object]], Answers]) -> Answers:
        """Scores [U, M, K] of the night's first items for its first users."""
        with pq.ParquetFile(clean) as file:
            _, at = self._places(file)
            keys = (self._data.user, self._data.item)
            taken = {}
            for key, most in zip(keys, (USERS, ITEMS), strict=True):
                ids = self._vocabularies[key].encode(file.read(columns=[key])[key])
                taken[key] = np.sort(np.unique(ids, return_index=True)[1])[:most]
            picked = {key: _picked(file, places) for key, places in taken.items()}
        of_user, of_item = (picked[key] for key in keys)
        past = self._past(at[taken[self._data.user]])
        requests = columns_of([spec for spec in self.specs if spec.per == "request"], of_user, past) | past
        candidates = columns_of([spec for spec in self.specs if spec.per == "candidate"], of_item, past)
        parts: list[Answers] = []
        for start in range(0, of_user.num_rows, TOGETHER):
            some = {name: values[start : start + TOGETHER] for name, values in requests.items()}
            users = min(TOGETHER, of_user.num_rows - start)
            shared = {
                name: np.broadcast_to(values[:, 0][None], (users, *values[:, 0].shape))
                for name, values in candidates.items()
            }
            parts.append(ask(some | shared))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _places(self, file: pq.ParquetFile) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where the exam's rows stand among the clean ones, and where the clean ones stand among all rows."""
        user = self._data.user
        order = order_of(file.read(columns=[user])[user], self._data, self._vocabularies)
        at = np.empty_like(order)
        at[order] = self._night.at
        return order, at

    def _past(self, at: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
        return past_of(self.specs, self._data, self._rows, self._night, self._vocabularies, at)


def _picked(file: pq.ParquetFile, places: npt.NDArray[np.int64]) -> pa.Table:
    """The rows at ascending places, read part by part: vectors of a whole night may not fit into memory."""
    parts, start = [], 0
    for batch in file.iter_batches(BATCH):
        inside = places[(places >= start) & (places < start + batch.num_rows)] - start
        parts.append(pa.Table.from_batches([batch]).take(pa.array(inside)))
        start += batch.num_rows
    return pa.concat_tables(parts)
