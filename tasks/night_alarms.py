"""What an operator must hear of a night, looked for in its exams, in the gate's findings and in its rows."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from tasks.clients.workspace import StepRecord
from tasks.data.columns import Rows
from tasks.data.contract import DataConfig, ObjectiveConfig
from tasks.data.lists import spans
from tasks.data.segments import level_name
from tasks.data.vocabulary import Vocabularies
from tasks.learning.adapters import AdapterConfig
from tasks.learning.exams import CANDIDATE, PARENT, ZERO_STEPS, column, segment_names
from tasks.learning.material import I64
from tasks.release.alarms import (
    LEAK_VECTOR_ROWS,
    Alarm,
    FloatArray,
    convicted,
    halves,
    harmful,
    inert,
    leaking,
    rates_by_category,
    rates_by_values,
    rates_by_vector,
    vanished,
)
from tasks.release.evidence import compare
from tasks.release.gate import GateConfig
from tasks.release.segment_gate import LevelHarm


def asked_for(table: pa.Table, objective: ObjectiveConfig) -> bool:
    """Whether an exam asked for an objective."""
    return f"label/{objective.name}" in table.column_names


def of_adaptation(
    data: DataConfig, adapter: AdapterConfig, gate: GateConfig, rows: Rows, tables: Sequence[pa.Table]
) -> Iterator[Alarm]:
    """What adaptation as a whole, and that of each level, does to the objectives.

    Args:
        data: the contract.
        adapter: which kind it is.
        gate: the rate of false discoveries.
        rows: for the levels' names.
        tables: exams of weights of the same kind, tonight's first: what others did is no news of these.
    """
    if adapter.kind == "none":
        return
    tonight, served = tables[0], tables[0]["level"].to_numpy()

    def said(condition: str, method: str) -> list[FloatArray]:
        """Of every objective."""
        return [tonight[column(condition, method, one.name)].to_numpy() for one in data.objectives]

    adapted = zip(said("contact 0", CANDIDATE), said("contact 5", CANDIDATE), strict=True)
    without = zip(said("contact 0", ZERO_STEPS), said("contact 5", ZERO_STEPS), strict=True)
    idle = 0
    for objective, after, before in zip(data.objectives, adapted, without, strict=True):
        asked = ~np.isnan(after[1])
        name = objective.name if len(data.objectives) > 1 else ""
        if (alarm := inert(np.r_[after[0], after[1][asked]], np.r_[before[0], before[1][asked]], of=name)) is not None:
            yield alarm
            idle += 1
    own, parent = (np.stack(said("nightly", method)) for method in (CANDIDATE, PARENT))
    for number, level in enumerate(rows.levels if idle < len(data.objectives) else ()):
        mine = served == number
        if (alarm := inert(own[:, mine], parent[:, mine], level_name(level.columns))) is not None:
            yield alarm
    against = {
        objective.name: compare([one for one in tables if asked_for(one, objective)], "nightly", objective, seed=0)
        for objective in data.objectives
    }
    yield from harmful({name: found[ZERO_STEPS][0] for name, found in against.items()}, gate.false_discovery)


def of_segments(data: DataConfig, gate: GateConfig, rows: Rows, examined: StepRecord) -> Iterator[Alarm]:
    """Whose own weights are proven to do harm."""
    for number, (level, harm) in enumerate(zip(rows.levels, examined.content["harmful"], strict=True)):
        tested = [one for one in examined.notes["tested"] if one["level"] == number]
        share = examined.notes["convicted"][number] if data.user in level.columns else None
        proven = LevelHarm.model_validate(harm)
        if (alarm := convicted(level_name(level.columns), proven, tested, gate.false_discovery, share)) is not None:
            yield alarm


def of_inputs(data: DataConfig, rows: Rows, night: int) -> Iterator[Alarm]:
    """Which inputs tell the labels of an objective by themselves; each is named once."""
    at = np.flatnonzero(np.asarray(rows.night) == night)
    few = np.sort(np.random.default_rng(0).permutation(len(at))[:LEAK_VECTOR_ROWS])
    named: set[str] = set()
    for number, objective in enumerate(data.objectives):
        labels = np.asarray(rows.labels)[at, number]
        labels = labels if objective.kind == "binary" else halves(labels)
        name = objective.name if len(data.objectives) > 1 else ""
        for chosen, told in (
            (labels, _told(data, rows, at, labels)),
            (labels[few], _told_by_vectors(data, rows, at[few], labels[few])),
        ):
            fresh = {one: values for one, values in told.items() if one not in named}
            found = {one: leaking(chosen, {one: values}, name) for one, values in fresh.items()}
            named |= {one for one, alarms in found.items() if alarms}
            yield from (alarm for alarms in found.values() for alarm in alarms)


def of_lost_segments(
    data: DataConfig, gate: GateConfig, rows: Rows, night: int, words: Vocabularies
) -> Iterator[Alarm]:
    """Which segments came on each of the nights before and have no rows tonight, whoever's weights serve them.

    Args:
        data: the contract.
        gate: how many rows a segment is missed from, and how many nights count, tonight included. A cohort that comes
            on some nights and not on others is none that vanished.
        rows: history and night.
        night: its ordinal.
        words: raw keys.
    """
    nights = np.asarray(rows.night)
    before = np.unique(nights[nights < night])[1 - gate.pool_nights :] if gate.pool_nights > 1 else nights[:0]
    for level in rows.levels if len(before) else ():
        if data.user in level.columns:
            continue
        segment = np.asarray(level.segment)
        counts = [np.bincount(segment[nights == one], minlength=level.size) for one in (*before, night)]
        always = np.flatnonzero(np.min(counts[:-1], axis=0) > 0)
        names = segment_names(level.keys[always], level.columns, level.radices, words)
        keys = names.to_numpy(zero_copy_only=False).astype(str)
        there = counts[-1][always] > 0
        alarm = vanished(level_name(level.columns), keys, counts[-2][always], keys[there], gate.min_exam_rows)
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
