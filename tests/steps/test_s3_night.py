"""A whole night with lake and store in S3 is the night of a directory, to the byte."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.config import RetrainConfig
from flows.nightly import NightResult
from tasks.clients.object_store import open_store
from tasks.release.manifest import pointer_key
from tasks.serving.ranker import Ranker
from tests.s3_server import S3Server
from tests.steps.plain import plain_night
from tests.world import World, write_world


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with S3Server(tmp_path / "server") as server:
        server.make_bucket("nights")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield "s3://nights"


def moved(world: World, **changes: object) -> RetrainConfig:
    """The world's config with other places."""
    tree = world.config | {"gate": {"when_unsure": "promote", "margin": 10.0}}
    tree |= {name: value for name, value in changes.items() if name != "source"}
    if "source" in changes:
        tree["data"] = tree["data"] | {"source": changes["source"]}
    return RetrainConfig.model_validate(tree)


def test_lake_and_store_in_s3_give_the_release_that_directories_give(tmp_path: Path, bucket: str) -> None:
    world = write_world(tmp_path / "world", nights=5, users=24)
    night = world.nights[-1]
    lake = open_store(f"{bucket}/lake")
    source = Path(world.config["data"]["source"])
    for file in sorted(source.rglob("*.parquet")):
        assert lake.put_file_if_absent(file.relative_to(source).as_posix(), file)

    local: NightResult = plain_night(moved(world), night)
    remote: NightResult = plain_night(
        moved(world, source=f"{bucket}/lake", store=f"{bucket}/store", scratch=str(tmp_path / "elsewhere")), night
    )

    assert remote.published.release == local.published.release
    assert [step.digest for step in remote.steps[:-1]] == [step.digest for step in local.steps[:-1]]
    assert open_store(f"{bucket}/store").exists(pointer_key("tiny"))
    with Ranker(f"{bucket}/store", "tiny", device="cpu") as ranker:
        assert ranker.release == remote.published.release
