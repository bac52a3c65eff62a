"""The whole night on one screen."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from prefect import flow, runtime

from flows.config import RetrainConfig, load_config
from tasks.adapt import adapt
from tasks.data.contract import Section
from tasks.errors import InvalidConfig
from tasks.evaluate import evaluate, judge
from tasks.export import export
from tasks.ingest import ingest
from tasks.meta_train import meta_train
from tasks.prepare import prepare
from tasks.publish import publish
from tasks.recommend import recommend
from tasks.references import FinishedSteps, PrepareRef, PublishRef, RetentionRef, StepRef, ValidateRef, VerdictRef
from tasks.retention import check_retention
from tasks.steps import hold
from tasks.tensorboard import check as check_tensorboard
from tasks.tensorboard import write_verdict
from tasks.validate import validate
from tasks.variants import try_variants


class NightResult(Section):
    """What a night came to."""

    night: date
    validated: ValidateRef
    prepared: PrepareRef
    retention: RetentionRef
    verdict: VerdictRef
    published: PublishRef
    steps: tuple[StepRef, ...]
    """Every step in order, as a reference without its own fields."""


def resolve(config: RetrainConfig | str) -> RetrainConfig:
    """The config itself, or the one in the file of that path.

    Raises:
        InvalidConfig: the file does not hold one.
    """
    return load_config(config) if isinstance(config, str) else config


def night_of(scheduled: datetime, config: RetrainConfig) -> date:
    """The night that a run scheduled for this moment works on: its local date less ``night_lag_days``."""
    return scheduled.astimezone(ZoneInfo(config.data.time_zone)).date() - timedelta(days=config.night_lag_days)


def _run_name() -> str:
    """Name the run after its pipeline and night, as an operator looks for it."""
    parameters: Mapping[str, Any] = runtime.flow_run.parameters
    night = parameters["night"]
    with suppress(InvalidConfig):  # the run itself is about to say it
        config = resolve(parameters["config"])
        return f"{config.pipeline} {night or night_of(runtime.flow_run.scheduled_start_time, config)}"
    return f"night {night}"


@flow(name="nightly-retrain", flow_run_name=_run_name, validate_parameters=True, persist_result=False)
def nightly_retrain(
    config: RetrainConfig | str, night: date | None = None, promote: bool = True, override: str | None = None
) -> NightResult:
    """Take in a night, learn from it, prove what was learned, and publish it.

    Args:
        config: the pipeline's config, or the path of its file.
        night: the night to work on; none: the scheduled local date less `night_lag_days`.
        promote: whether the pointer moves when the gate agrees.
        override: an operator's reason to release although the gate holds; it is recorded with the release.

    Raises:
        NightrankError: one of the family; the last good release stays in place.
    """
    config = resolve(config)
    config.baselines.check()  # now, not after the training that they are to be compared with
    check_tensorboard(config.training)
    night = night or night_of(runtime.flow_run.scheduled_start_time, config)
    place, data, segments, adapter, gate = config.place(), config.data, config.segments, config.adapter, config.gate
    settings = config.export
    with hold(place) as lease:
        ingested = ingest(place, data, gate, night, config.digest())
        validated = validate(place, data, ingested)
        prepared = prepare(place, data, segments, config.statistics, ingested, validated)
        base = meta_train(place, data, segments, config.ranker, config.training, adapter, ingested, prepared)
        bank = adapt(place, data, segments, adapter, prepared, base, bank="exam")
        exam = evaluate(place, data, segments, config.baselines, gate, ingested, prepared, base, bank)
        lists = recommend(place, data, segments, config.statistics, config.baselines, ingested, prepared, base, bank)
        retention = check_retention(place, data, segments, gate, ingested, prepared, base)
        verdict = judge(place, data, segments, adapter, gate, ingested, validated, prepared, exam, retention)
        write_verdict(config.training, place, night, verdict)
        tried = try_variants(
            place, data, segments, config.statistics, settings, ingested, validated, prepared, base, bank, exam
        )
        ship = adapt(place, data, segments, adapter, prepared, base, bank="ship", exam=exam, held=ingested.held)
        exported = export(place, data, segments, config.statistics, settings, ingested, validated, prepared, base, ship)
        done = FinishedSteps(
            ingested=ingested, validated=validated, prepared=prepared, base=base, bank=bank,
            exam=exam, lists=lists, retention=retention, verdict=verdict, variants=tried, ship=ship, exported=exported,
        )  # fmt: skip
        published = publish(place, data, gate, settings, done, config.digest(), promote, override, lease.token)
    shared = [{name: getattr(ref, name) for name in StepRef.model_fields} for ref in (*done.in_order, published)]
    return NightResult(
        night=night,
        validated=validated,
        prepared=prepared,
        retention=retention,
        verdict=verdict,
        published=published,
        steps=tuple(StepRef(**fields) for fields in shared),
    )
