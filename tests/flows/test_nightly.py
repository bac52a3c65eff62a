"""The night: its steps in order, its date, and the config it takes; with stand-ins for the verbs."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import RetrainConfig
from flows.nightly import night_of, nightly_retrain
from tasks.errors import ExpectationsFailed, InvalidConfig
from tasks.references import Place
from tests.flows.verbs import NIGHT, ORDER, stand_in
from tests.world import write_world


@pytest.fixture
def config(tmp_path: Path) -> RetrainConfig:
    return RetrainConfig.model_validate(write_world(tmp_path, nights=1).config)


def test_the_steps_come_in_order(config: RetrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch)
    result = nightly_retrain.fn(config, NIGHT)
    assert [name for name, _, _ in calls] == ORDER
    assert [kwargs["bank"] for name, _, kwargs in calls if name == "adapt"] == ["exam", "ship"]
    assert [step.step for step in result.steps] == [*ORDER[:4], "adapt-exam", *ORDER[5:7], "adapt-ship", *ORDER[8:]]
    assert result.published.release == "a" * 64


def test_a_verb_gets_the_place_and_its_own_sections_and_never_the_whole_config(
    config: RetrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(monkeypatch)
    nightly_retrain.fn(config, NIGHT)
    for _, args, kwargs in calls:
        assert isinstance(args[0], Place)
        assert not any(isinstance(value, RetrainConfig) for value in (*args, *kwargs.values()))


def test_only_the_shipped_bank_sees_the_exam(config: RetrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch)
    nightly_retrain.fn(config, NIGHT)
    exam_bank, ship_bank = (kwargs for name, _, kwargs in calls if name == "adapt")
    assert "exam" not in exam_bank
    assert ship_bank["exam"].step == "evaluate"


def test_the_pointer_moves_only_under_this_runs_token(config: RetrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    for promote in (True, False):
        calls = stand_in(monkeypatch)
        nightly_retrain.fn(config, NIGHT, promote)
        args, _ = calls.named("publish")
        assert args[-2] is promote
        assert args[-3] == config.digest()
        tokens.append(args[-1])
    assert tokens[1] > tokens[0]


@pytest.mark.parametrize(
    ("scheduled", "zone", "lag", "night"),
    [
        (datetime(2026, 3, 6, 2, 0, tzinfo=UTC), "UTC", 1, date(2026, 3, 5)),
        (datetime(2026, 3, 6, 2, 0, tzinfo=UTC), "UTC", 0, date(2026, 3, 6)),
        (datetime(2026, 3, 5, 23, 30, tzinfo=UTC), "Europe/Berlin", 1, date(2026, 3, 5)),
        (datetime(2026, 3, 6, 2, 0, tzinfo=UTC), "America/New_York", 1, date(2026, 3, 4)),
        # Clocks go forward at 01:00 UTC: still one calendar day a night.
        (datetime(2026, 3, 29, 0, 30, tzinfo=UTC), "Europe/Berlin", 1, date(2026, 3, 28)),
        (datetime(2026, 3, 29, 22, 30, tzinfo=UTC), "Europe/Berlin", 1, date(2026, 3, 29)),
    ],
)
def test_the_night_is_the_scheduled_local_date_less_the_lag(
    config: RetrainConfig, scheduled: datetime, zone: str, lag: int, night: date
) -> None:
    data = config.data.model_copy(update={"time_zone": zone})
    assert night_of(scheduled, config.model_copy(update={"data": data, "night_lag_days": lag})) == night


@pytest.mark.usefixtures("prefect")
class TestThroughPrefect:
    """The same flow, run by Prefect's engine."""

    def test_a_dict_a_path_and_a_model_are_the_same_config(
        self, config: RetrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        calls = stand_in(monkeypatch)
        for given in (config, config.model_dump(mode="json"), str(path)):
            nightly_retrain(given, NIGHT.isoformat())  # type: ignore[arg-type]
        expected = (config.place(), config.data, config.gate, NIGHT)
        assert [args for name, args, _ in calls if name == "ingest"] == [expected] * 3

    def test_without_a_night_it_is_derived_and_the_run_is_named_after_it(
        self, config: RetrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in(monkeypatch)
        state = nightly_retrain(config, return_state=True)
        night: Any = state.result().night
        today = datetime.now(UTC).date()
        assert (today - night).days in (1, 2)  # 2 only if midnight passed in between

    def test_an_error_of_the_family_comes_out_as_itself(
        self, config: RetrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in(monkeypatch, failing={NIGHT: ExpectationsFailed("liked is all null")})
        with pytest.raises(ExpectationsFailed, match="liked is all null"):
            nightly_retrain(config, NIGHT)

    def test_a_config_that_is_not_there_is_said_to_be_so(self) -> None:
        with pytest.raises(InvalidConfig, match="does not exist"):
            nightly_retrain("no/such.yaml", NIGHT)
