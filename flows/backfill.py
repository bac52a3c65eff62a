"""Nights in order, each starting from the one before; finished ones are skipped, so that it resumes."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, timedelta
from typing import Literal

from prefect import flow

from flows.config import RetrainConfig
from flows.nightly import NightResult, nightly_retrain, resolve
from tasks.data.contract import Section
from tasks.data.lakes import nights_by_lake, why_absent
from tasks.errors import DataRejected, InvalidConfig, NotEnoughHistory
from tasks.ingest import lake
from tasks.releases import collected, releases

log = logging.getLogger("nightrank.backfill")


class PlannedNight(Section):
    """What a backfill means to do about one night."""

    night: date
    runs: bool
    why: str
    """Why it runs, or why it does not."""


class NightOutcome(Section):
    """What became of one night."""

    night: date
    state: Literal["released", "skipped", "rejected"]
    why: str
    result: NightResult | None = None


class BackfillResult(Section):
    """What a backfill came to."""

    plan: tuple[PlannedNight, ...]
    outcomes: tuple[NightOutcome, ...]


Onlooker = Callable[[tuple[PlannedNight, ...] | NightOutcome], None]


def _log(event: tuple[PlannedNight, ...] | NightOutcome) -> None:
    for entry in event if isinstance(event, tuple) else ():
        log.info("plan: %s %s: %s", entry.night, "runs" if entry.runs else "is skipped", entry.why)
    if isinstance(event, NightOutcome):
        log.info("%s %s: %s", event.night, event.state, event.why)


_onlooker: ContextVar[Onlooker] = ContextVar("onlooker", default=_log)


@contextmanager
def told_to(onlooker: Onlooker) -> Iterator[None]:
    """Tell ``onlooker`` the plan, and each night's outcome as it comes."""
    token = _onlooker.set(onlooker)
    try:
        yield
    finally:
        _onlooker.reset(token)


def plan(config: RetrainConfig, start: date, end: date, promote: bool) -> tuple[PlannedNight, ...]:
    """What to do about each night from ``start`` to ``end``, both included. Reads; changes nothing.

    Raises:
        InvalidConfig: the range is empty.
    """
    if start > end:
        raise InvalidConfig(f"backfill from {start} to {end}: start lies after end; allowed: start on or before end")
    found = nights_by_lake(config.data, lake(config.data))
    done = [row for row in releases(config.place()) if row.config == config.digest()]
    finished = {row.night: row for row in done}
    champion = max((row.night for row in done if row.champion and row.night is not None), default=date.min)
    removed = collected(config.place(), config.digest())

    def look_at(night: date) -> PlannedNight:
        row = finished.get(night)
        if absent := why_absent(config.data, found, night):
            return PlannedNight(night=night, runs=False, why=absent)
        if row is None and night in removed:
            why = f"finished: release {removed[night][:12]}, which was removed since as an old one"
            return PlannedNight(night=night, runs=False, why=why)
        if row is None:
            return PlannedNight(night=night, runs=True, why="has no release of this config yet")
        if promote and row.go and night > champion:
            return PlannedNight(night=night, runs=True, why=f"release {row.release[:12]} is finished, but not promoted")
        return PlannedNight(night=night, runs=False, why=f"finished: release {row.release[:12]}")

    return tuple(look_at(start + timedelta(days=day)) for day in range((end - start).days + 1))


@flow(name="backfill", validate_parameters=True, persist_result=False)
def backfill(
    config: RetrainConfig | str, start: date, end: date, promote: bool = False, dry_run: bool = False
) -> BackfillResult:
    """Run the nights of a range in order. A night whose data is refused is named and left out; others go on.

    Args:
        config: the pipeline's config, or the path of its file.
        start: the first night.
        end: the last night, included.
        promote: whether the pointer moves when a night's gate agrees.
        dry_run: plan only.

    Raises:
        DataRejected: at the end, if nights were refused; the message names them.
        NightrankError: at once, for anything that is not about one night's data.
    """
    config = resolve(config)
    tell = _onlooker.get()
    planned = plan(config, start, end, promote)
    tell(planned)
    outcomes: list[NightOutcome] = []
    for entry in () if dry_run else planned:
        outcome = _one_night(config, entry, promote)
        outcomes.append(outcome)
        tell(outcome)
    if refused := [outcome for outcome in outcomes if outcome.state == "rejected"]:
        listed = "".join(f"\n{outcome.night}: {outcome.why}" for outcome in refused)
        raise DataRejected(f"{len(refused)} of {len(planned)} nights were refused; the others are done:{listed}")
    return BackfillResult(plan=planned, outcomes=tuple(outcomes))


def _one_night(config: RetrainConfig, entry: PlannedNight, promote: bool) -> NightOutcome:
    if not entry.runs:
        return NightOutcome(night=entry.night, state="skipped", why=entry.why)
    try:
        result = nightly_retrain(config, entry.night, promote)
    except NotEnoughHistory as error:
        return NightOutcome(night=entry.night, state="skipped", why=str(error))
    except DataRejected as error:
        return NightOutcome(night=entry.night, state="rejected", why=f"{type(error).__name__}: {error}")
    return NightOutcome(night=entry.night, state="released", why=result.published.why, result=result)
