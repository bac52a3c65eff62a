"""Backfill: the plan, the order, what is skipped, and what stops it; with stand-ins for the verbs."""

from datetime import UTC, date, datetime
from pathlib import Path

import pytest

import flows.backfill
from flows.backfill import NightOutcome, PlannedNight, backfill, plan, told_to
from flows.config import RetrainConfig
from tasks.errors import DataRejected, ExpectationsFailed, InvalidConfig, NotEnoughHistory, ParityBroken
from tasks.references import Place, ReleaseRow
from tests.flows.verbs import stand_in
from tests.world import write_world


@pytest.fixture
def config(tmp_path: Path) -> RetrainConfig:
    return RetrainConfig.model_validate(write_world(tmp_path, nights=4).config)


def day(number: int) -> date:
    return date(2026, 3, number)


def release(made_by: RetrainConfig, number: int, **changes: object) -> ReleaseRow:
    row = {
        "release": f"{number:064x}", "night": day(number), "created": datetime(2026, 4, 1, tzinfo=UTC), "go": True,
        "champion": False, "parent": None, "config": made_by.digest(), "report": "r",
    }  # fmt: skip
    return ReleaseRow.model_validate({**row, **changes})


def publish(monkeypatch: pytest.MonkeyPatch, *rows: ReleaseRow) -> None:
    def listed(place: Place) -> tuple[ReleaseRow, ...]:
        return rows

    monkeypatch.setattr(flows.backfill, "releases", listed)


def test_nights_without_a_partition_and_finished_ones_are_skipped(
    config: RetrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, release(config, 2))
    planned = plan(config, day(1), day(5), promote=False)
    assert [entry.night for entry in planned] == [day(1), day(2), day(3), day(4), day(5)]
    assert [entry.runs for entry in planned] == [True, False, True, True, False]
    assert planned[1].why == "finished: release 000000000000"
    assert planned[4].why == "the lake has no such night"


def test_a_night_finished_under_another_config_runs_again(
    config: RetrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, release(config, 2, config="0" * 64))
    assert plan(config, day(2), day(2), promote=False)[0].runs


@pytest.mark.parametrize(
    ("promote", "go", "champion", "runs"),
    [(True, True, 1, True), (False, True, 1, False), (True, False, 1, False), (True, True, 3, False)],
)
def test_a_finished_night_is_promoted_if_asked_for_and_never_backwards(
    config: RetrainConfig, monkeypatch: pytest.MonkeyPatch, promote: bool, go: bool, champion: int, runs: bool
) -> None:
    publish(monkeypatch, release(config, 2, go=go), release(config, champion, champion=True))
    assert plan(config, day(2), day(2), promote=promote)[0].runs is runs


def test_a_range_that_ends_before_it_starts_is_refused(config: RetrainConfig) -> None:
    with pytest.raises(InvalidConfig, match="start lies after end"):
        plan(config, day(2), day(1), promote=False)


@pytest.mark.usefixtures("prefect")
class TestThroughPrefect:
    """The flow, run by Prefect's engine."""

    def test_nights_run_in_order_and_the_plan_is_told_first(
        self, config: RetrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(monkeypatch, release(config, 2))
        calls = stand_in(monkeypatch)
        told: list[tuple[PlannedNight, ...] | NightOutcome] = []
        with told_to(told.append):
            result = backfill(config, day(1), day(4), promote=True)
        assert told == [result.plan, *result.outcomes]
        assert [(outcome.night.day, outcome.state) for outcome in result.outcomes] == [
            (1, "released"), (2, "released"), (3, "released"), (4, "released"),
        ]  # fmt: skip
        assert [args[-1] for name, args, _ in calls if name == "ingest"] == [day(1), day(2), day(3), day(4)]
        assert all(args[-2] is True for name, args, _ in calls if name == "publish")

    def test_a_dry_run_calls_nothing(self, config: RetrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        publish(monkeypatch)
        calls = stand_in(monkeypatch)
        result = backfill(config, day(1), day(4), dry_run=True)
        assert (len(result.plan), result.outcomes, calls) == (4, (), [])

    def test_the_pointer_stays_unless_told(self, config: RetrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        publish(monkeypatch)
        calls = stand_in(monkeypatch)
        backfill(config, day(1), day(1))
        assert calls.named("publish")[0][-2] is False

    def test_a_refused_night_is_named_and_the_others_go_on(
        self, config: RetrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(monkeypatch)
        calls = stand_in(monkeypatch, failing={day(2): ExpectationsFailed("too many bad rows")})
        with pytest.raises(DataRejected, match="1 of 3 nights were refused") as caught:
            backfill(config, day(1), day(3))
        assert "2026-03-02: ExpectationsFailed: too many bad rows" in str(caught.value)
        assert [args[2].night.day for name, args, _ in calls if name == "publish"] == [1, 3]

    def test_nights_with_too_little_history_are_skipped(
        self, config: RetrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(monkeypatch)
        stand_in(monkeypatch, failing={day(1): NotEnoughHistory("first night that can run: 2026-03-02")})
        outcomes = backfill(config, day(1), day(2)).outcomes
        assert (outcomes[0].state, outcomes[0].why) == ("skipped", "first night that can run: 2026-03-02")
        assert outcomes[1].state == "released"

    def test_what_is_not_about_data_stops_it(self, config: RetrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        publish(monkeypatch)
        calls = stand_in(monkeypatch, failing={day(2): ParityBroken("1e-2")})
        with pytest.raises(ParityBroken):
            backfill(config, day(1), day(3))
        assert [args[-1].day for name, args, _ in calls if name == "ingest"] == [1, 2]
