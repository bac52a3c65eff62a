"""Search: settings of ranker, adapter and training tried on earlier nights, and the best held against the config's own.

Each trial trains from nothing on the nights before a cut, and is scored on the block of nights behind it; then the same
with the next cut. The best of all trials and the config's own settings are then compared on a last block, which no
trial was chosen by. Nothing is published, and nothing of the night itself or later is read.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from tasks.clients.workspace import digest_of
from tasks.data import vocabulary
from tasks.data.columns import Rows
from tasks.data.contract import DataConfig, ObjectiveConfig, Section, SegmentsConfig
from tasks.data.vocabulary import Vocabularies
from tasks.errors import NotEnoughHistory
from tasks.evaluate import lead_objective
from tasks.learning import training as learning
from tasks.learning.adapters import AdapterConfig
from tasks.learning.base import shape_of
from tasks.learning.exams import CANDIDATE, SUPPORTS, Night, contact, joined, sit_contact, who_was_asked
from tasks.learning.intervals import Interval
from tasks.learning.ladder import Ladder
from tasks.learning.material import Material, visits_of
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape
from tasks.learning.setting import Setting
from tasks.learning.space import BELONGS, Parameter, Sections, Settings, Value, candidate_kinds
from tasks.learning.study import Told, Tried, remembered
from tasks.learning.training_config import BESIDE, TrainingConfig
from tasks.meta_train import LOOSE_STARTS, rows_of, solved_from
from tasks.references import HistoryRef, Place
from tasks.release.evidence import compare, losses
from tasks.release.gate import GateConfig
from tasks.steps import device_of, looked_at, open_workspace, record_of, verb

VERSION = 5
"""Part of a study's name: bumped where a loss would come out otherwise."""
OWN = "own settings"
"""The method that is the config's own settings."""
FEWEST = 2
"""Nights that a training needs."""


class SearchPlan(Section):
    """How long and how a search looks."""

    trials: Annotated[int, Field(ge=1, le=100_000)]
    """Trials in all, those of earlier runs included."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """No trial begins later than this after the start."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sampler."""
    block: Annotated[int, Field(ge=1)] = 7
    """Nights of a block, counted where the history has rows."""
    cuts: Annotated[int, Field(ge=1, le=20)] = 2
    """Blocks that settings are chosen by, each scored by a training on all nights before it."""
    storage: str
    """File that remembers the trials."""


class SearchedSetting(Section):
    """One setting that was searched."""

    name: str
    own: Value
    best: Value


class LastBlock(Section):
    """Best and own settings on the nights that nothing was chosen by."""

    support: int
    """Rows of the night that adapters have seen; 0 is the nightly exam's question."""
    rows: int
    users: int
    own: float
    best: float
    difference: float
    """Best minus own, per row; below zero is better."""
    low: float | None
    high: float | None


class SearchRef(Section):
    """What a search found."""

    objective: str
    settings: tuple[SearchedSetting, ...]
    own_is_best: bool
    """Whether no trial did better on the blocks that were chosen by."""
    chosen_by: tuple[date, date]
    """First and last night of the blocks that settings were chosen by."""
    last: tuple[date, date]
    """Of the last block."""
    own: float
    """Loss of the config's own settings on the blocks that were chosen by."""
    best: float
    """Loss of the best; optimistic, for it was chosen by it."""
    lines: tuple[LastBlock, ...]
    """By support; empty where the config's own settings did best."""
    complete: int
    pruned: int
    refused: tuple[str, ...]
    """Why trials whose settings cannot be trained, or whose process was killed, were given up, each reason once."""
    history: int
    """Nights that were read, in training or else."""
    left_out: dict[str, str]
    """Nights of the window that were not, with the reason."""
    storage: str


@verb
def search_settings(
    place: Place,
    data: DataConfig,
    segments: SegmentsConfig,
    ranker: RankerConfig,
    training: TrainingConfig,
    adapter: AdapterConfig,
    gate: GateConfig,
    history: HistoryRef,
    space: dict[str, Parameter],
    plan: SearchPlan,
) -> SearchRef:
    """Try settings, and say what the best one is worth on nights that it was not chosen by.

    Raises:
        NotEnoughHistory: the window has too few nights for the blocks.
        InvalidConfig: Optuna is not installed.
        SearchRunning: another search uses the file of trials.
        TrainingDiverged: the config's own settings cannot be trained.
    """
    record = record_of(place, history)
    rows = rows_of(place, record)
    words = vocabulary.load(data, open_workspace(place).file(record, "vocabulary.parquet"))
    own = Sections(ranker, adapter, training, candidate_kinds(data))
    bench = _Bench(data, segments, lead_objective(data, gate), rows, words, device_of(place))
    blocks = _blocks(np.unique(np.asarray(rows.night)), plan)
    made_from = {
        "version": VERSION,
        "history": history.digest,
        "objectives": [objective.model_dump(mode="json") for objective in data.objectives],
        "lead": bench.lead.name,
        "segments": segments.model_dump(mode="json"),
        "sections": {
            name: whole.model_dump(mode="json", exclude=set(BESIDE) if name == "training" else None)
            for name, whole in own.named.items()
        },
        "space": {name: one.model_dump(mode="json") for name, one in space.items()},
        "plan": plan.model_dump(mode="json", include={"seed", "block", "cuts"}),
        "device": bench.device,
        **solved_from(data),
    }
    if {"ranker.features", "adapter.kind", "adapter.bends"} & space.keys() or adapter.reads_learned(ranker.features):
        made_from["starts"] = LOOSE_STARTS
    begun = time.monotonic()

    def score(settings: Settings, told: Told) -> float:
        return bench.score(own.changed(settings), blocks[:-1], told)

    def in_time() -> bool:
        return plan.minutes is None or time.monotonic() - begun < 60 * plan.minutes

    with (
        remembered(Path(plan.storage), digest_of(made_from), space, plan.seed, own) as study,
        looked_at("search", _how_many(plan, len(study.tried))) as progress,
    ):
        mine = study.default(lambda: bench.score(own, blocks[:-1], lambda part, loss: None))
        study.run(score, plan.trials, in_time, lambda done: progress(done, plan.trials, "trials"))
        tried = study.tried
        best = min((one for one in tried if one.loss is not None), key=_loss, default=None)
        won = best is not None and _loss(best) < mine
        settings: Settings = best.settings if best is not None and won else {}
        changed = own.changed(settings)
        lines = bench.compared(changed, own, blocks[-1]) if won else ()
    return SearchRef(
        objective=bench.lead.name,
        settings=settings_of(space, own, changed),
        own_is_best=not won,
        chosen_by=(date.fromordinal(int(blocks[0][0])), date.fromordinal(int(blocks[-2][-1]))),
        last=(date.fromordinal(int(blocks[-1][0])), date.fromordinal(int(blocks[-1][-1]))),
        own=mine,
        best=_loss(best) if best is not None and won else mine,
        lines=lines,
        complete=sum(one.state == "complete" for one in tried),
        pruned=sum(one.state == "pruned" for one in tried),
        refused=tuple(sorted({one.why for one in tried if one.why})),
        history=len(history.nights),
        left_out=history.left_out,
        storage=plan.storage,
    )


def settings_of(space: Mapping[str, Parameter], own: Sections, best: Sections) -> tuple[SearchedSetting, ...]:
    """The searched settings that apply to the best, and those that are at their defaults because of its kinds.

    Args:
        space: what was tried.
        own: the config's sections.
        best: those of the best trial.
    """
    return tuple(
        SearchedSetting(name=name, own=own.value(name), best=best.value(name))
        for name in dict.fromkeys((*space, *BELONGS))
        if (name in space and best.applies(name, {})) or best.value(name) != own.value(name)
    )


def shape_before(data: DataConfig, rows: Rows, words: Vocabularies, first: int) -> RankerShape:
    """Sizes of a ranker as they were before a night: ids are appended, so the keys until then come first.

    With a row for every later key too, initial weights would depend on nights behind the cut, and a new key would be
    read with a row that nobody trained, in place of the unknown one.

    Args:
        data: the contract.
        rows: of the whole window.
        words: of the whole window.
        first: ordinal of the first night that is not known yet.
    """
    before = (np.asarray(rows.night) < first)[:, None]

    def sizes(ids: npt.NDArray[np.integer] | None, widths: tuple[int, ...]) -> tuple[int, ...]:
        if ids is None or not widths:
            return ()
        largest = np.max(ids, axis=0, where=before, initial=0)
        return tuple(1 + int(part.max(initial=0)) for part in np.split(largest, np.cumsum(widths)[:-1]))

    whole = shape_of(data, rows, words)
    tables = {
        "request_vocabularies": sizes(rows.request_ids, (1,) * len(whole.request_vocabularies)),
        "candidate_vocabularies": sizes(rows.candidate_ids, (1,) * len(whole.candidate_vocabularies)),
        "request_value_vocabularies": sizes(rows.request_values, whole.request_values),
        "candidate_value_vocabularies": sizes(rows.candidate_values, whole.candidate_values),
    }
    return whole.model_copy(update=tables)


def _how_many(plan: SearchPlan, before: int) -> str:
    return f"{plan.trials} trials, {before} of them done before" if before else f"{plan.trials} trials"


def _loss(tried: Tried) -> float:
    return math.inf if tried.loss is None else tried.loss


def _blocks(nights: npt.NDArray[np.integer], plan: SearchPlan) -> list[npt.NDArray[np.integer]]:
    """The nights (ordinals, ascending) of each block: those that are chosen by, oldest first, then the last one."""
    needed = plan.block * (plan.cuts + 1) + FEWEST
    if len(nights) < needed:
        raise NotEnoughHistory(
            f"the history has rows on {len(nights)} nights, and a search with {plan.cuts} + 1 blocks of {plan.block} "
            f"nights needs {needed}; search for a later night, widen data.window_nights, or lower --block or --cuts"
        )
    return list(np.split(nights[-plan.block * (plan.cuts + 1) :], plan.cuts + 1))


@dataclass(frozen=True)
class _Bench:
    """What every trial is scored with."""

    data: DataConfig
    segments: SegmentsConfig
    lead: ObjectiveConfig
    rows: Rows
    words: Vocabularies
    device: str

    def score(self, sections: Sections, blocks: list[npt.NDArray[np.integer]], told: Told) -> float:
        """Mean loss over the blocks, each by a training of its own."""
        found: list[float] = []
        for number, block in enumerate(blocks):
            found.append(self._mean_loss(self._examined(sections, block, CANDIDATE)))
            if number + 1 < len(blocks):  # behind the last one there is nothing to save
                told(number, sum(found) / len(found))
        return sum(found) / len(found)

    def compared(self, best: Sections, own: Sections, block: npt.NDArray[np.integer]) -> tuple[LastBlock, ...]:
        """Both settings on the rows of a block, paired."""
        table = self._examined(best, block, CANDIDATE)
        other = self._examined(own, block, OWN)
        for name in other.column_names:
            if name not in table.column_names:
                table = table.append_column(name, other[name])
        lines: list[LastBlock] = []
        for k in SUPPORTS:
            vs: Interval = compare([table], contact(k), self.lead, seed=0)[OWN][0]
            if not vs.rows:
                continue
            means = {name: float(np.nanmean(losses(table, contact(k), name, self.lead))) for name in (OWN, CANDIDATE)}
            bounds = vs.as_json()
            lines.append(
                LastBlock(
                    **{"support": k, "rows": vs.rows, "users": vs.users, "own": means[OWN], "best": means[CANDIDATE]},
                    **{"difference": vs.estimate, "low": bounds["low"], "high": bounds["high"]},
                )
            )
        return tuple(lines)

    def _examined(self, sections: Sections, block: npt.NDArray[np.integer], method: str) -> pa.Table:
        """The rows of a block, and what a base that was trained on the nights before it says of them."""
        first, last = int(block[0]), int(block[-1])
        trained = learning.meta_train(
            Setting(
                *(self.data, self.segments, sections.ranker, sections.adapter, sections.training, self.rows),
                *(shape_before(self.data, self.rows, self.words, first), date.fromordinal(first), self.device),
            )
        )
        asked = Night(
            *(self.data, Ladder(self.rows, self.segments, self.data.user), Material(self.rows, self.device), last),
            visits_of(self.rows).of_nights(first, last),
        )
        with learning.steady(0, sections.training.threads):
            said = sit_contact(asked, trained.base, method)
        return joined(who_was_asked(asked, self.words), said)

    def _mean_loss(self, table: pa.Table) -> float:
        """Loss per row, averaged over the supports of the exams."""
        found = [losses(table, contact(k), CANDIDATE, self.lead) for k in SUPPORTS]
        return float(np.mean([np.nanmean(one) for one in found if not np.isnan(one).all()]))
