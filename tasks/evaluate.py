"""Evaluate: both exams on the newest night, which nothing has seen; then the gate."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.adapt import cost_of
from tasks.champion import champion_scores
from tasks.clients.workspace import digest_of
from tasks.data import vocabulary
from tasks.data.contract import DataConfig, ObjectiveConfig, SegmentsConfig
from tasks.learning.adapters import AdapterConfig
from tasks.learning.bank import Bank
from tasks.learning.baselines import Baselines, BaselinesConfig
from tasks.learning.exams import (
    CANDIDATE,
    CHAMPION,
    LADDER,
    PARENT,
    SUPPORTS,
    Night,
    facts,
    joined,
    sit,
)
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.training import steady
from tasks.meta_train import rows_of, trained_base
from tasks.night_alarms import asked_for, of_adaptation, of_inputs, of_lost_segments, of_segments
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
from tasks.release import cost, earned, lift
from tasks.release.alarms import forgetting
from tasks.release.evidence import both_exams, compare, segment_evidence
from tasks.release.gate import GateConfig, decide_release
from tasks.release.retention import against_parent
from tasks.release.segment_gate import decide_segments
from tasks.steps import Product, Progress, carry_out, device_of, open_workspace, recalled, record_of, verb

VERSION, JUDGE_VERSION = 6, 6
ADAPTED = b"adapted"
"""Where an exam table's metadata say which kind of ranker was adapted how: weights of another kind prove nothing."""
TABLE, EARNED, LIFT = "exam.parquet", "support.parquet", "segments.parquet"
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
        how = digest_of([trained.network.config.kind, trained.adapter.model_dump(mode="json")])
        table = table.replace_schema_metadata({**table.schema.metadata, ADAPTED: how})
        pq.write_table(table, folder / TABLE, compression="zstd")
        progress(table.num_rows, table.num_rows, "rows")
        earlier = dict(earlier_exams(place, ingested.exams, table, lead))
        tables = [table, *(one for one in earlier.values() if _alike(one, table))]
        verdicts = decide_segments(gate, segment_evidence(tables, lead))
        shared = [objective for objective in data.objectives if all(asked_for(one, objective) for one in tables)]
        asked = data.model_copy(update={"objectives": tuple(shared)})
        gained = lift.lifts(tables, asked, segments.levels)
        lift.save(gained, folder / LIFT)
        earned.save(earned.curve(tables, asked, segments.levels, seed=0), folder / EARNED)
        spent = cost_of(record_of(place, bank))
        pooled = [spent, *(_spent(place, key) for key, one in earlier.items() if _alike(one, table))]
        paid = cost.costs(pooled, gained, tables, asked, segments.levels, seed=0)
        content = {
            "rows": table.num_rows,
            "users": len(np.unique(np.asarray(rows.user)[night.at])),
            "harmful": [harm.model_dump(mode="json") for harm in verdicts.harm(len(segments.levels))],
        }
        notes = {
            "nights": len(tables),
            "unnamed": lift.unnamed_levels(data, segments.levels),
            "tested": verdicts.table([data.user not in columns for columns in segments.levels]),
            "convicted": [verdicts.share(number) for number in range(len(segments.levels))],
            "spent": [asdict(one) for one in spent],
            "cost": [asdict(one) for one in paid],
        }
        return Product(content, notes, {name: folder / name for name in (TABLE, EARNED, LIFT)})

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
    adapter: AdapterConfig,
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
    section = {
        "gate": gate.model_dump(mode="json"),
        "segments": segments.model_dump(mode="json"),
        "adapts": adapter.kind != "none",
    }

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
        layout, night = record_of(place, prepared), ingested.night.toordinal()
        rows = rows_of(place, layout)
        words = vocabulary.load(data, open_workspace(place).file(layout, "vocabulary.parquet"))
        alike = [table, *(one for one in earlier if _alike(one, table))]
        alarms = list(of_adaptation(data, adapter, gate, rows, alike))
        alarms += of_segments(data, gate, rows, record_of(place, exam))
        alarms += of_inputs(data, rows, night)
        alarms += of_lost_segments(data, gate, rows, night, words)
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
        if asked_for(table, lead) and table.schema.metadata[LADDER] == tonight.schema.metadata[LADDER]:
            yield key, table


def _answers(place: Place, key: str) -> dict[str, Any]:
    """The champion's columns of an earlier verdict."""
    table = pq.read_table(open_workspace(place).file(recalled(place, "judge", key), ANSWERS))
    return {name: table[name].to_numpy() for name in table.column_names}


def _alike(before: pa.Table, tonight: pa.Table) -> bool:
    """Whether weights of the same kind were examined, on the same kind of ranker."""
    return bool((before.schema.metadata or {}).get(ADAPTED) == tonight.schema.metadata[ADAPTED])


def _spent(place: Place, key: str) -> list[cost.Spent]:
    """What the levels of an earlier exam's bank took."""
    return [cost.Spent(**one) for one in recalled(place, "evaluate", key).notes["spent"]]


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
