"""Evaluate: both exams on the newest night, which nothing has seen; then the gate."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.champion import champion_scores
from tasks.clients.workspace import digest_of
from tasks.data import vocabulary
from tasks.data.columns import Rows
from tasks.data.contract import DataConfig, ObjectiveConfig, SegmentsConfig
from tasks.data.lists import spans
from tasks.data.segments import level_name
from tasks.learning.bank import Bank
from tasks.learning.baselines import Baselines, BaselinesConfig
from tasks.learning.exams import (
    CANDIDATE,
    CHAMPION,
    LADDER,
    PARENT,
    SUPPORTS,
    ZERO_STEPS,
    Night,
    column,
    facts,
    joined,
    sit,
)
from tasks.learning.intervals import Interval
from tasks.learning.ladder import Ladder
from tasks.learning.material import I64, Material
from tasks.learning.training import steady
from tasks.meta_train import rows_of, trained_base
from tasks.references import (
    BankRef,
    BaseRef,
    ExamRef,
    IngestRef,
    Place,
    PrepareRef,
    RetentionRef,
    ScoreRow,
    ValidateRef,
    VerdictRef,
)
from tasks.release.alarms import (
    LEAK_VECTOR_ROWS,
    Alarm,
    FloatArray,
    forgetting,
    harmful,
    inert,
    leaking,
    rates_by_category,
    rates_by_values,
    rates_by_vector,
    vanished,
)
from tasks.release.evidence import both_exams, compare, segment_evidence
from tasks.release.gate import GateConfig, decide_release
from tasks.release.retention import against_parent
from tasks.release.segment_gate import decide_segments
from tasks.steps import Product, Progress, carry_out, device_of, open_workspace, recalled, record_of, verb

VERSION, JUDGE_VERSION = 4, 5
TABLE = "exam.parquet"
ANSWERS = "champion.parquet"


@verb
def evaluate(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    baselines: BaselinesConfig,
    gate: GateConfig,
    ingested: IngestRef,
    prepared: PrepareRef,
    base: BaseRef,
    bank: BankRef,
) -> ExamRef:
    """Examine candidate and baselines, and decide which segments keep weights of their own.

    The champion has no part in it, so that neither the exam nor the release depends on where the pointer stands.
    """
    layout = record_of(place, prepared)
    device = device_of(place)
    lead = lead_objective(data, gate)
    section = {
        "objectives": [objective.model_dump(mode="json") for objective in data.objectives],
        "segments": segments.model_dump(mode="json"),
        "baselines": baselines.model_dump(mode="json"),
        "gate": gate.model_dump(mode="json", include={"objective", "min_exam_rows", "false_discovery", "pool_nights"}),
        "device": device,
    }

    def work(folder: Path, progress: Progress) -> Product:
        rows = rows_of(place, layout)
        vocabularies = vocabulary.load(data, open_workspace(place).file(layout, "vocabulary.parquet"))
        trained = trained_base(place, base).to(device)
        exam_bank = Bank.load(open_workspace(place).file(record_of(place, bank), "bank.safetensors"))
        ladder, material = Ladder(rows, segments, data.user), Material(rows, device)
        night = Night.among(data, ladder, material, ingested.night.toordinal())
        with steady(0, None):
            rivals = Baselines(baselines, ladder, material, trained.kinds, night.ordinal)
            table = joined(facts(night, exam_bank, vocabularies), sit(night, trained, exam_bank, rivals))
        pq.write_table(table, folder / TABLE, compression="zstd")
        progress(table.num_rows, table.num_rows, "rows")
        tables = [table, *(exam for _, exam in earlier_exams(place, ingested.exams, table, lead))]
        verdicts = decide_segments(gate, segment_evidence(tables, lead))
        content = {
            "rows": table.num_rows,
            "users": len(np.unique(np.asarray(rows.user)[night.at])),
            "harmful": [harm.model_dump(mode="json") for harm in verdicts.harm(len(segments.levels))],
        }
        notes = {"tested": verdicts.table()}
        return Product(content, notes, {TABLE: folder / TABLE})

    inputs = {
        "layout": layout.digest,
        "base": base.digest,
        "bank": bank.digest,
        "earlier exams": digest_of(list(ingested.exams)),
    }
    record, shared = carry_out(place, "evaluate", VERSION, ingested.night, inputs, section, work)
    return ExamRef(**shared, rows=record.content["rows"], users=record.content["users"])


@verb
def judge(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    gate: GateConfig,
    ingested: IngestRef,
    validated: ValidateRef,
    prepared: PrepareRef,
    exam: ExamRef,
    retention: RetentionRef,
) -> VerdictRef:
    """Replay the champion on the same rows, and let the gate decide. Of what is retained it hears by alarm only."""
    lead = lead_objective(data, gate)
    inputs = {
        "exam": exam.digest,
        "champion": ingested.champion or "none",
        "earlier exams": digest_of([list(ingested.exams), list(ingested.verdicts)]),
        "retention": retention.digest,
    }
    section = {"gate": gate.model_dump(mode="json"), "segments": segments.model_dump(mode="json")}

    def work(folder: Path, progress: Progress) -> Product:
        table = exam_table(place, exam.key)
        scores: dict[str, Any] = {}
        why = "there is no champion yet"
        if ingested.champion is not None:
            scores, why = champion_scores(place, data, segments, ingested, validated, prepared)
            table = joined(table, scores)
        pq.write_table(pa.table(scores), folder / ANSWERS, compression="zstd")
        progress(table.num_rows, table.num_rows, "rows")
        verdicts = dict(zip(ingested.exams, ingested.verdicts, strict=True))
        pooled = earlier_exams(place, ingested.exams, table, lead)
        earlier = [joined(exam, _answers(place, verdicts[key])) for key, exam in pooled]
        told = both_exams([table, *earlier], data, seed=0)
        against = {name: vs for name, (vs, _) in compare([table, *earlier], "nightly", lead, seed=0).items()}
        against.pop(PARENT, None)
        verdict = decide_release(gate, against, None if ingested.champion is None else CHAMPION)
        alarms = list(_alarms(place, data, gate, lead, table, earlier, prepared, ingested))
        if (figures := record_of(place, retention).content["figures"]) is not None:
            alarms += filter(None, [forgetting(against_parent(figures), gate.golden.margin)])
        content = {"go": verdict.go, "decided_by": verdict.decided_by, "reasons": list(verdict.reasons)}
        notes = {
            "exams": told,
            "champion": {"release": ingested.champion, "compared": bool(scores), "why": why},
            "alarms": [[alarm.name, alarm.message] for alarm in alarms],
        }
        return Product(content, notes, {ANSWERS: folder / ANSWERS})

    record, shared = carry_out(place, "judge", JUDGE_VERSION, ingested.night, inputs, section, work)
    told = next(one for one in record.notes["exams"] if one["objective"] == lead.name)
    return VerdictRef(
        **shared,
        go=record.content["go"],
        decided_by=record.content["decided_by"],
        reasons=tuple(record.content["reasons"]),
        alarms=tuple(f"{name}: {message}" for name, message in record.notes["alarms"]),
        scores=tuple(_score_rows(told)),
    )


def lead_objective(data: DataConfig, gate: GateConfig) -> ObjectiveConfig:
    """The objective that the gate decides on."""
    return next((one for one in data.objectives if one.name == gate.objective), data.objectives[0])


def exam_table(place: Place, key: str) -> pa.Table:
    """The exam table of an evaluation."""
    return pq.read_table(open_workspace(place).file(recalled(place, "evaluate", key), TABLE))


def earlier_exams(
    place: Place, keys: Sequence[str], tonight: pa.Table, lead: ObjectiveConfig
) -> Iterator[tuple[str, pa.Table]]:
    """Of the exams of these keys, in their order, those that can be pooled with tonight's.

    An exam of another ladder, or one that did not ask for the lead objective, is left out.
    """
    for key in keys:
        table = exam_table(place, key)
        asked = f"label/{lead.name}" in table.column_names
        if asked and table.schema.metadata[LADDER] == tonight.schema.metadata[LADDER]:
            yield key, table


def _answers(place: Place, key: str) -> dict[str, Any]:
    """The champion's columns of an earlier verdict."""
    table = pq.read_table(open_workspace(place).file(recalled(place, "judge", key), ANSWERS))
    return {name: table[name].to_numpy() for name in table.column_names}


def _alarms(
    place: Place,
    data: DataConfig,
    gate: GateConfig,
    lead: ObjectiveConfig,
    table: pa.Table,
    earlier: list[pa.Table],
    prepared: PrepareRef,
    ingested: IngestRef,
) -> Iterator[Alarm]:
    own = table[column("contact 0", CANDIDATE, lead.name)].to_numpy()
    zero = table[column("contact 0", ZERO_STEPS, lead.name)].to_numpy()
    after = table[column("contact 5", CANDIDATE, lead.name)].to_numpy()
    before = table[column("contact 5", ZERO_STEPS, lead.name)].to_numpy()
    asked = ~np.isnan(after)
    if (alarm := inert(np.r_[own, after[asked]], np.r_[zero, before[asked]])) is not None:
        yield alarm
    vs: Interval = compare([table, *earlier], "nightly", lead, seed=0)[ZERO_STEPS][0]
    if (alarm := harmful(vs)) is not None:
        yield alarm
    rows = rows_of(place, record_of(place, prepared))
    at = np.flatnonzero(np.asarray(rows.night) == ingested.night.toordinal())
    if lead.kind == "binary":
        labels = np.asarray(rows.labels)[at, data.objectives.index(lead)]
        yield from leaking(labels, _told(data, rows, at, labels))
        few = np.sort(np.random.default_rng(0).permutation(len(at))[:LEAK_VECTOR_ROWS])
        yield from leaking(labels[few], _told_by_vectors(data, rows, at[few], labels[few]))
    if earlier:
        for number, level in enumerate(rows.levels):
            if level.columns == (data.user,):
                continue
            then = earlier[0].filter(pc.equal(earlier[0]["level"], number))
            then = then.group_by("segment").aggregate([([], "count_all")])
            now = table.filter(pc.equal(table["level"], number))["segment"].to_numpy(zero_copy_only=False)
            alarm = vanished(
                level_name(level.columns),
                then["segment"].to_numpy(zero_copy_only=False).astype(str),
                then["count_all"].to_numpy(),
                np.unique(now.astype(str)),
                gate.min_exam_rows,
            )
            if alarm is not None:
                yield alarm


def _told(data: DataConfig, rows: Rows, at: I64, labels: FloatArray) -> dict[str, FloatArray]:
    """What statistics, numbers, categories and lists say by themselves about the rows at positions, by name."""
    told: dict[str, FloatArray] = {
        name: np.asarray(rows.statistics)[at, number] for number, name in enumerate(rows.statistics_names)
    }
    for names, numbers in (
        (data.named("request", "numeric"), rows.request_numbers),
        (data.named("candidate", "numeric"), rows.candidate_numbers),
    ):
        told |= {name: np.asarray(numbers)[at, number] for number, name in enumerate(names)}
    for names, ids in (
        (data.named("request", "categorical"), np.asarray(rows.request_ids)[at]),
        (data.named("candidate", "categorical"), np.asarray(rows.candidate_ids)[at, 1:]),  # 0 is the item
    ):
        told |= {name: rates_by_category(labels, ids[:, number]) for number, name in enumerate(names)}
    for names, values, widths in (
        (data.named("request", "multi"), rows.request_values, data.widths("request", "multi")),
        (data.named("candidate", "multi"), rows.candidate_values, data.widths("candidate", "multi")),
    ):
        if values is not None:
            places = zip(names, spans(widths), strict=True)
            told |= {name: rates_by_values(labels, values[at, span]) for name, span in places}
    return told


def _told_by_vectors(data: DataConfig, rows: Rows, at: I64, labels: FloatArray) -> dict[str, FloatArray]:
    """What vectors say, likewise."""
    told: dict[str, FloatArray] = {}
    for names, vectors, widths in (
        (data.named("request", "dense"), rows.request_vectors, data.widths("request", "dense")),
        (data.named("candidate", "dense"), rows.candidate_vectors, data.widths("candidate", "dense")),
    ):
        if vectors is not None:
            told |= {
                n: rates_by_vector(labels, vectors[at, span]) for n, span in zip(names, spans(widths), strict=True)
            }
    return told


def _place(entry: tuple[str, dict[str, Any]]) -> tuple[bool, float]:
    """The candidate first, then the best."""
    method, figures = entry
    return method != CANDIDATE, figures.get("log_loss") or figures.get("rmse") or float("inf")


def _score_rows(told: dict[str, Any]) -> Iterator[ScoreRow]:
    exams = [("nightly", told["nightly"])]
    exams += [(f"first contact, {k} rows", told["first_contact"][str(k)]) for k in SUPPORTS if k > 0]
    for exam, by_method in exams:
        for method, figures in sorted(by_method.items(), key=_place):
            if method == PARENT or not figures.get("rows"):
                continue
            yield ScoreRow(
                exam=exam,
                method="adapted" if method == CANDIDATE else method,
                rows=figures["rows"],
                log_loss=figures["log_loss"] if "log_loss" in figures else figures["rmse"],
                calibration=figures.get("calibration_error"),
                auc=figures.get("auc"),
                ndcg=figures.get("ndcg_at_10"),
            )
