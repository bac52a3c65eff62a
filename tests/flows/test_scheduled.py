"""A real Prefect server and a real worker: a scheduled night completes by itself, and a backfill runs by deployment."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import yaml

from flows.config import RetrainConfig
from tasks.releases import releases
from tests.ports import free_ports
from tests.prefect_homes import home_with
from tests.shared import lend_graph
from tests.world import World, write_world

ROOT = Path(__file__).parent.parent.parent
PREFECT = str(Path(sys.executable).parent / "prefect")
LAG = 2


def until(what: str, limit_seconds: float, look: Callable[[], Any], logs: Path) -> Any:
    """What ``look`` finds, as soon as it finds something."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.5)
    told = "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(logs.glob("*.log")))
    raise AssertionError(f"waited {limit_seconds} s for {what}\n{told}")


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    """A process with its children, ended with the block."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class House:
    """A server with a worker and our deployments."""

    def __init__(self, api: str, environment: dict[str, str], logs: Path) -> None:
        self.api, self.environment, self.logs = api, environment, logs

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        request = Request(f"{self.api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        for _ in range(20):
            try:
                with urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or "null")
            except HTTPError as error:
                if error.code != 503:  # its database is busy, nothing was done, and it says when to ask again
                    raise
                time.sleep(float(error.headers.get("Retry-After", 1)))
        raise AssertionError(f"{path}: the server was busy twenty times")

    def prefect(self, *words: str) -> str:
        done = subprocess.run(
            [PREFECT, *words], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def runs_of(self, deployment: str, states: dict[str, list[str]]) -> list[dict[str, Any]]:
        """The first few runs in these states; a schedule has dozens that wait."""
        found: list[dict[str, Any]] = self.ask(
            "/flow_runs/filter",
            {
                "deployments": {"name": {"any_": [deployment]}},
                "flow_runs": {"state": {"type": states}},
                "sort": "EXPECTED_START_TIME_ASC",
                "limit": 5,
            },
        )
        return found

    def begun(self, deployment: str) -> list[dict[str, Any]]:
        return self.runs_of(deployment, {"not_any_": ["SCHEDULED", "PENDING"]})

    def ended(self, deployment: str) -> list[dict[str, Any]]:
        return self.runs_of(deployment, {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]})


def yesterday() -> date:
    return datetime.now(UTC).date() - timedelta(days=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Six nights, the last of them yesterday: the schedule says which one is tonight's."""
    return write_world(tmp_path_factory.mktemp("lake"), nights=6, first_night=yesterday() - timedelta(days=5))


def deployments(config: Path, schedule: dict[str, Any]) -> str:
    """Our prefect.yaml with another config and schedule: nobody waits for 04:30."""
    tree = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())
    for deployment in tree["deployments"]:
        deployment["parameters"]["config"] = str(config)
        if deployment["schedules"]:
            deployment["schedules"] = [schedule]
    return yaml.safe_dump(tree)


@pytest.fixture(scope="module")
def house(
    world: World,
    prefect_database: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump({**world.config, "night_lag_days": LAG}))
    port = free_ports(1)[0]
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home_with(prefect_database, folder / "home")),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    house = House(environment["PREFECT_API_URL"], environment, folder)

    def is_up() -> bool:
        try:
            with urlopen(f"{house.api}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, ConnectionError, TimeoutError):
            return False

    server = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running(server, folder / "server.log", environment):
        until("the server", 90, is_up, folder)
        house.ask("/work_pools/", {"name": "nightrank", "type": "process"})
        # Asked for this late, another worker may have made them meanwhile.
        lend_graph(request.getfixturevalue("finished").config.store, world.config["store"])
        soon = datetime.now(UTC) + timedelta(seconds=15)
        (folder / "prefect.yaml").write_text(deployments(config, {"interval": 100, "anchor_date": soon.isoformat()}))
        house.prefect("--no-prompt", "deploy", "--prefect-file", str(folder / "prefect.yaml"), "--all")
        with running([PREFECT, "worker", "start", "--pool", "nightrank"], folder / "worker.log", environment):
            yield house


@pytest.fixture(scope="module")
def scheduled(house: House) -> dict[str, Any]:
    """The first scheduled run, once it has ended; no second one follows it."""
    first = until("a scheduled run to start", 240, lambda: house.begun("nightly"), house.logs)[0]
    house.ask(f"/deployments/{first['deployment_id']}/pause_deployment", {})
    ended = until(
        "the scheduled run to end",
        240,
        lambda: [run for run in house.ended("nightly") if run["id"] == first["id"]],
        house.logs,
    )
    run: dict[str, Any] = ended[0]
    return run


def test_a_scheduled_night_completes_by_itself(scheduled: dict[str, Any], house: House) -> None:
    assert scheduled["state_type"] == "COMPLETED", (house.logs / "worker.log").read_text()[-4000:]
    assert scheduled["auto_scheduled"]


def test_its_night_is_the_scheduled_local_date_less_the_lag(scheduled: dict[str, Any], world: World) -> None:
    night = datetime.fromisoformat(scheduled["expected_start_time"]).date() - timedelta(days=LAG)
    assert [row.night for row in releases(RetrainConfig.model_validate(world.config).place())] == [night]
    assert scheduled["name"] == f"tiny {night.isoformat()}"


@pytest.mark.usefixtures("scheduled")
def test_a_backfill_runs_by_deployment(house: House, world: World) -> None:
    start, end = world.nights[-2], world.nights[-1]  # the scheduled one, and the one after
    parameters = [f"{name}={json.dumps(value.isoformat())}" for name, value in (("start", start), ("end", end))]
    house.prefect("deployment", "run", "backfill/backfill", *(word for one in parameters for word in ("--param", one)))
    run = until("the backfill to end", 240, lambda: house.ended("backfill"), house.logs)[0]
    assert run["state_type"] == "COMPLETED", (house.logs / "worker.log").read_text()[-4000:]
    made = {row.night: row for row in releases(RetrainConfig.model_validate(world.config).place())}
    assert set(made) >= {start, end}
    assert made[end].parent == made[start].release
    assert [made[night].champion for night in (start, end)] == [True, False], "the pointer moves only with promote"
