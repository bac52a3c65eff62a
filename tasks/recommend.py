"""Recommend: what a sample of a night's users would be shown of one catalogue, and how it differs between them."""

from pathlib import Path

import numpy as np

from tasks.data import vocabulary
from tasks.data.contract import DataConfig, SegmentsConfig, StatisticsConfig
from tasks.data.statistics import StatisticsTables, serving_tables
from tasks.data.vocabulary import Vocabularies
from tasks.learning.bank import Bank
from tasks.learning.baselines import BaselinesConfig
from tasks.learning.catalogue import catalogue, ranked, sampled
from tasks.learning.exams import Night
from tasks.learning.factorisation import Factorisation
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material
from tasks.learning.training import steady
from tasks.meta_train import rows_of, trained_base
from tasks.prepare import night_of_record
from tasks.references import BankRef, BaseRef, IngestRef, ListsRef, Place, PrepareRef
from tasks.release.variety import Variety, load, save, varieties
from tasks.steps import Product, Progress, carry_out, device_of, open_workspace, recalled, record_of, verb

VERSION = 3
TABLE = "variety.parquet"
SEED = 0
"""Of the draws of users and candidates: the same for every config, so that replays are compared on the same ones."""


@verb
def recommend(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    statistics: StatisticsConfig,
    baselines: BaselinesConfig,
    ingested: IngestRef,
    prepared: PrepareRef,
    base: BaseRef,
    bank: BankRef,
) -> ListsRef:
    """Rank one catalogue for a sample of the night's users by every method, with the exam bank.

    `tasks.learning.catalogue` bounds how much is scored; beside that the sums of the history
    are added up and matrix factorisation is fitted on it once more, as the exam has done.

    Args:
        place: where.
        data: the contract.
        segments: the ladder.
        statistics: cohort and strengths.
        baselines: how strongly matrix factorisation is held.
        ingested: the night.
        prepared: the columns, whose rows of the night say who came.
        base: the base.
        bank: the exam bank.
    """
    layout, history = record_of(place, prepared), recalled(place, "history", prepared.history)
    device = device_of(place)
    names = (*data.named("request", "categorical"), *data.named("candidate", "categorical"))
    strengths = {"factors", "factor_strength", "sweeps", "seed"}
    section = {
        "columns": list(names),
        "objectives": [objective.model_dump(mode="json") for objective in data.objectives],
        "segments": segments.model_dump(mode="json"),
        "statistics": statistics.model_dump(mode="json"),
        "baselines": baselines.model_dump(mode="json", include=strengths),
        "device": device,
    }

    def work(folder: Path, progress: Progress) -> Product:
        workspace, ordinal = open_workspace(place), ingested.night.toordinal()
        rows = rows_of(place, layout)
        vocabularies = vocabulary.load(data, workspace.file(layout, "vocabulary.parquet"))
        known = as_of(place, data, statistics, prepared, vocabularies)
        trained = trained_base(place, base).to(device)
        exam_bank = Bank.load(workspace.file(record_of(place, bank), "bank.safetensors"))
        ladder, material = Ladder(rows, segments, data.user), Material(rows, device)
        night = Night.among(data, ladder, material, ordinal)
        candidates, visits = catalogue(rows, ordinal, SEED), sampled(night.visits, ordinal, SEED)
        with steady(0, None):
            factorisation = Factorisation(
                *(ladder, material, trained.kinds, np.flatnonzero(np.asarray(rows.night) < ordinal)),
                factors=baselines.factors,
                strength=baselines.factor_strength,
                sweeps=baselines.sweeps,
                seed=baselines.seed,
            )
            lists = ranked(night, trained, exam_bank, factorisation, known, candidates, visits)
        objectives = [objective.name for objective in data.objectives]
        save(varieties(lists, objectives, candidates, ingested.night.isoformat()), folder / TABLE)
        progress(len(visits), len(visits), "lists")
        content = {"users": len(visits), "candidates": len(candidates), "items": candidates.known}
        return Product(content, {}, {TABLE: folder / TABLE})

    inputs = {"layout": layout.digest, "history": history.digest, "base": base.digest, "bank": bank.digest}
    record, shared = carry_out(place, "recommend", VERSION, ingested.night, inputs, section, work)
    return ListsRef(**shared, users=record.content["users"], candidates=record.content["candidates"])


def as_of(
    place: Place, data: DataConfig, statistics: StatisticsConfig, prepared: PrepareRef, vocabularies: Vocabularies
) -> StatisticsTables:
    """The statistics that rows of the night have, of every key: from the nights of its history.

    Args:
        place: where.
        data: the contract.
        statistics: cohort and strengths.
        prepared: the night's columns.
        vocabularies: of these columns; what is new on the night has an id and no sums.
    """
    workspace, history = open_workspace(place), recalled(place, "history", prepared.history)
    states = [recalled(place, "statistics", key) for key in history.content["states"]]
    files = [(night_of_record(state), workspace.file(state, "state.parquet")) for state in states]
    return serving_tables(data, statistics, vocabularies, files)


def varieties_of(place: Place, lists: ListsRef) -> list[Variety]:
    """The night's figures.

    Raises:
        ObjectMissing: they are gone.
    """
    return load(open_workspace(place).file(record_of(place, lists), TABLE))
