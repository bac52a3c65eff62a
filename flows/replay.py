"""Nights run again and compared, and nothing published: each starts from what the replay made of the one before.

There is no gate between them. A replay tells how a config would have fared, and where an unpublished night leads next
is part of that; so every replayed night's base is the next one's parent, whatever a gate would have said.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

from prefect import flow

from flows.config import RetrainConfig
from flows.nightly import resolve
from tasks.adapt import adapt
from tasks.data.contract import Section
from tasks.data.lakes import nights as nights_of
from tasks.errors import DataRejected, InvalidConfig, NotEnoughHistory
from tasks.evaluate import evaluate
from tasks.feedback import examine_feedback
from tasks.ingest import ingest_replayed, lake, released_before
from tasks.joint import examine_joint, jointly
from tasks.meta_train import meta_train
from tasks.parents import replayed_parent
from tasks.prepare import prepare
from tasks.recommend import recommend
from tasks.references import BankRef, ExamRef, FeedbackRef, IngestRef, JointRef, ListsRef, ParentRef, PrepareRef
from tasks.replay import Examined, ReplayRef, compare_nights
from tasks.steps import hold
from tasks.tensorboard import check as check_tensorboard
from tasks.validate import validate

log = logging.getLogger("nightrank.replay")


class ReplayedNight(Section):
    """What became of one night."""

    night: date
    state: Literal["examined", "skipped", "rejected"]
    why: str
    prepared: PrepareRef | None = None
    bank: BankRef | None = None
    exam: ExamRef | None = None
    lists: ListsRef | None = None
    joint: JointRef | None = None
    feedback: FeedbackRef | None = None

    @property
    def examined(self) -> Examined | None:
        """What is compared; None where the night was not examined."""
        if self.bank is None or self.exam is None or self.lists is None:
            return None
        return Examined(bank=self.bank, exam=self.exam, lists=self.lists, joint=self.joint, feedback=self.feedback)


class ReplayResult(Section):
    """What a replay came to."""

    nights: tuple[ReplayedNight, ...]
    written: ReplayRef


Onlooker = Callable[[int, int, ReplayedNight], None]
"""Called as ``onlooker(place, of, outcome)`` when a night is done with."""


def _log(place: int, of: int, outcome: ReplayedNight) -> None:
    log.info("%d of %d, %s %s: %s", place, of, outcome.night, outcome.state, outcome.why)


_onlooker: ContextVar[Onlooker] = ContextVar("onlooker of a replay", default=_log)


@contextmanager
def replay_told_to(onlooker: Onlooker) -> Iterator[None]:
    """Tell ``onlooker`` each night's outcome as it comes."""
    token = _onlooker.set(onlooker)
    try:
        yield
    finally:
        _onlooker.reset(token)


@dataclass(frozen=True)
class _Chain:
    """What the next night starts from, and the exams that it pools, newest first.

    Joint training has a chain of its own, `jointly`, that begins where the other does.
    """

    parent: ParentRef | None
    jointly: ParentRef | None
    exams: tuple[str, ...]


@flow(name="replay", validate_parameters=True, persist_result=False)
def replay(
    config: RetrainConfig | str,
    start: date,
    end: date,
    min_rows: int = 0,
    warm: bool = False,
    out: str | None = None,
    seed: int = 0,
    joint: bool = False,
) -> ReplayResult:
    """Examine the nights of a range in order, without publishing, and compare every method over all of them.

    Beside its exams, each night ranks one catalogue for a sample of its users: at most 300,000 scores of the network
    (`tasks.learning.catalogue`). With `export.feedback`, first contact is also asked through requests that bring it.
    Step records are written and the lease is taken; releases, pointer and ledger stay as
    they are. A night that was examined before from the same start, in a replay or to be published, is not examined
    again.

    Args:
        config: the pipeline's config, or the path of its file.
        start: the first night.
        end: the last night, included.
        min_rows: nights with fewer rows are left out, and are nobody's parent; they still count as history.
        warm: start from the newest gate-passed release before `start`; else from nothing.
        out: folder for the table and the page; none: `var/replay/<pipeline>-<start>-<end>`.
        seed: of the bootstrap by user.
        joint: also train the same network jointly, without adaptation in its loss, and compare it with the same
            adapters solved on it afterwards; each night then trains twice.

    Raises:
        InvalidConfig: the range is empty.
        DataRejected: no night of the range could be examined; the message says why not.
        NightrankError: at once, for anything that is not about one night's data.
    """
    config, tell = resolve(config), _onlooker.get()
    config.baselines.check()  # now, not after the training that they are to be compared with
    check_tensorboard(config.training)
    present = _nights(config, start, end)
    parent, exams = released_before(config.place(), config.gate, start) if warm else (None, ())
    began = parent
    chain = _Chain(parent, parent, exams)
    outcomes: list[ReplayedNight] = []
    for number, night in enumerate(present, start=1):
        outcome, chain = _one_night(config, night, chain, min_rows, joint)
        outcomes.append(outcome)
        tell(number, len(present), outcome)
    found = {outcome.night: one for outcome in outcomes if (one := outcome.examined) is not None}
    left_out = [(outcome.night, outcome.why) for outcome in outcomes if outcome.examined is None]
    if not found:
        listed = "".join(f"\n{night}: {why}" for night, why in left_out)
        raise DataRejected(f"replay from {start} to {end}: no night could be examined:{listed}")
    folder = out or str(Path("var/replay") / f"{config.pipeline}-{start}-{end}")
    written = compare_nights(config.place(), config.data, config.segments, found, left_out, began, seed, folder)
    return ReplayResult(nights=tuple(outcomes), written=written)


def _nights(config: RetrainConfig, start: date, end: date) -> list[date]:
    """The nights of the range that the lake has."""
    if start > end:
        raise InvalidConfig(f"replay from {start} to {end}: start lies after end; allowed: start on or before end")
    present = sorted(night for night in nights_of(config.data, lake(config.data)) if start <= night <= end)
    if not present:
        where = ", ".join(one.source for one in config.data.every_lake)
        raise InvalidConfig(f"replay from {start} to {end}: the lake {where} has no night of this range")
    return present


def _one_night(
    config: RetrainConfig, night: date, chain: _Chain, min_rows: int, joint: bool
) -> tuple[ReplayedNight, _Chain]:
    """Examine a night, up to the exam. Returns what became of it, and what the next one starts from."""
    place, data, segments, adapter, gate = config.place(), config.data, config.segments, config.adapter, config.gate
    try:
        with hold(place):
            ingested = ingest_replayed(place, data, night, chain.parent, chain.exams)
            if ingested.rows < min_rows:
                why = f"{ingested.rows:,} rows, fewer than {min_rows:,}"
                return ReplayedNight(night=night, state="skipped", why=why), chain
            validated = validate(place, data, ingested)
            prepared = prepare(place, data, segments, config.statistics, ingested, validated)
            base = meta_train(place, data, segments, config.ranker, config.training, adapter, ingested, prepared)
            bank = adapt(place, data, segments, adapter, prepared, base, bank="exam")
            exam = evaluate(place, data, segments, config.baselines, gate, ingested, prepared, base, bank)
            statistics, baselines = config.statistics, config.baselines
            lists = recommend(place, data, segments, statistics, baselines, ingested, prepared, base, bank)
            brought = (place, data, segments, statistics, config.export, ingested, prepared, base, bank)
            feedback = examine_feedback(*brought) if config.export.feedback else None
            parent = replayed_parent(place, prepared, base)
            answers, other = _trained_jointly(config, ingested, prepared, chain.jointly) if joint else (None, None)
    except NotEnoughHistory as error:
        return ReplayedNight(night=night, state="skipped", why=str(error)), chain
    except DataRejected as error:
        return ReplayedNight(night=night, state="rejected", why=f"{type(error).__name__}: {error}"), chain
    why = f"{exam.rows:,} rows of {exam.users:,} users{', as examined before' if exam.reused else ''}"
    outcome = ReplayedNight(
        night=night, state="examined", why=why, prepared=prepared, bank=bank, exam=exam, lists=lists, joint=answers,
        feedback=feedback,
    )  # fmt: skip
    return outcome, replace(chain, parent=parent, jointly=other, exams=(exam.key, *chain.exams)[: gate.pool_nights - 1])


def _trained_jointly(
    config: RetrainConfig, ingested: IngestRef, prepared: PrepareRef, parent: ParentRef | None
) -> tuple[JointRef, ParentRef]:
    """What joint training says of a night, and what its next one starts from."""
    place, data, segments, adapter = config.place(), config.data, config.segments, config.adapter
    ingested = ingested.model_copy(update={"parent": parent})
    base = meta_train(place, data, segments, config.ranker, jointly(config.training), adapter, ingested, prepared)
    bank = adapt(place, data, segments, adapter, prepared, base, bank="exam")
    answers = examine_joint(place, data, segments, ingested, prepared, base, bank)
    return answers, replayed_parent(place, prepared, base)
