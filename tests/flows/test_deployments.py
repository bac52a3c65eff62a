"""Every deployment in infra/prefect.yaml fits its flow: a typo fails here, and not at 02:00."""

from importlib import import_module
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect import Flow
from prefect.client.schemas.schedules import CronSchedule

from flows.cli import prefect_command
from flows.config import load_config

ROOT = Path(__file__).parent.parent.parent
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())["deployments"]
WHEN_RUN = {"backfill": {"start": "1998-04-16", "end": "1998-04-22"}}
"""What a person adds when he starts a deployment by hand."""


def flow_of(deployment: dict[str, Any]) -> Flow[Any, Any]:
    module, _, name = deployment["entrypoint"].rpartition(".")
    found = getattr(import_module(module), name)
    assert isinstance(found, Flow)
    return found


@pytest.fixture(params=DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def deployment(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def test_there_are_a_nightly_one_and_a_backfill() -> None:
    assert {entry["name"] for entry in DEPLOYMENTS} == {"nightly", "backfill"}


def test_its_parameters_fit_the_flow(deployment: dict[str, Any]) -> None:
    flow, given = flow_of(deployment), {**deployment["parameters"], **WHEN_RUN.get(deployment["name"], {})}
    assert set(given) == set(flow.parameters.properties), "every parameter is written down, and no other"
    assert set(deployment["parameters"]) >= set(flow.parameters.required) - set(WHEN_RUN.get(deployment["name"], {}))
    assert flow.validate_parameters(given)


def test_a_parameter_of_the_wrong_type_would_be_refused(deployment: dict[str, Any]) -> None:
    from prefect.exceptions import ParameterTypeError

    given = {**deployment["parameters"], **WHEN_RUN.get(deployment["name"], {}), "promote": "perhaps"}
    with pytest.raises(ParameterTypeError):
        flow_of(deployment).validate_parameters(given)


def test_its_config_is_there_and_fits(deployment: dict[str, Any]) -> None:
    load_config(ROOT / deployment["parameters"]["config"])


def test_its_entry_point_is_a_module_path(deployment: dict[str, Any]) -> None:
    assert ":" not in deployment["entrypoint"]


def test_its_schedules_have_a_zone(deployment: dict[str, Any]) -> None:
    for schedule in deployment["schedules"]:
        assert CronSchedule(**schedule).cron
        ZoneInfo(schedule["timezone"])
    assert bool(deployment["schedules"]) == (deployment["name"] == "nightly")


def test_the_command_line_names_it_as_it_is_called(deployment: dict[str, Any]) -> None:
    called = f"{flow_of(deployment).name}/{deployment['name']}"
    assert called in (ROOT / "flows" / "cli.py").read_text()
    assert called in prefect_command(called, {})
